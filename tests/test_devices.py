"""A model spread over devices, or kept on disk, is read and steered like any other."""

import pytest
import torch

import model_zoo
import trimtab as tt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny-llama")
    model_zoo.tiny("llama").save_pretrained(path)
    return str(path)


def spread(where: str) -> dict[str, str]:
    """Blocks 1 and 3 elsewhere, the rest on the CPU."""
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    blocks = {f"model.layers.{i}": where if i % 2 else "cpu" for i in range(model_zoo.LAYERS)}
    return {**rest, **blocks, "lm_head": "cpu"}


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_device_map_changes_nothing(folder, tmp_path, where):
    plain = tt.LM.load(folder)
    parted = tt.LM.load(folder, device_map=spread(where), offload_folder=str(tmp_path))
    assert parted.device.type == "cpu"
    ids = torch.randint(3, 500, (2, 7), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(3, plain.width, generator=torch.Generator().manual_seed(1))
    edit = tt.Add("resid@1:4", 3 * direction, keep_norm=True)
    rows = tt.Batch(ids)
    for edits in (None, edit, [edit, None]):
        with torch.no_grad():
            expected = plain(rows, edits=edits, record="resid@1:3")
            found = parted(rows, edits=edits, record="resid@1:3")
        torch.testing.assert_close(found.logits, expected.logits)
        for a, b in zip(found.recording.rows(), expected.recording.rows(), strict=True):
            torch.testing.assert_close(a, b)
        assert parted.generate_ids(rows, edits, 5) == plain.generate_ids(rows, edits, 5)
    with torch.no_grad():
        assert not torch.allclose(plain(rows, edits=edit).logits, plain(rows).logits)
    recorded = parted.record(rows, "mlp@-1", show_progress=False)
    other = plain.record(rows, "mlp@-1", show_progress=False)
    torch.testing.assert_close(recorded.rows()[0], other.rows()[0])
