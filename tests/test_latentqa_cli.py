"""The commands train-reader, ask and steer, one after the other on a tiny model."""

import json

import pytest
import typer
from typer.testing import CliRunner

import model_zoo
import tokenizers_zoo
import trimtab as tt
from trimtab import latentqa
from trimtab.cli.ask import ask
from trimtab.cli.steer import steer
from trimtab.cli.train_reader import train_reader

app = typer.Typer()
for command in (ask, train_reader, steer):
    app.command()(command)


def trimtab(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model_zoo.ARCHITECTURES["llama"](max_position_embeddings=1024).save_pretrained(folder)
    tokenizers_zoo.byte_tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_train_ask_steer(model, tmp_path):
    items = [{"label": f"l{i}", "control_user": f"Please be a fox {i}."} for i in range(6)]
    (tmp_path / "items.json").write_text(json.dumps(items))
    (tmp_path / "qa.json").write_text(json.dumps({"l0": [["Who?", "A fox."]]}))
    reader = tmp_path / "reader"
    given = ["train-reader", tmp_path / "items.json", "--qa", tmp_path / "qa.json", "--templates"]
    options = ["--model", model, "--read-layer", "1:3", "--steps", "4", "--out", reader]
    done = trimtab(*given, *options, "--evaluate-every", "2", "--held-out", "0.3")
    assert done.exit_code == 0, done
    assert "held_out_real" in done.stdout
    assert len((tmp_path / "reader-training" / "log.jsonl").read_text().splitlines()) == 4
    use = ["--model", model, "--reader", reader]
    done = trimtab(
        "ask", "Hello", "-q", "Who?", "--evidence", "--json", "--max-new-tokens", 4, *use
    )
    assert done.exit_code == 0, done
    (told,) = json.loads(done.stdout)["answers"]
    assert told.keys() == {"question", "answer", "none", "shuffled", "gain"}
    done = trimtab("ask", "Hello", "--system", "Be a fox.", "--answer", "I", "--layer", 1, *use)
    assert done.exit_code == 0 and done.stdout.count("reader ") == 3, done
    (tmp_path / "prompts.txt").write_text("Tell me a story.\n\nWhy?\n")
    given = ["be a fox", "--prompts", tmp_path / "prompts.txt", "--samples", 2, "--find", "add"]
    done = trimtab("steer", *given, "--out", tmp_path / "fox", *use)
    assert done.exit_code == 0, done
    assert tt.load(tmp_path / "fox").delta.shape[0] == 3
    given = ["be a fox", "--prompts", tmp_path / "prompts.txt", "--samples", 2]
    done = trimtab("steer", *given, "--out", tmp_path / "adapted", *use)
    assert done.exit_code == 0, done
    found = tt.load(tmp_path / "adapted")
    assert isinstance(found, tt.Adapter) and found.layers == (0, 1, 2)


def test_what_is_missing_is_said(model, tmp_path):
    done = trimtab("ask", "Hello", "--model", model)
    assert "no reader comes with the package" in str(done.exception)
    done = trimtab("steer", "be a fox", "--find", "luck", "--model", model)
    assert "lora or add" in str(done.exception)
    (tmp_path / "items.json").write_text(json.dumps([{"label": "a", "control_user": "x"}]))
    done = trimtab("train-reader", tmp_path / "items.json", "--model", model)
    assert "none of the items has a question" in str(done.exception)


@pytest.mark.slow
def test_the_shipped_reader_reads_the_embedded_model(smollm2):
    """Which of three persons a prompt asks for is in its activations, and in nothing else."""
    reader = latentqa.Reader.load(latentqa.builtin(smollm2), smollm2)
    question = "What type of persona will the assistant adopt?"
    persons = [
        "The assistant will be a pirate who sails the seas and hunts for gold.",
        "The assistant will be a doctor who cares for the sick.",
        "The assistant will be a poet who writes about love.",
    ]
    prompts = [
        "Imagine you are a pirate.",
        "Pretend that you are a physician in a hospital.",
        "Be a poet, full of romance.",
    ]
    found = [reader.choose(prompt, question, persons)[0] for prompt in prompts]
    assert found == [0, 1, 2]
    items = [
        latentqa.Item(str(i), control_user=p, qa=((question, persons[i]),))
        for i, p in enumerate(prompts)
    ]
    scores = latentqa.evaluate(reader, items)
    assert scores.loss("real")[0] < scores.loss("none")[0] - 0.1
    assert scores.loss("real")[0] < scores.loss("shuffled")[0] - 0.1  # control: another's


@pytest.mark.slow
def test_ask_works_out_of_the_box():
    done = trimtab("ask", "Imagine you are a pirate who loves gold.", "--json")
    assert done.exit_code == 0, done
    told = json.loads(done.stdout)["answers"]
    assert len(told) == 3 and "pirate" in " ".join(a["answer"] for a in told).lower()
    other = trimtab("ask", "Explain photosynthesis.", "--json")
    assert "pirate" not in other.stdout.lower()  # control
