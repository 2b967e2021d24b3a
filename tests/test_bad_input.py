"""Bad input: the right kind of error, with the value and a remedy, and a model that is as before.

Every test gets a model whose logits, weights and idle taps are compared to the bit afterwards.
"""

import math
import signal

import pytest
import torch

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab.errors import ArtifactError, BusyError, ChatError, PlaceError, TrimtabError

L, D, CONTEXT = model_zoo.LAYERS, model_zoo.HIDDEN, model_zoo.CONTEXT
PROMPT, TWO = "How are you?", ["How are you?", "Why did the chicken cross the road?"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def add(place="resid@1", rows=(), **options):
    return tt.Add(place, noise(len(tt.Place.parse(place).layer_indices(L)), *rows, D), **options)


def readout(layers="0", width=D, tokens="prompt[-1:]"):
    place = tt.Place("resid", layers, tokens)
    n = len(place.layer_indices(L))
    return tt.Readout(place, noise(n, width), torch.ones(n), torch.zeros(n))


@pytest.fixture(scope="module")
def loaded():
    return tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))


@pytest.fixture
def lm(loaded):
    """The model, and a check that nothing has changed when the test is over."""
    batch = loaded.batch(TWO, ["Fine.", "To see."])
    with torch.no_grad():
        logits = loaded(batch).logits
    weights = {n: p.clone() for n, p in loaded.model.state_dict().items()}
    yield loaded
    assert loaded.taps.call is None
    assert loaded.taps.lock.acquire(blocking=False)
    loaded.taps.lock.release()
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, logits)
        assert not torch.equal(loaded(batch, 4 * add()).logits, logits)  # and edits still work
        assert torch.equal(loaded(batch).logits, logits)
    now = loaded.model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[n], w) for n, w in weights.items())


def ways(lm, edits):
    """Everything that takes edits, on two prompts."""
    return {
        "call": lambda: lm(TWO, edits),
        "generate": lambda: lm.generate(TWO, edits, max_new_tokens=2),
        "beams": lambda: lm.generate(TWO, edits, max_new_tokens=2, num_beams=2),
        "score": lambda: lm.score(TWO, ["Fine.", "To see."], edits),
        "record": lambda: lm.record(TWO, "resid@3", edits=edits, show_progress=False),
    }


WAYS = ("call", "generate", "beams", "score", "record")


# ---- edits that do not fit -----------------------------------------------------------------------

BAD_EDITS = [
    (lambda: add("resid@4"), r"'?resid@4.* asks for layer 4, but this model has layers 0..3"),
    (lambda: tt.Add("resid@4", noise(1, D)), "asks for layer 4, but this model has layers 0..3"),
    (lambda: tt.Add("resid@-5", noise(1, D)), r"asks for layer -5.*\(or -4..-1 from the top\)"),
    (lambda: tt.Add("resid@0:9", noise(9, D)), "layers 0..3"),
    (lambda: tt.Add("resid@1", noise(1, D + 1)), f"width {D + 1}.*width is {D}.*another model"),
    (lambda: tt.Add("resid@1", noise(1, 1)), f"has width 1, but this model's width is {D}; spread"),
    (lambda: tt.Replace("resid@1", noise(1, 2 * D)), f"Replace .*width {2 * D}"),
    (lambda: tt.Project("resid@1", noise(1, 3)), r"Project .*width 3 \(shape \[1, 3\]\)"),
    (
        lambda: tt.Add("resid@0:3", noise(2, D)),
        r"2 layers \(shape \[2, 32\]\).*has 3 in this model",
    ),
    (lambda: tt.Add("resid@0:", noise(3, D)), r"3 layers .*has 4 in this model; give one vector"),
    (lambda: tt.Add("resid@1", torch.ones(1, D, dtype=torch.long)), r"not torch.int64; convert"),
    (lambda: tt.Add("resid@1", torch.ones(1, D, dtype=torch.bool)), r"not torch.bool; convert"),
    (lambda: tt.Add("resid@1", noise(1, D) * math.nan), "32 values that are NaN or infinite"),
    (lambda: tt.Add("resid@1", torch.full((1, D), math.inf)), "32 values that are NaN or infinite"),
    (lambda: 1e39 * add(), "values that are NaN or infinite"),
    (lambda: tt.Add("resid@1", noise(D)), r"shape \[32\]; it must be \[layers, width\]"),
    (lambda: tt.Add("resid@1", noise(1, D).tolist()), "delta is a tensor .*not list"),
    (lambda: tt.Add("resid@1", noise(1, 3, D)), r"for 3 rows|for \[3\] rows"),
    (lambda: tt.Add("resid@1 [[1], [2], [3]]", noise(1, D)), r"for 3 rows|for \[3\] rows"),
    (lambda: [add()], "1 edits for 2 rows; give one edit per row"),
    (lambda: [add(), None, add()], "3 edits for 2 rows; give one edit per row"),
    (lambda: [add(rows=(3,)), None], r"for 3 rows, but it serves one row of a list"),
    (lambda: [tt.Add("resid@1 [[1], [2]]", noise(1, D)), None], r"2 rows"),
    (lambda: "humor", r"not str 'humor'; load a saved one with tt.load"),
    (lambda: noise(1, D), r"not a tensor \[1, 32\]"),
    (lambda: 3, "edits is an Edit, a list with one per row, or None, not int 3"),
    (lambda: {"a": add()}, "not dict"),
    (lambda: [add(), "humor"], r"holds Edits and None, not str 'humor'"),
    (lambda: [[add()], None], r"not list .*join several edits of one row with a \+ b"),
    (lambda: tt.Add("q@1", noise(1, D)), "site 'q' can be read, not written; write to resid, norm"),
    (lambda: tt.Add("k@1", noise(1, D)), "site 'k' can be read"),
    (lambda: tt.Add("v@1", noise(1, D)), "site 'v' can be read"),
    (lambda: tt.Add("heads@1", noise(1, D)), "site 'heads' can be read"),
    (lambda: tt.Add("nose@1", noise(1, D)), "no site 'nose'; a site is one of resid"),
    (lambda: tt.Add("resid", noise(1, D)), r"cannot read the place 'resid'; write site@layers"),
    (lambda: tt.Add("resid@1 prompt before", noise(1, D)), "before"),
    (lambda: tt.When(readout("3"), 0.5, add("resid@1")), r"reads layers \[3\] only after the edit"),
    (lambda: tt.When(readout("0:3"), 0.5, add("resid@1")), r"\[1, 2\]|\[2\] only after the edit"),
    (
        lambda: tt.When(readout("0", D + 3), 0.5, add("resid@1")),
        f"probe .*width {D + 3}.*another mod",
    ),
    (lambda: tt.When(readout("0"), math.nan, add()), "threshold is a finite number, not nan"),
    (lambda: tt.When("joy", 0.5, add()), "When takes a probe or a Readout, not str"),
    (lambda: add() * math.nan, "multiplied by a finite number, not nan"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "told"), BAD_EDITS)
