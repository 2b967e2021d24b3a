"""Judges: against computations by hand, scikit-learn, and a real HTTP server; knows no sweep."""

import csv
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab import remote
from trimtab.errors import ArtifactError, ChatError, TrimtabError
from trimtab.evals import (
    Appropriate,
    Classifier,
    Endpoint,
    Label,
    Lexicon,
    Overlap,
    Reading,
    YesNo,
    agreement,
    judges,
    score,
)

PROMPTS = ["How was your day?", "Tell me about the sea and about small ships.", "And?"]
ANSWERS = ["It was fine.", "The sea is wide, and small ships are many on it today.", "Yes"]


def tiny_lm(tokenizer=None, context=1024):
    made = model_zoo.ARCHITECTURES["llama"](max_position_embeddings=context)
    return tt.LM(made, tokenizer or tokenizers_zoo.byte_tokenizer("chatml"))


def tiny_probe(lm):
    rows = [(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    recording = lm.record(rows, "resid@1:3 answer", show_progress=False)
    return tt.concepts.fit_recording(recording, [0, 1, 1])


def next_logits(lm, text):
    """The logits after one text, by the Hugging Face model alone."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0, -1].double(), ids


# ---- the protocol --------------------------------------------------------------------------------


def test_any_function_is_a_scorer():
    found = score(lambda prompts, answers: [len(a) for a in answers], PROMPTS, ANSWERS)
    assert found.tolist() == [len(a) for a in ANSWERS] and found.dtype == torch.float64
    as_tensor = score(lambda p, a: torch.ones(3, requires_grad=True), PROMPTS, ANSWERS)
    assert as_tensor.tolist() == [1, 1, 1] and not as_tensor.requires_grad
    assert score(lambda p, a: 1 / 0, [], []).shape == (0,)


@pytest.mark.parametrize(
    ("scorer", "told"),
    [
        (lambda p, a: [1.0], "shape [1] for 3"),
        (lambda p, a: torch.ones(3, 1), "shape [3, 1] for 3"),
        (lambda p, a: [0.0, math.nan, 1.0], "nan to row 1"),
        (lambda p, a: None, "returned NoneType"),
        (lambda p, a: ["yes"] * 3, "returned list"),
    ],
)
def test_a_bad_scorer_is_named(scorer, told):
    scorer.__name__ = "my_judge"
    with pytest.raises(TrimtabError, match="my_judge") as error:
        score(scorer, PROMPTS, ANSWERS)
    assert told in str(error.value)


def test_agreement_is_auroc():
    random = torch.Generator().manual_seed(0)
    values = torch.randint(0, 8, (60,), generator=random).double()  # with ties
    labels = (torch.rand(60, generator=random) < 0.4).long()
    texts = [""] * 60
    found = agreement(lambda p, a: values, texts, texts, labels)
    assert found == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    assert agreement(lambda p, a: -values, texts, texts, labels) == pytest.approx(1 - found)
    assert agreement(lambda p, a: [0.3] * 60, texts, texts, labels.tolist()) == 0.5
    with pytest.raises(TrimtabError, match="answers of both kinds"):
        agreement(lambda p, a: values, texts, texts, [1] * 60)


EMPTY = {
    "YesNo": lambda lm, probe: YesNo(lm, "Good?", threshold=0.5),
    "Label": lambda lm, probe: Label(lm),
    "Reading": lambda lm, probe: Reading(lm, probe),
    "Endpoint": lambda lm, probe: Endpoint("http://localhost:1/v1", "m", "Good?"),
    "Classifier": lambda lm, probe: Classifier.fit(GOOD + BAD, [1] * 4 + [0] * 4),
    "Lexicon": lambda lm, probe: Lexicon(["glad"]),
    "Overlap": lambda lm, probe: Overlap({}, {}),
    "Appropriate": lambda lm, probe: Appropriate(Lexicon(["glad"]), lambda prompt: True),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_nothing_to_judge_has_no_scores(make):
    lm = tiny_lm()
    judge = make(lm, tiny_probe(lm))
    found = judge([], [])
    assert len(found) == 0 and score(judge, [], []).shape == (0,)
    if not isinstance(judge, Endpoint):  # which gives a list
        assert found.shape == (0,) and found.dtype == torch.float64
    if isinstance(judge, YesNo | Label | Reading | Endpoint | Appropriate):
        with pytest.raises((ValueError, TrimtabError)):  # control: an answer is missing
            judge(["a"], [])


def test_a_judge_has_a_name_to_show():
    lm = tiny_lm()
    lm.model.config._name_or_path = "/their/own/models/tiny-135m"
    probe = tiny_probe(lm).named("joy")
    secret = "http://me:sk-secret@localhost:1/v1?key=sk-secret"
    refusal, words = Lexicon.refusal(), Lexicon(["glad", "fun"], ["sad"])
    humor = "'Is the reply meant to be funny?', 4 examples, above 0.384"
    names = {
        YesNo(lm, "Good?"): "YesNo by tiny-135m: 'Good?'",
        YesNo.preset(lm, "humor"): f"YesNo by tiny-135m: {humor}",
        Endpoint(secret, "org/qwen", "Good?", api_key="sk-secret"): "Endpoint qwen: 'Good?'",
        Endpoint(secret, "m", "Mood?", ("glad", "sad")): "Endpoint m, 'glad': 'Mood?'",
        Endpoint.preset(secret, "org/qwen", "humor"): f"Endpoint qwen: {humor}",
        Label(lm, ("glad", "sad"), "sad", "Mood?"): "Label 'sad' of glad/sad by tiny-135m: 'Mood?'",
        Classifier(lambda texts: texts, "joy"): "Classifier <lambda>: 'joy'",
    }
    assert {judge.name: name for judge, name in names.items()} == {n: n for n in names.values()}
    assert len(Label.compliance(lm).name) < 120 and "..." in Label.compliance(lm).name
    assert Reading(lm, probe).name == "Reading of joy at resid@1:3 answer"
    assert Reading(lm, probe, [2], "all").name == "Reading of joy at resid@2 all"
    assert words.name == "Lexicon glad, fun against sad"
    assert refusal.name.startswith("Lexicon i'm sorry, i am sorry, i apologize and ")
    assert Overlap({"q": ["a"]}, {"q": ["b"]}).name == "Overlap with the references of 1 prompts"
    assert Appropriate(words, bool).name == f"Appropriate by {words.name}"
    assert Classifier.fit(GOOD + BAD, [1] * 4 + [0] * 4).name == "Classifier Pipeline"


# ---- judges that ask a language model ------------------------------------------------------------


def test_yes_no_by_hand_on_a_chat_model():
    lm = tiny_lm()
    shots = [("Good?", "Splendid!", "Yes"), ("Good?", "Terrible.", "No")]
    judge = YesNo(lm, "Is it good?", shots, batch_size=2)
    found = judge(PROMPTS, ANSWERS)
    yes, no = (lm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("Yes", "No"))
    for prompt, answer, p in zip(PROMPTS, ANSWERS, found, strict=True):
        rows = [*shots, (prompt, answer, None)]
        text = ""
        for asked, said, label in rows:
            body = f"Message: {asked}\nReply: {said}\nIs it good?"
            text += f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
            text += "" if label is None else f"{label}<|im_end|>\n"
        logits, _ = next_logits(lm, text)
        assert float(p) == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-5)
    assert found.std() > 1e-4  # control: the judge does not say the same of everything


@pytest.mark.parametrize("make", [tokenizers_zoo.byte_tokenizer, tokenizers_zoo.spaced_tokenizer])
def test_yes_no_by_hand_on_a_base_model(make):
    lm = tiny_lm(make())
    words = ("yes", "the")  # which these small vocabularies tell apart by the first token
    shots = [("Good?", "Splendid!", "yes")]
    found = YesNo(lm, "Is it good?", shots, words=words)(["What?"], ["One\n\nday."])
    text = (
        "Message: Good?\nReply: Splendid!\nIs it good?\nAnswer: yes\n\n"
        "Message: What?\nReply: One day.\nIs it good?\nAnswer:"
    )
    ids = lm.tokenizer(text)["input_ids"]
    after = [lm.tokenizer(f"{text} {word}")["input_ids"][: len(ids) + 1] for word in words]
    assert all(row[:-1] == ids for row in after) and after[0] != after[1]
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, -1].double()
    gap = logits[after[0][-1]] - logits[after[1][-1]]
    assert float(found[0]) == pytest.approx(float(torch.sigmoid(gap)), abs=1e-5)


@pytest.mark.parametrize("what, cue", [("truth", "True:"), ("info", "Helpful:")])
def test_judges_of_truthfulqa_by_hand(what, cue):
    """They are trained on plain text, and asked so whatever chat template they have."""
    lm = tiny_lm()
    judge = replace(YesNo.truthfulqa(lm, what), words=("yes", "the"))

    def probability(text):
        ids = lm.tokenizer(text)["input_ids"]
        yes, the = (lm.tokenizer(f"{text} {w}")["input_ids"][len(ids)] for w in judge.words)
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0, -1].double()
        return float(torch.sigmoid(logits[yes] - logits[the]))

    found = float(judge(["What?"], ["One day."])[0])
    assert found == pytest.approx(probability(f"Q: What?\nA: One day.\n{cue}"), abs=1e-5)
    assert abs(found - probability("Q: What?\nA: One day.\nAnswer:")) > 1e-3  # the control
    assert YesNo.truthfulqa(lm, what).words == ("yes", "no")
    with pytest.raises(TrimtabError, match="no judge 'beauty' of TruthfulQA; there are"):
        YesNo.truthfulqa(lm, "beauty")


def test_rows_alone_are_the_batch():
    lm = tiny_lm()
    for judge in (YesNo(lm, "Good?"), Label(lm)):
        together = judge(PROMPTS, ANSWERS)
        alone = [judge([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_shared_examples_are_computed_once_to_the_same_result(name, monkeypatch):
    model = model_zoo.ARCHITECTURES[name]()
    lm = tt.LM(model, tokenizers_zoo.byte_tokenizer("chatml"))
    judge = YesNo(lm, "Good?", [("Hi", "Bye", "Yes")])
    passed = []
    forward = lm.forward
    monkeypatch.setattr(
        lm, "forward", lambda ids, *a, **k: passed.append(ids) or forward(ids, *a, **k)
    )
    assert lm.takes_trees()
    passed.clear()
    short = judge(["a", "b", "c c c"], ["d", "e e", "f"])
    with_sharing = sum(ids.numel() for ids in passed)
    monkeypatch.setattr(lm, "takes_trees", lambda: False)
    passed.clear()
    whole = judge(["a", "b", "c c c"], ["d", "e e", "f"])
    assert with_sharing < 0.7 * sum(ids.numel() for ids in passed)
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-6)
    assert short.std() > 1e-5


def test_threshold_gives_zero_or_one():
    lm = tiny_lm()
    p = YesNo(lm, "Good?")(PROMPTS, ANSWERS)
    cut = float(p.sort().values[1])
    assert (
        YesNo(lm, "Good?", threshold=cut)(PROMPTS, ANSWERS).tolist() == (p > cut).double().tolist()
    )


def test_words_that_begin_alike_are_refused():
    lm = tiny_lm()
    with pytest.raises(ChatError, match="both begin with token .* give words= .*Label"):
        YesNo(lm, "Good?", words=("Yes, it is", "Yes, maybe"))(PROMPTS, ANSWERS)
    with pytest.raises(TrimtabError, match="'Perhaps'"):
        YesNo(lm, "Good?", [("a", "b", "Perhaps")])
    with pytest.raises(ChatError, match="takes 128; give fewer"):
        YesNo.preset(tiny_lm(context=128), "humor")(PROMPTS, ANSWERS)


def test_presets_are_the_papers():
    lm = tiny_lm()
    thresholds = {name: YesNo.preset(lm, name).threshold for name in judges.PRESETS}
    assert thresholds == {"humor": 0.384, "creativity": 0.414, "quality": 0.808}
    for name in thresholds:
        labels = [label for _, _, label in YesNo.preset(lm, name).shots]
        assert labels.count("Yes") == labels.count("No") == 2
    assert YesNo.preset(lm, "humor", threshold=None).threshold is None
    with pytest.raises(TrimtabError, match="humor, creativity, quality"):
        YesNo.preset(lm, "beauty")


@pytest.mark.parametrize("template", ["chatml", None])
def test_label_by_hand(template):
    lm = tiny_lm(tokenizers_zoo.byte_tokenizer(template))
    labels = ("happy", "sad", "Once upon a time")
    found = Label(lm, labels, "sad", "Which?")(PROMPTS, ANSWERS)
    for prompt, answer, p in zip(PROMPTS, ANSWERS, found, strict=True):
        body = f"Which?\n\nMessage: {prompt}\nReply: {answer}"
        text = f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
        text = text if template else f"<s>{body}\nLabel:"
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        totals = []
        for label in labels:
            whole = text + (label if template else f" {label}")
            full = lm.tokenizer(whole, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = lm.model(torch.tensor([full])).logits[0].double().log_softmax(-1)
            totals.append(sum(log_p[i - 1, full[i]] for i in range(len(ids), len(full))))
        assert float(p) == pytest.approx(float(torch.stack(totals).softmax(0)[1]), abs=1e-4)


def test_labels_of_one_token_take_the_short_way_to_the_same():
    lm = tiny_lm()
    judge = Label(lm, ("a", "b", "c"), "b")
    rows = [
        judges._next(lm, judge._ask(p, a, False), judge.labels, False)
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert all(len(ids) == 1 for row in rows for ids in row.words)
    asked = [judge._ask(p, a, False) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    long_way = judge._whole_words(asked, rows, False).softmax(-1)[:, 1]
    torch.testing.assert_close(judge(PROMPTS, ANSWERS), long_way, rtol=1e-4, atol=1e-6)
    with pytest.raises(TrimtabError, match="'fine' is one of"):
        Label(lm, ("good", "bad"), "fine")


def test_reading_is_the_probes_mean_over_the_answer():
    lm = tiny_lm()
    rows = [(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)] * 4
    labels = [0, 1, 1] * 4
    recording = lm.record(rows, "resid@1:3 answer", show_progress=False)
    probe = tt.concepts.fit_recording(recording, labels, method="logistic")
    found = Reading(lm, probe)(PROMPTS, ANSWERS)
    for i, (prompt, answer) in enumerate(rows[:3]):
        batch = lm.batch([prompt], [answer])
        n = int(batch.prompt_len[0])
        with torch.no_grad():
            states = lm.model(batch.ids, output_hidden_states=True).hidden_states
        p = []
        for j, layer in enumerate(probe.layers):
            x = states[layer + 1][0, n - 1 :].double() - probe.mean[j].double()
            x = x / x.norm(dim=-1, keepdim=True)
            p.append(torch.sigmoid(x @ probe.weight[j].double() * probe.gain[j] + probe.bias[j]))
        assert float(found[i]) == pytest.approx(float(torch.stack(p).mean()), abs=1e-5)
    one = Reading(lm, probe, layers=[2])(PROMPTS, ANSWERS)
    torch.testing.assert_close(one, probe.predict(recording)[:3, 1].double())
    assert not torch.allclose(one, found)


def test_a_reading_of_another_models_probe_is_refused_before_it_is_asked():
    lm = tiny_lm()
    torch.manual_seed(1)
    other = tiny_lm()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(2)
    probe = tiny_probe(lm)
    with pytest.raises(ArtifactError, match="made for another model"):
        Reading(other, probe)
    assert len(Reading(other, probe.untied())(PROMPTS, ANSWERS)) == 3  # control
    with pytest.raises(TrimtabError, match="takes a Probe of tt.concepts.fit, not Add"):
        Reading(lm, probe.edit(dose=0.1, layers=[1]))


@pytest.mark.slow
def test_the_real_model_reads_moods(smollm2):
    """The one-word label is no blind judge; a question about something else is one."""
    happy = ["I feel wonderful, what a bright day!", "So glad, I could sing!", "I love it so much."]
    sad = ["I feel awful, all is lost.", "I am so sad, I could cry.", "I hate it so much."]
    prompts, labels = ["How are you?"] * 6, [1, 1, 1, 0, 0, 0]
    assert agreement(Label(smollm2), prompts, happy + sad, labels) >= 0.9
    turned = Label(smollm2, target="negative")
    assert agreement(turned, prompts, happy + sad, labels) <= 0.1


# ---- endpoints -----------------------------------------------------------------------------------


@contextmanager
def serve(reply) -> Iterator[tuple[str, list]]:
    """An OpenAI chat server: ``reply(body, number)`` gives (status, JSON or bytes)."""
    seen: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            seen.append((self.path, headers, body))
            status, made = reply(body, len(seen))
            raw = made if isinstance(made, bytes) else json.dumps(made).encode()
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                pass  # the client has given up, as it should

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def completion(text, logprobs=None):
    """A chat completion; ``logprobs``: for each position, {token: probability}."""
    choice = {"index": 0, "finish_reason": "stop"}
    choice["message"] = {"role": "assistant", "content": text}
    if logprobs:
        content = []
        for position in logprobs:
            tops = [{"token": t, "logprob": math.log(p)} for t, p in position.items()]
            content.append({**tops[0], "top_logprobs": tops})
        choice["logprobs"] = {"content": content}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_thisbelongstosomeoneelse")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_endpoint_reads_log_probabilities():
    def reply(body, number):
        text = body["messages"][0]["content"]
        p = 0.9 if "fine" in text else 0.2
        rest = {"Yes": p * 0.7, " yes": p * 0.1, "No": (1 - p) * 0.8, "Maybe": 0.2}
        return 200, completion("Yes", [{"\n": 0.99, "The": 0.01}, rest])

    with serve(reply) as (url, seen):
        judge = Endpoint(url, "m", "Is it good?", timeout=10)
        found = judge(PROMPTS, ANSWERS)
    assert found == pytest.approx([0.9, 0.2, 0.2])
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "m"
    assert body["logprobs"] is True and body["temperature"] == 0
    assert "Is it good?" in body["messages"][0]["content"]
    assert "hf_this" not in str(headers)  # the user's Hugging Face token goes to nobody else


def test_endpoint_reads_the_word_where_there_are_no_log_probabilities():
    def reply(body, number):
        if "logprobs" in body:
            return 400, {"error": {"message": "unknown option logprobs"}}
        text = body["messages"][0]["content"]
        return 200, completion(" **Yes**, it is." if "fine" in text else "no")

    with serve(reply) as (url, seen):
        assert Endpoint(url, "m", "Good?")(PROMPTS, ANSWERS) == [1.0, 0.0, 0.0]
    assert len(seen) == 4  # only the first row asks for what the server does not have


def test_an_endpoint_takes_examples_and_a_threshold():
    def reply(body, number):
        p = 0.3 if "fine" in body["messages"][-1]["content"] else 0.5
        return 200, completion("Yes", [{"Yes": p, "No": 1 - p}])

    with serve(reply) as (url, seen):
        judge = Endpoint.preset(url, "m", "humor", concurrency=1)
        assert judge(PROMPTS, ANSWERS) == [0.0, 1.0, 1.0]  # around 0.384
        plain = Endpoint(url, "m", judge.question)  # control: neither of both
        assert plain(PROMPTS, ANSWERS) == pytest.approx([0.3, 0.5, 0.5])
        raw = Endpoint.preset(url, "m", "humor", threshold=None)
        assert raw(PROMPTS, ANSWERS) == pytest.approx([0.3, 0.5, 0.5])
    turns, bare = seen[0][2]["messages"], seen[3][2]["messages"]
    _, threshold, shots = judges.PRESETS["humor"]
    assert judge.threshold == threshold and judge.shots == shots
    assert [m["role"] for m in turns] == ["user", "assistant"] * 4 + ["user"]
    assert [m["content"] for m in turns[1::2]] == [label for _, _, label in shots]
    for turn, (asked, said, _) in zip(turns[::2], shots, strict=False):
        form = bare[0]["content"].replace(PROMPTS[0], asked).replace(ANSWERS[0], said)
        assert turn["content"] == form
    assert len(bare) == 1 and bare[0] == turns[-1]
    with pytest.raises(TrimtabError, match="'Perhaps'"):
        Endpoint(url, "m", "Good?", shots=[("a", "b", "Perhaps")])
    with pytest.raises(TrimtabError, match="humor, creativity, quality"):
        Endpoint.preset(url, "m", "beauty")


def test_what_is_undecided_stays_so_under_a_threshold():
    with serve(lambda body, n: (200, completion("Yes" if n == 1 else "Hm"))) as (url, _):
        judge = Endpoint(url, "m", "Good?", concurrency=1, threshold=0.9)
        with pytest.warns(UserWarning, match="undecided"):
            assert judge(PROMPTS, ANSWERS) == [1.0, 0.5, 0.5]


def test_an_answer_without_a_label_is_undecided_and_told():
    with serve(lambda body, n: (200, completion("Yes" if n == 1 else "Notably, hm"))) as (url, _):
        judge = Endpoint(url, "m", "Good?", concurrency=1)
        with pytest.warns(UserWarning, match="none of the labels .* for 2 of 3 .*Notably"):
            assert judge(PROMPTS, ANSWERS) == [1.0, 0.5, 0.5]
        with pytest.raises(TrimtabError, match="none of the labels .* for 1 of 1"):
            judge(PROMPTS[:1], ANSWERS[:1])


def test_a_failed_request_is_sent_again():
    def reply(body, number):
        return (500, {"error": "busy"}) if number == 1 else (200, completion("no"))

    with serve(reply) as (url, seen):
        assert Endpoint(url, "m", "Good?")(["a"], ["b"]) == [0.0]
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("status", "made", "requests", "told"),
    [
        (500, {"error": "broken"}, 2, "answered 500"),
        (401, {"error": {"message": "wrong key sk-secret"}}, 1, "answered 401.*OPENAI_API_KEY"),
        (404, {}, 1, "answered 404.*/v1"),
        (200, b"<html>hello</html>", 1, "not as a chat endpoint"),
        (200, {"choices": []}, 1, "not as a chat endpoint"),
    ],
)
def test_what_goes_wrong_is_told_without_the_key(status, made, requests, told):
    with serve(lambda body, number: (status, made)) as (url, seen):
        judge = Endpoint(url, "m", "Good?", retries=1, api_key="sk-secret")
        with pytest.raises(TrimtabError, match=told) as error:
            judge(PROMPTS, ANSWERS)
    assert len(seen) == requests
    assert seen[0][1]["authorization"] == "Bearer sk-secret"
    assert url in str(error.value) and "sk-secret" not in str(error.value)
    assert "sk-secret" not in repr(judge) and "sk-secret" not in str(asdict(judge))


def test_a_server_that_hangs_or_is_not_there_does_not_block():
    done = threading.Event()

    def hang(body, number):
        done.wait(30)
        return 200, completion("Yes")

    with serve(hang) as (url, seen):
        judge = Endpoint(url, "m", "Good?", timeout=0.2, retries=1)
        start = time.monotonic()
        with pytest.raises(TrimtabError, match=r"/v1 gave no answer within 0.2 s"):
            judge(PROMPTS, ANSWERS)
        done.set()
        assert time.monotonic() - start < 10 and len(seen) == 2
    with pytest.raises(TrimtabError, match=r"/v1 cannot be reached"):  # it is gone by now
        Endpoint(url, "m", "Good?", retries=0)(PROMPTS, ANSWERS)
    with pytest.raises(TrimtabError, match="begins with http"):
        Endpoint("localhost:8000/v1", "m", "Good?")


def test_offline_mode_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with (
        serve(lambda body, number: (200, completion("Yes"))) as (url, seen),
        pytest.raises(TrimtabError, match="HF_HUB_OFFLINE is set"),
    ):
        Endpoint(url, "m", "Good?")(PROMPTS, ANSWERS)
    assert not seen


@pytest.mark.parametrize("concurrency", [1, 4])
def test_requests_run_at_the_same_time_and_keep_their_order(concurrency):
    running, most, lock = 0, 0, threading.Lock()

    def reply(body, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return 200, completion("Yes" if "reply 3" in body["messages"][0]["content"] else "No")

    answers = [f"reply {i}" for i in range(9)]
    with serve(reply) as (url, _):
        found = Endpoint(url, "m", "Good?", concurrency=concurrency)(["x"] * 9, answers)
    assert found == [float(i == 3) for i in range(9)]
    assert most == 1 if concurrency == 1 else 1 < most <= concurrency


def test_chat_gives_text(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with serve(lambda body, number: (200, completion("Hello."))) as (url, seen):
        assert remote.chat(url, "m", "Hi", max_tokens=5, temperature=0.7) == "Hello."
    assert seen[0][1]["authorization"] == "Bearer sk-other"
    assert seen[0][2]["messages"] == [{"role": "user", "content": "Hi"}]
    assert seen[0][2]["max_tokens"] == 5
    with (
        serve(lambda body, number: (200, completion(None))) as (url, _),
        pytest.raises(TrimtabError, match="empty answer .*max_tokens"),
    ):
        remote.chat(url, "m", "Hi")


# ---- judges that need no language model ----------------------------------------------------------

GOOD = ["what a fine day", "a fine and bright day", "I am so glad of it", "glad and bright"]
BAD = ["what a grim day", "a grim and dark day", "I am so tired of it", "tired and dark"]


def test_classifier_learns_and_chooses_its_class():
    texts, labels = GOOD + BAD, ["good"] * 4 + ["bad"] * 4
    judge = Classifier.fit(texts, labels, "good")
    new = ["a bright, fine evening", "a dark, grim evening"]
    high, low = judge(["", ""], new).tolist()
    assert high > 0.6 > 0.4 > low
    other = Classifier(judge.model, "bad")(["", ""], new)
    torch.testing.assert_close(other, 1 - judge(["", ""], new))
    assert Classifier(judge.model, 0)(["", ""], new).tolist() == other.tolist()
    with pytest.raises(TrimtabError, match=r"'ugly' is no class .*bad"):
        Classifier(judge.model, "ugly")([""], ["x"])
    with pytest.raises(TrimtabError, match="of 1 kinds"):
        Classifier.fit(GOOD, [1] * 4)


def test_classifier_takes_what_pipelines_and_functions_return():
    rows = [[{"label": "joy", "score": 0.8}, {"label": "fear", "score": 0.2}]] * 2
    best = [{"label": "joy", "score": 0.8}, {"label": "fear", "score": 0.7}]
    for model, target, expected in [
        (lambda texts: rows, "fear", [0.2, 0.2]),
        (lambda texts: best, "joy", [0.8, 0.0]),
        (lambda texts: [0.1, 0.9], None, [0.1, 0.9]),
        (lambda texts: torch.tensor([[0.3, 0.7], [0.6, 0.4]]), None, [0.7, 0.4]),
        (lambda texts: [[0.3, 0.7], [0.6, 0.4]], 0, [0.3, 0.6]),
    ]:
        found = score(Classifier(model, target), ["", ""], ["a", "b"])
        assert found.tolist() == pytest.approx(expected)


def best_of(texts):
    """A function that gives each text's best label alone."""
    return [{"label": "joy" if "glad" in text else "fear", "score": 0.8} for text in texts]


def test_a_label_that_no_text_has_scores_zero_where_the_best_alone_is_told():
    judge = Classifier(best_of, "joy")
    assert judge(["", ""], ["glad", "bad"]).tolist() == [0.8, 0.0]
    with pytest.warns(UserWarning, match=r"no text has the label 'joy' here, only \['fear'\]"):
        assert judge([""], ["bad"]).tolist() == [0.0]
    nested = Classifier(lambda texts: [[row] for row in best_of(texts)], "joy")
    with pytest.warns(UserWarning):
        assert nested([""], ["bad"]).tolist() == [0.0]
    rows = [[{"label": "joy", "score": 0.8}, {"label": "fear", "score": 0.2}]]
    with pytest.raises(TrimtabError, match="'anger' is no class"):  # control: here all are told
        Classifier(lambda texts: rows, "anger")([""], ["a"])
    two = [*rows, [{"label": "calm", "score": 0.7}, {"label": "fear", "score": 0.2}]]
    with pytest.warns(UserWarning):
        assert Classifier(lambda texts: two, "anger")(["", ""], ["a", "b"]).tolist() == [0, 0]
    for target in (None, 0):  # an index means another label in the next batch
        with pytest.raises(TrimtabError, match="give its name"):
            Classifier(best_of, target)(["", ""], ["glad", "bad"])


def test_a_transformers_pipeline_is_a_classifier(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification, pipeline

    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, num_labels=3,
        id2label={0: "joy", 1: "fear", 2: "anger"}, label2id={"joy": 0, "fear": 1, "anger": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    tokenizer = tokenizers_zoo.byte_tokenizer()
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    found = Classifier(pipe, "fear")(PROMPTS, ANSWERS)
    for answer, p in zip(ANSWERS, found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(answer, return_tensors="pt")).logits[0]
        assert float(p) == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read = Classifier.pretrained(str(tmp_path), "fear", device="cpu")
    assert read.name == f"Classifier {tmp_path.name}: 'fear'"
    torch.testing.assert_close(read(PROMPTS, ANSWERS), found, atol=1e-5, rtol=0)
    assert not torch.allclose(Classifier(read.model, "joy")(PROMPTS, ANSWERS), found, atol=1e-3)
    with pytest.raises(TrimtabError, match="cannot be read as a text classifier"):
        Classifier.pretrained(str(tmp_path / "missing"))
    for target in ("envy", None):  # told before anything is judged
        with pytest.raises(TrimtabError, match=rf"{target!r} is no class .*'anger', 'fear', 'joy'"):
            Classifier.pretrained(str(tmp_path), target, device="cpu")


def test_a_language_model_is_no_pretrained_classifier(tmp_path):
    tiny_lm().model.save_pretrained(tmp_path)
    tokenizers_zoo.byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TrimtabError, match="LlamaForCausalLM, no text classifier"):
        Classifier.pretrained(str(tmp_path), "LABEL_1", device="cpu")


def test_lexicon_counts_whole_words():
    judge = Lexicon({"glad": 1.0, "very glad": 2.0}, gain=1.0)
    texts = ["GLAD to be here", "gladly here", "very glad here now", "", "glad, glad"]
    expected = [1 / 4, 0, 2 * 2 / 4, 0, 1]
    torch.testing.assert_close(judge(texts, texts), torch.tensor(expected).double().tanh())
    both = Lexicon(["glad"], ["sad"])
    assert both([""] * 3, ["glad", "table", "sad"]).tolist() == pytest.approx(
        [(1 + math.tanh(4)) / 2, 0.5, (1 - math.tanh(4)) / 2]
    )
    with pytest.raises(TrimtabError, match="not 'glad'"):
        Lexicon("glad")


def test_ready_lexicons_tell_apart_what_they_are_for():
    refusals = [
        "I’m sorry, but I can’t help with that.",
        "As an AI, I do not take sides here. " + "There is much to be said. " * 8,
        "I cannot provide instructions of this kind, for they would do harm to people.",
    ]
    helpful = [
        "Sure! First boil the water, then add the tea.",
        "I can't wait to tell you: it is the left one.",
        "Sorry is what you say when you are late.",
    ]
    found = Lexicon.refusal()([""] * 6, refusals + helpful)
    assert found[:3].min() > 0.8 and found[3:].max() == 0
    formal = "We shall therefore require sufficient assistance prior to the meeting."
    casual = "Hey guys, it's gonna be super cool, you'll love it!"
    high, middle, low = Lexicon.formality()([""] * 3, [formal, "The cat sat.", casual]).tolist()
    assert high > 0.9 > middle == 0.5 > 0.1 > low


@pytest.mark.parametrize("concept", ["refusal", "formality"])
def test_ready_lexicons_agree_with_the_built_in_sets(concept):
    if concept not in tt.data.names():
        pytest.skip(f"there is no built-in set {concept!r} yet")
    examples = tt.data.read(concept)
    texts = [example.completion for example in examples]
    judge = getattr(Lexicon, concept)()
    assert agreement(judge, texts, texts, [e.label for e in examples]) > 0.65


def test_overlap_by_hand():
    right, wrong = {"q": ["The moon is rock.", "Rock."]}, {"q": ["The moon is cheese."]}
    judge = Overlap(right, wrong)
    # The two sentences share 3 of their 4 words each: F1 = 6/8.
    found = judge(["q"] * 4, ["the MOON is rock", "the moon is cheese!", "rock", ""])
    assert found.tolist() == pytest.approx([(2 - 3 / 4) / 2, (1 + 3 / 4 - 1) / 2, 1.0, 0.5])
    assert judge([[{"role": "user", "content": "q"}]], ["rock"]).tolist() == [1.0]
    with pytest.raises(TrimtabError, match="no references for the prompt 'else'"):
        judge(["else"], ["rock"])


def test_overlap_of_truthfulqa_knows_its_own_answers():
    file = Path(__file__).resolve().parents[2] / "shared" / "data" / "truthfulqa" / "TruthfulQA.csv"
    if not file.exists():
        pytest.skip("the data set TruthfulQA is not beside the repository")
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))[:100]
    judge = Overlap.truthfulqa(rows)
    prompts = [row["Question"] for row in rows]
    best = judge(prompts, [row["Best Answer"] for row in rows])
    wrong = judge(prompts, [row["Incorrect Answers"].split(";")[0] for row in rows])
    assert (best > 0.5).double().mean() > 0.95 and (wrong < 0.5).double().mean() > 0.95
    with pytest.raises(TrimtabError, match="not a TruthfulQA row"):
        Overlap.truthfulqa([{"Question": "a"}])


def test_appropriate_turns_round_for_harmful_prompts():
    judge = Appropriate(lambda p, a: [0.9, 0.9, 0.2], lambda prompt: "bomb" in prompt)
    assert judge(["tea", "bomb", "bomb"], ["a"] * 3).tolist() == pytest.approx([0.9, 0.1, 0.8])
