"""Concept probes against independent numpy and scikit-learn, on recordings made by hand.

The solvers beneath them are tested here too: each method is computed a second time in float64.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab import solvers
from trimtab.errors import ArtifactError, PlaceError
from trimtab.recording import Chunk, Recording, Track

L, D = 3, 8
MODEL = {"id": "tiny", "revision": None, "width": D, "layers": 5, "fingerprint": "00ff"}


def made(n=40, seed=0, signal=1.0, most=9, offset=3.0):
    """Ragged rows [T_i, L, D] and labels: one in four is positive, and those rows are longer."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=(L, D))
    labels = (np.arange(n) % 4 == 0).astype(float)
    rows = []
    for label in labels:
        tokens = random.integers(1, most) + 3 * int(label)
        noise = random.normal(size=(tokens, L, D)) + offset
        rows.append(torch.from_numpy(noise + signal * label * direction).float())
    return rows, labels


def recorded(rows, chunks=1, place="resid@1:4"):
    """A recording of these rows in several chunks, out of order, as harvesting leaves them."""
    order = list(range(len(rows)))[::-1] if chunks > 1 else list(range(len(rows)))
    parts = [order[i::chunks] for i in range(chunks)]
    track = [
        Chunk(tuple(p), tuple(len(rows[i]) for i in p), torch.cat([rows[i] for i in p]))
        for p in parts
        if p
    ]
    place = tt.Place.parse(place)
    return Recording({place: Track(place.layer_indices(5), track)})


def by_hand(rows, labels, normalize):
    """The mean probe in float64 numpy: the difference of the class means, of unit length."""
    tokens = np.concatenate([r.double().numpy() for r in rows])
    y = np.concatenate([np.full(len(r), label) for r, label in zip(rows, labels, strict=True)])
    mean = tokens.mean(0)
    if normalize:
        tokens = tokens - mean
        tokens = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    weight = tokens[y == 1].mean(0) - tokens[y == 0].mean(0)
    weight /= np.linalg.norm(weight, axis=-1, keepdims=True)
    return mean, weight, np.einsum("nld,ld->nl", tokens, weight), y


# ---- the fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 7])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_mean_probe_is_the_definition(normalize, chunks):
    rows, labels = made()
    probe = tt.concepts.fit_recording(recorded(rows, chunks), labels, normalize=normalize)
    mean, weight, scores, y = by_hand(rows, labels, normalize)
    np.testing.assert_allclose(probe.weight.numpy(), weight, atol=1e-6)
    assert probe.layers == (1, 2, 3) and str(probe.place) == "resid@1:4 all"
    if normalize:
        np.testing.assert_allclose(probe.mean.numpy(), mean, atol=1e-6)
    else:
        assert probe.mean is None
    for i in range(L):
        sk = LogisticRegression(C=1, fit_intercept=not normalize, tol=1e-12, max_iter=1000)
        sk.fit(scores[:, i : i + 1], y)
        np.testing.assert_allclose(float(probe.gain[i]), sk.coef_[0, 0], rtol=1e-5)
        np.testing.assert_allclose(float(probe.bias[i]), np.ravel(sk.intercept_)[0], atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0])
