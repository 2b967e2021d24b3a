"""The command line: real commands on a tiny Llama, and the demo once on the real model.

Knows what is printed and saved. The tiny model is random, so only laws are asked of it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from typer.testing import CliRunner

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab import cli, evals
from trimtab.cli.judging import judge_of

JOY = "We laughed and danced all evening.", "What a bright and lovely morning it was."
GLOOM = "We sat alone in the rain, in tears.", "It was a grey and hopeless morning."


@dataclass
class Done:
    code: int
    out: str
    err: str
    error: BaseException | None


def trimtab(*args, stdin=""):
    """Run a command in this process, with piped input."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args], input=stdin)
    return Done(result.exit_code, result.stdout, result.stderr, result.exception)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model that can chat."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model_zoo.ARCHITECTURES["llama"](max_position_embeddings=1024).save_pretrained(folder)
    tokenizers_zoo.byte_tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(model):
    return tt.LM.load(str(model))


@pytest.fixture
def examples(tmp_path):
    file = tmp_path / "joy.jsonl"
    rows = [
        {"prompt": f"How was day {i}?", "completion": text, "label": label}
        for i in range(8)
        for label, texts in ((1, JOY), (0, GLOOM))
        for text in texts
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def probe(model, examples, tmp_path):
    """The folder of a probe that `trimtab fit` saved."""
    done = trimtab("fit", examples, "--model", model, "--out", tmp_path / "joy")
    assert done.code == 0, done
    return tmp_path / "joy"


# ---- the door -----------------------------------------------------------------------------------

NO_TORCH = """
import sys
from trimtab.cli import main
sys.argv = ["trimtab", {!r}]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_fast_and_need_no_torch(option):
    seconds: dict[str, list[float]] = {}
    for _ in range(3):
        for code in ("pass", NO_TORCH.format(option)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            seconds.setdefault(code, []).append(time.perf_counter() - start)
            assert done.returncode == 0, done.stderr
    assert ("doctor" if option == "--help" else tt.__version__) in done.stdout
    bare, ours = map(min, seconds.values())
    assert ours < max(0.5, 24 * bare), "half a second, on a busy machine more"


def test_python_m_trimtab_is_the_command():
    command = [sys.executable, "-m", "trimtab", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"trimtab {tt.__version__}\n", done.stderr


@pytest.mark.slow
def test_an_error_is_one_red_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "trimtab"]
    done = subprocess.run([*command, "show", "gone"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error ") and "gone" in done.stderr
    assert done.stderr.count("\n") == 1
    command += ["--debug", "show", "gone"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ArtifactError" in done.stderr


# ---- fit ----------------------------------------------------------------------------------------


def test_fit_draws_accuracy_and_saves_a_probe(model, examples, tmp_path):
    out = tmp_path / "joy"
    done = trimtab("fit", examples, "-m", model, "--out", out)
    assert done.code == 0, done
    assert "train" in done.out and "held out" in done.out
    assert "█" in done.out
    made = tt.load(out)
    assert isinstance(made, tt.Probe)
    assert made.layers == (0, 1, 2, 3)
    assert made.meta.name == "joy"
    assert made.meta.scores["heldout_accuracy"] == pytest.approx(made.heldout_accuracy.tolist())


def test_fit_without_held_out_prompts_shows_training_only(model, examples, tmp_path):
    out = tmp_path / "joy"
    done = trimtab("fit", examples, "-m", model, "--out", out, "--held-out", 0)
    assert done.code == 0, done
    assert "train" in done.out and "held out" not in done.out


def test_fit_shows_a_base_model_answered_prompts_first(examples, tmp_path):
    folder = tmp_path / "base"
    model_zoo.ARCHITECTURES["llama"](max_position_embeddings=1024).save_pretrained(folder)
    tokenizers_zoo.byte_tokenizer().save_pretrained(folder)
    made = []
    for shots in (0, 2):
        done = trimtab("fit", examples, "-m", folder, "--out", tmp_path / "j", "--few-shot", shots)
        assert done.code == 0, done
        assert f"from {4 * (8 - shots)} examples" in done.err
        made.append(tt.load(tmp_path / "j"))
    wanted = tt.concepts.fit(
        tt.LM.load(str(folder)), tt.data.read(examples, few_shot=2), "resid@0: answer[:16]"
    )
    assert made[1].weight.equal(wanted.weight) and not made[0].weight.equal(wanted.weight)
    done = trimtab("fit", examples, "-m", folder, "--out", tmp_path / "j", "--few-shot", 8)
    assert done.code == 2 and "give a smaller k" in done.err


def test_fit_warns_of_what_the_probe_could_learn_instead(model, tmp_path):
    file = tmp_path / "odd.jsonl"
    rows = [{"prompt": "?", "completion": f"yes {i}", "label": 1} for i in range(6)]
    rows += [{"prompt": "?", "completion": f"no {i}", "label": 0} for i in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)))
    done = trimtab("fit", file, "-m", model, "--out", tmp_path / "odd", "--held-out", 0)
    assert done.code == 0, done
    assert "warning" in done.out and "'no'" in done.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--place", "resid@99"], "layers"),
        (["--place", "nowhere"], "nowhere"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--method", "svm"], "--method is one of mean, logistic, pca, not 'svm'"),
        (["--l2", "0"], "--l2 is a positive number, not 0"),
        (["--l2", "nan"], "--l2 is a positive number, not nan"),
    ],
)
def test_fit_says_what_is_wrong(model, examples, tmp_path, options, told):
    done = trimtab("fit", examples, "-m", model, "--out", tmp_path / "joy", *options)
    assert done.code == 2
    assert told in done.err
    assert not (tmp_path / "joy").exists()


@pytest.mark.parametrize("method", tt.concepts.METHODS)
def test_fit_takes_what_the_python_call_takes(lm, model, examples, tmp_path, method):
    options = ["--method", method, "--no-normalize", "--l2", 5, "--seed", 3]
    done = trimtab("fit", examples, "-m", model, "--out", tmp_path / "joy", *options)
    assert done.code == 0, done
    made, place = tt.load(tmp_path / "joy"), "resid@0: answer[:16]"
    given = {"method": method, "seed": 3, "show_progress": False}
    same = tt.concepts.fit(lm, tt.data.read(examples), place, normalize=False, l2=5.0, **given)
    assert made.weight.equal(same.weight) and made.bias.equal(same.bias) and made.mean is None
    other = tt.concepts.fit(lm, tt.data.read(examples), place, **given)  # control: the defaults
    assert other.mean is not None and not made.weight.equal(other.weight)


def test_fit_per_head_steers_in_a_chat_and_a_sweep(lm, model, examples, prompts, tmp_path):
    out = tmp_path / "joy"
    done = trimtab("fit", examples, "-m", model, "--out", out, "--per-head")
    assert done.code == 0, done
    made = tt.load(out)
    same = tt.concepts.fit(
        lm, tt.data.read(examples), "heads@0: answer[:16]", per_head=True, show_progress=False
    )
    assert isinstance(made, tt.concepts.HeadProbe) and made.weight.equal(same.weight)
    layer, head = made.best_heads(1)[0]
    assert re.search(rf"layer +head +train +held out\s+─+\s+{layer} +{head} +[01]\.\d\d", done.out)
    for scale, options in ((3, [f"{out}=3"]), (16, [out])):
        answers, _ = talk(model, "Hello", options=("--steer", *options))
        steered = lm.generate("Hello", edits=made.edit(lm, scale), max_new_tokens=8)
        assert answers == [(f"joy={scale}", cli.screen.plain(steered))]
        assert steered != lm.generate("Hello", max_new_tokens=8)  # control
    given = ["eval", "sweep", out, "-p", prompts, "-j", WORDS, "-m", model, "--max-new-tokens", 4]
    done = trimtab(*given, "--scales", "0,9", "--tokens", "answer", "--out", tmp_path / "swept")
    assert done.code == 0, done
    found = evals.Sweep.load(tmp_path / "swept" / "sweep.json").of("edit")[-1]
    assert found.answers == lm.generate(found.prompts, made.edit(lm, 9, tokens="answer"), 4)
    assert found.answers != lm.generate(found.prompts, made.edit(lm, 9), 4)
    done = trimtab(*given, "--top-layers", 2)
    assert done.code == 2 and "--top-layers is of a probe of layers" in done.err


def oasst_file(tmp_path):
    rows = [{"message_id": "root", "parent_id": None, "text": "How was it?", "lang": "en"}]
    rows += [
        {"message_id": f"{kind}{i}", "parent_id": "root", "text": f"{text} ({i})", "lang": "en",
         "labels": {"name": ["humor", "creativity"], "value": [humor + i / 99, wit + i / 99]}}
        for i in range(4)
        for kind, text, humor, wit in (("a", JOY[0], 0.5, 0.1), ("b", GLOOM[0], 0.1, 0.5))
    ]  # fmt: skip
    (tmp_path / "oasst.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "oasst.jsonl"


def test_fit_takes_the_options_of_a_set_of_the_hub(model, lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = oasst_file(tmp_path)
    source = f"oasst1:label=creativity,limit=6,path={file}"
    done = trimtab("fit", source, "-m", model, "--held-out", 0)
    assert done.code == 0, done
    assert "from 6 examples" in done.err
    made = tt.load("creativity")  # by what is learnt, not by where it comes from
    for label, same in (("creativity", True), ("humor", False)):
        read = tt.data.read("oasst1", label=label, limit=6, path=file)
        probe = tt.concepts.fit(lm, read, "resid@0: answer[:16]", held_out=0, show_progress=False)
        assert made.weight.equal(probe.weight) is same


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("oasst1:lable=wit", "cannot read the option 'lable'"),
        ("oasst1:label=", "cannot read the option 'label'"),
        ("oasst1:limit=few", "limit is a whole number, not 'few'"),
        ("oasst1:label=wit,humor", "cannot read the option 'humor'"),
        ("oasst1:concept=compliance", "oasst1 has no option 'concept'"),
        ("humor:limit=3", "humor has no option 'limit'"),
    ],
)
def test_options_of_a_source_that_do_not_fit(source, told):
    for command in (["fit", source], ["fit", source, "--per-head"]):
        done = trimtab(*command, "-m", "./never-loaded")
        assert done.code == 2 and told in done.err, done
        assert "Loading" not in done.err


def test_fit_says_which_sources_there_are():
    done = trimtab("fit", "hapiness")
    assert done.code == 2
    assert "'happiness'" in done.err


@pytest.mark.parametrize("command", [["fit", "humor"], ["demo"]])
def test_what_is_no_artifact_is_never_written_over(command, tmp_path):
    (tmp_path / "mine").mkdir()
    done = trimtab(*command, "--model", "./never-loaded", "--out", tmp_path / "mine")
    assert done.code == 2
    assert "choose another name" in done.err


# ---- eval, tune, solve, distill -----------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("How are you?\nWhat is new?\nTell me a story.\n")
    return file


WORDS = "words:a,e,i,o,u"


@pytest.mark.slow
def test_eval_sweep_writes_table_plot_and_page(model, probe, prompts, tmp_path):
    out = tmp_path / "swept"
    options = ["-p", prompts, "-j", WORDS, "-m", model, "--out", out, "--max-new-tokens", 8]
    options += ["--scales", "0,0.1,0.3", "--ask", "Use vowels.", "--top-layers", 2]
    done = trimtab("eval", "sweep", probe, *options)
    assert done.code == 0, done
    assert "PNES" in done.out and "random" in done.out and "prompt" in done.out
    files = {"sweep.json", "sweep.csv", "sweep.png", "sweep.html"}
    assert {p.name for p in out.iterdir()} == files
    saved = tt.evals.Sweep.load(out / "sweep.json")
    edit = tt.load(probe).edit(dose=0.3, top_layers=2)
    answers = tt.LM.load(str(model)).generate(saved.baseline.prompts, edit, 8)
    assert saved.of("edit")[-1].answers == answers
    assert trimtab("eval", "sweep", probe, *options).code == 0  # at once: it is all there


@pytest.mark.slow
def test_tune_stores_its_choice_in_the_artifact(model, probe, prompts, tmp_path):
    done = trimtab(
        "tune", probe, "-p", prompts, "-j", WORDS, "-m", model, "--budget", 800,
        "--max-new-tokens", 6, "--max-ratio", 3,
    )  # fmt: skip
    assert done.code == 0, done
    assert "chosen" in done.out
    tuned = tt.load(probe)
    assert tuned.guidance is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joy", "joy.jsonl", "prompts.txt"]
    said = trimtab("chat", "-m", model, "--steer", probe, stdin="Hello\n")
    assert f"a dose of {tuned.guidance['dose']:g}" in said.out + said.err


def test_tune_takes_examples_and_says_at_once_where_there_are_none(model, probe, prompts):
    given = ["tune", probe, "-p", prompts, "-j", WORDS, "--max-new-tokens", 6, "--max-ratio", 3]
    done = trimtab(*given, "-m", model, "--budget", 800, "--examples", probe.with_suffix(".jsonl"))
    assert done.code == 0, done
    assert tt.load(probe).guidance is not None
    wrong = trimtab(*given, "-m", "no-such-model", "--examples", "no-such-set")
    assert wrong.code == 2 and "no-such-set" in wrong.err  # before a model is looked for


@pytest.mark.parametrize(
    "judge, told",
    [("nobody", "no judge 'nobody'"), ("lexicon:love", "no judge 'lexicon:love'")],
)
def test_an_unknown_judge_is_told(model, probe, prompts, judge, told):
    done = trimtab("eval", "sweep", probe, "-p", prompts, "-j", judge, "-m", model)
    assert done.code == 2 and told in done.err


@pytest.mark.parametrize("command", [("eval", "sweep"), ("tune",)])
def test_what_is_wrong_with_a_measurement_is_told_before_a_model_is_loaded(
    probe, prompts, tmp_path, command
):
    (tmp_path / "two.txt").write_text("Fine.\nNothing.\n")
    cases = [
        (["-j", "nobody"], "no judge 'nobody'"),
        (["-j", f"probe:{tmp_path}"], "no artifact"),
        (["-j", WORDS, "--reference", tmp_path / "two.txt"], "2 reference answers for 3"),
        (["-j", WORDS, "--reference", tmp_path / "no.txt"], "cannot read reference answers"),
        (["-j", WORDS, "--tokens", "some"], "cannot read the tokens 'some'"),
    ]
    if command[0] == "eval":
        cases += [
            (["-j", WORDS, "--scales", "0,x"], "--scales are numbers"),
            (["-j", WORDS, "--scales", "0,inf"], "--scales are numbers"),
        ]
    else:
        cases += [
            (["-j", WORDS, "--layers", "first"], "'first'"),
            (["-j", WORDS, "--layers", "1:3", "--layers", "2:9"], "9"),
        ]
    for options, told in cases:
        done = trimtab(*command, probe, "-p", prompts, "-m", "./never-loaded", *options)
        assert done.code == 2 and told in done.err, done
        assert "Loading" not in done.err
    done = trimtab(*command, probe, "-p", prompts, "-m", "./never-loaded", "-j", WORDS)
    assert "never-loaded" in done.err  # control: this one is loaded


def test_eval_sweep_takes_reference_answers(model, probe, prompts, tmp_path):
    asked, answers = prompts.read_text().splitlines(), ["Fine.", "Nothing.", "Once, long ago."]
    (tmp_path / "a.txt").write_text("\n".join(answers) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps([{"text": a} for a in answers]))
    pairs = [{"prompt": p, "completion": a} for p, a in zip(asked, answers, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*pairs, *pairs[:1]])))
    options = ["-p", prompts, "-j", WORDS, "-m", model, "--max-new-tokens", 2, "--scales", "0,0.1"]
    found = {}
    for name in ("a.txt", "a.json", "a.jsonl", None):
        own = ["--reference", tmp_path / name] if name else []
        own += ["--out", tmp_path / f"swept-{name}"]
        done = trimtab("eval", "sweep", probe, *options, *own)
        assert done.code == 0, done
        found[name] = tt.evals.Sweep.load(tmp_path / f"swept-{name}" / "sweep.json").baseline
    lm = tt.LM.load(str(model))
    wanted = tt.evals.perplexities(lm, list(zip(asked, answers, strict=True))).tolist()
    assert found["a.txt"].perplexities == pytest.approx(wanted, rel=1e-5)
    assert found["a.json"].perplexities == found["a.txt"].perplexities
    assert found["a.jsonl"].perplexities == pytest.approx([*wanted, wanted[0]], rel=1e-5)
    assert found[None].perplexities != pytest.approx(wanted, rel=1e-2)


def swept(model, artifact, prompts, out, *options):
    """The answers of the strongest edit of a small sweep, and what the command printed."""
    given = ["-p", prompts, "-j", WORDS, "-m", model, "--out", out, "--max-new-tokens", 6]
    done = trimtab("eval", "sweep", artifact, *given, "--scales", "0,0.9", *options)
    assert done.code == 0, done
    return evals.Sweep.load(out / "sweep.json").of("edit")[-1], done


def test_a_sweep_of_a_tuned_probe_steers_as_asked_and_else_as_tuned(
    model, lm, probe, prompts, tmp_path
):
    shares = {"weights": [0.5, 1.0], "first": [2, 4.0]}
    guidance = {"layers": [1, 2], "tokens": "answer", "dose": 0.1, **shares}
    tuned = replace(tt.load(probe), guidance=guidance)
    tuned.save(probe)
    best = tuned.best_layers(1)
    cases = [
        ([], guidance),
        (["--tokens", "prompt"], {"layers": [1, 2], "tokens": "prompt", "weights": [0.5, 1.0]}),
        (["--top-layers", 1], {"layers": best, "tokens": "answer", "first": [2, 4.0]}),
        (["--tokens", "prompt", "--top-layers", 1], {"layers": best, "tokens": "prompt"}),
    ]
    found = []
    for number, (options, wanted) in enumerate(cases):
        arm, done = swept(model, probe, prompts, tmp_path / f"{number}", *options)
        assert arm.answers == lm.generate(arm.prompts, tuned.edit(**{**wanted, "dose": 0.9}), 6)
        assert ("instead of what was tuned" in done.err) is bool(options)
        found.append(tuple(arm.answers))
    assert len(set(found)) == len(cases)  # control: none of them is another


def test_tokens_of_an_edit_are_its_own(model, probe, prompts, tmp_path):
    edit = tt.load(probe).edit(dose=0.1, top_layers=2)
    edit.save(tmp_path / "edit")
    given = ["eval", "sweep", tmp_path / "edit", "-p", prompts, "-j", WORDS]
    done = trimtab(*given, "-m", "./never-loaded", "--tokens", "prompt", "--top-layers", 1)
    assert done.code == 2 and "--tokens and --top-layers choose where a probe steers" in done.err
    assert "Loading" not in done.err
    swept(model, tmp_path / "edit", prompts, tmp_path / "out")  # control: without them


def test_a_sweep_says_that_just_asking_is_left_out(model, probe, prompts, tmp_path):
    _, done = swept(model, probe, prompts, tmp_path / "one")
    assert "Just asking is left out" in done.err and "Warning" not in done.err
    _, done = swept(model, probe, prompts, tmp_path / "two", "--ask", "Use vowels.")
    assert "Just asking" not in done.err


@pytest.mark.filterwarnings("ignore:no setting has more effect")
def test_tune_takes_references_layers_and_tokens_and_saves_at_home(
    model, lm, probe, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "said.txt").write_text("Fine.\nNothing.\nOnce, long ago.\n")
    given = ["tune", probe, "-p", prompts, "-j", WORDS, "-m", model, "--budget", 400]
    given += ["--max-new-tokens", 6, "--max-ratio", 3, "--out", "~/tuned"]
    given += ["--layers", "1:3", "--layers", "2", "--tokens", "prompt"]
    done = trimtab(*given, "--reference", tmp_path / "said.txt")
    assert done.code == 0, done
    assert "chosen" in done.out
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    made = tt.load(tmp_path / "tuned").guidance
    assert made["layers"] in ([1, 2], [2]) and made["tokens"] == "prompt"
    said = ["Fine.", "Nothing.", "Once, long ago."]
    pairs = list(zip(prompts.read_text().splitlines(), said, strict=True))
    judge = judge_of(WORDS, None, None)(lm)
    asked = {"budget": 400, "max_ratio": 3.0, "max_new_tokens": 6, "show_progress": False}
    asked |= {"layers": ["1:3", "2"], "tokens": "prompt"}
    loaded = tt.load(probe)
    same = evals.tune(lm, loaded, [p for p, _ in pairs], judge, pairs, **asked)
    assert made == same.probe.guidance
    own = evals.tune(lm, loaded, [p for p, _ in pairs], judge, **asked)  # control: no references
    assert made["dose"] != own.best.dose


@pytest.mark.parametrize(
    ("name", "labels", "instruction"),
    [
        ("label:glad/sad", ("glad", "sad"), "Is the mood of the reply glad or sad?"),
        ("label:a/b,c", ("a", "b", "c"), "Is the mood of the reply a, b or c?"),
        ("label:dry / wet: How is it?", ("dry", "wet"), "How is it?"),
    ],
)
def test_a_one_word_label_by_its_name(lm, name, labels, instruction):
    judge = judge_of(name, None, None)(lm)
    assert judge == evals.Label(lm, labels, labels[0], f"{instruction} Answer with one word.")
    remote = judge_of(name, "m", "http://localhost:1/v1")(lm)
    assert remote == evals.Endpoint("http://localhost:1/v1", "m", instruction, labels)
    assert judge_of("label:positive/negative", None, None)(lm) == evals.Label(lm)


def test_presets_and_compliance_by_their_names(lm):
    url = "http://localhost:1/v1"
    assert judge_of("compliance", None, None)(lm) == evals.Label.compliance(lm)
    assert judge_of("compliance", "m", url)(lm).labels == ("positive", "negative")
    assert judge_of("humor", None, None)(lm) == evals.YesNo.preset(lm, "humor")
    remote = judge_of("humor", "m", url)(lm)
    assert remote == evals.Endpoint.preset(url, "m", "humor")
    assert remote != evals.Endpoint(url, "m", remote.question)  # control: no shots, no threshold
    assert judge_of("Is it?", "m", url)(lm) == evals.Endpoint(url, "m", "Is it?")


def test_a_text_classifier_by_its_folder(lm, model, probe, prompts, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    names = {0: "joy", 1: "fear"}
    config = LlamaConfig(
        vocab_size=512, num_attention_heads=4, pad_token_id=0, id2label=names,
        label2id={v: k for k, v in names.items()}, **sizes,
    )  # fmt: skip
    folder = tmp_path / "moods"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizers_zoo.byte_tokenizer().save_pretrained(folder)
    texts = ["We danced.", "It rained."]
    fear = evals.Classifier.pretrained(str(folder), "fear")(texts, texts)
    for name, wanted in ((f"{folder}:fear", fear), (f"{folder}:joy", 1 - fear), (folder, 1 - fear)):
        found = judge_of(f"classifier:{name}", None, None)(lm)(texts, texts)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert not torch.allclose(fear, 1 - fear, atol=1e-4)  # control
    given = ["eval", "sweep", probe, "-p", prompts, "-m", "./never-loaded", "-j"]
    for name, told in [
        (f"classifier:{folder}:envy", "'envy' is no class"),
        (f"classifier:{model}:joy", "no text classifier"),
        (f"classifier:{tmp_path / 'none'}:joy", "cannot be read as a text classifier"),
    ]:
        done = trimtab(*given, name)
        assert done.code == 2 and told in done.err and "Loading ./never" not in done.err, done


@pytest.mark.parametrize(
    ("name", "model", "url", "told"),
    [
        *((f"label:{text}", None, None, "write the word that counts, a slash") for text in
          ("glad", "glad/", "/sad", "glad/glad", "a,b/c", "a/b,b", "")),
        ("label:glad", "m", "http://localhost:1/v1", "write the word that counts, a slash"),
        ("humor", None, "http://localhost:1/v1", "--endpoint needs the model's name"),
        ("humour", "m", "http://localhost:1/v1", "--endpoint asks a question"),
        (WORDS, "m", "http://localhost:1/v1", "needs no server"),
        (WORDS, "m", None, "asks no language model; leave --judge-model out"),
        ("classifier:", None, None, "no judge 'classifier:'"),
        ("compliance:x", None, None, "no judge 'compliance:x'"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_read_is_told(name, model, url, told):
    with pytest.raises(tt.TrimtabError, match=re.escape(told)):
        judge_of(name, model, url)


@pytest.mark.slow
def test_solve_then_distill(model, prompts, tmp_path):
    solved, controller = tmp_path / "solved", tmp_path / "controller"
    done = trimtab(
        "solve", prompts, "--judge", "Is it good?", "-m", model, "--out", solved, "--steps", 1,
        "--search", 4, "--step-size", 8, "--max-new-tokens", 8,
    )  # fmt: skip
    assert done.code == 0, done
    kept = tt.selfcontrol.read_targets(solved)
    if not kept:
        pytest.fail(f"the tiny model solved nothing: {done.out}")
    done = trimtab("distill", solved, "-m", model, "--out", controller, "--epochs", 1)
    assert done.code == 0, done
    assert isinstance(tt.load(controller), tt.Attend)


# ---- show ---------------------------------------------------------------------------------------


def test_show_a_probe(probe):
    done = trimtab("show", probe)
    assert done.code == 0, done
    for told in ("joy", "probe", "resid@all answer[:16]", "as written", "held out", "4 layers"):
        assert told in done.out
    facts = json.loads(trimtab("show", probe, "--json").out)
    assert facts["sha256"] == "as written"
    assert facts["kind"] == "probe"
    assert facts["bytes"] == sum(f.stat().st_size for f in probe.iterdir())
    assert len(facts["scores"]["heldout_accuracy"]) == 4


def test_show_an_edit(probe, tmp_path):
    tt.load(probe).edit(dose=0.1).save(tmp_path / "edit")
    done = trimtab("show", tmp_path / "edit")
    assert done.code == 0, done
    assert "edit" in done.out and "from: probe" in done.out


def test_show_a_peft_folder(lm, tmp_path):
    sizes = lm.anatomy.linear_sizes([1])
    pairs = {name: (torch.ones(2, i), torch.ones(o, 2)) for name, (i, o) in sizes.items()}
    tt.Adapter("resid@all", pairs).save_peft(tmp_path / "theirs")
    done = trimtab("show", tmp_path / "theirs")
    assert done.code == 0, done
    assert "adapter from a foreign folder" in done.out and "resid@all all" in done.out


def test_show_a_recording(lm, tmp_path):
    recording = lm.record(["Hello", "Good day"], "resid@0:2 prompt", show_progress=False)
    recording.save(tmp_path / "rec")
    done = trimtab("show", tmp_path / "rec")
    assert done.code == 0, done
    assert "recording" in done.out and "resid@0:2 prompt" in done.out
    facts = json.loads(trimtab("show", tmp_path / "rec", "--json").out)
    assert facts["rows"] == 2
    assert facts["places"][0]["tokens"] == sum(recording.lengths)


def test_show_tells_a_changed_artifact(probe):
    file = probe / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = trimtab("show", probe)
    assert done.code == 2
    assert "does not match the sha256" in done.err


def test_show_never_passes_commands_on_to_the_terminal(probe):
    file = probe / "artifact.json"
    header = json.loads(file.read_text())
    header["name"] = "joy\x1b[2J [bold]x[/nonsense]"
    file.write_text(json.dumps(header))
    done = trimtab("show", probe)
    assert done.code == 0, done
    assert "\x1b" not in done.out
    assert "[bold]x[/nonsense]" in done.out


@pytest.mark.slow
def test_show_loads_no_transformers(probe):
    code = NO_TORCH.replace("argv = [", "argv = [*").replace('"trimtab", {!r}', "{!r}")
    code = code.format(("trimtab", "show", str(probe))).replace('"torch"', '"transformers.models"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "joy" in done.stdout, done.stderr


# ---- chat ---------------------------------------------------------------------------------------


def talk(model, *lines, options=()):
    """Pipe lines into a chat; the answers' labels and texts, and everything printed."""
    stdin = "".join(f"{line}\n" for line in lines)
    done = trimtab("chat", "-m", model, "--max-new-tokens", 8, *options, stdin=stdin)
    assert done.code == 0, done
    found = re.findall(
        r"^(plain|\S+=\S+(?: \S+=\S+)*) › (.*?)\n\n(?=you|\Z)", done.out, re.M | re.S
    )
    return found, done


def test_chat_answers_as_generate_does_over_several_turns(model, lm):
    answers, _ = talk(model, "Hello", "And you?")
    history = [{"role": "user", "content": "Hello"}]
    first = lm.generate(history, max_new_tokens=8)
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "And you?"}]
    second = lm.generate(history, max_new_tokens=8)
    assert answers == [("plain", cli.screen.plain(first)), ("plain", cli.screen.plain(second))]


