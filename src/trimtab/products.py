"""The linear maps of a model on a CPU, each by the routine that is fastest for its rows.

Nearly all of a pass is products of activations with weights. In float32 the default routine for
``x @ W.T`` is not the fastest that torch has. Up to four rows, as in decoding, time is that of
reading W: the same product as ``(W @ x.T).T`` makes a step 1.7 to 2 times as fast. For more rows
oneDNN's routine is 1.05 to 1.9 times as fast, and so is its product with W of the backward pass.
Sums come in another order, so results differ by rounding from those of the bare model; two passes
of the same shape do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEW, SOME = 4, 128  # rows
PAYS = 40  # passes of some rows: what packing the weights takes, and gains
ROOM = 2**31  # bytes: the most that packed weights may take


class Pack:
    """A weight, laid out as oneDNN's routine wants it; good while the weight stays as it was."""

    def __init__(self, weight: Tensor, laid_out: Tensor) -> None:
        self.state, self.laid_out = _state(weight), laid_out

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a module has a weight of its own."""


class Products:
    """The linear maps of a model, and contexts in which they take their fastest form."""

    def __init__(self, model: nn.Module) -> None:
        self.maps = [m for m in model.modules() if type(m) is nn.Linear]
        self.packs: dict[nn.Linear, Pack] = {}
        self.keeping = self.packing = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is packed inside stays so to the end: for many generations."""
        self.keeping += 1
        try:
            yield
        finally:
            self.keeping -= 1
            if not self.keeping:
                self.packs.clear()

    @contextmanager
    def packed(self, rows: int, passes: int) -> Iterator[None]:
        """For ``passes`` of so many rows each: with packed weights, where that pays.

        That hangs on nothing that was done before, so that the same call gives the same again.
        """
        if not FEW < rows <= SOME or passes < PAYS:
            yield
            return
        with self.kept():
            self._pack()
            self.packing += 1
            try:
                yield
            finally:
                self.packing -= 1
                if not self.packing:
                    for module in self.maps:
                        module.__dict__.pop("_packed", None)

    def _pack(self) -> None:
        mine = [m for m in self.maps if _fits(m.weight)]
        reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
        if reorder is None or sum(4 * m.weight.numel() for m in mine) > ROOM:
            return
        for module in mine:
            weight, known = module.weight, self.packs.get(module)
            if known is None or known.state != _state(weight):
                self.packs[module] = Pack(weight, reorder(weight.detach(), SOME // 4))
            module.__dict__["_packed"] = self.packs[module]

    def _on_cpu(self) -> bool:
        return not self.maps or self.maps[0].weight.device.type == "cpu"

    @contextmanager
    def fast(self) -> Iterator[None]:
        """For the passes inside, on a CPU; a backward pass may be run later."""
        if torch.compiler.is_compiling() or not self._on_cpu():  # a compiler chooses for itself
            yield
            return
        # A map that somebody has wrapped already stays as it is.
        mine = [m for m in self.maps if _fits(m.weight) and "forward" not in m.__dict__]
        for module in mine:
            module.__dict__["forward"] = MethodType(_forward, module)
        try:
            yield
        finally:
            for module in mine:
                module.__dict__.pop("forward", None)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's own parameters need no gradient for the passes inside."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """No dropout for the passes inside, also where the model is being trained.

    A model that computes its blocks again in the backward pass (gradient checkpointing) does so in
    training alone, and stays as it is while gradients are taken.
    """
    learning = [m for m in model.modules() if m.training] if model.training else []
    if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", 0) for m in learning):
        learning = []
    for module in learning:
        module.training = False
    try:
        yield
    finally:
        for module in learning:
            module.training = True


def _fits(weight: Tensor) -> bool:
    """Whether a weight is a usual one on a CPU: neither quantised nor spread over devices.

    Nor a part of a larger one: for that oneDNN's routine takes seconds.
    """
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and (weight.is_contiguous() or weight.T.is_contiguous())
    )


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    if not _plain(input, self.weight, self.bias):
        return linear(input, self.weight, self.bias)
    if input.numel() <= FEW * input.shape[-1]:
        return _transposed(input, self.weight, self.bias)
    if not (torch.is_grad_enabled() and input.requires_grad):
        few = input.numel() <= SOME * input.shape[-1]
        weight = _packed(self) if few else None
        return onednn(input, self.weight if weight is None else weight, self.bias)
    made: Tensor = _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
    return made


def _packed(self: nn.Linear) -> Tensor | None:
    """The packed weight, unless the weight has changed since."""
    pack: Pack | None = self.__dict__.get("_packed")
    return None if pack is None or pack.state != _state(self.weight) else pack.laid_out


def _state(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies, and how often it was changed."""
    return weight.data_ptr(), weight._version


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product may take another form; gradients are those of ``x`` alone."""
    training = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return (
        _fits(weight)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and not training
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


class _Product(torch.autograd.Function):
    """x @ W.T + b, whose gradient for ``x`` is such a product, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(grads[0], weight.T, None), None, None  # type: ignore


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(x, weight, bias)`` in float32 on a CPU by oneDNN's routine, without gradients."""
    # What torch's own compiler calls for a linear map; a build of torch may lack it.
    if (fused := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) is None:
        return linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # it looks at no stride of a bias
    made = fused(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, "none", [], "")
    whole: Tensor = torch.ops.aten._unsafe_view(made, (*x.shape[:-1], made.shape[-1]))
    return whole  # no view of ``made``, so that it may be changed in place
