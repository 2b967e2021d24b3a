"""Edits as values: what each computes, their arithmetic, merging into rows, names and ties.

No model is needed: ``applied`` runs the merged steps on activations by hand.
"""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import trimtab as tt
from trimtab.artifact import Meta
from trimtab.edits import Sum
from trimtab.errors import ArtifactError, PlaceError
from trimtab.merge import fingerprint, merge, spread

L, D = 4, 8
MODEL = {"id": "tiny", "width": D, "layers": L, "fingerprint": "00ff"}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def applied(edits, x, layer=1, prompt_len=None):
    """The activations x [B, T, D] of one layer after the edits at "resid"; rows have no padding."""
    rows, tokens = x.shape[:2]
    positions = torch.arange(tokens).expand(rows, tokens)
    steps = merge(edits, prompt_len or [tokens] * rows, [tokens] * rows, L, x.shape[-1])
    for step in steps:
        if layer in step.layers:
            x = step.apply(x, layer, *step.choose(positions))
    return x


def length(x):
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def add(layers="1:3", tokens="all", seed=1, **options):
    n = len(tt.Place("resid", layers).layer_indices(L))
    return tt.Add(tt.Place("resid", layers, tokens), noise(n, D, seed=seed), **options)


def readout(layers=(0,), tokens="prompt[-1:]", width=D, **options):
    n = len(layers)
    place = tt.Place("resid", layers, tokens)
    return tt.Readout(place, noise(n, width, seed=9), torch.ones(n), torch.zeros(n), **options)


# ---- what each edit computes ---------------------------------------------------------------------


def test_add():
    x, edit = noise(2, 5, D), add()
    assert torch.equal(applied(edit, x), x + edit.delta[0])
    assert torch.equal(applied(edit, x, layer=2), x + edit.delta[1])
    assert torch.equal(applied(edit, x, layer=3), x)


def test_add_keeping_the_norm():
    x, edit = noise(2, 5, D), add(keep_norm=True)
    moved = x + edit.delta[0]
    torch.testing.assert_close(applied(edit, x), length(x) * moved / length(moved))


def test_add_relative_to_the_length():
    x, edit = noise(2, 5, D), add(relative=True)
    torch.testing.assert_close(applied(edit, x), x + length(x) * edit.delta[0])


def test_add_per_row_and_per_token():
    x = noise(2, 5, D)
    rows = tt.Add("resid@1", noise(1, 2, D, seed=2))
    assert torch.equal(applied(rows, x), x + rows.delta[0][:, None])
    tokens = tt.Add("resid@1 prompt[1:3]", noise(1, 2, 2, D, seed=3))
    wanted = x.clone()
    wanted[:, 1:3] += tokens.delta[0]
    assert torch.equal(applied(tokens, x), wanted)


def test_values_per_token_are_looked_up_by_position():
    x, edit = noise(1, 5, D), tt.Add("resid@1 [1, 4]", noise(1, 1, 2, D, seed=3))
    wanted = x.clone()
    wanted[0, [1, 4]] += edit.delta[0, 0]
    assert torch.equal(applied(edit, x), wanted)


def test_replace():
    x, value = noise(2, 5, D), noise(1, D, seed=4)
    edit = tt.Replace("resid@1 prompt[:2]", value)
    got = applied(edit, x)
    assert torch.equal(got[:, :2], value.expand(2, 2, D)) and torch.equal(got[:, 2:], x[:, 2:])
    half = applied(0.5 * edit, x)
    torch.testing.assert_close(half[:, :2], (x[:, :2] + value) / 2)


