"""A reader trained by two processes, one of which is lost: what is said, and how it goes on.

The processes are real ones, and so is the kill: SIGKILL in the middle of training.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import model_zoo
import tokenizers_zoo
from trimtab.errors import TrimtabError
from trimtab.latentqa.processes import World

WHEN_LOST = (
    120  # seconds, of which the two cores of a busy machine need some to start two processes
)


# -- one process -----------------------------------------------------------------------------------


@pytest.fixture
def sigterm():
    """Only where a SIGTERM would otherwise end the process, as it does in a script."""
    own = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not own or threading.current_thread() is not threading.main_thread():
        pytest.skip("SIGTERM is handled by whatever runs the tests")
    yield signal.SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_being_told_to_end_is_an_error_that_says_what_to_do(sigterm):
    world = World(0, 2)
    told = r"process 0 of 2 was told to end .SIGTERM.* at step 3"
    with pytest.raises(TrimtabError, match=told), world.guarded(lambda: "at step 3"):
        os.kill(os.getpid(), sigterm)
        time.sleep(5)  # the handler runs before this ends
    assert signal.getsignal(sigterm) is signal.SIG_DFL
    with world.guarded(lambda: ""):
        assert signal.getsignal(sigterm) is not signal.SIG_DFL
    assert signal.getsignal(sigterm) is signal.SIG_DFL
    with World().guarded(lambda: ""):  # alone, it does nothing
        assert signal.getsignal(sigterm) is signal.SIG_DFL


def test_a_lost_process_is_told_from_other_errors(sigterm):
    world = World(1, 2)
    told = r"^process 0 .*\(closed by peer\).*process 1 of 2 .* at step 3"
    with pytest.raises(TrimtabError, match=told), world.guarded(lambda: "at step 3"):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:12] closed by peer\nmore")
    os.kill(os.getpid(), sigterm)  # torchrun's, which may not cut the message off
    assert signal.getsignal(sigterm) is signal.SIG_DFL  # the next one ends the process
    for error in (RuntimeError("shapes differ"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, world.guarded(lambda: ""):
            raise error
        assert found.value is error
        assert signal.getsignal(sigterm) is signal.SIG_DFL


# -- two processes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tiny model and something to learn, as files."""
    folder = tmp_path_factory.mktemp("sources")
    model = model_zoo.ARCHITECTURES["llama"](max_position_embeddings=1024)
    model.save_pretrained(folder / "model")
    tokenizers_zoo.byte_tokenizer("chatml").save_pretrained(folder / "model")
    items = [
        {"label": f"l{i}", "control_user": f"Be a fox {i}.", "qa": [["Who?", f"A fox {i}."]]}
        for i in range(8)
    ]
    (folder / "items.json").write_text(json.dumps(items))
    return folder


def trained(sources, out, *options):
    """``trimtab train-reader`` under torchrun, with two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = ["-m", "trimtab", "train-reader", sources / "items.json", "--out", out]
    sizes = ["--read-layer=2", "--steps=40", "--save-every=5", "--batch-size=2", "--held-out=0"]
    more = ["--model", sources / "model", "--lr=1e-2", "--ema=0.9", "--dropout=0.1"]
    return subprocess.Popen(
        [str(word) for word in (*torchrun, *given, *sizes, *more, *options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process):
    """Its output; it must end by itself."""
    try:
        return process.communicate(timeout=WHEN_LOST)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rank_of(parent, rank):
    """The process id of a rank that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
            if is_child and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"torchrun has no process of rank {rank}")


def logged(out):
    """The lines of a run's log, which say when as well, so that no two runs have the same."""
    return Path(f"{out}-training/log.jsonl").read_text().splitlines()


def losses(out):
    """The loss of each step, in their order."""
    rows = [json.loads(line) for line in logged(out)]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
@pytest.mark.parametrize(("victim", "options"), [(1, ()), (0, ("--shard",))])
def test_a_killed_rank_ends_the_run_which_goes_on_exactly(victim, options, sources, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "broken"
    first = trained(sources, whole, *options)
    told = ended(first)
    assert first.returncode == 0, told

    second = trained(sources, out, *options)
    state, deadline = Path(f"{out}-training/checkpoint.json"), time.monotonic() + WHEN_LOST
    while not state.exists():
        assert second.poll() is None, ended(second)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(rank_of(second.pid, victim), signal.SIGKILL)
    told = " ".join(ended(second).split())
    assert second.returncode != 0 and not out.exists()  # it was in the middle
    lost = f"process {victim} of this run has ended or no longer answers"
    assert lost in told or "was told to end (SIGTERM), as torchrun does" in told, told
    assert f"is in {state.parent}: run the same command again to go on from there" in told, told

    kept = json.loads(state.read_text())["step"]
    assert kept % 5 == 0 and (state.parent / f"checkpoint-{kept}.safetensors").is_file()
    before = logged(out)[:kept]
    third = trained(sources, out, *options)
    told = ended(third)
    assert third.returncode == 0, told
    assert logged(out)[:kept] == before  # it did go on, not begin anew
    assert losses(out) == losses(whole) and len(losses(out)) == 40
    ours, theirs = (load_file(folder / "tensors.safetensors") for folder in (out, whole))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert not list(state.parent.glob("*checkpoint*"))


_RANK = """
    import sys
    from datetime import timedelta
    sys.path.insert(0, {tests!r})
    from trimtab.latentqa import processes
    processes.PATIENCE = timedelta(seconds=12)
    from test_latentqa import ITEMS, OPTIONS, make, train
    from trimtab.errors import TrimtabError
    try:
        train(make(), ITEMS * 2, steps=10_000, batch_size=2, save_every=5, out={out!r}, **OPTIONS)
    except TrimtabError as error:
        sys.exit(f"said: {{error}}")
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(tmp_path):
    code = textwrap.dedent(_RANK).format(tests=os.path.dirname(__file__), out=str(tmp_path / "r"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        base |= {"MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=base | {"RANK": str(r)}, stderr=subprocess.PIPE
        )
        for r in range(2)
    ]
    try:
        state, deadline = tmp_path / "r-training" / "checkpoint.json", time.monotonic() + WHEN_LOST
        while not state.exists():
            assert ranks[0].poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGSTOP)
        told = ranks[0].communicate(timeout=WHEN_LOST)[1].decode()
        assert ranks[0].returncode == 1, told
        assert "said: process 1 of this run has ended or no longer answers (" in told
        assert ranks[1].poll() is None  # it still hangs
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
