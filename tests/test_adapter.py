"""Adapters as edits: PEFT and merged weights as oracles, and the laws that every edit obeys.

Each law stands beside a control that is expected to break it.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

import model_zoo
import trimtab as tt
from test_laws import (
    DIFFERS,
    EVERY,
    FEW,
    PROMPTS,
    SAME,
    Calling,
    D,
    Failing,
    Fault,
    L,
    alone,
    answered,
    error,
    fresh,
    generated,
    hooked,
    in_one_pass,
    in_thread,
    lm_of,
    loss_of,
    noise,
    pad,
    per_row,
    plain_forward,
    readout,
    real,
    text_lm,
    token_by_token,
    untouched,
)
from trimtab.adapter import Low, block_of
from trimtab.place import Place

SIZE = 0.3  # of what is added, in that of the input


def matrices(lm, rank=3, seed=0, layers=None, pick=lambda name: True, scale=1.5):
    """Random matrices for the linear modules of some layers."""
    made, sizes = {}, lm.anatomy.linear_sizes(layers)
    for i, (name, (inside, outside)) in enumerate(sizes.items()):
        if pick(name):
            down = noise(rank, inside, seed=100 * seed + i, size=inside**-0.5)
            up = noise(outside, rank, seed=100 * seed + i + 50, size=SIZE * rank**-0.5)
            made[name] = Low(down, up, scale)
    return made


def adapter(lm, tokens="all", **options):
    return tt.Adapter(Place("resid", "all", tokens), matrices(lm, **options))


def several(lm):
    """Adapters of other ranks, modules, tokens and strengths, alone and beside other edits."""
    a, b = adapter(lm), adapter(lm, "prompt", rank=5, seed=1, layers=[1, 2])
    first = next(iter(lm.anatomy.linear_sizes([2])))
    one = adapter(lm, "answer[:2]", rank=1, seed=2, pick=lambda name: name == first)
    add, attend = tt.Add("resid@1", noise(1, D)), tt.Attend("resid@2", *noise(2, 1, 3, D, seed=4))
    late = tt.When(readout("all", (0,)), 0.5, replace(b, place=Place("resid", [1, 2])))
    return {
        "all": a,
        "prompt": b,
        "one module": -2 * one,
        "none": None,
        "answer": 0.5 * replace(a, place=Place("resid", "1:", "answer")),
        "positions": replace(b, place=Place("resid", "all", [0, 2, 5, 9])),
        "sum": a + add - 0.5 * b + one,
        "beside others": attend + one + tt.LowRank("resid@0", *noise(2, 1, 2, D, seed=5)),
        "when": late + add,
    }


def merged(lm, edit):
    """A copy of the model whose weights hold the adapter: the second oracle."""
    model = copy.deepcopy(lm.model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, low in edit.modules.items():
            more = edit.strength * low.scale * low.up @ low.down
            weight = modules[name].weight
            weight += more.T if type(modules[name]).__name__ == "Conv1D" else more
    return model


# ---- oracles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_an_adapter_is_what_merged_weights_are(name):
    """Every linear module of every architecture; one strength off is not equal."""
    lm, batch = lm_of(name), answered()
    edit = 0.7 * adapter(lm)
    assert len(edit.modules) >= 4 * L and edit.layers == tuple(range(L))
    whole = batch.mask.bool()
    wanted = plain_forward(merged(lm, edit), batch)[whole]
    assert error(lm(batch, edit).logits[whole], wanted) < SAME
    assert error(lm(batch, 1.1 * edit).logits[whole], wanted) > DIFFERS


def peft_model(name, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng():
        torch.manual_seed(options["r"])
        return peft.get_peft_model(model_zoo.tiny(name), config).eval()


PEFT_OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*\.1\..*": 2},
        "alpha_pattern": {r".*\.2\..*": 9, r"0\.mlp.*": 1},
    },
}
SOME_LAYERS = {
    "llama": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "up_proj"]},
    "gpt2": {"layers_to_transform": [0, 2], "target_modules": ["c_attn", "c_fc"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", PEFT_OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_an_adapter_is_what_peft_computes(name, options, tmp_path):
    peft, batch, lm = pytest.importorskip("peft"), answered(), lm_of(name)
    theirs = peft_model(name, **PEFT_OPTIONS[options])
    theirs.save_pretrained(tmp_path / "theirs")
    edit, wanted = tt.load(tmp_path / "theirs"), plain_forward(theirs, batch)
    assert isinstance(edit, tt.Adapter) and str(edit.place) == "resid@all all"
    assert error(lm(batch, edit).logits, wanted) < SAME
    assert error(lm(batch, 1.1 * edit).logits, wanted) > DIFFERS
    (0.5 * edit).save_peft(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model_zoo.tiny(name), tmp_path / "ours").eval()
    assert error(plain_forward(again, batch), lm(batch, 0.5 * edit).logits) < SAME
    assert error(plain_forward(again, batch), wanted) > DIFFERS
    edit.save_peft(tmp_path / "ours")  # replaces it
    assert error(lm(batch, tt.load(tmp_path / "ours")).logits, wanted) < SAME


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_rows_have_what_pefts_adapter_names_give_them(name, tmp_path):
    peft, batch, lm = pytest.importorskip("peft"), answered(), lm_of(name)
    kinds = {"a": {"r": 4}, "b": {"r": 2} | SOME_LAYERS[name]}
    model = model_zoo.tiny(name)
    for key, options in kinds.items():
        peft_model(name, **options).save_pretrained(tmp_path / key)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    names = ["b", "__base__", "a"]
    positions = (batch.mask.cumsum(1) - 1).clamp_min(0)
    wanted = theirs.eval()(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=positions,
        adapter_names=names,
    ).logits
    own = {key: tt.load(tmp_path / key) for key in kinds} | {"__base__": None}
    assert max(per_row(lm(batch, [own[n] for n in names]).logits, wanted)) < SAME
    others = per_row(lm(batch, [own[n] for n in ("a", "b", "__base__")]).logits, wanted)
    assert min(others) > DIFFERS


# ---- the laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_cached_is_uncached(name):
    lm, edits = lm_of(name), list(several(lm_of(name)).values())
    batch = pad([PROMPTS[i % 3] for i in range(len(edits))])
    answers, cached = generated(lm, batch, edits)
    one = in_one_pass(lm, batch, answers, edits)
    assert max(per_row(cached, one)) < SAME
    assert max(per_row(cached, token_by_token(lm, batch, answers, edits))) < SAME
    late = [e and replace(e, place=e.place.at(tokens="answer[1:]")) for e in edits[:3]]
    wrong = in_one_pass(lm, batch, answers, [*late, *edits[3:]])
    assert min(per_row(wrong[:3], one[:3])) > DIFFERS


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_rows_are_single_runs(name):
    lm, edits = lm_of(name), list(several(lm_of(name)).values())
    batch = answered([PROMPTS[i % 3] for i in range(len(edits))], 2)
    together, rolled = lm(batch, edits).logits, lm(batch, [*edits[1:], edits[0]]).logits
    for i, edit in enumerate(edits):
        single = lm(alone(batch, i), edit).logits[0]
        assert error(real(together, batch, i), single) < SAME
        assert error(real(rolled, batch, i), single) > DIFFERS


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_nothing_is_the_plain_model_to_the_bit(name):
    batch, (_, plain), lm = answered(), untouched(name), lm_of(name)
    a = adapter(lm)
    for edits in (0 * a, [None, 0 * a, None], 0.0 * (a + tt.Add("resid@1", noise(1, D)))):
        assert torch.equal(lm(batch, edits).logits, plain)
    found = lm(batch, [a, None, 0 * a]).logits
    assert error(found[0], plain[0]) > DIFFERS and error(found[1:], plain[1:]) < 1e-6
    if name in FEW:  # where no router groups the tokens of all rows
        assert torch.equal(found[1:], plain[1:])
    assert torch.equal(plain_forward(lm.model, batch), plain)
    assert torch.equal(lm(batch).logits, plain)
    assert not torch.equal(lm(batch, 1e-3 * a).logits, plain)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_other_tokens_stay_to_the_bit(name):
    """Before the first adapted token nothing changes; after it everything does."""
    lm, batch = lm_of(name), answered(PROMPTS[:1])
    plain, found = lm(batch).logits[0], lm(batch, adapter(lm, [3])).logits[0]
    assert torch.equal(found[:3], plain[:3])
    assert min(per_row(found[3:], plain[3:])) > SAME


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_arithmetic(name):
    lm, batch = lm_of(name), answered()
    a, b = adapter(lm), adapter(lm, rank=2, seed=1, layers=[0, 2])
    whole = batch.mask.bool()
    joined = {  # both parts side by side are one adapter of a rank of both
        n: Low(torch.cat([low.down, other.down]), torch.cat([low.up, 3 * other.up], 1), low.scale)
        if (other := b.modules.get(n))
        else low
        for n, low in a.modules.items()
    }
    wanted = lm(batch, replace(a, modules=joined)).logits[whole]
    assert error(lm(batch, a + 3 * b).logits[whole], wanted) < SAME
    assert error(lm(batch, 3 * b + a).logits[whole], wanted) < SAME
    assert error(lm(batch, a + b).logits[whole], wanted) > DIFFERS
    assert error(lm(batch, 0.5 * a + a / 2).logits, lm(batch, a).logits) < SAME
    assert error(lm(batch, a - a).logits, lm(batch).logits) < SAME
    assert error(lm(batch, -a).logits, lm(batch, a).logits) > DIFFERS


@torch.no_grad()
def test_layers_of_the_place_are_those_that_take_part():
    lm, batch = lm_of("llama"), answered()
    a = adapter(lm)
    some = replace(a, modules={n: m for n, m in a.modules.items() if block_of(n) in (1, 2)})
    found = lm(batch, replace(a, place="resid@1:3 all")).logits
    assert torch.equal(found, lm(batch, some).logits)
    assert error(found, lm(batch, a).logits) > DIFFERS
    assert "3 tokens: '" in text_lm().explain("Hi", replace(a, place="resid@1:3 prompt[:3]"))


@torch.no_grad()
def test_many_rows_share_their_matrices():
    """Strengths of one adapter cost no copies of it; different adapters stand side by side."""
    from trimtab.merge import merge

    lm, a = lm_of("llama"), adapter(lm_of("llama"))
    (shared,) = merge([0.1 * (i + 1) * a for i in range(8)], [4] * 8, [9] * 8, L, D)
    assert {b.down.shape[0] for b in shared.modules.values()} == {3}
    (apart,) = merge([adapter(lm, seed=i) for i in range(8)], [4] * 8, [9] * 8, L, D)
    assert {b.down.shape[0] for b in apart.modules.values()} == {24}


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_recordings(name):
    """They share no prefix that was computed without the adapter, or with another row's."""
    lm = lm_of(name)
    edits = list(several(lm).values())
    rows = [[*PROMPTS[0][:3], *PROMPTS[i % 3]] for i in range(len(edits))]
    batch = answered(rows, 2)
    places = ["resid@all", "attn@2 prompt", "mlp@1 answer"]
    recording = lm.record(batch, places, show_progress=False, edits=edits)
    run, plain = lm(batch, edits, record=places).recording, lm(batch, record=places).recording
    for place in places:
        assert max(per_row(recording[place].rows(), run[place].rows())) < SAME
        assert max(per_row(recording[place].rows(), plain[place].rows())) > DIFFERS
    one = lm.record(batch, "resid@3", show_progress=False, edits=edits[0])
    wanted = lm(batch, edits[0], record="resid@3").recording
    assert max(per_row(one.rows(), wanted.rows())) < SAME
    without = lm(batch, record="resid@3").recording.rows()
    assert min(per_row(one.rows(), without)) > DIFFERS


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_edits_at_a_module_see_what_the_adapter_made_of_it(name):
    """Where a site is itself a linear module (BLOOM's attention), the adapter is part of it."""
    lm, batch = lm_of(name), answered()
    a, u = adapter(lm), noise(1, D)
    for site in ("attn", "mlp", "resid"):
        run = lm(batch, a + tt.Project(Place(site, 1), u), record=f"{site}@1")
        left = torch.cat(run.recording.rows())[:, 0] @ u[0]
        assert float(left.abs().max()) < 1e-5
        after = lm(batch, tt.Project(Place(site, 1), u) + a, record=f"{site}@1")  # the same
        assert torch.equal(after.logits, run.logits)


