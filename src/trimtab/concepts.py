"""Concept guidance: linear probes of a concept, and the edits that their directions make.

After von Rütte et al. 2024 (arXiv 2402.14433). Knows recordings, labels and directions; knows no
text. Letters: L layers, D width, N tokens, B rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from trimtab.artifact import (
    Meta,
    Parts,
    check_model,
    json_list,
    register,
    register_foreign,
    save,
)
from trimtab.edits import Add, Readout, wide
from trimtab.errors import ArtifactError, PlaceError
from trimtab.lm import LM
from trimtab.place import LayerSpec, Place, TokenSpec
from trimtab.recording import Chunk, Recording, Track
from trimtab.solvers import (
    Tokens,
    auroc,
    first_component,
    in_groups,
    logistic,
    logistic_1d,
    token_rows,
)

Method = Literal["mean", "logistic", "pca"]
METHODS = ("mean", "logistic", "pca")
SCORES = ("accuracy", "heldout_accuracy", "heldout_auroc")
PARTS = ("weight", "gain", "bias", *SCORES)


@dataclass(frozen=True, eq=False)
class Probe:
    """A concept's direction at each layer of a place, and how well it reads there.

    ``weight`` [L, D], ``gain`` and ``bias`` [L]: the probability of the concept at a token x is
    ``sigmoid(gain (x.weight) + bias)``; with ``mean`` [L, D] the token is first centred and brought
    to unit length. ``accuracy`` and ``heldout_accuracy`` [L]: the fraction of tokens read right,
    averaged per row, then over rows. ``heldout_auroc`` [L]: how often ``predict`` ranks a held-out
    positive row above a negative one. NaN where nothing was held out. ``guidance`` holds the
    arguments of ``edit`` that tuning chose (``tt.evals.tune``), if it was tuned.
    """

    place: Place
    layers: tuple[int, ...]
    weight: Tensor
    gain: Tensor
    bias: Tensor
    mean: Tensor | None
    accuracy: Tensor
    heldout_accuracy: Tensor
    heldout_auroc: Tensor
    meta: Meta = field(default_factory=Meta)
    guidance: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        best = self.layers[int(self.accuracy.argmax())]
        name = self.meta.name or "unnamed"
        return f"Probe({name} at {self.place}, best layer {best}: {float(self.accuracy.max()):.3f})"

    @property
    def readout(self) -> Readout:
        """The probe as something to read: for ``lm.stream(read=...)`` and ``When``."""
        place = self.place.at(layers=self.layers)
        return Readout(place, self.weight, self.gain, self.bias, self.mean)

    def at(self, layers: LayerSpec) -> "Probe":
        """The probe at some of its layers."""
        chosen = self._indices(layers)
        where = self._where(chosen)
        narrowed: dict[str, Any] = {name: getattr(self, name)[where] for name in PARTS}
        mean = None if self.mean is None else self.mean[where]
        place = self.place.at(layers=chosen)
        return replace(self, place=place, layers=chosen, mean=mean, guidance=None, **narrowed)

    def predict(self, recording: Recording) -> Tensor:
        """The mean probability over each row's tokens, [B, L].

        Raises PlaceError for a recording of another site, other layers or another width, or with
        rows that hold no token; ArtifactError for one of another model.
        """
        self._check(recording)
        rows: dict[int, Tensor] = {}
        for chunk in recording.chunks():
            probability = torch.sigmoid(self._margin(chunk.values))
            parts = probability.split(list(chunk.lengths))
            rows |= {i: p.mean(0) for i, p in zip(chunk.index, parts, strict=True)}
        return torch.stack([rows[i] for i in sorted(rows)])

    def edit(
        self,
        scale: float | Sequence[float] | Tensor | None = None,
        layers: LayerSpec | None = None,
        top_layers: int | None = None,
        keep_norm: bool | None = None,
        dose: float | Sequence[float] | Tensor | None = None,
        tokens: TokenSpec | None = None,
    ) -> Add:
        """The edit that adds ``scale`` (16) times the unit direction at each chosen layer.

        ``dose`` instead of ``scale`` is a fraction of each activation's own length, which carries
        over between layers and models. Either is one number or one per layer; a negative one steers
        away. ``tokens="answer"`` is the paper's ``only_last``. ``layers``: given, else the
        ``top_layers`` (16) with the best accuracy on the training rows. ``keep_norm`` (yes):
        x' = |x| (x + a w) / |x + a w|, the paper's form. ``tokens``: all. A tuned probe asked for
        nothing of this steers by its ``guidance``.
        """
        asked = (scale, layers, top_layers, keep_norm, dose, tokens)
        if self.guidance is not None and all(one is None for one in asked):
            return self.edit(**self.guidance)
        if dose is not None and scale is not None:
            raise PlaceError("scale= and dose= both say how strongly to steer; give one of them")
        top = 16 if top_layers is None else top_layers
        chosen = self.best_layers(top) if layers is None else self._indices(layers)
        direction = self.weight[self._where(chosen)].float()
        length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        direction = direction / length.clamp_min(1e-30)
        scale = 16.0 if scale is None else scale
        strength = torch.as_tensor(scale if dose is None else dose, dtype=torch.float32)
        if strength.dim() and strength.shape != (len(chosen),):
            raise PlaceError(
                f"{list(strength.shape)} strengths for {len(chosen)} layers; give one number, or "
                "one per layer"
            )
        delta = strength.reshape(-1, 1) * direction
        place = self.place.at(
            layers=chosen, tokens="all" if tokens is None else tokens, before=False
        )
        made_by = {"from": "probe", **self.meta.made_by}
        meta = replace(self.meta, made_by=made_by)
        kept = keep_norm is None or keep_norm
        return Add(place, delta, keep_norm=kept, relative=dose is not None, meta=meta)

    def as_edit(self) -> Add:
        """What this probe stands for as an argument ``edits``: its tuned edit.

        Raises PlaceError where it was not tuned.
        """
        if self.guidance is None:
            raise PlaceError(
                "this probe was not tuned, so it does not say how strongly to steer: give "
                "probe.edit(dose=0.02), or tune it (tt.evals.tune, trimtab tune)"
            )
        return self.edit()

    def named(self, name: str) -> "Probe":
        """The same probe under a name."""
        return replace(self, meta=replace(self.meta, name=name))

    def untied(self) -> "Probe":
        """The same probe without the model that it was made for: any of its width takes it."""
        return replace(self, meta=replace(self.meta, model=None))

    def save(self, path: str | Path) -> None:
        """Write the probe as an artifact folder (see ``tt.load``)."""
        tensors = {n: t for n in (*PARTS, "mean") if (t := getattr(self, n)) is not None}
        shown = [n for n in SCORES if bool(torch.isfinite(getattr(self, n)).any())]
        scores = {n: json_list(getattr(self, n)) for n in ("accuracy", *shown)}
        scores = dict(self.meta.scores) | scores
        meta = replace(self.meta, scores=scores)
        extra: dict[str, Any] = {"layers": list(self.layers)}
        if self.guidance is not None:
            extra["guidance"] = dict(self.guidance)
        save(path, Parts("probe", meta, str(self.place), extra, tensors))

    def best_layers(self, count: int) -> tuple[int, ...]:
        """The ``count`` layers with the best training accuracy, ascending."""
        if count < 1:
            raise PlaceError(f"top_layers is 1 or more, not {count!r}")
        if count < len(self.layers) and not bool(torch.isfinite(self.accuracy).all()):
            raise PlaceError(
                f"this probe has no accuracy to choose {count} of its {len(self.layers)} layers "
                "by; give layers="
            )
        order = self.accuracy.argsort(descending=True, stable=True)[:count]
        return tuple(sorted(self.layers[i] for i in order.tolist()))

    def _indices(self, layers: LayerSpec) -> tuple[int, ...]:
        """Layers as numbers; -1 is the model's last layer where the model is known."""
        depth = (self.meta.model or {}).get("layers") or max(self.layers) + 1
        return Place(self.place.site, layers).layer_indices(depth)

    def _check(self, recording: Recording) -> None:
        mine, theirs = self.meta.model, recording.meta.get("model")
        if mine and theirs:
            check_model(self.meta, theirs)
        have = (recording.place.site, recording.layers, recording.width)
        if have != (self.place.site, self.layers, self.weight.shape[-1]):
            raise PlaceError(
                f"this probe reads {self.place.site} at layers {list(self.layers)}, width "
                f"{self.weight.shape[-1]}; the recording holds {have[0]} at {list(have[1])}, width "
                f"{have[2]}. Narrow the one with recording[place], the other with probe.at(layers)"
            )
        if empty := [i for i, n in enumerate(recording.lengths) if n == 0]:
            raise PlaceError(
                f"rows {empty[:8]} hold no token at {str(recording.place)!r}; leave them out"
            )

    def _where(self, layers: Iterable[int]) -> list[int]:
        missing = [i for i in layers if i not in self.layers]
        if missing:
            raise PlaceError(f"this probe has no layers {missing}; it has {list(self.layers)}")
        return [self.layers.index(i) for i in layers]

    def _margin(self, values: Tensor) -> Tensor:
        """The logits [N, L] of tokens [N, L, D]."""
        x = _unit(values.to(wide(values.dtype)), self.mean)
        return torch.einsum("nld,ld->nl", x, self.weight.to(x.dtype)) * self.gain + self.bias