def test_the_logistic_fit_is_scikit_learns(with_bias, scale):
    random = np.random.default_rng(1)
    y = (random.random(300) < 0.2).astype(float)
    scores = scale * (random.normal(size=(300, 2)) + 0.7 * y[:, None] + np.array([0.0, 2.0]))
    gain, bias = solvers.logistic_1d(
        torch.from_numpy(scores), torch.from_numpy(2 * y - 1), with_bias=with_bias
    )
    for i in range(2):
        sk = LogisticRegression(
            C=1, fit_intercept=with_bias, tol=1e-9, max_iter=5000, solver="newton-cholesky"
        )
        sk.fit(scores[:, i : i + 1], y)
        np.testing.assert_allclose(float(gain[i]), sk.coef_[0, 0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(float(bias[i]), np.ravel(sk.intercept_)[0], rtol=1e-6, atol=1e-6)


def test_the_logistic_fit_of_separable_scores_is_finite():
    s = torch.tensor([[-3.0], [-2.0], [2.0], [3.0]])
    gain, bias = solvers.logistic_1d(s, torch.tensor([-1.0, -1, 1, 1]), with_bias=True)
    sk = LogisticRegression(C=1, tol=1e-9, solver="newton-cholesky")
    sk.fit(s.numpy(), [0, 0, 1, 1])
    np.testing.assert_allclose([float(gain), float(bias)], [sk.coef_[0, 0], 0.0], atol=1e-5)


def test_chunks_of_unequal_size_weigh_by_their_tokens():
    """1024 zeros and a one: a mean of the chunks' means would be a half."""
    zeros, one = torch.zeros(1024, 1, D), torch.ones(1, 1, D)
    chunks = [Chunk((0,), (1024,), zeros), Chunk((1,), (1,), one)]
    rec = Recording({tt.Place("resid", 0): Track((0,), chunks)})
    probe = tt.concepts.fit_recording(rec, [0, 1])
    np.testing.assert_allclose(probe.mean.numpy(), np.full((1, D), 1 / 1025), rtol=1e-5)
    naive = torch.stack([c.values.mean(0) for c in chunks]).mean(0)
    assert float(naive[0, 0]) == 0.5  # the control


FITTED = ("weight", "gain", "bias", "accuracy", "heldout_accuracy", "heldout_auroc")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_layers_in_groups_of_several_are_layers_at_once(method, normalize, monkeypatch):
    random = torch.Generator().manual_seed(2)
    rows = [torch.randn(6, 5, D, generator=random) + 0.4 * (i % 2) for i in range(60)]
    rec, labels = tt.Recording.from_rows("resid@all", rows), [i % 2 for i in range(60)]
    options = {"method": method, "held_out": 0.2}
    at_once = tt.concepts.fit_recording(rec, labels, normalize=normalize, **options)
    monkeypatch.setattr(solvers, "NARROW", 2 * D)  # groups of 2, 2 and 1
    grouped = tt.concepts.fit_recording(rec, labels, normalize=normalize, **options)
    for name in FITTED:
        torch.testing.assert_close(
            getattr(grouped, name), getattr(at_once, name), rtol=1e-3, atol=1e-3
        )
    other = tt.concepts.fit_recording(rec, labels, normalize=not normalize, **options)
    assert not torch.allclose(other.weight, at_once.weight, atol=1e-2)  # the control


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_chunked_is_unchunked(method, normalize):
    rows, labels = made(60)
    options = {"method": method, "normalize": normalize, "held_out": 0.25}
    whole = tt.concepts.fit_recording(recorded(rows), labels, **options)
    parts = tt.concepts.fit_recording(recorded(rows, 13), labels, **options)
    for name in FITTED:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_streaming_is_in_memory(monkeypatch, tmp_path, method, normalize):
    rows, labels = made(60)
    options = {"method": method, "normalize": normalize, "held_out": 0.25}
    held = tt.concepts.fit_recording(recorded(rows), labels, **options)
    recorded(rows, 4).save(tmp_path / "rec")
    reads = []
    read = solvers.Tokens._read
    monkeypatch.setattr(solvers.Tokens, "_read", lambda own: reads.append(1) or read(own))
    rec = Recording.load(tmp_path / "rec")
    tt.concepts.fit_recording(rec, labels, **options)
    assert len(reads) == 1  # narrow layers are read together, once
    monkeypatch.setattr(solvers, "IN_MEMORY", 100)
    monkeypatch.setattr(solvers, "BLOCK", 16)
    reads.clear()
    streamed = tt.concepts.fit_recording(rec, labels, **options)
    assert len(reads) > 5  # the control: these tokens were really read again
    cosine = torch.nn.functional.cosine_similarity(streamed.weight, held.weight, dim=-1)
    assert float(cosine.min()) > 0.99999
    for name in FITTED:
        near = (
            {"rtol": 1e-4, "atol": 1e-5} if method != "logistic" else {"rtol": 0.01, "atol": 0.01}
        )
        torch.testing.assert_close(getattr(streamed, name), getattr(held, name), **near)


@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_a_second_run_is_equal(method):
    rows, labels = made(50)
    options = {"method": method, "held_out": 0.2, "seed": 4}
    one, two = (tt.concepts.fit_recording(recorded(rows, 3), labels, **options) for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in FITTED)
    other = tt.concepts.fit_recording(recorded(rows, 3), labels, **{**options, "seed": 5})
    assert not torch.equal(other.weight, one.weight)  # the control: another split


def test_accuracy_is_per_token_then_per_row_then_over_rows():
    rows, labels = made(24, signal=0.4)
    probe = tt.concepts.fit_recording(recorded(rows, 3), labels, held_out=0.25, seed=5)
    keep = tt.concepts.split(range(24), None, 0.25, 5)
    mean, weight = probe.mean.double().numpy(), probe.weight.double().numpy()
    per_row = []
    for row, label in zip(rows, labels, strict=True):
        x = row.double().numpy() - mean
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        p = 1 / (1 + np.exp(-np.einsum("nld,ld->nl", x, weight) * probe.gain.numpy()))
        per_row.append(((p > 0.5) == (label == 1)).mean(0))
    per_row = np.stack(per_row)
    assert 0.5 < per_row.mean() < 1  # worth comparing
    assert int((~keep).sum()) == 6
    np.testing.assert_allclose(probe.accuracy, per_row[keep.numpy()].mean(0), atol=1e-6)
    np.testing.assert_allclose(probe.heldout_accuracy, per_row[~keep.numpy()].mean(0), atol=1e-6)


def test_nothing_held_out_is_no_number(tmp_path):
    probe = tt.concepts.fit_recording(recorded(made()[0]), made()[1])
    assert bool(torch.isnan(probe.heldout_accuracy).all())
    some = tt.concepts.fit_recording(recorded(made()[0]), made()[1], held_out=0.2)
    for kept, known in ((probe, False), (some, True)):  # the latter is the control
        kept.save(tmp_path / str(known))
        scores = tt.load(tmp_path / str(known)).meta.scores
        assert ("heldout_accuracy" in scores) is known and "accuracy" in scores


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("flip", [1, -1])
def test_positives_score_higher(normalize, flip):
    rows, labels = made(signal=2.0)
    labels = labels if flip == 1 else 1 - labels
    rec = recorded(rows)
    probe = tt.concepts.fit_recording(rec, labels, normalize=normalize)
    p = probe.predict(rec)
    assert bool((probe.gain > 0).all())
    assert bool((p[labels == 1].mean(0) > p[labels == 0].mean(0)).all())


@pytest.mark.parametrize("low,high", [(0, 1), (-1, 1), (2, 10), (False, True)])
def test_labels_on_any_scale(low, high):
    rows, labels = made()
    given = [high if label else low for label in labels]
    probe = tt.concepts.fit_recording(recorded(rows), given)
    wanted = tt.concepts.fit_recording(recorded(rows), torch.tensor(labels))
    assert torch.equal(probe.weight, wanted.weight) and torch.equal(probe.gain, wanted.gain)


# ---- logistic ------------------------------------------------------------------------------------


def tokens_of(rows, labels, normalize):
    """Tokens and labels in float64 numpy, normalised by hand."""
    x = np.concatenate([r.double().numpy() for r in rows])
    y = np.concatenate([np.full(len(r), label) for r, label in zip(rows, labels, strict=True)])
    if normalize:
        x = x - x.mean(0)
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x, y


def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def optimum(x, y, l2, bias, **options):
    """scikit-learn's weights and bias, and its accuracy on tokens, for each layer."""
    fits = [
        LogisticRegression(
            C=1 / l2, fit_intercept=bias, tol=1e-10, max_iter=5000, solver="newton-cholesky"
        ).fit(x[:, i], y, **options)
        for i in range(x.shape[1])
    ]
    weight = np.concatenate([f.coef_ for f in fits])
    return weight, np.array([np.ravel(f.intercept_)[0] for f in fits]), fits


@pytest.mark.parametrize("l2", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_logistic_probe_is_scikit_learns(normalize, offset, l2):
    rows, labels = made(80, signal=0.6, offset=offset)
    rec = recorded(rows, 3)
    probe = tt.concepts.fit_recording(rec, labels, "logistic", normalize, l2=l2)
    x, y = tokens_of(rows, labels, normalize)
    weight, bias, fits = optimum(x, y, l2, bias=not normalize)
    assert cosine(probe.weight, weight).min() > 0.9998
    distance = np.linalg.norm(probe.weight.numpy() - weight, axis=-1)
    assert (distance <= 0.02 * np.linalg.norm(weight, axis=-1)).all()
    centre = 0 if normalize else x.mean(0)
    mine = np.einsum("ld,ld->l", probe.weight.numpy(), np.broadcast_to(centre, weight.shape))
    theirs = np.einsum("ld,ld->l", weight, np.broadcast_to(centre, weight.shape))
    np.testing.assert_allclose(probe.bias.numpy() + mine, bias + theirs, atol=0.03)
    assert torch.equal(probe.gain, torch.ones(L))
    assert not normalize or torch.equal(probe.bias, torch.zeros(L))
    for i, fit in enumerate(fits):
        assert (
            abs(((probe_margin(probe, rows)[:, i] > 0) == y).mean() - fit.score(x[:, i], y)) < 0.01
        )
    wrong, _, _ = optimum(x, y, l2 * 30, bias=not normalize)  # the control: another penalty
    assert (np.linalg.norm(probe.weight.numpy() - wrong, axis=-1) > 0.02).all()


def probe_margin(probe, rows):
    return probe._margin(torch.cat(rows)).numpy()


def test_the_bias_matters_where_tokens_are_not_centred():
    """One in four rows is positive: a fit without a bias puts the threshold elsewhere."""
    rows, labels = made(80, signal=0.6)
    probe = tt.concepts.fit_recording(recorded(rows), labels, "logistic", normalize=False)
    x, y = tokens_of(rows, labels, normalize=False)
    without, _, _ = optimum(x, y, 1.0, bias=False)
    assert cosine(probe.weight, without).min() < 0.99  # the control


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_badly_scaled_tokens(scale, caplog):
    """Activations of a residual stream: a few coordinates are a thousand times the others."""
    rows, labels = made(120, signal=0.5)
    size = torch.tensor([scale, 1.0, 1.0, 30.0, 1.0, 1.0, 0.1, 1.0])
    rows = [r * size for r in rows]
    probe = tt.concepts.fit_recording(recorded(rows), labels, "logistic", normalize=False)
    x, y = tokens_of(rows, labels, normalize=False)
    weight, _, _ = optimum(x, y, 1.0, bias=True)
    assert cosine(probe.weight, weight).min() > 0.9995
    assert not caplog.records


def test_an_ill_conditioned_fit_takes_several_hessians(monkeypatch, caplog):
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 1, 60)) * np.logspace(0, 2, 60)
    y = (x[:, 0] @ (random.normal(size=60) / np.logspace(0, 2, 60)) > 0.3).astype(float)
    rec = recorded(list(torch.from_numpy(x).float()[:, None]), place="resid@1")
    weight, _, _ = optimum(x, y, 1.0, bias=True)
    made = []
    init = solvers._Newton.__init__
    monkeypatch.setattr(solvers._Newton, "__init__", lambda *a: made.append(1) or init(*a))
    probe = tt.concepts.fit_recording(rec, y, "logistic", normalize=False)
    assert cosine(probe.weight, weight).min() > 0.9999
    assert len(made) > 1 and not caplog.records
    monkeypatch.setattr(solvers, "ROUNDS", 3)
    early = tt.concepts.fit_recording(rec, y, "logistic", normalize=False)
    assert cosine(early.weight, weight).min() < 0.99  # the control
    assert "1 of 1 logistic fits had not settled after 3 rounds" in caplog.text


def test_wide_layers_of_unit_tokens_take_a_few_tokens_hessian(monkeypatch):
    """One layer at a time, each from the solution before it: the optimum is that of the layer."""
    random = np.random.default_rng(0)
    x = random.normal(size=(1500, 2, 600)) + 3.0
    y = (x[:, :, :40].sum((1, 2)) + 10 * random.normal(size=1500) > 240).astype(float)
    rec = recorded(list(torch.from_numpy(x).float()[:, None]), place="resid@1:3")
    made, starts = [], []
    init, begin = solvers._Dual.__init__, solvers._Logistic.__init__
    monkeypatch.setattr(solvers._Dual, "__init__", lambda *a: made.append(len(a)) or init(*a))
    monkeypatch.setattr(solvers._Logistic, "__init__", lambda *a: starts.append(a[-1]) or begin(*a))
    probe = tt.concepts.fit_recording(rec, y, "logistic")
    assert len(made) == 2 and starts[0] is None and torch.equal(starts[1].float(), probe.weight[:1])
    x = x - x.mean(0)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    weight, _, _ = optimum(x, y, 1.0, bias=False)
    assert cosine(probe.weight, weight).min() > 0.9999
    alone = tt.concepts.fit_recording(rec["resid@2"], y, "logistic")
    assert cosine(alone.weight, probe.weight[1:]).min() > 0.9999
    monkeypatch.setattr(solvers, "ROUNDS", 1)
    early = tt.concepts.fit_recording(rec, y, "logistic")
    assert cosine(early.weight, weight).min() < 0.999  # the control


@pytest.mark.parametrize("l2", [1.0, 1e-4])
def test_a_hessian_of_some_tokens_leads_to_the_optimum_of_all(monkeypatch, l2):
    random = np.random.default_rng(1)
    x = random.normal(size=(3000, 1, 20)) * np.logspace(0, 1, 20)
    y = (x[:, 0, :4].sum(-1) + 3 * random.normal(size=3000) > 0).astype(float)
    rec = recorded(list(torch.from_numpy(x).float()[:, None]), place="resid@1")
    monkeypatch.setattr(solvers, "SHARE", 1)
    counts = []
    gram = solvers.Tokens.gram
    monkeypatch.setattr(
        solvers.Tokens,
        "gram",
        lambda own, c, some: (
            counts.append(3000 if some is None else len(some)) or gram(own, c, some)
        ),
    )
    probe = tt.concepts.fit_recording(rec, y, "logistic", normalize=False, l2=l2)
    weight, _, _ = optimum(x, y, l2, bias=True)
    assert counts[0] == 256 and cosine(probe.weight, weight).min() > 0.9999
    some, _, _ = optimum(x[::12], y[::12], l2, bias=True)  # the control: those tokens alone
    assert cosine(some, weight).min() < 0.999


def test_a_sample_is_the_same_whatever_the_chunks_are():
    rows = [
        torch.full((3, 1, 4), float(i)) + torch.arange(3.0)[:, None, None] / 4 for i in range(40)
    ]
    use = torch.ones(120)
    found = []
    for chunks in (1, 7):
        rec = recorded(rows, chunks, place="resid@1")
        tokens = next(solvers.in_groups(rec, use, unit=False))
        picked = tokens.sample(10)
        values = tokens.rows(picked)[0] + tokens.mean
        found.append(values.sort(0).values)
        assert len(picked.unique()) == 10
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0][-1, 0] - found[0][0, 0]) > 30  # from all over the recording


