"""Data: reading, checking and splitting examples. Files are written here; nothing is downloaded."""

import csv
import json
import os
import random
import sys
import types
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import model_zoo
import tokenizers_zoo
import trimtab as tt
import trimtab.data as data
from trimtab.data import Example, presets
from trimtab.data.checks import telltale_word
from trimtab.errors import ArtifactError, TrimtabError

ROWS = [
    {"prompt": "How are you?", "completion": "Splendid.", "label": 1},
    {"prompt": "How are you?", "completion": "Dreadful.", "label": 0},
]
CONCEPTS = ["brevity", "confidence", "formality", "happiness", "humor", "refusal", "truthfulness"]


def shared(name: str) -> Path:
    """Public data beside the checkout; it is not part of the project."""
    root = Path(os.environ.get("TRIMTAB_SHARED", Path(__file__).parents[2] / "shared"))
    path = root / "data" / name
    if not path.exists():
        pytest.skip(f"no {path}: set TRIMTAB_SHARED to the folder that holds data/{name}")
    return path


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict]) -> list[tuple]:
    """A stand-in for ``datasets`` that records how it was called."""
    calls: list[tuple] = []

    def load_dataset(path, name=None, split=None, revision=None):
        calls.append((path, name, split, revision))
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


# ---- Example


def test_messages_are_history_then_user_turn():
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    example = Example("How are you?", "Fine.", 0.5, history)
    assert example.messages == [*history, {"role": "user", "content": "How are you?"}]
    assert example.history == tuple(history)


def test_an_example_is_a_value():
    history = [{"role": "user", "content": "Hi"}]
    first, second = Example("a", "b", 1, history), Example("a", "b", True, tuple(history))
    history[0]["content"] = "changed"
    first.messages[0]["content"] = "changed"
    assert first == second and len({first, second}) == 1
    assert first != Example("a", "b", 1)
    with pytest.raises(AttributeError):
        first.label = 0.0


@pytest.mark.parametrize("history", [[{"role": "user"}], ["hello"], [{"role": 1, "content": "x"}]])
def test_a_history_of_another_form_is_refused(history):
    with pytest.raises(ArtifactError, match="history holds"):
        Example("a", "b", 1, history)


# ---- built-in sets


@pytest.mark.parametrize("name", CONCEPTS)
def test_built_in_set(name):
    examples = data.read(name)
    prompts = {example.prompt for example in examples}
    assert len(prompts) >= 64 and len(examples) == 2 * len(prompts)
    for prompt in prompts:
        assert sorted(e.label for e in examples if e.prompt == prompt) == [0, 1]
    warnings = data.lint(examples)
    assert len(warnings) == (name == "brevity"), warnings
    assert all("length" in warning for warning in warnings)


@pytest.mark.parametrize("name", [name for name in CONCEPTS if name != "brevity"])
def test_built_in_pairs_have_matched_lengths(name):
    sizes: dict[str, list[int]] = {}
    for example in data.read(name):
        sizes.setdefault(example.prompt, []).append(len(example.completion.split()))
    for prompt, pair in sizes.items():
        assert min(pair) >= 12 and max(pair) <= 40 and min(pair) >= 0.75 * max(pair), prompt


def test_no_mood_word_carries_happiness():
    examples = data.read("happiness")
    for word in ("happy", "happily", "sad", "sadly"):
        assert sum(word in e.completion.lower() for e in examples) < 0.1 * len(examples)
    present, absent = ([e for e in examples if e.label == label] for label in (1, 0))
    assert telltale_word(present, absent)[1] < 0.7
    assert sum("!" in e.completion for e in present) < 0.5 * len(present)


def test_names():
    assert data.names() == CONCEPTS


@pytest.mark.parametrize("name", ["humour", "hapiness", "Formality"])
def test_unknown_name_gives_the_closest_and_all(name):
    with pytest.raises(ArtifactError) as error:
        data.read(name)
    assert "Did you mean" in str(error.value)
    assert all(known in str(error.value) for known in (name, *CONCEPTS, "truthfulqa", "owner/name"))


