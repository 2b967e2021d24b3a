"""Train a reader on LatentQA's files and measure it on labels that it never saw.

    python benchmarks/train_reader.py ../shared/data/latentqa --steps 1200 --out runs/reader

Prints the loss with activations, with none, with another item's, and with the text itself (each of
the last and of none by a decoder of its own, trained in the same way, with --baselines), with
intervals over labels; the share of the gap that is closed; and the four-way choice.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from trimtab import latentqa
from trimtab.latentqa import Item


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("data", type=Path)
    made.add_argument("--out", type=Path, default=Path("runs/reader"))
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--kinds", nargs="+", default=["control", "stimulus", "system"])
    made.add_argument("--templates", type=int, default=0, help="items whose QA come from templates")
    made.add_argument("--read-layer", type=int, default=10)
    made.add_argument("--write-layer", type=int, default=0)
    made.add_argument("--write", default="replace", choices=["replace", "add"])
    made.add_argument("--last", type=int)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--dropout", type=float, default=0.05)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--warmup", type=float, default=0.05)
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--baseline-steps", type=int, help="of the decoders of --baselines")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--ema", type=float)
    made.add_argument(
        "--held-out", type=float, default=0.04, help="labels to watch, of those to learn"
    )
    made.add_argument("--evaluate-every", type=int, default=40)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--test-items", type=int, default=120, help="held-out items, all kinds alike")
    made.add_argument("--baselines", action="store_true", help="train decoders of nothing and text")
    made.add_argument("--only", choices=["real", "none", "text"], help="train this one, no report")
    return made.parse_args()


def corpus(options: argparse.Namespace) -> tuple[list[Item], list[Item]]:
    """Items to train on and items to test on; no label is in both, and tests have real QA only."""
    table = latentqa.read_qa(options.data / "qa.json")
    files = [options.data / f"{kind}.json" for kind in options.kinds]
    train, test = latentqa.split(latentqa.attach(latentqa.read_items(files), table), 0.1, 0)
    drawn = random.Random(0)
    drawn.shuffle(test)
    share = -(-options.test_items // len(options.kinds))
    test = [i for kind in options.kinds for i in [t for t in test if t.kind == kind][:share]]
    held = {item.label for item in test}
    bare = latentqa.read_items(options.data / "system_without_qa.json")
    bare = [i for i in bare if i.label not in held and i.label not in table]
    drawn.shuffle(bare)
    for i, item in enumerate(bare[: options.templates]):
        kind = options.kinds[i % len(options.kinds)]
        if kind == "control":
            item = Item(item.label, control_user=item.system)
        elif kind == "stimulus":
            item = Item(item.label, control_user=item.system, stimulus_user=item.stimulus_user)
        train.append(replace(item, qa=latentqa.template_qa(item)))
    return train, test


def learn(lm: tt.LM, items: list[Item], options: argparse.Namespace, view: str, steps: int) -> Any:
    """One decoder; one that is finished is read."""
    out = options.out if view == "real" else options.out.with_name(f"{options.out.name}-{view}")
    if (out / "artifact.json").exists():
        return latentqa.Reader.load(out, lm)
    begun = time.perf_counter()
    reader = latentqa.train(
        lm,
        items,
        read_layer=options.read_layer,
        write_layer=options.write_layer,
        write=options.write,
        last=options.last,
        rank=options.rank,
        dropout=options.dropout,
        lr=options.lr,
        warmup=options.warmup,
        steps=steps,
        batch_size=options.batch_size,
        ema=options.ema,
        seed=options.seed,
        view=view,  # type: ignore[arg-type]
        held_out=options.held_out,
        evaluate_every=options.evaluate_every if options.held_out else None,
        out=out,
        save_every=50,
        tracker="jsonl",
        name=out.name,
    )
    print(f"{view}: {time.perf_counter() - begun:.0f} s for {steps} steps", flush=True)
    return reader


def told(name: str, interval: tuple[float, float, float]) -> dict[str, Any]:
    value, low, high = interval
    print(f"{name:<28} {value:7.3f}   [{low:.3f}, {high:.3f}]", flush=True)
    return {name: [round(x, 4) for x in interval]}


def asked(kind: str, items: list[Item]) -> list[bool]:
    """Which of the questions about items are about those of a kind."""
    return [kind in ("all", item.kind) for item in items for _ in item.qa]


def report(
    reader: Any, test: list[Item], readers: dict[str, Any], kinds: list[str]
) -> dict[str, Any]:
    """All losses, by kind of item."""
    scores = latentqa.evaluate(reader, test, views=("real", "none", "shuffled"))
    for view, other in readers.items():
        own = latentqa.evaluate(other, test, views=(view,))  # type: ignore[arg-type]
        # A decoder of nothing that was trained so guesses better than one whose input is missing.
        scores = scores | own.renamed(none="guess")
    empty = "guess" if "guess" in scores.sums else "none"
    found: dict[str, Any] = {}
    for kind in ["all", *kinds]:
        print(f"\n{kind}")
        some, rows = scores.only(asked(kind, test)), found.setdefault(kind, {})
        for view in some.sums:
            rows |= told(f"loss, {view}", some.loss(view))
        for worse in sorted({"none", "shuffled", empty}):
            rows |= told(f"{worse} - real", some.difference(worse, "real"))
        if "text" in some.sums:
            rows |= told("gap closed", some.gap_closed("real", empty, "text"))
    return found


def chosen(reader: Any, train: list[Item], test: list[Item]) -> dict[str, Any]:
    """The four-way choice, one question about each item."""
    test = [replace(item, qa=item.qa[:1]) for item in test]
    found: dict[str, Any] = {}
    for view in ("real", "none", "shuffled"):
        found |= told(f"four-way choice, {view}", latentqa.choices(reader, test, view=view))
    found |= told("four-way choice, plain model", latentqa.choices(reader, test, worn=False))
    probe = latentqa.linear_choices(reader, train, test)
    return found | told("four-way choice, linear probe", probe)


def curve(log: Path, picture: Path) -> dict[str, float]:
    """A power law of the steps, a + b step^-c, fitted to the losses of questions that are new when
    they are trained on (the first epoch), and drawn; what ten times the steps should bring."""
    import matplotlib
    import numpy as np
    from scipy.optimize import curve_fit

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in log.read_text().splitlines()]
    loss = np.array([record["loss"] for record in records])
    watched = [record for record in records if "held_out_real" in record]
    width = max(1, len(loss) // 24)
    means = loss[: len(loss) // width * width].reshape(-1, width).mean(1)
    steps = (np.arange(len(means)) + 0.5) * width

    def law(step: Any, a: float, b: float, c: float) -> Any:
        return a + b * step**-c

    bounds = ([0.0, 0.0, 0.05], [float(means.min()), 20.0, 2.0])
    found, _ = curve_fit(law, steps[1:], means[1:], (means.min() / 2, 1.0, 0.3), bounds=bounds)
    facts = {"a": found[0], "b": found[1], "c": found[2], "last": law(len(loss), *found)}
    facts["ten times the steps"] = law(10 * len(loss), *found)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(steps, means, ".", label=f"mean loss of {width} steps")
    far = np.geomspace(steps[1], 10 * len(loss), 100)
    axes.plot(far, law(far, *found), label=f"{found[0]:.2f} + {found[1]:.2f} step^-{found[2]:.2f}")
    for view in ("real", "none"):
        values = [record[f"held_out_{view}"] for record in watched]
        axes.plot([r["step"] for r in watched], values, "o-", label=f"new labels, {view}")
    axes.set(xscale="log", xlabel="step", ylabel="loss of the answers, nats a token")
    axes.legend()
    figure.savefig(picture, metadata={"Date": None})
    return {name: round(float(value), 4) for name, value in facts.items()}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    train, test = corpus(options)
    print(f"{len(train)} items to learn from, {len(test)} to test on", flush=True)
    lm = tt.LM.load(options.model, dtype=options.dtype)
    if options.only:
        steps = options.steps if options.only == "real" else options.baseline_steps
        learn(lm, train, options, options.only, steps or options.steps)
        return
    reader = learn(lm, train, options, "real", options.steps)
    readers = {}
    if options.baselines:
        steps = options.baseline_steps or options.steps
        readers = {view: learn(lm, train, options, view, steps) for view in ("none", "text")}
    found = report(reader, test, readers, options.kinds) | chosen(reader, train, test)
    folder = options.out.with_name(f"{options.out.name}-training")
    found["curve"] = curve(folder / "log.jsonl", folder / "loss.svg")
    print(found["curve"])
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    (folder / "report.json").write_text(
        json.dumps({"options": facts, "found": found}, indent=1) + "\n"
    )
    for item in test[:6]:
        question, answer = item.qa[0]
        print(f"\n{question}\n  said  {reader.ask(item, question)[0]}\n  true  {answer}")


if __name__ == "__main__":
    main()
