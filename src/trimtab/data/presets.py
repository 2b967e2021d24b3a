"""The data sets of concept guidance (arXiv 2402.14433, section 4). Knows their schemas, one
row -> Example function each; downloads only through ``datasets``, and only when called."""

import csv
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from trimtab.data.example import Example
from trimtab.errors import ArtifactError

Row = Mapping[str, Any]
FileFormat = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def hub_rows(
    name: str, split: str, config: str | None = None, revision: str | None = None
) -> Iterable[Row]:
    """Rows of one split of a hub dataset. Raises ArtifactError with the remedy."""
    datasets = _datasets(name)
    try:
        rows: Iterable[Row] = datasets.load_dataset(
            name, name=config, split=split, revision=revision
        )
    except Exception as error:  # network, permission, builder and split errors share no base class
        raise ArtifactError(
            f"cannot load {name!r} (config {config!r}, split {split!r}) from the hub: "
            f"{type(error).__name__}: {error} Check the name and the network, or give a file."
        ) from error
    return rows


def file_rows(path: str | Path) -> list[Row]:
    """Rows of a .json, .jsonl, .csv or .parquet file of a hub dataset. Raises ArtifactError."""
    file = Path(path).expanduser()
    kind = FileFormat.get(file.suffix.lower())
    if kind is None:
        raise ArtifactError(f"cannot read {file}: known formats are {', '.join(FileFormat)}.")
    if not file.is_file():
        raise ArtifactError(f"cannot open {file}: no such file. Check the path.")
    datasets = _datasets(file.name)
    with tempfile.TemporaryDirectory() as cache:  # nothing is left of it beside the file
        try:
            found = datasets.load_dataset(
                kind, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
            )
            return list(found)
        except Exception as error:  # see hub_rows
            cause = error.__cause__ or error
            raise ArtifactError(
                f"cannot read {file} as {kind}: {type(cause).__name__}: {cause}. Check the file."
            ) from error


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ArtifactError(
            f'reading {name!r} needs the package datasets: pip install "trimtab[data]"'
        ) from error
    return datasets


def _check_row(row: Row, keys: Iterable[str], name: str) -> None:
    if missing := [key for key in keys if key not in row]:
        raise ArtifactError(f"not a row of {name}: no {missing[0]!r} among {[*row]}.")


def read_truthfulqa(split: str | None = None, path: str | Path | None = None) -> list[Example]:
    """TruthfulQA: the best answer against the first incorrect one; ``path`` reads its CSV."""
    if path is None:
        rows = hub_rows("truthfulqa/truthful_qa", split or "validation", "generation")
    elif os.fspath(path).lower().endswith(".csv"):  # as it is published; takes no datasets
        rows = _csv_rows(Path(path).expanduser())
    else:
        rows = file_rows(path)
    return [example for row in rows for example in truthfulqa_pair(row)]


