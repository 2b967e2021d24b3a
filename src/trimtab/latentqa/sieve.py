"""Sieve: what of a model's text can be used as training data for a reader.

Knows how weak models write questions and answers, and what must not be learned; knows no model, no
file and nothing of what was asked. The bounds were set on the data that Pan et al. published.
"""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from trimtab.writer import clean, json_in, known, plain_line

# In characters. Published: controls 56-461, questions 18-177, answers 8-383, stimuli 25-136.
LENGTHS = {
    "control": (12, 600),
    "question": (10, 300),
    "answer": (4, 600),
    "stimulus": (10, 300),
    "passage": (2, 1200),
}

# -- reading ---------------------------------------------------------------------------------------

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_END = re.compile(r"[.!?…][\"”'’)*]*(?=\s)")
_ASKS = re.compile(r"(?:Q|Question)\s*\d*\s*[:.)]\s*", re.IGNORECASE)
_SAYS = re.compile(r"(?:A|Answer)\s*\d*\s*[:.)]\s*", re.IGNORECASE)
_INLINE = re.compile(r"\s+(?=(?:A|Answer)\s?\d*:\s)")
_ALONE = re.compile(r"^(\W*(?:Q|Question|A|Answer)\s*\d*\s*[:.)][*\s]*)$\s*", re.I | re.M)
_NUMBER = re.compile(r"\s*\(?\d+[.):]")


def thoughtless(text: str) -> str:
    """A text without what a model thought before it spoke."""
    return _THOUGHT.sub("", text)


def passage(text: str) -> Iterator[str]:
    """A whole answer; a very long one up to its last sentence that fits. Paragraphs stay."""
    text = text.encode("utf-8", "replace").decode().strip()
    ends = [m.end() for m in _END.finditer(text) if m.end() <= LENGTHS["passage"][1]]
    if text:
        yield text[: ends[-1]] if ends and len(text) > LENGTHS["passage"][1] else text


def question_pairs(text: str) -> Iterator[list[str]]:
    """[question, answer] out of JSON, "Q: ... A: ...", or lines that end in a question mark.

    >>> list(question_pairs("1. Who is it? A pirate.\\n2. What does it want?\\n- Gold."))
    [['Who is it?', 'A pirate.'], ['What does it want?', 'Gold.']]
    """
    if found := [pair for value in json_in(text) for pair in _json_pairs(value)]:
        yield from found
        return
    text = _INLINE.sub("\n", _ALONE.sub(r"\1 ", text))  # a mark stands before what it marks
    rows = [(raw, plain_line(raw)) for raw in text.splitlines()]
    marked = any(_ASKS.match(line) for _, line in rows)
    question = ""
    answer: list[str] = []
    for raw, line in [*rows, ("", "")]:
        if _asks(raw, line, marked):
            if question and answer:
                yield [question, " ".join(answer)]
            question, said = _cut(_ASKS.sub("", line, count=1) if marked else line)
            answer = [said] if said else []
        elif question and (said := _SAYS.sub("", line, count=1) if _SAYS.match(line) else line):
            answer.append(said)
        elif question and answer and not line:
            yield [question, " ".join(answer)]
            question, answer = "", []


def _asks(raw: str, line: str, marked: bool) -> bool:
    if marked:
        return _ASKS.match(line) is not None
    asks = line.endswith("?") or (_NUMBER.match(raw) is not None and "?" in line)
    return asks and not _SAYS.match(line)


def _cut(line: str) -> tuple[str, str]:
    """A question, and the answer that stands on the same line, if any."""
    end = line.rindex("?") + 1 if "?" in line else len(line)
    return line[:end], line[end:].strip()


def _json_pairs(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        named = {str(key).lower()[:1]: v for key, v in value.items() if isinstance(v, str)}
        if {"q", "a"} <= named.keys():
            yield [clean(named["q"]), clean(named["a"])]
            return
        value = list(value.values())
    if isinstance(value, list):
        if len(value) == 2 and all(isinstance(part, str) for part in value):
            yield [clean(part) for part in value]
            return
        for part in value:
            yield from _json_pairs(part)


# -- filters ---------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial|(?:large )?language model)\b"
    r"|\bi(?:'m| am) (?:just |only |merely )?an? (?:ai|artificial|(?:large )?language model)\b"
    r"|\bsorry,? (?:but )?i (?:can't|cannot|can not|am not|am unable|won't)\b"
    r"|\bi(?: can't| cannot| can not| won't| am unable to|'m unable to) (?:help|assist|comply|"
    r"fulfil|provide|write|create|generate|engage|continue|answer|do that)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_COMMON = frozenset(
    _WORD.findall(
        "about after also and answer answers any are assistant because been being but can chat "
        "could did does each every for from give has have her here him his how into its itself "
        "like likely make may might model more most much must not one only other our out persona "
        "please question reply respond response responses say says she should some such tell than "
        "that the their them then there these they this those through user very was way were what "
        "when where which while who whom why will with would yes you your"
    )
)


def text_fault(
    text: str,
    found: Sequence[str],
    kind: str,
    *,
    told: str = "",
    topic: str = "",
    asked: str = "",
) -> str | None:
    """Which filter drops a text beside those that were ``found``; None: it is kept.

    "length", "refusal", "echo" (it repeats the wording of what was ``asked`` for), "leak" (it
    copies what the assistant was ``told``), "unrelated" (it shares no word with its ``topic``, if
    that has any) or "duplicate".
    """
    low, high = LENGTHS[kind]
    if not low <= len(text) <= high:
        return "length"
    if _REFUSAL.search(text.replace("’", "'")):
        return "refusal"
    if _run(text, asked) >= 6:
        return "echo"
    if told and _copies(text, told):
        return "leak"
    if (words := _stems(topic)) and not words & _stems(text):
        return "unrelated"
    return "duplicate" if known(text, found) else None


def pair_fault(
    pair: Sequence[str], found: Sequence[Sequence[str]], told: str, description: str
) -> str | None:
    """Which filter drops a question with its answer; None: they are kept.

    Those of a text, and "no question mark". An answer's topic is the question, the description and
    what the assistant was told.
    """
    question, answer = pair
    if "?" not in question:
        return "no question mark"
    return text_fault(question, [q for q, _ in found], "question", told=told) or text_fault(
        answer, [], "answer", told=told, topic=f"{told} {description} {question}"
    )


def _copies(text: str, told: str) -> bool:
    """Whether a text is hardly more than a piece of what was told, word by word.

    "The assistant will adopt the persona of ..." with the rest copied is more: published answers
    are like that, up to 0.87 of their words.
    """
    own = len(_words(text))
    return _words(text) == _words(told) or _run(text, told) >= max(5, 0.9 * own)


def _run(text: str, other: str) -> int:
    """How many words of one text stand in the other, one after the other."""
    matcher = SequenceMatcher(None, _words(text), _words(other), autojunk=False)
    return matcher.find_longest_match().size


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def _stems(text: str) -> set[str]:
    """The first letters of a text's words, without words that any answer has.

    Of the published answers about goals and personas, 0.99 share one with their topic, and 0.3 with
    that of another label; of the controls, 0.95 share one with their label and 0.05 with another.
    """
    return {w[:5] for w in _words(text) if len(w) > 2 and w not in _COMMON}
