"""Evaluation: PNES against curves made by hand, sweeps against one edit at a time, kill and resume.

The judge here counts letters: sweeps and tuning are about rows, files and bounds, not about taste.
"""

import json
import math
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab.errors import ArtifactError, TrimtabError
from trimtab.evals.identity import scorer_identity
from trimtab.evals.profile import contrast, slope, solved
from trimtab.evals.report import page
from trimtab.evals.sweep import asking, exponential, fluencies
from trimtab.evals.tune import CLOSE, FIRST, NOTHING, Answer, Setting, _finalists, _Search
from trimtab.journal import Journal

SCALES = np.array([-256, -128, -64, -32, -16, -8, 0, 8, 16, 32, 64, 128, 256], float)
PROMPTS = ["How are you?", "Tell me a story about the sea.", "Why?", "What is a house?"]


def by_hand(scales, effects, perplexities):
    """PNES in float64, by many starts of a general solver."""
    zero = list(scales).index(0)
    ratio = np.asarray(perplexities) / perplexities[zero]
    pne = (np.asarray(effects) - effects[zero]) / ratio
    keep = np.asarray(perplexities) < 2000
    b = np.linalg.lstsq(scales[keep, None] ** 2, np.log(ratio[keep]), rcond=None)[0][0]

    def curve(x, a):
        return (np.tanh(x[0] * a) + x[1]) / np.exp(b * a**2)

    starts = [
        [s, 0.0] for s in np.concatenate([-np.geomspace(1e-5, 1, 15), np.geomspace(1e-5, 1, 15)])
    ]
    fits = [
        least_squares(lambda x: curve(x, scales) - pne, s, xtol=1e-14, ftol=1e-14) for s in starts
    ]
    best = min(fits, key=lambda f: f.cost)
    values = curve(best.x, np.linspace(scales.min(), scales.max(), 200))
    r2 = 1 - 2 * best.cost / ((pne - pne.mean()) ** 2).sum()
    return values.max() - values.min(), r2


NOISE = np.random.default_rng(3).normal(0, 0.03, len(SCALES)) * (SCALES != 0)
CURVES = {
    "monotone": (0.5 + 0.001 * SCALES, np.full(len(SCALES), 12.0)),
    "saturating": (0.5 + 0.4 * np.tanh(0.02 * SCALES), 12 * np.exp(1e-5 * SCALES**2)),
    "noisy": (0.4 + 0.3 * np.tanh(0.01 * SCALES) + NOISE, 9 * np.exp(2e-5 * SCALES**2 + NOISE)),
    "no point with a low perplexity": (
        0.5 + 0.3 * np.tanh(0.05 * SCALES),
        15 * np.exp(0.5 + 2e-5 * SCALES**2) ** (SCALES != 0),
    ),
    "one outlier": (
        0.5 + 0.4 * np.tanh(0.02 * SCALES),
        np.where(SCALES == 256, 1e5, 12 * np.exp(1e-5 * SCALES**2)),
    ),
    "backwards": (0.5 - 0.4 * np.tanh(0.02 * SCALES), 12 * np.exp(1e-5 * SCALES**2)),
}


@pytest.mark.parametrize("name", CURVES)
def test_pnes_equals_a_fit_by_hand(name):
    effects, perplexities = CURVES[name]
    found = tt.evals.pnes(SCALES, effects, perplexities)
    value, r2 = by_hand(SCALES, effects, perplexities)
    assert found.value == pytest.approx(value, rel=1e-5)
    assert found.r2 == pytest.approx(r2, abs=1e-5)
    # The control: perplexity matters, and so does the order of the effects.
    assert by_hand(SCALES, np.roll(effects, 4), perplexities)[0] != pytest.approx(value, rel=1e-2)


def test_pnes_of_an_exact_curve_gives_its_parameters_back():
    s, b = 0.013, 1.5e-5
    ratio = np.exp(b * SCALES**2)
    found = tt.evals.pnes(SCALES, 0.3 + np.tanh(s * SCALES), 10 * ratio)
    assert (found.s, found.b, found.c) == pytest.approx((s, b, 0.0), abs=1e-9)
    assert found.r2 == pytest.approx(1)
    assert found.curve([64.0])[0] == pytest.approx(np.tanh(s * 64) / np.exp(b * 64**2))
    assert found.at[0] == pytest.approx(-found.at[1]) != 0


def test_a_flat_sweep_has_pnes_0_and_perplexity_alone_does_not_count():
    found = tt.evals.pnes(SCALES, np.full(13, 0.7), 12 * np.exp(1e-5 * SCALES**2))
    assert (found.value, found.lowest, found.highest) == (0.0, 0.7, 0.7)


def test_broken_text_counts_as_no_effect():
    effects, perplexities = CURVES["saturating"]
    broken = np.where(abs(SCALES) == 256, np.inf, perplexities)
    assert tt.evals.pnes(SCALES, effects, broken).b == pytest.approx(1e-5)
    assert np.isfinite(tt.evals.pnes(SCALES, effects, broken).value)


