"""Artifacts: any edit, probe or reader as a folder of JSON and safetensors. Knows files and hashes.

    humor/artifact.json         format, kind, name, place, model, made_by, scores, sha256
    humor/tensors.safetensors   the numbers

Writing is atomic: a temporary folder beside the target, then a rename. Loading checks format and
hash, and says what is wrong. Nothing here executes what it reads.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from trimtab.errors import ArtifactError

FORMAT = 1
JSON_NAME, TENSORS_NAME = "artifact.json", "tensors.safetensors"


@dataclass(frozen=True)
class Meta:
    """What an artifact says of itself: its name, its model, how it was made, how well it scores.

    ``model`` holds id, revision, width, layers and a fingerprint of the embedding matrix.
    """

    name: str | None = None
    model: dict[str, Any] | None = None
    made_by: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """An artifact taken apart: what is written to disk and read back."""

    kind: str
    meta: Meta
    place: str | None
    extra: dict[str, Any]
    tensors: dict[str, Tensor]


_LOADERS: dict[str, Callable[[Parts], Any]] = {}
_FOREIGN: list[Callable[[dict[str, Tensor], Path], Any | None]] = []


def register(kind: str, loader: Callable[[Parts], Any]) -> None:
    """Teach ``tt.load`` to build objects of a kind from their parts."""
    _LOADERS[kind] = loader


def register_foreign(reader: Callable[[dict[str, Tensor], Path], Any | None]) -> None:
    """Teach ``tt.load`` a foreign safetensors file; the reader returns None if it is not its own."""
    _FOREIGN.append(reader)


def save(path: str | Path, parts: Parts) -> None:
    """Write an artifact folder, whole or not at all. An artifact of that name is replaced."""
    target = Path(path)
    if target.exists() and not (target / JSON_NAME).is_file():
        raise ArtifactError(f"{target} exists and is not an artifact; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in parts.tensors.items()}
        save_file(tensors, made / TENSORS_NAME)
        header = _header(parts) | {"sha256": _sha256(made / TENSORS_NAME)}
        text = json.dumps(header, indent=2, ensure_ascii=False, allow_nan=False)
        (made / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        os.chmod(made, 0o755)
        replace_folder(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def replace_folder(made: Path, target: Path) -> None:
    """Put a finished folder in place of the target; the old one is there until the new one is."""
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(made, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read(path: str | Path) -> Parts:
    """Read an artifact folder and check it: format, hash, and that every part is there."""
    folder = Path(path)
    header = read_header(folder)
    raw = _bytes(folder / TENSORS_NAME)
    if hashlib.sha256(raw).hexdigest() != header["sha256"]:
        raise ArtifactError(
            f"{folder / TENSORS_NAME} does not match the sha256 in {JSON_NAME}: it was changed or cut "
            "short; save the artifact again or fetch a fresh copy"
        )
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / TENSORS_NAME} cannot be read: {error}") from None
    meta = Meta(*(header.get(k) for k in ("name", "model")), header["made_by"], header["scores"])
    return Parts(header["kind"], meta, header.get("place"), header.get("extra", {}), tensors)


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON of an artifact, checked for format and completeness, without its tensors."""
    file = Path(path) / JSON_NAME
    if not file.is_file():
        raise ArtifactError(f"no artifact at {path}: {JSON_NAME} is missing")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} is not valid JSON ({error}); fetch a fresh copy") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise ArtifactError(
            f"{file} has format {found!r}, this Trimtab reads {FORMAT}; update the one or the other"
        )
    missing = [k for k in ("kind", "made_by", "scores", "sha256") if k not in header]
    if missing:
        raise ArtifactError(f"{file} lacks {', '.join(missing)}; fetch a fresh copy")
    return header


def load_artifact(path: str | Path) -> Any:
    """Load whatever was saved at ``path``: an artifact folder, or a file of a known foreign format."""
    target = Path(path)
    if not target.exists():
        raise ArtifactError(f"nothing at {target}; give the folder that .save(path) wrote")
    if target.is_file():
        return _load_foreign(target)
    parts = read(target)
    if parts.kind not in _LOADERS:
        raise ArtifactError(
            f"{target} is of kind {parts.kind!r}; this Trimtab knows {', '.join(sorted(_LOADERS))}"
        )
    return _LOADERS[parts.kind](parts)


def check_model(meta: Meta, model: dict[str, Any]) -> None:
    """Raise ArtifactError if an artifact was made for another model than ``model`` describes."""
    made_for = meta.model
    if not made_for or made_for.get("fingerprint") == model["fingerprint"]:
        return
    told = ", ".join(f"{k} {made_for.get(k)}" for k in ("id", "width", "layers", "fingerprint"))
    have = ", ".join(f"{k} {model.get(k)}" for k in ("id", "width", "layers", "fingerprint"))
    raise ArtifactError(
        f"{meta.name or 'this artifact'} was made for another model ({told}; this one: {have}); "
        "make it anew for this model, or drop the tie on purpose with .untied()"
    )


def _load_foreign(file: Path) -> Any:
    if file.suffix == ".safetensors":
        try:
            tensors = load(_bytes(file))
        except SafetensorError as error:
            raise ArtifactError(f"{file} is not a safetensors file: {error}") from None
        for reader in _FOREIGN:
            if (made := reader(tensors, file)) is not None:
                return made
        raise ArtifactError(f"{file} holds {sorted(tensors)[:6]}, which is no format known here")
    raise ArtifactError(f"{file} is a file; an artifact is a folder with {JSON_NAME} in it")


def _header(parts: Parts) -> dict[str, Any]:
    meta = parts.meta
    return {
        "format": FORMAT,
        "kind": parts.kind,
        "name": meta.name,
        "place": parts.place,
        "model": meta.model,
        "made_by": meta.made_by,
        "scores": meta.scores,
        "extra": parts.extra,
    }


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_list(values: Tensor) -> list[float]:
    """A 1-d tensor as JSON numbers, rounded to what matters."""
    return [round(float(v), 6) for v in values.to(torch.float64)]