@pytest.mark.parametrize("name", FEW)
def test_gradients(name):
    """With respect to the matrices, and of an edit below through them: finite differences."""
    lm, batch = tt.LM(model_zoo.tiny(name).double()), answered([PROMPTS[0], PROMPTS[0][::-1]])
    base = {n: Low(m.down.double(), m.up.double(), m.scale) for n, m in matrices(lm).items()}
    key = [n for n in base if block_of(n) == 2][1]
    downs, ups, delta = base[key].down, base[key].up, noise(1, D).double()
    other = adapter(lm, rank=2, seed=1)

    def run(down, up, delta, several):
        edit = tt.Adapter("resid@all answer", base | {key: Low(down, up, 1.5)})
        edit = tt.Add("resid@1", delta) + edit
        logits = lm(batch, [edit, other] if several else edit).logits.double()
        return (logits.log_softmax(-1)[..., 7] * noise(*batch.ids.shape, seed=8).double()).sum()

    for many in (False, True):
        start = [t.clone().requires_grad_() for t in (downs, ups, delta)]
        grads = torch.autograd.grad(run(*start, many), start)
        for i, (value, grad) in enumerate(zip(start, grads, strict=True)):
            way, ends = noise(*value.shape, seed=4).double(), []
            for sign in (1, -1):
                moved = [t.detach() for t in start]
                moved[i] = moved[i] + sign * 1e-3 * way
                with torch.no_grad():
                    ends.append(run(*moved, many))
            slope = float(ends[0] - ends[1]) / 2e-3
            assert float((grad * way).sum()) == pytest.approx(slope, rel=2e-2)
            assert abs(slope) > 1e-4
        assert all(p.grad is None for p in lm.model.parameters())


