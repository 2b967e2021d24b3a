"""Recordings: rows, pooling, disk; and harvesting with the fewest tokens, that survives a kill."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_zoo
import trimtab as tt
from trimtab import recording
from trimtab.errors import ArtifactError, PlaceError
from trimtab.recording import Chunk, Recording, Track

HERE = Path(__file__).parent
PLACES = ("resid@1:3 all", "norm@2 prompt[-1:]")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_rows(n=5, layers=2, width=4):
    return [noise(i % 4 + 1, layers, width, seed=i) for i in range(n)]


def llama():
    return tt.LM(model_zoo.tiny("llama"))


def prompts(n=60, seed=0):
    """Ragged rows, many with a common beginning, as a batch that is padded on the left."""
    chance = random.Random(seed)
    starts = [[chance.randrange(3, 500) for _ in range(k)] for k in (12, 7, 1)]
    rows = [
        chance.choice(starts) + [chance.randrange(3, 500) for _ in range(chance.randrange(2, 30))]
        for _ in range(n)
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return tt.Batch(ids, mask, torch.tensor([max(2, len(r) - 3) for r in rows]))


def plain_rows(lm, batch, place):
    """What one forward pass per row shows, without harvesting."""
    made = []
    for i in range(len(batch)):
        one = batch[i : i + 1]
        real = one.mask[0].bool()
        alone = tt.Batch(one.ids[:, real], one.mask[:, real], one.prompt_len)
        with torch.no_grad():
            made += lm(alone, record=place).recording.rows()
    return made


def equal(one, other):
    return one.places == other.places and all(
        torch.equal(a, b)
        for place in one.places
        for a, b in zip(one[place].rows(), other[place].rows(), strict=True)
    )


class Meter:
    """Counts the tokens that go into each block, and the passes of the LM head."""

    def __init__(self, lm):
        self.blocks, self.passes, self.heads = [0] * lm.n_layers, 0, 0
        self.handles = [
            block.register_forward_pre_hook(self._block(i), with_kwargs=True)
            for i, block in enumerate(lm.anatomy.blocks)
        ]
        head = lm.model.get_output_embeddings()
        self.handles.append(head.register_forward_pre_hook(self._head))

    def _block(self, i):
        def count(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            self.blocks[i] += x.shape[0] * x.shape[1]
            self.passes += i == 0

        return count

    def _head(self, module, args):
        self.heads += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


# ---- rows in memory ------------------------------------------------------------------------------


def test_rows_and_pooling():
    rows = some_rows()
    rec = Recording.from_rows("resid@3:5 answer", rows)
    assert (len(rec), rec.layers, rec.width, rec.lengths) == (5, (3, 4), 4, [1, 2, 3, 4, 1])
    assert str(rec.place) == "resid@3:5 answer" and rec.places == [rec.place]
    assert all(torch.equal(a, b) for a, b in zip(rec.rows(), rows, strict=True))
    torch.testing.assert_close(rec.mean(), torch.stack([r.mean(0) for r in rows]))
    assert torch.equal(rec.last(), torch.stack([r[-1] for r in rows]))
    assert repr(rec) == "Recording(5 rows at resid@3:5 answer)"


def test_rows_are_in_the_order_of_the_input():
    rows = some_rows(4)
    chunks = [
        Chunk(order, tuple(len(rows[i]) for i in order), torch.cat([rows[i] for i in order]))
        for order in ((2, 0), (3, 1))
    ]
    rec = Recording({tt.Place("resid", "0:2"): Track((0, 1), chunks)})
    assert all(torch.equal(a, b) for a, b in zip(rec.rows(), rows, strict=True))
    assert rec.lengths == [len(r) for r in rows]
    assert torch.equal(rec.last(), torch.stack([r[-1] for r in rows]))


def test_the_mean_is_summed_in_float32():
    rows = [torch.cat([torch.full((1, 1, 1), 1000.0), torch.full((999, 1, 1), 0.25)]).bfloat16()]
    rec = Recording.from_rows("resid@0", rows)
    assert rec.mean().dtype == torch.float32
    torch.testing.assert_close(float(rec.mean()), (1000 + 999 * 0.25) / 1000)
    assert Recording.from_rows("resid@0", [r.double() for r in rows]).mean().dtype == torch.float64


def test_a_row_without_tokens_has_no_mean():
    rec = Recording.from_rows("resid@0:2 [9]", [*some_rows(2), torch.zeros(0, 2, 4)])
    assert rec.lengths == [1, 2, 0] and len(rec.rows()[2]) == 0
    for pool in (rec.mean, rec.last):
        with pytest.raises(PlaceError, match=r"rows \[2\] hold no token at 'resid@0:2 \[9\]'"):
            pool()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "an empty list"),
        ([torch.ones(3, 4)], r"not \[3, 4\]"),
        ([torch.ones(2, 2, 4), torch.ones(2, 2, 5)], r"not \[2, 2, 5\]"),
        ([torch.ones(2, 2, 4), torch.ones(2, 3, 4)], r"not \[2, 3, 4\]"),
        ([[1.0]], "not list"),
        ([torch.ones(2, 2, 4), None], "not NoneType"),
    ],
)
def test_rows_of_another_shape(rows, told):
    with pytest.raises(PlaceError, match=f"tensors .tokens, layers, width., one per row.*{told}"):
        Recording.from_rows("resid@0:2", rows)


def test_rows_for_another_number_of_layers():
    with pytest.raises(PlaceError, match="names 3 layers, but the rows hold 2"):
        Recording.from_rows("resid@0:3", some_rows())
    assert Recording.from_rows("resid@0:", some_rows()).layers == (0, 1)
    assert Recording.from_rows("resid@4:", some_rows()).layers == (4, 5)
    assert Recording.from_rows("resid@4::3", some_rows()).layers == (4, 7)
    for place in ("resid@-1", "resid@-2:", "resid@2:-1"):  # whose model has how many?
        with pytest.raises(PlaceError, match="from the top.*give numbers from 0, .*resid@0:2 all"):
            Recording.from_rows(place, some_rows())


def test_one_row_and_all_of_them():
    rows = some_rows()
    rec = Recording.from_rows("resid@3:5", rows)
    assert all(torch.equal(a, b) for a, b in zip(rec, rows, strict=True))
    assert torch.equal(rec[0], rows[0]) and torch.equal(rec[torch.tensor(-1)], rows[-1])
    with pytest.raises(IndexError):
        rec[5]


def test_the_home_folder_and_the_right_loader(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rec = Recording.from_rows("resid@0:2", some_rows())
    rec.save("~/rec")
    assert (tmp_path / "rec").is_dir() and equal(Recording.load("~/rec"), rec)
    with pytest.raises(ArtifactError, match=r"rec is a recording; open it with tt.Recording.load"):
        tt.load("~/rec")


def test_narrowing():
    rows = some_rows(layers=4)
    rec = Recording.from_rows("resid@2:6", rows)
    assert torch.equal(rec["resid@3"].rows()[3], rows[3][:, [1]])
    assert torch.equal(rec["resid@2,5"].rows()[3], rows[3][:, [0, 3]])
    assert torch.equal(rec["resid@2,3,5"].rows()[3], rows[3][:, [0, 1, 3]])
    assert rec["resid@2:6:2"].layers == (2, 4) and rec["resid@-1"].layers == (5,)
    assert rec["resid@3:5"]["resid@4"].layers == (4,)
    for place in ("resid@3:5", "resid@3", "resid@2,5"):  # views: nothing is copied
        assert next(rec[place].chunks()).values._base is next(rec.chunks()).values
    with pytest.raises(PlaceError, match=r"layers \[0, 1\] were not recorded; recorded are \[2, 3"):
        rec["resid@0:3"]
    for other in ("norm@2:6", "resid@2:6 answer", "resid@2:6 all before"):
        with pytest.raises(PlaceError, match=r"was not recorded; this recording holds 'resid@2:6"):
            rec[other]


def test_the_last_layer_is_the_models():
    rec = Recording.from_rows("resid@0:2", some_rows())
    rec.meta["model"] = {"layers": 4}
    with pytest.raises(PlaceError, match=r"layers \[3\] were not recorded"):
        rec["resid@-1"]
    assert rec["resid@-3"].layers == (1,)


def test_several_places():
    a, b = (
        Recording.from_rows("resid@0:2", some_rows()),
        Recording.from_rows("norm@1", some_rows(layers=1)),
    )
    both = Recording({**a._tracks, **b._tracks})
    assert len(both) == 5 and [str(p) for p in both.places] == ["resid@0:2 all", "norm@1 all"]
    for use in (both.rows, both.mean, lambda: both.place, lambda: both.layers, both.chunks):
        with pytest.raises(PlaceError, match=r"several places; choose one: recording\['resid@0:2"):
            list(use())
    assert equal(both["norm@1"], b)


def test_join():
    rows = some_rows(4)
    parts = [
        Recording(
            {tt.Place("resid", "0:2"): Track((0, 1), [Chunk((i,), (len(rows[i]),), rows[i])])}
        )
        for i in (2, 0, 3, 1)
    ]
    assert equal(Recording.join(parts), Recording.from_rows("resid@0:2", rows))
    with pytest.raises(PlaceError, match=r"two of the parts hold rows \[2\]; .*from_rows"):
        Recording.join([*parts, parts[0]])
    with pytest.raises(PlaceError, match="parts of the same places, not Recording.*norm@0:2"):
        Recording.join([parts[0], Recording.from_rows("norm@0:2", rows)])
    with pytest.raises(PlaceError, match="one recording at least"):
        Recording.join([])


# ---- on disk -------------------------------------------------------------------------------------


def mapped_from(tensor):
    """The file behind a tensor's memory; None for ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return rest[4] if len(rest) > 4 and rest[4].startswith("/") else None
    return None


