"""The command show: what a saved artifact or recording says of itself. Loads no model."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from trimtab.cli.screen import OUT, accuracies, chart, facts_table, print_json

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def show(
    path: Annotated[Path, typer.Argument(help="The folder of an artifact or of a recording.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a saved artifact or recording is. Loads no model."""
    facts = _recording(path) if (path / "recording.json").is_file() else _artifact(path)
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    facts["bytes"] = sum(file.stat().st_size for file in files)
    if as_json:
        print_json(facts)
    else:
        OUT.print(facts_table([*_rows(facts)]))
        if isinstance(scores := facts.get("scores"), dict) and scores:
            OUT.print("", chart(scores), sep="\n")


def _artifact(path: Path) -> dict[str, Any]:
    import trimtab as tt
    from trimtab import adapter, artifact

    if path.is_file() or (path / adapter.CONFIG_NAME).is_file():
        # A foreign format: what can be said of it is what loading finds.
        made = tt.load(path)
        what = "file" if path.is_file() else "folder"
        kind = f"{type(made).__name__.lower()} from a foreign {what}"
        return {"path": str(path), "kind": kind, "place": str(made.place), **vars(made.meta)}
    parts = artifact.read(path)  # raises where the tensors are not as they were written
    facts = {"path": str(path), "kind": parts.kind, "place": parts.place, **vars(parts.meta)}
    if parts.kind == "probe":  # how well it read held-out prompts lies in its tensors
        own = {"layers": parts.extra.get("layers"), **accuracies(parts.tensors)}
        facts["scores"] = parts.meta.scores | own
    return facts | {"sha256": "as written"}


def _recording(path: Path) -> dict[str, Any]:
    from trimtab.recording import Recording

    recording = Recording.load(path)
    parts = [(str(p), recording[p]) for p in recording.places]
    return {
        "path": str(path),
        "kind": "recording",
        "model": recording.meta.get("model"),
        "rows": len(recording),
        "places": [
            {"place": p, "layers": len(r.layers), "tokens": sum(r.lengths), "width": r.width}
            for p, r in parts
        ],
    }


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The facts as lines of a table."""
    for key in ("name", "kind", "place", "rows"):
        if facts.get(key) is not None:
            yield key, facts[key]
    for one in facts.get("places", ()):
        shape = f"{one['layers']} layers × {one['width']} wide, {one['tokens']} tokens"
        yield "place", f"{one['place']}   {shape}"
    if isinstance(model := facts.get("model"), dict):
        known = defaultdict(lambda: "?", model)
        yield "model", "{id}, {layers} layers × {width} wide".format_map(known)
        yield "model", "revision {revision}, fingerprint {fingerprint}".format_map(known)
    if isinstance(made_by := facts.get("made_by"), dict):
        for key, value in made_by.items():
            yield "made by", f"{key}: {value}"
    yield "size", f"{facts['bytes'] / 1024:,.0f} KiB"
    if "sha256" in facts:
        yield "sha256", Text(facts["sha256"], "green")
