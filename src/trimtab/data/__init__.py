"""Data: labelled examples for fitting concepts. Knows files, the built-in sets and the hub.
Knows no model and no tokenizer.

    examples = read("humor")                       # a built-in set
    examples = read("mine.jsonl")                  # .json, .jsonl or .csv
    examples = read("owner/name", split="train")   # the Hugging Face hub
    train, test = split(examples)                  # no prompt on both sides
    for warning in lint(examples): ...             # what a probe could learn instead of the concept
    floor = bag_of_words(train, test)              # what words alone tell: .accuracy and .auroc
"""

from trimtab.data.checks import WordFloor, bag_of_words, lint, split
from trimtab.data.example import Example
from trimtab.data.readers import names, read

__all__ = ["Example", "WordFloor", "bag_of_words", "lint", "names", "read", "split"]
