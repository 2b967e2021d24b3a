"""Recordings: what was at a place, as ragged rows, in memory or in memory-mapped shards on disk.

Knows tensors, places and files; knows no model. A row holds one example: [T_i, L, D], its chosen
tokens by the layers of the place. Rows keep the order of the input, whatever order they came in.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import ArtifactError, PlaceError
from trimtab.place import Place

FORMAT = 1
INDEX_NAME = "recording.json"
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Some rows, end to end: ``values`` [sum of lengths, L, D], and which rows they are."""

    index: tuple[int, ...]
    lengths: tuple[int, ...]
    values: Tensor

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Each row's index and its [T_i, L, D] (views, nothing is copied)."""
        return zip(self.index, self.values.split(list(self.lengths)), strict=True)


@dataclass(frozen=True)
class Track:
    """The chunks of one place, and its layers as numbers."""

    layers: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


class Recording:
    """Activations of many examples at one place or several.

    ``recording[place]`` narrows to one place, or to some layers of one; ``rows()`` are [T_i, L, D];
    ``mean()`` and ``last()`` pool them to [B, L, D]; ``save`` and ``load`` go to disk and back.

    >>> rec = Recording.from_rows("resid@0:2", [torch.ones(3, 2, 4), torch.zeros(1, 2, 4)])
    >>> len(rec), rec.mean().shape
    (2, torch.Size([2, 2, 4]))
    """

    def __init__(
        self, tracks: Mapping[Place, Track], meta: Mapping[str, Any] | None = None
    ) -> None:
        self._tracks = dict(tracks)
        self.meta = dict(meta or {})

    @staticmethod
    def from_rows(place: Place | str, rows: Sequence[Tensor]) -> "Recording":
        """A recording of tensors that you have already, one [T_i, L, D] per example."""
        place = Place.parse(place)
        wrong = [list(r.shape) for r in rows if r.dim() != 3 or r.shape[1:] != rows[0].shape[1:]]
        if wrong or not rows:
            raise PlaceError(
                f"a recording takes rows of shape [tokens, layers, width], all with the same layers "
                f"and width, not {wrong[0] if wrong else 'an empty list'}"
            )
        lengths = tuple(len(r) for r in rows)
        chunk = Chunk(tuple(range(len(rows))), lengths, torch.cat(list(rows)))
        layers = _layers_of(place, rows[0].shape[1])
        return Recording({place: Track(layers, [chunk])})

    @staticmethod
    def join(recordings: Sequence["Recording"]) -> "Recording":
        """Parts of one recording (for example, one per process) as one; the row numbers stay."""
        first = recordings[0]
        tracks = {
            place: Track(track.layers, [c for r in recordings for c in r._tracks[place].chunks])
            for place, track in first._tracks.items()
        }
        return Recording(tracks, first.meta)

    @property
    def places(self) -> list[Place]:
        """The places that were recorded."""
        return list(self._tracks)

    @property
    def place(self) -> Place:
        """The place, where there is only one."""
        return self._only()[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """The 0-based layers, in the order of the second axis of a row."""
        return self._only()[1].layers

    @property
    def width(self) -> int:
        """The size of the last axis."""
        return self._only()[1].chunks[0].values.shape[-1]

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, in the order of the input."""
        pairs = [p for c in self.chunks() for p in zip(c.index, c.lengths, strict=True)]
        return [length for _, length in sorted(pairs)]

    def __len__(self) -> int:
        track = next(iter(self._tracks.values()))
        return sum(len(c.index) for c in track.chunks)

    def __repr__(self) -> str:
        return f"Recording({len(self)} rows at {', '.join(str(p) for p in self._tracks)})"

    def __getitem__(self, place: Place | str) -> "Recording":
        place = Place.parse(place)
        if place in self._tracks:
            return Recording({place: self._tracks[place]}, self.meta)
        for own, track in self._tracks.items():
            if own.at(layers=place.layers) == place:
                return Recording({place: _narrow(track, place)}, self.meta)
        have = ", ".join(repr(str(p)) for p in self._tracks)
        raise PlaceError(f"{str(place)!r} was not recorded; this recording holds {have}")

    def chunks(self) -> Iterator[Chunk]:
        """Pieces as they lie in memory or on disk, for passes over more than memory holds."""
        yield from self._only()[1].chunks

    def rows(self) -> list[Tensor]:
        """One [T_i, L, D] per example, in the order of the input."""
        pairs = dict(pair for chunk in self.chunks() for pair in chunk.rows())
        return [pairs[i] for i in sorted(pairs)]

    def mean(self) -> Tensor:
        """The mean over each row's tokens, [B, L, D], summed in float32."""
        return self._pool(lambda r: r.mean(0) if r.dtype == torch.float64 else r.float().mean(0))

    def last(self) -> Tensor:
        """The last chosen token of each row, [B, L, D]."""
        return self._pool(lambda r: r[-1])

    def _pool(self, pool: Any) -> Tensor:
        rows = self.rows()
        empty = [i for i, row in enumerate(rows) if len(row) == 0]
        if empty:
            raise PlaceError(f"rows {empty[:8]} hold no token at {str(self.place)!r}")
        return torch.stack([pool(row) for row in rows])

    def save(self, path: str | Path) -> None:
        """Write shards of at most 256 MiB and an index; nothing is complete until the index says so."""
        writer = ShardWriter(path, self._tracks, {**self.meta, "made": "saved"})
        tracks = list(self._tracks.values())
        for number in range(len(tracks[0].chunks)):
            writer.write([track.chunks[number] for track in tracks])
        writer.finish(len(self))

    @staticmethod
    def load(path: str | Path) -> "Recording":
        """Open a recording, memory-mapped: tensors are read when they are used."""
        folder = Path(path)
        index = _read_index(folder)
        done = [_read_shard(f, len(index["places"])) for f in sorted(folder.glob("shard-*"))]
        found = sum(len(chunks[0].index) for chunks in done)
        if not index["complete"] or found != index["rows"]:
            raise ArtifactError(
                f"the recording {folder} is not complete ({found} of {index['rows']} rows); run the "
                "same lm.record(..., out=...) again and it goes on where it stopped"
            )
        tracks = {
            Place.parse(entry["place"]): Track(tuple(entry["layers"]), [d[i] for d in done])
            for i, entry in enumerate(index["places"])
        }
        return Recording(tracks, index["meta"])

    def _only(self) -> tuple[Place, Track]:
        if len(self._tracks) != 1:
            have = ", ".join(repr(str(p)) for p in self._tracks)
            raise PlaceError(f"this recording holds several places; choose one: recording[{have}]")
        return next(iter(self._tracks.items()))


class ShardWriter:
    """Writes a recording shard by shard, each whole or not at all, and knows which rows are done."""

    def __init__(
        self,
        path: str | Path,
        tracks: Mapping[Place, Track],
        meta: Mapping[str, Any],
        n_rows: int = 0,
        rank: int = 0,
    ) -> None:
        self.folder, self.rank = Path(path), rank
        self.index = {
            "format": FORMAT,
            "complete": False,
            "rows": n_rows,
            "places": [
                {"place": str(p), "layers": list(track.layers)} for p, track in tracks.items()
            ],
            "meta": dict(meta),
        }
        self.pending: list[list[Chunk]] = []
        self.done = self._resume()
        self.number = 1 + max(
            (int(f.stem.split("-")[2]) for f in self.folder.glob(f"shard-{rank:04d}-*")), default=-1
        )

    def _resume(self) -> set[int]:
        """Rows that an earlier, interrupted run with the same index has written."""
        file = self.folder / INDEX_NAME
        if not self.folder.exists() or not any(self.folder.iterdir()):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_index()
            return set()
        if not file.is_file():
            raise ArtifactError(
                f"{self.folder} exists and is not a recording; choose another folder"
            )
        old = _read_index(self.folder)
        keys = ("places", "meta")
        if any(old[k] != self.index[k] for k in keys):
            differing = [
                k for k in self.index["meta"] if old["meta"].get(k) != self.index["meta"][k]
            ]
            raise ArtifactError(
                f"{self.folder} holds another recording (it differs in {differing or 'its places'}); "
                "choose another folder or delete it"
            )
        shards = sorted(self.folder.glob("shard-*.safetensors"))
        return {row for f in shards for row in _read_shard(f, 1)[0].index}

    def add(self, chunks: list[Chunk]) -> None:
        """Keep one chunk per place; written as a shard once enough have come together."""
        self.pending.append(chunks)
        size = sum(c.values.nbytes for chunks in self.pending for c in chunks)
        if size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has come together."""
        if self.pending:
            joined = [_join_chunks(list(column)) for column in zip(*self.pending, strict=True)]
            self.pending = []
            self.write(joined)

    def write(self, chunks: list[Chunk]) -> None:
        """One shard: a chunk per place, over the same rows."""
        tensors = {"index": torch.tensor(chunks[0].index, dtype=torch.long)}
        for i, chunk in enumerate(chunks):
            tensors[f"{i}.lengths"] = torch.tensor(chunk.lengths, dtype=torch.long)
            tensors[f"{i}.values"] = chunk.values.detach().cpu().contiguous()
        name = f"shard-{self.rank:04d}-{self.number:05d}.safetensors"
        temporary = self.folder / f".{name}.{os.getpid()}"
        save_file(tensors, temporary)
        os.replace(temporary, self.folder / name)
        self.number += 1
        self.done |= set(chunks[0].index)

    def finish(self, n_rows: int) -> None:
        """Write what is left and mark the recording complete."""
        self.flush()
        self.index |= {"complete": True, "rows": n_rows}
        self._write_index()

    def _write_index(self) -> None:
        temporary = self.folder / f".{INDEX_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(self.index, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / INDEX_NAME)


def _join_chunks(chunks: list[Chunk]) -> Chunk:
    return Chunk(
        tuple(i for c in chunks for i in c.index),
        tuple(n for c in chunks for n in c.lengths),
        torch.cat([c.values for c in chunks]),
    )


def _layers_of(place: Place, n: int) -> tuple[int, ...]:
    """The layers of rows given by hand: by the place's own numbers where they fit."""
    if place.layers == "all":
        return tuple(range(n))
    try:
        layers = place.layer_indices(10_000)
    except PlaceError:
        layers = ()
    if len(layers) == n or "-" in place.layers or place.layers.endswith(":"):
        return layers if len(layers) == n else tuple(range(n))
    raise PlaceError(f"{str(place)!r} names {len(layers)} layers, but the rows hold {n}")


def _narrow(track: Track, place: Place) -> Track:
    n_layers = max(track.layers) + 1
    layers = place.layer_indices(n_layers)
    missing = [i for i in layers if i not in track.layers]
    if missing:
        raise PlaceError(f"layers {missing} were not recorded; recorded are {list(track.layers)}")
    where = [track.layers.index(i) for i in layers]
    chunks = [Chunk(c.index, c.lengths, c.values[:, where]) for c in track.chunks]
    return Track(layers, chunks)


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_NAME
    if not file.is_file():
        raise ArtifactError(f"no recording at {folder}: {INDEX_NAME} is missing")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not a recording of format {FORMAT}")
    return index


def _read_shard(file: Path, n_places: int) -> list[Chunk]:
    try:
        with safe_open(file, framework="pt") as shard:
            index = tuple(shard.get_tensor("index").tolist())
            return [
                Chunk(
                    index,
                    tuple(shard.get_tensor(f"{i}.lengths").tolist()),
                    shard.get_tensor(f"{i}.values"),
                )
                for i in range(n_places)
            ]
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}); delete this shard and run the same recording again"
        ) from None
