"""What only a GPU shows: steered decoding under CUDA graphs, and the heavy work at its speed.

    python benchmarks/gpu.py [decoding] [batch] [large] [recording] [probes] [solving] [reader] \
        [sharding]

All parts by default. Every ratio is taken in one run on one device, whose name is kept with the
numbers. "large" is a model of the shape of Llama 3 8B with random weights in bfloat16: time does
not hang on what they are. The rest is the embedded model.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import best_of, chats, check, save

import trimtab as tt
from trimtab import latentqa, selfcontrol

TOKENS = 128
PROMPT = "Write a long story about a dog that crosses a mountain range in winter."
Rows = list[dict[str, Any]]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; this benchmark is about one")
    parts: dict[str, Callable[[], Rows]] = {
        "decoding": lambda: decoding(1),
        "batch": lambda: decoding(32),
        "large": large,
        "recording": recording,
        "probes": probes,
        "solving": solving,
        "reader": reader,
        "sharding": sharding,
    }
    for name in sys.argv[1:] or parts:
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        save(f"gpu-{name}", parts[name]())
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
        torch.cuda.empty_cache()


def told(name: str, value: float) -> dict[str, Any]:
    """A number that has no budget."""
    print(f"     {name}: {value:.4g}", flush=True)
    return {"name": name, "value": round(value, 4)}


def direction(lm: tt.LM, layers: int) -> torch.Tensor:
    made = torch.randn(layers, lm.width, generator=torch.Generator().manual_seed(0))
    return made / made.norm(dim=-1, keepdim=True)


# -- decoding --------------------------------------------------------------------------------------


def decoding(count: int) -> Rows:
    """The embedded model in bfloat16."""
    plain = tt.models.load("smollm2-135m", dtype="bfloat16")[0]
    lm = tt.LM.load("smollm2-135m", dtype="bfloat16")
    return steered(f"135M, {count} rows", plain, lm, lm.batch([PROMPT] * count))


def large() -> Rows:
    """A model of 8 billion parameters, one row: here reading the weights takes the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    lm = tt.LM(model)
    rows = steered("8B", model, lm, tt.Batch(ids))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size -= model.get_input_embeddings().weight.nbytes  # one row of it is read
    fastest = size / bandwidth()
    taken = next(r["value"] for r in rows if "milliseconds" in r["name"])
    return [
        *rows,
        told(
            "8B: time of a steered token, in that of reading the weights once",
            taken / 1000 / fastest,
        ),
    ]


def bandwidth() -> float:
    """Bytes a second that the device reads: a sum over 8 GiB."""
    data = torch.ones(2**32, dtype=torch.bfloat16, device="cuda")
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        data.view(torch.int64).sum()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return data.nbytes / min(times)


def steered(name: str, plain: Any, lm: tt.LM, batch: tt.Batch) -> Rows:
    """Eager and compiled decoding under an edit, in the time of transformers' ``generate``."""
    batch, count = batch.to(lm.device), len(batch)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    layers = lm.n_layers * 2 // 3
    w = direction(lm, layers)
    many = [
        tt.Add(f"resid@2:{2 + layers}", (0.01 + 1e-3 * i) * w, relative=True, keep_norm=True)
        for i in range(count)
    ]  # another one in each row

    def ours() -> Any:
        return lm.generate_ids(batch, many, TOKENS)

    times = best_of(
        {
            "transformers generate": partial(plain.generate, **inputs, **options),
            "no edit": lambda: lm.generate_ids(batch, None, TOKENS),
            "steered": ours,
        },
        3,
    )
    eager = ours()
    lm.compile(mode="reduce-overhead")  # CUDA graphs
    graphs = torch._dynamo.utils.counters["stats"]
    begun = time.perf_counter()
    assert lm._compiled is not None and lm._compiled.supported(), "this model decodes uncompiled"
    found = ours()
    print(f"  compiling took {time.perf_counter() - begun:.1f} s")
    before = graphs["unique_graphs"]
    others = [lm.generate_ids(batch, 2.0 * i * many[0], 8) for i in range(-10, 10)]
    times |= best_of({"steered, CUDA graphs": ours}, 5)
    assert all(len(row) == TOKENS for row in found), "a row ended early"
    same = sum(a == b for a, b in zip(eager, found, strict=True))
    base, best = times["transformers generate"], times["steered, CUDA graphs"]
    return [
        check(
            f"{name}: transformers generate / steered", base / times["steered"], 0.9, at_least=True
        ),
        check(
            f"{name}: transformers generate / steered with CUDA graphs",
            base / best,
            2.0,
            at_least=True,
        ),
        told(f"{name}: no edit / steered", times["no edit"] / times["steered"]),
        check(
            f"{name}: new graphs over 20 edits", graphs["unique_graphs"] - before, 0, at_least=False
        ),
        told(f"{name}: other texts among these 20 edits", len({str(f) for f in others})),
        told(f"{name}: rows of the eager text, of {count}", same),
        told(f"{name}: milliseconds for a steered token of each row", 1000 * best / TOKENS),
        told(f"{name}: steered tokens a second", count * TOKENS / best),
    ]


# -- reading ---------------------------------------------------------------------------------------


