"""Probes of attention heads: each equals a probe of that head alone, and the edit is the shift."""

import math

import pytest
import torch

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab.errors import ArtifactError, PlaceError

HEADS, D = 4, 32
PARTS = ("weight", "gain", "bias", "accuracy", "heldout_accuracy", "heldout_auroc")


def made(n=40, seed=0):
    """Ragged rows [T_i, 2, HEADS * 8] of which layer 3, head 2 knows the label."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    rows = [torch.randn(1 + i % 5, 2, D, generator=random) + 1.0 for i in range(n)]
    for row, label in zip(rows, labels.tolist(), strict=True):
        row[:, 1, 16:24] += 1.5 * label * torch.linspace(-1, 1, 8)
    return tt.Recording.from_rows("heads@1,3 answer", rows), labels


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_a_head_alone_gives_the_same_probe(method, normalize):
    rec, labels = made()
    options = {"method": method, "normalize": normalize, "held_out": 0.3, "seed": 1}
    probe = tt.concepts.fit_recording(rec, labels, per_head=HEADS, **options)
    assert probe.weight.shape == (2, HEADS, 8) and probe.heldout_auroc.shape == (2, HEADS)
    assert (probe.layers, str(probe.place)) == ((1, 3), "heads@1,3 answer")
    near = {"rtol": 1e-3, "atol": 1e-3 if method == "logistic" else 1e-5}
    for head in range(HEADS):
        alone = [row[..., 8 * head : 8 * head + 8] for row in rec.rows()]
        narrow = tt.Recording.from_rows(rec.place, alone)
        wanted = tt.concepts.fit_recording(narrow, labels, **options)
        for name in PARTS:
            torch.testing.assert_close(getattr(probe, name)[:, head], getattr(wanted, name), **near)
        torch.testing.assert_close(probe.predict(rec)[..., head], wanted.predict(narrow), **near)
    assert probe.best_heads(1) == [(3, 2)] and "layer 3, head 2" in repr(probe)
    if normalize:
        assert probe.mean.shape == (2, HEADS, 8)
    other = tt.concepts.fit_recording(rec, labels, **options)  # the control: the whole width
    assert not torch.allclose(other.accuracy[:, None].expand(2, HEADS), probe.accuracy, atol=1e-3)


def test_save_and_load(tmp_path):
    rec, labels = made()
    probe = tt.concepts.fit_recording(rec, labels, held_out=0.2, per_head=HEADS).named("joy")
    probe.save(tmp_path / "joy")
    back = tt.load(tmp_path / "joy")
    assert isinstance(back, tt.concepts.HeadProbe) and back.meta.name == "joy"
    assert (back.place, back.layers, back.n_heads) == (probe.place, probe.layers, HEADS)
    for name in (*PARTS, "mean"):
        assert torch.equal(getattr(back, name), getattr(probe, name))
    assert torch.equal(back.predict(rec), probe.predict(rec))


def test_a_damaged_head_probe(tmp_path):
    from trimtab.artifact import Parts, save

    rec, labels = made()
    probe = tt.concepts.fit_recording(rec, labels, per_head=HEADS)
    tensors = {n: getattr(probe, n) for n in (*PARTS, "mean")}
    extra = {"layers": [1, 3], "heads": 5}
    save(tmp_path / "p", Parts("head-probe", probe.meta, "heads@1,3 all", extra, tensors))
    with pytest.raises(ArtifactError, match="names 2 layers of 5 heads, but holds a gain of"):
        tt.load(tmp_path / "p")


def examples(n=12):
    return [
        tt.Example(f"Question {i // 2}", "yes yes yes" if i % 2 else "no, never", float(i % 2))
        for i in range(n)
    ]


def fitted(name, place="heads@all answer[:4]", **options):
    lm = tt.LM(model_zoo.tiny(name), tokenizers_zoo.byte_tokenizer("chatml"))
    probe = tt.concepts.fit(lm, examples(), place, per_head=True, show_progress=False, **options)
    return lm, probe


def shifted(lm, batch, probe, heads, scale, width):
    """Logits with a pre-hook on each output projection that shifts the chosen heads by hand."""
    handles = []
    for layer, head in heads:
        unit = probe.weight[layer, head] / probe.weight[layer, head].norm()

        def shift(_, inputs, unit=unit, head=head):
            x = inputs[0].clone()
            x[..., head * width : (head + 1) * width] += scale * unit
            return (x, *inputs[1:])

        handles.append(lm.anatomy.tap("heads", layer)[0].register_forward_pre_hook(shift))
    try:
        return lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2"])
@torch.no_grad()
def test_the_edit_is_a_shift_of_the_heads(name):
    """Grouped queries (llama), a transposed weight (gpt2), a norm behind (gemma2), biases."""
    lm, probe = fitted(name)
    width = probe.weight.shape[-1]
    batch = lm.batch("Question 1")
    heads = probe.best_heads(5)
    edit = probe.edit(lm, 3.0, top_heads=5)
    assert edit.place.site == "attn" and len(edit.delta) == len({layer for layer, _ in heads})
    plain, steered = lm(batch).logits, lm(batch, edit).logits
    wanted = shifted(lm, batch, probe, heads, 3.0, width)
    scale = float(wanted.abs().max())
    assert float((steered - wanted).abs().max()) < 1e-5 * scale
    assert float((plain - wanted).abs().max()) > 1e-2 * scale  # the controls: it does something,
    others = [(layer, (head + 1) % probe.n_heads) for layer, head in heads]
    wrong = shifted(lm, batch, probe, others, 3.0, width)
    assert float((steered - wrong).abs().max()) > 1e-3 * scale  # and other heads are others
    assert torch.equal(lm(batch, probe.edit(lm, 0.0)).logits, plain)
    given = probe.edit(lm, 3.0, heads=heads)
    assert torch.equal(given.delta, edit.delta)


def test_keys_and_values_fall_into_their_own_heads():
    """Two heads of keys for four of queries: all are of one width."""
    found = {s: fitted("llama", f"{s}@all answer[:4]")[1].weight.shape for s in ("q", "k", "v")}
    width = model_zoo.HIDDEN // model_zoo.HEADS
    assert found["q"] == (model_zoo.LAYERS, model_zoo.HEADS, width)
    assert found["k"] == found["v"] == (model_zoo.LAYERS, 2, width)
    whole = fitted("gpt2", "heads@all answer[:4]")[1]  # the control: no fewer heads of keys
    assert whole.weight.shape == (model_zoo.LAYERS, model_zoo.HEADS, width)


@pytest.mark.parametrize("site", ["norm", "resid", "attn", "mlp"])
def test_other_sites_have_no_heads(site):
    told = f"a site whose width falls into heads, heads, q, k, v, not '{site}'; give a place such"
    with pytest.raises(PlaceError, match=told):
        fitted("llama", f"{site}@all answer[:4]")
    rec, labels = made()
    other = tt.Recording.from_rows(f"{site}@1,3 answer", rec.rows())
    with pytest.raises(PlaceError, match=told):
        tt.concepts.fit_recording(other, labels, per_head=HEADS)
    tt.concepts.fit_recording(other, labels)  # the controls
    tt.concepts.fit_recording(rec, labels, per_head=HEADS)


def test_the_default_place_has_no_heads():
    lm = tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))
    with pytest.raises(PlaceError, match="not 'norm'.*heads@all"):
        tt.concepts.fit(lm, examples(), per_head=True, show_progress=False)


def test_what_it_takes():
    rec, labels = made()
    with pytest.raises(PlaceError, match="width of 32 at heads does not fall into 5 heads"):
        tt.concepts.fit_recording(rec, labels, per_head=5)
    lm, probe = fitted("llama")
    assert probe.meta.made_by["examples"] == 12 and probe.n_heads == model_zoo.HEADS
    with pytest.raises(PlaceError, match=r"no heads \[\(0, 4\)\]; it has layers \[0, 1, 2, 3\]"):
        probe.edit(lm, heads=[(0, 4)])
    with pytest.raises(PlaceError, match="top_heads is 1 or more, not 0"):
        probe.edit(lm, top_heads=0)
    with pytest.raises(PlaceError, match="NaN or infinite"):
        probe.edit(lm, math.nan)
    with pytest.raises(PlaceError, match=r"reads heads at layers \[0, 1, 2, 3\]; the recording"):
        probe.predict(rec)
    with pytest.raises(ArtifactError, match="another model"):
        probe.edit(tt.LM(model_zoo.tiny("llama", seed=1)))
    with pytest.raises(PlaceError, match="fit one there to steer by it"):
        fitted("llama", "q@all answer[:4]")[1].edit(lm)
    with pytest.raises(AttributeError, match="a HeadProbe has no 'weights'"):
        _ = probe.weights
