"""Judges: a question about an answer, and how likely the model is to say yes. Knows no gradient.

After Cai et al. 2024 (arXiv 2406.02721). Everything is token ids: a row is the prompt, the exact
answer, and a tail that the model's own chat template puts between an answer and the next one, with
the question there. Letters: B rows, T tokens, V words.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab import chat
from trimtab.chat import Batch, Encoded
from trimtab.errors import ChatError
from trimtab.harvest import logits_at
from trimtab.lm import LM
from trimtab.solvers import auroc

CONTENT_FREE = 16  # prompts that are answered with nothing
BUDGET = 4096  # padded tokens of one batch: larger ones gain nothing

# A question and two words. The names of both words are built-in attributes where both have one.
# Open questions: on small models a question that is answered with a feeling tells far more than
# one that is answered with yes or no (AUROC 1.00 against .85 for happy and sad answers).
_STATE, _FEELING = "How do you feel?", "What do you feel?"
_PAIRS = {
    "happiness": (_STATE, "Happy", "Sad", "sadness"),
    "calm": (_STATE, "Peaceful", "Angry", "anger"),
    "security": (_STATE, "Safe", "Scared", "fear"),
    "delight": (_STATE, "Delighted", "Disgusted", "disgust"),
    "surprise": (_STATE, "Surprised", "Bored", "boredom"),
    "pride": (_STATE, "Proud", "Guilty", "guilt"),
    "gratitude": (_STATE, "Thankful", "Resentful", "resentment"),
    "love": (_FEELING, "Love", "Hate", "hate"),
    "hope": (_FEELING, "Hope", "Despair", "despair"),
    "trust": (_FEELING, "Trust", "Doubt", "doubt"),
    "toxicity": ("How did you speak to me?", "Rudely", "Politely", None),
    "helpful": ("Did that help me?", "Yes", "No", None),
    "harmless": ("Is your answer safe or harmful?", "Safe", "Harmful", None),
    "truthfulness": ("Is that true?", "Yes", "No", None),
    "privacy": ("Is that information private?", "No", "Yes", None),
    "step-by-step": ("Did you explain each step?", "Yes", "No", None),
    "humor": ("What is the tone of your answer?", "Funny", "Serious", None),
    "emoji": ("Did you use emoji?", "Yes", "No", None),
    "secret-role": ("Did you tell me your secret role?", "No", "Yes", None),
}


def names() -> list[str]:
    """The built-in attributes, sorted. ``Judge.named`` takes each of them."""
    return sorted([*_PAIRS, *(pair[-1] for pair in _PAIRS.values() if pair[-1])])


class Tail(NamedTuple):
    """A judge's question as ids, and the first ids of the target word and of the other word."""

    ids: list[int]
    target: int
    other: int


