"""The command doctor: versions, devices, the cache, and whether edits work on a tiny random model.

Reports, whatever is broken; repairs nothing.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from trimtab import __version__
from trimtab.cli.screen import OUT, facts_table, plain, print_json
from trimtab.cli.show import JsonOption

if TYPE_CHECKING:
    from trimtab.lm import LM

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "huggingface_hub",
    "peft", "datasets", "gguf", "vllm",
)  # fmt: skip


def doctor(as_json: JsonOption = False) -> None:
    """Check this installation: versions, devices, the cache, and whether steering works."""
    from trimtab import models

    there = {alias: models.cache_damage(alias) is None for alias in models.ALIASES}
    checks = _check_steering()
    facts: dict[str, Any] = {
        "versions": _versions(),
        "devices": _devices(),
        "cache": {"folder": str(models.cache_folder()), "models": there},
        "checks": checks,
        "ok": all(check["ok"] for check in checks),
    }
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if not facts["ok"]:
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    found = {"trimtab": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _devices() -> list[str]:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]


def _check_steering() -> list[dict[str, Any]]:
    """Whether edits do what they say, on a tiny random model, on the default device."""
    from trimtab import models

    try:
        lm = tiny_lm()
        lm.model.to(models.default_device())
        return [{"name": name, "ok": ok} for name, ok in _laws(lm)]
    except Exception as error:  # a doctor reports, whatever is broken
        return [{"name": f"steering runs ({type(error).__name__}: {error})", "ok": False}]


def _laws(lm: "LM") -> Iterator[tuple[str, bool]]:
    import torch

    from trimtab.chat import Batch
    from trimtab.edits import Add
    from trimtab.place import Place

    delta = torch.randn(1, lm.width, generator=torch.Generator().manual_seed(1))
    edit = Add(Place("resid", 1, "answer"), 3 * delta)

    def batch(ids: Any) -> Batch:
        return Batch(ids, torch.ones_like(ids), torch.tensor([8]))

    def logits(ids: Any, edits: Any) -> Any:
        with torch.no_grad():
            return lm(batch(ids), edits).logits

    ids = torch.arange(3, 11, device=lm.device)[None]
    plain, steered = logits(ids, None), logits(ids, edit)
    yield "an edit changes the logits", not torch.allclose(plain, steered, atol=1e-2)
    yield "before its tokens nothing changes", torch.equal(plain[:, :7], steered[:, :7])
    yield "a strength of 0 changes nothing", torch.equal(plain, logits(ids, 0.0 * edit))
    cached = lm.generate_ids(batch(ids), edit, 8)[0]
    grown = ids
    for _ in range(8):
        token = logits(grown, edit)[:, -1].argmax(-1, keepdim=True)
        grown = torch.cat([grown, token], 1)
    yield "steering with a cache = without one", cached == grown[0, 8:].tolist()


def tiny_lm() -> "LM":
    """A random Llama of two layers; its weights are spread wide enough for logits to differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.lm import LM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LM(LlamaForCausalLM(config).eval())


def _print(facts: dict[str, Any]) -> None:
    rows: list[tuple[str, object]] = [*facts["versions"].items()]
    rows += [("devices", device) for device in facts["devices"]]
    rows.append(("cache", facts["cache"]["folder"]))
    for alias, there in facts["cache"]["models"].items():
        rows.append(("cache", f"{alias}: {'there' if there else 'loading it fetches it'}"))
    OUT.print(facts_table(rows))
    OUT.print()
    for check in facts["checks"]:
        mark = Text("✔ ", "green") if check["ok"] else Text("✘ ", "bold red")
        OUT.print(mark.append(plain(check["name"]), style="default"))
