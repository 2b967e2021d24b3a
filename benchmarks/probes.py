"""How fast is a logistic probe of all layers, beside scikit-learn layer by layer? One run, ratios.

    python benchmarks/probes.py

About 4,000 answer tokens of 256 chats, 30 layers, width 576, two threads. Ours starts at the
recording and ends at a probe with its accuracy. scikit-learn is timed in two ways:
- "fits alone": it gets each layer's tokens ready made (float32, contiguous, centred and of unit
  length where asked), and nothing but its fits counts;
- "from the recording": it begins where ours does, so each layer is cut out, centred, normalised,
  fitted, and its accuracy counted, in numpy.
Each with three stopping rules: its own (1e-4), and the largest of 1e-4, 1e-5, 1e-6 that comes
close enough at every layer (a cosine of .9995 with the optimum), or as close as ours; where none
does, the last. There scikit-learn's BLAS gets one thread: numpy's and SciPy's own threads wait for
each other, and with two its fits take many times as long here. One more line is what a user gets
who knows nothing of that: its fits alone, with all defaults. The optimum is found by Newton's
method in float64.
"""

import warnings
from typing import Any

import numpy as np
import torch
from common import best_of, chats, check, save
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import trimtab as tt

PLACE = "norm@all answer[:16]"
CHATS, THREADS = 256, 2
CLOSE = 0.9995


def fitted(
    x: np.ndarray, y: np.ndarray, bias: bool, tol: float, threads: int | None = 1
) -> LogisticRegression:
    options = {"C": 1.0, "fit_intercept": bias, "tol": tol, "max_iter": 20_000}
    with warnings.catch_warnings(), threadpool_limits(threads, user_api="blas"):
        warnings.simplefilter("ignore")  # float32 line searches end early at small tolerances
        return LogisticRegression(**options).fit(x, y)


def cut_out(rows: list[np.ndarray], layer: int, normalize: bool) -> np.ndarray:
    x = np.concatenate([row[:, layer] for row in rows])
    if normalize:
        x -= x.mean(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def from_recording(rec: tt.Recording, labels: list[float], normalize: bool, tol: float) -> None:
    """What a user would write: for each layer its weights and its accuracy."""
    rows, y = [row.numpy() for row in rec.rows()], np.repeat(labels, rec.lengths)
    ends = np.cumsum(rec.lengths)[:-1]
    for layer in range(len(rec.layers)):
        x = cut_out(rows, layer, normalize)
        right = fitted(x, y, not normalize, tol).predict(x) == y
        np.mean([part.mean() for part in np.split(right, ends)])


def optimum(x: np.ndarray, y: np.ndarray, bias: bool) -> np.ndarray:
    """The weights, by Newton's method in float64 on centred tokens."""
    x = torch.from_numpy(x).double()
    x = torch.cat([x - x.mean(0), torch.full((len(x), int(bias)), 1.0)], 1) if bias else x
    penalty = torch.ones(x.shape[1], dtype=torch.float64)
    penalty[len(penalty) - bias :] = 0
    w, target = torch.zeros_like(penalty), torch.from_numpy(y).double()
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty.diag()
        step = torch.linalg.solve(hessian, x.T @ (p - target) + penalty * w)
        w = w - step
        if step.norm() <= 1e-8 * w.norm():
            return w[: len(w) - bias].numpy()
    raise RuntimeError("Newton's method has not settled")


def cosines(mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(mine, axis=-1) * np.linalg.norm(other, axis=-1)
    return (mine * other).sum(-1) / norms


def accuracy(fits: list[LogisticRegression], layers: list[np.ndarray], y: np.ndarray) -> np.ndarray:
    """Of each layer, [L]: right tokens, [N, L]."""
    return np.stack([f.predict(x) == y for f, x in zip(fits, layers, strict=True)], 1)


def compare(rec: tt.Recording, labels: list[float], normalize: bool) -> list[dict[str, Any]]:
    rows, y = [row.numpy() for row in rec.rows()], np.repeat(labels, rec.lengths)
    layers = [cut_out(rows, layer, normalize) for layer in range(len(rec.layers))]
    bias, kind = not normalize, "normalised" if normalize else "raw"
    best = np.stack([optimum(x, y, bias) for x in layers])

    def ours() -> tt.Probe:
        return tt.concepts.fit_recording(rec, labels, method="logistic", normalize=normalize)

    probe = ours()
    close = cosines(probe.weight.numpy(), best).min()
    print(f"{kind}: {len(y)} tokens, least cosine with the optimum {close:.7f}")
    tols, reached = (1e-4, 1e-5, 1e-6), []
    for tol in tols:
        fits = [fitted(x, y, bias, tol) for x in layers]
        reached.append(cosines(np.concatenate([f.coef_ for f in fits]), best).min())
        print(f"  scikit-learn, tol {tol:g}: {reached[-1]:.7f}")
    enough, as_ours = (
        next((t for t, c in zip(tols, reached, strict=True) if c >= least), tols[-1])
        for least in (CLOSE, close)
    )
    told = {tols[0]: ["its own"], enough: [], as_ours: []}
    told[enough].append("enough for .9995")
    told[as_ours].append("as exact as ours" if max(reached) >= close else "never as exact as ours")
    right = torch.from_numpy(accuracy(fits, layers, y)).double().split(rec.lengths)
    apart = float((torch.stack([r.mean(0) for r in right]).mean(0) - probe.accuracy).abs().max())
    mine = best_of({f"{kind}: ours": ours}, 5)[f"{kind}: ours"]
    found = []
    for tol, rules in told.items():
        rule = f"tol {tol:g} ({', '.join(rules)})"
        names = (f"{kind}: fits alone, {rule}", f"{kind}: from the recording, {rule}")
        variants = {
            names[0]: lambda tol=tol: [fitted(x, y, bias, tol) for x in layers],
            names[1]: lambda tol=tol: from_recording(rec, labels, normalize, tol),
        }
        times = best_of(variants, 2 if normalize else 1, warm_up=normalize)
        found += [check(f"{n} / ours", t / mine, 5.0, at_least=True) for n, t in times.items()]
    plain = {
        f"{kind}: fits alone, all defaults": lambda: [
            fitted(x, y, bias, 1e-4, None) for x in layers
        ]
    }
    for name, t in best_of(plain, 1, warm_up=False).items():
        found.append(check(f"{name} / ours", t / mine, 5.0, at_least=True))
    again = ours()
    equal = torch.equal(again.weight, probe.weight) and torch.equal(again.bias, probe.bias)
    return [
        *found,
        check(f"{kind}: least cosine with the optimum", float(close), CLOSE, at_least=True),
        check(f"{kind}: accuracy, largest difference", apart, 0.002, at_least=False),
        check(f"{kind}: a second run is equal", float(equal), 1.0, at_least=True),
    ]


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = tt.LM.load("smollm2-135m", dtype="float32")
    examples = chats(CHATS)
    rec = lm.record(examples, PLACE, show_progress=False)
    labels = [e.label for e in examples]
    save("probes", [row for flag in (True, False) for row in compare(rec, labels, flag)])


if __name__ == "__main__":
    main()
