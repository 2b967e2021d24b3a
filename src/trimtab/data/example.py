"""One labelled example, and how a row becomes one. Knows nothing of where rows come from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import ArtifactError

Message = dict[str, str]

ALIASES = {
    "prompt": ("prompt", "question", "instruction"),
    "completion": ("completion", "answer", "output", "response", "text", "statement"),
    "label": ("label",),
    "history": ("history", "conversation_history"),
}
EXPECTED = (
    "Expected keys: prompt (or question, instruction), completion (or answer, output, response; "
    "or text alone), and optionally label, history (or conversation_history). Name other columns "
    'with columns={"prompt": "their name", ...}.'
)


@dataclass(frozen=True)
class Example:
    """A prompt, one completion of it, and how much of the concept the completion shows.

    ``label`` is 1 where the concept is present and 0 where it is absent; values between are
    grades. ``history`` holds the messages before the prompt: dicts with ``role`` and ``content``,
    a list or a tuple. Raises ArtifactError for a history of another form.

    >>> Example("How are you?", "Splendid, thank you.").messages
    [{'role': 'user', 'content': 'How are you?'}]
    """

    prompt: str
    completion: str
    label: float = 1.0
    history: Sequence[Message] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", float(self.label))
        object.__setattr__(self, "history", tuple(_message(m) for m in self.history))

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the completion: the history, then the prompt as a user turn."""
        return [*(dict(m) for m in self.history), {"role": "user", "content": self.prompt}]


def from_row(row: object, where: str, columns: Mapping[str, str] | None = None) -> Example:
    """An Example from one row of a table; ``where`` names file and row in errors.

    ``columns`` maps our keys to the table's. Keys are compared without case. Raises ArtifactError.
    """
    if not isinstance(row, Mapping):
        raise ArtifactError(f"{where}: found {_show(row)} instead of an object. {EXPECTED}")
    found = _pick(row, where, columns or {})
    try:
        return Example(
            prompt=_text(found.get("prompt", ""), "prompt"),
            completion=_text(found["completion"], "completion"),
            label=_label(found.get("label", 1.0)),
            history=_history(found.get("history")),
        )
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error} {EXPECTED}") from None


def _pick(row: Mapping[Any, Any], where: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Our keys -> the row's values, by the given columns first, then by the aliases."""
    lower = {str(key).strip().lower(): value for key, value in row.items()}
    unknown = [key for key in columns if key not in ALIASES]
    if unknown:
        raise ArtifactError(f"columns={dict(columns)}: {unknown[0]!r} is not one of {[*ALIASES]}.")
    picked = {}
    for key, aliases in ALIASES.items():
        wanted = (columns[key].strip().lower(),) if key in columns else aliases
        name = next((alias for alias in wanted if alias in lower), None)
        if name is not None:
            picked[key] = lower[name]
        elif key in columns:
            raise ArtifactError(f"{where}: no column {columns[key]!r}; found {[*row]}.")
    # A bare statement is an example without a prompt; a question without its answer is an accident.
    bare = "prompt" not in picked and ("text" in lower or "statement" in lower)
    if "completion" not in picked or not ("prompt" in picked or "prompt" in columns or bare):
        raise ArtifactError(f"{where}: found keys {[*row]}. {EXPECTED}")
    if "instruction" in lower and "prompt" not in lower and isinstance(lower.get("input"), str):
        # The Alpaca form keeps the material to work on in a column of its own.
        picked["prompt"] = f"{picked['prompt']}\n\n{lower['input']}".strip()
    return picked


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ArtifactError(f"{key} is {_show(value)}, not text.")
    return value


def _label(value: object) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        number = words.get(str(value).strip().lower())
        number = float(value) if number is None else number  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ArtifactError(f"label is {_show(value)}, not a number (1 = present, 0 = absent).")
    return number


def _history(value: object) -> list[Message]:
    if isinstance(value, str) and value.strip():  # a CSV cell holds it as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise ArtifactError(f"history is {_show(value)}, not JSON.") from None
    if not value:
        return []
    if not isinstance(value, list | tuple):
        raise ArtifactError(f"history is {_show(value)}, not a list of messages.")
    return [_message(message) for message in value]


def _message(message: object) -> Message:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
    raise ArtifactError(
        f'history holds {_show(message)}, not a message {{"role": ..., "content": ...}}.'
    )


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
