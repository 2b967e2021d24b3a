"""Compiled decoding: edits as data in fixed buffers, so that a compiled graph stays valid.

Knows static caches, ``torch.compile`` and slots; knows no text. The prompt runs as it does without
compiling. Every later pass has one token per row, and there an edit is a vector per layer and row:
the graph adds what lies in a buffer, and a change of edit is a change of numbers. One graph serves
a batch size, a cache length and a set of sites; ``lm.compile()`` says what it costs.
"""

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StaticCache

from trimtab.chat import Batch
from trimtab.decode import Eager, eager
from trimtab.edits import Add
from trimtab.merge import Step
from trimtab.taps import Call, Clock, Key, Slots

if TYPE_CHECKING:
    from trimtab.lm import LM

log = logging.getLogger(__name__)

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # cache sizes: one graph each


class Compiled:
    """The compiled step of one model, its caches and its slots, kept from run to run."""

    def __init__(self, lm: "LM", **options: Any) -> None:
        self.lm = lm
        self.slots: list[Slots] = []
        self.caches: dict[tuple[int, int], StaticCache] = {}
        self.owner = threading.Lock()
        self._supported: bool | None = None
        if lm.device.type == "cpu" and options.keys() <= {"options"}:
            options = {"options": {**_cpu_options(), **options.get("options", {})}}
        self.step = torch.compile(self._step, fullgraph=True, dynamic=False, **options)

    def engine(self, call: Call) -> "Static | Eager":
        """The engine for a call: compiled where its edits fit into slots, else as without.

        The fixed buffers serve one generation at a time: one that begins while another goes on (two
        streams that take turns) runs as without compiling.
        """
        if not (fits(call) and self.supported()) or not self.owner.acquire(blocking=False):
            return eager(self.lm)
        return Static(self)

    def supported(self) -> bool:
        """Whether the model runs on a static cache as on a growing one; measured once."""
        if self._supported is None:
            self._supported = runs_on_static_cache(self.lm)
            if not self._supported:
                name = type(self.lm.model).__name__
                log.warning("%s does not run on a static cache: it decodes uncompiled", name)
        return self._supported

    def cache(self, rows: int, length: int) -> StaticCache:
        """An empty cache of at least ``length`` columns, used again from run to run."""
        size = next((n for n in LENGTHS if n >= length), length)
        if (rows, size) not in self.caches:
            config = self.lm.text_config
            self.caches = {(rows, size): StaticCache(config=config, max_cache_len=size)}
        cache = self.caches[rows, size]
        cache.reset()
        return cache

    def slots_for(self, steps: list[Step], rows: int) -> Slots:
        """Slots with room for these edits; those of an earlier run where they have it.

        At least one edit at ``resid``, so that one graph serves no edit and most edits.
        """
        writes = Counter((step.site, layer) for step in steps for layer in step.layers)
        depth = max(writes.values(), default=0)
        for slots in self.slots:
            if slots.rows == rows and slots.depth >= depth and writes.keys() <= slots.keys:
                return slots
        sites = {"resid", *(step.site for step in steps)}
        keys = tuple(key for key in self.lm.anatomy.taps if key[0] in sites)
        slots = Slots(keys, max(depth, 1), rows, self.lm.width, self.lm.device)
        self.slots.append(slots)
        return slots

    def _step(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        out = self.lm.forward(ids, mask, positions, cache=cache, keep=1)
        logits: Tensor = out.logits[:, -1].float()
        return logits


class Static:
    """The passes of one generation on a cache of fixed size, its steps compiled."""

    fixed = True

    def __init__(self, compiled: Compiled) -> None:
        self.compiled, self.lm = compiled, compiled.lm

    def start(self, batch: Batch, call: Call, room: int) -> Tensor:
        rows, width = batch.ids.shape
        self.call, self.column = call, width
        self.cache = self.compiled.cache(rows, width + room)
        size = self.cache.get_max_length()
        self.mask = torch.ones(rows, size, dtype=torch.long, device=batch.ids.device)
        self.mask[:, :width] = batch.mask  # the causal mask hides what is not written yet
        self.next = batch.lengths
        with torch.no_grad(), self.lm.taps.carry(call, self.lm.waits):
            out = self.lm.forward(batch.ids, batch.mask, batch.positions, cache=self.cache, keep=1)
        self.steps = lasting(call)
        self.slots = self.compiled.slots_for(self.steps, rows)
        self.slots.clear()
        self.written: dict[int, Any] = {}
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self._fill()
        many = torch._dynamo.config.patch(recompile_limit=4096, accumulated_recompile_limit=4096)
        with torch.no_grad(), self.lm.taps.slotted(self.slots, self.lm.waits), many:
            logits = self.compiled.step(tokens[:, None], self.mask, self.next[:, None], self.cache)
        self.next, self.column = self.next + 1, self.column + 1
        return logits.clone()

    def close(self) -> None:
        self.compiled.owner.release()

    def take(self, rows: Tensor) -> None:
        raise NotImplementedError("a compiled graph has a fixed number of rows")

    def _fill(self) -> None:
        """Write this column's edits into the slots, where they differ from the last column's."""
        positions = self.call.clock.positions(self.column, 1)
        depth: dict[Key, int] = {}
        for number, step in enumerate(self.steps):
            where = {layer: depth.get((step.site, layer), 0) for layer in step.layers}
            for layer in step.layers:
                depth[step.site, layer] = where[layer] + 1
            mask, orders = step.choose(positions)
            chosen, order = mask[:, 0], None if orders is None else orders[:, 0]
            state = (chosen.tolist(), None if order is None else order.tolist())
            if self.written.get(number) != state:
                self.written[number] = state
                self._write(step, where, chosen, order)

    def _write(
        self, step: Step, where: dict[int, int], chosen: Tensor, order: Tensor | None
    ) -> None:
        edit = step.edit
        assert isinstance(edit, Add)
        for layer, i in step.layers.items():
            delta = step.values["delta"][i].detach()  # [B or 1, D] or [B or 1, N, D]
            if order is not None:
                delta = delta.expand(len(chosen), -1, -1)
                last = (delta.shape[1] - 1) * torch.ones_like(order)
                delta = delta[torch.arange(len(chosen)), torch.minimum(order, last)]
            self.slots.write(
                (step.site, layer),
                where[layer],
                delta,
                on=chosen & step.acts[i],
                relative=edit.relative,
                keep_norm=edit.keep_norm,
            )


def runs_on_static_cache(lm: "LM") -> bool:
    """Whether a prompt and one more token give the same logits on either kind of cache."""
    if not lm.caches:
        return False
    ids = torch.arange(3, 9, device=lm.device)[None]
    batch = Batch(ids)
    positions = torch.arange(7, device=lm.device)[None]
    call, grown = Call(Clock(batch.mask)), Eager(lm)
    try:
        cache = StaticCache(config=lm.text_config, max_cache_len=LENGTHS[0])
        if any(cache.is_sliding):  # counts its columns in Python: a graph per token
            return False
        with torch.no_grad(), lm.taps.carry(call, lm.waits):
            lm.forward(ids, batch.mask, positions[:, :6], cache=cache, keep=1)
            whole = torch.ones(1, LENGTHS[0], dtype=torch.long, device=lm.device)
            static = lm.forward(ids[:, :1], whole, positions[:, 6:], cache=cache, keep=1).logits
    except Exception:  # a model that takes no static cache says so in its own way
        log.debug("no static cache", exc_info=True)
        return False
    grown.start(batch, Call(Clock(batch.mask)), 1)
    plain = grown.step(ids[0, :1])
    return bool((static[:, -1].float() - plain).norm() < 0.05 * plain.norm())


def _cpu_options() -> dict[str, Any]:
    from trimtab.inductor import ProductsAsSums  # imports the compiler, which takes a while

    return {"post_grad_custom_post_pass": ProductsAsSums()}


def fits(call: Call) -> bool:
    """Whether a call's edits can live in slots: additions, without conditions or readings.

    What touches the prompt alone is of any kind: the prompt's pass is not compiled.
    """
    plain = all(isinstance(s.edit, Add) and s.gate is None for s in lasting(call))
    return plain and not call.readers


def lasting(call: Call) -> list[Step]:
    """The steps of a call that can touch tokens after its prompts."""

    def lasts(step: Step) -> bool:
        chosen, lengths = step.selection, call.clock.lengths
        listed = chosen.table is not None and bool((chosen.table >= lengths[:, None]).any())
        return listed or bool((chosen.stop > torch.maximum(chosen.start, lengths)).any())

    return [step for step in call.steps if lasts(step)]
