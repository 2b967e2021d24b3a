"""The savings of decoding and reading leave the numbers as they are: caches, few rows, trees."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import model_zoo
import tokenizers_zoo as zoo
import trimtab as tt
from trimtab import cache, decode, harvest, products
from trimtab.selfcontrol import Judge
from trimtab.selfcontrol.judge import encoded, readings

FAMILIES = ["llama", "gpt2", "gemma2", "qwen3_moe", "olmo2"]


# -- keys and values that grow in place ------------------------------------------------------------


def life(layer, seed=0, grad=False):
    """What a layer returns over a life of passes, chosen rows and cropped tokens."""
    numbers = torch.Generator().manual_seed(seed)
    seen, rows = [], 3
    with torch.set_grad_enabled(grad):
        for act in [5, 1, 1, "rows", 1, 1, "crop", 1, 90, 1, "repeat", 1, "crop", "rows", 2, 1]:
            if act == "rows":
                chosen = torch.randint(rows, (2,), generator=numbers)
                layer.batch_select_indices(chosen)
                rows = 2
            elif act == "crop":
                layer.crop(-2)
            elif act == "repeat":
                layer.batch_repeat_interleave(3)
                rows *= 3
            else:
                new = torch.randn(2, rows, 2, act, 4, generator=numbers)
                seen += [x.clone() for x in layer.update(*new)]
    return seen


@pytest.mark.parametrize("grad", [False, True])
def test_a_growing_layer_holds_what_a_plain_one_holds(grad, monkeypatch):
    plain, growing = life(DynamicLayer(), grad=grad), life(cache.Growing(), grad=grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, growing, strict=True))
    monkeypatch.setattr(cache, "_begins", lambda part, buffer: True)
    if not grad:  # control: rows were chosen, but the old buffer goes on
        with pytest.raises(RuntimeError, match="size|expand"):
            life(cache.Growing())


def test_a_growing_layer_writes_in_place_only_without_gradients():
    one = torch.zeros(1, 1, 1, 2)
    for grad in (False, True):
        layer = cache.Growing()
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                layer.update(one, one)
            before = layer.keys.data_ptr()
            layer.update(one, one)
        assert (layer.keys.data_ptr() == before) == (not grad)


def test_a_cache_goes_on_after_inference_mode():
    layer, one = cache.Growing(), torch.ones(1, 1, 1, 2)
    with torch.inference_mode():
        for _ in range(3):
            layer.update(one, one)
    with torch.no_grad():
        assert layer.update(one, one)[0].sum() == 8


def test_only_full_attention_grows_in_place():
    kinds = [type(x) for x in cache.growing(model_zoo.tiny("gemma2").config).layers]
    assert cache.Growing in kinds and any(k is not cache.Growing for k in kinds)


# -- products --------------------------------------------------------------------------------------


def answers(lm, rows, dtype=None):
    ids = torch.randint(3, 200, (rows, 7), generator=torch.Generator().manual_seed(rows))
    return lm.generate_ids(tt.Batch(ids), None, 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_the_usual_products(name, monkeypatch):
    lm, taken = tt.LM(model_zoo.tiny(name)), set()
    for form in ("_transposed", "onednn"):
        own = getattr(products, form)
        spy = lambda *a, own=own, form=form: taken.add(form) or own(*a)  # noqa: E731
        monkeypatch.setattr(products, form, spy)
    for rows, form in (
        (1, "_transposed"),
        (3, "_transposed"),
        (6, "onednn"),
        (65, "onednn"),
    ):
        taken.clear()
        found = answers(lm, rows)
        if name != "gpt2":  # it has no linear maps
            assert form in taken
        with monkeypatch.context() as patch:
            patch.setattr(products, "_fits", lambda weight: False)
            taken.clear()
            assert answers(lm, rows) == found
            assert not taken


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_weights_give_the_usual_answers(name, monkeypatch):
    lm, used = tt.LM(model_zoo.tiny(name)), set()
    own = products.onednn
    spy = lambda x, w, b=None: used.add(w.layout) or own(x, w, b)  # noqa: E731
    monkeypatch.setattr(products, "onednn", spy)
    monkeypatch.setattr(products, "PAYS", 8)  # as many tokens as `answers` makes
    for rows, packs in ((3, False), (6, True), (129, False)):
        used.clear()
        found = answers(lm, rows)
        if name != "gpt2":  # it has no linear maps
            assert (torch._mkldnn in used) == packs
        with monkeypatch.context() as patch:
            patch.setattr(products, "PAYS", 9)
            used.clear()
            assert answers(lm, rows) == found
            assert torch._mkldnn not in used, "control"
    assert not lm.products.packs and not any("_packed" in m.__dict__ for m in lm.model.modules())


def test_packed_weights_follow_the_weights_and_stay_within_their_room(monkeypatch):
    monkeypatch.setattr(products, "PAYS", 8)
    lm, other = (tt.LM(model_zoo.tiny("llama")) for _ in range(2))
    with lm.products.kept():
        first = answers(lm, 6)
        made = dict(lm.products.packs)
        assert len(made) == len(lm.products.maps)
        assert answers(lm, 6) == first
        assert all(lm.products.packs[m] is pack for m, pack in made.items()), "made once"
        for model in (lm, other):
            with torch.no_grad():
                model.model.lm_head.weight.neg_()
        found = answers(lm, 6)
        again = [m for m, pack in made.items() if lm.products.packs[m] is not pack]
        assert again == [lm.model.lm_head]
    assert found == answers(other, 6) != first
    monkeypatch.setattr(products, "ROOM", 1000)
    with lm.products.kept():
        assert answers(lm, 6) == found
        assert not lm.products.packs


def test_a_stream_that_is_left_behind_leaves_nothing_packed(monkeypatch):
    monkeypatch.setattr(products, "PAYS", 8)
    lm = tt.LM(model_zoo.tiny("llama"))
    head = lm.model.lm_head
    batch = tt.Batch(torch.arange(3, 45).reshape(6, 7))
    first, second = (
        decode.columns(
            lm, batch, lm._call(batch, None), sampling=decode.Sampling(), max_new_tokens=8
        )
        for _ in range(2)
    )
    next(first), next(second)
    first.close()
    assert "_packed" in head.__dict__ and lm.products.packs
    assert len(list(second)) == 7
    assert "_packed" not in head.__dict__ and not lm.products.packs


def test_without_onednn_the_usual_routine_is_called(monkeypatch):
    x, weight = torch.randn(6, 1, 24), torch.randn(40, 24)
    with torch.no_grad():
        found = products.onednn(x, weight, None)
        monkeypatch.setattr(torch.ops, "mkldnn", object())
        usual = products.onednn(x, weight, None)
    assert torch.equal(usual, torch.nn.functional.linear(x, weight))
    assert torch.allclose(found, usual, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 24), (3, 7, 24), (2, 24), (24,)])
def test_gradients_are_those_of_the_usual_products(shape):
    """Of the input, of a change of the output in place, and a second time."""
    map_, numbers = torch.nn.Linear(24, 40), torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=numbers, requires_grad=True)
    g = torch.randn((*shape[:-1], 40), generator=numbers)
    made = products.Products(map_)
    with products.frozen(map_), made.fast():
        y = map_(x)
        assert type(y.grad_fn).__name__ != "AddmmBackward0"
        y.mul_(2)
        (first,) = torch.autograd.grad(y.tanh(), x, g, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    wide = x.detach().double().requires_grad_()
    y = 2 * torch.nn.functional.linear(wide, map_.weight.double(), map_.bias.double())
    (expected,) = torch.autograd.grad(y.tanh(), wide, g.double(), create_graph=True)
    (again,) = torch.autograd.grad(expected.sum(), wide)
    assert (first - expected).abs().max() < 1e-5
    assert (second - again).abs().max() < 1e-4
    assert (first - 2 * expected).abs().max() > 1e-2, "control: another gradient"


def test_weights_that_learn_keep_the_usual_product():
    map_, x = torch.nn.Linear(24, 40), torch.randn(9, 24)
    with products.Products(map_).fast():
        map_(x).square().sum().backward()
    own = map_.weight.grad.clone()
    map_.zero_grad()
    map_(x).square().sum().backward()
    assert torch.equal(own, map_.weight.grad) and own.norm() > 0


def test_a_run_is_the_bare_model_to_the_bit_and_a_fast_one_up_to_rounding():
    model = model_zoo.tiny("llama")
    lm, batch = tt.LM(model), tt.Batch(torch.arange(3, 43).reshape(2, 20))
    with torch.no_grad():
        bare = model(batch.ids).logits
        assert torch.equal(lm(batch).logits, bare)
        near = lm.forward(batch.ids, None, batch.positions).logits
    assert torch.allclose(near, bare, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_blocks_that_are_computed_again_take_the_same_form():
    """Checkpoints compare what a block keeps, which another form of its products would change."""
    model = model_zoo.tiny("llama").requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lm, batch = tt.LM(model), tt.Batch(torch.arange(3, 43).reshape(2, 20))
    zero = torch.zeros(4, 2, 1, lm.width, requires_grad=True)
    call = lm._call(batch, tt.Add("resid@0:4 prompt[0:1]", zero), [20, 20])
    for held in (True, False):
        with lm.taps.carry(call, lm.waits):
            loss = lm.forward(batch.ids, None, batch.positions, use_cache=False).logits.sum()
        if held:
            with lm.replay(call):
                (slope,) = torch.autograd.grad(loss, zero)
            assert slope.norm() > 0
        else:
            with (
                pytest.raises(torch.utils.checkpoint.CheckpointError),
                lm.taps.replay(call, lm.waits),
            ):
                torch.autograd.grad(loss, zero)


ROTATING_PAIRS = {
    "llama4_text": dict(
        head_dim=8, intermediate_size_mlp=64, num_local_experts=2, moe_layers=[1, 3]
    ),
    "deepseek_v2": model_zoo.LATENT_ATTENTION | dict(head_dim=4, v_head_dim=6),
}


@pytest.mark.parametrize("name", [*ROTATING_PAIRS])
def test_models_that_look_at_pairs_of_features_are_decoded_too(name):
    lm = tt.LM(model_zoo.build(name, **(model_zoo._LLAMA | ROTATING_PAIRS[name])))
    for rows in (1, 3):
        ids = torch.randint(3, 200, (rows, 7), generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            whole = lm.model.generate(ids, max_new_tokens=8, do_sample=False)[:, 7:].tolist()
        assert lm.generate_ids(tt.Batch(ids), None, 8) == whole


CACHELESS = {
    "mamba": dict(hidden_size=32, num_hidden_layers=4, state_size=4, expand=2),
    "openai-gpt": dict(n_embd=32, n_layer=4, n_head=4, n_positions=128),
    "minimax": model_zoo._LLAMA
    | dict(
        head_dim=8,
        num_local_experts=2,
        block_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}


@pytest.mark.parametrize("name", [*CACHELESS])
def test_a_model_without_such_a_cache_generates_too(name):
    lm = tt.LM(model_zoo.build(name, **CACHELESS[name]))
    assert not lm.caches
    ids = torch.randint(3, 200, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = lm.model.generate(ids, max_new_tokens=8, do_sample=False)[:, 7:].tolist()
    assert lm.generate_ids(tt.Batch(ids), None, 8) == whole
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(2))
    edits = [scale * tt.Add("resid@1 all", direction[None]) for scale in (0.0, 3.0, -3.0)]
    found = lm.generate_ids(tt.Batch(ids), edits, 8)
    assert found[0] == whole[0] and found != whole
    for row, edit in enumerate(edits):
        own = ids[row : row + 1]
        for _ in range(8):
            with torch.no_grad():
                logits = lm(tt.Batch(own), edit).logits[:, -1]
            own = torch.cat([own, logits.argmax(-1, keepdim=True)], 1)
        assert own[0, 7:].tolist() == found[row]


def test_quantised_weights_keep_their_own_product():
    class Packed(torch.Tensor):
        """Says float32, as quantised weights do."""

    map_ = torch.nn.Linear(24, 40)
    x = torch.randn(1, 24)
    with torch.no_grad():
        assert products._plain(x, map_.weight, None) and products._plain(x, map_.weight.data, None)
        assert not products._plain(x, map_.weight.data.as_subclass(Packed), None)
        with torch.autocast("cpu", torch.bfloat16):
            assert not products._plain(x, map_.weight, None)
    assert not products._plain(x, map_.weight, None)


def test_a_part_of_a_larger_weight_keeps_the_usual_product():
    whole = torch.randn(80, 24)
    assert products._fits(whole) and products._fits(whole.T)
    assert not products._fits(whole.T[:12]) and not products._fits(whole[:, :12])


def test_a_bias_may_be_strided_and_a_copy_made_in_a_pass_is_a_copy():
    map_, x = torch.nn.Linear(24, 40), torch.randn(9, 24)
    map_.bias = torch.nn.Parameter(torch.randn(80)[::2])
    made = products.Products(map_)
    with torch.no_grad(), made.fast():
        found, usual = map_(input=x), torch.nn.functional.linear(x, map_.weight, map_.bias)
        assert torch.allclose(found, usual, atol=1e-5)
        twin = copy.deepcopy(map_)
        twin.weight.zero_()
        assert torch.allclose(twin(x), twin.bias.expand(9, -1))
        with made.packed(9, products.PAYS):
            twin = copy.deepcopy(map_)
            twin.weight.data.zero_()
            assert torch.allclose(twin(x), twin.bias.expand(9, -1))
            assert torch.allclose(map_(x), usual, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_other_form_is_the_same_product(bias):
    map_ = torch.nn.Linear(24, 40, bias=bias)
    form = partial(products._forward, map_)
    with torch.no_grad():
        for shape in ((1, 1, 24), (4, 1, 24), (1, 3, 24), (2, 24), (24,), (9, 1, 24), (40, 24)):
            x = torch.randn(shape)
            found, expected = form(x), torch.nn.functional.linear(x.double(), map_.weight.double())
            expected = expected if map_.bias is None else expected + map_.bias.double()
            assert found.shape == expected.shape
            assert (found - expected).abs().max() < 1e-5
            assert (form(2 * x) - expected).abs().max() > 1e-2, "control: another input"


def test_a_pass_leaves_the_model_as_it_was():
    model = model_zoo.tiny("llama")
    made, head = products.Products(model), model.lm_head
    with made.fast():
        assert "forward" in head.__dict__
        with made.fast():  # another thread's pass
            pass
        assert "forward" in head.__dict__
    with pytest.raises(KeyError), made.fast():
        raise KeyError
    assert not any("forward" in m.__dict__ for m in model.modules())
    head.forward = own = lambda x: x  # somebody else has wrapped it
    with made.fast():
        assert head.forward is own
    assert head.forward is own
    model.bfloat16()
    with made.fast():
        assert "forward" not in model.model.layers[0].mlp.up_proj.__dict__


# -- readings of many answers to one prompt --------------------------------------------------------


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_at_are_those_of_each_row_alone(name, trees, monkeypatch):
    lm = tt.LM(model_zoo.tiny(name))
    monkeypatch.setattr(lm, "takes_trees", lambda own=lm.takes_trees: trees and own())
    numbers = torch.Generator().manual_seed(0)
    head = torch.randint(3, 200, (20,), generator=numbers).tolist()
    rows = []
    for n in (3, 9, 9, 0, 40):
        ids = head + torch.randint(3, 200, (n,), generator=numbers).tolist()
        rows.append((ids, [4, len(ids) - 1]))
    found = {}
    for some, logits in harvest.logits_at(lm, rows):
        found |= dict(zip(some, logits.split([len(rows[i][1]) for i in some]), strict=True))
    assert sorted(found) == list(range(len(rows)))
    for i, (ids, at) in enumerate(rows):
        with torch.no_grad():
            alone = lm.model(torch.tensor([ids])).logits[0, at]
        assert torch.allclose(found[i], alone, atol=1e-4)
        assert not torch.allclose(found[i].flip(0), alone, atol=1e-3), "control: other positions"


def spied(lm, monkeypatch):
    """The masks of all passes from now on."""
    masks, forward = [], lm.forward
    told = lambda ids, mask, *a, **k: masks.append(mask) or forward(ids, mask, *a, **k)  # noqa: E731
    monkeypatch.setattr(lm, "forward", told)
    return masks


def test_long_rows_are_read_as_they_are(monkeypatch):
    sizes = dict(model_zoo._LLAMA, max_position_embeddings=2048)
    chunked = dict(ROTATING_PAIRS["llama4_text"], attention_chunk_size=250, no_rope_layers=[1] * 4)
    numbers = torch.Generator().manual_seed(0)
    head = torch.randint(3, 200, (harvest.TREE_WIDTH + 40,), generator=numbers).tolist()
    rows = [([*head, 5, 6, 7 + i], [3, len(head) + 2]) for i in range(2)] + [(head[:9], [8])]
    for name, more in (("llama", {}), ("llama4_text", chunked)):
        lm = tt.LM(model_zoo.build(name, **(sizes | more)))
        masks = spied(lm, monkeypatch)
        assert lm.takes_trees() == (name == "llama")
        masks.clear()
        for some, logits in harvest.logits_at(lm, rows):
            parts = logits.split([len(rows[i][1]) for i in some])
            for i, part in zip(some, parts, strict=True):
                with torch.no_grad():
                    alone = lm.model(torch.tensor([rows[i][0]])).logits[0, rows[i][1]]
                assert torch.allclose(part, alone, atol=1e-4)
        assert sum(m is None for m in masks) >= 1, "long rows need no mask"


def test_tokens_that_the_model_puts_before_a_row_are_passed_over():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    lm = tt.LM(peft.get_peft_model(model_zoo.tiny("llama"), config))
    rows = [(list(range(10, 10 + n)), [2, n - 1]) for n in (6, 9)]
    (some, logits), *rest = harvest.logits_at(lm, rows)
    assert not rest and sorted(some) == [0, 1]
    for i, part in zip(some, logits.split(2), strict=True):
        with torch.no_grad():
            alone = lm.model(torch.tensor([rows[i][0]])).logits[0]
        assert torch.allclose(part, alone[[3 + p for p in rows[i][1]]], atol=1e-4)
        assert not torch.allclose(part, alone[rows[i][1]], atol=1e-3), "control: not moved"


def test_a_batch_of_nothing_is_refused():
    lm = tt.LM(model_zoo.tiny("llama"))
    with pytest.raises(ValueError, match="1 or more, not 0"):
        list(harvest.logits_at(lm, [([5, 6], [1])], 0))
    assert list(harvest.logits_at(lm, [])) == []


def test_several_judges_read_one_answer_in_one_layout():
    lm = tt.LM(model_zoo.tiny("llama"), zoo.byte_tokenizer("chatml"))
    judges = [Judge("Is it warm?"), Judge("Is it blue?", "Blue", "Red", weight=3.0)]
    rows = encoded(lm, ["What?", "What?", "Why not?"], ["The sky", "", "Because"])
    found = readings(lm, judges, rows)
    expected = [
        readings(lm, [judge], [row], perplexity=False).score for row in rows for judge in judges
    ]
    one = torch.cat(expected).reshape(3, 2) @ torch.tensor([0.25, 0.75])
    assert torch.allclose(found.score, one, atol=1e-5)
    assert not torch.allclose(found.score, torch.cat(expected)[::2], atol=1e-5), (
        "control: unweighed"
    )
    assert found.perplexity.isinf().tolist() == [False, True, False]
    for row, value in zip(rows, found.perplexity.tolist(), strict=True):
        with torch.no_grad():
            logits = lm.model(torch.tensor([row.ids])).logits[0, row.prompt_len - 1 : -1]
        if len(logits):
            answer = torch.tensor(row.ids[row.prompt_len :])
            loss = torch.nn.functional.cross_entropy(logits, answer)
            assert value == pytest.approx(float(loss.exp()), rel=1e-4)


# -- attention -------------------------------------------------------------------------------------


def test_keys_that_heads_share_are_read_as_they_are(monkeypatch):
    """No copy and no folding for them inside our passes; other passes go transformers' own way."""
    from transformers.integrations import sdpa_attention

    lm, spread = tt.LM(model_zoo.tiny("llama")), []
    for name in ("repeat_kv", "pack_gqa"):
        theirs = getattr(sdpa_attention, name, None)
        if theirs is not None:

            def told(*args, theirs=theirs):
                spread.append(1)
                return theirs(*args)

            monkeypatch.setattr(sdpa_attention, name, told)
    ids = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = tt.Batch(ids, mask)
    ours = lm.generate_ids(batch, None, 6)
    assert not spread
    plain = lm.model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert spread, "control: transformers copies or folds"
    assert plain[:, 9:].tolist() == ours
    x = torch.randn(2, 2, 5, 8)

    def ask():
        return sdpa_attention.use_gqa_in_sdpa(torch.ones(2, 1, 5, 5), x, x)

    with cache.sharing():
        with pytest.raises(ZeroDivisionError), cache.sharing():
            assert ask()
            1 / 0  # noqa: B018
        assert ask(), "the outer one goes on"
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(ask).result(), "another thread is not inside"
    assert not ask()