def test_points_of_broken_text_say_nothing_of_b_unless_all_are_like_that():
    """The bound is the paper's 2,000, also where the plain perplexity is above 20."""
    clean = 90 * np.exp(2e-5 * SCALES**2)
    costs = np.where(abs(SCALES) == 256, 5000.0, clean)  # off the curve, below 100 times the plain
    assert tt.evals.pnes(SCALES, SCALES / 300, costs).b == pytest.approx(2e-5)
    value, r2 = by_hand(SCALES, SCALES / 300, costs)
    found = tt.evals.pnes(SCALES, SCALES / 300, costs)
    assert (found.value, found.r2) == pytest.approx((value, r2), rel=1e-4)
    # A model that knows nothing of the text: its ratios still tell.
    large = np.where(abs(SCALES) == 256, 1e9, 3000 * np.exp(2e-5 * SCALES**2))
    assert tt.evals.pnes(SCALES, SCALES / 300, large).b == pytest.approx(2e-5)


def test_low_and_high_effects_stay_within_the_perplexity_bound():
    effects, perplexities = CURVES["no point with a low perplexity"]
    found = tt.evals.pnes(SCALES, effects, perplexities)
    assert (found.lowest, found.highest) == (0.5, 0.5)
    wide = tt.evals.pnes(SCALES, effects, perplexities, low_ratio=100)
    assert wide.highest == effects.max()


def test_the_interval_holds_the_value_and_narrows_with_prompts():
    random = np.random.default_rng(0)

    def interval(count):
        effects = 0.5 + 0.3 * np.tanh(0.02 * SCALES)[:, None] + random.normal(0, 0.2, (13, count))
        costs = 12 * np.exp(1e-5 * SCALES**2)[:, None] * random.lognormal(0, 0.2, (1, count))
        found = tt.evals.pnes(SCALES, effects, costs, bootstrap=100)
        again = tt.evals.pnes(SCALES, torch.tensor(effects), costs, bootstrap=100)
        assert found == again
        return found.value, *found.interval

    (_, low, high), (value, near, far) = interval(12), interval(300)
    assert near <= value <= far
    assert far - near < (high - low) / 2


@pytest.mark.parametrize(
    "scales, effects, costs, told",
    [
        ([1, 2], [0.1, 0.2], [1, 1], "lack 0"),
        ([0, 1], [0.1, 0.2, 0.3], [1, 1], "effects have shape"),
        ([0, 1], [0.1, float("nan")], [1, 1], "not finite"),
        ([0, 1], [0.1, 0.2], [0, 1], "above 0"),
    ],
)
def test_pnes_says_what_does_not_fit(scales, effects, costs, told):
    with pytest.raises(ValueError, match=told):
        tt.evals.pnes(scales, effects, costs)


# --- sweeps ---------------------------------------------------------------------------------------


def tiny():
    tokenizer = tokenizers_zoo.byte_tokenizer(tokenizers_zoo.TEMPLATES["chatml"])
    return tt.LM(model_zoo.tiny("llama"), tokenizer)


@pytest.fixture(scope="module")
def lm():
    return tiny()


def vowels(prompts, answers):
    """The share of vowels: a concept that a random model has, more or less."""
    return [sum(c in "aeiouAEIOU" for c in a) / max(len(a), 1) for a in answers]


def direction(lm, seed=0):
    return torch.randn(2, lm.width, generator=torch.Generator().manual_seed(seed))


def make_edit(lm):
    vector = direction(lm)
    return lambda scale: tt.Add("resid@0:2 answer", scale * vector)


def swept(lm, **changes):
    given = {"scales": [-1, 0, 0.5, 1], "prompts": PROMPTS, "scorer": vowels, "max_new_tokens": 8}
    given |= {"ask": "Use vowels.", "show_progress": False} | changes
    return tt.evals.sweep(lm, make_edit(lm), **given)


def arm(found, name, scale):
    return next(a for a in found.arms if (a.name, a.scale) == (name, scale))


def test_a_sweep_equals_one_edit_at_a_time(lm):
    found = swept(lm, batch_size=7)
    edit = make_edit(lm)(0.5)
    alone = [lm.generate(p, edit, 8) for p in PROMPTS]
    own = arm(found, "edit", 0.5)
    assert own.answers == alone != found.baseline.answers
    assert own.effects == pytest.approx(vowels(PROMPTS, alone))
    references = found.baseline.answers
    assert own.perplexities == pytest.approx(
        [tt.evals.perplexity(lm, [(p, r)], edit) for p, r in zip(PROMPTS, references, strict=True)],
        rel=1e-4,
    )
    assert own.fluencies == pytest.approx(
        [tt.evals.perplexity(lm, [pair]) for pair in zip(PROMPTS, alone, strict=True)], rel=1e-4
    )


def test_a_sweep_stands_beside_its_baselines(lm):
    found = swept(lm)
    names = [(a.name, a.scale) for a in found.arms]
    assert names == [
        ("none", 0.0),
        *(("edit", s) for s in (-1.0, 0.5, 1.0)),
        ("flipped", -0.5),
        *(("random", s) for s in (-1.0, 0.5, 1.0)),
        ("prompt", None),
    ]
    assert found.baseline.answers == [lm.generate(p, None, 8) for p in PROMPTS]
    asked = [lm.generate(f"{p} Use vowels.", None, 8) for p in PROMPTS]
    assert arm(found, "prompt", None).answers == asked != found.baseline.answers
    flipped = [lm.generate(p, make_edit(lm)(-0.5), 8) for p in PROMPTS]
    assert arm(found, "flipped", -0.5).answers == flipped
    assert arm(found, "random", 1.0).answers != arm(found, "edit", 1.0).answers
    assert [a.scale for a in found.of("edit")] == [-1, 0, 0.5, 1]
    assert found.ratio(found.baseline) == 1
    assert found.best(max_ratio=1e9).effect == max(a.effect for a in found.of("edit"))


