"""A probe: a concept's direction at each layer, what it reads, and the edits that it makes.

Knows recordings, artifacts and directions; knows nothing of how a direction was found.
Letters: L layers, D width, N tokens, B rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from trimtab.edits import Add, Edit, EditLike, Readout, wide
from trimtab.errors import ArtifactError, PlaceError
from trimtab.place import SPANS, LayerSpec, Place, TokenSpec
from trimtab.recording import Recording

SCORES = ("accuracy", "heldout_accuracy", "heldout_auroc")
PARTS = ("weight", "gain", "bias", *SCORES)


@dataclass(frozen=True, eq=False)
class Probe(EditLike):
    """A concept's direction at each layer of a place, and how well it reads there.

    ``weight`` [L, D], ``gain`` and ``bias`` [L]: the probability of the concept at a token x is
    ``sigmoid(gain (x.weight) + bias)``; with ``mean`` [L, D] the token is first centred and brought
    to unit length. ``accuracy`` and ``heldout_accuracy`` [L]: the fraction of tokens read right,
    averaged per row, then over rows. ``heldout_auroc`` [L]: how often ``predict`` ranks a held-out
    positive row above a negative one. NaN where nothing was held out. ``guidance`` holds the
    arguments of ``edit`` that tuning chose (``tt.evals.tune``), if it was tuned: then the probe
    stands for that edit, also in arithmetic (``0.5 * humor + calm``).
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
        weights: Sequence[float] | None = None,
        first: tuple[int, float] | None = None,
    ) -> Edit:
        """The edit that adds ``scale`` (16) times the unit direction at each chosen layer.

        ``dose`` instead of ``scale`` is a fraction of each activation's own length, which carries
        over between layers and models. Either is one number, or one for each of ``layers`` in the
        order in which they are given; a negative one steers away. ``tokens="answer"`` is the
        paper's ``only_last``. ``layers``: given, else the ``top_layers`` (16) with the best
        accuracy on the training rows. ``keep_norm`` (yes): x' = |x| (x + a w) / |x + a w|, the
        paper's form. ``tokens``: all. ``weights``: the share of the strength that each layer gets
        (all of it). ``first`` (n, factor): the first n of the tokens take ``factor`` times the
        strength; then ``tokens`` is a span without a slice. A tuned probe asked for nothing of this
        steers by its ``guidance``.
        """
        asked = (scale, layers, top_layers, keep_norm, dose, tokens, weights, first)
        if self.guidance is not None and all(one is None for one in asked):
            return self.edit(**self.guidance)
        if dose is not None and scale is not None:
            raise PlaceError("scale= and dose= both say how strongly to steer; give one of them")
        top = 16 if top_layers is None else top_layers
        listed = [*self.best_layers(top)] if layers is None else self._listed(layers)
        chosen = tuple(sorted(set(listed)))
        direction = self.weight[self._where(chosen)].float()
        length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        direction = direction / length.clamp_min(1e-30)
        scale = 16.0 if scale is None else scale
        strength = _numbers(scale if dose is None else dose, direction.device)
        share = _numbers(1.0 if weights is None else weights, direction.device)
        for what, values in (("strengths", strength), ("weights", share)):
            if values.dim() and not values.shape == (len(chosen),) == (len(listed),):
                raise PlaceError(
                    f"{list(values.shape)} {what} for layers {listed}; give one number, or "
                    "one per layer"
                )
        strength = strength * share
        if strength.dim():  # each for the layer that it was given for
            strength = strength[torch.tensor(listed).argsort()]
        delta = strength.reshape(-1, 1) * direction
        tokens = "all" if tokens is None else tokens
        place = self.place.at(layers=chosen, tokens=tokens, before=False)
        made_by = {"from": "probe", **self.meta.made_by}
        made = Add(
            place,
            delta,
            keep_norm=keep_norm is None or keep_norm,
            relative=dose is not None,
            meta=replace(self.meta, made_by=made_by),
        )
        if first is None:
            return made
        if tokens not in SPANS:
            raise PlaceError(f"first= goes with tokens {' or '.join(SPANS)}, not {tokens!r}")
        count, factor = first
        if not isinstance(count, int) or count < 1:
            raise PlaceError(f"first=(n, factor) is of n tokens, 1 or more, not {count!r}")
        begun = replace(made.scaled(factor), place=place.at(tokens=f"{tokens}[:{count}]"))
        return begun + replace(made, place=place.at(tokens=f"{tokens}[{count}:]"))

    def as_edit(self) -> Edit:
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

    def _listed(self, layers: LayerSpec) -> list[int]:
        """The same in the order in which they are given."""
        given: Any = layers.tolist() if isinstance(layers, Tensor) else layers
        given = given.split(",") if isinstance(given, str) else given
        pieces = list(given) if isinstance(given, Iterable) else [given]
        return [i for piece in pieces for i in self._indices(piece)] or [*self._indices(pieces)]

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
        x = _unit(values.to(self.weight.device, wide(values.dtype)), self.mean)
        return torch.einsum("nld,ld->nl", x, self.weight.to(x.dtype)) * self.gain + self.bias


def _numbers(values: Any, device: torch.device) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise PlaceError(
            f"scale, dose and weights are one number, or one per layer, not {values!r:.60}"
        ) from None


def _unit(x: Tensor, mean: Tensor | None) -> Tensor:
    """Centred and brought to unit length, [N, L, D]; unchanged without a mean."""
    if mean is None:
        return x
    x = x - mean.to(x.dtype)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


# -- files ---------------------------------------------------------------------------------------


def read_probe(parts: Parts) -> Probe:
    """The probe of an artifact's parts; raises ArtifactError."""
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


def _guidance(found: Any) -> dict[str, Any] | None:
    """The arguments of ``edit`` that an artifact holds: layers, tokens, a dose, maybe more."""
    if found is None:
        return None
    wanted = {"layers": list, "tokens": str, "dose": int | float}
    fits = isinstance(found, dict) and set(found) - {"weights", "first"} == set(wanted)
    if fits and "weights" in found:
        own = found["weights"]
        fits = isinstance(own, list) and len(own) == len(found["layers"])
        fits = fits and all(isinstance(w, int | float) for w in own)
    if fits and "first" in found:
        first = found["first"]
        fits = isinstance(first, list) and [type(v) for v in first] == [int, float]
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


register("probe", read_probe)
register_foreign(_read_release)
