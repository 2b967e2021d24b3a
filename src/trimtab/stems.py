"""Stems: what rows begin with alike is run once. Knows rows, edits and caches of keys and values.

Rows share a system prompt, a judge's examples, or a whole prompt under different edits of the
answer; a pass over all of them would compute the same keys and values again for each. A *stem* is
the first k tokens of some rows, before the first that any edit touches. Its pass has a row for each
stem, and each row of the batch finds its stem's keys and values where its own would lie. Whether
there are stems hangs on the batch and its call alone. Letters: B rows, W columns, S stems.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.cache import Growing
from trimtab.chat import Batch
from trimtab.taps import Call, Clock

if TYPE_CHECKING:
    from trimtab.lm import LM

WORTH = 0.8  # of the tokens without stems: what a run with them may compute, at most


def begin(lm: "LM", batch: Batch, call: Call, cache: Any) -> int:
    """Fill an empty cache with the first columns of a batch, and say with how many: maybe none."""
    layers = cache.layers or [cache.layer_class_to_replicate]
    if any(Growing not in (layer, type(layer)) for layer in layers):
        return 0  # other layers keep more than keys and values, or drop some
    ids, member = stems(batch, call)
    if not (k := ids.shape[1]):
        return 0
    ones = torch.ones_like(ids)
    with torch.no_grad(), lm.taps.carry(Call(Clock(ones)), lm.waits):
        lm.forward(ids, ones, torch.arange(k).expand_as(ids), cache=cache, keep=1)
    # Column c of a row holds its token c - (W - its length); before that there is padding.
    tokens = torch.arange(k) + (batch.lengths - batch.ids.shape[1]).cpu()[:, None]
    for layer in cache.layers:
        layer.keys = _spread(layer.keys, member, tokens.clamp_min(0))
        layer.values = _spread(layer.values, member, tokens.clamp_min(0))
    return k


def stems(batch: Batch, call: Call) -> tuple[Tensor, Tensor]:
    """The stems' ids [S, k], and the stem of each row [B]; k is 0 where they would save too little.

    So it is, too, where something is read, where an edit hangs on a reading, and where rows are not
    padded on the left. No stem reaches the last token of a prompt.
    """
    longest = int(batch.prompt_len.min()) - 1
    left = bool((batch.mask[:, 1:] >= batch.mask[:, :-1]).all())
    if call.readers or any(step.gate for step in call.steps) or len(batch) < 2 or not left:
        longest = 0
    positions = torch.arange(max(longest, 0)).expand(len(batch), -1)
    touched = torch.zeros(positions.shape, dtype=torch.bool)
    for step in call.steps:
        touched |= step.choose(positions)[0] & step.acts.any(0)[:, None]
    longest = int((~touched.any(0)).long().cumprod(0).sum())
    first = (batch.ids.shape[1] - batch.lengths)[:, None]
    ids = batch.ids.gather(1, first + torch.arange(longest).to(batch.ids))  # [B, longest]
    alike = int((ids == ids[:1]).all(0).long().cumprod(0).sum())
    found, least = (ids[:, :0], torch.zeros(len(ids)).long()), WORTH * batch.ids.numel()
    for length in sorted({alike, longest} - {0}):
        kinds, member = torch.unique(ids[:, :length], dim=0, return_inverse=True)
        cost = kinds.numel() + len(batch) * (batch.ids.shape[1] - length)
        if cost <= least:
            found, least = (kinds, member), cost
    return found


def _spread(x: Tensor, member: Tensor, tokens: Tensor) -> Tensor:
    """Keys or values [S, H, k, D] of stems as those of rows, [B, H, k, D]."""
    member, tokens = member.to(x.device), tokens.to(x.device)
    return x[member[:, None], :, tokens].transpose(1, 2).contiguous()
