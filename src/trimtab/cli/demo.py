"""The commands demo and fit: learn a concept, draw how well it reads, steer by it.

Knows Trimtab's public calls. Holds the recipe that all commands follow where nothing else is asked.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import ROUNDED, SIMPLE
from rich.table import Table
from rich.text import Text

from trimtab.cli.screen import ERR, OUT, accuracies, chart, plain, say, working
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.concepts import HeadProbe, Probe
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

HEADS = "heads@0: answer[:16]"
OPTIONS = ("label", "concept", "limit", "language", "path", "split", "config", "revision")
LIKE = "oasst1:label=creativity,limit=512"

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
    OUT.print("", chart(probe.meta.scores), sep="\n")
    OUT.print(Text(_word_floor(examples, held_out=0.2, seed=0), style="dim"))
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
        str,
        typer.Argument(
            help="A built-in set (happiness, humor, ...), a .jsonl, .json or .csv, or a set of the "
            f"hub, with options after a colon: {LIKE}."
        ),
    ],
    model: ModelOption = DEMO.model,
    place: Annotated[
        str | None,
        typer.Option(
            help=f"What to read: site@layers tokens. By default {DEMO.place}; per head {HEADS}."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="mean (their difference), logistic (regression) or pca.")
    ] = "mean",
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize", help="Centre tokens and bring them to unit length first."
        ),
    ] = True,
    l2: Annotated[float, typer.Option(help="The penalty of logistic regression.")] = 1.0,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="A probe of each attention head.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to save the probe; by default the name of source or concept."),
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
    from trimtab import concepts, data
    from trimtab.place import Place

    if method not in concepts.METHODS:
        raise TrimtabError(f"--method is one of {', '.join(concepts.METHODS)}, not {method!r}")
    if not 0 < l2 < float("inf"):
        raise TrimtabError(f"--l2 is a positive number, not {l2:g}; 1 is usual")
    where = str(Place.parse(place or (HEADS if per_head else DEMO.place)))
    name, own = named_options(source)
    target = out or Path(str(own.get("label") or own.get("concept") or Path(name).stem))
    examples = examples_of(source, few_shot=few_shot)
    check_free(target)
    for warning in data.lint(examples):
        OUT.print(Text.assemble(("warning ", "bold yellow"), plain(warning)))
    lm = load_model(model)
    options: dict[str, Any] = {"method": method, "normalize": normalize, "l2": l2}
    options |= {"held_out": held_out, "seed": seed}
    if per_head:
        heads = _learn_heads(lm, examples, target.name, where, **options)
        OUT.print(_best_heads(heads))
        heads.save(target)
    else:
        probe = learn(lm, examples, target.name, where, **options)
        OUT.print("", chart(probe.meta.scores), sep="\n")
        probe.save(target)
    OUT.print(Text(_word_floor(examples, held_out, seed), style="dim"))
    _print_saved(model, target)


def named_options(source: str) -> tuple[str, dict[str, Any]]:
    """A source's name and its options.

    >>> named_options("oasst1:label=creativity,limit=64")
    ('oasst1', {'label': 'creativity', 'limit': 64})
    """
    name, colon, text = source.partition(":")
    if not colon or "=" not in text or os.path.exists(source):
        return source, {}
    pairs = [part.partition("=") for part in text.split(",")]
    own: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    if wrong := [key for key in own if key not in OPTIONS or not own[key]]:
        raise TrimtabError(
            f"cannot read the option {wrong[0]!r} of {source!r}; write name:option=value,..., such "
            f"as {LIKE}, with options of {', '.join(OPTIONS)}"
        )
    if "limit" in own:
        if not own["limit"].isdecimal():
            raise TrimtabError(f"limit is a whole number, not {own['limit']!r} ({source})")
        own["limit"] = int(own["limit"])
    return name, own


def examples_of(source: str, few_shot: int = 0) -> "list[Example]":
    """The examples of a source as ``fit`` names it."""
    from trimtab import data

    name, own = named_options(source)
    return data.read(name, few_shot=few_shot, **own)


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


def _learn_heads(
    lm: "LM", examples: "Sequence[Example]", name: str, place: str, **options: Any
) -> "HeadProbe":
    """Fit a probe of each head."""
    from trimtab import concepts

    say(f"Learning {name} from {len(examples)} examples at {place}, each head")
    show = ERR.is_terminal
    made: HeadProbe = concepts.fit(
        lm, examples, place, name=name, show_progress=show, per_head=True, **options
    )
    return made


def _best_heads(probe: "HeadProbe", count: int = 8) -> Table:
    """The heads that read best on the training prompts."""
    table = Table(box=SIMPLE, header_style="bold", title="Best heads (tokens read right)")
    for title in ("layer", "head", "train", "held out"):
        table.add_column(title, justify="right")
    for layer, head in probe.best_heads(count):
        row = probe.layers.index(layer), head
        parts = (float(values[row]) for values in (probe.accuracy, probe.heldout_accuracy))
        table.add_row(str(layer), str(head), *("" if v != v else f"{v:.2f}" for v in parts))
    return table


def edit_of(probe: "Probe", n_layers: int, dose: float = DEMO.dose) -> "Edit":
    """The edit by the recipe: at those of the probe's layers in its share, or all if none is."""
    layers = [i for i in probe.layers if i in DEMO.layers_of(n_layers)] or probe.layers
    return probe.edit(dose=dose, layers=layers, tokens=DEMO.tokens)


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
