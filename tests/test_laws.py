"""The laws that every run obeys, on tiny random models of every architecture, and on a real one.

Each law stands beside a control: a naive way to do the same that is expected to break it.
"""

from __future__ import annotations

import copy
import inspect
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import CheckpointError
from transformers import DynamicCache

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab.merge import merge
from trimtab.place import FOREVER, WRITABLE, Place
from trimtab.taps import Call, Clock

NAMES = sorted(model_zoo.ARCHITECTURES)
EVERY = sorted(model_zoo.ARCHITECTURES | model_zoo.HYBRIDS)
FEW = ["bloom", "gemma2", "gpt2", "llama"]
L, D = model_zoo.LAYERS, model_zoo.HIDDEN
PROMPTS = ([5, 17, 300, 41, 9, 77], [211, 34, 8, 45], [60, 61, 400, 12, 99, 7, 250, 31])
NEW = 4
SAME, DIFFERS = 1e-4, 1e-3  # relative errors: below the one is equal, above the other is not

# One selector for each kind of answer to "which tokens".
SELECTORS = (
    *("all", "prompt", "answer"),
    *("prompt[-1:]", "prompt[1:3]", "prompt[1:-1]", "prompt[::2]"),
    *("answer[:2]", "answer[1:]", "answer[0]", "all[::2]", "all[2:5]", "[0, 2, 5, 9]"),
)


# ---- what the laws are written with --------------------------------------------------------------


def noise(*shape, seed=0, size=0.5):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pad(rows, prompt_len=None):
    """Left-padded rows of ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tt.Batch(ids, mask, None if prompt_len is None else torch.tensor(prompt_len))


def answered(rows=PROMPTS, n=3):
    """Rows whose last ``n`` tokens are the answer."""
    return pad(rows, [len(row) - n for row in rows])


def extended(batch, answers):
    """The batch with these answer tokens [B, n] behind it."""
    ids = torch.cat([batch.ids, answers], 1)
    return tt.Batch(ids, torch.cat([batch.mask, torch.ones_like(answers)], 1), batch.prompt_len)


def alone(batch, i):
    """Row ``i`` without its padding."""
    real = batch.mask[i].bool()
    return tt.Batch(batch.ids[i, real][None], prompt_len=batch.prompt_len[i : i + 1])


def error(found, wanted):
    """The relative error |found - wanted| / |wanted|."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def per_row(found, wanted):
    return [error(a, b) for a, b in zip(found, wanted, strict=True)]


