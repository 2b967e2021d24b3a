"""Reader: a decoder that answers questions about activations, in plain language.

After LatentQA (Pan et al. 2024, arXiv 2412.08686). The decoder is the model itself with a low-rank
adapter; what is read is written into its residual stream at placeholder tokens. Knows recordings,
token ids and passes; knows nothing of how it was trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab import artifact, chat
from trimtab.artifact import Meta, Parts, check_model, register
from trimtab.chat import Batch
from trimtab.decode import Column, Sampling, columns
from trimtab.edits import Add, Edit, Replace, wide
from trimtab.errors import ArtifactError, ChatError, PlaceError
from trimtab.harvest import head_at
from trimtab.latentqa.data import Item, Pairs, attach, read_items, read_qa, seen
from trimtab.latentqa.dialogue import ROLE, Dialogue, Row
from trimtab.latentqa.lora import Lora
from trimtab.latentqa.passes import Shared, checkpointed, only
from trimtab.latentqa.sheet import Sheet, lay_out, neighbours, side_by_side
from trimtab.lm import LM, listed_prompts
from trimtab.merge import merge
from trimtab.place import Place
from trimtab.products import frozen
from trimtab.recording import Recording
from trimtab.taps import Call, Clock

Write = Literal["replace", "add"]
View = Literal["real", "shuffled", "none", "text", "words"]
_WIRED = ("write_layer", "write", "last", "align", "role")  # beside the layers that are read


class Shown(NamedTuple):
    """Activations to be written [N, D], and the position that the first had in the target."""

    values: Tensor
    first: int = 0


@dataclass(frozen=True)
class Wiring:
    """How activations get from the target into the decoder.

    ``read_layers``: the layers that it was trained to read, ``write_layer``: whose output they
    replace. ``write`` "replace": x' = v. "add": x' = x + |x| v / |v|, norm-matched as in activation
    oracles (arXiv 2512.15674). ``last``: at most so many of the shown tokens, the last ones.
    ``align``: the placeholders get the position ids that the tokens had in the target, which
    matters for learned positions only. ``role`` names the decoder's own turns.
    """

    read_layers: tuple[int, ...]
    write_layer: int = 0
    write: Write = "replace"
    last: int | None = None
    align: bool = True
    role: str = ROLE

    def __post_init__(self) -> None:
        if self.write not in ("replace", "add"):
            raise ValueError(f"write is 'replace' or 'add', not {self.write!r}")
        if self.last is not None and self.last < 1:
            raise ValueError(f"last is 1 or more, or None for all, not {self.last!r}")

    def within(self, n_layers: int) -> "Wiring":
        """The same with layers counted from 0; raises PlaceError for one that is not there."""
        read = Place("resid", self.read_layers).layer_indices(n_layers)
        (write,) = Place("resid", self.write_layer).layer_indices(n_layers)
        return replace(self, read_layers=read, write_layer=write)


@dataclass(eq=False)
class Reader:
    """Asks a model's activations in plain language: ``reader.ask(prompt, ["Is it honest?"])``.

    ``Reader.load(path, lm)`` reads what ``train`` wrote, and PEFT folders of published decoders.
    ``qa`` is the table that it was trained with, as long as it is in memory: it is not saved.
    After each call the model is as it was before.
    """

    lm: LM
    lora: Lora
    wiring: Wiring
    meta: Meta = field(default_factory=Meta)
    qa: Mapping[str, Pairs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wiring = self.wiring.within(self.lm.n_layers)
        for layer in (*self.wiring.read_layers, self.wiring.write_layer):
            self.lm.anatomy.tap("resid", layer)
        self.dialogue = Dialogue(self.lm.tokenizer, self.wiring.role, ends=self.lm.end_ids)
        self._last: Call | None = None

    def __repr__(self) -> str:
        w = self.wiring
        return f"Reader(layers {list(w.read_layers)} -> {w.write} at {w.write_layer}, {self.lm})"

    @property
    def read_layer(self) -> int:
        """The layer that is read unless another is asked for: the middle one of the trained."""
        return self.wiring.read_layers[len(self.wiring.read_layers) // 2]

    # -- what is shown -----------------------------------------------------------------------------

    def show(
        self, prompts: Sequence[Any], layer: int | None = None, *, edits: Any = None
    ) -> list[Shown]:
        """The activations that the decoder is shown for prompts, dialogues, pairs or Items."""
        layer = self.read_layer if layer is None else layer
        rows = [self._seen(prompt) for prompt in prompts]
        recording = record(self.lm, rows, [layer], self.wiring.last, edits=edits)
        firsts = [len(row.ids) - n for row, n in zip(rows, recording.lengths, strict=True)]
        return [Shown(r[:, 0], f) for r, f in zip(recording.rows(), firsts, strict=True)]

    def _seen(self, prompt: Any) -> Any:
        if isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[1], str):
            turns = prompt[0]
            turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
            prompt = [*turns, {"role": "assistant", "content": prompt[1]}]
        if _is_item(prompt):
            (prompt,) = read_items(prompt)
        found = seen(self.lm.tokenizer, prompt)
        self.lm._check_length(len(found.ids))
        return found

    def _given(self, target: Any, layer: int | None) -> tuple[list[Shown], bool]:
        """What to show for whatever was given, and whether it was a single one."""
        if isinstance(target, Recording):
            return self._recorded(target, layer), len(target) == 1
        listed, single = _listed(target)
        return self.show(listed, layer), single

    def _recorded(self, recording: Recording, layer: int | None) -> list[Shown]:
        layers = recording.layers
        layer = layer if layer is not None else layers[0] if len(layers) == 1 else self.read_layer
        if layer not in layers or recording.place.site != "resid":
            raise PlaceError(
                f"the reader reads resid at layer {layer}, but the recording holds "
                f"{recording.place.site} at {list(layers)}; record 'resid@{layer}', or name "
                "another of its layers with layer="
            )
        if recording.width != self.lm.width:
            raise PlaceError(f"the recording has width {recording.width}, not {self.lm.width}")
        index = layers.index(layer)
        return [Shown(row[:, index]) for row in recording.rows()]

    # -- asking ------------------------------------------------------------------------------------

    def ask(
        self,
        target: Any,
        questions: Sequence[str] | str,
        *,
        layer: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
        evidence: bool = False,
        batch_size: int = 64,
    ) -> Any:
        """Answers to questions about a prompt's activations: a list in the order of the questions.

        ``target``: a prompt, a (prompt, answer) pair, a dialogue, an Item or its dict, a Recording,
        or a list of these, which gives a list of lists. All questions about all targets run as one
        batch (at most ``batch_size`` rows) on the KV cache, and what the questions about one target
        share is computed once. ``evidence=True`` gives ``Evidence`` instead of text.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        if not asked or not all(isinstance(q, str) and q for q in asked):
            raise ChatError("ask takes a question, or a list of them, each with some text")
        shown, single = self._given(target, layer)
        options = _Options(Sampling(temperature, seed=seed), max_new_tokens, batch_size)
        counts = [len(s.values) for s in shown]
        answers: list[Any] = self._answers(counts, shown, asked, options)
        if evidence:
            answers = self._evidence(shown, asked, answers, options)
        return answers[0] if single else answers

    def ask_layers(
        self, target: Any, questions: Sequence[str] | str, layers: Sequence[int], **options: Any
    ) -> dict[int, Any]:
        """An answer per layer: what is read from each of ``layers``."""
        return {i: self.ask(target, questions, layer=i, **options) for i in layers}

    def _answers(
        self,
        counts: Sequence[int],
        shown: Sequence[Shown | None],
        questions: Sequence[str],
        options: "_Options",
    ) -> list[list[str]]:
        """Answers to all questions for each target; ``counts`` placeholders, written or not."""
        step = max(1, options.batch_size // len(questions))
        answers: list[list[str]] = []
        for i in range(0, len(shown), step):
            group = [
                [self.dialogue.row(count, q) for q in questions] for count in counts[i : i + step]
            ]
            answers += self._batch_of_answers(group, shown[i : i + step], options)
        return answers

    def _batch_of_answers(
        self, groups: list[list[Row]], shown: Sequence[Shown | None], options: "_Options"
    ) -> list[list[str]]:
        n = len(groups[0])
        ids: list[list[int]] = [[] for group in groups for _ in group]
        with self.lm.taps.held(self.lm.waits):
            for column in self._columns(groups, shown, options):
                for row, token in zip(column.rows, column.tokens, strict=True):
                    ids[row].append(token)
        texts = [self._text(row) for row in ids]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def _columns(
        self, groups: list[list[Row]], shown: Sequence[Shown | None], options: "_Options"
    ) -> Iterator[Column]:
        """The answers' tokens, a column at a time; the adapter is worn inside each pass only."""
        n, flat = len(groups[0]), [row for group in groups for row in group]
        spread = [s for s in shown for _ in range(n)]
        batch, width = side_by_side(groups, chat.pad_id(self.lm.tokenizer))
        batch = batch.to(self.lm.device)
        longest = batch.ids.shape[1]
        self.lm._check_length(longest + 1)
        context = self.lm.context or longest + options.room
        return columns(
            self.lm,
            batch,
            self._call(flat, spread, batch),
            sampling=options.sampling,
            max_new_tokens=min(options.room, context - longest),
            stop=lambda _, made: self.dialogue.stops(made),
            engine=Shared(self.lm, self.worn, n, width, self._shifts(flat, spread)),
        )

    def stream(
        self,
        target: Any,
        question: str,
        *,
        layer: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to one question about one target, piece by piece as it comes."""
        shown, _ = self._given(target, layer)
        if len(shown) != 1:
            raise ChatError(f"stream takes one target, not {len(shown)}; use ask for many")
        options = _Options(Sampling(temperature, seed=seed), max_new_tokens, 1)
        groups = [[self.dialogue.row(len(shown[0].values), question)]]
        return self._pieces(self._columns(groups, shown, options))

    def _pieces(self, found: Iterator[Column]) -> Iterator[str]:
        ids: list[int] = []
        told = ""
        for column in found:
            ids += column.tokens
            text = self._text(ids)
            if text.startswith(told) and len(text) > len(told) and not text.endswith("\ufffd"):
                yield text[len(told) :]
                told = text

    def _text(self, ids: list[int]) -> str:
        body = ids[:-1] if self.dialogue.stops(ids) else ids
        return chat.decode(self.lm.tokenizer, body).strip()

    # -- likelihoods -------------------------------------------------------------------------------

    def loss(self, items: Any, qa: Any = None, *, view: View = "real") -> Tensor:
        """The mean cross entropy of the answers' tokens, in the caller's gradient mode.

        ``items`` as for ``train``; what is asked about them is said in ``asked_of``.
        """
        rows, shown = self.pairs(items, qa, view)
        values, counts = self.losses(rows, shown)
        return values.sum() / counts.sum()

    def asked_of(self, items: Any, qa: Any = None) -> list[Item]:
        """Items with what is asked about them: their own questions, and their label's in ``qa``.

        Without ``qa``, items that have no question get those that the reader was trained with.
        Items that are left without one are left out. Raises ChatError if all are.
        """
        listed = read_items(items)
        if qa is None:
            listed = [i if i.qa else replace(i, qa=self.qa.get(i.label, ())) for i in listed]
        asked = attach(listed, None if qa is None else read_qa(qa))
        if not asked:
            raise ChatError("none of the items has a question: give qa= with their labels")
        return asked

    def pairs(
        self, items: Any, qa: Any = None, view: View = "real", shown: Sequence[Shown] | None = None
    ) -> tuple[list[Row], list[Shown | None]]:
        """The decoder's rows for each item and each of its QA, and what is written into each.

        ``view``: "real" activations; "shuffled", another item's; "none", as many placeholders and
        nothing written; "text", the whole dialogue to be read in their place; "words", only the
        part of it whose activations are shown. ``shown``: activations that are there already.
        """
        listed = self.asked_of(items, qa)
        if view in ("text", "words"):
            seen_ = [_text_of(item, item.hidden if view == "words" else 0) for item in listed]
            rows = [
                self.dialogue.row(t, *p) for t, i in zip(seen_, listed, strict=True) for p in i.qa
            ]
            return rows, [None] * len(rows)
        real = self.show(listed) if shown is None else list(shown)
        given = shuffled(real) if view == "shuffled" else real
        both = [
            (self.dialogue.row(len(s.values), *pair), None if view == "none" else s)
            for item, s in zip(listed, given, strict=True)
            for pair in item.qa
        ]
        return [row for row, _ in both], [s for _, s in both]

    def losses(
        self, rows: Sequence[Row], shown: Sequence[Shown | None], *, worn: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The summed cross entropy of each row's labels [B], and how many they are [B].

        ``shown`` None for a row: nothing is written, its placeholders are what they are. The LM
        head is applied at the labels' positions only, and what neighbouring rows about the same
        activations share is computed once, where the model takes such a layout. ``worn=False``
        leaves the adapter off (reading without training, as Patchscopes, arXiv 2401.06102).
        """
        trees = len(rows) > 1 and self.lm.takes_trees()
        with self.worn() if worn else nullcontext(), frozen(self.lm.model):
            each = self._label_losses(rows, shown, trees)
        counts = torch.tensor([len(row.labels) for row in rows], device=each.device)
        sums = torch.stack([part.sum() for part in each.split(counts.tolist())])
        return sums, counts

    def _label_losses(
        self, rows: Sequence[Row], shown: Sequence[Shown | None], trees: bool
    ) -> Tensor:
        """Cross entropy at every label, end to end [sum of labels]."""
        groups = neighbours(rows, shown, trees)
        sheet = lay_out(rows, groups, chat.pad_id(self.lm.tokenizer))
        firsts, given = [rows[i] for i in sheet.first], [shown[i] for i in sheet.first]
        positions = sheet.positions + self._shifts(firsts, given)[:, None]
        self.lm._check_length(int(positions.max()) + 1)
        call = self._call(firsts, given, Batch(sheet.ids))
        with ExitStack() as stack:
            stack.enter_context(self.lm.taps.carry(call, self.lm.waits))
            stack.enter_context(head_at(self.lm.model, sheet.where, sheet.ids))
            if not call.checkpointed:  # there blocks are computed again without this
                for layer, where in self._needed(sheet, firsts, given).items():
                    module, side = self.lm.anatomy.taps.get(("mlp", layer), (None, ""))
                    if module is not None and side == "out":
                        stack.enter_context(only(module, where))
            out = self.lm.forward(sheet.ids, sheet.mask, positions, use_cache=False)
        self._last = call if call.checkpointed else None
        logits = out.logits.reshape(-1, out.logits.shape[-1])
        logits = logits.to(wide(logits.dtype))
        return nn.functional.cross_entropy(logits, sheet.labels.to(logits.device), reduction="none")

    def _needed(
        self, sheet: Sheet, rows: Sequence[Row], shown: Sequence[Shown | None]
    ) -> dict[int, Tensor]:
        """The tokens in R * T whose MLP matters, for the layers where those are not all.

        What leaves the last block is read at the labels only, and what leaves the one that is
        written to is replaced at the placeholders.
        """
        found = {}
        if self.wiring.write == "replace":
            kept = torch.ones(sheet.ids.shape, dtype=torch.bool)
            for i, (row, given) in enumerate(zip(rows, shown, strict=True)):
                if given is not None:
                    kept[i, row.start : row.start + row.slots] = False
            found[self.wiring.write_layer] = kept.flatten().nonzero()[:, 0]
        return found | {self.lm.n_layers - 1: sheet.where}

    @contextmanager
    def training_pass(self, checkpointing: bool, bf16: bool) -> Iterator[Any]:
        """``losses`` for a pass whose backward pass is run inside too.

        With ``checkpointing`` blocks are computed again for it, with the adapter and the edits in
        force; ``bf16`` computes in bfloat16 where torch thinks that safe.
        """
        device = self.lm.device.type
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=bf16))
            stack.enter_context(self.worn())
            stack.enter_context(frozen(self.lm.model))
            if checkpointing:
                stack.enter_context(checkpointed(self.lm))

            def losses(rows: Sequence[Row], shown: Sequence[Shown | None]) -> Any:
                found = self.losses(rows, shown, worn=False)
                if checkpointing and self._last is not None:
                    stack.enter_context(self.lm.replay(self._last))
                return found

            yield losses

    def choose(
        self, target: Any, question: str, options: Sequence[str], *, layer: int | None = None
    ) -> Any:
        """The option that the decoder finds likeliest, by mean log-probability per token.

        Returns (index, log-probabilities [options]); a list of these for many targets.
        """
        shown, single = self._given(target, layer)
        found = []
        for s in shown:
            rows = [self.dialogue.row(len(s.values), question, option) for option in options]
            with torch.no_grad():
                sums, counts = self.losses(rows, [s] * len(rows))
            scores = -(sums / counts)
            found.append((int(scores.argmax()), scores.cpu()))
        return found[0] if single else found

    def _evidence(
        self,
        shown: Sequence[Shown],
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        options: "_Options",
    ) -> "list[list[Evidence]]":
        """Each answer beside what is said without its activations."""
        counts = [len(s.values) for s in shown]
        nothing = self._answers(counts, [None] * len(shown), questions, options)
        others = list(shuffled(shown))
        mixed = self._answers([len(s.values) for s in others], others, questions, options)
        return [
            [
                Evidence(a, none, other, self._gain(s, question, a))
                for question, a, none, other in zip(questions, *three, strict=True)
            ]
            for s, *three in zip(shown, answers, nothing, mixed, strict=True)
        ]

    @torch.no_grad()
    def _gain(self, shown: Shown, question: str, answer: str) -> float:
        row = self.dialogue.row(len(shown.values), question, answer or "...")
        sums, counts = self.losses([row, row], [shown, None])
        return float((sums[1] - sums[0]) / counts[0])

    # -- passes ------------------------------------------------------------------------------------

    @contextmanager
    def worn(self) -> Iterator[None]:
        """The decoder instead of the target: the passes inside wear the adapter."""
        with self.lm.taps.held(self.lm.waits), self.lora.on(self.lm):
            yield

    def edit(self, row: Row, shown: Shown | None) -> Edit | None:
        """What writes the activations [N, D] into a row's placeholders."""
        if shown is None:
            return None
        if len(shown.values) != row.slots:
            raise PlaceError(
                f"{len(shown.values)} activations for {row.slots} placeholders; make the row with "
                "as many"
            )
        tokens = f"all[{row.start}:{row.start + row.slots}]"
        place = Place("resid", self.wiring.write_layer, tokens)
        values = shown.values[None, None]
        if self.wiring.write == "replace":
            return Replace(place, values)
        values = values.to(wide(values.dtype))
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_min(1e-12)
        return Add(place, values / length, relative=True)

    def _call(self, rows: Sequence[Row], shown: Sequence[Shown | None], batch: Batch) -> Call:
        edits = [self.edit(row, s) for row, s in zip(rows, shown, strict=True)]
        ends = [len(row.ids) for row in rows]
        steps = merge(edits, [row.answer for row in rows], ends, self.lm.n_layers, self.lm.width)
        return Call(Clock(batch.mask), steps)

    def _shifts(self, rows: Sequence[Row], shown: Sequence[Shown | None]) -> Tensor:
        """How far position ids move so that placeholders stand where the tokens stood, [B]."""
        if not self.wiring.align:
            return torch.zeros(len(rows), dtype=torch.long)
        pairs = zip(rows, shown, strict=True)
        return torch.tensor([0 if s is None else max(0, s.first - r.start) for r, s in pairs])

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the reader as an artifact folder; its matrices in ``dtype``."""
        w = self.wiring
        extra = {name: getattr(w, name) for name in _WIRED}
        extra |= {"read_layers": list(w.read_layers), "lora": self.lora.config()}
        tensors = {n: t.to(dtype) for n, t in self.lora.tensors().items()}
        place = str(Place("resid", w.read_layers))
        artifact.save(path, Parts("reader", self.meta, place, extra, tensors))

    @staticmethod
    def load(path: str | Path, lm: LM, **wiring: Any) -> "Reader":
        """Read a reader for this model: an artifact folder, or a published decoder's PEFT folder.

        A PEFT folder does not say how it was wired: give ``read_layer=`` (default 15), and
        ``write_layer``, ``write``, ``last``, ``align``, ``role`` where they are not the paper's.
        For an artifact these take the place of what it was trained with. Raises ArtifactError.
        """
        folder, given = artifact.user_path(path), _given_wiring(lm, wiring)
        if (folder / "adapter_config.json").is_file():
            lora = Lora.read(folder).to(lm.device)
            return Reader(lm, lora, Wiring(**({"read_layers": (15,)} | given))).checked()
        if (kind := artifact.read_header(folder)["kind"]) != "reader":
            raise ArtifactError(
                f"{folder} is of kind {kind!r}, and only a 'reader' can be asked; give a folder "
                "that latentqa.train or trimtab train-reader wrote"
            )
        saved: SavedReader = artifact.load_artifact(folder)
        return replace(saved, wiring=replace(saved.wiring, **given)).on(lm)

    def checked(self) -> "Reader":
        """This reader, if its adapter fits the model; raises ArtifactError."""
        with self.worn():
            return self


@dataclass(frozen=True)
class SavedReader:
    """A reader that was read from disk, without its model: ``tt.load(path).on(lm)``."""

    lora: Lora
    wiring: Wiring
    meta: Meta

    def on(self, lm: LM) -> Reader:
        """The reader of this model. Raises ArtifactError if it was made for another."""
        check_model(self.meta, lm.describe())
        return Reader(lm, self.lora.to(lm.device), self.wiring, self.meta).checked()


@dataclass(frozen=True)
class Evidence:
    """An answer, and what the reader says without seeing the activations.

    ``none``: its answer with no activations, ``shuffled``: with another's (or, for a single target,
    its own in another order). ``gain``: by how much the activations raise the mean log-probability
    of the answer's tokens; near or below 0 the reader merely talks.
    """

    answer: str
    none: str
    shuffled: str
    gain: float

    @property
    def confidence(self) -> float:
        """The probability of the answer per token against no activations: sigmoid(gain)."""
        return float(torch.sigmoid(torch.tensor(self.gain)))


@dataclass(frozen=True)
class _Options:
    """How answers are made."""

    sampling: Sampling
    room: int
    batch_size: int


def _is_item(target: Any) -> bool:
    """Whether this is an Item as a dict; a dict with a role is a message."""
    return isinstance(target, Mapping) and "role" not in target


def _listed(target: Any) -> tuple[list[Any], bool]:
    """What is asked about as a list, and whether there was a single one."""
    if isinstance(target, Item | tuple) or _is_item(target):
        return [target], True
    listed, single = listed_prompts(target)
    if not listed:
        raise ChatError("there is nothing to ask about: give a prompt, a dialogue or an Item")
    if single and isinstance(listed[0], list) and _is_item(listed[0][0]):
        return listed[0], False
    return listed, single


def _text_of(item: Item, hidden: int) -> str:
    return "\n".join(message["content"] for message in item.messages[hidden:])


def shuffled(shown: Sequence[Shown]) -> list[Shown]:
    """Each target's activations given to another; those of a single one in another order."""
    if len(shown) > 1:
        return [*shown[1:], shown[0]]
    order = torch.randperm(len(shown[0].values), generator=torch.Generator().manual_seed(0))
    return [shown[0]._replace(values=shown[0].values[order.to(shown[0].values.device)])]


