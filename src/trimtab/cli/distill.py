"""The command distill: one controller out of a folder of solved prompts. Knows the public calls."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from trimtab.cli.demo import DEMO, ModelOption, check_free, load_model
from trimtab.cli.screen import OUT, say


def distill(
    targets: Annotated[Path, typer.Argument(help="The folder that [bold]solve[/bold] wrote.")],
    out: Annotated[Path, typer.Option(help="Where to save the controller.")] = Path("controller"),
    model: ModelOption = DEMO.model,
    length: Annotated[int, typer.Option(help="Pairs that start at activations.")] = 16,
    adapter_length: Annotated[int, typer.Option(help="Pairs that start at random.")] = 32,
    rank: Annotated[
        int | None, typer.Option(help="Learn a low-rank map of this rank instead (LoRA only).")
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often each prompt is seen.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Prompts in one step.")] = 8,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal controllers.")] = 0,
) -> None:
    """Distil solved prompts into one [bold]controller[/bold]. Goes on where it was stopped."""
    from trimtab import prefix, selfcontrol
    from trimtab.artifact import user_path

    out = user_path(out)
    check_free(out)
    solutions = selfcontrol.read_targets(targets)
    lm = load_model(model)
    work = out.with_name(f".{out.name}-work")
    controller = prefix.distill(
        lm,
        solutions,
        length,
        adapter_length,
        rank=rank,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        out=work,
        name=out.name,
    )
    controller.save(out)
    shutil.rmtree(work, ignore_errors=True)  # its result is safe now
    matched = controller.meta.scores["matched"]
    say(f"Distilled {len(solutions)} prompts: {matched:.0%} of their held-out shift is matched")
    OUT.print(Text(f"trimtab chat --steer {out}=1", style="bold"))