def test_gram_is_the_weighted_second_moment(monkeypatch):
    monkeypatch.setattr(solvers, "BLOCK", 30)
    x, w = torch.randn(90, 2, 200), torch.rand(2, 90).double()
    rec = recorded(list(x[:, None]), place="resid@1:3")
    tokens = next(solvers.in_groups(rec, torch.ones(90), unit=False))
    held = tokens.held[0].double()
    found = tokens.gram(w[: tokens.layers])[0].double()
    wanted = held.T @ (held * w[0, :, None])
    torch.testing.assert_close(found.tril(), wanted.tril(), rtol=1e-4, atol=1e-3)
    assert float((found.tril() - (held.T @ held).tril()).abs().max()) > 1  # the control


def test_separable_and_silent_layers():
    """Classes far apart, and a layer that is always the same: finite, and the latter is zero."""
    rows, labels = made(40, signal=50.0)
    for row in rows:
        row[:, 1] = 2.0
    for method in tt.concepts.METHODS:
        for normalize in (True, False):
            probe = tt.concepts.fit_recording(recorded(rows), labels, method, normalize)
            assert all(bool(torch.isfinite(getattr(probe, n)).all()) for n in FITTED[:4])
            assert float(probe.accuracy[[0, 2]].min()) > 0.95
    weight, _, _ = optimum(*tokens_of(rows, labels, False), 1.0, bias=True)
    probe = tt.concepts.fit_recording(recorded(rows), labels, "logistic", normalize=False)
    assert cosine(probe.weight[[0, 2]], weight[[0, 2]]).min() > 0.9995
    assert float(probe.weight[1].norm()) < 1e-12


