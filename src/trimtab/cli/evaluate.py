"""The commands eval sweep and tune: what an edit does and costs, and how strong it should be.

Knows Trimtab's public calls and how a judge is named on the command line.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from trimtab.cli.demo import DEMO, ModelOption, check_free, load_model
from trimtab.cli.screen import ERR, OUT, plain, say
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.concepts import Probe
    from trimtab.edits import Edit
    from trimtab.evals import Scorer, Setting, Sweep
    from trimtab.lm import LM

app = typer.Typer(no_args_is_help=True, help="Measure what an edit does, beside its baselines.")

JUDGES = (
    'a question ("Is the reply happy?"), a preset (humor, creativity, quality), '
    "lexicon:refusal, lexicon:formality, probe:FOLDER, or words:glad,fun/sad,tired"
)
ArtifactArgument = Annotated[Path, typer.Argument(help="A saved probe or edit.")]
PromptsOption = Annotated[
    Path, typer.Option("--prompts", "-p", help="Prompts: .txt (one a line), .json or .jsonl.")
]
JudgeOption = Annotated[str, typer.Option("--judge", "-j", help=f"Who grades: {JUDGES}.")]
JudgeModelOption = Annotated[
    str | None, typer.Option(help="The model that judges; by default the steered one itself.")
]
EndpointOption = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible URL that judges; needs --judge-model."),
]
ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="Answers whose perplexity is the price: .jsonl, .json or .csv as for fit, or a text "
        "with one answer per prompt; by default the model's own."
    ),
]
TokensOption = Annotated[int, typer.Option(min=1, help="New tokens per answer.")]


@app.command("sweep")
def sweep(
    artifact: ArtifactArgument,
    prompts: PromptsOption,
    judge: JudgeOption,
    scales: Annotated[
        str, typer.Option(help="Comma-separated; doses of a probe, factors of an edit.")
    ] = "-0.04,-0.03,-0.02,-0.01,0,0.01,0.02,0.03,0.04",
    ask: Annotated[
        str | None, typer.Option(help='The prompt baseline, e.g. "Answer happily."')
    ] = None,
    reference: ReferenceOption = None,
    tokens: Annotated[str, typer.Option(help="Which tokens a probe steers.")] = "all",
    top_layers: Annotated[int, typer.Option(help="How many layers a probe steers.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for all results; resumes there.")] = Path(
        "sweep"
    ),
    model: ModelOption = DEMO.model,
    judge_model: JudgeModelOption = None,
    endpoint: EndpointOption = None,
    max_new_tokens: TokensOption = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Answer prompts at many strengths at once; judge effect and perplexity beside baselines.

    Writes sweep.json, sweep.csv, sweep.png and a page to read, sweep.html. A sweep that was
    stopped goes on when the same command is given again.
    """
    import trimtab as tt

    numbers, graded = _numbers(scales), judge_of(judge, judge_model, endpoint)
    listed = tt.selfcontrol.read_prompts(prompts)
    pairs = None if reference is None else _references(reference, listed)
    make = _maker(tt.load(artifact), tokens, top_layers)
    lm = load_model(model)
    say(f"Sweeping {scales} over {len(listed)} prompts")
    found = tt.evals.sweep(
        lm,
        make,
        numbers,
        listed,
        graded(lm),
        pairs,
        ask=ask,
        baselines=_baselines(make(max(numbers, key=abs))),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out=out,
        title=str(artifact),
        show_progress=ERR.is_terminal,
    )
    found.csv(out / "sweep.csv")
    found.page(out / "sweep.html")
    print_table(found)
    try:
        found.plot(out / "sweep.png")
    except TrimtabError as error:  # the page says the same in numbers
        say(f"No sweep.png: {error}")
    OUT.print(Text.assemble("\nSaved to ", (f"{out}/", "bold"), "; read ", f"{out}/sweep.html"))


