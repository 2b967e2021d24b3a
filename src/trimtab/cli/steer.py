"""The command steer: one sentence in, an edit of the model out. Knows Trimtab's public calls."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from trimtab.cli.ask import ReaderOption, load_reader
from trimtab.cli.demo import DEMO, ModelOption, check_free, load_model
from trimtab.cli.screen import OUT, plain, say
from trimtab.errors import TrimtabError


def steer(
    behaviour: Annotated[
        str, typer.Argument(help='"be a passionate vegan", or a file of wanted answers.')
    ],
    out: Annotated[Path, typer.Option(help="Where to save the edit.")] = Path("steered"),
    reader: ReaderOption = None,
    model: ModelOption = DEMO.model,
    prompts: Annotated[
        Path | None, typer.Option(help="Ordinary instructions: .txt, a line each.")
    ] = None,
    find: Annotated[str, typer.Option(help="lora (an adapter) or add (a vector).")] = "lora",
    layers: Annotated[
        str | None, typer.Option(help="Such as 5:16; by default all up to the read layer.")
    ] = None,
    one_layer: Annotated[
        bool, typer.Option("--one-layer", help="One loss at the read layer, not one per layer.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Instructions gone through.")] = 30,
    lr: Annotated[
        float | None,
        typer.Option(help="Adam's step; of vectors, in units of a layer's usual length."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
) -> None:
    """Steer by a sentence: find the edit under which a reader would say so of the model."""
    from trimtab import latentqa

    if find not in ("lora", "add"):
        raise TrimtabError(f"--find is lora or add, not {find!r}")
    check_free(out)
    lm = load_model(model)
    made = load_reader(reader, lm)
    pairs = latentqa.wanted(behaviour)
    for question, answer in pairs[:4]:
        say(f"{question} {answer}")
    edit = latentqa.steer(
        lm,
        made,
        pairs,
        _prompts(prompts),
        find=find,  # type: ignore[arg-type]
        per_layer=not one_layer,
        layers=layers,
        samples=samples,
        lr=lr,
        seed=seed,
        name=out.name,
        out=out,
    )
    questions = list(DEMO.questions)
    answers = lm.generate(
        questions * 2,
        edits=[None] * len(questions) + [edit] * len(questions),
        max_new_tokens=DEMO.max_new_tokens,
    )
    table = Table(expand=True, border_style="dim")
    for name in ("question", "plain", "steered"):
        table.add_column(name, ratio=1)
    n = len(questions)
    for row in zip(questions, answers[:n], answers[n:], strict=True):
        table.add_row(*(Text(plain(cell)) for cell in row))
    OUT.print(table)
    OUT.print(Text(f"saved {out}; steer with it: trimtab chat --steer {out}=1", style="dim"))


def _prompts(file: Path | None) -> list[str]:
    """Ordinary instructions: those of a file, else the prompts of the built-in sets."""
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise TrimtabError(f"cannot read {file}: {error.strerror}") from None
        return [line for line in lines if line]
    from trimtab import data

    found = [e.prompt for name in data.names() for e in data.read(name)]
    return [p for p in dict.fromkeys(found) if isinstance(p, str)]
