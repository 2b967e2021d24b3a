"""The command line: demo, fit, chat, show, doctor. Knows Trimtab's public calls and a terminal.

Knows no method and no model from the inside. Whatever loads torch is imported inside a command, so
that ``trimtab --help`` comes at once. Results go to stdout, progress and errors to stderr.
"""

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, cast

import typer
from rich.box import ROUNDED
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from trimtab import __version__
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from rich.progress import Progress

    from trimtab.concepts import Probe
    from trimtab.data import Example
    from trimtab.edits import Edit
    from trimtab.lm import LM

OUT = Console(highlight=False)
ERR = Console(highlight=False, stderr=True)


@dataclass(frozen=True)
class Recipe:
    """What the commands do where nothing else is asked for; set by measurement on ``model``."""

    model: str
    concept: str
    place: str
    method: str
    layers: range
    n_layers: int  # of the model that was measured
    dose: float
    questions: tuple[str, ...]
    max_new_tokens: int

    def layers_of(self, n_layers: int) -> range:
        """The same share of the depth in a model of ``n_layers``.

        >>> DEMO.layers_of(DEMO.n_layers) == DEMO.layers
        True
        """
        first, stop = (
            round(n_layers * i / self.n_layers) for i in (self.layers.start, self.layers.stop)
        )
        return range(min(first, n_layers - 1), max(stop, min(first, n_layers - 1) + 1))


DEMO = Recipe(
    model="smollm2-135m",
    concept="happiness",
    place="resid@0: answer[:16]",
    method="mean",
    layers=range(9, 22),
    n_layers=30,
    dose=0.012,
    questions=(
        "How was your day?",
        "What do you think about the weather today?",
        "Tell me about your plans for the weekend.",
    ),
    max_new_tokens=60,
)


class _Commands(TyperGroup):
    """Turns errors that are made on purpose into one line; ``--debug`` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrimtabError as error:
            if ctx.params.get("debug"):
                raise
            _complain(error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command ``trimtab``."""
    app(prog_name="trimtab")