def test_a_random_direction_has_the_size_of_the_edit_and_nothing_else_of_it(lm):
    edit = make_edit(lm)(0.7)
    other, same = tt.evals.random_like(edit, 3), tt.evals.random_like(0.1 * edit, 3)
    norm = torch.linalg.vector_norm
    assert torch.allclose(norm(other.delta, dim=-1), norm(edit.delta, dim=-1))
    assert torch.allclose(10 * same.delta, other.delta, atol=1e-6)
    cosine = torch.cosine_similarity(other.delta, edit.delta, dim=-1)
    assert (cosine.abs() < 0.6).all()
    assert not torch.equal(tt.evals.random_like(edit, 4).delta, other.delta)
    both = tt.evals.random_like(edit + edit, 3)
    assert len(both.parts()) == 2
    with pytest.raises(ValueError, match="no random direction for Project"):
        tt.evals.random_like(tt.Project("resid@0:2", direction(lm)), 0)


def test_a_random_adapter_looks_at_the_same_and_adds_as_much(lm):
    sizes = lm.anatomy.linear_sizes([0, 1])
    random = {n: (torch.randn(2, i), torch.randn(o, 2)) for n, (i, o) in sizes.items()}
    edit = -0.5 * tt.Adapter("resid@all", random)
    other, norm = tt.evals.random_like(edit, 3), torch.linalg.vector_norm
    assert other.strength == 0.5 and other.modules.keys() == edit.modules.keys()
    for name, low in edit.modules.items():
        mine = other.modules[name]
        assert torch.equal(mine.down, low.down) and mine.scale == low.scale
        assert torch.allclose(norm(mine.up, dim=0), norm(low.up, dim=0))
        if len(low.up) > 8:
            assert (torch.cosine_similarity(mine.up, low.up, dim=0).abs() < 0.9).all()
        assert not torch.equal(tt.evals.random_like(edit, 4).modules[name].up, mine.up)


def test_asking_goes_to_the_end_of_the_last_turn():
    told = asking("Be kind.")
    assert told("Hello.") == "Hello. Be kind."
    history = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi."}]
    assert told(history) == [history[0], {"role": "user", "content": "Hi. Be kind."}]
    assert history[1]["content"] == "Hi."


def test_perplexity_is_the_mean_over_texts_of_exp_cross_entropy(lm):
    texts = ["The sea is wide.", "No.", "A house stands on a hill."]
    logits = [lm.model(lm.batch([t], raw=True).ids).logits[0].double() for t in texts]
    ids = [lm.batch([t], raw=True).ids[0] for t in texts]
    losses = [
        torch.nn.functional.cross_entropy(z[:-1], i[1:]) for z, i in zip(logits, ids, strict=True)
    ]
    expected = float(torch.stack(losses).detach().exp().mean())
    assert tt.evals.perplexity(lm, texts) == pytest.approx(expected, rel=1e-4)
    steered = tt.evals.perplexity(lm, texts, tt.Add("resid@0:2", direction(lm)))
    assert steered != pytest.approx(expected, rel=1e-3)


def test_repetition_counts_runs_of_three_words():
    assert tt.evals.repetition("one two three four") == 0
    assert tt.evals.repetition("go on and go on and") == pytest.approx(1 / 4)
    assert tt.evals.repetition("no") == 0


def test_a_sweep_is_saved_whole_and_read_back(lm, tmp_path):
    found = swept(lm)
    found.save(tmp_path / "a.json")
    assert tt.evals.Sweep.load(tmp_path / "a.json") == found
    (tmp_path / "b.json").write_text('{"arms": 3}')
    with pytest.raises(ArtifactError, match="not a saved sweep"):
        tt.evals.Sweep.load(tmp_path / "b.json")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"scales": []}, "scales are finite"),
        ({"scales": [float("inf")]}, "scales are finite"),
        ({"baselines": ["nothing"]}, "no baseline 'nothing'"),
        ({"prompts": []}, "no prompts"),
        ({"reference": ["one"]}, "1 reference answers for 4 prompts"),
        ({"reference": []}, "reference is empty"),
        ({"reference": ["a", "b", " ", "d"]}, r"references \[2\] are empty"),
        ({"prompts": ["What?", None]}, "prompt 1 is None"),
        ({"scorer": None}, "None cannot be"),
        ({"batch_size": 0}, "batch_size is 1 or more, not 0"),
        ({"prompts": [[{"role": "system", "content": "S"}]]}, "has none"),
    ],
)
def test_a_sweep_says_what_does_not_fit_before_it_answers(lm, monkeypatch, changes, told):
    monkeypatch.setattr(lm, "generate", lambda *a, **k: pytest.fail("answered"))
    with pytest.raises((ValueError, TrimtabError), match=told):
        swept(lm, **changes)


