"""Prefix controllers: what is learned, that it stays an edit, and that a killed run goes on.

The laws of edits in general are in test_laws.py, where the controller's kinds stand beside the
others; here they are shown for a whole controller on many architectures.
"""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import model_zoo
import tokenizers_zoo
import trimtab as tt
from test_laws import (
    DIFFERS,
    PROMPTS,
    SAME,
    alone,
    answered,
    error,
    generated,
    in_one_pass,
    lm_of,
    noise,
    pad,
    per_row,
    real,
)

L, D = model_zoo.LAYERS, model_zoo.HIDDEN
ARCHITECTURES = [
    *("llama", "gpt2", "bloom", "falcon", "gemma2", "gpt_oss", "deepseek_v3", "mpt"),
    *("opt_post_norm", "qwen3_moe", "lfm2", "qwen3_next"),
]
TEXTS = ["hello", "how do you do", "what", "a b c", "one two", "three"]
QUICK = dict(length=4, adapter_length=4, answer_tokens=4, epochs=6, lr=0.03, show_progress=False)


def controller(seed=0):
    """One of the right form: pairs at every layer."""
    return tt.Attend("resid@all", noise(L, 6, D, seed=seed), noise(L, 6, D, seed=seed + 1))


def talker(name="llama", template="chatml"):
    return tt.LM(model_zoo.tiny(name), tokenizers_zoo.byte_tokenizer(template))


def push(seed=0, layers="1:3"):
    """A steering edit on the prompt, as a solution has."""
    return tt.Add(f"resid@{layers} prompt", 0.06 * noise(2, D, seed=seed), relative=True)


def away_from(lm, rows, edits, goal):
    """How far the block outputs with ``edits`` are from those with ``goal``, at all layers."""
    batch = lm.batch(rows)
    found, wanted = (
        lm.record(batch, "resid@all", edits=e, show_progress=False) for e in (edits, goal)
    )
    return error(torch.cat(found.rows()), torch.cat(wanted.rows()))


@cache
def learned(seed=1, kind="attend"):
    """A tiny model and a controller for ``push(seed)`` at every prompt."""
    lm = talker()
    more = {"rank": 4} if kind == "lowrank" else {}
    return lm, tt.prefix.distill(lm, [(t, push(seed)) for t in TEXTS], **QUICK, **more)


# ---- a controller is an edit ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_controller_obeys_the_laws_of_edits(name, tmp_path):
    """Cached = uncached, a batch = its rows alone, edits per row, saved = loaded, no trace left."""
    lm, batch = lm_of(name), pad(PROMPTS)
    plain = lm(batch).logits
    one, other = controller(), controller(seed=2)
    one.save(tmp_path / "one")
    edits = [tt.load(tmp_path / "one"), None, tt.Add("resid@1", noise(1, D)) + 0.5 * other]
    answers, cached = generated(lm, batch, edits)
    whole = in_one_pass(lm, batch, answers, edits)
    assert max(per_row(cached, whole)) < SAME
    unedited = in_one_pass(lm, batch, answers)
    assert min(per_row(whole[[0, 2]], unedited[[0, 2]])) > DIFFERS
    assert torch.equal(whole[1], unedited[1])
    wrong = in_one_pass(lm, batch, answers, [0.9 * one, None, edits[2]])
    assert error(wrong[0], cached[0]) > DIFFERS
    rows = answered()
    together = lm(rows, [one, None, edits[2]]).logits
    for i, edit in enumerate(edits):
        assert error(real(together, rows, i), lm(alone(rows, i), edit).logits[0]) < SAME
    assert torch.equal(lm(batch, 0 * one).logits, plain)
    assert torch.equal(lm(batch).logits, plain)
    assert not torch.equal(lm(batch, 0.001 * one).logits, plain)