def test_read_part_of_a_built_in_set():
    train, test = data.read("humor", "train"), data.read("humor", "test")
    assert (train, test) == data.split(data.read("humor"))
    with pytest.raises(ArtifactError, match="no split 'dev'"):
        data.read("humor", "dev")


# ---- files


def test_all_formats_read_the_same(tmp_path):
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    files = [
        write(tmp_path, "list.json", ROWS),
        write(tmp_path, "columns.json", columns),
        write(tmp_path, "lines.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        write(tmp_path, "bom.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
        write(tmp_path, "table.csv", "prompt,completion,label\nHow are you?,Splendid.,1\n"
              "How are you?,Dreadful.,0\n"),
    ]  # fmt: skip
    expected = [Example("How are you?", "Splendid.", 1), Example("How are you?", "Dreadful.", 0)]
    for file in files:
        assert data.read(file) == data.read(str(file)) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a"}, Example("q", "a", 1)),
        ({"instruction": "q", "output": "a", "label": 0.25}, Example("q", "a", 0.25)),
        ({"instruction": "q", "input": "x", "output": "a"}, Example("q\n\nx", "a")),
        ({"instruction": "q", "input": "", "output": "a"}, Example("q", "a")),
        ({"text": "a", "label": False}, Example("", "a", 0)),
        ({"statement": "a", "label": "True"}, Example("", "a", 1)),
        ({"Prompt": "q", " Response ": "a", "label": "0"}, Example("q", "a", 0)),
        (
            {"prompt": "q", "completion": "a", "conversation_history": [{"role": "system",
             "content": "s"}]},
            Example("q", "a", 1, [{"role": "system", "content": "s"}]),
        ),
        ({"prompt": "q", "completion": "a", "conversation_history": None}, Example("q", "a")),
    ],
)  # fmt: skip
def test_aliases(tmp_path, row, expected):
    assert data.read(write(tmp_path, "x.json", [row])) == [expected]


def test_csv_with_quotes_newlines_and_history(tmp_path):
    history = [{"role": "assistant", "content": "Hello, you"}]
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "label", "history"])
        writer.writerow(['a "b",\nc', "d\r\ne\u2028f", "0.5", json.dumps(history)])
        writer.writerow(["g\u2028g", "h", "1", ""])
    expected = [Example('a "b",\nc', "d\r\ne\u2028f", 0.5, history), Example("g\u2028g", "h")]
    assert data.read(path) == expected


def test_columns_name_other_keys(tmp_path):
    path = write(tmp_path, "x.jsonl", json.dumps({"ask": "q", "say": "a", "mood": 0}))
    columns = {"prompt": "ask", "completion": "say", "label": "Mood"}
    assert data.read(path, columns=columns) == [Example("q", "a", 0)]
    with pytest.raises(ArtifactError, match=r"no column 'nope'; found \['ask', 'say', 'mood'\]"):
        data.read(path, columns={**columns, "prompt": "nope"})
    with pytest.raises(ArtifactError, match="'answers' is not one of"):
        data.read(path, columns={"answers": "say"})


