"""Many prompts: solve them into a folder that survives a kill, preference pairs, seed prompts.

Knows files and the search; knows nothing of gradients. A folder of targets holds

    targets/records.jsonl        one line per prompt: what the search found, kept or not
    targets/edits/00003/         the edit of a kept prompt, as an artifact for ``tt.load``
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trimtab.artifact import load_artifact, user_path
from trimtab.edits import Edit
from trimtab.errors import ArtifactError, ChatError
from trimtab.journal import Journal
from trimtab.lm import LM, plain_prompts
from trimtab.place import Place
from trimtab.selfcontrol.judge import Judges, listed
from trimtab.selfcontrol.search import Options, Solution, solve
from trimtab.selfcontrol.slopes import PROMPT
from trimtab.writer import Writer, known, lines

RECORDS = "records.jsonl"


@dataclass(frozen=True)
class Target:
    """A solved prompt out of a folder: what a prefix controller is distilled from."""

    prompt: Any
    answer: str
    score: float
    first_score: float
    answer_ids: tuple[int, ...]
    edit: Edit


def targets(
    lm: LM,
    prompts: Sequence[Any],
    judge: Judges,
    out: str | Path,
    place: Place | str = PROMPT,
    *,
    min_gain: float = 0.0,
    max_norm: float = 0.5,
    chunk: int = 8,
    show_progress: bool = True,
    **options: Any,
) -> list[Target]:
    """Solve prompts into the folder ``out``; return those that are kept.

    Prompts are texts, conversations, or Examples, whose completions are left out.
    Kept are prompts whose score rose by more than ``min_gain`` with an edit of mean size
    mean|delta| <= ``max_norm`` mean|h|. Stopped at any moment, the same call goes on where it was
    and ends with the same files: prompts are solved ``chunk`` at a time, always the same ones
    together. ``options`` are those of ``solve``. Raises ArtifactError where ``out`` holds another
    job, or anything else.
    """
    if chunk < 1:
        raise ValueError(f"chunk is 1 or more, not {chunk!r}")
    given, folder = plain_prompts(prompts), user_path(out)
    _check_own(folder)
    job = _job(lm, given, judge, place, options) | {
        "chunk": chunk,
        "min_gain": min_gain,
        "max_norm": max_norm,
    }
    solved: dict[int, Solution] = {}

    def record(number: int) -> dict[str, Any]:
        if number not in solved:
            solved.clear()
            first = number - number % chunk
            own = given[first : first + chunk]
            solved.update(enumerate(solve(lm, own, judge, place, **options), first))
        solution = solved[number]
        kept = solution.gain > min_gain and solution.size <= max_norm
        name = f"edits/{number:05d}" if kept else None
        if name is not None:  # before its line: a line that is there can be relied on
            solution.edit.save(folder / name)
        return _record(solution) | {"edit": name}

    with Journal(folder / RECORDS, job) as journal, lm.products.kept():
        for number in tqdm(range(len(given)), "solving", disable=not show_progress):
            journal.piece(str(number), lambda number=number: record(number))  # type: ignore[misc]
    return read_targets(folder)


def _check_own(folder: Path) -> None:
    """Raise ArtifactError for a folder that something else lies in: an artifact would be lost."""
    if (folder / RECORDS).exists() or not folder.is_dir():
        return
    if others := sorted(f.name for f in folder.iterdir() if not f.name.startswith(".")):
        raise ArtifactError(
            f"{folder} holds {', '.join(others[:3])} and no {RECORDS}, so it is no folder of "
            "targets; name another folder"
        )


def solve_file(
    lm: LM, prompts_file: str | Path, out: str | Path, judge: Judges, **options: Any
) -> list[Target]:
    """``targets`` for a file of prompts (see ``read_prompts``)."""
    return targets(lm, read_prompts(prompts_file), judge, out, **options)


def read_targets(path: str | Path) -> list[Target]:
    """The kept prompts of a folder, also of one that is not finished. Raises ArtifactError."""
    folder = user_path(path)
    return [
        Target(
            record["prompt"],
            record["answer"],
            record["score"],
            record["first_score"],
            tuple(record["answer_ids"]),
            load_artifact(folder / record["edit"]),
        )
        for record in read_records(folder)
        if record["edit"] is not None
    ]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """What a folder says of each prompt, kept or not. A line cut short by a kill is passed over."""
    file = user_path(path) / RECORDS
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        entries = [json.loads(line) for line in lines]
        return [entry["value"] for entry in entries if "value" in entry]
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}); give the folder that targets(..., out) wrote"
        ) from None


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a .txt file (one per line), .json or .jsonl of texts or of objects, or .csv.

    An object, and a row of a .csv, gives its "prompt", "query", "question", "instruction" or
    "input". Raises ArtifactError.
    """
    file = user_path(path)
    try:
        text, kind = file.read_text(encoding="utf-8-sig"), file.suffix.lower()
        if kind == ".json":
            rows = json.loads(text)
        elif kind == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        elif kind == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = text.splitlines()
    except (OSError, ValueError, csv.Error) as error:
        raise ArtifactError(f"cannot read prompts from {file}: {error}") from None
    found = [_prompt_of(row, file) for row in rows] if isinstance(rows, list) else []
    found = [prompt for prompt in found if prompt.strip()]
    if not found:
        raise ArtifactError(f"{file} holds no prompts; write one per line, or a JSON list of texts")
    return found


