"""The command line: one app, what it does with errors, and the entry point. Knows no command.

Whatever loads torch is imported inside a command, so that ``trimtab --help`` comes at once.
Results go to stdout, progress and errors to stderr.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.cli import (
    ask,
    chat,
    curate,
    demo,
    distill,
    doctor,
    evaluate,
    screen,
    show,
    solve,
    steer,
    train_reader,
)
from trimtab.errors import TrimtabError


class _Commands(TyperGroup):
    """Turns errors that are made on purpose into one line; ``--debug`` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TrimtabError, ValueError) as error:  # a value that does not fit
            if ctx.params.get("debug"):
                raise
            screen.complain(error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo.demo,
    demo.fit,
    evaluate.tune,
    chat.chat,
    solve.solve,
    distill.distill,
    curate.curate,
    train_reader.train_reader,
    ask.ask,
    steer.steer,
    show.show,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    """The entry point of the command ``trimtab``."""
    app(prog_name="trimtab")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None:
    """Read and steer what a language model is thinking.

    Begin with [bold]trimtab demo[/bold].
    """