@pytest.mark.parametrize("form", [str, Path])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(tmp_path, form, dtype):
    rec = Recording.from_rows("resid@0:2 answer", [r.to(dtype) for r in some_rows(20)])
    rec.meta["note"] = "by hand"
    rec.save(form(tmp_path / "deep" / "rec"))
    back = Recording.load(form(tmp_path / "deep" / "rec"))
    assert equal(rec, back) and back.meta == {"note": "by hand"}
    assert back.rows()[0].dtype == dtype
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["rec"]


def test_rows_may_have_no_token_on_disk(tmp_path):
    rec = Recording.from_rows(
        "resid@0:2", [torch.zeros(0, 2, 4), *some_rows(2), torch.zeros(0, 2, 4)]
    )
    rec.save(tmp_path / "rec")
    assert equal(rec, Recording.load(tmp_path / "rec"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the maps are Linux's")
def test_loading_maps_the_file(tmp_path):
    Recording.from_rows("resid@0:2", [noise(500, 2, 64)] * 4).save(tmp_path / "rec")
    back = Recording.load(tmp_path / "rec")
    shard = str(tmp_path / "rec" / "shard-0000-00000.safetensors")
    for rec in (back, back["resid@1"], back["resid@0"]):
        for tensor in (next(rec.chunks()).values, *rec.rows()):
            assert mapped_from(tensor) == shard
    assert mapped_from(back.mean()) is None  # the control


def test_shards_are_of_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "SHARD_BYTES", 4 * 2 * 4 * 6)  # six tokens
    rows = some_rows(20)
    many = Recording(
        {
            tt.Place("resid", "0:2"): Track(
                (0, 1), [Chunk((i,), (len(r),), r) for i, r in enumerate(rows)]
            )
        }
    )
    for rec in (Recording.from_rows("resid@0:2", rows), many):  # one large chunk; twenty small ones
        rec.save(tmp_path / "rec")
        back = Recording.load(tmp_path / "rec")
        sizes = [len(c.values) for c in back.chunks()]
        assert equal(rec, back) and 6 <= max(sizes) < 10 and min(sizes[:-1]) >= 6


def test_saving_replaces_a_recording_whole(tmp_path, monkeypatch):
    first, second = (Recording.from_rows("resid@0:2", some_rows(n)) for n in (8, 5))
    first.save(tmp_path / "rec")
    second.save(tmp_path / "rec")
    second.save(tmp_path / "rec")
    loaded = Recording.load(tmp_path / "rec")
    assert equal(loaded, second)
    loaded.save(tmp_path / "rec")  # over the very file that it is mapped from
    assert equal(Recording.load(tmp_path / "rec"), second) and equal(loaded, second)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(recording, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        first.save(tmp_path / "rec")
    assert equal(Recording.load(tmp_path / "rec"), second)
    assert [p.name for p in tmp_path.iterdir()] == ["rec"]


def test_saving_over_something_else(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("ten years")
    (tmp_path / "file").write_text("more work")
    rec = Recording.from_rows("resid@0:2", some_rows())
    for name in ("folder", "file"):
        with pytest.raises(ArtifactError, match=f"{name} exists and is not a recording; choose"):
            rec.save(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot write"):
        rec.save(tmp_path / "file" / "rec")
    assert (tmp_path / "file").read_text() == "more work"
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["thesis.txt"]


def test_meta_that_json_cannot_hold(tmp_path):
    rec = Recording.from_rows("resid@0:2", some_rows())
    rec.meta["when"] = object()
    with pytest.raises(ArtifactError, match="meta holds what JSON cannot"):
        rec.save(tmp_path / "rec")
    assert list(tmp_path.iterdir()) == []


def change_index(folder, **changes):
    file = folder / "recording.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_damaged_recordings(tmp_path):
    folder = tmp_path / "rec"
    with pytest.raises(
        ArtifactError, match=r"no recording at .*rec: recording.json is missing; give"
    ):
        Recording.load(folder)
    Recording.from_rows("resid@0:2", some_rows()).save(folder)
    index, shard = folder / "recording.json", folder / "shard-0000-00000.safetensors"
    whole, tensors = index.read_bytes(), shard.read_bytes()
    for size in (0, 10, len(whole) - 5):
        index.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="recording.json is not valid JSON"):
            Recording.load(folder)
    for changes, told in [
        ({"format": 99}, "has format 99, this Trimtab reads 1"),
        ({"places": None}, "damaged in places"),
        ({"places": ["resid@0"]}, "damaged in places"),
        ({"places": [{"place": "resid@0", "layers": "all"}]}, "damaged in places"),
        ({"rows": "many"}, "damaged in rows"),
        ({"complete": False}, r"not complete \(5 of 5 rows\); run the same lm.record"),
        ({"rows": 9}, r"not complete \(5 of 9 rows\)"),
        ({"places": [{"place": "resid@0", "layers": [0]}]}, "values .* for 5 rows and 1 layers"),
    ]:
        index.write_bytes(whole)
        change_index(folder, **changes)
        with pytest.raises(ArtifactError, match=told):
            Recording.load(folder)
    index.write_bytes(whole)
    for size in (0, 20, len(tensors) - 8):
        shard.write_bytes(tensors[:size])
        with pytest.raises(
            ArtifactError, match=r"shard-0000-00000.safetensors cannot be read .*del"
        ):
            Recording.load(folder)
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"not complete \(0 of 5 rows\)"):
        Recording.load(folder)
    shard.write_bytes(tensors)
    (folder / "shard-0000-00001.safetensors").write_bytes(tensors)
    with pytest.raises(ArtifactError, match=r"5 rows twice\); delete it and record anew"):
        Recording.load(folder)


# ---- harvesting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["resid@1:3 all", "norm@-1 answer", "mlp@0 prompt[-2:]", "v@2 all[::3]"]
)
@pytest.mark.parametrize("trees", [True, False])
def test_record_is_a_forward_pass_per_row(place, trees, monkeypatch):
    lm, batch = llama(), prompts(25)
    if not trees:
        monkeypatch.setattr(tt.LM, "takes_trees", lambda *args: False)
    rec = lm.record(batch, place, batch_size=4, show_progress=False)
    wanted = plain_rows(lm, batch, place)
    assert rec.place == tt.Place.parse(place) and len(rec) == 25
    assert rec.meta["model"] == lm.describe()
    for got, row in zip(rec.rows(), wanted, strict=True):
        torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-4)


