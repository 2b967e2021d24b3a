"""Merging: a list of edits, one per row, becomes few tensor operations. Knows rows and steps.

Knows tensors and edits; knows no model and no hook. Edits of one family share their kernels: the
number of operations at a layer depends on how the edits are made, never on how many rows there are.
Letters: L layers, B rows, T tokens of a pass, N chosen tokens, D width.
"""

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from trimtab.adapter import Adapter, Low, added, block_of
from trimtab.edits import Edit, Readout, Values, When, described, to_spec, wide
from trimtab.errors import PlaceError
from trimtab.place import Place, Selection, Tokens

Edits = Edit | Sequence[Edit | None] | None
"""What a run takes: one edit for every row, a list with one per row (None for none), or None."""


def merge(
    edits: Edits, prompt_len: Sequence[int], lengths: Sequence[int], n_layers: int, width: int
) -> "list[Step]":
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
            stack = _stack if adapter_of(members[0][1]) is None else _side_by_side
            step = stack(members, prompt_len, lengths, n_layers, width)
            if bool(step.acts.any()):
                steps.append(step)
    return steps


def as_edits(edits: Any) -> Any:
    """The same, with what has an ``as_edit`` of its own, such as a tuned probe, turned into it."""
    if isinstance(edits, list | tuple):
        found = [as_edits(edit) for edit in edits]
        return edits if all(a is b for a, b in zip(found, edits, strict=True)) else found
    own = getattr(edits, "as_edit", None)
    return edits if own is None else own()