def test_a_judge_that_fails_loses_no_answer(lm, tmp_path, monkeypatch):
    calls, plain = [], lm.generate
    monkeypatch.setattr(lm, "generate", lambda *a, **k: calls.append(1) or plain(*a, **k))
    with pytest.raises(TrimtabError, match="one number per answer"):
        swept(lm, out=tmp_path, batch_size=4, scorer=lambda prompts, answers: [1.0])
    assert len(calls) == 1  # found out at the first batch
    again = swept(lm, out=tmp_path, batch_size=4)
    assert len(calls) == len(again.arms) == 9  # whose answers were kept
    assert again == swept(lm, batch_size=4) != swept(lm, batch_size=4, scorer=lengths)
    with pytest.raises(ArtifactError, match=r"another sweep \(judge: \"vowels\" there"):
        swept(lm, out=tmp_path, batch_size=4, scorer=lengths)


def lengths(prompts, answers):
    return [len(answer) / 100 for answer in answers]


def test_a_sweep_without_asking_says_so(lm):
    with pytest.warns(UserWarning, match="just asking"):
        assert "prompt" not in {a.name for a in swept(lm, ask=None).arms}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swept(lm, ask=None, baselines=("random",))


def test_a_page_says_who_judged_and_what_was_asked(lm):
    text = page(swept(lm))
    assert "judge: vowels" in text and "just asking: Use vowels." in text
    assert "judge: lengths" in page(swept(lm, scorer=lengths)) != text


def test_what_is_no_number_is_finite_in_a_file():
    assert exponential(math.nan) == exponential(math.inf) == math.exp(700)
    assert exponential(0.5) == math.exp(0.5)


def test_a_sweep_of_another_kind_does_not_overwrite_a_result(lm, tmp_path):
    first = swept(lm, out=tmp_path / "s")
    assert swept(lm, out=tmp_path / "s") == first
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["sweep.json"]
    with pytest.raises(ArtifactError, match="another sweep"):
        swept(lm, out=tmp_path / "s", scales=[0, 3])


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_evals as t
lm = t.tiny()
plain, count = lm.generate, 0
def slowly(*args, **options):
    global count
    count += 1
    if count > 3:
        time.sleep(60)
    return plain(*args, **options)
lm.generate = slowly
t.swept(lm, out={out!r}, batch_size=4)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_with_the_same_file(lm, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    swept(lm, out=whole, batch_size=4)
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(broken))
    process = subprocess.Popen([sys.executable, "-c", script])
    progress = broken / "progress.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (
            progress.exists() and progress.read_bytes().count(b"\n") == 7
        ):  # the job; answers and their effects
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "sweep.json").exists()
    with progress.open("a") as file:  # and the crash came in the middle of a line
        file.write('{"key": "answers/12", "value": ["hal')
    calls = []
    plain = lm.generate
    lm.generate = lambda *a, **k: calls.append(1) or plain(*a, **k)
    try:
        swept(lm, out=broken, batch_size=4)
    finally:
        del lm.generate
    assert (broken / "sweep.json").read_bytes() == (whole / "sweep.json").read_bytes()
    assert len(calls) == 9 - 3  # nine arms of four prompts, three of which were finished
    assert not progress.exists()


def test_a_journal_belongs_to_one_job(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, {"scales": [1]}) as journal:
        assert journal.piece("a", lambda: [1, 2]) == [1, 2]
    with Journal(path, {"scales": [1]}) as journal:
        assert journal.piece("a", lambda: pytest.fail("made twice")) == [1, 2]
    with pytest.raises(ArtifactError, match=r"scales: \[1\] there, \[2\] now"):
        Journal(path, {"scales": [2]})
    assert json.loads(path.read_text().splitlines()[0]) == {"job": {"scales": [1]}}


@pytest.mark.parametrize(
    "there, now, told",
    [
        ({"o": {"a": 1, "b": 4}}, {"o": {"a": 1, "b": 5}}, r"o\.b: 4 there, 5 now"),
        ({"o": {"a": 1}}, {"o": {"a": 1, "b": 5}}, r"o\.b: null there, 5 now"),
        ({"j": [{"q": "x" * 80}, 1]}, {"j": [{"q": "x" * 80}, 2]}, r"j\.1: 1 there, 2 now"),
        ({"q": "x" * 80 + "a"}, {"q": "x" * 80 + "b"}, r'q: "\.+x+a" there, "\.+x+b" now'),
        ({"j": [1]}, {"j": {"a": 1}}, r"j: \[1\] there, \{\"a\": 1\} now"),
    ],
)
def test_a_journal_says_what_differs_however_deep(tmp_path, there, now, told):
    with Journal(tmp_path / "j.jsonl", there) as journal:
        journal.piece("a", lambda: 1)
    with pytest.raises(ArtifactError, match=told):
        Journal(tmp_path / "j.jsonl", now)


def test_a_journal_without_a_piece_blocks_nobody(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, {"place": "nowhere"}).__exit__()
    with Journal(path, {"place": "here"}) as journal:
        journal.piece("a", lambda: 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"job": {"place": "here"}},
        {"key": "a", "value": 1},
    ]