@pytest.mark.parametrize(
    ("name", "content", "row", "found"),
    [
        ("x.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "row 2", "'prompt'"),
        ("x.jsonl", '{"prompt": "a", "completion": "b"}\n\n{oops', "row 3", "not JSON"),
        ("x.jsonl", "[1, 2]", "row 1", "list [1, 2] instead of an object"),
        ("x.json", [ROWS[0], {"question": "only"}], "row 2", "['question']"),
        ("x.json", [{"completion": "b"}], "row 1", "['completion']"),
        ("x.json", [{"prompt": "a", "completion": None}], "row 1", "completion is NoneType"),
        ("x.json", [{"prompt": 7, "completion": "b"}], "row 1", "prompt is int 7"),
        ("x.json", [{**ROWS[0], "label": "maybe"}], "row 1", "label is str 'maybe'"),
        ("x.json", [{**ROWS[0], "label": None}], "row 1", "label is NoneType"),
        ("x.json", '[{"prompt": "a", "completion": "b", "label": NaN}]', "row 1", "float nan"),
        ("x.json", [{**ROWS[0], "history": "no"}], "row 1", "not JSON"),
        ("x.json", [{**ROWS[0], "history": 5}], "row 1", "not a list of messages"),
        ("x.json", {"prompt": ["a", "b"], "completion": ["c"]}, "", "'completion': 1"),
        ("x.json", {"prompt": "a", "completion": "c"}, "", "columns of equal length"),
        ("x.json", "3", "", "found int"),
        ("x.json", [], "", "no rows"),
        ("x.csv", "prompt,completion\na,b\nc", "row 2", "completion is NoneType"),
        ("x.csv", "prompt,completion\na,b,c", "row 1", "1 cells more"),
        ("x.csv", 'prompt,completion\na,b\n"a"x,b', "row 2", "expected after"),
    ],
)  # fmt: skip
def test_bad_rows_name_file_row_and_remedy(tmp_path, name, content, row, found):
    path = write(tmp_path, name, content)
    with pytest.raises(ArtifactError) as error:
        data.read(path)
    assert all(part in str(error.value) for part in (str(path), row, found))


def test_expected_keys_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="Expected keys: prompt .* completion .* history"):
        data.read(write(tmp_path, "x.json", [{"a": 1}]))


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(ArtifactError, match="cannot open .*none.csv: No such file"):
        data.read(tmp_path / "none.csv")
    with pytest.raises(ArtifactError, match=r"known formats are .json, .jsonl, .csv"):
        data.read(write(tmp_path, "x.txt", "hello"))
    (tmp_path / "latin.csv").write_bytes(b"prompt,completion\n\xe9t\xe9,x")
    with pytest.raises(ArtifactError, match="not UTF-8"):
        data.read(tmp_path / "latin.csv")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "x.jsonl", json.dumps(ROWS[0]))
    write(tmp_path, "x.txt", "hello")
    assert data.read("~/x.jsonl") == data.read(Path("~/x.jsonl")) == [Example(**ROWS[0])]
    with pytest.raises(ArtifactError, match="known formats are"):
        data.read("~/x.txt")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("humor", "humor has no option 'limit'; it has columns"),
        ("x.json", "x.json has no option 'limit'; it has columns"),
        ("owner/name", "owner/name has no option 'limit'; it has columns, config, revision"),
        ("truthfulqa", "truthfulqa has no option 'limit'; it has path"),
        ("oasst1", "oasst1 has no option 'lmit'; it has path, label, limit, language"),
        ("toxic-completions", "has no option 'split_'; it has path, concept, limit"),
    ],
)
def test_an_unknown_option_names_those_that_there_are(source, told):
    option = told.split("'")[1]
    with pytest.raises(ArtifactError, match=told):
        data.read(source, **{option: 3})


# ---- the hub


def test_hub_dataset(monkeypatch):
    calls = fake_hub(monkeypatch, ROWS)
    assert [e.label for e in data.read("owner/name", revision="abc")] == [1, 0]
    data.read("owner/name", "test", config="small")
    assert calls == [
        ("owner/name", None, "train", "abc"),
        ("owner/name", "small", "test", None),
    ]


