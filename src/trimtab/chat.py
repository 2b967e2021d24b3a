"""Chat: prompts and conversations become token ids with exact spans, by the tokenizer's template.

Knows tokenizers, their templates and padding. Knows nothing of models, layers or edits, and no
model's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import ChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Prompt = str | Sequence[Mapping[str, Any]]
    Message = dict[str, Any]

# What a conversation looks like for a tokenizer without a chat template: a chat template like any
# other. Newlines sit inside expressions, because Jinja removes a newline that follows a tag.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ('' if loop.first else '\\n') + 'Answer: ' + message['content'] | trim }}"
    "{% elif message['role'] in ['user', 'system'] %}"
    "{{ ('' if loop.first else '\\n\\n') + ('Question: ' if message['role'] == 'user' else '') }}"
    "{{ message['content'] | trim }}"
    "{% else %}"
    "{{ raise_exception('plain text has the roles system, user and assistant only') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)
"""The default for conversations on a tokenizer without a chat template, as a Jinja chat template.

System text is a paragraph of its own; each turn is `Question: ...\\nAnswer: ...`; turns are
separated by a blank line; the prompt ends with `Answer:`.
"""

# Texts put before a piece so that it is tokenised as the inside of a text; tried in order, because
# a tokenizer may merge one of them with the start of the piece.
_ANCHORS = ("\n", ":", "x")
_MARKS = ("[[ANSWER 1]]", "[[ANSWER 2]]")  # stand-ins for answers, to find their places


class Encoded(NamedTuple):
    """One row of token ids: the first `prompt_len` are the prompt, the rest are the answer."""

    ids: list[int]
    prompt_len: int


class Layout(NamedTuple):
    """A conversation as token ids, and where each message's content stands: [start, end)."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True, eq=False, init=False)
