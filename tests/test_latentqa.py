"""Reading, training and steering with a decoder: exact against independent computations."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch.nn.functional import cross_entropy

import trimtab as tt
from model_zoo import tiny
from tokenizers_zoo import byte_tokenizer
from trimtab import artifact
from trimtab.errors import ArtifactError, ChatError, PlaceError, TrimtabError
from trimtab.latentqa import (
    Item,
    Lora,
    Reader,
    Wiring,
    choices,
    evaluate,
    harvest_items,
    linear_choices,
    steer,
    train,
)
from trimtab.latentqa.reader import Shown, record
from trimtab.place import Place

steering = import_module("trimtab.latentqa.steer")
reader_module = import_module("trimtab.latentqa.reader")
lora_module = import_module("trimtab.latentqa.lora")

QA = (("Who is it?", "A small dog."), ("Why?", "Because it is."))
ITEMS = [
    Item("a", control_user="Tell me a story about a ship.", qa=QA),
    Item("b", system="Be a fox.", stimulus_user="What is the capital?", qa=QA[:1]),
    Item("c", control_user="Hi", control_model="Yes", stimulus_user="Why not", qa=QA[1:]),
]


def make(name="llama", *, double=False, seed=0):
    model = tiny(name, seed=seed)
    return tt.LM(model.double() if double else model, byte_tokenizer("chatml"))


def worn(lm, write="replace", layer=2, **wiring):
    """A reader with an adapter that does something."""
    lora = Lora.of(lm, rank=4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for up in lora.up:
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))
    return Reader(lm, lora, Wiring((layer,), write=write, **wiring))


def adapted(lm, lora):
    """An independent adapted model: the same matrices merged into a copy's weights."""
    other = tiny("llama")
    other.load_state_dict(lm.model.state_dict())
    modules = dict(other.named_modules())
    with torch.no_grad():
        for name, down, up, scale in zip(lora.names, lora.down, lora.up, lora.scaling, strict=True):
            modules[name].weight += scale * up @ down
    return other


def written_loss(model, lm, row, shown, at, write):
    """The plain forward pass of Hugging Face with a hook of our own, all logits, no padding."""

    def hook(module, args, output):
        x = (output if torch.is_tensor(output) else output[0]).clone()
        old, v = x[0, at : at + len(shown)], shown
        if write == "add":
            v = old + old.norm(dim=-1, keepdim=True) * v / v.norm(dim=-1, keepdim=True)
        x[0, at : at + len(shown)] = v
        return x

    handle = model.model.layers[0].register_forward_hook(hook)
    try:
        logits = model(torch.tensor([row.ids])).logits[0]
    finally:
        handle.remove()
    return cross_entropy(logits[row.answer - 1 : -1], torch.tensor(row.labels), reduction="sum")


# -- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["replace", "add"])
def test_the_loss_is_that_of_a_plain_pass_with_a_merged_adapter(write):
    lm = make()
    reader = worn(lm, write)
    rows, shown = reader.pairs(ITEMS)
    with torch.no_grad():
        sums, counts = reader.losses(rows, shown)
        other = adapted(lm, reader.lora)
        each = [
            written_loss(other, lm, row, s.values, row.start, write)
            for row, s in zip(rows, shown, strict=True)
        ]
        shifted = written_loss(other, lm, rows[0], shown[0].values, rows[0].start + 1, write)
    assert counts.tolist() == [len(row.labels) for row in rows]
    assert torch.allclose(sums, torch.stack(each), rtol=1e-4)
    assert not torch.allclose(sums[0], shifted, rtol=1e-3)  # one placeholder off is seen
    assert torch.allclose(reader.loss(ITEMS).detach(), sums.sum() / counts.sum())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # GPT-2's linear maps give views
def test_an_adapters_gradients_are_those_of_matrices_that_are_added(name, bf16):
    lm = make(name)
    batch = tt.Batch(torch.arange(3, 43).reshape(2, 20))
    found = {}
    for form in ("hooks", "plain"):
        lora = worn(lm).lora
        with ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bf16))
            if form == "hooks":
                stack.enter_context(lora.on(lm))
            for key, module in dict(lm.model.named_modules()).items() if form == "plain" else ():
                if key in lora.names:
                    i = lora.names.index(key)
                    down, up, scale = lora.down[i], lora.up[i], lora.scaling[i]
                    hook = lambda _, args, out, a=down, b=up, s=scale: out + s * args[0] @ a.T @ b.T  # noqa: E731
                    stack.callback(module.register_forward_hook(hook).remove)
            logits = lm.forward(batch.ids, None, batch.positions, use_cache=False).logits
            logits.float().logsumexp(-1).sum().backward()
        lm.model.zero_grad()
        found[form] = torch.cat([p.grad.flatten() for p in lora.parameters()])
    near = torch.nn.functional.cosine_similarity(found["hooks"], found["plain"], 0)
    assert near > (0.95 if bf16 else 1 - 1e-6)
    assert abs(found["hooks"].norm() / found["plain"].norm() - 1) < (0.05 if bf16 else 1e-5)
    flipped = found["hooks"].flip(0)
    assert torch.nn.functional.cosine_similarity(flipped, found["plain"], 0) < 0.9, "control"


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.001, 0.9999])
def test_dropout_keeps_the_share_that_it_says(rate):
    torch.manual_seed(0)
    x = torch.ones(7, 211, 333, requires_grad=True)
    found, kept = lora_module.dropped(x, rate)
    drawn = found.detach()
    assert set(found.unique().tolist()) == {0.0, 1.0}
    spread = (kept * (1 - kept) / x.numel()) ** 0.5
    assert abs(float(drawn.mean()) - kept) < 5 * spread
    assert abs(kept - (1 - rate)) <= 1 / 256
    other, _ = lora_module.dropped(x, rate)
    same = float((drawn == other).float().mean())  # two draws agree as often as chance has it
    assert abs(same - kept**2 - (1 - kept) ** 2) < 20 * spread
    neighbours = float((drawn[..., 1:] * drawn[..., :-1]).mean())
    assert abs(neighbours - kept**2) < 20 * spread
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(slope, found)