def test_chat_steers_by_dose_and_off_is_plain_again(model, lm, probe):
    answers, done = talk(
        model, "Hello", "/reset", f"/steer {probe}=0.8", "/show", "Hello", "/off", "/reset", "Hello"
    )
    plain, steered, again = answers
    assert plain == again
    assert steered[0] == "joy=0.8"
    assert steered[1] != plain[1]
    assert "a dose of 0.8 at resid@1:3 answer" in done.out
    edit = tt.load(probe).edit(dose=0.8, layers="1:3", tokens="answer")
    assert steered[1] == cli.screen.plain(lm.generate("Hello", edits=edit, max_new_tokens=8))


def test_chat_scales_a_saved_edit_by_a_factor(model, lm, probe, tmp_path):
    edit = tt.load(probe).edit(dose=0.4, layers="0:3")
    edit.save(tmp_path / "edit")
    answers, done = talk(model, "/show", "Hello", options=("--steer", f"{tmp_path / 'edit'}=-2"))
    assert answers == [
        ("edit=-2", cli.screen.plain(lm.generate("Hello", edits=-2.0 * edit, max_new_tokens=8)))
    ]
    assert "times -2 (1 is as saved)" in done.out


def test_chat_takes_a_peft_folder(model, lm, tmp_path):
    sizes = lm.anatomy.linear_sizes([1])
    pairs = {n: (torch.randn(2, i) * 0.1, torch.randn(o, 2)) for n, (i, o) in sizes.items()}
    adapter = tt.Adapter("resid@all", pairs)
    adapter.save_peft(tmp_path / "theirs")
    answers, _ = talk(model, "Hello", options=("--steer", f"{tmp_path / 'theirs'}=0.5"))
    whole = lm.generate("Hello", edits=0.5 * adapter, max_new_tokens=8)
    assert answers == [("theirs=0.5", cli.screen.plain(whole))]
    assert whole != lm.generate("Hello", max_new_tokens=8)


