"""Artifacts: folders that are whole or not there, and damage that is told by name. No model."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trimtab as tt
from trimtab import artifact
from trimtab.artifact import Meta, Parts
from trimtab.errors import ArtifactError

L, D = 2, 8
MODEL = {"id": "tiny", "revision": None, "width": D, "layers": L, "fingerprint": "00ff"}


def humor(**meta):
    delta = torch.randn(L, D, generator=torch.Generator().manual_seed(0))
    given = {"name": "humor", "model": MODEL, "made_by": {"seed": 3}, "scores": {"pnes": 0.5}}
    return tt.Add("resid@0:2 answer", delta, keep_norm=True, meta=Meta(**{**given, **meta}))


@pytest.fixture
def saved(tmp_path):
    humor().save(tmp_path / "humor")
    return tmp_path / "humor"


def change_json(folder, **changes):
    file = folder / "artifact.json"
    header = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in header.items() if v is not ...}))


def retell_hash(folder):
    """What a forger would do: the tensors are changed, and the hash with them."""
    change_json(folder, sha256=artifact._sha256(folder / "tensors.safetensors"))


# ---- whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path])
def test_the_folder_says_all(tmp_path, form):
    humor().save(form(tmp_path / "deep" / "humor"))
    folder = tmp_path / "deep" / "humor"
    assert sorted(p.name for p in folder.iterdir()) == ["artifact.json", "tensors.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["humor"]  # nothing temporary is left
    header = json.loads((folder / "artifact.json").read_text())
    assert header["format"] == 1 and header["kind"] == "edit" and header["name"] == "humor"
    assert header["place"] == "resid@0:2 answer" and header["model"] == MODEL
    assert header["made_by"] == {"seed": 3, "trimtab": tt.__version__} and header["scores"] == {
        "pnes": 0.5
    }
    back = tt.load(form(folder))
    assert torch.equal(back.delta, humor().delta) and back.keep_norm
    assert back.meta == replace(humor().meta, made_by=header["made_by"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_stays(tmp_path, dtype):
    tt.Add("resid@0", torch.ones(1, D, dtype=dtype)).save(tmp_path / "a")
    assert tt.load(tmp_path / "a").delta.dtype == dtype


def test_views_are_saved_alone(tmp_path):
    big = torch.randn(L, 1000, D)
    tt.Add("resid@0:2", big[:, 7]).save(tmp_path / "a")
    assert torch.equal(tt.load(tmp_path / "a").delta, big[:, 7])
    assert (tmp_path / "a" / "tensors.safetensors").stat().st_size < 2000


def test_an_artifact_is_replaced(saved):
    (0.5 * humor()).save(saved)
    assert torch.equal(tt.load(saved).delta, 0.5 * humor().delta)
    assert [p.name for p in saved.parent.iterdir()] == ["humor"]


def test_a_failure_while_writing_leaves_the_old_one(saved, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    for name in ("save_file", "replace_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(artifact, name, fail)
            with pytest.raises(ArtifactError, match=r"cannot write .*humor: No space left"):
                (2 * humor()).save(saved)
        assert torch.equal(tt.load(saved).delta, humor().delta)
        assert [p.name for p in saved.parent.iterdir()] == ["humor"]


def test_ctrl_c_while_writing_leaves_the_old_one(saved, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
        (2 * humor()).save(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["humor"]
    assert torch.equal(tt.load(saved).delta, humor().delta)


def test_a_failed_swap_puts_the_old_one_back(saved, monkeypatch):
    real = os.replace

    def second_fails(source, target):
        if Path(target) == saved and "-old-" not in str(source):
            raise OSError(16, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(artifact.os, "replace", second_fails)
    with pytest.raises(ArtifactError, match="Device or resource busy"):
        (2 * humor()).save(saved)
    assert torch.equal(tt.load(saved).delta, humor().delta)


# ---- paths ---------------------------------------------------------------------------------------


def test_something_else_is_never_overwritten(tmp_path):
    folder, file, link = (tmp_path / name for name in ("folder", "file", "link"))
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years of work")
    file.write_text("more work")
    link.symlink_to(tmp_path / "nowhere")
    for target in (folder, file, link):
        with pytest.raises(ArtifactError, match=f"{target.name} exists and is not an artifact; ch"):
            humor().save(target)
    assert (folder / "thesis.txt").read_text() == "ten years of work"
    assert file.read_text() == "more work" and link.is_symlink()


@pytest.mark.parametrize("name", ["thesis.txt", "edits/00000/artifact.json", ".git/config"])
def test_an_artifact_that_holds_more_is_not_replaced(saved, name):
    (saved / name).parent.mkdir(parents=True, exist_ok=True)
    (saved / name).write_text("ten years of work")
    with pytest.raises(ArtifactError, match=rf"also holds {name.split('/')[0]}, which saving"):
        (2 * humor()).save(saved)
    assert (saved / name).read_text() == "ten years of work"
    assert torch.equal(tt.load(saved).delta, humor().delta)
    shutil.rmtree(saved / name.split("/")[0], ignore_errors=True)
    (saved / name).unlink(missing_ok=True)
    (2 * humor()).save(saved)  # control: alone it is replaced
    assert torch.equal(tt.load(saved).delta, (2 * humor()).delta)


def test_a_path_through_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/humor: Not a directory|exists"):
        humor().save(tmp_path / "file" / "humor")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="Permission denied; choose another path"):
            humor().save(tmp_path / "humor")
    finally:
        tmp_path.chmod(0o700)


def test_a_name_is_a_name_and_a_path_is_a_path(tmp_path, monkeypatch):
    """Separators in the path make folders; in the edit's own name they do nothing."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    evil = humor().named("../../../evil/name")
    evil.save("a/b/c")
    evil.save("../beside")
    assert tt.load("a/b/c").meta.name == tt.load("../beside").meta.name == "../../../evil/name"
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_dir())
    assert found == ["beside", "here", "here/a", "here/a/b", "here/a/b/c"]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    humor().save("~/humor")
    assert (tmp_path / "humor").is_dir() and tt.load("~/humor").meta.name == "humor"
    assert artifact.read_header(Path("~/humor"))["name"] == "humor"