@pytest.mark.parametrize("kind", [tt.Attend, tt.LowRank])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])  # they stay in float64 throughout
def test_gradients_of_pairs_are_differences(name, kind):
    """Of keys and values, in float64, also from the closed gate; the model's weights get none."""
    lm, batch = tt.LM(model_zoo.tiny(name).double()), answered(PROMPTS[:1])
    size = 0.1 if kind is tt.LowRank else 1.0
    pairs = [size * noise(L, 3, D, seed=i).double() for i in (1, 2)]
    ways = [noise(L, 3, D, seed=i).double() for i in (3, 4)]

    def loss(key, value):
        logits = lm(batch, kind("resid@all", key, value)).logits
        return logits.log_softmax(-1)[..., 7].mean()

    for key, value in (pairs, (pairs[0], torch.zeros_like(pairs[1]))):
        key, value = key.clone().requires_grad_(), value.clone().requires_grad_()
        for parameter, way in zip((key, value), ways, strict=True):
            (gradient,) = torch.autograd.grad(loss(key, value), parameter)
            step = 1e-5 * way
            with torch.no_grad():
                moved = [
                    loss(*(p + s * step if p is parameter else p for p in (key, value)))
                    for s in (1, -1)
                ]
            difference = float(moved[0] - moved[1]) / 2e-5
            assert float((gradient * way).sum()) == pytest.approx(difference, rel=1e-4, abs=1e-9)
            assert abs(difference) > 1e-4 or not bool(value.any())
    assert all(p.grad is None for p in lm.model.parameters())


@torch.no_grad()
def test_streams_and_conditions_take_a_controller():
    lm, edit = learned()
    strong = 20 * edit
    assert "".join(lm.stream("hello", edits=strong, max_new_tokens=6)) == lm.generate(
        "hello", edits=strong, max_new_tokens=6
    )
    probe = tt.Readout("resid@0 prompt[-1:]", noise(1, D), torch.ones(1), torch.zeros(1))
    batch = lm.batch(TEXTS)
    always, never = (lm(batch, tt.When(probe, t, strong)).logits[:, -1] for t in (0.0, 1.0))
    assert torch.equal(never, lm(batch).logits[:, -1])
    assert error(always, lm(batch).logits[:, -1]) > DIFFERS


# ---- what it learns ------------------------------------------------------------------------------


def test_a_controller_does_what_the_solutions_do():
    """Also on prompts that it has not seen; the controls go nowhere near."""
    lm, edit = learned()
    assert edit.key.shape == (L, 8, D) and isinstance(edit, tt.Attend)
    assert edit.meta.scores["matched"] > 0.5 and edit.meta.model == lm.describe()
    new = ["something else", "and more"]
    plain = away_from(lm, new, None, push(1))
    assert away_from(lm, new, edit, push(1)) < 0.7 * plain
    assert away_from(lm, new, -edit, push(1)) > plain
    assert away_from(lm, new, learned(2)[1], push(1)) > plain  # distilled from other solutions


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"adapter_length": 0},
        {"rank": 4, "lr": 0.01},
        {"loss": "mse"},
        {"tokens": "all"},
        {"layers": "0:3", "held_out": 0},
        {"answer_tokens": 0},
    ],
    ids=str,
)
def test_variants(options):
    lm = talker("gpt2")
    solutions = [(t, push(1)) for t in TEXTS]
    edit = tt.prefix.distill(lm, solutions, **{**QUICK, **options})
    assert edit.meta.scores["matched"] > 0.3
    assert away_from(lm, ["some other"], edit, push(1)) < away_from(
        lm, ["some other"], None, push(1)
    )
    assert type(edit) is (tt.LowRank if "rank" in options else tt.Attend)
    wanted = {"length": 4, "adapter_length": 4, **options}
    pairs = options.get("rank") or wanted["length"] + wanted["adapter_length"]
    assert edit.key.shape == (3 if "layers" in options else L, pairs, D)
    assert str(edit.place).split()[1] == options.get("tokens", "prompt")


def test_solutions_of_every_form_and_edits_per_token():
    """Objects, pairs, conversations, given answers, None for a prompt that needs nothing."""
    lm = talker()
    ids = [lm.batch(t).ids.shape[1] for t in TEXTS]
    own = [tt.Add("resid@all prompt", 0.2 * noise(L, 1, n, D, seed=n)) for n in ids[:4]]
    turns = [{"role": "user", "content": TEXTS[2]}]
    solutions = [
        SimpleNamespace(prompt=TEXTS[0], edit=own[0], answer="yes yes"),
        SimpleNamespace(prompt=TEXTS[1], edit=own[1]),
        (turns, own[2]),
        (TEXTS[3], 0.5 * own[3] + push()),
        (TEXTS[4], None),
    ]
    edit = tt.prefix.distill(lm, solutions, **{**QUICK, "held_out": 0, "epochs": 12})
    assert edit.meta.scores["matched"] > 0.02
    assert edit.meta.made_by["solutions"] == 5
    single = tt.prefix.distill(lm, solutions[0], **QUICK)
    assert single.meta.made_by["solutions"] == 1


