"""Anatomy: every site is the tensor its name promises, on every architecture of the zoo."""

from __future__ import annotations

import copy
import inspect
from collections import namedtuple
from functools import cache

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import model_zoo
from trimtab.anatomy import Anatomy, find_blocks, first_tensor, with_first
from trimtab.errors import PlaceError
from trimtab.place import SITES, WRITABLE

NAMES = sorted(model_zoo.ARCHITECTURES)
EVERY = sorted(model_zoo.ARCHITECTURES | model_zoo.HYBRIDS)
L = model_zoo.LAYERS

QKV, NORM = {"q", "k", "v"}, {"norm"}
LACKS = {
    **dict.fromkeys(
        ["bloom", "codegen", "falcon", "falcon_new", "gpt2", "gpt_bigcode", "gpt_neox"], QKV
    ),
    **dict.fromkeys(["mpt", "phi3"], QKV),
    **dict.fromkeys(["olmo2", "exaone4", "opt_post_norm"], NORM),
    "deepseek_v3": {"k", "v"},
}
# A norm or a factor lies between the part and the stream, so the parts do not add up as they are.
SCALED_PARTS = {"gemma2", "gemma3", "olmo2", "exaone4", "glm4", "opt_post_norm", "granite"}
# Of one token, attention returns its value, except through a sink (gpt_oss) or a gate (qwen3_next).
MIXED_VALUES = {"gpt_oss", "qwen3_next"}


@cache
def model_of(name):
    return model_zoo.tiny(name)


def padded_batch(model):
    """Two rows, the second with three left pads; position_ids where the model takes them."""
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13], [0, 0, 0, 21, 22, 23, 24]])
    mask = (ids != model_zoo.PAD).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return batch


def attention_modules(anatomy):
    """The attention module of each layer, found apart from the table under test."""
    names = ("self_attn", "self_attention", "attention", "attn")
    for layer, block in enumerate(anatomy.blocks):
        for name, child in block.named_children():
            if name in names:
                yield layer, child


