"""The suffix gradient: how a judge's score falls with every activation of a prompt, in one pass.

Knows judges, edits and places; knows no search. The gradient is that of a loss with respect to a
zero ``Add`` at the place, so that one backward pass gives all layers. Letters: L layers, B rows,
N chosen prompt tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab import chat
from trimtab.chat import Batch, Encoded
from trimtab.edits import Add, Edit
from trimtab.errors import PlaceError
from trimtab.harvest import head_at
from trimtab.lm import LM
from trimtab.merge import Edits, spread
from trimtab.place import Place, Selection, Tokens
from trimtab.products import frozen
from trimtab.selfcontrol.judge import (
    Judge,
    Judges,
    Readings,
    Tail,
    agreement,
    encoded,
    groups,
    listed,
    perplexity_of,
    wanted,
)
from trimtab.taps import Reader

Objective = Literal["score", "cross_entropy"]
PROMPT = "resid@all prompt"


def gradient(
    lm: LM,
    prompts: Any,
    answers: Any,
    judge: Judges,
    place: Place | str = PROMPT,
    edits: Edits = None,
    objective: Objective = "score",
    *,
    label_smoothing: float = 0.0,
    clip: float | None = None,
    top_k: int | None = None,
    batch_size: int = 8,
) -> Tensor:
    """The gradient of the loss with respect to the activations of the prompt, [L, B, N, D].

    dLoss/dh at every layer and prompt token of ``place``, with ``edits`` in force; answer and
    question stay free. Rows with fewer than N tokens there end in zeros. The loss is -score, or the
    ``"cross_entropy"`` of the target word (with ``label_smoothing``); of several judges, their
    weighted mean. ``-step * gradient`` is the delta of an ``Add`` that lowers it. ``clip`` and
    ``top_k``: see ``shaped``. Raises PlaceError and ChatError.
    """
    rows = encoded(lm, prompts, answers)
    found = slopes(
        lm,
        rows,
        listed(judge),
        places_of(lm, place, rows),
        spread(edits, len(rows)),
        objective=objective,
        label_smoothing=label_smoothing,
        batch_size=batch_size,
    )
    return shaped(found.gradient, clip, top_k)


def shaped(gradient: Tensor, clip: float | None = None, top_k: int | None = None) -> Tensor:
    """A gradient [L, B, N, D] limited per position.

    ``clip``: g <- g min(1, clip / |g|). ``top_k``: of each row, only the k layer-token positions
    with the largest |g| are kept.
    """
    for name, value in (("clip", clip), ("top_k", top_k)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is above 0 or None, not {value!r}")
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    if clip is not None:
        gradient = gradient * (clip / norm.clamp_min(1e-30)).clamp_max(1.0)
    if top_k is None:
        return gradient
    flat = norm.transpose(0, 1).flatten(1)  # [B, L * N]
    chosen = flat.topk(min(int(top_k), flat.shape[1])).indices
    kept = torch.zeros_like(flat).scatter_(1, chosen, 1.0)
    return gradient * kept.view(norm.shape[1], norm.shape[0], -1, 1).transpose(0, 1)


@dataclass(frozen=True)
class Slopes:
    """``gradient`` [L, B, N, D], ``lengths`` |h| [L, B, N], and ``readings`` of the answers.

    All under the edits: where those do nothing, the readings are those without an edit, for which
    no other pass is needed. Their perplexity is NaN where it was not asked for.
    """

    gradient: Tensor
    lengths: Tensor
    readings: Readings


def slopes(
    lm: LM,
    rows: Sequence[Encoded],
    judges: Sequence[Judge],
    places: Sequence[Place],
    edits: Edits,
    *,
    objective: Objective = "score",
    label_smoothing: float = 0.0,
    perplexity: bool = False,
    batch_size: int = 8,
) -> Slopes:
    """The raw gradient for rows of ids, each with a place of its own (see ``places_of``)."""
    if objective not in ("score", "cross_entropy"):
        raise ValueError(f'objective is "score" or "cross_entropy", not {objective!r:.60}')
    counts = [count(place, row.prompt_len) for place, row in zip(places, rows, strict=True)]
    layers = len(places[0].layer_indices(lm.n_layers))
    total = torch.zeros(layers, len(rows), max(counts), lm.width, device=lm.device)
    lengths = total.new_zeros(total.shape[:3])
    weights = sum(judge.weight for judge in judges)
    score, fluency = torch.zeros(len(rows)), torch.full((len(rows),), math.nan)
    for number, judge in enumerate(judges):
        tail, reads = judge.tail(lm), perplexity and number == 0
        asked = [Encoded(row.ids + tail.ids, row.prompt_len) for row in rows]
        for group in groups([len(row.ids) for row in asked], batch_size):
            zeros = [
                total.new_zeros(layers, 1, counts[i], lm.width, requires_grad=True) for i in group
            ]
            with torch.enable_grad():
                own = [
                    _with_zero(_of_row(edits, i), places[i], zero)
                    for i, zero in zip(group, zeros, strict=True)
                ]
                batch = chat.pad([asked[i] for i in group], chat.pad_id(lm.tokenizer))
                at = [wanted(rows[i], tail, reads) for i in group]
                run = _Pass(lm, batch.to(lm.device), own, [places[i] for i in group], at)
                loss = _loss(judge, tail, run.last, objective, label_smoothing)
            found = agreement(judge, tail, run.last.detach()).cpu()
            score[group] += found * (judge.weight / weights)
            if reads:
                said = [perplexity_of(rows[i], x) for i, x in zip(group, run.before, strict=True)]
                fluency[group] = torch.tensor(said)
            for i, slope in zip(group, run.slopes(loss, zeros), strict=True):
                total[:, i, : counts[i]] += slope[:, 0] * (judge.weight / weights)
            lengths[:, group] = run.lengths(max(counts))
    return Slopes(total, lengths, Readings(score, fluency))


class _Pass:
    """One forward pass with edits, the head at wanted positions only, and what it read.

    ``at``: for each row the positions after which logits are wanted, the last of them its end.
    """

    def __init__(
        self,
        lm: LM,
        batch: Batch,
        edits: list[Edit],
        places: Sequence[Place],
        at: Sequence[Sequence[int]],
    ) -> None:
        lm._check_length(batch.ids.shape[1])
        self.lm, self.call = lm, lm._call(batch, edits, batch.lengths.tolist())
        prompt_len = batch.prompt_len.tolist()
        tokens = [Tokens.of(place.tokens) for place in places]
        selection = Selection.of(tokens, prompt_len, batch.lengths.tolist())
        self.counts = [count(p, n) for p, n in zip(places, prompt_len, strict=True)]
        self.reader = Reader(places[0], places[0].layer_indices(lm.n_layers), selection)
        self.call.add(self.reader)
        width, pads = batch.ids.shape[1], (batch.ids.shape[1] - batch.lengths).tolist()
        index = [r * width + pads[r] + p for r, own in enumerate(at) for p in own]
        head = head_at(lm.model, torch.tensor(index), batch.ids)
        with frozen(lm.model), head, lm.taps.carry(self.call, lm.waits):
            out = lm.forward(batch.ids, batch.mask, batch.positions)
        parts = out.logits[0].float().split([len(own) for own in at])
        self.last: Tensor = torch.stack([part[-1] for part in parts])  # [B, V]
        self.before = [part[:-1].detach() for part in parts]  # logits [n, V] before answer tokens

    def slopes(self, loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the loss with respect to the leaves; no parameter gets one."""
        with self.lm.replay(self.call):
            return torch.autograd.grad(loss, leaves)

    def lengths(self, width: int) -> Tensor:
        """|h| [L, B, width] at the chosen tokens."""
        layers = self.reader.passes[0][1]
        real = torch.arange(width)[None] < torch.tensor(self.counts)[:, None]
        norms = torch.zeros(len(layers), *real.shape, device=layers[0].device)
        read = [torch.linalg.vector_norm(x.detach().float(), dim=-1) for x in layers]
        norms[:, real.to(norms.device)] = torch.stack([x.to(norms.device) for x in read])
        return norms


