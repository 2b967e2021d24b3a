"""Steering by a reader: find the edit under which it would give the answers that you want.

Over ordinary instructions the target's activations are shown to the decoder, and the loss of the
wanted answers is differentiated through the decoder's input back into the target (Pan et al. 2024,
arXiv 2412.08686). Knows edits, readers and gradients; knows no text but the questions.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trimtab import chat
from trimtab.adapter import Adapter, fresh
from trimtab.artifact import Meta, check_free
from trimtab.edits import Add, Edit
from trimtab.errors import ChatError, PlaceError
from trimtab.latentqa.data import Pairs, Seen, read_qa, sentence_qa
from trimtab.latentqa.passes import cut
from trimtab.latentqa.reader import Reader, Shown, record
from trimtab.lm import LM
from trimtab.place import LayerSpec, Place, TokenSpec
from trimtab.products import frozen
from trimtab.taps import Stop

Find = Literal["lora", "add"]
RATES = {"lora": 1e-4, "add": 3e-4}  # of learning, where none is given
ALPHA = 2  # of an adapter, in its rank: what comes of A and B is doubled


def steer(
    lm: LM,
    reader: Reader,
    qa_pairs: Any,
    prompts: Sequence[Any],
    *,
    find: Find = "lora",
    per_layer: bool = True,
    layers: LayerSpec | None = None,
    samples: int = 30,
    questions: int = 2,
    rank: int = 8,
    lr: float | None = None,
    max_dose: float | None = 0.03,
    tokens: TokenSpec = "all",
    seed: int = 0,
    name: str | None = None,
    out: str | Path | None = None,
    show_progress: bool = True,
) -> Edit:
    """The edit of ``lm`` under which ``reader`` gives the wanted answers.

    ``qa_pairs``: [[question, answer], ...], a control file, or one sentence ("be a passionate
    vegan"), of which templates make pairs. ``prompts``: ordinary instructions, each a user turn or
    a (prompt, answer) pair; ``samples`` of them are gone through one by one, with so many
    ``questions`` each.

    ``find`` "lora": an ``Adapter`` of this ``rank`` beside all linear modules of the blocks
    ``layers`` (default: 0 up to the read layer). "add": one vector per layer (``Add``).
    ``per_layer``: a loss at each of the layers, with the stream detached between them, so that each
    layer's loss moves that layer's part only; else one loss at the read layer, through all below.

    ``lr`` is Adam's: of the matrices (default 1e-4), or of vectors in units of each layer's mean
    activation length (default 3e-4). ``max_dose`` bounds an added vector's length in those units
    (None: no bound). The artifact goes to ``out`` if that is given.
    """
    if find not in ("lora", "add"):
        raise ValueError(f"find is 'lora' or 'add', not {find!r}")
    if out is not None:
        check_free(out)
    pairs, prompts = wanted(qa_pairs), list(prompts)
    if not prompts:
        raise ChatError("steer needs ordinary instructions to read: give some prompts")
    chosen = Place("resid", range(reader.read_layer + 1) if layers is None else layers)
    numbers = chosen.layer_indices(lm.n_layers)
    rows = [reader._seen(prompt) for prompt in prompts]
    place, lr = chosen.at(layers=numbers, tokens=tokens), RATES[find] if lr is None else lr
    form: _Vector | _Matrices
    if find == "add":
        form = _Vector(place, _mean_lengths(lm, rows[:16], numbers, reader.wiring.last), lm.width)
    else:
        form = _Matrices(place, lm, numbers, rank, seed)
    optimizer = torch.optim.Adam(form.parameters, lr=lr)
    drawn, losses = random.Random(seed), list[float]()
    order = [r for _ in range(-(-samples // len(rows))) for r in drawn.sample(rows, len(rows))]
    read = numbers if per_layer else (reader.read_layer,)
    if numbers[0] > read[-1]:
        raise PlaceError(
            f"layers {chosen.layers} lie above layer {read[-1]}, which is read; name lower ones"
        )
    with _fixed(reader):
        for row in tqdm(order[:samples], "steering", disable=not show_progress):
            asked = drawn.sample(list(pairs), min(questions, len(pairs)))
            with cut(lm) if per_layer else nullcontext():
                shown = _shown(lm, reader, form.edit(), row, read)
            loss = _loss(reader, shown, asked)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            form.bound(max_dose)
            losses.append(float(loss.detach()))
    told = {"find": find, "per_layer": per_layer, "lr": lr, "samples": samples}
    made_by = {"method": "latentqa steering", **told, "losses": [round(x, 4) for x in losses]}
    edit = form.edit(detach=True)._with(meta=Meta(name, lm.describe(), made_by))
    if out is not None:
        edit.save(out)
    return edit


def wanted(qa_pairs: Any) -> Pairs:
    """The pairs of a list, of a control file or mapping, or made of one sentence."""
    if isinstance(qa_pairs, str) and not qa_pairs.endswith((".json", ".jsonl")):
        return sentence_qa(qa_pairs)
    if isinstance(qa_pairs, str | Path | Mapping):
        table = read_qa(qa_pairs)
    else:
        table = read_qa({"": [list(pair) for pair in qa_pairs]})
    pairs = tuple(pair for own in table.values() for pair in own)
    if not pairs:
        raise ChatError("there are no question-answer pairs to steer by: give at least one")
    return pairs


# -- losses ----------------------------------------------------------------------------------------


def _shown(lm: LM, reader: Reader, edit: Edit, row: Seen, layers: Sequence[int]) -> list[Shown]:
    """What the reader is shown of a row at each of ``layers``, under an edit and with its graph."""
    batch = chat.pad([chat.Encoded(row.ids, row.start + 1)], 0).to(lm.device)
    lengths, last = batch.lengths.tolist(), reader.wiring.last
    call = lm._call(batch, edit, lengths)
    place = Place("resid", list(layers), "answer" if last is None else f"answer[-{last}:]")
    tap = lm._add_reader(call, place, batch.prompt_len.tolist(), lengths)
    call.stop = True
    with frozen(lm.model), lm.taps.carry(call, lm.waits), suppress(Stop):
        lm.forward(batch.ids, None, batch.positions, use_cache=False)
    values = tap.track().chunks[0].values  # [N, L, D]
    return [Shown(own, len(row.ids) - len(own)) for own in values.unbind(1)]


def _loss(reader: Reader, shown: Sequence[Shown], pairs: Sequence[tuple[str, str]]) -> Tensor:
    """The wanted answers' loss, a mean over all that is shown."""
    rows = [reader.dialogue.row(len(s.values), *pair) for s in shown for pair in pairs]
    sums, counts = reader.losses(rows, [s for s in shown for _ in pairs])
    return sums.sum() / counts.sum()


# -- what is found ---------------------------------------------------------------------------------


class _Vector:
    """A vector per layer, in units of the layer's mean activation length [L]."""

    def __init__(self, place: Place, lengths: Tensor, width: int) -> None:
        self.place, self.lengths = place, lengths[:, None]
        self.dose = torch.zeros(len(lengths), width, device=lengths.device, requires_grad=True)
        self.parameters = [self.dose]

    def edit(self, detach: bool = False) -> Edit:
        dose = self.dose.detach() if detach else self.dose
        return Add(self.place, dose * self.lengths)

    @torch.no_grad()
    def bound(self, limit: float | None) -> None:
        """Shorten vectors that are longer than ``limit``."""
        if limit is not None:
            size = torch.linalg.vector_norm(self.dose, dim=-1, keepdim=True)
            self.dose.mul_((limit / size.clamp_min(1e-12)).clamp_max(1.0))


class _Matrices:
    """Two matrices beside each linear module of some layers; A is random, B starts at zero."""

    def __init__(self, place: Place, lm: LM, layers: Sequence[int], rank: int, seed: int) -> None:
        made = fresh(lm.anatomy.linear_sizes(layers), rank, ALPHA * rank, seed)
        self.modules = {
            name: replace(
                low,
                down=low.down.to(lm.device).requires_grad_(),
                up=low.up.to(lm.device).requires_grad_(),
            )
            for name, low in made.items()
        }
        self.place = place
        self.parameters = [t for low in self.modules.values() for t in (low.down, low.up)]

    def edit(self, detach: bool = False) -> Edit:
        if not detach:
            return Adapter(self.place, self.modules)
        fixed = {
            name: replace(low, down=low.down.detach(), up=low.up.detach())
            for name, low in self.modules.items()
        }
        return Adapter(self.place, fixed)

    def bound(self, limit: float | None) -> None:
        """Matrices have no length to be bounded."""


def _mean_lengths(lm: LM, rows: Sequence[Seen], layers: Sequence[int], last: int | None) -> Tensor:
    """The mean length of the shown activations at each layer [L]."""
    found = torch.cat(record(lm, rows, layers, last).rows()).float()
    lengths: Tensor = torch.linalg.vector_norm(found, dim=-1).mean(0)
    return lengths.to(lm.device)


@contextmanager
def _fixed(reader: Reader) -> Iterator[None]:
    """The reader's own parameters are not learned here."""
    was = [p.requires_grad for p in reader.lora.parameters()]
    reader.lora.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(reader.lora.parameters(), was, strict=True):
            parameter.requires_grad_(flag)