def test_project_removes_and_clamps():
    x, direction = noise(2, 5, D), noise(1, D, seed=5)
    unit = direction / length(direction)
    removed = applied(tt.Project("resid@1", 7 * direction), x)
    torch.testing.assert_close((removed * unit).sum(-1), torch.zeros(2, 5))
    torch.testing.assert_close(removed, x - (x * unit).sum(-1, keepdim=True) * unit)
    clamped = applied(tt.Project("resid@1", direction, to=3.0), x)
    torch.testing.assert_close((clamped * unit).sum(-1), torch.full((2, 5), 3.0))
    half = applied(0.5 * tt.Project("resid@1", direction), x)
    torch.testing.assert_close(half, (x + removed) / 2)


def test_attend_mixes_values_by_nearness():
    """One pair is an addition in units of the activation's size; a far better key wins alone."""
    x, size = noise(2, 5, D), noise(2, 5, D).square().mean(-1, keepdim=True).sqrt()
    one = tt.Attend("resid@1", noise(1, 1, D, seed=2), noise(1, 1, D, seed=3))
    torch.testing.assert_close(applied(one, x), x + size * one.value[0, 0])
    key = torch.stack([100 * x[0, 0] / size[0, 0], -100 * x[0, 0] / size[0, 0]])[None]
    two = tt.Attend("resid@1", key, noise(1, 2, D, seed=4))
    wanted = x[0, 0] + size[0, 0] * two.value[0, 0]
    torch.testing.assert_close(applied(two, x)[0, 0], wanted)
    swapped = replace(two, value=two.value.flip(1))
    assert float((applied(swapped, x)[0, 0] - wanted).abs().max()) > 0.1
    torch.testing.assert_close(applied(two, 7 * x), 7 * applied(two, x))  # a dose, at any size


def test_low_rank_is_a_linear_map():
    x, edit = noise(2, 5, D), tt.LowRank("resid@1", noise(1, 3, D, seed=2), noise(1, 3, D, seed=3))
    matrix = torch.eye(D) + edit.key[0].T @ edit.value[0]
    torch.testing.assert_close(applied(edit, x), x @ matrix)
    assert int(torch.linalg.matrix_rank(matrix - torch.eye(D))) == 3


@pytest.mark.parametrize("kind", [tt.Attend, tt.LowRank])
def test_learned_pairs_of_several_rows(kind):
    """Rows with pairs of their own, of equal and of other numbers, and of other layers."""
    x = noise(4, 5, D)
    edits = [
        kind("resid@1", noise(1, 3, D, seed=1), noise(1, 3, D, seed=2)),
        kind("resid@0:3 answer", noise(3, 3, D, seed=3), noise(3, 3, D, seed=4)),
        None,
        add() + kind("resid@1 [0, 3]", noise(1, 6, D, seed=5), noise(1, 6, D, seed=6)),
    ]
    for layer in range(L):
        together = applied(edits, x, layer, [3] * 4)
        for i, edit in enumerate(edits):
            torch.testing.assert_close(together[i : i + 1], applied(edit, x[i : i + 1], layer, [3]))
    wrong = applied([edits[1], *edits[:1], *edits[2:]], x, 1, [3] * 4)
    assert float((wrong[:2] - applied(edits, x, 1, [3] * 4)[:2]).abs().max()) > 0.1
    assert len(merge([edits[0]] * 2 + [replace(edits[0], value=-edits[0].value)] * 2,
                     [5] * 4, [5] * 4, L, D)) == 1  # fmt: skip
    both = spread(edits[0] + tt.Add("resid@1", noise(1, 4, D)), 4)
    assert [type(part) for part in both[2].parts()] == [kind, tt.Add]