def test_scores_and_their_gradient():
    lm, prompts, answers = text_lm(), ["Hello", "Why not"], ["Yes.", "I do."]
    up = {n: m.up.clone().requires_grad_() for n, m in matrices(lm).items()}
    edit = tt.Adapter("resid@all", {n: Low(m.down, up[n]) for n, m in matrices(lm).items()})
    scores = lm.score(prompts, answers, [edit, None])
    plain = lm.score(prompts, answers)
    assert scores.requires_grad and not plain.requires_grad
    assert torch.equal(scores[1], plain[1]) and abs(float(scores[0].detach() - plain[0])) > DIFFERS
    scores[0].backward()
    assert all(u.grad.abs().sum() > 0 for u in up.values())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    lm, batch = fresh(name), answered()
    base = matrices(lm)

    def gradients(backward):
        ups = {n: m.up.clone().requires_grad_() for n, m in base.items()}
        own = tt.Adapter("resid@all prompt", {n: replace(m, up=ups[n]) for n, m in base.items()})
        run = lm(batch, [own, None, 0.5 * own])
        backward(run, loss_of(run.logits, batch))
        return [u.grad for u in ups.values()]

    wanted = gradients(lambda run, loss: loss.backward())
    lm.model.train()
    lm.model.gradient_checkpointing_enable()
    assert max(map(error, gradients(lambda run, loss: run.backward(loss)), wanted)) < SAME
    assert lm.taps.call is None
    with pytest.raises(CheckpointError):
        gradients(lambda run, loss: loss.backward())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_dtypes(dtype):
    lm = tt.LM(model_zoo.tiny("llama").to(dtype))
    batch, edit = answered(PROMPTS[:1]), adapter(lm)
    run, plain = lm(batch, edit, record="resid@1"), lm(batch).logits
    assert run.logits.dtype == run.recording.rows()[0].dtype == dtype
    close = lm_of("llama")(batch, edit).logits
    assert error(run.logits, close) < (SAME if dtype == torch.float64 else 0.3)
    assert error(run.logits, close) < error(plain, close) / 2
    assert torch.equal(lm(batch, [0 * edit]).logits, plain)


