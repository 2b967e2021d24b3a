"""Adapters: low-rank parts beside linear modules (LoRA, arXiv 2106.09685), as an edit and as files.

Knows tensors, names of modules and PEFT's file format; knows no model, no hook and no text.
"""

import json
import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.nn.functional import linear

from trimtab.artifact import Meta, register_folder, user_path, write_folder
from trimtab.edits import Edit, described, finite, teach
from trimtab.errors import ArtifactError, PlaceError
from trimtab.place import Place

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names in a PEFT file
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")

# What PEFT's config may say that makes an adapter more than A and B beside the weights as they are.
_MORE = (
    *("use_dora", "modules_to_save", "alora_invocation_tokens", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "lora_bias", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
_REWRITES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings that change the weights


@dataclass(frozen=True, eq=False)
class Low:
    """What is added to one linear module: ``y' = y + scale B A x``.

    ``down`` A [rank, in], ``up`` B [out, rank]; ``scale`` is LoRA's alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, wanted in (("down", "[rank, in]"), ("up", "[out, rank]")):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
                raise PlaceError(
                    f"{name} is a floating point tensor {wanted}, not {described(value)}"
                )
            if not bool(torch.isfinite(value.detach()).all()):
                raise PlaceError(
                    f"{name} {list(value.shape)} holds values that are NaN or infinite"
                )
        if not len(self.down) or len(self.down) != self.up.shape[1]:
            raise PlaceError(
                f"down {list(self.down.shape)} and up {list(self.up.shape)} do not fit together; "
                "they are [rank, in] and [out, rank], of a rank of 1 or more"
            )
        object.__setattr__(self, "scale", finite("scale is", self.scale))

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True, eq=False)
class Adapter(Edit):
    """A LoRA adapter: ``y' = y + strength scale B A x`` in linear modules inside the blocks.

    ``modules`` maps a module's name in the Hugging Face model ("model.layers.3.mlp.up_proj") to its
    ``Low``, or to (down, up) or (down, up, scale). The place's site is "resid"; of its layers those
    take part that have modules here, at its tokens. Weights are not merged and nothing is put into
    the model: each row of a batch can have an adapter of its own, beside any other edit.
    ``tt.load`` reads PEFT folders, ``save_peft`` writes one.

    >>> matrices = torch.randn(2, 8), torch.zeros(16, 2)
    >>> Adapter("resid@all answer", {"model.layers.3.mlp.up_proj": matrices}).layers
    (3,)
    """

    modules: Mapping[str, Low]
    _: KW_ONLY
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place.site != "resid":
            raise PlaceError(
                f"an Adapter acts inside whole blocks, so its place is at resid, not {self.place!r}"
            )
        given = self.modules
        if not isinstance(given, Mapping) or not given:
            raise PlaceError(
                "an Adapter takes a mapping from module names to pairs (down, up), not "
                f"{described(given)}"
            )
        if not all(isinstance(low, Low) for low in given.values()):
            object.__setattr__(self, "modules", {n: _low(n, low) for n, low in given.items()})
        for name in given:
            block_of(name)
        object.__setattr__(self, "strength", finite("strength is", self.strength))

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that it has modules in."""
        return tuple(sorted({block_of(name) for name in self.modules}))

    def scaled(self, factor: float) -> "Adapter":
        return replace(self, strength=self.strength * factor)

    def family(self) -> Hashable:
        return (Adapter,)

    def values(self) -> dict[str, Tensor]:
        return {}

    def acts(self) -> Tensor:
        return torch.full((1, 1), self.strength != 0)

    def save_peft(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that PEFT loads, with the strength in its alphas.

        PEFT's adapters act at all tokens: for any other place this raises PlaceError.
        """
        depth = (self.meta.model or {}).get("layers", self.layers[-1] + 1)
        if self.place.tokens != "all":
            raise PlaceError(
                f"a PEFT adapter acts at all tokens, not at {str(self.place)!r}; keep the tokens "
                "with .save(path)"
            )
        chosen = self.place.layer_indices(depth)
        modules = {
            name: replace(low, scale=low.scale * self.strength)
            for name, low in self.modules.items()
            if block_of(name) in chosen
        }
        write_peft(path, modules, dtype=dtype)


def block_of(name: str) -> int:
    """The number of the block that a module lies in: the first number in its name."""
    if (found := _BLOCK.search(str(name))) is None:
        raise PlaceError(
            f"module {name!r} lies in no block; an Adapter is for linear modules inside the blocks,"
            " such as 'model.layers.3.mlp.up_proj'"
        )
    return int(found[1])


def fresh(
    sizes: Mapping[str, tuple[int, int]], rank: int, alpha: float, seed: int
) -> dict[str, Low]:
    """New matrices for modules of these (inputs, outputs): A as PEFT draws it, B zero."""
    if not sizes:
        raise PlaceError("there is no linear module to adapt in these layers")
    if rank < 1:
        raise ValueError(f"rank is 1 or more, not {rank!r}")
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, (inside, outside) in sizes.items():
        drawn = torch.rand(rank, inside, generator=generator) * 2 - 1  # nn.Linear's own beginning
        made[name] = Low(drawn / math.sqrt(inside), torch.zeros(outside, rank), alpha / rank)
    return made


def _low(name: str, given: Any) -> Low:
    if isinstance(given, Low):
        return given
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise PlaceError(f"module {name!r} takes (down, up) or a Low, not {described(given)}")
    return Low(*given)


# -- the product -----------------------------------------------------------------------------------


def added(
    output: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float | Tensor,
    chosen: Tensor | None = None,
) -> Tensor:
    """A linear module's ``output`` with ``up (scale (down x))`` added, in the output's dtype.

    ``scale`` is a number, or one for each token and rank [..., rank]. Where ``chosen`` [..., 1] is
    False, the output is what it was, to the bit. It is written in place where nobody else can have
    seen it: hooks that call this come before all others.
    """
    low = linear(x, down.to(x.dtype)) * scale
    if isinstance(scale, Tensor):
        low = low.masked_fill(scale == 0, 0)  # whatever x holds
    if chosen is not None:
        low = low.masked_fill(~chosen, 0)
    low, up = low.to(output.dtype), up.to(x.dtype).to(output.dtype)
    if output._base is not None or not output.is_contiguous():
        return output + linear(low, up)
    if not torch.is_grad_enabled():
        return _add_into(output, low, up)
    made: Tensor = _Added.apply(output, low, up)  # type: ignore[no-untyped-call]
    return made


def _add_into(output: Tensor, low: Tensor, up: Tensor) -> Tensor:
    output.view(-1, output.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), up.T)
    return output


class _Added(torch.autograd.Function):
    """``output += low @ up.T`` in place: neither product nor sum takes memory of its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(low, up)
        ctx.mark_dirty(output)
        return _add_into(output, low, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        low, up = ctx.saved_tensors
        grad, (_, for_low, for_up) = grads[0], ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        own = rows.T @ low.reshape(-1, low.shape[-1]) if for_up else None
        return grad, grad @ up if for_low else None, own


# -- PEFT's files ----------------------------------------------------------------------------------


def read_peft(folder: str | Path) -> tuple[dict[str, Low], dict[str, Any]]:
    """The matrices and the config of a PEFT folder. Raises ArtifactError if it is no plain LoRA."""
    path = user_path(folder)
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load((path / WEIGHTS_NAME).read_bytes())
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        pickled = (path / WEIGHTS_NAME).with_suffix(".bin").is_file()
        hint = "; its .bin may hold a pickle, which is never read: save it anew" if pickled else ""
        raise ArtifactError(f"{path} is no PEFT folder that can be read: {error}{hint}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path / CONFIG_NAME} holds no settings; fetch a fresh copy")
    return from_peft(tensors, config), config


def from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Low]:
    """The matrices by module, from PEFT's tensors and config. Raises ArtifactError."""
    _check_plain(config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if kind not in ("A", "B"):
            raise ArtifactError(
                f"the adapter holds {key!r}, which is no part of a plain LoRA beside linear "
                "modules; train it without, or merge it into the model with PEFT"
            )
        pairs.setdefault(name, {})[kind] = value
    if bad := [n for n, p in pairs.items() if len(p) != 2]:
        raise ArtifactError(f"the adapter holds half of the matrices for {bad[0]!r}; fetch it anew")
    made = {}
    for name, pair in pairs.items():
        try:
            scale = _scale(name, len(pair["A"]), config)
            made[name] = Low(pair["A"], pair["B"], scale)
        except (PlaceError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise ArtifactError(f"the adapter's matrices for {name!r}: {error}") from None
    return made


def peft_tensors(modules: Mapping[str, Low]) -> dict[str, Tensor]:
    """The matrices under the names that PEFT gives them."""
    named: dict[str, Tensor] = {}
    for name, low in modules.items():
        named[f"{_PREFIX}{name}.lora_A.weight"] = low.down.detach()
        named[f"{_PREFIX}{name}.lora_B.weight"] = low.up.detach()
    return named


def peft_config(modules: Mapping[str, Low], dropout: float = 0.0) -> dict[str, Any]:
    """What PEFT's adapter_config.json says of them."""
    first = next(iter(modules.values()))
    alphas = {name: _plain(low.scale * low.rank) for name, low in modules.items()}
    usual = _plain(first.scale * first.rank)
    ranks = {name: low.rank for name, low in modules.items() if low.rank != first.rank}
    fixed = {"bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA"}
    patterns = {
        "rank_pattern": ranks,
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != usual},
    }
    own: dict[str, Any] = {"r": first.rank, "lora_alpha": usual, "lora_dropout": dropout}
    return own | fixed | patterns | {"target_modules": list(modules)}


def write_peft(
    path: str | Path,
    modules: Mapping[str, Low],
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT folder, whole or not at all. An adapter that stands there is replaced."""

    def write(folder: Path) -> None:
        named = peft_tensors(modules).items()  # safetensors wants memory of its own for each
        tensors = {n: t.to("cpu", dtype).contiguous().clone() for n, t in named}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(peft_config(modules, dropout), indent=2)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    write_folder(path, write, (CONFIG_NAME, WEIGHTS_NAME, "README.md"))


def _check_plain(config: Mapping[str, Any]) -> None:
    more = [key for key in _MORE if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITES):
        more.append(f"init_lora_weights {start!r}, which changes the model's own weights")
    if config.get("bias", "none") != "none":
        more.append("a bias")
    if config.get("peft_type") != "LORA" or more:
        told = f"{config.get('peft_type')!r} with {', '.join(more) or 'what only that has'}"
        raise ArtifactError(
            f"a plain LoRA adapter is read here, not {told}; merge it into the model with PEFT"
        )


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):  # as PEFT reads them
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _plain(number: float) -> float:
    """A whole number as an int, what comes from dividing by a rank and back included."""
    near = round(number)
    return near if math.isclose(number, near, rel_tol=1e-12) else number


def _load(folder: Path) -> Adapter:
    modules, config = read_peft(folder)
    made_by = {"method": "peft", "base_model": config.get("base_model_name_or_path")}
    return Adapter(Place("resid"), modules, meta=Meta(made_by=made_by))


teach(Adapter, Low)
register_folder(CONFIG_NAME, _load)
