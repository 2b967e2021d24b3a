"""Keys and values without copies: in a cache that grows in place, and for heads that share them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations import sdpa_attention

ROOM = 64  # tokens for which there is space before all is copied once


class Growing(DynamicLayer):
    """Full attention's keys and values [B, H, T, D], as the first T tokens of a longer buffer.

    What the cache does to them from outside (rows chosen, tokens cropped) needs no help: a buffer
    that they no longer begin is left behind. Under autograd nothing is written in place.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, t, D] to both; returns all of them."""
        if torch.is_grad_enabled() or self.get_seq_length() == 0:
            return super().update(key_states, value_states)
        self.keys = self._grown(0, cast(Tensor, self.keys), key_states)
        self.values = self._grown(1, cast(Tensor, self.values), value_states)
        return self.keys, self.values

    def _grown(self, number: int, old: Tensor, new: Tensor) -> Tensor:
        before, after = old.shape[-2], old.shape[-2] + new.shape[-2]
        buffer = self._buffers[number]
        if buffer is None or not _begins(old, buffer) or not _takes(buffer, after):
            buffer = old.new_empty(*old.shape[:2], after + ROOM, old.shape[-1])
            buffer[..., :before, :] = old
            self._buffers[number] = buffer
        buffer[..., before:after, :] = new
        return buffer[..., :after, :]


def _begins(part: Tensor, buffer: Tensor) -> bool:
    return part.data_ptr() == buffer.data_ptr() and part.shape[:2] == buffer.shape[:2]


def _takes(buffer: Tensor, tokens: int) -> bool:
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    return buffer.shape[-2] >= tokens and not frozen


def growing(config: Any) -> DynamicCache:
    """An empty cache for a model of this text config; sliding and other layers stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [Growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = Growing
    return cache


_theirs: Any = getattr(sdpa_attention, "use_gqa_in_sdpa", None)


class _Here(threading.local):
    """How many `sharing` this thread is inside."""

    inside = 0


_here = _Here()


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, attention on a CPU reads keys that several heads share as they are.

    Transformers would copy them for each head, or fold the heads: 1.1 to 2 times as slow. It asks
    one function which way to go; ours stands in for it, and gives its answers to other threads and
    to compilers.
    """
    if torch.compiler.is_compiling():
        yield
        return
    _here.inside += 1
    try:
        yield
    finally:
        _here.inside -= 1


def _use_gqa(mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    ours = not torch.compiler.is_compiling() and _here.inside > 0
    if ours and key.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        return True
    answer: bool = _theirs(mask, key, value)
    return answer


if _theirs is not None:
    sdpa_attention.use_gqa_in_sdpa = cast(Any, _use_gqa)