def _print_version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"trimtab {__version__}")
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


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="An alias, a hub id, a folder or a .gguf file.")
]
SeedOption = Annotated[int, typer.Option(help="Chooses the held-out prompts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


# ---- demo ---------------------------------------------------------------------------------------


@app.command()
def demo(
    model: ModelOption = DEMO.model,
    out: Annotated[Path, typer.Option(help="Where to save the edit.")] = Path(DEMO.concept),
    seed: SeedOption = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default what torch chooses.")
    ] = None,
) -> None:
    """Learn [bold]happiness[/bold] and answer three questions against, without and with it."""
    _check_free(out)
    clock = _Clock()
    lm = _load_model(model)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    clock.lap("load")
    from trimtab import data

    examples = data.read(DEMO.concept)
    _say(f"Learning {DEMO.concept} from {len(examples)} built-in examples")
    probe = _learn(lm, examples, DEMO.concept, seed=seed)
    clock.lap("learn")
    _print_accuracy(probe, examples, held_out=0.2, seed=seed)
    clock.restart()
    edit = probe.edit(dose=DEMO.dose, layers=DEMO.layers_of(lm.n_layers))
    answers = _answer_thrice(lm, edit)
    clock.lap("answer")
    _print_answers(answers)
    edit.save(str(out))
    _print_next(lm, out)
    OUT.print(Text(f"\n{clock}", style="dim"))


def _answer_thrice(lm: "LM", edit: "Edit") -> list[list[str]]:
    """Answers against, without and with the edit, per question: one batch, an edit per row."""
    questions = DEMO.questions
    n = len(questions)
    with _passes(lm, f"Answering {n} questions in 3 ways", DEMO.max_new_tokens):
        answers = lm.generate(
            [*questions] * 3,
            edits=[-edit] * n + [None] * n + [edit] * n,
            max_new_tokens=DEMO.max_new_tokens,
        )
    return [answers[i::n] for i in range(n)]


def _print_answers(answers: list[list[str]]) -> None:
    """Three columns, a question above each row of them."""
    heads = (
        ("red", f"against {DEMO.concept}"),
        ("default", "plain"),
        ("green", f"with {DEMO.concept}"),
    )
    OUT.print()
    for number, (question, texts) in enumerate(zip(DEMO.questions, answers, strict=True)):
        table = Table(
            box=ROUNDED,
            expand=True,
            border_style="dim",
            title=f"“{question}”",
            title_style="bold",
            title_justify="left",
            show_header=number == 0,
        )
        for style, head in heads:
            table.add_column(head, ratio=1, header_style=f"bold {style}", style=style)
        table.add_row(*(Text(_ended(_plain(text))) for text in texts))
        OUT.print(table)


def _ended(text: str) -> str:
    """With an ellipsis where the answer was cut off."""
    text = text.strip()
    return text if text.endswith((".", "!", "?", '"', "”", "…")) else f"{text} …"


def _print_next(lm: "LM", out: Path) -> None:
    from rich.syntax import Syntax

    model = lm.describe()["id"] if lm.describe()["id"] != _hub_id(DEMO.model) else DEMO.model
    name = _identifier(out.name)
    code = f"""\
import trimtab as tt
lm = tt.LM.load("{model}")
{name} = tt.load("{out}")
print(lm.generate("{DEMO.questions[0]}", edits={name}))
print(lm.generate("{DEMO.questions[0]}", edits=-{name}))"""
    OUT.print(f"\nSaved to [bold]{out}/[/bold]. Try next:\n")
    commands = Table.grid(padding=(0, 3))
    commands.add_row(
        f"  [bold]trimtab chat --steer {out}[/bold]", "[dim]talk to the happy model[/dim]"
    )
    commands.add_row(
        f"  [bold]trimtab show {out}[/bold]", "[dim]what the saved edit says of itself[/dim]"
    )
    OUT.print(commands)
    OUT.print("\nor in Python:\n")
    OUT.print(Syntax(code, "python", theme="ansi_dark", background_color="default", padding=(0, 2)))


def _hub_id(alias: str) -> str:
    from trimtab import models

    return models.ALIASES.get(alias, alias)


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "edit"


# ---- fit ----------------------------------------------------------------------------------------


@app.command()
def fit(
    source: Annotated[
        str, typer.Argument(help="A built-in set (happiness, humor, ...) or a .jsonl, .json, .csv.")
    ],
    model: ModelOption = DEMO.model,
    place: Annotated[str, typer.Option(help="What to read: site@layers tokens.")] = DEMO.place,
    method: Annotated[str, typer.Option(help="How to find the direction.")] = DEMO.method,
    out: Annotated[
        Path | None, typer.Option(help="Where to save the probe; by default the source's name.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers that chat steers by default, such as 9:22.")
    ] = None,
    dose: Annotated[
        float, typer.Option(help="Strength that chat steers with by default.")
    ] = DEMO.dose,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the prompts that is only tested on.")
    ] = 0.2,
    seed: SeedOption = 0,
) -> None:
    """Learn a concept from labelled examples and save the probe."""
    from trimtab import data

    examples = data.read(source)
    target = out if out is not None else Path(Path(source).stem)
    _check_free(target)
    for warning in data.lint(examples):
        OUT.print(Text.assemble(("warning ", "bold yellow"), _plain(warning)))
    lm = _load_model(model)
    _say(f"Learning {target.name} from {len(examples)} examples at {place}")
    probe = _learn(
        lm,
        examples,
        target.name,
        place=place,
        method=method,
        held_out=held_out,
        seed=seed,
        layers=layers,
        dose=dose,
    )
    _print_accuracy(probe, examples, held_out=held_out, seed=seed)
    probe.save(target)
    OUT.print(
        f"\nSaved to [bold]{target}/[/bold]. Try next:  [bold]trimtab chat --steer {target}[/bold]"
    )