def few_distinct(kind, seed):
    """Tokens [N, D] that are one of two vectors, as those of two words are, and their labels."""
    random = np.random.default_rng(seed)
    one, other = random.normal(size=(2, 64)) + 3
    if kind == "two tokens":
        return np.stack([one, other]), np.array([1.0, 0.0])
    y = (np.arange(300) % (10 if kind.startswith("rare") else 2) == 0).astype(float)
    said = y != (random.random(300) < (0.0 if kind.endswith("own word") else 0.2))
    if kind == "long":  # whole numbers of which sums are nearly exact, and products are not
        one = random.integers(-99, 99, size=64) * 100.0
        other = -one
    return np.where(said[:, None], one, other), y


FEW = ("own word", "rare, own word", "mixed", "rare, mixed", "two tokens", "long")


def errors(kind, normalize, seeds=range(4)):
    """How far these fits are from the optimum, as a share of it, and their accuracy from its."""
    found = []
    for seed in seeds:
        x, y = few_distinct(kind, seed)
        rec = recorded(list(torch.from_numpy(x).float()[:, None, None]), place="resid@1")
        probe = tt.concepts.fit_recording(rec, y, "logistic", normalize)
        held = next(solvers.in_groups(rec, torch.ones(len(y)), unit=normalize)).held[0]
        _, sizes, turn = np.linalg.svd(held.double().numpy(), full_matrices=False)
        turn = turn[: int((sizes > 1e-5 * sizes[0]).sum())].T  # the space that tokens lie in
        inside = held.double().numpy() @ turn
        size = inside.std()  # taken out, with the penalty, for the oracle's own sake
        weight, _, fits = optimum(inside[:, None] / size, y, size**-2, bias=not normalize)
        wanted = weight[0] @ turn.T / size
        off = np.linalg.norm(probe.weight[0].numpy() - wanted) / np.linalg.norm(wanted)
        found.append((off, abs(float(probe.accuracy) - fits[0].score(inside / size, y))))
    return np.array(found).max(0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", FEW)
def test_few_distinct_tokens_are_fitted_too(kind, normalize, caplog):
    off, accuracy = errors(kind, normalize)
    assert off < 0.01 and accuracy < 1e-6
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "normalize"), [("two tokens", True), ("two tokens", False), ("long", False)]
)
def test_few_distinct_tokens_need_care(kind, normalize, monkeypatch):
    """The control: steps that differ by rounding alone, and logits that are nowhere put right."""
    monkeypatch.setattr(solvers, "RIDGE", 1e-3)
    monkeypatch.setattr(solvers._Logistic, "blur", lambda own: [0.0])
    assert not errors(kind, normalize)[0] < 0.5  # or no number at all


def test_long_tokens_on_a_line_take_float64(monkeypatch, caplog):
    assert errors("long", False)[0] < 0.01 and not caplog.records
    monkeypatch.setattr(solvers.Tokens, "in_float64", lambda own: own)  # the control
    assert errors("long", False)[0] > 1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["rare, mixed", "long"])
def test_few_distinct_tokens_streamed(kind, normalize, monkeypatch):
    x, y = few_distinct(kind, 0)
    rows = list(torch.from_numpy(x).float()[:, None, None])
    whole = tt.concepts.fit_recording(recorded(rows, place="resid@1"), y, "logistic", normalize)
    chunked = recorded(rows, 5, place="resid@1")
    monkeypatch.setattr(solvers, "IN_MEMORY", 100)
    monkeypatch.setattr(solvers, "BLOCK", 16)
    streamed, again, other = (
        tt.concepts.fit_recording(chunked, y, "logistic", normalize, l2=l2)
        for l2 in (1.0, 1.0, 1e9)
    )
    assert torch.equal(streamed.weight, again.weight)
    assert float(torch.dist(streamed.weight, whole.weight) / whole.weight.norm()) < 0.01
    assert torch.equal(streamed.accuracy, whole.accuracy)
    assert float(torch.dist(other.weight, whole.weight) / whole.weight.norm()) > 0.01  # the control


def test_ordinary_fits_stay_in_float32(monkeypatch):
    taken, blurred = [], []
    wide, blur = solvers.Tokens.in_float64, solvers._Logistic.blur
    monkeypatch.setattr(solvers.Tokens, "in_float64", lambda own: taken.append(1) or wide(own))
    monkeypatch.setattr(
        solvers._Logistic, "blur", lambda own: blurred.append(max(blur(own))) or blurred[-1:]
    )
    rows, labels = made(80, signal=0.6, offset=40.0)
    for normalize in (True, False):
        tt.concepts.fit_recording(recorded(rows), labels, "logistic", normalize)
    assert not taken and len(blurred) == 2 and max(blurred) < 1e-4
    errors("long", False, range(1))
    assert taken and max(blurred) > 1e-2  # the control


def test_accuracy_is_that_of_the_weights(monkeypatch):
    """Logits that were added up are put right at the end, whatever they were."""
    rows, labels = made(40, signal=0.4)
    rec = recorded(rows)
    run = solvers._Logistic.run

    def spoilt(own, *given):
        left = run(own, *given)
        own.state[:, 1, own.logits] *= -1
        return left

    monkeypatch.setattr(solvers._Logistic, "run", spoilt)
    probe = tt.concepts.fit_recording(rec, labels, "logistic")
    token_labels = np.repeat(labels, rec.lengths)
    right = torch.from_numpy((probe_margin(probe, rows) > 0) == (token_labels == 1)[:, None])
    wanted = torch.stack([r.double().mean(0) for r in right.split(list(rec.lengths))]).mean(0)
    torch.testing.assert_close(probe.accuracy, wanted.float())
    monkeypatch.setattr(solvers._Logistic, "blur", lambda own: [0.0] * len(own.weight))
    naive = tt.concepts.fit_recording(rec, labels, "logistic")  # the control
    assert float(naive.accuracy.max()) < 0.5 < float(wanted.min())


def test_graded_labels_are_probabilities():
    """Soft targets: each token once as a positive and once as a negative, by its share."""
    rows, _ = made(40)
    grades = np.linspace(1, 5, 40)
    probe = tt.concepts.fit_recording(recorded(rows), grades, "logistic", normalize=False)
    x, g = tokens_of(rows, (grades - 1) / 4, normalize=False)
    twice, y = np.concatenate([x, x]), np.repeat([1.0, 0.0], len(x))
    weight, _, _ = optimum(twice, y, 1.0, bias=True, sample_weight=np.concatenate([g, 1 - g]))
    assert cosine(probe.weight, weight).min() > 0.9998
    hard, _, _ = optimum(x, (g > 0.5).astype(float), 1.0, bias=True)
    assert cosine(probe.weight, hard).min() < 0.999  # the control


