"""What the commands share of a terminal: bars, charts, lines and facts. Knows no model."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

OUT = Console(highlight=False)
ERR = Console(highlight=False, stderr=True)
BLOCKS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], height: int, low: float, high: float) -> list[str]:
    """Numbers as vertical bars, the top line first, with eight steps a line.

    >>> bars([0.5, 0.75, 1.0], 2, 0.5, 1.0)
    ['  █', ' ██']
    """
    steps = [round(8 * height * (v - low) / (high - low)) for v in values]
    lines = [[BLOCKS[min(max(s - 8 * row, 0), 8)] for s in steps] for row in range(height)]
    return ["".join(line) for line in reversed(lines)]


def accuracies(parts: Mapping[str, Any]) -> dict[str, list[float]]:
    """Accuracy by layer out of a probe's tensors, as JSON holds it; none where it is unknown."""
    found = {key: [round(float(v), 6) for v in parts.get(key, ())] for key in SERIES}
    return {key: v for key, v in found.items() if v and not any(map(math.isnan, v))}


SERIES = {"accuracy": ("train", "cyan"), "heldout_accuracy": ("held out", "green")}


def chart(scores: Mapping[str, Any]) -> Group:
    """Accuracy by layer, one chart per series, side by side where there is room."""
    drawn = []
    for key, (title, style) in SERIES.items():
        values, layers = scores.get(key), scores.get("layers")
        if not (isinstance(values, list) and values and all(map(is_number, values))):
            continue
        fits = isinstance(layers, list) and len(layers) == len(values)
        drawn.append(one_chart(title, style, layers if fits else range(len(values)), values))  # type: ignore[arg-type]
    if not drawn:
        return Group()
    head = Text("Accuracy by layer (tokens read right; 0.5 is guessing)\n", style="dim")
    return Group(head, Columns(drawn, padding=(0, 4)))


def one_chart(title: str, style: str, layers: Sequence[int], values: Sequence[float]) -> Text:
    """One series: title and best layer, bars with their axis, layer numbers."""
    best = max(range(len(values)), key=lambda i: values[i])
    thin = -(-len(values) // 64)  # more layers than fit: every second, third, ...
    told = f"  best {values[best]:.2f} at layer {layers[best]}\n"
    made = Text.assemble((f"     {title}", "bold"), told)
    for axis, line in zip(
        ("1.0 ┤", "    │", "    │", "0.5 ┤"), bars(values[::thin], 4, 0.5, 1.0), strict=True
    ):
        made.append(axis, "dim").append(line.ljust(26), style).append("\n")
    return made.append("     " + _ticks(layers[::thin]), "dim")


def _ticks(layers: Sequence[int]) -> str:
    """Layer numbers under their bars, every fifth."""
    line = ""
    for i, layer in enumerate(layers):
        if (i == 0 or layer % 5 == 0) and len(line) <= i:
            line = line.ljust(i) + f"{layer} "
    return line + "layer" if len(line) <= len(layers) else line


def is_number(value: object) -> bool:
    """Whether this is a finite number; what is read from a file may be anything."""
    return isinstance(value, int | float) and math.isfinite(value)


def plain(text: object) -> str:
    """Text without control characters: an artifact or a model may hold terminal commands."""
    return "".join(c for c in str(text) if c.isprintable() or c in "\n\t")


def facts_table(rows: Sequence[tuple[str, object]]) -> Table:
    """Names in grey and what they stand for; a name is not repeated from line to line."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    last = ""
    for name, value in rows:
        shown = value if isinstance(value, Text) else Text(plain(value))
        table.add_row("" if name == last else name, shown)
        last = name
    return table


def print_json(facts: Mapping[str, Any]) -> None:
    """The same facts for a program."""
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """A line about what is going on."""
    ERR.print(Text(text, style="dim"))


def complain(error: Exception) -> None:
    """An error in one red line."""
    ERR.print(Text.assemble(("error ", "bold red"), (plain(error), "red")), soft_wrap=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner while something takes long; a line where there is no terminal."""
    if not ERR.is_terminal:
        say(text)
    with ERR.status(Text(text, style="dim")):
        yield
