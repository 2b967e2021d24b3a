"""How fast, and in how little memory, are activations recorded? Ratios of times in one run.

    python benchmarks/recording.py

256 chats of 30 to 200 tokens, all layers, the first 16 answer tokens, beside two references kept
here: a bare forward pass through the blocks on the same truncated tokens (length-sorted, about
1,024 tokens a pass, nothing recorded), and the way of the published concept-guidance code (one chat
at a time, with a KV cache, all hidden states and the LM head).
"""

import torch
from common import best_of, chats, check, peak_memory, save

import trimtab as tt
from trimtab import harvest

PLACE = "resid@all answer[:16]"


def memory(lm: tt.LM, examples: list[tt.Example], place: tt.Place) -> tuple[float, int]:
    """The budget, 1.2 times what is kept plus one batch, and what recording really adds, in bytes.

    One batch is what recording a few examples adds beyond what it keeps.
    """
    one, few = peak_memory(lambda: lm.record(examples[:32], place, show_progress=False))
    one -= sum(chunk.values.nbytes for chunk in few.chunks())
    peak, all_of_them = peak_memory(lambda: lm.record(examples, place, show_progress=False))
    kept = sum(chunk.values.nbytes for chunk in all_of_them.chunks())
    print(f"kept {kept >> 20} MiB, one batch {one >> 20} MiB, recording adds {peak >> 20} MiB")
    return 1.2 * kept + one, peak


def main() -> None:
    lm = tt.LM.load("smollm2-135m", dtype="float32")
    plain = tt.models.load("smollm2-135m", dtype="float32")[0]
    examples = chats(256)
    few = examples[:32]
    place = tt.Place.parse(PLACE)
    encoded = lm._encode(examples)
    lengths = [len(row.ids) for row in encoded]
    print(f"{len(examples)} chats, {min(lengths)}-{max(lengths)} tokens, {sum(lengths)} in all")
    cut = [harvest._row(i, ids, n, [place]) for i, (ids, n) in enumerate(encoded)]
    tree = sum(sheet.ids.numel() for sheet in harvest._trees(cut, 32))
    print(f"{sum(len(r.ids) for r in cut)} tokens up to the last asked ones, {tree} in trees")

    def ours(rows: list[tt.Example]) -> tt.Recording:
        return lm.record(rows, place, show_progress=False)

    def bare(rows: list[harvest.Row]) -> None:
        with torch.no_grad():
            for sheet in harvest._plain(rows, 32):
                plain.model(input_ids=sheet.ids, attention_mask=None, use_cache=False)

    def original(rows: list[tt.Example]) -> list[torch.Tensor]:
        kept = []
        with torch.no_grad():
            for ids, prompt_len in lm._encode(rows):
                out = plain(
                    input_ids=torch.tensor([ids]), use_cache=True, output_hidden_states=True
                )
                asked = slice(prompt_len - 1, prompt_len + 15)
                kept.append(torch.stack([h[0, asked] for h in out.hidden_states[1:]], 1))
        return kept

    limit, peak = memory(lm, examples, place)  # before anything else has grown the process
    many = best_of({"bare, 256": lambda: bare(cut), "record, 256": lambda: ours(examples)}, 2)
    small = best_of({"original, 32": lambda: original(few), "record, 32": lambda: ours(few)}, 3)
    ratio = many["bare, 256"] / many["record, 256"]
    speedup = small["original, 32"] / small["record, 32"]
    rows = [
        check("256 chats: bare forward / record", ratio, 0.9, at_least=True),
        check("32 chats: original / record", speedup, 2.0, at_least=True),
        check("32 chats: seconds to record", small["record, 32"], 3.0, at_least=False),
        check("peak memory / (1.2 x kept + one batch)", peak / limit, 1.0, at_least=False),
    ]
    same = max(
        float((a[:, :-1] - b[:, :-1]).norm() / b[:, :-1].norm())
        for a, b in zip(ours(few).rows(), original(few), strict=True)
    )
    rows.append(check("relative difference from the original's", same, 1e-4, at_least=False))
    save("recording", rows)


if __name__ == "__main__":
    main()
