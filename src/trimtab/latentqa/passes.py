"""What a pass of the decoder needs beside its tokens: contexts that leave the model as it was.

Knows modules and passes of a model; knows no text and no questions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import first_tensor, with_first
from trimtab.cache import growing
from trimtab.chat import Batch
from trimtab.decode import Eager
from trimtab.errors import ChatError
from trimtab.lm import LM
from trimtab.taps import Call

Wear = Callable[[], AbstractContextManager[None]]


@contextmanager
def checkpointed(lm: LM) -> Iterator[None]:
    """Blocks keep only their inputs, and are computed again in the backward pass inside."""
    was = [block.training for block in lm.anatomy.blocks]
    inner = lm._inner()
    _switch(inner, "enable", {"use_reentrant": False})
    for block in lm.anatomy.blocks:
        block.training = True  # the block's own flag: dropout modules inside it stay as they are
    try:
        yield
    finally:
        _switch(inner, "disable")
        for block, flag in zip(lm.anatomy.blocks, was, strict=True):
            block.training = flag


@contextmanager
def cut(lm: LM) -> Iterator[None]:
    """Each block's input comes without its graph: gradients reach what acts in that block only."""

    def detach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(_detached, args)), {k: _detached(v) for k, v in kwargs.items()}

    handles = [b.register_forward_pre_hook(detach, with_kwargs=True) for b in lm.anatomy.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _switch(model: Any, what: str, *options: Any) -> None:
    """Gradient checkpointing, under whichever of its two names this transformers has."""
    for kind in ("activation", "gradient"):
        if (method := getattr(model, f"{kind}_checkpointing_{what}", None)) is not None:
            method(*options)
            return


@contextmanager
def only(module: nn.Module, where: Tensor) -> Iterator[None]:
    """A module that treats each token by itself runs those at ``where`` of R * T; others get 0.

    One that is given flattened tokens runs them all.
    """
    shapes: list[torch.Size | None] = []

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0] if args and isinstance(args[0], Tensor) and args[0].dim() == 3 else None
        shapes.append(None if x is None else x.shape)
        return None if x is None else (x.flatten(0, 1)[where.to(x.device)][None], *args[1:])

    def spread(module: nn.Module, args: Any, output: Any) -> Any:
        if (shape := shapes.pop()) is None:
            return None
        found = first_tensor(output)
        whole = found.new_zeros(shape[0] * shape[1], found.shape[-1])
        whole = whole.index_copy(0, where.to(found.device), found[0])
        return with_first(output, whole.view(*shape[:2], -1))

    handles = module.register_forward_pre_hook(pick), module.register_forward_hook(spread)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Shared(Eager):
    """Passes in which ``each`` neighbouring rows share their first ``width`` columns, run once.

    ``wear`` puts the adapter on, for a pass at a time. ``shifts`` [B] are added to position ids.
    """

    def __init__(self, lm: LM, wear: Wear, each: int, width: int, shifts: Tensor) -> None:
        super().__init__(lm)
        self.wear, self.each, self.width, self.shifts = wear, each, width, shifts

    def start(self, batch: Batch, call: Call, room: int) -> Tensor:
        if not self.lm.caches:
            raise ChatError(
                f"a reader answers on a cache of keys and values, which {type(self.lm.model)} does "
                "not take; read another model"
            )
        shifts = self.shifts.to(batch.ids.device)
        positions = batch.positions + shifts[:, None]
        first = torch.arange(0, len(batch), self.each)
        self.cache: Any = growing(self.lm.text_config)
        self.call = Call(call.clock.take(first), [step.take(first) for step in call.steps])
        self.mask = batch.mask[:: self.each, : self.width]
        self._run(batch.ids[:: self.each, : self.width], positions[:: self.each, : self.width])
        self.cache.batch_repeat_interleave(self.each)
        self.call, self.mask, self.next = call, batch.mask, batch.lengths + shifts
        return self._run(batch.ids[:, self.width :], positions[:, self.width :])

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self.wear():
            return super()._run(ids, positions)
