"""Journal: the finished pieces of a long job, so that one that is killed goes on where it stopped.

Knows files and JSON; knows nothing of what the pieces are.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from trimtab.artifact import user_path
from trimtab.errors import ArtifactError

T = TypeVar("T")


class Journal:
    """A file with one JSON line per finished piece; without a path, memory alone.

    The first line says which ``job`` the pieces belong to. A line that a crash left half written is
    dropped. Threads may make different pieces at a time. A journal without a piece is begun anew.
    Raises ArtifactError where the file belongs to another job or cannot be read.
    """

    def __init__(self, path: str | Path | None, job: Mapping[str, Any]) -> None:
        self.path = None if path is None else user_path(path)
        self._done: dict[str, Any] = {}
        self._lock = threading.Lock()
        if self.path is not None:
            self._open(self.path, as_json(job))

    def piece(self, key: str, make: Callable[[], T]) -> T:
        """The piece of this name: read if it was finished before, else made and written."""
        if key not in self._done:
            made = make()
            self._append(key, made)
            self._done[key] = made
        found: T = self._done[key]
        return found

    def remove(self) -> None:
        """Delete the file: the job's result is safe elsewhere."""
        if self.path is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._file.close()

    def _open(self, path: Path, job: dict[str, Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            if lines and not _is_begun(lines[0]):
                raise ValueError("it is no journal")
            cut = bool(lines) and not lines[-1].endswith(b"\n")
            entries = [json.loads(line) for line in lines[: len(lines) - cut]]
            self._file = path.open("a", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot go on with {path} ({error}); name another file") from None
        if entries and entries[0] != {"job": job}:
            if not _is_bare(entries):
                self._file.close()
                raise ArtifactError(
                    f"{path} holds the beginning of another job "
                    f"({difference(_job_of(entries[0]), job)}); delete it, or name another file"
                )
            entries = []
        self._file.truncate(sum(map(len, lines[: len(entries)])))
        if not entries:
            self._write({"job": job})
        self._done = {entry["key"]: entry["value"] for entry in entries[1:]}

    def _append(self, key: str, value: Any) -> None:
        if self.path is not None:
            with self._lock:
                self._write({"key": key, "value": value})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def as_json(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job as its file holds it. An error in it is raised: it says what could not be told."""
    if errors := [value for value in job.values() if isinstance(value, Exception)]:
        raise errors[0]
    found: dict[str, Any] = json.loads(json.dumps(dict(job)))
    return found


def _is_begun(line: bytes) -> bool:
    """Whether a file's first line is a journal's, even if it was cut short."""
    start = b'{"job": '
    return line.startswith(start) or start.startswith(line)


def _is_bare(entries: list[Any]) -> bool:
    """Whether a journal holds its job alone: what failed before its first piece is no loss."""
    return len(entries) == 1 and isinstance(entries[0], dict) and [*entries[0]] == ["job"]


def _job_of(entry: Any) -> Any:
    return entry.get("job") if isinstance(entry, dict) else None


def difference(there: Any, now: Any, name: str = "") -> str:
    """The innermost first thing in which two jobs differ, by its dotted name."""
    alike = _short(there) == _short(now)
    if alike and isinstance(there, list) and isinstance(now, list):
        there, now = dict(enumerate(there)), dict(enumerate(now))
    if alike and isinstance(there, str) and isinstance(now, str):
        pairs = enumerate(zip(there, now, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(there), len(now)))
        there, now = (f"...{text[max(same - 20, 0) :]}" for text in (there, now))
    if isinstance(there, dict) and isinstance(now, dict):
        key = next((k for k in [*now, *there] if there.get(k) != now.get(k)), None)
        if key is not None:
            return difference(there.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    return f"{name or 'its form'}: {_short(there)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
