"""Evaluation and pictures of SelfControl: scores, win rates, heat maps, trajectories.

Knows solutions and gradients as numbers; runs no model. Matplotlib is imported when it is used.
"""

import html
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from trimtab.artifact import user_path
from trimtab.errors import ArtifactError
from trimtab.selfcontrol.search import Solution, Try

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def scores_by_iteration(solutions: Sequence[Solution], steps: int | None = None) -> Tensor:
    """The score so far after each iteration, [B, steps + 1]; column 0 is the first answer."""
    last = max(len(solution.trace) for solution in solutions) - 1 if steps is None else steps
    rows = []
    for solution in solutions:
        row = [solution.first.score]
        for iteration in solution.trace[1 : last + 1]:
            row.append(iteration.accepted.score if iteration.accepted else row[-1])
        rows.append(row + [row[-1]] * (last + 1 - len(row)))
    return torch.tensor(rows)


def win_rate(
    prefers: Callable[[Any, str, str], bool],
    prompts: Sequence[Any],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    seed: int = 0,
) -> float:
    """How often a comparison prefers ours, shown in random order so that a place wins nothing.

    ``prefers(prompt, first, second)`` says whether the first is better. Equal answers count half.
    """
    order = random.Random(seed)
    won = 0.0
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        first = order.random() < 0.5
        if our == their:
            won += 0.5
        else:
            won += prefers(prompt, *((our, their) if first else (their, our))) == first
    return won / len(prompts)


