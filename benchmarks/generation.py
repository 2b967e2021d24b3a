"""How much do taps and edits cost while a model generates? Ratios of times in one run.

    python benchmarks/generation.py [--quick]

Everything decodes the same number of tokens in float32. "plain" is transformers' own ``generate``
on a copy of the model that Trimtab never touched.
"""

import argparse
from typing import Any

import torch
from common import best_of, check, save

import trimtab as tt
from trimtab.merge import Edits

TOKENS = 48
PROMPT = "Write a long story about a dog that crosses a mountain range in winter."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 2 if parser.parse_args().quick else 6
    plain = tt.models.load("smollm2-135m", dtype="float32")[0]
    lm = tt.LM.load("smollm2-135m", dtype="float32")
    save("generation", [row for size in (1, 8) for row in compare(plain, lm, size, repeats)])


def compare(plain: Any, lm: tt.LM, size: int, repeats: int) -> list[dict[str, Any]]:
    """The ratios at one batch size."""
    print(f"batch {size}, {TOKENS} tokens")
    direction = torch.randn(22, lm.width, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm(dim=-1, keepdim=True)
    add = tt.Add("resid@4:26", 0.1 * direction)
    keep = tt.Add("resid@4:26", 0.1 * direction, keep_norm=True)
    several = [tt.Add("resid@4:26", (0.02 + 0.01 * i) * direction) for i in range(size)]
    batch = lm.batch([PROMPT] * size)

    def theirs(model: Any) -> None:
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    def ours(edits: Edits) -> None:
        ids = lm.generate_ids(batch, edits, TOKENS)
        assert all(len(row) == TOKENS for row in ids), "a row ended early"

    limits = {
        "transformers generate, taps idle": 1.01,
        "lm.generate, no edit": 1.01,
        "lm.generate, Add on 22 layers": 1.03,
        "lm.generate, Add keep_norm on 22 layers": 1.06,
    }
    base, one, many = (
        "transformers generate, no taps",
        list(limits)[2],
        "a different Add in each row",
    )
    times = best_of(
        {
            base: lambda: theirs(plain),
            **dict(
                zip(
                    limits,
                    [
                        lambda: theirs(lm.model),
                        *(lambda edit=edit: ours(edit) for edit in (None, add, keep)),
                    ],
                    strict=True,
                )
            ),
            many: lambda: ours(several),
        },
        repeats,
    )
    rows = [
        check(f"batch {size}: {name} / no taps", times[name] / times[base], limit, at_least=False)
        for name, limit in limits.items()
    ]
    if size > 1:
        rows.append(
            check(f"{size} different edits / one", times[many] / times[one], 1.05, at_least=False)
        )
    return rows


if __name__ == "__main__":
    main()
