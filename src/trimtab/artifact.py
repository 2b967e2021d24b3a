"""Artifacts: any edit, probe or reader as a folder of JSON and safetensors. Knows files and hashes.

    humor/artifact.json         format, kind, name, place, model, made_by, scores, sha256
    humor/tensors.safetensors   the numbers

Writing is atomic: a temporary folder beside the target, then a rename. Loading checks format and
hash, and says what is wrong. Nothing here executes what it reads.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from trimtab.errors import ArtifactError, TrimtabError

FORMAT = 1
JSON_NAME, TENSORS_NAME = "artifact.json", "tensors.safetensors"
FILES = (JSON_NAME, TENSORS_NAME)


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


_MAYBE_TEXT, _MAYBE_DICT = (str, type(None)), (dict, type(None))
_KINDS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "name": _MAYBE_TEXT,
    "place": _MAYBE_TEXT,
    "model": _MAYBE_DICT,
    "made_by": dict,
    "scores": dict,
    "extra": _MAYBE_DICT,
    "sha256": str,
}

_LOADERS: dict[str, Callable[[Parts], Any]] = {}
_FOREIGN: list[Callable[[dict[str, Tensor], Path], Any | None]] = []
_FOLDERS: dict[str, Callable[[Path], Any]] = {}


def register(kind: str, loader: Callable[[Parts], Any]) -> None:
    """Teach ``tt.load`` to build objects of a kind from their parts."""
    _LOADERS[kind] = loader


def register_foreign(reader: Callable[[dict[str, Tensor], Path], Any | None]) -> None:
    """Teach ``tt.load`` a foreign safetensors file; the reader returns None for others."""
    _FOREIGN.append(reader)


def register_folder(marker: str, reader: Callable[[Path], Any]) -> None:
    """Teach ``tt.load`` a foreign folder, known by a file in it."""
    _FOLDERS[marker] = reader


def save(path: str | Path, parts: Parts) -> None:
    """Write an artifact folder, whole or not at all. An artifact of that name is replaced.

    Raises ArtifactError where something else stands there (see ``check_free``), or where it cannot
    be written.
    """
    write_folder(path, lambda made: _write(made, parts))


def write_folder(
    path: str | Path, write: Callable[[Path], None], files: Sequence[str] = FILES
) -> None:
    """Have ``write`` fill a folder with ``files``, and put it at ``path``, whole or not at all.

    Raises ArtifactError where something else stands there (see ``check_free``), or where it cannot
    be written.
    """
    target = user_path(path)
    check_free(target, files)
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        write(made)
        os.chmod(made, 0o755)
        replace_folder(made, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"cannot write {target}: {reason}; choose another path") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def check_free(path: str | Path, files: Sequence[str] = FILES) -> None:
    """Raise ArtifactError where a new folder of ``files`` would delete what is no such folder.

    A folder that has the first of the files and no others but them may be replaced.
    """
    target = user_path(path)
    if not os.path.lexists(target):
        return
    what = "an artifact" if files is FILES else f"a folder with {files[0]}"
    if not (target / files[0]).is_file():
        raise ArtifactError(f"{target} exists and is not {what}; choose another name")
    if others := sorted({file.name for file in target.iterdir()} - set(files)):
        raise ArtifactError(
            f"{target} is {what} that also holds {', '.join(others[:3])}, which saving would "
            "delete; choose another name, or move that away"
        )


def _write(folder: Path, parts: Parts) -> None:
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in parts.tensors.items()}
    save_file(tensors, folder / TENSORS_NAME)
    header = _header(parts) | {"sha256": _sha256(folder / TENSORS_NAME)}
    try:
        text = json.dumps(header, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"the meta of {parts.meta.name or 'this artifact'} holds what JSON cannot ({error}); "
            "keep to text, finite numbers, lists and dicts"
        ) from None
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")


def write_file(path: str | Path, content: bytes) -> None:
    """Write one file, whole or not at all, also when the machine stops. Raises ArtifactError."""
    target = user_path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)
            os.chmod(made, 0o644)
            os.replace(made, target)
        except BaseException:
            Path(made).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror}; choose another path"
        ) from None


def user_path(path: str | Path) -> Path:
    """A path as typed, where "~" is the home folder."""
    return Path(os.path.expanduser(path))


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
    folder = user_path(path)
    header = read_header(folder)
    raw = _bytes(folder / TENSORS_NAME)
    if hashlib.sha256(raw).hexdigest() != header["sha256"]:
        raise ArtifactError(
            f"{folder / TENSORS_NAME} does not match the sha256 in {JSON_NAME}: it was changed or "
            "cut short; save the artifact again or fetch a fresh copy"
        )
    try:
        tensors = load(raw)
    except SafetensorError as error:
        raise ArtifactError(
            f"{folder / TENSORS_NAME} cannot be read ({error}); fetch a fresh copy"
        ) from None
    name, model = header.get("name"), header.get("model")
    meta = Meta(name, model, header["made_by"], header["scores"])
    return Parts(header["kind"], meta, header.get("place"), header.get("extra") or {}, tensors)


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON of an artifact, checked for format and completeness, without its tensors."""
    file = user_path(path) / JSON_NAME
    if (file.parent / "recording.json").is_file():
        raise ArtifactError(f"{path} is a recording; open it with tt.Recording.load(path)")
    if not file.is_file():
        raise ArtifactError(
            f"no artifact at {path}: {JSON_NAME} is missing; give the folder that .save(path) wrote"
        )
    try:
        header = json.loads(_bytes(file).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{file} is not valid JSON ({error}); fetch a fresh copy") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise ArtifactError(
            f"{file} has format {found!r}, this Trimtab reads {FORMAT}; update the one or the other"
        )
    missing = [k for k in ("kind", "made_by", "scores", "sha256") if k not in header]
    if missing:
        raise ArtifactError(f"{file} lacks {', '.join(missing)}; fetch a fresh copy")
    wrong = [k for k, kinds in _KINDS.items() if not isinstance(header.get(k), kinds)]
    if wrong:
        told = ", ".join(f"{k} {header.get(k)!r:.40}" for k in wrong)
        raise ArtifactError(f"{file} holds {told}, of a wrong type; fetch a fresh copy")
    return header


