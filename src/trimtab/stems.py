"""Stems: what rows begin with alike is run once. Knows rows, edits and caches of keys and values.

Rows share a system prompt, a judge's examples, or a whole prompt under different edits of the
answer; a pass over all of them would compute the same keys and values again for each. A *stem* is
the first k tokens of some rows under the edits that act there. Its pass has a row for each stem,
and each row of the batch finds its stem's keys and values where its own would lie. Whether there
are stems hangs on the batch and its call alone. Letters: B rows, W columns, S stems, k tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.cache import Growing
from trimtab.chat import Batch
from trimtab.merge import Step, Worn
from trimtab.taps import Call, Clock

if TYPE_CHECKING:
    from trimtab.lm import LM

WORTH = 0.8  # of the tokens without stems: what a run with them may compute, at most


@dataclass(frozen=True)
class Stems:
    """S beginnings of ``length`` tokens: the rows that they are taken from, and whose each is."""

    length: int
    rows: Tensor  # [S] rows of the batch
    member: Tensor  # [B] stems
    steps: list[Step]  # of those rows, that act there

    @staticmethod
    def of(batch: Batch, call: Call) -> "Stems | None":
        """The stems of a batch, if there are any that save enough.

        None where something is read, where an edit hangs on a reading, and where rows are not
        padded on the left. No stem reaches the last token of a prompt.
        """
        longest = int(batch.prompt_len.min()) - 1
        left = bool((batch.mask[:, 1:] >= batch.mask[:, :-1]).all())
        if len(batch) < 2 or longest < 1 or not left:
            return None
        if call.readers or any(step.gate for step in call.steps):
            return None
        columns = (batch.ids.shape[1] - batch.lengths)[:, None] + torch.arange(longest).to(
            batch.ids
        )
        ids = batch.ids.gather(1, columns).cpu()
        positions = torch.arange(longest).expand(len(batch), -1)
        acting = [(step, _touched(step, positions)) for step in call.steps]
        alike = int((ids == ids[:1]).all(0).long().cumprod(0).sum())
        best, least = None, WORTH * batch.ids.numel()
        for length in {alike, longest} - {0}:
            found = _grouped(ids[:, :length], [(s, t[:, :length]) for s, t in acting])
            cost = len(found[0]) * length + len(batch) * (batch.ids.shape[1] - length)
            if cost <= least:
                best, least = (length, *found), cost
        if best is None:
            return None
        length, rows, member = best
        steps = [s.take(rows) for s, touched in acting if bool(touched[:, :length].any())]
        return Stems(length, rows, member, steps)


def begin(lm: "LM", batch: Batch, call: Call, cache: Any) -> int:
    """Fill an empty cache with the first columns of a batch, and say with how many: maybe none."""
    layers = cache.layers or [cache.layer_class_to_replicate]
    if any(Growing not in (layer, type(layer)) for layer in layers):
        return 0  # other layers keep more than keys and values, or drop some
    stems = Stems.of(batch, call)
    if stems is None:
        return 0
    k, rows = stems.length, stems.rows.to(batch.ids.device)
    first = (batch.ids.shape[1] - batch.lengths)[rows, None] + torch.arange(k).to(batch.ids)
    ids = batch.ids[rows].gather(1, first)
    inner = Call(Clock(torch.ones_like(ids)), stems.steps)
    with torch.no_grad(), lm.taps.carry(inner, lm.waits):
        lm.forward(ids, torch.ones_like(ids), torch.arange(k).expand_as(ids), cache=cache, keep=1)
    # Column c of a row holds its token c - (W - its length); before that there is padding.
    tokens = torch.arange(k)[None] + (batch.lengths - batch.ids.shape[1]).cpu()[:, None]
    for layer in cache.layers:
        layer.keys = _spread(layer.keys, stems.member, tokens.clamp_min(0))
        layer.values = _spread(layer.values, stems.member, tokens.clamp_min(0))
    return k


def _spread(x: Tensor, member: Tensor, tokens: Tensor) -> Tensor:
    """Keys or values [S, H, k, D] of stems as those of rows, [B, H, k, D]."""
    member, tokens = member.to(x.device), tokens.to(x.device)
    return x[member[:, None], :, tokens].transpose(1, 2).contiguous()


def _touched(step: Step, positions: Tensor) -> Tensor:
    """Where a step acts, bool [B, T]."""
    return step.choose(positions)[0] & step.acts.any(0)[:, None]


def _grouped(ids: Tensor, acting: list[tuple[Step, Tensor]]) -> tuple[Tensor, Tensor]:
    """One row of each kind [S], and the kind of each row [B]: its tokens, and what acts on them."""
    kinds = [[row.numpy().tobytes()] for row in ids]
    for step, touched in acting:
        if bool(touched.any()):
            marks = _marks(step).tolist()
            for kind, own, mark in zip(kinds, touched, marks, strict=True):
                kind += [own.numpy().tobytes(), mark if bool(own.any()) else b""]
    numbers: dict[tuple[Any, ...], int] = {}
    member = [numbers.setdefault(tuple(kind), len(numbers)) for kind in kinds]
    rows = [member.index(number) for number in range(len(numbers))]
    return torch.tensor(rows), torch.tensor(member)


def _marks(step: Step) -> Tensor:
    """A number for each row [B] that tells its values from those of any other."""
    shares = [b.scale for b in step.modules.values()] if isinstance(step, Worn) else []
    held = [step.acts.T.long(), *(v for v in shares if isinstance(v, Tensor))]
    held += [v.transpose(0, 1) for v in step.values.values() if v.shape[1] > 1]
    if step.counts is not None:
        held.append(step.counts[:, None])
    marks = torch.zeros(step.acts.shape[1], dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for value in held:
        whole = value.detach().reshape(len(value), -1).contiguous()
        whole = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
        odd = torch.randint(-(2**62), 2**62, whole.shape[1:], generator=generator) * 2 + 1
        for start in range(0, whole.shape[1], 1 << 16):  # as 8 bytes each they are large
            part = whole[:, start : start + (1 << 16)].long()
            marks += (part * odd[start : start + (1 << 16)].to(part.device)).sum(1).cpu()
    return marks
