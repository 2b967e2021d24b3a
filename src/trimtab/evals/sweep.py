"""Sweeps: an edit at many scales, beside its baselines, over many prompts in large batches.

Knows the model, edits and scorers; knows no method and draws nothing. An *arm* is one line of the
table: no edit, the edit at one scale, a random direction of the same size, the sign flipped, or
asking for it in the prompt.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trimtab.adapter import Adapter
from trimtab.artifact import user_path, write_file
from trimtab.chat import Batch
from trimtab.edits import Add, Edit, Sum
from trimtab.errors import ArtifactError, ChatError
from trimtab.evals.identity import scorer_identity, weights_identity
from trimtab.evals.pnes import Pnes, pnes
from trimtab.evals.scorers import Scorer, prompt_text, score, scorer_name
from trimtab.journal import Journal, as_json, difference
from trimtab.lm import LM, listed_prompts, plain_prompts
from trimtab.merge import Edits, fingerprint

BASELINES = ("random", "flipped", "prompt")
MAX_RATIO = 1.25  # of perplexities: what counts as text that is still whole


@dataclass(frozen=True)
class Arm:
    """One line of a sweep: P prompts answered under one edit, R reference answers scored under it.

    ``effects`` [P] by the judge; ``perplexities`` [R] of the references under the edit;
    ``fluencies`` [P]: the perplexity of each answer for the model *without* the edit (None for an
    empty answer); ``repetitions`` [P]: the share of three-word runs that were there before.
    """

    name: str  # "none", "edit", "random", "flipped" or "prompt"
    scale: float | None
    prompts: list[str]
    answers: list[str]
    effects: list[float]
    perplexities: list[float]
    fluencies: list[float | None]
    repetitions: list[float]

    @property
    def effect(self) -> float:
        """The judge's mean score."""
        return fmean(self.effects)

    @property
    def perplexity(self) -> float:
        """The mean perplexity of the references."""
        return fmean(self.perplexities)

    @property
    def fluency(self) -> float:
        """The mean perplexity of the answers without the edit; NaN where all are empty."""
        found = [f for f in self.fluencies if f is not None]
        return fmean(found) if found else math.nan

    @property
    def repetition(self) -> float:
        """The mean share of repeated three-word runs."""
        return fmean(self.repetitions)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: its arms, and what follows from them."""

    arms: list[Arm]
    title: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> Arm:
        """The model without an edit."""
        return next(arm for arm in self.arms if arm.name == "none")

    def of(self, name: str) -> list[Arm]:
        """The arms of a name, by rising scale; "edit" and "random" include no edit as scale 0."""
        own = [arm for arm in self.arms if arm.name == name]
        if name == "edit" or (name == "random" and own):
            own.append(self.baseline)
        return sorted(own, key=lambda arm: arm.scale or 0.0)

    def ratio(self, arm: Arm) -> float:
        """The arm's perplexity, in those of no edit."""
        return arm.perplexity / self.baseline.perplexity

    def best(self, name: str = "edit", max_ratio: float = MAX_RATIO) -> Arm:
        """The arm with the largest effect among those whose perplexity ratio is bounded."""
        fit = [arm for arm in self.of(name) if self.ratio(arm) <= max_ratio]
        if not fit:
            raise ValueError(f"no arm {name!r} has a perplexity ratio of at most {max_ratio}")
        return max(fit, key=lambda arm: arm.effect)

    @cached_property
    def pnes(self) -> Pnes:
        """The edit's PNES, with its interval over prompts."""
        return self.pnes_of("edit")

    def pnes_of(self, name: str) -> Pnes:
        """The PNES of the arms of a name ("edit" or "random")."""
        arms = self.of(name)
        return pnes(
            [arm.scale or 0.0 for arm in arms],
            [arm.effects for arm in arms],
            [arm.perplexities for arm in arms],
        )

    def table(self) -> list[dict[str, Any]]:
        """One line per arm: effect with its interval, perplexity and its ratio, fluency."""
        from trimtab.evals import report

        return report.table(self)

    def plot(self, path: str | Path) -> None:
        """Draw effect, perplexity and the PNES fit by scale (.png, .svg or .pdf)."""
        from trimtab.evals import report

        report.plot(self, path)

    def csv(self, path: str | Path) -> None:
        """Write the table."""
        from trimtab.evals import report

        report.write_csv(self, path)

    def page(self, path: str | Path) -> None:
        """Write one HTML file with the table, the plot and the completions side by side."""
        from trimtab.evals import report

        report.write_page(self, path)

    def save(self, path: str | Path) -> None:
        """Write everything as one JSON file, whole or not at all."""
        made: dict[str, Any] = {"title": self.title, "facts": dict(self.facts)}
        made["arms"] = [asdict(a) for a in self.arms]
        text = json.dumps(made, ensure_ascii=False, default=str)
        write_file(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Read what ``save`` wrote. Raises ArtifactError for another file."""
        try:
            found = json.loads(user_path(path).read_text(encoding="utf-8"))
            arms = [Arm(**arm) for arm in found["arms"]]
            return cls(arms, found["title"], found["facts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is not a saved sweep ({error})") from None


def sweep(
    lm: LM,
    make: Callable[[float], Edit],
    scales: Sequence[float],
    prompts: Sequence[Any],
    scorer: Scorer,
    reference: Sequence[Any] | None = None,
    *,
    ask: str | Callable[[Any], Any] | None = None,
    baselines: Sequence[str] = BASELINES,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    title: str = "",
    show_progress: bool = True,
) -> Sweep:
    """Answer ``prompts`` under ``make(scale)`` for each scale, and judge effect and perplexity.

    ``reference``: answers to the prompts, or (prompt, answer) pairs, or Examples, whose perplexity
    under each edit says how much language it costs; by default the model's own answers without an
    edit. ``ask``: what the prompt baseline adds to the last user turn ("Answer happily."), or a
    function of a prompt. ``baselines``: of "random" (a direction of the same size, another one for
    each prompt), "flipped" (the edit at -scale, where that is not swept anyway) and "prompt", which
    is left out, with a warning, where there is no ``ask``.

    Decoding is greedy; rows with different edits share batches, each judged as soon as it is
    answered. With ``out`` (a folder) every finished batch is kept, and the same call after a crash
    goes on, also with another judge; the result is ``out/sweep.json``. A scorer is known by what it
    is made of: its code, all that it holds and the globals that it names, or a text that it has as
    attribute ``identity``. Raises ValueError for scales, baselines, prompts or references that do
    not fit.
    """
    values, asked = _checked(scales, baselines), prompts_of(prompts)
    check_judging(scorer, batch_size)
    arms = _arms(make, values, baselines, ask, seed)
    plan = _Plan(lm, asked, scorer, arms, max_new_tokens)
    pairs = None if reference is None else references(reference, plan.prompts)
    facts = {"scales": values, "batch_size": batch_size, "seed": seed, "title": title}
    facts |= {"judge": scorer_name(scorer), "ask": ask if isinstance(ask, str) else None}
    job = _job(plan, pairs, facts)
    folder = None if out is None else user_path(out)
    job = job if folder is None else as_json(job)
    if folder is not None and (done := folder / "sweep.json").exists():
        found = Sweep.load(done)
        if found.facts == job:
            (folder / "progress.jsonl").unlink(missing_ok=True)  # a crash may have left it
            return found
        raise ArtifactError(
            f"{done} is the result of another sweep ({difference(found.facts, job)}); name another "
            "folder to write to"
        )
    progress = None if folder is None else folder / "progress.jsonl"
    # Answers are good for any judge: what is kept of them does not hang on it.
    begun = {key: value for key, value in job.items() if key not in ("scorer", "judge")}
    with Journal(progress, begun) as journal, lm.products.kept():
        pieces = Pieces(journal, batch_size, show_progress)
        made = Sweep(plan.run(pieces, pairs, f"judging by {job['scorer']}"), title, job)
        if folder is not None:
            made.save(folder / "sweep.json")
            journal.remove()
    return made


def random_like(edit: Edit, seed: int) -> Edit:
    """The edit with each direction replaced by a random one of the same length and kind.

    The direction depends on ``seed`` and the layer alone, so that edits of other sizes get the same
    one. An ``Adapter`` keeps what it looks at, and what it adds there has random directions. Raises
    ValueError for edits of another kind.
    """
    if isinstance(edit, Sum):
        return Sum.of(*(random_like(part, seed) for part in edit.parts()))
    if isinstance(edit, Adapter):
        return _random_adapter(edit, seed)
    if not isinstance(edit, Add):
        raise ValueError(
            f"there is no random direction for {type(edit).__name__}; leave 'random' out of "
            "baselines"
        )
    layers = edit.delta.shape[0]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(layers, edit.delta.shape[-1], generator=generator).to(edit.delta)
    unit = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(edit.delta, dim=-1, keepdim=True)
    shape = (layers, *(1,) * (edit.delta.dim() - 2), -1)
    return replace(edit, delta=unit.view(shape) * length)


def _random_adapter(edit: Adapter, seed: int) -> Adapter:
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, low in edit.modules.items():
        noise = torch.randn(low.up.shape, generator=generator).to(low.up)
        length = torch.linalg.vector_norm(low.up, dim=0, keepdim=True)
        unit = noise / torch.linalg.vector_norm(noise, dim=0, keepdim=True)
        made[name] = replace(low, up=unit * length)
    return replace(edit, modules=made, strength=abs(edit.strength))


def perplexity(lm: LM, texts: Sequence[Any], edits: Edits = None, *, batch_size: int = 32) -> float:
    """The mean over texts of exp(cross entropy per token), under edits.

    ``texts``: plain texts (every token after the first counts), or (prompt, answer) pairs or
    Examples (the answer's tokens count).
    """
    return float(perplexities(lm, texts, edits, batch_size=batch_size).mean())


def perplexities(
    lm: LM, texts: Sequence[Any], edits: Edits = None, *, batch_size: int = 32
) -> Tensor:
    """The perplexity of each text, [B]; see ``perplexity``."""
    listed, _ = listed_prompts(texts)
    if all(isinstance(text, str) for text in listed):
        batch = lm.batch(listed, raw=True)
        batch = Batch(batch.ids, batch.mask, torch.ones_like(batch.prompt_len))
        return torch.exp(-lm.score(batch, edits=edits, batch_size=batch_size)).double()
    pairs = references(listed, listed)
    prompts, answers = [list(x) for x in zip(*pairs, strict=True)]
    return torch.exp(-lm.score(prompts, answers, edits, batch_size=batch_size)).double()


def fluencies(lm: LM, prompts: Sequence[Any], answers: Sequence[str]) -> list[float | None]:
    """The perplexity of answers themselves to the plain model; None for one that says nothing."""
    found: list[float | None] = [None] * len(answers)
    full = [i for i, answer in enumerate(answers) if answer.strip()]
    if not full:
        return found
    try:
        logs = lm.score([prompts[i] for i in full], [answers[i] for i in full]).tolist()
    except ChatError:  # a text of broken bytes may have more tokens than were generated
        if len(full) == 1:
            return found
        return [fluencies(lm, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    for i, log in zip(full, logs, strict=True):
        found[i] = exponential(-log)
    return found


def repetition(text: str) -> float:
    """The share of three-word runs that were there before: 0 for text without a repeat."""
    words = text.lower().split()
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class _Line:
    """An arm before it is run: its edit for the prompt of a number, and the prompts as asked."""

    name: str
    scale: float | None
    edit: Callable[[int], Edit | None]
    ask: Callable[[Any], Any] = lambda prompt: prompt


Row = tuple[int, int]  # number of the arm, number of the prompt or reference


@dataclass(frozen=True)
class Pieces:
    """Rows worked off in batches, each kept in the journal as soon as it is finished."""

    journal: Journal
    batch_size: int
    show_progress: bool

    def work(
        self, stage: str, rows: list[Row], do: Callable[[list[Row]], list[Any]]
    ) -> dict[Row, Any]:
        """What ``do`` gives for each row."""
        found: dict[Row, Any] = {}
        for start, group in self.groups(stage, rows):
            made = self.journal.piece(f"{stage}/{start}", partial(do, group))
            found |= dict(zip(group, made, strict=True))
        return found

    def groups(self, stage: str, rows: list[Row]) -> Iterator[tuple[int, list[Row]]]:
        """The batches, each with the number of its first row."""
        with tqdm(total=len(rows), desc=stage, disable=not self.show_progress) as bar:
            for start in range(0, len(rows), self.batch_size):
                yield start, (group := rows[start : start + self.batch_size])
                bar.update(len(group))


@dataclass(frozen=True)
class _Plan:
    """What is to be run; rows are (arm, prompt) pairs, in an order that depends on nothing else."""

    lm: LM
    prompts: list[Any]
    scorer: Scorer
    lines: list[_Line]
    max_new_tokens: int

    def run(self, pieces: Pieces, pairs: list[tuple[Any, str]] | None, judging: str) -> list[Arm]:
        """All arms, finished; ``pairs`` are the references (None for the model's own answers)."""
        texts, effects = self._answers(pieces, judging)
        pairs = own_references(self.prompts, texts[0]) if pairs is None else pairs
        costs = self._perplexities(pieces, pairs)
        fluencies = self._fluencies(pieces, texts)
        shown = [prompt_text(prompt) for prompt in self.prompts]
        return [
            Arm(
                line.name,
                line.scale,
                shown,
                texts[i],
                effects[i],
                costs[i],
                fluencies[i],
                [repetition(text) for text in texts[i]],
            )
            for i, line in enumerate(self.lines)
        ]

    def _rows(self, items: int) -> list[Row]:
        return [(i, k) for i in range(len(self.lines)) for k in range(items)]

    def _answers(self, pieces: Pieces, judging: str) -> tuple[list[list[str]], list[list[float]]]:
        """Answers and their effects; a judge that fails does so after the first batch."""
        rows = self._rows(len(self.prompts))
        asked = {(i, p): self.lines[i].ask(self.prompts[p]) for i, p in rows}

        def answer(group: list[Row]) -> list[str]:
            made: list[str] = self.lm.generate(
                [asked[row] for row in group],
                [self.lines[i].edit(p) for i, p in group],
                self.max_new_tokens,
                batch_size=len(group),
            )
            return made

        def judge(group: list[Row], said: list[str]) -> list[float]:
            return list(score(self.scorer, [self.prompts[p] for _, p in group], said).tolist())

        rows.sort(key=lambda row: len(prompt_text(asked[row])))  # batches of similar length
        texts: dict[Row, str] = {}
        effects: dict[Row, float] = {}
        for start, group in pieces.groups("answers", rows):
            said = pieces.journal.piece(f"answers/{start}", partial(answer, group))
            found = pieces.journal.piece(f"{judging}/{start}", partial(judge, group, said))
            texts |= zip(group, said, strict=True)
            effects |= zip(group, found, strict=True)
        return self._by_arm(texts), self._by_arm(effects)

    def _perplexities(self, pieces: Pieces, pairs: list[tuple[Any, str]]) -> list[list[float]]:
        def cost(group: list[Row]) -> list[float]:
            logs = self.lm.score(
                [self.lines[i].ask(pairs[r][0]) for i, r in group],
                [pairs[r][1] for _, r in group],
                [self.lines[i].edit(r) for i, r in group],
            )
            return [exponential(-v) for v in logs.tolist()]

        return self._by_arm(pieces.work("perplexity", self._rows(len(pairs)), cost))

    def _fluencies(self, pieces: Pieces, texts: list[list[str]]) -> list[list[float | None]]:
        rows = self._rows(len(self.prompts))
        full = [(i, p) for i, p in rows if texts[i][p].strip()]

        def cost(group: list[Row]) -> list[float | None]:
            asked, said = [self.prompts[p] for _, p in group], [texts[i][p] for i, p in group]
            return fluencies(self.lm, asked, said)

        empty: dict[Row, float | None] = dict.fromkeys(rows)
        return self._by_arm(empty | pieces.work("fluency", full, cost))

    def _by_arm(self, found: Mapping[Row, Any]) -> list[list[Any]]:
        """Results row by row as one list per arm, in the order of its items."""
        arms: list[list[Any]] = [[] for _ in self.lines]
        for row in sorted(found):
            arms[row[0]].append(found[row])
        return arms


def prompts_of(prompts: Any) -> list[Any]:
    """Prompts as a list of texts and conversations, whatever holds them."""
    listed = plain_prompts(prompts)
    if not listed:
        raise ValueError("there are no prompts to answer; give at least one")
    for number, prompt in enumerate(listed):
        turns = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(turns, list | tuple) or not all(isinstance(t, str | dict) for t in turns):
            raise ValueError(
                f"prompt {number} is {prompt!r:.60}; a prompt is a text or a list of messages"
            )
    return listed


def check_judging(scorer: Any, batch_size: int) -> None:
    """Raises ValueError for a scorer that cannot be called, and for batches without a row."""
    if not callable(scorer):
        raise ValueError(
            f"a scorer is called with prompts and answers, and {scorer!r:.60} cannot be; give one "
            "of tt.evals, or a function of both"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, not {batch_size!r}")


def model_identity(lm: LM) -> dict[str, Any]:
    """What a model says of itself, and a hash of some of all its weights."""
    weights = weights_identity(lm.model)
    return {**lm.describe(), "dtype": str(lm.model.dtype), "weights": weights}


def own_references(prompts: Sequence[Any], answers: Sequence[str]) -> list[tuple[Any, str]]:
    """The model's own answers without an edit, as references."""
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.strip()]
    if not pairs:
        raise ValueError(
            "without an edit the model answers every prompt with nothing; give reference="
        )
    return pairs


def exponential(value: float) -> float:
    """exp, but finite: broken text, and a model that gives no number at all, are so in JSON."""
    return math.exp(700.0 if math.isnan(value) else min(value, 700.0))


def _checked(scales: Sequence[float], baselines: Sequence[str]) -> list[float]:
    values = sorted({float(s) for s in scales})
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"scales are finite numbers, at least one, not {list(scales)!r}")
    if unknown := [b for b in baselines if b not in BASELINES]:
        raise ValueError(f"no baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")
    return values


def _arms(
    make: Callable[[float], Edit],
    scales: list[float],
    baselines: Sequence[str],
    ask: str | Callable[[Any], Any] | None,
    seed: int,
) -> list[_Line]:
    edits = {scale: _made(make, scale) for scale in scales if scale}
    lines = [_Line("none", 0.0, _always(None))]
    lines += [_Line("edit", scale, _always(edit)) for scale, edit in edits.items()]
    if "flipped" in baselines:
        missing = [-scale for scale in edits if -scale not in edits]
        lines += [_Line("flipped", scale, _always(_made(make, scale))) for scale in missing]
    if "random" in baselines:
        lines += [_Line("random", s, _randoms(edit, s, seed)) for s, edit in edits.items()]
    if "prompt" in baselines and ask is None:
        warnings.warn(
            'whether just asking does as well is not measured: give ask="Answer happily.", or '
            "leave 'prompt' out of baselines",
            stacklevel=3,
        )
    elif "prompt" in baselines and ask is not None:
        lines.append(_Line("prompt", None, _always(None), asking(ask)))
    return lines


def _always(edit: Edit | None) -> Callable[[int], Edit | None]:
    return lambda _: edit


def _made(make: Callable[[float], Edit], scale: float) -> Edit:
    edit = make(scale)
    if not isinstance(edit, Edit):
        raise ValueError(
            f"make({scale}) gave {type(edit).__name__}, not an Edit; for a probe give "
            "lambda s: probe.edit(scale=s)"
        )
    return edit


def _randoms(edit: Edit, scale: float, seed: int) -> Callable[[int], Edit]:
    sign = math.copysign(1.0, scale)  # so that -scale steers against scale, as the edit does
    return lambda number: sign * random_like(edit, 1000 * seed + number)


def asking(ask: str | Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What turns a prompt into one that asks for the concept, at the end of its last user turn."""
    if not isinstance(ask, str):
        return ask

    def asked(prompt: Any) -> Any:
        if isinstance(prompt, str):
            return f"{prompt} {ask}"
        users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        if not users:
            raise ChatError(
                f"ask= goes to the end of the last user turn, and {prompt!r:.60} has none; leave "
                "'prompt' out of baselines"
            )
        last = users[-1]
        told = {**prompt[last], "content": f"{prompt[last]['content']} {ask}"}
        return [*prompt[:last], told, *prompt[last + 1 :]]

    return asked


def references(reference: Sequence[Any], prompts: list[Any]) -> list[tuple[Any, str]]:
    """Reference answers as (prompt, answer) pairs; see ``sweep``."""
    listed = list(reference)
    if not listed:
        raise ValueError("reference is empty; give answers, or None for the model's own")
    if all(isinstance(answer, str) for answer in listed):
        if len(listed) != len(prompts):
            raise ValueError(
                f"{len(listed)} reference answers for {len(prompts)} prompts; give one for each, "
                "or (prompt, answer) pairs"
            )
        pairs = list(zip(prompts, listed, strict=True))
    else:
        pairs = [_pair(item) for item in listed]
    if empty := [i for i, (_, answer) in enumerate(pairs) if not answer.strip()]:
        raise ValueError(f"the references {empty[:8]} are empty answers; leave them out")
    return pairs


def _pair(item: Any) -> tuple[Any, str]:
    if hasattr(item, "completion"):
        return (item.messages if item.history else item.prompt), item.completion
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[1], str):
        return item[0], item[1]
    raise ValueError(f"a reference is an answer or a (prompt, answer) pair, not {item!r:.60}")


def _job(
    plan: _Plan, pairs: list[tuple[Any, str]] | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes a sweep this one: a stopped one goes on only where all of it is the same."""
    own = [line.edit(0) for line in plan.lines if line.name in ("edit", "flipped")]
    texts = [plan.prompts, pairs, [line.ask(p) for line in plan.lines for p in plan.prompts]]
    return {
        **facts,
        "model": model_identity(plan.lm),
        "scorer": scorer_identity(plan.scorer),
        "arms": [[line.name, line.scale] for line in plan.lines],
        "edits": fingerprint(own) if own else None,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "max_new_tokens": plan.max_new_tokens,
    }
