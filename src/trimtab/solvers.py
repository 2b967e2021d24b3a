"""Solvers: a recording's tokens as matrices, and what is solved for them, many layers at once.

Knows tensors and recordings; knows neither concepts nor models. Logistic regressions, a first
principal component, AUROC. Products are float32, long sums float64.
Letters: l layers, N tokens, D width, K directions.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from trimtab.recording import Recording

log = logging.getLogger(__name__)

IN_MEMORY = 2**30  # bytes: the float32 tokens that are kept between passes
BLOCK = 4096  # tokens that are summed in float32
DIRECTIONS, NEWEST, ROUNDS = 64, 16, 1000  # of the subspace of `logistic`; how long it goes on
STILL, PATIENCE = 1e-4, 5  # that many rounds that move the solution by less end it as well
COMPONENT_ROUNDS = 200
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
        self.mean = torch.zeros(self.layers, self.width, device=device)
        if held is not None:
            start = 0
            for x in self._read():
                held[:, start : start + x.shape[1]] = x
                start += x.shape[1]
        self.held = held
        for _ in range(2):  # the second time takes away what rounding left of a large mean
            share = self.use / self.use.sum()
            step = self.transposed(share.expand(self.layers, -1)).float()
            self.mean = self.mean + step
            if self.held is not None:
                self.held -= step[:, None]
        if unit and self.held is not None:
            self.held /= _length(self.held)
        self.unit = unit

    def times(self, weight: Tensor) -> Tensor:
        """X w, [l, N], for ``weight`` [l, D]."""
        parts = [_product(x, weight.float()) for x in self._blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def transposed(self, values: Tensor) -> Tensor:
        """X' v, [l, D] float64, for ``values`` [l, N]."""
        total = torch.zeros(self.layers, self.width, dtype=torch.float64, device=self.device)
        values, start = values.float(), 0
        for x in self._blocks():
            total += _product(x.transpose(1, 2), values[:, start : start + x.shape[1]])
            start += x.shape[1]
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


def in_groups(
    recording: Recording, use: Tensor, *, unit: bool, device: str | torch.device | None = None
) -> Iterator[Tokens]:
    """The tokens of all layers, in groups of layers to solve together; use each before the next.

    A processor takes one layer at a time, whose tokens may then stay in its cache; an accelerator
    takes what ``IN_MEMORY`` holds. Where that does not hold one layer, all layers share each pass.
    """
    where = torch.device(device) if device else next(recording.chunks()).values.device
    count, shape = len(recording.layers), (len(use), recording.width)
    fitting = IN_MEMORY // max(1, 4 * shape[0] * shape[1])
    if not fitting:
        yield Tokens(recording, slice(0, count), use, unit=unit, device=where)
        return
    step = 1 if where.type == "cpu" else min(fitting, count)
    room = torch.empty(step, *shape, device=where)  # one for all groups: new memory is slow
    for i in range(0, count, step):
        held = room[: min(step, count - i)]
        yield Tokens(recording, slice(i, i + step), use, unit=unit, device=where, held=held)


def _length(x: Tensor) -> Tensor:
    return _size(x)[..., None].clamp_min(1e-12)


