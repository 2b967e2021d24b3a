"""Solvers: a recording's tokens as matrices, and what is solved for them, many layers at once.

Knows tensors and recordings; knows neither concepts nor models. Logistic regressions, a first
principal component, AUROC. Products are float32, or float64 where that is not enough; long sums
are float64.
Letters: l layers, N tokens, D width.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.products import onednn
from trimtab.recording import Recording

log = logging.getLogger(__name__)

IN_MEMORY = 2**30  # bytes: the float32 tokens that are kept between passes
BLOCK = 4096  # tokens that are summed in float32
ROUNDS, REUSED = 200, 12  # of `logistic`: how long it goes on, and each Hessian serves
NARROW_ROUNDS, BLURRED = 96, 0.1  # of these in float32; the share of its tolerance left to rounding
SAMPLE, SHARE, OVER = 256, 32, 4  # tokens of its first Hessian: at least, per N/D, and per D
FLAT = 4e5  # N/l2 up to which float32 resolves the penalty in a Hessian of unit tokens
RIDGE = 8.0  # on a Hessian of unit diagonal, in units of rounding: more than its sums may lack
COMPONENT_ROUNDS = 200
MUCH = 2**20  # numbers of a matrix
NARROW = 512  # the width that a processor solves at once
TINY = 1e-30


class Tokens:
    """The tokens of some layers as matrices X [l, N, D], centred and maybe of unit length.

    ``use`` [N] weighs the tokens for ``mean`` [l, D]; ``order``: those in use, in the order of the
    input, whatever the chunks are. ``held`` [l, N, D]: memory to keep them in;
    without, they are taken from the recording's chunks again in every pass. All that is computed
    lies on ``device``.
    """

    def __init__(
        self,
        recording: Recording,
        layers: slice,
        use: Tensor,
        order: Tensor,
        *,
        unit: bool,
        device: torch.device,
        held: Tensor | None = None,
    ) -> None:
        self.recording, self.where, self.device = recording, layers, device
        self.layers, self.width = len(recording.layers[layers]), recording.width
        self.use, self.held, self.unit = use.to(device, torch.float64), None, False
        self.dtype = torch.float32  # of products
        self.order = order.to(device)
        # Any token has what is common to all, and taking it away first spares rounding and a pass.
        some = next(c.values for c in recording.chunks() if len(c.values))
        self.mean = some[-1, layers].to(device, torch.float32)
        if held is not None:
            start = 0
            for x in self._read():
                here = held[:, start : start + x.shape[1]]
                torch.sub(x.to(device), self.mean[:, None], out=here)
                start += x.shape[1]
        self.held = held
        share = self.use / self.use.sum()
        step = self.transposed(share.expand(self.layers, -1)).float()
        self.mean = self.mean + step
        if self.held is not None:
            self.held -= step[:, None]
            if unit:
                self.held /= _length(self.held)
        self.unit = unit

    def in_float64(self) -> "Tokens":
        """The same tokens, with products in float64: several times slower."""
        wide = copy.copy(self)
        wide.dtype = torch.float64
        return wide

    def lengths(self) -> Tensor:
        """How long each token's vector is, [l, N]."""
        return torch.cat([_size(x) for x in self._blocks()], 1)

    def times(self, weight: Tensor) -> Tensor:
        """X w, [l, N], for ``weight`` [l, D]."""
        parts = [_product(x, weight.to(self.dtype)) for x in self._blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def transposed(self, values: Tensor) -> Tensor:
        """X' v, [l, D] float64, for ``values`` [l, N]."""
        total = torch.zeros(self.layers, self.width, dtype=torch.float64, device=self.device)
        values, start = values.to(self.dtype), 0
        for x in self._blocks():
            total += _product(x.transpose(1, 2), values[:, start : start + x.shape[1]])
            start += x.shape[1]
        return total

    def gram(self, weights: Tensor, some: Tensor | None = None) -> Tensor:
        """The lower triangle of X' diag(weights) X, [l, D, D], for ``weights`` [l, N] of 0 or more.

        With ``some`` (their numbers), of these tokens alone.
        Above its diagonal blocks stand zeros: a Cholesky factorisation does not look there.
        """
        shape = (self.layers, self.width, self.width)
        total = torch.zeros(shape, dtype=self.dtype, device=self.device)
        roots, start = (weights if some is None else weights[:, some]).sqrt().to(self.dtype), 0
        step = max(64, -(-self.width // 6))
        for x in self._blocks(some):
            here = roots[:, start : start + x.shape[1], None]
            start += x.shape[1]
            rows = (x * here).transpose(1, 2).contiguous()  # [l, D, n]
            for i in range(0, self.width, step):
                part = slice(i, i + step)
                total[:, part, : i + step] += _inner(rows[:, part], rows[:, : i + step])
        return total

    def rows(self, some: Tensor) -> Tensor:
        """The rows of X of ``some``, the numbers of tokens: [l, n, D]."""
        return torch.cat(list(self._blocks(some)), 1)

    def sample(self, count: int) -> Tensor:
        """About every n-th token in use, ``count`` in all: their numbers, in order."""
        steps = torch.arange(min(count, len(self.order)), device=self.device)
        return self.order[steps * len(self.order) // len(steps)].sort().values

    def _blocks(self, some: Tensor | None = None) -> Iterator[Tensor]:
        """All tokens in order, or those of ``some``, a part at a time, [l, n, D]."""
        start = 0
        for x in self._read() if self.held is None else self.held.split(BLOCK, 1):
            end = start + x.shape[1]
            if self.held is None:
                x = x.to(self.device, torch.float32) - self.mean[:, None]
                x = x / _length(x) if self.unit else x
            if some is not None:
                first, last = torch.searchsorted(some, torch.tensor([start, end]).to(some)).tolist()
                x = x.index_select(1, some[first:last] - start)
            yield x.to(self.dtype)
            start = end

    def _read(self) -> Iterator[Tensor]:
        for chunk in self.recording.chunks():
            for values in chunk.values.split(BLOCK):
                yield values[:, self.where].transpose(0, 1)


def in_groups(
    recording: Recording, use: Tensor, *, unit: bool, device: str | torch.device | None = None
) -> Iterator[Tokens]:
    """The tokens of all layers, in groups of layers to solve together; use each before the next.

    A processor takes one layer at a time, or some narrow ones, whose tokens may then stay in its
    cache; an accelerator takes what ``IN_MEMORY`` holds. Where that does not hold one layer, layers
    share each pass.
    """
    where = torch.device(device) if device else next(recording.chunks()).values.device
    order = token_rows(recording).argsort(stable=True)
    order = order[use[order] > 0]
    count, shape = len(recording.layers), (len(use), recording.width)
    fitting = IN_MEMORY // max(1, 4 * shape[0] * shape[1])
    if not fitting:
        step = max(1, IN_MEMORY // (4 * shape[1] ** 2))  # as many Hessians
        for i in range(0, count, step):
            yield Tokens(recording, slice(i, i + step), use, order, unit=unit, device=where)
        return
    step = min(fitting, count, max(1, NARROW // shape[1]) if where.type == "cpu" else count)
    room = torch.empty(step, *shape, device=where)  # one for all groups: new memory is slow
    for i in range(0, count, step):
        held = room[: min(step, count - i)]
        yield Tokens(recording, slice(i, i + step), use, order, unit=unit, device=where, held=held)


def _length(x: Tensor) -> Tensor:
    return _size(x)[..., None].clamp_min(1e-12)


def _product(x: Tensor, values: Tensor) -> Tensor:
    """Products of matrices [l, n, m] and vectors [l, m]: [l, n]."""
    if x.device.type == "cpu":  # several times faster than one batched product
        made = [_with_vector(m, v) for m, v in zip(x, values, strict=True)]
        return torch.stack(made) if len(made) > 1 else made[0][None]
    return torch.bmm(x, values[..., None])[..., 0]


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of all rows of [l, n, D] and [l, m, D]: [l, n, m]."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        made = [onednn(a, b) for a, b in zip(x, y, strict=True)]
        return torch.stack(made) if len(made) > 1 else made[0][None]
    return torch.bmm(x, y.transpose(1, 2))


def _with_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """Twice as fast by oneDNN where there is much; in parts of a larger matrix it takes seconds."""
    whole = matrix.is_contiguous() or matrix.T.is_contiguous()
    if whole and matrix.numel() > MUCH and vector.dtype == torch.float32:
        return onednn(vector[None], matrix)[0]
    return matrix @ vector


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
    start: Tensor | None = None,
    tolerance: float = 0.02,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic regressions of ``targets`` [N] (probabilities) on the tokens in use, one per layer.

    Minimises sum crossentropy(target, sigmoid(X w + b)) + l2/2 |w|^2, the same optimum as
    scikit-learn's with C = 1/l2; the bias is not penalised. Returns w [l, D], b [l] and all tokens'
    logits X w + b [l, N].

    Newton's method where each Hessian serves ``REUSED`` rounds: a round turns the gradient by it,
    and takes one Newton step for the shares of w, that direction, the last one and the bias
    (sequential subspace optimisation, Narkiss & Zibulevsky 2005). The first Hessian is that of
    some tokens, which is enough for most fits; at ``start`` [l, D] = 0 it is the largest there is
    (Böhning & Lindsay 1988). A round costs two passes over the tokens. It ends when the steps to
    come add up to ``tolerance`` |w| or less. Where float32 cannot tell that, as for few distinct
    tokens of great length, all begins anew in float64.
    """
    fit = _Logistic(tokens, targets, l2, with_bias, start)
    left = fit.run(tolerance, min(ROUNDS, NARROW_ROUNDS))
    sharp = max(fit.blur()) <= BLURRED * tolerance and max(left) <= tolerance
    if not sharp and fit.rounds < ROUNDS:
        rest = ROUNDS - fit.rounds
        fit = _Logistic(tokens.in_float64(), targets, l2, with_bias, None)
        left = fit.run(tolerance, rest)
        fit.blur()
    if not max(left) <= tolerance:
        log.warning(
            "%d of %d logistic fits had not settled after %d rounds: fit normalised tokens, or "
            "raise l2 (%g)",
            sum(not x <= tolerance for x in left),
            tokens.layers,
            ROUNDS,
            l2,
        )
    found = fit.state[:, 1].clone()  # so that nothing holds on to the rest
    return found[:, fit.vector], found[:, 0], found[:, fit.logits]


@dataclass
class _Pace:
    """How fast the steps of one fit shrink, and so what is left to go."""

    before: float = 1.0
    rate: float = 0.99

    def left(self, step: float, turned: float, size: float) -> float:
        """Beside |w|: the sum of the steps to come, if they shrink as in the slower of two rounds.

        They are expected to be longer where a step had to exceed Newton's, ``turned``.
        """
        longest = max(step, turned)
        last, self.rate = self.rate, min(max(longest / max(self.before, TINY), 0.1), 0.99)
        self.before, slower = longest, max(last, self.rate)
        return (
            longest / max(size, TINY) * max(1.0, step / max(turned, TINY)) * slower / (1 - slower)
        )


def _newton(tokens: Tokens, curvature: Tensor, l2: float, *, first: bool) -> "_Newton | _Dual":
    """What turns gradients: at first the Hessian of some tokens, later that of all.

    Few tokens do where few directions weigh more than the penalty, as for tokens of unit length.
    """
    many = len(tokens.order)
    count = max(SAMPLE, SHARE * many // tokens.width)
    few = tokens.unit and 2 * count <= tokens.width and many < FLAT * l2
    count = count if few else max(count, OVER * tokens.width)
    enough = first and 3 * count <= 2 * many and tokens.dtype == torch.float32
    some = tokens.sample(count) if enough else None
    if some is None:
        return _Newton(tokens, curvature, l2, some)
    return (_Dual if few else _Newton)(tokens, curvature * (many / count), l2, some)


class _Newton:
    """A Newton direction: (X' diag(curvature) X + l2)^-1 times a gradient, factored once."""

    def __init__(self, tokens: Tokens, curvature: Tensor, l2: float, some: Tensor | None) -> None:
        hessian, self.l2 = tokens.gram(curvature, some), l2
        hessian.diagonal(dim1=1, dim2=2).add_(l2)
        self.scale = hessian.diagonal(dim1=1, dim2=2).rsqrt()  # makes rounding alike everywhere
        hessian *= self.scale[:, :, None] * self.scale[:, None]
        self.ridge = RIDGE * torch.finfo(hessian.dtype).eps
        hessian.diagonal(dim1=1, dim2=2).add_(self.ridge)
        self.factor, failed = torch.linalg.cholesky_ex(hessian)
        while bool(failed.any()) and self.ridge < 1:  # few distinct tokens: their sums lack more
            hessian.diagonal(dim1=1, dim2=2).add_(self.ridge * (failed > 0)[:, None])
            self.factor, failed = torch.linalg.cholesky_ex(hessian)
            self.ridge *= 2

    def direction(self, gradient: Tensor) -> Tensor:
        """For ``gradient`` [l, D]."""
        scaled = (self.scale * gradient).to(self.factor.dtype)[..., None]
        return self.scale * torch.cholesky_solve(scaled, self.factor)[..., 0]

    def reach(self, error: Tensor) -> Tensor:
        """How far an error of length ``error`` [l] in a gradient, of any direction, turns out, [l].

        Where the ridge hides how flat the loss is: as far as the penalty lets it.
        """
        random = _random(self.scale) / self.scale
        turned = _size(self.direction(random * (error / _size(random))[:, None]))
        flat = _random(self.scale)[..., None]
        for _ in range(4):
            flat = torch.cholesky_solve(flat / _size(flat[..., 0])[:, None, None], self.factor)
        hidden = _size(flat[..., 0]) > 1 / (4 * self.ridge)
        return torch.where(hidden, error / self.l2, turned)


class _Dual:
    """The same of fewer tokens than the width: (1 - S' (S S' + 1)^-1 S) / l2, S of their rows."""

    def __init__(self, tokens: Tokens, curvature: Tensor, l2: float, some: Tensor) -> None:
        self.rows, self.l2 = tokens.rows(some), l2
        self.rows = self.rows * (curvature[:, some] / l2).sqrt().float()[..., None]
        inner = _inner(self.rows, self.rows)
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        self.factor = torch.linalg.cholesky(inner)

    def direction(self, gradient: Tensor) -> Tensor:
        """For ``gradient`` [l, D]."""
        inner = torch.cholesky_solve(_product(self.rows, gradient.float())[..., None], self.factor)
        return (gradient - _product(self.rows.transpose(1, 2), inner[..., 0])) / self.l2

    def reach(self, error: Tensor) -> Tensor:
        """The same as of a `_Newton`."""
        random = _random(self.rows[:, 0])
        return _size(self.direction(random * (error / _size(random))[:, None]))


class _Logistic:
    """Logistic regressions on their way.

    ``state`` [l, 4, 1 + D + N]: a bias, a vector and the logits that both make; first of the bias
    alone, then of where the fit is, of its last step and of the next direction. ``slope`` and
    ``curve`` [l, 1 + D + N] are the loss's derivatives by each of these numbers, where the fit is.
    """

    def __init__(
        self, tokens: Tokens, targets: Tensor, l2: float, with_bias: bool, start: Tensor | None
    ) -> None:
        self.tokens, self.l2 = tokens, l2
        self.targets = targets.to(tokens.device, torch.float64)
        self.vector, self.logits = slice(1, 1 + tokens.width), slice(1 + tokens.width, None)
        size = 1 + tokens.width + len(targets)
        self.state = self.targets.new_zeros(tokens.layers, 4, size)
        self.slope, self.curve = self.state.new_zeros(2, tokens.layers, size)
        self.curve[:, self.vector] = l2
        self.state[:, 0, 0] = self.state[:, 0, self.logits] = float(with_bias)
        if start is not None:
            self.state[:, 1, self.vector] = start.to(tokens.device)
            self.state[:, 1, self.logits] = tokens.times(start.to(tokens.device))
        self.bias, self.weight = self.state[:, 1, 0], self.state[:, 1, self.vector]  # [l], [l, D]
        self.curvature = self.curve[:, self.logits]  # of the loss by each token's logit, [l, N]
        self._move(self.state[:, 1])

    def run(self, tolerance: float, rounds: int) -> list[float]:
        """Takes steps until those to come add up to ``tolerance`` |w|; what is left, [l]."""
        pace, left = [_Pace() for _ in self.weight], []
        for self.rounds in range(1, rounds + 1):
            if (self.rounds - 1) % REUSED == 0:
                first = self.rounds == 1
                self.newton = _newton(self.tokens, self.curvature, self.l2, first=first)
            turned = self.newton.direction(self.gradient())
            lengths = torch.stack([self.step(turned), _size(turned), _size(self.weight)], 1)
            left = [p.left(*own) for p, own in zip(pace, lengths.tolist(), strict=True)]
            if max(left) <= tolerance:
                break
        return left

    def blur(self) -> list[float]:
        """What rounding may have done to the weights, beside |w|, [l].

        The logits were added up from those of all steps: here they become those of the weights, and
        what they were off counts. So does the rounding of a gradient, which 1/l2 makes larger.
        """
        own = self.tokens.times(self.weight).double() + self.bias[:, None]
        kept = self.state[:, 1, self.logits]
        off = _size(self.tokens.use * (own - kept)) / (_size(self.tokens.use * own) + TINY)
        kept.copy_(own)
        self._move(self.state[:, 1])
        pull = self.slope[:, self.logits]
        pull = pull if self.tokens.unit else pull * self.tokens.lengths()
        rounding = torch.finfo(self.tokens.dtype).eps / 2 * _size(pull)
        turned = self.newton.reach(rounding) / (_size(self.weight) + TINY)
        found: list[float] = torch.maximum(off, turned).tolist()
        return found

    def gradient(self) -> Tensor:
        """By the weights, [l, D]."""
        own: Tensor = self.slope[:, self.vector]
        return own + self.tokens.transposed(self.slope[:, self.logits])

    def step(self, direction: Tensor) -> Tensor:
        """The best step that uses ``direction`` [l, D]; returns its length, [l].

        One Newton step for the four shares, halved until it helps.
        """
        self.state[:, 3, self.vector] = direction
        self.state[:, 3, self.logits] = self.tokens.times(direction)
        turned, here, before = self.state.transpose(1, 2), self.state[:, 1], self.loss
        hessian = torch.bmm(self.state * self.curve[:, None], turned)
        scale = (hessian.diagonal(dim1=1, dim2=2) + TINY).rsqrt()
        hessian = hessian * scale[:, :, None] * scale[:, None]
        # What is not there stays at 0, and so does what differs from the others by rounding alone.
        hessian.diagonal(dim1=1, dim2=2).add_(RIDGE * torch.finfo(self.tokens.dtype).eps)
        slope = scale * _times(self.state, self.slope)
        newton = scale * torch.linalg.solve_ex(hessian, slope)[0]
        for _ in range(30):
            new = here - _times(turned, newton)
            self._move(new)
            worse = self.loss > before + 1e-12 * before.abs()
            if not bool(worse.any()):
                break
            newton = torch.where(worse[:, None], newton / 2, newton)
        self.state[:, 2] = new - here
        self.state[:, 1] = new
        return _size(self.state[:, 2, self.vector])

    def _move(self, new: Tensor) -> None:
        """The loss and its derivatives at ``new`` [l, 1 + D + N]."""
        use, w, z = self.tokens.use, new[:, self.vector], new[:, self.logits]
        p, mine = torch.sigmoid(z), use * self.targets
        used = use * p
        self.slope[:, self.vector] = self.l2 * w
        self.slope[:, self.logits] = used - mine
        self.curvature[:] = used * (1 - p)
        crossentropy = use * torch.nn.functional.softplus(z) - mine * z
        self.loss = crossentropy.sum(-1) + self.l2 / 2 * (w * w).sum(-1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products of matrices [l, n, m] and vectors [l, m]: [l, n]."""
    product: Tensor = torch.bmm(matrix, vector[..., None])[..., 0]
    return product


def _random(like: Tensor) -> Tensor:
    """Always the same random numbers, in the form of ``like``."""
    return (
        torch.randn(like.shape[-1], generator=torch.Generator().manual_seed(0))
        .to(like)
        .expand(like.shape)
    )


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
            known = basis[:, :k]
            new = new - torch.einsum("lkd,lk->ld", known, torch.einsum("lkd,ld->lk", known, new))
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