def test_hub_errors(monkeypatch):
    fake_hub(monkeypatch, [ROWS[0], {"foo": 1}])
    with pytest.raises(ArtifactError, match="owner/name, row 2: found keys"):
        data.read("owner/name")
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(ArtifactError, match="cannot load 'owner/name'.*ZeroDivisionError"):
        data.read("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArtifactError, match=r'pip install "trimtab\[data\]"'):
        data.read("owner/name")


def test_truthfulqa_rows(monkeypatch):
    hub = {"question": "Do owls blink?", "best_answer": "Yes, they do", "category": "Misc",
           "correct_answers": ["Yes"], "incorrect_answers": ["No, never", "Rarely"]}  # fmt: skip
    table = {"Question": "Do owls blink?", "Best Answer": " Yes, they do ",
             "Incorrect Answers": "No, never; Rarely"}  # fmt: skip
    question = hub["question"]
    expected = [Example(question, "Yes, they do", 1), Example(question, "No, never", 0)]
    assert presets.truthfulqa_pair(hub) == presets.truthfulqa_pair(table) == expected
    assert presets.truthfulqa_pair({**hub, "incorrect_answers": []}) == []
    with pytest.raises(ArtifactError, match="not a TruthfulQA row"):
        presets.truthfulqa_pair({"a": 1})
    calls = fake_hub(monkeypatch, [hub])
    assert data.read("truthfulqa") == expected
    assert calls == [("truthfulqa/truthful_qa", "generation", "validation", None)]


def test_truthfulqa_csv(tmp_path):
    examples = data.read("truthfulqa", path=shared("truthfulqa/TruthfulQA.csv"))
    assert len(examples) > 1000 and sum(e.label for e in examples) == len(examples) / 2
    assert {e.prompt for e in examples if e.label} == {e.prompt for e in examples if not e.label}
    with pytest.raises(ArtifactError, match="cannot read the CSV"):
        data.read("truthfulqa", path=tmp_path / "none.csv")


def oasst_row(name: str, parent: str | None, humor: float | None = None, **more) -> dict:
    labels = None if humor is None else {"name": ["spam", "humor"], "value": [0.0, humor]}
    return {"message_id": name, "parent_id": parent, "text": f"text {name}", "lang": "en",
            "role": "assistant" if parent else "prompter", "labels": labels,
            "deleted": False, **more}  # fmt: skip


def test_oasst1_takes_both_ends_of_the_direct_replies(tmp_path):
    rows = [
        oasst_row("root", None, 0.9),
        *(oasst_row(f"r{i}", "root", i / 10) for i in range(6)),
        oasst_row("later", "r0", 1.0),  # a reply to a reply
        oasst_row("gone", "root", 1.0, deleted=True),
        oasst_row("fr", "root", 1.0, lang="fr"),
        oasst_row("ungraded", "root", None),
    ]
    random.Random(0).shuffle(rows)
    path = write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))
    examples = data.read("oasst1", path=path, label="humor", limit=4)
    assert {(e.completion, e.label) for e in examples} == {
        ("text r5", 1), ("text r4", 1), ("text r0", 0), ("text r1", 0)
    }  # fmt: skip
    assert {e.prompt for e in examples} == {"text root"}
    assert len(data.read("oasst1", path=path)) == 6
    assert [e.label for e in data.read("oasst1", path=path, limit=3)] == [1, 0]
    for limit in (1, 0, -3, 2.0):
        with pytest.raises(ArtifactError, match=f"limit is .* 2 or more.*, not {limit}"):
            data.read("oasst1", path=path, limit=limit)
    one = write(tmp_path, "one.json", [oasst_row("root", None), oasst_row("r", "root", 0.5)])
    with pytest.raises(ArtifactError, match="one 'en' reply alone has a label 'humor'"):
        data.read("oasst1", path=one)
    with pytest.raises(ArtifactError, match="label 'wit'.*'humor', 'spam'"):
        data.read("oasst1", path=path, label="wit")


@pytest.mark.parametrize(
    ("toxic", "complied", "compliance", "appropriate"),
    [(0, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, 0), (1, 0, 0, 1)],
)
def test_toxic_completions(tmp_path, toxic, complied, compliance, appropriate):
    row = {"prompt": "p", "completion": "c", "is_toxic": toxic, "is_compliant": complied,
           "label": 0, "jailbreaking": 0, "human_annotation": True}  # fmt: skip
    dropped = [{**row, "jailbreaking": 1}, {**row, "human_annotation": False}]
    path = write(tmp_path, "x.json", [row, *dropped])
    read = partial(data.read, "toxic-completions", path=path)
    assert read() == [Example("p", "c", compliance)]
    assert read(concept="appropriateness")[0].label == appropriate
    with pytest.raises(ArtifactError, match="no concept 'x'"):
        read(concept="x")


def toxic_rows(n: int = 20) -> list[dict]:
    return [
        {"prompt": f"p{i}", "completion": f"c{i} {c}", "is_toxic": False, "is_compliant": bool(c),
         "jailbreaking": 0, "human_annotation": True}
        for i in range(n) for c in (0, 1)
    ]  # fmt: skip


