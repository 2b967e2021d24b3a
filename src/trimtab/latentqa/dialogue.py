"""The decoder's input: placeholders, a fixed answer, a question and its answer, as token ids.

Knows a tokenizer's template through ``chat.layout``; knows no model and no activations. Nothing is
looked up by a model's name: where the parts stand is read off the tokenizer's own offsets.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from trimtab import chat
from trimtab.errors import ChatError

OPENING = "Sure, I've analyzed the assistant."
ROLE = "reflect"  # what the decoder is called in its own turns, where the template writes it
_PLACEHOLDERS = ("?", "_", "x", "a", "0")  # the first that is one token in its place is taken


class Row(NamedTuple):
    """One row of the decoder: its placeholders are ids[start : start + slots].

    The labels are ids[answer:], the answer and its end token; a row to be answered ends there.
    """

    ids: list[int]
    start: int
    slots: int
    answer: int

    @property
    def labels(self) -> list[int]:
        """The ids that the decoder is to predict."""
        return self.ids[self.answer :]


@dataclass(frozen=True)
class Dialogue:
    """How a decoder is asked, in its tokenizer's own template.

    ``role`` names the decoder's own turns where the template takes such a role, else they are the
    assistant's. ``ends`` are tokens that may end an answer, beside the tokenizer's special ones.
    """

    tokenizer: Any
    role: str = ROLE
    opening: str = OPENING
    ends: Collection[int] = field(default=())

    @cached_property
    def speaker(self) -> str:
        """The role of the decoder's turns, as far as the template allows."""
        if self.role == "assistant":
            return "assistant"
        try:
            chat.layout(self.tokenizer, self._messages("?", "?", "?", self.role))
        except ChatError:
            return "assistant"
        return self.role

    @cached_property
    def placeholder(self) -> tuple[str, int]:
        """Text and id of the token that stands where an activation is written."""
        for text in _PLACEHOLDERS:
            laid = chat.layout(self.tokenizer, self._messages(text, "?", "?", self.speaker))
            start, end = laid.spans[0]
            alone = end - start == 1
            if alone and chat.decode_token(self.tokenizer, laid.ids[start]).strip() == text:
                return text, laid.ids[start]
        raise ChatError(
            f"none of {_PLACEHOLDERS} is one token in the first turn of this tokenizer's template"
        )

    def row(self, shown: int | str, question: str, answer: str | None = None) -> Row:
        """A row with ``shown`` placeholders (or with a text in their place), ready to be answered.

        With ``answer`` it is followed by that and the token that ends it. Raises ChatError.
        """
        text = self.placeholder[0] if isinstance(shown, int) else shown
        turns = self._messages(text, question, answer or "The", self.speaker)
        laid = chat.layout(self.tokenizer, turns, answer=True)
        start, end = laid.spans[0]
        begin, stop = laid.spans[3]
        tail = laid.ids[begin : self._end(laid.ids, stop)] if answer is not None else []
        count = shown if isinstance(shown, int) else end - start
        middle = [self.placeholder[1]] * count if isinstance(shown, int) else laid.ids[start:end]
        front = laid.ids[:start] + middle + laid.ids[end:begin]
        if answer is not None and not answer.strip():
            raise ChatError(f"the answer to {question!r} is empty; a reader learns from text")
        return Row(front + tail + self._missing_end(tail), start, count, len(front))

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether an answer has ended with its last token."""
        return bool(ids) and ids[-1] in self._ends

    @cached_property
    def _ends(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset([*self.ends, *(i for i, token in added.items() if token.special)])

    def _end(self, ids: Sequence[int], stop: int) -> int:
        """Through the first token after the answer that ends it; none of the closers before it."""
        found = (i for i in range(stop, len(ids)) if ids[i] in self._ends)
        return next(found, stop - 1) + 1

    def _missing_end(self, tail: Sequence[int]) -> list[int]:
        """The end token for templates that write none after an answer."""
        end = self.tokenizer.eos_token_id
        return [] if not tail or tail[-1] in self._ends or end is None else [end]

    def _messages(self, shown: str, question: str, answer: str, role: str) -> list[dict[str, str]]:
        turns = (("user", shown), (role, self.opening), ("user", question), (role, answer))
        return [{"role": role, "content": text} for role, text in turns]