def spread(edits: "Edits", n_rows: int) -> "Edits":
    """The same edits, as one for all rows or a list, so that rows can be taken out of order.

    An edit that holds values or positions for each of ``n_rows`` rows becomes one edit per row.
    Raises PlaceError where edits do not fit so many rows.
    """
    edits = as_edits(edits)
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
        spec = None if edit is None else to_spec(edit, "", tensors)
        digest.update(json.dumps(spec, sort_keys=True).encode())
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Step:
    """One stage of a run's edits: the same kernels for every row, with values stacked by row."""

    edit: Edit  # the first of its family: its options hold for all
    site: str
    layers: dict[int, int]  # layer -> index into values
    values: Values  # each [L, B or 1, D'] or [L, B or 1, N, D']
    acts: Tensor  # [L, B] bool
    selection: Selection
    counts: Tensor | None = None  # [B], with values per token: how many tokens they are for
    gate: "Gate | None" = None
    split: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # values, by layer
    ready: dict[int, tuple[Values, Tensor | None]] = field(default_factory=dict)

    def apply(self, x: Tensor, layer: int, mask: Tensor | None, order: Tensor | None) -> Tensor:
        """The edit at one layer; ``mask`` [B, T] chooses tokens (None = all of them)."""
        values, rows = self._at(layer, x)
        if order is not None and self.counts is not None:
            values = {name: _look_up(v, order) for name, v in values.items()}
        new = self.edit.write(x, values)
        if rows is not None:
            mask = rows if mask is None else mask & rows
        return new if mask is None else torch.where(mask[..., None], new, x)

    def choose(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which of ``positions`` [B, T] it touches, and the place of each among its values.

        Values per token are for the first N chosen tokens; those after them are left alone.
        """
        mask = self.selection.mask(positions)
        if self.counts is None:
            return mask, None
        order = self.selection.order(positions)
        return mask & (order < self.counts[:, None]), order

    @property
    def differentiable(self) -> bool:
        """Whether a gradient with respect to its values is wanted."""
        return any(v.requires_grad for v in self.values.values())

    def _at(self, layer: int, x: Tensor) -> tuple[Values, Tensor | None]:
        """Values [B or 1, 1 or N, D'] and acting rows [B, 1] of one layer, on the right device."""
        if layer not in self.ready:
            i, dtype = self.layers[layer], x.dtype if self.edit.narrow else wide(x.dtype)
            self.split = self.split or {n: v.unbind() for n, v in self.values.items()}
            values = {n: v[i].to(device=x.device, dtype=dtype) for n, v in self.split.items()}
            if self.counts is None:
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
        counts = None if self.counts is None else self.counts[rows]
        made = replace(self, values=values, acts=acts, selection=selection, gate=gate)
        return replace(made, counts=counts, split={}, ready={})


class Beside(NamedTuple):
    """The matrices beside one module, S ranks in all, and how much of each a row takes."""

    down: Tensor  # [S, in]
    up: Tensor  # [out, S]
    scale: float | Tensor  # one for every row and rank, or [B, S]


@dataclass
class Worn(Step):
    """A stage of a run's adapters: those of all rows side by side, another share in each row.

    They act beside linear modules, not at sites: ``layers`` and ``values`` are empty. Rows may take
    the same matrices with other strengths: what there is to multiply grows with the adapters, not
    with the rows.
    """

    modules: dict[str, Beside] = field(default_factory=dict)
    placed: dict[str, Beside] = field(default_factory=dict)  # on the module's device, in its dtype

    def adapt(self, name: str, x: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
        """A linear module's output for its input ``x``; ``mask`` [B, T] chooses tokens."""
        down, up, scale = self._placed(name, x.dtype, output.device)
        if mask is None and isinstance(scale, float):
            return added(output, x, down, up, scale)
        shape = x.shape[:-1]
        if mask is not None and mask.numel() != shape.numel():
            raise PlaceError(
                f"module {name!r} is given tokens of the shape {list(shape)} in a pass of "
                f"{list(mask.shape)}, such as a router chooses; there an adapter serves every row "
                "and all tokens: leave the module out of this one"
            )
        if isinstance(scale, Tensor):
            scale = scale[:, None].expand(-1, shape.numel() // len(scale), -1)
            scale = scale.reshape(*shape, -1)
        return added(output, x, down, up, scale, None if mask is None else mask.reshape(*shape, 1))

    def choose(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = self.selection.mask(positions)
        # Pads too: nobody looks at them, and without a mask there is less to do.
        return (mask | (positions < 0) if bool(mask.any()) else mask), None

    def take(self, rows: Tensor) -> "Worn":
        modules = {
            name: b if isinstance(b.scale, float) else b._replace(scale=b.scale[rows])
            for name, b in self.modules.items()
        }
        gate = self.gate.take(rows) if self.gate else None
        selection, acts = self.selection.take(rows), self.acts[:, rows]
        made = replace(self, modules=modules, selection=selection, gate=gate)
        return replace(made, acts=acts, placed={})

    @property
    def differentiable(self) -> bool:
        return any(b.down.requires_grad or b.up.requires_grad for b in self.modules.values())

    def _placed(self, name: str, dtype: torch.dtype, device: torch.device) -> Beside:
        if name not in self.placed:
            down, up, scale = self.modules[name]
            if isinstance(scale, Tensor):
                scale = scale.to(device, wide(dtype))
            self.placed[name] = Beside(down.to(device, dtype), up.to(device, dtype), scale)
        return self.placed[name]


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
    was_open: Tensor  # [B, tokens of all passes so far] bool
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
            self.was_open = self.was_open[:, :0]

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
            self.was_open = torch.cat([self.was_open, self.is_open], 1)
        return self.is_open

    def take(self, rows: Tensor) -> "Gate":
        values = {n: v[:, rows] if v.shape[1] > 1 else v for n, v in self.values.items()}
        by_row = {n: getattr(self, n)[rows] for n in ("threshold", "total", "count", "was_open")}
        made = replace(self, values=values, selection=self.selection.take(rows), **by_row)
        return replace(made, seen={}, is_open=None)


def _rows(edits: Edits, n_rows: int) -> list[tuple[int | None, list[Edit]]]:
    if edits is None or (isinstance(edits, list | tuple) and not edits):
        return []
    if isinstance(edits, Edit):
        return [(None, edits.parts())]
    if isinstance(edits, str) or not isinstance(edits, Sequence):
        raise PlaceError(
            f"edits is an Edit, a list with one per row, or None, not {described(edits)}; load a "
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
            f"a list of edits holds Edits and None, not {described(wrong[0])}; join several edits "
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
        counts=_counts(tables, n_rows),
    )
    if first.condition() is not None:
        step.gate = _gate(members, prompt_len, lengths, n_layers, width)
    return step


def adapter_of(edit: Edit) -> Adapter | None:
    """The adapter that an edit is, or applies on a condition."""
    inner = edit.edit if isinstance(edit, When) else edit
    return inner if isinstance(inner, Adapter) else None


def _side_by_side(
    members: list[tuple[int | None, Edit]],
    prompt_len: Sequence[int],
    lengths: Sequence[int],
    n_layers: int,
    width: int,
) -> Worn:
    """The same for adapters. Rows with the same matrices share them."""
    rows, edits = [row for row, _ in members], [edit for _, edit in members]
    adapters = [cast(Adapter, adapter_of(edit)) for edit in edits]
    owned = {id(a.modules): a.modules for a in adapters}
    numbers = {key: i for i, key in enumerate(owned)}
    blocks = {id(a.modules): _layers_of(a, n_layers) for a in adapters}
    shares = torch.zeros(n_layers, len(prompt_len), len(owned), dtype=torch.float64)
    for row, a in zip(rows, adapters, strict=True):
        where = [i for i in a.place.layer_indices(n_layers) if i in blocks[id(a.modules)]]
        if not where:
            raise PlaceError(
                f"the Adapter at {str(a.place)!r} has no module there, only in layers "
                f"{list(a.layers)}; name some of these"
            )
        shares[where, slice(None) if row is None else row, numbers[id(a.modules)]] = a.strength
    alone = adapters[0].strength if rows[0] is None else None
    step = Worn(
        edit=edits[0],
        site=edits[0].place.site,
        layers={},
        values={},
        acts=(shares != 0).any(-1),
        selection=_select([(r, e.place) for r, e in members], prompt_len, lengths),
        modules=_beside(list(owned.values()), shares, alone),
    )
    if edits[0].condition() is not None:
        step.gate = _gate(members, prompt_len, lengths, n_layers, width)
    return step


def _layers_of(adapter: Adapter, n_layers: int) -> tuple[int, ...]:
    if (deepest := adapter.layers[-1]) >= n_layers:
        raise PlaceError(
            f"the Adapter has modules in layer {deepest}, but this model has layers "
            f"0..{n_layers - 1}; was it made for another model?"
        )
    return adapter.layers


def _beside(
    owned: Sequence[Mapping[str, Low]], shares: Tensor, alone: float | None
) -> dict[str, Beside]:
    """What stands beside each module; ``shares`` [L, B, adapters], or ``alone`` for all rows."""
    found: dict[str, Beside] = {}
    for name in dict.fromkeys(name for modules in owned for name in modules):
        own = shares[block_of(name)]
        having = [
            (modules[name], own[:, i : i + 1])
            for i, modules in enumerate(owned)
            if name in modules and bool(own[:, i].any())
        ]
        if len(sizes := {(low.down.shape[1], low.up.shape[0]) for low, _ in having}) > 1:
            told = " and ".join(f"{i} inputs to {o} outputs" for i, o in sorted(sizes))
            raise PlaceError(
                f"the Adapters of this batch take {told} at {name!r}; were they made for different "
                "models?"
            )
        if having and alone is not None:
            low = having[0][0]
            found[name] = Beside(low.down, low.up, low.scale * alone)
        elif having:
            device = having[0][0].down.device
            found[name] = Beside(
                torch.cat([low.down.to(device) for low, _ in having]),
                torch.cat([low.up.to(device) for low, _ in having], 1),
                torch.cat([(share * low.scale).expand(-1, low.rank) for low, share in having], 1),
            )
    return found


def _counts(tables: list[tuple[int | None, tuple[int, ...], Values]], n_rows: int) -> Tensor | None:
    """How many tokens each row's values are for, [B]; None where they serve any number."""
    counts = torch.zeros(n_rows, dtype=torch.long)
    for row, _, values in tables:
        lengths = [v.shape[2] for v in values.values() if v.dim() == 4]
        if not lengths:
            return None
        counts[slice(None) if row is None else row] = lengths[0]
    return counts


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
        was_open=torch.zeros(n_rows, 0, dtype=torch.bool),
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
    whole = width * edit.vectors
    _check_layers(value, n_layers, edit.place, type(edit).__name__, whole, edit.vectors)
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
    if all(v.shape[-1] != width * edit.vectors for v in values.values()):
        raise PlaceError(
            f"{type(edit).__name__} at {str(edit.place)!r} has width 1, but this model's width is "
            f"{width}; spread the number over a vector of that width"
        )


def _check_layers(
    value: Tensor, n_layers: int, place: Place, what: str, width: int | None, vectors: int = 1
) -> None:
    if value.shape[0] != n_layers:
        raise PlaceError(
            f"{what} at {str(place)!r} holds {value.shape[0]} layers (shape "
            f"{list(value.shape)}), but that place has {n_layers} in this model; give one vector "
            "for each, or name other layers"
        )
    if width is not None and value.shape[-1] not in (1, width):
        raise PlaceError(
            f"{what} at {str(place)!r} has width {value.shape[-1] // vectors} (shape "
            f"{list(value.shape)}), but this model's width is {width // vectors}; was it made for "
            "another model?"
        )


def _look_up(value: Tensor, order: Tensor) -> Tensor:
    """Pick value [B or 1, N, D'] at ``order`` [B, T] -> [B, T, D']."""
    order = order.clamp_max(value.shape[1] - 1)
    if value.shape[0] == 1:
        return value[0][order]
    return value[torch.arange(order.shape[0], device=order.device)[:, None], order]