def _product(x: Tensor, values: Tensor) -> Tensor:
    """Products of matrices [l, n, m] and vectors [l, m]: [l, n]."""
    if len(x) == 1:
        return (x[0] @ values[0])[None]
    if x.device.type == "cpu":  # several times faster than one batched product
        return torch.stack([matrix @ vector for matrix, vector in zip(x, values, strict=True)])
    return torch.bmm(x, values[..., None])[..., 0]


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
    tolerance: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Logistic regressions of ``targets`` [N] (probabilities) on the tokens in use, one per layer.

    Minimises sum crossentropy(target, sigmoid(X w + b)) + l2/2 |w|^2, the same optimum as
    scikit-learn's with C = 1/l2; the bias is not penalised. Returns w [l, D] and b [l].

    Every round adds the gradient to a subspace and takes one Newton step of the regression inside
    it (sequential subspace optimisation, Narkiss & Zibulevsky 2005). A round costs two passes over
    the tokens. A layer is done when |gradient| <= ``tolerance`` l2 |w|: since the loss is
    l2-strongly convex, w is then within ``tolerance`` |w| of the optimum, usually far closer. It
    is done as well when it moves no more, as float32 allows where activations are very large.
    """
    inside = _Subspace(tokens, targets, l2, int(with_bias))
    still = torch.zeros(tokens.layers, device=tokens.device)
    for _ in range(ROUNDS):
        weight = inside.weight()
        gradient = tokens.transposed(inside.residual) + l2 * weight
        done = _size(gradient) <= tolerance * l2 * _size(weight)
        if with_bias:
            done &= inside.residual.sum(-1).abs() <= tolerance * inside.curvature.sum(-1)
        if bool((done | (still >= PATIENCE)).all()):
            break
        inside.widen(gradient)
        still = torch.where(inside.step() <= STILL, still + 1, 0)
    else:
        log.warning(
            "%d of %d logistic fits had not settled after %d rounds: fit normalised tokens, or "
            "raise l2 (%g)",
            int((~done).sum()),
            tokens.layers,
            ROUNDS,
            l2,
        )
    return inside.weight(), inside.u[:, 0] * inside.first


class _Subspace:
    """A logistic regression inside span(Q): w = Q u, with orthonormal Q [l, K, D] and X Q known.

    With a bias it is the first coordinate: a column of ones, no direction, no penalty.
    """

    def __init__(self, tokens: Tokens, targets: Tensor, l2: float, first: int) -> None:
        self.tokens, self.first, self.size = tokens, first, first
        self.targets = targets.to(tokens.device, torch.float64)
        layers, where = tokens.layers, tokens.device
        affordable = IN_MEMORY // (4 * layers * len(targets))
        room = first + min(DIRECTIONS, max(NEWEST + 8, affordable))
        self.basis = torch.zeros(layers, room, tokens.width, device=where)
        self.columns = torch.ones(layers, room, len(targets), device=where)
        self.u = torch.zeros(layers, room, dtype=torch.float64, device=where)
        self.penalty = torch.full_like(self.u[0], l2)
        self.penalty[:first] = TINY
        self._move(torch.zeros(layers, len(targets), dtype=torch.float64, device=where), self.u)

    def weight(self) -> Tensor:
        return _mix(self.u[:, : self.size], self.basis[:, : self.size])

    def widen(self, gradient: Tensor) -> None:
        """Add a gradient, [l, D], made orthogonal to the directions that are there."""
        if self.size == self.u.shape[1]:
            self._fold()
        basis = self.basis[:, : self.size]
        new = (gradient / _size(gradient)[:, None].clamp_min(TINY)).float()
        new = new - _mix(torch.bmm(basis, new[..., None])[..., 0], basis)
        new = new / _size(new)[:, None].clamp_min(TINY)
        self.basis[:, self.size] = new
        self.columns[:, self.size] = self.tokens.times(new)
        self.size += 1

    def _fold(self) -> None:
        """Make room: all but the newest directions become one, along the solution so far."""
        old, new = slice(self.first, self.size - NEWEST), slice(self.size - NEWEST, self.size)
        length = _size(self.u[:, old])[:, None]
        share = self.u[:, old] / length.clamp_min(TINY)
        self.size = self.first + 1 + NEWEST
        for held in (self.basis, self.columns):
            one = _mix(share, held[:, old])[:, None].float()
            held[:, self.first : self.size] = torch.cat([one, held[:, new]], 1)
        self.u[:, self.first : self.size] = torch.cat([length, self.u[:, new]], 1)
        self.u[:, self.size :] = 0

    def step(self) -> Tensor:
        """One Newton step for u, halved until it helps; returns its length beside |u|, [l]."""
        columns, penalty = self.columns[:, : self.size], self.penalty[: self.size]
        u, z, before = self.u[:, : self.size].clone(), self.z, self.loss
        slope = torch.bmm(columns, self.residual.float()[..., None])[..., 0] + penalty * u
        hessian = torch.bmm(columns * self.curvature.float()[:, None], columns.transpose(1, 2))
        newton = torch.linalg.solve(hessian.double() + torch.diag(penalty), slope)
        along, share = _mix(newton, columns), torch.ones_like(u[:, :1])
        for _ in range(30):
            self.u[:, : self.size] = u - share * newton
            self._move(z - share * along, self.u)
            worse = self.loss > before + 1e-9 * before.abs()
            if not bool(worse.any()):
                break
            share = torch.where(worse[:, None], share / 2, share)
        return _size(newton) / _size(self.u).clamp_min(TINY)

    def _move(self, z: Tensor, u: Tensor) -> None:
        """Go to logits z [l, N]: the loss there, and what its derivatives are made of."""
        use, p = self.tokens.use, torch.sigmoid(z)
        self.z, self.residual = z, use * (p - self.targets)
        self.curvature = use * p * (1 - p)
        crossentropy = torch.nn.functional.softplus(z) - self.targets * z
        self.loss = (use * crossentropy).sum(-1) + (self.penalty * u * u).sum(-1) / 2


def _size(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return size


def _mix(share: Tensor, directions: Tensor) -> Tensor:
    """Sums of K rows [L, K, D] by their shares [L, K]: [L, D], in the shares' own type."""
    return torch.bmm(share.float()[:, None], directions)[:, 0].to(share.dtype)


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