@pytest.mark.parametrize("kind", [tt.Attend, tt.LowRank])
def test_what_is_no_pair_says_so(kind):
    pairs = noise(1, 3, D)
    for key, value in ((pairs, noise(1, 2, D)), (noise(1, D), noise(1, D)), (pairs[:, :0],) * 2):
        with pytest.raises(
            PlaceError, match=r"of one shape \[layers, pairs, width\], not a tensor"
        ):
            kind("resid@1", key, value)
    with pytest.raises(PlaceError, match="3 values that are NaN or infinite"):
        kind("resid@1", pairs, torch.full_like(pairs, math.nan)[..., :1].expand(1, 3, 1))
    with pytest.raises(PlaceError, match="2 layers"):
        merge(kind("resid@1", noise(2, 3, D), noise(2, 3, D)), [5], [5], L, D)
    with pytest.raises(PlaceError, match=r"width 6 \(shape.*width is 8; .*another model"):
        merge(kind("resid@1", noise(1, 3, 6), noise(1, 3, 6)), [5], [5], L, D)
    narrow = kind("resid@1", noise(1, D, 1), noise(1, D, 1))  # as many numbers as fit by chance
    with pytest.raises(PlaceError, match="width 1"):
        merge(narrow, [5], [5], L, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "edit",
    [
        tt.Attend("resid@1", noise(1, 3, D), noise(1, 3, D)),
        tt.LowRank("resid@1", noise(1, 3, D), noise(1, 3, D)),
        add(),
        add(keep_norm=True),
        add(relative=True),
        tt.Replace("resid@1", noise(1, D)),
        0.5 * tt.Replace("resid@1", noise(1, D)),
        tt.Project("resid@1", noise(1, D)),
    ],
)
def test_dtype_stays_and_the_input_is_not_written(edit, dtype):
    x = noise(2, 5, D).to(dtype)
    before = x.clone()
    assert applied(edit, x).dtype == dtype
    assert torch.equal(x, before)


def test_keep_norm_is_computed_in_float32():
    x = 300 * noise(1, 4, D).half()  # |x|^2 overflows float16
    assert bool(torch.isfinite(applied(add(keep_norm=True), x)).all())


def test_double_stays_double():
    """A float64 model is edited and read in float64, to the last digits."""
    x, direction = noise(2, 5, D).double(), noise(1, D, seed=5).double()
    removed = applied(tt.Project("resid@1", direction), x)
    unit = direction / length(direction)
    assert float((removed * unit).sum(-1).abs().max()) < 1e-14
    made = tt.Readout("resid@1", direction, *torch.ones(2, 1).double())
    margin = made.margin(x, {n: v[0] for n, v in made.values().items()})
    torch.testing.assert_close(margin, x @ direction[0] + 1, rtol=1e-14, atol=1e-14)


def test_numbers_are_not_rounded_to_a_vectors_dtype():
    x, direction = noise(2, 5, D), noise(1, D).bfloat16()
    clamped = applied(tt.Project("resid@1", direction, to=3.3), x)
    unit = direction.float() / length(direction.float())
    torch.testing.assert_close((clamped * unit).sum(-1), torch.full((2, 5), 3.3))


def test_options_by_position():
    edit = tt.Add("resid@1", noise(1, D), True, True)
    assert edit.keep_norm and edit.relative
    assert tt.Replace("resid@1", noise(1, D), 0.25).strength == 0.25
    project = tt.Project("resid@1", noise(1, D), 2.0, 0.5)
    assert (project.to, project.strength) == (2.0, 0.5)
    with pytest.raises(TypeError):
        tt.Add("resid@1", noise(1, D), True, True, Meta("humor"))


def test_zero_length_stays_finite():
    x = torch.zeros(1, 2, D)
    for options in ({"keep_norm": True}, {"relative": True}, {"keep_norm": True, "relative": True}):
        assert torch.equal(applied(add(**options), x), x)


# ---- arithmetic ----------------------------------------------------------------------------------


def test_a_sum_applies_in_order():
    x, a, b = noise(2, 5, D), add(), tt.Replace("resid@1", noise(1, D))
    assert torch.equal(applied(a + b, x), applied(b, x))
    assert torch.equal(applied(b + a, x), applied(a, applied(b, x)))
    assert torch.equal(applied(sum([b, a, a]), x), applied(a, applied(a, applied(b, x))))