@dataclass(frozen=True, eq=False)
class HeadProbe:
    """A concept's direction in each attention head, read where the output projection begins.

    Letters: H heads, d their width. ``weight`` and ``mean`` [L, H, d]; ``gain``, ``bias``,
    ``accuracy``, ``heldout_accuracy`` and ``heldout_auroc`` [L, H]: as of a ``Probe``, one for each
    head. ``flat`` is that probe of L H rows.
    """

    place: Place
    layers: tuple[int, ...]
    n_heads: int
    flat: Probe

    def __repr__(self) -> str:
        (best,) = self.best_heads(1)
        told = f"best layer {best[0]}, head {best[1]}: {float(self.accuracy.max()):.3f}"
        return f"HeadProbe({self.meta.name or 'unnamed'} at {self.place}, {told})"

    def __getattr__(self, name: str) -> Tensor:
        if name not in PARTS:
            raise AttributeError(f"a HeadProbe has no {name!r}; it has {', '.join(PARTS)}")
        return self._split(getattr(self.flat, name))

    @property
    def mean(self) -> Tensor | None:
        """What tokens are centred by, [L, H, d], or None where they are not."""
        return None if self.flat.mean is None else self._split(self.flat.mean)

    @property
    def meta(self) -> Meta:
        """Name, model and origin."""
        return self.flat.meta

    def predict(self, recording: Recording) -> Tensor:
        """The mean probability over each row's tokens, [B, L, H]; see ``Probe.predict``."""
        if (recording.place.site, recording.layers) != (self.place.site, self.layers):
            raise PlaceError(
                f"this probe reads {self.place.site} at layers {list(self.layers)}; the recording "
                f"holds {recording.place.site} at {list(recording.layers)}"
            )
        read = self.flat.predict(_by_head(recording, self.n_heads))
        return self._split(read.T).movedim(-1, 0)

    def best_heads(self, count: int) -> list[tuple[int, int]]:
        """The ``count`` pairs (layer, head) with the best training accuracy, best first."""
        if count < 1:
            raise PlaceError(f"top_heads is 1 or more, not {count!r}")
        order = self.flat.accuracy.argsort(descending=True, stable=True)[:count].tolist()
        return [(self.layers[i // self.n_heads], i % self.n_heads) for i in order]

    @torch.no_grad()
    def edit(
        self,
        lm: LM,
        scale: float = 16.0,
        *,
        top_heads: int = 16,
        heads: Iterable[tuple[int, int]] | None = None,
        tokens: TokenSpec = "all",
    ) -> Add:
        """The edit that adds ``scale`` times the unit direction to the output of some heads.

        Inference-time intervention (Li et al. 2023, arXiv 2306.03341), without its factor of the
        activations' deviation. The output projection is linear, so a shift of its input is the
        projected shift of what attention returns: an ``Add`` at site "attn". ``heads``: pairs
        (layer, head), else the ``top_heads`` with the best training accuracy.
        """
        check_model(self.meta, lm.describe())
        if self.place.site != "heads":
            raise PlaceError(
                f"this probe reads heads of site {self.place.site!r}; what heads return is read at "
                'site "heads": fit one there to steer by it'
            )
        chosen = sorted(set(self.best_heads(top_heads) if heads is None else heads))
        known = {(i, h) for i in self.layers for h in range(self.n_heads)}
        if wrong := [pair for pair in chosen if pair not in known] or not chosen:
            raise PlaceError(
                f"this probe has no heads {wrong if chosen else []}; it has layers "
                f"{list(self.layers)}, each with heads 0..{self.n_heads - 1}, as (layer, head)"
            )
        shift = torch.zeros_like(self.weight)
        for layer, head in chosen:
            row = self.layers.index(layer), head
            length = torch.linalg.vector_norm(self.weight[row])
            shift[row] = float(scale) * self.weight[row] / length.clamp_min(1e-30)
        layers = sorted({layer for layer, _ in chosen})
        delta = [_projected(lm, i, shift[self.layers.index(i)].flatten()) for i in layers]
        place = Place("attn", layers, tokens)
        made_by = {"from": "head-probe", **self.meta.made_by, "heads": [list(p) for p in chosen]}
        return Add(place, torch.stack(delta), meta=replace(self.meta, made_by=made_by))

    def named(self, name: str) -> "HeadProbe":
        """The same probe under a name."""
        return replace(self, flat=self.flat.named(name))

    def untied(self) -> "HeadProbe":
        """The same probe without the model that it was made for."""
        return replace(self, flat=self.flat.untied())

    def save(self, path: str | Path) -> None:
        """Write the probe as an artifact folder (see ``tt.load``)."""
        tensors = {n: t for n in (*PARTS, "mean") if (t := getattr(self, n)) is not None}
        extra = {"layers": list(self.layers), "heads": self.n_heads}
        save(path, Parts("head-probe", self.meta, str(self.place), extra, tensors))

    def _split(self, values: Tensor) -> Tensor:
        """Values [L H, ...] as [L, H, ...]."""
        return values.reshape(len(self.layers), self.n_heads, *values.shape[1:])


def _by_head(recording: Recording, n_heads: int) -> Recording:
    """The same tokens with each head as a layer of its own: rows [T_i, L H, d] (views)."""
    if n_heads < 1 or recording.width % n_heads:
        raise PlaceError(
            f"a width of {recording.width} at {recording.place.site} does not fall into {n_heads} "
            "heads; record the site heads, and give the number of attention heads of its model"
        )
    count = len(recording.layers) * n_heads
    chunks = [
        Chunk(c.index, c.lengths, c.values.unflatten(-1, (n_heads, -1)).flatten(1, 2))
        for c in recording.chunks()
    ]
    place = recording.place.at(layers=range(count))
    return Recording({place: Track(tuple(range(count)), chunks)}, recording.meta)


def _projected(lm: LM, layer: int, shift: Tensor) -> Tensor:
    """What a shift of the output projection's input, [H d], does to its output, [D]."""
    projection, _ = lm.anatomy.tap("heads", layer)
    weight = next(projection.parameters())
    moved = torch.stack([shift, torch.zeros_like(shift)]).to(weight.device, lm.model.dtype)[None]
    ends: Tensor = projection(moved)[0].float().cpu()  # a module knows its own layout and bias
    return ends[0] - ends[1]


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
    "heads") takes the number of heads from the model's config. For the rest see ``fit_recording``.
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
    recording = lm.record(examples, place, batch_size=batch_size, show_progress=show_progress)
    options: _RecordingOptions = {
        "l2": l2,
        "held_out": held_out,
        "groups": [e.prompt or e.completion for e in examples],
        "seed": seed,
        "device": lm.device if lm.device.type == "cuda" else "cpu",
    }
    n_heads = lm.text_config.num_attention_heads if per_head else None
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
    teach nothing. Sums run on ``device`` (default: where the recording lies); what is larger than
    memory is read again for each pass. ``per_head``: that many heads share the width (of site
    "heads"), and each gets its own probe. Raises PlaceError for labels that do not fit.
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
    recording = recording if n_heads is None else _by_head(recording, n_heads)
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
    task = _Task(y, keep, token_rows(recording), method, normalize, l2, seed)
    fits = [
        task.fit(tokens) for tokens in in_groups(recording, task.use, unit=normalize, device=device)
    ]
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

    Where anything is to be held out, one group of several is.
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

    @property
    def use(self) -> Tensor:
        """1 for training tokens, 0 for others, [N]."""
        return self.keep[self.rows].double()

    def fit(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weight [l, D], gain [l], bias [l], mean [l, D] and all tokens' logits [N, l]."""
        gain, mean = torch.ones(tokens.layers, dtype=torch.float64), tokens.mean.cpu()
        if self.method == "logistic":
            weight, bias = self._logistic(tokens)
        else:
            weight = self._pca(tokens) if self.method == "pca" else self._mean(tokens)
        scores, weight = tokens.times(weight).double().cpu().T, weight.cpu()  # [N, l]
        if self.method != "logistic":
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

    def _logistic(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        targets = (self.labels[self.rows] + 1) / 2
        weight, bias = logistic(tokens, targets, l2=self.l2, with_bias=not self.normalize)
        return weight, bias.cpu()

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


def _unit(x: Tensor, mean: Tensor | None) -> Tensor:
    """Centred and brought to unit length, [N, L, D]; unchanged without a mean."""
    if mean is None:
        return x
    x = x - mean.to(x.dtype)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


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


def _row_means(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Tokens' values [N, L] averaged per row, [B, L]."""
    sums = torch.zeros(n_rows, values.shape[1], dtype=torch.float64).index_add_(0, rows, values)
    return sums / torch.bincount(rows, minlength=n_rows).clamp_min(1)[:, None]


def _load(parts: Parts) -> Probe:
    t, needed = dict(parts.tensors), PARTS
    if "accuracy" in t:  # written before there was an AUROC
        t.setdefault("heldout_auroc", torch.full_like(t["accuracy"], float("nan")))
    if parts.place is None or any(n not in t for n in needed):
        raise ArtifactError(f"this probe lacks some of {', '.join(needed)}; fetch a fresh copy")
    values: dict[str, Any] = {name: t[name] for name in needed} | {"mean": t.get("mean")}
    place, layers = Place.parse(parts.place), tuple(parts.extra["layers"])
    guidance = _guidance(parts.extra.get("guidance"))
    probe = Probe(place=place, layers=layers, meta=parts.meta, guidance=guidance, **values)
    shapes = {tuple(values[name].shape) for name in needed[1:]} | {(len(probe.readout.weight),)}
    if shapes != {(len(layers),)}:
        raise ArtifactError(f"this probe names {len(layers)} layers, but holds shapes {shapes}")
    return probe


def _load_heads(parts: Parts) -> HeadProbe:
    layers, heads = parts.extra["layers"], parts.extra["heads"]
    tensors = {name: t.flatten(0, 1) for name, t in parts.tensors.items()}
    if parts.place is None or tensors["gain"].shape != (len(layers) * heads,):
        raise ArtifactError(
            f"this probe names {len(layers)} layers of {heads} heads, but holds a gain of "
            f"{list(parts.tensors['gain'].shape)}"
        )
    place = Place.parse(parts.place)
    rows = list(range(len(layers) * heads))
    flat = Parts("probe", parts.meta, str(place.at(layers=rows)), {"layers": rows}, tensors)
    return HeadProbe(place, tuple(layers), heads, _load(flat))


def _guidance(found: Any) -> dict[str, Any] | None:
    """The arguments of ``edit`` that an artifact holds: layers, tokens and a dose."""
    if found is None:
        return None
    wanted = {"layers": list, "tokens": str, "dose": int | float}
    fits = isinstance(found, dict) and set(found) == set(wanted)
    if not fits or not all(isinstance(found[k], kind) for k, kind in wanted.items()):
        raise ArtifactError(f"this probe's guidance is {found!r:.80}; tune it again")
    return dict(found)


def _read_release(tensors: dict[str, Tensor], file: Path) -> Probe | None:
    """The release files of concept guidance: W [L, D], maybe b (bias) and a (gain), [L]."""
    if "W" not in tensors:
        return None
    weight = tensors["W"].float()
    weight = weight.squeeze(1) if weight.dim() == 3 else weight
    if weight.dim() != 2:
        raise ArtifactError(f"W in {file} has shape {list(tensors['W'].shape)}, expected [L, D]")
    n = len(weight)
    gain, bias = (
        tensors.get(k, d).float().reshape(-1)
        for k, d in (("a", torch.ones(n)), ("b", torch.zeros(n)))
    )
    if wrong := [k for k, v in (("a", gain), ("b", bias)) if len(v) != n]:
        shape = list(tensors[wrong[0]].shape)
        raise ArtifactError(f"{wrong[0]} in {file} has shape {shape}, but W has {n} layers")
    nothing = torch.full((n,), float("nan"))
    meta = Meta(file.stem, None, {"method": "concept-guidance release", "file": file.name})
    place = Place("norm", range(n))
    layers = tuple(range(n))
    return Probe(place, layers, weight, gain, bias, None, nothing, nothing, nothing, meta)


register("probe", _load)
register("head-probe", _load_heads)
register_foreign(_read_release)