def test_edits_that_do_not_fit(lm, make, told, way):
    with pytest.raises(PlaceError, match=told):
        ways(lm, make())[way]()


@pytest.mark.parametrize("tokens", ["all[-2:]", "answer[-1:]", "answer[:-1]"])
def test_the_end_of_a_growing_text(lm, tokens):
    edit = add(f"resid@1 {tokens}")
    for run in ("generate", "beams"):
        with pytest.raises(PlaceError, match=r"still growing.*answer\[:16\].*prompt\[-1:\]"):
            ways(lm, edit)[run]()
    with pytest.raises(PlaceError, match="still growing"):
        lm.stream(PROMPT, edit)
    lm(TWO, edit)  # a text that is there has an end
    lm.score(TWO, ["Fine.", "To see."], edit)


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_of_another_model(lm, way):
    other = tt.LM(model_zoo.tiny("llama", seed=5))
    meta = tt.Meta("humor", other.describe())
    tied = add(meta=meta)
    told = r"humor was made for another model \(id .*fingerprint .*; this one: id .*\.untied\(\)"
    plain = add()
    for edits in (tied, plain + tied, [None, tied], tt.When(readout("0"), 0.5, tied)):
        with pytest.raises(ArtifactError, match=told):
            ways(lm, edits)[way]()
    for edits in (tied, plain + tied, tt.When(readout("0"), 0.5, tied)):
        ways(lm, edits.untied())[way]()


def test_a_probe_of_another_model(lm):
    class Probe:
        readout = readout("0")
        meta = tt.Meta("joy", tt.LM(model_zoo.tiny("llama", seed=5)).describe())

    with pytest.raises(ArtifactError, match="joy was made for another model"):
        lm.stream(PROMPT, read=Probe())
    with pytest.raises(ArtifactError, match="joy was made for another model"):
        lm(TWO, tt.When(Probe(), 0.5, add().named("joy")))


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_list_of_edits_is_none(lm, way):
    empty, none = ways(lm, [])[way](), ways(lm, None)[way]()
    if way == "call":
        assert torch.equal(empty.logits, none.logits)
    elif way == "record":
        assert all(map(torch.allclose, empty.rows(), none.rows()))
    else:
        assert torch.equal(empty, none) if way == "score" else empty == none