def builtin(lm: LM) -> Path | None:
    """The reader that comes with the package for this model, if there is one."""
    for folder in sorted((Path(__file__).parent / "readers").glob("*/artifact.json")):
        model = artifact.read_header(folder.parent).get("model") or {}
        if model.get("fingerprint") == lm.describe()["fingerprint"]:
            return folder.parent
    return None


def record(
    lm: LM,
    rows: Sequence[Any],
    layers: Sequence[int],
    last: int | None = None,
    **options: Any,
) -> Recording:
    """Record the shown tokens of ``seen`` rows at the output of blocks; see ``LM.record``."""
    encoded = [chat.Encoded(row.ids, row.start + 1) for row in rows]  # an answer begins at its last
    batch = chat.pad(encoded, chat.pad_id(lm.tokenizer))
    place = Place("resid", list(layers), "answer" if last is None else f"answer[-{last}:]")
    return lm.record(batch, place, **({"show_progress": False} | options))


def _given_wiring(lm: LM, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Wiring that these keywords of ``Reader.load`` name."""
    if unknown := sorted(set(given) - {"read_layer", *_WIRED}):
        raise TypeError(
            f"Reader.load takes no {', '.join(unknown)}; it takes read_layer, {', '.join(_WIRED)}"
        )
    found = {name: given[name] for name in _WIRED if name in given}
    if "read_layer" in given:
        place = Place("resid", given["read_layer"])
        found["read_layers"] = place.layer_indices(lm.n_layers)
    return found


def _load(parts: Parts) -> SavedReader:
    extra = parts.extra
    wiring = Wiring(tuple(extra["read_layers"]), **{name: extra[name] for name in _WIRED})
    return SavedReader(Lora.built(parts.tensors, extra["lora"]), wiring, parts.meta)


register("reader", _load)
