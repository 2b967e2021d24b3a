"""Remote: any server that speaks the OpenAI chat protocol, through huggingface_hub's client.

Knows HTTP, retries and keys; knows no model on this machine and nothing of what is asked.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from trimtab.errors import TrimtabError

_AGAIN = {408, 409, 425, 429}  # and every status of 500 and more
_REMEDIES = {
    401: "Give a valid api_key=, or set OPENAI_API_KEY.",
    403: "Give an api_key= that may use this model.",
    404: "Check the url (it usually ends in /v1) and the model's name.",
    429: "Lower concurrency=, or wait.",
}


class RemoteError(TrimtabError):
    """What became of a request: its HTTP status (0: there was none), and whether to try again."""

    def __init__(
        self, message: str, *, status: int = 0, again: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status, self.again, self.wait = status, again, wait


class EmptyAnswer(RemoteError):
    """The server answered, and there is no text in it."""


class Server:
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

    def _failed(self, error: Exception) -> RemoteError:
        from huggingface_hub.errors import (
            HfHubHTTPError,
            InferenceTimeoutError,
            OfflineModeIsEnabled,
        )

        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            wait = error.response.headers.get("retry-after", "")
            return RemoteError(
                f"{self.shown} answered {status} for the model {self.model!r}: "
                f"{self._clean(error)}. {_REMEDIES.get(status, 'Check the server.')}",
                status=status,
                again=status in _AGAIN or status >= 500,
                wait=float(wait) if wait.isdecimal() else 0.0,
            )
        if isinstance(error, InferenceTimeoutError):
            told = f"gave no answer within {self.timeout:g} s; start the server or raise timeout="
            return RemoteError(f"{self.shown} {told}", again=True)
        if isinstance(error, OfflineModeIsEnabled):
            told = "HF_HUB_OFFLINE is set, and its client then calls nobody; unset it"
            return RemoteError(f"{self.shown} was not called: {told}")
        if isinstance(error, ValueError | LookupError | TypeError | AttributeError):
            told = "answered, but not as a chat endpoint; does the url end in /v1?"
            return RemoteError(f"{self.shown} {told} ({self._clean(error)})")
        told = f"cannot be reached ({self._clean(error)}); start the server or correct the url"
        return RemoteError(f"{self.shown} {told}", again=True)

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
    server = Server(url, model, api_key=key_of(api_key), timeout=timeout, retries=retries)
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    choice = server.ask(turns, **options)
    if not choice.message.content:
        raise EmptyAnswer(
            f"{server.shown} gave an empty answer (finish_reason {choice.finish_reason!r}); a "
            "model that thinks first needs a larger max_tokens="
        )
    return str(choice.message.content)


def key_of(api_key: str | None) -> str | None:
    return api_key or os.environ.get("OPENAI_API_KEY")