@pytest.mark.parametrize("write", ["replace", "add"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gptj", "opt", "olmo2", "mixtral", "qwen3_moe"]
)
def test_tokens_whose_mlp_is_left_out_change_nothing(name, write, monkeypatch):
    lm = make(name)
    reader = worn(lm, write)
    rows, shown = reader.pairs(ITEMS)
    shown[-1] = None  # its placeholders stay what they are
    found, run = {}, []
    own = reader_module.only
    spy = lambda module, where: run.append(len(where)) or own(module, where)  # noqa: E731
    wrong = lambda module, where: own(module, where[:-1])  # noqa: E731
    for form in (spy, lambda *_: nullcontext(), wrong):
        monkeypatch.setattr(reader_module, "only", form)
        for parameter in reader.lora.parameters():
            parameter.grad = None
        sums, _ = reader.losses(rows, shown)
        sums.sum().backward()
        grads = [p.grad.flatten() for p in reader.lora.parameters() if p.grad is not None]
        found[len(found)] = sums.detach(), torch.cat(grads)
    few, all_, wrong_ = found.values()
    assert torch.allclose(few[0], all_[0], rtol=1e-4)
    assert (few[1] - all_[1]).norm() < 1e-4 * all_[1].norm()
    assert len(run) == (2 if write == "replace" else 1) and min(run) == sum(
        len(row.labels) for row in rows
    )
    if name != "opt":  # it flattens its tokens
        assert not torch.allclose(wrong_[0], all_[0], rtol=1e-4), "control: one label too few"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_decoder_gets_the_recorded_activations_bit_by_bit(name):
    lm = make(name)
    reader = worn(lm)
    given = reader._seen(ITEMS[1])
    kept = record(lm, [given], [2])[0][:, 0]
    shown = reader.show([ITEMS[1]])[0]
    assert torch.equal(shown.values, kept) and shown.first == given.start
    row = reader.dialogue.row(len(kept), *QA[0])
    batch = tt.Batch(torch.tensor([row.ids]))
    place = Place("resid", 0, range(row.start, row.start + row.slots))
    seen = lm(batch, edits=[reader.edit(row, shown)], record=[place, place.at(before=True)])
    assert torch.equal(seen.recording[place][0][:, 0], kept)
    assert not torch.equal(seen.recording[place.at(before=True)][0][:, 0], kept)
    with pytest.raises(PlaceError, match="placeholders"):
        reader.edit(row, Shown(kept[1:]))


def test_rows_about_the_same_activations_share_their_tokens(monkeypatch):
    lm = make()
    reader = worn(lm)
    rows, shown = reader.pairs(ITEMS[:1] * 2)
    trees = {}
    for flag in (True, False):
        monkeypatch.setattr(lm, "takes_trees", lambda flag=flag: flag)
        sums, _ = reader.losses(rows, shown)
        reader.lora.zero_grad()
        sums.sum().backward()
        trees[flag] = sums.detach(), torch.cat([p.grad.flatten() for p in reader.lora.parameters()])
    assert torch.allclose(trees[True][0], trees[False][0], rtol=1e-5)
    assert float((trees[True][1] - trees[False][1]).norm()) < 1e-5 * float(trees[True][1].norm())
    assert lm.__class__.takes_trees(lm)  # this model does take them


def test_a_batch_is_its_rows_alone():
    reader = worn(make())
    rows, shown = reader.pairs(ITEMS)
    with torch.no_grad():
        sums, _ = reader.losses(rows, shown)
        alone = [reader.losses([r], [s])[0][0] for r, s in zip(rows, shown, strict=True)]
    assert torch.allclose(sums, torch.stack(alone), rtol=1e-5)


def test_positions_matter_where_they_are_learned():
    """GPT-2 has learned positions; under rotary ones a shift of all changes nothing."""
    for name, matters in (("gpt2", True), ("llama", False)):
        lm = make(name)
        item = replace(ITEMS[1], system="Be a fox. " * 6)
        aligned, not_ = (worn(lm, align=flag).loss([item]).detach() for flag in (True, False))
        assert torch.allclose(aligned, not_, rtol=1e-4) != matters
    (row,), (shown,) = (part[:1] for part in worn(make("gpt2")).pairs([item]))
    shift = worn(make("gpt2"))._shifts([row], [shown])
    assert row.start + int(shift) == shown.first == len(reader_ids(item)) - row.slots


def reader_ids(item):
    return worn(make("gpt2"))._seen(item).ids


def test_the_model_is_left_as_it_was(monkeypatch):
    lm = make()
    reader, batch = worn(lm), lm.batch(["Hello"])
    flags = [p.requires_grad for p in lm.model.parameters()]
    hooks = sum(len(m._forward_hooks) for m in lm.model.modules())
    base = lm(batch).logits.detach()
    with reader.worn():
        assert not torch.equal(lm(batch).logits, base)  # it does do something
    reader.loss(ITEMS).backward()
    reader.ask("Hello", ["Who?"], max_new_tokens=3)
    with pytest.raises(ZeroDivisionError), reader.worn():
        raise ZeroDivisionError
    monkeypatch.setattr(lm, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.loss(ITEMS, view="none")
    monkeypatch.undo()
    assert torch.equal(lm(batch).logits, base)
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(p.grad is None for p in lm.model.parameters())
    assert sum(len(m._forward_hooks) for m in lm.model.modules()) == hooks


def test_views_differ_as_they_should():
    reader = worn(make())
    loss = {
        v: float(reader.loss(ITEMS, view=v).detach())
        for v in ("real", "none", "shuffled", "text", "words")
    }
    assert len({round(v, 4) for v in loss.values()}) == 5
    with pytest.raises(ChatError, match="none of the items has a question"):
        reader.loss([replace(ITEMS[0], qa=())])


# -- asking ----------------------------------------------------------------------------------------


def slow_answer(reader, shown, question, room):
    """Greedy decoding without a cache: the likeliest next token, again and again."""
    ids, row = [], reader.dialogue.row(len(shown.values), question)
    for _ in range(room):
        grown = row._replace(ids=row.ids + ids)
        batch = tt.Batch(torch.tensor([grown.ids]))
        with reader.worn(), torch.no_grad():
            logits = reader.lm(batch, edits=[reader.edit(grown, shown)]).logits[0, -1]
        ids.append(int(logits.argmax()))
        if reader.dialogue.stops(ids):
            break
    return reader._text(ids)


@pytest.mark.parametrize("write", ["replace", "add"])
def test_asking_many_is_asking_each(write):
    reader = worn(make(), write)
    questions = ["Who?", "Why is it so?", "Who?"]
    prompts = ["Hello there", "What is the capital of France?"]
    answers = reader.ask(prompts, questions, max_new_tokens=6)
    for prompt, own in zip(prompts, answers, strict=True):
        shown = reader.show([prompt])[0]
        assert own == [slow_answer(reader, shown, q, 6) for q in questions]
        assert own == reader.ask(prompt, questions, max_new_tokens=6)
        assert own[:1] == reader.ask(prompt, "Who?", max_new_tokens=6)
    assert answers[0] != answers[1]  # what is written does matter


def test_a_stream_is_the_answer_in_pieces():
    lm = make()
    reader = worn(lm)
    base = lm.generate("Hello", max_new_tokens=3)
    pieces = []
    for piece in reader.stream("Hello there", "Who?", max_new_tokens=8):
        pieces.append(piece)
        assert lm.generate("Hello", max_new_tokens=3) == base  # the adapter is off in between
    whole = reader.ask("Hello there", "Who?", max_new_tokens=8)[0]
    assert len(pieces) > 1 and whole.startswith("".join(pieces))
    with pytest.raises(ChatError, match="one target"):
        reader.stream(["Hello", "there"], "Who?")


def test_what_can_be_asked_about():
    lm = make()
    reader = worn(lm)
    ask = {"questions": ["Who?"], "max_new_tokens": 4}
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes, I am"}]
    assert reader.ask(("Hello", "Yes, I am"), **ask) == reader.ask(turns, **ask)
    found = record(lm, [reader._seen("Hello")], [1, 2])
    assert reader.ask(found, **ask) == reader.ask("Hello", **ask)
    assert reader.ask(found["resid@1 answer"], **ask) == reader.ask("Hello", layer=1, **ask)
    assert reader.ask_layers("Hello", layers=[1, 2], **ask)[2] == reader.ask("Hello", **ask)
    with pytest.raises(PlaceError, match="another of its layers"):
        reader.ask(found, layer=0, **ask)
    with pytest.raises(ChatError, match="takes a question"):
        reader.ask("Hello", [])


def test_dicts_are_items_or_messages():
    lm = make()
    reader = worn(lm)
    ask = {"questions": ["Who?"], "max_new_tokens": 4}
    dicts = [{"label": "b", "system": "Be a fox.", "stimulus_user": "What is it?"}]
    dicts.append({"control_user": "Tell me a story about a ship."})
    both = reader.ask([Item(**d) for d in dicts], **ask)
    assert both[0] != both[1]  # what is asked about does matter
    assert reader.ask(dicts, **ask) == reader.ask(iter(dicts), **ask) == both
    assert reader.ask(dicts[0], **ask) == both[0]
    assert reader.ask([dicts[1], "Hello"], **ask) == [both[1], reader.ask("Hello", **ask)]
    turn = {"role": "user", "content": "Hello"}
    assert reader.ask([turn], **ask) == reader.ask("Hello", **ask)  # a list is a conversation
    with pytest.raises(ChatError) as theirs:
        lm.generate(turn)
    with pytest.raises(ChatError) as ours:
        reader.ask(turn, **ask)
    assert str(ours.value) == str(theirs.value)
    for wrong, told in (
        ([], "nothing to ask about"),
        ({"prompt": "Hello"}, "has the turns none"),
        ([turn, dicts[0]], "message 1 is"),
        ([dicts[0], turn], "a prompt is text or a list of messages"),
    ):
        with pytest.raises(ChatError, match=told):
            reader.ask(wrong, **ask)


def test_evidence_and_choice():
    reader = worn(make())
    (told,) = reader.ask("Hello there", ["Who?"], max_new_tokens=4, evidence=True)
    assert told.answer == reader.ask("Hello there", "Who?", max_new_tokens=4)[0]
    shown = reader.show(["Hello there"])[0]
    row = reader.dialogue.row(len(shown.values), "Who?", told.answer)
    with torch.no_grad():
        (own, blank), counts = reader.losses([row, row], [shown, None])
    assert told.gain == pytest.approx(float((blank - own) / counts[0]), abs=1e-5)
    assert (told.confidence > 0.5) == (told.gain > 0)
    best, scores = reader.choose("Hello there", "Who?", ["A dog.", "The weather", "3"])
    assert best == int(scores.argmax()) and len(scores) == 3


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_reader_answers_the_same(tmp_path):
    lm = make()
    reader = worn(lm, "add", last=3)
    reader.meta = replace(reader.meta, model=lm.describe())
    reader.save(tmp_path / "r", dtype=torch.float32)
    loaded = Reader.load(tmp_path / "r", lm)
    assert loaded.wiring == reader.wiring
    assert torch.equal(loaded.loss(ITEMS), reader.loss(ITEMS))
    assert torch.equal(tt.load(tmp_path / "r").on(lm).loss(ITEMS), reader.loss(ITEMS))
    with pytest.raises(ArtifactError, match="another model"):
        Reader.load(tmp_path / "r", make(seed=1))


@pytest.mark.parametrize("form", ["artifact", "peft"])
def test_a_loaded_reader_is_wired_as_it_is_told(form, tmp_path):
    lm = make()
    reader, path = worn(lm, "add", last=3), tmp_path / "r"
    if form == "peft":
        reader.lora.save(path)
    else:
        reader.save(path, dtype=torch.float32)
        assert Reader.load(path, lm).wiring == reader.wiring  # control
    told = {"read_layer": -3, "write_layer": 1, "write": "replace", "last": None, "align": False}
    loaded = Reader.load(path, lm, **told)
    assert loaded.wiring == Wiring((lm.n_layers - 3,), 1, "replace", None, False)
    other = Reader(lm, reader.lora, loaded.wiring)
    assert torch.equal(loaded.loss(ITEMS), other.loss(ITEMS))
    assert not torch.equal(loaded.loss(ITEMS), reader.loss(ITEMS))
    with pytest.raises(TypeError, match="takes no nonsense; it takes read_layer, write_layer"):
        Reader.load(path, lm, read_layer=1, nonsense=1)
    with pytest.raises(PlaceError, match="asks for layer 45"):
        Reader.load(path, lm, read_layer=45)


def test_what_is_no_reader_is_named(tmp_path):
    lm = make()
    tt.Add("resid@1", torch.ones(1, lm.width)).save(tmp_path / "e")
    saved = artifact.read(tmp_path / "e")
    artifact.save(tmp_path / "p", replace(saved, kind="probe"))
    for name, kind in (("e", "edit"), ("p", "probe")):
        with pytest.raises(ArtifactError, match=f"'{kind}', and only a 'reader' .*train-reader"):
            Reader.load(tmp_path / name, lm)
    with pytest.raises(ArtifactError, match="no artifact at"):
        Reader.load(tmp_path / "nothing", lm)


@pytest.mark.slow
def test_adapters_are_peft_folders(tmp_path):
    """PEFT reads what we write and writes what we read, and computes the same."""
    peft = pytest.importorskip("peft")
    lm = make()
    reader, batch = worn(lm), lm.batch(["Hello there"])
    with reader.worn(), torch.no_grad():
        ours = lm(batch).logits
    reader.lora.save(tmp_path / "p")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "p")
    with torch.no_grad():
        assert torch.allclose(theirs(batch.ids).logits, ours, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "q")
    again = Reader.load(tmp_path / "q", lm, read_layer=2)
    assert torch.allclose(again.loss(ITEMS), reader.loss(ITEMS))
    dora = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(use_dora=True, target_modules=["q_proj"], r=2)
    )
    dora.save_pretrained(tmp_path / "d")
    with pytest.raises(ArtifactError, match="plain LoRA"):
        Reader.load(tmp_path / "d", lm)