@pytest.mark.parametrize("mine", ["my notes", "my notes\nof years", '{"mine": 1}\n', "[1]\n", "\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, mine):
    path = tmp_path / "j.jsonl"
    path.write_text(mine)
    with pytest.raises(ArtifactError, match="it is no journal"):
        Journal(path, {"place": "here"})
    assert path.read_text() == mine


@pytest.mark.parametrize("end", [0, 1, 5, 12, 20, 21, 30])
def test_a_journal_cut_anywhere_goes_on(tmp_path, end):
    path, whole = tmp_path / "j.jsonl", '{"job": {"at": "here"}}\n{"key": "a", "value": 1}\n'
    path.write_text(whole[:end])
    with Journal(path, {"at": "here"}) as journal:
        assert journal.piece("a", lambda: 1) == 1
    assert path.read_text() == whole


# --- tuning ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(lm):
    random = torch.Generator().manual_seed(1)
    shift = torch.randn(lm.n_layers, lm.width, generator=random)
    rows = [
        torch.randn(5, lm.n_layers, lm.width, generator=random) + shift * (i % 2) for i in range(20)
    ]
    recording = tt.Recording.from_rows("resid@all answer", rows)
    return tt.concepts.fit_recording(recording, [i % 2 for i in range(20)])


def tuned(lm, probe, **changes):
    given = {"max_new_tokens": 6, "budget": 6000, "max_ratio": 1.5, "show_progress": False}
    given |= {"prompts": PROMPTS, "scorer": vowels} | changes
    return tt.evals.tune(lm, probe, **given)


def test_tuning_stays_within_its_bounds_and_is_stored(lm, probe, tmp_path):
    found = tuned(lm, probe)
    best = found.best
    assert best.ratio <= 1.5 and best.judged == len(PROMPTS)
    assert found.generated <= 6000
    assert best.effect == max(s.effect for s in found.frontier)
    assert found.runner_up is None or best.guidance | {"dose": 0} != found.runner_up.guidance | {
        "dose": 0
    }
    ratios = [s.ratio for s in found.frontier]
    assert ratios == sorted(ratios)
    # What it reports is what the edit does.
    answers = lm.generate(PROMPTS, found.edit, 6)
    assert best.effect == pytest.approx(float(np.mean(vowels(PROMPTS, answers))))
    plain = lm.generate(PROMPTS, None, 6)
    references = list(zip(PROMPTS, plain, strict=True))
    costs = [tt.evals.perplexity(lm, references, e) for e in (found.edit, None)]
    assert best.ratio == pytest.approx(costs[0] / costs[1], rel=1e-4)
    assert best.effect > found.baseline  # a control: there was something to find
    found.probe.save(tmp_path / "vowels")
    loaded = tt.load(tmp_path / "vowels")
    assert torch.equal(loaded.edit().delta, found.edit.delta)
    assert loaded.edit().place == found.edit.place
    assert loaded.meta.scores["tuned"]["effect"] == best.effect
    assert not torch.equal(loaded.edit(scale=2.0).delta, found.edit.delta)
    # The loaded probe is an edit by itself; one that was not tuned says that it is none.
    assert lm.generate(PROMPTS, loaded, 6) == answers != plain
    assert lm.generate(PROMPTS[:2], [loaded, None], 6) == [answers[0], plain[1]]
    with pytest.raises(tt.PlaceError, match="was not tuned"):
        lm.generate(PROMPTS, probe, 6)


class Curve(_Search):
    """A search whose ratios are 1.25 ** dose ** power, and whose answers are words of its own."""

    power = 1.4

    def _ratios(self, stage, settings, pairs):
        return [replace(s, ratio=self.ratio(s.dose)) for s in settings]

    def ratio(self, dose):
        return 1.25**dose**self.power

    def answer(self, setting, prompt):
        return Answer("a b", setting.layers[0] + 0.1 * prompt, 2.0)

    def _judge(self, stage, settings, numbers):
        for s in settings:
            for p in numbers:
                self.answers[(*s.key, p)] = self.answer(s, p)
        return [self._summed(s, numbers) for s in settings]


def curve(kind=Curve, prompts=24, tokens=10):
    return kind(None, None, list(range(prompts)), None, None, tokens, 1.25)


def starts(count, dose):
    return [Setting((i,), "all", dose) for i in range(count)]


@pytest.mark.parametrize("dose", [0.1, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("power", [1.0, 1.4, 2.0, 2.8])
def test_the_largest_dose_of_a_bound_is_found(power, dose):
    """A perplexity whose logarithm is a power of the dose, at its bound at a dose of 1."""
    search = curve()
    search.power = power
    (found,) = search._largest("", starts(1, dose), [])
    assert CLOSE <= found.dose**power <= 1 and found.ratio == search.ratio(found.dose)


def test_a_dose_without_a_number_is_beyond_the_bound():
    class Broken(Curve):
        def ratio(self, dose):
            return float("nan") if dose > 0.5 else super().ratio(dose)

    (found,) = curve(Broken)._largest("", starts(1, 0.8), [])
    assert 0.05 < found.dose <= 0.5

    class Better(Curve):
        def ratio(self, dose):
            return 1 - 0.01 * dose

    (found,) = curve(Better)._largest("", starts(1, 1.0), [])
    assert found.dose > 10  # an edit that makes the references likelier may be of any size


@pytest.mark.parametrize("settings", [1, 2, 4, 9, 27])
@pytest.mark.parametrize("more", [0, 90, 1000, 100_000])
@pytest.mark.parametrize("dose", [0.5, 0.95])
def test_comparisons_stay_within_the_budget_and_grow(settings, more, dose):
    """With doses that change before the last comparison, and with such as stay."""
    search, plain = curve(), Setting((), "all", 0.0, repetition=0.0, broken=0.0)
    budget = 10 * (2 * settings + 2 * _finalists(settings)) + more
    steps = search._halve(starts(settings, dose), plain, budget, [])
    assert search.spent <= budget
    judged = [step[0].judged for step in steps]
    assert min(judged) >= 2 and max(s.judged for s in steps[-1]) == judged[-1]
    if dose == 0.95:
        assert judged == sorted(judged)
    if more == 100_000:
        assert judged == [24, 24, 24]


@pytest.mark.parametrize("cost, broken", [(2.0, 0), (39.0, 0), (41.0, 1), (None, 1)])
@pytest.mark.parametrize("share, ranked", [(0.04, [1, 0]), (0.25, [0, 1])])
def test_what_is_nonsense_to_the_plain_model_comes_last(cost, broken, share, ranked):
    """Plain answers cost 2; those of setting 1, which the judge prefers, in part something else."""

    class Odd(Curve):
        def answer(self, setting, prompt):
            if not setting.layers:
                return Answer("a b", 0.0, 2.0)
            odd = setting.layers == (1,) and prompt < share * 24
            return Answer("a b", setting.layers[0] + 1.0, cost if odd else 2.0)

    search = curve(Odd)
    (plain,) = search._judge("", [NOTHING], range(24))
    found = search._judge("", starts(2, 1.0), range(24))
    assert [s.broken for s in found] == [0, broken * -(-24 * share // 1) / 24]
    order = [s.layers[0] for s in search._ranked(found, plain)]
    assert order == (ranked if broken else [1, 0])


def test_broken_answers_are_counted_by_their_perplexity_to_the_plain_model(lm, probe):
    edit, texts = probe.edit(dose=0.5), ["", " \n", "some words", "\ufffd"]
    costs = fluencies(lm, PROMPTS[:4], texts)
    assert costs[:2] == [None, None]
    assert costs[2] == pytest.approx(tt.evals.perplexity(lm, [(PROMPTS[2], texts[2])]), rel=1e-4)
    assert fluencies(lm, PROMPTS[:2], texts[:2]) == [None, None]
    found = tuned(lm, probe, layers=[[1, 2]], tokens="answer[:4]", max_ratio=3.0)
    answers = [lm.generate(PROMPTS, e, 6) for e in (None, found.edit)]
    plain, steered = (np.array(fluencies(lm, PROMPTS, a), dtype=float) for a in answers)
    assert found.best.broken == np.mean(~(steered <= 20 * np.median(plain)))
    # The control: to the edited model its own text is likelier than to the plain one.
    pairs = list(zip(PROMPTS, lm.generate(PROMPTS, edit, 6), strict=True))
    assert tt.evals.perplexity(lm, pairs, edit) < tt.evals.perplexity(lm, pairs)


def test_the_first_tokens_take_a_dose_of_their_own(lm, probe, tmp_path):
    made = probe.edit(layers=[1, 2], tokens="answer", dose=0.1, first=(2, 3.0))
    begun, rest = (
        probe.edit(layers=[1, 2], tokens=t, dose=d)
        for t, d in (("answer[:2]", 0.3), ("answer[2:]", 0.1))
    )
    with torch.no_grad():
        batch = lm.batch(PROMPTS[:2], ["some more words"] * 2)
        found, wanted, plain = (
            lm(batch, e).logits
            for e in (made, begun + rest, probe.edit(layers=[1, 2], tokens="answer", dose=0.1))
        )
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain, atol=1e-3)  # the control
    with pytest.raises(tt.PlaceError, match=r"first= goes with tokens all or prompt or answer"):
        probe.edit(tokens="answer[:4]", dose=0.1, first=(2, 3.0))
    guided = replace(
        probe, guidance={"layers": [1, 2], "tokens": "answer", "dose": 0.1, "first": [2, 3.0]}
    )
    guided.save(tmp_path / "guided")
    assert lm.generate(PROMPTS, tt.load(tmp_path / "guided"), 6) == lm.generate(PROMPTS, made, 6)
    file = tmp_path / "guided" / "artifact.json"
    file.write_text(file.read_text().replace("3.0", '"much"'))
    with pytest.raises(ArtifactError):
        tt.load(tmp_path / "guided")


@pytest.mark.filterwarnings("ignore:no setting has more effect")
def test_whole_answers_and_their_beginnings_are_tried(lm, probe):
    found = tuned(lm, probe, layers=[[1, 2]])
    kinds = {(s.tokens, s.first) for s in found.tried}
    whole = {("all", None), ("answer", None), ("answer", FIRST)}
    assert kinds == whole | {("answer[:4]", None), ("answer[:1]", None)}
    only = tuned(lm, probe, layers=[[1, 2]], tokens="answer")
    assert {s.tokens for s in only.tried} == {"answer"}


@pytest.mark.filterwarnings("ignore:no setting has more effect", "ignore:no setting keeps")
def test_the_frontier_says_what_a_lower_price_buys(lm, probe):
    given = {"layers": [[1, 2]], "tokens": "answer[:4]", "max_ratio": 3.0}
    found = tuned(lm, probe, **given)
    doses = sorted(s.dose for s in found.tried if s.judged)[-3:]
    assert doses == pytest.approx([doses[2] / 3, doses[2] * 2 / 3, doses[2]])
    smallest, largest = (next(s for s in found.tried if s.dose == doses[i]) for i in (0, 2))
    answers = lm.generate(PROMPTS, smallest.edit(probe), 6)
    assert smallest.effect == pytest.approx(float(np.mean(vowels(PROMPTS, answers))))
    assert 1 < smallest.ratio < largest.ratio and smallest.judged == len(PROMPTS)
    assert found.best.effect == max(s.effect for s in found.frontier)
    # A budget that is used up buys none of it: a control.
    least = 6 * (4 + 2 + 4)
    assert len(tuned(lm, probe, **given, budget=least).tried) == 1


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"layers": []}, "each name one choice"),
        ({"tokens": []}, "each name one choice"),
        ({"tokens": "answr"}, "cannot read the tokens 'answr'"),
        ({"examples": [("a", "b")]}, "takes labelled Examples"),
        ({"scorer": None}, "None cannot be"),
        ({"batch_size": 0}, "batch_size is 1 or more"),
        ({"reference": ["a", "", "c", "d"]}, r"references \[1\] are empty"),
    ],
)
def test_tuning_says_what_does_not_fit_before_it_answers(lm, probe, monkeypatch, changes, told):
    monkeypatch.setattr(lm, "generate", lambda *a, **k: pytest.fail("answered"))
    with pytest.raises((ValueError, TrimtabError), match=told):
        tuned(lm, probe, **changes)


def test_tuning_tries_a_choice_once_and_takes_probes_only(lm, probe):
    found = tuned(lm, probe, layers=[[0], "0", [0]], tokens=["all", " all"])
    assert {(s.layers, s.tokens) for s in found.tried} == {((0,), "all")}
    assert found.runner_up is None
    with pytest.raises(ValueError, match="takes a Probe of tt.concepts.fit, not Add"):
        tuned(lm, make_edit(lm)(1.0))


@pytest.mark.filterwarnings("ignore:no setting has more effect")
def test_a_tighter_bound_gives_a_smaller_ratio(lm, probe):
    only = {"layers": [[0, 1]], "tokens": ["all"]}
    loose, tight = tuned(lm, probe, max_ratio=2.0, **only), tuned(lm, probe, max_ratio=1.05, **only)
    doses = [max(s.dose for s in t.tried) for t in (loose, tight)]
    assert doses[0] > 2 * doses[1]
    assert all(s.ratio <= 1.05 for s in tight.frontier)


def test_a_stopped_tuning_goes_on(lm, probe, tmp_path):
    whole = tuned(lm, probe, out=tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:-3]))
    assert tuned(lm, probe, out=tmp_path / "b.jsonl").best == whole.best
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()
    with pytest.raises(ArtifactError, match="another job"):
        tuned(lm, probe, out=tmp_path / "b.jsonl", max_ratio=1.6)