def test_sites_that_an_architecture_lacks():
    olmo = tt.LM(model_zoo.tiny("olmo2"), tokenizers_zoo.byte_tokenizer("chatml"))
    told = r"no site 'norm' in Olmo2DecoderLayer; it has resid, attn, mlp, embed"
    before = olmo(TWO).logits
    for run in (
        *ways(olmo, add("norm@1")).values(),
        lambda: olmo(TWO, record="norm@1"),
        lambda: olmo.record(TWO, "norm@0:", show_progress=False),
        lambda: olmo.stream(PROMPT, add("norm@1")).__next__(),
    ):
        with pytest.raises(PlaceError, match=told):
            run()
    assert torch.equal(olmo(TWO).logits, before)


# ---- places to read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("resid", "cannot read the place 'resid'"),
        ("resid@9", "asks for layer 9, but this model has layers 0..3"),
        ("resid@2:2", "names no layer"),
        ("nose@1", "no site 'nose'"),
        ("resid@1 [[1], [2], [3]]", "positions for 3 rows"),
        (["resid@1", 7], "cannot read the place 7"),
    ],
)
def test_places_that_cannot_be_read(lm, place, told):
    with pytest.raises(PlaceError, match=told):
        lm(TWO, record=place)
    with pytest.raises(PlaceError, match=told):
        lm.record(TWO, place, show_progress=False)
    assert lm(TWO, record="resid@1").recording.width == D


def test_nothing_was_recorded(lm):
    with pytest.raises(PlaceError, match=r"nothing was recorded; name a place: lm\(batch, record="):
        _ = lm(TWO).recording


@pytest.mark.parametrize(
    ("read", "told"),
    [
        ("joy", "read= takes a probe or a Readout, not str"),
        (
            readout("0", D - 1),
            f"width {D - 1}, but what it reads has width {D}; was it made for ano",
        ),
        (
            tt.Readout("resid@0:", noise(2, D), torch.ones(2), torch.zeros(2)),
            "weights for 2 layers",
        ),
        (tt.Readout("resid@9", noise(1, D), torch.ones(1), torch.zeros(1)), "asks for layer 9"),
    ],
)
def test_probes_that_do_not_fit(lm, read, told):
    with pytest.raises(PlaceError, match=told):
        list(lm.stream(PROMPT, read=read, max_new_tokens=2))


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", [""], [PROMPT, ""]])
def test_an_empty_prompt(lm, prompt):
    for run in (lm.batch, lm.generate, lm, lambda p: lm.record(p, "resid@1", show_progress=False)):
        with pytest.raises(ChatError, match="the prompt is an empty string: give it at least one"):
            run(prompt)


def test_no_prompts(lm):
    told = "there are no prompts: give at least one"
    assert lm.generate([]) == []
    for run in (
        lambda: lm.batch([]),
        lambda: lm([]),
        lambda: lm.stream([]),
        lambda: lm.score([], []),
        lambda: lm.record([], "resid@1", show_progress=False),
    ):
        with pytest.raises(ChatError, match=told):
            run()


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (7, "a prompt is text or a list of messages"),
        ([None], "got NoneType None"),
        ([["hello"]], "message 0 is str 'hello'"),
        ([{"role": "user"}], r"message 0 is dict .*role.*content"),
        ([{"content": "hello"}], "each message is"),
        ({"role": "user", "content": "hello"}, "put the message into a list"),
        (b"hello", "text"),
    ],
)
def test_what_is_no_prompt(lm, prompt, told):
    with pytest.raises((ChatError, TypeError), match=told):
        lm.batch(prompt)


def test_a_prompt_beyond_the_context(lm):
    long = " ".join(["the lazy dog"] * 100)
    told = rf"a row has \d+ tokens, but this model takes at most {CONTEXT}; shorten the prompt"
    for run in (
        lambda: lm.generate(long),
        lambda: lm.stream(long),
        lambda: lm([PROMPT, long]),
        lambda: lm.score(PROMPT, long),
        lambda: lm.record([PROMPT, long], "resid@1", show_progress=False),
    ):
        with pytest.raises(ChatError, match=told):
            run()
    full = tt.Batch(torch.full((1, CONTEXT), 9))
    with pytest.raises(ChatError, match=rf"a prompt has {CONTEXT} tokens and leaves no room"):
        lm.generate_ids(full)
    over = tt.Batch(torch.full((1, CONTEXT + 1), 9))
    with pytest.raises(ChatError, match=f"a row has {CONTEXT + 1} tokens"):
        lm(over)
    nearly = tt.Batch(torch.full((1, CONTEXT - 2), 9))
    assert len(lm.generate_ids(nearly, max_new_tokens=50)[0]) <= 2


@pytest.mark.parametrize("answers", [["Fine."], ["a", "b", "c"], "Fine.", []])
def test_answers_of_another_count(lm, answers):
    count = 1 if isinstance(answers, str) else len(answers)
    for run in (lm.batch, lm.score):
        with pytest.raises(ChatError, match=f"{count} answers for 2 prompts; give one for each"):
            run(TWO, answers)


