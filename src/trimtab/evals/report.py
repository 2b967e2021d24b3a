"""Reports: the results of a sweep as a table, CSV, a plot, and a page that a person can read.

Knows results, by the names of their fields, and how to write files; knows no model and no judge.
"""

import csv
import html
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from trimtab.artifact import user_path, write_file
from trimtab.errors import TrimtabError

COLUMNS = (*("arm", "scale", "effect", "interval", "perplexity", "ratio", "fluency", "repetition"),)
NAMES = {
    "none": "no edit",
    "edit": "edit",
    "random": "random direction",
    "flipped": "flipped sign",
    "prompt": "just asking",
}
LIMIT = 1.25  # of the perplexity ratio: what the page shows first stays below


class ArmLike(Protocol):
    """One condition of a sweep: its answers, and a value per prompt for each measure."""

    @property
    def name(self) -> str: ...
    @property
    def scale(self) -> float | None: ...
    @property
    def prompts(self) -> Sequence[Any]: ...
    @property
    def answers(self) -> Sequence[str]: ...
    @property
    def effects(self) -> Sequence[float]: ...
    @property
    def perplexities(self) -> Sequence[float]: ...
    @property
    def fluencies(self) -> Sequence[float | None]: ...
    @property
    def repetitions(self) -> Sequence[float]: ...
    @property
    def effect(self) -> float: ...
    @property
    def perplexity(self) -> float: ...


class SweepLike(Protocol):
    """A finished sweep. ``pnes`` has value, r2, interval and curve(scales), or cannot be had."""

    @property
    def title(self) -> str: ...
    @property
    def arms(self) -> Sequence[Any]: ...
    @property
    def baseline(self) -> Any: ...
    @property
    def pnes(self) -> Any: ...


def table(sweep: SweepLike) -> list[dict[str, Any]]:
    """One line per arm: name, scale and means over its prompts.

    ``interval`` is half the width of the 95 % interval of the effect (normal, over prompts);
    ``ratio`` the perplexity over that without an edit. NaN where there is nothing to average.
    """
    base = float(sweep.baseline.perplexity)
    return [_line(arm, base) for arm in sweep.arms]


def _line(arm: ArmLike, base: float) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "scale": arm.scale,
        "effect": float(arm.effect),
        "interval": _interval(arm.effects),
        "perplexity": float(arm.perplexity),
        "ratio": float(arm.perplexity) / base if base else math.nan,
        "fluency": _mean(arm.fluencies),
        "repetition": _mean(arm.repetitions),
    }


