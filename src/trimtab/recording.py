"""Recordings: what was at a place, as ragged rows, in memory or in memory-mapped shards on disk.

Knows tensors, places and files; knows no model. A row holds one example: [T_i, L, D], its chosen
tokens by the layers of the place. Rows keep the order of the input, whatever order they came in.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.artifact import replace_folder, user_path
from trimtab.errors import ArtifactError, PlaceError
from trimtab.place import Place

FORMAT = 1
INDEX_NAME, SHARDS = "recording.json", "shard-*.safetensors"
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

    ``recording[place]`` narrows to one place, or to some layers of one; ``rows()`` are [T_i, L, D],
    ``recording[0]`` is one of them; ``mean()`` and ``last()`` pool them to [B, L, D]; ``save`` and
    ``load`` go to disk and back.

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
        """A recording of tensors that you have already, one [T_i, L, D] per example.

        An open end ("resid@4:") takes as many layers as the rows hold. Raises PlaceError for layers
        counted from the top, or of another number than the rows'.
        """
        place, rows = Place.parse(place), list(rows)
        wrong = [_shape(r) for r in rows if not _like(r, rows[0])]
        if wrong or not rows:
            raise PlaceError(
                "a recording takes tensors [tokens, layers, width], one per row, all with the same "
                f"layers and width, not {wrong[0] if wrong else 'an empty list'}"
            )
        lengths = tuple(len(r) for r in rows)
        chunk = Chunk(tuple(range(len(rows))), lengths, torch.cat(rows))
        layers = _layers_of(place, rows[0].shape[1])
        return Recording({place: Track(layers, [chunk])})

    @staticmethod
    def join(recordings: Sequence["Recording"]) -> "Recording":
        """Parts of one recording (for example, one per process) as one; the row numbers stay.

        Raises PlaceError for parts of other places, and for rows that two parts hold.
        """
        if not recordings:
            raise PlaceError("join takes one recording at least, not an empty list")
        first = recordings[0]
        for other in recordings[1:]:
            if [(p, t.layers) for p, t in other._tracks.items()] != [
                (p, t.layers) for p, t in first._tracks.items()
            ]:
                raise PlaceError(f"join takes parts of the same places, not {first} and {other}")
        tracks = {
            place: Track(track.layers, [c for r in recordings for c in r._tracks[place].chunks])
            for place, track in first._tracks.items()
        }
        for track in tracks.values():
            numbers = sorted(i for chunk in track.chunks for i in chunk.index)
            if twice := sorted({a for a, b in pairwise(numbers) if a == b}):
                raise PlaceError(
                    f"two of the parts hold rows {twice[:8]}; join takes parts of one recording. "
                    "To put two behind each other: from_rows(place, [*a.rows(), *b.rows()])"
                )
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
        return next((c.values.shape[-1] for c in self.chunks()), 0)

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

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows())

    @overload
    def __getitem__(self, place: Place | str) -> "Recording": ...

    @overload
    def __getitem__(self, place: SupportsIndex) -> Tensor: ...

    def __getitem__(self, place: Place | str | SupportsIndex) -> "Recording | Tensor":
        if isinstance(place, SupportsIndex):
            return self.rows()[place]
        place = Place.parse(place)
        if place in self._tracks:
            return Recording({place: self._tracks[place]}, self.meta)
        for own, track in self._tracks.items():
            if own.at(layers=place.layers) == place:
                return Recording({place: self._narrow(track, place)}, self.meta)
        have = ", ".join(repr(str(p)) for p in self._tracks)
        raise PlaceError(f"{str(place)!r} was not recorded; this recording holds {have}")

    def _narrow(self, track: Track, place: Place) -> Track:
        """Some layers of a track, as views; -1 is the model's last layer if the model is known."""
        depth = (self.meta.get("model") or {}).get("layers") or max(track.layers) + 1
        layers = place.layer_indices(depth)
        if missing := [i for i in layers if i not in track.layers]:
            raise PlaceError(
                f"layers {missing} were not recorded; recorded are {list(track.layers)}"
            )
        where = [track.layers.index(i) for i in layers]
        step = where[1] - where[0] if len(where) > 1 else 1
        regular = where == list(range(where[0], where[-1] + 1, step))
        chosen: Any = slice(where[0], where[-1] + 1, step) if regular else where
        chunks = [Chunk(c.index, c.lengths, c.values[:, chosen]) for c in track.chunks]
        return Track(layers, chunks)

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
        """Write shards of about 256 MiB and an index, whole or not at all.

        A recording at that path is replaced; anything else there raises ArtifactError.
        """
        target = user_path(path)
        if _visible(target) and not (target / INDEX_NAME).is_file():
            raise ArtifactError(
                f"{target} exists and is not a recording; choose another folder or delete it"
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:
            raise ArtifactError(
                f"cannot write {target}: {error.strerror}; choose another folder"
            ) from None
        try:
            writer = ShardWriter(made, self._tracks, self.meta)
            for column in zip(*(track.chunks for track in self._tracks.values()), strict=True):
                for chunks in _cut(list(column)):
                    writer.add(chunks)
            writer.finish(len(self))
            os.chmod(made, 0o755)
            replace_folder(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    @staticmethod
    def load(path: str | Path) -> "Recording":
        """Open a recording, memory-mapped: tensors are read when they are used."""
        folder = user_path(path)
        index = _read_index(folder)
        layers = [tuple(entry["layers"]) for entry in index["places"]]
        done = [_read_shard(f, layers) for f in sorted(folder.glob(SHARDS))]
        found = {i for chunks in done for i in chunks[0].index}
        twice = sum(len(chunks[0].index) for chunks in done) - len(found)
        if not index["complete"] or twice or len(found) != index["rows"]:
            told = f"{twice} rows twice" if twice else f"{len(found)} of {index['rows']} rows"
            raise ArtifactError(
                f"the recording {folder} is not complete ({told}); "
                + (
                    "delete it and record anew"
                    if twice
                    else "run the same lm.record(..., out=...) "
                )
                + ("" if twice else "again and it goes on where it stopped")
            )
        tracks = {
            Place.parse(entry["place"]): Track(layers[i], [chunks[i] for chunks in done])
            for i, entry in enumerate(index["places"])
        }
        return Recording(tracks, index["meta"])

    def _only(self) -> tuple[Place, Track]:
        if len(self._tracks) != 1:
            have = ", ".join(repr(str(p)) for p in self._tracks)
            raise PlaceError(f"this recording holds several places; choose one: recording[{have}]")
        return next(iter(self._tracks.items()))


class ShardWriter:
    """Writes a recording shard by shard, each whole or not at all; knows which rows are done."""

    def __init__(
        self,
        path: str | Path,
        tracks: Mapping[Place, Track],
        meta: Mapping[str, Any],
        n_rows: int = 0,
        rank: int = 0,
    ) -> None:
        self.folder, self.rank = user_path(path), rank
        self.index: dict[str, Any] = {
            "format": FORMAT,
            "complete": False,
            "rows": n_rows,
            "places": [
                {"place": str(p), "layers": list(track.layers)} for p, track in tracks.items()
            ],
            "meta": dict(meta),
        }
        self.index = json.loads(_as_json(self.index))  # as it will be read back
        self.pending: list[list[Chunk]] = []
        self.size = 0
        self.done = self._resume()
        self.number = 1 + max(
            (int(f.stem.split("-")[2]) for f in self.folder.glob(f"shard-{rank:04d}-*")), default=-1
        )

    def _resume(self) -> set[int]:
        """Rows that an earlier, interrupted run with the same index has written."""
        if not _visible(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write_index()
            except OSError as error:
                raise ArtifactError(
                    f"cannot write to {self.folder}: {error.strerror}; choose another folder"
                ) from None
            return set()
        if not (self.folder / INDEX_NAME).is_file():
            raise ArtifactError(
                f"{self.folder} exists and is not a recording; choose another folder"
            )
        old = _read_index(self.folder)
        if differing := self._differing(old):
            raise ArtifactError(
                f"{self.folder} holds another recording (it differs in {', '.join(differing)}); "
                "choose another folder or delete it"
            )
        for leftover in self.folder.glob(f".shard-{self.rank:04d}-*"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        layers = [tuple(entry["layers"]) for entry in self.index["places"]]
        shards = sorted(self.folder.glob(SHARDS))
        return {row for f in shards for row in _read_shard(f, layers)[0].index}

    def _differing(self, old: Mapping[str, Any]) -> list[str]:
        """In what an earlier recording is not this one."""
        mine, other = self.index["meta"], old["meta"]
        names = [k for k in {**mine, **other} if mine.get(k) != other.get(k)]
        return names + [k for k in ("rows", "places") if old[k] != self.index[k]]

    def add(self, chunks: list[Chunk]) -> None:
        """Keep one chunk per place; written as a shard once enough have come together."""
        self.pending.append(chunks)
        self.size += sum(c.values.nbytes for c in chunks)
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has come together."""
        if self.pending:
            joined = [_join_chunks(list(column)) for column in zip(*self.pending, strict=True)]
            self.write(joined)
            self.pending, self.size = [], 0

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
        temporary.write_text(_as_json(self.index) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / INDEX_NAME)


def _join_chunks(chunks: list[Chunk]) -> Chunk:
    return Chunk(
        tuple(i for c in chunks for i in c.index),
        tuple(n for c in chunks for n in c.lengths),
        torch.cat([c.values for c in chunks]),
    )


def _layers_of(place: Place, n: int) -> tuple[int, ...]:
    """The layers of rows given by hand: the place's own numbers, an open end as far as they go."""
    if place.layers == "all":
        return tuple(range(n))
    if "-" in place.layers:
        raise PlaceError(
            f"{str(place)!r} counts layers from the top, which needs a model's depth; give numbers "
            f"from 0, for example {str(place.at(layers=range(n)))!r}"
        )
    start, *ends = place.layers.split(":")
    if ends and not ends[0] and "," not in place.layers:
        step = int(ends[1]) if len(ends) > 1 else 1
        return tuple(range(int(start), int(start) + n * step, step))
    layers = place.layer_indices(10_000)
    if len(layers) != n:
        raise PlaceError(f"{str(place)!r} names {len(layers)} layers, but the rows hold {n}")
    return layers


def _cut(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """A chunk per place, over the same rows, in pieces of about a shard's size."""
    parts = [c.values.split(list(c.lengths)) for c in chunks]
    first = size = 0
    for i in range(len(parts[0])):
        size += sum(rows[i].nbytes for rows in parts)
        if size >= SHARD_BYTES or i + 1 == len(parts[0]):
            some = slice(first, i + 1)
            yield [
                Chunk(c.index[some], c.lengths[some], torch.cat(rows[some]))
                for c, rows in zip(chunks, parts, strict=True)
            ]
            first, size = i + 1, 0


def _like(row: object, first: object) -> bool:
    if not (isinstance(row, Tensor) and isinstance(first, Tensor)):
        return False
    return row.dim() == 3 and row.shape[1:] == first.shape[1:]


def _shape(row: object) -> str:
    return str(list(row.shape)) if isinstance(row, Tensor) else type(row).__name__


def _visible(folder: Path) -> bool:
    """Whether something is there already; temporary files of a run that was killed are nothing."""
    if not folder.is_dir():
        return folder.exists()
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def _as_json(index: Mapping[str, Any]) -> str:
    try:
        return json.dumps(index, indent=2)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"a recording's meta holds what JSON cannot ({error}); keep to text, numbers and lists"
        ) from None


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_NAME
    if not file.is_file():
        raise ArtifactError(
            f"no recording at {folder}: {INDEX_NAME} is missing; give the folder that "
            "rec.save(path) or lm.record(..., out=path) wrote"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{file} is not valid JSON ({error}); record anew") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise ArtifactError(
            f"{file} has format {found!r}, this Trimtab reads {FORMAT}; update the one or the other"
        )
    kinds = {"complete": bool, "rows": int, "places": list, "meta": dict}
    wrong = [k for k, kind in kinds.items() if not isinstance(index.get(k), kind)]
    if wrong or not all(_is_entry(entry) for entry in index["places"]):
        raise ArtifactError(f"{file} is damaged in {', '.join(wrong) or 'places'}; record anew")
    return index


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the index names a place and its layers."""
    if not (isinstance(entry, dict) and isinstance(entry.get("place"), str)):
        return False
    layers = entry.get("layers")
    return isinstance(layers, list) and all(isinstance(i, int) for i in layers)


def _read_shard(file: Path, layers: Sequence[tuple[int, ...]]) -> list[Chunk]:
    """A chunk per place of one shard, memory-mapped."""
    try:
        with safe_open(file, framework="pt") as shard:
            index = tuple(shard.get_tensor("index").tolist())
            chunks = [
                Chunk(
                    index,
                    tuple(shard.get_tensor(f"{i}.lengths").tolist()),
                    shard.get_tensor(f"{i}.values"),
                )
                for i in range(len(layers))
            ]
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from None
    for chunk, numbers in zip(chunks, layers, strict=True):
        shape, rows = list(chunk.values.shape), len(chunk.lengths)
        if shape[:2] != [sum(chunk.lengths), len(numbers)] or len(shape) != 3 or rows != len(index):
            raise _damaged(file, f"values {shape} for {len(index)} rows and {len(numbers)} layers")
    return chunks


def _damaged(file: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{file} cannot be read ({reason}); delete this shard and run the same recording again"
    )