def test_record_several_places_in_a_dtype():
    lm, batch = llama(), prompts(20)
    rec = lm.record(batch, PLACES, show_progress=False, dtype=torch.bfloat16)
    assert [str(p) for p in rec.places] == list(PLACES)
    for place in PLACES:
        alone = lm.record(batch, place, show_progress=False)
        assert rec[place].rows()[0].dtype == torch.bfloat16
        for got, row in zip(rec[place].rows(), alone.rows(), strict=True):
            torch.testing.assert_close(got.float(), row, rtol=1e-2, atol=2e-2)
    assert rec["norm@2 prompt[-1:]"].last().shape == (20, 1, 32)


def test_record_positions_and_edits_per_row():
    lm, batch = llama(), prompts(6)
    listed = [[i % 3, 4 + i % 2] for i in range(6)]
    place = tt.Place("resid", 2, listed)
    rec = lm.record(batch, place, batch_size=2, show_progress=False)
    for row, got, where in zip(plain_rows(lm, batch, "resid@2"), rec.rows(), listed, strict=True):
        torch.testing.assert_close(got, row[where], rtol=1e-4, atol=1e-4)
    edit = tt.Add(
        tt.Place("resid", 1, listed), noise(1, 6, 32)
    )  # another vector, elsewhere, per row
    edited = lm.record(batch, "resid@2", batch_size=2, show_progress=False, edits=edit)
    with torch.no_grad():
        wanted = lm(batch, edit, record="resid@2").recording
    for got, row in zip(edited.rows(), wanted.rows(), strict=True):
        torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-4)
    plain = lm.record(batch, "resid@2", show_progress=False).rows()
    assert not any(
        torch.allclose(a, b, atol=1e-2) for a, b in zip(edited.rows(), plain, strict=True)
    )