def _learn(
    lm: "LM",
    examples: "Sequence[Example]",
    name: str,
    *,
    place: str = DEMO.place,
    method: str = DEMO.method,
    held_out: float = 0.2,
    seed: int = 0,
    layers: str | None = None,
    dose: float = DEMO.dose,
) -> "Probe":
    """Fit a probe that says how well it reads, and which layers and dose to steer with."""
    from trimtab import concepts
    from trimtab.place import Place

    if method not in concepts.METHODS:
        raise TrimtabError(
            f"no method {method!r}; a method is one of {', '.join(concepts.METHODS)}"
        )
    asked = Place.parse(place).at(tokens="all") if layers is None else Place("resid", layers)
    steered = _shared(asked.layer_indices(lm.n_layers), None if layers else lm.n_layers)
    probe = concepts.fit(
        lm,
        examples,
        place,
        method=cast(Any, method),
        held_out=held_out,
        seed=seed,
        name=name,
        show_progress=ERR.is_terminal,
    )
    missing = [i for i in steered if i not in probe.layers]
    if missing:
        raise TrimtabError(f"--layers {layers} asks for {missing}, which {place!r} does not read")
    scores: dict[str, Any] = {"layers": [*probe.layers]}
    for part in ("accuracy", "heldout_accuracy"):
        values = [round(float(v), 6) for v in getattr(probe, part)]
        scores |= {} if any(map(math.isnan, values)) else {part: values}
    made_by = probe.meta.made_by | {"steer": {"layers": steered, "dose": dose}}
    return replace(probe, meta=replace(probe.meta, made_by=made_by, scores=scores))


def _shared(layers: Sequence[int], n_layers: int | None) -> list[int]:
    """Those of ``layers`` in the recipe's share of the depth, or all if that leaves none."""
    middle = [*layers] if n_layers is None else [i for i in layers if i in DEMO.layers_of(n_layers)]
    return middle or [*layers]


def _print_accuracy(
    probe: "Probe", examples: "Sequence[Example]", *, held_out: float, seed: int
) -> None:
    OUT.print()
    OUT.print(_chart(probe.meta.scores))
    floor = _word_floor(examples, held_out, seed)
    if floor is not None:
        OUT.print(
            Text(f"\nA bag of words, reading whole held-out answers: {floor:.2f}", style="dim")
        )


def _word_floor(examples: "Sequence[Example]", held_out: float, seed: int) -> float | None:
    """Held-out accuracy of a bag of words on the same split; None without scikit-learn."""
    if util.find_spec("sklearn") is None:
        return None
    import torch
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from trimtab import concepts

    labels = [e.label > 0.5 for e in examples]
    groups = [e.prompt for e in examples]
    keep = concepts.split(groups, torch.tensor(labels), held_out, seed).tolist()
    train, test = ([i for i, k in enumerate(keep) if k is side] for side in (True, False))
    if not test or len({labels[i] for i in train}) < 2:
        return None
    texts = [e.completion for e in examples]
    words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    words.fit([texts[i] for i in train], [labels[i] for i in train])
    return float(words.score([texts[i] for i in test], [labels[i] for i in test]))


# ---- chat ---------------------------------------------------------------------------------------