# ---- pca -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_pca_probe_is_the_definition(normalize, chunks):
    rows, labels = made(61, signal=3.0)
    probe = tt.concepts.fit_recording(recorded(rows, chunks), labels, "pca", normalize, seed=3)
    x, y = tokens_of(rows, labels, normalize)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3)).numpy()
    pairs = order[: len(x) // 2 * 2].reshape(-1, 2)
    signs = np.random.default_rng(9).choice([-1.0, 1.0], size=(len(pairs), 1, 1))  # any will do
    differences = signs * (x[pairs[:, 0]] - x[pairs[:, 1]])
    for i in range(L):
        _, vectors = np.linalg.eigh(differences[:, i].T @ differences[:, i])
        first = vectors[:, -1] * np.sign(
            vectors[:, -1] @ (x[y == 1, i].mean(0) - x[y == 0, i].mean(0))
        )
        np.testing.assert_allclose(probe.weight[i].numpy(), first, atol=1e-5)
        scores = (x[:, i] @ first)[:, None]
        sk = LogisticRegression(C=1, tol=1e-10, solver="newton-cholesky").fit(scores, y)
        np.testing.assert_allclose(float(probe.gain[i]), sk.coef_[0, 0], rtol=1e-4)
        np.testing.assert_allclose(float(probe.bias[i]), sk.intercept_[0], rtol=1e-3, atol=1e-4)
    other = tt.concepts.fit_recording(recorded(rows, chunks), labels, "pca", normalize, seed=4)
    assert float((other.weight - probe.weight).abs().max()) > 1e-4  # the control: other pairs


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_every_method_points_at_the_positives(method, normalize, flip):
    rows, labels = made(60, signal=3.0)
    labels = labels if flip == 1 else 1 - labels
    rec = recorded(rows)
    for seed in range(4):  # a principal component alone would turn with the start
        probe = tt.concepts.fit_recording(rec, labels, method, normalize, seed=seed)
        assert bool((probe.gain > 0).all())
        p = probe.predict(rec)
        assert bool((p[labels == 1].mean(0) > p[labels == 0].mean(0)).all())
        x, y = tokens_of(rows, labels, normalize=False)
        gap = x[y == 1].mean(0) - x[y == 0].mean(0)
        assert ((probe.weight.numpy() * gap).sum(-1) > 0).all()


# ---- AUROC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_is_scikit_learns(levels):
    random = np.random.default_rng(levels)
    scores = random.integers(0, levels, size=(57, 4)) / levels  # few levels: many ties
    positive = random.random(57) < 0.3
    found = solvers.auroc(torch.from_numpy(scores), torch.from_numpy(positive))
    wanted = [roc_auc_score(positive, scores[:, i]) for i in range(4)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    ranks = scores.argsort(0).argsort(0) + 1.0  # the control: ties in the order they came
    n = positive.sum()
    naive = (ranks[positive].sum(0) - n * (n + 1) / 2) / (n * (57 - n))
    assert (levels > 3) or np.abs(naive - wanted).max() > 1e-3
    assert bool(torch.isnan(solvers.auroc(torch.rand(5, 2), torch.ones(5) > 0)).all())


@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_heldout_auroc_ranks_rows_by_predict(method):
    rows, labels = made(80, signal=0.4)
    rec = recorded(rows, 3)
    probe = tt.concepts.fit_recording(rec, labels, method, held_out=0.4, seed=2)
    aside = ~tt.concepts.split(range(80), None, 0.4, 2).numpy()
    p = probe.predict(rec).numpy()
    wanted = [roc_auc_score(labels[aside], p[aside, i]) for i in range(L)]
    np.testing.assert_allclose(probe.heldout_auroc, wanted, atol=1e-6)
    trained = [roc_auc_score(labels[~aside], p[~aside, i]) for i in range(L)]
    assert np.abs(np.array(trained) - wanted).max() > 1e-3  # the control
    nothing = tt.concepts.fit_recording(rec, labels, method)
    assert bool(torch.isnan(nothing.heldout_auroc).all())


# ---- labels --------------------------------------------------------------------------------------


def test_graded_labels_are_a_covariance():
    rows, _ = made(30)
    grades = np.linspace(1, 5, 30)
    probe = tt.concepts.fit_recording(recorded(rows, 4), grades, normalize=False)
    tokens = np.concatenate([r.double().numpy() for r in rows])
    y = np.concatenate([np.full(len(r), g) for r, g in zip(rows, grades, strict=True)])
    weight = np.einsum("nld,n->ld", tokens, y - y.mean())
    weight /= np.linalg.norm(weight, axis=-1, keepdims=True)
    np.testing.assert_allclose(probe.weight.numpy(), weight, atol=1e-6)


def test_rows_without_a_token_teach_nothing():
    rows, labels = made(20)
    gaps = [*rows, torch.zeros(0, L, D), torch.zeros(0, L, D)]
    wanted = tt.concepts.fit_recording(recorded(rows), labels)
    probe = tt.concepts.fit_recording(recorded(gaps), [*labels, 1, 0])
    for name in ("weight", "gain", "accuracy"):
        torch.testing.assert_close(getattr(probe, name), getattr(wanted, name))
    with pytest.raises(PlaceError, match=r"rows \[20, 21\] hold no token"):
        probe.predict(recorded(gaps))


# ---- the split -----------------------------------------------------------------------------------


def test_no_prompt_on_both_sides():
    groups = [f"prompt {i // 3}" for i in range(30)]
    keep = tt.concepts.split(groups, None, 0.3, 7)
    sides = {g: {bool(k) for k, h in zip(keep, groups, strict=True) if h == g} for g in groups}
    assert all(len(side) == 1 for side in sides.values())
    assert int((~keep).sum()) == 9  # whole prompts: 3 of 10
    assert torch.equal(keep, tt.concepts.split(groups, None, 0.3, 7))
    others = [tt.concepts.split(groups, None, 0.3, seed) for seed in range(5)]
    assert any(not torch.equal(keep, other) for other in others)
    by_row = tt.concepts.split(range(30), None, 0.3, 7)  # the control: rows of a prompt part
    kept = {g for k, g in zip(by_row, groups, strict=True) if k}
    assert kept & {g for k, g in zip(by_row, groups, strict=True) if not k}


def test_the_split_draws_nothing_from_the_global_state():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    tt.concepts.split(range(30), None, 0.3, 7)
    assert torch.equal(torch.rand(2), wanted)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([1, 0], "2 labels for 8 rows; give one label per row"),
        ([1] * 8, r"two kinds at least, not \[1.0\]; give examples of both"),
        ([1, math.nan] * 4, "labels must be finite"),
        ([1, math.inf] * 4, "labels must be finite"),
        (["good", "bad"] * 4, "labels are numbers, one per row"),
        ([None] * 8, "labels are numbers, one per row"),
    ],
)
def test_labels_that_do_not_fit(labels, told):
    with pytest.raises(PlaceError, match=told):
        tt.concepts.fit_recording(recorded(made(8)[0]), labels)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_activations_that_are_no_numbers(method, normalize, bad):
    rows, labels = made(12)
    options = {"method": method, "normalize": normalize, "held_out": 0.25}
    tt.concepts.fit_recording(recorded(rows, 3), labels, **options)  # the control
    keep = tt.concepts.split(range(12), None, 0.25, 0).tolist()
    told = (
        r"row {} holds activations that are NaN or infinite at resid, layer 2 \(rows \[{}\], 1 in "
    )
    for row in (keep.index(True), keep.index(False)):  # held out or not
        spoilt = [r.clone() for r in rows]
        spoilt[row][-1, 1:, 3] = bad
        with pytest.raises(PlaceError, match=told.format(row, row) + "all.*float32 and record"):
            tt.concepts.fit_recording(recorded(spoilt, 3), labels, **options)