class Batch:
    """Padded rows of token ids that carry their own prompt lengths.

    `ids` [B, T]; `mask` [B, T], 1 = a real token (default: all are); `prompt_len` [B], how many
    real tokens of each row are its prompt (default: all of them), the remaining real tokens are its
    answer. All three are long, on the device of `ids`. Raises ChatError for shapes that disagree.

    >>> batch = Batch(torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    >>> batch.prompt_len.tolist()
    [2, 3]
    """

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    prompt_len: Tensor  # [B]

    def __init__(
        self, ids: Tensor, mask: Tensor | None = None, prompt_len: Tensor | None = None
    ) -> None:
        ids = _whole(ids, "ids", "[B, T]", 2)
        mask = torch.ones_like(ids) if mask is None else _whole(mask, "mask", "[B, T]", 2)
        if mask.shape != ids.shape:
            raise ChatError(
                f"mask has shape {list(mask.shape)}, ids have {list(ids.shape)}: both are [B, T]"
            )
        mask = mask.to(ids.device)
        lengths = mask.sum(1)
        prompt_len = lengths if prompt_len is None else _whole(prompt_len, "prompt_len", "[B]", 1)
        if len(prompt_len) != len(ids):
            raise ChatError(f"prompt_len has {len(prompt_len)} rows, ids have {len(ids)}")
        prompt_len = prompt_len.to(ids.device)
        if bool(((prompt_len < 0) | (prompt_len > lengths)).any()):
            raise ChatError(
                f"prompt_len {prompt_len.tolist()} does not lie within the rows' real tokens "
                f"{lengths.tolist()}: it counts real tokens of the prompt, without padding"
            )
        for name, value in (("ids", ids), ("mask", mask), ("prompt_len", prompt_len)):
            object.__setattr__(self, name, value)

    @property
    def lengths(self) -> Tensor:
        """[B] how many real tokens each row has."""
        return self.mask.sum(1)

    @property
    def positions(self) -> Tensor:
        """[B, T] the position of each real token in its row, from 0; 0 for padding."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.prompt_len.to(device))

    def rows(self, index: Sequence[int]) -> Batch:
        """These rows, in this order, as wide as before (so they line up with logits [B, T, V])."""
        chosen = torch.as_tensor(list(index), dtype=torch.long, device=self.ids.device)
        return Batch(self.ids[chosen], self.mask[chosen], self.prompt_len[chosen])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> Batch:
        if isinstance(index, slice):
            return self.rows(range(len(self))[index])
        return self.rows([range(len(self))[index]])  # the range raises IndexError


def encode(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    answer: str | Sequence[int] | None = None,
    *,
    raw: bool = False,
    system: str | None = None,
) -> Encoded:
    """Token ids of a prompt and its answer, with the exact length of the prompt.

    `prompt`: a str is one user turn (plain text for a tokenizer without a chat template); a list of
    {"role", "content"} is a conversation (`PLAIN` where there is no template), whose last assistant
    message is the answer unless `answer` is given. `answer`: text, or token ids that are appended
    as they are. `raw`: the prompt is plain text, with the tokenizer's own BOS. `system`: a system
    message in front, or in the first user turn where the template takes none; a conversation's own
    leading system message is put there too.

    The prompt's ids are exactly those of the template's generation prompt; the answer's are those
    of the answer in its place, without the template's closers. The text of a special token becomes
    that token, in prompts and answers alike. Raises ChatError.
    """
    _check(tokenizer, answer, system)
    assert tokenizer is not None
    if isinstance(prompt, str):
        if raw or not tokenizer.chat_template:
            return _encode_text(tokenizer, _plain_text(prompt, raw, system), answer)
        if not prompt:
            raise ChatError("the prompt is an empty string: give it at least one character")
        prompt = [{"role": "user", "content": prompt}]
    elif raw:
        raise ChatError(f"raw=True takes plain text, got {_shown(prompt)}: join it to one str")
    messages = _messages(prompt)
    if answer is None and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    return _encode_chat(tokenizer, _with_system(tokenizer, messages, system), answer)


def layout(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    system: str | None = None,
    prompt: bool = False,
    answer: bool = False,
) -> Layout:
    """Token ids of a whole conversation, and which of them are each message's content.

    The contents are found by the tokenizer's own offsets: a token that holds a character of a
    content belongs to it. `prompt` ends the ids with the template's generation prompt; otherwise
    they end as the template ends its last message. With `answer` no token straddles the start of
    the last content: what stands before it is tokenised as if the model were about to write it.
    `system` is as in `encode`, and has no span. Raises ChatError, also without offsets.
    """
    _check(tokenizer, None, system)
    assert tokenizer is not None
    real = _messages(messages)
    marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(real)]
    if not tokenizer.is_fast:
        raise ChatError(f"{type(tokenizer).__name__} has no offsets: load the fast tokenizer")
    text, frame = (
        _render(tokenizer, _with_system(tokenizer, m, system), prompt) for m in (real, marked)
    )
    where = _contents(text, frame, [m["content"] for m in real], [m["content"] for m in marked])
    ids, offsets = _ids_and_offsets(tokenizer, text)
    if answer:  # spaces before an answer belong to it, as in `encode`
        where[-1] = len(text[: where[-1][0]].rstrip(" ")), where[-1][1]
        ids, offsets = _parted(tokenizer, text, where[-1][0])
    return Layout(ids, [_covering(offsets, start, end) for start, end in where])


def _contents(
    text: str, frame: str, contents: list[str], marks: list[str]
) -> list[tuple[int, int]]:
    """Where the contents stand in `text`, given the same text with marks in their places."""
    found: list[tuple[int, int]] = []
    ends = [frame.find(mark) for mark in marks]
    tails = [
        frame[end + len(mark) : after if after >= 0 else None]
        for end, mark, after in zip(ends, marks, [*ends[1:], -1], strict=True)
    ]
    cursor = ends[0]
    for content, tail in zip(contents, tails, strict=True):
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        last = len(found) + 1 == len(contents)
        fits = (f for f in forms if text.startswith(f + tail, cursor))
        form = next((f for f in fits if not last or cursor + len(f + tail) == len(text)), None)
        if form is None or min(ends) < 0:
            raise ChatError(
                f"the chat template does not write {_shown(content)} as it is: give the message "
                "another role, or text without the template's own marks"
            )
        found.append((cursor, cursor + len(form)))
        cursor += len(form) + len(tail)
    return found


def _ids_and_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids as `encode` makes them, and the characters of each; a BOS in front has none."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(made["input_ids"]), [(int(a), int(b)) for a, b in made["offset_mapping"]]
    if tokenizer.chat_template:  # a template writes its own BOS, PLAIN does not
        return ids, offsets
    front = _ids_with_bos(tokenizer, text)
    front = front[: len(front) - len(ids)]
    return front + ids, [(0, 0)] * len(front) + offsets


def _parted(
    tokenizer: PreTrainedTokenizerBase, text: str, at: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text in which no token straddles character `at`."""
    joint, offsets = _ids_and_offsets(tokenizer, text)
    front, front_offsets = _ids_and_offsets(tokenizer, text[:at])
    if joint[: len(front)] == front:
        return joint, offsets
    for anchor in (*_ANCHORS, ""):
        made = tokenizer(
            anchor + text[at:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        head = _ids(tokenizer, anchor) if anchor else []
        if list(made["input_ids"])[: len(head)] == head:
            break
    rest, moved = list(made["input_ids"])[len(head) :], made["offset_mapping"][len(head) :]
    shift = at - len(anchor)
    return front + rest, front_offsets + [(int(a) + shift, int(b) + shift) for a, b in moved]


def _covering(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that hold a character of [start, end)."""
    held = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if held:
        return held[0], held[-1] + 1
    at = next((i for i, (a, _) in enumerate(offsets) if a >= start), len(offsets))
    return at, at


def pad(rows: Sequence[Encoded], pad_id: int, *, side: Literal["left", "right"] = "left") -> Batch:
    """Rows of several lengths as one Batch, filled with `pad_id` on one side (mask 0 there)."""
    if side not in ("left", "right"):
        raise ChatError(f'side is "left" or "right", got {side!r}')
    if not rows:
        raise ChatError("there are no rows to pad: give at least one prompt")
    width = max(len(row.ids) for row in rows)
    ids, mask = [], []
    for row in rows:
        gap, real = width - len(row.ids), [1] * len(row.ids)
        left, right = (gap, 0) if side == "left" else (0, gap)
        ids.append([pad_id] * left + list(row.ids) + [pad_id] * right)
        mask.append([0] * left + real + [0] * right)
    lengths = torch.tensor([row.prompt_len for row in rows], dtype=torch.long)
    return Batch(torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long), lengths)


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id to fill with: the tokenizer's pad token, else its end token, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if isinstance(token, int):
            return token
    return 0


def decode(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int] | Tensor) -> str:
    """The text of one row of ids, without special tokens and with its spaces as they are."""
    _check(tokenizer, None, None)
    assert tokenizer is not None
    row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if not all(isinstance(token, int) for token in row):
        raise ChatError(f"decode takes one row of token ids, got {_shown(ids)}")
    text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def decode_token(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """The text of one token, special tokens included."""
    _check(tokenizer, None, None)
    assert tokenizer is not None
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def follow_up(
    tokenizer: PreTrainedTokenizerBase | None, question: str, words: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """What stands between an answer and the next one, with a user's question there.

    Ids from the end of an answer to where the template begins the next (a template with thoughts
    writes a finished answer, without one), and the ids of each of `words` as that next answer.
    They go after the exact ids of a prompt and its answer. Raises ChatError.
    """
    _check(tokenizer, None, None)
    assert tokenizer is not None
    roles, texts = ("user", "assistant") * 2, ("Hello.", _MARKS[0], question, _MARKS[1])
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    text = _render(tokenizer, turns, prompt=False)
    start, end = text.find(_MARKS[0]) + len(_MARKS[0]), text.rfind(_MARKS[1])
    if _MARKS[0] not in text or end < start:
        raise ChatError("the chat template does not show earlier answers; give it one that does")
    head = text[start:end].rstrip(" ")  # a space before a word belongs to the word's first token
    gap, ids = text[start + len(head) : end], _ids_inside(tokenizer, head)
    joint = [_ids_inside(tokenizer, head + gap + word) for word in words]
    apart = [_ids_inside(tokenizer, gap + word) for word in words]
    found: list[list[int]] = [
        j[len(ids) :] if j[: len(ids)] == ids else a for j, a in zip(joint, apart, strict=True)
    ]
    return ids, found


# -- text to ids ----------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _ids_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokenizer's usual ids, with one BOS at most and no appended end token."""
    bos = tokenizer.bos_token
    if bos and text.startswith(bos):
        return _ids(tokenizer, text)
    ids, end = _ids(tokenizer, text, special=True), tokenizer.eos_token_id
    # Some tokenizers close a text with an end token: the answer would come after its own end.
    if len(ids) > 1 and ids[-1] == end and _ids(tokenizer, text)[-1:] != [end]:
        ids = ids[:-1]
    return ids


def _ids_inside(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    """Ids of a text as it stands inside another: no invented prefix space, as sentencepiece has."""
    for anchor in _ANCHORS:
        head, joint = _ids(tokenizer, anchor), _ids(tokenizer, anchor + piece)
        if head and joint[: len(head)] == head:
            return joint[len(head) :]
    return _ids(tokenizer, piece)


def _join(
    tokenizer: PreTrainedTokenizerBase, text: str, piece: str, ids: list[int], special: bool
) -> Encoded:
    """Prompt ids followed by the ids of a piece of text that continues `text`.

    Both are tokenised as one text. Where a token straddles the boundary the prompt keeps its ids,
    because they are what the model sees when it generates.
    """
    encoder = _ids_with_bos if special else _ids
    joint = encoder(tokenizer, text + piece)
    if joint[: len(ids)] == ids:
        return Encoded(joint, len(ids))
    return Encoded(ids + _ids_inside(tokenizer, piece), len(ids))


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, answer: str | Sequence[int] | None
) -> Encoded:
    ids = _ids_with_bos(tokenizer, text)
    if not ids:
        raise ChatError(f"the text {text!r} gives no tokens: write something for the model to read")
    if isinstance(answer, str):
        return _join(tokenizer, text, answer, ids, special=True)
    return Encoded(ids + list(answer or ()), len(ids))


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    answer: str | Sequence[int] | None,
) -> Encoded:
    text = _render(tokenizer, messages)
    special = not tokenizer.chat_template  # a template writes its own BOS, PLAIN does not
    ids = _ids_with_bos(tokenizer, text) if special else _ids(tokenizer, text)
    if not ids:
        raise ChatError(f"the chat template makes no text of {_shown(messages)}")
    if not isinstance(answer, str):
        return Encoded(ids + list(answer or ()), len(ids))
    full = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], prompt=False)
    return _join(tokenizer, text, _answer_piece(text, full, answer), ids, special)