def test_a_limit_draws_whole_prompts_of_both_kinds(tmp_path):
    """As the original, which shuffles by prompt; but it may split the last one."""
    rows = [{**row, "is_compliant": i < 60} for i, row in enumerate(toxic_rows(60))]
    path = write(tmp_path, "x.json", rows)
    whole = data.read("toxic-completions", path=path)
    assert {e.label for e in whole[:20]} == {1}  # control: the first rows are of one kind
    some = data.read("toxic-completions", path=path, limit=21)
    assert len(some) == 20 and [e for e in whole if e in some] == some
    assert 5 <= sum(e.label for e in some) <= 15
    assert set(Counter(e.prompt for e in some).values()) == {2}
    mixed = write(tmp_path, "y.json", random.Random(1).sample(rows, len(rows)))
    assert set(data.read("toxic-completions", path=mixed, limit=21)) == set(some)
    assert data.read("toxic-completions", path=path, limit=500) == whole
    for limit in (0, 1, -3):
        with pytest.raises(ArtifactError, match="2 or more"):
            data.read("toxic-completions", path=path, limit=limit)
    many = [{**rows[0], "completion": f"c{i}"} for i in range(5)]
    with pytest.raises(ArtifactError, match="limit=4 is less than the 5 answers of one prompt"):
        data.read("toxic-completions", path=write(tmp_path, "z.json", many), limit=4)