@pytest.mark.parametrize("path", ["", ".", ".."])
def test_a_path_without_a_name(tmp_path, monkeypatch, path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ArtifactError, match="exists and is not an artifact"):
        humor().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_unusual_names_are_ordinary(tmp_path):
    for name in ("with space", "ünïcode 温", "-dash", ".hidden", "a" * 100):
        humor().named(name).save(tmp_path / name)
        assert tt.load(tmp_path / name).meta.name == name


# ---- damage --------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    with pytest.raises(ArtifactError, match=r"nothing at .*none; give the folder that .save"):
        tt.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"no artifact at .*empty: artifact.json is missing;"):
        tt.load(tmp_path / "empty")


def test_every_cut_of_the_json(saved):
    file = saved / "artifact.json"
    whole = file.read_bytes()
    for size in range(0, len(whole) - 2, 37):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"artifact.json is not valid JSON .*fresh copy"):
            tt.load(saved)
    file.write_bytes(whole)
    tt.load(saved)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 1', b"\x80"])
def test_json_that_is_none(saved, content):
    (saved / "artifact.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="artifact.json is not valid JSON"):
        tt.load(saved)


def test_every_cut_of_the_tensors(saved):
    file = saved / "tensors.safetensors"
    whole = file.read_bytes()
    for size in range(0, len(whole), 23):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"does not match the sha256.*fresh copy"):
            tt.load(saved)
        retell_hash(saved)  # even where the hash is right, the file is not
        with pytest.raises(ArtifactError, match=r"tensors.safetensors cannot be read"):
            tt.load(saved)
        change_json(saved, sha256="0" * 64)


def test_one_changed_bit(saved):
    file = saved / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match="does not match the sha256"):
        tt.load(saved)


