"""Anatomy: where the sites of a decoder are. Knows the structure of modules and one short table
of child names; nothing of hooks, edits, tokens or text, and no model by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn

from trimtab.errors import PlaceError
from trimtab.place import SITES

Tap = tuple[nn.Module, str]
T = TypeVar("T")

# Children of a block, in the order in which they are tried. A row begins with the exact part
# where the parent's output is more than the part: BLOOM's attention and MLP, and MPT's MLP,
# return their result with the residual stream already added.
_CHILDREN: dict[str, tuple[str, ...]] = {
    "norm": (
        "input_layernorm",
        "ln_1",
        "ln_attn",
        "norm_1",
        "operator_norm",
        "attention_layernorm",
        "self_attn_layer_norm",
    ),
    "attn": ("self_attn", "self_attention.dense", "attention.dense", "attn"),
    "mlp": (
        "mlp.dense_4h_to_h",
        "ffn.down_proj",
        "mlp",
        "feed_forward",
        "block_sparse_moe",
        "shared_mlp",
        "fc2",
    ),
    "q": ("self_attn.q_proj", "self_attn.q_b_proj", "attn.q_proj", "attn.attention.q_proj"),
    "k": ("self_attn.k_proj", "attn.k_proj", "attn.attention.k_proj"),
    "v": ("self_attn.v_proj", "attn.v_proj", "attn.attention.v_proj"),
    "heads": (
        "self_attn.o_proj",
        "self_attn.out_proj",
        "self_attn.dense",
        "self_attention.dense",
        "attention.dense",
        "attn.c_proj",
        "attn.out_proj",
        "attn.attention.out_proj",
    ),
}
_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_WRAPPED = re.compile(r"(_orig_mod\.|module\.|base_model\.model\.)*")  # compiled, DDP, PEFT


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The places of one decoder, resolved to modules: `Anatomy.of(model)`.

    `taps[site, layer]` is (module, kind): kind "out" means the module's output, "in" its first
    input. Both are [B, T, D] ("q", "k", "v", "heads" have their own width), except that OPT
    calls the last module of its MLP on flattened tokens, so "mlp" is [B*T, D] there.
    `trunk` is the module whose forward receives `input_ids` or `inputs_embeds`; `prefix` is the
    name of the blocks in the Hugging Face model.
    """

    blocks: nn.ModuleList = field(repr=False)
    n_layers: int
    width: int
    trunk: nn.Module = field(repr=False)
    taps: Mapping[tuple[str, int], Tap] = field(repr=False)
    prefix: str = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Find the blocks of `model` and every site in them; PlaceError where there are none."""
        blocks = find_blocks(model)
        taps: dict[tuple[str, int], Tap] = {("embed", 0): (blocks[0], "in")}
        for layer, block in enumerate(blocks):
            taps["resid", layer] = (block, "out")
            for site in _CHILDREN:
                child = _site_module(block, site)
                if child is not None:
                    taps[site, layer] = (child, "in" if site == "heads" else "out")
        prefix = _WRAPPED.sub("", _name_of(model, blocks), count=1)
        return cls(blocks, len(blocks), _width(model), _trunk(model, blocks), taps, prefix)

    def sites(self) -> list[str]:
        """The sites that at least one layer has, in the order of SITES."""
        return [site for site in SITES if self.layers(site)]

    def layers(self, site: str) -> list[int]:
        """The layers that have `site`, ascending; empty where the model lacks it."""
        return [layer for layer in range(self.n_layers) if (site, layer) in self.taps]

    def tap(self, site: str, layer: int) -> Tap:
        """(module, kind) of a site in a layer; a negative layer counts from the top.

        Raises PlaceError naming the sites or layers that the model has.
        """
        depth = self.n_layers
        if not -depth <= layer < depth:
            raise PlaceError(f"no layer {layer}; this model has 0 to {depth - 1} (-1 is the last)")
        layer %= depth
        if (site, layer) in self.taps:
            return self.taps[site, layer]
        block = type(self.blocks[layer]).__name__
        having = self.layers(site)
        if having:
            where = ", ".join(map(str, having))
            raise PlaceError(f"no site {site!r} in layer {layer} ({block}); layers {where} have it")
        raise PlaceError(f"no site {site!r} in {block}; it has {', '.join(self.sites())}")

    def linear_sizes(self, layers: Iterable[int] | None = None) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear modules of some blocks (default: all), by their names."""
        found: dict[str, tuple[int, int]] = {}
        for layer in range(self.n_layers) if layers is None else layers:
            outer = None
            for name, module in self.blocks[layer].named_modules():
                if outer is not None and name.startswith(outer):  # a part of one that is wrapped
                    continue
                if (size := _linear_size(module)) is not None:
                    found[f"{self.prefix}.{layer}.{name}"], outer = size, f"{name}."
        return found

    def linear(self, name: str) -> tuple[nn.Module, tuple[int, int]]:
        """A linear module of a block and its (inputs, outputs), by its name in the model.

        Raises PlaceError where there is none.
        """
        layer, _, inside = name.removeprefix(f"{self.prefix}.").partition(".")
        own = name.startswith(f"{self.prefix}.") and layer.isdecimal()
        block = self.blocks[int(layer)] if own and int(layer) < self.n_layers else None
        module = None if block is None else _child(block, inside)
        size = None if module is None else _linear_size(module)
        if module is None or size is None:
            some = ", ".join(list(self.linear_sizes([0]))[:3])
            raise PlaceError(
                f"this model has no linear module {name!r} in its blocks; it has {some}, ...; was "
                "the adapter made for another model?"
            )
        return module, size


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's block list: the ModuleList with as many entries as the config has layers.

    At least one entry must hold an attention-like child (hybrid models have entries without).
    Of several lists, as in a model that also sees images, the one beside the text embedding
    wins, then the one with most parameters. PlaceError where there is none.
    """
    config = _text_config(model)
    depth = _first_of(config, _DEPTH)
    candidates = [
        (owner, child)
        for owner in model.modules()
        for child in owner.children()
        if isinstance(child, nn.ModuleList)
        and (len(child) == depth or (depth is None and len(child) > 0))
        and any(_attends(block) for block in child)
    ]
    if not candidates:
        wanted = "decoder blocks" if depth is None else f"{depth} decoder blocks"
        raise PlaceError(
            f"found no list of {wanted} with attention in {type(model).__name__}; "
            "pass a decoder whose blocks are one nn.ModuleList"
        )
    vocabulary = _first_of(config, ("vocab_size",))
    return max(candidates, key=lambda pair: (_embeds(pair[0], vocabulary), _size(pair[1])))[1]


def first_tensor(out: Any) -> torch.Tensor:
    """The tensor of a module's output: itself, or the first entry of a tuple, list or mapping.

    A bare tensor is never indexed: that would silently take batch row 0.
    """
    if isinstance(out, torch.Tensor):
        return out
    if isinstance(out, Mapping) and out:
        return first_tensor(next(iter(out.values())))
    if isinstance(out, (tuple, list)) and out:
        return first_tensor(out[0])
    raise PlaceError(
        f"a module returned {type(out).__name__}; expected a tensor, or a tuple, list or "
        "mapping that begins with one"
    )


def with_first(out: T, tensor: torch.Tensor) -> T:
    """A copy of `out` with its first tensor replaced: the inverse of `first_tensor`.

    The container keeps its type (also a named tuple or a ModelOutput); `out` is not changed.
    """
    if isinstance(out, torch.Tensor):
        return cast(T, tensor)
    make: Any = type(out)
    if isinstance(out, Mapping) and out:
        key = next(iter(out))
        return cast(T, make(**{**out, key: with_first(out[key], tensor)}))
    if isinstance(out, (tuple, list)) and out:
        items = [with_first(out[0], tensor), *out[1:]]
        return cast(T, make(*items) if hasattr(out, "_fields") else make(items))
    first_tensor(out)  # raises, with the type that was given
    raise AssertionError("unreachable")


def _site_module(block: nn.Module, site: str) -> nn.Module | None:
    for name in _CHILDREN[site]:
        child = _child(block, name)
        if child is not None and not _misleads(block, site, name):
            return child
    return None


def _misleads(block: nn.Module, site: str, name: str) -> bool:
    """True where a child has the right name and the wrong role."""
    children = list(dict(block.named_children()))
    if name == "self_attn_layer_norm":  # after the attention in BART and in OPT-350m
        return not getattr(block, "do_layer_norm_before", False)
    if name == "ln_1":  # after the attention in GPT-1, whose block also lists it after
        return "attn" not in children or children.index("ln_1") > children.index("attn")
    # Experts beside a second MLP: neither child alone is what the two add to the stream.
    pair = {"block_sparse_moe", "shared_mlp"} <= set(children)
    return site == "mlp" and (pair or "experts" in children)


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear module; None for any other."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if all(isinstance(s, int) for s in sizes):
        return cast(tuple[int, int], tuple(sizes))
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):  # GPT-2: [in, out]
        return int(weight.shape[0]), int(weight.shape[1])
    return None


def _child(module: nn.Module, dotted: str) -> nn.Module | None:
    found: Any = module
    for name in dotted.split("."):
        found = getattr(found, name, None)
    # A list is never called, so a hook on it would stay silent (LongCat has two of each child).
    real = isinstance(found, nn.Module) and not isinstance(found, nn.ModuleList)
    return found if real else None


def _attends(block: nn.Module) -> bool:
    return any(
        _ATTENTION.search(name) or _ATTENTION.search(type(child).__name__)
        for name, child in block.named_children()
    )


def _embeds(owner: nn.Module, vocabulary: int | None) -> bool:
    sizes = [m.num_embeddings for m in owner.modules() if isinstance(m, nn.Embedding)]
    return vocabulary in sizes if vocabulary is not None else bool(sizes)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _text_config(model: nn.Module) -> Any:
    """The config of the text part; None for a module without one. Looks inside wrappers (DDP)."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((c for c in configs if c is not None and _is_config(c)), None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config(decoder=True) if get_text_config else config


def _is_config(config: Any) -> bool:
    return hasattr(config, "get_text_config") or _first_of(config, _DEPTH) is not None


def _first_of(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _width(model: nn.Module) -> int:
    """The width of the residual stream: the config's word, else the first embedding's."""
    width = _first_of(_text_config(model), _WIDTH)
    if width is not None:
        return width
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    raise PlaceError(
        f"the width of {type(model).__name__} is unknown; give it a config with hidden_size"
    )


def _trunk(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The innermost module around the blocks that takes token ids or embeddings."""
    around = list(_ancestors(model, blocks))
    for module in around:
        parameters = inspect.signature(module.forward).parameters
        if "input_ids" in parameters or "inputs_embeds" in parameters:
            return module
    return around[0]


def _name_of(model: nn.Module, blocks: nn.ModuleList) -> str:
    names: Iterator[str] = (name for name, module in model.named_modules() if module is blocks)
    return next(names)


def _ancestors(model: nn.Module, blocks: nn.ModuleList) -> Iterator[nn.Module]:
    name = _name_of(model, blocks)
    while name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)