def final_number(text: str) -> str | None:
    """The number that an answer to an arithmetic question ends with: after ####, else the last.

    >>> final_number("5 + 7 = 12, so #### 1,012.0")
    '1012'
    """
    _, marked, last = text.rpartition("####")
    found = _NUMBER.findall(last)
    if not found:
        return None
    number: str = found[0 if marked else -1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of answers whose final number is the wanted one's (as for GSM8K)."""
    pairs = [(final_number(a), final_number(w)) for a, w in zip(answers, wanted, strict=True)]
    return sum(a is not None and a == w for a, w in pairs) / len(pairs)


def cosines(gradient: Tensor, direction: Tensor) -> Tensor:
    """The cosine of each -gradient [L, B, N, D] with a direction [L, D], as [L, B, N].

    Positive where the direction (of a concept probe, say: ``probe.weight``) raises the score.
    """
    found: Tensor = cosine_similarity(-gradient, direction[:, None, None].to(gradient), dim=-1)
    return found


# -- pictures --------------------------------------------------------------------------------------


def heat_map(
    gradient: Tensor,
    path: str | Path,
    *,
    row: int = 0,
    tokens: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    top_k: int = 10,
) -> Tensor:
    """Draw |g| by layer and token of one row of a gradient [L, B, N, D]; returns it, [L, N].

    The ``top_k`` largest are marked. ``tokens``: texts below the columns (only as many columns as
    there are texts are drawn). Needs matplotlib.
    """
    norm: Tensor = torch.linalg.vector_norm(gradient[:, row].detach().float().cpu(), dim=-1)
    norm = norm[:, : len(tokens)] if tokens is not None else norm
    figure = _figure(max(4.0, 1.5 + 0.22 * norm.shape[1]), max(3.0, 1.5 + 0.16 * norm.shape[0]))
    axes = figure.add_subplot()
    image = axes.imshow(norm.numpy(), origin="lower", aspect="auto", cmap="viridis")
    figure.colorbar(image, label="|gradient|")
    top = norm.flatten().topk(min(top_k, norm.numel())).indices
    x, y = (top % norm.shape[1]).tolist(), (top // norm.shape[1]).tolist()
    axes.scatter(x, y, s=30, marker="s", facecolors="none", edgecolors="red", label=f"top {len(x)}")
    axes.set_xlabel("token of the prompt")
    axes.set_ylabel("layer")
    if layers is not None:
        shown = range(0, len(layers), max(1, len(layers) // 12))
        axes.set_yticks([*shown], [str(layers[i]) for i in shown])
    if tokens is not None:
        plain = [t.replace("$", r"\$").replace("\n", "⏎") for t in tokens]
        axes.set_xticks(range(len(plain)), plain, rotation=90, fontsize=7)
    axes.legend(loc="upper left", fontsize=7)
    figure.savefig(user_path(path), dpi=150, bbox_inches="tight")
    return norm


def trajectory(solutions: Solution | Sequence[Solution], path: str | Path) -> None:
    """Draw the scores of all candidates over iterations, a line through those that were accepted.

    ``path``: an image (needs matplotlib), or .html: one page without anything from elsewhere, that
    shows each candidate's answer under the pointer.
    """
    shown = [solutions] if isinstance(solutions, Solution) else list(solutions)
    target = user_path(path)
    if target.suffix == ".html":
        target.write_text(_page(shown), encoding="utf-8")
        return
    figure = _figure(7.0, 4.5)
    axes = figure.add_subplot()
    for number, solution in enumerate(shown):
        color = f"C{number % 10}"
        points = _points(solution)
        for alpha, own in ((0.8, True), (0.25, False)):
            chosen = [(x, t.score) for x, t in points if t.fluent == own]
            axes.scatter(
                *zip(*chosen, strict=True), s=14, color=color, alpha=alpha
            ) if chosen else 0
        line = [(x, t.score) for x, t in points if t.accepted]
        axes.plot(*zip(*line, strict=True), color=color, label=str(solution.prompt)[:40])
    axes.set_xlabel("iteration")
    axes.set_ylabel("score")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7)
    figure.savefig(target, dpi=150, bbox_inches="tight")


def _points(solution: Solution) -> list[tuple[float, Try]]:
    """Candidates with their place on the x axis: those of one iteration side by side."""
    return [
        (it.number + (0.0 if one.accepted else 0.5 * (i / max(len(it.tries), 1) - 0.5)), one)
        for it in solution.trace
        for i, one in enumerate(it.tries)
    ]


def _page(solutions: Sequence[Solution]) -> str:
    parts = "".join(_drawn(solution) for solution in solutions)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>SelfControl</title><style>'
        "body{font:14px system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em}"
        "svg{width:100%;height:auto}circle:hover{stroke:#000;stroke-width:2}h2{font-size:15px}"
        f"</style><h1>Scores over iterations</h1>{parts}</html>\n"
    )


def _drawn(solution: Solution) -> str:
    points = _points(solution)
    values = [one.score for _, one in points]
    low, span = min(values), max(max(values) - min(values), 1e-6)
    last = max(it.number for it in solution.trace) or 1

    def at(x: float, score: float) -> tuple[str, str]:
        return (
            f"{60 + 700 * (x + 0.25) / (last + 0.5):.1f}",
            f"{220 - 180 * (score - low) / span:.1f}",
        )

    line = " ".join(",".join(at(x, one.score)) for x, one in points if one.accepted)
    dots = "".join(_dot(*at(x, one.score), one) for x, one in points)
    ticks = "".join(
        f'<text x="{at(i, low)[0]}" y="245" font-size="12" text-anchor="middle">{i}</text>'
        for i in range(last + 1)
    ) + "".join(
        f'<text x="8" y="{at(0, v)[1]}" font-size="12">{v:.3f}</text>' for v in (low, low + span)
    )
    return (
        f"<h2>{html.escape(str(solution.prompt))}</h2>"
        f'<svg viewBox="0 0 800 255"><polyline points="{line}" fill="none" stroke="#27c"/>'
        f"{dots}{ticks}</svg><p>{html.escape(solution.answer)}</p>"
    )


def _dot(x: str, y: str, one: Try) -> str:
    fill = "#27c" if one.accepted else "#9ab" if one.fluent else "#e99"
    told = (
        f"score {one.score:.4f}, step {one.step:g}, perplexity {one.perplexity:.2f}\n{one.answer}"
    )
    return (
        f'<circle cx="{x}" cy="{y}" r="6" fill="{fill}"><title>{html.escape(told)}</title></circle>'
    )


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ArtifactError(
            'pictures need matplotlib; install it with: pip install "trimtab[evals]"'
        ) from None
    return Figure(figsize=(width, height))
