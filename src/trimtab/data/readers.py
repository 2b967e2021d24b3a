"""Reading examples: built-in sets, files, the hub. Knows formats; leaves rows to ``example``."""

import csv
import difflib
import inspect
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from trimtab.data import presets, shots
from trimtab.data.checks import split as split_examples
from trimtab.data.example import EXPECTED, Example, from_row
from trimtab.errors import ArtifactError

Rows = Iterator[tuple[int, object]]


def names() -> list[str]:
    """The built-in sets, sorted. ``read`` takes each of them by name."""
    return sorted(Path(file.name).stem for file in _builtin().iterdir() if _is_set(file.name))


def read(
    source: str | os.PathLike[str], split: str | None = None, *, few_shot: int = 0, **options: Any
) -> list[Example]:
    """Labelled examples from a built-in set, a file, a preset of the paper, or a hub dataset.

    - A name from ``names()``, such as ``"humor"``.
    - A ``.json`` (list of objects, or object of columns), ``.jsonl`` or ``.csv`` file. Option
      ``columns`` maps prompt, completion, label and history to the file's own column names.
    - ``"truthfulqa"``, ``"oasst1"`` (options ``label``, ``limit``, ``language``),
      ``"toxic-completions"`` (options ``concept``, ``limit``): the data of arXiv 2402.14433; with
      option ``path`` from a .json, .jsonl, .csv or .parquet file of these rows.
    - ``"owner/name"`` on the hub, through ``datasets`` (options ``columns``, ``config``,
      ``revision``).

    ``split`` is ``"train"`` or ``"test"`` of the fixed 80/20 split for built-in sets and files
    (None: every row), and the dataset's own split for the hub (None: ``"train"``, and
    ``"validation"`` for truthfulqa). ``few_shot``: so many answered prompts go before each example,
    for a base model (see ``few_shot``: drawn before the split; true answers for truthfulqa, and for
    toxic-completions harmless prompts answered and toxic ones refused). Raises ArtifactError that
    names file, row, what was found and what was expected.

    >>> {example.label for example in read("happiness")}
    {0.0, 1.0}
    """
    name = os.fspath(source)
    reader, whole = _reader(source, split, options)
    _check_options(name, reader, options)
    examples = reader(**options)
    if few_shot:
        kinds = presets.shots_of(name, reader, options)
        examples = shots.few_shot(examples, few_shot, **kinds)
    return _part(examples, name, split) if whole else examples


def _reader(
    source: str | os.PathLike[str], split: str | None, options: Mapping[str, Any]
) -> tuple[Callable[..., list[Example]], bool]:
    """What reads this source, given its options, and whether it is whole: without a split."""
    name = os.fspath(source)
    if name in names():
        return partial(_read_file, _builtin() / f"{name}.jsonl"), True
    if name in presets.PRESETS:
        own = options.get("path") is not None
        return partial(presets.PRESETS[name], None if own else split), own
    file = Path(name).expanduser()
    if file.suffix.lower() in FORMATS:
        return partial(_read_file, file), True
    if isinstance(source, str) and _is_hub_id(name):
        return partial(_read_hub, name, split), False
    raise ArtifactError(_unknown(os.path.expanduser(name)))


def _check_options(
    name: str, reader: Callable[..., list[Example]], options: Mapping[str, Any]
) -> None:
    known = [*inspect.signature(reader).parameters]
    if unknown := [option for option in options if option not in known]:
        raise ArtifactError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known)}.")


def _builtin() -> Traversable:
    return resources.files("trimtab.data") / "builtin"


def _is_set(file_name: str) -> bool:
    return file_name.endswith(".jsonl")


def _is_hub_id(name: str) -> bool:
    """``owner/name``, and not something that lies on this disk."""
    return (
        name.count("/") == 1
        and all(name.split("/"))
        and name[0] not in ".~"
        and not (os.path.exists(name))
    )


def _unknown(name: str) -> str:
    if os.path.exists(name):
        return f"cannot read {name!r}: known formats are {', '.join(FORMATS)}. {EXPECTED}"
    known = [*names(), *presets.PRESETS]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"no data set named {name!r}.{hint} Built in: {', '.join(names())}. From the paper: "
        f"{', '.join(presets.PRESETS)}. Else give a {', '.join(FORMATS)} file, or a hub dataset "
        "as owner/name."
    )


def _part(examples: list[Example], name: str, split: str | None) -> list[Example]:
    if split is None:
        return examples
    if split not in ("train", "test"):
        raise ArtifactError(f"{name} has no split {split!r}. Use 'train', 'test' or None.")
    return split_examples(examples)[split == "test"]


def _read_file(file: Traversable, *, columns: Mapping[str, str] | None = None) -> list[Example]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArtifactError(f"cannot open {file}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file} is not UTF-8 ({error}). Save it as UTF-8.") from error
    rows = FORMATS[Path(file.name).suffix.lower()](text, str(file))
    examples = [from_row(row, f"{file}, row {number}", columns) for number, row in rows]
    if not examples:
        raise ArtifactError(f"{file} holds no rows. {EXPECTED}")
    return examples


def _jsonl_rows(text: str, where: str) -> Rows:
    # Not splitlines(): it also breaks at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse_json(line, f"{where}, row {number}")


def _json_rows(text: str, where: str) -> Rows:
    data = _parse_json(text, where)
    if isinstance(data, dict):
        data = _rows_of_columns(data, where)
    if not isinstance(data, list):
        found = type(data).__name__
        raise ArtifactError(f"{where}: found {found}, not a list of rows. {EXPECTED}")
    yield from enumerate(data, start=1)


def _csv_rows(text: str, where: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise ArtifactError(
                    f"{where}, row {number}: {len(row[None])} cells more than the header has. "
                    "Quote cells that hold commas."
                )
            yield number, row
    except csv.Error as error:
        raise ArtifactError(f"{where}, row {number + 1}: {error}. Or use .jsonl.") from error


FORMATS: dict[str, Callable[[str, str], Rows]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
}


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not JSON ({error}). Found {text[:60]!r}.") from error


def _rows_of_columns(columns: dict[str, Any], where: str) -> list[dict[str, Any]]:
    lengths = {
        key: len(values) if isinstance(values, list) else None for key, values in columns.items()
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ArtifactError(
            f"{where}: found an object with {lengths} rows per key; expected columns of equal "
            f"length, or a list of objects. {EXPECTED}"
        )
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _read_hub(
    name: str,
    split: str | None,
    *,
    columns: Mapping[str, str] | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> list[Example]:
    rows: Iterable[object] = presets.hub_rows(name, split or "train", config, revision)
    return [from_row(row, f"{name}, row {n}", columns) for n, row in enumerate(rows, start=1)]
