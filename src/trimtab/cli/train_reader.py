"""The command train-reader: dialogues in, a reader out. Knows Trimtab's public calls."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from trimtab.cli.demo import DEMO, ModelOption, check_free, load_model
from trimtab.cli.screen import OUT, facts_table, say
from trimtab.errors import TrimtabError


def train_reader(
    items: Annotated[
        list[Path], typer.Argument(help="Dialogues: .json or .jsonl, in LatentQA's format.")
    ],
    qa: Annotated[
        Path | None, typer.Option(help="Questions and answers by label: .json or .jsonl.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to save the reader.")] = Path("reader"),
    model: ModelOption = DEMO.model,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    templates: Annotated[
        bool, typer.Option("--templates", help="Make questions of items that have none.")
    ] = False,
    read_layer: Annotated[str, typer.Option(help="'15', '10:20', '5,15' or 'sampled'.")] = "15",
    write_layer: Annotated[int, typer.Option(help="Whose output they replace.")] = 0,
    write: Annotated[str, typer.Option(help="replace or add.")] = "replace",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Of the adapter.")] = 0.05,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-5,
    epochs: Annotated[float, typer.Option(help="Passes over the questions.")] = 5.0,
    steps: Annotated[int | None, typer.Option(help="Instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches in a step.")] = 1,
    ema: Annotated[float | None, typer.Option(help="Keep a running mean, e.g. 0.999.")] = None,
    last: Annotated[int | None, typer.Option(help="Read so many tokens at most.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of labels kept for testing.")] = 0.1,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between tests.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = 100,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="FSDP2, under torchrun.")] = False,
    tracker: Annotated[str, typer.Option(help="jsonl, wandb or trackio.")] = "jsonl",
    seed: Annotated[int, typer.Option(help="Of order, dropout and split.")] = 0,
) -> None:
    """Train a decoder that answers questions about a model's activations.

    Stopped at any moment, the same command goes on from its last checkpoint. Under torchrun all
    processes train together.
    """
    from trimtab import latentqa

    check_free(out)
    listed = latentqa.attach(
        latentqa.read_items(items), None if qa is None else latentqa.read_qa(qa)
    )
    if templates:
        listed += _from_templates(latentqa.read_items(items), {item.label for item in listed})
    if not listed:
        raise TrimtabError("none of the items has a question: give --qa, or --templates")
    say(f"{len(listed)} items, {sum(len(i.qa) for i in listed)} questions")
    reader = latentqa.train(
        _model(model, dtype),
        listed,
        read_layer=read_layer if not read_layer.isdigit() else int(read_layer),
        write_layer=write_layer,
        write=write,  # type: ignore[arg-type]
        out=out,
        rank=rank,
        dropout=dropout,
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        ema=ema,
        last=last,
        held_out=held_out,
        evaluate_every=evaluate_every,
        save_every=save_every,
        checkpointing=checkpointing,
        bf16=bf16,
        shard=shard,
        tracker=tracker,
        seed=seed,
        name=out.name,
    )
    told: list[tuple[str, object]] = [("saved", out), ("log", f"{out}-training/log.jsonl")]
    OUT.print(facts_table([*told, *((k, f"{v:.3f}") for k, v in reader.meta.scores.items())]))
    OUT.print(Text(f'\ntrimtab ask "Tell me about cats." --reader {out}', style="dim"))


def _model(source: str, dtype: str | None) -> Any:
    from trimtab.lm import LM

    return load_model(source) if dtype is None else LM.load(source, dtype=dtype)


def _from_templates(items: list[Any], have: set[str]) -> list[Any]:
    """Items without questions of their own, with those that templates make of their text."""
    from trimtab import latentqa

    bare = [item for item in items if item.label not in have]
    return [replace(i, qa=pairs) for i in bare if (pairs := latentqa.template_qa(i))]
