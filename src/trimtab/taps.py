"""Taps: run edits and readings inside a forward pass. Knows modules, positions and numbers.

Knows nothing of text or files. Hooks are installed once; what they do is carried by a ``Call``,
one per run, and while no call is carried they do nothing. Only the modules that an adapter acts
beside get hooks of their own, for the passes of a call that carries one. Positions are computed
once per pass and values are looked up by position, never by counting calls: a run with a cache and
one without give the same numbers.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, first_tensor, with_first
from trimtab.errors import BusyError, PlaceError
from trimtab.merge import Step, Worn
from trimtab.place import Place, Selection
from trimtab.recording import Chunk, Track

Key = tuple[str, int]  # site, layer
Chosen = tuple[Tensor | None, Tensor | None]  # see Call._choose


class Stop(Exception):
    """Everything that was asked for has been read: the rest of the pass is not needed."""


class Clock:
    """The positions of real tokens, column by column, of a padded batch that may grow.

    ``mask`` [B, W]; columns after the batch are tokens that were generated since.
    """

    def __init__(self, mask: Tensor) -> None:
        mask = mask.cpu().bool()
        self.columns = torch.where(mask, mask.long().cumsum(1) - 1, -1)  # [B, W]
        self.lengths = mask.long().sum(1)  # [B]

    def positions(self, first: int, width: int) -> Tensor:
        """Positions [B, width] of the columns first .. first + width; -1 where padding."""
        known = self.columns[:, first : first + width]
        begin = max(first, self.columns.shape[1])  # a prompt may come in parts: none after it yet
        after = torch.arange(begin, max(begin, first + width))
        grown = self.lengths[:, None] + (after - self.columns.shape[1])[None]
        return torch.cat([known, grown], dim=1)

    def take(self, rows: Tensor) -> "Clock":
        """The clock of these rows, repeated or dropped as given."""
        made = Clock.__new__(Clock)
        made.columns, made.lengths = self.columns[rows], self.lengths[rows]
        return made


class Reader:
    """Keeps the chosen tokens of one place during a run."""

    def __init__(
        self,
        place: Place,
        layers: tuple[int, ...],
        selection: Selection,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.place, self.layers, self.selection, self.dtype = place, layers, selection, dtype
        self.passes: list[tuple[list[int], list[Tensor]]] = []
        self.mask = torch.zeros(0, dtype=torch.bool)
        self.devices: dict[torch.device, Tensor] = {}

    @property
    def keys(self) -> list[Key]:
        """The taps it reads."""
        return [(self.place.site, layer) for layer in self.layers]

    def begin(self, positions: Tensor) -> None:
        """A new pass over these positions [B, T]."""
        self.mask = self.selection.mask(positions)
        self.devices = {}
        self.passes.append((self.mask.sum(1).tolist(), []))

    def read(self, x: Tensor) -> None:
        """Keep the chosen tokens of x [B, T, D]."""
        if x.device not in self.devices:
            self.devices[x.device] = self.mask.to(x.device)
        picked = x[self.devices[x.device]]
        self.passes[-1][1].append(picked if self.dtype is None else picked.to(self.dtype))

    def track(self, rows: tuple[int, ...] | None = None) -> Track:
        """What was read, as ragged rows."""
        lengths = torch.tensor([counts for counts, _ in self.passes])  # [passes, B]
        device = self.passes[0][1][0].device
        stacked = [torch.stack([t.to(device) for t in layers], 1) for _, layers in self.passes]
        values = stacked[0]
        if len(stacked) > 1:  # regroup: by row, then by pass
            pieces = [s.split(n.tolist()) for s, n in zip(stacked, lengths, strict=True)]
            values = torch.cat([p[b] for b in range(lengths.shape[1]) for p in pieces])
        total = tuple(lengths.sum(0).tolist())
        return Track(self.layers, [Chunk(rows or tuple(range(len(total))), total, values)])

    def take(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.selection = self.selection.take(rows)


class Call:
    """What one run carries through its passes: positions, edits, readers."""

    def __init__(
        self,
        clock: Clock,
        steps: list[Step] | None = None,
        readers: list[Reader] | None = None,
        *,
        stop: bool = False,
    ) -> None:
        self.clock, self.steps, self.readers, self.stop = clock, steps or [], readers or [], stop
        self.rows = len(clock.lengths)
        self.checkpointed = False  # a backward pass may run the inside of blocks again
        self.replaying = False
        self.thread: int | None = None
        self.first, self.positions = 0, clock.columns
        self.remaining = 0
        self.modules: dict[str, nn.Module] = {}  # those that adapters act beside
        self._index()

    def _index(self) -> None:
        self.writes: dict[Key, list[Step]] = {}
        self.gates: dict[Key, list[Step]] = {}
        self.before: dict[Key, list[Reader]] = {}
        self.after: dict[Key, list[Reader]] = {}
        self.worn: dict[str, list[Worn]] = {}
        for step in self.steps:
            for name in step.modules if isinstance(step, Worn) else ():
                self.worn.setdefault(name, []).append(step)  # type: ignore[arg-type]
            for layer in step.layers:
                self.writes.setdefault((step.site, layer), []).append(step)
            for layer in step.gate.layers if step.gate else ():
                assert step.gate is not None
                self.gates.setdefault((step.gate.site, layer), []).append(step)
        for reader in self.readers:
            side = self.before if reader.place.before else self.after
            for key in reader.keys:
                side.setdefault(key, []).append(reader)
        self.keys = {*self.writes, *self.gates, *self.before, *self.after}

    def add(self, reader: Reader) -> None:
        """Read something more."""
        self.readers.append(reader)
        self._index()

    def begin(self, first: int, width: int, rows: int) -> None:
        """A new pass over ``width`` columns from column ``first``, ``rows`` rows of it."""
        if rows != self.rows:
            self._widen(rows)
        self.first, self.positions = first, self.clock.positions(first, width)
        self.chosen: dict[tuple[int, torch.device, bool], Chosen] = {}
        self.remaining = sum(len(r.layers) for r in self.readers)
        if not self.replaying:
            for reader in self.readers:
                reader.begin(self.positions)
            for step in self.steps:
                if step.gate:
                    step.gate.begin(first)

    def _widen(self, rows: int) -> None:
        if rows % self.rows:
            raise PlaceError(f"a pass has {rows} rows, but this run began with {self.rows}")
        self.take(torch.arange(self.rows).repeat_interleave(rows // self.rows))

    def take(self, rows: Tensor) -> None:
        """Go on with these rows: repeated as beams are, or those that are left."""
        self.clock = self.clock.take(rows)
        self.steps = [step.take(rows) for step in self.steps]
        for reader in self.readers:
            reader.take(rows)
        self.rows = len(rows)
        self._index()

    def visit(self, key: Key, x: Tensor) -> Tensor:
        """The activation that leaves a tap, for the one that arrives."""
        if x.dim() == 2:  # a module that was given flattened tokens
            return self.visit(key, x.view(*self.positions.shape, -1)).flatten(0, 1)
        if not self.replaying:
            for step in self.gates.get(key, ()):
                assert step.gate is not None
                step.gate.read(x, key[1])
            for reader in self.before.get(key, ()):
                self._read(reader, x)
        for step in self.writes.get(key, ()):
            x = self._apply(step, x, key[1])
        if not self.replaying:
            for reader in self.after.get(key, ()):
                self._read(reader, x)
        if self.stop and self.remaining == 0 and not self.replaying:
            raise Stop
        return x

    def adapt(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """What leaves a linear module that was given ``x`` and gives ``output`` by itself."""
        # Some modules are given the whole text again, from the cache: DeepSeek's keys and values.
        whole = x.shape[:-1].numel() == self.rows * (self.first + self.positions.shape[1])
        for step in self.worn[name]:
            mask, _ = self._chosen(step, output.device, whole)
            if mask is None or mask.numel():
                output = step.adapt(name, x, output, mask)
        return output

    def _read(self, reader: Reader, x: Tensor) -> None:
        reader.read(x)
        self.remaining -= 1

    def _apply(self, step: Step, x: Tensor, layer: int) -> Tensor:
        mask, order = self._chosen(step, x.device)
        if mask is not None and mask.numel() == 0:
            return x
        return step.apply(x, layer, mask, order)

    def _chosen(self, step: Step, device: torch.device, whole: bool = False) -> Chosen:
        """``_choose``, once in a pass."""
        where = (id(step), device, whole and self.first > 0)
        if where not in self.chosen:
            self.chosen[where] = self._choose(step, device, where[2])
        return self.chosen[where]

    def _choose(self, step: Step, device: torch.device, whole: bool) -> Chosen:
        """Which tokens of this pass a step touches (None = all, empty = none), and their order.

        ``whole``: of all passes so far.
        """
        width = self.positions.shape[1]
        mask, order = step.choose(
            self.clock.positions(0, self.first + width) if whole else self.positions
        )
        if step.gate:
            is_open = step.gate.decide(step.gate.selection.mask(self.positions))
            mask = mask & (step.gate.was_open if whole else is_open)
        if not bool(mask.any()):
            return mask.new_zeros(0), None
        order = None if order is None else order.to(device)
        # A mask makes the edit save a tensor for backward, so that a recomputation without the
        # edit is noticed by torch instead of giving wrong gradients.
        if bool(mask.all()) and not self.checkpointed:
            return None, order
        return mask.to(device), order


class Slots:
    """Edits as data for a compiled pass of one token per row: a vector per place, depth and row.

    ``delta`` [K, S, B, D], float32; ``on``, ``relative`` and ``keep`` [K, S, B, 1] say which rows
    take it and how. K places, S edits one after the other. Changing numbers recompiles nothing.
    """

    def __init__(
        self, keys: tuple[Key, ...], depth: int, rows: int, width: int, device: torch.device
    ) -> None:
        self.index = {key: i for i, key in enumerate(keys)}
        self.depth, self.rows = depth, rows
        self.delta = torch.zeros(len(self.index), depth, rows, width, device=device)
        self.on, self.relative, self.keep = (
            torch.zeros(len(self.index), depth, rows, 1, dtype=torch.bool, device=device)
            for _ in range(3)
        )

    @property
    def keys(self) -> set[Key]:
        """The places that have slots."""
        return set(self.index)

    def clear(self) -> None:
        """No row takes anything."""
        self.on.zero_()

    def write(
        self,
        key: Key,
        depth: int,
        delta: Tensor,
        *,
        on: Tensor,
        relative: bool,
        keep_norm: bool,
    ) -> None:
        """Set one place: ``delta`` [B or 1, D] for the rows ``on`` [B]; the others keep theirs."""
        i, rows = self.index[key], on.to(self.on.device)
        new = delta.to(self.delta).expand(len(on), -1)
        self.delta[i, depth] = torch.where(rows[:, None], new, self.delta[i, depth])
        self.on[i, depth, :, 0] = rows
        self.relative[i, depth] = relative
        self.keep[i, depth] = keep_norm

    def visit(self, key: Key, x: Tensor) -> Tensor:
        """The activation [B, 1, D] that leaves a tap; traced into the graph."""
        if key not in self.index:
            return x
        i, tiny = self.index[key], torch.finfo(torch.float32).tiny
        for s in range(self.depth):
            old = x.float()
            length = torch.linalg.vector_norm(old, dim=-1, keepdim=True)
            new = old + self.delta[i, s][:, None] * torch.where(
                self.relative[i, s][:, None], length, 1.0
            )
            new_length = torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min(tiny)
            new = torch.where(self.keep[i, s][:, None], new * (length / new_length), new)
            x = torch.where(self.on[i, s][:, None], new.to(x.dtype), x)
        return x


@contextmanager
def beside(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks that are on inside, before all others: those see what these have made of it."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield


class Taps:
    """The hooks of one model. ``carry`` makes a call active for the passes inside it."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.call: Call | None = None
        self.slots: Slots | None = None
        self.lock = threading.RLock()
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.install(anatomy)

    def install(self, anatomy: Anatomy) -> None:
        """Hook the model's modules; again where some were replaced since (by an adapter, say)."""
        for handle in self.handles:
            handle.remove()
        self.anatomy = anatomy
        self.handles = [
            anatomy.trunk.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(self._hook(key) for key in anatomy.taps),
        ]

    @contextmanager
    def held(self, wait: bool = True) -> Iterator[None]:
        """Keep other threads from running the model; BusyError if one is and ``wait`` is False."""
        if not self.lock.acquire(blocking=wait):
            raise BusyError(
                "another thread is running this model; wait for it (LM(..., busy='wait')) or load "
                "a second copy"
            )
        try:
            yield
        finally:
            self.lock.release()

    @contextmanager
    def carry(self, call: Call, wait: bool = True) -> Iterator[None]:
        """Run the passes inside with this call's edits and readers, then leave no trace."""
        with self.held(wait):
            if self.call is not None:
                raise BusyError("this thread is in the middle of a run of the same model")
            self.check(call)
            call.thread, self.call = threading.get_ident(), call
            try:
                with beside((m, self._on_linear(n, m)) for n, m in call.modules.items()):
                    yield
            finally:
                self.call = None

    @contextmanager
    def slotted(self, slots: Slots, wait: bool = True) -> Iterator[None]:
        """Run a compiled pass inside: what the taps do is traced from ``slots``."""
        with self.held(wait):
            self.slots = slots
            try:
                yield
            finally:
                self.slots = None

    @contextmanager
    def replay(self, call: Call, wait: bool = True) -> Iterator[None]:
        """Keep a finished pass's edits alive while a backward pass computes blocks again."""
        with self.carry(call, wait):
            call.thread, call.replaying = None, True  # autograd has threads of its own
            try:
                yield
            finally:
                call.replaying = False

    def __deepcopy__(self, memo: Any) -> "Taps":
        """A copied model brings these taps along, idle; an LM made of it installs its own."""
        return self

    def check(self, call: Call) -> None:
        """Raise PlaceError if this model lacks a site or a module that the call is for."""
        for site, layer in call.keys:
            self.anatomy.tap(site, layer)  # raises, with the sites that there are
        for name, worn in call.worn.items():
            if name not in call.modules:
                call.modules[name] = self._module(name, worn)
        call.checkpointed = torch.is_grad_enabled() and any(
            getattr(block, "gradient_checkpointing", False) and block.training
            for block in self.anatomy.blocks
        )

    def _module(self, name: str, worn: list[Worn]) -> nn.Module:
        module, (inside, outside) = self.anatomy.linear(name)
        for own in (step.modules[name] for step in worn):
            if (own.down.shape[1], own.up.shape[0]) != (inside, outside):
                raise PlaceError(
                    f"the Adapter takes {own.down.shape[1]} inputs to {own.up.shape[0]} outputs at "
                    f"{name!r}, but this model's module {inside} to {outside}; was it made for "
                    "another model?"
                )
        return module

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.call
        if call is None or call.thread not in (None, threading.get_ident()):
            return
        if module is not self.anatomy.trunk:  # of a copy
            return
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        ids = args[0] if ids is None else ids
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        call.begin(seen, ids.shape[1], ids.shape[0])

    def _hook(self, key: Key) -> torch.utils.hooks.RemovableHandle:
        module, side = self.anatomy.taps[key]
        if side == "out":
            return module.register_forward_hook(self._on_output(key))
        return module.register_forward_pre_hook(self._on_input(key), with_kwargs=True)

    def _on_linear(self, name: str, own: nn.Module) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = self.call
            if call is None or call.thread not in (None, threading.get_ident()):
                return None
            return call.adapt(name, args[0], output) if module is own else None  # not of a copy

        return hook

    def _visitor(self, key: Key, module: nn.Module) -> Callable[[Key, Tensor], Tensor] | None:
        """What is to be done at a tap in this pass, if anything."""
        call = self.call
        if call is None:  # slots are for the graph that is being traced, not for other threads
            return self.slots.visit if self.slots and torch.compiler.is_compiling() else None
        if key not in call.keys or call.thread not in (None, threading.get_ident()):
            return None
        # A copied model brings these hooks along: they must not act on its passes.
        return call.visit if module is self.anatomy.taps[key][0] else None

    def _on_output(self, key: Key) -> Callable[..., Any]:
        def tap(module: nn.Module, args: Any, output: Any) -> Any:
            visit = self._visitor(key, module)
            if visit is None:
                return None
            x = first_tensor(output)
            new = visit(key, x)
            return None if new is x else with_first(output, new)

        return tap

    def _on_input(self, key: Key) -> Callable[..., Any]:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            visit = self._visitor(key, module)
            if visit is None:
                return None
            if args:
                x = first_tensor(args[0])
                new = visit(key, x)
                return None if new is x else ((new, *args[1:]), kwargs)
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            x = first_tensor(kwargs[name])
            new = visit(key, x)
            return None if new is x else (args, {**kwargs, name: new})

        return tap