def _loss(
    judge: Judge, tail: Tail, logits: Tensor, objective: Objective, label_smoothing: float
) -> Tensor:
    """The sum over rows: each row's gradient is its own."""
    if objective == "score":
        return -agreement(judge, tail, logits).sum()
    target = torch.full((len(logits),), tail.target, device=logits.device)
    return cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="sum")


def _with_zero(edit: Edit | None, place: Place, zero: Tensor) -> Edit:
    added = Add(place, zero)
    return added if edit is None else edit + added


def _of_row(edits: Edits, number: int) -> Edit | None:
    return edits if edits is None or isinstance(edits, Edit) else edits[number]


# -- places within a prompt ------------------------------------------------------------------------


def places_of(lm: LM, place: Place | str, rows: Sequence[Encoded]) -> list[Place]:
    """The place for each row alone: only tokens of its prompt, only layers that have the site.

    "all" means all of the prompt, for the answer stays free. Raises PlaceError where a row's prompt
    has no such token.
    """
    place = Place.parse(place)
    if place.site not in lm.sites():
        lm.anatomy.tap(place.site, 0)  # raises, with the sites that there are
    layers = lm._layers(place)
    if len(layers) != len(place.layer_indices(lm.n_layers)):
        place = place.at(layers=layers)
    return [_within(place, i, len(rows), row.prompt_len) for i, row in enumerate(rows)]


def _within(place: Place, number: int, n_rows: int, prompt_len: int) -> Place:
    tokens = Tokens.of(place.tokens)
    if tokens.positions is not None:
        if len(tokens.positions) not in (1, n_rows):
            raise PlaceError(
                f"{place!r} lists positions for {len(tokens.positions)} rows, but there are "
                f"{n_rows}; list them once for every row, or one list per row"
            )
        own = tokens.positions[number if len(tokens.positions) > 1 else 0]
        place = place.at(tokens=[p for p in own if p < prompt_len])
    elif tokens.span == "answer":
        raise PlaceError(
            f"{str(place)!r} names tokens of the answer, which stays free; name tokens of the "
            "prompt: prompt, or prompt[-8:]"
        )
    elif tokens.span == "all":
        place = place.at(tokens=str(replace(tokens, span="prompt")))
    if count(place, prompt_len) == 0:
        raise PlaceError(f"{str(place)!r} names no token of a prompt of {prompt_len} tokens")
    return place


def count(place: Place, prompt_len: int) -> int:
    """How many tokens of one row's prompt a place chooses."""
    tokens = Tokens.of(place.tokens)
    if tokens.positions is not None:
        return len(tokens.positions[0])
    return len(range(*tokens.interval(prompt_len, prompt_len), tokens.step))
