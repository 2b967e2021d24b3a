"""PNES: one number for how well a direction guides, out of effects and perplexities by scale.

The perplexity-normalised effect size of von Rütte et al. 2024 (arXiv 2402.14433, section 4). Knows
numbers only.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.errors import TrimtabError

Array = np.ndarray[Any, np.dtype[np.float64]]

BROKEN = 2000.0  # a perplexity from which on a point says nothing of b
BROKEN_RATIO = 100.0  # the same beside no edit, for a model whose perplexities are all that large
LOW_RATIO = 1.25  # what "small" perplexity means, beside that without the edit


@dataclass(frozen=True)
class Pnes:
    """How far a concept can be turned both ways, at a price in perplexity.

    ``value`` is the largest minus the smallest of the fitted curve
    ``(tanh(s a) + c) / exp(b a^2)`` over the swept scales a, with its ``interval`` (95 %, bootstrap
    over prompts; NaN where effects were given as means) and the fit's ``r2``. ``at`` holds the
    scales of the smallest and the largest; ``lowest`` and ``highest`` the measured effects where
    the perplexity ratio is at most ``low_ratio``.
    """

    value: float
    r2: float
    s: float
    c: float
    b: float
    at: tuple[float, float]
    lowest: float
    highest: float
    low_ratio: float = LOW_RATIO
    interval: tuple[float, float] = (float("nan"), float("nan"))

    def curve(self, scales: Sequence[float] | Array) -> Array:
        """The fit at these scales."""
        return _curve(np.asarray(scales, float), self.s, self.c, self.b)


def pnes(
    scales: Sequence[float],
    effects: Any,
    perplexities: Any,
    *,
    bootstrap: int = 300,
    low_ratio: float = LOW_RATIO,
    seed: int = 0,
) -> Pnes:
    """Fit the perplexity-normalised effect of a sweep.

    ``effects`` and ``perplexities`` [S], one per scale, or [S, P], one per scale and prompt: then
    ``bootstrap`` resamples of the prompts give an interval. The scales contain 0, against which
    both are measured: ``PNE(a) = (p(a) - p(0)) / (ppl(a) / ppl(0))``. First b is fitted in
    ``ln(ppl(a) / ppl(0)) = b a^2`` over points below 2,000 (below 100 ppl(0) where no other scale
    than 0 is), then s and c in ``PNE = (tanh(s a) + c) / exp(b a^2)`` over all. A flat sweep gives
    0. Raises ValueError for shapes that differ, scales without 0 and effects that are not finite.
    """
    a = np.asarray(scales, float)
    p, ppl = _table("effects", effects, a), _table("perplexities", perplexities, a)
    if not np.isfinite(p).all():
        raise ValueError(f"{int((~np.isfinite(p)).sum())} effects are not finite; a judge gave NaN")
    if (zero := np.flatnonzero(a == 0)).size == 0:
        raise ValueError(f"the scales {a.tolist()} lack 0, which effects are measured against")
    if (ppl <= 0).any() or not low_ratio >= 1:
        raise ValueError(
            f"perplexities are above 0 (the lowest is {ppl.min()}), low_ratio is 1 or more (not "
            f"{low_ratio})"
        )
    if not np.isfinite(ppl[zero]).all():
        raise ValueError(f"the perplexity at scale 0 is {ppl[zero[0]].tolist()}, not above 0")
    made = _fit(a, p.mean(1), ppl.mean(1), low_ratio)
    if p.shape[1] == 1 or not bootstrap:
        return made
    values = [
        _fit(a, p_.mean(1), q_.mean(1), low_ratio, start=made.s).value
        for p_, q_ in _resamples(p, ppl, bootstrap, np.random.default_rng(seed))
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return replace(made, interval=(float(low), float(high)))


def _table(name: str, values: Any, scales: Array) -> Array:
    """Values as [S, P]."""
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    table = np.asarray(found, float)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or len(table) != len(scales):
        raise ValueError(
            f"{name} have shape {list(np.shape(found))} for {len(scales)} scales; give one row each"
        )
    return table


def _resamples(p: Array, ppl: Array, count: int, rng: np.random.Generator) -> Any:
    """Prompts drawn with replacement; references too, together where there are as many."""
    for _ in range(count):
        first = rng.integers(p.shape[1], size=p.shape[1])
        same = ppl.shape[1] == p.shape[1]
        second = first if same else rng.integers(ppl.shape[1], size=ppl.shape[1])
        yield p[:, first], ppl[:, second]


def _fit(a: Array, p: Array, ppl: Array, low_ratio: float, start: float | None = None) -> Pnes:
    zero = np.flatnonzero(a == 0)[0]
    ratio = np.where(np.isfinite(ppl), ppl / ppl[zero], np.inf)
    effect = np.where(np.isfinite(ratio), (p - p[zero]) / ratio, 0.0)  # broken text shows nothing
    usable = np.isfinite(ratio) & (ppl < BROKEN)
    if not a[usable].any():
        usable = np.isfinite(ratio) & (ratio < BROKEN_RATIO)
    weight = (a[usable] ** 4).sum()
    b = float((a[usable] ** 2 * np.log(ratio[usable])).sum() / weight) if weight else 0.0
    s, c = _solve(a, effect, b, start)
    grid = np.linspace(a.min(), a.max(), 200)
    fitted = _curve(grid, s, c, b)
    low, high = int(fitted.argmin()), int(fitted.argmax())
    small = ratio <= low_ratio
    return Pnes(
        float(fitted[high] - fitted[low]),
        _r2(effect, _curve(a, s, c, b)),
        s,
        c,
        b,
        (float(grid[low]), float(grid[high])),
        float(p[small].min()),
        float(p[small].max()),
        low_ratio,
    )


def _curve(a: Array, s: float, c: float, b: float) -> Array:
    made: Array = (np.tanh(s * a) + c) * np.exp(np.clip(-b * a**2, -700, 700))
    return made


def _solve(a: Array, effect: Array, b: float, start: float | None) -> tuple[float, float]:
    """The least-squares s and c: c is linear given s, so that s alone is searched."""
    if not effect.any():
        return 0.0, 0.0
    try:
        from scipy.optimize import curve_fit
    except ImportError:
        raise TrimtabError("PNES is fitted with scipy: pip install 'trimtab[evals]'") from None
    damping = _curve(a, 0.0, 1.0, b)
    best = start if start is not None else _best_start(a, effect, damping)
    first = (best, _offset(np.tanh(best * a), effect, damping))
    model: Callable[..., Array] = lambda x, s, c: _curve(x, s, c, b)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a covariance that a perfect fit leaves open
        try:
            (s, c), _ = curve_fit(model, a, effect, p0=first, maxfev=2000, ftol=1e-12, xtol=1e-12)
        except RuntimeError:  # it ran out of steps: the start is near enough
            s, c = first
    return float(s), float(c)


def _best_start(a: Array, effect: Array, damping: Array) -> float:
    """The best s of a wide grid, so that no start has to be guessed."""
    reach = np.abs(a).max()
    sizes = np.geomspace(1e-4, 1e2, 121) / reach
    tried = np.concatenate([-sizes, [0.0], sizes])
    shapes = np.tanh(tried[:, None] * a)  # [G, S]
    offsets = ((effect - shapes * damping) * damping).sum(1) / (damping**2).sum()
    errors = ((effect - (shapes + offsets[:, None]) * damping) ** 2).sum(1)
    return float(tried[int(errors.argmin())])


def _offset(shape: Array, effect: Array, damping: Array) -> float:
    return float(((effect - shape * damping) * damping).sum() / (damping**2).sum())


def _r2(truth: Array, fitted: Array) -> float:
    """The share of variance explained; 1 for a perfect fit of a constant."""
    rest, total = ((truth - fitted) ** 2).sum(), ((truth - truth.mean()) ** 2).sum()
    if total < 1e-24:
        return 1.0 if rest < 1e-24 else 0.0
    return float(1 - rest / total)
