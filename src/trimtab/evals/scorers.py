"""Scorers: how much of a concept each answer shows. One call: (prompts, answers) -> scores.

Knows the protocol and how to check what comes out of it; knows no judge. Letter: B rows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.solvers import auroc

FORM = "Message: {prompt}\nReply: {answer}\n{question}"


class Scorer(Protocol):
    """Anything that grades answers: higher is more of the concept, mostly in 0 … 1.

    Stored scores are used again for a scorer that is made alike; a text as attribute ``identity``
    says instead which one it is.
    """

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str]) -> Sequence[float] | Tensor:
        """One score per row."""
        ...


def score(scorer: Scorer, prompts: Sequence[Any], answers: Sequence[str]) -> Tensor:
    """The scores as a float64 tensor [B], checked.

    Raises TrimtabError, naming the scorer, for a wrong number of scores and for one that is no
    finite number.

    >>> score(lambda prompts, answers: [len(a) / 10 for a in answers], ["hi"], ["hello"])
    tensor([0.5000], dtype=torch.float64)
    """
    if len(prompts) != len(answers):
        raise TrimtabError(f"{len(prompts)} prompts for {len(answers)} answers; give one for each")
    if not len(answers):
        return torch.zeros(0, dtype=torch.float64)
    name, given = scorer_name(scorer), scorer(prompts, answers)
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TrimtabError(
            f"the scorer {name} returned {type(given).__name__} {given!r:.60}; a scorer returns "
            "one number per answer"
        ) from None
    if values.shape != (len(answers),):
        raise TrimtabError(
            f"the scorer {name} returned scores of shape {list(values.shape)} for {len(answers)} "
            "answers; a scorer returns one number per answer"
        )
    if bad := (~values.isfinite()).nonzero()[:, 0].tolist():
        raise TrimtabError(
            f"the scorer {name} gave {float(values[bad[0]])} to row {bad[0]} "
            f"({len(bad)} such rows), whose answer is {answers[bad[0]]!r:.60}; scores are finite"
        )
    return values


def agreement(
    scorer: Scorer,
    prompts: Sequence[Any],
    answers: Sequence[str],
    labels: Sequence[float] | Tensor,
) -> float:
    """AUROC of the scorer against labels you trust (> 0.5 = the concept is there).

    0.5 is a blind judge, 1 a perfect one, below 0.5 one that reads the opposite. Raises
    TrimtabError where the labels hold one class only.
    """
    positive = torch.as_tensor(labels, dtype=torch.float64) > 0.5
    if positive.shape != (len(answers),) or not 0 < int(positive.sum()) < len(answers):
        raise TrimtabError(
            f"labels of shape {list(positive.shape)} with {int(positive.sum())} positives for "
            f"{len(answers)} answers; give one label per answer, and answers of both kinds"
        )
    return float(auroc(score(scorer, prompts, answers)[:, None], positive))


def prompt_text(prompt: Any) -> str:
    """A prompt as plain text: a str itself, a conversation its turns, one paragraph each."""
    if isinstance(prompt, str):
        return prompt
    messages = list(getattr(prompt, "messages", prompt))
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def model_name(model: str) -> str:
    """The last part of a model's id or folder: short, and nothing of whose machine it is on."""
    return model.rstrip("/").rpartition("/")[2] or "a model"


def scorer_name(scorer: Any) -> str:
    """What a scorer calls itself: its name, else that of its function or class."""
    own = getattr(scorer, "name", None) or getattr(scorer, "__name__", None)
    return str(own or type(scorer).__name__)