def labelled(lm):
    """Examples whose positive texts are vowels, as far as a byte tokenizer knows."""
    pairs = [("ae io ua", 1.0), ("xyz trw", 0.0), ("oua eia", 1.0), ("bcd fgh", 0.0)]
    return [tt.Example(p, text, y) for p in PROMPTS[:2] for text, y in pairs]


def test_slopes_by_layer_are_those_of_the_loss(lm, probe):
    """Against differences of the loss itself, computed with plain lm.score."""
    texts = contrast(labelled(lm))
    assert sum(w for *_, w in texts) == pytest.approx(0)
    doses = torch.tensor([0.05, -0.02, 0.1, 0.0])

    def loss(at):
        edit = probe.edit(layers=list(probe.layers), tokens="all", dose=at)
        scores = lm.score([e for e, *_ in texts], edits=edit)
        return float((scores.double() * torch.tensor([w for *_, w in texts]).double()).sum())

    found = slope(lm, probe, "all", texts, doses)
    for i in range(len(doses)):
        step = torch.zeros_like(doses)
        step[i] = 1e-2
        by_hand = (loss(doses + step) - loss(doses - step)) / 2e-2
        assert float(found[i]) == pytest.approx(by_hand, rel=0.02, abs=1e-4)
    elsewhere = slope(lm, probe, "answer[:1]", texts, doses)
    assert not torch.allclose(found, elsewhere, rtol=0.1)  # a control: tokens matter