@app.command()
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
    session = Session(
        _load_model(model),
        system=system,
        sampling={"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
    )
    for text in steer or []:
        session.steer(text)
    _say("Ask away. /steer happiness steers, /help says what else there is, Ctrl-D leaves.")
    for line in _lines():
        try:
            if not session.turn(line):
                break
        except TrimtabError as error:
            _complain(error)


@dataclass(frozen=True)
class Steer:
    """One thing that steers a conversation: a name, a strength, the edit and a line about it."""

    strength: float
    edit: "Edit"
    about: str


@dataclass
class Session:
    """A conversation with one model, and what steers it."""

    lm: "LM"
    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, str]] = field(default_factory=list)
    steers: dict[str, Steer] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)  # what names stand for, once looked up

    def turn(self, line: str) -> bool:
        """Do what one line asks for; False to quit."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self.answer(line)
            return True
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit", "/q"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/steer": self.steer,
            "/off": self.off,
            "/show": self.show,
            "/system": self.set_system,
            "/reset": self.reset,
            "/help": self.help,
        }
        if name not in commands:
            raise TrimtabError(f"no command {name!r}; there are {', '.join(commands)} and /quit")
        commands[name](rest.strip())
        return True

    def answer(self, text: str) -> None:
        """Ask the model, and print its answer while it comes. Ctrl-C stops this answer only."""
        asked = [*self.history, {"role": "user", "content": text}]
        pieces: list[str] = []
        edit = sum(s.edit for s in self.steers.values()) if self.steers else None
        stream = self.lm.stream(asked, edits=edit, system=self.system, **self.sampling)  # type: ignore[arg-type]
        OUT.print(Text(f"{self.label()} › ", style="green" if self.steers else "cyan"), end="")
        try:
            for piece in stream:
                pieces.append(str(piece))
                OUT.file.write(_plain(piece))
                OUT.file.flush()
        except KeyboardInterrupt:
            OUT.print(Text(" (stopped)", style="dim"), end="")
        OUT.print("\n")
        if pieces:  # a question that was stopped before its answer began is not kept
            self.history = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def label(self) -> str:
        """What steers, in a few words."""
        told = (f"{Path(name).name}={s.strength:g}" for name, s in self.steers.items())
        return " ".join(told) or "plain"

    def steer(self, text: str) -> None:
        """``name=dose name=dose``: steer with these from now on; 0 stops one."""
        if not text:
            raise TrimtabError("steer by what? /steer humor=0.01, or the folder of an artifact")
        for part in text.split():
            name, strength = _named_number(part)
            if name not in self.found:
                self.found[name] = _find(self.lm, name)
            made = _steer(self.lm, self.found[name], name, strength)
            self.steers.pop(name, None)
            if made.strength:
                self.steers[name] = made
            told = Text(f"{name}: {made.about if made.strength else 'off'}", style="dim")
            OUT.print(told, soft_wrap=True)

    def off(self, _: str = "") -> None:
        """Stop all steering."""
        self.steers.clear()
        OUT.print(Text("steering is off", style="dim"))

    def show(self, _: str = "") -> None:
        """Print what is active."""
        table = Table.grid(padding=(0, 2))
        table.add_row("model", Text(repr(self.lm)))
        table.add_row("system", Text(self.system or "none"))
        table.add_row("turns", str(len(self.history) // 2))
        for name, made in self.steers.items():
            table.add_row("steer", Text(f"{name}: {made.about}"))
        if not self.steers:
            table.add_row("steer", "nothing")
        OUT.print(table)

    def set_system(self, text: str) -> None:
        """Another system message; none without text."""
        self.system = text or None
        OUT.print(Text(f"system: {self.system or 'none'}", style="dim"))

    def reset(self, _: str = "") -> None:
        """Forget the conversation; steering and system message stay."""
        self.history = []
        OUT.print(Text("a new conversation", style="dim"))

    def help(self, _: str = "") -> None:
        """Print the commands."""
        from trimtab import data

        table = Table.grid(padding=(0, 2))
        for name, text in HELP.items():
            table.add_row(Text(name, style="bold"), Text(text))
        OUT.print(table, Text(f"\n{NUMBERS}\n\nConcepts: {', '.join(data.names())}"), sep="\n")


HELP = {
    "/steer name=number ...": "Steer from now on, by a concept or an artifact's folder.",
    "/off": "Stop all steering.",
    "/show": "What is active: layers, dose, system message.",
    "/system text": "Set the system message; without text there is none.",
    "/reset": "Forget the conversation.",
    "/quit": "Leave; so does Ctrl-D. Ctrl-C stops an answer.",
}
NUMBERS = (
    f"The number: of a concept or a probe it is a dose, such as {DEMO.dose:g}, a fraction of the "
    "activation's own length at each layer. Of a saved edit it is a factor, and 1 is as saved. "
    "A negative number steers away, and 0 stops this one."
)


def _named_number(text: str) -> tuple[str, float | None]:
    """``name=0.01``, or a name alone."""
    name, equals, number = text.rpartition("=")
    if not equals:
        return text, None
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (name and math.isfinite(value)):
        raise TrimtabError(f"cannot read {text!r}; write name=number, such as humor=0.01")
    return name, value


def _find(lm: "LM", name: str) -> Any:
    """What a name stands for: a saved artifact, or a built-in concept that is learned now."""
    import trimtab as tt

    path = Path(name).expanduser()
    if path.suffix in (".jsonl", ".json", ".csv") and path.is_file():
        raise TrimtabError(f"{name} holds examples; learn from them first: trimtab fit {name}")
    if path.is_file() or (path / "artifact.json").is_file():
        return tt.load(path)
    known = tt.data.names()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TrimtabError(
            f"no concept and no artifact {name!r}.{hint} Concepts: {', '.join(known)}; or give the "
            "folder that trimtab fit or .save(path) wrote."
        )
    _say(f"Learning {name}")
    return _learn(lm, tt.data.read(name), name)


def _steer(lm: "LM", origin: Any, name: str, strength: float | None) -> Steer:
    """A probe steers by a dose, a saved edit by a factor."""
    from trimtab.artifact import check_model
    from trimtab.concepts import Probe
    from trimtab.edits import Edit

    if not isinstance(origin, Probe | Edit):
        raise TrimtabError(f"{name} is a {type(origin).__name__}, which does not steer")
    check_model(origin.meta, lm.describe())
    if isinstance(origin, Edit):
        factor = 1.0 if strength is None else strength
        places = ", ".join(dict.fromkeys(str(part.place) for part in origin.parts()))
        return Steer(
            factor, factor * origin, f"the saved edit at {places}, times {factor:g} (1 is as saved)"
        )
    layers, advised = _advice(origin, lm.n_layers)
    dose = advised if strength is None else strength
    edit = origin.edit(dose=dose, layers=layers)
    return Steer(dose, edit, f"a dose of {dose:g} at {edit.place}")


def _advice(probe: "Probe", n_layers: int) -> tuple[list[int], float]:
    """Layers and dose: what the probe was saved with, else the recipe's."""
    advice = probe.meta.made_by.get("steer")
    advice = advice if isinstance(advice, dict) else {}
    layers, dose = advice.get("layers"), advice.get("dose")
    known = [i for i in layers if i in probe.layers] if isinstance(layers, list) else []
    return known or _shared(probe.layers, n_layers), dose if _is_number(dose) else DEMO.dose


