"""Edits: pure functions of an activation, and their arithmetic.

Knows tensors and places; knows no model, no hook and no text. An edit never writes into its input,
keeps dtype and device, and lets gradients through. Letters: L layers of the place, B rows, T tokens
of a pass, N chosen tokens, D width.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, get_origin

import torch
from torch import Tensor

from trimtab.artifact import Meta, Parts, register, save
from trimtab.errors import ArtifactError, PlaceError
from trimtab.place import WRITABLE, Place, Tokens

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """What happens at a place. ``a + b`` applies a, then b; ``0.5 * a`` is half as strong.

    An edit is an argument of a run (``lm.generate(prompts, edits=...)``) and never a state of the
    model. A strength of 0 is bit-identical to no edit.
    """

    __array_ufunc__ = None  # so that numpy leaves np.float32(0.5) * a to the edit

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
        return self.scaled(finite("an edit is multiplied by", factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Edit":
        return self * (1.0 / finite("an edit is divided by", divisor))

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
        spec = to_spec(self, "", tensors)
        place = None if isinstance(self, Sum) else str(self.place)
        save(path, Parts("edit", self.meta, place, {"edit": spec}, tensors))

    # What merging needs of a single edit ---------------------------------------------------------

    def family(self) -> Hashable:
        """Edits of one family share their kernels, whatever their rows."""
        raise NotImplementedError

    def values(self) -> Values:
        """The edit's tensors, each [L, D'], [L, B, D'] or [L, B, N, D'].

        D' is 1, or ``vectors`` times D.
        """
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

    @property
    def vectors(self) -> int:
        """How many vectors of width D each of the ``values`` holds, one after the other."""
        return 1

    def condition(self) -> "tuple[Readout, float] | None":
        """The readout and threshold that must hold for the edit to apply, if any."""
        return None


class EditLike:
    """The arithmetic of what stands for an edit, such as a tuned probe: that of its edit."""

    __array_ufunc__ = None

    def as_edit(self) -> Edit:
        """The edit; raises PlaceError where there is none."""
        raise NotImplementedError

    def __add__(self, other: "Edit | EditLike") -> Edit:
        return self.as_edit() + _own(other)

    def __radd__(self, other: Any) -> Edit:
        made: Edit = other + self.as_edit()
        return made

    def __sub__(self, other: "Edit | EditLike") -> Edit:
        return self.as_edit() - _own(other)

    def __rsub__(self, other: Any) -> Edit:
        made: Edit = other - self.as_edit()
        return made

    def __mul__(self, factor: float) -> Edit:
        return self.as_edit() * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Edit:
        return self.as_edit() / divisor

    def __neg__(self) -> Edit:
        return -self.as_edit()


def _own(edit: Edit | EditLike) -> Edit:
    """An edit, be it that of something that stands for it."""
    return edit.as_edit() if isinstance(edit, EditLike) else edit


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
        old, delta = x.to(wide(x.dtype)), v["delta"]
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
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor("value", self.value, self.place)
        object.__setattr__(self, "strength", finite("strength is", self.strength))

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
        old = x.to(wide(x.dtype))
        return (old + v["strength"] * (v["value"] - old)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Project(Edit):
    """Set the component along a direction: ``x' = x + s (to - x.u) u`` with u of unit length.

    ``direction`` is [L, D] or [L, B, D]. ``to`` = 0 removes the direction (ablation); another
    number clamps the activation's component to it. ``strength`` s = 1 does so wholly.
    """

    direction: Tensor
    to: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tensor("direction", self.direction, self.place)
        object.__setattr__(self, "to", finite("to is", self.to))
        object.__setattr__(self, "strength", finite("strength is", self.strength))
        if self.direction.dim() == 4:
            raise PlaceError("Project takes a direction [L, D] or [L, B, D], not one per token")
        if bool((torch.linalg.vector_norm(self.direction.detach(), dim=-1) == 0).any()):
            raise PlaceError("Project needs a direction of length > 0 at every layer")

    def scaled(self, factor: float) -> "Project":
        return replace(self, strength=self.strength * factor)

    def family(self) -> Hashable:
        return (Project,)

    def values(self) -> Values:
        unit = self.direction.to(wide(self.direction.dtype))
        unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        to, strength = (_filled(self.direction, f) for f in (self.to, self.strength))
        return {"unit": unit, "to": to, "strength": strength}

    def acts(self) -> Tensor:
        return torch.full((self.direction.shape[0], 1), self.strength != 0)

    def write(self, x: Tensor, v: Values) -> Tensor:
        old = x.to(wide(x.dtype))
        component = (old * v["unit"]).sum(-1, keepdim=True)
        return (old + v["strength"] * (v["to"] - component) * v["unit"]).to(x.dtype)


@dataclass(frozen=True, eq=False)
class _Learned(Edit):
    """Learned pairs of a key and a value: ``x' = x + sum_j weight_j(x.key) value_j``.

    ``key`` and ``value`` are [L, N, D]: N pairs at each layer, the same for every row and token.
    """

    key: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key", "value"):
            _check_tensor(name, getattr(self, name), self.place)
        if self.key.dim() != 3 or self.key.shape != self.value.shape or not self.key.shape[1]:
            raise PlaceError(
                f"{type(self).__name__} takes a key and a value of one shape [layers, pairs, "
                f"width], not {described(self.key)} and {described(self.value)}"
            )

    def scaled(self, factor: float) -> Self:
        return replace(self, value=self.value * factor)

    def row(self, number: int) -> Edit:
        return replace(self, place=_row_of_place(self.place, number))

    def family(self) -> Hashable:
        return type(self), self.vectors

    @property
    def vectors(self) -> int:
        return self.key.shape[1]

    def values(self) -> Values:
        return {"key": self.key.flatten(1), "value": self.value.flatten(1)}

    def acts(self) -> Tensor:
        if self.key.requires_grad or self.value.requires_grad:
            return torch.ones(self.value.shape[0], 1, dtype=torch.bool)
        return (self.value.flatten(1) != 0).any(-1, keepdim=True)

    def _pairs(self, v: Values) -> tuple[Tensor, Tensor]:
        """Keys [B, D, N] and values [B, N, D] of rows; [D, N] and [N, D] where all share them."""
        key, value = (v[name].view(-1, *self.key.shape[1:]) for name in ("key", "value"))
        return (key[0].T, value[0]) if len(key) == 1 else (key.mT, value)


@dataclass(frozen=True, eq=False)
class Attend(_Learned):
    """Attend to learned keys and values: ``x' = x + |x| softmax(q.K) V`` (a prefix controller).

    ``key`` K and ``value`` V are [L, N, D]. The query is the activation itself at a root mean
    square of 1, q = x / |x| with |x| its root mean square: a key holds what a query projection
    would add. Values are fractions of the activation's own size (doses), so that one learning rate
    serves all layers. V = 0 is the closed gate of LLaMA-Adapter (arXiv 2303.16199).

    >>> Attend("resid@0:2", torch.randn(2, 4, 8), torch.zeros(2, 4, 8)).vectors
    4
    """

    def values(self) -> Values:
        root = math.sqrt(self.key.shape[-1])  # so that |x| can be the length, which costs less
        return {"key": self.key.flatten(1) * root, "value": self.value.flatten(1) / root}

    def write(self, x: Tensor, v: Values) -> Tensor:
        old, (key, value) = x.to(wide(x.dtype)), self._pairs(v)
        size = torch.linalg.vector_norm(old, dim=-1, keepdim=True)
        size = size.clamp_min(torch.finfo(torch.float32).tiny)
        weight = (old @ key / size).softmax(-1)
        return torch.addcmul(old, weight @ value, size).to(x.dtype)


@dataclass(frozen=True, eq=False)
class LowRank(_Learned):
    """A linear map of rank N beside the activation: ``x' = x + (x.K) V``, as in LoRA.

    ``key`` K (LoRA's A) and ``value`` V (LoRA's B, transposed) are [L, N, D]. Unlike an ``Adapter``
    it acts on the residual stream (or another site) and knows no module.
    """

    def write(self, x: Tensor, v: Values) -> Tensor:
        old, (key, value) = x.to(wide(x.dtype)), self._pairs(v)
        return (old + old @ key @ value).to(x.dtype)


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
            raise PlaceError(f"a weight is a tensor [L, D], not {described(self.weight)}")
        shape = self.weight.shape
        wanted = {"weight": shape, "gain": shape[:1], "bias": shape[:1], "mean": shape}
        for name, size in wanted.items():
            value = getattr(self, name)
            if value is None and name == "mean":
                continue
            if not isinstance(value, Tensor) or value.shape != size:
                raise PlaceError(
                    f"a Readout's {name} has shape {list(size)} beside a weight of {list(shape)}, "
                    f"not {described(value)}"
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
        x = x.to(wide(x.dtype))
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
        self, probe: Any, threshold: float, edit: Edit | EditLike, *, meta: Meta | None = None
    ) -> None:
        edit = _own(edit)
        readout = getattr(probe, "readout", probe)
        if not isinstance(readout, Readout):
            raise PlaceError(f"When takes a probe or a Readout, not {type(probe).__name__}")
        threshold = finite("a threshold is", threshold)
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
            ("threshold", threshold),
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

    @property
    def vectors(self) -> int:
        return self.edit.vectors

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
            raise PlaceError(f"a Sum holds a tuple of Edits, not {described(self.edits)}")

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


def _check_tensor(name: str, value: object, place: Place) -> None:
    if not isinstance(value, Tensor):
        raise PlaceError(
            f"{name} is a tensor [L, D], [L, B, D] or [L, B, N, D], not {described(value)}"
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


def finite(told: str, value: Any) -> float:
    """A finite number, be it Python's, numpy's or a tensor [] without a gradient, as a float."""
    number = math.nan
    is_text = isinstance(value, str | bytes) or "bool" in str(getattr(value, "dtype", ""))
    if not is_text and not getattr(value, "ndim", 0) and not getattr(value, "requires_grad", False):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            number = float(value)
    if not math.isfinite(number):
        raise PlaceError(f"{told} a finite number, not {value!r:.60}")
    return number


def _rowwise(found: Tensor) -> Tensor:
    """Any over all but layers and rows: [L, B or 1]."""
    found = found.detach()
    if found.dim() == 2:
        return found.any(-1, keepdim=True)
    return found.flatten(2).any(-1)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _filled(like: Tensor, number: float) -> Tensor:
    # Not in the dtype of a bfloat16 value, which would round the number.
    return like.new_full((*like.shape[:-1], 1), number, dtype=wide(like.dtype), requires_grad=False)


def described(value: object) -> str:
    """A value for an error message: a tensor by its shape, others by the first of their text."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# --- as an artifact -------------------------------------------------------------------------------

