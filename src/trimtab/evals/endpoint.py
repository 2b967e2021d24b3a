"""Judges over the network: any server that speaks the OpenAI chat protocol.

Knows HTTP through huggingface_hub's client, retries and keys; knows no model on this machine.
"""

import math
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trimtab.errors import TrimtabError
from trimtab.evals.scorers import FORM, prompt_text

_AGAIN = {408, 409, 425, 429}  # and every status of 500 and more
_REMEDIES = {
    401: "Give a valid api_key=, or set OPENAI_API_KEY.",
    403: "Give an api_key= that may use this model.",
    404: "Check the url (it usually ends in /v1) and the model's name.",
    429: "Lower concurrency=, or wait.",
}


class _EndpointError(TrimtabError):
    """What became of a request: its HTTP status (0: there was none), and whether to try again."""

    def __init__(
        self, message: str, *, status: int = 0, again: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status, self.again, self.wait = status, again, wait


class _Server:
    """One OpenAI-compatible chat endpoint: bounded retries, and errors that never show the key."""

    def __init__(
        self, url: str, model: str, *, api_key: str | None, timeout: float, retries: int
    ) -> None:
        from huggingface_hub import InferenceClient

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TrimtabError(
                f"an endpoint's url begins with http:// or https://, such as "
                f"http://localhost:8000/v1, not {url!r}"
            )
        host = parts.hostname + (f":{parts.port}" if parts.port else "")
        self.shown = f"{parts.scheme}://{host}{parts.path}"  # without user, password and query
        self.model, self.timeout, self.retries, self._url = model, timeout, retries, url
        self._secrets = [s for s in (api_key, parts.password, parts.query) if s]
        # Without a key the client would send the user's Hugging Face token to this stranger.
        self._client = InferenceClient(base_url=url, api_key=api_key or "none", timeout=timeout)

    def ask(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """The first choice of a chat completion. Raises TrimtabError with URL and status."""
        listed: list[Any] = [dict(message) for message in messages]
        for done in range(self.retries + 1):
            try:
                made = self._client.chat_completion(listed, model=self.model, **options)
                choice = made.choices[0]
                _ = choice.message.content  # fails here, and not later, for another kind of JSON
                return choice
            except Exception as error:  # which HTTP library raises depends on the client's version
                failed = self._failed(error)
                if done == self.retries or not failed.again:
                    raise failed from None
            time.sleep(min(max(0.25 * 2**done, failed.wait), 30.0))
        raise AssertionError("every turn of the loop returns, raises or sleeps")

    def _failed(self, error: Exception) -> _EndpointError:
        from huggingface_hub.errors import (
            HfHubHTTPError,
            InferenceTimeoutError,
            OfflineModeIsEnabled,
        )

        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            wait = error.response.headers.get("retry-after", "")
            return _EndpointError(
                f"{self.shown} answered {status} for the model {self.model!r}: "
                f"{self._clean(error)}. {_REMEDIES.get(status, 'Check the server.')}",
                status=status,
                again=status in _AGAIN or status >= 500,
                wait=float(wait) if wait.isdecimal() else 0.0,
            )
        if isinstance(error, InferenceTimeoutError):
            told = f"gave no answer within {self.timeout:g} s; start the server or raise timeout="
            return _EndpointError(f"{self.shown} {told}", again=True)
        if isinstance(error, OfflineModeIsEnabled):
            told = "HF_HUB_OFFLINE is set, and its client then calls nobody; unset it"
            return _EndpointError(f"{self.shown} was not called: {told}")
        if isinstance(error, ValueError | LookupError | TypeError | AttributeError):
            told = "answered, but not as a chat endpoint; does the url end in /v1?"
            return _EndpointError(f"{self.shown} {told} ({self._clean(error)})")
        told = f"cannot be reached ({self._clean(error)}); start the server or correct the url"
        return _EndpointError(f"{self.shown} {told}", again=True)

    def _clean(self, error: Exception) -> str:
        text = " ".join(str(error).split()).replace(self._url, self.shown)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return (text[:300] or type(error).__name__).rstrip(".")


def chat(
    url: str,
    model: str,
    messages: Sequence[Mapping[str, str]] | str,
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
    retries: int = 3,
    **options: Any,
) -> str:
    """One answer of an OpenAI-compatible chat endpoint, as text.

    ``messages`` is a conversation, or a str as its only turn; ``options`` (``max_tokens``,
    ``temperature``, ``seed`` ...) go to the endpoint. The key is ``api_key``, else the environment
    variable OPENAI_API_KEY. Raises TrimtabError with the URL and the status.

    >>> chat("http://localhost:8000/v1", "qwen", "Write a question.")       # doctest: +SKIP
    """
    server = _Server(url, model, api_key=_key(api_key), timeout=timeout, retries=retries)
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    choice = server.ask(turns, **options)
    if not choice.message.content:
        raise TrimtabError(
            f"{server.shown} gave an empty answer (finish_reason {choice.finish_reason!r}); a "
            "model that thinks first needs a larger max_tokens="
        )
    return str(choice.message.content)


@dataclass(frozen=True)
class Endpoint:
    """Asks any OpenAI-compatible chat endpoint about each answer, several at a time.

    The score is the share of ``labels[0]`` among the labels: by the first token's log-probabilities
    where the server gives them, else 1 or 0 by the word it says. An answer without any label counts
    as undecided, 1 / number of labels, with a warning; TrimtabError where all are like that.
    Failed requests (timeouts, 429, 5xx) are sent again up to ``retries`` times, waiting longer each
    time. The key is ``api_key``, else the environment variable OPENAI_API_KEY; it is no field.

    >>> judge = Endpoint("http://localhost:8000/v1", "qwen", "Is it funny?")  # doctest: +SKIP
    """

    url: str
    model: str
    question: str
    labels: tuple[str, ...] = ("Yes", "No")
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 3
    form: str = field(default=FORM, repr=False)
    api_key: InitVar[str | None] = None

    def __post_init__(self, api_key: str | None) -> None:
        if len(set(self.labels)) < 2 or isinstance(self.labels, str):
            raise TrimtabError(f"labels are two words or more, not {self.labels!r}")
        if self.concurrency < 1:
            raise TrimtabError(f"concurrency is 1 or more, not {self.concurrency!r}")
        server = _Server(
            self.url,
            self.model,
            api_key=_key(api_key),
            timeout=self.timeout,
            retries=self.retries,
        )
        object.__setattr__(self, "_server", server)

    @property
    def name(self) -> str:
        """What tells this judge from another; without the url, which may hold a secret."""
        return f"Endpoint {self.model}: {self.question!r}, {self.labels[0]!r} of {[*self.labels]}"

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """The share of the first label, one per row."""
        asked = [self._ask(p, a) for p, a in zip(prompts, answers, strict=True)]
        first, options = self._first(asked[0])  # alone: it shows what the server takes
        with ThreadPoolExecutor(self.concurrency) as pool:
            server: _Server = self._server  # type: ignore[attr-defined]
            futures = [pool.submit(server.ask, turns, **options) for turns in asked[1:]]
            try:
                choices = [first, *(future.result() for future in futures)]
            except BaseException:  # otherwise the pool would first ask all that are left
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._decided([_share(choice, self.labels) for choice in choices], choices)

    def _ask(self, prompt: Any, answer: str) -> list[dict[str, str]]:
        question = f"{self.question}\nAnswer with one word: {' or '.join(self.labels)}."
        text = self.form.format(prompt=prompt_text(prompt), answer=answer, question=question)
        return [{"role": "user", "content": text}]

    def _first(self, turns: list[dict[str, str]]) -> tuple[Any, dict[str, Any]]:
        """The first row's choice, and the most informative options that the server took."""
        server: _Server = self._server  # type: ignore[attr-defined]
        for options in _OPTIONS[:-1]:
            try:
                return server.ask(turns, **options), options
            except _EndpointError as error:
                if error.status not in (400, 422):
                    raise
        return server.ask(turns, **_OPTIONS[-1]), _OPTIONS[-1]

    def _decided(self, shares: Sequence[float | None], choices: Sequence[Any]) -> list[float]:
        unclear = [i for i, share in enumerate(shares) if share is None]
        if unclear:
            told = (
                f"{self.model} gave none of the labels {list(self.labels)} for {len(unclear)} of "
                f"{len(shares)} answers; it said {str(choices[unclear[0]].message.content)!r:.60}"
            )
            if len(unclear) == len(shares):
                raise TrimtabError(f"{told}. Ask more plainly, or another model")
            warnings.warn(f"{told}. They count as undecided", stacklevel=3)
        return [1 / len(self.labels) if share is None else share for share in shares]


# From the most informative to what every server takes.
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 8, "temperature": 0.0, "logprobs": True, "top_logprobs": 5},
    {"max_tokens": 8, "temperature": 0.0},
    {},
)


def _key(api_key: str | None) -> str | None:
    return api_key or os.environ.get("OPENAI_API_KEY")


def _share(choice: Any, labels: Sequence[str]) -> float | None:
    """How much of the labels' probability is the first one's; None where no label is to be seen."""
    logprobs = getattr(choice, "logprobs", None)
    for position in getattr(logprobs, "content", None) or []:
        mass = [0.0] * len(labels)
        for token in position.top_logprobs or [position]:
            fits = [i for i, label in enumerate(labels) if _begins(label, token.token)]
            if len(fits) == 1:
                mass[fits[0]] += math.exp(token.logprob)
        if sum(mass) > 0:
            return mass[0] / sum(mass)
    either = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    said = re.search(rf"(?<!\w)({either})(?!\w)", choice.message.content or "", re.IGNORECASE)
    return None if said is None else float(said[1].lower() == labels[0].lower())


def _begins(label: str, token: str) -> bool:
    """Whether a token is a label or its first two letters or more, whatever its case."""
    token, label = re.sub(r"^\W+|\W+$", "", token).lower(), label.lower()
    return token == label or (len(token) > 1 and label.startswith(token))