def _lines() -> Iterator[str]:
    """What is typed or piped in, until it ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                told = Text(f"you › {_plain(line.strip())}", style="bold")
                OUT.print(told, soft_wrap=True)
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


# ---- show ---------------------------------------------------------------------------------------


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="The folder of an artifact or of a recording.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a saved artifact or recording is. Loads no model."""
    facts = _recording_facts(path) if (path / "recording.json").is_file() else _artifact_facts(path)
    if as_json:
        _print_json(facts)
    else:
        _print_facts(facts)
    if facts.get("sha256_ok") is False:
        raise typer.Exit(1)


def _artifact_facts(path: Path) -> dict[str, Any]:
    import trimtab as tt
    from trimtab import artifact

    if path.is_file():  # a foreign format: what can be said of it is what loading finds
        made = tt.load(path)
        kind = f"{type(made).__name__.lower()} from a foreign file"
        facts = {"path": str(path), "kind": kind, "place": str(made.place), "bytes": _bytes(path)}
        return facts | {k: getattr(made.meta, k) for k in ("name", "model", "made_by", "scores")}
    header = artifact.read_header(path)
    keys = ("kind", "name", "place", "model", "made_by", "scores")
    facts = {"path": str(path), **{key: header.get(key) for key in keys}, "bytes": _bytes(path)}
    tensors = path / artifact.TENSORS_NAME
    if not tensors.is_file():
        raise TrimtabError(f"{path} lacks {tensors.name}; save the artifact again")
    with tensors.open("rb") as file:
        facts["sha256_ok"] = hashlib.file_digest(file, "sha256").hexdigest() == header["sha256"]
    if header["kind"] == "probe" and facts["sha256_ok"]:
        facts["scores"] = _probe_scores(path, facts["scores"])
    return facts


def _probe_scores(path: Path, scores: Any) -> dict[str, Any]:
    """A probe's scores with its layers and its held-out accuracy, which lie in its tensors."""
    from trimtab import artifact

    parts = artifact.read(path)
    found: dict[str, Any] = {"layers": parts.extra.get("layers")}
    for part in ("accuracy", "heldout_accuracy"):
        values = [round(float(v), 6) for v in parts.tensors.get(part, ())]
        found |= {} if not values or any(map(math.isnan, values)) else {part: values}
    return {**(scores if isinstance(scores, dict) else {}), **found}


def _recording_facts(path: Path) -> dict[str, Any]:
    from trimtab.recording import Recording

    recording = Recording.load(path)
    places = [
        {"place": str(p), "layers": len(one.layers), "tokens": sum(one.lengths), "width": one.width}
        for p in recording.places
        for one in (recording[p],)
    ]
    model = recording.meta.get("model")
    return {
        "path": str(path), "kind": "recording", "model": model, "rows": len(recording),
        "places": places, "bytes": _bytes(path),
    }  # fmt: skip