def load_artifact(path: str | Path) -> Any:
    """Load what was saved at ``path``: an artifact folder, or a file of a known foreign format."""
    target = user_path(path)
    if not target.exists():
        raise ArtifactError(f"nothing at {target}; give the folder that .save(path) wrote")
    if target.is_file():
        return _load_foreign(target)
    if (reader := foreign_folder(target)) is not None:
        return reader(target)
    parts = read(target)
    if parts.kind not in _LOADERS:
        raise ArtifactError(
            f"{target} is of kind {parts.kind!r}; this Trimtab knows {', '.join(sorted(_LOADERS))}"
        )
    try:
        return _LOADERS[parts.kind](parts)
    except ArtifactError:
        raise
    except (
        TrimtabError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:
        told = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(
            f"the {parts.kind} in {target} cannot be built: {told}; save it again or fetch a fresh "
            "copy"
        ) from error


def foreign_folder(folder: Path) -> Callable[[Path], Any] | None:
    """What reads a folder that is no artifact, if its format is known."""
    if (folder / JSON_NAME).is_file():
        return None
    return next((own for name, own in _FOLDERS.items() if (folder / name).is_file()), None)


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
            raise ArtifactError(
                f"{file} is not a safetensors file ({error}); fetch a fresh copy"
            ) from None
        for reader in _FOREIGN:
            if (made := reader(tensors, file)) is not None:
                return made
        raise ArtifactError(
            f"{file} holds {sorted(tensors)[:6]}, which is no format known here; make an edit of "
            "its tensors yourself: tt.Add(place, delta)"
        )
    if file.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"):
        raise ArtifactError(
            f"{file} may hold a pickle, which can run code and is never read here; save its "
            "tensors as safetensors and make an edit of them: tt.Add(place, delta)"
        )
    raise ArtifactError(f"{file} is a file; an artifact is a folder with {JSON_NAME} in it")


def _header(parts: Parts) -> dict[str, Any]:
    meta = parts.meta
    return {
        "format": FORMAT,
        "kind": parts.kind,
        "name": meta.name,
        "place": parts.place,
        "model": meta.model,
        "made_by": {**meta.made_by, "trimtab": _version()},
        "scores": meta.scores,
        "extra": parts.extra,
    }


def _version() -> str:
    try:
        return version("trimtab")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{file} cannot be read ({error.strerror}); fetch a fresh copy or save it again"
        ) from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_list(values: Tensor) -> list[float | None]:
    """A 1-d tensor as JSON numbers, rounded to what matters; None where there is no number."""
    return [round(v, 6) if math.isfinite(v) else None for v in values.double().tolist()]