@pytest.mark.parametrize("count", [2, 5, 9])
def test_record_positions_for_other_rows(count):
    place = tt.Place("resid", 2, [[i] for i in range(count)])
    with pytest.raises(PlaceError, match=f"positions for {count} rows, but there are 6 examples"):
        llama().record(prompts(6), place, show_progress=False)


def test_hybrids_have_a_site_in_some_layers():
    lm = tt.LM(model_zoo.tiny("lfm2"))
    rec = lm.record(prompts(3), "q@0:", show_progress=False)
    assert rec.layers == tuple(lm.anatomy.layers("q")) != (0, 1, 2, 3)


# ---- the fewest work -----------------------------------------------------------------------------


def test_nothing_beyond_what_is_asked_is_computed():
    """No token after the last asked one, no layer above the deepest, no LM head."""
    lm = llama()
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23, 24]]
    batch = tt.Batch(
        torch.tensor([rows[0], [0, 0, *rows[1]]]),
        torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]),
        torch.tensor([4, 3]),
    )
    for places in ("resid@1", ["resid@0", "resid@2"]):  # the model is measured once, so not below
        lm.record(batch, places, show_progress=False)
    with Meter(lm) as meter:
        lm.record(batch, "resid@1 prompt[-1:]", show_progress=False)
        assert meter.blocks == [4 + 3, 4 + 3, 0, 0] and meter.heads == 0
        lm.record(batch, ["resid@0 answer", "resid@2 prompt[:1]"], show_progress=False)
        assert meter.blocks == [7 + 12, 7 + 12, 12, 0] and meter.heads == 0
    with Meter(lm) as meter:
        lm(batch)  # the control
        assert meter.blocks == [14] * 4 and meter.heads == 1


