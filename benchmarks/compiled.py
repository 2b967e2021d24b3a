"""Does a compiled, *steered* model beat the unsteered eager ``generate``? Ratios in one run.

    python benchmarks/compiled.py [float32 | bfloat16]

Batch 1. The text must be the eager one's, and the number of graphs must not grow over 20 changes of
edit. Compiling takes about a minute.
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
    same = sum(a == b for a, b in zip(eager_ids[0], compiled_ids[0], strict=False))
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
        check(f"{dtype}: same ids as eager", same / len(eager_ids[0]), 1.0, at_least=True),
        check(f"{dtype}: new graphs over 20 edits", grown, 0, at_least=False),
    ]
    save(f"compiled-{dtype}", rows)


if __name__ == "__main__":
    main()
