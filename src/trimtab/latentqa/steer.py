"""Steering by a reader: find the edit under which it would give the answers that you want.

Over ordinary instructions the target's activations are shown to the decoder, and the loss of the
wanted answers is differentiated through the decoder's input back into the target (Pan et al. 2024,
arXiv 2412.08686). Knows edits, readers and gradients; knows no text but the questions.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trimtab import chat
from trimtab.artifact import Meta, check_free
from trimtab.edits import Add, Edit, LowRank, wide
from trimtab.errors import ChatError
from trimtab.latentqa.data import Pairs, Seen, read_qa, sentence_qa
from trimtab.latentqa.reader import Reader, Shown, record
from trimtab.lm import LM
from trimtab.place import LayerSpec, Place, Selection, Tokens, TokenSpec
from trimtab.products import frozen
from trimtab.taps import Stop

Find = Literal["lora", "add"]


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
    lr: float = 3e-4,
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

    ``find`` "lora": a low-rank map (``LowRank``) at each of ``layers`` (default: 0 up to the read
    layer). Unlike the paper's it acts on the residual stream, not inside the weights, so it
    composes with other edits and can be another one in each row. "add": one vector per layer
    (``Add``). ``per_layer``: a loss at each of the layers, with the stream detached between them,
    so that each layer's loss moves that layer's part only; else one loss at the read layer,
    through all below.

    ``lr`` is Adam's, in units of each layer's mean activation length. ``max_dose`` bounds an added
    vector's length in those units (None: no bound). The artifact goes to ``out`` if that is given.
    """
    if find not in ("lora", "add"):
        raise ValueError(f"find is 'lora' or 'add', not {find!r}")
    if out is not None:
        check_free(out)
    pairs, prompts = wanted(qa_pairs), list(prompts)
    if not prompts:
        raise ChatError("steer needs ordinary instructions to read: give some prompts")
    top = reader.read_layer
    chosen = Place("resid", range(top + 1) if layers is None else layers)
    numbers = chosen.layer_indices(lm.n_layers)
    rows = [reader._seen(prompt) for prompt in prompts]
    lengths = _mean_lengths(lm, rows[:16], numbers, reader.wiring.last)
    place = chosen.at(layers=numbers, tokens=tokens)
    form = (
        _Vector(place, lengths, lm.width)
        if find == "add"
        else _Map(place, lengths, lm.width, rank, seed)
    )
    optimizer = torch.optim.Adam(form.parameters, lr=lr)
    drawn, losses = random.Random(seed), list[float]()
    order = [r for _ in range(-(-samples // len(rows))) for r in drawn.sample(rows, len(rows))]
    measure = _each_layer if per_layer else _deepest
    with _fixed(reader):
        for row in tqdm(order[:samples], "steering", disable=not show_progress):
            asked = drawn.sample(list(pairs), min(questions, len(pairs)))
            loss = measure(lm, reader, form.edit(), row, asked)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            form.bound(max_dose)
            losses.append(float(loss.detach()))
    made_by: dict[str, Any] = {
        "method": "latentqa steering",
        "find": find,
        "per_layer": per_layer,
        "lr": lr,
    }
    made_by |= {"samples": samples, "losses": [round(x, 4) for x in losses]}
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


def _each_layer(
    lm: LM, reader: Reader, edit: Edit, row: Seen, pairs: Sequence[tuple[str, str]]
) -> Tensor:
    """The mean over layers of the wanted answers' loss, each through its own layer's part only."""
    before = _before(lm, edit, row, reader.wiring.last)  # [N, L, D], no graph
    positions = torch.arange(len(row.ids) - len(before), len(row.ids))
    touched = _touched(edit, row, positions).to(before.device)[:, None]
    dtype = before.dtype if edit.narrow else wide(before.dtype)
    shown = []
    for i in range(before.shape[1]):
        values = {n: v[i][None, None].to(before.device, dtype) for n, v in edit.values().items()}
        after = edit.write(before[None, :, i], values)[0]
        after = torch.where(touched, after, before[:, i])
        shown.append(Shown(after, int(positions[0])))
    return _loss(reader, shown, pairs)


def _deepest(
    lm: LM, reader: Reader, edit: Edit, row: Seen, pairs: Sequence[tuple[str, str]]
) -> Tensor:
    """The wanted answers' loss at the read layer, differentiated through all layers below."""
    batch = chat.pad([chat.Encoded(row.ids, row.start + 1)], 0).to(lm.device)
    lengths = batch.lengths.tolist()
    call = lm._call(batch, edit, lengths)
    last = reader.wiring.last
    place = Place("resid", reader.read_layer, "answer" if last is None else f"answer[-{last}:]")
    tap = lm._add_reader(call, place, batch.prompt_len.tolist(), lengths)
    call.stop = True
    with frozen(lm.model), lm.taps.carry(call, lm.waits), suppress(Stop):
        lm.forward(batch.ids, None, batch.positions, use_cache=False)
    values = tap.track().chunks[0].values[:, 0]
    return _loss(reader, [Shown(values, len(row.ids) - len(values))], pairs)


def _loss(reader: Reader, shown: Sequence[Shown], pairs: Sequence[tuple[str, str]]) -> Tensor:
    rows = [reader.dialogue.row(len(s.values), *pair) for s in shown for pair in pairs]
    sums, counts = reader.losses(rows, [s for s in shown for _ in pairs])
    return sums.sum() / counts.sum()


def _before(lm: LM, edit: Edit, row: Seen, last: int | None) -> Tensor:
    """What arrives at each layer's edit, with the edits of the layers below in force: [N, L, D]."""
    tokens = "answer" if last is None else f"answer[-{last}:]"
    place = edit.place.at(tokens=tokens, before=True)
    batch = chat.pad([chat.Encoded(row.ids, row.start + 1)], 0)
    with torch.no_grad():
        return lm.record(batch, place, edits=edit, show_progress=False)[0]


def _touched(edit: Edit, row: Seen, positions: Tensor) -> Tensor:
    """Which of these positions the edit acts at; the prompt ends where the row does."""
    tokens = Tokens.of(edit.place.tokens)
    selection = Selection.of([tokens], [row.start + 1], [len(row.ids)])
    return selection.mask(positions[None])[0]


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


class _Map:
    """A low-rank map per layer: keys of about unit products, values that start at zero."""

    def __init__(self, place: Place, lengths: Tensor, width: int, rank: int, seed: int) -> None:
        self.place, self.lengths = place, lengths[:, None, None]
        generator = torch.Generator().manual_seed(seed)
        key = torch.randn(len(lengths), rank, width, generator=generator).to(lengths.device)
        self.key = key.requires_grad_()
        self.value = torch.zeros_like(key, requires_grad=True)
        self.parameters = [self.key, self.value]

    def edit(self, detach: bool = False) -> Edit:
        key, value = self.key / self.lengths, self.value * self.lengths
        return LowRank(self.place, *((t.detach() if detach else t) for t in (key, value)))

    def bound(self, limit: float | None) -> None:
        """A map has no length to be bounded."""


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
