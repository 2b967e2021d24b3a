"""LatentQA's data and the decoder's input, token by token, on every kind of template."""

import json
from pathlib import Path

import pytest

from tokenizers_zoo import TEMPLATES, byte_tokenizer, spaced_tokenizer
from trimtab import chat
from trimtab.errors import ArtifactError, ChatError
from trimtab.latentqa import Item, attach, read_items, read_qa, sentence_qa, split, template_qa
from trimtab.latentqa.data import seen
from trimtab.latentqa.dialogue import OPENING, Dialogue

SIX = ["chatml", "llama3", "llama2", "mistral", "gemma", "phi3"]
ALL = [*TEMPLATES, None]
MAKERS = [byte_tokenizer, spaced_tokenizer]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "latentqa"

CONTROL, REPLY = "Be a fox, always.", "I am a fox."
STIMULUS, ANSWER = "Tell me a small story.", "Once upon a time."


@pytest.fixture(params=MAKERS, ids=["byte", "spaced"])
def make(request):
    return request.param


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# -- where contents stand --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_layout_covers_each_content_and_nothing_else(make, name):
    tokenizer = make(name)
    turns = [("user", CONTROL), ("assistant", REPLY), ("user", STIMULUS)]
    messages = [{"role": role, "content": content} for role, content in turns]
    laid = chat.layout(tokenizer, messages, prompt=True)
    assert laid.ids == chat.encode(tokenizer, messages).ids
    for (start, end), (_, content) in zip(laid.spans, turns, strict=True):
        assert text_of(tokenizer, laid.ids[start:end]).strip() == content
    naive = laid.ids[: laid.spans[-1][1] - 2]  # "drop the last two tokens" finds no content's end
    assert text_of(tokenizer, naive[laid.spans[-1][0] :]).strip() != STIMULUS


def test_a_template_that_rewrites_a_content_is_refused():
    shouting = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper }}{% endfor %}"
    with pytest.raises(ChatError, match="does not write"):
        chat.layout(byte_tokenizer(shouting), [{"role": "user", "content": "quiet"}])


# -- what the decoder is shown ---------------------------------------------------------------------

KINDS = {
    "system": Item("a", system=CONTROL, stimulus_user=STIMULUS),
    "stimulus": Item("a", control_user=CONTROL, control_model=REPLY, stimulus_user=STIMULUS),
    "stimulus_completion": Item(
        "a",
        control_user=CONTROL,
        control_model=REPLY,
        stimulus_user=STIMULUS,
        stimulus_model=ANSWER,
    ),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_the_control_part_is_read_but_not_shown(make, name, kind):
    tokenizer, item = make(name), KINDS[kind]
    row = seen(tokenizer, item)
    hidden, shown = (
        text_of(tokenizer, ids) for ids in (row.ids[: row.start], row.ids[row.start :])
    )
    assert item.kind == kind
    assert CONTROL in hidden and STIMULUS not in hidden
    assert shown.strip().startswith(STIMULUS) and CONTROL not in shown and REPLY not in shown
    if kind == "stimulus_completion":
        assert shown.strip().endswith(ANSWER)
    # A little later would lose a part (the first token may be a space of its own).
    assert not text_of(tokenizer, row.ids[row.start + 2 :]).strip().startswith(STIMULUS)


@pytest.mark.parametrize("name", SIX)
def test_a_lone_control_turn_is_shown_whole(make, name):
    tokenizer = make(name)
    row = seen(tokenizer, Item("a", control_user=CONTROL))
    assert text_of(tokenizer, row.ids[row.start :]).strip().startswith(CONTROL)
    assert row.ids == chat.encode(tokenizer, CONTROL).ids


@pytest.mark.parametrize("name", SIX)
def test_the_target_reads_what_the_model_would_be_given(make, name):
    tokenizer = make(name)
    asked = chat.encode(tokenizer, STIMULUS, system=CONTROL)
    assert seen(tokenizer, KINDS["system"]).ids == asked.ids


# -- the decoder's rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rows_token_by_token(make, name):
    dialogue = Dialogue(tokenizer := make(name))
    _, placeholder = dialogue.placeholder
    row = dialogue.row(5, "Who is it?", "A lazy dog.")
    assert (
        row.ids[row.start : row.start + row.slots] == [placeholder] * 5 == [placeholder] * row.slots
    )
    assert placeholder not in (row.ids[row.start - 1], row.ids[row.start + 5])
    after = text_of(tokenizer, row.ids[row.start + row.slots : row.answer])
    assert OPENING in after and "Who is it?" in after and "lazy" not in after
    *answer, end = row.labels
    assert text_of(tokenizer, answer).strip() == "A lazy dog."
    assert tokenizer.added_tokens_decoder[end].special
    assert dialogue.stops(row.ids) and not dialogue.stops(row.ids[:-1])


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_asked_as_it_was_trained(make, name):
    """Whatever the answer: the ids before it do not depend on it."""
    dialogue = Dialogue(make(name))
    asked = dialogue.row(3, "Why?")
    assert asked.answer == len(asked.ids) and not asked.labels
    for answer in ("A dog.", "The dog", "2", "\nso"):
        row = dialogue.row(3, "Why?", answer)
        assert row.ids[: row.answer] == asked.ids


@pytest.mark.parametrize(("name", "speaker"), [("chatml", "reflect"), (None, "assistant")])
def test_the_decoder_has_a_role_of_its_own_where_the_template_allows(name, speaker):
    assert Dialogue(byte_tokenizer(name)).speaker == speaker
    assert Dialogue(byte_tokenizer(name), role="assistant").speaker == "assistant"


def test_visible_text_stands_where_placeholders_would():
    dialogue = Dialogue(tokenizer := byte_tokenizer("chatml"))
    row, blank = dialogue.row(CONTROL, "Why?", "so"), dialogue.row(4, "Why?", "so")
    assert text_of(tokenizer, row.ids[row.start : row.start + row.slots]) == CONTROL
    assert row.ids[: row.start] == blank.ids[: blank.start]
    assert row.ids[row.start + row.slots :] == blank.ids[blank.start + blank.slots :]


# -- items and questions ---------------------------------------------------------------------------


def test_items_and_questions_from_files(tmp_path):
    rows = [
        {"label": "a", "control_user": "x", "control_thought": "?"},
        {"label": "b", "control_user": "y"},
    ]
    (tmp_path / "i.json").write_text(json.dumps(rows))
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "q.json").write_text(json.dumps({"a": [["Q", "A"]]}))
    (tmp_path / "q.jsonl").write_text(json.dumps({"label": "a", "qa": [["Q", "A"]]}))
    assert read_items(tmp_path / "i.json") == read_items(tmp_path / "i.jsonl")
    table = read_qa(tmp_path / "q.json")
    assert table == read_qa(tmp_path / "q.jsonl") == {"a": (("Q", "A"),)}
    assert [i.label for i in attach(read_items(tmp_path / "i.json"), table)] == ["a"]