def test_an_empty_answer_has_no_score(lm):
    with pytest.raises(ChatError, match=r"rows \[1\] have an empty answer; a score needs tokens"):
        lm.score(TWO, ["Fine.", ""])


def test_no_tokenizer():
    bare = tt.LM(model_zoo.tiny("llama"))
    batch = tt.Batch(torch.tensor([[5, 6, 7]]))
    before = bare(batch).logits
    for run in (bare.batch, bare.generate, bare.stream, bare):
        with pytest.raises(ChatError, match=r"there is no tokenizer: .*give token ids \(Batch\)"):
            run(PROMPT)
    assert len(bare.generate_ids(batch, max_new_tokens=3)) == 1
    assert torch.equal(bare(batch).logits, before)


def test_no_template():
    """A tokenizer without a template reads plain text; roles without words are refused."""
    plain = tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer(None))
    assert isinstance(plain.generate("How are", max_new_tokens=2), str)
    assert isinstance(plain.generate([{"role": "user", "content": "Hi"}], max_new_tokens=2), str)
    with pytest.raises(ChatError, match=r"roles \['tool'\].*raw=True"):
        plain.batch([{"role": "tool", "content": "7"}])


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (([[1, 2]],), "ids is a tensor"),
        ((torch.tensor([1, 2]),), r"ids has shape \[2\]: it should be \[B, T\]"),
        ((torch.ones(1, 2),), "ids holds torch.float32"),
        ((torch.ones(2, 3).long(), torch.ones(2, 2).long()), r"mask has shape \[2, 2\]"),
        ((torch.ones(2, 3).long(), None, torch.tensor([1])), "prompt_len has 1 rows"),
        (
            (torch.ones(1, 3).long(), None, torch.tensor([4])),
            r"prompt_len \[4\] does not lie within",
        ),
        ((torch.ones(1, 3).long(), None, torch.tensor([-1])), r"prompt_len \[-1\]"),
    ],
)
def test_what_is_no_batch(parts, told):
    with pytest.raises(ChatError, match=told):
        tt.Batch(*parts)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -3])
def test_max_new_tokens(lm, count):
    for run in (lm.generate, lm.stream):
        with pytest.raises(ValueError, match=f"max_new_tokens is 1 or more, not {count}"):
            run(PROMPT, max_new_tokens=count)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, -math.inf])
def test_temperature(lm, temperature):
    for run in (lm.generate, lm.stream):
        with pytest.raises(ValueError, match=r"temperature is 0 \(greedy\) or more, not"):
            run(PROMPT, temperature=temperature)


def test_unknown_options(lm):
    with pytest.raises(TypeError, match="stream takes no num_beams, warmth; generate does"):
        lm.stream(PROMPT, warmth=3, num_beams=2)
    with pytest.raises((TypeError, ValueError), match="warmth"):
        lm.generate(PROMPT, warmth=3)


def test_stream_takes_one_prompt(lm):
    with pytest.raises(ChatError, match="stream takes one prompt, not a list of them"):
        lm.stream(TWO)


@pytest.mark.parametrize("options", [{"top_p": 7.0}, {"top_k": -2}, {"min_p": -1.0}])
def test_sampling_options(lm, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        lm.generate(PROMPT, temperature=1.0, max_new_tokens=2, **options)


def test_what_is_no_model():
    with pytest.raises(
        PlaceError, match="found no list of decoder blocks with attention in Linear"
    ):
        tt.LM(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="busy is 'wait' or 'raise', not 'maybe'"):
        tt.LM(model_zoo.tiny("llama"), busy="maybe")


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_in_a_pass(lm, way):
    def press(module, args):
        signal.raise_signal(signal.SIGINT)

    handle = lm.anatomy.blocks[2].register_forward_pre_hook(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            ways(lm, add())[way]()
    finally:
        handle.remove()


def test_a_stream_that_is_left(lm):
    stream = lm.stream(PROMPT, add(), max_new_tokens=8)
    next(stream)
    stream.close()
    with pytest.raises(KeyboardInterrupt):
        for _ in lm.stream(PROMPT, add(), max_new_tokens=8):
            raise KeyboardInterrupt


def test_a_run_inside_a_run(lm):
    def again(module, args):
        lm(TWO)

    handle = lm.anatomy.blocks[2].register_forward_pre_hook(again)
    try:
        with pytest.raises(BusyError, match="in the middle of a run of the same model"):
            lm(TWO, add())
    finally:
        handle.remove()


# ---- the kinds -----------------------------------------------------------------------------------


def test_every_kind_is_a_trimtab_error():
    for kind, builtin in [
        (PlaceError, ValueError),
        (ArtifactError, ValueError),
        (ChatError, ValueError),
        (BusyError, RuntimeError),
    ]:
        assert issubclass(kind, TrimtabError) and issubclass(kind, builtin)