# ---- other ways to run ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_beams_and_copies_share_their_rows_adapter(name):
    lm, batch = lm_of(name), pad(PROMPTS)
    kinds = several(lm)
    edits = [kinds["sum"], None, kinds["prompt"]]
    for options in ({"num_beams": 3}, {}):
        options |= {"max_new_tokens": 5}
        together = lm.generate_ids(batch, edits, **options)
        singles = [lm.generate_ids(alone(batch, i), e, **options)[0] for i, e in enumerate(edits)]
        assert together == singles
        assert together != lm.generate_ids(batch, [*edits[1:], edits[0]], **options)
    copies = lm.generate_ids(batch, edits, num_return_sequences=2, max_new_tokens=5)
    assert copies == [row for row in together for _ in range(2)]


@torch.no_grad()
def test_streams_take_turns():
    lm = text_lm()
    edits = [adapter(lm), None, adapter(lm, "answer", seed=1)]
    apart = [list(lm.stream("Are you happy?", e, max_new_tokens=6)) for e in edits]
    streams = [lm.stream("Are you happy?", e, max_new_tokens=6) for e in edits]
    found = [[], [], []]
    for _ in range(6):
        for pieces, stream in zip(found, streams, strict=True):
            pieces += [piece] if (piece := next(stream, None)) is not None else []
    assert found == apart and len(set(map(str, apart))) == 3
    assert "".join(apart[0]) == lm.generate("Are you happy?", edits[0], max_new_tokens=6)