def test_a_profile_is_the_best_direction_of_a_quadratic_cost():
    random = torch.Generator().manual_seed(0)
    half = torch.randn(4, 4, generator=random, dtype=torch.float64)
    gain = torch.randn(4, generator=random, dtype=torch.float64)
    cost = half @ half.T
    damped = cost + 0.3 * cost.trace() / 4 * torch.eye(4)
    best = torch.tensor(solved(cost, gain, 0.3), dtype=torch.float64)
    assert best.abs().max() == pytest.approx(1)

    def value(d):
        return float(gain @ d / (d @ damped @ d).sqrt())

    assert value(best) == pytest.approx(float((gain @ torch.linalg.solve(damped, gain)).sqrt()))
    assert value(best) > value(gain) and value(best) > value(torch.ones(4).double())


def test_tuning_by_examples_gives_layers_doses_of_their_own(lm, probe, tmp_path):
    given = {"examples": labelled(lm), "layers": [[0]], "out": tmp_path / "a.jsonl"}
    found = tuned(lm, probe, **given)
    own = [s for s in found.tried if s.weights]
    assert own and all(max(map(abs, s.weights)) == pytest.approx(1) for s in own)
    setting = own[0]
    made = setting.edit(probe)
    length = torch.linalg.vector_norm(made.delta, dim=-1)
    wanted = setting.dose * torch.tensor(setting.weights).abs()
    assert torch.allclose(length, wanted.float(), rtol=1e-4)
    stored = replace(probe, guidance=setting.guidance)
    stored.save(tmp_path / "own")
    again = tt.load(tmp_path / "own")
    assert torch.equal(again.edit().delta, made.delta)
    twice = again.edit(**again.guidance | {"dose": 2 * setting.dose})
    assert torch.equal((2 * again.edit()).delta, twice.delta)
    # What was found is kept, and goes on.
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:5]))
    assert tuned(lm, probe, **given | {"out": tmp_path / "b.jsonl"}).best == found.best
    with pytest.raises(ArtifactError, match="another job"):
        tuned(lm, probe, **given | {"examples": labelled(lm)[:4]})
    with pytest.raises(tt.ChatError, match="two labels"):
        tuned(lm, probe, examples=[e for e in labelled(lm) if e.label])