def _mean(values: Sequence[float | None]) -> float:
    """The mean of those that are numbers: an empty answer has no fluency."""
    found = [float(v) for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(found) if found else math.nan


def _interval(values: Sequence[float]) -> float:
    """1.96 standard errors of the mean."""
    if len(values) < 2:
        return math.nan
    return 1.96 * statistics.stdev(map(float, values)) / math.sqrt(len(values))


def write_csv(sweep: SweepLike, path: str | Path) -> None:
    """The table as CSV, whole or not at all; an empty cell where there is no number."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in table(sweep):
        writer.writerow({k: "" if _is_nan(v) else v for k, v in line.items()})
    write_file(path, out.getvalue().encode())


def _is_nan(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# -- plot ------------------------------------------------------------------------------------------

# Between light and dark, so that they show on both.
COLOURS = {"edit": "#2f7ed8", "random": "#8c8c8c", "flipped": "#2a9d78", "prompt": "#d97a1f"}
INK = "#708090"  # for what is neither: becomes the page's own text colour there


def plot(sweep: SweepLike, path: str | Path) -> None:
    """Effect, perplexity ratio and the fit of the PNES by scale; .png, .svg or .pdf.

    Bands are 95 % intervals. Needs matplotlib (TrimtabError names the extra).
    """
    suffix = user_path(path).suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise TrimtabError(f"a plot is a .png, .svg or .pdf file, not {str(path)!r}")
    write_file(path, _drawn(sweep, suffix[1:]))


def _drawn(sweep: SweepLike, kind: str, ink: str = "#333333", *, clear: bool = False) -> bytes:
    """The figure as a file's content."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise TrimtabError("a plot needs matplotlib: pip install 'trimtab[evals]'") from None
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {name: ink for name in names} | {
        "svg.hashsalt": "trimtab",  # the same sweep gives the same file
        "svg.fonttype": "none" if clear else "path",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "grid.color": ink,
        "grid.alpha": 0.15,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        axes = figure.subplots(1, 3)
        for ax in axes:
            ax.grid(True)
            ax.set_axisbelow(True)
            ax.set_xlabel("scale")
        _draw_effect(axes[0], sweep)
        _draw_ratio(axes[1], sweep)
        _draw_pnes(axes[2], sweep)
        for ax in axes:
            _spread_scales(ax, sweep)
        if sweep.title and not clear:
            figure.suptitle(sweep.title, parse_math=False, fontsize=11, x=0.01, ha="left")
        out = io.BytesIO()
        keys = {"svg": ("Creator", "Date", "Format", "Type"), "pdf": ("CreationDate",)}
        blank = {key: None for key in keys.get(kind, ("Software",))}
        figure.savefig(out, format=kind, dpi=160, metadata=blank, transparent=clear)
    return out.getvalue()


def _series(sweep: SweepLike, name: str) -> list[ArmLike]:
    """The arms of that name by scale, with the baseline at 0."""
    arms = [arm for arm in sweep.arms if arm.name == name and arm.scale is not None]
    if arms and not any(arm.scale == 0 for arm in arms):
        arms.append(_AtZero(sweep.baseline))
    return sorted(arms, key=lambda arm: float(arm.scale))


class _AtZero:
    """The arm without an edit, as what an edit of scale 0 gives."""

    scale = 0.0

    def __init__(self, arm: Any) -> None:
        self._arm = arm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arm, name)


def _draw_effect(ax: Any, sweep: SweepLike) -> None:
    ax.set_title("effect")
    _draw_lines(ax, sweep, lambda arm: float(arm.effect), band=True)
    for arm in sweep.arms:
        if arm.name == "prompt":
            _draw_level(ax, float(arm.effect), _interval(arm.effects))
    ax.legend(fontsize=8)


def _draw_ratio(ax: Any, sweep: SweepLike) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    base = float(sweep.baseline.perplexity)
    ax.set_title("perplexity over that without an edit")
    ax.set_yscale("log")
    _draw_lines(ax, sweep, lambda arm: float(arm.perplexity) / base)
    ax.axhline(LIMIT, color=INK, linewidth=0.8, linestyle=":")
    low, high = ax.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(plain)
    # Within less than two decades an axis would have a single label, or none.
    ax.yaxis.set_minor_formatter(plain if high / low < 8 else NullFormatter())
    if high / low < 8:
        ax.yaxis.set_minor_locator(LogLocator(subs=_marks(high / low)))


def _marks(span: float) -> list[float]:
    """Where within a decade a log axis of that span is marked."""
    if span < 1.1:
        return [round(0.9 + 0.01 * i, 2) for i in range(1, 30)]
    return [round(1 + 0.05 * i, 2) for i in range(1, 20)] if span < 1.6 else [2.0, 3.0, 5.0]


def _draw_lines(ax: Any, sweep: SweepLike, value: Any, *, band: bool = False) -> None:
    for name in ("random", "flipped", "edit"):
        if not (arms := _series(sweep, name)):
            continue
        x, y = [float(arm.scale or 0) for arm in arms], [value(arm) for arm in arms]
        line = "--" if name == "flipped" else "-"
        ax.plot(x, y, line, color=COLOURS[name], marker="o", markersize=3, label=NAMES[name])
        if band and name != "flipped":
            half = [_interval(arm.effects) for arm in arms]
            low = [a - h for a, h in zip(y, half, strict=True)]
            high = [a + h for a, h in zip(y, half, strict=True)]
            ax.fill_between(x, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)


def _draw_level(ax: Any, effect: float, half: float) -> None:
    colour = COLOURS["prompt"]
    ax.axhline(effect, color=colour, linewidth=1.2, label=NAMES["prompt"])
    if math.isfinite(half):
        ax.axhspan(effect - half, effect + half, color=colour, alpha=0.1, linewidth=0)


def _draw_pnes(ax: Any, sweep: SweepLike) -> None:
    """The perplexity-normalised effect of each scale, and the curve fitted to them."""
    base = sweep.baseline
    arms = _series(sweep, "edit")
    scales = [float(arm.scale or 0) for arm in arms]
    points = [
        (float(arm.effect) - float(base.effect)) / (float(arm.perplexity) / float(base.perplexity))
        for arm in arms
    ]
    ax.plot(scales, points, "o", color=COLOURS["edit"], markersize=4)
    fit = _fit(sweep)
    ax.set_title("effect per perplexity" if fit is None else _pnes_text(fit))
    if fit is not None and scales:
        x = [min(scales) + (max(scales) - min(scales)) * i / 199 for i in range(200)]
        ax.plot(x, fit.curve(x), color=COLOURS["edit"], linewidth=1.2)


def _fit(sweep: SweepLike) -> Any:
    """The PNES; None where the sweep is too small for one, or the package that fits is missing."""
    try:
        fit = sweep.pnes
    except (ImportError, TrimtabError, ValueError, ArithmeticError):
        return None
    return fit if fit is not None and math.isfinite(fit.value) else None


def _pnes_text(fit: Any) -> str:
    text = f"PNES {fit.value:.3f}"
    if all(math.isfinite(bound) for bound in fit.interval):
        text += f" [{fit.interval[0]:.3f}, {fit.interval[1]:.3f}]"
    return text + (f", r² {fit.r2:.2f}" if math.isfinite(fit.r2) else "")


def _spread_scales(ax: Any, sweep: SweepLike) -> None:
    """A symmetric log axis where scales are powers: on a linear one most would lie at 0."""
    sizes = sorted({abs(float(a.scale)) for a in sweep.arms if a.scale})
    if len(sizes) > 2 and sizes[-1] / sizes[0] >= 8:
        ax.set_xscale("symlog", linthresh=sizes[0], linscale=0.6, base=2)
        signs = {math.copysign(1, a.scale) for a in sweep.arms if a.scale}
        ticks = sizes[::-1][:: math.ceil(len(sizes) * len(signs) / 8)]  # with room for the labels
        marks = sorted({0.0} | {sign * size for size in ticks for sign in signs})
        ax.set_xticks(marks, [f"{mark:g}" for mark in marks], minor=False)


# -- page ------------------------------------------------------------------------------------------


def write_page(sweep: SweepLike, path: str | Path) -> None:
    """One HTML file that needs nothing else: table, plot, and the completions side by side.

    A row per prompt, a column per arm; columns are chosen with check boxes, without a script. It
    loads nothing and runs nothing: its content security policy forbids both. Where matplotlib is
    missing, the page says so in the plot's place.
    """
    write_file(path, page(sweep).encode("utf-8", "replace"))


def page(sweep: SweepLike) -> str:
    """The text of that page."""
    title = html.escape(sweep.title or "A sweep")
    shown = _first_shown(sweep)
    lines = table(sweep)
    rules = "\n".join(
        f"body:has(#c{i}:not(:checked)) .c{i}{{display:none}}" for i in range(len(sweep.arms))
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{_STYLE}\n{rules}</style></head><body>",
            f"<header><h1>{title}</h1>{_summary(sweep)}</header>",
            f'<section class="plot">{_inline_plot(sweep)}</section>',
            f"<section><h2>Table</h2>{_html_table(lines)}</section>",
            f"<section><h2>Completions</h2>{_choices(sweep, shown)}{_answers(sweep)}</section>",
            "</body></html>\n",
        ]
    )


