"""What a reader learns from: dialogues with a hidden instruction, and questions about it.

Knows text, JSON and the conversation that the target reads; knows no activations and no decoder.
The formats are those of LatentQA (Pan et al. 2024, arXiv 2412.08686).
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimtab import chat
from trimtab.artifact import user_path, write_file
from trimtab.errors import ArtifactError, ChatError

Kind = Literal["system", "control", "stimulus", "stimulus_completion"]
Pair = tuple[str, str]  # a question and its answer
Pairs = tuple[Pair, ...]

TURNS = {  # in the order in which the target reads them
    "system": "system",
    "control_user": "user",
    "control_model": "assistant",
    "stimulus_user": "user",
    "stimulus_model": "assistant",
}


@dataclass(frozen=True)
class Item:
    """A dialogue that the target reads, a ``label`` for what it was told, and ``qa`` about that.

    The turns before the stimulus (a system text, or a control turn and its answer) are what the
    questions ask about; their activations are not shown to the decoder. A control turn that stands
    alone is shown. Raises ChatError for turns that make none of the four kinds.
    """

    label: str = ""
    system: str | None = None
    control_user: str | None = None
    control_model: str | None = None
    stimulus_user: str | None = None
    stimulus_model: str | None = None
    qa: Pairs = ()

    def __post_init__(self) -> None:
        have = tuple(name for name in TURNS if getattr(self, name) is not None)
        if have not in _KINDS:
            known = "; ".join(" + ".join(turns) for turns in _KINDS)
            raise ChatError(
                f"item {self.label!r} has the turns {' + '.join(have) or 'none'}; give one of "
                f"these: {known}"
            )

    @property
    def kind(self) -> Kind:
        """Which of the four kinds of dialogue this is."""
        return _KINDS[tuple(name for name in TURNS if getattr(self, name) is not None)]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole dialogue, as the target reads it."""
        turns = ((role, getattr(self, name)) for name, role in TURNS.items())
        return [{"role": role, "content": text} for role, text in turns if text is not None]

    @property
    def hidden(self) -> int:
        """How many of the first messages are not shown to the decoder."""
        return 0 if self.kind == "control" else len(self.messages) - self._shown

    @property
    def _shown(self) -> int:
        return 1 if self.stimulus_model is None else 2


_KINDS: dict[tuple[str, ...], Kind] = {
    ("system", "stimulus_user"): "system",
    ("system", "stimulus_user", "stimulus_model"): "system",
    ("control_user",): "control",
    ("control_user", "stimulus_user"): "stimulus",
    ("control_user", "control_model", "stimulus_user"): "stimulus",
    ("control_user", "stimulus_user", "stimulus_model"): "stimulus_completion",
    ("control_user", "control_model", "stimulus_user", "stimulus_model"): "stimulus_completion",
    ("stimulus_user",): "stimulus",
    ("stimulus_user", "stimulus_model"): "stimulus_completion",
}


class Seen(NamedTuple):
    """Token ids that the target reads, and where the shown ones begin; they go on to the end."""

    ids: list[int]
    start: int


def seen(tokenizer: Any, item: Item | Sequence[Mapping[str, str]] | str, hidden: int = 0) -> Seen:
    """The target's input for an item (or a prompt, or a conversation), with its shown tokens.

    Shown are the tokens from the first content token of the first message that is not hidden, to
    the end: closers, later turns, and the template's generation prompt (a dialogue that ends with
    an answer ends with that answer's last token).
    """
    if isinstance(item, Item):
        messages, hidden = item.messages, item.hidden
    else:
        messages = chat._messages(
            [{"role": "user", "content": item}] if isinstance(item, str) else item
        )
    if not 0 <= hidden < len(messages):
        raise ChatError(f"{hidden} of {len(messages)} messages are hidden; leave one to be shown")
    system = None
    if messages[0]["role"] == "system" and len(messages) > 1:
        # Given apart, because some templates take it only inside the first user turn.
        system, messages, hidden = messages[0]["content"], messages[1:], max(hidden - 1, 0)
    answered = messages[-1]["role"] == "assistant"
    laid = chat.layout(tokenizer, messages, system=system, prompt=not answered)
    end = laid.spans[-1][1] if answered else len(laid.ids)
    return Seen(laid.ids[:end], laid.spans[hidden][0])


# -- reading files ---------------------------------------------------------------------------------