def test_lines_with_the_same_label_add_up(tmp_path):
    lines = [{"label": "a", "qa": [["Q", "A"]]}, {"label": "b", "qa": [["Q", "B"]]}]
    lines.append({"label": "a", "qa": [["R", "C"]]})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_qa(tmp_path / "q.jsonl") == {"a": (("Q", "A"), ("R", "C")), "b": (("Q", "B"),)}
    for line in ({"qa": [["Q", "A"]]}, [["Q", "A"]]):
        (tmp_path / "q.jsonl").write_text(json.dumps(line))
        with pytest.raises(ArtifactError, match="line without a label, .*'Q'.*a line is"):
            read_qa(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"label": "a"}, "none"),
        ({"label": "a", "control_model": "x"}, "control_model"),
        ({"label": "a", "control_user": 3}, "is text"),
        (3, "JSON object"),
    ],
)
def test_items_that_are_none(row, told):
    with pytest.raises(ChatError, match=told):
        read_items([row])


@pytest.mark.parametrize("qa", [{"a": "text"}, {"a": [["only"]]}, {"a": [["", "x"]]}, ["a"]])
def test_questions_that_are_none(qa):
    with pytest.raises(ArtifactError, match="qa is a"):
        read_qa(qa)


def test_no_label_is_on_both_sides_of_a_split():
    items = [Item(f"l{i % 7}", control_user=str(i)) for i in range(40)]
    kept, aside = split(items, 0.3, seed=1)
    assert {i.label for i in kept}.isdisjoint(i.label for i in aside)
    assert len(kept) + len(aside) == 40 and len({i.label for i in aside}) == 2
    assert split(items, 0.3, seed=1) == (kept, aside)


@pytest.mark.parametrize(("labels", "share", "held"), [(8, 0.05, 1), (2, 0.9, 1), (8, 0.3, 2)])
def test_both_sides_of_a_split_have_a_label(labels, share, held):
    items = [Item(f"l{i % labels}", control_user=str(i)) for i in range(16)]
    kept, aside = split(items, share)
    assert len({i.label for i in aside}) == held and len({i.label for i in kept}) == labels - held
    assert split(items, 0.0) == (items, [])  # control
    alone = items[:1]
    assert split(alone, share) == (alone, [])


def test_questions_made_by_templates():
    item = Item(
        "a", control_user="Please adopt the persona of a baker who loves your bread. Be warm."
    )
    (_, who), (_, how) = template_qa(item)
    assert who == "The assistant will adopt the persona of a baker who loves its bread."
    assert how == "The assistant will be warm."
    assert template_qa(Item("a", stimulus_user="Hello")) == ()
    answers = [a for _, a in sentence_qa("be a passionate vegan")]
    assert all("vegan" in a for a in answers) and len(set(answers)) == len(answers) > 2
    with pytest.raises(ChatError, match="no behaviour"):
        sentence_qa(" . ")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the published LatentQA files are not at {DATA}")
def test_the_published_files_are_read_whole():
    items = read_items([DATA / f"{n}.json" for n in ("control", "stimulus", "system")])
    table = read_qa(DATA / "qa.json")
    assert len(items) == 1180 and len(attach(items, table)) == 1180 and len(table) == 684
    assert {item.kind for item in items} == {"control", "stimulus", "system"}
    bare = read_items(DATA / "system_without_qa.json")
    made = [template_qa(item) for item in bare]
    assert len(bare) == 7844 and all(made)