# -- templates ------------------------------------------------------------------------------------


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = True
) -> str:
    """The conversation as text; `prompt` ends it where the model is to begin its answer."""
    template = None if tokenizer.chat_template else PLAIN
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
    except Exception as error:  # templates are programs: they raise whatever they like
        roles = [message["role"] for message in messages]
        raise ChatError(
            f"the chat template refuses a conversation with the roles {roles}: {error}. "
            "Give it the roles it takes (a system text can be given as system=...), or raw=True"
        ) from error
    return str(text)


def _answer_piece(text: str, full: str, answer: str) -> str:
    """What follows the prompt's text: the answer with the spaces that the template gives it.

    `full` is the conversation rendered with the answer. Most templates write the answer directly
    after the prompt's text, some strip it, some put a space before it; closers are left out. A
    template that writes something else in between (an empty thought, say) is not followed there:
    the model answers after the generation prompt as it is.
    """
    core = answer.strip()
    direct = full.startswith(text)
    after = full[len(text) if direct else _common(text, full) :]
    if not (direct and core and after.lstrip().startswith(core)):
        return core if core in after and answer not in after else answer
    end = len(after) - len(after.lstrip()) + len(core)
    tail = answer[len(answer.rstrip()) :]
    return after[: end + len(tail)] if after.startswith(tail, end) else after[:end]