def read_items(source: Any) -> list[Item]:
    """Items from a .json or .jsonl file (a list of such), from dicts, or as they are.

    Unknown keys are left out; ``qa`` inside an item is kept. Raises ArtifactError, ChatError.
    """
    if isinstance(source, str | Path):
        return [_item(row) for row in _rows(user_path(source))]
    if isinstance(source, Item | Mapping):
        source = [source]
    listed = list(source)
    if any(isinstance(one, str | Path) for one in listed):
        return [item for one in listed for item in read_items(one)]
    return [one if isinstance(one, Item) else _item(one) for one in listed]


def write_items(items: Iterable[Item], path: str | Path) -> None:
    """Items as a .jsonl file that ``read_items`` gives back. Raises ArtifactError."""
    rows = ({k: v for k, v in asdict(item).items() if v not in (None, ())} for item in items)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_file(path, "".join(lines).encode())


def read_qa(source: Any) -> dict[str, Pairs]:
    """Questions and answers by label, from a .json or .jsonl file or a mapping.

    A line of JSONL is {"label": ..., "qa": [[question, answer], ...]}; lines with the same label
    add up. A control file ({prompt: [[question, answer], ...]}) has the form of the mapping.
    """
    if isinstance(source, str | Path):
        file = user_path(source)
        if file.suffix == ".jsonl":
            return _by_label(file)
        source = _json(file)
    if not isinstance(source, Mapping):
        raise ArtifactError(
            f"qa is a mapping {{label: [[question, answer], ...]}}, not a {type(source).__name__}"
        )
    return {str(label): _pairs(pairs) for label, pairs in source.items()}


def attach(items: Iterable[Item], qa: Mapping[str, Pairs] | None) -> list[Item]:
    """Items with the QA of their label, beside what they have; items with none are left out."""
    table = qa or {}
    joined = (replace(i, qa=tuple(dict.fromkeys(i.qa + table.get(i.label, ())))) for i in items)
    return [item for item in joined if item.qa]


def split(
    items: Sequence[Item], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Items for training and items with labels that are never trained on.

    Of two labels or more, at least one is on either side, unless ``held_out`` is 0.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a fraction in [0, 1), not {held_out!r}")
    labels = sorted({item.label for item in items})
    random.Random(seed).shuffle(labels)
    count = max(1, round(held_out * len(labels))) if held_out else 0
    aside = set(labels[: min(count, max(0, len(labels) - 1))])
    kept = [item for item in items if item.label not in aside]
    return kept, [item for item in items if item.label in aside]


# -- questions from templates ----------------------------------------------------------------------

_ROLE = re.compile(
    r"(?:adopt|take on|assume|embody|play|act as|pretend to be)\s+(?:the\s+|a\s+)?"
    r"(?:persona|role|identity|character|perspective|mindset|point of view)\s+of\s+(.+?)[.!]?$"
)
_FILLER = re.compile(
    r"^(?:(?:please|kindly)\b,?\s*|(?:in|for|throughout|during) (?:your|our) (?:(?:next|future|"
    r"upcoming|following) )?(?:responses?|messages?|repl(?:y|ies)|answers?|conversations?|"
    r"sentences?|interactions?),?\s*|(?:could|can|would) you (?:please )?|i(?:'d| would) like you "
    r"to |i want you to |make (?:every|an) effort to |make sure (?:to|that) |make it a point to |"
    r"try (?:your best |hard )?to |do your (?:very )?best to |ensure (?:that )?|be sure to |"
    r"you (?:will |should |must |are to )?(?!'))+",
    re.IGNORECASE,
)
_SWAP = {
    "your": "its",
    "yours": "its own",
    "you": "it",
    "yourself": "itself",
    "my": "the user's",
    "mine": "the user's",
    "me": "the user",
    "i": "the user",
    "you're": "it is",
    "you've": "it has",
    "i'm": "the user is",
    "i've": "the user has",
    "our": "the",
    "us": "the user and the assistant",
}
_WORD = re.compile(r"[A-Za-z']+")


def template_qa(item: Item) -> Pairs:
    """Questions and answers made from the text of an item's instruction, without a model.

    The instruction's own sentences are turned into the third person. What comes out is a template's
    work: repetitive, sometimes clumsy, and never more than the instruction says. Which wording is
    taken depends on the label only.
    """
    told = item.system or item.control_user
    if told is None:
        return ()
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(told.split())) if s]
    pick = random.Random(item.label or told)
    return _first_pair(sentences[0], pick) + _rest_pair(sentences[1:], pick)


