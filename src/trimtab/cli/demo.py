"""The commands demo and fit: learn a concept, draw how well it reads, steer by it.

Knows Trimtab's public calls. Holds the recipe that all commands follow where nothing else is asked.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from trimtab.cli.screen import ERR, OUT, accuracies, chart, plain, say, working
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.concepts import Probe
    from trimtab.data import Example
    from trimtab.edits import Edit
    from trimtab.lm import LM


@dataclass(frozen=True)
class Recipe:
    """What the commands do where nothing else is asked for; set by measurement on ``model``."""

    model: str = "smollm2-135m"
    concept: str = "happiness"
    place: str = "resid@0: answer[:16]"
    layers: range = range(5, 22)
    n_layers: int = 30  # of the model that was measured
    tokens: str = "answer"  # steering the prompt too costs fluency
    dose: float = 0.017
    questions: tuple[str, ...] = (
        "How do you feel about your work?",
        "What do you think about the weather today?",
        "Write a short diary entry about this morning.",
    )
    max_new_tokens: int = 60

    def layers_of(self, n_layers: int) -> range:
        """The same share of the depth in a model of ``n_layers``.

        >>> DEMO.layers_of(DEMO.n_layers) == DEMO.layers
        True
        """
        ends = self.layers.start, self.layers.stop
        first, stop = (round(n_layers * i / self.n_layers) for i in ends)
        first = min(first, n_layers - 1)
        return range(first, max(stop, first + 1))


DEMO = Recipe()
ENDS = (".", "!", "?", '"', "”", "…")
CONTEXT = (
    f"Dose {DEMO.dose:g}: what is added, as a fraction of the activation's own length at each "
    "layer. The baseline to beat is to ask for it in the prompt (“Answer happily.”)."
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="An alias, a hub id, a folder or a .gguf file.")
]


def demo(
    model: ModelOption = DEMO.model,
    out: Annotated[Path, typer.Option(help="Where to save the edit.")] = Path(DEMO.concept),
) -> None:
    """Learn [bold]happiness[/bold] and answer three questions against, without and with it."""
    from trimtab import data

    check_free(out)
    times = [time.perf_counter()]
    lm = load_model(model)
    times.append(time.perf_counter())
    examples = data.read(DEMO.concept)
    probe = learn(lm, examples, DEMO.concept)
    times.append(time.perf_counter())
    _print_accuracy(probe, examples, held_out=0.2)
    edit = edit_of(probe, lm.n_layers)
    print_answers(_answer_thrice(lm, edit))
    times.append(time.perf_counter())
    OUT.print(Text(CONTEXT, style="dim"))
    edit.save(str(out))
    _print_next(model, out)
    laps = zip(("load", "learn", "answer"), pairwise(times), strict=True)
    OUT.print(Text("\n" + ", ".join(f"{n} {b - a:.1f} s" for n, (a, b) in laps), style="dim"))


def _answer_thrice(lm: "LM", edit: "Edit") -> list[list[str]]:
    """Answers against, without and with the edit, per question: one batch, an edit per row."""
    n = len(DEMO.questions)
    with working(f"Answering {n} questions in 3 ways"):
        answers = lm.generate(
            [*DEMO.questions] * 3,
            edits=[-edit] * n + [None] * n + [edit] * n,
            max_new_tokens=DEMO.max_new_tokens,
        )
    return [answers[i::n] for i in range(n)]


def print_answers(answers: list[list[str]]) -> None:
    """Three columns, a question above each row of them."""
    name = DEMO.concept
    heads = ("red", f"against {name}"), ("default", "plain"), ("green", f"with {name}")
    OUT.print()
    for number, (question, texts) in enumerate(zip(DEMO.questions, answers, strict=True)):
        table = Table(box=ROUNDED, expand=True, border_style="dim", show_header=number == 0)
        table.title, table.title_style, table.title_justify = f"“{question}”", "bold", "left"
        for style, head in heads:
            table.add_column(head, ratio=1, header_style=f"bold {style}", style=style)
        told = (plain(text).strip() for text in texts)  # an ellipsis where one was cut off
        table.add_row(*(Text(t if t.endswith(ENDS) else f"{t} …") for t in told))
        OUT.print(table)


def _print_next(model: str, out: Path) -> None:
    from rich.syntax import Syntax

    name = out.name if out.name.isidentifier() else "edit"
    code = f"""\