# -- training --------------------------------------------------------------------------------------

OPTIONS = {"read_layer": 2, "lr": 1e-2, "show_progress": False, "rank": 4}


def curve(lm, items=ITEMS, **options):
    losses = []
    reader = train(lm, items, tracker=lambda r: losses.append(r["loss"]), **(OPTIONS | options))
    return losses, reader


def test_training_lowers_the_loss_and_spares_the_model():
    lm = make()
    before = {n: p.clone() for n, p in lm.model.state_dict().items()}
    losses, reader = curve(lm, epochs=5, batch_size=2, lr=2e-2)
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in lm.model.state_dict().items())
    assert reader.meta.made_by["steps"] == 10


def test_a_trained_reader_knows_its_questions():
    lm = make()
    bare = [{"label": label, "control_user": f"Tell me of {label}."} for label in "abc"]
    qa = {"a": [list(pair) for pair in QA], "b": [["Who is it?", "A large fox."]]}
    reader = train(lm, bare, qa, steps=1, **OPTIONS)
    assert torch.equal(reader.loss(bare), reader.loss(bare, qa))
    with pytest.raises(ChatError, match="give qa="):
        reader.loss(bare[2:])
    own = Item("a", control_user="Tell me of a.", qa=QA[:1])  # items with questions keep to them
    assert torch.equal(reader.loss([own]), reader.loss([own], {}))
    assert not torch.equal(reader.loss([own]), reader.loss([own], qa))
    assert evaluate(reader, bare, views=["real"]).labels == ("a", "a", "b")


