"""How fast is a logistic probe of all layers, beside scikit-learn layer by layer? One run, ratios.

    python benchmarks/probes.py

About 4,000 answer tokens of 256 chats, 30 layers, width 576, two threads. scikit-learn gets each
layer's tokens ready made (float32, contiguous, centred and of unit length where asked): only its
fits are timed.
Ours starts at the recording and ends at a probe with its accuracy. Two stopping rules of
scikit-learn: its own (1e-4), and the largest of 1e-4, 1e-5, ... that comes as close to the optimum
at every layer as ours does. The optimum is a fit in float64 with a tolerance of 1e-8.
"""

import warnings
from typing import Any

import numpy as np
import torch
from common import best_of, chats, check, save
from sklearn.linear_model import LogisticRegression

import trimtab as tt

PLACE = "norm@all answer[:16]"
CHATS, THREADS = 256, 2


def scikit(
    layers: list[np.ndarray], y: np.ndarray, bias: bool, tol: float
) -> list[LogisticRegression]:
    options = {"C": 1.0, "fit_intercept": bias, "tol": tol, "max_iter": 20_000}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float32 line searches end early at small tolerances
        return [LogisticRegression(**options).fit(x, y) for x in layers]


def cosines(mine: np.ndarray, other: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(mine, axis=-1) * np.linalg.norm(other, axis=-1)
    return (mine * other).sum(-1) / norms


def weights(fits: list[LogisticRegression]) -> np.ndarray:
    return np.concatenate([f.coef_ for f in fits])


def compare(rec: tt.Recording, labels: list[float], normalize: bool) -> list[dict[str, Any]]:
    tokens = torch.cat(rec.rows())
    if normalize:
        tokens = tokens - tokens.mean(0)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    y = np.repeat(labels, rec.lengths)
    layers = [x.contiguous().numpy() for x in tokens.unbind(1)]
    bias, kind = not normalize, "normalised" if normalize else "raw"

    def ours() -> tt.Probe:
        return tt.concepts.fit_recording(rec, labels, method="logistic", normalize=normalize)

    fits = scikit([x.astype(np.float64) for x in layers], y, bias, 1e-8)
    best = weights(fits)
    probe = ours()
    right = np.stack([f.predict(x) == y for f, x in zip(fits, layers, strict=True)], 1)
    rows = torch.from_numpy(right).double().split(rec.lengths)
    accuracy = torch.stack([r.mean(0) for r in rows]).mean(0)
    apart = float((accuracy - probe.accuracy).abs().max())
    close = cosines(probe.weight.numpy(), best).min()
    print(f"{kind}: {len(tokens)} tokens, least cosine with the optimum {close:.7f}")
    for tol in (1e-4, 1e-5, 1e-6, 1e-7):
        theirs = cosines(weights(scikit(layers, y, bias, tol)), best).min()
        print(f"  scikit-learn, tol {tol:g}: {theirs:.7f}")
        if theirs >= close:
            break
    times = best_of(
        {
            f"{kind}: ours": ours,
            f"{kind}: scikit-learn, tol 1e-4": lambda: scikit(layers, y, bias, 1e-4),
            f"{kind}: scikit-learn, as exact": lambda: scikit(layers, y, bias, tol),
        },
        2,
    )
    mine, default, exact = times.values()
    again = ours()
    equal = torch.equal(again.weight, probe.weight) and torch.equal(again.bias, probe.bias)
    return [
        check(f"{kind}: scikit-learn / ours", default / mine, 5.0, at_least=True),
        check(f"{kind}: as exact scikit-learn / ours", exact / mine, 5.0, at_least=True),
        check(f"{kind}: least cosine with the optimum", float(close), 0.9995, at_least=True),
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