def plain_forward(model, batch):
    """The Hugging Face model by itself, with what it accepts."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options = {"use_cache": False}
    if "position_ids" in inspect.signature(inner.forward).parameters:
        options["position_ids"] = (batch.mask.cumsum(1) - 1).clamp_min(0)
    return model(input_ids=batch.ids, attention_mask=batch.mask, **options).logits


@cache
def untouched(name):
    """A model, and its logits from before Trimtab knew of it."""
    model = model_zoo.tiny(name)
    with torch.no_grad():
        return model, plain_forward(model, answered())


@cache
def lm_of(name):
    return tt.LM(untouched(name)[0])


def fresh(name, **options):
    return tt.LM(model_zoo.tiny(name), **options)


@contextmanager
def hooked(module, hook, pre=False):
    if pre:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def generated(lm, batch, edits=None, n=NEW):
    """Greedy answers [B, n], and the logits [B, n, V] of the cached passes that chose them."""
    logits = []
    with hooked(lm.model, lambda m, args, out: logits.append(out.logits[:, -1])):
        rows = lm.generate_ids(batch, edits, max_new_tokens=n)
    assert all(len(row) == n for row in rows)
    return torch.tensor(rows), torch.stack(logits, 1)


def in_one_pass(lm, batch, answers, edits=None):
    """The logits [B, n, V] that predict the answers, from one pass over prompt and answer."""
    first = batch.ids.shape[1] - 1
    return lm(extended(batch, answers), edits).logits[:, first : first + answers.shape[1]]


def token_by_token(lm, batch, answers, edits=None):
    """The same, from a pass of its own for each answer token, without a cache."""
    steps = range(answers.shape[1])
    each = [lm(extended(batch, answers[:, :k]), edits).logits[:, -1] for k in steps]
    return torch.stack(each, 1)


def edits_of_all_kinds(site="resid", layers=(1, 2), seed=0):
    """One edit of each kind and shape, for a single row, by name."""
    n = len(layers)

    def at(tokens):
        return Place(site, layers, tokens)

    def v(*shape, k=0):
        return noise(*shape, D, seed=seed + k)

    return {
        "add": tt.Add(at("all"), v(n)),
        "add per row": tt.Add(at("answer"), v(n, 1, k=1)),
        "add per token": tt.Add(at("prompt"), v(n, 1, 20, k=2)),
        "add at positions": tt.Add(at([1, 4]), v(n, 1, 2, k=3)),
        "keep_norm": tt.Add(at("prompt[-1:]"), 3 * v(n, k=4), keep_norm=True),
        "relative": tt.Add(at("all[::2]"), v(n, k=5), relative=True),
        "both": tt.Add(at("all"), v(n, k=6), relative=True, keep_norm=True),
        "replace": tt.Replace(at("prompt[1:3]"), v(n, k=7)),
        "replace per token": tt.Replace(at("prompt[:2]"), v(n, 1, 2, k=8)),
        "replace half": tt.Replace(at("all"), v(n, k=9), strength=0.5),
        "project": tt.Project(at("all"), v(n, k=10)),
        "clamp": tt.Project(at("answer"), v(n, k=11), to=2.0, strength=0.5),
        "attend": tt.Attend(at("all"), v(n, 5, k=12), v(n, 5, k=13)),
        "low rank": tt.LowRank(at("all[1:]"), 0.3 * v(n, 3, k=14), v(n, 3, k=15)),
    }


# ---- 1. cached = uncached ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_cached_is_uncached(name):
    """A row for each selector: the naive edit of "the last token of this pass" is not equal."""
    lm, n = lm_of(name), len(SELECTORS)
    batch = pad([PROMPTS[i % 3] for i in range(n)])
    edits = [tt.Add(f"resid@1:3 {s}", noise(2, D, seed=i)) for i, s in enumerate(SELECTORS)]
    answers, cached = generated(lm, batch, edits)
    one = in_one_pass(lm, batch, answers, edits)
    assert max(per_row(cached, one)) < SAME
    assert max(per_row(cached, token_by_token(lm, batch, answers, edits))) < SAME
    assert min(per_row(in_one_pass(lm, batch, answers), one)) > DIFFERS

    def naive(module, args, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        x[:, -1] += noise(D)

    with hooked(lm.anatomy.blocks[1], naive):
        answers, cached = generated(lm, batch)
        assert min(per_row(cached, in_one_pass(lm, batch, answers))) > DIFFERS


@pytest.mark.parametrize("tokens", [*SELECTORS, [[1, 7], [0, 3, 8, 9], [5]]], ids=str)
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_cached_is_uncached_with_one_edit(name, tokens):
    lm, batch = lm_of(name), pad(PROMPTS)
    edit = tt.Add(Place("resid", "0:3", tokens), noise(3, 1, 12, D, seed=3))  # one per token
    answers, cached = generated(lm, batch, edit)
    assert error(cached, in_one_pass(lm, batch, answers, edit)) < SAME
    assert error(cached, token_by_token(lm, batch, answers, edit)) < SAME
    shifted = tt.Add(edit.place, edit.delta.roll(1, 2))
    assert error(cached, in_one_pass(lm, batch, answers, shifted)) > DIFFERS


@pytest.mark.parametrize("kind", edits_of_all_kinds())
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_cached_is_uncached_for_every_kind(name, kind):
    lm, batch, edit = lm_of(name), pad(PROMPTS), edits_of_all_kinds()[kind]
    answers, cached = generated(lm, batch, edit)
    assert error(cached, in_one_pass(lm, batch, answers, edit)) < SAME
    assert error(cached, in_one_pass(lm, batch, answers)) > DIFFERS


@torch.no_grad()
def test_an_edit_counted_by_calls_is_not():
    """The control of looking up by position: the first call is the prompt only with a cache."""
    lm, batch, calls = lm_of("llama"), pad(PROMPTS), []

    def first_call_only(module, args, out):
        calls.append(1)
        return out + noise(D) if len(calls) == 1 else None

    with hooked(lm.anatomy.blocks[1], first_call_only):
        answers, cached = generated(lm, batch)
        calls.clear()
        assert error(cached, in_one_pass(lm, batch, answers)) > DIFFERS
    edit = tt.Add("resid@1 prompt", noise(1, D))
    assert error(cached, in_one_pass(lm, batch, answers, edit)) < SAME


@pytest.mark.parametrize("tokens", ["answer[-1:]", "all[:-2]"])
def test_counting_from_a_growing_end_is_refused(tokens):
    with pytest.raises(tt.PlaceError, match="still growing"):
        lm_of("llama").generate_ids(pad(PROMPTS), tt.Add(f"resid@1 {tokens}", noise(1, D)))


@torch.no_grad()
def test_rows_that_end_leave_the_others_alone():
    """Rows leave the batch when they end: edits and positions of the others stay theirs."""
    lm, batch = fresh("llama"), pad(PROMPTS)
    edits = [None, *list(edits_of_all_kinds().values())[1:3]]
    rows, _ = generated(lm, batch, edits, 12)
    lm.model.generation_config.eos_token_id = int(rows[0, 1])
    ended = lm.generate_ids(batch, edits, max_new_tokens=12)
    (end,) = lm.end_ids
    assert ended == [row[: [*row, end].index(end)] for row in rows.tolist()]
    assert len(ended[0]) < 2 and max(map(len, ended)) == 12


# ---- 2. a batch = its rows alone -----------------------------------------------------------------


def real(logits, batch, i):
    return logits[i, batch.mask[i].bool()]


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_batch_is_its_rows_alone(name):
    lm, batch = lm_of(name), answered()
    pads = batch.ids.shape[1] - batch.lengths
    somewhere = tt.Add("resid@1 [1, 3]", noise(1, D)) + tt.Add("resid@2 answer", noise(1, D))
    for edit in (None, somewhere):
        together = lm(batch, edit).logits
        singles = [lm(alone(batch, i), edit).logits[0] for i in range(len(batch))]
        for i, single in enumerate(singles):
            assert error(real(together, batch, i), single) < SAME
    for i in (0, 1):  # control: positions that count the padding
        wrong = tt.Add(f"resid@1 {[1 + int(pads[i]), 3 + int(pads[i])]}", noise(1, D))
        wrong += tt.Add("resid@2 answer", noise(1, D))
        assert error(lm(alone(batch, i), wrong).logits[0], singles[i]) > DIFFERS


# ---- 3. edits per row ----------------------------------------------------------------------------


def many_edits():
    """Every kind, None, sums of different lengths, other layers, and values of other lengths."""
    kinds, late = edits_of_all_kinds(), edits_of_all_kinds(layers=(2,), seed=50)
    sums = [
        kinds["add"] + late["clamp"],
        late["replace half"] + kinds["add per token"] + 0.5 * kinds["keep_norm"],
        tt.Add("embed@0 answer[1:]", noise(1, D)) - late["add"],
        tt.Add("resid@3 prompt", noise(1, 1, 9, D, seed=9)),
    ]
    return [*kinds.values(), None, *sums]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_edits_per_row_are_single_runs(name):
    lm, edits = lm_of(name), many_edits()
    rows = [PROMPTS[i % 3] for i in range(len(edits))]
    batch = answered(rows, 2)
    together, rolled = lm(batch, edits).logits, lm(batch, [*edits[1:], edits[0]]).logits
    for i, edit in enumerate(edits):
        single = lm(alone(batch, i), edit).logits[0]
        assert error(real(together, batch, i), single) < SAME
        assert error(real(rolled, batch, i), single) > DIFFERS


@pytest.mark.parametrize("edit", [e for e in many_edits() if e is not None], ids=repr)
def test_one_edit_beside_none(edit):
    """A list with a None in it: one row is edited, the other is the plain model's."""
    lm, batch = lm_of("llama"), answered(PROMPTS[:1] * 2, 2)
    with torch.no_grad():
        plain, whole = lm(batch).logits, lm(batch, edit).logits
        for found, i in ((lm(batch, [edit, None]).logits, 0), (lm(batch, [None, edit]).logits, 1)):
            assert torch.equal(found[1 - i], plain[1 - i])
            assert error(found[i], whole[i]) < SAME < DIFFERS < error(found[i], plain[i])


def test_a_list_of_another_length_is_refused():
    with pytest.raises(tt.PlaceError, match="2 edits for 3 rows"):
        lm_of("llama")(answered(), [None, None])


# ---- 4. nothing = nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_no_edit_is_the_plain_model_to_the_bit(name):
    """Also between pads, and for a recording; the smallest edit is not nothing."""
    batch, (_, plain), lm = answered(), untouched(name), lm_of(name)
    kinds = edits_of_all_kinds()
    for edits in (
        None,
        [None] * 3,
        [],
        *(0 * kinds[k] for k in ("add", "keep_norm", "relative", "replace", "project", "clamp")),
        *(0 * kinds[k] for k in ("attend", "low rank")),
        0.0 * (kinds["add"] + kinds["project"]),
        [None, 0 * kinds["both"], None],
        tt.Add("resid@all", torch.zeros(L, D), keep_norm=True),
    ):
        assert torch.equal(lm(batch, edits).logits, plain)
    assert torch.equal(lm(batch, record=["resid@all", "attn@-1"]).logits, plain)
    assert torch.equal(plain_forward(lm.model, batch), plain)
    assert not torch.equal(lm(batch, 1e-3 * kinds["add"]).logits, plain)
    wide = tt.Add("resid@1", torch.zeros(1, D).requires_grad_())
    assert error(lm(batch, wide).logits, plain) < 1e-6


