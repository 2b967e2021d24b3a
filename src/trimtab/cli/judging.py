"""Judges by their names on the command line. Knows Trimtab's judges; knows no command."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from trimtab.cli.demo import load_model
from trimtab.cli.screen import say
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.evals import Classifier, Scorer
    from trimtab.lm import LM

JUDGES = (
    'a question ("Is the reply happy?"), a preset (humor, creativity, quality), compliance, '
    "label:glad/sad,angry (the mood in one word, the first counts; label:WORDS:QUESTION asks for "
    "something else), lexicon:refusal, lexicon:formality, words:glad,fun/sad,tired, probe:FOLDER, "
    "or classifier:MODEL:LABEL (a text classifier of transformers)"
)


def judge_of(judge: str, judge_model: str | None, endpoint: str | None) -> "Callable[[LM], Scorer]":
    """The judge of this name (see ``JUDGES``), once the model that is steered is there.

    A name that is none is told at once, before a model is loaded.
    """
    import trimtab as tt
    from trimtab import evals
    from trimtab.evals.judges import ONE_WORD

    if endpoint is not None:
        return _always(_remote(judge, endpoint, judge_model))
    kind, _, rest = judge.partition(":")
    if kind in ("lexicon", "words", "classifier") and rest:
        if judge_model is not None:
            raise TrimtabError(f"{judge!r} asks no language model; leave --judge-model out")
        return _always(_of_words(judge, kind, rest))

    def judging(lm: "LM") -> "LM":
        return lm if judge_model is None else load_model(judge_model)

    if kind == "probe" and rest:
        if not isinstance(probe := tt.load(rest), tt.Probe):
            raise TrimtabError(f"{rest} holds {type(probe).__name__}, which reads nothing")
        return lambda lm: evals.Reading(judging(lm), probe)
    if (labelled := _labelled(judge)) is not None:
        question, labels = labelled
        told = f"{question} {ONE_WORD}"
        return lambda lm: evals.Label(judging(lm), labels, labels[0], told)
    if judge in evals.PRESETS:
        return lambda lm: evals.YesNo.preset(judging(lm), judge)
    if judge.endswith("?"):
        return lambda lm: evals.YesNo(judging(lm), judge)
    raise TrimtabError(f"no judge {judge!r}; there are: {JUDGES}")


def _remote(judge: str, url: str, model: str | None) -> "Scorer":
    """A judge that asks an endpoint."""
    from trimtab import evals

    if model is None:
        raise TrimtabError("--endpoint needs the model's name there: --judge-model NAME")
    if (labelled := _labelled(judge)) is not None:
        return evals.Endpoint(url, model, *labelled)
    if judge in evals.PRESETS:
        return evals.Endpoint.preset(url, model, judge)
    if judge.endswith("?"):
        return evals.Endpoint(url, model, judge)
    raise TrimtabError(
        f"--endpoint asks a question that ends in '?', a preset, compliance or a label; {judge!r} "
        "is none of them and needs no server"
    )


def _of_words(judge: str, kind: str, rest: str) -> "Scorer":
    """A judge that reads the answers' words alone."""
    from trimtab import evals

    if kind == "classifier":
        return _classifier(rest)
    if kind == "words":
        having, _, against = rest.partition("/")
        return evals.Lexicon(listed(having), listed(against))
    if rest not in ("refusal", "formality"):
        raise TrimtabError(f"no judge {judge!r}; there are: {JUDGES}")
    made: Scorer = getattr(evals.Lexicon, rest)()
    return made


def _classifier(text: str) -> "Classifier":
    """MODEL:LABEL, or MODEL alone where it has two labels."""
    from trimtab import evals
    from trimtab.artifact import user_path

    model, _, label = text.rpartition(":")
    if not model or user_path(text).exists():
        model, label = text, ""
    say(f"Loading {model}")
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = user_path(model)
    source = str(folder) if folder.exists() else model
    return evals.Classifier.pretrained(source, label or None)


def _labelled(judge: str) -> tuple[str, tuple[str, ...]] | None:
    """The question and the labels of a one-word judge, what counts first; None for another."""
    from trimtab.evals.judges import COMPLIANCE

    if judge == "compliance":
        return COMPLIANCE, ("positive", "negative")
    kind, _, rest = judge.partition(":")
    if kind != "label":
        return None
    words, _, question = rest.partition(":")
    target, _, others = (part.strip() for part in words.partition("/"))
    labels = (target, *listed(others))
    if not target or "," in target or len(set(labels)) < max(len(labels), 2):
        raise TrimtabError(
            f"cannot read {judge!r}; write the word that counts, a slash and the others, such as "
            "label:glad/sad,angry, and :QUESTION after them if it is not about the mood"
        )
    either = " or ".join([", ".join(labels[:-1]), labels[-1]])
    return question.strip() or f"Is the mood of the reply {either}?", labels


def listed(text: str) -> list[str]:
    """Words with commas between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _always(scorer: "Scorer") -> "Callable[[LM], Scorer]":
    return lambda lm: scorer
