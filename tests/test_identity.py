"""Identities of judges: another judge has another, the same judge the same in every process.

Each kind of judge stands here twice, made alike and made otherwise.
"""

import functools
import math
import subprocess
import sys
import threading
import types
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab.errors import TrimtabError
from trimtab.evals import Appropriate, Classifier, Lexicon, YesNo
from trimtab.evals.identity import scorer_identity


def classifier(flip=0):
    model = make_pipeline(CountVectorizer(analyzer="char"), LogisticRegression())
    return model.fit(["the was honest"] * 3 + ["est"] * 3, [0 ^ flip] * 3 + [1 ^ flip] * 3)


class Count:
    """A judge as people write them: a class with a state and a method that uses it."""

    threshold = 0

    def __init__(self, word):
        self.word = word

    def __call__(self, prompts, answers):
        return [float(self.cut(a.count(self.word))) for a in answers]

    def cut(self, count):
        return min(count, 9)

    @cached_property
    def pattern(self):
        return self.word.upper()


class Cut8(Count):
    def cut(self, count):
        return min(count, 8)


class Slots:
    __slots__ = ("word",)

    def __init__(self, word):
        self.word = word

    def __call__(self, prompts, answers):
        return [0.0 for _ in answers]


class Words(dict):
    def __call__(self, prompts, answers):
        return [0.0 for _ in answers]


@dataclass
class Weighed:
    weights: np.ndarray = field(repr=False)

    def __call__(self, prompts, answers):
        return list(self.weights[: len(answers)])


class Net(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.line = torch.nn.Linear(40, 1)

    def __call__(self, prompts, answers):
        return [0.0 for _ in answers]


class Lex(Lexicon):
    def __call__(self, prompts, answers):
        return super().__call__(prompts, answers) ** 2


Pair = namedtuple("Pair", "a b")


def closure(value):
    return lambda prompts, answers: [value for _ in answers]


def recursive(depth):
    def judge(prompts, answers):
        return [walk(a) for a in answers]

    def walk(text):
        return float(len(text)) if len(text) < depth else walk(text[1:])

    return judge


def written(source, **names):
    """A judge out of a program of its own."""
    exec(source, names := {"__name__": "__main__", **names})
    return names["judge"]


def program(word="a", helper="x.count(w)"):
    return f"""
import math, numpy as np
WORDS = {{"list": [{word!r}, "b"]}}
def helper(x, w): return {helper}
class Inner:
    def run(self, x): return sum(helper(x, w) for w in WORDS["list"])
def judge(prompts, answers): return [math.floor(Inner().run(a)) for a in answers]
"""


def of_module(word):
    """A judge that reads a word from another of the user's modules."""
    mine = types.ModuleType("mine")
    mine.words = types.ModuleType("mine.words")
    mine.words.WORD, mine.words.mine, mine.words.LOCK = word, mine, threading.Lock()
    return written(
        "def judge(prompts, answers): return [mine.words.WORD in a for a in answers]", mine=mine
    )


def by_name(name):
    return written(f"def judge(prompts, answers): return [a.{name}('a') for a in answers]")


def among(*words):
    return written(f"def judge(prompts, answers): return [a in {set(words)!r} for a in answers]")


def cached(body):
    return functools.lru_cache(written(f"def judge(prompts, answers): return {body}"))


def without_gradient(value):
    judge = closure(value)
    return torch.no_grad()(judge)


def adapted(lm, by):
    """The model of a judge, with another head on the same embedding."""
    made = tt.LM(model_zoo.tiny("llama"), lm.tokenizer)
    with torch.no_grad():
        made.model.lm_head.weight += by
    return made


LM = tt.LM(model_zoo.tiny("llama"), tokenizers_zoo.byte_tokenizer("chatml"))
# How to make a judge, with what makes one and what makes another.
KINDS = {
    "sklearn": (lambda x: Classifier(classifier(x)), 0, 1),
    "a bound method": (lambda x: classifier(x).predict_proba, 0, 1),
    "a function of a fit": (lambda x: closure(classifier(x)), 0, 1),
    "state": (Count, "e", "X"),
    "a subclass": (lambda x: x("e"), Count, Cut8),
    "a method of an object": (lambda x: Count(x).__call__, "e", "X"),
    "slots": (Slots, "e", "X"),
    "a mapping": (lambda x: Words(a=x), 1, 2),
    "an array": (lambda x: Weighed(np.arange(5000.0) + (np.arange(5000) == 2500) * x), 0, 1),
    "an array of float32": (lambda x: closure(np.float32(x)), 1, 2),
    "a tensor": (lambda x: closure(torch.arange(300).bfloat16() * x), 1, 2),
    "the form of a tensor": (lambda x: closure(torch.zeros(x)), (2, 3), (3, 2)),
    "a module": (Net, 0, 1),
    "a judge of ours": (Lexicon, ["a"], ["b"]),
    "a subclass of ours": (lambda x: x(["a"]), Lexicon, Lex),
    "ours around a function": (lambda x: Appropriate(closure(x), closure(0)), 0, 1),
    "ours around the other function": (lambda x: Appropriate(closure(0), closure(x)), 0, 1),
    "a model": (lambda x: YesNo(adapted(LM, x), "Is it?"), 0.0, 0.5),
    "a closure": (closure, 0.25, 0.5),
    "a partial": (lambda x: functools.partial(closure(0), prompts=x), "a", "b"),
    "a recursive closure": (recursive, 2, 3),
    "a cached function": (cached, "[0]", "[1]"),
    "a decorated function": (without_gradient, 0, 1),
    "a default": (lambda x: written(f"def judge(p, answers, w={x!r}): return [w]"), "a", "b"),
    "a global": (lambda x: written(program(x)), "a", "c"),
    "a function named": (lambda x: written(program(helper=x)), "x.count(w)", "x.index(w)"),
    "another module": (of_module, "a", "b"),
    "a method of a text": (by_name, "count", "index"),
    "a function of C": (closure, math.floor, torch.floor),
    "a set": (lambda x: among("a", "b", "c", x), "d", "e"),
    "a type": (closure, int, float),
    "an argument's type": (closure, 1, True),
    "collections": (lambda x: closure([Counter("ab"), OrderedDict(a=x), Pair(1, x)]), 1, 2),
    "a default factory": (lambda x: closure(defaultdict(x)), int, list),
    "bytes": (closure, b"a", b"b"),
    "a text": (lambda x: named(closure(0), x), "one", "two"),
}


def named(judge, identity):
    judge.identity = identity
    return judge


@pytest.mark.parametrize("kind", KINDS)
def test_another_judge_has_another_identity(kind):
    make, one, other = KINDS[kind]
    first, again, second = (scorer_identity(make(x)) for x in (one, one, other))
    assert all(isinstance(found, str) for found in (first, second)), (first, second)
    assert first == again  # made anew, at other addresses
    assert first != second


HERE = "import test_identity as t; print({k: t.scorer_identity(t.KINDS[k][0](t.KINDS[k][1])) "
HERE += "for k in t.KINDS})"


@pytest.mark.slow
def test_an_identity_is_the_same_in_every_process():
    command = [sys.executable, "-c", HERE]  # with another order of sets
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == f"{ {k: scorer_identity(make(x)) for k, (make, x, _) in KINDS.items()} }\n"
    )


