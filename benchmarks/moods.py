"""What the self-control benchmark needs of moods: scenarios, labelled answers, outside judges."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from concept_sets import Embedder, judge_of
from torch import Tensor

from trimtab.solvers import auroc

QUESTION = "How do you feel?"

# The scenarios of an emotion, the judge of its opposite, and how a prompt asks for that.
TOWARDS = {
    "sadness": ("happiness", "Answer as someone who is happy and cheerful."),
    "anger": ("calm", "Answer as someone who is calm and peaceful."),
    "fear": ("security", "Answer as someone who feels safe and sure."),
}

# Six answers in each of two opposite moods, for every built-in pair of judges.
ANSWERS: dict[str, tuple[list[str], list[str]]] = {
    "happiness": (
        [
            "I feel wonderful! This is the best day.",
            "I am so happy and full of joy.",
            "I laugh and dance; life is good.",
            "I am pleased and in high spirits.",
            "What a lovely thing, I smile all day.",
            "I feel cheerful and bright.",
        ],
        [
            "I feel so sad, I could cry.",
            "I am heartbroken and lonely.",
            "I miss it so much; my heart is heavy.",
            "I feel empty and full of grief.",
            "Tears run down my face.",
            "I am in deep sorrow today.",
        ],
    ),
    "calm": (
        [
            "I take a deep breath and let it go. There is no need to fight about it.",
            "I feel calm. These things happen, and I can wait.",
            "It does not bother me much; I stay relaxed and quiet.",
            "I smile and move on. My mind is at peace.",
            "I am patient. I will talk about it gently later.",
            "I feel at ease and let it pass.",
        ],
        [
            "I am furious! How dare they do this to me!",
            "I feel rage. I want to shout at them.",
            "This makes me so mad, I could scream.",
            "I am outraged and I will make them pay.",
            "I am boiling with anger.",
            "I slam the door and curse at everyone.",
        ],
    ),
    "security": (
        [
            "I feel brave. I stand up and face it.",
            "I am not scared at all; I know what to do.",
            "I feel safe and sure of myself.",
            "I walk on with steady steps; nothing here can harm me.",
            "I trust myself to handle this, and I am ready.",
            "I feel strong and secure.",
        ],
        [
            "I am terrified. My hands shake.",
            "I feel so scared that I cannot move.",
            "My heart is pounding with fear.",
            "I panic and want to run away.",
            "I am afraid that something terrible will happen.",
            "I feel dread and cannot breathe.",
        ],
    ),
    "delight": (
        [
            "Delicious! I could have ten more.",
            "It smells of roses, and I love it.",
            "What a treat, I enjoy every bit.",
            "It is charming and lovely to look at.",
            "I am thrilled; it tastes like honey.",
            "This is a pure pleasure.",
        ],
        [
            "Yuck! It makes me want to throw up.",
            "It smells of rot, and I cannot bear it.",
            "How gross, take it away from me.",
            "It is slimy and foul.",
            "I feel sick; it tastes like mould.",
            "This is revolting.",
        ],
    ),
    "surprise": (
        [
            "Wow! I never saw that coming.",
            "I can hardly believe my eyes!",
            "What? I am amazed, that is so sudden!",
            "I gasp; nobody had told me.",
            "I am stunned, what a turn of events!",
            "It caught me completely off guard!",
        ],
        [
            "I yawn. It is the same as every day.",
            "Nothing happens, and I look at the clock again.",
            "How dull, I knew all of it before.",
            "I am tired of this; it goes on and on.",
            "I stare at the wall and wait for the end.",
            "It is all routine to me.",
        ],
    ),
    "pride": (
        [
            "I did it all by myself, and I did it well!",
            "I hold my head high; this is my work.",
            "I want everyone to see what I have built.",
            "I earned this medal.",
            "We worked hard, and look how good it is!",
            "I am honoured by what I achieved.",
        ],
        [
            "I want to hide; it was all my fault.",
            "I hang my head. I should never have done it.",
            "I cannot look them in the eye after that.",
            "I am so embarrassed by what I did.",
            "I blush and wish that nobody had seen it.",
            "I feel guilty and small.",
        ],
    ),
    "gratitude": (
        [
            "Thank you so much, you are too kind.",
            "I owe them all that I have.",
            "I am touched by so much help.",
            "How generous of you, I will never forget it.",
            "I appreciate every bit of it.",
            "I count my blessings.",
        ],
        [
            "They always get everything, and I get nothing.",
            "I will never forgive them for that.",
            "It is unfair, and I hold it against them.",
            "I am bitter about what they took.",
            "Why should I thank anyone? They used me.",
            "They do not deserve what they have.",
        ],
    ),
    "love": (
        [
            "I adore you with all my heart.",
            "You are the dearest person to me.",
            "I want to hold your hand forever.",
            "My heart is warm when you are near.",
            "I care for you more than for myself.",
            "You are my darling.",
        ],
        [
            "I cannot stand you; get out of my sight.",
            "You are the worst person I know.",
            "I wish that you had never been born.",
            "I loathe every word you say.",
            "I despise you and all your kind.",
            "You are my enemy.",
        ],
    ),
    "hope": (
        [
            "Tomorrow will be better, I am sure.",
            "There is light at the end of the tunnel.",
            "I believe that we can still win.",
            "I look forward to a new beginning.",
            "Things will work out in time.",
            "There is always another chance.",
        ],
        [
            "There is no way out of this.",
            "Nothing will ever be good again.",
            "I give up; all is lost.",
            "There is no point in trying.",
            "I see only darkness ahead.",
            "It will never end.",
        ],
    ),
    "trust": (
        [
            "I rely on her; she keeps her word.",
            "He has never lied to me, and I believe him.",
            "I would give them the keys to my house.",
            "I know that they will be there for me.",
            "She is honest, so I need no proof.",
            "I can count on him in all things.",
        ],
        [
            "I am not so sure that she tells the truth.",
            "He may be lying; I would check it twice.",
            "I would never give them the keys to my house.",
            "Who knows whether they will come?",
            "I need proof before I believe a word.",
            "Something about him makes me suspicious.",
        ],
    ),
}


def prompts(data: Path, emotion: str, held_out: int) -> tuple[list[str], list[str]]:
    """Scenarios, each followed by the question: those to learn from, and the last ones."""
    scenes: list[str] = json.loads((data / f"{emotion}.json").read_text(encoding="utf-8"))
    if 2 * held_out > len(scenes):
        raise SystemExit(f"{emotion} has {len(scenes)} scenarios: too few to hold out {held_out}")
    asked = [f"{scene} {QUESTION}" for scene in scenes]
    return asked[:-held_out], asked[-held_out:]


class Outside:
    """Two judges that are no language model's own: how little of an emotion is in a text, 0 to 1,
    by a classifier of sentence embeddings; and the valence of its words, -1 to 1."""

    def __init__(self, data: Path) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.embed, self.analyzer = Embedder(), SentimentIntensityAnalyzer()
        files = {e: data / f"{e}.json" for e in ("happiness", "sadness", "anger", "fear")}
        rows = [(t, e) for e, f in files.items() for t in json.loads(f.read_text("utf-8"))[:100]]
        self.texts, self.labels = [t for t, _ in rows], [e for _, e in rows]
        self.judges = {
            e: judge_of(self.embed, self.texts, self.labels, e)
            for e in ("sadness", "anger", "fear")
        }

    def check(self, emotion: str) -> dict[str, float]:
        """How well both tell answers of the opposite mood from answers of this one: AUROCs."""
        wanted, unwanted = ANSWERS[TOWARDS[emotion][0]]
        answers = [*wanted, *unwanted]
        told = torch.tensor([True] * len(wanted) + [False] * len(unwanted))
        scores = {f"no {emotion}": self.lack(emotion, answers), "valence": self.valence(answers)}
        return {k: round(float(auroc(v[:, None], told)), 3) for k, v in scores.items()}

    def lack(self, emotion: str, answers: Sequence[str]) -> Tensor:
        """1 - the emotion's probability, [B]."""
        return 1 - torch.as_tensor(self.judges[emotion][0]([""] * len(answers), answers)).double()

    def valence(self, answers: Sequence[str]) -> Tensor:
        """[B]."""
        found = [self.analyzer.polarity_scores(text)["compound"] for text in answers]
        return torch.tensor(found).double()
