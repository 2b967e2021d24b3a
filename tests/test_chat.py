"""Laws of prompts and conversations, on eight templates, two spellings of text, and no template.

Knows tiny tokenizers built in code. Each key law has a control: the naive rule that breaks it.
"""

from __future__ import annotations

import doctest
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenizers_zoo as zoo
from trimtab import chat
from trimtab.chat import PLAIN, Batch, Encoded, decode, encode, layout, pad, pad_id
from trimtab.errors import ChatError

KINDS: dict[str, Callable[..., Any]] = {
    "byte": zoo.byte_tokenizer,
    "spaced": zoo.spaced_tokenizer,
}
NAMES = sorted(zoo.TEMPLATES)
DIRECT = ["chatml", "llama3", "llama2", "mistral", "gemma", "phi3"]  # answer right after the prompt
USER = {"role": "user", "content": "What is the capital of France?"}
HISTORY = [
    {"role": "user", "content": "Are you happy?"},
    {"role": "assistant", "content": "Yes, I am happy."},
    USER,
]
ANSWERS = [
    "Paris.",
    "The capital of France is Paris.\n\nAre you happy?",
    "  spaces before and after \n",
    "\n\n\nnewlines first",
    "日本 über 🙂",
    " Paris",
    "a",
    "<not a tag> [/INST",
    "",
    " ",
]


@pytest.fixture(params=[(kind, name) for kind in KINDS for name in NAMES], ids="-".join)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    kind, name = request.param
    return KINDS[kind](name)


@pytest.fixture(params=list(KINDS))
def bare(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def template_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    return str(text)


def said(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


# -- the prompt is the template's -----------------------------------------------------------------


def test_prompt_is_the_templates(tokenizer: Any) -> None:
    for prompt, messages in ((USER["content"], [USER]), ([USER], [USER]), (HISTORY, HISTORY)):
        row = encode(tokenizer, prompt)
        assert row.ids == template_ids(tokenizer, messages)
        assert row.prompt_len == len(row.ids)


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "llama2"])
def test_never_a_second_bos(name: str) -> None:
    tokenizer = zoo.byte_tokenizer(name)
    text = rendered(tokenizer, [USER], prompt=True)
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, [USER]).ids.count(bos) == 1
    assert encode(tokenizer, text, raw=True).ids == encode(tokenizer, [USER]).ids
    assert tokenizer(text)["input_ids"].count(bos) == 2  # control: the tokenizer's own call


# -- the answer is the template's, without its closers --------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("messages", [[USER], HISTORY], ids=["one", "history"])
def test_answer_has_an_exact_span(
    tokenizer: Any, messages: list[dict[str, str]], answer: str
) -> None:
    row = encode(tokenizer, messages, answer)
    assert row.ids[: row.prompt_len] == template_ids(tokenizer, messages)
    assert decode(tokenizer, row.ids[row.prompt_len :]).strip() == answer.strip()
    assert not set(row.ids[row.prompt_len :]) & set(tokenizer.all_special_ids)
    assert encode(tokenizer, [*messages, said(answer)]) == row


def test_answer_is_what_the_offsets_of_the_full_text_say() -> None:
    compared = set()
    for kind, name in ((kind, name) for kind in KINDS for name in DIRECT):
        tokenizer = KINDS[kind](name)
        prompt = template_ids(tokenizer, [USER])
        for answer in ("Paris.", "Yes, I am happy.", "日本 über 🙂"):
            full = rendered(tokenizer, [USER, said(answer)])
            end = full.rindex(answer) + len(answer)
            whole = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
            spans = zip(whole["input_ids"], whole["offset_mapping"], strict=True)
            inside = [token for token, (_, stop) in spans if stop <= end]
            if inside[: len(prompt)] == prompt:  # else a token straddles: the prompt's ids win
                assert encode(tokenizer, [USER], answer).ids == inside
                compared.add((kind, name))
    assert len(compared) == 2 * len(DIRECT) - 1  # this byte-level one splits Llama 3's newlines