def test_what_is_kept_while_judging_is_no_part_of_a_judge():
    judge, words = Count("e"), Lexicon(["a"])
    before = scorer_identity(judge), scorer_identity(words)
    assert judge.pattern == "E"
    words([""], ["a"])
    assert before == (scorer_identity(judge), scorer_identity(words))


def test_a_text_classifier_of_transformers_is_told_by_its_weights():
    from transformers import LlamaForSequenceClassification, pipeline

    config = model_zoo.tiny("llama").config
    config.pad_token_id = 0

    def made(seed):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config).eval()
        return Classifier(pipeline("text-classification", model=model, tokenizer=LM.tokenizer), 0)

    judge = made(0)
    before = scorer_identity(judge)
    judge([""], ["a text"])
    assert before == scorer_identity(judge) == scorer_identity(made(0)) != scorer_identity(made(1))


def swept(judge, **options):
    given = {"max_new_tokens": 4, "baselines": (), "show_progress": False} | options
    push = torch.ones(1, LM.width)
    return tt.evals.sweep(
        LM, lambda s: tt.Add("resid@1", s * push), [0, 2], ["hi", "yo"], judge, **given
    )


def test_a_sweep_never_returns_the_scores_of_another_judge(tmp_path):
    for number, judges in enumerate(([Count("e"), Count("X")], [closure(0.25), closure(0.5)])):
        out = tmp_path / str(number)
        first = swept(judges[0], out=out)
        assert swept(judges[0], out=out) == first
        with pytest.raises(TrimtabError, match="another sweep"):
            swept(judges[1], out=out)


@pytest.mark.parametrize("held", [threading.Lock(), (n for n in [1]), sys.stdout])
def test_a_judge_that_cannot_be_told_is_never_taken_for_another(tmp_path, held):
    judge = closure(0.5)
    judge.client = held
    with pytest.raises(
        TrimtabError, match=r"judge <lambda> cannot be told \(it holds a .*identity"
    ):
        swept(judge, out=tmp_path / "s")
    with pytest.raises(TrimtabError, match=r"cannot be told"):
        tt.evals.tune(LM, probe(), ["hi"], judge, out=tmp_path / "t.jsonl")
    assert not (tmp_path / "s").exists() and not (tmp_path / "t.jsonl").exists()
    found = swept(judge)  # where nothing is stored nothing can be taken for another
    found.save(tmp_path / "s.json")
    assert tt.evals.Sweep.load(tmp_path / "s.json").arms == found.arms
    judge.identity = "half, always"
    assert swept(judge, out=tmp_path / "s") == swept(judge, out=tmp_path / "s")
    judge.identity = "half, always, version 2"
    with pytest.raises(TrimtabError, match="another sweep"):
        swept(judge, out=tmp_path / "s")


def probe():
    rows = [torch.randn(3, LM.n_layers, LM.width) + i % 2 for i in range(8)]
    recording = tt.Recording.from_rows("resid@all answer", rows)
    return tt.concepts.fit_recording(recording, [i % 2 for i in range(8)])
