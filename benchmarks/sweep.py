"""Speed of a sweep: 17 scales x 64 prompts in shared batches, against one patched model per scale.

    python benchmarks/sweep.py [--scales 17] [--prompts 64] [--tokens 32] [--sample 4]

Both sides do the whole of a sweep: answers, the perplexity of reference answers under each scale,
and that of the answers to the model without an edit. The reference patches the model with a hook
that holds one scale, answers prompt by prompt with transformers' own ``generate``, scores, and
takes the hook off again, as the published code does. It runs on ``--sample`` of the prompts and its
time is multiplied; its texts must be equal, and its perplexities close. A second reference gives
each patched model all prompts as one batch.
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


def perplexities(lm: tt.LM, prompts: list[str], answers: list[str]) -> torch.Tensor:
    """Of each answer in one batch, [B], by transformers' own forward pass."""
    batch = lm.batch(prompts, answers)
    out = lm.model(batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
    logs = out.logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    count = batch.lengths - batch.prompt_len  # of answer tokens, which stand at the end
    own = torch.arange(logs.shape[1], 0, -1) <= count[:, None]
    return torch.exp(-(logs * own).sum(1) / count)


def reference(
    lm: tt.LM, edit: tt.Edit | None, prompts: list[str], plain: list[str], tokens: int
) -> tuple[list[str], torch.Tensor]:
    """One scale of the sweep by hooks: answers, and the perplexities of the plain ones."""

    def run() -> tuple[list[str], torch.Tensor]:
        return answer(lm, prompts, tokens), perplexities(lm, prompts, plain)

    said, costs = run() if edit is None else hooked(lm, edit, run)
    perplexities(lm, prompts, said)  # fluency
    return said, costs


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
    edits = {s: probe.edit(dose=s, layers=LAYERS) if s else None for s in scales}

    start = time.perf_counter()
    found = tt.evals.sweep(
        lm,
        lambda scale: edits[scale],
        scales,
        prompts,
        tt.evals.Lexicon(["happy", "funny"]),
        baselines=(),
        max_new_tokens=args.tokens,
        show_progress=False,
    )
    ours = time.perf_counter() - start
    arms = {arm.scale: arm for arm in found.arms}
    plain = found.baseline.answers
    print(f"sweep: {len(scales) * len(prompts)} answers, judged, in {ours:.1f} s")

    def timed(rows: list[list[int]], at: list[float]) -> tuple[float, int, float]:
        """Seconds for everything, by these batches at these scales; equal texts; largest error."""
        start, equal, error = time.perf_counter(), 0, 0.0
        for s in at:
            for row in rows:
                asked, known = [prompts[i] for i in row], [plain[i] for i in row]
                said, costs = reference(lm, edits[s], asked, known, args.tokens)
                equal += sum(arms[s].answers[i] == t for i, t in zip(row, said, strict=True))
                ours = torch.tensor([arms[s].perplexities[i] for i in row])
                error = max(error, float((costs / ours).log().abs().max()))
        share = sum(map(len, rows)) * len(at) / (len(prompts) * len(scales))
        return (time.perf_counter() - start) / share, equal, error

    few = list(range(0, len(prompts), max(1, len(prompts) // args.sample)))[: args.sample]
    single, equal, error = timed([[i] for i in few], scales)
    print(f"a patched model per scale, prompt by prompt: {single:.1f} s (from {len(few)} prompts)")
    batched, *_ = timed([list(range(len(prompts)))], scales[:: max(1, len(scales) // 3)][:3])
    print(f"a patched model per scale, its prompts as one batch: {batched:.1f} s")

    texts = equal / (len(scales) * len(few))
    print(f"{texts:.3f} of the texts are equal; perplexities are {error:.1g} apart at most")
    report = [
        common.check("one patched model per scale / sweep", single / ours, 3.0, at_least=True),
        common.check("the same, prompts as one batch / sweep", batched / ours, 0.9, at_least=True),
        common.check("equal texts", texts, 0.97, at_least=True),
        common.check("relative difference of perplexities", error, 1e-3, at_least=False),
    ]
    common.save("sweep", report)


if __name__ == "__main__":
    main()
