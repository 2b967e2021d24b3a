"""What an LM promises beyond the laws of test_laws.py: forms of input, and models that change."""

import peft
import pytest
import torch

import model_zoo
import tokenizers_zoo
import trimtab as tt


@pytest.fixture
def lm():
    return tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))


def direction(layers: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(layers, width, generator=torch.Generator().manual_seed(seed))


def test_trees_are_judged_by_the_whole_model_not_by_the_first_layers():
    """A hybrid whose first block attends and whose others convolve must not take trees."""
    model = model_zoo.tiny("lfm2")
    kinds = model.config.layer_types
    assert "conv" in kinds
    ids = torch.randint(3, 500, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, :8] = ids[0, :8]
    lm, fresh = tt.LM(model), tt.LM(model_zoo.tiny("lfm2"))
    lm.record(tt.Batch(ids), "resid@0", show_progress=False)
    deep = lm.record(tt.Batch(ids), "resid@-1", show_progress=False)
    with torch.no_grad():
        plain = fresh(tt.Batch(ids), record="resid@-1").recording
    for a, b in zip(deep.rows(), plain.rows(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_values_per_token_touch_as_many_tokens_as_there_are_values(lm):
    """Alone, and beside a longer edit: tokens after the last value are left alone."""
    w = direction(1, lm.width)
    short = tt.Add("resid@1 prompt", torch.stack([w, 2 * w], 1)[:, None])
    long = tt.Add("resid@1 prompt", torch.stack([w] * 5, 1)[:, None])
    rows = tt.Batch(torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        alone = lm(rows[0], edits=short, record="resid@1").recording.rows()[0]
        both = lm(rows, edits=[short, long], record="resid@1").recording.rows()[0]
        plain = lm(rows[0], record="resid@1").recording.rows()[0]
    torch.testing.assert_close(alone, both)
    changed = (alone - plain).norm(dim=-1)[:, 0] > 1e-6
    assert changed.tolist() == [True, True] + [False] * 7


def test_an_adapter_that_is_put_in_later_is_seen(lm):
    """Taps follow modules that were replaced, also for the LM that was there before."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    adapted = tt.LM(peft.get_peft_model(lm.model, config))
    batch = tt.Batch(torch.tensor([[5, 6, 7]]))
    with torch.no_grad():
        found = adapted(batch, record="q@1").recording.rows()[0][:, 0]
        kept = []
        module = adapted.anatomy.tap("q", 1)[0]
        handle = module.register_forward_hook(lambda m, a, out: kept.append(out))
        adapted(batch)
        handle.remove()
        assert torch.equal(found, kept[0][0])
        edit = tt.Add("resid@1", direction(1, lm.width))
        assert torch.equal(lm(batch, edits=edit).logits, adapted(batch, edits=edit).logits)
        assert not torch.allclose(lm(batch, edits=edit).logits, lm(batch).logits)


def test_a_right_padded_batch_generates_what_its_rows_generate(lm):
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    padded = tt.Batch(ids, torch.tensor([[1, 1, 1, 0, 0], [1] * 5]))
    alone = [lm.generate_ids(tt.Batch(ids[:1, :3]), None, 6), lm.generate_ids(padded[1], None, 6)]
    assert lm.generate_ids(padded, None, 6) == [alone[0][0], alone[1][0]]


def test_a_batch_is_taken_wherever_prompts_are(lm):
    batch = lm.batch(["Hello", "How are you?"])
    assert lm.generate(batch, max_new_tokens=5) == lm.generate(
        ["Hello", "How are you?"], max_new_tokens=5
    )
    streamed = "".join(lm.stream(batch[0], max_new_tokens=5))
    assert streamed == lm.generate("Hello", max_new_tokens=5)


def test_more_prompts_than_a_batch_keep_their_order_and_their_edits(lm):
    prompts = [f"{'so ' * (7 - i)}{i}?" for i in range(7)]
    edits = [s * tt.Add("resid@1", direction(1, lm.width)) for s in range(7)]
    together = lm.generate(prompts, edits=edits, max_new_tokens=6)
    assert lm.generate(prompts, edits=edits, max_new_tokens=6, batch_size=2) == together
    assert lm.generate(prompts, edits=edits[::-1], max_new_tokens=6, batch_size=2) != together


def test_one_place_named_twice_is_recorded_once(lm):
    recording = lm.record("Hello", ["resid@1", "resid@1 all"], show_progress=False)
    assert recording.places == [tt.Place("resid", 1)]
    with pytest.raises(tt.PlaceError, match="no place to record"):
        lm.record("Hello", [])


def test_a_dtype_may_be_a_name(lm):
    recording = lm.record("Hello", "resid@1", show_progress=False, dtype="bfloat16")
    assert recording.rows()[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="float99"):
        lm.record("Hello", "resid@1", dtype="float99")


def test_a_score_has_gradients_only_where_an_edit_asks_for_them(lm):
    assert not lm.score("Hello", "you").requires_grad
    delta = torch.zeros(1, lm.width, requires_grad=True)
    lm.score("Hello", "you", edits=tt.Add("resid@1", delta)).sum().backward()
    assert delta.grad is not None and float(delta.grad.abs().sum()) > 0


def test_explain_takes_places_batches_and_edits(lm):
    told = lm.explain("Hello", "resid@1 prompt[-1:]")
    assert told.count("[") == 1 + 1, "the selector's own bracket and one token"
    add = tt.Add("resid@1 answer", direction(1, lm.width))
    lines = lm.explain(lm.batch(["Hello", "Hi"]), [add, None]).splitlines()
    assert lines[0].startswith("row 0: Add at resid@1 answer: 1 tokens")
    assert lines[1] == "row 1: no edit"
    with pytest.raises(tt.PlaceError, match="layer 99"):
        lm.explain("Hello", tt.Add("resid@99", direction(1, lm.width)))
