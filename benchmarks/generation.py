"""How much do taps and edits cost while a model generates? Ratios of times in one run.

    python benchmarks/generation.py [--quick]

Everything decodes the same number of tokens in float32. "plain" is transformers' own ``generate``
on a copy of the model that Trimtab never touched.
"""

import argparse

import torch
from common import best_of, check, save

import trimtab as tt

TOKENS = 48
PROMPT = "Write a long story about a dog that crosses a mountain range in winter."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 2 if parser.parse_args().quick else 6
    plain = tt.models.load("smollm2-135m", dtype="float32")[0]
    lm = tt.LM.load("smollm2-135m", dtype="float32")
    direction = torch.randn(22, lm.width, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm(dim=-1, keepdim=True)
    add = tt.Add("resid@4:26", 0.1 * direction)
    keep = tt.Add("resid@4:26", 0.1 * direction, keep_norm=True)
    rows: list[dict[str, object]] = []
    for size in (1, 8):
        print(f"batch {size}, {TOKENS} tokens")
        batch = lm.batch([PROMPT] * size)
        options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        inputs = dict(input_ids=batch.ids, attention_mask=batch.mask)
        several = [tt.Add("resid@4:26", (0.02 + 0.01 * i) * direction) for i in range(size)]

        def ours(edits: tt.edits.Edits, batch: tt.Batch = batch) -> None:
            ids = lm.generate_ids(batch, edits, TOKENS)
            assert all(len(row) == TOKENS for row in ids), "a row ended early"

        variants = {
            "plain transformers generate": lambda: plain.generate(**inputs, **options),
            "transformers generate, taps idle": lambda: lm.model.generate(**inputs, **options),
            "lm.generate, no edit": lambda: ours(None),
            "lm.generate, Add on 22 layers": lambda: ours(add),
            "lm.generate, Add keep_norm on 22 layers": lambda: ours(keep),
        }
        if size > 1:
            variants["lm.generate, a different Add in each row"] = lambda: ours(several)
        times = best_of(variants, repeats)
        base = times["plain transformers generate"]
        for name, limit in (
            ("transformers generate, taps idle", 1.01),
            ("lm.generate, no edit", 1.01),
            ("lm.generate, Add on 22 layers", 1.03),
            ("lm.generate, Add keep_norm on 22 layers", 1.06),
        ):
            label = f"batch {size}: {name} / plain"
            rows.append(check(label, times[name] / base, limit, at_least=False))
        if size > 1:
            ratio = times["lm.generate, a different Add in each row"]
            ratio /= times["lm.generate, Add on 22 layers"]
            rows.append(check("8 different edits / one edit", ratio, 1.05, at_least=False))
    save("generation", rows)


if __name__ == "__main__":
    main()