def tune(
    probe: Annotated[Path, typer.Argument(help="A saved probe (trimtab fit).")],
    prompts: PromptsOption,
    judge: JudgeOption,
    examples: Annotated[
        str | None,
        typer.Option(
            help="Examples of the concept (a built-in set or a file): with them each layer may get "
            "a dose of its own."
        ),
    ] = None,
    budget: Annotated[int, typer.Option(help="Generated tokens in all.")] = 40_000,
    max_ratio: Annotated[
        float, typer.Option(help="How much the perplexity of plain answers may rise.")
    ] = 1.25,
    out: Annotated[
        Path | None, typer.Option(help="Where to save the tuned probe; by default in place.")
    ] = None,
    model: ModelOption = DEMO.model,
    judge_model: JudgeModelOption = None,
    endpoint: EndpointOption = None,
    max_new_tokens: TokensOption = 40,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Find a probe's layers, tokens and dose, and store the choice in its artifact.

    Afterwards the artifact steers by itself: edits=tt.load("humor"). A search that was stopped goes
    on when the same command is given again.
    """
    import trimtab as tt

    target = probe if out is None else out
    check_free(target)
    graded = judge_of(judge, judge_model, endpoint)
    loaded, listed = tt.load(probe), tt.selfcontrol.read_prompts(prompts)
    if not isinstance(loaded, tt.Probe):
        raise TrimtabError(f"{probe} holds {type(loaded).__name__}; tune a probe (trimtab fit)")
    labelled = None if examples is None else tt.data.read(examples)
    lm = load_model(model)
    journal = target.with_name(f".{target.name}-tuning.jsonl")
    found = tt.evals.tune(
        lm,
        loaded,
        listed,
        graded(lm),
        examples=labelled,
        budget=budget,
        max_ratio=max_ratio,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out=journal,
        show_progress=ERR.is_terminal,
    )
    found.probe.save(target)
    journal.unlink()
    _print_settings(found.frontier, found.best, found.runner_up, found.baseline)
    OUT.print(Text.assemble("\nSaved to ", (f"{target}/", "bold"), ". Try next:\n"))
    OUT.print(Text(f"  trimtab chat --steer {target}", "bold"))


def judge_of(judge: str, judge_model: str | None, endpoint: str | None) -> "Callable[[LM], Scorer]":
    """The judge of this name (see ``JUDGES``), once the model that is steered is there.

    A name that is none is told at once, before a model is loaded.
    """
    import trimtab as tt
    from trimtab import evals

    kind, _, rest = judge.partition(":")
    if endpoint is not None:
        if judge_model is None:
            raise TrimtabError("--endpoint needs the model's name there: --judge-model NAME")
        if kind in ("lexicon", "words", "probe") and rest:
            raise TrimtabError(f"--endpoint asks a question or a preset; {judge!r} needs no server")
        question = evals.PRESETS[judge][0] if judge in evals.PRESETS else judge
        return _always(evals.Endpoint(endpoint, judge_model, question))
    if kind == "lexicon" and rest in ("refusal", "formality"):
        return _always(getattr(evals.Lexicon, rest)())
    if kind == "words" and rest:
        having, _, against = rest.partition("/")
        return _always(evals.Lexicon(_words(having), _words(against)))

    def judging(lm: "LM") -> "LM":
        return lm if judge_model is None else load_model(judge_model)

    if kind == "probe" and rest:
        if not isinstance(probe := tt.load(rest), tt.Probe):
            raise TrimtabError(f"{rest} holds {type(probe).__name__}, which reads nothing")
        return lambda lm: evals.Reading(judging(lm), probe)
    if judge.endswith("?"):
        return lambda lm: evals.YesNo(judging(lm), judge)
    if judge in evals.PRESETS:
        return lambda lm: evals.YesNo.preset(judging(lm), judge)
    raise TrimtabError(f"no judge {judge!r}; there are: {JUDGES}")


def _always(scorer: "Scorer") -> "Callable[[LM], Scorer]":
    return lambda lm: scorer


def _references(file: Path, prompts: list[str]) -> list[tuple[Any, str]]:
    """Reference answers as (prompt, answer) pairs, checked against the prompts."""
    from trimtab import data
    from trimtab.artifact import user_path
    from trimtab.evals.sweep import references

    if file.suffix.lower() in (".json", ".jsonl", ".csv"):
        found: list[Any] = [*data.read(file)]
        if not any(example.prompt for example in found):
            found = [example.completion for example in found]
    else:
        try:
            lines = user_path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise TrimtabError(f"cannot read reference answers from {file}: {error}") from None
        found = [line for line in lines if line.strip()]
    return references(found, list(prompts))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _maker(loaded: Any, tokens: str, top_layers: int) -> "Callable[[float], Edit]":
    """What turns a scale into an edit: a dose of a probe, a factor of an edit."""
    import trimtab as tt

    if isinstance(loaded, tt.Edit):
        return lambda scale: scale * loaded
    if not isinstance(loaded, tt.Probe):
        raise TrimtabError(f"cannot steer by {type(loaded).__name__}; give a probe or an edit")
    if loaded.guidance is not None:
        return lambda dose: _with_dose(loaded, dose)
    return lambda dose: loaded.edit(dose=dose, top_layers=top_layers, tokens=tokens)


def _baselines(edit: "Edit") -> tuple[str, ...]:
    """All baselines, without the random direction where the edit has none."""
    from trimtab import evals

    try:
        evals.random_like(edit, 0)
    except ValueError as error:
        say(f"No random baseline: {error}")
        return tuple(name for name in evals.BASELINES if name != "random")
    return evals.BASELINES


def _with_dose(probe: "Probe", dose: float) -> "Edit":
    return probe.edit(**{**(probe.guidance or {}), "dose": dose})


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
        return found
    except ValueError:
        raise TrimtabError(f"--scales are numbers with commas between, not {text!r}") from None


def print_table(found: "Sweep") -> None:
    """A sweep's arms, and its PNES."""
    table = Table(box=SIMPLE, header_style="bold")
    for name in ("arm", "scale", "effect", "perplexity ratio", "fluency", "repetition"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for line in found.table():
        scale = "" if line["scale"] is None else f"{line['scale']:g}"
        effect = f"{line['effect']:.3f} ± {line['interval']:.3f}"
        numbers = (f"{line[k]:.2f}" for k in ("ratio", "fluency", "repetition"))
        table.add_row(plain(line["arm"]), scale, effect, *numbers)
    OUT.print(table)
    try:
        pnes = found.pnes
    except (TrimtabError, ValueError) as error:
        say(f"No PNES: {error}")
        return
    low, high = pnes.interval
    told = f"PNES {pnes.value:.3f} (95 %: {low:.3f} to {high:.3f}), r² {pnes.r2:.2f}"
    OUT.print(Text(told, style="bold"))


def _print_settings(
    frontier: "list[Setting]", best: "Setting", runner_up: "Setting | None", baseline: float
) -> None:
    table = Table(box=SIMPLE, header_style="bold", title="Most effect for each perplexity")
    for name in ("layers", "tokens", "dose", "effect", "perplexity ratio", ""):
        table.add_column(name)
    shown = {id(best): "chosen", id(runner_up): "runner-up"}
    rows = [*frontier, *(s for s in (best, runner_up) if s is not None and s not in frontier)]
    for setting in rows:
        facts = asdict(setting)
        told = (f"{facts[k]:.3g}" for k in ("dose", "effect", "ratio"))
        layers = _span(setting.layers) + (", each its own" if setting.weights else "")
        tokens = setting.tokens
        if setting.first:
            tokens += ", {1:g}x at the first {0}".format(*setting.first)
        table.add_row(layers, tokens, *told, shown.get(id(setting), ""))
    OUT.print(table)
    OUT.print(Text(f"Without an edit the effect is {baseline:.3g}.", style="dim"))


def _span(layers: tuple[int, ...]) -> str:
    """Layers in a few characters: a run by its ends."""
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
