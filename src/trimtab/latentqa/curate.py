"""Curate: what a reader learns from, written by a model out of one-line goals and personas.

Knows what to ask of a writer, and files; knows no activations. The chain is that of LatentQA (Pan
et al. 2024, arXiv 2412.08686): a description becomes a control (an instruction), questions and
answers about it, messages that call for it, and answers to those. The prompts and the filters are
for English. A folder holds

    items.jsonl     the items, for ``read_items`` and ``train``
    record.json     how often the writer was asked, what was kept, and what was dropped and why
    pieces.jsonl    every finished piece, so that a run that was stopped goes on
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from tqdm.auto import tqdm

from trimtab.artifact import user_path, write_file
from trimtab.errors import ArtifactError, ChatError
from trimtab.journal import Journal
from trimtab.latentqa.data import Item, Kind, write_items
from trimtab.latentqa.sieve import pair_fault, passage, question_pairs, text_fault, thoughtless
from trimtab.remote import EmptyAnswer
from trimtab.writer import Writer, clean, lines

Piece = dict[str, Any]  # {"found": what is kept, "dropped": {filter: count}, "requests": count}

_CONTROL = (
    "A chat assistant shall have this goal or persona: {description}\n"
    "Write the instruction that a user gives it for that: one or two sentences, spoken to the "
    'assistant, such as "Imagine you are ..." or "Please ...". Only the instruction, on one line.'
)
_PAIRS = (
    "A chat assistant was told: {control}\n"
    "Write {n} different questions about this assistant, each with its answer: who it is, what it "
    "wants, how it speaks, what it would say or do when a user brings something up. The questions "
    "do not give away what it was told. The answers say it in full sentences, in words of their "
    "own. Write each like this:\nQ: the question?\nA: the answer."
)
_STIMULI = (
    "A chat assistant was told: {control}\n"
    "Write {n} different short messages that a person could send to it next. They do not mention "
    "what it was told, but its answers to them would show it. One message per line, nothing else."
)


def curate(
    writer: Any,
    descriptions: str | Path | Iterable[str],
    out: str | Path,
    *,
    kinds: Sequence[Kind] = ("control", "stimulus", "system"),
    stimuli: int = 2,
    pairs: int = 4,
    model: str | None = None,
    api_key: str | None = None,
    seed: int = 0,
    temperature: float = 0.9,
    tries: int = 4,
    concurrency: int = 4,
    show_progress: bool = True,
) -> list[Item]:
    """Items with questions and answers, written by a model into the folder ``out``.

    ``writer``: an ``LM``, or the URL of an OpenAI-compatible endpoint (with ``model`` and
    ``api_key``; ``concurrency`` descriptions at a time). ``descriptions``: goals and personas, a
    line each, as texts or as a file; each is the label of its items. ``stimuli`` and ``pairs`` are
    how many of them a description gets at most; a piece of which too little is of use is asked for
    ``tries`` times, with other seeds.

    Stopped at any moment, the same call goes on where it was and ends with the same files (only the
    order of ``pieces.jsonl`` depends on which thread was first). More descriptions and kinds may be
    given then: what is there is not asked for again. Raises ChatError where nothing usable came,
    and ArtifactError where ``out`` holds another job.

    >>> url, told = "http://localhost:8000/v1", ["a pirate", "answer in rhymes"]
    >>> items = curate(url, told, "curated", model="qwen")                  # doctest: +SKIP
    """
    listed, wanted = _descriptions(descriptions), _kinds(kinds)
    counts = {"stimuli": stimuli, "pairs": pairs, "tries": tries}
    for name, value in {**counts, "concurrency": concurrency}.items():
        if value < 1:
            raise ValueError(f"{name} is 1 or more, not {value!r}")
    write, folder = Writer(writer, model, api_key, temperature), user_path(out)
    workers = concurrency if isinstance(writer, str) else 1
    job = {"job": "latentqa.curate", "writer": write.identity, "seed": seed, **counts}
    with Journal(folder / "pieces.jsonl", job) as journal, ThreadPoolExecutor(workers) as pool:
        desk = _Desk(write, journal, seed, tries, stimuli, pairs)
        each = map if workers == 1 else pool.map
        coming = each(partial(desk.pieces, kinds=wanted), listed)
        made = [*tqdm(coming, "curating", len(listed), disable=not show_progress)]
    told = dict(zip(listed, made, strict=True))
    items = [item for label, pieces in told.items() for item in _items(label, pieces, wanted)]
    record = {**job, "kinds": wanted, **_record(told, items)}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_file(folder / "record.json", text.encode())
    if not items:
        raise ChatError(
            f"nothing that the writer said about {len(listed)} descriptions was usable: "
            f"{_losses(record)} ({folder / 'record.json'}). Take a better writer, or more tries="
        )
    write_items(items, folder / "items.jsonl")
    return items


def _descriptions(given: str | Path | Iterable[str]) -> list[str]:
    if isinstance(given, str | Path):
        try:
            given = user_path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"cannot read descriptions from {str(given)!r:.80} ({error}); give a file with one "
                "a line, or a list of texts"
            ) from None
    listed = list(given)
    if wrong := [one for one in listed if not isinstance(one, str)]:
        raise ChatError(f"a description is a text such as 'a pirate', not {wrong[0]!r:.60}")
    if not (found := [text for text in dict.fromkeys(map(clean, listed)) if text]):
        raise ChatError("there are no descriptions; give goals or personas such as 'a pirate'")
    return found


def _kinds(given: Sequence[Kind]) -> list[Kind]:
    listed = list(dict.fromkeys(given))
    if not listed or not set(listed) <= set(get_args(Kind)):
        raise ValueError(f"kinds are some of {', '.join(get_args(Kind))}, not {given!r}")
    return listed


# -- asking ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Desk:
    """Where one job's pieces are made: the writer, the journal, and how much of each is wanted."""

    write: Writer
    journal: Journal
    seed: int
    tries: int
    stimuli: int
    pairs: int

    def pieces(self, description: str, kinds: Sequence[Kind]) -> dict[str, Piece]:
        """The pieces of a description, by stage; the chain ends where nothing usable came."""
        made: dict[str, Piece] = {}

        def stage(name: str, ask: Any, parse: Any, fault: Any, n: int = 1) -> list[Any]:
            key = f"{name}: {description}"
            make = partial(self._gather, key, ask, parse, fault, n)
            made[name] = self.journal.piece(key, make)
            return list(made[name]["found"])

        fits = partial(text_fault, kind="control", topic=description, asked=_CONTROL)
        if not (found := stage("control", _CONTROL.format(description=description), lines, fits)):
            return made
        told = str(found[0])
        about = partial(pair_fault, told=told, description=description)
        ask = _PAIRS.format(control=told, n=self.pairs)
        if not stage("pairs", ask, question_pairs, about, self.pairs) or {*kinds} == {"control"}:
            return made
        fits = partial(text_fault, kind="stimulus", told=told, asked=_STIMULI)
        ask = _STIMULI.format(control=told, n=self.stimuli)
        messages = stage("stimuli", ask, lines, fits, self.stimuli)
        if not messages or {*kinds} <= {"control", "system"}:
            return made
        fits = partial(text_fault, kind="passage", told=told)
        turns = [{"role": "user", "content": told}]
        replies = stage("reply", turns, passage, fits)
        if replies and "stimulus_completion" in kinds:
            turns.append({"role": "assistant", "content": replies[0]})
            for i, message in enumerate(messages):
                turn = {"role": "user", "content": message}
                stage(f"completion {i}", [*turns, turn], passage, fits)
        return made

    def _gather(
        self,
        key: str,
        ask: Any,
        parse: Callable[[str], Iterable[Any]],
        fault: Callable[[Any, list[Any]], str | None],
        n: int,
    ) -> Piece:
        """Ask until ``n`` usable ones are there, ``tries`` times at most."""
        found: list[Any] = []
        dropped: Counter[str] = Counter()
        first = int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:3])
        requests = 0
        while len(found) < n and requests < self.tries:
            made = [*parse(thoughtless(self._said(ask, first + requests)))]
            requests += 1
            dropped["unreadable"] += not made
            for one in made:
                if len(found) < n and (reason := fault(one, found)):
                    dropped[reason] += 1
                elif len(found) < n:
                    found.append(one)
        return {"found": found, "dropped": dict(+dropped), "requests": requests}

    def _said(self, ask: Any, seed: int) -> str:
        try:
            return self.write(ask, seed)
        except EmptyAnswer:  # some servers refuse so; another seed may be answered
            return ""


