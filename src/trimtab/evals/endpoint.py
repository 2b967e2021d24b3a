"""Judges over the network: any server that speaks the OpenAI chat protocol.

Knows what is asked and how an answer becomes a score; knows no model on this machine.
"""

import math
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evals.judges import Shot, check_shots, preset, yes_no_name
from trimtab.evals.scorers import FORM, model_name, prompt_text
from trimtab.remote import RemoteError, Server, key_of


@dataclass(frozen=True)
class Endpoint:
    """Asks any OpenAI-compatible chat endpoint about each answer, several at a time.

    The score is the share of ``labels[0]`` among the labels: by the first token's log-probabilities
    where the server gives them, else 1 or 0 by the word it says. An answer without any label counts
    as undecided, 1 / number of labels, with a warning; TrimtabError where all are like that.
    ``shots`` and ``threshold`` are as of YesNo; what is undecided stays so. Failed requests
    (timeouts, 429, 5xx) are sent again up to ``retries`` times, waiting longer each time. The key
    is ``api_key``, else the environment variable OPENAI_API_KEY; it is no field.

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
    shots: Sequence[Shot] = field(default=(), repr=False)
    threshold: float | None = None

    def __post_init__(self, api_key: str | None) -> None:
        if len(set(self.labels)) < 2 or isinstance(self.labels, str):
            raise TrimtabError(f"labels are two words or more, not {self.labels!r}")
        if self.concurrency < 1:
            raise TrimtabError(f"concurrency is 1 or more, not {self.concurrency!r}")
        check_shots(self.shots, self.labels)
        server = Server(
            self.url,
            self.model,
            api_key=key_of(api_key),
            timeout=self.timeout,
            retries=self.retries,
        )
        object.__setattr__(self, "_server", server)

    @classmethod
    def preset(cls, url: str, model: str, name: str, **changes: Any) -> "Endpoint":
        """The judge that ``YesNo.preset`` gives, asked of an endpoint."""
        question, own = preset(name)
        return cls(url, model, question, **{**own, **changes})

    @property
    def name(self) -> str:
        """The judge in a few words, for a report; without the url, which may hold a secret."""
        who = f"Endpoint {model_name(self.model)}"
        who += "" if self.labels == ("Yes", "No") else f", {self.labels[0]!r}"
        return yes_no_name(who, self.question, self.shots, self.threshold)

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        """The share of the first label, one per row."""
        asked = [self._ask(p, a) for p, a in zip(prompts, answers, strict=True)]
        if not asked:
            return []
        first, options = self._first(asked[0])  # alone: it shows what the server takes
        with ThreadPoolExecutor(self.concurrency) as pool:
            server: Server = self._server  # type: ignore[attr-defined]
            futures = [pool.submit(server.ask, turns, **options) for turns in asked[1:]]
            try:
                choices = [first, *(future.result() for future in futures)]
            except BaseException:  # otherwise the pool would first ask all that are left
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._decided([self._cut(_share(c, self.labels)) for c in choices], choices)

    def _ask(self, prompt: Any, answer: str) -> list[dict[str, str]]:
        question = f"{self.question}\nAnswer with one word: {' or '.join(self.labels)}."
        turns: list[dict[str, str]] = []
        for asked, said, label in [*self.shots, (prompt_text(prompt), answer, "")]:
            text = self.form.format(prompt=asked, answer=said, question=question)
            turns.append({"role": "user", "content": text})
            turns.append({"role": "assistant", "content": label})
        return turns[:-1]

    def _cut(self, share: float | None) -> float | None:
        """1 or 0 where there is a threshold."""
        if share is None or self.threshold is None:
            return share
        return float(share > self.threshold)

    def _first(self, turns: list[dict[str, str]]) -> tuple[Any, dict[str, Any]]:
        """The first row's choice, and the most informative options that the server took."""
        server: Server = self._server  # type: ignore[attr-defined]
        for options in _OPTIONS[:-1]:
            try:
                return server.ask(turns, **options), options
            except RemoteError as error:
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


def _share(choice: Any, labels: Sequence[str]) -> float | None:
    """How much of the labels' probability is the first one's; None where no label is to be seen."""
    logprobs = getattr(choice, "logprobs", None)
    for position in getattr(logprobs, "content", None) or []:
        mass = [0.0] * len(labels)
        for token in position.top_logprobs or [position]:
            fits = [i for i, label in enumerate(labels) if _begins(label, token.token)]
            if len(fits) == 1:
                mass[fits[0]] += math.exp(token.logprob)
        said_one = any(_begins(label, position.token) for label in labels)
        if sum(mass) > 0 and (said_one or sum(mass) > 0.5):
            return mass[0] / sum(mass)
    either = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    text = choice.message.content or ""
    said = {w.lower() for w in re.findall(rf"(?<!\w)({either})(?!\w)", text, re.IGNORECASE)}
    return float(labels[0].lower() in said) if len(said) == 1 else None


def _begins(label: str, token: str) -> bool:
    """Whether a token is a label or its first two letters or more, whatever its case."""
    token, label = re.sub(r"^\W+|\W+$", "", token).lower(), label.lower()
    return token == label or (len(token) > 1 and label.startswith(token))