@torch.no_grad()
def test_rows_that_end_leave_the_others_alone():
    lm, batch = fresh("llama"), pad(PROMPTS)
    kinds = several(lm)
    edits = [None, kinds["sum"], kinds["when"]]
    rows, _ = generated(lm, batch, edits, 12)
    lm.model.generation_config.eos_token_id = int(rows[0, 1])
    ended = lm.generate_ids(batch, edits, max_new_tokens=12)
    (end,) = lm.end_ids
    assert ended == [row[: [*row, end].index(end)] for row in rows.tolist()]
    assert len(ended[0]) < 2


@torch.no_grad()
def test_a_compiled_lm_runs_adapters_uncompiled():
    """Those that end with the prompt run compiled, as other edits do."""
    lm, plain = tt.LM(model_zoo.tiny("llama")), lm_of("llama")
    lm.compile(backend="eager")
    batch = pad(PROMPTS)
    for tokens in ("all", "prompt"):
        edit = adapter(lm, tokens)
        found = lm.generate_ids(batch, edit, max_new_tokens=4)
        assert found == plain.generate_ids(batch, edit, max_new_tokens=4)
        assert found != lm.generate_ids(batch, max_new_tokens=4)
    assert lm.generate_ids(batch, max_new_tokens=4) == plain.generate_ids(batch, max_new_tokens=4)


@torch.no_grad()
def test_a_model_that_was_compiled_is_refused():
    """A hook put on later would be ignored there, without a word."""
    for compiled in ("inside", "around"):
        model = model_zoo.tiny("llama")
        if compiled == "inside":
            model.compile(backend="eager")
        around = compiled == "around"
        lm = tt.LM(torch.compile(model, backend="eager") if around else model)
        edit = adapter(lm)
        assert "model.layers.0.mlp.up_proj" in edit.modules
        with pytest.raises(tt.PlaceError, match=r"was compiled.*lm.compile\(\)"):
            lm(answered(), edit)
        with pytest.raises(tt.PlaceError, match="was compiled"):
            lm.record(answered(), "resid@0", edits=edit)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_beside_an_adapter_that_peft_has_put_in():
    model, batch = peft_model("llama"), answered()
    lm = tt.LM(model)
    edit = adapter(lm_of("llama"))
    assert lm.anatomy.linear_sizes() == lm_of("llama").anatomy.linear_sizes()
    found, plain = lm(batch, edit).logits, lm(batch).logits
    whole = batch.mask.bool()
    both = model.merge_and_unload()
    wanted = plain_forward(merged(tt.LM(both), edit), batch)[whole]
    assert error(found[whole], wanted) < SAME < DIFFERS < error(plain[whole], wanted)


# ---- nothing is left behind ----------------------------------------------------------------------


def hooks(lm):
    return sum(len(m._forward_hooks) for m in lm.model.modules())


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_nothing_is_left_after_an_exception(name):
    lm, batch, (_, plain), before = lm_of(name), answered(), untouched(name), hooks(lm_of(name))
    a, failing = adapter(lm), Failing("mlp@2", noise(1, D))
    missing = replace(a, modules=a.modules | {f"{lm.anatomy.prefix}.1.nose": Low(*noise(2, 3, 3))})
    late = tt.When(readout(layers=(3,)), 0.5, a)
    attempts = [
        (Fault, lambda: lm(batch, a + failing)),
        (Fault, lambda: lm.generate_ids(batch, [None, a + failing, a], max_new_tokens=3)),
        (Fault, lambda: lm.generate_ids(batch, a + failing, max_new_tokens=3, num_beams=2)),
        (Fault, lambda: lm.record(batch, "resid@3", edits=a + failing, show_progress=False)),
        (tt.PlaceError, lambda: lm(batch, late)),
        (tt.PlaceError, lambda: lm(batch, missing)),
    ]
    for kind, attempt in attempts:
        with pytest.raises(kind):
            attempt()
        assert lm.taps.call is None and hooks(lm) == before
        assert torch.equal(plain_forward(lm.model, batch), plain)
        assert torch.equal(in_thread(lambda: lm(batch).logits), plain)
    assert not torch.equal(lm(batch, a).logits, plain)
    assert hooks(lm) == before


