"""Decoding some rows on a CPU, faster: linear maps by the routine that reads weights fastest.

A decoding step is little but products of few rows with large weights, so its time is that of
reading them. In float32 the default routine for ``x @ W.T`` reads at a fraction of the memory's
speed. Up to four rows, the same product as ``(W @ x.T).T`` makes a step 1.7 to 2 times as fast; up
to some dozens oneDNN's routine does, by 1.4 (8 rows) to 1.1 times (48). Sums come in another order,
so results differ by rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEW = 4  # rows
ROWS = 64  # more are as fast as they are


class Thin:
    """The linear maps of a model, and a context in which few rows take their fastest form."""

    def __init__(self, model: nn.Module) -> None:
        self.maps = [m for m in model.modules() if type(m) is nn.Linear]

    @contextmanager
    def products(self, ids: Tensor) -> Iterator[None]:
        """For one pass over these ids; nothing changes where they are many or not on a CPU."""
        fits = ids.numel() <= ROWS and ids.device.type == "cpu" and not torch.is_grad_enabled()
        # A map that somebody has wrapped already stays as it is.
        mine = [m for m in self.maps if "forward" not in m.__dict__] if fits else []
        for module in mine:
            module.__dict__["forward"] = MethodType(_forward, module)
        try:
            yield
        finally:
            for module in mine:
                module.__dict__.pop("forward", None)


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    if not _plain(input, self.weight):
        return linear(input, self.weight, self.bias)
    few = input.numel() <= FEW * input.shape[-1]
    return (_transposed if few else _onednn)(input, self.weight, self.bias)


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Whether these are few rows and a usual weight, not a quantised or a distributed one."""
    return (
        x.numel() <= ROWS * x.shape[-1]
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    few = len(rows)
    if few == 1:  # alone it would be a product with a vector: the slow one
        rows = torch.cat([rows, torch.zeros_like(rows)])
    # Contiguous, as a linear map's output is: some models look at it as pairs.
    made = (weight @ rows.T).T[:few].contiguous().reshape(*x.shape[:-1], len(weight))
    return made if bias is None else made + bias


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch's own compiler calls for a linear map; a build of torch may lack it.
    if (fused := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) is None:
        return linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # it looks at no stride of a bias
    made: Tensor = fused(x, weight, bias, "none", [], "")
    return made
