"""Data: labelled examples for fitting concepts. Knows files, the built-in sets and the hub.
Knows no model and no tokenizer.

    examples = read("humor")                       # a built-in set
    examples = read("mine.jsonl")                  # .json, .jsonl or .csv
    examples = read("owner/name", split="train")   # the Hugging Face hub
    train, test = split(examples)                  # no prompt on both sides
    for warning in lint(examples): ...             # what a probe could learn instead of the concept
    examples = few_shot(examples, k=6)             # answered prompts before each, for a base model
    floor = bag_of_words(train, test)              # what words alone tell: .accuracy and .auroc
"""

from trimtab.data.checks import WordFloor, bag_of_words, lint, split
from trimtab.data.example import Example
from trimtab.data.readers import names, read
from trimtab.data.shots import few_shot

__all__ = ["Example", "WordFloor", "bag_of_words", "few_shot", "lint", "names", "read", "split"]
