"""Compiled decoding gives the eager answer, and a change of edit compiles nothing."""

import shutil

import pytest
import torch

import model_zoo
import trimtab as tt
from trimtab.compiled import fits, lasting

pytestmark = pytest.mark.slow  # compiling takes seconds even for tiny models


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def unit(layers: int, width: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(layers, width, generator=torch.Generator().manual_seed(seed))
    return made / made.norm(dim=-1, keepdim=True)


@pytest.fixture
def pair():
    """The same tiny model twice: eager, and compiled."""
    torch._dynamo.reset()
    eager, compiled = (tt.LM(model_zoo.tiny("llama", seed=3)) for _ in range(2))
    yield eager, compiled.compile(backend="aot_eager")  # the graphs are what is tested
    torch._dynamo.reset()


def batch(rows: int) -> tt.Batch:
    ids = torch.randint(3, 500, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :4] = 0  # a shorter row, left-padded
    return tt.Batch(ids, mask)


def test_compiled_is_eager_for_every_kind_of_addition(pair):
    eager, compiled = pair
    w = unit(2, eager.width)
    ramp = torch.linspace(0, 3, 4)[None, None, :, None] * w[:, None, None]
    edits = {
        "plain": tt.Add("resid@1:3", 2 * w),
        "keep_norm": tt.Add("resid@1:3", 2 * w, keep_norm=True),
        "dose": tt.Add("resid@1:3", 0.5 * w, relative=True, keep_norm=True),
        "answer slice": tt.Add("resid@1:3 answer[2:5]", 4 * w),
        "per position": tt.Add("resid@1:3 answer[1:5]", ramp),
        "sum": tt.Add("resid@1:3", w) + tt.Add("resid@0:2", 2 * w.flip(0), keep_norm=True),
    }
    rows = batch(1)
    plain = eager.generate_ids(rows, None, 10)
    for name, edit in edits.items():
        expected = eager.generate_ids(rows, edit, 10)
        assert compiled.generate_ids(rows, edit, 10) == expected, name
        assert expected != plain, f"control: {name} changes nothing"


def test_rows_with_their_own_edits(pair):
    eager, compiled = pair
    w = unit(2, eager.width)
    a, b = tt.Add("resid@1:3", 3 * w), tt.Add("resid@2:4 answer", -4 * w, keep_norm=True)
    edits = [a, None, 0.5 * b]
    expected = eager.generate_ids(batch(3), edits, 8)
    assert compiled.generate_ids(batch(3), edits, 8) == expected
    assert compiled.generate_ids(batch(3), edits[::-1], 8) != expected


def test_no_graph_is_added_by_another_edit(pair):
    _, compiled = pair
    w = unit(2, compiled.width)
    compiled.generate_ids(batch(1), None, 4)
    before = graphs()
    for i in range(20):
        place = f"resid@{i % 3}:{i % 3 + 2} {('all', 'answer', 'answer[1:3]')[i % 3]}"
        edit = tt.Add(place, 0.1 * i * w, keep_norm=i % 2 == 0, relative=i % 4 == 0)
        compiled.generate_ids(batch(1), edit, 4)
    assert graphs() == before
    compiled.generate_ids(batch(1), tt.Add("mlp@1:3", w), 4)
    assert graphs() > before, "control: another site is another graph"


def test_what_does_not_fit_into_slots_runs_as_without(pair):
    eager, compiled = pair
    w = unit(1, eager.width)
    pairs = 2 * unit(1, eager.width)[:, None].repeat(1, 3, 1)
    attend = tt.Attend("resid@2", pairs, pairs)
    for edit in (tt.Project("resid@2", w), tt.Replace("resid@1 answer[3:4]", w), attend):
        assert compiled.generate_ids(batch(1), edit, 8) == eager.generate_ids(batch(1), edit, 8)


def test_what_touches_the_prompt_alone_is_of_any_kind(pair):
    """A controller at the prompt runs compiled, beside additions that last, and adds no graph."""
    eager, compiled = pair
    w = unit(4, eager.width)
    pairs = torch.stack([unit(4, eager.width, seed=s) for s in range(3)], 1)
    last, more = tt.Add("resid@0:4 answer", 2 * w), tt.Attend("resid@0:4 prompt", pairs, 2 * pairs)
    compiled.generate_ids(batch(3), last, 4)
    before = graphs()
    for edits in (more, more + last, [more, last, tt.Project("resid@1 [0, 2]", w[:1])]):
        expected = eager.generate_ids(batch(3), edits, 8)
        assert compiled.generate_ids(batch(3), edits, 8) == expected
        assert expected != eager.generate_ids(batch(3), None, 8)
        call = compiled._call(batch(3), edits)
        assert fits(call) and len(lasting(call)) < len(call.steps)
    assert graphs() == before
    everywhere = compiled._call(batch(3), tt.Attend("resid@0:4", pairs, pairs))
    assert fits(compiled._call(batch(3), more)) and not fits(everywhere)


def test_two_compiled_streams_take_turns(pair):
    """The fixed buffers belong to one stream; the other runs without, and both are right."""
    import tokenizers_zoo

    eager, compiled = pair
    for lm in pair:
        lm.tokenizer = tokenizers_zoo.byte_tokenizer("chatml")
    a, b = (tt.Add("resid@1:3", s * unit(2, eager.width)) for s in (3, -3))
    expected = ["".join(eager.stream("Hello", edits=e, max_new_tokens=8)) for e in (a, b)]
    found = ["", ""]
    streams = [compiled.stream("Hello", edits=e, max_new_tokens=8) for e in (a, b)]
    going = [0, 1]
    while going:
        for i in list(going):
            piece = next(streams[i], None)
            found[i] += piece or ""
            if piece is None:
                going.remove(i)
    assert found == expected
    assert found[0] != found[1]
    assert not compiled._compiled.owner.locked(), "the buffers are free again"


def test_a_model_without_static_cache_decodes_uncompiled():
    lm, plain = (tt.LM(model_zoo.tiny("bloom")) for _ in range(2))
    lm.compile(backend="aot_eager")
    edit = tt.Add("resid@1:3", 2 * unit(2, lm.width))
    assert lm.generate_ids(batch(1), edit, 6) == plain.generate_ids(batch(1), edit, 6)
    assert lm._compiled.supported() is False
    assert tt.LM(model_zoo.tiny("llama")).compile()._compiled.supported() is True  # the control


def test_many_batch_sizes(pair):
    eager, compiled = pair
    for rows in range(1, 11):  # the compiler's own limit is 8 graphs
        assert compiled.generate_ids(batch(rows), None, 3) == eager.generate_ids(
            batch(rows), None, 3
        )


def test_copies_and_sampling(pair):
    eager, compiled = pair
    options = dict(temperature=1.0, seed=5, num_return_sequences=3)
    expected = eager.generate_ids(batch(2), None, 6, **options)
    assert compiled.generate_ids(batch(2), None, 6, **options) == expected


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler needs g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_one_row_become_sums(dtype):
    """The CPU's compiler pass is taken for one row, and gives the numbers that mm gives."""
    from trimtab import inductor

    class Counting(inductor.ProductsAsSums):
        left: tuple[int, ...] = ()

        def __call__(self, graph):
            super().__call__(graph)
            products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            self.left = (*self.left, sum(n.target in products for n in graph.nodes))

        def uuid(self):
            return None  # not from the compiler's cache of an earlier run

    torch.manual_seed(0)
    counting = Counting()
    layers = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32, bias=False))
    layers = layers.to(dtype)
    run = torch.compile(layers, dynamic=False, options={"post_grad_custom_post_pass": counting})
    with torch.no_grad():
        for rows in (1, 16):
            x = torch.randn(rows, 64, dtype=dtype)
            close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
            torch.testing.assert_close(run(x), layers(x), **close)
    assert counting.left == (0, 2), "control: with many rows the products stay"
    torch._dynamo.reset()