def _csv_rows(path: str | Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ArtifactError(f"cannot read the CSV {path}: {error}. Check the path.") from error


def truthfulqa_pair(row: Row) -> list[Example]:
    """One TruthfulQA row (hub or CSV) -> true and false example; none where it lacks an answer."""
    fields = {key.lower().replace(" ", "_"): value for key, value in row.items()}
    try:
        question, best, wrong = (
            fields[key] for key in ("question", "best_answer", "incorrect_answers")
        )
    except KeyError as error:
        raise ArtifactError(
            f"not a TruthfulQA row: no {error} among {[*row]}. "
            "Expected Question, Best Answer, Incorrect Answers."
        ) from None
    answers = wrong.split(";") if isinstance(wrong, str) else list(wrong)
    false = next((answer.strip() for answer in answers if answer.strip()), "")
    if not (best.strip() and false):
        return []
    return [Example(question, best.strip(), 1.0), Example(question, false, 0.0)]


def read_oasst1(
    split: str | None = None,
    path: str | Path | None = None,
    label: str = "humor",
    limit: int = 512,
    language: str = "en",
) -> list[Example]:
    """OASST1: direct replies that score highest on ``label`` against those that score lowest."""
    rows = hub_rows("OpenAssistant/oasst1", split or "train") if path is None else file_rows(path)
    return oasst1_extremes(rows, label=label, limit=limit, language=language)


def oasst1_extremes(
    rows: Iterable[Row], label: str, limit: int = 512, language: str = "en"
) -> list[Example]:
    """Messages -> ``limit`` examples at most, half from each end; ties are broken by message id."""
    _check_limit(limit)
    rows = list(rows)
    for row in rows:
        _check_row(row, ("message_id", "parent_id", "text", "lang"), "OASST1")
    messages = [row for row in rows if row["lang"] == language and not row.get("deleted")]
    roots = {row["message_id"]: row["text"] for row in messages if row["parent_id"] is None}
    replies = [row for row in messages if row["parent_id"] in roots]
    scored = [(grades[label], row) for row in replies if label in (grades := _grades(row))]
    if not scored:
        known = sorted({name for row in replies for name in _grades(row)})
        raise ArtifactError(f"no {language!r} reply has a label {label!r}. Labels: {known}.")
    if len(scored) < 2:
        raise ArtifactError(f"one {language!r} reply alone has a label {label!r}; it takes two.")
    scored.sort(key=lambda pair: (pair[0], pair[1]["message_id"]))
    half = min(limit, len(scored)) // 2
    top, bottom = scored[len(scored) - half :], scored[:half]
    return [
        Example(roots[row["parent_id"]], row["text"], present)
        for present, part in ((1.0, top), (0.0, bottom))
        for _, row in part
    ]


def _grades(row: Row) -> dict[str, float]:
    """OASST1 keeps labels as two parallel lists, or None where nobody graded the message."""
    labels = row.get("labels") or {"name": [], "value": []}
    return dict(zip(labels["name"], labels["value"], strict=True))


def read_toxic_completions(
    split: str | None = None,
    path: str | Path | None = None,
    concept: str = "compliance",
    limit: int | None = None,
) -> list[Example]:
    """Toxic-completions: ``concept`` is ``"compliance"`` or ``"appropriateness"``.

    ``limit``: so many examples at most, of prompts drawn at random, each with all of its answers.
    """
    if limit is not None:
        _check_limit(limit)
    name = "dvruette/toxic-completions"
    rows = hub_rows(name, split or "train") if path is None else file_rows(path)
    found = [e for row in rows if (e := toxic_completion(row, concept)) is not None]
    return found if limit is None else _whole_prompts(found, limit)


def _whole_prompts(examples: list[Example], limit: int) -> list[Example]:
    """The examples of some prompts, in their order; which ones depends on the prompts alone."""
    counts = Counter(example.prompt for example in examples)
    order = sorted(counts)
    random.Random(0).shuffle(order)
    taken = list(zip(order, accumulate(counts[prompt] for prompt in order), strict=True))
    kept = {prompt for prompt, total in taken if total <= limit}
    if examples and not kept:
        raise ArtifactError(
            f"limit={limit} is less than the {counts[order[0]]} answers of one prompt, which stay "
            "together; give a larger limit."
        )
    return [example for example in examples if example.prompt in kept]


def _check_limit(limit: int) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2:
        raise ArtifactError(
            f"limit is a whole number of 2 or more, for both labels, not {limit!r}."
        )


def toxic_completion(row: Row, concept: str = "compliance") -> Example | None:
    """One row -> Example; None for jailbreaks and machine annotations, which the paper drops.

    Appropriate means that it complied with a harmless prompt or refused a toxic one.
    """
    _check_row(row, ("prompt", "completion", "is_compliant", "is_toxic"), "toxic-completions")
    complied, toxic = bool(row["is_compliant"]), bool(row["is_toxic"])
    labels = {"compliance": complied, "appropriateness": complied != toxic}
    if concept not in labels:
        raise ArtifactError(
            f"toxic-completions has no concept {concept!r}. Use one of {[*labels]}."
        )
    if row.get("jailbreaking") or not row.get("human_annotation", True):
        return None
    return Example(row["prompt"], row["completion"], float(labels[concept]))


def shots_of(
    name: str, read: Callable[..., list[Example]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Which few-shot answers the paper shows, as arguments of ``few_shot``.

    True ones for TruthfulQA; of toxic-completions, whatever the concept, harmless prompts that were
    answered and toxic ones that were refused, in turn; elsewhere answers of both labels in turn.
    """
    if name == "truthfulqa":
        return {"label": 1.0}
    if name != "toxic-completions":
        return {}
    both = [read(**{**options, "concept": c}) for c in ("appropriateness", "compliance")]
    return {"among": [told for fit, told in zip(*both, strict=True) if fit.label]}


PRESETS: dict[str, Callable[..., list[Example]]] = {
    "truthfulqa": read_truthfulqa,
    "oasst1": read_oasst1,
    "toxic-completions": read_toxic_completions,
}
