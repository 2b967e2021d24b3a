"""Tune: which layers, which tokens, how strong: found by effect at a bounded perplexity.

Knows probes, the model and scorers. A *setting* is layers, tokens and a dose. First every choice of
layers and tokens gets the largest dose that the bound on perplexity allows, by scoring some
references (no text is generated); then settings are compared by generating under them, the better
ones on more and more prompts (successive halving, Jamieson & Talwalkar 2016, arXiv 1502.07943), the
last of them at the largest dose that the bound allows on all references. With
examples of the concept some settings spread the dose over the layers by slopes (``profile``).
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from trimtab.concepts import Probe
from trimtab.edits import Edit
from trimtab.evals.identity import scorer_identity
from trimtab.evals.profile import DAMPING, profiles
from trimtab.evals.scorers import Scorer, prompt_text, score
from trimtab.evals.sweep import (
    MAX_RATIO,
    Pieces,
    Row,
    check_judging,
    exponential,
    fluencies,
    model_identity,
    own_references,
    prompts_of,
    references,
    repetition,
)
from trimtab.journal import Journal
from trimtab.lm import LM
from trimtab.merge import fingerprint
from trimtab.place import LayerSpec, Place, Tokens

ROUNDS = 4  # of the search for the largest dose, at most
FEW = 12  # references in that search
CLOSE, AIM = 0.85, 0.93  # of the bound's logarithm: a dose so near to it is kept; what is aimed at
STEPS = 3  # comparisons, each on more prompts
KEPT = 1 / 3  # of the settings, from one comparison to the next
SMALLER = (2 / 3, 1 / 3)  # of the dose of the best setting: what a lower price buys
MAX_REPETITION = 0.15  # more than without the edit: text that goes round in circles
BROKEN = 20.0  # times the perplexity of plain answers, to the plain model: an answer of nonsense
MAX_BROKEN = 0.05  # more of them than without the edit

# An answer goes on as it begins, and the bound is on the mean over an answer: its first few tokens
# take a much larger dose, and the first alone (a refusal, a list, a yes) the largest. Where a part
# e1 of an effect is to be had of them and e2 of all others, at costs that grow as the square of the
# dose, both together give (e1^2 + e2^2)^(1/2).
FIRST = (4, 4.0)  # so many of them, at so many times the dose
SELECTORS = ("all", "answer", "answer[:4]", "answer[:1]")

Pairs = list[tuple[Any, str]]


@dataclass(frozen=True)
class Setting:
    """Where and how strongly to steer, and what was measured of it.

    ``effect``: the judge's mean over ``judged`` prompts; ``ratio``: the perplexity of the
    references (some; all for the finalists), in that without an edit; ``repetition``: the share of
    repeated three-word runs; ``broken``: the share of answers that are empty, or nonsense to the
    model without the edit (20 times the perplexity of its own answers or more). ``weights``: the
    share of the dose that each layer gets (empty: all alike). ``first`` (n, factor): the first n
    tokens take ``factor`` times the dose.
    """

    layers: tuple[int, ...]
    tokens: str
    dose: float
    effect: float = math.nan
    ratio: float = math.nan
    repetition: float = math.nan
    broken: float = math.nan
    judged: int = 0
    weights: tuple[float, ...] = ()
    first: tuple[int, float] | None = None

    @property
    def guidance(self) -> dict[str, Any]:
        """The arguments of ``probe.edit`` that make it so."""
        own: dict[str, Any] = {"weights": list(self.weights)} if self.weights else {}
        own |= {"first": list(self.first)} if self.first else {}
        return {"layers": list(self.layers), "tokens": self.tokens, "dose": self.dose, **own}

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells settings apart, whatever was measured of them."""
        return self.layers, self.tokens, self.dose, self.weights, self.first

    def edit(self, probe: Probe) -> Edit | None:
        """The probe's edit at this setting; None for a dose of 0."""
        return probe.edit(**self.guidance) if self.dose else None


NOTHING = Setting((), "all", 0.0)


@dataclass(frozen=True)
class Tuned:
    """What tuning found: the probe with its choice stored, and what it was chosen from.

    ``runner_up``: the best with other layers or tokens. ``frontier``: of the finalists, and of the
    best one at smaller doses, those that none beats in both effect and perplexity.
    """

    probe: Probe
    best: Setting
    runner_up: Setting | None
    frontier: list[Setting]
    tried: list[Setting]
    baseline: float  # the effect without an edit
    generated: int  # tokens, at most

    @property
    def edit(self) -> Edit:
        """The edit that was chosen."""
        return self.probe.edit()