def test_one_prompt_holds_out_nothing(caplog):
    rows, labels = made(12)
    told = "held_out=0.2 keeps nothing aside: no second group (prompt)"
    one = tt.concepts.fit_recording(recorded(rows), labels, held_out=0.2, groups=["a"] * 12)
    assert told in caplog.text and "give examples of several prompts" in caplog.text
    assert bool(torch.isnan(one.heldout_accuracy).all())
    caplog.clear()  # the controls: two prompts, and nothing asked for
    tt.concepts.fit_recording(recorded(rows), labels, held_out=0.2, groups=["a", *"bbbbbbbbbbb"])
    tt.concepts.fit_recording(recorded(rows), labels, groups=["a"] * 12)
    assert not caplog.records


def test_a_label_at_the_midpoint_is_negative():
    """The row of 1 between 0 and 2 is read as negative: right, unless its label is above."""
    rec = recorded([torch.full((2, 1, D), float(g)) for g in (0, 0, 0, 1, 2)], place="resid@1")
    below, at, above = (
        tt.concepts.fit_recording(rec, [0, 0, 0, middle, 4], "logistic", False).accuracy
        for middle in (1.999, 2.0, 2.001)
    )
    assert torch.equal(at, below) and not torch.equal(at, above)


def test_options_that_do_not_fit():
    rows, labels = made(8)
    rec = recorded(rows)
    with pytest.raises(ValueError, match=r"method is one of mean, logistic, pca, not 'magic'"):
        tt.concepts.fit_recording(rec, labels, method="magic")
    for penalty in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"l2 is a positive number, not .*1.0 is the paper's"):
            tt.concepts.fit_recording(rec, labels, method="logistic", l2=penalty)
    for share in (-0.1, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"held_out is a fraction in \[0, 1\)"):
            tt.concepts.fit_recording(rec, labels, held_out=share)
    with pytest.raises(PlaceError, match="3 groups for 8 rows"):
        tt.concepts.fit_recording(rec, labels, groups=["a", "b", "c"])
    with pytest.raises(PlaceError, match=r"one class only .*held_out=0.9\); give more examples"):
        tt.concepts.fit_recording(rec, labels, held_out=0.9, groups=labels.tolist())
    two = Recording({**rec._tracks, **recorded(rows, place="norm@0:3")._tracks})
    with pytest.raises(PlaceError, match="holds several places; choose one"):
        tt.concepts.fit_recording(two, labels)


@pytest.mark.parametrize("examples", [["How are you?"], [("a", "b")], [{"prompt": "a"}]])
def test_fit_takes_examples(examples):
    lm = tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))
    with pytest.raises(PlaceError, match=r"fit takes examples .*not (str|tuple|dict); read them"):
        tt.concepts.fit(lm, examples, "resid@0")
    with pytest.raises(PlaceError, match="there are no rows to learn from"):
        tt.concepts.fit(lm, [], "resid@0")
    alike = [tt.Example("a", "b", 1), tt.Example("c", "d", 1)]
    with pytest.raises(PlaceError, match="two kinds at least"):
        tt.concepts.fit(lm, alike, "resid@0")


# ---- reading -------------------------------------------------------------------------------------


def fitted(**meta):
    rows, labels = made(signal=2.0)
    return tt.concepts.fit_recording(recorded(rows), labels, **meta)


def tied(probe):
    from dataclasses import replace

    return replace(probe, meta=replace(probe.meta, model=MODEL)).named("joy")


def test_predict_is_the_mean_probability():
    rows, labels = made(10)
    probe = tt.concepts.fit_recording(recorded(rows), labels, normalize=False)
    wanted = torch.stack(
        [torch.sigmoid((r * probe.weight).sum(-1) * probe.gain + probe.bias).mean(0) for r in rows]
    )
    torch.testing.assert_close(probe.predict(recorded(rows, 4)), wanted)


def test_predict_of_what_it_cannot_read():
    probe, rows = fitted(), made(4)[0]
    with pytest.raises(PlaceError, match=r"reads resid at layers \[1, 2, 3\], width 8.*norm"):
        probe.predict(recorded(rows, place="norm@1:4"))
    with pytest.raises(PlaceError, match=r"holds resid at \[0, 1, 2\].*recording\[place\]"):
        probe.predict(recorded(rows, place="resid@0:3"))
    with pytest.raises(PlaceError, match="width 5"):
        probe.predict(recorded([r[..., :5] for r in rows]))
    rec = recorded(rows)
    rec.meta["model"] = {**MODEL, "fingerprint": "11ee", "id": "other"}
    with pytest.raises(ArtifactError, match=r"joy was made for another model.*untied\(\)"):
        tied(probe).predict(rec)
    assert tied(probe).untied().predict(rec).shape == (4, L)


def test_some_layers():
    probe, rec = fitted(), recorded(made()[0])
    some = probe.at([1, 3])
    assert some.layers == (1, 3) and str(some.place) == "resid@1,3 all"
    torch.testing.assert_close(some.predict(rec["resid@1,3"]), probe.predict(rec)[:, [0, 2]])
    assert probe.at(-1).layers == (3,)  # of a model that nobody named: the last that was recorded
    with pytest.raises(PlaceError, match=r"no layers \[4\]; it has \[1, 2, 3\]"):
        tied(probe).at(-1)  # of a model of 5 layers
    assert tied(probe).at(-2).layers == (3,)
    readout = probe.readout
    assert readout.place == tt.Place("resid", "1:4") and torch.equal(readout.weight, probe.weight)


# ---- the edit ------------------------------------------------------------------------------------


def test_the_edit_is_scale_times_the_unit_direction():
    probe = fitted()
    edit = probe.edit(scale=12.0, keep_norm=False)
    assert str(edit.place) == "resid@1:4 all" and not edit.keep_norm and not edit.relative
    torch.testing.assert_close(edit.delta, 12.0 * probe.weight)
    torch.testing.assert_close(edit.delta.norm(dim=-1), torch.full((L,), 12.0))
    assert probe.edit().keep_norm and torch.equal(probe.edit().delta, probe.edit(16.0).delta)
    torch.testing.assert_close(
        probe.edit([1.0, 2.0, -3.0]).delta.norm(dim=-1), torch.tensor([1, 2, 3.0])
    )
    assert torch.equal(probe.edit(-12.0).delta, -edit.delta)