def _print_facts(facts: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    for key in ("name", "kind", "place", "rows"):
        if facts.get(key) is not None:
            table.add_row(key, Text(_plain(facts[key]), style="bold" if key == "name" else ""))
    for place in facts.get("places", ()):
        told = f"{place['place']}   {place['layers']} layers × {place['width']} wide, "
        table.add_row("place", Text(f"{told}{place['tokens']} tokens"))
    if isinstance(model := facts.get("model"), dict):
        told = f"{model.get('id')}, {model.get('layers')} layers × {model.get('width')} wide"
        table.add_row("model", Text(_plain(told)))
        told = f"revision {model.get('revision')}, fingerprint {model.get('fingerprint')}"
        table.add_row("", Text(_plain(told)))
    if isinstance(made_by := facts.get("made_by"), dict):
        for i, (key, value) in enumerate(made_by.items()):
            table.add_row("" if i else "made by", Text(_plain(f"{key}: {_short(value)}")))
    table.add_row("size", f"{facts['bytes'] / 1024:,.0f} KiB")
    if "sha256_ok" in facts:
        good = Text("as written", "green") if facts["sha256_ok"] else Text("DIFFERS", "bold red")
        table.add_row("sha256", good)
    OUT.print(table)
    if isinstance(scores := facts.get("scores"), dict) and scores:
        OUT.print()
        OUT.print(_chart(scores))


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        if len(value) > 2 and value == [*range(value[0], value[-1] + 1)]:
            return f"{value[0]}:{value[-1] + 1}"
        return ",".join(map(str, value))
    return str(value)


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


# ---- doctor -------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this installation: versions, devices, the cache, and whether steering works."""
    checks = _check_steering()
    facts: dict[str, Any] = {
        "versions": _versions(),
        "devices": _devices(),
        "cache": _cache(),
        "checks": checks,
        "ok": all(check["ok"] for check in checks),
    }
    if as_json:
        _print_json(facts)
    else:
        _print_doctor(facts)
    if not facts["ok"]:
        raise typer.Exit(1)


PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "huggingface_hub",
    "peft", "datasets", "gguf", "vllm",
)  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"trimtab": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _devices() -> list[str]:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


def _cache() -> dict[str, Any]:
    from trimtab import models

    folder = models.cache_folder()
    there = {alias: models.cache_damage(alias) is None for alias in models.ALIASES}
    return {"folder": str(folder), "models": there}


def _check_steering() -> list[dict[str, Any]]:
    """Whether edits do what they say, on a tiny random model."""
    try:
        return [{"name": name, "ok": ok} for name, ok in _steering_laws()]
    except Exception as error:  # a doctor reports, whatever is broken
        return [{"name": f"steering runs ({type(error).__name__}: {error})", "ok": False}]


def _steering_laws() -> Iterator[tuple[str, bool]]:
    import torch

    from trimtab.chat import Batch
    from trimtab.edits import Add
    from trimtab.place import Place

    lm = _tiny_lm()
    ids = torch.arange(3, 11)[None]
    delta = torch.randn(1, lm.width, generator=torch.Generator().manual_seed(1))
    edit = Add(Place("resid", 1, "answer"), 3 * delta)

    def logits(ids: Any, edits: Any) -> Any:
        with torch.no_grad():
            return lm(Batch(ids, torch.ones_like(ids), torch.tensor([8])), edits).logits

    plain, steered = logits(ids, None), logits(ids, edit)
    yield "an edit changes the logits", not torch.allclose(plain, steered, atol=1e-2)
    yield "before its tokens nothing changes", torch.equal(plain[:, :7], steered[:, :7])
    yield "a strength of 0 changes nothing", torch.equal(plain, logits(ids, 0.0 * edit))
    cached = lm.generate_ids(Batch(ids, torch.ones_like(ids), torch.tensor([8])), edit, 8)[0]
    grown = ids
    for _ in range(8):
        token = logits(grown, edit)[:, -1].argmax(-1, keepdim=True)
        grown = torch.cat([grown, token], 1)
    yield "steering with a cache = without one", cached == grown[0, 8:].tolist()