_KINDS: dict[str, type[Any]] = {
    c.__name__.lower(): c for c in (Add, Replace, Project, Attend, LowRank, When, Sum, Readout)
}


def teach(*kinds: type[Any]) -> None:
    """Let ``tt.load`` build edits, or parts of edits, of these kinds."""
    _KINDS.update({kind.__name__.lower(): kind for kind in kinds})


def to_spec(item: Any, prefix: str, tensors: Values) -> dict[str, Any]:
    """An edit as JSON; its tensors go into ``tensors`` under names that begin with ``prefix``."""
    spec: dict[str, Any] = {"type": type(item).__name__.lower()}
    for f in fields(item):
        value = getattr(item, f.name)
        if isinstance(value, Tensor):
            tensors[prefix + f.name] = value.detach()
        elif isinstance(value, Place):
            spec[f.name] = str(value)
        elif isinstance(value, Edit | Readout):
            spec[f.name] = to_spec(value, f"{prefix}{f.name}.", tensors)
        elif isinstance(value, Mapping):
            below = f"{prefix}{f.name}."
            spec[f.name] = {k: to_spec(v, f"{below}{k}.", tensors) for k, v in value.items()}
        elif isinstance(value, tuple):
            spec[f.name] = [to_spec(v, f"{prefix}{i}.", tensors) for i, v in enumerate(value)]
        elif isinstance(value, bool | float | int):
            spec[f.name] = value
    return spec