def test_layers_count_from_the_top_or_are_refused():
    lm = make()
    options = OPTIONS | {"read_layer": -2}
    reader = train(lm, ITEMS, steps=1, write_layer=-3, **options)
    assert (reader.wiring.read_layers, reader.wiring.write_layer) == (
        (lm.n_layers - 2,),
        lm.n_layers - 3,
    )
    lora = Lora.of(lm, rank=2)
    for wiring in ({"read_layers": (45,)}, {"read_layers": (2,), "write_layer": 45}):
        with pytest.raises(PlaceError, match="asks for layer 45"):
            Reader(lm, lora, Wiring(**wiring))
    with pytest.raises(PlaceError, match="asks for layer 45"):
        train(lm, ITEMS, steps=1, write_layer=45, **OPTIONS)


@pytest.mark.slow
def test_ways_to_the_same_curve():
    lm = make()
    plain, _ = curve(lm, steps=3, batch_size=4, dropout=0.0)
    ways = [
        {"batch_size": 2, "accumulate": 2},
        {"harvest": False},
        {"checkpointing": True},
        {"harvest": harvest_items(lm, ITEMS, [1, 2], show_progress=False)},
    ]
    for way in ways:
        losses, _ = curve(lm, **({"steps": 3, "batch_size": 4, "dropout": 0.0} | way))
        assert losses == pytest.approx(plain, rel=1e-4), way
    other, _ = curve(lm, steps=3, batch_size=4, dropout=0.0, seed=1)
    assert other != pytest.approx(plain, rel=1e-4)