def test_the_loss_is_the_mean_relative_distance():
    """``plain`` and ``loss`` against runs by hand; the paper's loss is another number."""
    lm = talker()
    solutions = [(t, push(1)) for t in TEXTS[:2]]
    options = {**QUICK, "answer_tokens": 0, "held_out": 0}
    edit = tt.prefix.distill(lm, solutions, **options)
    goal, found, none = (
        torch.cat(lm.record(TEXTS[:2], "resid@all", edits=e, show_progress=False).rows())
        for e in (push(1), edit, None)
    )
    for states, name in ((none, "plain"), (found, "loss")):
        distance = ((states - goal).square().sum(-1) / goal.square().sum(-1)).mean()
        assert edit.meta.scores[name] == pytest.approx(float(distance), rel=1e-4)
    squares = tt.prefix.distill(lm, solutions, **options, loss="mse").meta.scores["plain"]
    assert squares == pytest.approx(float((none - goal).square().mean()), rel=1e-4)
    assert edit.meta.scores["loss"] == min(edit.meta.scores["losses"])


def test_two_controllers_compose():
    """A weighted sum goes both ways, and is nearer to both pushes than either controller."""
    lm, a = learned(1)
    b = learned(2)[1]
    batch = lm.batch(TEXTS)
    both, goal = 0.4 * a + 0.6 * b, 0.4 * push(1) + 0.6 * push(2)
    plain = away_from(lm, TEXTS, None, goal)
    assert away_from(lm, TEXTS, both, goal) < 0.75 * plain
    assert away_from(lm, TEXTS, both, goal) < 0.9 * min(
        away_from(lm, TEXTS, e, goal) for e in (0.4 * a, 0.6 * b)
    )
    assert away_from(lm, TEXTS, 0.4 * a - 0.6 * b, goal) > plain
    with torch.no_grad():
        x = lm(batch, both, record="resid@0").recording.rows()[0][:, 0]
        start = lm(batch, both, record="resid@0 before").recording.rows()[0][:, 0]
    assert error(x, by_hand(by_hand(start, a, 0.4), b, 0.6)) < SAME
    assert error(x, by_hand(start, b, 0.6)) > 10 * SAME


def by_hand(x, edit, factor):
    size = x.square().mean(-1, keepdim=True).sqrt()
    return x + factor * size * torch.softmax(x / size @ edit.key[0].T, -1) @ edit.value[0]


