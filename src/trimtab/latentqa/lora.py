"""The matrices of an adapter as parameters, to be trained and worn for the length of a pass.

Knows adapters and dropout; knows no text and no activations. The adapter is apart from the model:
hooks add its part to each linear module's output while ``on`` is active, and the model itself, one
copy of its weights, is never changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import (
    Low,
    added,
    fresh,
    from_peft,
    peft_config,
    peft_tensors,
    read_peft,
    write_peft,
)
from trimtab.errors import ArtifactError, PlaceError
from trimtab.lm import LM
from trimtab.taps import beside


class Lora(nn.Module):
    """Two small matrices for each linear module: ``y' = y + scaling B A dropout(x)``.

    ``down[i]`` A [rank, in] and ``up[i]`` B [out, rank] belong to the module ``names[i]``. The
    parameters are float32.
    """

    def __init__(self, modules: Mapping[str, Low], dropout: float = 0.0) -> None:
        super().__init__()
        self.names, self.dropout = tuple(modules), dropout
        self.scaling = [low.scale for low in modules.values()]
        self.down = nn.ParameterList(nn.Parameter(m.down.float()) for m in modules.values())
        self.up = nn.ParameterList(nn.Parameter(m.up.float()) for m in modules.values())

    @staticmethod
    def of(
        lm: LM,
        rank: int = 16,
        alpha: float = 32,
        *,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> "Lora":
        """A fresh adapter for all linear modules of a model's blocks, or of some ``layers``.

        B is zero: it changes nothing yet.
        """
        return Lora(fresh(lm.anatomy.linear_sizes(layers), rank, alpha, seed)).to(lm.device)

    @property
    def matrices(self) -> dict[str, Low]:
        """The matrices by module."""
        each = zip(self.names, self.down, self.up, self.scaling, strict=True)
        return {name: Low(down, up, scale) for name, down, up, scale in each}

    @contextmanager
    def on(self, lm: LM) -> Iterator[None]:
        """Wear the adapter: the passes inside are the adapted model's."""
        try:
            modules = [lm.anatomy.linear(name)[0] for name in self.names]
        except PlaceError as error:
            raise ArtifactError(str(error)) from None
        with beside((module, self._hook(i)) for i, module in enumerate(modules)):
            yield

    def _hook(self, i: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            down, up = self.down[i], self.up[i]
            if down.device != output.device:  # a model over several devices
                down, up = down.to(output.device), up.to(output.device)
            x, scale = args[0], self.scaling[i]
            if self.training and self.dropout:
                x, kept = dropped(x, self.dropout)
                scale = scale / kept
            return added(output, x, down, up, scale)

        return add

    # -- files -------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The matrices under the names that PEFT gives them."""
        return peft_tensors(self.matrices)

    def config(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json says of it."""
        return peft_config(self.matrices, self.dropout)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a PEFT folder: adapter_config.json and adapter_model.safetensors."""
        write_peft(folder, self.matrices, self.dropout, dtype)

    @staticmethod
    def read(folder: str | Path) -> "Lora":
        """Read a PEFT folder of a plain LoRA. Raises ArtifactError for anything else."""
        return Lora._of(*read_peft(folder))

    @staticmethod
    def built(tensors: dict[str, Tensor], config: dict[str, Any]) -> "Lora":
        """An adapter from PEFT's tensors and config."""
        return Lora._of(from_peft(tensors, config), config)

    @staticmethod
    def _of(modules: Mapping[str, Low], config: dict[str, Any]) -> "Lora":
        return Lora(modules, float(config.get("lora_dropout") or 0.0))


def dropped(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """``x`` with a share of its numbers set to 0, and the share of those that stay.

    The rate is taken to the next 256th: a byte of randomness for each number, an eighth of what
    torch's own dropout draws, which on a CPU is a fifth of a training step.
    """
    count = min(255, max(1, round(256 * rate)))
    drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    drawn.random_(-(2**63), None)
    keep = drawn.view(torch.uint8)[: x.numel()].view(x.shape) >= count
    kept: Tensor = _Kept.apply(x, keep)  # type: ignore[no-untyped-call]
    return kept, 1 - count / 256


class _Kept(torch.autograd.Function):
    """x where ``keep`` holds, else 0, in one pass over the numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return torch.ops.aten.native_dropout_backward(x, keep, 1.0)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grads[0].contiguous(), keep, 1.0), None
