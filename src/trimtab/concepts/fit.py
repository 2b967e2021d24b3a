"""Fitting probes: to examples or to a recording, by mean difference, logistic regression or PCA.

Knows recordings, labels and solvers; knows no text. Letters: L layers, D width, N tokens, B rows.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from trimtab.artifact import Meta
from trimtab.concepts.heads import HeadProbe, by_head, head_count
from trimtab.concepts.probe import Probe
from trimtab.errors import PlaceError
from trimtab.lm import LM
from trimtab.place import Place
from trimtab.recording import Recording
from trimtab.solvers import (
    Tokens,
    auroc,
    first_component,
    in_groups,
    logistic,
    logistic_1d,
    token_rows,
)

log = logging.getLogger(__name__)

Method = Literal["mean", "logistic", "pca"]
METHODS = ("mean", "logistic", "pca")
HUGE = 1e18  # whose square is infinite in float32


class _FitOptions(TypedDict, total=False):
    l2: float
    held_out: float
    seed: int
    name: str | None
    batch_size: int
    show_progress: bool


class _RecordingOptions(TypedDict, total=False):
    l2: float
    held_out: float
    groups: Sequence[Any] | None
    seed: int
    device: str | torch.device | None


@overload
def fit(
    lm: LM,
    examples: Sequence[Any],
    place: Place | str = ...,
    method: Method = ...,
    *,
    normalize: bool = ...,
    per_head: Literal[True],
    **options: Unpack[_FitOptions],
) -> HeadProbe: ...


@overload
def fit(
    lm: LM,
    examples: Sequence[Any],
    place: Place | str = ...,
    method: Method = ...,
    *,
    normalize: bool = ...,
    per_head: Literal[False] = ...,
    **options: Unpack[_FitOptions],
) -> Probe: ...


def fit(
    lm: LM,
    examples: Sequence[Any],
    place: Place | str = "norm@0: answer[:16]",
    method: Method = "mean",
    *,
    normalize: bool = True,
    per_head: bool = False,
    l2: float = 1.0,
    held_out: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    batch_size: int = 32,
    show_progress: bool = True,
) -> Probe | HeadProbe:
    """Learn a concept from examples with ``prompt``, ``completion`` and ``label``.

    Records the examples at ``place`` and fits one probe per layer. A fraction ``held_out`` of the
    *prompts* is kept aside for ``heldout_accuracy`` and ``heldout_auroc``. ``per_head`` (at site
    "heads"; to read only, at "q", "k" and "v") takes the number of heads from the model's config.
    For the rest see ``fit_recording``.
    """
    examples = list(examples)
    if wrong := [e for e in examples if not hasattr(e, "label") or not hasattr(e, "prompt")]:
        raise PlaceError(
            f"fit takes examples with prompt, completion and label, not {type(wrong[0]).__name__}; "
            "read them with tt.data.read, or record and call fit_recording(recording, labels)"
        )
    labels = [float(e.label) for e in examples]
    _signed(labels, len(labels))  # these two raise before the work of recording
    _check_options(method, l2)
    n_heads = head_count(lm, Place.parse(place).site) if per_head else None
    recording = lm.record(examples, place, batch_size=batch_size, show_progress=show_progress)
    options: _RecordingOptions = {
        "l2": l2,
        "held_out": held_out,
        "groups": [e.prompt or e.completion for e in examples],
        "seed": seed,
        "device": lm.device if lm.device.type == "cuda" else "cpu",
    }
    flat = _fit(recording, labels, method, normalize, n_heads, **options)
    made_by = flat.meta.made_by | {"examples": len(examples)}
    flat = replace(flat, meta=Meta(name, lm.describe(), made_by, flat.meta.scores))
    return _headed(flat, recording, n_heads)


@overload
def fit_recording(
    recording: Recording,
    labels: Sequence[float] | Tensor,
    method: Method = ...,
    normalize: bool = ...,
    *,
    per_head: int,
    **options: Unpack[_RecordingOptions],
) -> HeadProbe: ...


@overload
def fit_recording(
    recording: Recording,
    labels: Sequence[float] | Tensor,
    method: Method = ...,
    normalize: bool = ...,
    *,
    per_head: None = ...,
    **options: Unpack[_RecordingOptions],
) -> Probe: ...


def fit_recording(
    recording: Recording,
    labels: Sequence[float] | Tensor,
    method: Method = "mean",
    normalize: bool = True,
    *,
    per_head: int | None = None,
    **options: Unpack[_RecordingOptions],
) -> Probe | HeadProbe:
    """Fit one probe per layer on a recording; all tokens of a row carry its label.

    ``method`` "mean": the difference of the class means, brought to unit length (for graded labels,
    the covariance with the label, which is the same direction for two classes). "logistic":
    the weights of a logistic regression with L2 penalty ``l2`` (scikit-learn's with C = 1/l2;
    graded labels are probabilities between the lowest and the highest). "pca": the first principal
    component of differences of random pairs of tokens, turned so that positives score higher.
    Unlike the paper's code, "logistic" does subtract the mean where it normalises, and "pca" takes
    the second moment of the differences, for which their random signs do not matter.

    ``normalize``: tokens are centred and brought to unit length first. For "mean" and "pca" a 1-d
    logistic fit (penalty ``l2``) on the projections gives ``gain`` and ``bias``. Like the paper's,
    the fits "mean" and "logistic" have a bias only where tokens are not centred; "pca" always has.

    Rows of one group (by default each its own) lie on one side of the split; rows without a token
    teach nothing. Where accuracy and AUROC need two classes, a row is positive if its label lies
    above the midpoint of the lowest and the highest; right at it, it is negative.

    Sums run on ``device`` (default: where the recording lies); what is larger than memory is read
    again for each pass. ``per_head``: that many heads share the width (of site "heads", "q", "k" or
    "v"), and each gets its own probe. Raises PlaceError for labels that do not fit and for
    activations that are NaN or infinite.
    """
    return _headed(
        _fit(recording, labels, method, normalize, per_head, **options), recording, per_head
    )


def _headed(flat: Probe, recording: Recording, n_heads: int | None) -> Probe | HeadProbe:
    if n_heads is None:
        return flat
    return HeadProbe(recording.place, recording.layers, n_heads, flat)


@torch.no_grad()
def _fit(
    recording: Recording,
    labels: Sequence[float] | Tensor,
    method: Method,
    normalize: bool,
    n_heads: int | None,
    *,
    l2: float = 1.0,
    held_out: float = 0.0,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Probe:
    """The probe of each layer, or of each head of each layer, as if they were layers."""
    whole = recording
    recording = recording if n_heads is None else by_head(recording, n_heads)
    _check_options(method, l2)
    y = _signed(labels, len(recording))
    listed = list(range(len(y)) if groups is None else groups)
    if len(listed) != len(y):
        raise PlaceError(f"{len(listed)} groups for {len(y)} rows; give one per row")
    keep = split(listed, y, held_out, seed)  # [B] bool
    with_tokens = torch.tensor(recording.lengths) > 0
    aside, keep = ~keep & with_tokens, keep & with_tokens
    if len(set(y[keep].sign().tolist()) - {0.0}) < 2:
        raise PlaceError(
            f"the training rows hold one class only ({int(keep.sum())} of {len(y)} rows, "
            f"held_out={held_out}); give more examples of both labels"
        )
    if held_out and not bool(aside.any()):
        log.warning(
            "held_out=%g keeps nothing aside: no second group (prompt) has rows with tokens; give "
            "examples of several prompts, or held_out=0",
            held_out,
        )
    task = _Task(y, keep, token_rows(recording), method, normalize, l2, seed, n_heads is None)
    fits: list[tuple[Tensor, ...]] = []
    for tokens in in_groups(recording, task.use, unit=normalize, device=device):
        if not bool(torch.isfinite(tokens.mean).all()):
            raise PlaceError(_told_not_finite(whole))
        fits.append(task.fit(tokens, fits[-1][0] if fits else None))
    weight, gain, bias, mean = (torch.cat([f[i] for f in fits]).float() for i in range(4))
    margins = torch.cat([f[4] for f in fits], 1)  # [N, L]
    right = ((margins > 0) == (y[task.rows] > 0)[:, None]).double()
    ranked = _row_means(torch.sigmoid(margins), task.rows, len(y))[aside]
    right = _row_means(right, task.rows, len(y))
    made_by = {"method": method, "normalize": normalize, "seed": seed, "rows": len(y)}
    return Probe(
        recording.place,
        recording.layers,
        weight,
        gain,
        bias,
        mean if normalize else None,
        right[keep].mean(0).float(),
        right[aside].mean(0).float(),
        auroc(ranked, y[aside] > 0).float(),
        Meta(None, recording.meta.get("model"), made_by | {"l2": l2}),
    )


def split(groups: Sequence[Any], labels: Tensor, held_out: float, seed: int) -> Tensor:
    """Which rows are for training, [B] bool: whole groups, about ``1 - held_out`` of them.

    Where anything is to be held out, one group of several is. By groups and seed alone: ``labels``
    do not matter, so that whoever compares with a probe has its split, whatever the labels.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a fraction in [0, 1), not {held_out!r}")
    unique = list(dict.fromkeys(groups))
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(round(held_out * len(unique)), int(held_out > 0 and len(unique) > 1))
    aside = {unique[i] for i in order[:count]}
    return torch.tensor([g not in aside for g in groups])


