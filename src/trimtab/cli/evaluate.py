"""The commands eval sweep and tune: what an edit does and costs, and how strong it should be.

Knows Trimtab's public calls.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from trimtab.cli.demo import DEMO, ModelOption, check_free, examples_of, load_model
from trimtab.cli.judging import JUDGES, judge_of
from trimtab.cli.screen import ERR, OUT, plain, say
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.edits import Edit
    from trimtab.evals import Setting, Sweep
    from trimtab.lm import LM

    Make = Callable[[float], Edit]

app = typer.Typer(no_args_is_help=True, help="Measure what an edit does, beside its baselines.")

# What is swept where nothing else is asked for, by what steers.
DOSES = "-0.04,-0.03,-0.02,-0.01,0,0.01,0.02,0.03,0.04"
FACTORS = "-2,-1.5,-1,-0.5,0,0.5,1,1.5,2"
LENGTHS = "-32,-16,-8,-4,0,4,8,16,32"
ArtifactArgument = Annotated[Path, typer.Argument(help="A saved probe or edit.")]
PromptsOption = Annotated[
    Path, typer.Option("--prompts", "-p", help="Prompts: .txt (one a line), .json, .jsonl or .csv.")
]
JudgeOption = Annotated[str, typer.Option("--judge", "-j", help=f"Who grades: {JUDGES}.")]
JudgeModelOption = Annotated[
    str | None, typer.Option(help="The model that judges; by default the steered one itself.")
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        help="An OpenAI-compatible URL that judges; needs --judge-model. Its key is OPENAI_API_KEY."
    ),
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
        str | None,
        typer.Option(
            help=f"Comma-separated. Doses of a probe, by default {DOSES}; factors of an edit "
            f"({FACTORS}); lengths of a probe of heads ({LENGTHS})."
        ),
    ] = None,
    ask: Annotated[
        str | None, typer.Option(help='The prompt baseline, e.g. "Answer happily."')
    ] = None,
    reference: ReferenceOption = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Which tokens a probe steers; by default all, or as it was tuned."),
    ] = None,
    top_layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many layers a probe steers; by default 16, or as it was tuned."
        ),
    ] = None,
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
    from trimtab.artifact import user_path

    out = user_path(out)
    loaded, listed = tt.load(artifact), tt.selfcontrol.read_prompts(prompts)
    scales = _usual(loaded) if scales is None else scales
    numbers = _numbers(scales)
    pairs = None if reference is None else _references(reference, listed)
    maker = _maker(loaded, tokens, top_layers)
    graded = judge_of(judge, judge_model, endpoint)
    lm = load_model(model)
    say(f"Sweeping {scales} over {len(listed)} prompts")
    make = maker(lm)
    found = tt.evals.sweep(
        lm,
        make,
        numbers,
        listed,
        graded(lm),
        pairs,
        ask=ask,
        baselines=_baselines(make(max(numbers, key=abs)), ask),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out=out,
        title=str(artifact),
        show_progress=ERR.is_terminal,
    )
    found.csv(out / "sweep.csv")
    found.page(out / "sweep.html")
    print_table(found)
    if ask is None:
        say('Just asking is left out, the baseline to beat: give --ask "Answer happily."')
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
            help="Examples of the concept, named as for fit: with them each layer may get a dose "
            "of its own."
        ),
    ] = None,
    reference: ReferenceOption = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to try, such as 5:22. Can be given several times; by default windows over "
            "the depth and the best ones."
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens to try, such as answer[:4]. Can be given several times; by default all, "
            "answer, answer[:4] and answer[:1]."
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
    from trimtab.artifact import user_path
    from trimtab.evals.tune import SELECTORS

    target = user_path(probe if out is None else out)
    check_free(target)
    loaded, listed = tt.load(probe), tt.selfcontrol.read_prompts(prompts)
    if not isinstance(loaded, tt.Probe):
        raise TrimtabError(f"{probe} holds {type(loaded).__name__}; tune a probe (trimtab fit)")
    choices: list[Any] = [loaded.layers] if not layers else [*layers]
    for own, some in product(choices, tokens or SELECTORS):
        loaded.edit(dose=0.01, layers=own, tokens=some)  # says what does not fit
    pairs = None if reference is None else _references(reference, listed)
    labelled = None if examples is None else examples_of(examples)
    graded = judge_of(judge, judge_model, endpoint)
    lm = load_model(model)
    journal = target.with_name(f".{target.name}-tuning.jsonl")
    found = tt.evals.tune(
        lm,
        loaded,
        listed,
        graded(lm),
        pairs,
        examples=labelled,
        budget=budget,
        max_ratio=max_ratio,
        max_new_tokens=max_new_tokens,
        layers=layers or None,
        tokens=tokens or SELECTORS,
        batch_size=batch_size,
        out=journal,
        show_progress=ERR.is_terminal,
    )
    found.probe.save(target)
    journal.unlink()
    _print_settings(found.frontier, found.best, found.runner_up, found.baseline)
    OUT.print(Text.assemble("\nSaved to ", (f"{target}/", "bold"), ". Try next:\n"))
    OUT.print(Text(f"  trimtab chat --steer {target}", "bold"))


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


def _usual(loaded: Any) -> str:
    """The scales that fit what steers."""
    import trimtab as tt
    from trimtab.concepts import HeadProbe

    if isinstance(loaded, HeadProbe):
        return LENGTHS
    return FACTORS if isinstance(loaded, tt.Edit) else DOSES


def _maker(loaded: Any, tokens: str | None, top_layers: int | None) -> "Callable[[LM], Make]":
    """What turns a scale into an edit, once the model is there: a dose of a probe, a factor."""
    import trimtab as tt
    from trimtab.concepts import HeadProbe
    from trimtab.place import Place

    asked = [*(["--tokens"] if tokens else []), *(["--top-layers"] if top_layers else [])]
    if tokens is not None:
        Place("resid", tokens=tokens)  # says what cannot be read
    if isinstance(loaded, tt.Edit):
        if asked:
            raise TrimtabError(
                f"{' and '.join(asked)} choose where a probe steers; an edit says so itself: leave "
                "that out, or sweep the probe"
            )
        return lambda lm: lambda scale: scale * loaded
    if isinstance(loaded, HeadProbe):
        if top_layers is not None:
            raise TrimtabError(
                "--top-layers is of a probe of layers; this one steers its 16 best heads: leave it "
                "out"
            )
        return lambda lm: lambda scale: loaded.edit(lm, scale, tokens=tokens or "all")
    if not isinstance(loaded, tt.Probe):
        raise TrimtabError(f"cannot steer by {type(loaded).__name__}; give a probe or an edit")
    chosen = _chosen(loaded.guidance, tokens, top_layers)
    if loaded.guidance is not None and asked:
        say(f"{' and '.join(asked)} instead of what was tuned")

    def make(dose: float) -> "Edit":
        return loaded.edit(**{**chosen, "dose": dose})

    make(0.01)  # says what does not fit
    return lambda lm: make


def _chosen(
    tuned: Mapping[str, Any] | None, tokens: str | None, top_layers: int | None
) -> dict[str, Any]:
    """Where a probe steers: as asked, else as tuned, without what was tuned for the others."""
    chosen = {"tokens": "all", "top_layers": 16} if tuned is None else dict(tuned)
    if tokens is not None:
        chosen.pop("first", None)
        chosen["tokens"] = tokens
    if top_layers is not None:
        chosen = {k: v for k, v in chosen.items() if k not in ("layers", "weights")}
        chosen["top_layers"] = top_layers
    return chosen


def _baselines(edit: "Edit", ask: str | None) -> tuple[str, ...]:
    """All baselines that there are: not every edit has a random direction."""
    from trimtab import evals

    names = [name for name in evals.BASELINES if name != "prompt" or ask is not None]
    try:
        evals.random_like(edit, 0)
    except ValueError as error:
        say(f"No random baseline: {error}")
        names.remove("random")
    return tuple(names)


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
