"""Speed of LatentQA: a training step, harvesting, and asking many questions at once.

    python benchmarks/latentqa.py --read 150 --dialogue 60 --batch 4

A step is compared with a plain PEFT step on the same decoder tokens (random activations instead of
placeholders make no difference to the cost), harvesting with a bare forward pass to the read layer,
and many questions with as many single calls that use no cache.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from torch.nn.functional import cross_entropy

import trimtab as tt
from trimtab import latentqa
from trimtab.latentqa.reader import Shown, record

Step = Callable[[], None]
DROPOUT = 0.05  # the paper's, in every variant of a step
OURS, READING, PEFT, ORIGINAL = STEPS = (
    "our step",
    "our step, target read each time",
    "plain PEFT step",
    "the original's step",
)


def words(count: int) -> str:
    """A text of at least so many tokens."""
    return "The small ship turned its rudder and went on. " * (count // 8 + 1)


def rows_of(reader: Any, options: argparse.Namespace) -> tuple[list[Any], list[Shown]]:
    """Rows with so many placeholders and so many dialogue tokens, each about its own item."""
    length = len(reader.dialogue.row(1, "Why?", "So.").ids)
    answer = words(options.dialogue - length)
    rows, shown = [], []
    for i in range(options.batch):
        row = reader.dialogue.row(options.read, f"Why {i}?", answer)
        rows.append(row._replace(ids=row.ids[: options.read + options.dialogue]))
        shown.append(Shown(torch.randn(options.read, reader.lm.width, dtype=reader.lm.model.dtype)))
    return rows, shown


def our_step(reader: Any, rows: list[Any], shown: list[Shown]) -> Step:
    reader.lora.dropout = DROPOUT
    parameters = list(reader.lora.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with reader.training_pass(False, False) as losses:
            sums, counts = losses(rows, shown)
            (sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(base: Any, rows: list[Any], rank: int) -> Step:
    """The same tokens through PEFT: all logits, labels masked."""
    import peft

    model: Any = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=DROPOUT, target_modules="all-linear"
        ),
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor([row.ids for row in rows])
    labels = ids.clone()
    for i, row in enumerate(rows):
        labels[i, : row.answer] = -100

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_of(reader: Any, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Step]:
    """The variants of a training step by their names; only what these need is loaded."""
    rows, shown = rows_of(reader, options)
    read = reading(reader, options)
    ours = our_step(reader, rows, shown)
    plain = None
    if {PEFT, ORIGINAL} & set(names):  # PEFT changes its model, so beside ours it takes another
        lm = reader.lm if len(names) == 1 else tt.LM.load(options.model, dtype="float32")
        plain = peft_step(lm.model, rows, 16)
    target = read_ids(reader, options)

    def original() -> None:
        """The target's whole forward pass, with its logits, before every step."""
        with torch.no_grad():
            reader.lm.model(input_ids=target, use_cache=False)
        assert plain is not None
        plain()

    def reading_each_time() -> None:
        read()
        ours()

    made = {OURS: ours, READING: reading_each_time, PEFT: plain, ORIGINAL: original}
    return {name: step for name in names if (step := made[name]) is not None}


def steps(reader: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    times = common.best_of(steps_of(reader, options, STEPS), options.repeats)
    share = peak(OURS, options) / peak(PEFT, options)
    return [
        common.check("step / plain PEFT step", times[OURS] / times[PEFT], 1.15, at_least=False),
        common.check(
            "original / ours, reading", times[ORIGINAL] / times[READING], 1.6, at_least=True
        ),
        common.check(
            "original / ours, harvested", times[ORIGINAL] / times[OURS], 1.8, at_least=True
        ),
        common.check("peak memory of a process / PEFT's", share, 1.1, at_least=False),
    ]


def peak(name: str, options: argparse.Namespace) -> int:
    """Bytes that a process of its own needs at most to load the model and take two steps."""
    given = [f"--{k.replace('_', '-')}={v}" for k, v in vars(options).items() if v is not None]
    run = [sys.executable, __file__, *given, f"--peak-of={name}"]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])


def read_ids(reader: Any, options: argparse.Namespace) -> torch.Tensor:
    """Ids to read [B, T]; no two rows begin alike."""
    ids = reader.lm.tokenizer(words(options.read), add_special_tokens=False)["input_ids"]
    return torch.tensor([[100 + i, *ids[: options.read - 1]] for i in range(options.batch)])


def reading(reader: Any, options: argparse.Namespace) -> Step:
    """The target's part of a step: its activations at the read layer, for a batch."""
    batch = tt.Batch(read_ids(reader, options))

    def run() -> None:
        reader.lm.record(batch, f"resid@{reader.read_layer} prompt", show_progress=False)

    return run


def harvesting(reader: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    lm = reader.lm
    prompts = [f"{i}. {words(options.read)}" for i in range(options.batch * 4)]
    rows = [reader._seen(prompt) for prompt in prompts]
    batches = [
        lm.batch(prompts[i : i + options.batch]) for i in range(0, len(prompts), options.batch)
    ]
    blocks = lm.anatomy.blocks
    kept = list(blocks)

    def bare() -> None:
        lm.anatomy.trunk.layers = torch.nn.ModuleList(kept[: reader.read_layer + 1])
        try:
            with torch.no_grad():
                for batch in batches:
                    lm.anatomy.trunk(
                        input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
                    )
        finally:
            lm.anatomy.trunk.layers = blocks

    variants = {
        "harvest": lambda: record(lm, rows, [reader.read_layer]),
        "bare forward to the read layer": bare,
    }
    ours, theirs = common.best_of(variants, options.repeats).values()
    return [common.check("bare forward / harvest", theirs / ours, 0.9, at_least=True)]


def asking(reader: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    questions = [f"What does the assistant think of number {i}?" for i in range(15)]
    prompt = words(options.read)

    def one_by_one() -> None:
        shown = reader.show([prompt])[0]
        for question in questions:
            ids = list(reader.dialogue.row(len(shown.values), question).ids)
            row = reader.dialogue.row(len(shown.values), question)
            for _ in range(options.answer):
                grown = row._replace(ids=ids)
                batch = tt.Batch(torch.tensor([ids]))
                with reader.worn(), torch.no_grad():
                    logits = reader.lm(batch, edits=[reader.edit(grown, shown)]).logits[0, -1]
                ids.append(int(logits.argmax()))

    variants = {
        "15 questions": lambda: reader.ask(prompt, questions, max_new_tokens=options.answer),
        "15 single calls without a cache": one_by_one,
    }
    ours, theirs = common.best_of(variants, 1, warm_up=False).values()
    return [common.check("15 questions / 15 single calls", ours / theirs, 0.2, at_least=False)]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--read", type=int, default=150)
    made.add_argument("--dialogue", type=int, default=60)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    made.add_argument("--read-layer", type=int, default=15)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    made.add_argument("--only", choices=["steps", "harvesting", "asking"])
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    lm = tt.LM.load(options.model, dtype="float32")
    reader = latentqa.Reader(
        lm, latentqa.Lora.of(lm), latentqa.Wiring((options.read_layer,), align=False)
    )
    if options.peak_of:
        (step,) = steps_of(reader, options, [options.peak_of]).values()
        step(), step()
        print(common.peak_resident())
        return
    lm.takes_trees()  # measured once, and not a part of any timing
    parts = {"steps": steps, "harvesting": harvesting, "asking": asking}
    chosen = [options.only] if options.only else list(parts)
    rows = [row for name in chosen for row in parts[name](reader, options)]
    if not options.only:
        common.save("latentqa", rows)


if __name__ == "__main__":
    main()