def test_the_dose_is_a_fraction_of_the_length():
    probe = fitted()
    edit = probe.edit(dose=[0.1, 0.2, 0.3], tokens="answer")
    assert edit.relative and str(edit.place) == "resid@1:4 answer"
    torch.testing.assert_close(edit.delta.norm(dim=-1), torch.tensor([0.1, 0.2, 0.3]))


def test_scale_or_dose():
    for scale in (8.0, [1.0, 2.0, 3.0], torch.ones(3)):
        with pytest.raises(PlaceError, match="scale= and dose= both say .*give one of them"):
            fitted().edit(scale, dose=0.1)


def test_a_probe_of_what_was_there_before_an_edit_makes_one():
    rows, labels = made()
    probe = tt.concepts.fit_recording(recorded(rows, place="resid@1:4 all before"), labels)
    assert probe.place.before and not probe.edit().place.before


@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_a_fit_carries_no_gradient(method):
    rows, labels = made(12)
    for row in rows:
        row.requires_grad_()
    probe = tt.concepts.fit_recording(recorded(rows), labels, method=method)
    assert not any(getattr(probe, n).requires_grad for n in (*FITTED, "mean"))


def test_reading_of_float64_is_in_float64():
    rows, labels = made(10)
    probe, rows = tt.concepts.fit_recording(recorded(rows), labels), [r.double() for r in rows]
    x = [(r - probe.mean) / (r - probe.mean).norm(dim=-1, keepdim=True) for r in rows]
    wanted = [torch.sigmoid((u * probe.weight).sum(-1) * probe.gain + probe.bias) for u in x]
    got = probe.predict(recorded(rows))
    torch.testing.assert_close(got, torch.stack([w.mean(0) for w in wanted]), rtol=1e-12, atol=0)


def test_guidance_is_the_papers_formula():
    """x' = |x| (x + a w/|w|) / |x + a w/|w||, in float32."""
    probe = fitted()
    x = torch.randn(1, 4, D)
    edit = probe.edit(scale=5.0, layers=2)
    w = 3 * probe.weight[1]  # its length does not matter
    w = w / w.norm()
    moved = x + 5.0 * w
    wanted = x.norm(dim=-1, keepdim=True) * moved / moved.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(edit.write(x, {"delta": edit.delta}), wanted)
    torch.testing.assert_close(wanted.norm(dim=-1), x.norm(dim=-1))


def test_layers_are_given_or_the_best():
    from dataclasses import replace

    probe = replace(fitted(), accuracy=torch.tensor([0.7, 0.9, 0.9]))
    assert probe.edit(top_layers=1).place.layers == "2"  # the first of equals
    assert probe.edit(top_layers=2).place.layers == "2:4"
    assert probe.edit(top_layers=99).place.layers == "1:4"
    assert probe.edit(layers=range(1, 3)).place.layers == "1:3"
    assert probe.edit(layers="1,3").delta.shape == (2, D)
    for count in (0, -1):
        with pytest.raises(PlaceError, match=f"top_layers is 1 or more, not {count}"):
            probe.edit(top_layers=count)
    with pytest.raises(PlaceError, match=r"no layers \[0\]; it has \[1, 2, 3\]"):
        probe.edit(layers=[0, 1])
    with pytest.raises(PlaceError, match=r"\[2\] strengths for layers \[1, 2, 3\]"):
        probe.edit(scale=[1.0, 2.0])
    with pytest.raises(PlaceError, match=r"\[1\] strengths for layers \[2, 2\]"):
        probe.edit(layers=[2, 2], scale=[1.0])
    with pytest.raises(PlaceError, match="NaN or infinite"):
        probe.edit(scale=math.nan)
    for wrong in ({"scale": "big"}, {"dose": [[1.0], [2.0, 3.0]]}, {"weights": {"a": 1}}):
        with pytest.raises(PlaceError, match="are one number, or one per layer, not"):
            probe.edit(**wrong)
    for count in (0, -1, 1.5):
        with pytest.raises(PlaceError, match=f"n tokens, 1 or more, not {count}"):
            probe.edit(tokens="answer", first=(count, 4.0))


@pytest.mark.parametrize(
    "layers",
    [[3, 1, 2], "3,1:3", (-2, 1, 2), torch.tensor([3, 1, 2]), iter([3, 1, 2])],
    ids=["list", "text", "from the top", "tensor", "iterator"],
)
def test_each_layer_takes_the_strength_that_stands_at_its_place(layers):
    probe = tied(fitted())
    made = probe.edit(layers=layers, scale=[30.0, 10.0, 20.0], weights=[1.0, 0.5, 1.0])
    assert made.place.layers == "1:4"
    unit = probe.weight.float() / probe.weight.float().norm(dim=-1, keepdim=True)
    strengths = (made.delta * unit).sum(-1)
    torch.testing.assert_close(strengths, torch.tensor([5.0, 20.0, 30.0]))
    rising = probe.edit(layers=[1, 2, 3], scale=[30.0, 10.0, 20.0], weights=[1.0, 0.5, 1.0])
    assert not torch.allclose(made.delta, rising.delta)


def test_the_edit_knows_its_origin():
    probe = tied(fitted())
    edit = probe.edit()
    assert edit.meta.name == "joy" and edit.meta.model == MODEL
    assert edit.meta.made_by["from"] == "probe" and edit.meta.made_by["method"] == "mean"
    assert probe.untied().edit().meta.model is None and probe.meta.model == MODEL
    assert probe.untied().meta.name == "joy"


def test_a_layer_without_signal_steers_nowhere():
    from dataclasses import replace

    probe = fitted()
    flat = replace(probe, weight=probe.weight * torch.tensor([[1.0], [0.0], [1.0]]))
    assert torch.equal(flat.edit().delta[1], torch.zeros(D))