def recording() -> Rows:
    """Chats through all layers, beside a bare forward pass over the same tokens."""
    rows, examples = [], chats(2048)
    for dtype in ("float32", "bfloat16"):
        lm = tt.LM.load("smollm2-135m", dtype=dtype)
        encoded = sorted((e.ids for e in lm._encode(examples)), key=len)
        tokens = sum(map(len, encoded))

        @torch.no_grad()
        def bare(lm: tt.LM = lm, encoded: list[list[int]] = encoded) -> None:
            for start in range(0, len(encoded), 64):
                part = encoded[start : start + 64]
                width = max(map(len, part))
                ids = torch.tensor([[0] * (width - len(r)) + r for r in part], device="cuda")
                lm.model.model(input_ids=ids, use_cache=False)
            torch.cuda.synchronize()

        def ours(lm: tt.LM = lm) -> Any:
            place = "resid@all answer[:16]"
            return lm.record(examples, place, batch_size=64, show_progress=False)

        times = best_of({"bare forward passes": bare, "record all layers": ours}, 3)
        name = f"{len(examples)} chats, {dtype}"
        ratio = times["bare forward passes"] / times["record all layers"]
        rows += [
            check(f"{name}: bare forward / record", ratio, 0.5, at_least=True),
            told(f"{name}: tokens a second", tokens / times["record all layers"]),
        ]
    return rows


def probes() -> Rows:
    """All layers' probes from a recording: the device, beside the CPU of the same machine."""
    lm = tt.LM.load("smollm2-135m", dtype="float32")
    examples = chats(1024)
    labels = [e.label for e in examples]
    rec = lm.record(examples, "norm@all answer[:16]", show_progress=False)
    rows = [told("answer tokens", sum(rec.lengths))]
    for method in ("mean", "logistic", "pca"):
        fit = partial(tt.concepts.fit_recording, rec, labels, method)
        times = best_of({d: partial(fit, device=d) for d in ("cpu", "cuda")}, 2)
        a, b = (fit(device=d).weight for d in ("cpu", "cuda"))
        cosine = torch.cosine_similarity(a.cpu(), b.cpu(), dim=-1).abs().min()
        rows += [
            told(f"{method}: seconds on the GPU, 30 layers", times["cuda"]),
            told(f"{method}: CPU / GPU", times["cpu"] / times["cuda"]),
            check(f"{method}: least cosine of the two", float(cosine), 0.999, at_least=True),
        ]
    return rows


# -- self-control ----------------------------------------------------------------------------------


def solving() -> Rows:
    """Prompts together against one after another."""
    lm = tt.LM.load("smollm2-135m", dtype="bfloat16")
    judge = selfcontrol.Judge.named("happiness")
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id = None
    lm.text_config.eos_token_id = None
    options = dict(steps=1, search=3, max_new_tokens=48, max_perplexity_ratio=math.inf)
    prompts = [f"You find {n} coins on the way home. How do you feel?" for n in range(2, 66)]
    rows = []
    for count in (8, 64):
        some = prompts[:count]
        times = best_of(
            {
                "one by one": lambda: [
                    selfcontrol.solve(lm, p, judge, **options) for p in prompts[:4]
                ],
                "together": partial(selfcontrol.solve, lm, some, judge, **options),
            },
            2,
        )
        gain = times["one by one"] / 4 * count / times["together"]
        rows += [
            check(f"throughput of {count} prompts together", gain, 3.0, at_least=True),
            told(f"seconds of {count} prompts together", times["together"]),
        ]
    return rows


# -- readers ---------------------------------------------------------------------------------------


def items(count: int) -> list[latentqa.Item]:
    """Items of chats with a question each: what a training step costs, not what it teaches."""
    told = "The small ship turned its rudder and went on. " * 8
    made = []
    for i, chat in enumerate(chats(count)):
        text = f"{chat.prompt} {told}"
        made.append(latentqa.Item(f"{i}", control_user=text, qa=((f"What is it, {i}?", told),)))
    return made


def trained(lm: tt.LM, steps: int, **options: Any) -> tuple[list[float], float]:
    """The losses of some steps, and the seconds of one after the first few."""
    kept: list[dict[str, Any]] = []
    latentqa.train(
        lm,
        items(steps * options.get("batch_size", 32)),
        read_layer=10,
        steps=steps,
        dropout=0.0,
        show_progress=False,
        tracker=kept.append,
        **options,
    )
    return [k["loss"] for k in kept], min(k["seconds"] for k in kept[3:])


def reader() -> Rows:
    """A step of the decoder's training, in float32 and bfloat16."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        lm = tt.LM.load("smollm2-135m", dtype=dtype)
        torch.cuda.reset_peak_memory_stats()
        losses, seconds = trained(lm, 12, batch_size=32, lr=1e-3)
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows += [
            told(f"{dtype}: questions a second, batch 32", 32 / seconds),
            check(f"{dtype}: last loss / first", losses[-1] / losses[0], 1.0, at_least=False),
            told(f"{dtype}: peak GiB of memory", peak),
        ]
    return rows


def sharding() -> Rows:
    """FSDP2 over NCCL, in a group of this one process: the same losses as without."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain, _ = trained(tt.LM.load("smollm2-135m", dtype="float32"), 6, batch_size=8, lr=1e-3)
    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    try:
        lm = tt.LM.load("smollm2-135m", dtype="float32")
        for block in lm.anatomy.blocks:
            fully_shard(block)
        sharded, _ = trained(lm, 6, batch_size=8, lr=1e-3)
    finally:
        dist.destroy_process_group()
    apart = max(abs(a - b) / a for a, b in zip(plain, sharded, strict=True))
    rows = [told("first and last loss", plain[0]), told("last loss", plain[-1])]
    return [*rows, check("sharded: losses' greatest distance", apart, 1e-3, at_least=False)]


if __name__ == "__main__":
    main()
