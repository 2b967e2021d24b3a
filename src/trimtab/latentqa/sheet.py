"""One pass of the decoder: rows side by side, and what neighbouring rows share only once.

Knows token ids, masks and positions; knows no model. Rows about the same activations begin with the
same tokens: laid out as a tree in one sequence, whose mask lets a token see its own ancestors only,
they give the numbers that they give apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab import chat
from trimtab.chat import Batch
from trimtab.latentqa.dialogue import Row


@dataclass(frozen=True)
class Sheet:
    """Ids [R, T] of one pass, where the labels are predicted in R * T, and what they are.

    ``mask`` is None where plain causal attention is meant (pads stand on the right, where no token
    looks), else [R, 1, T, T]. ``first`` [R] is the row of which each sequence begins with.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    where: Tensor
    labels: Tensor
    first: list[int]


def lay_out(rows: Sequence[Row], groups: Sequence[Sequence[int]], fill: int) -> Sheet:
    """The sheet of some rows; those of one group stand in one sequence."""
    trees = [_Tree([rows[i] for i in group]) for group in groups]
    width = max(len(tree.ids) for tree in trees)
    ids = torch.full((len(trees), width), fill)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    where: list[int] = []
    labels: list[int] = []
    for r, tree in enumerate(trees):
        ids[r, : len(tree.ids)] = torch.tensor(tree.ids)
        positions[r, : len(tree.ids)] = torch.tensor(tree.depths)
        where += [r * width + i for i in tree.where]
        labels += tree.labels
    branched = any(len(group) > 1 for group in groups)
    mask = torch.stack([tree.mask(width) for tree in trees])[:, None] if branched else None
    first = [group[0] for group in groups]
    return Sheet(ids, mask, positions, torch.tensor(where), torch.tensor(labels), first)


def neighbours(rows: Sequence[Row], shown: Sequence[Any], trees: bool) -> list[list[int]]:
    """Which rows can share a sequence: neighbours with the same activations and the same start."""
    groups: list[list[int]] = []
    for i, row in enumerate(rows):
        end = row.start + row.slots
        last = groups[-1][-1] if groups else None
        if (
            trees
            and last is not None
            and shown[i] is shown[last]
            and rows[last].ids[:end] == row.ids[:end]
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows share from their start; each keeps one more of its own at least."""
    shortest = min(map(len, rows)) - 1
    columns = zip(*(row[:shortest] for row in rows), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), shortest)


def side_by_side(groups: Sequence[Sequence[Row]], fill: int) -> tuple[Batch, int]:
    """Rows as one batch: what a group's rows share, then the rest, each padded on its left."""
    heads = [common([row.ids for row in group]) for group in groups]
    flat = [(row, n) for group, n in zip(groups, heads, strict=True) for row in group]
    fronts = chat.pad([chat.Encoded(row.ids[:n], n) for row, n in flat], fill)
    rests = chat.pad([chat.Encoded(row.ids[n:], 0) for row, n in flat], fill)
    ids, mask = (
        torch.cat(pair, 1) for pair in ((fronts.ids, rests.ids), (fronts.mask, rests.mask))
    )
    return Batch(ids, mask), fronts.ids.shape[1]


class _Tree:
    """Rows that share their first tokens, as one sequence."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.stem = common([row.ids[: row.answer] for row in rows]) if len(rows) > 1 else 0
        self.ids = list(rows[0].ids[: self.stem])
        self.depths = list(range(self.stem))
        self.where: list[int] = []
        self.labels: list[int] = []
        self.branches: list[tuple[int, int]] = []
        for row in rows:
            begin = len(self.ids)
            self.ids += row.ids[self.stem :]
            self.depths += range(self.stem, len(row.ids))
            self.where += [begin + p - self.stem for p in range(row.answer - 1, len(row.ids) - 1)]
            self.labels += row.labels
            self.branches.append((begin, len(self.ids)))

    def mask(self, width: int) -> Tensor:
        """Who sees whom [T, T]: the stem, one's own branch, and no one after; pads see pads."""
        sees = torch.ones(width, width, dtype=torch.bool).tril()
        for begin, end in self.branches:
            sees[begin:end, self.stem : begin] = False
        sees[len(self.ids) :, : len(self.ids)] = False
        return sees
