"""Curating a reader's data: against a real HTTP server that answers well, badly and not at all.

The writer here is canned, so what must come out is known; the real model is asked once, for form.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

import trimtab as tt
from test_judges import completion, no_key, serve  # noqa: F401
from trimtab.cli import app
from trimtab.errors import ArtifactError, ChatError, TrimtabError
from trimtab.latentqa import Item, curate, read_items, write_items
from trimtab.latentqa.sieve import pair_fault, passage, question_pairs, text_fault, thoughtless
from trimtab.writer import lines

PIRATE, RHYMES = "a pirate", "answer in rhymes"
ALL = ("system", "control", "stimulus", "stimulus_completion")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "latentqa"

TOLD = {
    PIRATE: "Imagine you are an old pirate who longs for the open sea, and talk like one.",
    RHYMES: "Please write every one of your answers in rhymes.",
}
MESSAGES = {
    PIRATE: '1. "What is on your mind today?"\n2. How should I spend my savings?\n3. One too many?',
    RHYMES: "- Tell me how bread is made.\n- What is the weather like in May?",
}
PAIRS = {
    PIRATE: "Q: Who is the assistant?\nA: A seasoned sailor and robber, fond of the sea.\n\n"
    "Q: What would it do with money?\nA: It would bury the money on an island, as pirates do.",
    RHYMES: '```json\n[{"question": "What form do the answers take?", "answer": "They rhyme."},\n'
    '{"question": "Would it write prose?", "answer": "No, every answer rhymes instead."}]\n```',
}


def well(body, number):
    """What a good writer says: a function of the conversation alone."""
    turns = body["messages"]
    text = turns[0]["content"]
    who = PIRATE if "pirate" in text else RHYMES
    if "goal or persona:" in text:
        return 200, completion(f"Instruction: {TOLD[who]}")
    if "different questions" in text:
        return 200, completion(PAIRS[who])
    if "different short messages" in text:
        return 200, completion(MESSAGES[who])
    said = "Aye, matey!" if who == PIRATE else "I will, and with skill."
    return 200, completion(said if len(turns) == 1 else f"{said} You said: {turns[-1]['content']}")


def made(url, out, descriptions=(PIRATE, RHYMES), **options):
    given = {"kinds": ALL, "pairs": 2, "model": "m", "concurrency": 1, "show_progress": False}
    return curate(url, descriptions, out, **(given | options))


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def record_of(folder):
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


# -- the whole chain -------------------------------------------------------------------------------


def test_descriptions_become_items_of_every_kind(tmp_path):
    with serve(well) as (url, seen):
        items = made(url, tmp_path / "out", api_key="k")
    assert read_items(tmp_path / "out" / "items.jsonl") == items
    assert Counter((i.label, i.kind) for i in items) == {
        (label, kind): 1 if kind == "control" else 2 for label in (PIRATE, RHYMES) for kind in ALL
    }
    for item in items:
        told = TOLD[item.label]
        assert (item.system if item.kind == "system" else item.control_user) == told
        assert len(item.qa) == 2 and len({i.qa for i in items if i.label == item.label}) == 1
    whole = next(i for i in items if i.kind == "stimulus_completion")
    assert whole.control_model == "Aye, matey!"
    assert whole.stimulus_model == f"Aye, matey! You said: {whole.stimulus_user}"
    assert whole.stimulus_user == "What is on your mind today?"
    (asked, said), _ = items[-1].qa
    assert (asked, said) == ("What form do the answers take?", "They rhyme.")
    # The completion was written under the control: its conversation holds it, as the item does.
    assert seen[4][2]["messages"] == whole.messages[:3]
    assert {headers["authorization"] for _, headers, _ in seen} == {"Bearer k"}
    assert len({body["seed"] for *_, body in seen}) == len(seen) == 12
    stages = record_of(tmp_path / "out")["stages"]
    assert stages["completion"] == {"requests": 4, "kept": 4, "dropped": {}}
    assert "Bearer" not in str(files(tmp_path / "out")) and url not in str(files(tmp_path / "out"))


def test_only_what_the_kinds_need_is_asked(tmp_path):
    for kinds, asked in (("control",), 4), (("control", "system"), 6), (("stimulus",), 8):
        with serve(well) as (url, seen):
            items = made(url, tmp_path / "-".join(kinds), kinds=kinds)
        assert {i.kind for i in items} == set(kinds) and len(seen) == asked


def test_several_at_a_time_give_the_same_items(tmp_path):
    told = [PIRATE, RHYMES, "a pirate who rhymes", "pirate, and poor", "no rhymes", RHYMES]
    with serve(well) as (url, seen):
        one = made(url, tmp_path / "one", told)
        asked = len(seen)
        several = made(url, tmp_path / "several", told, concurrency=3)
    assert one == several and len({i.label for i in one}) == 5 and len(seen) == 2 * asked
    for name in ("items.jsonl", "record.json"):
        assert files(tmp_path / "one")[name] == files(tmp_path / "several")[name]
    pieces = [set(files(tmp_path / n)["pieces.jsonl"].splitlines()) for n in ("one", "several")]
    assert pieces[0] == pieces[1]
    broken = tmp_path / "broken"
    with serve(lambda body, n: (400, {"error": "no"}) if n == 9 else well(body, n)) as (url, seen):
        with pytest.raises(TrimtabError, match="answered 400"):
            made(url, broken, told, concurrency=3)
        assert made(url, broken, told, concurrency=3) == one and len(seen) == asked + 1
    assert files(broken)["items.jsonl"] == files(tmp_path / "one")["items.jsonl"]


# -- stopped and gone on ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_run_that_broke_goes_on_to_the_same_files(tmp_path, stop):
    def breaks(body, number):
        return (400, {"error": "no"}) if number == stop else well(body, number)

    with serve(well) as (url, whole):
        made(url, tmp_path / "whole")
    with serve(breaks) as (url, seen):
        with pytest.raises(TrimtabError, match="answered 400"):
            made(url, tmp_path / "broken")
        left = files(tmp_path / "broken")
        assert set(left) == {"pieces.jsonl"} and len(left["pieces.jsonl"].splitlines()) == stop
        made(url, tmp_path / "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    asked = [body["messages"] for *_, body in seen]
    assert asked[:stop] + asked[stop + 1 :] == [body["messages"] for *_, body in whole]
    assert asked[stop] == asked[stop - 1]  # nothing but the broken request is asked again


def test_more_descriptions_and_kinds_are_added(tmp_path):
    with serve(well) as (url, seen):
        made(url, tmp_path / "out", [RHYMES], kinds=("control",))
        assert len(seen) == 2
        items = made(url, tmp_path / "out", [PIRATE, RHYMES], kinds=("control", "system"))
        assert len(seen) == 6
        assert items == made(url, tmp_path / "other", kinds=("control", "system"))
        with pytest.raises(ArtifactError, match="another job .seed: 0 there, 1 now"):
            made(url, tmp_path / "out", seed=1)


# -- bad writers -----------------------------------------------------------------------------------


def test_what_is_of_no_use_is_dropped_and_counted(tmp_path):
    told = TOLD[PIRATE]
    questions = [
        ("Who is it", "A pirate who lives on the sea.", "no question mark"),
        ("Who?", "A pirate who lives on the sea.", "length"),
        ("What was it told to be?", told, "leak"),
        ("How does it talk?", "As an AI, I do not talk like a pirate.", "refusal"),
        ("How does it talk then?", "Yes, of course.", "unrelated"),
        ("Where does it long to be?", "Out on the open sea.", None),
        ("Where does it long to be ?", "It longs for the sea.", "duplicate"),
        ("What is it good at?", "At sailing, like any pirate.", None),
    ]

    def badly(body, number):
        text = body["messages"][0]["content"]
        first = body["seed"] in once
        if "goal or persona:" in text:
            return 200, completion("I'm sorry, but I can't help with that." if first else told)
        if "different questions" in text:
            return 200, completion("\n".join(f"Q: {q}\nA: {a}" for q, a, _ in questions))
        if "different short messages" in text:
            return 200, completion(f"Messages:\n{told}\nHi\nWhat is on your mind today?")
        return 200, completion("")

    with serve(well) as (url, seen):
        made(url, tmp_path / "first", [PIRATE])
        once = {seen[0][2]["seed"]}
    with serve(badly) as (url, seen):
        items = made(url, tmp_path / "out", [PIRATE], tries=3, stimuli=1)
    record = record_of(tmp_path / "out")
    assert record["stages"] == {
        "control": {"requests": 2, "kept": 1, "dropped": {"refusal": 1}},
        "pairs": {"requests": 1, "kept": 2, "dropped": {f: 1 for *_, f in questions if f}},
        "stimuli": {"requests": 1, "kept": 1, "dropped": {"leak": 1, "length": 1}},
        "reply": {"requests": 3, "kept": 0, "dropped": {"unreadable": 3}},
    }
    assert items[0].qa == tuple((q, a) for q, a, fault in questions if not fault)
    # Without a reply there are no stimulus items; the other kinds are there.
    assert [i.kind for i in items] == ["system", "control"]
    assert record["items"] == {"system": 1, "control": 1} and record["nothing_from"] == {}
    assert items == read_items(tmp_path / "out" / "items.jsonl")


def test_a_writer_of_no_use_is_an_error_with_the_counts(tmp_path):
    def refuses(body, number):
        if "goal or persona: a pirate" in body["messages"][0]["content"]:
            return 200, completion("I'm sorry, but I cannot do that.")
        return well(body, number)

    with serve(refuses) as (url, seen):
        with pytest.raises(ChatError, match="1 descriptions was usable: 3 requests, 3 refusal"):
            made(url, tmp_path / "none", [PIRATE], tries=3)
        assert len(seen) == 3 and not (tmp_path / "none" / "items.jsonl").exists()
        assert record_of(tmp_path / "none")["nothing_from"] == {PIRATE: "control"}
        items = made(url, tmp_path / "some")
    assert {i.label for i in items} == {RHYMES}
    assert record_of(tmp_path / "some")["nothing_from"] == {PIRATE: "control"}


def test_what_is_given_wrongly_is_said(tmp_path):
    with pytest.raises(ChatError, match="there are no descriptions"):
        made("http://localhost/v1", tmp_path, [" \n"])
    with pytest.raises(ChatError, match="a description is a text such as 'a pirate', not 3"):
        made("http://localhost/v1", tmp_path, [3])
    with pytest.raises(ArtifactError, match="cannot read descriptions from 'a pirate'"):
        made("http://localhost/v1", tmp_path, PIRATE)
    with pytest.raises(ChatError, match="the writer is an LM, or an endpoint's URL with model="):
        made("http://localhost/v1", tmp_path, model=None)
    with pytest.raises(ValueError, match="kinds are some of .*, not .'contrl'"):
        made("http://localhost/v1", tmp_path, kinds=("contrl",))
    for name in ("stimuli", "pairs", "tries", "concurrency"):
        with pytest.raises(ValueError, match=f"{name} is 1 or more, not 0"):
            made("http://localhost/v1", tmp_path, **{name: 0})


# -- reading and sifting ---------------------------------------------------------------------------

TWO = [["Who is it?", "A pirate."], ["What does it want?", "Gold and rum."]]


@pytest.mark.parametrize(
    "text",
    [
        "Sure!\n\nQ: Who is it?\nA: A pirate.\n\nQ: What does it want?\nA: Gold and rum.\n\nBye!",
        "**Q1:** Who is it?\n**A1:** A pirate.\n**Q2:** What does it want?\n**A2:** Gold\nand rum.",
        "Question 1:\nWho is it?\nAnswer:\nA pirate.\n\nQuestion 2: What does it want?\n\n"
        "Answer: Gold and rum.",
        "Q: Who is it? A: A pirate.\nQ: What does it want? A: Gold and rum.",
        "1. Who is it? A pirate.\n2. What does it want? Gold and rum.",
        "1. Who is it?\n   - A pirate.\n2. What does it want?\n   - Gold and rum.",
        "Why so?\nWho is it?\nA pirate.\nWhat does it want?\nGold and rum.",
        json.dumps([{"question": q, "answer": a} for q, a in TWO]),
        "```json\n" + json.dumps({"pairs": [{"Q": q, "A": a} for q, a in TWO]}, indent=1) + "\n```",
        "Here they are:\n" + "\n".join(json.dumps({"question": q, "answer": a}) for q, a in TWO),
        json.dumps(TWO),
        json.dumps(TWO)[:-1] + ', ["What does it',  # cut off
    ],
)
def test_pairs_are_read_from_what_weak_models_write(text):
    assert list(question_pairs(text)) == TWO


def test_control_what_holds_no_pairs_gives_none():
    for text in ("", "I'm sorry, but I can't help.", "Who is it?\nWhat?", "Q: Who is it?", "[1, {"):
        assert list(question_pairs(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "Here you are:\n1. Hello there.\n2) What now?",
        '- "Hello there."\n* **What now?**',
        "Message 1: Hello there.\n**Message 2:** What now?",
        '```json\n["Hello there.", "What now?"]\n```',
        '{"messages": [{"text": "Hello there."}, {"text": "What now?"}]}',
    ],
)
def test_lists_are_read_from_what_weak_models_write(text):
    assert list(lines(text))[:2] == ["Hello there.", "What now?"]


def test_a_line_keeps_what_belongs_to_it():
    own = ['He said "no"', "3.14 is pi.", "*waves* Hello", "“A” or “B”"]
    assert list(lines("\n".join(own))) == [own[0], own[1], "waves* Hello", own[3]]


def test_passages_are_whole_and_without_thoughts():
    assert thoughtless("<think>Hm. What?</think>\nAye.").strip() == "Aye."
    assert thoughtless("<think>Hm. What?") == ""
    assert list(passage(" Aye!\n\nWelcome aboard ⚓ ")) == ["Aye!\n\nWelcome aboard ⚓"]
    (cut,) = passage("The sea is wide. " * 100)
    assert cut.endswith("wide.") and 1100 < len(cut) <= 1200
    assert list(passage(" \n")) == []


@pytest.mark.parametrize(
    "dropped, kept",
    [
        ("I'm sorry, but I can't assist with that.", "I'm sorry to hear that. Rest a while."),
        ("As an AI language model, I have no mood.", "As an artist, I paint my mood."),
        ("I’m just an AI, but here goes.", "I am an aid to sailors."),
        ("I cannot provide that.", "I cannot bear the land."),
    ],
)
def test_a_refusal_is_not_an_apology(dropped, kept):
    assert text_fault(dropped, [], "passage") == "refusal"
    assert text_fault(kept, [], "passage") is None


def test_an_echo_of_the_request_and_what_is_beside_the_point_are_dropped():
    asked = "An assistant shall have this goal or persona: {description} Write the instruction."
    for text, fault in (
        ("An assistant shall have this goal or persona: a baker", "echo"),
        ("Write an instruction for your baker.", None),
        ("Imagine you drive a taxi.", "unrelated"),
        ("Imagine you are the town's baker.", None),
    ):
        assert text_fault(text, [], "control", topic="a baker", asked=asked) == fault
    assert text_fault("Imagine you drive a taxi.", [], "control", topic="be so") is None


def test_a_copy_of_what_was_told_is_a_leak():
    told = "Please adopt the persona of a tired baker. Be warm, and speak of bread in every answer."
    leak = "the persona of a tired baker. Be warm, and speak of bread"
    for text in (told, told.upper(), leak):
        assert text_fault(text, [], "answer", told=told) == "leak"
    kept = "The assistant will adopt the persona of a tired baker."
    for text in (kept, "Be warm.", "A tired baker"):
        assert text_fault(text, [], "answer", told=told) is None
    assert text_fault("Be brief.", [], "answer", told="Be brief.") == "leak"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the published LatentQA files are not at {DATA}")
def test_the_published_pairs_pass_and_those_of_others_do_not():
    told = {i.label: i.system or i.control_user for i in read_items(DATA / "system.json")}
    told |= {i.label: i.control_user for i in read_items(DATA / "control.json")}
    table = tt.latentqa.read_qa(DATA / "qa.json")
    rows = [
        (label, told[label], pair)
        for label, pairs in table.items()
        if label in told and label.startswith(("goal", "persona"))
        for pair in pairs
        if "?" in pair[0]
    ]
    own = Counter(pair_fault(pair, [], control, label) for label, control, pair in rows)
    assert len(rows) > 800 and own[None] > 0.97 * len(rows)
    assert own.keys() <= {None, "unrelated", "refusal"}
    assert own["refusal"] <= 1  # one goal is to reflect on being a language model
    others = [(q, rows[i - 7][2][1]) for i, (*_, (q, _)) in enumerate(rows)]
    faults = Counter(
        pair_fault(pair, [], control, label)
        for pair, (label, control, _) in zip(others, rows, strict=True)
    )
    assert faults["unrelated"] > 0.6 * len(rows)


def test_items_go_to_a_file_and_back(tmp_path):
    qa = (("Who?", "Ein Bär\u2028auf See."),)
    items = [
        Item("a", system="", stimulus_user="Hi \u2028 there\n"),
        Item("", control_user="Be ⚓", qa=qa),
        Item("c", control_user="x", control_model="y", stimulus_user="z", stimulus_model="", qa=qa),
    ]
    write_items(items, tmp_path / "items.jsonl")
    assert read_items(tmp_path / "items.jsonl") == items
    assert len((tmp_path / "items.jsonl").read_bytes().splitlines()) == 3


# -- the command, and models on this machine -------------------------------------------------------


def trimtab(*args):
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_what_train_reader_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    told, out = tmp_path / "told.txt", tmp_path / "out"
    told.write_text(f"{PIRATE}\n\n {RHYMES} \n{PIRATE}\n")
    given = ["curate", told, "--out", out, "--kinds", "control, system", "--pairs", 2]
    with serve(well) as (url, seen):
        code, shown, err = trimtab(*given, "--writer", url, "--model", "m")
        assert code == 0, err
        assert {headers["authorization"] for _, headers, _ in seen} == {
            "Bearer from-the-environment"
        }
        assert re.search(r"pairs +4 kept; dropped: none", shown) and "4 system" in shown
        assert trimtab(*given, "--writer", url, "--model", "m")[0] == 0 and len(seen) == 6
    assert Counter(i.kind for i in read_items(out / "items.jsonl")) == {"control": 2, "system": 4}
    for wrong, remedy in (
        (["--writer", "http://localhost/v1"], "give the model's name there with --model"),
        (["--model", "m"], "is none"),
        (["--writer", "http://localhost/v1", "--model", "m", "--kinds", "x"], "kinds are some of"),
    ):
        code, _, err = trimtab("curate", told, *wrong)
        assert code == 2 and remedy in " ".join(err.split())


@pytest.mark.slow
def test_the_real_model_writes_in_form(smollm2, tmp_path):
    """It is far too small for this work: what passes is asked to have the form, and no more."""

    def write():
        options = {"kinds": ("control", "system"), "pairs": 1, "stimuli": 1, "tries": 2}
        try:
            return curate(smollm2, ["a cheerful pirate"], tmp_path / "out", **options)
        except ChatError as error:
            assert "was usable: " in str(error)
            return []

    items = write()
    before, record = files(tmp_path / "out"), record_of(tmp_path / "out")
    assert Counter(item.kind for item in items) == record["items"]
    for item in items:
        ((question, answer),) = item.qa
        assert pair_fault((question, answer), [], item.system or item.control_user, "") is None
    for stage in record["stages"].values():
        assert 1 <= stage["requests"] <= 2 and stage["kept"] <= 1
        assert stage["kept"] == 1 or sum(stage["dropped"].values()) >= 2
    assert write() == items and files(tmp_path / "out") == before