@dataclass(frozen=True)
class _Task:
    """What is to be learnt, and how: the same for every group of layers."""

    labels: Tensor  # [B], in [-1, 1]
    keep: Tensor  # [B] bool: the training rows
    rows: Tensor  # [N]: the row of each token, in the order of the chunks
    method: Method
    normalize: bool
    l2: float
    seed: int
    alike: bool  # whether one layer's weight tells something of the next one's

    @property
    def use(self) -> Tensor:
        """1 for training tokens, 0 for others, [N]."""
        return self.keep[self.rows].double()

    def fit(self, tokens: Tokens, before: Tensor | None) -> tuple[Tensor, ...]:
        """Weight [l, D], gain [l], bias [l], mean [l, D] and all tokens' logits [N, l].

        ``before``: the weight of the layers before these, if any.
        """
        gain, mean = torch.ones(tokens.layers, dtype=torch.float64), tokens.mean.cpu()
        if self.method == "logistic":
            weight, bias, margins = self._logistic(tokens, before)
        else:
            weight = self._pca(tokens) if self.method == "pca" else self._mean(tokens)
            scores, weight = tokens.times(weight).double().cpu().T, weight.cpu()  # [N, l]
            train, y = self.use > 0, self.labels[self.rows]
            with_bias = self.method == "pca" or not self.normalize
            gain, bias = logistic_1d(scores[train], y[train], with_bias=with_bias, l2=self.l2)
            margins = scores * gain + bias
        if not self.normalize:  # the tokens were centred here, but are not where the probe reads
            bias = bias - gain * (weight * mean).sum(-1)
        return weight, gain, bias, mean, margins

    def _mean(self, tokens: Tokens) -> Tensor:
        """The covariance of tokens with the label, of unit length."""
        use, y = self.use, self.labels[self.rows]
        centred = use * (y - (use * y).sum() / use.sum())
        weight = tokens.transposed(centred.to(tokens.device).expand(tokens.layers, -1))
        length: Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        return weight / length.clamp_min(1e-30)

    def _logistic(self, tokens: Tokens, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        targets = (self.labels[self.rows] + 1) / 2
        near = before is not None and self.normalize and self.alike
        weight, bias, logits = logistic(
            tokens,
            targets,
            l2=self.l2,
            with_bias=not self.normalize,
            start=before[-1:].expand(tokens.layers, -1) if before is not None and near else None,
        )
        return weight.cpu(), bias.cpu(), logits.cpu().T

    def _pca(self, tokens: Tokens) -> Tensor:
        """The first component of differences of random pairs, turned towards the positives.

        The original gives each difference a random sign and then subtracts their mean, which is
        zero but for chance. The second moment used here does not depend on the signs at all.
        """
        random = torch.Generator().manual_seed(self.seed)
        order = self.rows.argsort(stable=True)  # so that pairs do not depend on the chunks
        order = order[self.use[order] > 0]
        order = order[torch.randperm(len(order), generator=random)]
        pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
        start = torch.randn(tokens.width, generator=random).expand(tokens.layers, -1)
        weight = first_component(tokens, pairs, start)
        sign = (weight * self._mean(tokens)).sum(-1, keepdim=True).sign()
        return weight * torch.where(sign == 0, 1.0, sign)


def _check_options(method: str, l2: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if not 0 < l2 < float("inf"):
        raise ValueError(f"l2 is a positive number, not {l2!r}; 1.0 is the paper's")


def _signed(labels: Sequence[float] | Tensor, n_rows: int) -> Tensor:
    """Labels brought to [-1, 1], [B] float64."""
    try:
        y = torch.as_tensor(labels, dtype=torch.float64).flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlaceError(f"labels are numbers, one per row, not {labels!r:.60} ({error})") from None
    if len(y) != n_rows:
        raise PlaceError(f"{len(y)} labels for {n_rows} rows; give one label per row")
    if not n_rows:
        raise PlaceError("there are no rows to learn from; give examples of both labels")
    low, high = float(y.min()), float(y.max())
    if not bool(torch.isfinite(y).all()) or low == high:
        raise PlaceError(
            "labels must be finite and of two kinds at least, not "
            f"{list(dict.fromkeys(y.tolist()))[:8]}; give examples of both"
        )
    return 2 * (y - low) / (high - low) - 1


def _told_not_finite(recording: Recording) -> str:
    """Which rows hold activations that are NaN or infinite, and the first row's first layer."""
    found: dict[int, int] = {}
    for chunk in recording.chunks():
        bad = ~(chunk.values.float().abs() < HUGE).all(-1)  # [N, L]
        for row, part in zip(chunk.index, bad.split(list(chunk.lengths)), strict=True):
            if bool(part.any()):
                found[row] = recording.layers[int(part.any(0).int().argmax())]
    rows = sorted(found)
    return (
        f"row {rows[0]} holds activations that are NaN or infinite at {recording.place.site}, "
        f"layer {found[rows[0]]} (rows {rows[:8]}, {len(rows)} in all); float16 may have "
        "overflowed: load the model in bfloat16 or float32 and record again in one of them"
    )


def _row_means(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Tokens' values [N, L] averaged per row, [B, L]."""
    sums = torch.zeros(n_rows, values.shape[1], dtype=torch.float64).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=n_rows).clamp_min(1)[:, None]
