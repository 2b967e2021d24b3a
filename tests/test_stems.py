"""Stems: what rows begin with alike is run once, and nothing else is changed by it."""

import pytest
import torch

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab import stems
from trimtab.cache import growing
from trimtab.stems import begin

L, D = model_zoo.LAYERS, model_zoo.HIDDEN
HEAD = [7, 300, 21, 45, 8, 90, 33, 12]
ROWS = [[*HEAD, 5, 17], [*HEAD, 211, 34, 8, 45, 71], [*HEAD, 60], [*HEAD, 5, 17]]
TOKENS = ("all", "prompt", "answer", "prompt[-1:]", "all[2:5]", "[0, 2, 9]", "[9]")


def noise(*shape, seed=0, size=0.5):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lm_of(name="llama"):
    return tt.LM(
        model_zoo.tiny(name), tokenizers_zoo.byte_tokenizer(tokenizers_zoo.TEMPLATES["chatml"])
    )


def batch_of(rows=ROWS, prompt_len=None):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tt.Batch(ids, mask, None if prompt_len is None else torch.tensor(prompt_len))


def add(tokens, seed=0, layers="all"):
    count = L if layers == "all" else 1
    return tt.Add(tt.Place("resid", layers, tokens), noise(count, D, seed=seed))


def first_logits(lm, batch, edits):
    """Of a decoding, as with stems and as without; and how many columns the stems took."""
    call = lm._call(batch, edits)
    found = lm.engine(call).start(batch, call, 4)
    call, cache = lm._call(batch, edits), growing(lm.text_config)
    seen = begin(lm, batch, call, cache)
    with torch.no_grad(), lm.taps.carry(lm._call(batch, edits)):
        wanted = lm.forward(batch.ids, batch.mask, batch.positions, fast=False).logits[:, -1]
    return found, wanted, seen


@pytest.mark.parametrize("name", sorted(model_zoo.ARCHITECTURES | model_zoo.HYBRIDS))
def test_a_row_with_a_stem_is_the_row_by_itself(name):
    lm = lm_of(name)
    for edits in (None, add("all"), [add("answer", 1), None, add("all", 2), add("answer", 3)]):
        found, wanted, _ = first_logits(lm, batch_of(), edits)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_most_models_take_stems():
    taken = {
        name: first_logits(lm_of(name), batch_of(), None)[2] for name in model_zoo.ARCHITECTURES
    }
    assert sum(seen == len(HEAD) for seen in taken.values()) > len(taken) / 2
    assert taken["llama"] == len(HEAD) and taken["gemma2"] == 0  # whose cache drops tokens


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("edits", ["one", "some", "each"])
def test_edits_act_in_stems_as_without(tokens, edits):
    lm = lm_of()
    given = {
        "one": add(tokens),
        "some": [add(tokens), None, add(tokens), add(tokens)],
        "each": [add(tokens, seed) for seed in range(4)],
    }[edits]
    found, wanted, _ = first_logits(lm, batch_of(), given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    plain, *_ = first_logits(lm, batch_of(), None)
    assert not torch.allclose(found, plain, atol=1e-3)  # a control


def kinds(edits, rows=ROWS, prompt_len=None):
    """How long the stems are, and how many rows each has."""
    batch = batch_of(rows, prompt_len)
    ids, member = stems.stems(batch, lm_of()._call(batch, edits))
    return ids.shape[1], torch.bincount(member).tolist()


def test_stems_end_where_an_edit_begins():
    assert kinds(None) == (8, [4])
    assert kinds([add("answer", i) for i in range(4)]) == (8, [4])
    assert kinds([add("all[6:]"), None, None, None]) == (6, [4])
    assert kinds(add("[7, 9]")) == (7, [4])
    assert kinds(0.0 * add("all")) == (8, [4])
    assert kinds([None, None, None, add("all")])[0] == kinds(add("all"))[0] == 0


def test_rows_without_much_alike_have_no_stems():
    other = [[9 + i, *row[1:]] for i, row in enumerate(ROWS)]
    assert kinds(None, other)[0] == kinds(None, ROWS[:1])[0] == 0
    long = [row + list(range(i, i + 60)) for i, row in enumerate(ROWS)]
    assert kinds(None, long)[0] == 0  # eight tokens of seventy are not worth a pass


def test_whole_prompts_are_stems_where_they_stand_several_times():
    rows = [[5 + i // 4, *HEAD, *range(20, 30)] for i in range(8)]
    assert kinds(None, rows) == (18, [4, 4])
    assert kinds([add("answer", i) for i in range(8)], rows) == (18, [4, 4])


def test_what_reads_or_hangs_on_a_reading_has_no_stems():
    lm, batch = lm_of(), batch_of()
    call = lm._call(batch, None)
    assert stems.stems(batch, call)[0].shape[1] == 8
    lm._add_reader(call, tt.Place("resid@0"), [len(r) for r in ROWS], [len(r) for r in ROWS])
    readout = tt.edits.Readout("resid@0", noise(1, D), torch.ones(1), torch.zeros(1))
    gated = lm._call(batch, tt.When(readout, 0.5, add("answer", 1, 1)))
    right = tt.Batch(batch.ids.flip(1), batch.mask.flip(1))
    for one, of in ((batch, call), (batch, gated), (right, lm._call(right, None))):
        assert stems.stems(one, of)[0].shape[1] == 0


@pytest.mark.parametrize("tokens", TOKENS)
def test_scores_are_those_without_stems(tokens, monkeypatch):
    lm = lm_of()
    rows = [row + [50 + i, 60, 70 + i][: 1 + i % 3] for i, row in enumerate(ROWS)]
    batch = batch_of(rows, [len(row) for row in ROWS])
    edits = [add(tokens, 1), None, add(tokens, 1), add(tokens, 2)]
    seen, plain = [], stems.begin
    monkeypatch.setattr(stems, "begin", lambda *a: seen.append(plain(*a)) or seen[-1])
    found = lm.score(batch, edits=edits)
    assert seen and (seen[-1] > 0 or tokens != "answer")
    monkeypatch.setattr(stems, "begin", lambda *a: 0)
    torch.testing.assert_close(found, lm.score(batch, edits=edits), rtol=1e-4, atol=1e-5)


def test_texts_and_adapters_are_those_of_each_row_alone():
    lm = lm_of()
    prompts = ["How is the sea?", "What is a house made of?", "Why?"]
    sizes = lm.anatomy.linear_sizes([0, 1])
    low = {n: (noise(2, i, seed=1), noise(o, 2, seed=2)) for n, (i, o) in sizes.items()}
    worn = tt.Adapter("resid@all", low)
    for edits in (None, add("all"), worn, [worn, None, 0.5 * worn]):
        own = edits if isinstance(edits, list) else [edits] * 3
        alone = [
            lm.generate(p, e, 6, system="Be kind and tell the truth.")
            for p, e in zip(prompts, own, strict=True)
        ]
        assert lm.generate(prompts, edits, 6, system="Be kind and tell the truth.") == alone