@torch.no_grad()
def test_another_thread_does_not_wear_it():
    model, batch = model_zoo.tiny("llama"), answered()
    lm, strict, found = tt.LM(model), tt.LM(model, busy="raise"), {}
    plain, a = lm(batch).logits, adapter(lm)

    def meanwhile():
        found["hooks"] = hooks(lm)
        found["bare"] = in_thread(lambda: plain_forward(model, batch))
        found["refused"] = in_thread(lambda: strict(batch, a))
        copied = copy.deepcopy(model)
        found["copy"] = plain_forward(copied, batch)

    calling = Calling("resid@0", noise(1, D))
    object.__setattr__(calling, "then", meanwhile)
    before = hooks(lm)
    edited = lm(batch, a + calling).logits
    assert found["hooks"] == before + len(a.modules)  # it was worn at that moment
    assert torch.equal(found["bare"], plain) and isinstance(found["refused"], tt.BusyError)
    assert torch.equal(found["copy"], plain)
    assert torch.equal(edited, lm(batch, a + tt.Add("resid@0", noise(1, D))).logits)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_a_models_own_tensors_are_not_written_into(name):
    """What modules were given stays, and others' hooks see the adapted output, which stays too."""
    kept, model = [], model_zoo.tiny(name)

    def keep(module, args, out):
        kept.extend((t, t.clone()) for t in (args[0], out))

    for part in tt.LM(model).anatomy.linear_sizes():
        model.get_submodule(part).register_forward_hook(keep)
    lm, batch = tt.LM(model), answered()
    lm(batch, adapter(lm))
    assert len(kept) >= 8 * L and all(torch.equal(t, clone) for t, clone in kept)

    def spoil(module, args, out):
        args[0].add_(1)

    kept.clear()
    part = list(lm.anatomy.linear_sizes([1]))[-1]
    with hooked(model.get_submodule(part), spoil):
        lm(batch)
    assert not all(torch.equal(t, clone) for t, clone in kept)


# ---- files ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_is_the_same(tmp_path):
    lm, batch = lm_of("llama"), answered()
    for i, (name, edit) in enumerate(several(lm).items()):
        if edit is not None:
            edit.named(name).save(tmp_path / str(i))
            loaded = tt.load(tmp_path / str(i))
            assert loaded.meta.name == name
            assert [str(p.place) for p in loaded.parts()] == [str(p.place) for p in edit.parts()]
            assert torch.equal(lm(batch, loaded).logits, lm(batch, edit).logits)
            assert error(lm(batch, -loaded).logits, lm(batch, edit).logits) > SAME


