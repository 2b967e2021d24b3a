"""LatentQA: ask a model's activations in plain language, and steer by the answers.

After Pan et al. 2024 (arXiv 2412.08686). ``train`` makes a reader, ``reader.ask`` asks it, and
``steer`` finds the edit of the model under which the reader would give the answers that you want.
"""

from trimtab.latentqa.curate import curate
from trimtab.latentqa.data import (
    Item,
    attach,
    read_items,
    read_qa,
    sentence_qa,
    split,
    template_qa,
    write_items,
)
from trimtab.latentqa.lora import Lora
from trimtab.latentqa.measure import Scores, choices, evaluate, linear_choices
from trimtab.latentqa.reader import Evidence, Reader, Wiring, builtin
from trimtab.latentqa.steer import steer, wanted
from trimtab.latentqa.train import harvest_items, train

__all__ = [
    "Evidence",
    "Item",
    "Lora",
    "Reader",
    "Scores",
    "Wiring",
    "attach",
    "builtin",
    "choices",
    "curate",
    "evaluate",
    "harvest_items",
    "linear_choices",
    "read_items",
    "read_qa",
    "sentence_qa",
    "split",
    "steer",
    "template_qa",
    "train",
    "wanted",
    "write_items",
]