def _common(a: str, b: str) -> int:
    """How many characters two texts share from the start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _with_system(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], system: str | None
) -> list[Message]:
    """The conversation with the system text in front, or in its first user turn if it must be.

    A system message that leads the conversation is treated alike, whatever the template takes.
    """
    if messages and messages[0]["role"] == "system" and (system is not None or len(messages) > 1):
        own, messages = messages[0]["content"], messages[1:]
        system = own if system is None else f"{system}\n\n{own}"
    if system is None:
        return _some(messages)
    fronted = [{"role": "system", "content": system}, *messages]
    user = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if user is None or _shows(tokenizer, fronted, system):
        return fronted
    if not system.strip():
        return messages
    merged = {**messages[user], "content": f"{system}\n\n{messages[user]['content']}"}
    return [*messages[:user], merged, *messages[user + 1 :]]


def _shows(tokenizer: PreTrainedTokenizerBase, messages: list[Message], system: str) -> bool:
    """Whether the template takes the system text: some raise, some drop it without a word."""
    text = system.strip()
    try:
        shown = _render(tokenizer, messages).count(text)
    except ChatError:
        return False
    return bool(shown > sum(message["content"].count(text) for message in messages[1:]))


# -- checks ---------------------------------------------------------------------------------------


def _check(tokenizer: object, answer: object, system: object) -> None:
    if tokenizer is None:
        raise ChatError("there is no tokenizer: load the model with one, or give token ids (Batch)")
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ChatError(f"the tokenizer is a {type(tokenizer).__name__}: give a transformers one")
    if not (answer is None or isinstance(answer, str) or _are_ids(answer)):
        raise ChatError(f"an answer is text or a list of token ids, got {_shown(answer)}")
    if not (system is None or isinstance(system, str)):
        raise ChatError(f"system is text, got {_shown(system)}")


def _are_ids(answer: object) -> bool:
    return isinstance(answer, list | tuple) and all(
        isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in answer
    )


def _plain_text(prompt: str, raw: bool, system: str | None) -> str:
    if raw and system is not None:
        raise ChatError("raw text has no system turn: write the system text into the prompt")
    if not (raw or prompt):
        raise ChatError("the prompt is an empty string: give it at least one character")
    return prompt if system is None else f"{system}\n\n{prompt}"


def _messages(prompt: object) -> list[Message]:
    """A checked copy of a conversation."""
    if not isinstance(prompt, list | tuple):
        raise ChatError(f"a prompt is text or a list of messages, got {_shown(prompt)}")
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ChatError(
                f"message {i} is {_shown(message)}: "
                'each message is {"role": "user", "content": "..."}, both text'
            )
    return [dict(message) for message in _some(list(prompt))]


def _some(messages: list[Message]) -> list[Message]:
    if not messages:
        raise ChatError("the conversation has no message to answer: give at least one user turn")
    return messages


def _whole(value: object, name: str, shape: str, dims: int) -> Tensor:
    """A long tensor with so many dimensions, or an error that names what was given."""
    if not isinstance(value, Tensor):
        raise ChatError(f"{name} is a tensor {shape}, got {_shown(value)}")
    if value.dim() != dims:
        raise ChatError(f"{name} has shape {list(value.shape)}: it should be {shape}")
    if value.is_floating_point() or value.is_complex():
        raise ChatError(f"{name} holds {value.dtype}: it should be whole numbers (torch.long)")
    return value.long()


def _shown(value: object) -> str:
    """A value for an error message: its type and the first of its text."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