def _from_spec(spec: dict[str, Any], prefix: str, tensors: Values) -> Any:
    kind = _KINDS.get(str(spec.get("type")))
    if kind is None:
        raise ArtifactError(f"unknown edit type {spec.get('type')!r}; known: {', '.join(_KINDS)}")
    made: dict[str, Any] = {}
    for f in fields(kind):  # what the class does not declare, and a meta in here, is not looked at
        name, given = prefix + f.name, spec.get(f.name)
        if f.type in (Tensor, Tensor | None) and name in tensors:
            made[f.name] = tensors[name]
        elif f.type is Place:
            made[f.name] = Place.parse(spec[f.name])
        elif f.type in (Edit, Readout) and isinstance(given, dict):
            made[f.name] = _from_spec(given, f"{name}.", tensors)
        elif f.type == tuple[Edit, ...] and isinstance(given, list):
            made[f.name] = tuple(
                _from_spec(s, f"{prefix}{i}.", tensors) for i, s in enumerate(given)
            )
        elif get_origin(f.type) is Mapping and isinstance(given, dict):
            made[f.name] = {k: _from_spec(s, f"{name}.{k}.", tensors) for k, s in given.items()}
        elif f.type in (bool, float) and f.name in spec:
            made[f.name] = _typed(f.name, given, f.type is bool)
    if kind is When:
        return When(made["readout"], made["threshold"], made["edit"])
    return kind(**made)


def _typed(name: str, given: Any, is_bool: bool) -> bool | float:
    if not isinstance(given, int | float) or isinstance(given, bool) != is_bool:
        wanted = "true or false" if is_bool else "a number"
        raise ArtifactError(f"{name} is {wanted}, not {given!r:.40}; fetch a fresh copy")
    return given


def _load(parts: Parts) -> Edit:
    edit: Edit = _from_spec(parts.extra["edit"], "", parts.tensors)
    return edit._with(meta=parts.meta)


register("edit", _load)