def test_an_adapter_of_another_model_is_refused():
    lm, other = lm_of("llama"), tt.LM(model_zoo.tiny("llama", seed=1))
    edit = replace(adapter(lm), meta=tt.Meta("theirs", other.describe()))
    with pytest.raises(tt.ArtifactError, match="theirs was made for another model"):
        lm(answered(), [None, edit, None])
    with pytest.raises(tt.PlaceError, match="no linear module 'model.*it has transformer.h.0"):
        lm_of("gpt2")(answered(), adapter(lm))
    broad = tt.LM(model_zoo.ARCHITECTURES["llama"](hidden_size=64))
    with pytest.raises(tt.PlaceError, match="32 inputs to 32 outputs at .*64 to 64"):
        broad(answered(), adapter(lm))
    with pytest.raises(tt.PlaceError, match="no linear module"):
        text_lm().explain("Hi", adapter(lm_of("gpt2")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "not 'LORA' with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "with a bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["lm_head", "q_proj"]}, "'base_model.model.lm_head.base_layer"),
        ({"target_modules": ["embed_tokens"]}, "no part of a plain LoRA beside linear modules"),
    ],
)
def test_what_is_no_plain_lora_is_refused(options, told, tmp_path):
    peft_model("llama", **options).save_pretrained(tmp_path)
    with pytest.raises(tt.TrimtabError, match=told):
        tt.load(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_broken_peft_folders(tmp_path):
    good = adapter(lm_of("llama"))
    good.save_peft(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for changes, told in (
        ({"peft_type": "IA3"}, "not 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),
        ({"lora_alpha": "much"}, "could not convert"),
        ({"alpha_pattern": {"(": 3}}, "unterminated|missing"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(tt.ArtifactError, match=told):
            tt.load(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    with pytest.raises(tt.ArtifactError, match="holds no settings"):
        tt.load(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(tt.ArtifactError, match="pickle, which is never read"):
        tt.load(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(tt.ArtifactError, match="exists and is not a folder with adapter_config"):
        good.save_peft(tmp_path / "b")
    with pytest.raises(tt.PlaceError, match="at all tokens, not at 'resid@all prompt'"):
        replace(good, place="resid@all prompt").save_peft(tmp_path / "c")
    assert not (tmp_path / "c").exists()


A, B = torch.ones(2, 4), torch.ones(6, 2)
MODULE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: tt.Adapter("mlp@1", {MODULE: (A, B)}), "its place is at resid, not"),
        (lambda: tt.Adapter("resid@1", {}), "mapping from module names"),
        (lambda: tt.Adapter("resid@1", [(A, B)]), "mapping from module names"),
        (lambda: tt.Adapter("resid@1", {MODULE: A}), r"takes \(down, up\) or a Low, not a tensor"),
        (lambda: tt.Adapter("resid@1", {MODULE: (A, B.T)}), "do not fit together"),
        (lambda: tt.Adapter("resid@1", {MODULE: (A, B.long())}), "floating point"),
        (lambda: tt.Adapter("resid@1", {MODULE: (A, B * torch.inf)}), "NaN or infinite"),
        (lambda: tt.Adapter("resid@1", {MODULE: (A, B, "x")}), "scale is a finite number, not 'x'"),
        (lambda: tt.Adapter("resid@1", {"lm_head": (A, B)}), "'lm_head' lies in no block"),
        (lambda: tt.Adapter("resid@1", {MODULE: (A, B)}, strength=torch.nan), "strength is a fin"),
        (lambda: tt.Adapter("q@1", {MODULE: (A, B)}), "can be read, not written"),
    ],
)
def test_bad_adapters(make, told):
    with pytest.raises(tt.PlaceError, match=told):
        make()


def test_adapters_that_do_not_fit_the_run():
    lm, a = lm_of("llama"), adapter(lm_of("llama"))
    deep = tt.Adapter("resid@all", {"model.layers.7.mlp.up_proj": (A, B)})
    for edits, told in (
        (deep, r"modules in layer 7, but this model has layers 0..3"),
        (replace(deep, place="resid@1"), "modules in layer 7"),
        (replace(a, place="resid@9"), "asks for layer 9"),
        ([a, None], "2 edits for 3 rows"),
        ([a, None, tt.Adapter("resid@1", {MODULE: (A, B)})], "for different models"),
        (replace(a, place="resid@all [[1], [2]]"), "2 rows"),
    ):
        with pytest.raises(tt.PlaceError, match=told):
            lm(answered(), edits)
    some = tt.Adapter("resid@1", matrices(lm, layers=[2]))
    with pytest.raises(tt.PlaceError, match=r"has no module there, only in layers \[2\]"):
        lm(answered(), some)


class Routed(torch.nn.Module):
    """An MLP that gives its expert some of the tokens only."""

    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen = flat[:, 0] > flat[:, 0].median()
        out = torch.zeros_like(flat)
        out[chosen] = self.expert(flat[chosen])
        return out.view_as(x)


@torch.no_grad()
def test_experts_that_a_router_chooses_tokens_for():
    """One adapter for all rows and tokens is what it is; where tokens are chosen it is refused."""
    lm, batch = fresh("llama"), answered()
    lm.anatomy.blocks[1].mlp = Routed(lm.anatomy.blocks[1].mlp)
    lm = tt.LM(lm.model)
    edit = adapter(lm)
    assert "model.layers.1.mlp.expert.up_proj" in edit.modules
    whole = batch.mask.bool()
    wanted = plain_forward(merged(lm, edit), batch)[whole]
    assert error(lm(batch, edit).logits[whole], wanted) < SAME
    for edits in (replace(edit, place="resid@all prompt"), [edit, None, edit]):
        with pytest.raises(tt.PlaceError, match="such as a router chooses"):
            lm(batch, edits)