def test_missing_tensors(saved):
    (saved / "tensors.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"tensors.safetensors cannot be read \(No such file"):
        tt.load(saved)


@pytest.mark.parametrize("found", [99, "1", None, 0, [1]])
def test_another_format(saved, found):
    change_json(saved, format=found)
    with pytest.raises(ArtifactError, match=r"has format .*, this Trimtab reads 1; update"):
        tt.load(saved)


@pytest.mark.parametrize("content", [[1, 2], "text", 3, None])
def test_json_of_another_kind(saved, content):
    (saved / "artifact.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=f"has format '{type(content).__name__}'"):
        tt.load(saved)


@pytest.mark.parametrize("key", ["kind", "made_by", "scores", "sha256"])
def test_a_missing_entry(saved, key):
    change_json(saved, **{key: ...})
    with pytest.raises(ArtifactError, match=f"lacks {key}; fetch a fresh copy"):
        tt.load(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("kind", ["edit"]), ("kind", None), ("made_by", []), ("scores", "good"), ("sha256", 7)),
        *(("name", {}), ("place", 4), ("model", "tiny"), ("extra", [1])),
    ],
)
def test_an_entry_of_a_wrong_type(saved, key, value):
    change_json(saved, **{key: value})
    with pytest.raises(ArtifactError, match=f"holds {key} .*of a wrong type; fetch a fresh copy"):
        tt.load(saved)


def test_an_unknown_kind(saved):
    change_json(saved, kind="spell")
    with pytest.raises(ArtifactError, match="of kind 'spell'; this Trimtab knows edit, head-probe"):
        tt.load(saved)


SPEC = {"type": "add", "place": "resid@0:2 answer", "keep_norm": True, "relative": False}


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({}, "'edit' is missing"),
        ({"edit": [SPEC]}, "cannot be built"),
        ({"edit": "Add()"}, "cannot be built"),
        ({"edit": {**SPEC, "type": "__import__"}}, "unknown edit type '__import__'; known: add"),
        ({"edit": {"type": "add"}}, "'place' is missing"),
        ({"edit": {**SPEC, "place": "nowhere"}}, "cannot read the place 'nowhere'"),
        ({"edit": {**SPEC, "place": 3}}, "cannot read the place 3"),
        ({"edit": {**SPEC, "type": "replace"}}, "value"),
        ({"edit": {"type": "sum", "place": "resid@0", "edits": 5}}, "cannot be built"),
        ({"edit": {"type": "sum", "place": "resid@0", "edits": [SPEC]}}, "delta"),
        ({"edit": {"type": "when", "edit": SPEC}}, "cannot be built"),
        ({"edit": {**SPEC, "keep_norm": "false"}}, "keep_norm is true or false, not 'false'"),
        ({"edit": {**SPEC, "keep_norm": 1}}, "keep_norm is true or false, not 1"),
        ({"edit": {**SPEC, "relative": None}}, "relative is true or false, not None"),
        ({"edit": {**SPEC, "relative": SPEC}}, "relative is true or false, not {'type'"),
    ],
)
def test_a_description_that_cannot_be_built(saved, extra, told):
    change_json(saved, extra=extra)
    with pytest.raises(ArtifactError, match=told):
        tt.load(saved)


@pytest.mark.parametrize("strength", ["1", None, True, [1.0], {"type": "add"}, math.nan, 10**400])
def test_a_number_is_a_number(tmp_path, strength):
    tt.Replace("resid@0:2", torch.ones(L, D), 0.5).save(tmp_path / "patch")
    file = tmp_path / "patch" / "artifact.json"
    spec = json.loads(file.read_text())["extra"]["edit"]
    change_json(tmp_path / "patch", extra={"edit": {**spec, "strength": strength}})
    with pytest.raises(ArtifactError, match="strength is a (finite )?number, not"):
        tt.load(tmp_path / "patch")
    change_json(tmp_path / "patch", extra={"edit": {**spec, "strength": 1}})
    assert tt.load(tmp_path / "patch").strength == 1.0  # JSON of others writes 1.0 so