def test_scaling_and_differences():
    x, a, b = noise(2, 5, D), add(seed=1), add(seed=2)
    assert torch.equal(applied(2 * a, x), x + 2 * a.delta[0])
    assert torch.equal(applied(a * 0.5, x), applied(0.5 * a, x))
    assert torch.equal(applied(-a, x), x - a.delta[0])
    assert torch.equal(applied(a - b, x), x + a.delta[0] - b.delta[0])
    torch.testing.assert_close(applied(0.5 * (a + b), x), x + (a.delta[0] + b.delta[0]) / 2)


@pytest.mark.parametrize(
    "edit",
    [
        add(),
        add(keep_norm=True),
        tt.Replace("resid@1", noise(1, D)),
        tt.Project("resid@1", noise(1, D)),
        add() + add(seed=3),
        tt.When(readout(), 0.0, add()),
        tt.Attend("resid@1", noise(1, 3, D), noise(1, 3, D)),
        tt.LowRank("resid@1", noise(1, 3, D), noise(1, 3, D)),
        tt.When(readout(), 0.0, tt.Attend("resid@1", noise(1, 3, D), noise(1, 3, D))),
    ],
)
def test_strength_zero_is_no_edit(edit):
    assert merge(0 * edit, [5], [5], L, D) == []
    assert merge([None, 0 * edit], [5, 5], [5, 5], L, D) == []


