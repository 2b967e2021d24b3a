"""Few-shot examples: prompts answered before, for a model that was never taught to answer.

Knows prompts, completions and labels; knows no model and no file.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice

from trimtab.data.checks import is_present
from trimtab.data.example import Example, Message
from trimtab.errors import TrimtabError


def few_shot(
    examples: Sequence[Example],
    k: int = 6,
    seed: int = 0,
    *,
    label: float | None = None,
    among: Sequence[Example] | None = None,
) -> list[Example]:
    """The examples, each with the same ``k`` answered prompts at the beginning of its history.

    The shots are drawn out of the examples, or out of those of ``among``, each of another prompt,
    and every example of these prompts is left out of the result: nothing that is asked was shown.
    ``label``: shots that have the concept (above 1/2) or lack it; by default both in turn, the
    first with the concept, so that they lean to neither side. The choice depends on the examples
    and the seed, not on their order.
    Raises TrimtabError where there are too few.

    >>> asked = [Example(f"{n} + 1?", str(n + 1)) for n in range(9)]
    >>> example, *others = few_shot(asked, k=2, label=1)
    >>> len(others), [message["role"] for message in example.messages]
    (6, ['user', 'assistant', 'user', 'assistant', 'user'])
    """
    if k < 0:
        raise TrimtabError(f"k is the number of shots, 0 or more, not {k!r}")
    among = examples if among is None else among
    shots = list(islice(_drawn(among, seed, label), k))
    shown = {shot.prompt for shot in shots}
    rest = [example for example in examples if example.prompt not in shown]
    if len(shots) < k or (k and not rest):
        prompts = len({example.prompt for example in among if example.prompt})
        raise TrimtabError(
            f"{len(among)} examples of {prompts} prompts are too few for {k} shots of "
            f"{'both labels' if label is None else f'label {label:g}'}, each of another prompt and "
            "none of those that are left; give a smaller k"
        )
    told = [message for shot in shots for message in _turns(shot)]
    return [replace(example, history=[*told, *example.history]) for example in rest]


def _drawn(examples: Sequence[Example], seed: int, label: float | None) -> Iterator[Example]:
    """Shots of different prompts in random order, of one label or of both in turn."""
    usable = {e for e in examples if e.prompt.strip() and e.completion.strip() and not e.history}
    order = sorted(usable, key=lambda e: (e.prompt, e.completion, e.label))
    random.Random(seed).shuffle(order)
    shown: set[str] = set()
    for wanted in cycle([True, False] if label is None else [label > 0.5]):
        fits = (e for e in order if is_present(e) is wanted and e.prompt not in shown)
        shot = next(fits, None)
        if shot is None:
            return
        shown.add(shot.prompt)
        yield shot


def _turns(shot: Example) -> list[Message]:
    return [*shot.messages, {"role": "assistant", "content": shot.completion}]
