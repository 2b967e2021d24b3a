"""What the CPU computes, a GPU computes too: edits, artifacts and inputs stay where they were made.

Each test runs the same tiny model on both, from inputs on the CPU. Where torch sees no CUDA device
all of them are skipped.
"""

import pytest
import torch

import model_zoo
import tokenizers_zoo
import trimtab as tt
from test_evals import vowels
from test_laws import PROMPTS, D, answered, error, many_edits, noise, pad
from trimtab import latentqa, selfcontrol
from trimtab.adapter import Low

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

CLOSE, DIFFERS = 1e-3, 1e-2  # relative errors; a GPU adds in another order
LABELLED = [
    tt.Example(f"Say {i % 5}", "yes " * i if i % 2 else "no " * i, i % 2) for i in range(20)
]
TEXTS = ["How are you?", "Tell me a story about the sea.", "Why?", "What is a house?"]


def both(name="llama", dtype=torch.float32, talks=False):
    """One tiny model on the CPU and on the GPU."""
    tokenizer = tokenizers_zoo.byte_tokenizer("chatml") if talks else None
    model = model_zoo.tiny(name).to(dtype)
    return [tt.LM(model, tokenizer), tt.LM(model_zoo.tiny(name).to(GPU, dtype), tokenizer)]


def test_the_devices_are_not_the_same():
    cpu, gpu = both()
    assert (cpu.device.type, gpu.device.type) == ("cpu", GPU)
    assert tt.models.load("smollm2-135m")[0].device.type == GPU


@pytest.mark.parametrize("name", sorted(model_zoo.ARCHITECTURES))
@torch.no_grad()
def test_edits_recordings_and_answers_of_every_architecture(name):
    cpu, gpu = both(name)
    edits = many_edits()
    batch = answered([PROMPTS[i % 3] for i in range(len(edits))], 2)
    expected, found = (lm(batch, edits, record="resid@all") for lm in (cpu, gpu))
    assert error(found.logits.cpu(), expected.logits) < CLOSE
    assert error(found.logits.cpu(), cpu(batch).logits) > DIFFERS
    for a, b in zip(found.recording.rows(), expected.recording.rows(), strict=True):
        assert a.device.type == GPU and error(a.cpu(), b) < CLOSE
    rows = [PROMPTS[i % 3] for i in range(len(edits))]
    first = [lm.generate_ids(pad(rows), edits, max_new_tokens=2) for lm in (cpu, gpu)]
    same = [a == b for a, b in zip(*first, strict=True)]
    assert sum(same) >= len(same) - 2  # ties of two tokens may fall either way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    cpu, gpu = both()
    half = tt.LM(model_zoo.tiny("llama").to(GPU, dtype))
    edit = tt.Add("resid@1:3", noise(2, D), keep_norm=True) + tt.Project("resid@2", noise(1, D))
    real = answered().mask.bool()  # padding reads whatever a kernel leaves there
    exact, found, near = (lm(answered(), edit).logits.float().cpu() for lm in (cpu, half, gpu))
    assert error(found[real], exact[real]) < 0.1
    assert error(found[real], cpu(answered()).logits[real]) > 0.1
    assert error(near[real], exact[real]) < CLOSE


def test_sampling_is_repeated_by_its_seed():
    _, gpu = both(talks=True)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    first, again, other = (gpu.generate(TEXTS, None, seed=s, **options) for s in (1, 1, 2))
    assert first == again != other


def test_streams():
    cpu, gpu = both(talks=True)
    edit = tt.Add("resid@1:3 answer", noise(2, D))
    told = ["".join(lm.stream(TEXTS[0], edit, max_new_tokens=8)) for lm in (cpu, gpu)]
    assert told[0] == told[1]


@pytest.mark.parametrize("method", ["mean", "logistic", "pca"])
def test_probes(method, tmp_path):
    found = [
        tt.concepts.fit(lm, LABELLED, "resid@all answer", method, show_progress=False)
        for lm in both(talks=True)
    ]
    cosines = torch.cosine_similarity(*(p.weight.cpu() for p in found), dim=-1)
    assert cosines.abs().min() > 0.999
    found[1].save(tmp_path / "probe")
    cpu, gpu = both(talks=True)
    loaded = tt.load(tmp_path / "probe")
    scores = [lm.score(TEXTS, TEXTS, loaded.edit(dose=0.1)).cpu() for lm in (cpu, gpu)]
    assert error(*scores) < CLOSE
    seen = [
        loaded.predict(lm.record(LABELLED, loaded.place, show_progress=False)) for lm in (cpu, gpu)
    ]
    assert error(seen[1].cpu(), seen[0]) < CLOSE