def _tiny_lm() -> "LM":
    """A random Llama of two layers; its weights are spread wide enough for logits to differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.lm import LM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LM(LlamaForCausalLM(config).eval())


def _print_doctor(facts: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="dim")
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    for i, device in enumerate(facts["devices"]):
        table.add_row("" if i else "devices", device)
    table.add_row("cache", facts["cache"]["folder"])
    for alias, there in facts["cache"]["models"].items():
        table.add_row(
            "", f"{alias}: {'there' if there else 'not yet there; loading it fetches it'}"
        )
    OUT.print(table)
    OUT.print()
    for check in facts["checks"]:
        mark = Text("✔ ", "green") if check["ok"] else Text("✘ ", "bold red")
        OUT.print(mark.append(check["name"], style="default"))


# ---- what they share ----------------------------------------------------------------------------

BLOCKS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], height: int, low: float, high: float) -> list[str]:
    """Numbers as vertical bars, the top line first, with eight steps a line.

    >>> bars([0.5, 0.75, 1.0], 2, 0.5, 1.0)
    ['  █', ' ██']
    """
    share = [min(max((v - low) / (high - low), 0.0), 1.0) for v in values]
    steps = [round(8 * height * s) for s in share]
    lines = [[BLOCKS[min(max(s - 8 * row, 0), 8)] for s in steps] for row in range(height)]
    return ["".join(line) for line in reversed(lines)]


def _chart(scores: Mapping[str, Any]) -> Group:
    """Accuracy by layer, one chart per series, side by side where there is room."""
    series = {"train": scores.get("accuracy"), "held out": scores.get("heldout_accuracy")}
    drawn = []
    for title, values in series.items():
        if not (isinstance(values, list) and values and all(map(_is_number, values))):
            continue
        layers = scores.get("layers")
        fits = isinstance(layers, list) and len(layers) == len(values)
        drawn.append(_one_chart(title, [*(layers if fits else range(len(values)))], values))  # type: ignore[misc]
    if not drawn:
        return Group()
    head = Text("Accuracy by layer (tokens read right; 0.5 is guessing)\n", style="dim")
    return Group(head, Columns(drawn, padding=(0, 4)))


def _one_chart(title: str, layers: Sequence[int], values: Sequence[float]) -> Text:
    best = max(range(len(values)), key=lambda i: values[i])
    thin = -(-len(values) // 64)  # more layers than fit: every second, third, ...
    layers_, shown = layers[::thin], values[::thin]
    made = Text.assemble(
        (f"     {title}", "bold"), f"  best {values[best]:.2f} at layer {layers[best]}\n"
    )
    style = "cyan" if title == "train" else "green"
    lines = bars(shown, 4, 0.5, 1.0)
    for i, line in enumerate(lines):
        axis = {0: "1.0 ┤", len(lines) - 1: "0.5 ┤"}.get(i, "    │")
        made.append(axis, "dim").append(line.ljust(26), style).append("\n")
    return made.append("     " + _ticks(layers_), "dim")


def _ticks(layers: Sequence[int]) -> str:
    """Layer numbers under their bars, every fifth."""
    line = ""
    for i, layer in enumerate(layers):
        if (i == 0 or layer % 5 == 0) and len(line) <= i:
            line = line.ljust(i) + f"{layer} "
    return line + "layer" if len(line) <= len(layers) else line


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(text: object) -> str:
    """Text without control characters: an artifact or a model may hold terminal commands."""
    return "".join(c for c in str(text) if c.isprintable() or c in "\n\t")


def _print_json(facts: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def _say(text: str) -> None:
    ERR.print(Text(text, style="dim"))


def _complain(error: TrimtabError) -> None:
    ERR.print(Text.assemble(("error ", "bold red"), (_plain(error), "red")), soft_wrap=True)


def _check_free(out: Path) -> None:
    """Fail before the work, not after it, where the result cannot be saved."""
    if out.exists() and not (out / "artifact.json").is_file():
        raise TrimtabError(f"{out} exists and is not an artifact; choose another name with --out")


def _load_model(source: str) -> "LM":
    _say(f"Loading {source}")
    from transformers.utils import logging

    from trimtab.lm import LM

    logging.disable_progress_bar()
    return LM.load(source)


@contextmanager
def _passes(lm: "LM", text: str, total: int) -> Iterator[None]:
    """A progress bar that counts the model's passes, one per new token."""
    with _bar() as bar:
        task = bar.add_task(text, total=total)
        hook = lm.model.register_forward_hook(lambda *_: bar.advance(task))
        try:
            yield
        finally:
            hook.remove()


def _bar() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", style="dim"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=ERR, transient=True)


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def restart(self) -> None:
        """What has been done since the last lap does not count."""
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name what has been done since the last lap."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.laps.items())
