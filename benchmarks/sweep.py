"""Speed of a sweep: 17 scales x 64 prompts in shared batches, against one patched model per scale.

    python benchmarks/sweep.py [--scales 17] [--prompts 64] [--tokens 32] [--sample 4]

The reference patches the model with a hook that holds one scale, answers prompt by prompt with
transformers' own ``generate``, and takes the hook off again, as the published code does. It runs on
``--sample`` of the prompts and its time is multiplied; its texts must be equal. A second reference
gives each patched model all prompts as one batch.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
import torch

import trimtab as tt

LAYERS = range(5, 22)


def hooked(lm: tt.LM, edit: tt.Add, run: Callable[[], Any]) -> Any:
    """Run with the norm-keeping addition written as plain hooks, on every token that is passed."""

    def hook(delta: torch.Tensor) -> Callable[..., torch.Tensor]:
        def add(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            length = out.norm(dim=-1, keepdim=True)
            new = out + length * delta
            return new * (length / new.norm(dim=-1, keepdim=True))

        return add

    blocks = lm.model.model.layers
    handles = [
        blocks[layer].register_forward_hook(hook(edit.delta[k])) for k, layer in enumerate(LAYERS)
    ]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def answer(lm: tt.LM, prompts: list[str], tokens: int) -> list[str]:
    """Transformers' own greedy generation of one batch."""
    batch = lm.batch(prompts)
    out = lm.model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=lm.tokenizer.eos_token_id,
    )
    texts = lm.tokenizer.batch_decode(out[:, batch.ids.shape[1] :], skip_special_tokens=True)
    return list(texts)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("scales", 17), ("prompts", 64), ("tokens", 32), ("sample", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    lm = tt.LM.load("smollm2-135m", dtype="float32")
    examples = tt.data.read("happiness") + tt.data.read("humor")
    probe = tt.concepts.fit(lm, examples[:144], "resid@5:22 answer[:16]", show_progress=False)
    prompts = list(dict.fromkeys(e.prompt for e in examples))[: args.prompts]
    scales = [float(s) for s in torch.linspace(-0.03, 0.03, args.scales)]
    edits = {s: probe.edit(dose=s, layers=LAYERS) for s in scales}

    start = time.perf_counter()
    rows = [(s, p) for s in scales for p in prompts]
    rows.sort(key=lambda row: len(row[1]))
    texts: dict[Any, str] = {}
    for k in range(0, len(rows), 64):
        group = rows[k : k + 64]
        made = lm.generate([p for _, p in group], [edits[s] for s, _ in group], args.tokens)
        texts |= dict(zip(group, made, strict=True))
    ours = time.perf_counter() - start
    print(f"shared batches: {len(rows)} answers in {ours:.1f} s")

    start, equal = time.perf_counter(), 0
    few = prompts[:: max(1, len(prompts) // args.sample)][: args.sample]
    for s in scales:
        one = hooked(lm, edits[s], lambda: [answer(lm, [p], args.tokens)[0] for p in few])
        equal += sum(texts[s, p] == t for p, t in zip(few, one, strict=True))
    single = (time.perf_counter() - start) * len(prompts) / len(few)
    print(f"a patched model per scale, prompt by prompt: {single:.1f} s (from {len(few)} prompts)")

    start = time.perf_counter()
    middle = scales[:: max(1, len(scales) // 3)][:3]
    for s in middle:
        hooked(lm, edits[s], lambda: answer(lm, prompts, args.tokens))
    batched = (time.perf_counter() - start) * len(scales) / len(middle)
    print(f"a patched model per scale, its prompts as one batch: {batched:.1f} s")

    print(f"{equal} of {len(scales) * len(few)} texts are equal to the reference's")
    report = [
        common.check("one patched model per scale / sweep", single / ours, 3.0, at_least=True),
        common.check("the same, prompts as one batch / sweep", batched / ours, 0.9, at_least=True),
        common.check("equal texts", equal / (len(scales) * len(few)), 0.97, at_least=True),
    ]
    common.save("sweep", report)


if __name__ == "__main__":
    main()