@pytest.mark.parametrize(
    "half", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_factors_of_every_kind(half):
    a = add()
    for scaled in (a * half, half * a, a / 2, a / (4 * half)):
        assert isinstance(scaled, tt.Add) and torch.equal(scaled.delta, 0.5 * a.delta)
    made = tt.Project("resid@1", noise(1, D), half, strength=half)
    assert type(made.to) is type(made.strength) is float  # so that they are saved


@pytest.mark.parametrize(
    "factor",
    [
        *(math.nan, math.inf, "2", None, torch.ones(1), [2], 10**400, b"2", np.ones(2)),
        *(np.array([True]), torch.tensor(True), torch.tensor(0.5, requires_grad=True)),
    ],
)
def test_a_factor_is_a_finite_number(factor):
    with pytest.raises(PlaceError, match="multiplied by a finite number"):
        add() * factor
    with pytest.raises(PlaceError, match="divided by a finite number"):
        add() / factor
    with pytest.raises(ZeroDivisionError):
        add() / 0


@pytest.mark.parametrize("other", [1, "a", None, torch.ones(L, D)])
def test_only_edits_are_added(other):
    for sum_ in (lambda: add() + other, lambda: add() - other, lambda: other + add()):
        with pytest.raises(TypeError):
            sum_()


# ---- merging a list into rows --------------------------------------------------------------------


def test_a_list_is_its_rows_alone():
    x = noise(5, 6, D)
    edits = [
        add(tokens="answer"),
        None,
        tt.Replace("resid@0:2 prompt[-1:]", noise(2, D)),
        add("0:4", seed=6) + 0.5 * tt.Project("resid@1", noise(1, D)),
        tt.Add("resid@1 [0, 2, 5]", noise(1, 1, 3, D), keep_norm=True),
    ]
    prompt_len = [4, 6, 3, 5, 2]
    for layer in range(L):
        together = applied(edits, x, layer, prompt_len)
        for i, edit in enumerate(edits):
            alone = applied(edit, x[i : i + 1], layer, [prompt_len[i]])
            torch.testing.assert_close(together[i : i + 1], alone)
        assert torch.equal(together[1], x[1])


def test_steps_do_not_grow_with_the_rows():
    edits = [add(seed=i) for i in range(32)]
    assert len(merge(edits, [5] * 32, [5] * 32, L, D)) == 1
    assert len(merge([edits[0]] * 32, [5] * 32, [5] * 32, L, D)) == 1


def test_rows_with_values_of_several_lengths():
    x = noise(2, 6, D)
    long, short = (tt.Add(f"resid@1 prompt[:{n}]", noise(1, 1, n, D, seed=n)) for n in (4, 2))
    got = applied([short, long], x)
    assert torch.equal(got[:1], applied(short, x[:1])) and torch.equal(
        got[1:], applied(long, x[1:])
    )


def test_gradients_reach_delta():
    delta = torch.zeros(1, D, requires_grad=True)
    applied(tt.Add("resid@1", delta), noise(2, 5, D)).sum().backward()
    assert torch.equal(delta.grad, torch.full((1, D), 10.0))


def test_spread_makes_one_edit_per_row():
    x = noise(3, 5, D)
    wide = tt.Add("resid@1 [[0], [1, 4], []]", noise(1, 3, D), keep_norm=True) + add()
    rows = spread(wide, 3)
    assert len(rows) == 3
    torch.testing.assert_close(applied(rows, x), applied(wide, x))
    swapped = applied([rows[2], rows[0], rows[1]], x[[2, 0, 1]])
    torch.testing.assert_close(swapped, applied(wide, x)[[2, 0, 1]])
    gated = tt.When(readout(tokens=[[0], [1], [2]]), 0.5, wide)
    assert [str(e.readout.place) for e in spread(gated, 3)] == [f"resid@0 [{i}]" for i in range(3)]


def test_spread_leaves_what_serves_every_row():
    for edits in (None, add(), [None, add(), None], tt.Add("resid@1", noise(1, 1, D))):
        assert spread(edits, 3) is edits
    with pytest.raises(PlaceError, match=r"Add.*for \[2\] rows, but there are 3"):
        spread(tt.Add("resid@1", noise(1, 2, D)), 3)
    with pytest.raises(PlaceError, match="2 edits for 3 rows"):
        spread([None, None], 3)


def test_fingerprint_is_of_what_edits_do():
    edits = [
        None,
        add(),
        2 * add(),
        add(seed=8),
        add(tokens="answer"),
        add() + add(),
        [add(), None],
    ]
    assert len({fingerprint(e) for e in edits}) == len(edits)
    assert fingerprint(None) is None
    assert fingerprint(add()) == fingerprint(add())
    assert fingerprint([add()]) == fingerprint(add())


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "told"),
    [
        (noise(D), r"shape \[8\]; it must be \[layers, width\]"),
        (noise(1, 1, 1, 1, D), r"shape \[1, 1, 1, 1, 8\]"),
        (torch.ones(1, D, dtype=torch.long), r"torch.int64; convert it with .float\(\)"),
        (torch.ones(1, D, dtype=torch.complex64), r"torch.complex64"),
        ([[1.0] * D], r"tensor .*, not list \[\[1.0"),
        (None, "not NoneType"),
        (torch.full((1, D), math.nan), "8 values that are NaN or infinite"),
        (torch.tensor([[math.inf] + [0.0] * 7]), "1 values that are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("kind", [tt.Add, tt.Replace, tt.Project])
def test_what_is_no_vector_says_so(kind, delta, told):
    with pytest.raises(PlaceError, match=told):
        kind("resid@1", delta)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (tt.Add("resid@1", noise(2, D)), r"2 layers \(shape \[2, 8\]\).*has 1 in this model"),
        (tt.Add("resid@0:4", noise(3, D)), r"3 layers .*has 4 in this model"),
        (
            tt.Add("resid@1", noise(1, 6)),
            r"width 6 \(shape \[1, 6\]\).*width is 8; .*another model",
        ),
        (tt.Add("resid@1", noise(1, 1)), r"width 1, but this model's width is 8"),
        (tt.Replace("resid@1", noise(1, 1)), r"width 1, but this model's width is 8"),
        (tt.Add("resid@4", noise(1, D)), r"layer 4, but this model has layers 0..3"),
        (tt.Add("resid@1", noise(1, 3, D)), r"values for 3 rows, but it serves a batch of 2 rows"),
        (tt.Add("resid@1 [[1], [2], [3]]", noise(1, D)), r"3 rows, but the batch has 2|3 rows"),
    ],
)
def test_what_does_not_fit_the_run_says_so(edit, told):
    with pytest.raises(PlaceError, match=told):
        merge(edit, [5, 5], [5, 5], L, D)