_PERSONA = (
    "What type of persona will the assistant adopt?",
    "Please describe the persona of the assistant.",
    "Who is the assistant going to be?",
)
_GOAL = (
    "What is the assistant's goal in the conversation?",
    "What will the assistant do in its responses?",
    "What was the assistant asked to do?",
)
_MANNER = (
    "How will the assistant express itself?",
    "How does the assistant's persona shape its responses to user queries?",
    "What characterises the assistant's responses?",
)


def _first_pair(sentence: str, pick: random.Random) -> Pairs:
    if role := _ROLE.search(sentence):
        text = f"The assistant will adopt the persona of {third_person(role[1])}."
        return ((pick.choice(_PERSONA), text),)
    return ((pick.choice(_GOAL), _clause(sentence)),)


def _rest_pair(sentences: Sequence[str], pick: random.Random) -> Pairs:
    if not sentences:
        return ()
    return ((pick.choice(_MANNER), " ".join(_clause(s) for s in sentences[:2])),)


def _clause(sentence: str) -> str:
    """ "Please try to be brief." -> "The assistant will be brief."""
    bare = _FILLER.sub("", sentence).rstrip(".!? ")
    return f"The assistant will {third_person(bare[:1].lower() + bare[1:])}."


def third_person(text: str) -> str:
    """The same words about an assistant and a user instead of you and me."""
    return _WORD.sub(lambda m: _SWAP.get(m[0].lower(), m[0]), text)


def sentence_qa(sentence: str) -> Pairs:
    """What a decoder should say of an assistant that was told ``sentence``, from templates.

    The sentence is an instruction ("talk about bridges") or what to be ("a passionate vegan").
    """
    bare = _FILLER.sub("", " ".join(sentence.split())).rstrip(".!? ")
    if not bare:
        raise ChatError(f"there is no behaviour in {sentence!r}; write for example 'be a pirate'")
    does = third_person(bare[:1].lower() + bare[1:])
    if re.match(r"(an?|the)\b|\S+$", does):
        does = f"be {does}"
    who = does.removeprefix("be ") if re.match("be (an?|the) ", does) else f"one that will {does}"
    return (
        (
            "What type of persona will the assistant adopt?",
            f"The assistant will adopt the persona of {who}.",
        ),
        ("What is the assistant's goal in the conversation?", f"The assistant will {does}."),
        ("How will the assistant express itself?", f"The assistant will {does} in every answer."),
        (
            "How does the assistant's persona shape its responses to user queries?",
            f"Whatever the user asks, the assistant will {does}.",
        ),
    )


# -- files -----------------------------------------------------------------------------------------


def _by_label(file: Path) -> dict[str, Pairs]:
    table: dict[str, Pairs] = {}
    for row in _rows(file):
        if not isinstance(row, Mapping) or row.get("label") is None:
            raise ArtifactError(
                f"{file} has a line without a label, {row!r:.60}; a line is "
                '{"label": ..., "qa": [[question, answer], ...]}'
            )
        label = str(row["label"])
        table[label] = table.get(label, ()) + _pairs(row.get("qa"))
    return table


def _item(row: Any) -> Item:
    if not isinstance(row, Mapping):
        raise ChatError(f"an item is a JSON object with turns and a label, not {row!r:.60}")
    turns = {name: row.get(name) for name in TURNS}
    if wrong := [n for n, v in turns.items() if not (v is None or isinstance(v, str))]:
        raise ChatError(
            f"item {row.get('label')!r}: {wrong[0]} is text, not {turns[wrong[0]]!r:.40}"
        )
    return Item(label=str(row.get("label") or ""), qa=_pairs(row.get("qa") or ()), **turns)


def _pairs(value: Any) -> Pairs:
    good = isinstance(value, list | tuple) and all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) and t for t in p)
        for p in value
    )
    if not good:
        raise ArtifactError(f"qa is a list of [question, answer], both text, not {value!r:.80}")
    return tuple((question, answer) for question, answer in value)


def _rows(file: Path) -> list[Any]:
    if file.suffix == ".jsonl":
        lines = _text(file).split("\n")  # and no other line end: JSON holds U+2028 as it is
        return [
            _parsed(line, f"{file} line {i}") for i, line in enumerate(lines, 1) if line.strip()
        ]
    rows = _json(file)
    if not isinstance(rows, list):
        raise ArtifactError(f"{file} holds a {type(rows).__name__}; items are a JSON list")
    return rows


def _json(file: Path) -> Any:
    return _parsed(_text(file), str(file))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {file}: {error}; give a .json or .jsonl file") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON ({error})") from None