# ---- 5. a + b = both by hand ---------------------------------------------------------------------


def length(x):
    return x.pow(2).sum(-1, keepdim=True).sqrt()


def hand_written():
    """Pairs (edit at a place, the same as a function of x [B, T, D]), on the prompt's tokens."""
    a, b, c, u = (noise(1, D, seed=i) for i in range(4))
    rows, each = noise(1, 3, D, seed=5), noise(1, 1, 9, D, seed=6)
    keys, values = 0.3 * noise(1, 4, D, seed=7), noise(1, 4, D, seed=8)
    unit = u / length(u)

    def attended(x):
        size = length(x) / D**0.5
        scores = torch.einsum("btd,nd->btn", x / size, keys[0]).exp()
        mixed = torch.einsum("btn,nd->btd", scores / scores.sum(-1, keepdim=True), values[0])
        return x + size * mixed

    def kept(x, new):
        return new * length(x) / length(new)

    def along(x):
        return (x * unit).sum(-1, keepdim=True)

    def by_position(x):
        starts = [x.shape[1] - len(row) for row in PROMPTS]  # padding is on the left
        width, own = x.shape[1], each[0, 0]
        return x + torch.stack([own.roll(start, 0)[:width] for start in starts])

    return [
        (lambda p: tt.Add(p, a), lambda x: x + a),
        (lambda p: tt.Replace(p, b, strength=0.25), lambda x: x + 0.25 * (b - x)),
        (lambda p: tt.Add(p, c, keep_norm=True), lambda x: kept(x, x + c)),
        (lambda p: tt.Project(p, u, to=1.5), lambda x: x + (1.5 - along(x)) * unit),
        (lambda p: tt.Add(p, a, relative=True), lambda x: x + length(x) * a),
        (lambda p: tt.Project(p, u, strength=0.5), lambda x: x - 0.5 * along(x) * unit),
        (lambda p: tt.Add(p, rows), lambda x: x + rows[0][:, None]),
        (
            lambda p: tt.Add(p, c, relative=True, keep_norm=True),
            lambda x: kept(x, x + length(x) * c),
        ),
        (lambda p: tt.Replace(p, b), lambda x: b.expand_as(x)),
        (lambda p: tt.Add(p, each), by_position),
        (lambda p: tt.Attend(p, keys, values), attended),
        (lambda p: tt.LowRank(p, keys, values), lambda x: x + (x @ keys[0].T) @ values[0]),
    ]


