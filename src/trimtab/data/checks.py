"""What can be wrong with a set of examples, and a fair split of it. Knows words and counts only."""

import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from trimtab.data.example import Example
from trimtab.errors import TrimtabError

LEAK = 0.9  # balanced accuracy of one word
LENGTH_EFFECT = 0.5  # Cohen's d, "medium"
LENGTH_GAP = 0.1  # of the longer mean; where lengths hardly vary, d is large for nothing
SHARED_PROMPTS = 0.5  # share of the examples whose prompt has both labels
MINORITY = 0.3  # share of the smaller class

# Words, signs, and the characters of scripts that have no spaces between words.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Thai, Lao, Kana, Han
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['\u2019]\w+)*|[^\w\s]")
_LONG = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")  # what a length counts


def is_present(example: Example) -> bool:
    """Whether the concept counts as present: a label above one half."""
    return example.label > 0.5


def lint(examples: Sequence[Example]) -> list[str]:
    """What a probe could learn from these examples instead of the concept, one sentence each.

    Checks: no examples or one class only, class imbalance, empty completions, duplicates, labels
    outside 0 … 1, a word (or sign) that alone tells the classes apart, a difference in length,
    prompts that occur with one label only. An empty list means that none of these was found. Raises
    TrimtabError for what is no example.
    """
    _check_examples(examples)
    present = [example for example in examples if is_present(example)]
    absent = [example for example in examples if not is_present(example)]
    if not (present and absent):
        return [
            f"{len(present)} examples have the concept and {len(absent)} lack it (label > 0.5 = "
            "present): a probe needs both."
        ]
    return [*_lint_rows(examples), *(w for check in CHECKS for w in check(present, absent))]


def _check_examples(examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples):
        if not hasattr(example, "completion") or not hasattr(example, "label"):
            raise TrimtabError(
                f"number {number} is no example with prompt, completion and label, but "
                f"{type(example).__name__} {example!r:.60}; read examples with tt.data.read"
            )


def _lint_rows(examples: Sequence[Example]) -> Iterator[str]:
    empty = [n for n, example in enumerate(examples) if not example.completion.strip()]
    if empty:
        yield f"{len(empty)} completions are empty, the first at index {empty[0]}. Remove them."
    outside = [example.label for example in examples if not 0 <= example.label <= 1]
    if outside:
        yield f"{len(outside)} labels lie outside 0 … 1, the first is {outside[0]:g}. Rescale them."
    key = [(e.prompt, e.completion, str(e.history), e.label) for e in examples]
    copies = len(key) - len(set(key))
    if copies:
        common = Counter(key).most_common(1)[0][0]
        yield f"{copies} examples are duplicates, such as {common[1][:60]!r}. Remove them."


def _lint_balance(present: list[Example], absent: list[Example]) -> Iterator[str]:
    share = min(len(present), len(absent)) / (len(present) + len(absent))
    if share < MINORITY:
        yield (
            f"classes are unbalanced: {len(present)} with the concept, {len(absent)} without. "
            "Accuracy of a constant guess is already "
            f"{1 - share:.2f}; drop examples of the larger class."
        )


def _lint_words(present: list[Example], absent: list[Example]) -> Iterator[str]:
    word, accuracy = telltale_word(present, absent)
    if accuracy > LEAK:
        yield (
            f"the word {word!r} alone tells the classes apart (accuracy {accuracy:.2f}). Vary the "
            "wording, or the probe finds the word instead of the concept."
        )


def telltale_word(present: list[Example], absent: list[Example]) -> tuple[str, float]:
    """The word whose presence in a completion separates the classes best: (word, accuracy).

    The accuracy is the mean over both classes, so that a rare class cannot hide it.
    """
    inside, outside = _word_counts(present), _word_counts(absent)

    def accuracy(word: str) -> float:
        difference = inside[word] / len(present) - outside[word] / len(absent)
        return 0.5 + abs(difference) / 2

    best = max(sorted(inside | outside), key=accuracy, default="")
    return best, accuracy(best)


def _word_counts(examples: list[Example]) -> Counter[str]:
    return Counter(w for e in examples for w in set(_WORD.findall(e.completion.lower())))


def _lint_length(present: list[Example], absent: list[Example]) -> Iterator[str]:
    effect, means = length_effect(present, absent)
    if abs(effect) > LENGTH_EFFECT and abs(means[0] - means[1]) > LENGTH_GAP * max(means):
        yield (
            f"completions differ in length: {means[0]:.1f} words with the concept, {means[1]:.1f} "
            f"without (effect size {effect:+.2f}). Match the lengths, unless length is the concept."
        )


def length_effect(
    present: list[Example], absent: list[Example]
) -> tuple[float, tuple[float, float]]:
    """Cohen's d of the number of words, and the two means."""
    sizes = [[len(_LONG.findall(e.completion)) for e in part] for part in (present, absent)]
    means = statistics.fmean(sizes[0]), statistics.fmean(sizes[1])
    spread = [s - m for part, m in zip(sizes, means, strict=True) for s in part]
    deviation = (sum(s * s for s in spread) / max(len(spread) - 2, 1)) ** 0.5
    gap = means[0] - means[1]
    if deviation == 0:  # no spread at all: any gap separates perfectly
        return (float("inf") * gap if gap else 0.0), means
    return gap / deviation, means


def _lint_topics(present: list[Example], absent: list[Example]) -> Iterator[str]:
    both = {e.prompt for e in present} & {e.prompt for e in absent}
    asked = [e.prompt for e in (*present, *absent) if e.prompt]
    shared = sum(prompt in both for prompt in asked)
    if asked and shared / len(asked) < SHARED_PROMPTS:
        yield (
            f"only {shared / len(asked):.0%} of the examples have a prompt that occurs with both "
            "labels: the classes may differ in topic. Give each prompt one completion of each."
        )


def _lint_contradictions(present: list[Example], absent: list[Example]) -> Iterator[str]:
    said = [{(e.prompt, e.completion, str(e.history)) for e in part} for part in (present, absent)]
    both = sorted(said[0] & said[1])
    if both:
        yield f"{len(both)} completions carry both labels, such as {both[0][1][:60]!r}. Choose one."


CHECKS: tuple[Callable[[list[Example], list[Example]], Iterator[str]], ...] = (
    _lint_balance,
    _lint_contradictions,
    _lint_words,
    _lint_length,
    _lint_topics,
)


def split(
    examples: Sequence[Example], held_out: float = 0.2, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(train, test): no prompt on both sides, labels in about equal shares, the same every time.

    ``held_out`` is the share of examples in test, 0 <= held_out < 1; the choice depends on the
    prompts, the labels and the seed, not on the order of the examples. With two prompts or more
    and ``held_out`` above 0, neither side is empty. Raises TrimtabError.
    """
    if not 0 <= held_out < 1:
        raise TrimtabError(f"held_out is {held_out}; it must be at least 0 and below 1.")
    _check_examples(examples)
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[_group(example)].append(example)
    test = _held_out_groups(groups, held_out, seed)
    return (
        [example for example in examples if _group(example) not in test],
        [example for example in examples if _group(example) in test],
    )


def _group(example: Example) -> str:
    return example.prompt or example.completion  # statements without a prompt stand alone


def _held_out_groups(groups: dict[str, list[Example]], held_out: float, seed: int) -> set[str]:
    """Fill test stratum by stratum, each time a group brings it nearer to its share."""
    strata: dict[tuple[int, int], list[str]] = defaultdict(list)
    for key in sorted(groups):
        labels = [is_present(example) for example in groups[key]]
        strata[sum(labels), len(labels) - sum(labels)].append(key)
    order = random.Random(seed)
    test: set[str] = set()
    wanted, taken = 0.0, 0
    for stratum in (strata[key] for key in sorted(strata)):
        order.shuffle(stratum)
        wanted += held_out * sum(len(groups[key]) for key in stratum)
        for key in stratum:
            if taken + len(groups[key]) / 2 <= wanted and len(test) + 1 < len(groups):
                test.add(key)
                taken += len(groups[key])
    if held_out and not test and len(groups) > 1:
        test.add(order.choice(sorted(groups)))
    return test


class WordFloor(NamedTuple):
    """How well words alone tell held-out completions apart: the floor that a probe must pass."""

    accuracy: float
    auroc: float


def bag_of_words(train: Sequence[Example], held_out: Sequence[Example]) -> WordFloor:
    """The floor under a probe's held-out accuracy and AUROC: a logistic regression on TF-IDF.

    Learns from the completions of ``train`` and reads the whole completions of ``held_out``; split
    as the probe's fit does, by ``concepts.split``. NaN where ``train`` has one class only or
    ``held_out`` is empty, and an AUROC of NaN where that has one class only. Raises TrimtabError
    without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise TrimtabError(
            'a bag of words takes scikit-learn, which is missing: pip install "trimtab[evals]"'
        ) from None
    y, wanted = ([is_present(e) for e in part] for part in (train, held_out))
    if len(set(y)) < 2 or not wanted:
        return WordFloor(float("nan"), float("nan"))
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    try:
        x = words.fit_transform([e.completion for e in train])
    except ValueError:  # no word at all: every guess is as good
        return WordFloor(sum(wanted) / len(wanted), 0.5)
    fit = LogisticRegression(max_iter=1000).fit(x, y)
    margin = fit.decision_function(words.transform([e.completion for e in held_out]))
    right = [bool(m > 0) == label for m, label in zip(margin, wanted, strict=True)]
    both = len(set(wanted)) == 2
    auroc = float(roc_auc_score(wanted, margin)) if both else float("nan")
    return WordFloor(sum(right) / len(right), auroc)