import trimtab as tt
lm = tt.LM.load("{model}")
{name} = tt.load("{out}")
print(lm.generate("{DEMO.questions[0]}", edits={name}))
print(lm.generate("{DEMO.questions[0]}", edits=-{name}))"""
    _print_saved(model, out)
    OUT.print("\nor in Python:\n")
    OUT.print(Syntax(code, "python", theme="ansi_dark", background_color="default", padding=(0, 2)))


def _print_saved(model: str, out: Path) -> None:
    chat = f"trimtab chat --steer {out}" + (f" -m {model}" if model != DEMO.model else "")
    OUT.print(Text.assemble("\nSaved to ", (f"{out}/", "bold"), ". Try next:\n"))
    commands = Table.grid(padding=(0, 3))
    commands.add_row(Text(f"  {chat}", "bold"), Text("talk to the steered model", "dim"))
    commands.add_row(Text(f"  trimtab show {out}", "bold"), Text("what was saved", "dim"))
    OUT.print(commands)


def fit(
    source: Annotated[
        str, typer.Argument(help="A built-in set (happiness, humor, ...) or a .jsonl, .json, .csv.")
    ],
    model: ModelOption = DEMO.model,
    place: Annotated[str, typer.Option(help="What to read: site@layers tokens.")] = DEMO.place,
    out: Annotated[
        Path | None, typer.Option(help="Where to save the probe; by default the source's name.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the prompts that is only tested on.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Chooses the held-out prompts.")] = 0,
    few_shot: Annotated[
        int, typer.Option(min=0, help="Answered prompts before each example, for a base model.")
    ] = 0,
) -> None:
    """Learn a concept from labelled examples and save the probe."""
    from trimtab import data

    target = out if out is not None else Path(Path(source).stem)
    examples = data.read(source, few_shot=few_shot)
    check_free(target)
    for warning in data.lint(examples):
        OUT.print(Text.assemble(("warning ", "bold yellow"), plain(warning)))
    lm = load_model(model)
    probe = learn(lm, examples, target.name, place, held_out=held_out, seed=seed)
    _print_accuracy(probe, examples, held_out=held_out, seed=seed)
    probe.save(target)
    _print_saved(model, target)


def check_free(out: Path) -> None:
    """Fail before the work, not after it, where the result cannot be saved."""
    from trimtab import artifact

    try:
        artifact.check_free(out)
    except TrimtabError as error:
        raise TrimtabError(f"{error} (--out)") from None


def load_model(source: str) -> "LM":
    """The model, with a word to the user and without the loader's own progress bars."""
    say(f"Loading {source}")
    from transformers.utils import logging

    from trimtab.lm import LM

    logging.disable_progress_bar()
    return LM.load(source)


def learn(
    lm: "LM", examples: "Sequence[Example]", name: str, place: str = DEMO.place, **options: Any
) -> "Probe":
    """Fit a probe that says how well it reads at each layer; options as of ``concepts.fit``."""
    from trimtab import concepts

    say(f"Learning {name} from {len(examples)} examples at {place}")
    show = ERR.is_terminal
    probe: Probe = concepts.fit(lm, examples, place, name=name, show_progress=show, **options)
    scores = {"layers": [*probe.layers], **accuracies(vars(probe))}
    return replace(probe, meta=replace(probe.meta, scores=scores))


def edit_of(probe: "Probe", n_layers: int, dose: float = DEMO.dose) -> "Edit":
    """The edit by the recipe: at those of the probe's layers in its share, or all if none is."""
    layers = [i for i in probe.layers if i in DEMO.layers_of(n_layers)] or probe.layers
    return probe.edit(dose=dose, layers=layers, tokens=DEMO.tokens)


def _print_accuracy(
    probe: "Probe", examples: "Sequence[Example]", held_out: float, seed: int = 0
) -> None:
    OUT.print("", chart(probe.meta.scores), sep="\n")
    OUT.print(Text(_word_floor(examples, held_out, seed), style="dim"))


def _word_floor(examples: "Sequence[Example]", held_out: float, seed: int) -> str:
    """What a bag of words reads in the held-out answers, on the probe's own split, as a line."""
    import torch

    from trimtab import data
    from trimtab.concepts import split

    labels = torch.tensor([e.label for e in examples])
    keep = split([e.prompt or e.completion for e in examples], labels, held_out, seed).tolist()
    train, test = (
        [e for e, k in zip(examples, keep, strict=True) if k is s] for s in (True, False)
    )
    try:
        floor = data.bag_of_words(train, test)
    except TrimtabError as error:
        return f"\nNothing to compare with: {error}"
    if not test:
        return ""
    told = f"accuracy {floor.accuracy:.2f}, AUROC {floor.auroc:.2f}"
    return f"\nFor comparison, a bag of words that reads whole held-out answers: {told}"