def test_chat_adds_several_and_stops_one_at_zero(model, probe, tmp_path):
    edit = tt.load(probe).edit(dose=0.4, layers="0:3")
    for name in ("a", "b"):
        edit.save(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    answers, _ = talk(model, f"/steer {a} {b}=0.5", "Hello", f"/steer {a}=0", "Hello")
    assert [label for label, _ in answers] == ["a=1 b=0.5", "b=0.5"]


def test_chat_learns_a_built_in_concept_once(model, monkeypatch):
    learned = []
    real = cli.demo.learn
    monkeypatch.setattr(cli.demo, "learn", lambda *a, **k: learned.append(a[2]) or real(*a, **k))
    _, done = talk(model, "/steer humor=0.1", "/off", "/steer humor=-0.1")
    assert learned == ["humor"]
    assert "humor: a dose of -0.1" in done.out


def test_chat_system_and_reset(model, lm):
    answers, _ = talk(model, "/system Be brief.", "Hello", "/reset", "/system", "Hello")
    told = lm.generate("Hello", max_new_tokens=8, system="Be brief.")
    assert [text for _, text in answers] == [
        cli.screen.plain(told),
        cli.screen.plain(lm.generate("Hello", max_new_tokens=8)),
    ]


def test_chat_goes_on_after_errors_and_quits(model, probe):
    answers, done = talk(
        model, "/frob", "/steer hapiness", f"/steer {probe}=much", "/steer", "/help", "Hello",
        "/quit", "Hello",
    )  # fmt: skip
    assert len(answers) == 1
    assert done.err.count("error ") == 4
    assert "Did you mean 'happiness'?" in done.err
    assert "is a dose" in done.out and "is a factor" in done.out


def test_chat_refuses_an_artifact_of_another_model(model, tmp_path, probe):
    file = probe / "artifact.json"
    header = json.loads(file.read_text())
    header["model"]["fingerprint"] = "0" * 16
    file.write_text(json.dumps(header))
    done = trimtab("chat", "-m", model, "--steer", probe)
    assert done.code == 2
    assert "another model" in done.err


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(lm, capsys):
    session = cli.chat.Session(lm, sampling={"max_new_tokens": 64})
    real = lm.stream

    class Interrupted:
        def __getattr__(self, name):
            return getattr(lm, name)

        def stream(self, *args, **kwargs):
            for number, piece in enumerate(real(*args, **kwargs)):
                if number == 3:
                    signal.raise_signal(signal.SIGINT)
                yield piece

    session.lm = Interrupted()
    assert session.turn("Hello")
    assert "(stopped)" in capsys.readouterr().out
    assert [m["role"] for m in session.history] == ["user", "assistant"]
    session.lm = lm
    session.turn("Go on")
    assert len(session.history) == 4


# ---- demo ---------------------------------------------------------------------------------------


def test_demo_on_a_tiny_model(model, tmp_path):
    done = trimtab("demo", "--model", model, "--out", tmp_path / "happy")
    assert done.code == 0, done
    made = tt.load(tmp_path / "happy")
    assert isinstance(made, tt.Edit)
    assert made.meta.name == "happiness"
    assert len(made.meta.scores["accuracy"]) == 4
    assert all(question in done.out for question in cli.demo.DEMO.questions)
    assert re.search(r"load [\d.]+ s, learn [\d.]+ s, answer [\d.]+ s", done.out)


HAPPY = re.compile(
    r"\b(happy|happi\w+|excit\w+|love\w*|fun|great|amazing|wonderful|fantastic|delight\w*|joy\w*|"
    r"smil\w+|laugh\w*|beautiful|bright\w*|thrill\w*|enjoy\w*|favou?rite|friends?|play\w*)\b"
)
SAD = re.compile(
    r"\b(sad\w*|dark\w*|alone|lonely|pain\w*|loss|lost|death|dead|die[ds]?|dying|fear\w*|cold|"
    r"despair\w*|suffer\w*|violence|grief|empty|tears?|cr(y|ied|ying)|hopeless\w*|end|ending|"
    r"unending|doom\w*|curs\w+|miser\w+|never|unable|torn|war)\b"
)


@pytest.mark.slow
def test_demo_on_the_real_model_makes_it_happier(tmp_path, monkeypatch):
    said = []
    real = cli.demo.print_answers
    monkeypatch.setattr(
        cli.demo, "print_answers", lambda answers: said.extend(answers) or real(answers)
    )
    monkeypatch.chdir(tmp_path)
    done = trimtab("demo")
    assert done.code == 0, done
    assert len(said) == 3 and all(question in done.out for question in cli.demo.DEMO.questions)
    edit = tt.load("happiness")
    assert isinstance(edit, tt.Edit) and max(edit.meta.scores["heldout_accuracy"]) > 0.7

    def mood(column):
        text = " ".join(answers[column] for answers in said).lower()
        return len(HAPPY.findall(text)) - len(SAD.findall(text))

    against, _, with_it = (mood(column) for column in range(3))
    assert with_it > 3 + against
    assert "happiness" in trimtab("show", "happiness").out


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_finds_this_installation_sound():
    done = trimtab("doctor")
    assert done.code == 0, done
    assert "✘" not in done.out
    facts = json.loads(trimtab("doctor", "--json").out)
    assert facts["ok"] is True
    assert {"python", "torch", "transformers"} <= set(facts["versions"])
    assert facts["devices"][-1].startswith("cpu")
    assert len(facts["checks"]) == 4


def test_doctor_control_edits_that_do_nothing_are_found(monkeypatch):
    monkeypatch.setattr("trimtab.lm.LM._call", _without_edits(tt.LM._call))
    done = trimtab("doctor")
    assert done.code == 1
    assert "✘ an edit changes the logits" in done.out


def _without_edits(call):
    return lambda self, batch, edits, lengths=None: call(self, batch, None, lengths)


def test_doctor_reports_whatever_is_broken(monkeypatch):
    monkeypatch.setattr(cli.doctor, "tiny_lm", lambda: 1 / 0)
    done = trimtab("doctor", "--json")
    assert done.code == 1
    assert "ZeroDivisionError" in json.loads(done.out)["checks"][0]["name"]


# ---- small parts --------------------------------------------------------------------------------


def test_layers_of_other_models_keep_the_share_of_the_depth():
    assert cli.demo.DEMO.layers_of(cli.demo.DEMO.n_layers) == cli.demo.DEMO.layers
    for n in range(1, 100):
        assert 0 <= min(cli.demo.DEMO.layers_of(n)) <= max(cli.demo.DEMO.layers_of(n)) < n


def test_many_layers_are_drawn_thinly():
    chart = cli.screen.one_chart("train", "cyan", range(126), [0.9] * 126).plain
    assert max(map(len, chart.split("\n"))) <= 80


def test_bars():
    assert cli.screen.bars([0.0, 0.5, 0.5625, 1.0, 2.0], 1, 0.5, 1.0) == ["  ▁██"]


def test_names_and_numbers():
    assert cli.chat.named_number("joy") == ("joy", None)
    assert cli.chat.named_number("a=b/joy=-0.5") == ("a=b/joy", -0.5)
    for wrong in ("joy=", "joy=nan", "=1", "joy=much"):
        with pytest.raises(tt.TrimtabError, match="name=number"):
            cli.chat.named_number(wrong)


def test_the_environment_is_left_alone():
    before = dict(os.environ)
    trimtab("--version")
    assert dict(os.environ) == before