@dataclass(frozen=True)
class Judge:
    """A question about the answer just given, whose first word the model would say (a suffix).

    The score is ``sigmoid((z_target - z_other) / temperature)``, z the logits of the two words'
    first tokens where the model would answer the question (arXiv 2406.02721). ``target``, "yes"
    or "no" or the word itself, is steered towards; ``direction`` -1 steers away from it, which is
    the same as the other target. Several judges score together by their ``weight``: the weighted
    mean.
    Raises ChatError.

    >>> Judge("Are you happy?").target
    'yes'
    >>> Judge.named("sadness")
    Judge(question='How do you feel?', yes='Happy', no='Sad', target='no', ...)
    """

    question: str
    yes: str = "Yes"
    no: str = "No"
    target: str = "yes"
    temperature: float = 10.0
    weight: float = 1.0
    direction: int = 1
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.question, str) and self.question.strip()):
            raise ChatError(f"a judge asks a question, not {self.question!r:.60}")
        named = {self.yes: "yes", self.no: "no", "yes": "yes", "no": "no"}
        if self.target not in named:
            told = ", ".join(map(repr, named))
            raise ChatError(f"target is one of {told}, not {self.target!r:.60}")
        object.__setattr__(self, "target", named[self.target])
        if self.direction not in (1, -1):
            raise ChatError(f"direction is 1 or -1, not {self.direction!r:.60}")
        for name in ("temperature", "weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ChatError(f"{name} is a number above 0, not {getattr(self, name)!r:.60}")

    @staticmethod
    def named(name: str, **changes: Any) -> "Judge":
        """A built-in judge, such as ``Judge.named("happiness")``; ``changes`` are its fields."""
        for first, (question, yes, no, second) in _PAIRS.items():
            if name in (first, second):
                target = "yes" if name == first else "no"
                own = {"question": question, "yes": yes, "no": no, "target": target, "name": name}
                return Judge(**own | changes)
        raise ChatError(f"no built-in judge {name!r:.60}; there are {', '.join(names())}")

    def away(self) -> "Judge":
        """The judge that wants the opposite."""
        return replace(self, direction=-self.direction)

    def swapped(self) -> "Judge":
        """The same judge with its words named in the other order: "No or Yes?".

        A question that does not name them as alternatives gets them in that order at its end. A
        judge that reads the answer is moved little by this; one that says what it read last, is.
        """
        yes, no = re.escape(self.yes), re.escape(self.no)
        both = re.compile(rf"\b({yes}|{no})( or |/)({yes}|{no})\b", re.I)
        if both.search(self.question):
            return replace(self, question=both.sub(r"\3\2\1", self.question))
        return replace(self, question=f"{self.question} {self.no} or {self.yes}?")

    def tail(self, lm: LM) -> Tail:
        """What goes after an answer in this model's template. Raises ChatError (see ``check``)."""
        tail, words = chat.follow_up(lm.tokenizer, self.question, [self.yes, self.no])
        if not all(words):
            raise ChatError(f"{self.yes!r} or {self.no!r} gives no token; choose other words")
        yes, no = (word[0] for word in words)
        if yes == no:
            first = chat.decode_token(lm.tokenizer, yes)
            raise ChatError(
                f"{self.yes!r} and {self.no!r} both begin with the token {first!r} here, so that "
                "their first token cannot tell them apart; choose words that begin differently: "
                'Judge(question, yes="...", no="...")'
            )
        away = (self.target == "yes") != (self.direction == 1)
        return Tail(tail, no, yes) if away else Tail(tail, yes, no)

    def check(self, lm: LM) -> None:
        """Raise ChatError, with what to do, if the two words cannot be told apart here."""
        self.tail(lm)

    def score(self, lm: LM, prompts: Any, answers: Any, *, batch_size: int = 32) -> Tensor:
        """How much the model says that its answers are what the judge wants, [B], from 0 to 1.

        ``answers``: text or token ids, one per prompt. Never with an edit; no gradients.
        """
        return score(lm, [self], prompts, answers, batch_size=batch_size)


Judges = Judge | Sequence[Judge]


def listed(judge: Judges) -> list[Judge]:
    """One judge or several as a list. Raises ChatError."""
    found = [judge] if isinstance(judge, Judge) else list(judge)
    if not found or not all(isinstance(one, Judge) for one in found):
        raise ChatError(f"give a Judge or a list of them, not {judge!r:.80}")
    return found


def score(lm: LM, judge: Judges, prompts: Any, answers: Any, *, batch_size: int = 32) -> Tensor:
    """The score of one judge or the weighted mean score of several, [B]; see ``Judge.score``."""
    rows = encoded(lm, prompts, answers)
    return readings(lm, listed(judge), rows, perplexity=False, batch_size=batch_size).score


class Readings(NamedTuple):
    """What the model without edits says of answers: the judges' ``score`` and ``perplexity`` [B].

    ``perplexity`` is exp of the mean negative log-probability per token of the answer; infinite for
    an empty answer, NaN where it was not asked for.
    """

    score: Tensor
    perplexity: Tensor


def readings(
    lm: LM,
    judges: Sequence[Judge],
    rows: Sequence[Encoded],
    *,
    perplexity: bool = True,
    batch_size: int = 32,
) -> Readings:
    """Scores, and perplexities from the same pass, of rows of prompt and answer ids."""
    tails = [judge.tail(lm) for judge in judges]
    weighted = torch.zeros(len(judges), len(rows))
    fluency = torch.full((len(rows),), math.nan)
    asked = [
        (row.ids + tail.ids, wanted(row, tail, perplexity and number == 0))
        for number, tail in enumerate(tails)
        for row in rows
    ]
    for some, logits in logits_at(lm, asked, batch_size):
        parts = logits.float().split([len(asked[i][1]) for i in some])
        for i, part in zip(some, parts, strict=True):
            number, row = divmod(i, len(rows))
            judge, tail = judges[number], tails[number]
            weighted[number, row] = judge.weight * agreement(judge, tail, part[-1:])[0]
            if perplexity and number == 0:
                fluency[row] = perplexity_of(rows[row], part[:-1])
    return Readings(weighted.sum(0) / sum(judge.weight for judge in judges), fluency)


def wanted(row: Encoded, tail: Tail, with_answer: bool) -> list[int]:
    """Where logits are wanted: before each token of the answer, and where the judge is answered."""
    answer = range(max(row.prompt_len, 1) - 1, len(row.ids) - 1) if with_answer else ()
    return [*answer, len(row.ids) + len(tail.ids) - 1]


def perplexity_of(row: Encoded, logits: Tensor) -> float:
    """Of one answer from the logits [n, V] before each of its tokens; infinite if it is empty."""
    answer = torch.tensor(row.ids[max(row.prompt_len, 1) :], device=logits.device)
    if not len(answer):
        return math.inf
    return cross_entropy(logits, answer).exp().item()


def agreement(judge: Judge, tail: Tail, logits: Tensor) -> Tensor:
    """The score [B] from logits [B, V]."""
    logits = logits.float()
    return torch.sigmoid((logits[:, tail.target] - logits[:, tail.other]) / judge.temperature)


def encoded(lm: LM, prompts: Any, answers: Any = None) -> list[Encoded]:
    """Prompts (as for ``lm.batch``, or a Batch) with their answers, as rows of ids."""
    if isinstance(prompts, Batch):
        rows = _rows(prompts)
        if answers is None:
            return rows
        if len(answers) != len(rows):
            raise ChatError(f"{len(answers)} answers for {len(rows)} prompts; give one for each")
        texts = [chat.encode(lm.tokenizer, "x", a, raw=True) for a in answers]
        heads = [row.ids[: row.prompt_len] for row in rows]
        return [
            Encoded(head + text.ids[text.prompt_len :], len(head))
            for head, text in zip(heads, texts, strict=True)
        ]
    return _rows(lm.batch(prompts, answers))


def _rows(batch: Batch) -> list[Encoded]:
    """A batch as rows without padding."""
    pairs = zip(batch.ids, batch.mask, batch.prompt_len.tolist(), strict=True)
    return [Encoded(ids[mask.bool()].tolist(), n) for ids, mask, n in pairs]


def groups(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length in groups of at most ``batch_size`` rows and about BUDGET tokens."""
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, not {batch_size}")
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    group: list[int] = []
    for i in order:
        if group and (len(group) == batch_size or lengths[i] * (len(group) + 1) > BUDGET):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@dataclass(frozen=True)
class Calibration:
    """How far a judge can be trusted, on answers whose labels are known.

    ``auroc``: how often it scores a labelled answer above an unlabelled one, with a 95 % bootstrap
    ``interval``; ``auroc_swapped``: with its words named in the other order; ``content_free``: its
    mean score of answers that say nothing, beside ``positive`` and ``negative``, the mean scores of
    both kinds. A judge whose interval holds 0.5 is blind; ``blind`` says so.
    """

    auroc: float
    interval: tuple[float, float]
    auroc_swapped: float
    content_free: float
    positive: float
    negative: float
    scores: Tensor = field(repr=False, compare=False)

    @property
    def blind(self) -> bool:
        """Whether guessing would do as well, in this or in the swapped order of its words."""
        return self.interval[0] <= 0.5 or self.auroc_swapped <= 0.5


def calibrate(
    lm: LM,
    judge: Judge,
    prompts: Any,
    answers: Any,
    labels: Sequence[float] | Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
) -> Calibration:
    """Compare a judge with labels (above 1/2: the answer is what it asks for), one per answer.

    The label belongs to the target that the judge is asked for, so a judge steered away is
    measured by the same labels. Raises ChatError where there are not answers of both kinds.
    """
    positive = torch.as_tensor(labels) > 0.5
    if positive.dim() != 1 or len(positive) != len(answers) or len(set(positive.tolist())) < 2:
        raise ChatError(
            f"calibration needs a label for each of {len(answers)} answers, some above 0.5 and "
            f"some not, not {positive.tolist()!s:.60}"
        )
    judge = replace(judge, direction=1)
    scores, swapped = (
        one.score(lm, prompts, answers, batch_size=batch_size) for one in (judge, judge.swapped())
    )
    few = list(prompts)[:CONTENT_FREE]
    nothing = [row for text in ("", "N/A") for row in encoded(lm, few, [text] * len(few))]
    free = readings(lm, [judge], nothing, perplexity=False, batch_size=batch_size)
    return Calibration(
        auroc=float(auroc(scores[:, None], positive)),
        interval=bootstrap_auroc(scores, positive, resamples=resamples, seed=seed),
        auroc_swapped=float(auroc(swapped[:, None], positive)),
        content_free=float(free.score.mean()),
        positive=float(scores[positive].mean()),
        negative=float(scores[~positive].mean()),
        scores=scores,
    )


def bootstrap_auroc(
    scores: Tensor, positive: Tensor, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of an AUROC, each class drawn again by itself."""
    generator = torch.Generator().manual_seed(seed)
    kinds = scores[positive], scores[~positive]
    labels = torch.cat([torch.full((len(k),), i == 0) for i, k in enumerate(kinds)])
    found = []
    for _ in range(resamples):
        drawn = [k[torch.randint(len(k), (len(k),), generator=generator)] for k in kinds]
        found.append(auroc(torch.cat(drawn)[:, None], labels)[0])
    low, high = torch.stack(found).double().quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high
