"""Edits: pure functions of an activation, their arithmetic, and merging a list of them into rows.

Knows tensors and places; knows no model, no hook and no text. An edit never writes into its input,
keeps dtype and device, and lets gradients through. Letters: L layers of the place, B rows, T tokens
of a pass, N chosen tokens, D width.
"""

import hashlib
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from trimtab.artifact import Meta, Parts, register, save
from trimtab.errors import ArtifactError, PlaceError
from trimtab.place import WRITABLE, Place, Selection, Tokens

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """What happens at a place. ``a + b`` applies a, then b; ``0.5 * a`` is half as strong.

    An edit is an argument of a run (``lm.generate(prompts, edits=...)``) and never a state of the
    model. A strength of 0 is bit-identical to no edit.
    """

    place: Place
    _: KW_ONLY
    meta: Meta = field(default_factory=Meta)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", Place.parse(self.place))
        if self.place.site not in WRITABLE:
            raise PlaceError(
                f"site {self.place.site!r} can be read, not written; write to {', '.join(WRITABLE)}"
            )
        if self.place.before:
            raise PlaceError(
                f"{str(self.place)!r} names the value before an edit, which can be recorded, not "
                "written; leave out before"
            )

    def parts(self) -> "list[Edit]":
        """The single edits of a sum, in the order in which they apply."""
        return [self]

    def scaled(self, factor: float) -> "Edit":
        """The same edit, ``factor`` times as strong."""
        raise NotImplementedError

    def __add__(self, other: "Edit") -> "Edit":
        return Sum.of(self, other) if isinstance(other, Edit) else NotImplemented

    def __radd__(self, other: object) -> "Edit":
        # The 0 that sum([...]) begins with.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: "Edit") -> "Edit":
        return Sum.of(self, -other) if isinstance(other, Edit) else NotImplemented

    def __mul__(self, factor: float) -> "Edit":
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            raise PlaceError(f"an edit is multiplied by a finite number, not {factor!r}")
        return self.scaled(float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> "Edit":
        return self.scaled(-1.0)

    def named(self, name: str) -> Self:
        """The same edit under a name."""
        return self._with(meta=replace(self.meta, name=name))

    def untied(self) -> Self:
        """The same edit without the model that it was made for: any model of its width takes it."""
        return self._with(meta=replace(self.meta, model=None))

    def row(self, number: int) -> "Edit":
        """What this edit does to one row of a batch, as an edit for that row alone."""
        sliced: dict[str, Any] = {"place": _row_of_place(self.place, number)}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and value.dim() > 2 and value.shape[1] > 1:
                sliced[f.name] = value[:, number : number + 1]
        return self._with(**sliced)

    def _with(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def save(self, path: str | Path) -> None:
        """Write the edit as an artifact folder (see ``tt.load``)."""
        tensors: Values = {}
        spec = _to_spec(self, "", tensors)
        place = None if isinstance(self, Sum) else str(self.place)
        save(path, Parts("edit", self.meta, place, {"edit": spec}, tensors))

    # What merging needs of a single edit ---------------------------------------------------------

    def family(self) -> Hashable:
        """Edits of one family share their kernels, whatever their rows."""
        raise NotImplementedError

    def values(self) -> Values:
        """The edit's tensors, each [L, D'], [L, B, D'] or [L, B, N, D'] with D' = D or 1."""
        raise NotImplementedError

    def acts(self) -> Tensor:
        """Where the edit does anything at all: bool [L, B or 1]."""
        raise NotImplementedError

    def write(self, x: Tensor, v: Values) -> Tensor:
        """The new activation; ``v`` holds ``values`` looked up for the rows and tokens of ``x``."""
        raise NotImplementedError

    @property
    def narrow(self) -> bool:
        """Whether values are used in the activation's own dtype rather than in float32."""
        return False

    def condition(self) -> "tuple[Readout, float] | None":
        """The readout and threshold that must hold for the edit to apply, if any."""
        return None


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add a vector: ``x' = x + delta``.

    ``delta`` is [L, D], [L, B, D] for one per row, or [L, B, N, D] for one per chosen token, looked
    up by position. ``relative`` reads delta as a fraction of the activation's own length (a dose):
    ``x' = x + |x| delta``. ``keep_norm`` rescales to the old length, computed in float32
    (concept guidance, arXiv 2402.14433): ``x' = |x| (x + delta) / |x + delta|``.

    >>> Add("resid@0:2", torch.ones(2, 8)).place
    Place('resid@0:2 all')
    """

    delta: Tensor
    _: KW_ONLY
    keep_norm: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor("delta", self.delta, self.place)

    def scaled(self, factor: float) -> "Add":
        return replace(self, delta=self.delta * factor)

    def family(self) -> Hashable:
        return Add, self.delta.dim() == 4, self.keep_norm, self.relative

    def values(self) -> Values:
        return {"delta": self.delta}

    def acts(self) -> Tensor:
        if self.delta.requires_grad:  # a zero that is differentiated must stay in the graph
            return torch.ones(self.delta.shape[0], 1, dtype=torch.bool)
        return _rowwise(self.delta != 0)

    @property
    def narrow(self) -> bool:
        return not (self.keep_norm or self.relative)

    def write(self, x: Tensor, v: Values) -> Tensor:
        if self.narrow:
            return x + v["delta"]
        old, delta = x.to(_wide(x.dtype)), v["delta"]
        length = torch.linalg.vector_norm(old, dim=-1, keepdim=True)
        new = torch.addcmul(old, delta, length) if self.relative else old + delta
        if self.keep_norm:
            tiny = torch.finfo(torch.float32).tiny
            new_length = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
            new = new * (length / new_length.clamp_min(tiny))
        return new.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put a value in place of the activation (a latent patch): ``x' = x + s (value - x)``.

    ``value`` is [L, D], [L, B, D] or [L, B, N, D]; ``strength`` s = 1 replaces wholly.
    """

    value: Tensor
    _: KW_ONLY
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor("value", self.value, self.place)
        _check_number("strength", self.strength)

    def scaled(self, factor: float) -> "Replace":
        return replace(self, strength=self.strength * factor)

    def family(self) -> Hashable:
        return Replace, self.value.dim() == 4, self.strength == 1.0

    def values(self) -> Values:
        return {"value": self.value, "strength": _filled(self.value, self.strength)}

    def acts(self) -> Tensor:
        return torch.full((self.value.shape[0], 1), self.strength != 0)

    @property
    def narrow(self) -> bool:
        return self.strength == 1.0

    def write(self, x: Tensor, v: Values) -> Tensor:
        if self.strength == 1.0:  # exact: x + (value - x) would round
            return v["value"].expand_as(x)
        old = x.to(_wide(x.dtype))
        return (old + v["strength"] * (v["value"] - old)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Project(Edit):
    """Set the component along a direction: ``x' = x + s (to - x.u) u`` with u of unit length.

    ``direction`` is [L, D] or [L, B, D]. ``to`` = 0 removes the direction (ablation); another
    number clamps the activation's component to it. ``strength`` s = 1 does so wholly.
    """

    direction: Tensor
    _: KW_ONLY
    to: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor("direction", self.direction, self.place)
        _check_number("to", self.to)
        _check_number("strength", self.strength)
        if self.direction.dim() == 4:
            raise PlaceError("Project takes a direction [L, D] or [L, B, D], not one per token")
        if bool((torch.linalg.vector_norm(self.direction.detach(), dim=-1) == 0).any()):
            raise PlaceError("Project needs a direction of length > 0 at every layer")

    def scaled(self, factor: float) -> "Project":
        return replace(self, strength=self.strength * factor)

    def family(self) -> Hashable:
        return (Project,)

    def values(self) -> Values:
        unit = self.direction.float()
        unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        to, strength = (_filled(self.direction, f) for f in (self.to, self.strength))
        return {"unit": unit, "to": to, "strength": strength}

    def acts(self) -> Tensor:
        return torch.full((self.direction.shape[0], 1), self.strength != 0)

    def write(self, x: Tensor, v: Values) -> Tensor:
        old = x.to(_wide(x.dtype))
        component = (old * v["unit"]).sum(-1, keepdim=True)
        return (old + v["strength"] * (v["to"] - component) * v["unit"]).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Readout:
    """A linear reading of an activation: ``sigmoid(gain (x.w) + bias)``, one number per token.

    ``weight`` [L, D], ``gain`` and ``bias`` [L]; with ``mean`` [L, D] the activation is first
    centred and brought to unit length. Over several layers the reading is the mean. Raises
    PlaceError for other shapes and for values that are not finite.
    """

    place: Place
    weight: Tensor
    gain: Tensor
    bias: Tensor
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", Place.parse(self.place))
        if not isinstance(self.weight, Tensor) or self.weight.dim() != 2:
            raise PlaceError(f"a weight is a tensor [L, D], not {_described(self.weight)}")
        shape = self.weight.shape
        wanted = {"weight": shape, "gain": shape[:1], "bias": shape[:1], "mean": shape}
        for name, size in wanted.items():
            value = getattr(self, name)
            if value is None and name == "mean":
                continue
            if not isinstance(value, Tensor) or value.shape != size:
                raise PlaceError(
                    f"a Readout's {name} has shape {list(size)} beside a weight of {list(shape)}, "
                    f"not {_described(value)}"
                )
            if not bool(torch.isfinite(value.detach()).all()):
                raise PlaceError(f"a Readout's {name} holds values that are NaN or infinite")

    def values(self) -> Values:
        mean = torch.zeros_like(self.weight) if self.mean is None else self.mean
        columns = {"gain": self.gain[:, None], "bias": self.bias[:, None]}
        return {"weight": self.weight, "mean": mean, **columns}

    def margin(self, x: Tensor, v: Values) -> Tensor:
        """The logit of the reading, [B, T], for ``x`` [B, T, D]."""
        if x.shape[-1] != self.weight.shape[-1]:
            raise PlaceError(
                f"the probe at {str(self.place)!r} has width {self.weight.shape[-1]}, but what it "
                f"reads has width {x.shape[-1]}; was it made for another model?"
            )
        x = x.float()
        if self.mean is not None:
            x = x - v["mean"]
            x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
        return ((x * v["weight"]).sum(-1, keepdim=True) * v["gain"] + v["bias"]).squeeze(-1)


@dataclass(frozen=True, eq=False)
class When(Edit):
    """Apply an edit only where a probe's reading reaches a threshold (CAST, arXiv 2409.05907).

    ``When(probe, threshold, edit)``: a probe reads probabilities (0..1) at its own place. The
    condition at a token is the mean reading over the probe's tokens *so far*: an edit can only
    depend on what the model has read. A probe at ``prompt[-1:]`` decides once, for the answer; one
    at ``all`` decides with a running mean. The probe's layers lie before the edit's.
    """

    readout: Readout
    threshold: float
    edit: Edit

    def __init__(
        self, probe: Any, threshold: float, edit: Edit, *, meta: Meta | None = None
    ) -> None:
        readout = getattr(probe, "readout", probe)
        if not isinstance(readout, Readout):
            raise PlaceError(f"When takes a probe or a Readout, not {type(probe).__name__}")
        _check_number("a threshold", threshold)
        if not isinstance(edit, Edit):
            raise PlaceError(f"When takes an Edit to apply, not {type(edit).__name__}")
        if any(isinstance(part, When) for part in _flat(edit)):
            raise PlaceError("When inside When: join the conditions in one probe instead")
        if meta is None:
            model = _one_model([getattr(probe, "meta", None) or Meta(), edit.meta])
            meta = replace(edit.meta, model=model)
        for name, value in (
            ("place", edit.place),
            ("readout", readout),
            ("threshold", float(threshold)),
            ("edit", edit),
            ("meta", meta),
        ):
            object.__setattr__(self, name, value)

    def _with(self, **changes: Any) -> Self:
        given: dict[str, Any] = {"readout": self.readout, "threshold": self.threshold}
        given |= {"edit": self.edit, "meta": self.meta} | changes
        return type(self)(given["readout"], given["threshold"], given["edit"], meta=given["meta"])

    def untied(self) -> Self:
        return self._with(edit=self.edit.untied(), meta=replace(self.meta, model=None))

    def row(self, number: int) -> Edit:
        readout = replace(self.readout, place=_row_of_place(self.readout.place, number))
        return self._with(readout=readout, edit=self.edit.row(number))

    def parts(self) -> list[Edit]:
        if not isinstance(self.edit, Sum):
            return [self]
        return [When(self.readout, self.threshold, part) for part in self.edit.parts()]

    def scaled(self, factor: float) -> "When":
        return When(self.readout, self.threshold, self.edit.scaled(factor), meta=self.meta)

    def condition(self) -> tuple[Readout, float]:
        return self.readout, self.threshold

    def family(self) -> Hashable:
        readout = self.readout
        return When, readout.place.site, readout.mean is None, self.edit.family()

    def values(self) -> Values:
        return self.edit.values()

    def acts(self) -> Tensor:
        return self.edit.acts()

    @property
    def narrow(self) -> bool:
        return self.edit.narrow

    def write(self, x: Tensor, v: Values) -> Tensor:
        return self.edit.write(x, v)


@dataclass(frozen=True, eq=False)
class Sum(Edit):
    """Several edits, one after the other."""

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = self.edits if isinstance(self.edits, tuple) else (self.edits,)
        if not listed or not all(isinstance(edit, Edit) for edit in listed):
            raise PlaceError(f"a Sum holds a tuple of Edits, not {_described(self.edits)}")

    @staticmethod
    def of(*edits: Edit) -> "Edit":
        flat = tuple(part for edit in edits for part in _flat(edit))
        name = " + ".join(e.meta.name for e in edits if e.meta.name) or None
        model = _one_model([e.meta for e in (*edits, *flat)])
        return Sum(flat[0].place, edits=flat, meta=Meta(name=name, model=model))

    def untied(self) -> Self:
        meta = replace(self.meta, model=None)
        return replace(self, edits=tuple(e.untied() for e in self.edits), meta=meta)

    def row(self, number: int) -> Edit:
        return replace(self, edits=tuple(e.row(number) for e in self.edits))

    def parts(self) -> list[Edit]:
        return [single for edit in self.edits for single in edit.parts()]

    def scaled(self, factor: float) -> Edit:
        return replace(self, edits=tuple(e.scaled(factor) for e in self.edits))


def _flat(edit: Edit) -> tuple[Edit, ...]:
    return edit.edits if isinstance(edit, Sum) else (edit,)


def _one_model(metas: Sequence[Meta]) -> dict[str, Any] | None:
    """The model that all of these were made for, by its fingerprint; None if none of them says."""
    models = {m.model.get("fingerprint"): m.model for m in metas if m.model}
    if len(models) > 1:
        told = "; ".join(f"{m.get('id')} ({mark})" for mark, m in models.items())
        raise ArtifactError(
            f"these were made for different models: {told}; make them for one model, or drop the "
            "tie on purpose with .untied()"
        )
    return next(iter(models.values()), None)


def _row_of_place(place: Place, number: int) -> Place:
    positions = Tokens.of(place.tokens).positions
    if positions is None or len(positions) == 1:
        return place
    return place.at(tokens=positions[number])


def spread(edits: "Edits", n_rows: int) -> "Edits":
    """The same edits, as one for all rows or a list, so that rows can be taken out of order.

    An edit that holds values or positions for each of ``n_rows`` rows becomes one edit per row.
    Raises PlaceError where edits do not fit so many rows.
    """
    if not isinstance(edits, Edit):
        _rows(edits, n_rows)  # raises
        return edits or None
    held = {count for part in edits.parts() for count in _rows_held(part)} - {1}
    if not held:
        return edits
    if held != {n_rows}:
        raise PlaceError(
            f"{type(edits).__name__} at {str(edits.place)!r} holds values or positions for "
            f"{sorted(held)} rows, but there are {n_rows}; give one per row, or one for all"
        )
    return [edits.row(i) for i in range(n_rows)]


def _rows_held(edit: Edit) -> list[int]:
    """For how many rows each of the edit's tensors and position lists is meant."""
    condition = edit.condition()
    places = [edit.place] + ([condition[0].place] if condition else [])
    listed = [len(Tokens.of(place.tokens).positions or ((),)) for place in places]
    return listed + [v.shape[1] for v in edit.values().values() if v.dim() > 2]


def fingerprint(edits: "Edits") -> str | None:
    """A hash of what edits do, so that a stopped run is not resumed with others; None for none."""
    if edits is None:
        return None
    digest = hashlib.sha256()
    for edit in [edits] if isinstance(edits, Edit) else edits:
        tensors: Values = {}
        spec = None if edit is None else _to_spec(edit, "", tensors)
        digest.update(json.dumps(spec, sort_keys=True).encode())
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- merging --------------------------------------------------------------------------------------


@dataclass
class Step:
    """One stage of a run's edits: the same kernels for every row, with values stacked by row."""

    edit: Edit  # the first of its family: its options hold for all
    site: str
    layers: dict[int, int]  # layer -> index into values
    values: Values  # each [L, B or 1, D'] or [L, B or 1, N, D']
    acts: Tensor  # [L, B] bool
    selection: Selection
    per_token: bool
    gate: "Gate | None" = None
    ready: dict[int, tuple[Values, Tensor | None]] = field(default_factory=dict)

    def apply(self, x: Tensor, layer: int, mask: Tensor | None, order: Tensor | None) -> Tensor:
        """The edit at one layer; ``mask`` [B, T] chooses tokens (None = all of them)."""
        values, rows = self._at(layer, x)
        if self.per_token:
            assert order is not None
            values = {name: _look_up(v, order) for name, v in values.items()}
        new = self.edit.write(x, values)
        if rows is not None:
            mask = rows if mask is None else mask & rows
        return new if mask is None else torch.where(mask[..., None], new, x)

    def _at(self, layer: int, x: Tensor) -> tuple[Values, Tensor | None]:
        """Values [B or 1, 1 or N, D'] and acting rows [B, 1] of one layer, on the right device."""
        if layer not in self.ready:
            i, dtype = self.layers[layer], x.dtype if self.edit.narrow else _wide(x.dtype)
            values = {n: v[i].to(device=x.device, dtype=dtype) for n, v in self.values.items()}
            if not self.per_token:
                values = {n: v[:, None] for n, v in values.items()}
            acting = self.acts[i]
            rows = None if bool(acting.all()) else acting[:, None].to(x.device)
            self.ready[layer] = (values, rows)
        return self.ready[layer]

    def take(self, rows: Tensor) -> "Step":
        """The step for these rows of the batch, repeated or dropped as given."""
        values = {n: v[:, rows] if v.shape[1] > 1 else v for n, v in self.values.items()}
        gate = self.gate.take(rows) if self.gate else None
        selection, acts = self.selection.take(rows), self.acts[:, rows]
        return replace(self, values=values, acts=acts, selection=selection, gate=gate, ready={})


@dataclass
class Gate:
    """The condition of a ``When`` during a run: a running mean of readings, one per row."""

    readout: Readout
    layers: dict[int, int]
    values: Values
    threshold: Tensor  # [B]
    selection: Selection
    total: Tensor  # [B] sum of readings over the tokens so far
    count: Tensor  # [B]
    seen: dict[int, Tensor] = field(default_factory=dict)  # this pass: layer -> [B, T]
    is_open: Tensor | None = None  # this pass: [B, T] bool

    @property
    def site(self) -> str:
        return self.readout.place.site

    def begin(self, first: int) -> None:
        """Forget the last pass's readings; keep the sums, unless the text begins anew."""
        self.seen, self.is_open = {}, None
        if first == 0:  # without a cache every pass reads all tokens again
            self.total, self.count = torch.zeros_like(self.total), torch.zeros_like(self.count)

    def read(self, x: Tensor, layer: int) -> None:
        """Take the reading of one layer."""
        i = self.layers[layer]
        values = {n: v[i][:, None].to(x.device, torch.float32) for n, v in self.values.items()}
        self.seen[layer] = torch.sigmoid(self.readout.margin(x, values)).detach().cpu()

    def decide(self, chosen: Tensor) -> Tensor:
        """Where the condition holds [B, T]; ``chosen`` [B, T] are the probe's own tokens."""
        if self.is_open is None:
            missing = set(self.layers) - set(self.seen)
            if missing:
                raise PlaceError(
                    f"When: the probe reads layers {sorted(missing)} only after the edit has to be "
                    "applied; give the edit later layers or the probe earlier ones"
                )
            reading = torch.stack(list(self.seen.values())).mean(0) * chosen
            total = self.total[:, None] + reading.cumsum(1)
            count = self.count[:, None] + chosen.cumsum(1)
            self.is_open = (count > 0) & (total >= self.threshold[:, None] * count)
            self.total, self.count = total[:, -1], count[:, -1]
        return self.is_open

    def take(self, rows: Tensor) -> "Gate":
        values = {n: v[:, rows] if v.shape[1] > 1 else v for n, v in self.values.items()}
        threshold, total, count = (t[rows] for t in (self.threshold, self.total, self.count))
        return Gate(
            self.readout, self.layers, values, threshold, self.selection.take(rows), total, count
        )


Edits = Edit | Sequence[Edit | None] | None


def merge(
    edits: Edits, prompt_len: Sequence[int], lengths: Sequence[int], n_layers: int, width: int
) -> list[Step]:
    """Turn one edit, or one per row, into steps whose number does not grow with the rows.

    Raises PlaceError where an edit does not fit the rows, the layers or the width.
    """
    rows = _rows(edits, len(prompt_len))
    steps: list[Step] = []
    for stage in range(max((len(parts) for _, parts in rows), default=0)):
        groups: dict[Hashable, list[tuple[int | None, Edit]]] = {}
        for row, parts in rows:
            if stage < len(parts):
                family = parts[stage].place.site, parts[stage].family()
                groups.setdefault(family, []).append((row, parts[stage]))
        for members in groups.values():
            step = _stack(members, prompt_len, lengths, n_layers, width)
            if bool(step.acts.any()):
                steps.append(step)
    return steps


def _rows(edits: Edits, n_rows: int) -> list[tuple[int | None, list[Edit]]]:
    if edits is None or (isinstance(edits, list | tuple) and not edits):
        return []
    if isinstance(edits, Edit):
        return [(None, edits.parts())]
    if isinstance(edits, str) or not isinstance(edits, Sequence):
        raise PlaceError(
            f"edits is an Edit, a list with one per row, or None, not {_described(edits)}; load a "
            "saved one with tt.load(path)"
        )
    if len(edits) != n_rows:
        raise PlaceError(
            f"{len(edits)} edits for {n_rows} rows; give one edit per row (None for none) or a "
            "single edit for all rows"
        )
    wrong = [e for e in edits if e is not None and not isinstance(e, Edit)]
    if wrong:
        raise PlaceError(
            f"a list of edits holds Edits and None, not {_described(wrong[0])}; join several edits "
            "of one row with a + b"
        )
    if n_rows > 1 and edits[0] is not None and all(e is edits[0] for e in edits):
        first = edits[0]
        if all(v.dim() < 3 or v.shape[1] == 1 for p in first.parts() for v in p.values().values()):
            return [(None, first.parts())]
    return [(i, e.parts()) for i, e in enumerate(edits) if e is not None]


def _stack(
    members: list[tuple[int | None, Edit]],
    prompt_len: Sequence[int],
    lengths: Sequence[int],
    n_layers: int,
    width: int,
) -> Step:
    n_rows, first = len(prompt_len), members[0][1]
    layers = {i: e.place.layer_indices(n_layers) for i, (_, e) in enumerate(members)}
    union = sorted(set().union(*layers.values()))
    tables: list[tuple[int | None, tuple[int, ...], Values]] = []
    acts = torch.zeros(len(union), n_rows, dtype=torch.bool)
    for i, (row, edit) in enumerate(members):
        values = {
            name: _fit(v, edit, row, len(layers[i]), n_rows, width)
            for name, v in edit.values().items()
        }
        _check_width(values, edit, width)
        tables.append((row, layers[i], values))
        where = torch.tensor([union.index(layer) for layer in layers[i]])
        columns = slice(None) if row is None else slice(row, row + 1)
        acts[where, columns] = edit.acts().expand(len(where), -1).cpu()
    step = Step(
        edit=first,
        site=first.place.site,
        layers={layer: i for i, layer in enumerate(union) if bool(acts[i].any())},
        values=_stack_values(tables, union, n_rows),
        acts=acts,
        selection=_select([(row, e.place) for row, e in members], prompt_len, lengths),
        per_token=any(v.dim() == 4 for v in first.values().values()),
    )
    if first.condition() is not None:
        step.gate = _gate(members, prompt_len, lengths, n_layers, width)
    return step


def _gate(
    members: list[tuple[int | None, Edit]],
    prompt_len: Sequence[int],
    lengths: Sequence[int],
    n_layers: int,
    width: int,
) -> Gate:
    n_rows = len(prompt_len)
    conditions = [(row, *cast(tuple[Readout, float], e.condition())) for row, e in members]
    places = [(row, readout.place) for row, readout, _ in conditions]
    own = [place.layer_indices(n_layers) for _, place in places]
    if len(set(own)) > 1:
        raise PlaceError("When: the rows of one batch need probes that read the same layers")
    threshold = torch.full((n_rows,), math.inf)
    tables: list[tuple[int | None, tuple[int, ...], Values]] = []
    for (row, readout, limit), layers in zip(conditions, own, strict=True):
        threshold[slice(None) if row is None else row] = limit
        _check_layers(readout.weight, len(layers), readout.place, "the probe", None)
        values = {n: v.detach()[:, None] for n, v in readout.values().items()}
        tables.append((row, layers, values))
    return Gate(
        readout=conditions[0][1],
        layers={layer: i for i, layer in enumerate(own[0])},
        values=_stack_values(tables, list(own[0]), n_rows),
        threshold=threshold,
        selection=_select(places, prompt_len, lengths),
        total=torch.zeros(n_rows),
        count=torch.zeros(n_rows),
    )


def _select(
    places: list[tuple[int | None, Place]], prompt_len: Sequence[int], lengths: Sequence[int]
) -> Selection:
    nothing = Tokens(positions=((),))
    chosen = [nothing] * len(prompt_len)
    for row, place in places:
        tokens = Tokens.of(place.tokens)
        n_lists = len(tokens.positions or ())
        if n_lists > 1 and n_lists != (len(prompt_len) if row is None else 1):
            raise PlaceError(
                f"{place!r} lists positions for {n_lists} rows, but the batch has {len(prompt_len)}"
            )
        if row is None:
            chosen = [tokens] * len(prompt_len)
        else:
            chosen[row] = tokens
    return Selection.of(chosen, prompt_len, lengths)


def _stack_values(
    tables: list[tuple[int | None, tuple[int, ...], Values]], union: list[int], n_rows: int
) -> Values:
    """Join [L, 1, (N,) D] of single rows into [union, B, (N,) D]; a shared edit stays as it is."""
    if tables[0][0] is None:
        return tables[0][2]
    by_row = {row: (layers, values) for row, layers, values in tables}
    joined: Values = {}
    for name, sample in tables[0][2].items():
        longest = max(v[name].shape[2] for _, _, v in tables) if sample.dim() == 4 else 0
        for _, _, values in tables:  # no row's values are rounded to another's dtype
            sample = sample.to(torch.promote_types(sample.dtype, values[name].dtype))
        blank = sample.new_zeros(len(union), *((longest,) if longest else ()), sample.shape[-1])
        columns = []
        for row in range(n_rows):
            if row not in by_row:
                columns.append(blank)
                continue
            layers, values = by_row[row]
            value = values[name][:, 0].to(sample.device, sample.dtype)
            if longest and value.shape[1] < longest:
                value = torch.nn.functional.pad(value, (0, 0, 0, longest - value.shape[1]))
            if list(layers) != union:
                where = torch.tensor([union.index(i) for i in layers], device=value.device)
                value = blank.index_copy(0, where, value)
            columns.append(value)
        joined[name] = torch.stack(columns, dim=1)
    return joined


def _fit(
    value: Tensor, edit: Edit, row: int | None, n_layers: int, n_rows: int, width: int
) -> Tensor:
    """Check a value against the run and bring it to [L, B or 1, (N,) D']."""
    _check_layers(value, n_layers, edit.place, type(edit).__name__, width)
    if value.dim() == 2:
        return value[:, None]
    wanted = (1,) if row is not None else (1, n_rows)
    if value.shape[1] not in wanted:
        told = "one row of a list of edits" if row is not None else f"a batch of {n_rows} rows"
        raise PlaceError(
            f"{type(edit).__name__} at {str(edit.place)!r} holds values for {value.shape[1]} rows, "
            f"but it serves {told}; give one row of values for all, or one for each"
        )
    return value


def _check_width(values: Values, edit: Edit, width: int) -> None:
    """A number per token ([L, 1]) may stand beside a vector, never in place of one."""
    if all(v.shape[-1] != width for v in values.values()):
        raise PlaceError(
            f"{type(edit).__name__} at {str(edit.place)!r} has width 1, but this model's width is "
            f"{width}; spread the number over a vector of that width"
        )


def _check_layers(value: Tensor, n_layers: int, place: Place, what: str, width: int | None) -> None:
    if value.shape[0] != n_layers:
        raise PlaceError(
            f"{what} at {str(place)!r} holds {value.shape[0]} layers (shape "
            f"{list(value.shape)}), but that place has {n_layers} in this model; give one vector "
            "for each, or name other layers"
        )
    if width is not None and value.shape[-1] not in (1, width):
        raise PlaceError(
            f"{what} at {str(place)!r} has width {value.shape[-1]} (shape {list(value.shape)}), "
            f"but this model's width is {width}; was it made for another model?"
        )


def _check_tensor(name: str, value: object, place: Place) -> None:
    if not isinstance(value, Tensor):
        raise PlaceError(
            f"{name} is a tensor [L, D], [L, B, D] or [L, B, N, D], not {_described(value)}"
        )
    if value.dim() not in (2, 3, 4):
        raise PlaceError(
            f"{name} at {str(place)!r} has shape {list(value.shape)}; it must be [layers, width], "
            "[layers, rows, width] or [layers, rows, tokens, width]"
        )
    if not value.is_floating_point():
        raise PlaceError(
            f"{name} must be a floating point tensor, not {value.dtype}; convert it with .float()"
        )
    if not bool(torch.isfinite(value.detach()).all()):
        bad = int((~torch.isfinite(value.detach())).sum())
        raise PlaceError(
            f"{name} at {str(place)!r} holds {bad} values that are NaN or infinite; an edit takes "
            "finite ones only"
        )


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise PlaceError(f"{name} is a finite number, not {value!r:.60}")


def _rowwise(found: Tensor) -> Tensor:
    """Any over all but layers and rows: [L, B or 1]."""
    found = found.detach()
    if found.dim() == 2:
        return found.any(-1, keepdim=True)
    return found.flatten(2).any(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _filled(like: Tensor, number: float) -> Tensor:
    return like.new_full((*like.shape[:-1], 1), number, requires_grad=False)


def _look_up(value: Tensor, order: Tensor) -> Tensor:
    """Pick value [B or 1, N, D'] at ``order`` [B, T] -> [B, T, D']."""
    order = order.clamp_max(value.shape[1] - 1)
    if value.shape[0] == 1:
        return value[0][order]
    return value[torch.arange(order.shape[0], device=order.device)[:, None], order]


def _described(value: object) -> str:
    """A value for an error message: a tensor by its shape, others by the first of their text."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# --- as an artifact -------------------------------------------------------------------------------

_KINDS: dict[str, type[Any]] = {
    c.__name__.lower(): c for c in (Add, Replace, Project, When, Sum, Readout)
}


def _to_spec(item: Any, prefix: str, tensors: Values) -> dict[str, Any]:
    spec: dict[str, Any] = {"type": type(item).__name__.lower()}
    for f in fields(item):
        value = getattr(item, f.name)
        if isinstance(value, Tensor):
            tensors[prefix + f.name] = value.detach()
        elif isinstance(value, Place):
            spec[f.name] = str(value)
        elif isinstance(value, Edit | Readout):
            spec[f.name] = _to_spec(value, f"{prefix}{f.name}.", tensors)
        elif isinstance(value, tuple):
            spec[f.name] = [_to_spec(v, f"{prefix}{i}.", tensors) for i, v in enumerate(value)]
        elif isinstance(value, bool | float | int):
            spec[f.name] = value
    return spec


def _from_spec(spec: dict[str, Any], prefix: str, tensors: Values) -> Any:
    kind = _KINDS.get(str(spec.get("type")))
    if kind is None:
        raise ArtifactError(f"unknown edit type {spec.get('type')!r}; known: {', '.join(_KINDS)}")
    made: dict[str, Any] = {}
    for f in fields(kind):
        if prefix + f.name in tensors:
            made[f.name] = tensors[prefix + f.name]
        elif f.name == "place":
            made["place"] = Place.parse(spec["place"])
        elif isinstance(spec.get(f.name), dict):
            made[f.name] = _from_spec(spec[f.name], f"{prefix}{f.name}.", tensors)
        elif isinstance(spec.get(f.name), list):
            made[f.name] = tuple(
                _from_spec(s, f"{prefix}{i}.", tensors) for i, s in enumerate(spec[f.name])
            )
        elif f.name in spec:
            made[f.name] = spec[f.name]
    if kind is When:
        return When(made["readout"], made["threshold"], made["edit"])
    return kind(**made)


def _load(parts: Parts) -> Edit:
    edit: Edit = _from_spec(parts.extra["edit"], "", parts.tensors)
    return edit._with(meta=parts.meta)


register("edit", _load)
