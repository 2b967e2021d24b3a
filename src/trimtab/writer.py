"""Writer: text on request, from a model on this machine or from an endpoint, and lists read out.

Knows how writers are asked and how weak ones write lists and JSON; knows nothing of what is asked.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab import remote
from trimtab.errors import ChatError
from trimtab.lm import LM


class Writer:
    """Sampled text for a prompt or a conversation, equal for equal seeds where the model allows it.

    ``source``: an ``LM``, or the URL of an OpenAI-compatible endpoint (with ``model`` and
    ``api_key``). Raises ChatError for anything else. What an endpoint raises is passed on.
    """

    def __init__(
        self,
        source: Any,
        model: str | None = None,
        api_key: str | None = None,
        temperature: float = 0.9,
    ) -> None:
        if not isinstance(source, LM) and (not isinstance(source, str) or model is None):
            raise ChatError(
                f"the writer is an LM, or an endpoint's URL with model=, not {source!r:.60} with "
                f"model={model!r}"
            )
        self.temperature = temperature
        self._source, self._model, self._api_key = source, model, api_key

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this writer from another; a model may move to another URL, and is the same."""
        if not isinstance(self._source, LM):
            return {"model": self._model, "temperature": self.temperature}
        told = self._source.describe()
        dtype = str(self._source.model.dtype)
        return {"model": told["fingerprint"], "dtype": dtype, "temperature": self.temperature}

    def __call__(self, messages: Sequence[Mapping[str, str]] | str, seed: int) -> str:
        """What the model says; a str is a conversation's only turn."""
        if isinstance(self._source, LM):
            return str(
                self._source.generate(
                    messages,
                    max_new_tokens=400,
                    temperature=self.temperature,
                    top_p=0.95,
                    seed=seed,
                )
            )
        options: dict[str, Any] = {
            "max_tokens": 1000,
            "temperature": self.temperature,
            "seed": seed,
        }
        return remote.chat(
            self._source, self._model or "", messages, api_key=self._api_key, **options
        )


# -- what is in the text ---------------------------------------------------------------------------

_NUMBERED = re.compile(r"^\s*(?:[-•]\s*|\*(?!\*)\s*|\(?\d+[.):](?!\d)\s*)")
_NAMED = re.compile(r"^(?:\w+ )?(?:instruction|message|prompt)s?(?: \d+)?: *(?=\S)", re.IGNORECASE)
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|`([^`]*)`')
_JSON = re.compile(r"^\s*(?:```\w*\s*)?[\[{]", re.MULTILINE)
_FLAT = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]")


def lines(text: str) -> Iterator[str]:
    """The entries of a list, one a line: without numbers, quotes and headings; JSON as well."""
    found = [entry for value in json_in(text) for entry in _strings(value)]
    for line in found or text.splitlines():
        line = plain_line(line)
        if line and not line.endswith(":") and not line.startswith(("[", "{", "```")):
            yield line


def plain_line(line: str) -> str:
    """A line without its number or bullet, what it is called, and the quotes around it.

    >>> plain_line('2) **Message 1:** "Hello there"')
    'Hello there'
    """
    line = _NUMBERED.sub("", clean(line)).replace("**", "").removesuffix(",")
    line = _NAMED.sub("", line).strip()
    quoted = _QUOTED.fullmatch(line)
    return line if quoted is None else "".join(filter(None, quoted.groups())).strip()


def clean(text: str) -> str:
    """The text on one line, and such that every file can hold it."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def json_in(text: str) -> list[Any]:
    """The JSON values of a text: all from the first bracket to the last, else its flat parts.

    Flat parts are what remains readable of JSON lines, and of a list that was cut off.
    """
    if not (begins := _JSON.search(text)):
        return []
    inner = text[begins.end() - 1 : max(text.rfind("]"), text.rfind("}")) + 1]
    whole = _parsed(inner)
    parts = [whole] if whole is not None else map(_parsed, _FLAT.findall(inner))
    return [part for part in parts if isinstance(part, list | dict)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _strings(value: Any) -> Iterator[str]:
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, str):
            yield part
        elif isinstance(part, list | dict):
            yield from _strings(part)


def known(line: str, found: Sequence[str]) -> bool:
    """Whether nearly the same line is there already."""
    plain = line.casefold()
    return any(difflib.SequenceMatcher(None, plain, f.casefold()).ratio() > 0.85 for f in found)