def test_control_dropping_the_last_two_tokens_disagrees_on_most_templates() -> None:
    wrong = 0
    for name in NAMES:
        tokenizer = zoo.byte_tokenizer(name)
        ids = tokenizer(rendered(tokenizer, [USER, said("Paris.")]), add_special_tokens=False)
        naive = ids["input_ids"][len(template_ids(tokenizer, [USER])) : -2]
        row = encode(tokenizer, [USER], "Paris.")
        wrong += naive != row.ids[row.prompt_len :]
    assert wrong > len(NAMES) / 2


def test_no_prefix_space_is_invented() -> None:
    tokenizer = zoo.spaced_tokenizer("chatml")
    answer = encode(tokenizer, [USER], "Paris.")
    naive = tokenizer("Paris.", add_special_tokens=False)["input_ids"]
    assert answer.ids[answer.prompt_len :] != naive  # control: it begins with a space
    assert tokenizer.convert_ids_to_tokens(naive)[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(answer.ids[answer.prompt_len])[0].startswith("▁")
    row = encode(tokenizer, [USER], "\n\n\nParis.")  # its newlines would merge with the prompt's
    assert str(tokenizer.decode(row.ids)).endswith("assistant\n\n\n\nParis.")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_token_across_the_boundary_leaves_the_prompt_alone(kind: str) -> None:
    template = (
        "{{ 'Question: ' + messages[0]['content'] + '\\nAnswer: ' }}"
        "{% if messages | length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    )
    tokenizer = KINDS[kind](template)
    prompt, row = template_ids(tokenizer, [USER]), encode(tokenizer, [USER], "The quick fox")
    full = tokenizer(rendered(tokenizer, [USER, said("The quick fox")]), add_special_tokens=False)
    assert full["input_ids"][: len(prompt)] != prompt  # control: one text has other tokens there
    assert row.ids[: row.prompt_len] == prompt
    assert tokenizer.decode(row.ids).endswith("Answer: The quick fox")  # one space, not two
    assert decode(tokenizer, row.ids[row.prompt_len :]) == "The quick fox"


def test_a_thought_between_prompt_and_answer_is_not_followed() -> None:
    tokenizer = zoo.byte_tokenizer("qwen3")
    assert "<think>" in rendered(tokenizer, [USER, said("Paris.")])
    row = encode(tokenizer, [USER], "Paris.")
    assert str(tokenizer.decode(row.ids)).endswith("<|im_start|>assistant\nParis.")
    tokenizer = zoo.byte_tokenizer("reasoner")
    thought = "Hm, a city.\n</think>\n\nParis."  # the template would leave out the thought
    row = encode(tokenizer, [USER], thought)
    assert decode(tokenizer, row.ids[row.prompt_len :]) == thought
    strips = zoo.TEMPLATES["reasoner"].replace("split('</think>')[-1]", "strip()")
    assert encode(zoo.byte_tokenizer(strips), [USER], " a \n") == encode(tokenizer, [USER], "a")


def test_a_closer_that_merges_with_the_answer_is_cut_off() -> None:
    template = "{% for m in messages %}{{ m['content'] + '\\n\\n\\n' }}{% endfor %}"
    tokenizer = zoo.byte_tokenizer(template)
    row = encode(tokenizer, [USER], "Paris.\n")
    assert decode(tokenizer, row.ids[row.prompt_len :]) == "Paris.\n"
    full = tokenizer(rendered(tokenizer, [USER, said("Paris.\n")]), add_special_tokens=False)
    assert full["input_ids"][: len(row.ids)] != row.ids  # control: there its newlines are one token


def test_answer_ids_are_appended_as_they_are(tokenizer: Any) -> None:
    row = encode(tokenizer, HISTORY, [7, 8, 2])
    assert row == Encoded([*template_ids(tokenizer, HISTORY), 7, 8, 2], len(row.ids) - 3)
    assert encode(tokenizer, "Hi", [9], raw=True).ids[-1] == 9


# -- system ---------------------------------------------------------------------------------------


def test_system_is_a_message_or_joins_the_first_user_turn(tokenizer: Any) -> None:
    row = encode(tokenizer, HISTORY, "Paris.", system="Be honest.")
    fronted = [{"role": "system", "content": "Be honest."}, *HISTORY]
    merged = [{"role": "user", "content": "Be honest.\n\nAre you happy?"}, *HISTORY[1:]]
    takes = tokenizer.chat_template not in [zoo.TEMPLATES[n] for n in ("gemma", "mistral", "phi3")]
    assert row.ids[: row.prompt_len] == template_ids(tokenizer, fronted if takes else merged)
    assert "Be honest." in tokenizer.decode(row.ids)
    assert encode(tokenizer, HISTORY, system=" ").ids  # nothing to merge, nothing to refuse


def test_system_control_and_corner_cases() -> None:
    gemma = zoo.byte_tokenizer("gemma")
    with pytest.raises(ChatError, match=r"System role not supported.*system=\.\.\."):
        encode(gemma, [{"role": "system", "content": "Be honest."}])  # control: no user turn
    for name in ("gemma", "mistral", "phi3", "chatml"):
        other = zoo.byte_tokenizer(name)
        lead = [{"role": "system", "content": "Be honest."}, USER]
        assert encode(other, lead) == encode(other, [USER], system="Be honest.")
        spans = layout(other, lead).spans
        texts = [other.decode(layout(other, lead).ids[a:b]).strip() for a, b in spans]
        assert texts == ["Be honest.", USER["content"]]
    phi3 = zoo.byte_tokenizer("phi3")  # drops it silently, even where the user says the same
    assert encode(phi3, "Hi there", system="Hi").ids == encode(phi3, "Hi\n\nHi there").ids
    chatml = zoo.byte_tokenizer("chatml")
    own = [{"role": "system", "content": "B"}, USER]
    both = encode(chatml, own, system="A")
    assert both == encode(chatml, [USER], system="A\n\nB")
    assert own[0]["content"] == "B"  # the given conversation is not changed


# -- without a template ---------------------------------------------------------------------------


def test_plain_conversations(bare: Any) -> None:
    row = encode(bare, HISTORY, " Paris.\n", system="Be honest.")
    prompt = (
        "Be honest.\n\nQuestion: Are you happy?\nAnswer: Yes, I am happy.\n\n"
        "Question: What is the capital of France?\nAnswer:"
    )
    assert row.ids[: row.prompt_len] == bare(prompt)["input_ids"]  # with the tokenizer's BOS
    assert row.ids[: len(row.ids)] == bare(prompt + " Paris.")["input_ids"]
    assert decode(bare, row.ids) == prompt + " Paris."
    assert encode(bare, [*HISTORY, said("Paris.")]) == encode(bare, HISTORY, "Paris.")
    with pytest.raises(ChatError, match="system, user and assistant only"):
        encode(bare, [{"role": "tool", "content": "4"}])


@pytest.mark.parametrize("answer", ANSWERS)
def test_plain_answers_have_an_exact_span(bare: Any, answer: str) -> None:
    row = encode(bare, HISTORY, answer)
    assert row.ids[: row.prompt_len] == encode(bare, HISTORY).ids
    assert decode(bare, row.ids[row.prompt_len :]).strip() == answer.strip()


def test_plain_is_a_chat_template_like_any_other(bare: Any) -> None:
    as_template = KINDS["spaced" if "▁a" in bare.get_vocab() else "byte"](PLAIN)
    assert encode(bare, HISTORY, "a").ids == [
        bare.bos_token_id,
        *encode(as_template, HISTORY, "a").ids,
    ]


def test_a_lone_text_is_plain_text(bare: Any) -> None:
    assert encode(bare, "Once upon").ids == bare("Once upon")["input_ids"]
    assert encode(bare, "Once upon") == encode(bare, "Once upon", raw=True)
    assert encode(bare, "upon", system="Once").ids == bare("Once\n\nupon")["input_ids"]


def test_raw_text_ignores_the_template(tokenizer: Any) -> None:
    row = encode(tokenizer, "Once upon", " a time", raw=True)
    assert row.ids == tokenizer("Once upon a time")["input_ids"]
    assert row.ids[: row.prompt_len] == tokenizer("Once upon")["input_ids"]
    assert decode(tokenizer, row.ids) == "Once upon a time"
    split = encode(tokenizer, "Once upo", "n a time", raw=True)  # inside a word
    assert split.ids[: split.prompt_len] == tokenizer("Once upo")["input_ids"]
    assert decode(tokenizer, split.ids) == "Once upon a time"


def test_raw_text_is_not_closed_before_its_answer() -> None:
    from tokenizers import processors

    tokenizer = zoo.byte_tokenizer()
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    closing = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = closing
    assert tokenizer("Once upon")["input_ids"][-1] == tokenizer.eos_token_id  # control
    row = encode(tokenizer, "Once upon", " a time", raw=True)
    assert tokenizer.decode(row.ids) == "<s>Once upon a time"


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty string"),
        ([], {}, "at least one user turn"),
        ([said("alone")], {}, "at least one user turn"),
        (["Hi"], {}, "message 0 is str 'Hi'"),
        ([USER, {"role": "user"}], {}, "message 1 is dict"),
        ([{"role": "user", "content": ["part"]}], {}, "both text"),
        (7, {}, "got int 7"),
        ({"role": "user"}, {}, "got dict"),
        ([USER], {"raw": True}, "raw=True takes plain text, got list"),
        ("Hi", {"raw": True, "system": "A"}, "no system turn"),
        ("Hi", {"system": 3}, "system is text, got int 3"),
        ("Hi", {"answer": 3}, "got int 3"),
        ("Hi", {"answer": ["a"]}, "list of token ids"),
        ("Hi", {"answer": [-1]}, "list of token ids"),
    ],
)
def test_errors_say_what_was_given(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        encode(zoo.byte_tokenizer("chatml"), prompt, **options)


def test_errors_of_tokenizers() -> None:
    for call in (lambda: encode(None, "Hi"), lambda: decode(None, [1])):
        with pytest.raises(ChatError, match="no tokenizer"):
            call()
    with pytest.raises(ChatError, match="is a str"):
        encode("gpt2", "Hi")  # type: ignore[arg-type]
    bare = zoo.byte_tokenizer()
    with pytest.raises(ChatError, match="empty string"):
        encode(bare, "")
    assert encode(bare, "", raw=True).ids == [bare.bos_token_id]
    bare.backend_tokenizer.post_processor = None
    bare.bos_token = None
    with pytest.raises(ChatError, match="'' gives no tokens"):
        encode(bare, "", raw=True)
    with pytest.raises(ChatError, match="no text of"):
        encode(zoo.byte_tokenizer("{{ '' }}"), "Hi")
    with pytest.raises(ChatError, match=r"\['user', 'user'\].*must alternate"):
        encode(zoo.byte_tokenizer("mistral"), [USER, USER])
    with pytest.raises(ChatError, match="refuses"):
        encode(zoo.byte_tokenizer("{{ messages[0].nothing.at_all }}"), "Hi")


# -- batches --------------------------------------------------------------------------------------


def test_left_padding_keeps_every_row() -> None:
    tokenizer = zoo.byte_tokenizer("chatml")
    rows = [encode(tokenizer, "Hi", "Paris."), encode(tokenizer, HISTORY, "Yes."), Encoded([5], 1)]
    batch = pad(rows, pad_id(tokenizer))
    assert batch.ids.dtype == batch.mask.dtype == batch.prompt_len.dtype == torch.long
    assert batch.lengths.tolist() == [len(row.ids) for row in rows]
    assert batch.prompt_len.tolist() == [row.prompt_len for row in rows]
    for i, row in enumerate(rows):
        assert batch.ids[i][batch.mask[i].bool()].tolist() == row.ids
        assert batch.ids[i, -len(row.ids) :].tolist() == row.ids
    assert batch.ids[0, : len(rows[0].ids)].tolist() != rows[0].ids  # control: count from the left
    assert (batch.ids[batch.mask == 0] == tokenizer.pad_token_id).all()
    right = pad(rows, 0, side="right")
    assert right.ids[0, : len(rows[0].ids)].tolist() == rows[0].ids
    assert right.mask[2].tolist() == [1] + [0] * (right.ids.shape[1] - 1)


def test_rows_of_a_batch() -> None:
    batch = pad([Encoded([1, 2, 3], 2), Encoded([4], 1), Encoded([5, 6], 0)], 0)
    assert len(batch) == 3 and [len(row) for row in batch] == [1, 1, 1]  # type: ignore[attr-defined]
    assert batch[-1].ids.tolist() == [[0, 5, 6]] and batch[-1].prompt_len.tolist() == [0]
    assert batch[:2].ids.tolist() == batch.rows([0, 1]).ids.tolist()
    assert batch.rows([2, 0, 2]).lengths.tolist() == [2, 3, 2]
    with pytest.raises(IndexError):
        batch[3]
    assert batch.to("cpu").prompt_len.tolist() == [2, 1, 0]


def test_batch_fills_in_what_is_missing() -> None:
    ids = torch.arange(6).view(2, 3)
    assert Batch(ids).mask.tolist() == [[1, 1, 1]] * 2
    assert Batch(ids, None, None).prompt_len.tolist() == [3, 3]
    half = Batch(ids.int(), torch.tensor([[False, True, True], [True, True, True]]))
    assert half.prompt_len.tolist() == [2, 3] and half.ids.dtype == torch.long
    with pytest.raises(AttributeError):
        half.ids = ids  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((torch.arange(3),), r"ids has shape \[3\]: it should be \[B, T\]"),
        (([[1]],), "ids is a tensor"),
        ((torch.zeros(2, 3),), "whole numbers"),
        ((torch.ones(2, 3).long(), torch.ones(2, 4).long()), r"\[2, 4\].*\[2, 3\]"),
        ((torch.ones(2, 3).long(), None, torch.tensor([1])), "1 rows, ids have 2"),
        ((torch.ones(1, 3).long(), None, torch.tensor([4])), r"\[4\] does not lie within"),
        ((torch.ones(1, 3).long(), None, torch.tensor([-1])), "does not lie within"),
    ],
)
def test_batch_refuses_shapes_that_disagree(fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ChatError, match=message):
        Batch(*fields)


def test_pad_and_decode_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ChatError, match="no rows"):
        pad([], 0)
    with pytest.raises(ChatError, match="'top'"):
        pad([Encoded([1], 1)], 0, side="top")  # type: ignore[arg-type]
    with pytest.raises(ChatError, match="one row of token ids"):
        decode(zoo.byte_tokenizer(), torch.ones(2, 2).long())


def test_pad_id_and_decode() -> None:
    tokenizer = zoo.byte_tokenizer()
    assert pad_id(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id == 2
    assert pad_id(None) == 0
    text = " I 'm here , you 've said ! "
    ids = tokenizer(text)["input_ids"]
    assert decode(tokenizer, ids) == text == decode(tokenizer, torch.tensor(ids))
    tokenizer.clean_up_tokenization_spaces = True
    assert decode(tokenizer, ids) == text


# -- the zoo and the file -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_zoo_is_small_and_quick(kind: str) -> None:
    start = time.perf_counter()
    tokenizer = KINDS[kind]("chatml")
    assert time.perf_counter() - start < 2
    assert len(tokenizer) <= 512 and max(tokenizer.get_vocab().values()) < 512
    assert None not in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(chat).failed == 0