def test_training_leaves_no_trace():
    """Neither on the model nor on the global random state; equal seeds give equal bits."""
    lm, solutions = talker(), [(t, push(1)) for t in TEXTS]
    batch = lm.batch(TEXTS)
    before, state = lm(batch).logits, torch.random.get_rng_state()
    first, again, other = (
        tt.prefix.distill(lm, solutions, **QUICK, seed=s, name="calm") for s in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(lm(batch).logits, before)
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    assert not first.key.requires_grad and first.meta.name == "calm"
    assert torch.equal(first.value, again.value) and torch.equal(first.key, again.key)
    assert not torch.equal(first.value, other.value)


# ---- going on after an interruption --------------------------------------------------------------

WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import trimtab as tt
from test_prefix import QUICK, TEXTS, push, talker
solutions = [(t, push(1)) for t in 2 * TEXTS]
more = {{**QUICK, "epochs": {epochs}, "batch_size": 2}}
edit = tt.prefix.distill(talker(), solutions, **more, out=sys.argv[1])
edit.save(sys.argv[2])
"""
EPOCHS = 12


@pytest.mark.slow
@pytest.mark.parametrize("until", ["states", "training.safetensors"])
def test_a_killed_run_goes_on_and_ends_the_same(until, tmp_path):
    """SIGKILL as soon as this much is written: the rerun gives the bits of a run that was not."""
    code = WORKER.format(tests=os.path.dirname(__file__), epochs=EPOCHS)
    command = [sys.executable, "-c", code, str(tmp_path / "work"), str(tmp_path / "edit")]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "work" / until).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "edit").exists()  # it was in the middle
    subprocess.run(command, check=True)
    resumed = tt.load(tmp_path / "edit")
    solutions = [(t, push(1)) for t in 2 * TEXTS]
    whole = tt.prefix.distill(
        talker(), solutions, **{**QUICK, "epochs": EPOCHS, "batch_size": 2}, out=tmp_path / "whole"
    )
    assert torch.equal(resumed.key, whole.key) and torch.equal(resumed.value, whole.value)
    assert resumed.meta.scores == whole.meta.scores


def test_a_finished_run_is_read_and_other_work_is_refused(tmp_path):
    lm, solutions = talker(), [(t, push(1)) for t in TEXTS]
    first = tt.prefix.distill(lm, solutions, **QUICK, out=tmp_path / "work")
    started = (tmp_path / "work" / "training.safetensors").stat().st_mtime_ns
    again = tt.prefix.distill(lm, solutions, **QUICK, out=tmp_path / "work")
    assert torch.equal(first.value, again.value) and first.meta.scores == again.meta.scores
    assert (tmp_path / "work" / "training.safetensors").stat().st_mtime_ns == started
    alone_ = tt.prefix.distill(lm, solutions, **QUICK)
    assert torch.equal(first.value, alone_.value)
    for told, changed in (
        ("edits", {"solutions": [(t, push(2)) for t in TEXTS]}),
        ("rows", {"solutions": solutions[:-1]}),
        ("seed", {"seed": 3}),
        ("epochs", {"epochs": 7}),
    ):
        options = {**QUICK, "solutions": solutions, **changed}
        with pytest.raises(tt.ArtifactError, match=rf"another [\w, ]*{told}.*delete that one"):
            tt.prefix.distill(lm, out=tmp_path / "work", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(tt.ArtifactError, match="holds something else"):
        tt.prefix.distill(lm, solutions, **QUICK, out=tmp_path / "full")
    (tmp_path / "work" / "training.safetensors").write_bytes(b"cut")
    with pytest.raises(tt.ArtifactError, match="cannot be read.*delete it"):
        tt.prefix.distill(lm, solutions, **QUICK, out=tmp_path / "work")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solutions", "told"),
    [
        ([], "no solutions"),
        (["hello"], "a solution has a prompt and an edit.*'hello'"),
        ([("hello", 3)], "edit is an Edit or None, not 3"),
        ([("hello", None)], "none of the solutions has an edit"),
        ([("hello", tt.Add("resid@0", torch.ones(1, 5)))], "width 5"),
    ],
)
def test_what_is_no_solution_says_so(solutions, told):
    with pytest.raises(tt.PlaceError, match=told):
        tt.prefix.distill(talker(), solutions, **QUICK)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "l1"}, "loss is one of relative, mse, not 'l1'"),
        ({"epochs": 0}, "epochs is 1 or more, not 0"),
        ({"length": 0, "adapter_length": 0}, "one of them at least 1"),
        ({"length": -1}, "length -1"),
        ({"rank": 0}, "at least 1"),
        ({"lr": 0}, "lr is a positive number, not 0"),
        ({"held_out": 1.0}, "held_out is a fraction"),
    ],
)
def test_options_are_checked(options, told):
    with pytest.raises(ValueError, match=told):
        tt.prefix.distill(talker(), [("hello", push())], **{**QUICK, **options})


# ---- on the real model ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_controller(smollm2):
    """Six prompts and a few epochs give most of the shift, on prompts that were not trained on."""
    questions = ["How was your day?", "What is rain?", "Tell me about dogs.", "Who are you?"]
    more = ["What did you do on Sunday?", "Describe a street."]
    width, n = smollm2.width, 16
    way = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    way = 0.02 * way / way.norm(dim=-1, keepdim=True)
    push_ = tt.Add("resid@5:21 prompt", way, relative=True)
    options = dict(
        epochs=10, batch_size=3, answer_tokens=4, held_out=0, show_progress=False, lr=6e-3
    )
    edit = tt.prefix.distill(smollm2, [(q, push_) for q in (questions + more)[:5]], **options)
    assert edit.meta.scores["matched"] > 0.5
    plain = away_from(smollm2, more[1:], None, push_)
    assert away_from(smollm2, more[1:], edit, push_) < 0.8 * plain
    assert away_from(smollm2, more[1:], -edit, push_) > plain