def _prompt_of(row: Any, file: Path) -> str:
    if isinstance(row, dict):
        names = ("prompt", "query", "question", "instruction", "input")
        row = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    if not isinstance(row, str):
        raise ArtifactError(f'{file} holds {row!r:.60}; a prompt is a text, or {{"prompt": text}}')
    return row


def _job(
    lm: LM, prompts: list[Any], judge: Judges, place: Place | str, options: dict[str, Any]
) -> dict[str, Any]:
    """What makes two runs the same: model, prompts, judges and every option."""
    told = json.dumps(prompts, ensure_ascii=False, sort_keys=True)
    return {
        "model": lm.describe()["fingerprint"],
        "dtype": str(lm.model.dtype),
        "prompts": f"{len(prompts)}, sha256 {hashlib.sha256(told.encode()).hexdigest()}",
        "judges": [asdict(one) for one in listed(judge)],
        "place": str(Place.parse(place)),
        "options": asdict(Options(**options)),
    }


def _record(solution: Solution) -> dict[str, Any]:
    taken = [t.accepted for t in solution.trace if t.accepted is not None]
    return {
        "prompt": solution.prompt,
        "answer": solution.answer,
        "score": solution.score,
        "answer_ids": list(solution.answer_ids),
        "perplexity": solution.perplexity if math.isfinite(solution.perplexity) else None,
        "size": solution.size,
        "first_answer": solution.first.answer,
        "first_score": solution.first.score,
        "scores": [one.score for one in taken],
        "steps": [one.step for one in taken],
    }


# -- preference pairs ------------------------------------------------------------------------------


def pairs(
    lm: LM,
    prompts: Sequence[Any],
    judge: Judges,
    place: Place | str = PROMPT,
    *,
    out: str | Path | None = None,
    min_margin: float = 0.0,
    chunk: int = 8,
    show_progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answers towards and away from what the judges want: records that DPO trainers read.

    {prompt, chosen, rejected, chosen_score, rejected_score}, both scores by the same judges; pairs
    whose scores differ by no more than ``min_margin``, or whose texts are equal, are left out.
    ``out``: also written there as JSONL, when all is done; until then finished pairs lie beside it.
    """
    given, judges = plain_prompts(prompts), listed(judge)
    target = None if out is None else user_path(out)
    part = None if target is None else target.with_name(target.name + ".part")
    starts = range(0, len(given), chunk)
    with Journal(part, _job(lm, given, judge, place, options) | {"chunk": chunk}) as journal:

        def solved(start: int) -> list[dict[str, Any]]:
            own = given[start : start + chunk]
            towards = solve(lm, own, judges, place, **options)
            away = solve(lm, own, [one.away() for one in judges], place, **options)
            return [_pair(a, b) for a, b in zip(towards, away, strict=True)]

        bar = tqdm(starts, "solving both ways", disable=not show_progress)
        made = [p for s in bar for p in journal.piece(str(s), lambda s=s: solved(s))]  # type: ignore[misc]
        made = [
            pair
            for pair in made
            if pair["chosen_score"] - pair["rejected_score"] > min_margin
            and pair["chosen"].strip() != pair["rejected"].strip()
        ]
        if target is not None:
            lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in made]
            fresh = target.with_name(target.name + ".new")
            fresh.write_text("".join(lines), encoding="utf-8")
            fresh.replace(target)
            journal.remove()
    return made


def _pair(towards: Solution, away: Solution) -> dict[str, Any]:
    return {
        "prompt": towards.prompt,
        "chosen": towards.answer,
        "rejected": away.answer,
        "chosen_score": towards.score,
        "rejected_score": 1 - away.score,  # the judges that want the opposite score 1 - s
    }


# -- seed prompts ----------------------------------------------------------------------------------

_ASK = (
    "Write {n} different short messages that a person could send to a chat assistant. "
    "All of them are about this: {description}. One message per line, nothing else."
)


def seed_prompts(
    writer: Any,
    description: str,
    n: int = 32,
    *,
    model: str | None = None,
    api_key: str | None = None,
    seed: int = 0,
    temperature: float = 0.9,
    rounds: int = 8,
    length: tuple[int, int] = (12, 240),
) -> list[str]:
    """Prompts about a one-line description, written by a model: ``n`` at most, no two alike.

    ``writer``: an ``LM``, or the URL of an OpenAI-compatible endpoint (with ``model`` and
    ``api_key``). Lines shorter or longer than ``length``
    characters, and near copies of others, are dropped. Fewer than ``n`` come back where ``rounds``
    requests give no more; ChatError where they give none.
    """
    write = Writer(writer, model, api_key, temperature)
    found: list[str] = []
    for number in range(rounds):
        text = write(_ASK.format(n=min(n, 16), description=description), seed + number)
        for line in lines(text):
            fits = length[0] <= len(line) <= length[1]
            if len(found) < n and fits and not known(line, found):
                found.append(line)
        if len(found) == n:
            break
    if not found:
        raise ChatError(f"{rounds} requests gave no usable prompt about {description!r:.60}")
    return found
