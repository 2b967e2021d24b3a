"""The command curate: goals and personas in, a reader's training data out. Knows public calls."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from trimtab.cli.demo import DEMO, load_model
from trimtab.cli.screen import OUT, facts_table, plain
from trimtab.errors import TrimtabError


def curate(
    descriptions: Annotated[
        Path, typer.Argument(help="Goals and personas: .txt, one a line, such as 'a pirate'.")
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for what is written; resumed if it is there.")
    ] = Path("curated"),
    writer: Annotated[
        str, typer.Option(help="Who writes: a model here, or an OpenAI-compatible URL.")
    ] = DEMO.model,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model's name at the URL.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Of control, stimulus, stimulus_completion, system.")
    ] = "control,stimulus,system",
    stimuli: Annotated[int, typer.Option(min=1, help="Messages per description.")] = 2,
    pairs: Annotated[int, typer.Option(min=1, help="Questions per description.")] = 4,
    tries: Annotated[int, typer.Option(min=1, help="Requests for one piece at most.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Descriptions at a time.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Have a model write dialogues and questions to train a reader on.

    The key of an endpoint is read from OPENAI_API_KEY. Stopped at any moment, the same command goes
    on where it was.
    """
    from trimtab import latentqa

    remote = writer.startswith(("http://", "https://"))
    if remote and model is None:
        raise TrimtabError("--writer is a URL: give the model's name there with --model")
    if model is not None and not remote:
        raise TrimtabError(f"--model names a model at a URL; --writer {writer!r} is none")
    latentqa.curate(
        writer if remote else load_model(writer),
        descriptions,
        out,
        kinds=[kind.strip() for kind in kinds.split(",")],  # type: ignore[misc]
        stimuli=stimuli,
        pairs=pairs,
        model=model,
        seed=seed,
        temperature=temperature,
        tries=tries,
        concurrency=concurrency,
    )
    _print(json.loads((out.expanduser() / "record.json").read_text(encoding="utf-8")), out)


def _print(record: dict[str, Any], out: Path) -> None:
    """What came of it, stage by stage, and what to do with it."""
    told: list[tuple[str, object]] = []
    for name, stage in record["stages"].items():
        lost = ", ".join(f"{count} {fault}" for fault, count in stage["dropped"].items())
        told.append((name, f"{stage['kept']} kept; dropped: {lost or 'none'}"))
    told += [("items", f"{count} {kind}") for kind, count in record["items"].items()]
    told += [("nothing from", label) for label in record["nothing_from"]]
    OUT.print(facts_table(told))
    OUT.print(Text.assemble("Saved to ", (f"{out}/", "bold")))
    OUT.print(Text(f"\ntrimtab train-reader {plain(out / 'items.jsonl')}", style="dim"))
