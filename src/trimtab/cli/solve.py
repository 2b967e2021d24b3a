"""The command solve: prompts in, a folder of solved prompts out. Knows Trimtab's public calls."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from trimtab.cli.demo import DEMO, ModelOption, load_model
from trimtab.cli.screen import OUT, plain

if TYPE_CHECKING:
    from trimtab.selfcontrol import Judge


def solve(
    prompts: Annotated[
        Path, typer.Argument(help="A file of prompts: .txt (one per line), .json, .jsonl or .csv.")
    ],
    judge: Annotated[
        list[str], typer.Option(help="A built-in attribute such as happiness, or a question.")
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for what is found; resumed if it is there.")
    ],
    model: ModelOption = DEMO.model,
    yes: Annotated[str, typer.Option(help="The word to steer towards, of a question.")] = "Yes",
    no: Annotated[str, typer.Option(help="The other word of a question.")] = "No",
    away: Annotated[bool, typer.Option("--away", help="Steer away instead.")] = False,
    place: Annotated[str, typer.Option(help="Where to steer.")] = "resid@all prompt",
    steps: Annotated[int, typer.Option(min=1, help="Iterations at most.")] = 3,
    step_size: Annotated[
        float, typer.Option(help="The smallest step, in percent of a layer's usual length.")
    ] = 0.5,
    search: Annotated[int, typer.Option(min=1, help="Step sizes tried, each twice the last.")] = 5,
    branches: Annotated[int, typer.Option(min=1, help="Answers per step size.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 64,
    min_gain: Annotated[float, typer.Option(help="Keep prompts whose score rose by more.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of random choices, where there are any.")] = 0,
) -> None:
    """Steer answers to many prompts by the model's own judgement of them.

    Stopped at any moment, the same command goes on where it was.
    """
    from trimtab import selfcontrol

    judges = [_judge(text, yes, no, away) for text in judge]
    listed = selfcontrol.read_prompts(prompts)
    kept = selfcontrol.targets(
        load_model(model),
        listed,
        judges,
        out,
        place,
        steps=steps,
        step_size=step_size,
        search=search,
        branches=branches,
        max_new_tokens=max_new_tokens,
        min_gain=min_gain,
        seed=seed,
    )
    _print(selfcontrol.read_records(out), len(kept), out)


def _judge(text: str, yes: str, no: str, away: bool) -> "Judge":
    from trimtab.selfcontrol import Judge, names

    asks = " " in text or "?" in text
    made = Judge(text, yes=yes, no=no) if asks and text not in names() else Judge.named(text)
    return made.away() if away else made


def _print(records: list[dict[str, Any]], kept: int, out: Path) -> None:
    """The first prompts with both answers, and what came of all."""
    table = Table(expand=True, border_style="dim")
    for name, ratio in (("prompt", 2), ("first answer", 3), ("steered", 3)):
        table.add_column(name, ratio=ratio)
    for record in [r for r in records if r["edit"]][:5]:
        table.add_row(
            Text(plain(record["prompt"])),
            Text(plain(f"{record['first_score']:.3f}  {record['first_answer'].strip()}")),
            Text(plain(f"{record['score']:.3f}  {record['answer'].strip()}")),
        )
    OUT.print(table)
    before, after = (
        sum(record[name] for record in records) / len(records) for name in ("first_score", "score")
    )
    OUT.print(f"{len(records)} prompts, {kept} kept. Mean score {before:.3f} → {after:.3f}")
    OUT.print(Text.assemble("Saved to ", (f"{out}/", "bold")))
