"""Profiles: how a dose is best spread over layers, found by slopes instead of by trying.

What steering is for, and what it costs, are both losses that can be differentiated with respect to
the dose of each layer: how much likelier a concept's texts become than their opposites (a slope
g), and how fast the perplexity of ordinary answers rises (a curvature H, for at dose 0 it is about
least). For small doses d the most of g.d at a given d.H.d is at d = H^-1 g, up to its length.
Neighbouring layers share much of their direction, so they share a dose, in a dozen groups at most;
H is nearly singular all the same, and damped. Knows the model and probes; generates no text.
Letters: L layers, G groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.concepts import Probe
from trimtab.errors import ChatError
from trimtab.evals.sweep import Pieces, Row
from trimtab.lm import LM
from trimtab.products import frozen

GROUPS = 12
DAMPING = (0.3, 1.0, 3.0)  # in mean eigenvalues of H: one profile for each
SMALL = 0.02  # the dose at which the curvature is measured
CONTRASTED = 24  # examples of each kind
READ = 6  # ordinary answers
TOGETHER = 6  # texts in one backward pass, whose memory grows with them

Weighted = list[tuple[Any, str | None, float]]  # prompt, answer (None: an Example), weight


def profiles(
    lm: LM,
    probe: Probe,
    tokens: str,
    first: tuple[int, float] | None,
    examples: Sequence[Any],
    pairs: Sequence[tuple[Any, str]],
    pieces: Pieces,
) -> list[tuple[float, ...]]:
    """Relative doses of the probe's layers, the largest 1: one profile for each damping.

    ``examples``: labelled texts of the concept; ``pairs``: prompts with ordinary answers. Raises
    ChatError for examples of one kind only. Slopes are kept by ``pieces`` as they are found.
    """
    texts = contrast(examples)
    every = -(-len(pairs) // READ)
    plain: Weighted = [(p, a, -1.0 / len(pairs[::every])) for p, a in pairs[::every]]
    layers = torch.arange(len(probe.layers))
    count = min(GROUPS, len(layers))
    member = (layers * count // len(layers) == torch.arange(count)[:, None]).float()  # [G, L]

    def found(rows: list[Row]) -> list[list[float]]:
        made = []
        for _, number in rows:  # -2: the concept; -1: the perplexity; then at a dose in each group
            doses = SMALL * member[number] if number >= 0 else torch.zeros(len(layers))
            some = texts if number == -2 else plain
            made.append((member @ slope(lm, probe, tokens, some, doses, first)).tolist())
        return made

    rows = [(0, number) for number in range(-2, count)]
    one_by_one = Pieces(pieces.journal, 1, pieces.show_progress)
    stage = f"slopes by layer, {tokens}" + (f", first {first}" if first else "")
    slopes = one_by_one.work(stage, rows, found)
    gain, cost, *moved = (torch.tensor(slopes[row], dtype=torch.float64) for row in rows)
    curvature = (torch.stack(moved) - cost) / SMALL
    made = (solved(curvature, gain, damping) for damping in DAMPING)
    return [tuple((torch.tensor(own) @ member).tolist()) for own in made]


def solved(curvature: Tensor, gain: Tensor, damping: float) -> tuple[float, ...]:
    """(H + damping)^-1 g, its largest number 1 or -1: ``curvature`` [G, G], ``gain`` [G]."""
    values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
    values = values.clamp_min(0)  # what the finite step left below it
    inverse = 1 / (values + damping * values.mean().clamp_min(1e-12))
    doses = vectors @ (inverse * (vectors.T @ gain))
    return tuple((doses / doses.abs().max().clamp_min(1e-30)).tolist())


def contrast(examples: Sequence[Any]) -> Weighted:
    """Some examples of both kinds, weighted so that a sum is the one's mean less the other's."""
    middle = sum(e.label for e in examples) / max(1, len(examples))
    kinds = [[e for e in examples if (e.label > middle) is above] for above in (True, False)]
    if not all(kinds):
        raise ChatError("tuning by examples takes examples of two labels; leave examples= out")
    some = [kind[:: -(-len(kind) // CONTRASTED)] for kind in kinds]
    return [
        (e, None, s / len(kind)) for kind, s in zip(some, (1.0, -1.0), strict=True) for e in kind
    ]


def slope(
    lm: LM,
    probe: Probe,
    tokens: str,
    texts: Weighted,
    doses: Tensor,
    first: tuple[int, float] | None = None,
) -> Tensor:
    """The gradient [L] at ``doses`` [L] of the weighted sum of the texts' mean log-likelihoods."""
    doses = doses.clone().requires_grad_(True)
    total = torch.zeros_like(doses)
    texts = sorted(texts, key=lambda text: len(str(text[0])) + len(text[1] or ""))
    for start in range(0, len(texts), TOGETHER):
        asked, answers, weights = zip(*texts[start : start + TOGETHER], strict=True)
        with torch.enable_grad(), frozen(lm.model):
            edit = probe.edit(layers=list(probe.layers), tokens=tokens, dose=doses, first=first)
            said = None if answers[0] is None else list(answers)
            scores = lm.score(list(asked), said, edit)
            loss = (scores * torch.tensor(weights).to(scores)).sum()
            total += torch.autograd.grad(loss, doses)[0]
    return total
