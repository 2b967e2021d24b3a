"""Does a compiled, *steered* model beat the unsteered eager ``generate``? Ratios in one run.

    python benchmarks/compiled.py [float32 | bfloat16]

Batch 1. The text must be the eager one's (where it parts from it, at a tie within the dtype's
rounding), and the number of graphs must not grow over 20 changes of edit. Compiling takes a minute.
"""

import sys

import torch
from common import best_of, check, save

import trimtab as tt

TOKENS = 64
PROMPT = "Write a long story about a dog that crosses a mountain range in winter."
BUDGETS = {"float32": 1.15, "bfloat16": 1.4}


def main() -> None:
    for dtype in sys.argv[1:] or BUDGETS:
        compare(dtype)


def gap_at_first_difference(
    lm: tt.LM, batch: tt.Batch, edit: tt.Edit, a: list[int], b: list[int]
) -> float:
    """How clear the choice was where two texts part: 0 if they never do.

    The gap between the two most likely tokens, in units of the dtype's rounding of the larger
    logit. Two ways of rounding may part at a tie, and only there.
    """
    where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if where is None:
        return 0.0
    print(f"  the texts part at token {where} of {len(a)}")
    ids = torch.cat([batch.ids, torch.tensor([a[:where]], dtype=torch.long)], 1)
    with torch.no_grad():
        logits = lm(tt.Batch(ids, prompt_len=batch.prompt_len), edits=edit).logits[0, -1]
    first, second = logits.float().topk(2).values.tolist()
    return (first - second) / (torch.finfo(logits.dtype).eps * abs(first))


def compare(dtype: str) -> None:
    print(dtype)
    plain = tt.models.load("smollm2-135m", dtype=dtype)[0]
    lm = tt.LM.load("smollm2-135m", dtype=dtype)
    noise = torch.Generator().manual_seed(0)
    direction = torch.randn(22, lm.width, generator=noise)
    direction /= direction.norm(dim=-1, keepdim=True)

    def edit(strength: float) -> tt.Edit:
        return tt.Add("resid@4:26", strength * direction, keep_norm=True, relative=True)

    batch = lm.batch(PROMPT)
    inputs = dict(input_ids=batch.ids, attention_mask=batch.mask)
    options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    steered = edit(0.02)
    eager_ids = lm.generate_ids(batch, steered, TOKENS)
    lm.compile()
    compiled_ids = lm.generate_ids(batch, steered, TOKENS)
    gap = gap_at_first_difference(lm, batch, steered, eager_ids[0], compiled_ids[0])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for i in range(20):
        changed = None if i == 7 else edit(0.001 * i - 0.01)
        lm.generate_ids(batch, changed, 4)
    grown = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    times = best_of(
        {
            "plain transformers generate": lambda: plain.generate(**inputs, **options),
            "lm.generate, compiled and steered": lambda: lm.generate_ids(batch, steered, TOKENS),
        },
        6,
    )
    ratio = times["plain transformers generate"] / times["lm.generate, compiled and steered"]
    rows = [
        check(f"{dtype}: plain / compiled and steered", ratio, BUDGETS[dtype], at_least=True),
        check(f"{dtype}: top-2 gap at the first other token, in roundings", gap, 2, at_least=False),
        check(f"{dtype}: new graphs over 20 edits", grown, 0, at_least=False),
    ]
    save(f"compiled-{dtype}", rows)


if __name__ == "__main__":
    main()
