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
    dropped. Threads may make different pieces at a time. Raises ArtifactError where the file
    belongs to another job or cannot be read.
    """

    def __init__(self, path: str | Path | None, job: Mapping[str, Any]) -> None:
        self.path = None if path is None else user_path(path)
        self._done: dict[str, Any] = {}
        self._lock = threading.Lock()
        if self.path is not None:
            self._open(self.path, json.loads(json.dumps(dict(job))))

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
            if lines and not lines[-1].endswith(b"\n"):
                os.truncate(path, sum(map(len, lines := lines[:-1])))
            entries = [json.loads(line) for line in lines]
            self._file = path.open("a", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot go on with {path} ({error}); name another file") from None
        if entries and entries[0] != {"job": job}:
            self._file.close()
            raise ArtifactError(
                f"{path} holds the beginning of another job ({_difference(entries[0], job)}); "
                "delete it, or name another file"
            )
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


def _difference(entry: Any, job: dict[str, Any]) -> str:
    """The first thing in which two jobs differ."""
    other = entry.get("job") if isinstance(entry, dict) else None
    other = other if isinstance(other, dict) else {}
    name = next((k for k in [*job, *other] if job.get(k) != other.get(k)), "its form")
    return f"{name}: {_short(other.get(name))} there, {_short(job.get(name))} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