def tune(
    lm: LM,
    probe: Probe,
    prompts: Sequence[Any],
    scorer: Scorer,
    reference: Sequence[Any] | None = None,
    *,
    examples: Sequence[Any] | None = None,
    budget: int = 40_000,
    max_ratio: float = MAX_RATIO,
    max_new_tokens: int = 40,
    layers: Iterable[LayerSpec] | None = None,
    tokens: str | Sequence[str] = SELECTORS,
    batch_size: int = 64,
    out: str | Path | None = None,
    show_progress: bool = True,
) -> Tuned:
    """Find the layers, the tokens and the dose with the largest effect at a bounded perplexity.

    ``budget``: generated tokens in all. ``max_ratio``: how much the mean perplexity of the
    references (as for ``sweep``) may rise. ``layers``: a list of choices to try, such as
    ``["0:15", [20]]``, by default windows over the depth and the layers with the best training
    accuracy, the paper's 16 among them.
    ``tokens``: the selectors to try; "answer" also with a larger dose at its first few tokens.
    ``examples``: labelled ones of the concept, such as the probe learnt from; with them some
    choices give each layer a dose of its own, as the examples' likelihood and the references'
    perplexity suggest. ``out``: a file that keeps finished batches, so that the same call goes on
    after a crash.

    Of settings with the same effect the one that costs least is chosen. Those whose answers repeat
    themselves, are empty or nonsense come last, whatever the judge sees in them.
    ``tuned.probe.edit()`` without numbers is the edit that was chosen, also after saving. Raises
    ValueError for a budget that does not reach every setting twice, and where no dose fits; warns
    where no setting beats no edit, or none keeps the text whole.
    """
    if not isinstance(probe, Probe):
        raise ValueError(f"tune takes a Probe of tt.concepts.fit, not {type(probe).__name__}")
    if not max_ratio > 1:
        raise ValueError(f"max_ratio is above 1, the perplexity without an edit; not {max_ratio}")
    check_judging(scorer, batch_size)
    asked, tokens = prompts_of(prompts), [tokens] if isinstance(tokens, str) else list(tokens)
    tokens = list(dict.fromkeys(str(Tokens.of(spec)) for spec in tokens))
    windows = _windows(probe)
    if layers is not None:
        windows = list(dict.fromkeys(_layers_of(probe, choice) for choice in layers))
    if not windows or not tokens:
        raise ValueError("layers= and tokens= each name one choice to try, at least")
    kinds: list[tuple[str, tuple[int, float] | None]] = [(t, None) for t in tokens]
    kinds += [(t, FIRST) for t in tokens if t == "answer"]
    starts = [Setting(w, t, _dose(w), first=first) for w in windows for t, first in kinds]
    count = len(starts) + (0 if examples is None else len(DAMPING) * len(kinds))
    if budget < (least := max_new_tokens * (len(asked) + 2 * count + 2 * _finalists(count))):
        raise ValueError(
            f"a budget of {budget} tokens is too small for {len(asked)} prompts, {count} "
            f"settings and {max_new_tokens} tokens an answer; give at least {least}, fewer layers "
            "or shorter answers"
        )
    pairs = None if reference is None else references(reference, asked)
    if odd := [e for e in examples or () if not hasattr(e, "label")]:
        raise ValueError(
            f"examples= takes labelled Examples, such as of tt.data, not {odd[0]!r:.60}"
        )
    job: dict[str, Any] = {"model": model_identity(lm), "budget": budget, "max_ratio": max_ratio}
    job |= {"probe": fingerprint(probe.edit(layers=list(probe.layers)))}
    job |= {"scorer": scorer_identity(scorer), "texts": [asked, pairs], "layers": windows}
    job |= {"tokens": list(tokens), "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    job |= {"search": [ROUNDS, FEW, CLOSE, AIM, STEPS, KEPT, MAX_REPETITION, BROKEN, MAX_BROKEN]}
    if examples is not None:
        job |= {"examples": [[prompt_text(e.prompt), e.completion, e.label] for e in examples]}
    with Journal(out, job) as journal, lm.products.kept():
        pieces = Pieces(journal, batch_size, show_progress)
        search = _Search(lm, probe, asked, scorer, pieces, max_new_tokens, max_ratio)
        return search.run(starts, pairs, budget, examples)


def _dose(layers: tuple[int, ...]) -> float:
    """Where the search for the largest dose of so many layers begins."""
    return 0.12 / math.sqrt(len(layers) * math.sqrt(len(layers)))


def _finalists(settings: int) -> int:
    """How many of so many settings come to the last comparison, at most."""
    for _ in range(STEPS - 1):
        settings = max(2, math.ceil(settings * KEPT))
    return settings


def _layers_of(probe: Probe, spec: Any) -> tuple[int, ...]:
    depth = (probe.meta.model or {}).get("layers") or max(probe.layers) + 1
    return Place(probe.place.site, spec).layer_indices(depth)


def _windows(probe: Probe) -> list[tuple[int, ...]]:
    """All layers; halves and quarters of the depth; the best ones by accuracy."""
    own, count = probe.layers, len(probe.layers)
    found = [own]
    for share, step in ((1 / 2, 1 / 6), (1 / 4, 1 / 4)):
        width = max(1, round(count * share))
        first = [round(count * step * i) for i in range(1 + round((1 - share) / step))]
        found += [own[i : i + width] for i in first if i + width <= count]
    if bool(probe.accuracy.isfinite().all()):
        found += [probe.best_layers(k) for k in (16, 8, 4) if k < count]
    return list(dict.fromkeys(found))


class Answer(NamedTuple):
    """What one setting had the model say to one prompt."""

    text: str
    effect: float
    perplexity: float | None  # to the model without the edit; None for a text that says nothing


@dataclass
class _Search:
    """One search: what it works with, and what it has measured so far."""

    lm: LM
    probe: Probe
    prompts: list[Any]
    scorer: Scorer
    pieces: Pieces
    max_new_tokens: int
    max_ratio: float
    answers: dict[tuple[Any, ...], Answer] = field(default_factory=dict)

    @property
    def spent(self) -> int:
        """Generated tokens, at most."""
        return len(self.answers) * self.max_new_tokens

    @property
    def limit(self) -> float:
        """The perplexity beyond which an answer is broken."""
        plain = (self.answers.get((*NOTHING.key, p)) for p in range(len(self.prompts)))
        return BROKEN * median([a.perplexity for a in plain if a and a.perplexity] or [math.inf])

    def run(
        self,
        starts: list[Setting],
        pairs: Pairs | None,
        budget: int,
        examples: Sequence[Any] | None = None,
    ) -> Tuned:
        everything = range(len(self.prompts))
        (baseline,) = self._judge("no edit", [NOTHING], everything)
        if pairs is None:
            plain = [self.answers[(*NOTHING.key, i)].text for i in everything]
            pairs = own_references(self.prompts, plain)
        if examples is not None:
            every = dict.fromkeys((s.tokens, s.first) for s in starts)
            starts = starts + self._profiled(examples, pairs, every)
        some = pairs[:: -(-len(pairs) // FEW)]
        limits = self._largest("largest dose", starts, some)
        steps = self._halve(limits, baseline, budget, pairs)
        steps.append(self._smaller(steps[-1][0], budget, pairs))
        last = self._ranked(sorted(steps[-2] + steps[-1], key=lambda s: s.ratio), baseline)
        best, *others = last
        if not _sound(best, baseline):
            warnings.warn(
                f"no setting keeps the text whole: of the best one's answers {best.broken:.0%} are "
                f"empty or nonsense, and {best.repetition:.0%} of their three-word runs are "
                f"repeated (without an edit {baseline.broken:.0%} and {baseline.repetition:.0%}); "
                "lower max_ratio, or look at what the judge likes",
                stacklevel=3,
            )
        if best.effect <= baseline.effect:
            warnings.warn(
                f"no setting has more effect ({best.effect:.3g}) than no edit "
                f"({baseline.effect:.3g}): this probe does not steer towards what the judge sees; "
                "to steer away from its concept, fit one with the labels swapped",
                stacklevel=3,
            )
        tried = {s.key: s for step in steps for s in step}
        return Tuned(
            self._stored(best, baseline),
            best,
            next((s for s in others if replace(s, dose=best.dose).key != best.key), None),
            _frontier(s for s in last if _sound(s, baseline)),
            list(tried.values()),
            baseline.effect,
            self.spent,
        )

    def _profiled(
        self,
        examples: Sequence[Any],
        pairs: Pairs,
        kinds: Iterable[tuple[str, tuple[int, float] | None]],
    ) -> list[Setting]:
        """All layers, each with its own share of the dose."""
        lm, probe, layers = self.lm, self.probe, self.probe.layers
        return [
            Setting(layers, tokens, _dose(layers), weights=weights, first=first)
            for tokens, first in kinds
            for weights in profiles(lm, probe, tokens, first, examples, pairs, self.pieces)
        ]

    def _largest(self, stage: str, settings: list[Setting], pairs: Pairs) -> list[Setting]:
        """Each setting at the largest dose that was seen to keep within the bound, if any was."""
        inside: dict[int, Setting] = {}
        outside: dict[int, float] = {}
        before: dict[int, Setting] = {}
        tried = dict(enumerate(settings))
        for number in range(ROUNDS):
            if not tried:
                break
            told = f"{stage}, round {number + 1} of {ROUNDS}"
            found = dict(zip(tried, self._ratios(told, list(tried.values()), pairs), strict=True))
            tried = {}
            for i, s in found.items():
                if not s.ratio <= self.max_ratio:
                    outside[i] = min(outside.get(i, math.inf), s.dose)
                elif i not in inside or s.dose > inside[i].dose:
                    inside[i] = s
                low = inside[i].dose if i in inside else 0.0
                if not CLOSE <= math.log(s.ratio) / math.log(self.max_ratio) <= 1:
                    dose = _next(s, before.get(i), self.max_ratio, low, outside.get(i, math.inf))
                    tried[i] = replace(s, dose=dose)
            before = found
        return [inside[i] for i in sorted(inside)]

    def _halve(
        self, settings: list[Setting], baseline: Setting, budget: int, pairs: Pairs
    ) -> list[list[Setting]]:
        """Compare, keep the better ones, compare on more prompts; the settings of each step."""
        steps: list[list[Setting]] = []
        order = _spread(len(self.prompts))
        least = 2 * _finalists(len(settings)) * self.max_new_tokens
        for step in range(STEPS):
            if last := step == STEPS - 1:
                settings = self._largest("all references", settings, pairs)
            if not settings:
                raise ValueError(
                    f"no dose tried keeps the perplexity ratio within {self.max_ratio}; raise "
                    "max_ratio, or give other layers"
                )
            kept = 0 if last else least
            share = (budget - self.spent - kept) / (STEPS - step)
            count = self._affordable(settings, order, share)
            told = f"comparison {step + 1} of {STEPS}"
            measured = self._judge(told, settings, order[: max(2, count)])
            measured = self._ranked(measured, baseline)
            steps.append(measured)
            settings = measured[: max(2, math.ceil(len(measured) * KEPT))]
        return steps

    def _smaller(self, best: Setting, budget: int, pairs: Pairs) -> list[Setting]:
        """The best setting at smaller doses, on the same prompts, as far as the budget goes."""
        order, made = _spread(len(self.prompts))[: best.judged], []
        for share in SMALLER:
            if budget - self.spent >= len(order) * self.max_new_tokens:
                told, one = f"{share:.2f} of the dose", replace(best, dose=share * best.dose)
                (one,) = self._ratios(f"price at {told}", [one], pairs)
                made += self._judge(f"effect at {told}", [one], order)
        return made

    def _ranked(self, settings: list[Setting], baseline: Setting) -> list[Setting]:
        """By effect, equal ones in their order; text that goes in circles or says nothing, last."""
        return sorted(settings, key=lambda s: (not _sound(s, baseline), -s.effect))

    def _affordable(self, settings: list[Setting], order: list[int], tokens: float) -> int:
        """On how many first prompts all of these can be compared for so many more tokens."""
        room = tokens / self.max_new_tokens
        for count, p in enumerate(order):
            room -= sum((*s.key, p) not in self.answers for s in settings)
            if room < 0:
                return count
        return len(order)

    def _ratios(self, stage: str, settings: list[Setting], pairs: Pairs) -> list[Setting]:
        """Settings with the ratio of perplexities over these references."""
        edits = [None, *(s.edit(self.probe) for s in settings)]

        def cost(group: list[Row]) -> list[float]:
            asked, said = [pairs[r][0] for _, r in group], [pairs[r][1] for _, r in group]
            own = [edits[i] for i, _ in group]
            logs = self.lm.score(asked, said, own, batch_size=len(group))
            return [exponential(-v) for v in logs.tolist()]

        rows = [(i, r) for i in range(len(edits)) for r in range(len(pairs))]
        found = self.pieces.work(stage, rows, cost)
        base, *costs = [fmean(found[i, r] for r in range(len(pairs))) for i in range(len(edits))]
        return [replace(s, ratio=c / base) for s, c in zip(settings, costs, strict=True)]

    def _judge(self, stage: str, settings: list[Setting], numbers: Sequence[int]) -> list[Setting]:
        """Settings with their effect on the prompts of these numbers; new ones are generated."""
        edits = [s.edit(self.probe) for s in settings]

        def answer(group: list[Row]) -> list[Answer]:
            asked = [self.prompts[p] for _, p in group]
            own = [edits[i] for i, _ in group]
            texts = self.lm.generate(asked, own, self.max_new_tokens, batch_size=len(group))
            effects = score(self.scorer, asked, texts).tolist()
            costs = fluencies(self.lm, asked, texts)
            return list(map(Answer, texts, effects, costs))

        new = [
            (i, p)
            for i, s in enumerate(settings)
            for p in numbers
            if (*s.key, p) not in self.answers
        ]
        for (i, p), made in self.pieces.work(stage, new, answer).items():
            self.answers[(*settings[i].key, p)] = Answer(*made)
        return [self._summed(s, numbers) for s in settings]

    def _summed(self, setting: Setting, numbers: Sequence[int]) -> Setting:
        found, limit = [self.answers[(*setting.key, p)] for p in numbers], self.limit
        return replace(
            setting,
            effect=fmean(a.effect for a in found),
            repetition=fmean(repetition(a.text) for a in found),
            broken=fmean(a.perplexity is None or a.perplexity > limit for a in found),
            judged=len(found),
        )

    def _stored(self, best: Setting, baseline: Setting) -> Probe:
        """The probe that steers by this setting where no other is named."""
        told = {"effect": best.effect, "without": baseline.effect, "judged": best.judged}
        told |= {"perplexity_ratio": best.ratio, "repetition": best.repetition}
        told |= {"broken": best.broken}
        scores = {**self.probe.meta.scores, "tuned": told}
        meta = replace(self.probe.meta, scores=scores)
        return replace(self.probe, guidance=best.guidance, meta=meta)


def _sound(setting: Setting, baseline: Setting) -> bool:
    """Whether its answers are little more repetitive and broken than those without an edit."""
    return (
        setting.repetition <= baseline.repetition + MAX_REPETITION
        and setting.broken <= baseline.broken + MAX_BROKEN
    )


def _next(
    now: Setting, before: Setting | None, max_ratio: float, inside: float, outside: float
) -> float:
    """The dose to try next, between the largest within the bound and the smallest beyond it.

    The logarithm of the ratio grows as a power of the dose, with an exponent of about 1 to 2. Two
    doses tell which; after the first, 1 is the safe guess down from beyond the bound, 2 up to it.
    """
    if not math.isfinite(now.ratio):
        return max(now.dose / 10, (inside + now.dose) / 2 if inside else 0.0)
    growth = max(math.log(now.ratio), 1e-3)
    step = AIM * math.log(max_ratio) / growth
    power = 2.0 if step > 1 else 1.0
    if before is not None and before.dose != now.dose and math.isfinite(before.ratio):
        grown = math.log(growth / max(math.log(before.ratio), 1e-3))
        power = min(max(grown / math.log(now.dose / before.dose), 1.0), 3.0)
    dose = now.dose * min(max(math.pow(step, 1 / power), 0.1), 4.0)
    if inside < dose < outside:
        return dose
    return 2 * inside if math.isinf(outside) else (inside + outside) / 2


def _spread(count: int) -> list[int]:
    """Numbers so that the first few come from all over the list, which may be sorted by topic."""
    step = next(
        k for k in range(round(count * 0.618) or 1, 2 * count + 2) if math.gcd(k, count) == 1
    )
    return [i * step % count for i in range(count)]


def _frontier(settings: Iterable[Setting]) -> list[Setting]:
    """Those that no other one beats in both effect and ratio, by rising ratio."""
    found: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.ratio, -s.effect)):
        if not found or setting.effect > found[-1].effect:
            found.append(setting)
    return found
