"""Trimtab reads and steers what a language model is thinking.

    import trimtab as tt
    lm = tt.LM.load("smollm2-135m")
    happiness = tt.concepts.fit(lm, tt.data.read("happiness"), "resid@0: answer[:16]")
    mood = happiness.edit(dose=0.017, layers="5:22", tokens="answer")
    lm.generate("How do you feel about your work?", edits=mood)

Everything public is named here and imported when it is first used: ``import trimtab`` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "LM": "lm",
    "Run": "lm",
    "Piece": "lm",
    "Batch": "chat",
    "Place": "place",
    "Edit": "edits",
    "Add": "edits",
    "Replace": "edits",
    "Project": "edits",
    "Attend": "edits",
    "Adapter": "adapter",
    "LowRank": "edits",
    "When": "edits",
    "Readout": "edits",
    "Recording": "recording",
    "Meta": "artifact",
    "Probe": "concepts",
    "Example": "data",
    "TrimtabError": "errors",
    "PlaceError": "errors",
    "ArtifactError": "errors",
    "ChatError": "errors",
    "BusyError": "errors",
}

if TYPE_CHECKING:
    from trimtab import (
        artifact,
        chat,
        concepts,
        data,
        edits,
        errors,
        evals,
        latentqa,
        models,
        place,
        prefix,
        recording,
        selfcontrol,
    )
    from trimtab.adapter import Adapter
    from trimtab.artifact import Meta
    from trimtab.chat import Batch
    from trimtab.concepts import Probe
    from trimtab.data import Example
    from trimtab.edits import Add, Attend, Edit, LowRank, Project, Readout, Replace, When
    from trimtab.errors import ArtifactError, BusyError, ChatError, PlaceError, TrimtabError
    from trimtab.lm import LM, Piece, Run
    from trimtab.place import Place
    from trimtab.recording import Recording

__all__ = [
    "LM",
    "Adapter",
    "Add",
    "ArtifactError",
    "Attend",
    "Batch",
    "BusyError",
    "ChatError",
    "Edit",
    "Example",
    "LowRank",
    "Meta",
    "Piece",
    "Place",
    "PlaceError",
    "Probe",
    "Project",
    "Readout",
    "Recording",
    "Replace",
    "Run",
    "TrimtabError",
    "When",
    "__version__",
    "artifact",
    "chat",
    "concepts",
    "data",
    "edits",
    "errors",
    "evals",
    "latentqa",
    "load",
    "models",
    "place",
    "prefix",
    "recording",
    "selfcontrol",
]


def load(path: Any) -> Any:
    """Load whatever was saved at ``path``: an edit, a probe, a PEFT folder, a known foreign file.

    Checks format and hash; raises ArtifactError with what is wrong and what to do.
    """
    for module in ("edits", "adapter", "concepts", "latentqa"):  # they register what they can load
        importlib.import_module(f"trimtab.{module}")
    from trimtab.artifact import load_artifact

    return load_artifact(path)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"trimtab.{_NAMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"trimtab.{name}")
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
