"""The command chat: a conversation that is steered while it goes on. Knows Trimtab's public calls.

A name in ``/steer name=number`` is a saved artifact or a built-in concept, learned when first used.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from trimtab.cli import demo
from trimtab.cli.demo import DEMO, ModelOption
from trimtab.cli.screen import OUT, complain, facts_table, plain, say
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.edits import Edit
    from trimtab.lm import LM

COMMANDS = {  # each is a method of Session
    "steer": ("name=number ...", "Steer from now on, by a concept or an artifact's folder."),
    "off": ("", "Stop all steering."),
    "show": ("", "What is active: layers, dose, system message."),
    "system": ("text", "Set the system message; without text there is none."),
    "reset": ("", "Forget the conversation."),
    "help": ("", "These lines."),
    "quit": ("", "Leave; so does Ctrl-D. Ctrl-C stops an answer."),
}
NUMBERS = (
    f"The number: of a concept or a probe it is a dose, such as {DEMO.dose:g}, a fraction of the "
    "activation's own length at each layer; of a probe of heads it is the length that is added. Of "
    "a saved edit it is a factor, and 1 is as saved. A negative number steers away, 0 stops this "
    "one, and without a number it is as recommended."
)


def chat(
    model: ModelOption = DEMO.model,
    steer: Annotated[
        list[str] | None,
        typer.Option(help="name=dose: a concept or a saved artifact. Can be given several times."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Talk to a model, and steer it while you talk."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    session = Session(demo.load_model(model), system, sampling)
    for text in steer or []:
        session.steer(text)
    say("Ask away. /steer happiness steers, /help says what else there is, Ctrl-D leaves.")
    for line in _lines():
        try:
            if not session.turn(line):
                break
        except TrimtabError as error:
            complain(error)


class Steer(NamedTuple):
    """One thing that steers a conversation: a strength, the edit and a line about it."""

    strength: float
    edit: "Edit"
    about: str


@dataclass
class Session:
    """A conversation with one model, and what steers it."""

    lm: "LM"
    system_text: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, str]] = field(default_factory=list)
    steers: dict[str, Steer] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)  # what names stand for, once looked up

    def turn(self, line: str) -> bool:
        """Do what one line asks for; False to quit."""
        line = line.strip()
        name, _, rest = line[1:].partition(" ")
        if not line.startswith("/"):
            if line:
                self.answer(line)
        elif name in ("quit", "exit", "q"):
            return False
        elif name not in COMMANDS:
            raise TrimtabError(f"no command '/{name}'; there are /{', /'.join(COMMANDS)}")
        else:
            getattr(self, name)(rest.strip())
        return True

    def answer(self, text: str) -> None:
        """Ask the model, and print its answer while it comes. Ctrl-C stops this answer only."""
        asked = [*self.history, {"role": "user", "content": text}]
        pieces: list[str] = []
        edits: Any = sum(s.edit for s in self.steers.values()) if self.steers else None
        stream = self.lm.stream(asked, edits=edits, system=self.system_text, **self.sampling)
        told = (f"{Path(name).name}={s.strength:g}" for name, s in self.steers.items())
        label = Text(" ".join(told) or "plain", style="green" if self.steers else "cyan")
        OUT.print(label.append(" › "), end="")
        try:
            for piece in stream:
                pieces.append(str(piece))
                OUT.file.write(plain(piece))
                OUT.file.flush()
        except KeyboardInterrupt:
            OUT.print(Text(" (stopped)", style="dim"), end="")
        OUT.print("\n")
        if pieces:  # a question that was stopped before its answer began is not kept
            self.history = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def steer(self, text: str) -> None:
        """``name=dose name=dose``: steer with these from now on; 0 stops one."""
        if not text:
            raise TrimtabError(
                f"steer by what? /steer humor={DEMO.dose:g}, or an artifact's folder"
            )
        for part in text.split():
            name, strength = named_number(part)
            if name not in self.found:
                self.found[name] = _find(self.lm, name)
            made = _steer(self.lm, self.found[name], name, strength)
            self.steers.pop(name, None)
            if made.strength:
                self.steers[name] = made
            _note(f"{name}: {made.about if made.strength else 'off'}")

    def off(self, _: str = "") -> None:
        """Stop all steering."""
        self.steers.clear()
        _note("steering is off")

    def show(self, _: str = "") -> None:
        """Print what is active."""
        steers = [("steer", f"{name}: {made.about}") for name, made in self.steers.items()]
        rows = [("model", repr(self.lm)), ("system", self.system_text or "none")]
        rows += [("turns", str(len(self.history) // 2)), *(steers or [("steer", "nothing")])]
        OUT.print(facts_table(rows))

    def system(self, text: str) -> None:
        """Another system message; none without text."""
        self.system_text = text or None
        _note(f"system: {self.system_text or 'none'}")

    def reset(self, _: str = "") -> None:
        """Forget the conversation; steering and system message stay."""
        self.history = []
        _note("a new conversation")

    def help(self, _: str = "") -> None:
        """Print the commands."""
        from trimtab import data

        table = Table.grid(padding=(0, 2))
        for name, (values, text) in COMMANDS.items():
            table.add_row(Text(f"/{name} {values}", style="bold"), Text(text))
        OUT.print(table, Text(f"\n{NUMBERS}\n\nConcepts: {', '.join(data.names())}"), sep="\n")


def _note(text: str) -> None:
    OUT.print(Text(plain(text), style="dim"), soft_wrap=True)


def named_number(text: str) -> tuple[str, float | None]:
    """``name=0.1``, or a name alone."""
    name, equals, number = text.rpartition("=")
    if not equals:
        return text, None
    with suppress(ValueError):
        if name and math.isfinite(value := float(number)):
            return name, value
    raise TrimtabError(f"cannot read {text!r}; write name=number, such as humor={DEMO.dose:g}")


def _find(lm: "LM", name: str) -> Any:
    """What a name stands for: a saved artifact, or a built-in concept that is learned now."""
    import trimtab as tt

    path = Path(name).expanduser()
    if path.suffix in (".jsonl", ".json", ".csv") and path.is_file():
        raise TrimtabError(f"{name} holds examples; learn from them first: trimtab fit {name}")
    markers = ("artifact.json", "adapter_config.json")  # ours, and PEFT's
    if path.is_file() or any((path / marker).is_file() for marker in markers):
        return tt.load(path)
    known = tt.data.names()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TrimtabError(
            f"no concept and no artifact {name!r}.{hint} Concepts: {', '.join(known)}; or give the "
            "folder that trimtab fit or .save(path) wrote."
        )
    return demo.learn(lm, tt.data.read(name), name)


def _steer(lm: "LM", origin: Any, name: str, strength: float | None) -> Steer:
    """A probe steers by a dose, a saved edit by a factor."""
    from trimtab.artifact import check_model
    from trimtab.concepts import HeadProbe, Probe
    from trimtab.edits import Edit

    if not isinstance(origin, Probe | HeadProbe | Edit):
        raise TrimtabError(f"{name} is a {type(origin).__name__}, which does not steer")
    check_model(origin.meta, lm.describe())
    if isinstance(origin, Edit):
        factor = 1.0 if strength is None else strength
        places = ", ".join(dict.fromkeys(str(part.place) for part in origin.parts()))
        about = f"the saved edit at {places}, times {factor:g} (1 is as saved)"
        return Steer(factor, factor * origin, about)
    if isinstance(origin, HeadProbe):
        scale = 16.0 if strength is None else strength
        return Steer(scale, origin.edit(lm, scale), f"a length of {scale:g} at its 16 best heads")
    if origin.guidance is not None:  # tuned: where, and how strongly if nothing else is said
        tuned = origin.guidance if strength is None else {**origin.guidance, "dose": strength}
        made: Edit = origin.edit(**tuned)
        dose = tuned["dose"]
    else:
        dose = DEMO.dose if strength is None else strength
        made = demo.edit_of(origin, lm.n_layers, dose)
    return Steer(dose, made, f"a dose of {dose:g} at {made.place}")


def _lines() -> Iterator[str]:
    """What is typed or piped in, until it ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                OUT.print(Text(f"you › {plain(line.strip())}", style="bold"), soft_wrap=True)
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and editing)
    while True:
        try:
            yield input("you › ")
        except EOFError:
            OUT.print()
            return
        except KeyboardInterrupt:
            OUT.print(Text("\n/quit or Ctrl-D leaves", style="dim"))