def test_tuning_warns_where_nothing_beats_no_edit(lm, probe):
    plain = set(lm.generate(PROMPTS, None, 6))

    def contrary(prompts, answers):
        return [float(a in plain) for a in answers]

    given = {"max_new_tokens": 6, "budget": 6000, "show_progress": False, "tokens": "all"}
    with pytest.warns(UserWarning, match="than no edit"):
        tt.evals.tune(lm, probe, PROMPTS, contrary, layers=[[0, 1]], max_ratio=3, **given)


@pytest.mark.filterwarnings("ignore:no setting has more effect")
def test_of_equal_effects_the_cheapest_is_chosen(lm, probe):
    def alike(prompts, answers):
        return [1.0] * len(answers)

    given = {"layers": [[1, 2]], "tokens": "answer[:4]", "max_ratio": 3.0}
    found = tuned(lm, probe, scorer=alike, **given)
    final = [s for s in found.tried if s.judged == len(PROMPTS)]
    assert len(final) == 3 and found.frontier == [found.best]
    assert found.best.ratio == min(s.ratio for s in final) < max(s.ratio for s in final)


def test_tuning_warns_where_no_setting_keeps_the_text_whole(lm, probe, recwarn):
    """A direction that says one word again and again, under a judge that likes it."""
    head = lm.model.get_output_embeddings().weight.detach()
    pieces = {i: lm.tokenizer.decode([i]) for i in range(len(head))}
    words = [i for i, p in pieces.items() if p[0] == " " and p[1:].isalpha()]
    word = max(words, key=lambda i: float(head[i].norm()))

    def likes(prompts, answers):
        return [a.count(pieces[word]) for a in answers]

    said = replace(probe, weight=head[word].expand_as(probe.weight).clone())
    given = {"layers": [range(4)], "tokens": "all", "scorer": likes}
    tuned(lm, said, **given, max_ratio=1.05)
    assert not any("keeps the text whole" in str(w.message) for w in recwarn)
    with pytest.warns(UserWarning, match=r"keeps the text whole: .* 75% of their three-word runs"):
        found = tuned(lm, said, **given, max_ratio=1e6)
    assert found.frontier == [] and found.best.effect > 5


def test_a_scale_that_is_named_is_the_scale_of_a_tuned_probe_too(lm, probe):
    made = tuned(lm, probe).probe
    assert torch.equal(made.edit(scale=16.0).delta, probe.edit(scale=16.0).delta)
    assert torch.equal(made.edit(scale=16.0).delta, probe.edit().delta)  # what it is untuned
    assert not torch.equal(made.edit().delta, probe.edit().delta)


def test_another_judge_is_another_job(lm, probe):
    """Identities hold all that a judge is made of, and nothing of the process."""
    one, other = (
        tt.evals.YesNo(lm, "Is it good?"),
        tt.evals.YesNo(lm, "Is it good?", shots=[("a", "b", "Yes")]),
    )
    reading, narrowed = tt.evals.Reading(lm, probe), tt.evals.Reading(lm, probe.at([0]))
    words, fewer = tt.evals.Lexicon(["a", "b"]), tt.evals.Lexicon(["a"])
    judges = [one, other, reading, narrowed, words, fewer, lambda p, a: 0, lambda p, a: 1]
    assert len({scorer_identity(judge) for judge in judges}) == len(judges)
    assert scorer_identity(one) == scorer_identity(tt.evals.YesNo(lm, "Is it good?"))


def test_prompts_are_whatever_generate_takes(lm):
    example = tt.Example(PROMPTS[0], "Fine.")
    chat = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "I"}]
    wanted = swept(lm, prompts=[PROMPTS[0]]).baseline.answers
    assert swept(lm, prompts=[example]).baseline.answers == wanted
    assert swept(lm, prompts=PROMPTS[0]).baseline.answers == wanted
    asked = asking("Be kind.")(chat)
    assert asked[0]["content"].endswith("Be kind.") and asked[1] == chat[1]
    assert tt.evals.perplexity(lm, "One text.") == tt.evals.perplexity(lm, ["One text."])


def test_tuning_says_what_does_not_fit(lm, probe):
    with pytest.raises(ValueError, match="a budget of 30 tokens is too small"):
        tuned(lm, probe, budget=30)
    with pytest.raises(ValueError, match="max_ratio is above 1"):
        tuned(lm, probe, max_ratio=1.0)
