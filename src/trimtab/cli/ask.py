"""The command ask: questions about a prompt's activations. Knows Trimtab's public calls."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from trimtab.cli.demo import DEMO, ModelOption, load_model
from trimtab.cli.screen import OUT, plain, print_json, working
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.latentqa import Reader
    from trimtab.lm import LM

QUESTIONS = (
    "What type of persona will the assistant adopt?",
    "What is the assistant's goal in the conversation?",
    "How will the assistant express itself?",
)
ReaderOption = Annotated[
    Path | None,
    typer.Option(help="A reader's folder (trimtab train-reader), or a PEFT folder of a decoder."),
]


def ask(
    prompt: Annotated[str, typer.Argument(help="What the model reads.")],
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Can be given several times.")
    ] = None,
    reader: ReaderOption = None,
    model: ModelOption = DEMO.model,
    system: Annotated[
        str | None, typer.Option(help="A system text; its own activations are not shown.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="What the model has answered (or has begun to answer).")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Another layer to read.")] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Show what is said without the activations, too.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Ask a model's activations in plain language."""
    lm = load_model(model)
    made = load_reader(reader, lm)
    asked = question or list(QUESTIONS)
    target = _target(prompt, system, answer)
    with working(f"Asking {len(asked)} questions"):
        found = made.ask(
            target, asked, layer=layer, evidence=evidence, max_new_tokens=max_new_tokens
        )
    if json:
        print_json(
            {"prompt": prompt, "answers": [_facts(q, a) for q, a in zip(asked, found, strict=True)]}
        )
    else:
        OUT.print(_table(asked, found))


def load_reader(path: Path | None, lm: "LM") -> "Reader":
    """The reader at a path, else the one that comes with the package for this model."""
    from trimtab import latentqa

    if path is None:
        path = latentqa.builtin(lm)
    if path is None:
        raise TrimtabError(
            "no reader comes with the package for this model; train one with trimtab train-reader, "
            "and give its folder with --reader"
        )
    return latentqa.Reader.load(path, lm)


def _target(prompt: str, system: str | None, answer: str | None) -> Any:
    from trimtab.latentqa import Item

    if system is not None:
        return Item(system=system, stimulus_user=prompt, stimulus_model=answer)
    return prompt if answer is None else (prompt, answer)


def _facts(question: str, found: Any) -> dict[str, Any]:
    if isinstance(found, str):
        return {"question": question, "answer": found}
    facts = {"question": question, "answer": found.answer, "none": found.none}
    return facts | {"shuffled": found.shuffled, "gain": round(found.gain, 4)}


def _table(questions: list[str], found: list[Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for question, one in zip(questions, found, strict=True):
        facts = _facts(question, one)
        table.add_row("", Text(plain(question), style="bold"))
        table.add_row("reader", Text(plain(facts["answer"])))
        if "gain" in facts:
            table.add_row("without", Text(plain(facts["none"]), style="dim"))
            table.add_row("shuffled", Text(plain(facts["shuffled"]), style="dim"))
            table.add_row("gain", Text(f"{facts['gain']:+.3f} nats per token over no activations"))
    return table