def test_a_row_of_a_list_holds_one_row():
    with pytest.raises(PlaceError, match="values for 3 rows, but it serves one row of a list"):
        merge([tt.Add("resid@1", noise(1, 3, D)), None], [5, 5], [5, 5], L, D)
    with pytest.raises(PlaceError, match="2 rows"):
        merge([tt.Add("resid@1 [[1], [2]]", noise(1, D)), None], [5, 5], [5, 5], L, D)


@pytest.mark.parametrize("site", ["q", "k", "v", "heads"])
def test_sites_that_are_only_read(site):
    with pytest.raises(PlaceError, match=rf"'{site}' can be read, not written; write to resid"):
        tt.Add(f"{site}@1", noise(1, D))


def test_numbers_are_finite():
    for value in (math.nan, math.inf, "1", None):
        with pytest.raises(PlaceError, match="to is a finite number"):
            tt.Project("resid@1", noise(1, D), to=value)
        with pytest.raises(PlaceError, match="strength is a finite number"):
            tt.Replace("resid@1", noise(1, D), strength=value)
        with pytest.raises(PlaceError, match="threshold is a finite number"):
            tt.When(readout(), value, add())
    with pytest.raises(PlaceError, match="length > 0"):
        tt.Project("resid@1", torch.zeros(1, D))
    with pytest.raises(PlaceError, match="not one per token"):
        tt.Project("resid@1", noise(1, 1, 2, D))


# ---- Readout and When ----------------------------------------------------------------------------


def test_a_readout_reads_the_text_form_of_its_place():
    made = tt.Readout("resid@1:3 all", noise(2, D), torch.ones(2), torch.zeros(2))
    assert made.place == tt.Place("resid", "1:3")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": noise(D)}, r"weight is a tensor \[L, D\], not a tensor \[8\]"),
        ({"weight": [1.0]}, r"weight is a tensor .*list"),
        ({"gain": torch.ones(3)}, r"gain has shape \[2\].*not a tensor \[3\]"),
        ({"bias": 0.0}, r"bias has shape \[2\].*not float 0.0"),
        ({"mean": noise(2, 3)}, r"mean has shape \[2, 8\].*not a tensor \[2, 3\]"),
        ({"gain": torch.full((2,), math.nan)}, r"gain holds values that are NaN"),
    ],
)
def test_a_readout_checks_its_shapes(change, told):
    parts = {"weight": noise(2, D), "gain": torch.ones(2), "bias": torch.zeros(2), **change}
    with pytest.raises(PlaceError, match=told):
        tt.Readout(tt.Place("resid", "1:3"), **parts)


def test_a_readout_is_a_logistic_of_its_layer():
    made, x = readout((0, 2), mean=noise(2, D, seed=11)), noise(3, 5, D)
    values = {n: v[:, None] for n, v in made.values().items()}
    for i in range(2):
        unit = (x - made.mean[i]) / length(x - made.mean[i])
        wanted = unit @ made.weight[i]
        own = {n: v[i] for n, v in values.items()}
        torch.testing.assert_close(made.margin(x, own), wanted)
    with pytest.raises(PlaceError, match="width 8, but what it reads has width 5"):
        made.margin(noise(1, 2, 5), values)


def test_when_takes_a_probe_and_an_edit():
    with pytest.raises(PlaceError, match="When takes a probe or a Readout, not str"):
        tt.When("probe", 0.5, add())
    with pytest.raises(PlaceError, match="When takes an Edit to apply, not NoneType"):
        tt.When(readout(), 0.5, None)
    for inner in (tt.When(readout(), 0.5, add()), add() + tt.When(readout(), 0.5, add())):
        with pytest.raises(PlaceError, match="When inside When"):
            tt.When(readout(), 0.5, inner)