def test_the_pass_stops_inside_the_deepest_block():
    lm, fired = llama(), []
    lm.takes_trees()  # the model is measured once, not below
    handle = lm.anatomy.tap("attn", 2)[0].register_forward_pre_hook(lambda *a: fired.append(1))
    lm.record(prompts(4), "norm@2", show_progress=False)
    assert not fired
    lm.record(prompts(4), "attn@2", show_progress=False)
    assert fired
    handle.remove()


def test_shared_prefixes_are_computed_once(monkeypatch):
    lm = llama()
    prefix = list(range(10, 30))
    rows = [[*prefix, 100 + i, 200 + i, 300 + i] for i in range(8)]
    rows += [rows[0][:22], rows[0]]  # one that ends inside another, and a copy
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    batch = tt.Batch(ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]))
    lm.takes_trees()
    with Meter(lm) as meter:
        shared = lm.record(batch, "resid@1", show_progress=False)
    assert meter.blocks[0] == 20 + 8 * 3 and meter.passes == 1
    monkeypatch.setattr(tt.LM, "takes_trees", lambda *args: False)
    with Meter(lm) as control:
        plain = lm.record(batch, "resid@1", show_progress=False)
    assert control.blocks[0] >= sum(map(len, rows)) > 5 * meter.blocks[0]
    for a, b in zip(shared.rows(), plain.rows(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_little_is_padding(monkeypatch):
    monkeypatch.setattr(tt.LM, "takes_trees", lambda *args: False)
    lm, batch = llama(), prompts(200, seed=3)
    real = int(batch.mask.sum())
    with Meter(lm) as meter:
        lm.record(batch, "resid@0", show_progress=False)
    assert real <= meter.blocks[0] < 1.15 * real < batch.mask.numel()


# ---- on disk while running -----------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(recording, "SHARD_BYTES", 20_000)


def sheets_of(lm, batch, **options):
    """How many passes an uninterrupted run takes, without those that measure the model."""
    lm.record(batch[:2], PLACES, show_progress=False)
    with Meter(lm) as meter:
        rec = lm.record(batch, PLACES, show_progress=False, **options)
    return rec, meter.passes


def rows_on_disk(folder):
    layers = [(1, 2), (2,)]
    shards = sorted(folder.glob("shard-*.safetensors"))
    return [i for f in shards for i in recording._read_shard(f, layers)[0].index]


@pytest.mark.parametrize("form", [str, Path])
def test_out_is_the_same_as_in_memory(tmp_path, small_shards, form):
    lm, batch = llama(), prompts(200)
    wanted = lm.record(batch, PLACES, show_progress=False)
    rec = lm.record(batch, PLACES, show_progress=False, out=form(tmp_path / "rec"))
    assert equal(rec, wanted) and equal(Recording.load(tmp_path / "rec"), wanted)
    assert len(list((tmp_path / "rec").glob("shard-*"))) > 3
    assert sorted(rows_on_disk(tmp_path / "rec")) == list(range(200))
    with Meter(lm) as meter:  # again: nothing is left to do
        again = lm.record(batch, PLACES, show_progress=False, out=form(tmp_path / "rec"))
    assert equal(again, wanted) and meter.passes == 0


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_recording import PLACES, llama, prompts
from trimtab import recording

recording.SHARD_BYTES = 20_000
real, count = os.replace, 0

def replace(source, target):  # dies with a shard that is written and not yet in its place
    global count
    count += str(target).endswith(".safetensors")
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)

os.replace = replace
llama().record(prompts(200), PLACES, show_progress=False, out={out!r})
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, small_shards):
    lm, batch, out = llama(), prompts(200), tmp_path / "rec"
    wanted, passes = sheets_of(lm, batch)
    script = KILLED.format(tests=str(HERE), out=str(out))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = rows_on_disk(out)
    assert len(kept) > 20 and len(kept) == len(set(kept)) < 200
    assert len(list(out.glob(".shard-*"))) == 1  # half a shard, in nobody's way
    with pytest.raises(ArtifactError, match=rf"not complete \({len(kept)} of 200 rows\); run the"):
        Recording.load(out)
    with Meter(lm) as meter:
        rec = lm.record(batch, PLACES, show_progress=False, out=out)
    assert equal(rec, wanted)  # bit for bit, though a part was computed by another process
    assert 0 < meter.passes < passes
    assert sorted(rows_on_disk(out)) == list(range(200)) and not list(out.glob(".shard-*"))


