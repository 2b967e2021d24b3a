"""How much a reader reads: its loss with activations, without, with another's, and with the text.

Knows readers, items and statistics; trains nothing. A reader that merely talks about assistants has
a low loss too: only the difference to what it says without activations shows that it reads.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trimtab.errors import ChatError
from trimtab.latentqa.data import Item
from trimtab.latentqa.dialogue import Row
from trimtab.latentqa.reader import Reader, Shown, View, shuffled

Interval = tuple[float, float, float]  # a mean, and the bounds of its 95 % interval


@dataclass(frozen=True)
class Scores:
    """The loss of each question under each view: ``sums`` and ``counts`` [pairs] of label tokens.

    ``labels`` names each pair's label: intervals are bootstrapped over labels, because items of one
    label share their answers.
    """

    labels: tuple[str, ...]
    sums: Mapping[str, Tensor]
    counts: Tensor

    def loss(self, view: str) -> Interval:
        """Mean cross entropy per answer token."""
        return self._interval(lambda keep: self._mean(view, keep))

    def difference(self, worse: str, better: str) -> Interval:
        """By how much the loss under ``better`` is lower than under ``worse``."""
        return self._interval(lambda keep: self._mean(worse, keep) - self._mean(better, keep))

    def gap_closed(self, real: str = "real", none: str = "none", text: str = "text") -> Interval:
        """(L_none - L_real) / (L_none - L_text): 0 reads nothing, 1 as well as from the text."""

        def share(keep: Tensor) -> float:
            empty = self._mean(none, keep)
            return (empty - self._mean(real, keep)) / (empty - self._mean(text, keep))

        return self._interval(share)

    def renamed(self, **names: str) -> "Scores":
        """The same scores under other names: ``renamed(none="none_own")``."""
        sums = {names.get(view, view): value for view, value in self.sums.items()}
        return Scores(self.labels, sums, self.counts)

    def only(self, keep: Sequence[bool]) -> "Scores":
        """The scores of the questions for which ``keep`` [pairs] says so."""
        if len(keep) != len(self.labels):
            raise ChatError(f"there are {len(self.labels)} questions, but {len(keep)} to choose by")
        index = torch.tensor([i for i, kept in enumerate(keep) if kept], dtype=torch.long)
        labels = tuple(self.labels[i] for i in index.tolist())
        sums = {view: value[index] for view, value in self.sums.items()}
        return Scores(labels, sums, self.counts[index])

    def __or__(self, other: "Scores") -> "Scores":
        if self.labels != other.labels or not torch.equal(self.counts, other.counts):
            raise ChatError("these scores are of different questions; evaluate the same items")
        return Scores(self.labels, {**self.sums, **other.sums}, self.counts)

    def _mean(self, view: str, keep: Tensor) -> float:
        return float(self.sums[view][keep].sum() / self.counts[keep].sum())

    def _interval(self, measure: Any, rounds: int = 1000) -> Interval:
        names = sorted(set(self.labels))
        where = {n: [i for i, label in enumerate(self.labels) if label == n] for n in names}
        drawn = random.Random(0)
        values = []
        for _ in range(rounds):
            some = drawn.choices(names, k=len(names))
            values.append(measure(torch.tensor([i for n in some for i in where[n]])))
        values.sort()
        whole = measure(torch.arange(len(self.labels)))
        return whole, values[int(0.025 * rounds)], values[int(0.975 * rounds) - 1]


@torch.no_grad()
def evaluate(
    reader: Reader,
    items: Any,
    qa: Any = None,
    *,
    views: Sequence[View] = ("real", "none", "shuffled"),
    worn: bool = True,
    batch_size: int = 16,
    show_progress: bool = False,
) -> Scores:
    """The loss of every question about items, under each view; see ``Reader.pairs``.

    ``worn=False`` measures reading without training: the plain model instead of the decoder.
    """
    listed = reader.asked_of(items, qa)
    shown = reader.show(listed) if {"real", "none", "shuffled"} & set(views) else None
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(0)
    for view in views:
        rows, given = reader.pairs(listed, view=view, shown=shown)
        found: list[Tensor] = []
        sizes: list[Tensor] = []
        steps = range(0, len(rows), batch_size)
        for i in tqdm(steps, f"evaluating {view}", disable=not show_progress):
            part = slice(i, i + batch_size)
            loss, count = reader.losses(rows[part], given[part], worn=worn)
            found.append(loss.double().cpu())
            sizes.append(count.cpu())
        sums[view], counts = torch.cat(found), torch.cat(sizes)
    return Scores(tuple(item.label for item in listed for _ in item.qa), sums, counts)


@torch.no_grad()
def choices(
    reader: Reader,
    items: Any,
    qa: Any = None,
    *,
    view: View = "real",
    options: int = 4,
    seed: int = 0,
    worn: bool = True,
) -> Interval:
    """How often the right answer is the likeliest of ``options``, with the interval over items.

    The other answers are those of other labels to questions of the same number, of the same kind
    ("persona-...", "goal-...") where there are enough.
    """
    listed = reader.asked_of(items, qa)
    if len({item.label for item in listed}) < options:
        raise ChatError(f"{options} options need as many labels, not {len(listed)}")
    shown: Sequence[Shown | None] = [None] * len(listed)
    if view in ("real", "none", "shuffled"):
        shown = reader.show(listed)
        shown = shuffled(shown) if view == "shuffled" else shown
    drawn = random.Random(seed)
    right: list[float] = []
    for item, own in zip(listed, shown, strict=True):
        for k, (question, answer) in enumerate(item.qa):
            wrong = _others(item, k, listed, options - 1, drawn)
            rows = _rows(reader, item, own, view, question, [answer, *wrong])
            given = None if view == "none" else own
            sums, counts = reader.losses(rows, [given] * len(rows), worn=worn)
            right.append(float((sums / counts).argmin() == 0))
    return _proportion(right)


@torch.no_grad()
def linear_choices(
    reader: Reader,
    train: Any,
    test: Any,
    qa: Any = None,
    *,
    options: int = 4,
    penalty: float = 0.1,
    seed: int = 0,
) -> Interval:
    """The same choice by a linear probe, which needs no decoder: the baseline to beat.

    A ridge regression from the mean of the shown activations to the mean embedding of the answer's
    tokens; the option whose embedding points the most in the predicted direction is taken.
    ``penalty`` is a share of the activations' mean variance.
    """
    taught, asked = reader.asked_of(train, qa), reader.asked_of(test, qa)
    x, y = _pooled(reader, taught), _embedded(reader, [i.qa[0][1] for i in taught])
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y)
    predicted = (_pooled(reader, asked) - x_mean) @ weight
    drawn = random.Random(seed)
    right: list[float] = []
    for item, direction in zip(asked, predicted, strict=True):
        for k, (_, answer) in enumerate(item.qa):
            wrong = _others(item, k, asked, options - 1, drawn)
            found = _embedded(reader, [answer, *wrong]) - y_mean
            right.append(float(torch.cosine_similarity(found, direction[None]).argmax() == 0))
    return _proportion(right)


def _pooled(reader: Reader, items: Sequence[Item]) -> Tensor:
    """The mean of what is shown of each item [items, D]."""
    return torch.stack([s.values.double().mean(0) for s in reader.show(items)]).cpu()


def _embedded(reader: Reader, answers: Sequence[str]) -> Tensor:
    """The mean input embedding of each answer's tokens [answers, D]."""
    rows = [reader.lm.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    weight = reader.lm.embedding.detach()
    return torch.stack([weight[torch.tensor(r)].double().mean(0) for r in rows]).cpu()


def _rows(
    reader: Reader,
    item: Item,
    shown: Shown | None,
    view: View,
    question: str,
    answers: Sequence[str],
) -> list[Row]:
    if shown is not None:
        return [reader.dialogue.row(len(shown.values), question, a) for a in answers]
    rows, _ = reader.pairs([_asked(item, question, a) for a in answers], view=view)
    return rows


def _asked(item: Item, question: str, answer: str) -> Item:
    return replace(item, qa=((question, answer),))


def _others(
    item: Item, number: int, items: Sequence[Item], count: int, drawn: random.Random
) -> list[str]:
    kind = item.label.split("-")[0]
    pool = {i.label: i.qa[min(number, len(i.qa) - 1)][1] for i in items if i.label != item.label}
    alike = {k: v for k, v in pool.items() if k.split("-")[0] == kind}
    chosen = alike if len(alike) >= count else pool
    return drawn.sample(list(chosen.values()), count)


def _proportion(right: Sequence[float]) -> Interval:
    """A proportion with its 95 % interval (Wilson)."""
    n, z = len(right), 1.96
    p = sum(right) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return p, middle - half, middle + half
