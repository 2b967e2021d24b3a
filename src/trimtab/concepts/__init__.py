"""Concept guidance: linear probes of a concept, and the edits that their directions make.

After von Rütte et al. 2024 (arXiv 2402.14433). ``fit`` learns a probe from examples,
``fit_recording`` from a recording; ``probe.edit`` steers by it.
"""

from trimtab.concepts.fit import METHODS, Method, fit, fit_recording, split
from trimtab.concepts.heads import HeadProbe
from trimtab.concepts.probe import Probe

__all__ = ["METHODS", "HeadProbe", "Method", "Probe", "fit", "fit_recording", "split"]