def _summary(sweep: SweepLike) -> str:
    parts = [f"{len(sweep.baseline.prompts)} prompts"]
    scales = {arm.scale for arm in sweep.arms if arm.name == "edit"}
    parts.append(f"{len(scales)} scales")
    if (fit := _fit(sweep)) is not None:
        parts.append(_pnes_text(fit))
    own = getattr(sweep, "facts", {})
    model = own.get("model")
    said = {"model": model.get("id") if isinstance(model, dict) else model}
    said |= {"judge": own.get("judge"), "just asking": own.get("ask")}
    told = [" · ".join(parts), " · ".join(f"{what}: {v}" for what, v in said.items() if v)]
    return "".join(f"<p>{html.escape(line)}</p>" for line in told if line)


def _inline_plot(sweep: SweepLike) -> str:
    try:
        drawn = _drawn(sweep, "svg", INK, clear=True).decode()
    except TrimtabError as error:
        return f"<p>No plot: {html.escape(str(error))}</p>"
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' (width|height)="[\d.]+pt"', "", drawn, count=2)


def _html_table(lines: Sequence[dict[str, Any]]) -> str:
    heads = ("", "scale", "effect", "± 95 %", "perplexity", "ratio", "fluency", "repetition")
    cells = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
    for line in lines:
        name = html.escape(NAMES.get(line["arm"], line["arm"]))
        scale = "–" if line["scale"] is None else _scale(line["scale"])
        numbers = "".join(f"<td>{_number(line[column])}</td>" for column in COLUMNS[2:])
        kind = ' class="over"' if line["ratio"] > LIMIT else ""
        cells.append(f"<tr{kind}><th>{name}</th><td>{scale}</td>{numbers}</tr>")
    note = f"<p>Faint: a perplexity ratio above {LIMIT:g}.</p>"
    return f'<div class="scroll"><table class="numbers">{"".join(cells)}</table></div>{note}'