def by_hand(lm, batch, site, layer, functions):
    """Logits with these functions applied, one after the other, by a hook of our own."""
    module, side = lm.anatomy.taps[site, layer]
    position = batch.mask.cumsum(1) - batch.mask
    chosen = (batch.mask.bool() & (position < batch.prompt_len[:, None]))[..., None]

    def change(x):
        flat, x = x.shape, x.reshape(*batch.ids.shape, -1)
        for function in functions:
            x = torch.where(chosen, function(x), x)
        return x.reshape(flat)

    def after(module, args, out):
        return change(out) if isinstance(out, torch.Tensor) else (change(out[0]), *out[1:])

    def before(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    with hooked(module, before if side == "in" else after, pre=side == "in"):
        return plain_forward(lm.model, batch)


def check_sums(lm):
    batch, pairs = answered(), hand_written()
    for site in [s for s in WRITABLE if s in lm.sites()]:
        layer = lm.anatomy.layers(site)[len(lm.anatomy.layers(site)) // 2]
        for i in range(0, len(pairs), 2):
            (make_a, a), (make_b, b) = pairs[i], pairs[i + 1]
            place = Place(site, layer, "prompt")
            found = lm(batch, make_a(place) + make_b(place)).logits
            assert error(found, by_hand(lm, batch, site, layer, [a, b])) < SAME, (site, i)
        elsewhere = ("resid", 0) if site == "embed" else (site, lm.anatomy.layers(site)[0])
        assert error(found, by_hand(lm, batch, *elsewhere, [a, b])) > DIFFERS, site


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_sum_is_both_by_hand(name):
    """Every kind at every site that can be written; the neighbouring layer is not equal."""
    check_sums(lm_of(name))


@torch.no_grad()
def test_the_order_of_a_sum_matters():
    lm, batch = lm_of("llama"), answered()
    a, b = tt.Add("resid@1", noise(1, D)), tt.Project("resid@1", noise(1, D, seed=1))
    assert error(lm(batch, a + b).logits, lm(batch, b + a).logits) > DIFFERS
    assert error(lm(batch, sum([a, b])).logits, lm(batch, a + b).logits) < SAME
    assert error(lm(batch, 0.5 * a + 0.5 * a).logits, lm(batch, a).logits) < SAME
    assert error(lm(batch, a - a).logits, lm(batch).logits) < SAME


# ---- 6. the gradient of a zero edit is autograd's ------------------------------------------------


def loss_of(logits, batch):
    """A loss that every real position of every row has a part in."""
    weights = noise(*batch.ids.shape, seed=8, size=1.0) * batch.mask
    return (logits.float().log_softmax(-1)[..., 7] * weights).sum()


def block_gradients(lm, batch):
    """Autograd's gradient at every block's output [L, B, T, D], by hooks of our own."""
    outputs = []

    def keep(module, args, out):
        outputs.append(out if isinstance(out, torch.Tensor) else out[0])

    handles = [block.register_forward_hook(keep) for block in lm.anatomy.blocks]
    try:
        loss = loss_of(plain_forward(lm.model, batch), batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(torch.autograd.grad(loss, outputs))


def check_gradients(lm, batch, control=True):
    n, wanted = lm.n_layers, block_gradients(lm, batch)
    wanted = wanted * batch.mask[None, ..., None]
    longest = int(batch.prompt_len.max())
    shapes = {
        "all": (n, lm.width),
        "answer": (n, len(batch), lm.width),
        "prompt": (n, len(batch), longest, lm.width),
    }
    for tokens, shape in shapes.items():
        delta = torch.zeros(shape, requires_grad=True)
        loss = loss_of(lm(batch, tt.Add(f"resid@all {tokens}", delta)).logits, batch)
        (found,) = torch.autograd.grad(loss, [delta])
        position = batch.mask.cumsum(1) - batch.mask
        if tokens == "all":
            expected = wanted.sum((1, 2))
        elif tokens == "answer":
            expected = (wanted * (position >= batch.prompt_len[:, None] - 1)[..., None]).sum(2)
        else:
            expected = torch.zeros(shape)
            for i, length in enumerate(batch.prompt_len.tolist()):
                first = int((batch.mask[i] == 0).sum())
                expected[:, i, :length] = wanted[:, i, first : first + length]
        assert max(per_row(found, expected)) < 5 * SAME
        if control:
            assert min(per_row(found, expected.roll(1, 0))) > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_gradient_of_a_zero_edit_is_autograds(name):
    """Every layer, the last one too; a gradient read one layer off is not equal."""
    check_gradients(lm_of(name), answered())


def test_gradients_of_edits_that_are_not_zero():
    """Through every kind of edit: finite differences in float64."""
    lm, batch = tt.LM(model_zoo.tiny("llama").double()), answered(PROMPTS[:2])
    for kind, edit in edits_of_all_kinds().items():
        name = next(n for n in ("delta", "value", "direction") if hasattr(edit, n))
        tensor = getattr(edit, name).double().requires_grad_()
        edited = replace(edit, **{name: tensor})
        (grad,) = torch.autograd.grad(loss_of(lm(batch, edited).logits, batch).double(), [tensor])
        way = noise(*tensor.shape, seed=4).double()
        ends = []
        for sign in (1, -1):
            moved = replace(edit, **{name: tensor.detach() + sign * 1e-3 * way})
            with torch.no_grad():
                ends.append(loss_of(lm(batch, moved).logits, batch).double())
        slope = (ends[0] - ends[1]) / 2e-3
        assert float((grad * way).sum()) == pytest.approx(float(slope), rel=2e-2), kind
        assert abs(float(slope)) > 1e-4, kind


# ---- 7. a recording = what hooks see -------------------------------------------------------------


def seen_by_hooks(lm, batch, run):
    """What our own hooks see at every tap, installed after the taps: the value after an edit."""
    seen, handles = {}, []

    def keep(key, side):
        def hook(module, args, kwargs, *out):
            x = out[0] if side == "out" else (args[0] if args else kwargs["hidden_states"])
            x = x if isinstance(x, torch.Tensor) else x[0]
            seen[key] = x.reshape(*batch.ids.shape, -1).clone()

        return hook

    for key, (module, side) in lm.anatomy.taps.items():
        add = module.register_forward_hook if side == "out" else module.register_forward_pre_hook
        handles.append(add(keep(key, side), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_recording_is_what_hooks_see(name):
    """Before or after an edit as named: without an edit and with one they differ."""
    lm, batch = lm_of(name), answered()
    sites = lm.sites()
    middle = {site: lm.anatomy.layers(site)[len(lm.anatomy.layers(site)) // 2] for site in sites}
    edits = sum(tt.Add(Place(s, middle[s]), noise(1, D)) for s in WRITABLE if s in sites)
    named = [f"{site}@{layer} answer" for site, layer in middle.items()]
    places = [*named, *(f"{place} before" for place in named)]
    kept = {}
    seen = seen_by_hooks(
        lm, batch, lambda: kept.update(run=lm(batch, edits, record=[*places, "resid@all"]))
    )
    recording = kept["run"].recording
    for place in named:
        key = (Place.parse(place).site, middle[Place.parse(place).site])
        first = [int((batch.mask[i] == 0).sum() + n) - 1 for i, n in enumerate(batch.prompt_len)]
        for i, row in enumerate(recording[place].rows()):
            assert torch.equal(row[:, 0], seen[key][i, first[i] :])
            earlier = recording[f"{place} before"].rows()[i]
            delta = noise(1, D) if key[0] in WRITABLE else 0
            assert torch.allclose(earlier[:, 0] + delta, row[:, 0], atol=1e-5, rtol=1e-5)
            assert key[0] not in WRITABLE or not torch.equal(earlier, row)
    for i, row in enumerate(recording["resid@all"].rows()):
        for layer in range(L):
            assert torch.equal(row[:, layer], seen["resid", layer][i, batch.mask[i].bool()])


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_record_is_a_forward_pass(name):
    """Trees, plain sheets, right padding, and what a run records in passing are all the same."""
    lm = lm_of(name)
    rows = [PROMPTS[i % 3][:3] + row for i, row in enumerate([*PROMPTS, *PROMPTS[::-1]])]
    batch, sites = answered(rows, 2), lm.sites()
    places = [f"{site}@{lm.anatomy.layers(site)[-1]} answer" for site in sites]
    places += ["resid@0:2 prompt[-1:]", "resid@2 all"]
    recording = lm.record(batch, places, show_progress=False)
    harmless = 0 * tt.Add("resid@0", noise(1, D))  # with edits, rows stand side by side
    plain = lm.record(batch, places, show_progress=False, edits=harmless)
    run = lm(batch, record=places).recording
    last = recording[places[-2]].last()
    assert min(per_row(last, last.roll(1, 0))) > DIFFERS  # rows in another order would be seen
    for place in places:
        found, beside, wanted = (r[place].rows() for r in (recording, plain, run))
        assert max(per_row(found, wanted)) < SAME
        assert max(per_row(beside, wanted)) < SAME


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_record_with_edits_per_row(name):
    lm, edits = lm_of(name), many_edits()
    batch = answered([PROMPTS[i % 3] for i in range(len(edits))], 2)
    places = ["resid@all answer", "attn@2 prompt", "resid@1 all before"]
    recording = lm.record(batch, places, show_progress=False, edits=edits)
    run, plain = lm(batch, edits, record=places).recording, lm(batch, record=places).recording
    for place in places:
        assert max(per_row(recording[place].rows(), run[place].rows())) < SAME
        assert max(per_row(recording[place].rows(), plain[place].rows())) > DIFFERS


# ---- 8. save then load = same --------------------------------------------------------------------


def readout(tokens="all", layers=(0, 1), seed=70, mean=False):
    n = len(layers)
    centre = noise(n, D, seed=seed + 2) if mean else None
    weight, bias = noise(n, D, seed=seed, size=1.0), noise(n, seed=seed + 1)
    return tt.Readout(Place("resid", layers, tokens), weight, torch.ones(n), bias, centre)


def gated(tokens="all", threshold=0.5, mean=False):
    inner = tt.Add("resid@2 all", noise(1, D, seed=71)) + tt.Project("mlp@3", noise(1, D, seed=72))
    return tt.When(readout(tokens, mean=mean), threshold, inner)


@torch.no_grad()
def test_saved_edits_are_the_same(tmp_path):
    lm, batch = lm_of("llama"), answered()
    edits = {**edits_of_all_kinds(), "when": gated(), "when centred": gated(mean=True)}
    kinds = list(edits.values())
    edits |= {"sum": kinds[0] + 0.5 * kinds[4] + gated("prompt[-1:]")}
    for name, edit in edits.items():
        edit.named(name).save(tmp_path / name)
        loaded = tt.load(tmp_path / name)
        assert loaded.meta.name == name and type(loaded) is type(edit)
        assert [str(p.place) for p in loaded.parts()] == [str(p.place) for p in edit.parts()]
        assert torch.equal(lm(batch, loaded).logits, lm(batch, edit).logits)
        assert error(lm(batch, 0.5 * loaded).logits, lm(batch, edit).logits) > SAME


@torch.no_grad()
def test_saved_probes_and_recordings_are_the_same(tmp_path):
    lm, batch = lm_of("llama"), answered()
    recording = lm.record(batch, ["resid@all answer", "q@1 all"], show_progress=False)
    recording.save(tmp_path / "recording")
    loaded = tt.Recording.load(tmp_path / "recording")
    assert loaded.places == recording.places
    for place in recording.places:
        pairs = zip(loaded[place].rows(), recording[place].rows(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for normalize in (True, False):
        probe = tt.concepts.fit_recording(
            recording["resid@all answer"], [1, 0, 1], normalize=normalize
        )
        probe.named("odd rows").save(tmp_path / f"probe {normalize}")
        again = tt.load(tmp_path / f"probe {normalize}")
        here = recording["resid@all answer"]
        assert torch.equal(again.predict(here), probe.predict(here))
        assert torch.equal(lm(batch, again.edit()).logits, lm(batch, probe.edit()).logits)
        assert not torch.equal(again.edit().delta, again.edit(scale=8.0).delta)
        assert (again.mean is None) == (not normalize)


def test_an_edit_of_another_model_is_refused():
    lm, other = lm_of("llama"), tt.LM(model_zoo.tiny("llama", seed=1))
    edit = tt.Add("resid@1", noise(1, D), meta=tt.Meta("theirs", other.describe()))
    other(answered(), edit)
    with pytest.raises(tt.ArtifactError, match="theirs was made for another model"):
        lm(answered(), [None, None, edit + tt.Add("resid@2", noise(1, D))])


# ---- 9. nothing is left behind -------------------------------------------------------------------


class Fault(Exception):
    pass


class Failing(tt.Add):
    """An edit that raises when it is applied."""

    def write(self, x, v):
        raise Fault


class Calling(tt.Add):
    """An edit that calls ``self.then`` when it is applied."""

    def write(self, x, v):
        self.then()
        return x + v["delta"]


def calling(then):
    edit = Calling("resid@2", noise(1, D))
    object.__setattr__(edit, "then", then)
    return edit


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_nothing_is_left_after_an_exception(name):
    lm, batch, (_, plain) = lm_of(name), answered(), untouched(name)
    late = tt.When(readout(layers=(3,)), 0.5, tt.Add("resid@1", noise(1, D)))
    failing = Failing("mlp@2", noise(1, D))
    first = tt.Add("resid@0", noise(1, D))
    attempts = [
        (Fault, lambda: lm(batch, first + failing, record="resid@all")),
        (Fault, lambda: lm.generate_ids(batch, [None, failing, first], max_new_tokens=3)),
        (Fault, lambda: lm.generate_ids(batch, failing, max_new_tokens=3, num_beams=2)),
        (Fault, lambda: lm.record(batch, "resid@3", edits=failing, show_progress=False)),
        (tt.PlaceError, lambda: lm(batch, first + late)),
        (tt.PlaceError, lambda: lm(batch, tt.Add("resid@9", noise(1, D)))),
        (tt.PlaceError, lambda: lm(batch, tt.Add("resid@1", noise(1, D + 1)))),
        (tt.BusyError, lambda: lm(batch, calling(lambda: lm(batch)))),
    ]
    for kind, attempt in attempts:
        with pytest.raises(kind):
            attempt()
        assert lm.taps.call is None
        assert torch.equal(plain_forward(lm.model, batch), plain)
        assert torch.equal(lm(batch).logits, plain)
        assert torch.equal(in_thread(lambda: lm(batch).logits), plain)  # the lock is free
    assert not torch.equal(lm(batch, first).logits, plain)


@torch.no_grad()
def test_nothing_is_left_by_a_stream_that_is_dropped():
    lm, (_, plain) = text_lm(), untouched("llama")
    stream = lm.stream("Are you happy?", tt.Add("resid@1", noise(1, D)), max_new_tokens=9)
    next(stream)
    assert torch.equal(lm(answered()).logits, plain)
    del stream
    assert torch.equal(lm(answered()).logits, plain)


def in_thread(work):
    """What ``work()`` gives, or raises, in a thread of its own."""
    kept = []

    def target():
        try:
            with torch.no_grad():
                kept.append(work())
        except Exception as fault:
            kept.append(fault)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(timeout=20)
    return kept[0]


@torch.no_grad()
def test_a_second_thread_waits_or_is_told():
    model, batch = model_zoo.tiny("llama"), answered()
    lm, strict = tt.LM(model), tt.LM(model, busy="raise")
    plain, found = lm(batch).logits, {}
    waiting = threading.Thread(target=lambda: found.update(waited=lm(batch).logits.detach()))

    def meanwhile():
        found["refused"] = in_thread(lambda: strict(batch))
        found["generate"] = in_thread(lambda: strict.generate_ids(batch))
        found["untouched"] = in_thread(lambda: plain_forward(model, batch))
        waiting.start()
        waiting.join(timeout=0.05)
        found["early"] = "waited" in found

    edited = lm(batch, calling(meanwhile)).logits
    waiting.join(timeout=20)
    assert isinstance(found["refused"], tt.BusyError) and not found["early"]
    assert isinstance(found["generate"], tt.BusyError)
    assert torch.equal(found["untouched"], plain) and torch.equal(found["waited"], plain)
    assert torch.equal(edited, lm(batch, tt.Add("resid@2", noise(1, D))).logits)
    assert torch.equal(strict(batch).logits, plain)


def test_busy_is_one_of_two():
    with pytest.raises(ValueError, match="'wait' or 'raise', not 'never'"):
        tt.LM(model_zoo.tiny("llama"), busy="never")


# ---- 10. edits as values -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", edits_of_all_kinds())
def test_an_edit_writes_nothing_into_its_input(kind, dtype):
    """It keeps dtype, shape and device, and changes what it says and nothing else."""
    edit, x = edits_of_all_kinds()[kind], noise(1, 9, D, size=2.0).to(dtype)
    before = x.clone()
    (step,) = merge(edit, [6], [9], L, D)
    positions = torch.arange(9)[None]
    mask, order = step.selection.mask(positions), step.selection.order(positions)
    for chosen in (mask, None):
        new = step.apply(x, 1, chosen, order)
        assert torch.equal(x, before)
        assert (new.dtype, new.shape, new.device) == (x.dtype, x.shape, x.device)
        assert error(new, x) > DIFFERS
    new = step.apply(x, 1, mask, order)
    assert torch.equal(new[~mask], x[~mask])


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_a_models_own_tensors_are_not_written_into(name):
    """What a block returned stays as it was; the control writes in place and is seen."""
    kept = []

    def keep(module, args, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        kept.append((x, x.clone()))

    def spoil(module, args, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        x += 1

    model, taps = model_zoo.tiny(name), lm_of(name).anatomy.taps
    names = {module: path for path, module in lm_of(name).model.named_modules()}
    sites = [s for s in WRITABLE if (s, 1) in taps]
    for site in sites:
        module = model.get_submodule(names[taps[site, 1][0]])
        module.register_forward_hook(keep)
    lm, batch = tt.LM(model), answered(PROMPTS[:1])  # its taps come after our hooks
    for kind in edits_of_all_kinds():
        lm(batch, sum(edits_of_all_kinds(site, (1,))[kind] for site in sites))
    assert len(kept) == len(sites) * len(edits_of_all_kinds()) > 12
    assert all(torch.equal(x, clone) for x, clone in kept)
    kept.clear()
    lm.anatomy.blocks[1].register_forward_hook(spoil)
    lm(batch)
    assert not all(torch.equal(x, clone) for x, clone in kept)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_bfloat16(name):
    lm = tt.LM(model_zoo.tiny(name).bfloat16())
    batch, kinds = answered(PROMPTS[:1]), edits_of_all_kinds()
    plain = plain_forward(lm.model, batch)
    assert torch.equal(lm(batch, 0 * sum(kinds.values())).logits, plain)
    for kind, edit in kinds.items():
        run = lm(batch, edit, record=["resid@1", "resid@1 before"])
        after, before = (run.recording[p].rows()[0] for p in ("resid@1", "resid@1 before"))
        assert run.logits.dtype == after.dtype == before.dtype == torch.bfloat16
        assert not torch.equal(after, before), kind
    after, before = (
        lm(batch, kinds["add"], record=p).recording.rows()[0] for p in ("resid@1", "resid@1 before")
    )
    assert torch.equal(after[:, 0], before[:, 0] + kinds["add"].delta[0].bfloat16())


@torch.no_grad()
def test_edits_of_several_dtypes_side_by_side():
    """A row's values are not rounded to the dtype of another row's."""
    lm, batch = lm_of("llama"), answered(PROMPTS[:1] * 2)
    fine, coarse = tt.Add("resid@1", noise(1, D)), tt.Add("resid@1", noise(1, D).bfloat16())
    together = lm(batch, [coarse, fine]).logits
    assert error(together[1], lm(batch, fine).logits[1]) < 1e-6
    assert error(together[0], lm(batch, coarse).logits[0]) < 1e-6
    assert error(together[0], together[1]) > 1e-5


# ---- 11. other ways to generate ------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_beams_of_a_row_share_its_edit(name):
    lm, batch = lm_of(name), pad(PROMPTS)
    kinds = edits_of_all_kinds()
    edits = [kinds["add per token"] + kinds["clamp"], None, kinds["keep_norm"] + kinds["add"]]
    options = {"max_new_tokens": 5, "num_beams": 3}
    together = lm.generate_ids(batch, edits, **options)
    singles = [lm.generate_ids(alone(batch, i), e, **options)[0] for i, e in enumerate(edits)]
    assert together == singles
    assert together != lm.generate_ids(batch, [*edits[1:], edits[0]], **options)
    uncached = lm.generate_ids(batch, edits, use_cache=False, **options)
    assert together == uncached
    several = lm.generate_ids(batch, edits, num_return_sequences=2, **options)
    assert several[::2] == together and several[1::2] != together


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_sampling_has_its_own_random_state(name):
    lm, batch, edit = lm_of(name), pad(PROMPTS), tt.Add("resid@1", noise(1, D))

    def sample(seed, **options):
        options = {"max_new_tokens": 6, "temperature": 1.0, "seed": seed, **options}
        return lm.generate_ids(batch, edit, **options)

    state = torch.get_rng_state()
    first = sample(7)
    assert sample(7) == first != sample(8)
    assert sample(None) != sample(None)
    assert sample(7, num_beams=2) == sample(7, num_beams=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(7, top_k=1) == lm.generate_ids(batch, edit, max_new_tokens=6)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_copies_of_a_row_stand_side_by_side(name):
    lm, batch = lm_of(name), pad(PROMPTS)
    edits = [None, *list(edits_of_all_kinds().values())[2:4]]
    singles = lm.generate_ids(batch, edits, max_new_tokens=5)
    copies = lm.generate_ids(batch, edits, max_new_tokens=5, num_return_sequences=3)
    assert copies == [row for row in singles for _ in range(3)]
    assert copies != singles * 3
    warm = {"max_new_tokens": 5, "num_return_sequences": 3, "temperature": 1.0, "seed": 1}
    assert len({tuple(row) for row in lm.generate_ids(batch, edits, **warm)}) > 3


@cache
def text_lm():
    return tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))


@torch.no_grad()
def test_a_stream_joined_is_generate():
    lm, edit = text_lm(), tt.Add("resid@1 answer", noise(1, D))
    for options in ({"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}, {}):
        pieces = list(lm.stream("Are you happy?", edit, max_new_tokens=12, **options))
        whole = lm.generate("Are you happy?", edit, max_new_tokens=12, **options)
        assert "".join(pieces) == whole and len(pieces) > 1
    assert whole != lm.generate("Are you happy?", max_new_tokens=12)
    for start in range(2, len(whole) - 3):  # a stop that may span pieces
        options = {"max_new_tokens": 12, "stop": ["never", whole[start : start + 3]]}
        short = lm.generate("Are you happy?", edit, **options)
        assert "".join(lm.stream("Are you happy?", edit, **options)) == short != whole


@torch.no_grad()
def test_streams_take_turns():
    lm, edits = text_lm(), [tt.Add("resid@1", noise(1, D, seed=i)) for i in range(2)]
    apart = [list(lm.stream("Are you happy?", e, max_new_tokens=6)) for e in edits]
    streams = [lm.stream("Are you happy?", e, max_new_tokens=6) for e in edits]
    found = [[], []]
    for _ in range(6):
        for pieces, stream in zip(found, streams, strict=True):
            pieces += [piece] if (piece := next(stream, None)) is not None else []
    assert found == apart and apart[0] != apart[1]


@torch.no_grad()
def test_a_stream_reads_what_predicted_each_piece():
    lm, probe = text_lm(), readout()
    pieces = list(lm.stream("Are you happy?", read=probe, max_new_tokens=6))
    ids = lm.generate_ids(lm.batch("Are you happy?"), max_new_tokens=6)
    batch = extended(lm.batch("Are you happy?"), torch.tensor(ids))
    readings = by_hand_readings(lm, batch, probe)[0, -7:-1]
    assert len(pieces) == 6  # one for each token, in this text
    assert [p.reading for p in pieces] == pytest.approx(readings.tolist(), abs=1e-5)
    assert [p.reading for p in pieces[:-1]] != pytest.approx(readings[1:].tolist(), abs=1e-3)


# ---- 12. When ------------------------------------------------------------------------------------


def by_hand_readings(lm, batch, probe):
    """The probe's readings [B, T] of a plain run."""
    layers = probe.place.layer_indices(lm.n_layers)
    outputs = {}

    def keep(layer):
        def hook(module, args, out):
            outputs[layer] = out if isinstance(out, torch.Tensor) else out[0]

        return hook

    handles = [lm.anatomy.blocks[i].register_forward_hook(keep(i)) for i in layers]
    plain_forward(lm.model, batch)
    for handle in handles:
        handle.remove()
    margins = [
        outputs[k] @ probe.weight[i] * probe.gain[i] + probe.bias[i] for i, k in enumerate(layers)
    ]
    return torch.stack(margins).sigmoid().mean(0)


def by_hand_open(lm, batch, probe, threshold):
    """Where the running mean over the probe's tokens so far reaches the threshold [B, T]."""
    readings, is_open = by_hand_readings(lm, batch, probe), torch.zeros_like(batch.mask).bool()
    for b in range(len(batch)):
        first = int((batch.mask[b] == 0).sum())
        taken = []
        for t in range(first, batch.ids.shape[1]):
            position, last = t - first, int(batch.prompt_len[b]) - 1
            if {"all": True, "prompt[-1:]": position == last, "answer": position >= last}[
                probe.place.tokens
            ]:
                taken.append(float(readings[b, t]))
            is_open[b, t] = bool(taken) and sum(taken) / len(taken) >= threshold
    return is_open


@pytest.mark.parametrize("tokens", ["all", "prompt[-1:]", "answer"])
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_when_opens_where_the_probe_says(name, tokens):
    lm, batch, probe = lm_of(name), answered(), readout(tokens)
    readings = by_hand_readings(lm, batch, probe)[batch.mask.bool()]
    threshold = float(readings.median()) + 1e-4
    is_open = by_hand_open(lm, batch, probe, threshold)
    assert bool(is_open.any()) and bool((batch.mask.bool() & ~is_open).any())
    inner = tt.Add("resid@2", noise(1, D))

    def by_hand_hook(where):
        def hook(module, args, out):
            x = out if isinstance(out, torch.Tensor) else out[0]
            new = torch.where(where[..., None], x + inner.delta[0], x)
            return new if isinstance(out, torch.Tensor) else (new, *out[1:])

        return hook

    real = batch.mask.bool()
    found = lm(batch, tt.When(probe, threshold, inner)).logits[real]
    with hooked(lm.anatomy.blocks[2], by_hand_hook(is_open & real)):
        assert error(found, plain_forward(lm.model, batch)[real]) < SAME
    with hooked(lm.anatomy.blocks[2], by_hand_hook(~is_open & real)):
        assert error(found, plain_forward(lm.model, batch)[real]) > DIFFERS
    assert torch.equal(lm(batch, tt.When(probe, 2.0, inner)).logits, lm(batch).logits)
    always = lm(batch, tt.When(replace(probe, place=Place("resid", (0, 1))), -1.0, inner)).logits
    assert error(always, lm(batch, inner).logits) < 1e-6


@pytest.mark.parametrize("tokens", ["all", "prompt[-1:]", "answer", "answer[1:3]"])
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_when_cached_is_uncached(name, tokens):
    """Also beside other edits, and row by row."""
    lm, batch = lm_of(name), pad(PROMPTS)
    probe, inner = readout(tokens), gated().edit
    readings = by_hand_readings(lm, batch, probe)[batch.mask.bool()]
    threshold = float(readings.median()) + 1e-4
    edit = tt.When(probe, threshold, inner)
    other = tt.When(replace(probe, weight=-probe.weight), threshold, inner)
    for edits in (edit, [edit, None, other], [other, tt.Add("resid@1", noise(1, D)) + edit, edit]):
        answers, cached = generated(lm, batch, edits, 6)
        assert error(cached, in_one_pass(lm, batch, answers, edits)) < SAME
        assert error(cached, token_by_token(lm, batch, answers, edits)) < SAME
        if isinstance(edits, list):
            whole = extended(batch, answers)
            together = lm(whole, edits).logits
            for i, single in enumerate(edits):
                assert error(real(together, whole, i), lm(alone(whole, i), single).logits[0]) < SAME


def beam_search(lm, batch, edit, n, width):
    """Beam search of one row by whole passes: the likeliest of the ``width`` beams."""
    beams, scores = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1)
    for _ in range(n):
        wide = [
            t.expand(len(beams), -1) for t in (batch.ids, batch.mask, batch.prompt_len[:, None])
        ]
        rows = extended(tt.Batch(wide[0], wide[1], wide[2][:, 0]), beams)
        scores = scores[:, None] + lm(rows, edit).logits[:, -1].log_softmax(-1)
        scores, best = scores.flatten().topk(width)
        tokens = len(lm.embedding)
        beams = torch.cat([beams[best // tokens], (best % tokens)[:, None]], 1)
    return beams[0].tolist()


@torch.no_grad()
def test_when_under_beam_search_follows_the_beam():
    """Beams change places while the probe's mean is running; each keeps its own."""
    lm, batch = lm_of("llama"), pad(PROMPTS)
    outcomes = set()
    for threshold in (0.4, 0.5, 0.55, 0.6):
        edit = tt.When(readout("answer"), threshold, gated().edit)
        found = lm.generate_ids(batch, edit, max_new_tokens=8, num_beams=4)
        assert found == [beam_search(lm, alone(batch, i), edit, 8, 4) for i in range(3)]
        outcomes.add(str(found))
    assert len(outcomes) > 1


# ---- 13. models in other clothes -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("site", ["resid", "norm", "attn", "mlp"])
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing_gives_the_same_gradients(name, site):
    """With the run's own backward; without it, torch says that inside blocks things changed."""
    lm, batch = fresh(name), answered()
    deltas = [noise(L, D), noise(2, 3, 8, D)]
    places = [f"{site}@all", f"{site}@1:3 prompt"]

    def gradients(backward):
        tensors = [delta.clone().requires_grad_() for delta in deltas]
        edits = tt.Add(places[0], tensors[0]) + tt.Add(places[1], tensors[1], relative=True)
        run = lm(batch, edits)
        backward(run, loss_of(run.logits, batch))
        return [t.grad for t in tensors]

    wanted = gradients(lambda run, loss: loss.backward())
    assert max(map(error, gradients(lambda run, loss: run.backward(loss)), wanted)) < SAME
    lm.model.train()
    lm.model.gradient_checkpointing_enable()
    assert max(map(error, gradients(lambda run, loss: run.backward(loss)), wanted)) < SAME
    assert lm.taps.call is None
    if site == "resid":  # lies outside of what is computed again
        assert max(map(error, gradients(lambda run, loss: loss.backward()), wanted)) < SAME
    else:
        with pytest.raises(CheckpointError):
            gradients(lambda run, loss: loss.backward())


def test_a_model_in_training_reads_without_dropout():
    lm = fresh("gpt2")
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch, place = answered(), "resid@all"
    lm.model.eval()
    wanted = lm.record(batch, place).rows()
    lm.model.train()
    found = lm.record(batch, place).rows()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(module.training for module in lm.model.modules())  # it is left as it was
    logits = [lm(batch).logits for _ in range(2)]  # a bare pass is the model's own, dropout and all
    assert not torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_lora_model_obeys_the_same_laws(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(model_zoo.tiny(name), config).eval()
    batch = answered()
    plain = plain_forward(model, batch)
    assert error(plain, untouched(name)[1]) > DIFFERS
    lm = tt.LM(model)
    assert torch.equal(lm(batch).logits, plain)
    assert torch.equal(lm(batch, 0 * edits_of_all_kinds()["both"]).logits, plain)
    prompts, edits = pad(PROMPTS), list(edits_of_all_kinds().values())[:3]
    answers, cached = generated(lm, prompts, edits)
    assert error(cached, in_one_pass(lm, prompts, answers, edits)) < SAME
    assert error(cached, in_one_pass(lm, prompts, answers)) > DIFFERS
    check_sums(lm)
    with torch.enable_grad():
        model.requires_grad_(True)
        check_gradients(lm, batch)


@torch.no_grad()
def test_two_lms_of_one_model():
    """They share its taps: an edit applies once, and each carries its own."""
    model, batch = model_zoo.tiny("llama"), answered()
    first, second = tt.LM(model), tt.LM(model)
    kinds = edits_of_all_kinds()
    wanted = [lm_of("llama")(batch, e).logits for e in (kinds["add"], kinds["clamp"])]
    assert torch.equal(first(batch, kinds["add"]).logits, wanted[0])
    assert torch.equal(second(batch, kinds["clamp"]).logits, wanted[1])
    assert torch.equal(first(batch, kinds["add"]).logits, wanted[0])
    twice = lm_of("llama")(batch, kinds["add"] + kinds["add"]).logits
    assert error(twice, wanted[0]) > DIFFERS


@torch.no_grad()
def test_a_copied_model_is_a_model_of_its_own():
    lm, batch, (_, plain) = fresh("llama"), answered(), untouched("llama")
    copied = tt.LM(copy.deepcopy(lm.model))
    edit = tt.Add("resid@1", noise(1, D))
    assert torch.equal(copied(batch, edit).logits, lm(batch, edit).logits)
    assert torch.equal(copied(batch).logits, plain)
    other = calling(lambda: copied(batch, edit))  # a run of the copy inside a run of the model
    assert torch.equal(lm(batch, other).logits, lm(batch, replace(edit, place="resid@2")).logits)


@pytest.mark.parametrize("cuts", [(0, 3), (0, 5, 6), (0, 1, 2, 7)], ids=str)
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_a_prompt_may_come_in_parts(name, cuts):
    """Taps take positions from the cache's length: a prompt longer than the cache so far."""
    lm, batch = lm_of(name), pad(PROMPTS)
    ids, mask, positions = batch.ids, batch.mask, (batch.mask.cumsum(1) - 1).clamp_min(0)
    edits = [tt.Add("resid@1 [1, 4]", noise(1, 1, 2, D)), gated(), edits_of_all_kinds()["clamp"]]
    wanted = lm(batch, edits).logits
    prompt_len = batch.prompt_len.tolist()

    def in_parts(clock_mask):
        steps = merge(edits, prompt_len, [FOREVER] * 3, L, D)
        cache, call, found = DynamicCache(config=lm.text_config), Call(Clock(clock_mask), steps), []
        with lm.taps.carry(call):
            for a, b in zip(cuts, [*cuts[1:], ids.shape[1]], strict=True):
                out = lm.forward(ids[:, a:b], mask[:, :b], positions[:, a:b], cache=cache)
                found.append(out.logits)
        return torch.cat(found, 1)

    real = mask.bool()
    assert error(in_parts(mask)[real], wanted[real]) < SAME
    assert error(in_parts(torch.ones_like(mask))[real], wanted[real]) > DIFFERS  # pads counted


# ---- 14. the real model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversation(smollm2):
    """Prompts of several lengths, and edits at a tenth of the stream's length."""
    prompts = ["How was your day?", "Name three birds, please.", "Hi"]
    edits = [
        tt.Add("resid@8:20 answer", noise(12, smollm2.width, size=0.004), relative=True),
        None,
        tt.Add("resid@4 prompt", noise(1, 1, 30, smollm2.width, size=0.02), keep_norm=True)
        + tt.Project("mlp@10:12", noise(2, smollm2.width)),
    ]
    return smollm2.batch(prompts), edits


@pytest.mark.slow
@torch.no_grad()
def test_real_cached_is_uncached(smollm2, conversation):
    batch, edits = conversation
    answers, cached = generated(smollm2, batch, edits, 6)
    assert error(cached, in_one_pass(smollm2, batch, answers, edits)) < SAME
    assert error(cached, token_by_token(smollm2, batch, answers, edits)) < SAME
    assert error(cached, in_one_pass(smollm2, batch, answers)) > DIFFERS


@pytest.mark.slow
@torch.no_grad()
def test_real_batch_is_its_rows_alone_each_with_its_edit(smollm2, conversation):
    batch, edits = conversation
    together, plain = smollm2(batch, edits).logits, smollm2(batch).logits
    for i, edit in enumerate(edits):
        single = smollm2(alone(batch, i), edit).logits[0]
        assert error(real(together, batch, i), single) < SAME
        assert edit is None or error(real(plain, batch, i), single) > DIFFERS
    assert error(real(plain, batch, 1), real(together, batch, 1)) < SAME


@pytest.mark.slow
@torch.no_grad()
def test_real_no_edit_is_the_plain_model_to_the_bit(smollm2, conversation):
    batch, edits = conversation
    plain = plain_forward(smollm2.model, batch)
    assert torch.equal(smollm2(batch).logits, plain)
    assert torch.equal(smollm2(batch, [e and 0 * e for e in edits]).logits, plain)
    assert not torch.equal(smollm2(batch, edits).logits, plain)


@pytest.mark.slow
def test_real_gradient_of_a_zero_edit_is_autograds(smollm2, conversation):
    check_gradients(smollm2, conversation[0])


# ---- which architecture has which site -----------------------------------------------------------


def test_the_table_of_architectures_is_up_to_date():
    committed = Path(__file__).parent.parent / "docs" / "architectures.md"
    assert committed.read_text(encoding="utf-8") == model_zoo.architecture_table(), (
        "write it anew: python tests/model_zoo.py > docs/architectures.md"
    )