# -- what comes of it ------------------------------------------------------------------------------


def _items(label: str, pieces: Mapping[str, Piece], kinds: Sequence[Kind]) -> Iterator[Item]:
    """A description's items; those that lack a piece are left out."""

    def found(name: str) -> list[Any]:
        return list(pieces.get(name, {"found": []})["found"])

    qa = tuple((question, answer) for question, answer in found("pairs"))
    told, reply = (next(iter(found(name)), None) for name in ("control", "reply"))
    for kind in kinds if qa else ():
        if kind == "control":
            yield Item(label, control_user=told, qa=qa)
        for i, asked in enumerate(found("stimuli")):
            turns = {"control_user": told, "control_model": reply, "stimulus_user": asked}
            if kind == "system":
                yield Item(label, system=told, stimulus_user=asked, qa=qa)
            elif kind == "stimulus" and reply:
                yield Item(label, **turns, qa=qa)
            elif kind == "stimulus_completion":
                for said in found(f"completion {i}"):
                    yield Item(label, **turns, stimulus_model=said, qa=qa)


def _record(told: Mapping[str, dict[str, Piece]], items: Sequence[Item]) -> dict[str, Any]:
    stages: dict[str, dict[str, Any]] = {}
    for name, piece in chain.from_iterable(pieces.items() for pieces in told.values()):
        empty = {"requests": 0, "kept": 0, "dropped": Counter()}
        stage = stages.setdefault(name.split()[0], empty)
        stage["requests"] += piece["requests"]
        stage["kept"] += len(piece["found"])
        stage["dropped"].update(piece["dropped"])
    ended = {label: list(pieces)[-1] for label, pieces in told.items()}
    used = {item.label for item in items}
    return {
        "descriptions": len(told),
        "items": dict(Counter(item.kind for item in items)),
        "stages": stages,
        "nothing_from": {label: name for label, name in ended.items() if label not in used},
    }


def _losses(record: Mapping[str, Any]) -> str:
    """What was asked and dropped, in a line."""
    asked = sum(stage["requests"] for stage in record["stages"].values())
    dropped: Counter[str] = sum((s["dropped"] for s in record["stages"].values()), Counter())
    return ", ".join([f"{asked} requests", *(f"{n} {name}" for name, n in dropped.most_common())])
