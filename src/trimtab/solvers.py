"""Solvers: a recording's tokens as matrices, and what is solved for them, many layers at once.

Knows tensors and recordings; knows neither concepts nor models. Logistic regressions, a first
principal component, AUROC. Products are float32, long sums float64.
Letters: l layers, N tokens, D width.
"""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from trimtab.recording import Recording

log = logging.getLogger(__name__)

T = TypeVar("T")

IN_MEMORY = 2**30  # bytes: the float32 tokens that are kept between passes
BLOCK = 4096  # tokens that are summed in float32
ROUNDS = 200  # of `logistic`: how long it goes on
SAMPLE = 256  # tokens at least that its first Hessian is made of
SLOWEST = 0.98  # the rate of a round that gained no less than the last
COMPONENT_ROUNDS = 200
NARROW = 512  # the width that a processor solves at once
WORKERS = 8  # groups of layers that a processor solves side by side
TINY = 1e-30


class Tokens:
    """The tokens of some layers as matrices X [l, N, D], centred and maybe of unit length.

    ``use`` [N] weighs the tokens for ``mean`` [l, D]. ``held`` [l, N, D]: memory to keep them in;
    without, they are taken from the recording's chunks again in every pass. All that is computed
    lies on ``device``.
    """

    def __init__(
        self,
        recording: Recording,
        layers: slice,
        use: Tensor,
        *,
        unit: bool,
        device: torch.device,
        held: Tensor | None = None,
    ) -> None:
        self.recording, self.where, self.device = recording, layers, device
        self.layers, self.width = len(recording.layers[layers]), recording.width
        self.use, self.held, self.unit = use.to(device, torch.float64), None, False
        first = next(c.values for c in recording.chunks() if len(c.values))
        self.mean = first[:16, layers].to(device, torch.float32).mean(0)  # near enough to sum from
        if held is not None:
            start = 0
            for x in self._read():
                here = held[:, start : start + x.shape[1]]
                torch.sub(x.to(device), self.mean[:, None], out=here)
                start += x.shape[1]
        self.held = held
        step = self.transposed(self.use.expand(self.layers, -1)) / self.use.sum()
        self.mean = self.mean + step.float()
        if held is not None:
            held -= step.float()[:, None]
            if unit:
                held *= _length(held).reciprocal_()
        self.unit = unit

    def times(self, weight: Tensor) -> Tensor:
        """X w, [l, N], for ``weight`` [l, D]."""
        return _joined([_product(x, weight.float()) for x in self._blocks()])

    def transposed(self, values: Tensor) -> Tensor:
        """X' v, [l, D] float64, for ``values`` [l, N]."""
        total = torch.zeros(self.layers, self.width, dtype=torch.float64, device=self.device)
        values, start = values.float(), 0
        for x in self._blocks():
            total += _product(x.transpose(1, 2), values[:, start : start + x.shape[1]])
            start += x.shape[1]
        return total

    def some(self, index: Tensor) -> Tensor:
        """The tokens at ``index`` [m], which rises: [l, m, D]."""
        parts, start = [], 0
        for x in self._blocks():
            inside = index[(index >= start) & (index < start + x.shape[1])]
            parts.append(x.index_select(1, inside - start))
            start += x.shape[1]
        return _joined(parts)

    def gram(self, weights: Tensor) -> Tensor:
        """The lower triangle of X' diag(weights) X, [l, D, D], for ``weights`` [l, N].

        Summed in the precision of ``weights``. Above its diagonal blocks stand zeros: a Cholesky
        factorisation does not look there.
        """
        total = weights.new_zeros(self.layers, self.width, self.width)
        weights, start, step = weights[..., None], 0, max(64, -(-self.width // 4))
        for x in self._blocks():
            x, here = x.to(total.dtype), weights[:, start : start + x.shape[1]]
            start += x.shape[1]
            for i in range(0, self.width, step):
                some = (x[..., i : i + step] * here).transpose(1, 2)
                total[:, i : i + step, : i + step] += torch.bmm(some, x[..., : i + step])
        return total

    def _blocks(self) -> Iterator[Tensor]:
        """All tokens in order, some at a time, [l, n, D]."""
        if self.held is not None:
            yield from self.held.split(BLOCK, 1)
            return
        for x in self._read():
            x = x.to(self.device, torch.float32) - self.mean[:, None]
            yield x / _length(x) if self.unit else x

    def _read(self) -> Iterator[Tensor]:
        for chunk in self.recording.chunks():
            for values in chunk.values.split(BLOCK):
                yield values[:, self.where].transpose(0, 1)


def each_group(
    solve: Callable[[Tokens], T],
    recording: Recording,
    use: Tensor,
    *,
    unit: bool,
    device: str | torch.device | None = None,
) -> list[T]:
    """What ``solve`` makes of the tokens of all layers, a group of layers at a time, in order.

    A processor takes one layer at a time, or some narrow ones, whose tokens may then stay in its
    cache, and several such groups side by side, as many as torch has threads: one small product
    shared by threads gains nothing. An accelerator takes what ``IN_MEMORY`` holds. Where that does
    not hold one layer, layers share each pass.
    """
    where = torch.device(device) if device else next(recording.chunks()).values.device
    count, shape = len(recording.layers), (len(use), recording.width)
    fitting, workers = IN_MEMORY // max(1, 4 * shape[0] * shape[1]), 1
    if not fitting:
        step = max(1, IN_MEMORY // (4 * shape[1] ** 2))  # as many Hessians
    elif where.type == "cpu":
        step = min(fitting, count, max(1, NARROW // shape[1]))
        workers = min(torch.get_num_threads(), WORKERS, -(-count // step), fitting // step)
    else:
        step = min(fitting, count)
    # memory for all groups of a worker: new memory is slow
    rooms = [torch.empty(step, *shape, device=where) for _ in range(workers)] if fitting else []

    @torch.no_grad()  # each thread has a setting of its own
    def work(first: int) -> T:
        layers, room = slice(first, min(first + step, count)), rooms.pop() if rooms else None
        held = None if room is None else room[: layers.stop - first]
        try:
            return solve(Tokens(recording, layers, use, unit=unit, device=where, held=held))
        finally:
            if room is not None:
                rooms.append(room)

    return _side_by_side(work, range(0, count, step), workers)


def _side_by_side(work: Callable[[int], T], items: range, workers: int) -> list[T]:
    """``work`` of each item, in order, by several Python threads that share torch's threads."""
    if workers == 1:
        return [work(item) for item in items]
    own = torch.get_num_threads()
    share = max(1, own // workers)
    try:
        with ThreadPoolExecutor(workers, "solve", torch.set_num_threads, (share,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(own)  # each has its own number; the last one set is for new threads


def _length(x: Tensor) -> Tensor:
    return _size(x)[..., None].clamp_min(1e-12)


def _product(x: Tensor, values: Tensor) -> Tensor:
    """Products of matrices [l, n, m] and vectors [l, m]: [l, n]."""
    if len(x) > 1 and x.device.type == "cpu":  # several times faster than one batched product
        return torch.stack([matrix @ vector for matrix, vector in zip(x, values, strict=True)])
    return torch.bmm(x, values[..., None])[..., 0]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def token_rows(recording: Recording) -> Tensor:
    """The row of each token, [N], in the order of the chunks."""
    return torch.cat(
        [
            torch.tensor(c.index, dtype=torch.long).repeat_interleave(torch.tensor(c.lengths))
            for c in recording.chunks()
        ]
    )


def logistic(
    tokens: Tokens,
    targets: Tensor,
    *,
    l2: float = 1.0,
    with_bias: bool,
    tolerance: float = 0.015,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic regressions of ``targets`` [N] (probabilities) on the tokens in use, one per layer.

    Minimises sum crossentropy(target, sigmoid(X w + b)) + l2/2 |w|^2, the same optimum as
    scikit-learn's with C = 1/l2; the bias is not penalised. Returns w [l, D], b [l] and all
    tokens' logits X w + b, [l, N], float64.

    A round turns the gradient by the inverse of a Hessian, and takes one Newton step for the shares
    of that direction, the last step and the bias (sequential subspace optimisation, Narkiss &
    Zibulevsky 2005): two passes over the tokens. The Hessian is that of a sample of the tokens
    (subsampled Newton, Erdogdu & Montanari 2015), drawn by a fixed seed. Narrow layers, and fits
    that take as many rounds as it costs, get that of all tokens, and another one whenever a round
    gains little. A fit ends when the steps to come, which shrink as the gains of the last two
    rounds did, add up to ``tolerance`` |w| or less; with the Hessian of all tokens, when the gain
    to come allows no larger error either (a strongly convex loss bounds |error|^2 by 2 gain / l2).
    """
    fit = _Logistic(tokens, targets, l2, with_bias)
    patience = 0 if tokens.width <= SAMPLE else min(max(24, tokens.width // 16), ROUNDS // 2)
    gains, rates, made = [0.0] * tokens.layers, [SLOWEST] * tokens.layers, 0
    newton: _Sampled | _Newton
    for turn in range(ROUNDS):
        if turn == patience:
            newton, made = _Newton(tokens, fit.curvature, l2), turn
        elif turn == 0:
            newton = _Sampled(tokens, fit.curvature, l2)
        elif patience <= made < turn - 1 and max(rates) > 0.5:  # float32 was not enough
            newton, made = _Newton(tokens, fit.curvature.double(), l2), turn
        before, last = gains, rates
        gains, moves = fit.step(newton.direction(fit.gradient()))
        rates = [_rate(*pair) for pair in zip(gains, before, strict=True)]
        if turn >= patience:
            bounds = [math.sqrt(gain / l2) / w for gain, w in zip(gains, fit.sizes, strict=True)]
            moves = list(map(max, moves, bounds))
        slower = map(max, rates, last)
        settled = [m * r <= tolerance * (1 - r) for m, r in zip(moves, slower, strict=True)]
        if all(settled):
            break
    else:
        log.warning(
            "%d of %d logistic fits had not settled after %d rounds: fit normalised tokens, or "
            "raise l2 (%g)",
            settled.count(False),
            tokens.layers,
            ROUNDS,
            l2,
        )
    return fit.weight, fit.bias, fit.logits


def _rate(gain: float, before: float) -> float:
    """How much smaller the next step will be, by what two rounds gained (squares of steps)."""
    if gain <= 0:
        return 0.0
    return math.sqrt(gain / before) if gain < SLOWEST**2 * before else SLOWEST


class _Sampled:
    """A Newton direction by the Hessian of some tokens, A'A + ridge, where they are few.

    Its inverse is (I - A'(A A' + ridge)^-1 A) / ridge; the direction leaves out the last factor.
    """

    def __init__(self, tokens: Tokens, curvature: Tensor, l2: float) -> None:
        index = tokens.use.nonzero()[:, 0]
        count = len(index)
        size = min(count, tokens.width, max(SAMPLE, math.ceil(5 * math.sqrt(count))))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:size]
        index = index[order.sort().values.to(index.device)]
        self.rows = tokens.some(index)
        self.rows *= (curvature[:, index] * (count / size)).sqrt()[..., None]
        self.columns = self.rows.transpose(1, 2)
        # What the sample did not see is like a typical direction of it: without, each direction
        # outside of the sample would seem to have no curvature, and get far too long a step.
        unseen = max(0.75 * (1 - size / count) * tokens.width / size, 1e-3)
        ridge = l2 + unseen * self.rows.square().sum(1).median(-1).values
        gram = torch.bmm(self.rows, self.columns)
        gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-5).add_(ridge[:, None])  # sums are float32
        self.factor = torch.linalg.cholesky(gram)

    def direction(self, gradient: Tensor) -> Tensor:
        """For ``gradient`` [l, D], of any length."""
        gradient = gradient[..., None]
        inside = torch.cholesky_solve(torch.bmm(self.rows, gradient), self.factor)
        return torch.baddbmm(gradient, self.columns, inside, alpha=-1)[..., 0]


class _Newton:
    """A Newton direction by the Hessian of all tokens: (X' diag(curvature) X + l2)^-1 times it."""

    def __init__(self, tokens: Tokens, curvature: Tensor, l2: float) -> None:
        hessian = tokens.gram(curvature).double()
        hessian.diagonal(dim1=1, dim2=2).add_(l2)
        self.scale = hessian.diagonal(dim1=1, dim2=2).rsqrt()  # makes rounding alike everywhere
        hessian *= self.scale[:, :, None] * self.scale[:, None]
        ridge, wrong = 16 * torch.finfo(curvature.dtype).eps, True
        while wrong:  # more than the sums may lack
            hessian.diagonal(dim1=1, dim2=2).add_(ridge)
            self.factor, info = torch.linalg.cholesky_ex(hessian)
            ridge, wrong = 10 * ridge, bool(info.any())

    def direction(self, gradient: Tensor) -> Tensor:
        """For ``gradient`` [l, D]."""
        scaled = torch.cholesky_solve((self.scale * gradient)[..., None], self.factor)
        return (self.scale * scaled[..., 0]).float()


class _Logistic:
    """Logistic regressions on their way.

    The loss is a sum over N logits, and over D weights and a bias, which are in line as if they
    were tokens too: ``at`` [l, N + D + 1] holds all of them, ``residual`` and ``curvature`` the
    loss's derivatives there, ``steps`` [l, k, N + D + 1] what can be added: the last step, the new
    direction, and the bias, if there is one. So a round has few operations, whose number counts.
    """

    def __init__(self, tokens: Tokens, targets: Tensor, l2: float, with_bias: bool) -> None:
        self.tokens, self.l2, n = tokens, l2, len(targets)
        self.targets = targets.to(tokens.device, torch.float64)
        self.told = self.targets * tokens.use
        self.at = self.targets.new_zeros(tokens.layers, n + tokens.width + 1)
        self.logits, self.weight, self.bias = self.at[:, :n], self.at[:, n:-1], self.at[:, -1]
        k, shape = 3 if with_bias else 2, self.at.shape[1:]
        zeros = torch.zeros(tokens.layers, 2 * k + 2, *shape, device=tokens.device)
        self.steps, self.products, self.second = zeros[:, :k], zeros[:, k:-1], zeros[:, -1]
        self.residual, self.curvature = self.products[:, -1], self.second[:, :n]
        self.second[:, n:-1] = l2
        if with_bias:
            self.steps[:, 2, :n] = self.steps[:, 2, -1:] = 1.0
        self._look()

    def gradient(self) -> Tensor:
        n = len(self.targets)
        return self.tokens.transposed(self.residual[:, :n]).float() + self.residual[:, n:-1]

    def step(self, direction: Tensor) -> tuple[list[float], list[float]]:
        """The best step that uses ``direction`` [l, D].

        Returns twice what it gains, if the loss is a parabola, and its length beside |w|.
        """
        torch.cat([self.tokens.times(direction), direction], 1, out=self.steps[:, 1, :-1])
        torch.mul(self.steps, self.second[:, None], out=self.products[:, :-1])
        shares, gains = [], []
        for *hessian, slope in torch.bmm(self.products, self.steps.transpose(1, 2)).tolist():
            shares.append(_solved(hessian, slope))
            gains.append(sum(a * b for a, b in zip(shares[-1], slope, strict=True)))
        step = torch.bmm(self.steps.new_tensor(shares)[:, None], self.steps)[:, 0]
        # less than the digits of a loss is nothing
        gains = [g if g > 1e-14 * a else 0.0 for g, a in zip(gains, self.losses, strict=True)]
        halved = self._go(step)
        self.steps[:, 0] = step
        lengths = _size(step[:, len(self.targets) : -1]).tolist()
        lengths = [math.inf if h else s for h, s in zip(halved, lengths, strict=True)]
        return gains, [s / w for s, w in zip(lengths, self.sizes, strict=True)]

    def _go(self, step: Tensor) -> list[bool]:
        """Take ``step`` from where we are, halved in place until no loss grows; where it was."""
        before, halved = self.losses, [False] * len(step)
        for _ in range(30):
            self.at -= step
            self._look()
            worse = [a > b + 1e-12 * abs(b) for a, b in zip(self.losses, before, strict=True)]
            if not any(worse):
                return halved
            halved = [a or b for a, b in zip(halved, worse, strict=True)]
            self.at += step
            step *= step.new_tensor([0.5 if w else 1.0 for w in worse])[:, None]
        self._look()
        return halved

    def _look(self) -> None:
        """The losses, and the derivatives that all else is made of."""
        n, use = len(self.targets), self.tokens.use
        p = torch.sigmoid(self.logits)
        torch.mul(p - self.targets, use, out=self.residual[:, :n])
        torch.mul(torch.addcmul(p, p, p, value=-1), use, out=self.curvature)
        torch.mul(self.at[:, n:], self.second[:, n:], out=self.residual[:, n:])
        sums = torch.nn.functional.softplus(self.logits) @ use - self.logits @ self.told
        sizes = _size(self.weight).tolist()
        self.losses = [a + self.l2 / 2 * w * w for a, w in zip(sums.tolist(), sizes, strict=True)]
        self.sizes = [max(w, TINY) for w in sizes]


def _solved(matrix: list[list[float]], values: list[float]) -> list[float]:
    """``matrix`` [k, k], positive or zero, beneath ``values`` [k]; quick where k is 2 or 3."""
    count = len(values)
    rows = [[*row, v] for row, v in zip(matrix, values, strict=True)]
    for i in range(count):
        rows[i][i] = rows[i][i] * (1 + 1e-6) + TINY  # what is not there, stays at 0
    for i in range(count):
        for row in rows[:i] + rows[i + 1 :]:
            share = row[i] / rows[i][i]
            row[i:] = [a - share * b for a, b in zip(row[i:], rows[i][i:], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def _size(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return size


def logistic_1d(
    scores: Tensor, labels: Tensor, *, with_bias: bool, l2: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logistic fits of labels [N] on scores [N, L], one per column, by Newton's method in float64.

    Minimises sum log(1 + exp(-y (g s + b))) + l2/2 g^2. Returns gain and bias, [L] each.
    """
    s, y = scores.double(), (labels > 0).double()[:, None]
    scale = s.std(0).clamp_min(1e-12)  # columns of similar size make the steps well conditioned
    s = s / scale
    gain, bias = (torch.zeros(s.shape[1], dtype=torch.float64) for _ in range(2))
    for _ in range(100):
        p = torch.sigmoid(s * gain + bias)
        curve = p * (1 - p)
        g1 = ((p - y) * s).sum(0) + l2 * gain / scale**2
        h11 = (curve * s * s).sum(0) + l2 / scale**2
        if not with_bias:
            step1, step2 = g1 / h11, torch.zeros_like(bias)
        else:
            g2, h12, h22 = (p - y).sum(0), (curve * s).sum(0), curve.sum(0) + 1e-12
            det = (h11 * h22 - h12 * h12).clamp_min(1e-30)
            step1, step2 = (h22 * g1 - h12 * g2) / det, (h11 * g2 - h12 * g1) / det
        size = torch.maximum(step1.abs(), step2.abs()).clamp_min(1e-30)
        damp = (4.0 / size).clamp_max(1.0)  # far from the optimum a full step overshoots
        gain, bias = gain - damp * step1, bias - damp * step2
        if float(size.max()) < 1e-10:
            break
    return gain / scale, bias


def first_component(
    tokens: Tokens, pairs: Tensor, start: Tensor, *, tolerance: float = 1e-6
) -> Tensor:
    """The first principal component of the differences x_i - x_j of ``pairs`` [P, 2]: [L, D].

    The direction v of unit length with the largest sum (v.(x_i - x_j))^2, by Lanczos' method with
    full orthogonalisation, beginning at ``start`` [L, D]. A layer is done when |A v - a v| <=
    ``tolerance`` a, for the second moment A of the differences. The sign is arbitrary.
    """
    rounds = min(COMPONENT_ROUNDS, tokens.width)
    new, pairs = start.to(tokens.device, torch.float64), pairs.to(tokens.device)
    basis = new.new_zeros(len(start), rounds, tokens.width)
    images, best = torch.zeros_like(basis), torch.zeros_like(new)
    for k in range(rounds):
        for _ in range(2):
            new = new - torch.einsum("lkd,lke,le->ld", basis[:, :k], basis[:, :k], new)
            new = new / _size(new)[:, None].clamp_min(TINY)
        basis[:, k], images[:, k] = new, _spread(tokens, pairs, new)
        known, seen = basis[:, : k + 1], images[:, : k + 1]
        inside = torch.bmm(known, seen.transpose(1, 2))
        values, vectors = torch.linalg.eigh((inside + inside.transpose(1, 2)) / 2)
        share, value = vectors[:, None, :, -1], values[:, -1:]
        best = torch.bmm(share, known)[:, 0]
        new = torch.bmm(share, seen)[:, 0] - value * best
        if bool((_size(new) <= tolerance * value[:, 0]).all()):
            break
    return best


def _spread(tokens: Tokens, pairs: Tensor, v: Tensor) -> Tensor:
    """A v, [L, D], for the second moment A of the differences of pairs of tokens."""
    z = tokens.times(v).double()
    first, second = pairs.unbind(1)
    difference = z[:, first] - z[:, second]
    values = torch.zeros_like(z).index_add_(1, first, difference)
    return tokens.transposed(values.index_add_(1, second, -difference))


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """How often a positive row scores above a negative one, ties counting half: [L].

    ``scores`` [B, L] and ``positive`` [B] bool; NaN where one of the two kinds is missing.
    """
    ordered = scores.T.contiguous().sort(dim=-1).values
    own = scores.T.contiguous()
    below, upto = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
    ranks = (below + upto + 1).double() / 2  # 1-based; those of equal scores are their mean
    n = int(positive.sum())
    others = len(positive) - n
    if not n or not others:
        return torch.full((scores.shape[1],), float("nan"), dtype=torch.float64)
    return (ranks[:, positive].sum(-1) - n * (n + 1) / 2) / (n * others)
