"""Which reader is best? One short training for each choice of layers, way of writing and rank.

    python benchmarks/reader_table.py ../shared/data/latentqa --out runs/reader-table

Each line is one change to the first; all see the same items in the same order and are measured on
labels that they never saw. A line whose report exists is read, not trained again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import save
from train_reader import arguments, corpus, learn, told

import trimtab as tt
from trimtab import latentqa

CHOICES: dict[str, dict[str, Any]] = {
    "read 10, write 0, replace, rank 16": {},
    "read 15": {"read_layer": 15},
    "read 5": {"read_layer": 5},
    "read 20": {"read_layer": 20},
    "write 4": {"write_layer": 4},
    "add": {"write": "add"},
    "rank 4": {"rank": 4},
}


def one(lm: tt.LM, options: argparse.Namespace, sets: tuple[list[Any], list[Any]]) -> Any:
    train, test = sets
    reader = learn(lm, train, options, "real", options.steps)
    found: dict[str, Any] = {}
    for kind in ["all", *options.kinds]:
        some = [item for item in test if kind in ("all", item.kind)]
        scores = latentqa.evaluate(reader, some, views=("real", "none", "shuffled"))
        rows = found.setdefault(kind, {})
        for view in scores.sums:
            rows |= told(f"{kind}: {view}", scores.loss(view))
        rows |= told(f"{kind}: none - real", scores.difference("none", "real"))
        rows |= told(f"{kind}: shuffled - real", scores.difference("shuffled", "real"))
    return found


def main() -> None:
    base = arguments()
    torch.set_num_threads(base.threads)
    lm = tt.LM.load(base.model, dtype=base.dtype)
    train, test = corpus(base)
    table = []
    for name, change in CHOICES.items():
        options = argparse.Namespace(**(vars(base) | change))
        options.out = base.out / name.replace(" ", "-").replace(",", "")
        report = Path(f"{options.out}.report.json")
        print(f"\n{name}", flush=True)
        if not report.exists():
            found = one(lm, options, (train[:: max(1, len(train) // 600)], test))
            report.write_text(json.dumps(found, indent=1) + "\n")
        table.append({"choice": name, **json.loads(report.read_text())})
    save("reader-table", table)


if __name__ == "__main__":
    main()