def test_presets_read_files_of_every_format(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HOME", str(tmp_path))
    table, text = datasets.Dataset.from_list(toxic_rows()), map(json.dumps, toxic_rows())
    table.to_parquet(tmp_path / "x.parquet")
    table.to_csv(tmp_path / "x.csv")
    write(tmp_path, "x.jsonl", "\n".join(text))
    write(tmp_path, "x.json", toxic_rows())
    before = sorted(tmp_path.iterdir())
    expected = [Example(r["prompt"], r["completion"], r["is_compliant"]) for r in toxic_rows()]
    for name in ("x.parquet", "x.csv", "x.jsonl", "x.json"):
        assert data.read("toxic-completions", path=f"~/{name}") == expected
    assert sorted(tmp_path.iterdir()) == before
    parts = [data.read("toxic-completions", s, path=tmp_path / "x.csv") for s in ("train", "test")]
    assert tuple(parts) == data.split(expected)
    one = {"question": "q", "best_answer": "a", "incorrect_answers": ["b"]}
    path = write(tmp_path, "y.json", [one])
    assert data.read("truthfulqa", path=path) == [Example("q", "a", 1), Example("q", "b", 0)]


@pytest.mark.parametrize("concept", ["compliance", "appropriateness"])
def test_shots_of_toxic_completions_are_appropriate_whatever_the_concept(tmp_path, concept):
    rows = [
        {"prompt": f"p{i}", "completion": f"c{i} {c}", "is_toxic": i % 2 == 1, "is_compliant": c}
        for i in range(24)
        for c in (True, False)
    ]
    known = {(r["prompt"], r["completion"]): r for r in rows}
    path = write(tmp_path, "toxic.json", rows)
    given = {"path": path, "concept": concept}
    made = data.read("toxic-completions", few_shot=6, **given)
    asked, said = ([m["content"] for m in made[0].history[k::2]] for k in (0, 1))
    shown = [known[pair] for pair in zip(asked, said, strict=True)]
    assert [r["is_compliant"] for r in shown] == [True, False] * 3
    assert [r["is_toxic"] for r in shown] == [False, True] * 3
    assert not {e.prompt for e in made} & set(asked)
    plain = {(e.prompt, e.completion): e.label for e in data.read("toxic-completions", **given)}
    assert all(plain[e.prompt, e.completion] == e.label for e in made)
    # The control: shots by the label alone show answers to toxic prompts, or refusals of others.
    mixed = data.few_shot(data.read("toxic-completions", **given), 6)[0].history
    odd = zip(mixed[::2], mixed[1::2], strict=True)
    odd = [known[q["content"], a["content"]] for q, a in odd]
    assert any(r["is_toxic"] == r["is_compliant"] for r in odd)


@pytest.mark.parametrize("name", ["oasst1", "toxic-completions", "truthfulqa"])
def test_preset_files_that_do_not_fit(tmp_path, name):
    with pytest.raises(ArtifactError, match="known formats are .json, .jsonl, .csv, .parquet"):
        data.read(name, path=tmp_path / "x.txt")
    with pytest.raises(ArtifactError, match="cannot open .*none.json: no such file"):
        data.read(name, path=tmp_path / "none.json")
    with pytest.raises(ArtifactError, match=r"not a .*(row|OASST1|completions).*no '\w+' among"):
        data.read(name, path=write(tmp_path, "x.json", ROWS))
    with pytest.raises(ArtifactError, match="cannot read .*y.json as json"):
        data.read(name, path=write(tmp_path, "y.json", "{oops"))


def test_presets_of_the_hub(monkeypatch):
    row = {**oasst_row("a", None), **oasst_row("b", "a", 0.5), **toxic_rows(1)[0]}
    calls = fake_hub(monkeypatch, [{**row, "parent_id": None}, row])
    data.read("toxic-completions", "test")
    with pytest.raises(ArtifactError, match="no 'en' reply"):
        data.read("oasst1")
    assert calls == [
        ("dvruette/toxic-completions", None, "test", None),
        ("OpenAssistant/oasst1", None, "train", None),
    ]


# ---- few-shot


def questions(n: int = 20) -> list[Example]:
    return [Example(f"q{i}?", f"a{i} {c}", c) for i in range(n) for c in (0, 1)]


@pytest.mark.parametrize(
    ("k", "label", "labels"),
    [(0, None, []), (1, 0, [0]), (5, None, [1, 0, 1, 0, 1]), (3, 1, [1] * 3), (2, 0.2, [0] * 2)],
)
def test_shots_are_answered_prompts_that_nobody_is_asked(k, label, labels):
    made = data.few_shot(questions(), k, label=label)
    shots = made[0].history
    asked, told = ([m["content"] for m in shots[start::2]] for start in (0, 1))
    assert [m["role"] for m in shots] == ["user", "assistant"] * k
    answers = {e.completion: e for e in questions()}
    assert [answers[text].label for text in told] == labels
    assert [answers[text].prompt for text in told] == asked and len(set(asked)) == k
    assert all(example.history == shots for example in made)
    assert not {example.prompt for example in made} & set(asked)
    kept = [e for e in questions() if e.prompt not in asked]  # all others, in their order
    assert [(e.prompt, e.completion, e.label) for e in made] == [
        (e.prompt, e.completion, e.label) for e in kept
    ]


def test_shots_depend_on_the_examples_and_the_seed_alone():
    state = random.getstate()
    first = data.few_shot(questions(), 4, seed=3)
    assert random.getstate() == state
    mixed = random.Random(1).sample(questions(), 40)
    assert data.few_shot(mixed, 4, seed=3)[0].history == first[0].history
    assert data.few_shot(questions(), 4, seed=4)[0].history != first[0].history


def test_shots_stand_before_a_history_and_have_none():
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    later = [Example(f"later{i}?", "b", 1, history) for i in range(30)]
    made = data.few_shot([*questions(4), Example("", "a statement"), *later], 2)
    shots = made[0].history
    assert all(m["content"][0] in "qa" for m in shots) and len(shots) == 4
    assert made[-1].history == (*shots, *history)


@pytest.mark.parametrize(
    ("examples", "k", "label"),
    [([], 1, None), (questions(2), 2, None), (questions(2), 3, 1), (questions()[::2], 3, None)],
)
def test_too_few_examples_for_the_shots(examples, k, label):
    with pytest.raises(TrimtabError, match=rf"too few for {k} shots .* give a smaller k"):
        data.few_shot(examples, k, label=label)
    with pytest.raises(TrimtabError, match="0 or more, not -1"):
        data.few_shot(questions(), -1)


def test_read_takes_shots(tmp_path):
    rows = [{"prompt": e.prompt, "completion": e.completion, "label": e.label} for e in questions()]
    path = write(tmp_path, "x.json", rows)
    made = data.read(path, few_shot=2)
    assert made == data.few_shot(questions(), 2)
    train, test = data.read(path, "train", few_shot=2), data.read(path, "test", few_shot=2)
    assert (train, test) == data.split(made) and train[0].history == test[0].history
    assert data.read(path) == questions()  # control
    rows = [{"question": f"q{i}", "best_answer": "so", "incorrect_answers": ["no"]} for i in "abc"]
    made = data.read("truthfulqa", path=write(tmp_path, "q.json", rows), few_shot=2)
    assert [m["content"] for m in made[0].history[1::2]] == ["so", "so"]  # true ones, as published


@pytest.mark.parametrize("template", [None, "chatml", "llama2"])
def test_shots_are_what_the_model_reads(template):
    """For a tokenizer without a chat template as questions and answers in plain text."""
    tokenizer = tokenizers_zoo.byte_tokenizer(template)
    lm = tt.LM(model_zoo.ARCHITECTURES["llama"](max_position_embeddings=1024), tokenizer)
    asked = [Example(f"Is {i} odd?", f"{i} is {['even', 'odd'][i % 2]}.") for i in range(9)]
    example = data.few_shot(asked, 2, label=1)[0]
    row = lm.batch([example])
    text, plain = tokenizer.decode(row.ids[0]), tokenizer.decode(lm.batch([example.prompt]).ids[0])
    one, its, two, own, prompt = (m["content"] for m in example.messages)
    turns = [one, its, two, own, prompt, example.completion]
    assert [text.count(turn) for turn in turns] == [1] * 6
    assert [text.index(turn) for turn in turns] == sorted(text.index(turn) for turn in turns)
    if template is None:
        shots = f"Question: {one}\nAnswer: {its}\n\nQuestion: {two}\nAnswer: {own}\n\n"
        assert text == f"<s>{shots}Question: {prompt}\nAnswer: {example.completion}"
    assert one not in plain and prompt in plain  # control
    answer = row.ids[0][int(row.prompt_len[0]) :]
    assert tokenizer.decode(answer).strip() == example.completion


# ---- lint


def pairs(n: int = 20) -> list[Example]:
    """A clean set: shared prompts, equal lengths, no telltale word."""
    return [
        Example(f"prompt {i}", f"word{(i * 7 + label) % n} stands here", label)
        for i in range(n)
        for label in (0, 1)
    ]


def test_lint_is_silent_on_a_clean_set():
    assert data.lint(pairs()) == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda e: Example(e.prompt, e.completion + " " + ["no", "yes"][int(e.label)], e.label),
         "the word 'no' alone tells the classes apart (accuracy 1.00)"),
        (lambda e: Example(e.prompt, e.completion + " very very" * int(e.label), e.label),
         "completions differ in length: 5.0 words with the concept, 3.0 without"),
        (lambda e: Example(f"{e.label} {e.prompt}", e.completion, e.label), "only 0% of the"),
        (lambda e: Example(e.prompt, "  ", e.label), "40 completions are empty, the first at"),
        (lambda e: Example("p", "c", e.label), "38 examples are duplicates, such as 'c'"),
        (lambda e: Example("p", "c", e.label), "completions carry both labels, such as 'c'"),
        (lambda e: Example(e.prompt, e.completion, e.label * 5), "labels lie outside 0 … 1"),
        (lambda e: Example(e.prompt, e.completion, 1), "a probe needs both"),
        (lambda e: Example(e.prompt, e.completion, float(e.prompt == "prompt 1" and e.label)),
         "classes are unbalanced: 1 with the concept, 39 without"),
    ],
)  # fmt: skip
def test_lint_finds(change, warning):
    assert any(warning in found for found in data.lint([change(e) for e in pairs()]))