def test_self_control(tmp_path):
    judge = selfcontrol.Judge("Happy?")
    slopes, solved = [], []
    for lm in both(talks=True):
        slopes.append(selfcontrol.gradient(lm, TEXTS, TEXTS, judge))
        options = {"steps": 2, "search": 2, "max_new_tokens": 6, "max_perplexity_ratio": 9.0}
        solved.append(selfcontrol.solve(lm, TEXTS, judge, **options))
    assert error(slopes[1].cpu(), slopes[0]) < DIFFERS
    for a, b in zip(*solved, strict=True):
        assert b.first.score == pytest.approx(a.first.score, abs=1e-3)
    solved[1][0].edit.save(tmp_path / "solution")
    assert torch.equal(tt.load(tmp_path / "solution").delta, solved[1][0].edit.delta.cpu())


def test_controllers():
    pairs = [(t, tt.Add("resid@1:3 prompt", 0.06 * noise(2, D), relative=True)) for t in TEXTS]
    quick = {"length": 4, "adapter_length": 4, "answer_tokens": 4, "epochs": 3}
    cpu, gpu = both(talks=True)
    for more in ({}, {"rank": 2}):
        found = [
            tt.prefix.distill(lm, pairs, lr=0.01, show_progress=False, **quick, **more)
            for lm in (cpu, gpu)
        ]
        with torch.no_grad():
            batch = cpu.batch(TEXTS)
            a, b, plain = (cpu(batch, e).logits for e in (*found, None))
        assert error(b, a) < 0.05 * max(1.0, error(plain, a))


def test_adapters():
    cpu, gpu = both()
    low = {
        name: Low(noise(2, inside), noise(outside, 2, seed=1), 0.5)
        for name, (inside, outside) in cpu.anatomy.linear_sizes().items()
    }
    edit = tt.Adapter("resid@all answer", low)
    with torch.no_grad():
        found, expected, plain = (
            lm(answered(), e).logits.cpu() for lm, e in ((gpu, edit), (cpu, edit), (cpu, None))
        )
    assert error(found, expected) < CLOSE and error(plain, expected) > DIFFERS


def test_readers():
    items = [
        latentqa.Item("a", control_user="Tell me of a ship.", qa=(("Who?", "A small dog."),)),
        latentqa.Item("b", control_user="What is it?", qa=(("Why?", "Because it is."),)),
    ]
    options = {"read_layer": 2, "rank": 4, "steps": 4, "lr": 1e-3, "dropout": 0.0}
    readers = [latentqa.train(lm, items, show_progress=False, **options) for lm in both(talks=True)]
    losses = [float(r.loss(items).detach()) for r in readers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    told = [r.ask("Tell me of a ship.", "Who?", max_new_tokens=1) for r in readers]
    assert told[0] == told[1]


def test_evaluation():
    edit = tt.Add("resid@0:2 answer", noise(2, D))
    options = {"max_new_tokens": 6, "ask": "Use vowels.", "show_progress": False}
    found = [
        tt.evals.sweep(lm, lambda s: s * edit, [-1, 0, 1], TEXTS, vowels, **options)
        for lm in both(talks=True)
    ]
    for a, b in zip(found[0].arms, found[1].arms, strict=True):
        assert (a.name, a.scale) == (b.name, b.scale)
        assert b.perplexity == pytest.approx(a.perplexity, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_decoding(mode):
    """CUDA graphs are captured once: another edit is other numbers in the same buffers."""
    torch._dynamo.reset()
    _, eager = both()
    compiled = both()[1].compile(**({} if mode is None else {"mode": mode}))
    w = noise(2, D)
    edits = [
        tt.Add(f"resid@{i % 3}:{i % 3 + 2}", 0.3 * i * w, keep_norm=i % 2 == 0) for i in range(6)
    ]
    expected = [eager.generate_ids(pad(PROMPTS), e, 8) for e in edits]
    found = [compiled.generate_ids(pad(PROMPTS), edits[0], 8)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found += [compiled.generate_ids(pad(PROMPTS), e, 8) for e in edits[1:]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert found == expected
    assert len({str(e) for e in expected}) > 3
    rows = [edits[3], None, edits[5]]
    assert compiled.generate_ids(pad(PROMPTS), rows, 8) == eager.generate_ids(pad(PROMPTS), rows, 8)
    torch._dynamo.reset()