def test_rows_of_when_need_the_same_probe_layers():
    edits = [tt.When(readout((0,)), 0.5, add()), tt.When(readout((1,)), 0.5, add())]
    with pytest.raises(PlaceError, match="probes that read the same layers"):
        merge(edits, [5, 5], [5, 5], L, D)


# ---- names, ties and artifacts -------------------------------------------------------------------


def everything():
    """One edit of each kind, made for a model."""
    meta = Meta("humor", MODEL, {"method": "by hand"}, {"accuracy": [0.5]})
    a = add(meta=meta)
    return [
        a,
        tt.Replace("resid@1", noise(1, D), strength=0.25, meta=meta),
        tt.Project("resid@1", noise(1, D), to=2.0, meta=meta),
        a + add(seed=4),
        tt.When(readout(), 0.5, a),
        tt.When(readout(mean=noise(1, D)), 0.5, a + add(seed=4)),
        a + tt.When(readout(), 0.25, add(seed=5)),
        tt.Attend("resid@1", noise(1, 3, D), noise(1, 3, D, seed=1), meta=meta),
        tt.LowRank("resid@1", noise(1, 3, D), noise(1, 3, D, seed=1), meta=meta),
    ]


@pytest.mark.parametrize("edit", everything(), ids=lambda e: type(e).__name__)
def test_named_and_untied(edit):
    named = edit.named("calm")
    assert type(named) is type(edit) and named.meta.name == "calm"
    assert named.meta.model == edit.meta.model == MODEL
    free = named.untied()
    assert type(free) is type(edit) and free.meta.name == "calm"
    assert all(part.meta.model is None for part in [free, *free.parts()])
    assert edit.meta.model == MODEL  # the edit itself is as before
    assert fingerprint(free) == fingerprint(edit)


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize("edit", everything(), ids=lambda e: type(e).__name__)
def test_save_and_load(edit, as_path, tmp_path):
    edit = edit.named("calm")
    edit.save(as_path(tmp_path / "edit"))
    back = tt.load(as_path(tmp_path / "edit"))
    stamped = {**edit.meta.made_by, "trimtab": tt.__version__}
    assert type(back) is type(edit) and back.meta == replace(edit.meta, made_by=stamped)
    assert fingerprint(back) == fingerprint(edit)
    again = 0.5 * back.named("half")
    again.save(tmp_path / "again")
    assert fingerprint(tt.load(tmp_path / "again")) == fingerprint(0.5 * edit)


def test_a_sum_keeps_the_model_of_its_parts(tmp_path):
    a, b = everything()[0], add(seed=4)
    assert (a + b).meta.model == MODEL and (a + b).meta.name == "humor"
    (a + b).named("both").save(tmp_path / "both")
    back = tt.load(tmp_path / "both") + b.named("calm")
    assert back.meta.model == MODEL and back.meta.name == "both + calm"
    assert isinstance(back, Sum) and len(back.parts()) == 3


def test_edits_of_two_models_do_not_add_up(tmp_path):
    a = everything()[0]
    other = add(meta=Meta("calm", {**MODEL, "id": "other", "fingerprint": "11ee"}))
    with pytest.raises(ArtifactError, match=r"different models: tiny \(00ff\); other .*untied"):
        a + other
    assert (a + other.untied()).meta.model == MODEL
    renamed = add(meta=Meta("calm", {**MODEL, "id": "a copy in another folder"}))
    assert len((a + renamed).parts()) == 2  # the same weights under another name


def test_when_is_tied_by_its_probe():
    class Probe:
        readout = readout()
        meta = Meta("alarm", MODEL)

    assert tt.When(Probe(), 0.5, add()).meta.model == MODEL
    with pytest.raises(ArtifactError, match="different models"):
        tt.When(Probe(), 0.5, add(meta=Meta("calm", {**MODEL, "fingerprint": "11ee"})))