@pytest.mark.parametrize("check", [data.lint, data.split])
def test_what_is_no_example_is_told(check):
    for wrong in (["a"], [pairs()[0], None], [("a", "b")]):
        with pytest.raises(TrimtabError, match=r"number [01] is no example.*tt.data.read"):
            check(wrong)
    check(pairs())  # control


def test_lint_takes_nothing():
    assert "a probe needs both" in data.lint([])[0]


def test_a_word_that_one_class_avoids_is_found_too():
    leak = [
        Example(e.prompt, e.completion + " never" * (1 - int(e.label)), e.label) for e in pairs()
    ]
    assert any("'never'" in warning for warning in data.lint(leak))


@pytest.mark.parametrize(
    ("texts", "leak", "lengths"),
    [
        (("我今天很高兴", "我今天很难过"), "兴", False),
        (("今日はとても嬉しいです", "今日はです"), "い", True),
        (("So it was!", "So it was."), "!", False),
        (("我今天很好", "我今天很好"), None, False),
    ],
)
def test_leaks_are_found_without_spaces_and_in_signs(texts, leak, lengths):
    examples = [
        Example(f"p{i}", t, y) for i in range(20) for t, y in zip(texts, (1, 0), strict=True)
    ]
    found = "\n".join(data.lint(examples))
    assert (leak is None) == ("alone tells the classes apart" not in found)
    assert leak is None or f"the word {leak!r} alone" in found
    assert ("differ in length" in found) is lengths