def _number(value: Any) -> str:
    if _is_nan(value):
        return "–"
    size = abs(float(value))
    text = f"{value:.0f}" if 1000 <= size < 1e6 else f"{value:.3g}"
    return text.replace("-", "\u2212")


def _scale(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")


def _first_shown(sweep: SweepLike) -> set[int]:
    """The columns that are shown at first: no edit, the best edit, its controls, just asking."""
    base = float(sweep.baseline.perplexity)
    edits = [i for i, arm in enumerate(sweep.arms) if arm.name == "edit" and arm.scale]
    fluent = [i for i in edits if float(sweep.arms[i].perplexity) <= LIMIT * base]
    shown = {i for i, arm in enumerate(sweep.arms) if arm.name in ("none", "prompt")}
    best = max(fluent or edits, key=lambda i: float(sweep.arms[i].effect), default=None)
    if best is not None:
        scale = sweep.arms[best].scale
        alike = [i for i, arm in enumerate(sweep.arms) if arm.scale == scale]
        shown |= {best} | {i for i in alike if sweep.arms[i].name != "edit"}
    return shown


def _heading(arm: ArmLike) -> str:
    name = NAMES.get(arm.name, arm.name)
    return html.escape(name if arm.scale is None else f"{name} {_scale(arm.scale)}")


def _choices(sweep: SweepLike, shown: set[int]) -> str:
    """A check box per column, a group per name."""
    groups: dict[str, list[str]] = {}
    for i, arm in enumerate(sweep.arms):
        text = _heading(arm) if arm.scale is None else _scale(arm.scale)
        tick = " checked" if i in shown else ""
        box = f'<label><input type="checkbox" id="c{i}"{tick}>{text}</label>'
        groups.setdefault(arm.name if arm.scale is not None else "", []).append(box)
    legends = {name: html.escape(NAMES.get(name, name)) for name in groups}
    return "".join(
        f"<fieldset><legend>{legends[name]}</legend>{''.join(boxes)}</fieldset>"
        for name, boxes in groups.items()
    )


def _answers(sweep: SweepLike) -> str:
    spans = [[float(e) for e in arm.effects if math.isfinite(e)] for arm in sweep.arms]
    values = [e for span in spans for e in span]
    bounds = (min([0.0, *values]), max([1.0, *values]))
    heads = [
        f'<th class="c{i}">{_heading(arm)}<small>effect {_number(arm.effect)} · '
        f"perplexity {_number(arm.perplexity)}</small></th>"
        for i, arm in enumerate(sweep.arms)
    ]
    rows = [
        f"<tr><th>{html.escape(_prompt(prompt))}</th>"
        + "".join(_answer(i, arm, row, bounds) for i, arm in enumerate(sweep.arms))
        + "</tr>"
        for row, prompt in enumerate(sweep.baseline.prompts)
    ]
    head = f"<thead><tr><th>prompt</th>{''.join(heads)}</tr></thead>"
    return (
        f'<div class="scroll tall"><table class="texts">{head}<tbody>{"".join(rows)}'
        "</tbody></table></div>"
    )


def _answer(column: int, arm: ArmLike, row: int, bounds: tuple[float, float]) -> str:
    if row >= len(arm.answers):
        return f'<td class="c{column}"></td>'
    foot = ""
    if row < len(arm.effects) and math.isfinite(effect := float(arm.effects[row])):
        foot = (
            f'<small><meter min="{bounds[0]:g}" max="{bounds[1]:g}" value="{effect:.4g}"></meter> '
            f"{_number(effect)}</small>"
        )
    return f'<td class="c{column}"><p>{html.escape(arm.answers[row])}</p>{foot}</td>'


def _prompt(prompt: Any) -> str:
    """A prompt as text; a conversation as its turns."""
    if isinstance(prompt, str):
        return prompt
    messages = getattr(prompt, "messages", prompt)
    if isinstance(messages, list | tuple) and all(isinstance(m, dict) for m in messages):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages)
    return str(prompt)


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--ink:#1c2330;--soft:#5b6675;--line:#dfe3e8;
--card:#f6f7f9}
@media(prefers-color-scheme:dark){:root{--back:#14181f;--ink:#e4e8ee;--soft:#9aa5b4;
--line:#2c343f;--card:#1b2129}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:110rem;padding:1.5rem clamp(1rem,3vw,3rem);background:var(--back);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .6rem}
header p,section>p{color:var(--soft);margin:.3rem 0}
.plot{max-width:75rem;margin-top:1rem;color:var(--soft)}
.plot svg{width:100%;height:auto;display:block}
.scroll{overflow:auto;border:1px solid var(--line);border-radius:8px;width:fit-content;
max-width:100%}
.tall{max-height:85vh;width:100%}
table{border-collapse:separate;border-spacing:0}
.numbers{font-variant-numeric:tabular-nums}
.numbers th,.numbers td{padding:.25rem .9rem;text-align:right;border-bottom:1px solid var(--line)}
.numbers th{font-weight:600}.numbers tr>:first-child{text-align:left}
.numbers tr:last-child>*{border-bottom:0}
.numbers .over>*{opacity:.5}
fieldset{border:0;margin:0 0 .5rem;padding:0;display:flex;flex-wrap:wrap;gap:.2rem .8rem}
legend{float:left;color:var(--soft);min-width:9rem;padding:0}
label{white-space:nowrap;cursor:pointer}input{margin:0 .3rem 0 0;vertical-align:-1px}
.texts{width:100%}
.texts th,.texts td{min-width:16rem;max-width:34rem;padding:.6rem .8rem;text-align:left;
vertical-align:top;border-bottom:1px solid var(--line);border-right:1px solid var(--line)}
.texts thead th{position:sticky;top:0;z-index:2;background:var(--card)}
.texts th:first-child{position:sticky;left:0;z-index:1;background:var(--card);min-width:12rem;
max-width:20rem;white-space:pre-wrap;overflow-wrap:anywhere;font-weight:600}
.texts thead th:first-child{z-index:3}
.texts p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
small{display:block;color:var(--soft);font-weight:400;margin-top:.3rem}
meter{width:5rem;height:.8rem;vertical-align:-1px}
@media print{.scroll{overflow:visible;max-height:none}fieldset{display:none}}
"""