def interrupt_after(lm, passes, out, batch, **options):
    """Press Ctrl-C in the middle of a pass."""
    count = 0

    def press(module, args):
        nonlocal count
        count += 1
        if count == passes:
            signal.raise_signal(signal.SIGINT)

    handle = lm.anatomy.blocks[1].register_forward_pre_hook(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            lm.record(batch, PLACES, show_progress=False, out=out, **options)
    finally:
        handle.remove()


def test_ctrl_c_keeps_what_was_computed(tmp_path):
    lm, batch, out = llama(), prompts(600), tmp_path / "rec"
    wanted, passes = sheets_of(lm, batch)
    logits = lm(batch).logits
    interrupt_after(lm, 4, out, batch)
    first = len(rows_on_disk(out))
    assert first > 0  # no shard was full: what was there has been written
    assert torch.equal(lm(batch).logits, logits) and lm.taps.call is None
    interrupt_after(lm, 3, out, batch)  # and once more
    assert len(rows_on_disk(out)) > first
    with Meter(lm) as meter:
        rec = lm.record(batch, PLACES, show_progress=False, out=out)
    assert equal(rec, wanted) and meter.passes == passes - 3 - 2


def test_a_fault_keeps_what_was_computed(tmp_path):
    lm, batch, out = llama(), prompts(600), tmp_path / "rec"

    def fault(module, args):
        if next(faults) == 4:
            raise RuntimeError("out of memory")

    faults = iter(range(1000))
    lm.record(batch[:2], PLACES, show_progress=False)
    handle = lm.anatomy.blocks[1].register_forward_pre_hook(fault)
    with pytest.raises(RuntimeError, match="out of memory"):
        lm.record(batch, PLACES, show_progress=False, out=out)
    handle.remove()
    assert rows_on_disk(out)
    # With a smaller batch the sheets are others; what is there already stays as it is.
    kept = set(rows_on_disk(out))
    rec = lm.record(batch, PLACES, batch_size=3, show_progress=False, out=out)
    assert sorted(rows_on_disk(out)) == list(range(600)) and len(kept) > 0
    for place in PLACES:
        wanted = lm.record(batch, place, show_progress=False)
        for a, b in zip(rec[place].rows(), wanted.rows(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_another_request_into_the_same_folder(tmp_path):
    lm, batch, out = llama(), prompts(8), tmp_path / "rec"
    kept = lm.record(batch, "resid@1", show_progress=False, out=out)
    other = tt.LM(model_zoo.tiny("llama", seed=1))
    for model, rows, place, options, told in [
        (lm, prompts(8, seed=1), "resid@1", {}, "examples"),
        (lm, prompts(9), "resid@1", {}, "examples, rows"),
        (lm, batch, "resid@2", {}, "places"),
        (lm, batch, "resid@1 prompt", {}, "examples, places"),
        (lm, batch, "resid@1", {"dtype": torch.float64}, "dtype"),
        (lm, batch, "resid@1", {"edits": tt.Add("resid@0", noise(1, 32))}, "edits"),
        (other, batch, "resid@1", {}, "model"),
    ]:
        with pytest.raises(ArtifactError, match=rf"another recording \(it differs in {told}\); ch"):
            model.record(rows, place, show_progress=False, out=out, **options)
    assert equal(Recording.load(out), kept)


def test_edits_are_part_of_the_request(tmp_path):
    lm, batch, out = llama(), prompts(8), tmp_path / "rec"
    edit = tt.Add("resid@0", noise(1, 32))
    first = lm.record(batch, "resid@1", show_progress=False, out=out, edits=edit)
    again = lm.record(batch, "resid@1", show_progress=False, out=out, edits=1.0 * edit)
    assert equal(first, again)
    with pytest.raises(ArtifactError, match="differs in edits"):
        lm.record(batch, "resid@1", show_progress=False, out=out, edits=2 * edit)


def test_out_is_a_folder_of_its_own(tmp_path):
    lm, batch = llama(), prompts(4)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("ten years")
    (tmp_path / "file").write_text("more work")
    for name in ("folder", "file"):
        with pytest.raises(ArtifactError, match=f"{name} exists and is not a recording; choose"):
            lm.record(batch, "resid@1", show_progress=False, out=tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot write to .*choose another folder|exists"):
        lm.record(batch, "resid@1", show_progress=False, out=tmp_path / "file" / "rec")
    (tmp_path / "left").mkdir()  # what a run leaves that was killed before its index was written
    (tmp_path / "left" / ".recording.json.123").write_text("{")
    assert len(lm.record(batch, "resid@1", show_progress=False, out=tmp_path / "left")) == 4


def test_a_damaged_shard_is_recorded_again(tmp_path, small_shards):
    lm, batch, out = llama(), prompts(200), tmp_path / "rec"
    wanted = lm.record(batch, PLACES, show_progress=False, out=out)
    wanted = Recording.join([wanted])  # the rows stay mapped; unlink keeps them alive
    shard = sorted(out.glob("shard-*"))[1]
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ArtifactError, match=f"{shard.name} cannot be read .*; delete this shard and"
    ):
        lm.record(batch, PLACES, show_progress=False, out=out)
    shard.unlink()
    assert equal(lm.record(batch, PLACES, show_progress=False, out=out), wanted)


# ---- several processes ---------------------------------------------------------------------------

RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from test_recording import PLACES, Meter, equal, llama, prompts
from trimtab import recording

recording.SHARD_BYTES = 20_000
lm, batch = llama(), prompts(200)
lm.record(batch[:2], PLACES, show_progress=False)
with Meter(lm) as meter:
    memory = lm.record(batch, PLACES, show_progress=False)
disk = lm.record(batch, PLACES, show_progress=False, out={out!r} + "/disk")
assert equal(memory, disk) and len(memory) == 200
rank = torch.distributed.get_rank()
if rank == 0:
    memory.save({out!r} + "/memory")
with open({out!r} + f"/passes-{{rank}}", "w") as file:
    file.write(str(meter.passes))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    lm, batch = llama(), prompts(200)
    wanted, passes = sheets_of(lm, batch)
    script = tmp_path / "script.py"
    script.write_text(RANKS.format(tests=str(HERE), out=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, "--master-addr", "127.0.0.1", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert equal(Recording.load(tmp_path / "disk"), wanted)
    assert equal(Recording.load(tmp_path / "memory"), wanted)
    shares = [int((tmp_path / f"passes-{rank}").read_text()) for rank in (0, 1)]
    assert sum(shares) == passes and abs(shares[0] - shares[1]) <= 1
    names = {p.name.split("-")[1] for p in (tmp_path / "disk").glob("shard-*")}
    assert names == {"0000", "0001"}
    with Meter(lm) as meter:  # one process goes on where two have ended
        shard = max((tmp_path / "disk").glob("shard-0001-*"))
        shard.unlink()
        rec = lm.record(batch, PLACES, show_progress=False, out=tmp_path / "disk")
    assert equal(rec, wanted) and 0 < meter.passes < passes


def test_rows_are_unique_in_the_control():
    """The equalities above would not notice rows that are all alike."""
    rows = llama().record(prompts(200), "norm@2 prompt[-1:]", show_progress=False).last()[:, 0]
    assert len({tuple(row) for row in rows.tolist()}) > 150