def test_a_stopped_run_goes_on_exactly(tmp_path):
    lm = make()
    options = {"steps": 6, "batch_size": 2, "dropout": 0.1, "ema": 0.9}
    whole, reader = curve(lm, **options)
    seen = []

    def stop(facts):
        seen.append(facts["loss"])
        if facts["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lm, ITEMS, out=tmp_path / "r", save_every=3, tracker=stop, **OPTIONS, **options)
    with pytest.raises(ArtifactError, match="another run"):
        train(lm, ITEMS, out=tmp_path / "r", **(OPTIONS | options | {"lr": 1.0}))
    rest, again = curve(lm, out=tmp_path / "r", save_every=3, **options)
    assert seen[:3] + rest == whole and len(rest) == 3
    assert torch.equal(again.loss(ITEMS), reader.loss(ITEMS))
    assert (tmp_path / "r" / "artifact.json").is_file()
    assert logged(tmp_path / "r") == [1, 2, 3, 4, 5, 6]  # the fourth, which was lost, stands once
    assert not (tmp_path / "r-training" / "checkpoint.json").exists()
    curve(lm, out=tmp_path / "r", **(options | {"steps": 2}))
    assert logged(tmp_path / "r") == [1, 2]  # a new run, a new log


def logged(out):
    """The steps that stand in the log of a run."""
    lines = out.with_name(f"{out.name}-training").joinpath("log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"alpha": 1}, "lora_alpha 32 there, 1 now"),
        ({"dropout": 0.5}, r"lora_dropout 0\.0 there, 0\.5 now"),
        ({"rank": 8}, "r 4 there, 8 now"),
        ({"items": [*ITEMS[:2], replace(ITEMS[2], control_user="No")]}, "items '2 of hash .* now"),
        ({"items": ITEMS[::-1], "harvest": False}, "items '2 of hash .* now"),
        ({"qa": {"c": [["Who is it?", "A hen."]]}}, "'2 of hash .* now"),
        ({"held_out": 0.0}, "held out '1 of hash .* there, '0 of hash .* now"),
    ],
)
def test_a_checkpoint_goes_on_under_its_own_job_only(changed, told, tmp_path):
    lm, out = make(), tmp_path / "r"
    qa = {"c": [["Who is it?", "A dog."]]}
    job = {"items": ITEMS, "qa": qa, "held_out": 0.3, "dropout": 0.0}
    job |= OPTIONS | {"steps": 3, "save_every": 1, "out": out}

    def stop(facts):
        if facts["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lm, **job, tracker=stop)
    message = f"another run \\(.*{told}.*delete the folder to begin anew, or choose another out="
    with pytest.raises(ArtifactError, match=message):
        train(lm, **(job | changed))
    assert logged(out) == [1, 2, 3]  # a run that is refused leaves it as it was
    seen = []
    train(lm, **job, tracker=seen.append)
    assert [facts["step"] for facts in seen] == [3]  # control: the same job does go on


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_step_and_are_finished(name, tmp_path, monkeypatch):
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    for key in ("WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(key, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen, done, init = [], [], module.init

    def begun(**options):
        run = init(**options)
        log, finish = run.log, run.finish
        monkeypatch.setattr(run, "log", lambda *a, **k: seen.append((a, k)) or log(*a, **k))
        monkeypatch.setattr(run, "finish", lambda: done.append(len(seen)) or finish())
        return run

    monkeypatch.setattr(module, "init", begun)
    losses, _ = curve(make(), steps=3, batch_size=2)
    train(make(), ITEMS, steps=3, batch_size=2, tracker=name, **OPTIONS)
    assert [k["step"] for _, k in seen] == [1, 2, 3] and done == [3]
    assert [a[0]["loss"] for a, _ in seen] == pytest.approx(losses)
    assert "step" not in seen[0][0][0]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrimtabError, match="pip install wandb"):
        train(make(), ITEMS, steps=1, tracker="wandb", **OPTIONS)


def test_unknown_wishes_are_refused():
    lm = make()
    with pytest.raises(ValueError, match="write is"):
        train(lm, ITEMS, **OPTIONS, write="multiply")
    with pytest.raises(ValueError, match="tracker is"):
        train(lm, ITEMS, **OPTIONS, tracker="paper")
    with pytest.raises(ArtifactError, match="has a question"):
        train(lm, [Item("a", control_user="x")], {"b": [["Q", "A"]]}, **OPTIONS)
    with pytest.raises(PlaceError, match="layer 15"):
        train(lm, ITEMS, **(OPTIONS | {"read_layer": 15}))
    for name in ("steps", "batch_size", "accumulate"):
        with pytest.raises(ValueError, match=f"{name} is 1 or more, not 0"):
            train(lm, ITEMS, **OPTIONS, **{name: 0})
    with pytest.raises(ValueError, match="epochs is more than 0, not -1"):
        train(lm, ITEMS, **OPTIONS, epochs=-1)
    for items, share in ((ITEMS, 0.0), (ITEMS[:1], 0.3)):
        with pytest.raises(ValueError, match="evaluate_every=1 needs labels .* give held_out="):
            train(lm, items, **OPTIONS, evaluate_every=1, held_out=share, steps=1)


def test_a_small_share_of_few_labels_is_evaluated():
    seen = []
    train(make(), ITEMS, **OPTIONS, held_out=0.1, evaluate_every=1, steps=2, tracker=seen.append)
    assert all("held_out_real" in facts for facts in seen) and len(seen) == 2


def test_where_a_result_cannot_be_saved_no_work_begins(tmp_path, monkeypatch):
    lm, theirs = make(), tmp_path / "theirs"
    reader = worn(lm)
    theirs.mkdir()
    with monkeypatch.context() as m:
        m.setattr(lm, "forward", lambda *a, **k: pytest.fail("a pass was run"))
        with pytest.raises(ArtifactError, match="not an artifact; choose another name"):
            train(lm, ITEMS, **OPTIONS, steps=1, out=theirs)
        with pytest.raises(ArtifactError, match="not an artifact; choose another name"):
            steer(lm, reader, "be a fox", ["Hello"], out=theirs, show_progress=False)
    assert not list(theirs.iterdir()) and not theirs.with_name("theirs-training").exists()
    for _ in range(2):  # control: a reader is replaced by another
        train(lm, ITEMS, **OPTIONS, steps=1, out=tmp_path / "ours")


@pytest.mark.slow
def test_only_the_activations_tell_the_answer():
    """Each word has an answer of its own, and the question never says which one it is about."""
    lm = make()
    words = ["ship", "dog", "fox", "train", "gloves", "chicken"]
    items = [
        Item(word, control_user=f"Tell me of the {word}.", qa=(("Which?", f"{i} {word}"),))
        for i, word in enumerate(words)
    ]
    options = {"epochs": 40, "batch_size": 6, "dropout": 0.0, "lr": 1e-2}
    _, reader = curve(lm, items, **options)
    scores = evaluate(reader, items)
    real, none, shuffled = (scores.loss(v)[0] for v in ("real", "none", "shuffled"))
    assert real < 0.3 * shuffled and real < 0.3 * none  # the end token is unlikely by design
    assert scores.difference("shuffled", "real")[1] > 0  # the interval's lower end
    first = scores.only([label == scores.labels[0] for label in scores.labels])
    alone = [item for item in items if item.label == scores.labels[0]]
    assert first.loss("real")[0] == pytest.approx(evaluate(reader, alone).loss("real")[0], rel=1e-4)
    assert first.loss("real")[0] != pytest.approx(real, rel=1e-4)  # control
    with pytest.raises(ChatError, match="questions, but 1 to choose by"):
        scores.only([True])
    assert linear_choices(reader, items, items)[0] > 0.8  # so simple a task is linear, too
    assert choices(reader, items)[0] == 1 > choices(reader, items, view="shuffled")[0]
    _, blind = curve(lm, items, view="none", **options)  # learns to guess, and no more
    assert evaluate(blind, items, views=["none"]).loss("none")[0] > 1.25 * real
    assert choices(blind, items, view="none")[0] < 0.7


_RANKS = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from test_latentqa import ITEMS, OPTIONS, curve, make
    items = ITEMS * 2
    losses, reader = curve(make(), items, steps=4, batch_size={batch}, dropout=0.0, shard={shard})
    if int(__import__("os").environ.get("RANK", 0)) == 0:
        print("LOSSES", losses)
"""


def run_ranks(count, batch, shard=False):
    source = textwrap.dedent(_RANKS).format(
        tests=os.path.dirname(__file__), batch=batch, shard=shard
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base |= {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", source],
            env=base | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(count)
    ]
    outs = [p.communicate(timeout=240) for p in ranks]
    assert all(p.returncode == 0 for p in ranks), outs
    line = next(line for line in outs[0][0].splitlines() if line.startswith("LOSSES"))
    return [float(x) for x in line.removeprefix("LOSSES [").rstrip("]").split(",")]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_follow_the_curve_of_one(shard):
    alone = run_ranks(1, 4)
    assert run_ranks(2, 2, shard) == pytest.approx(alone, rel=1e-4)
    assert run_ranks(2, 1, shard) != pytest.approx(alone, rel=1e-4)  # another global batch


# -- steering --------------------------------------------------------------------------------------


def case(find="add"):
    """GPT-2 in double precision: its norms do not drop to float32, as Llama's do."""
    lm = make("gpt2", double=True)
    reader = worn(lm, last=6)
    place, generator = Place("resid", "0:3"), torch.Generator().manual_seed(5)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if find == "add":
        return lm, reader, lambda t: tt.Add(place, t), drawn(3, 32), drawn(3, 32)
    parts = ("attn.c_proj", "mlp.c_proj")
    names = [f"transformer.h.{i}.{part}" for i in range(3) for part in parts]
    downs = [drawn(2, 32 if "attn" in name else 128) for name in names]

    def adapter(t):  # [3, 2, 32, 2]: B beside two modules of each layer
        pairs = zip(downs, t.flatten(0, 1), strict=True)
        return tt.Adapter(place, dict(zip(names, pairs, strict=True)))

    return lm, reader, adapter, drawn(3, 2, 32, 2), drawn(3, 2, 32, 2)


@pytest.mark.parametrize("find", ["add", "lora"])
def test_the_gradient_reaches_the_target_and_is_right(find):
    lm, reader, edit, start, way = case(find)
    row = reader._seen("Tell me a story.")

    def loss(at):
        return steering._loss(reader, steering._shown(lm, reader, edit(at), row, [2]), QA)

    at = (0.1 * start).requires_grad_()
    loss(at).backward()
    with torch.no_grad():
        up, down = (loss(at + e * way) for e in (1e-5, -1e-5))
    slope = float((up - down) / 2e-5)
    assert float((at.grad * way).sum()) == pytest.approx(slope, rel=1e-6)
    assert float((at.grad.flip(0) * way).sum()) != pytest.approx(slope, rel=1e-3)
    assert all(p.grad is None for p in lm.model.parameters())
    assert float(at.grad[0].norm()) > 0  # through all the layers in between


@pytest.mark.parametrize("find", ["add", "lora"])
def test_each_layers_loss_moves_its_own_part_only(find):
    lm, reader, edit, start, way = case(find)
    row, layers = reader._seen("Tell me a story."), range(3)

    def parts(at, context=steering.cut):
        with context(lm):
            shown = steering._shown(lm, reader, edit(at), row, layers)
        return [steering._loss(reader, [s], QA) for s in shown]

    def sizes(part, at):
        (grad,) = torch.autograd.grad(part, at, retain_graph=True)
        return grad.flatten(1).norm(dim=1)

    at = (0.1 * start).requires_grad_()
    losses = parts(at)
    for i, part in enumerate(losses):
        size = sizes(part, at)
        assert float(size[i]) > 0 and float(size.sum()) == float(size[i])
    assert int((sizes(parts(at, nullcontext)[2], at) > 0).sum()) == 3  # control: nothing detached
    # The value is that of the steered target itself, which the layers below do change.
    with torch.no_grad():
        shown = reader.show(["Tell me a story."], edits=edit(at.detach()))[0]
        assert torch.allclose(steering._loss(reader, [shown], QA), losses[2], rtol=1e-9)
        plain = reader.show(["Tell me a story."])[0]
        assert not torch.allclose(steering._loss(reader, [plain], QA), losses[2], rtol=1e-6)
    (grad,) = torch.autograd.grad(losses[2], at, retain_graph=True)
    top = torch.zeros_like(way)
    top[2] = way[2]
    with torch.no_grad():  # the last layer's part has nothing below it that is detached
        up, down = (parts(at + e * top)[2] for e in (1e-5, -1e-5))
    assert float((grad * top).sum()) == pytest.approx(float((up - down) / 2e-5), rel=1e-6)
    assert not any(block._forward_pre_hooks for block in lm.anatomy.blocks[1:])


def test_an_adapter_stands_beside_every_linear_module_up_to_the_read_layer():
    lm = make()
    reader = worn(lm, last=6)
    options = {"samples": 2, "lr": 1e-2, "show_progress": False}
    edit = steer(lm, reader, "be a fox", ["Tell me a story."], rank=3, **options)
    assert isinstance(edit, tt.Adapter) and list(edit.modules) == list(
        lm.anatomy.linear_sizes(range(3))
    )
    for name, low in edit.modules.items():
        assert low.rank == 3 and float(low.up.abs().max()) > 0, name
        assert not low.up.requires_grad
    some = steer(lm, reader, "be a fox", ["Hi"], layers=[1], tokens="answer", **options)
    assert some.layers == (1,) and str(some.place) == "resid@1 answer"
    with pytest.raises(PlaceError, match="lie above layer 2, which is read"):
        steer(lm, reader, "be a fox", ["Hi"], layers=[3], per_layer=False, **options)


@pytest.mark.parametrize("find", ["add", "lora"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_steering_makes_the_wanted_answers_likelier(find, per_layer, tmp_path):
    lm = make()
    reader, prompts = worn(lm, last=6), ["Tell me a story.", ("Hello", "Yes, I am")]
    edit = steer(
        lm,
        reader,
        [["Who is it?", "A small dog."]],
        prompts,
        find=find,
        per_layer=per_layer,
        samples=10,
        lr=2e-2,
        max_dose=0.3,
        out=tmp_path / "e",
        show_progress=False,
    )
    losses = edit.meta.made_by["losses"]
    assert len(losses) == 10 and losses[-1] < losses[1] and losses[-2] < losses[0]
    assert edit.place == Place("resid", range(3))
    if find == "add":
        record_ = lm.record(["Tell me a story."], edit.place, show_progress=False)[0]
        share = edit.delta.norm(dim=-1) / record_.norm(dim=-1).mean(0)
        assert float(share.max()) < 0.6
    loaded, push = tt.load(tmp_path / "e"), tt.Add("resid@1", torch.ones(1, 32))
    assert type(loaded) is (tt.Add if find == "add" else tt.Adapter)
    rows = [loaded, None, loaded + push, push, -loaded]
    found = lm.generate(["Hello"] * 5, edits=rows, max_new_tokens=16)
    assert found == [lm.generate("Hello", edits=e, max_new_tokens=16) for e in rows]
    assert len(set(found)) == 5
    assert all(p.requires_grad for p in reader.lora.parameters())


def test_steering_needs_something_to_go_by():
    lm = make()
    reader = worn(lm)
    with pytest.raises(ChatError, match="no question-answer pairs"):
        steer(lm, reader, [], ["Hello"])
    with pytest.raises(ChatError, match="ordinary instructions"):
        steer(lm, reader, "be a fox", [])
    with pytest.raises(ValueError, match="find is"):
        steer(lm, reader, "be a fox", ["Hello"], find="luck")
    assert issubclass(ChatError, TrimtabError)