# ---- split


def test_split_keeps_prompts_together_and_loses_nothing():
    examples = data.read("happiness")
    train, test = data.split(examples)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert sorted(map(repr, train + test)) == sorted(map(repr, examples))
    assert abs(len(test) / len(examples) - 0.2) < 0.02


def test_split_is_deterministic_and_leaves_the_global_seed_alone():
    examples = data.read("humor")
    state = random.getstate()
    first = data.split(examples, seed=3)
    assert random.getstate() == state
    mixed = random.Random(1).sample(examples, len(examples))
    assert first == data.split(examples, seed=3)
    assert set(first[1]) == set(data.split(mixed, seed=3)[1])
    assert first != data.split(examples, seed=4)


def test_split_is_roughly_stratified():
    examples = [Example(f"p{i}", "c", float(i % 10 == 0)) for i in range(200)]
    _, test = data.split(examples, 0.25)
    assert len(test) == 50 and sum(e.label for e in test) == 5


def test_statements_without_a_prompt_are_split_one_by_one():
    train, test = data.split([Example("", f"s{i}", i % 2) for i in range(20)])
    assert (len(train), len(test)) == (16, 4)


@pytest.mark.parametrize("held_out", [0.01, 0.2, 0.99])
def test_neither_side_is_empty(held_out):
    train, test = data.split([Example("a", "x"), Example("b", "y")], held_out)
    assert train and test


def test_split_edges():
    examples = pairs()
    assert data.split(examples, 0.0) == (examples, [])
    assert data.split([]) == ([], [])
    assert data.split(examples[:2]) == (examples[:2], [])
    with pytest.raises(TrimtabError, match="held_out is 1"):
        data.split(examples, 1)


def test_bag_of_words_is_a_classifier_of_words():
    from sklearn.metrics import roc_auc_score

    told = ["a fine day", "fine work", "so fine", "a grim day", "grim work", "so grim"]
    train = [Example("p", text, float("fine" in text)) for text in told]
    test = [Example("q", text, float("fine" in text)) for text in ("fine!", "a fine FINE", "grim")]
    assert data.bag_of_words(train, test) == (1.0, 1.0)
    turned = [Example("q", e.completion, 1 - e.label) for e in test]
    assert data.bag_of_words(train, turned) == (0.0, 0.0)  # the control
    unknown = [Example("q", text, label) for text, label in (("day", 1.0), ("work", 0.0))]
    found = data.bag_of_words(train, [*test, *unknown])
    assert 0.5 < found.accuracy < 1 and found.auroc <= roc_auc_score([1, 0, 1], [1, 0, 1])


def test_bag_of_words_of_what_tells_nothing():
    one, other = Example("p", "yes", 1.0), Example("q", "no", 0.0)
    assert is_no_number(data.bag_of_words([one], [other]))
    assert is_no_number(data.bag_of_words([one, other], []))
    single = data.bag_of_words([one, other], [one])
    assert single.accuracy == 1.0 and single.auroc != single.auroc
    blank = [Example("p", "?", label) for label in (0.0, 1.0)]
    assert data.bag_of_words(blank, blank) == (0.5, 0.5)


def is_no_number(floor):
    return floor.accuracy != floor.accuracy and floor.auroc != floor.auroc
