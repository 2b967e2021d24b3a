"""The search: answers, gradients and step sizes in turn, many prompts at once. Knows no files.

Each iteration takes the gradient at the answer so far, tries several step sizes as rows of one
batch, reads all candidates without an edit, and keeps what a judge prefers, as long as the text
stays as fluent as the first answer. Letters: L layers, N chosen prompt tokens, D width.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trimtab import chat
from trimtab.artifact import Meta
from trimtab.chat import Batch, Encoded
from trimtab.decode import Sampling, columns
from trimtab.edits import Add
from trimtab.errors import ChatError
from trimtab.lm import LM, listed_prompts
from trimtab.place import Place
from trimtab.selfcontrol.judge import Judge, Judges, encoded, groups, listed, readings
from trimtab.selfcontrol.slopes import PROMPT, Objective, count, places_of, shaped, slopes

Accept = Literal["first", "best"]
Direction = Literal["gradient", "random"]


@dataclass(frozen=True)
class Try:
    """One candidate: how far it stepped, what came of it, and whether it was taken.

    ``perplexity`` is that of the answer without an edit, ``repetition`` the share of its token
    triples that were there before; ``fluent``: both lie within their bounds.
    """

    step: float
    branch: int
    answer: str
    score: float
    perplexity: float
    repetition: float
    fluent: bool = True
    accepted: bool = False


@dataclass(frozen=True)
class Iteration:
    """What one iteration tried; iteration 0 is the first answer, with a step of 0.

    ``gradient_norms``: the largest |g| of a token, by layer of the place.
    """

    number: int
    tries: tuple[Try, ...]
    gradient_norms: tuple[float, ...] = ()

    @property
    def accepted(self) -> Try | None:
        """The candidate that was taken."""
        return next((one for one in self.tries if one.accepted), None)


@dataclass(frozen=True)
class Solution:
    """The best accepted answer to one prompt, and the edit that makes the model give it.

    ``edit`` is an ``Add`` at the tokens of this prompt, [L, 1, N, D]; of a prompt for which no step
    was accepted it is zero. ``score`` and ``perplexity`` are the answer's, read without the edit.
    ``size``: the mean length of the edit's vectors as a share of that of the activations there.
    """

    prompt: Any
    answer: str
    score: float
    edit: Add
    trace: tuple[Iteration, ...]
    perplexity: float = math.nan
    answer_ids: tuple[int, ...] = field(default=(), repr=False)
    size: float = 0.0

    @property
    def first(self) -> Try:
        """The answer that the search began with."""
        found = self.trace[0].accepted
        assert found is not None
        return found

    @property
    def gain(self) -> float:
        """How much the score rose."""
        return self.score - self.first.score


@dataclass(frozen=True)
class Options:
    """How a search goes.

    ``steps`` iterations of ``search`` tries each: ``step_size``, twice that, four times ... A size
    is relative: the token with the steepest slope moves by that many *percent* of its layer's usual
    activation length (the median of |h| over the prompt), other tokens and layers in proportion to
    their slopes g |h|, with lengths above ``clip`` cut to it (1 is the steepest). With ``absolute``
    a step is size times g, each |g| above ``clip`` cut to it: the paper's form, which moves small
    models not at all. ``pgd``: every token moves by the full size along g / |g|, and no coordinate
    of the edit leaves ±pgd. ``top_k``: only so many layer-token positions move.

    ``accept``: the "best" of the tries, or the "first" whose score is above the score so far by
    more than ``threshold`` (the paper's rule; with ``at_once`` = 2 the later tries are generated
    only where the first two fail). All tries are one batch, so the best costs no more.
    ``branches``: answers per try, from as many likeliest first tokens; the best is kept. Texts that
    break are never accepted: those with more than ``max_perplexity_ratio`` times the perplexity of
    the first answer, or with a share of repeated token triples above ``max_repetition``.
    ``direction`` "random" is the baseline: random vectors as long as the gradient at each position.
    ``objective`` and ``label_smoothing``: see ``gradient``.
    """

    steps: int = 3
    step_size: float = 0.5
    search: int = 5
    branches: int = 1
    clip: float | None = 1.0
    seed: int = 0
    accept: Accept = "best"
    threshold: float = 0.0
    at_once: int | None = None
    objective: Objective = "score"
    label_smoothing: float = 0.0
    top_k: int | None = None
    pgd: float | None = None
    direction: Direction = "gradient"
    absolute: bool = False
    max_perplexity_ratio: float = 1.5
    max_repetition: float = 0.2
    max_new_tokens: int = 64
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("search", "branches", "max_new_tokens", "batch_size", "at_once", "top_k"):
            if (value := getattr(self, name)) is not None and (value < 1 or value % 1):
                raise ValueError(f"{name} is a whole number of 1 or more, not {value!r}")
        if not self.max_perplexity_ratio > 0:
            raise ValueError(
                f"max_perplexity_ratio is above 0, not {self.max_perplexity_ratio!r}; math.inf "
                "bounds nothing"
            )
        for name, known in (("accept", ("first", "best")), ("direction", ("gradient", "random"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {' or '.join(map(repr, known))}, not {getattr(self, name)!r:.60}"
                )
        if not self.step_size > 0:
            raise ValueError(f"step_size is above 0, not {self.step_size!r}; steps go downhill")

    def sizes(self) -> list[list[float]]:
        """The step sizes in the order in which they are tried, those of one batch together."""
        sizes = [self.step_size * 2**i for i in range(self.search)]
        first = self.at_once or self.search
        return [part for part in (sizes[:first], sizes[first:]) if part]


@dataclass
class _State:
    """One prompt on its way."""

    prompt: Any
    ids: list[int]
    place: Place
    delta: Tensor  # [L, N, D]
    size: float = 0.0
    answer: list[int] = field(default_factory=list)
    score: float = -math.inf
    perplexity: float = math.inf
    bound: tuple[float, float] = (math.inf, math.inf)  # of perplexity and of repetition
    trace: list[Iteration] = field(default_factory=list)
    alive: bool = True

    def row(self, answer: Sequence[int] = ()) -> Encoded:
        return Encoded([*self.ids, *answer], len(self.ids))


def solve(
    lm: LM,
    prompt: Any,
    judge: Judges,
    place: Place | str = PROMPT,
    *,
    initial_response: Any = None,
    show_progress: bool = False,
    **options: Any,
) -> Any:
    """Steer a model by its own judgement: one Solution for a prompt, a list of them for a list.

    Iterative control of arXiv 2406.02721: each iteration takes the gradient of the judges' score
    with respect to the prompt's activations at ``place``, with the edit so far in force, tries
    several step sizes against it, and keeps the answer that scores best *without* the edit. A
    prompt for which no step is accepted stops. ``initial_response`` (text or ids, one per prompt):
    begin with it instead of the model's own answer. ``options`` are the fields of ``Options``.
    Deterministic for a seed. Raises ChatError, PlaceError, and ValueError for options.

    >>> solve(lm, "You lose your keys. How do you feel?", judge, steps=3)       # doctest: +SKIP
    """
    chosen, judges = Options(**options), listed(judge)
    given: Any = prompt
    single = False
    if not isinstance(prompt, Batch):
        given, single = listed_prompts(prompt)
    rows = encoded(lm, given)
    if any(row.prompt_len < len(row.ids) for row in rows) and initial_response is None:
        raise ChatError(
            "a prompt ends with an answer; end it with a user turn, and give what the model has "
            "said as initial_response="
        )
    if initial_response is not None:
        texts = [initial_response] if single else initial_response
        starts = [row.ids[row.prompt_len :] for row in encoded(lm, given, texts)]
    kept = list(given) if not isinstance(given, Batch) else [None] * len(rows)
    states = []
    for own, row, one in zip(kept, rows, places_of(lm, place, rows), strict=True):
        shape = len(one.layer_indices(lm.n_layers)), count(one, row.prompt_len), lm.width
        ids = row.ids[: row.prompt_len]
        states.append(_State(own, ids, one, torch.zeros(shape, device=lm.device)))
    search = _Search(lm, judges, chosen)
    bar = tqdm(range(1, chosen.steps + 1), "solving", disable=not show_progress)
    with lm.products.kept():
        search.begin(states, starts if initial_response is not None else None)
        for number in bar:
            live = [state for state in states if state.alive]
            if not live:
                break
            bar.set_postfix(live=len(live))
            search.iterate(live, number)
    made = [search.solution(state) for state in states]
    return made[0] if single else made


class _Search:
    """The parts of one iteration, for any number of prompts at once."""

    def __init__(self, lm: LM, judges: list[Judge], options: Options) -> None:
        self.lm, self.judges, self.options, self.own = lm, judges, options, True
        self.tail = max(len(judge.tail(lm).ids) for judge in judges)  # also checks their words

    def begin(self, states: list[_State], answers: list[list[int]] | None) -> None:
        """The first answers: given, or the best branch without an edit.

        Where there is nothing to choose, the first gradient's pass reads them.
        """
        self.own = answers is None
        if answers is None:
            found = self._branches([(state, None) for state in states])
        else:
            found = [[answer] for answer in answers]
        if all(len(own) == 1 for own in found) and self.options.steps:
            for state, own in zip(states, found, strict=True):
                state.answer = own[0]
            return
        tries = self._read(states, found, [0.0] * len(states))
        for state, answers_, own_tries in zip(states, found, tries, strict=True):
            self._open(state, answers_, own_tries)

    def _open(self, state: _State, answers: list[list[int]], tries: list[Try]) -> None:
        """Begin with the best of the first answers, which also sets the bounds."""
        best = max(range(len(tries)), key=lambda i: tries[i].score)
        first = tries[best]
        state.bound = (
            self._usual(state, tries, self.own) * self.options.max_perplexity_ratio,
            max(min(one.repetition for one in tries), self.options.max_repetition),
        )
        state.answer, state.score = answers[best], first.score
        state.perplexity = first.perplexity
        tries[best] = replace(first, accepted=True)
        state.trace.append(Iteration(0, tuple(tries)))

    def _usual(self, state: _State, tries: list[Try], own: bool) -> float:
        """The perplexity of what the model answers by itself: of its likeliest first answer.

        An answer that was given, or is empty, says nothing of that: then the model writes one.
        """
        found = [one.perplexity for one in tries if math.isfinite(one.perplexity)]
        if own and found:
            return min(found)
        batch = chat.pad([state.row()], chat.pad_id(self.lm.tokenizer))
        tokens = self.options.max_new_tokens
        written = complete(self.lm, batch, None, 2, tokens, self.tail)[0]  # 2: never empty
        made = readings(self.lm, self.judges, [state.row(written)])
        return float(made.perplexity[0])

    def iterate(self, states: list[_State], number: int) -> None:
        """One iteration for prompts that are still going; those without an accepted step stop."""
        downhill, norms = self._directions(states, number)
        tried: list[list[Try]] = [[] for _ in states]
        for state in states:
            state.alive = False
        for sizes in self.options.sizes():
            todo = [i for i, state in enumerate(states) if not state.alive]
            items = [(i, size) for i in todo for size in sizes]
            found = self._branches([(states[i], size * downhill[i]) for i, size in items])
            read = self._read([states[i] for i, _ in items], found, [size for _, size in items])
            for k, i in enumerate(todo):
                own = slice(k * len(sizes), (k + 1) * len(sizes))
                tried[i] += self._decide(states[i], downhill[i], read[own], found[own])
        for state, tries, norm in zip(states, tried, norms, strict=True):
            state.trace.append(Iteration(number, tuple(tries), norm))

    def _decide(
        self,
        state: _State,
        downhill: Tensor,
        tries: list[list[Try]],
        answers: list[list[list[int]]],
    ) -> list[Try]:
        """Take the first step whose best branch beats the score so far, or the best of all."""
        flat = [
            (one, ids)
            for own, texts in zip(tries, answers, strict=True)
            for one, ids in zip(own, texts, strict=True)
        ]
        best = [max(own, key=lambda one: (one.fluent, one.score)) for own in tries]
        # The same answer scores the same, whatever rounding in another batch made of it.
        same = {id(one) for one, ids in flat if ids == state.answer}
        gains = {id(t): 0.0 if id(t) in same else t.score - state.score for t in best}
        better = [t for t in best if t.fluent and gains[id(t)] > self.options.threshold]
        if not better:
            return [one for one, _ in flat]
        if self.options.accept == "first":
            chosen = better[0]
        else:
            chosen = max(better, key=lambda one: one.score)
        state.answer = next(ids for one, ids in flat if one is chosen)
        state.score, state.perplexity, state.alive = chosen.score, chosen.perplexity, True
        state.delta = self._stepped(state, downhill, chosen.step)
        return [replace(one, accepted=True) if one is chosen else one for one, _ in flat]

    # -- directions --------------------------------------------------------------------------------

    def _directions(
        self, states: list[_State], number: int
    ) -> tuple[list[Tensor], list[tuple[float, ...]]]:
        """For each prompt the step of size 1 [L, N, D], and the largest |g| by layer."""
        options = self.options
        found = slopes(
            self.lm,
            [state.row(state.answer) for state in states],
            self.judges,
            [state.place for state in states],
            [Add(state.place, state.delta[:, None]) for state in states],
            objective=options.objective,
            label_smoothing=options.label_smoothing,
            perplexity=not states[0].trace,  # all of them are read already, or none
            batch_size=max(options.batch_size // 4, 1),
        )
        for i, state in enumerate(states):
            if not state.trace:  # still without an edit: so are the readings
                score, perplexity = (float(x[i]) for x in found.readings)
                first = self._try(state, 0.0, 0, state.answer, score, perplexity)
                self._open(state, [state.answer], [first])
        steps, norms = [], []
        for i, state in enumerate(states):
            g = found.gradient[:, i, : state.delta.shape[1]]
            length = found.lengths[:, i, : state.delta.shape[1], None]
            state.size = float(length.mean())
            length = length.median(1, keepdim=True).values  # by layer: a first token may be huge
            norms.append(tuple(torch.linalg.vector_norm(g, dim=-1).amax(1).tolist()))
            if options.direction == "random":
                g = _random_like(g, state.ids, options.seed + 7919 * number)
            steps.append(-self._scaled(g, length))
        return steps, norms

    def _scaled(self, g: Tensor, length: Tensor) -> Tensor:
        """The gradient [L, N, D] as a step of size 1, beside each layer's usual |h| [L, 1, 1]."""
        options = self.options
        unit = torch.ones_like(length) if options.absolute else length / 100
        if options.pgd is not None:
            g = shaped(g[:, None], None, options.top_k)[:, 0]
            norm: Tensor = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
            return g / norm.clamp_min(1e-30) * unit
        if not options.absolute:
            g = g * length  # with respect to h' = h + |h| dose
            g = g / torch.linalg.vector_norm(g, dim=-1).max().clamp_min(1e-30)
        return shaped(g[:, None], options.clip, options.top_k)[:, 0] * unit

    def _stepped(self, state: _State, downhill: Tensor, size: float) -> Tensor:
        """The edit's delta after a step."""
        delta = state.delta + size * downhill
        if self.options.pgd is None:
            return delta
        return delta.clamp(-self.options.pgd, self.options.pgd)

    # -- answers -----------------------------------------------------------------------------------

    def _branches(self, items: Sequence[tuple[_State, Tensor | None]]) -> list[list[list[int]]]:
        """Greedy answers under each prompt's edit after a step; ``branches`` for each item."""
        options = self.options
        answers: dict[int, list[list[int]]] = {}
        size = max(options.batch_size // options.branches, 1)
        lengths = [len(state.ids) for state, _ in items]
        for group in groups(lengths, size):
            edits = []
            for i in group:
                state, step = items[i]
                delta = state.delta if step is None else self._stepped(state, step, 1.0)
                edits.append(None if step is None else Add(state.place, delta[:, None]))
            batch = chat.pad([items[i][0].row() for i in group], chat.pad_id(self.lm.tokenizer))
            rows = complete(
                self.lm, batch, edits, options.branches, options.max_new_tokens, self.tail
            )
            for k, i in enumerate(group):
                answers[i] = rows[k * options.branches : (k + 1) * options.branches]
        return [answers[i] for i in range(len(items))]

    def _read(
        self, states: Sequence[_State], answers: list[list[list[int]]], steps: Sequence[float]
    ) -> list[list[Try]]:
        """Judge all answers in one go, without any edit."""
        rows = [s.row(a) for s, own in zip(states, answers, strict=True) for a in own]
        found = readings(self.lm, self.judges, rows, batch_size=self.options.batch_size)
        numbers = zip(found.score.tolist(), found.perplexity.tolist(), strict=True)
        return [
            [self._try(state, step, i, ids, *next(numbers)) for i, ids in enumerate(own)]
            for state, own, step in zip(states, answers, steps, strict=True)
        ]

    def _try(
        self,
        state: _State,
        step: float,
        branch: int,
        ids: list[int],
        score: float,
        perplexity: float,
    ) -> Try:
        again = repetition(ids)
        fluent = perplexity <= state.bound[0] and again <= state.bound[1] and bool(ids)
        text = chat.decode(self.lm.tokenizer, ids)
        return Try(step, branch, text, score, perplexity, again, fluent)

    def solution(self, state: _State) -> Solution:
        """What the search found for one prompt."""
        options = self.options
        made_by = {
            "method": "selfcontrol",
            "judges": [f"{j.question} ({j.target}, {j.direction:+d})" for j in self.judges],
            "direction": options.direction,
            "seed": options.seed,
        }
        scores = {"score": state.score, "perplexity": state.perplexity}
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        return Solution(
            prompt=state.prompt,
            answer=chat.decode(self.lm.tokenizer, state.answer),
            score=state.score,
            edit=Add(
                state.place,
                state.delta[:, None].clone(),
                meta=Meta(model=self.lm.describe(), made_by=made_by, scores=finite),
            ),
            trace=tuple(state.trace),
            perplexity=state.perplexity,
            answer_ids=tuple(state.answer),
            size=float(torch.linalg.vector_norm(state.delta, dim=-1).mean()) / (state.size or 1.0),
        )


@dataclass(frozen=True)
class _Branching(Sampling):
    """Greedy answers, of which copy k begins with the k-th most likely token."""

    copies: int = 1
    ends: tuple[int, ...] = ()

    def chooser(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        greedy, begun = super().chooser(device), False

        def choose(history: Tensor, logits: Tensor) -> Tensor:
            nonlocal begun
            if begun or self.copies == 1:
                return greedy(history, logits)
            begun = True
            logits = self._processors()(cast(Any, history), cast(Any, logits)).clone()
            logits[:, list(self.ends)] = -math.inf
            number = torch.arange(len(logits), device=logits.device)[:, None] % self.copies
            return logits.topk(self.copies).indices.gather(1, number)[:, 0]

        return choose


def complete(
    lm: LM, batch: Batch, edits: Any, copies: int, max_new_tokens: int, tail: int = 0
) -> list[list[int]]:
    """``copies`` greedy answers per row, side by side; with several, each begins differently.

    The prompts run once for all their copies: the fewest passes that there can be. After an answer
    the context has room for ``tail`` more tokens. Raises ChatError where there is none.
    """
    batch = batch.to(lm.device)
    room, call = lm._room(batch, max_new_tokens), lm._call(batch, edits)
    if lm.context is not None and (left := lm.context - batch.ids.shape[1] - tail) < room:
        if left < 1:
            raise ChatError(
                f"a prompt has {batch.ids.shape[1]} tokens and the judge's question {tail}, which "
                f"leaves no room for an answer: this model takes {lm.context}"
            )
        room = left
    own = lm._defaults()
    sampling = _Branching(**own, copies=copies, ends=tuple(lm.end_ids))
    rows: list[list[int]] = [[] for _ in range(len(batch) * copies)]
    with lm.taps.held(lm.waits):
        for column in columns(
            lm, batch, call, sampling=sampling, max_new_tokens=room, copies=copies
        ):
            lm._collect(rows, column)
    return rows


def repetition(ids: Sequence[int]) -> float:
    """The share of token triples that were there before.

    >>> round(repetition([1, 2, 3, 4, 1, 2, 3]), 3)
    0.2
    """
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def _random_like(g: Tensor, ids: Sequence[int], seed: int) -> Tensor:
    """A random direction at each position, as long as the gradient is there.

    Its numbers hang on the seed and the prompt alone, not on what is solved beside it.
    """
    digest = hashlib.sha256(f"{seed} {list(ids)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    noise = torch.randn(g.shape, generator=generator).to(g)
    unit: Tensor = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    return unit * length