@torch.no_grad()
def observe(model, **batch):
    """Everything the taps see in one forward, plus ("attention input", layer)."""
    anatomy, seen, handles = Anatomy.of(model), {}, []

    def keep(key, kind):
        def into(module, args, kwargs, *out):
            value = out[0] if kind == "out" else (args or (kwargs.get("hidden_states"),))
            seen[key] = first_tensor(value).clone()

        return into

    taps = {**anatomy.taps}
    taps.update({("attention input", i): (m, "in") for i, m in attention_modules(anatomy)})
    for key, (module, kind) in taps.items():
        add = module.register_forward_hook if kind == "out" else module.register_forward_pre_hook
        handles.append(add(keep(key, kind), with_kwargs=True))
    try:
        run = model(**batch, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return anatomy, seen, run.hidden_states


@cache
def observed(name):
    return observe(model_of(name), **padded_batch(model_of(name)))


def close(a, b):
    return torch.allclose(a, b.reshape(a.shape), atol=1e-4, rtol=1e-4)


def test_the_zoo_is_wide():
    assert len(NAMES) >= 28


@pytest.mark.parametrize("name", EVERY)
def test_structure(name):
    model, anatomy = model_of(name), Anatomy.of(model_of(name))
    assert anatomy.n_layers == len(anatomy.blocks) == L
    assert anatomy.width == model_zoo.HIDDEN
    assert anatomy.blocks is find_blocks(model)
    assert "input_ids" in inspect.signature(anatomy.trunk.forward).parameters
    assert anatomy.trunk in list(model.modules())
    assert set(SITES) - set(anatomy.sites()) == LACKS.get(name, set())
    inside = set(model.modules())
    assert all(module in inside and kind in ("in", "out") for module, kind in anatomy.taps.values())
    assert anatomy.layers("resid") == list(range(L)) and anatomy.layers("embed") == [0]


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_alike(name):
    anatomy = Anatomy.of(model_of(name))
    for site in set(anatomy.sites()) - {"embed"}:
        assert anatomy.layers(site) == list(range(L))


@pytest.mark.parametrize("name", EVERY)
def test_every_tap_fires_with_its_width(name):
    anatomy, seen, _ = observed(name)
    for (site, layer), (module, _) in anatomy.taps.items():
        value = seen[site, layer]
        flat = site == "mlp" and name.startswith("opt")  # OPT flattens tokens before its MLP
        assert value.shape[:-1] == ((14,) if flat else (2, 7))
        if site in WRITABLE:
            assert value.shape[-1] == anatomy.width
        if site == "heads":
            assert value.shape[-1] == getattr(module, "in_features", anatomy.width)


@pytest.mark.parametrize("name", EVERY)
def test_resid_and_embed_are_the_hidden_states(name):
    _, seen, hidden = observed(name)
    assert torch.equal(seen["embed", 0], hidden[0])
    for layer in range(L - 1):
        assert torch.equal(seen["resid", layer], hidden[layer + 1])
    # The control: the last hidden state is after the final norm (or OPT's final projection).
    assert not torch.equal(seen["resid", L - 1], hidden[-1])


@pytest.mark.parametrize("name", EVERY)
def test_attn_and_mlp_are_what_the_block_adds(name):
    anatomy, seen, _ = observed(name)
    for layer in anatomy.layers("attn"):
        before = seen["resid", layer - 1] if layer else seen["embed", 0]
        attn, mlp = seen["attn", layer], seen["mlp", layer].reshape(before.shape)
        assert close(before + attn + mlp, seen["resid", layer]) is (name not in SCALED_PARTS)
        assert not close(before + attn, seen["resid", layer])
        if name == "granite":
            factor = model_of(name).config.residual_multiplier
            assert close(before + factor * (attn + mlp), seen["resid", layer])


@pytest.mark.parametrize("name", EVERY)
def test_norm_is_what_attention_receives(name):
    anatomy, seen, _ = observed(name)
    for layer in anatomy.layers("attn"):
        received = seen["attention input", layer]
        stream = seen["resid", layer - 1] if layer else seen["embed", 0]
        if "norm" in anatomy.sites():
            assert torch.equal(received, seen["norm", layer])
            assert not close(received, stream)
        else:
            assert torch.equal(received, stream)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_heads_projected_are_attn(name):
    anatomy, seen, _ = observed(name)
    for layer in anatomy.layers("heads"):
        project, kind = anatomy.tap("heads", layer)
        assert kind == "in"
        assert close(first_tensor(project(seen["heads", layer])), seen["attn", layer])


@pytest.mark.parametrize("name", [n for n in EVERY if "v" not in LACKS.get(n, ())])
def test_one_token_attends_to_its_own_value(name):
    anatomy, seen, _ = observe(model_of(name), input_ids=torch.tensor([[9]]))
    for layer in anatomy.layers("v"):
        heads, v, k = (seen[site, layer][0, 0] for site in ("heads", "v", "k"))
        config = model_of(name).config
        size = heads.numel() // config.num_attention_heads
        groups = heads.numel() // v.numel()
        repeated = v.view(-1, 1, size).expand(-1, groups, -1).flatten()
        assert close(repeated, heads) is (name not in MIXED_VALUES)
        assert k.shape == v.shape and not close(k, v)


def test_hybrid_layers_differ():
    anatomy = Anatomy.of(model_of("lfm2"))
    assert anatomy.layers("attn") == anatomy.layers("q") == [1, 3]
    assert anatomy.layers("norm") == anatomy.layers("mlp") == [0, 1, 2, 3]
    with pytest.raises(PlaceError, match=r"no site 'attn' in layer 2 \(Lfm2DecoderLayer\).*1, 3"):
        anatomy.tap("attn", 2)
    with pytest.raises(PlaceError, match="no site 'attn' in layer 2"):
        anatomy.tap("attn", -2)
    assert anatomy.tap("attn", -1)[0] is anatomy.blocks[3].self_attn


def test_missing_site_names_those_there():
    with pytest.raises(PlaceError) as caught:
        Anatomy.of(model_of("olmo2")).tap("norm", 0)
    assert str(caught.value) == (
        "no site 'norm' in Olmo2DecoderLayer; it has resid, attn, mlp, embed, q, k, v, heads"
    )
    with pytest.raises(PlaceError, match="no site 'residual' in LlamaDecoderLayer; it has resid"):
        Anatomy.of(model_of("llama")).tap("residual", 0)


@pytest.mark.parametrize("layer", [L, -L - 1])
def test_missing_layer_names_the_range(layer):
    with pytest.raises(PlaceError, match=f"no layer {layer}; this model has 0 to 3"):
        Anatomy.of(model_of("llama")).tap("resid", layer)


def test_embed_is_the_input_of_block_0():
    anatomy = Anatomy.of(model_of("llama"))
    assert anatomy.tap("embed", 0) == (anatomy.blocks[0], "in")
    with pytest.raises(PlaceError, match=r"no site 'embed' in layer 1 .*layers 0 have it"):
        anatomy.tap("embed", 1)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("openai-gpt", dict(n_embd=32, n_layer=L, n_head=4, n_positions=64)),
        (
            "bart",
            dict(
                d_model=32,
                decoder_layers=L,
                encoder_layers=L,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
                is_decoder=True,
                is_encoder_decoder=False,
            ),
        ),
    ],
)
def test_a_norm_after_attention_is_no_norm_site(model_type, settings):
    model = model_zoo.build(model_type, **settings)
    assert "norm" not in Anatomy.of(model).sites()
    children = dict(find_blocks(model)[0].named_children())
    assert "ln_1" in children or "self_attn_layer_norm" in children  # the name alone misleads


