"""A low-rank adapter (LoRA, arXiv 2106.09685) that is worn for the length of a pass.

Knows linear modules and PEFT's file format; knows no text and no activations. The adapter is apart
from the model: hooks add its part to each linear module's output while ``on`` is active, and the
model itself, one copy of its weights, is never changed.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from trimtab.artifact import user_path
from trimtab.errors import ArtifactError, PlaceError
from trimtab.lm import LM

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names in a PEFT file


class Lora(nn.Module):
    """Two small matrices for each linear module: ``y' = y + (alpha / rank) B A dropout(x)``.

    ``down[i]`` A [rank, in] and ``up[i]`` B [out, rank] belong to the module ``names[i]``; B starts
    at zero, so a fresh adapter changes nothing. The parameters are float32.
    """

    def __init__(
        self, sizes: dict[str, tuple[int, int]], rank: int = 16, alpha: float = 32, *, seed: int = 0
    ) -> None:
        super().__init__()
        if not sizes:
            raise PlaceError("there is no linear module to adapt in these layers")
        if rank < 1:
            raise ValueError(f"rank is 1 or more, not {rank!r}")
        self.names, self.alpha, self.dropout = tuple(sizes), alpha, 0.0
        self.scaling = [alpha / rank] * len(sizes)
        generator = torch.Generator().manual_seed(seed)
        down, up = [], []
        for inside, outside in sizes.values():
            limit = 1 / math.sqrt(inside)  # what nn.Linear itself begins with, as in PEFT
            drawn = torch.rand(rank, inside, generator=generator) * 2 - 1
            down.append(nn.Parameter(drawn * limit))
            up.append(nn.Parameter(torch.zeros(outside, rank)))
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)

    @staticmethod
    def of(
        lm: LM,
        rank: int = 16,
        alpha: float = 32,
        *,
        layers: Sequence[int] | None = None,
        seed: int = 0,
    ) -> "Lora":
        """A fresh adapter for all linear modules of a model's blocks, or of some ``layers``."""
        chosen = None if layers is None else [lm.anatomy.blocks[i] for i in layers]
        sizes = {n: size for n, m in _inside(lm, chosen) if (size := _size(m)) is not None}
        return Lora(sizes, rank, alpha, seed=seed).to(lm.device)

    @property
    def rank(self) -> int:
        """The rank of the first matrix."""
        return int(self.down[0].shape[0])

    @contextmanager
    def on(self, lm: LM) -> Iterator[None]:
        """Wear the adapter: the passes inside are the adapted model's."""
        modules = dict(_inside(lm, None))
        if missing := [n for n in self.names if n not in modules]:
            raise ArtifactError(
                f"the adapter is for modules that this model lacks, such as {missing[0]!r}; was it "
                "made for another model?"
            )
        with ExitStack() as stack:
            for i, name in enumerate(self.names):
                handle = modules[name].register_forward_hook(self._hook(i))
                stack.callback(handle.remove)
            yield

    def _hook(self, i: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            down, up = self.down[i], self.up[i]
            if down.device != output.device:  # a model over several devices
                down, up = down.to(output.device), up.to(output.device)
            x = args[0]
            down, up = down.to(x.dtype), up.to(x.dtype)  # the small ones, not the activations
            scale = self.scaling[i]
            if self.training and self.dropout:
                x, kept = dropped(x, self.dropout)
                scale = scale / kept
            low = nn.functional.linear(x, down) * scale
            low, up = low.to(output.dtype), up.to(output.dtype)
            if output._base is not None or not output.is_contiguous():
                return output + nn.functional.linear(low, up)
            added: Tensor = _Added.apply(output, low, up)  # type: ignore[no-untyped-call]
            return added

        return add

    # -- files -------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The matrices under the names that PEFT gives them."""
        named: dict[str, Tensor] = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            named[f"{_PREFIX}{name}.lora_A.weight"] = down.detach()
            named[f"{_PREFIX}{name}.lora_B.weight"] = up.detach()
        return named

    def config(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json says of it."""
        own = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        fixed = {"bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA"}
        return own | fixed | {"target_modules": sorted({n.split(".")[-1] for n in self.names})}

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a PEFT folder: adapter_config.json and adapter_model.safetensors."""
        target = user_path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.to("cpu", dtype).contiguous() for n, t in self.tensors().items()}
        save_file(tensors, target / WEIGHTS_NAME)
        text = json.dumps(self.config() | {"target_modules": list(self.names)}, indent=2)
        (target / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: str | Path) -> "Lora":
        """Read a PEFT folder of a plain LoRA. Raises ArtifactError for anything else."""
        path = user_path(folder)
        try:
            config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
            tensors = load((path / WEIGHTS_NAME).read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(f"{path} is no PEFT folder that can be read: {error}") from None
        return Lora.built(tensors, config)

    @staticmethod
    def built(tensors: dict[str, Tensor], config: dict[str, Any]) -> "Lora":
        """An adapter from PEFT's tensors and config."""
        unlike = [
            k for k in ("use_dora", "modules_to_save", "alora_invocation_tokens") if config.get(k)
        ]
        if config.get("peft_type") != "LORA" or unlike or config.get("bias", "none") != "none":
            told = f"{config.get('peft_type')!r} with {', '.join(unlike) or 'a bias'}"
            raise ArtifactError(f"a reader takes a plain LoRA adapter, not {told}")
        pairs: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
            if kind not in ("A", "B"):
                raise ArtifactError(f"the adapter holds {key!r}, which is no part of a plain LoRA")
            pairs.setdefault(name, {})[kind] = value
        if bad := [
            n for n, p in pairs.items() if len(p) != 2 or p["A"].shape[0] != p["B"].shape[1]
        ]:
            raise ArtifactError(f"the adapter's matrices for {bad[0]!r} do not fit together")
        sizes = {n: (p["A"].shape[1], p["B"].shape[0]) for n, p in pairs.items()}
        made = Lora(sizes, 1, float(config.get("lora_alpha", 1)))
        made.down = nn.ParameterList(nn.Parameter(p["A"].float()) for p in pairs.values())
        made.up = nn.ParameterList(nn.Parameter(p["B"].float()) for p in pairs.values())
        made.dropout = float(config.get("lora_dropout") or 0.0)
        made.scaling = [_scaling(n, p["A"].shape[0], config) for n, p in pairs.items()]
        return made


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


class _Added(torch.autograd.Function):
    """``output += low @ up.T`` in place: neither product nor sum takes memory of its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(low, up)
        ctx.mark_dirty(output)
        rows = output.view(-1, output.shape[-1])
        rows.addmm_(low.reshape(-1, low.shape[-1]), up.T)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, up = ctx.saved_tensors
        grad = grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        return grad, grad @ up, rows.T @ low.reshape(-1, low.shape[-1])


def _scaling(name: str, rank: int, config: dict[str, Any]) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _inside(lm: LM, blocks: Sequence[nn.Module] | None) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the blocks, by their names in the Hugging Face model."""
    inner = lm._inner()
    names = {id(module): name for name, module in inner.named_modules()}
    for block in lm.anatomy.blocks if blocks is None else blocks:
        prefix = names[id(block)]
        for name, module in block.named_modules():
            yield f"{prefix}.{name}" if name else prefix, module


def _size(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear module; None for any other."""
    if isinstance(module, nn.Embedding):
        return None
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if all(isinstance(s, int) for s in sizes):
        return sizes[0], sizes[1]  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # GPT-2: [in, out]
        return int(weight.shape[0]), int(weight.shape[1])
    return None