def test_a_nested_meta_is_not_looked_at(saved):
    change_json(saved, extra={"edit": {**SPEC, "meta": {"name": "evil"}, "delta": [[1.0]]}})
    assert tt.load(saved).meta.name == "humor" and torch.equal(tt.load(saved).delta, humor().delta)


@pytest.mark.parametrize(
    ("delta", "told"),
    [
        (torch.full((L, D), math.nan), "16 values that are NaN"),
        (torch.ones(D), r"shape \[8\]"),
        (torch.ones(L, D, dtype=torch.int32), "torch.int32"),
    ],
)
def test_forged_tensors(saved, delta, told):
    save_file({"delta": delta}, saved / "tensors.safetensors")
    retell_hash(saved)
    with pytest.raises(ArtifactError, match=f"the edit in .*humor cannot be built: .*{told}"):
        tt.load(saved)


# ---- files that are no artifacts -----------------------------------------------------------------


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".pkl", ".ckpt", ".npy", ""])
def test_a_pickle_is_never_read(tmp_path, suffix):
    file, sprung = tmp_path / f"vector{suffix}", tmp_path / "sprung"
    torch.save({"delta": torch.ones(L, D), "trap": Trap(sprung)}, file)
    with pytest.raises(ArtifactError, match=r"pickle.*safetensors|an artifact is a folder"):
        tt.load(file)
    folder = tmp_path / "folder"
    humor().save(folder)
    shutil.copy(file, folder / "tensors.safetensors")
    retell_hash(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        tt.load(folder)
    assert not sprung.exists()
    torch.load(file, weights_only=False)  # the control: the trap is a real one
    assert sprung.exists()


def test_foreign_safetensors(tmp_path):
    save_file({"weights": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"holds \['weights'\], which is no format known here;"):
        tt.load(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("no")
    with pytest.raises(
        ArtifactError, match=r"y.safetensors is not a safetensors file .*fresh copy"
    ):
        tt.load(tmp_path / "y.safetensors")
    (tmp_path / "z.txt").write_text("no")
    with pytest.raises(ArtifactError, match="an artifact is a folder with artifact.json in it"):
        tt.load(tmp_path / "z.txt")


# ---- what may stand in the JSON ------------------------------------------------------------------


@pytest.mark.parametrize("scores", [{"pnes": math.nan}, {"pnes": math.inf}, {"x": {1, 2}}])
def test_meta_that_json_cannot_hold(tmp_path, scores):
    with pytest.raises(ArtifactError, match="the meta of humor holds what JSON cannot"):
        humor(scores=scores).save(tmp_path / "humor")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none():
    values = torch.tensor([0.12345678, math.nan, math.inf])
    assert artifact.json_list(values) == [0.123457, None, None]


# ---- the model that an artifact was made for -----------------------------------------------------


def test_the_tie_to_a_model():
    artifact.check_model(Meta(), MODEL)
    artifact.check_model(Meta(model=MODEL), {**MODEL, "id": "a copy elsewhere"})
    other = {**MODEL, "id": "other", "width": 16, "fingerprint": "11ee"}
    told = r"humor was made for another model \(id tiny, width 8, .*id other, width 16.*untied\(\)"
    with pytest.raises(ArtifactError, match=told):
        artifact.check_model(humor().meta, other)
    artifact.check_model(humor().untied().meta, other)


def test_parts_are_read_as_written(tmp_path):
    tensors = {"a": torch.arange(4), "b.c": torch.ones(1, 2)}
    wrote = Parts("thing", Meta("n", MODEL, {"x": 1}, {"y": [2]}), None, {"z": "ü"}, tensors)
    artifact.save(tmp_path / "thing", wrote)
    read = artifact.read(tmp_path / "thing")
    assert (read.kind, read.place, read.extra) == ("thing", None, {"z": "ü"})
    assert read.meta == replace(wrote.meta, made_by={"x": 1, "trimtab": tt.__version__})
    assert all(torch.equal(read.tensors[n], t) for n, t in tensors.items())