def test_lora_changes_no_place():
    peft = pytest.importorskip("peft")
    plain = model_zoo.tiny("llama")
    blocks = find_blocks(plain)
    places = set(Anatomy.of(plain).taps)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], r=2)
    anatomy = Anatomy.of(peft.get_peft_model(plain, config))
    assert anatomy.blocks is blocks
    assert set(anatomy.taps) == places
    assert anatomy.trunk is plain.model
    assert anatomy.tap("mlp", 1)[0] is blocks[1].mlp
    assert hasattr(anatomy.tap("q", 1)[0], "base_layer")  # the adapted output, not the base's


def test_the_text_blocks_of_a_model_that_sees():
    """The vision tower has as many blocks and more parameters; its blocks are not the ones."""
    size = dict(num_hidden_layers=L, num_attention_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, image_size=16, patch_size=8, **size
    )
    text = LlamaConfig(hidden_size=32, intermediate_size=64, vocab_size=512, **size)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    anatomy = Anatomy.of(model)
    assert anatomy.blocks is model.model.language_model.layers
    assert anatomy.trunk is model.model.language_model
    assert anatomy.width == 32


class Wrapped(nn.Module):
    """A wrapper without a config of its own, as DistributedDataParallel is."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_inside_a_wrapper():
    model = model_of("gpt2")
    anatomy = Anatomy.of(Wrapped(model))
    assert anatomy.blocks is model.transformer.h and anatomy.trunk is model.transformer


def test_a_module_without_config():
    block = nn.Module()
    block.attn = nn.Linear(8, 8)
    model = nn.Module()
    model.embedding = nn.Embedding(10, 8)
    model.body = nn.ModuleList(copy.deepcopy(block) for _ in range(3))
    anatomy = Anatomy.of(model)
    assert (anatomy.n_layers, anatomy.width, anatomy.trunk) == (3, 8, model)
    assert anatomy.sites() == ["resid", "attn", "embed"]


def test_no_blocks():
    with pytest.raises(
        PlaceError, match=r"found no list of decoder blocks.*Sequential.*ModuleList"
    ):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
    lopped = model_zoo.tiny("llama")
    lopped.model.layers = lopped.model.layers[:3]
    with pytest.raises(PlaceError, match=r"found no list of 4 decoder blocks .*LlamaForCausalLM"):
        find_blocks(lopped)


Pair = namedtuple("Pair", "hidden weights")
X, Y = torch.arange(6.0).view(1, 2, 3), torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    "out",
    [
        X,
        (X,),
        (X, None),
        [X, "rest"],
        Pair(X, None),
        ((X, 1), 2),
        {"hidden": X, "rest": 1},
        BaseModelOutput(last_hidden_state=X, hidden_states=(X,)),
    ],
    ids=lambda out: type(out).__name__,
)
def test_first_tensor_of_any_output(out):
    assert first_tensor(out) is X
    changed = with_first(out, Y)
    assert type(changed) is type(out) and first_tensor(changed) is Y
    assert first_tensor(out) is X  # the given container is left alone
    if not isinstance(out, torch.Tensor):
        assert len(changed) == len(out)


@pytest.mark.parametrize("out", [None, (), [], {}, 3, (None, X), "text"])
def test_an_output_without_a_first_tensor(out):
    for call in (first_tensor, lambda out: with_first(out, Y)):
        with pytest.raises(PlaceError, match="expected a tensor"):
            call(out)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_zoo_model_is_fit_for_laws(name):
    """Left pads change nothing, the cache changes nothing, and logits are far from constant."""
    model = model_of(name)
    batch = padded_batch(model)
    logits = model(**batch).logits
    alone = model(input_ids=batch["input_ids"][1:, 3:]).logits
    assert logits.isfinite().all() and logits.std(-1).min() > 0.5
    assert close(logits[1, 3:], alone[0]) and not close(logits[1, 3:], logits[0, 3:])
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    cached = model.generate(**prompt, do_sample=False, max_new_tokens=6)
    plain = model.generate(**prompt, do_sample=False, max_new_tokens=6, use_cache=False)
    assert cached.shape == (2, 13) and torch.equal(cached, plain)


def test_zoo_seeds():
    state = torch.get_rng_state()
    a, b, other = (model_zoo.tiny("llama", seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)
    assert model_zoo.tiny("gpt2", vocab_size=64).lm_head.weight.shape == (64, model_zoo.HIDDEN)
