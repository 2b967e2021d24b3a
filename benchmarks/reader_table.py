"""Which reader is best? One short training for each choice of layers, way of writing and rank.

    python benchmarks/reader_table.py ../shared/data/latentqa --out runs/reader-table

Each line is one change to the first; all see the same items in the same order and are measured on
labels that they never saw. Two more decoders, trained in the same way, are shown nothing, or the
text itself: from them the share of the gap that activations close. A line whose report exists is
read, not trained again.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from common import save
from train_reader import arguments, asked, corpus, learn, told

import trimtab as tt
from trimtab import latentqa
from trimtab.latentqa import Item

CHOICES: dict[str, dict[str, Any]] = {
    "read 10, write 0, replace, rank 16": {},
    "read 15": {"read_layer": 15},
    "read 5": {"read_layer": 5},
    "write 4": {"write_layer": 4},
    "add": {"write": "add"},
    "rank 4": {"rank": 4},
}
VIEWS = ("none", "text")


def one(reader: Any, options: argparse.Namespace, test: list[Item]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    scores = latentqa.evaluate(reader, test, views=("real", "none", "shuffled"))
    for kind in ["all", *options.kinds]:
        some = scores.only(asked(kind, test))
        rows = found.setdefault(kind, {})
        for view in some.sums:
            rows |= told(f"{kind}: {view}", some.loss(view))
        for worse in ("none", "shuffled"):
            rows |= told(f"{kind}: {worse} - real", some.difference(worse, "real"))
    return found


def gap(readers: dict[str, Any], options: argparse.Namespace, test: list[Item]) -> dict[str, Any]:
    """How much of what the text tells the activations tell, by decoders that are trained alike."""
    found: dict[str, Any] = {}
    three = [latentqa.evaluate(r, test, views=(v,)) for v, r in readers.items()]  # type: ignore[arg-type]
    scores = three[0] | three[1] | three[2]
    for kind in ["all", *options.kinds]:
        some = scores.only(asked(kind, test))
        for view in some.sums:
            found |= told(f"{kind}: {view}, own decoder", some.loss(view))
        found |= told(f"{kind}: gap closed", some.gap_closed("real", "none", "text"))
    return found


def main() -> None:
    base = arguments()
    torch.set_num_threads(base.threads)
    lm = tt.LM.load(base.model, dtype=base.dtype)
    train, test = corpus(base)
    train = train[:: max(1, len(train) // 600)]

    def decoder(name: str, view: str = "real", **change: Any) -> Any:
        options = argparse.Namespace(**(vars(base) | change))
        options.out = base.out / name.replace(" ", "-").replace(",", "")
        return learn(lm, train, options, view, options.steps)

    def reported(name: str, make: Callable[[], Any]) -> dict[str, Any]:
        report = base.out / f"{name.replace(' ', '-').replace(',', '')}.report.json"
        print(f"\n{name}", flush=True)
        if not report.exists():
            report.write_text(json.dumps(make(), indent=1) + "\n")
        return {"choice": name, **json.loads(report.read_text())}

    first = next(iter(CHOICES))

    def closed() -> dict[str, Any]:
        readers = {"real": decoder(first)} | {view: decoder(first, view) for view in VIEWS}
        return gap(readers, base, test)

    table = [reported("gap closed", closed)]
    for name, change in CHOICES.items():
        table.append(reported(name, lambda n=name, c=change: one(decoder(n, **c), base, test)))  # type: ignore[misc]
    save("reader-table", table)


if __name__ == "__main__":
    main()
