"""Evaluation: what an edit does, at what price, beside its baselines.

    found = sweep(lm, lambda s: probe.edit(scale=s), scales, prompts, scorer)
    found.pnes; found.table(); found.plot("sweep.png"); found.page("sweep.html")
    tuned = tune(lm, probe, prompts, scorer)     # which layers, which tokens, how strong
    tuned.probe.save("humor")                    # edits=tt.load("humor") steers by it

A *scorer* is any callable ``(prompts, answers) -> scores``. Knows the model, edits and scorers;
draws with matplotlib and fits with scipy, imported when used.
"""

from trimtab.evals.endpoint import Endpoint
from trimtab.evals.judges import PRESETS, Label, Reading, YesNo
from trimtab.evals.pnes import Pnes, pnes
from trimtab.evals.scorers import Scorer, agreement, score
from trimtab.evals.sweep import (
    BASELINES,
    MAX_RATIO,
    Arm,
    Sweep,
    perplexities,
    perplexity,
    random_like,
    repetition,
    sweep,
)
from trimtab.evals.tune import Setting, Tuned, tune
from trimtab.evals.wording import Appropriate, Classifier, Lexicon, Overlap

__all__ = [
    "BASELINES",
    "MAX_RATIO",
    "PRESETS",
    "Appropriate",
    "Arm",
    "Classifier",
    "Endpoint",
    "Label",
    "Lexicon",
    "Overlap",
    "Pnes",
    "Reading",
    "Scorer",
    "Setting",
    "Sweep",
    "Tuned",
    "YesNo",
    "agreement",
    "perplexities",
    "perplexity",
    "pnes",
    "random_like",
    "repetition",
    "score",
    "sweep",
    "tune",
]