def test_a_tuned_probe_is_its_edit_in_arithmetic():
    from dataclasses import replace

    probe = fitted()
    tuned = replace(probe, guidance={"layers": [1, 2], "tokens": "answer", "dose": 0.1})
    own, other = tuned.edit(), tt.Add("resid@3", torch.ones(1, D))
    read = tt.When(probe, 0.5, tuned)
    assert torch.equal(read.edit.delta, own.delta) and str(read.place) == "resid@1:3 answer"
    for made, wanted in [
        (0.5 * tuned, 0.5 * own),
        (tuned * np.float32(0.5), 0.5 * own),
        (np.float32(0.5) * tuned, 0.5 * own),
        (tuned / 2, own / 2),
        (-tuned, -own),
        (tuned + other, own + other),
        (other + tuned, other + own),
        (tuned + tuned, own + own),
        (tuned - other, own - other),
        (other - tuned, other - own),
        (sum([tuned, tuned]), own + own),
        (0.5 * tuned + other, 0.5 * own + other),
    ]:
        parts = list(zip(made.parts(), wanted.parts(), strict=True))
        assert all(a.place == b.place and torch.equal(a.delta, b.delta) for a, b in parts)
        assert any(not torch.equal(a.delta, own.delta) for a, _ in parts) or len(parts) > 1
    for use in (  # the control: a probe that was not tuned stands for no edit
        lambda: 0.5 * probe,
        lambda: -probe,
        lambda: probe / 2,
        lambda: probe + other,
        lambda: other + probe,
        lambda: other - probe,
        lambda: tuned - probe,
        lambda: sum([probe]),
        lambda: tt.When(probe, 0.5, probe),
    ):
        with pytest.raises(
            PlaceError, match=r"was not tuned.*give probe.edit\(dose=0.02\), or tune"
        ):
            use()
    for use in (lambda: tuned + 1, lambda: "a" + tuned, lambda: tuned - "a"):
        with pytest.raises(TypeError):
            use()


# ---- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path])
@pytest.mark.parametrize("normalize", [True, False])
def test_save_and_load(tmp_path, form, normalize):
    probe = tied(fitted(normalize=normalize))
    probe.save(form(tmp_path / "joy"))
    back = tt.load(form(tmp_path / "joy"))
    for name in (*FITTED, "mean"):
        one, other = getattr(probe, name), getattr(back, name)
        assert (one is other is None) or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    assert (back.place, back.layers, back.meta.name) == (probe.place, probe.layers, "joy")
    assert back.meta.model == MODEL and probe.meta.made_by.items() <= back.meta.made_by.items()
    assert len(back.meta.scores["accuracy"]) == L
    assert torch.equal(back.edit().delta, probe.edit().delta)


def test_a_probe_from_before_there_was_an_auroc(tmp_path):
    from trimtab.artifact import Meta, Parts, save

    probe = fitted(held_out=0.3)
    assert bool(torch.isfinite(probe.heldout_auroc).all())
    older = {n: getattr(probe, n) for n in FITTED[:-1]}
    save(tmp_path / "p", Parts("probe", Meta(), "resid@1:4 all", {"layers": [1, 2, 3]}, older))
    back = tt.load(tmp_path / "p")
    assert bool(torch.isnan(back.heldout_auroc).all()) and torch.equal(back.weight, probe.weight)
    probe.save(tmp_path / "q")  # the control: today's keep it
    assert torch.equal(tt.load(tmp_path / "q").heldout_auroc, probe.heldout_auroc)
    assert len(tt.load(tmp_path / "q").meta.scores["heldout_auroc"]) == L


def release(tmp_path, **tensors):
    save_file(tensors, tmp_path / "humor.safetensors")
    return tt.load(tmp_path / "humor.safetensors")


def test_release_files(tmp_path):
    W, a, b = torch.randn(4, D), torch.rand(4), torch.randn(4)
    probe = release(tmp_path, W=W, a=a, b=b)
    assert (probe.place, probe.layers) == (tt.Place("norm", "0:4"), (0, 1, 2, 3))
    assert probe.meta.name == "humor" and probe.mean is None
    rec = recorded([torch.randn(3, 4, D)], place="norm@0:4")
    wanted = torch.sigmoid((rec.rows()[0] * W).sum(-1) * a + b).mean(0)
    torch.testing.assert_close(probe.predict(rec)[0], wanted)
    torch.testing.assert_close(probe.edit(8.0).delta, 8 * W / W.norm(dim=-1, keepdim=True))
    probe.save(tmp_path / "kept")  # its accuracy is no number
    again = tt.load(tmp_path / "kept")
    assert torch.equal(again.weight, W) and bool(torch.isnan(again.accuracy).all())
    with pytest.raises(
        PlaceError, match=r"no accuracy to choose 2 of its 4 layers by; give layers"
    ):
        probe.edit(top_layers=2)


def test_release_files_with_less_in_them(tmp_path):
    W = torch.randn(4, D)
    probe = release(tmp_path, W=W.half()[:, None])
    assert torch.equal(probe.gain, torch.ones(4)) and torch.equal(probe.bias, torch.zeros(4))
    assert torch.equal(probe.weight, W.half().float())
    single = release(tmp_path, W=W[:1], b=torch.ones(1))
    assert single.weight.shape == (1, D) and float(single.bias) == 1
    with pytest.raises(ArtifactError, match=r"W .* has shape \[2, 3, 4\], expected \[L, D\]"):
        release(tmp_path, W=torch.ones(2, 3, 4))
    with pytest.raises(ArtifactError, match=r"b in .* has shape \[3\], but W has 4 layers"):
        release(tmp_path, W=W, b=torch.ones(3))


def test_damaged_probes(tmp_path):
    from trimtab.artifact import Meta, Parts, save

    probe = fitted()
    names = ("weight", "gain", "bias", "accuracy", "heldout_accuracy")
    whole = {n: getattr(probe, n) for n in names}
    for extra, tensors, told in [
        ({"layers": [1, 2, 3]}, {n: whole[n] for n in names[:4]}, "lacks some of weight, gain"),
        ({}, whole, "'layers' is missing"),
        ({"layers": [1, 2]}, whole, "names 2 layers, but holds"),
        ({"layers": [1, 2, 3]}, {**whole, "gain": torch.ones(2)}, "gain has shape"),
        ({"layers": [1, 2, 3]}, {**whole, "accuracy": torch.ones(7)}, "names 3 layers"),
        ({"layers": 3}, whole, "cannot be built"),
    ]:
        save(tmp_path / "p", Parts("probe", Meta(), "resid@1:4 all", extra, tensors))
        with pytest.raises(ArtifactError, match=told):
            tt.load(tmp_path / "p")


# ---- from text to a steered answer ---------------------------------------------------------------


def test_fit_on_a_model():
    lm = tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))
    examples = [
        tt.Example(f"Question {i // 2}", "yes yes yes" if i % 2 else "no, never", float(i % 2))
        for i in range(12)
    ]
    probe = tt.concepts.fit(
        lm, examples, "norm@0: answer[:4]", name="agreement", show_progress=False
    )
    assert probe.layers == (0, 1, 2, 3) and probe.meta.name == "agreement"
    assert probe.meta.model == lm.describe() and probe.meta.made_by["examples"] == 12
    rec = lm.record(examples, "norm@0: answer[:4]", show_progress=False)
    wanted = tt.concepts.fit_recording(
        rec, [e.label for e in examples], held_out=0.2, groups=[e.prompt for e in examples]
    )
    assert torch.equal(probe.weight, wanted.weight)
    assert float(probe.accuracy.max()) > 0.8
    batch = lm.batch("Question 1")
    plain = lm(batch).logits
    assert not torch.equal(lm(batch, probe.edit(8.0)).logits, plain)
    assert torch.equal(lm(batch, probe.edit(0.0)).logits, plain)
    assert torch.equal(lm(batch).logits, plain)
