"""Folders of solved prompts, preference pairs and seed prompts: files that survive a kill.

The kill is a real one: a process that is stopped with SIGKILL in the middle of its work.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import model_zoo
import tokenizers_zoo as zoo
import trimtab as tt
from trimtab import selfcontrol
from trimtab.errors import ArtifactError, ChatError
from trimtab.selfcontrol import Judge

JUDGE = Judge("Happy?")
OPTIONS = dict(
    steps=2, search=2, step_size=4.0, max_new_tokens=5, max_perplexity_ratio=1e9, max_repetition=1.0
)
PROMPTS = ["Hello there", "Hi", "What is this?", "Who are you?", "A ship", "the dog", "so", "it"]


def tiny():
    return tt.LM(model_zoo.tiny("llama"), zoo.byte_tokenizer("chatml"))


def run(out, prompts=PROMPTS, **options):
    return selfcontrol.targets(
        tiny(), prompts, JUDGE, out, chunk=3, show_progress=False, **(OPTIONS | options)
    )


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_holds_every_record_and_the_kept_edits(tmp_path):
    kept = run(tmp_path / "out")
    records = selfcontrol.read_records(tmp_path / "out")
    assert [r["prompt"] for r in records] == PROMPTS
    risen = [r for r in records if r["score"] > r["first_score"] and r["size"] <= 0.5]
    assert [t.prompt for t in kept] == [r["prompt"] for r in risen] and kept
    lm = tiny()
    for target in kept:
        ids = lm.generate_ids(lm.batch(target.prompt), target.edit, 5)[0]
        assert lm.tokenizer.decode(ids, skip_special_tokens=True) == target.answer
    none = run(tmp_path / "small", max_norm=1e-9)
    assert none == [] and len(selfcontrol.read_records(tmp_path / "small")) == len(PROMPTS)


def test_a_line_cut_short_is_made_again_and_another_job_is_refused(tmp_path):
    out = tmp_path / "out"
    run(out)
    whole, records = files(out), out / "records.jsonl"
    text = records.read_bytes()
    for cut in (len(text) - 1, len(text) // 2):
        os.truncate(records, cut)
        assert len(selfcontrol.read_records(out)) < len(PROMPTS)
        run(out)
        assert files(out) == whole
    for change in ({"steps": 1}, {"prompts": PROMPTS[:-1]}):
        with pytest.raises(ArtifactError, match="the beginning of another job"):
            run(out, **change)
    assert files(out) == whole


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    tt.Add("resid@0", torch.ones(1, 8)).save(tmp_path / "edit")
    before = files(tmp_path / "edit")
    with pytest.raises(ArtifactError, match=r"holds artifact.json, tensors.* no records.jsonl"):
        run(tmp_path / "edit")
    assert files(tmp_path / "edit") == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".gitkeep").touch()  # control: an empty folder is anyone's
    assert run(tmp_path / "new")


def test_a_failed_call_blocks_no_corrected_one(tmp_path):
    with pytest.raises(tt.PlaceError):
        run(tmp_path / "out", place="resid@99 prompt")
    run(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"options\.max_new_tokens: 5 there, 6 now"):
        run(tmp_path / "out", max_new_tokens=6)


def test_prompts_are_texts_conversations_and_examples(tmp_path):
    turn = [{"role": "user", "content": PROMPTS[0]}]
    wanted = run(tmp_path / "plain", [PROMPTS[0], turn])
    mixed = [tt.Example(PROMPTS[0], "not read"), tuple(turn)]
    kept = run(tmp_path / "mixed", mixed)
    assert [t.answer for t in kept] == [t.answer for t in wanted] and kept
    assert kept[0].prompt == turn
    assert [t.answer for t in run(tmp_path / "one", PROMPTS[0])] == [wanted[0].answer]
    lm = tiny()
    one, other = (
        selfcontrol.pairs(lm, given, JUDGE, out=tmp_path / "pairs.jsonl", **OPTIONS)
        for given in ([turn], mixed[:1])
    )
    assert one == other and one


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import test_selfcontrol_targets as here
from trimtab.selfcontrol import files
slow = files._record
def paced(solution):
    import time
    time.sleep(0.2)
    return slow(solution)
files._record = paced
here.run({out!r})
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_files(tmp_path):
    run(tmp_path / "whole")
    out = tmp_path / "out"
    code = CHILD.format(tests=str(Path(__file__).parent), out=str(out))
    for wanted in (2, 5):
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ""})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            done = out / "records.jsonl"
            if done.exists() and done.read_bytes().count(b"\n") > wanted:
                break
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL  # it was in the middle
    before = selfcontrol.read_records(out)
    assert 5 <= len(before) < len(PROMPTS)
    run(out)
    assert selfcontrol.read_records(out)[: len(before)] == before
    assert files(out) == files(tmp_path / "whole")


def test_pairs_lean_both_ways(tmp_path):
    lm, out = tiny(), tmp_path / "pairs.jsonl"
    made = selfcontrol.pairs(lm, PROMPTS[:4], JUDGE, out=out, chunk=2, **OPTIONS)
    assert [json.loads(line) for line in out.read_text().splitlines()] == made
    assert made and list(tmp_path.iterdir()) == [out]
    for pair in made:
        assert set(pair) == {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}
        assert pair["chosen_score"] > pair["rejected_score"]
        assert pair["chosen"] != pair["rejected"]
        away = selfcontrol.solve(lm, pair["prompt"], JUDGE.away(), **OPTIONS)
        score = float(JUDGE.score(lm, [pair["prompt"]], [list(away.answer_ids)])[0])
        assert pair["rejected_score"] == pytest.approx(score, abs=1e-4)
    few = selfcontrol.pairs(lm, PROMPTS[:4], JUDGE, min_margin=1.0, **OPTIONS)
    assert few == []


def test_prompts_are_read_from_texts_and_objects(tmp_path):
    for name, text in (
        ("a.txt", "one\n\ntwo\n"),
        ("bom.txt", "\ufeffone\ntwo\n"),
        ("a.json", '["one", "two"]'),
        ("A.JSON", '\ufeff["one", "two"]'),
        ("a.csv", "label,prompt\r\n1,one\r\n0,two\r\n"),
        ("a.jsonl", '{"query": "one"}\n{"prompt": "two", "query": "no"}\n'),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert selfcontrol.read_prompts(tmp_path / name) == ["one", "two"]
    quoted = tmp_path / "quoted.csv"
    quoted.write_text('prompt,label\n"How, are\nyou?",1\n')
    assert selfcontrol.read_prompts(quoted) == ["How, are\nyou?"]
    for name, text in (
        ("b.json", '{"a": 1}'),
        ("b.jsonl", '{"a": 1}'),
        ("b.csv", "a\n1\n"),
        ("b.txt", "\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ArtifactError, match=r"no prompts|a prompt is a text"):
            selfcontrol.read_prompts(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot read prompts"):
        selfcontrol.read_prompts(tmp_path / "none.txt")
    (tmp_path / "c.csv").write_text('prompt\n"open')
    with pytest.raises(ArtifactError, match="cannot read prompts"):
        selfcontrol.read_prompts(tmp_path / "c.csv")


class Endpoint(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server does; keeps what it was asked."""

    asked = ()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked = (*self.asked, (self.path, self.headers["Authorization"], body))
        lines = ["Here are some messages:", '1. "I lost my keys today."', "- My dog is ill, help!"]
        lines += ["2) I lost my keys today!", "short", f"What now, number {len(self.asked)}?"]
        message = {"role": "assistant", "content": "\n".join(lines)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        told = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1,
                "total_tokens": 2}}  # fmt: skip
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_seed_prompts_come_from_an_endpoint():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        found = selfcontrol.seed_prompts(url, "bad luck", 3, model="m", api_key="k")
    finally:
        server.shutdown()
        server.server_close()
    assert found[:2] == ["I lost my keys today.", "My dog is ill, help!"]
    assert found[2].startswith("What now, number")
    path, key, body = Endpoint.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer k"
    assert body["model"] == "m" and "bad luck" in body["messages"][0]["content"]


def test_seed_prompts_come_from_a_model():
    lm = tiny()
    found = selfcontrol.seed_prompts(lm, "ships", 3, rounds=2, length=(1, 10000))
    assert found and len(found) <= 3
    assert found == selfcontrol.seed_prompts(lm, "ships", 3, rounds=2, length=(1, 10000))
    with pytest.raises(ChatError, match="no usable prompt about 'ships'"):
        selfcontrol.seed_prompts(lm, "ships", 3, rounds=1, length=(9999, 10000))


@pytest.mark.slow
def test_the_command_solves_a_file(tmp_path):
    from trimtab.cli.solve import solve

    app = typer.Typer()
    app.command()(solve)
    lm = tiny()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("Hello there\nHi\n")
    options = {"model": tmp_path / "model", "out": tmp_path / "out", "judge": "Happy are you?",
               "steps": 1, "search": 2, "max-new-tokens": 5}  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    for _ in range(2):  # the second time goes on where all is done
        result = CliRunner().invoke(app, [str(tmp_path / "prompts.txt"), *given])
        assert result.exit_code == 0, result.output
        assert "2 prompts" in result.output
    assert len(selfcontrol.read_records(tmp_path / "out")) == 2
    torch.set_num_threads(1)
