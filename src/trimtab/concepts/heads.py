"""A probe of each attention head, and the edit of some of them.

After Li et al. 2023 (arXiv 2306.03341). Knows probes, and of the model its output projections.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trimtab.artifact import Meta, Parts, check_model, register, save
from trimtab.concepts.probe import PARTS, Probe, read_probe
from trimtab.edits import Add
from trimtab.errors import ArtifactError, PlaceError
from trimtab.lm import LM
from trimtab.place import Place, TokenSpec
from trimtab.recording import Chunk, Recording, Track


@dataclass(frozen=True, eq=False)
class HeadProbe:
    """A concept's direction in each attention head, read where the output projection begins.

    Letters: H heads, d their width. ``weight`` and ``mean`` [L, H, d]; ``gain``, ``bias``,
    ``accuracy``, ``heldout_accuracy`` and ``heldout_auroc`` [L, H]: as of a ``Probe``, one for each
    head. ``flat`` is that probe of L H rows.
    """

    place: Place
    layers: tuple[int, ...]
    n_heads: int
    flat: Probe

    def __repr__(self) -> str:
        (best,) = self.best_heads(1)
        told = f"best layer {best[0]}, head {best[1]}: {float(self.accuracy.max()):.3f}"
        return f"HeadProbe({self.meta.name or 'unnamed'} at {self.place}, {told})"

    def __getattr__(self, name: str) -> Tensor:
        if name not in PARTS:
            raise AttributeError(f"a HeadProbe has no {name!r}; it has {', '.join(PARTS)}")
        return self._split(getattr(self.flat, name))

    @property
    def mean(self) -> Tensor | None:
        """What tokens are centred by, [L, H, d], or None where they are not."""
        return None if self.flat.mean is None else self._split(self.flat.mean)

    @property
    def meta(self) -> Meta:
        """Name, model and origin."""
        return self.flat.meta

    def predict(self, recording: Recording) -> Tensor:
        """The mean probability over each row's tokens, [B, L, H]; see ``Probe.predict``."""
        if (recording.place.site, recording.layers) != (self.place.site, self.layers):
            raise PlaceError(
                f"this probe reads {self.place.site} at layers {list(self.layers)}; the recording "
                f"holds {recording.place.site} at {list(recording.layers)}"
            )
        read = self.flat.predict(by_head(recording, self.n_heads))
        return self._split(read.T).movedim(-1, 0)

    def best_heads(self, count: int) -> list[tuple[int, int]]:
        """The ``count`` pairs (layer, head) with the best training accuracy, best first."""
        if count < 1:
            raise PlaceError(f"top_heads is 1 or more, not {count!r}")
        order = self.flat.accuracy.argsort(descending=True, stable=True)[:count].tolist()
        return [(self.layers[i // self.n_heads], i % self.n_heads) for i in order]

    @torch.no_grad()
    def edit(
        self,
        lm: LM,
        scale: float = 16.0,
        *,
        top_heads: int = 16,
        heads: Iterable[tuple[int, int]] | None = None,
        tokens: TokenSpec = "all",
    ) -> Add:
        """The edit that adds ``scale`` times the unit direction to the output of some heads.

        Inference-time intervention (Li et al. 2023, arXiv 2306.03341), without its factor of the
        activations' deviation. The output projection is linear, so a shift of its input is the
        projected shift of what attention returns: an ``Add`` at site "attn". ``heads``: pairs
        (layer, head), else the ``top_heads`` with the best training accuracy.
        """
        check_model(self.meta, lm.describe())
        if self.place.site != "heads":
            raise PlaceError(
                f"this probe reads heads of site {self.place.site!r}; what heads return is read at "
                'site "heads": fit one there to steer by it'
            )
        chosen = sorted(set(self.best_heads(top_heads) if heads is None else heads))
        known = {(i, h) for i in self.layers for h in range(self.n_heads)}
        if wrong := [pair for pair in chosen if pair not in known] or not chosen:
            raise PlaceError(
                f"this probe has no heads {wrong if chosen else []}; it has layers "
                f"{list(self.layers)}, each with heads 0..{self.n_heads - 1}, as (layer, head)"
            )
        shift = torch.zeros_like(self.weight)
        for layer, head in chosen:
            row = self.layers.index(layer), head
            length = torch.linalg.vector_norm(self.weight[row])
            shift[row] = float(scale) * self.weight[row] / length.clamp_min(1e-30)
        layers = sorted({layer for layer, _ in chosen})
        delta = [_projected(lm, i, shift[self.layers.index(i)].flatten()) for i in layers]
        place = Place("attn", layers, tokens)
        made_by = {"from": "head-probe", **self.meta.made_by, "heads": [list(p) for p in chosen]}
        return Add(place, torch.stack(delta), meta=replace(self.meta, made_by=made_by))

    def named(self, name: str) -> "HeadProbe":
        """The same probe under a name."""
        return replace(self, flat=self.flat.named(name))

    def untied(self) -> "HeadProbe":
        """The same probe without the model that it was made for."""
        return replace(self, flat=self.flat.untied())

    def save(self, path: str | Path) -> None:
        """Write the probe as an artifact folder (see ``tt.load``)."""
        tensors = {n: t for n in (*PARTS, "mean") if (t := getattr(self, n)) is not None}
        extra = {"layers": list(self.layers), "heads": self.n_heads}
        save(path, Parts("head-probe", self.meta, str(self.place), extra, tensors))

    def _split(self, values: Tensor) -> Tensor:
        """Values [L H, ...] as [L, H, ...]."""
        return values.reshape(len(self.layers), self.n_heads, *values.shape[1:])


HEAD_SITES = ("heads", "q", "k", "v")


def head_count(lm: LM, site: str) -> int:
    """How many heads share the width of a site; keys and values may have fewer than queries."""
    _check_site(site)
    config = lm.text_config
    count: int = config.num_attention_heads
    return (getattr(config, "num_key_value_heads", None) or count) if site in "kv" else count


def _check_site(site: str) -> None:
    if site not in HEAD_SITES:
        raise PlaceError(
            f"per_head takes a site whose width falls into heads, {', '.join(HEAD_SITES)}, not "
            f'{site!r}; give a place such as "heads@all answer[:16]", or leave out per_head'
        )


def by_head(recording: Recording, n_heads: int) -> Recording:
    """The same tokens with each head as a layer of its own: rows [T_i, L H, d] (views)."""
    _check_site(recording.place.site)
    if n_heads < 1 or recording.width % n_heads:
        raise PlaceError(
            f"a width of {recording.width} at {recording.place.site} does not fall into {n_heads} "
            "heads; record the site heads, and give the number of attention heads of its model"
        )
    count = len(recording.layers) * n_heads
    chunks = [
        Chunk(c.index, c.lengths, c.values.unflatten(-1, (n_heads, -1)).flatten(1, 2))
        for c in recording.chunks()
    ]
    place = recording.place.at(layers=range(count))
    return Recording({place: Track(tuple(range(count)), chunks)}, recording.meta)


def _projected(lm: LM, layer: int, shift: Tensor) -> Tensor:
    """What a shift of the output projection's input, [H d], does to its output, [D]."""
    projection, _ = lm.anatomy.tap("heads", layer)
    weight = next(projection.parameters())
    moved = torch.stack([shift, torch.zeros_like(shift)]).to(weight.device, lm.model.dtype)[None]
    ends: Tensor = projection(moved)[0].float().cpu()  # a module knows its own layout and bias
    return ends[0] - ends[1]


def _load(parts: Parts) -> HeadProbe:
    layers, heads = parts.extra["layers"], parts.extra["heads"]
    tensors = {name: t.flatten(0, 1) for name, t in parts.tensors.items()}
    if parts.place is None or tensors["gain"].shape != (len(layers) * heads,):
        raise ArtifactError(
            f"this probe names {len(layers)} layers of {heads} heads, but holds a gain of "
            f"{list(parts.tensors['gain'].shape)}"
        )
    place = Place.parse(parts.place)
    rows = list(range(len(layers) * heads))
    flat = Parts("probe", parts.meta, str(place.at(layers=rows)), {"layers": rows}, tensors)
    return HeadProbe(place, tuple(layers), heads, read_probe(flat))


register("head-probe", _load)
