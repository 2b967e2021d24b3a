"""LM: a Hugging Face decoder that is run, generates, streams, records and scores, with edits.

Knows transformers, chat and taps; knows no method. Edits are arguments of a run: after a call
nothing on the model has changed.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trimtab import chat, models
from trimtab.anatomy import Anatomy
from trimtab.artifact import check_model
from trimtab.cache import sharing
from trimtab.chat import Batch, Encoded
from trimtab.compiled import Compiled
from trimtab.decode import Column, Engine, Sampling, columns, eager
from trimtab.edits import Edit, Readout
from trimtab.errors import ChatError, PlaceError
from trimtab.harvest import fits_trees, harvest, tokens_a_pass
from trimtab.merge import Edits, adapter_of, as_edits, merge, spread
from trimtab.place import FOREVER, Place, Selection, Tokens
from trimtab.products import Products, settled
from trimtab.recording import Recording
from trimtab.taps import Call, Clock, Reader, Taps

_OWN = {"top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"}


@dataclass
class Run:
    """What one forward pass gave: ``logits`` [B, T, V], and the ``recording`` that was asked for.

    Gradients flow through both. ``backward(loss)`` is ``loss.backward()`` with the run's edits kept
    alive, as gradient checkpointing needs: it computes blocks a second time.
    """

    logits: Tensor
    _call: Call = field(repr=False)
    _lm: "LM" = field(repr=False)

    @property
    def recording(self) -> Recording:
        """The recorded places, rows in the order of the batch."""
        readers = self._call.readers
        if not readers:
            raise PlaceError("nothing was recorded; name a place: lm(batch, record='resid@3')")
        return Recording({r.place: r.track() for r in readers}, {"model": self._lm.describe()})

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Differentiate ``loss`` (a function of this run), with the edits in force."""
        with self._lm.taps.replay(self._call, self._lm.waits):
            loss.backward(**options)


class Piece(str):
    """A piece of streamed text; ``reading`` is the probe's probability where it was predicted."""

    reading: float | None

    def __new__(cls, text: str, reading: float | None = None) -> "Piece":
        made = super().__new__(cls, text)
        made.reading = reading
        return made

    @property
    def text(self) -> str:
        """The text as a plain str."""
        return str(self)


class LM:
    """A language model whose activations can be read and written while it runs.

    ``LM(model, tokenizer)`` takes a Hugging Face causal LM that is loaded already (``tokenizer``
    may be None where text is not used); ``LM.load`` finds one. ``n_layers``, ``width``,
    ``tokenizer`` and ``model`` are plain facts. ``busy`` says what a second thread gets while the
    model runs: "wait" for its turn, or "raise" BusyError.

    >>> lm = LM.load("smollm2-135m")                                        # doctest: +SKIP
    >>> lm.generate("How was your day?", edits=0.5 * happiness)             # doctest: +SKIP
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, busy: Literal["wait", "raise"] = "wait"
    ) -> None:
        if busy not in ("wait", "raise"):
            raise ValueError(f"busy is 'wait' or 'raise', not {busy!r}")
        self.model, self.tokenizer, self.busy = model, tokenizer, busy
        self.anatomy = Anatomy.of(model)
        self.taps: Taps = _taps(model, self.anatomy)
        self.n_layers, self.width = self.anatomy.n_layers, self.anatomy.width
        self._accepts = set(inspect.signature(self._inner().forward).parameters)
        self.products = Products(model)
        self._trees: dict[Any, bool] = {}
        self._description: dict[str, Any] | None = None
        self._compiled: Compiled | None = None

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: Any = None,
        device: Any = None,
        busy: Literal["wait", "raise"] = "wait",
        **options: Any,
    ) -> "LM":
        """Load a model by alias, hub id, folder or .gguf file.

        ``options`` (``device_map``, ``quantization_config``, ``revision``, ...) go to transformers.
        Raises ArtifactError for a source that is not there.
        """
        return cls(*models.load(source, dtype=dtype, device=device, **options), busy=busy)

    def __repr__(self) -> str:
        facts = self.describe()
        return f"LM({facts['id']}, {self.n_layers} layers, width {self.width})"

    # -- facts -------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a second thread waits for its turn."""
        return self.busy == "wait"

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """The input embedding matrix [V, D]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def text_config(self) -> Any:
        """The config of the decoder."""
        return self._inner().config.get_text_config(decoder=True)

    @property
    def context(self) -> int | None:
        """The longest text that the model takes, where its config says so."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(value := getattr(self.text_config, name, None), int) and value > 0:
                return value
        return None

    @property
    def caches(self) -> bool:
        """Whether the model takes a cache of keys and values; recurrent ones keep another."""
        supports = getattr(self._inner(), "_supports_default_dynamic_cache", lambda: True)
        return "past_key_values" in self._accepts and bool(supports())

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        config = getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ends = self.text_config.eos_token_id if ends is None else ends
        listed = [ends] if isinstance(ends, int) else list(ends or [])
        own = getattr(self.tokenizer, "eos_token_id", None)
        return listed if own is None or own in listed else [*listed, own]

    def describe(self) -> dict[str, Any]:
        """Id, revision, width, layers and fingerprint: what an artifact says of its model."""
        if self._description is None:
            self._description = models.describe(self._inner())
        return self._description

    def sites(self) -> list[str]:
        """The sites that this model has."""
        return self.anatomy.sites()

    # -- text to ids -------------------------------------------------------------------------------

    def batch(
        self,
        prompts: Any,
        answers: Sequence[str | Sequence[int]] | str | None = None,
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> Batch:
        """Token ids of prompts, left-padded, with their exact prompt lengths.

        A str is one user turn, a list of dicts a conversation, a list of these many rows; an
        ``Example`` is its conversation and completion. ``answers`` (text or token ids, one per row)
        stand after the prompts. ``raw=True`` reads plain text. Raises ChatError.
        """
        rows = self._encode(prompts, answers, raw=raw, system=system)
        return chat.pad(rows, chat.pad_id(self.tokenizer)).to(self.device)

    def _encode(
        self, prompts: Any, answers: Any = None, *, raw: bool = False, system: str | None = None
    ) -> list[Encoded]:
        listed, _ = listed_prompts(prompts)
        if not listed:
            raise ChatError("there are no prompts: give at least one")
        if answers is None:
            answers = [None] * len(listed)
        elif isinstance(answers, str):
            answers = [answers]
        if len(answers) != len(listed):
            raise ChatError(f"{len(answers)} answers for {len(listed)} prompts; give one for each")
        rows = []
        for prompt, answer in zip(listed, answers, strict=True):
            if hasattr(prompt, "completion"):  # an Example
                answer = prompt.completion if answer is None else answer
                prompt = list(prompt.messages)
            rows.append(chat.encode(self.tokenizer, prompt, answer, raw=raw, system=system))
        self._check_length(max(len(row.ids) for row in rows))
        return rows

    def _check_length(self, longest: int) -> None:
        if self.context is not None and longest > self.context:
            raise ChatError(
                f"a row has {longest} tokens, but this model takes at most {self.context}; shorten "
                "the prompt or its history"
            )

    # -- running -----------------------------------------------------------------------------------

    def __call__(
        self, batch: Any, edits: Edits = None, record: Place | str | Sequence[Any] | None = None
    ) -> Run:
        """One forward pass with edits, in the caller's gradient mode.

        ``batch`` is a Batch (or prompts, as for ``batch``). ``record`` names a place or several.
        Returns a Run: ``logits`` [B, T, V], ``recording``, ``backward``.
        """
        batch = batch.to(self.device) if isinstance(batch, Batch) else self.batch(batch)
        self._check_length(batch.ids.shape[1])
        lengths = batch.lengths.tolist()
        call = self._call(batch, edits, lengths)
        for place in _places(record):
            self._add_reader(call, place, batch.prompt_len.tolist(), lengths)
        with self.taps.carry(call, self.waits):
            out = self.forward(batch.ids, batch.mask, batch.positions, fast=False)
        return Run(out.logits, call, self)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        *,
        cache: Any = None,
        keep: int = 0,
        use_cache: bool | None = None,
        fast: bool = True,
    ) -> Any:
        """The model's own forward pass with what it accepts; ``keep`` last logits (0 = all).

        Without ``fast`` it is the bare model's to the bit; with it, up to rounding and without
        dropout.
        """
        use_cache = cache is not None if use_cache is None else use_cache
        options: dict[str, Any] = {"use_cache": use_cache, "past_key_values": cache}
        options |= {"position_ids": positions.to(self.device), "logits_to_keep": keep}
        options = {k: v for k, v in options.items() if k in self._accepts}
        mask = None if mask is None else mask.to(self.device)
        with ExitStack() as stack:
            if fast:
                stack.enter_context(self.products.fast())
                stack.enter_context(sharing())
                stack.enter_context(settled(self.model))
            return self.model(input_ids=ids.to(self.device), attention_mask=mask, **options)

    @contextmanager
    def replay(self, call: Call) -> Iterator[None]:
        """For the backward pass of ``forward``: what is computed again is so in the same way."""
        with self.taps.replay(call, self.waits), self.products.fast(), sharing():
            yield

    def _call(self, batch: Batch, edits: Edits, lengths: Sequence[int] | None = None) -> Call:
        """A call for this batch; without ``lengths`` its rows go on growing."""
        edits = as_edits(edits)
        self._check_edits(edits)
        prompt_len = batch.prompt_len.tolist()
        ends = [FOREVER] * len(batch) if lengths is None else lengths
        steps = merge(edits, prompt_len, ends, self.n_layers, self.width)
        return Call(Clock(batch.mask), steps)

    def _check_edits(self, edits: Edits) -> None:
        listed = edits if isinstance(edits, list | tuple) else [edits]
        for edit in {id(e): e for e in listed if isinstance(e, Edit)}.values():
            for part in [edit, *edit.parts()]:
                if part.meta.model:
                    check_model(part.meta, self.describe())
                if adapter_of(part) is not None:
                    self._check_uncompiled()

    def _check_uncompiled(self) -> None:
        """A graph that was compiled before sees no hook that is put on later."""
        for module in self.model.modules():
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
                raise PlaceError(
                    f"{type(module).__name__} was compiled, and an Adapter would not be seen "
                    "there; give LM the model as it was before torch.compile, and call lm.compile()"
                )

    def _add_reader(
        self, call: Call, place: Place, prompt_len: Sequence[int], lengths: Sequence[int]
    ) -> Reader:
        tokens = Tokens.of(place.tokens)
        selection = Selection.of([tokens] * len(prompt_len), prompt_len, lengths)
        reader = Reader(place, self._layers(place), selection)
        call.add(reader)
        return reader

    def _layers(self, place: Place) -> tuple[int, ...]:
        """The layers of a place in this model; "all" means all that have the site."""
        if place.layers == "all" and (having := self.anatomy.layers(place.site)):
            return tuple(having)
        return place.layer_indices(self.n_layers)

    def explain(self, prompts: Any, edits: Any, answers: Any = None) -> str:
        """Which tokens of which row are touched, a line per row and edit: they stand in [brackets].

        ``edits`` as for a run, or a place (text or Place) to see what its tokens mean. Raises what
        a run with these edits would raise.
        """
        rows = self._encode_examples(prompts) if answers is None else self._encode(prompts, answers)
        if isinstance(edits, str | Place):
            places = [[("place", Place.parse(edits))]] * len(rows)
        else:
            edits = as_edits(edits)
            self.taps.check(self._call(chat.pad(rows, chat.pad_id(self.tokenizer)), edits))
            own = [edits] * len(rows) if isinstance(edits, Edit) else edits or [None] * len(rows)
            parts = [edit.parts() if edit is not None else [] for edit in own]
            places = [[(type(part).__name__, part.place) for part in row] for row in parts]
        told = [
            self._explained(i, row, kind, place)
            for i, row in enumerate(rows)
            for kind, place in places[i]
        ]
        none = [f"row {i}: no edit" for i in range(len(rows)) if not places[i]]
        return "\n".join(told + none)

    def _explained(self, number: int, row: Encoded, kind: str, place: Place) -> str:
        tokens = Tokens.of(place.tokens)
        if tokens.positions is not None and len(tokens.positions) > 1:
            tokens = Tokens(positions=(tokens.positions[number],))
        selection = Selection.of([tokens], [row.prompt_len], [FOREVER])
        mask = selection.mask(torch.arange(len(row.ids))[None])[0].tolist()
        pieces = [chat.decode_token(self.tokenizer, token) for token in row.ids]
        text = "".join(f"[{p}]" if m else p for p, m in zip(pieces, mask, strict=True))
        return f"row {number}: {kind} at {place}: {sum(mask)} tokens: {text!r}"

    # -- generating --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        edits: Edits = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        *,
        num_return_sequences: int = 1,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
        system: str | None = None,
        batch_size: int = 64,
        show_progress: bool = False,
        **options: Any,
    ) -> Any:
        """Answers to prompts: str in, str out; a list (or a Batch) in, a list out.

        ``edits``: one for all rows, or a list with one per row (None for none). ``temperature`` 0
        is greedy; ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
        ``no_repeat_ngram_size`` and ``seed`` shape sampling without touching global random state.
        With ``num_return_sequences`` n > 1 each prompt gives a list of n. ``stop``: texts that end
        an answer. Any other option (``num_beams`` ...) goes to transformers' own ``generate``. More
        than ``batch_size`` prompts run in groups of similar length. An answer ends where the
        longest prompt beside it and the answer fill the model's context.
        """
        if isinstance(prompts, Batch):
            rows, single = self._encode_examples(prompts), False
        else:
            listed, single = listed_prompts(prompts)
            rows = self._encode(listed, raw=raw, system=system) if listed else []
        edits, n = spread(edits, len(rows)), num_return_sequences
        groups = _groups([len(row.ids) for row in rows], batch_size)
        texts: dict[int, list[str]] = {}
        with self.products.kept():
            for group in tqdm(groups, "generating", disable=not show_progress):
                ids = self.generate_ids(
                    chat.pad([rows[i] for i in group], chat.pad_id(self.tokenizer)),
                    edits
                    if edits is None or isinstance(edits, Edit)
                    else [edits[i] for i in group],
                    max_new_tokens,
                    temperature,
                    num_return_sequences=n,
                    seed=None if seed is None else seed + len(texts),
                    stop=stop,
                    **options,
                )
                for k, i in enumerate(group):
                    own = ids[k * n : (k + 1) * n]
                    texts[i] = [self._trim(chat.decode(self.tokenizer, row), stop) for row in own]
        answers = [texts[i] if n > 1 else texts[i][0] for i in range(len(rows))]
        return answers[0] if single else answers

    def generate_ids(
        self,
        batch: Batch,
        edits: Edits = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        *,
        num_return_sequences: int = 1,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """As ``generate``, on token ids: one list of new ids per row, without its end token.

        Copies of a row (``num_return_sequences``) stand side by side.
        """
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences is 1 or more, not {num_return_sequences}")
        if not bool(batch.mask[:, -1].all()):  # the next token comes after the last real one
            batch = chat.pad(self._encode_examples(batch), chat.pad_id(self.tokenizer))
        batch = batch.to(self.device)
        room = self._room(batch, max_new_tokens)
        call = self._call(batch, edits)
        if set(options) - _OWN:
            options |= {"temperature": temperature, "num_return_sequences": num_return_sequences}
            with self.taps.held(self.waits):
                return self._transformers_generate(batch, call, room, seed, options)
        sampling = Sampling(temperature, seed=seed, **self._defaults(), **options)
        rows: list[list[int]] = [[] for _ in range(len(batch) * num_return_sequences)]
        with self.taps.held(self.waits):
            for column in columns(
                self,
                batch,
                call,
                sampling=sampling,
                max_new_tokens=room,
                copies=num_return_sequences,
                stop=self._stopper(stop),
            ):
                self._collect(rows, column)
        return rows

    def stream(
        self,
        prompt: Any,
        edits: Edits = None,
        read: Any = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        *,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
        system: str | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Pieces of the answer to one prompt as they come: str with ``.text`` and ``.reading``.

        ``read``: a probe (or Readout); each piece then carries its mean probability at the tokens
        that predicted the piece. Several streams of one model can take turns.
        """
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], Mapping):
            raise ChatError("stream takes one prompt, not a list of them; use generate for many")
        given = prompt if isinstance(prompt, Batch) else None
        batch = self.batch(prompt, raw=raw, system=system) if given is None else given
        batch = batch.to(self.device)
        call, room = self._call(batch, edits), self._room(batch, max_new_tokens)
        gauge = _Gauge(self, call, read) if read is not None else None
        unknown = set(options) - _OWN
        if unknown:
            raise TypeError(f"stream takes no {', '.join(sorted(unknown))}; generate does")
        sampling = Sampling(temperature, seed=seed, **self._defaults(), **options)
        return self._pieces(batch, call, sampling, room, gauge, stop)

    def _pieces(
        self,
        batch: Batch,
        call: Call,
        sampling: Sampling,
        room: int,
        gauge: "_Gauge | None",
        stop: str | Sequence[str] | None,
    ) -> Iterator[Piece]:
        ids: list[int] = []
        readings: list[float] = []
        shown = ""
        found = columns(
            self, batch, call, sampling=sampling, max_new_tokens=room, stop=self._stopper(stop)
        )
        for number, column in enumerate(found):
            self._collect([ids], column)
            if gauge is not None:
                readings.append(gauge.value())
            text = self._trim(chat.decode(self.tokenizer, ids), stop)
            last = column.ended[0] or number + 1 == room
            sure = text if last else text[: len(text) - _unsure(text, stop)]
            if len(sure) > len(shown):
                mean = sum(readings) / len(readings) if readings else None
                yield Piece(sure[len(shown) :], mean)
                shown, readings = sure, []

    def _collect(self, rows: list[list[int]], column: Column) -> None:
        ends = set(self.end_ids)
        for row, token in zip(column.rows, column.tokens, strict=True):
            if token not in ends:
                rows[row].append(token)

    def engine(self, call: Call) -> Engine:
        """What runs the passes of a generation with this call."""
        return eager(self) if self._compiled is None else self._compiled.engine(call)

    def compile(self, **options: Any) -> "LM":
        """Decode with a compiled graph from now on, also under edits; returns this LM.

        The first answer of each batch size compiles (about a minute for 30 layers on two cores);
        after that a change of edit, of its values or of its rows recompiles nothing. Additions at
        generated tokens run compiled; other edits (adapters too), streams that read, and beam
        search run as without. ``options`` go to ``torch.compile``; on CUDA,
        ``mode="reduce-overhead"`` captures CUDA graphs, which belong to a thread: decode in one.
        """
        self._compiled = Compiled(self, **options)
        return self

    def _room(self, batch: Batch, max_new_tokens: int) -> int:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is 1 or more, not {max_new_tokens}")
        if self.context is None:
            return max_new_tokens
        if (left := self.context - batch.ids.shape[1]) < 1:
            raise ChatError(
                f"a prompt has {batch.ids.shape[1]} tokens and leaves no room for an answer: this "
                f"model takes {self.context}"
            )
        return min(max_new_tokens, left)

    def _defaults(self) -> dict[str, Any]:
        """Penalties that the model's own generation config asks for."""
        config = getattr(self.model, "generation_config", None)
        found = {
            name: getattr(config, name, None)
            for name in ("repetition_penalty", "no_repeat_ngram_size")
        }
        return {name: value for name, value in found.items() if value}

    def _stopper(self, stop: str | Sequence[str] | None) -> Any:
        if not stop:
            return None
        texts = [stop] if isinstance(stop, str) else list(stop)
        return lambda row, ids: any(t in chat.decode(self.tokenizer, ids[-64:]) for t in texts)

    def _trim(self, text: str, stop: str | Sequence[str] | None) -> str:
        for end in [stop] if isinstance(stop, str) else stop or []:
            text = text.split(end)[0]
        return text

    def _transformers_generate(
        self, batch: Batch, call: Call, room: int, seed: int | None, options: dict[str, Any]
    ) -> list[list[int]]:
        """Beam search and whatever else transformers offers; beams of a row share its edits."""
        warm = options["temperature"] > 0
        options = {"do_sample": warm, **options}
        if not warm:
            del options["temperature"]
        if any(step.gate for step in call.steps):
            options["use_cache"] = False  # beams change places; a running mean cannot follow them
        with torch.random.fork_rng() if seed is not None else nullcontext():
            if seed is not None:
                torch.manual_seed(seed)
            with torch.no_grad(), self.taps.carry(call, self.waits):
                out = self.model.generate(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    max_new_tokens=room,
                    pad_token_id=chat.pad_id(self.tokenizer),
                    disable_compile=True,
                    **options,
                )
        sequences = out if isinstance(out, Tensor) else out.sequences
        rows, ends = sequences[:, batch.ids.shape[1] :].tolist(), set(self.end_ids)
        return [_until(row, ends) for row in rows]

    # -- recording and scoring ---------------------------------------------------------------------

    def record(
        self,
        examples: Any,
        place: Place | str | Sequence[Place | str],
        batch_size: int = 32,
        show_progress: bool = True,
        *,
        edits: Edits = None,
        dtype: torch.dtype | str | None = None,
        out: str | None = None,
        raw: bool = False,
        system: str | None = None,
    ) -> Recording:
        """Record activations at the asked tokens of many examples, rows in the order of the input.

        ``examples`` are as for ``batch``, or (prompt, answer) pairs, or a Batch. Only the asked
        tokens and layers are kept, in ``dtype``; nothing after the last asked token or the deepest
        asked layer is computed. ``out``: write shards to this folder while running; the same call
        goes on where an interrupted one stopped. Under torchrun the work is shared by rank.
        """
        places = _places(place)
        encoded = self._encode_examples(examples, raw, system)
        for one in places:
            for layer in self._layers(one):
                self.anatomy.tap(one.site, layer)
        edits = as_edits(edits)
        self._check_edits(edits)
        with self.taps.held(self.waits):
            return harvest(
                self,
                encoded,
                places,
                edits=edits,
                batch_size=batch_size,
                dtype=_dtype(dtype),
                out=out,
                show_progress=show_progress,
            )

    def takes_trees(self) -> bool:
        """Whether rows that share prefixes can be computed as a tree; measured once per model."""
        attention = str(getattr(self.text_config, "_attn_implementation", None))
        key = (str(self.model.dtype), self.model.training, attention)
        if key not in self._trees:
            windows = ("sliding_window", "attention_chunk_size")  # a tree's mask would undo them
            whole = all(getattr(self.text_config, name, None) is None for name in windows)
            self._trees[key] = whole and fits_trees(self)
        return self._trees[key]

    def score(
        self,
        prompts: Any,
        answers: Any = None,
        edits: Edits = None,
        *,
        batch_size: int = 32,
        raw: bool = False,
        system: str | None = None,
    ) -> Tensor:
        """Mean log-probability per answer token, [B].

        Without ``answers``, ``prompts`` holds them: a Batch, Examples or (prompt, answer) pairs.
        Differentiable with respect to edits that require gradients, and only then. Rows whose
        answer holds no token raise ChatError.
        """
        if answers is None:
            rows = self._encode_examples(prompts, raw, system)
        else:
            rows = self._encode(prompts, answers, raw=raw, system=system)
        empty = [i for i, row in enumerate(rows) if len(row.ids) == row.prompt_len]
        if empty:
            raise ChatError(f"rows {empty[:8]} have an empty answer; a score needs tokens")
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        edits = spread(edits, len(rows))
        scores: dict[int, Tensor] = {}
        while order:
            lengths = [len(rows[i].ids) for i in order]
            count = _count(lengths, batch_size, tokens_a_pass(self.device))
            group, order = order[:count], order[count:]
            own = edits if edits is None or isinstance(edits, Edit) else [edits[i] for i in group]
            batch = chat.pad([rows[i] for i in group], chat.pad_id(self.tokenizer))
            scores |= dict(zip(group, self._score(batch.to(self.device), own), strict=True))
        return torch.stack([scores[i] for i in range(len(rows))])

    def _score(self, batch: Batch, edits: Edits) -> Tensor:
        call = self._call(batch, edits, batch.lengths.tolist())
        longest = int((batch.lengths - batch.prompt_len).max())
        wanted = any(step.differentiable for step in call.steps)
        grad = torch.is_grad_enabled() and wanted
        with torch.set_grad_enabled(grad), self.taps.carry(call, self.waits):
            out = self.forward(batch.ids, batch.mask, batch.positions, keep=longest + 1)
        logits = out.logits[:, -longest - 1 : -1].float()
        labels = batch.ids[:, -longest:]
        columns_ = torch.arange(longest, 0, -1, device=labels.device)
        real = columns_[None] <= (batch.lengths - batch.prompt_len)[:, None]
        picked = logits.gather(-1, labels[..., None])[..., 0] - logits.logsumexp(-1)
        mean: Tensor = (picked * real).sum(1) / real.sum(1)
        return mean

    def _encode_examples(
        self, examples: Any, raw: bool = False, system: str | None = None
    ) -> list[Encoded]:
        if isinstance(examples, Batch):
            rows = []
            for ids, mask, n in zip(examples.ids, examples.mask, examples.prompt_len, strict=True):
                rows.append(Encoded(ids[mask.bool()].tolist(), int(n)))
            return rows
        listed, _ = listed_prompts(examples)
        pairs = [isinstance(e, tuple) and len(e) == 2 for e in listed]
        if any(pairs):
            prompts = [e[0] if p else e for e, p in zip(listed, pairs, strict=True)]
            answers = [e[1] if p else None for e, p in zip(listed, pairs, strict=True)]
            return self._encode(prompts, answers, raw=raw, system=system)
        return self._encode(listed, raw=raw, system=system)

    def _inner(self) -> Any:
        """The Hugging Face model inside a PEFT wrapper."""
        getter = getattr(self.model, "get_base_model", None)
        return getter() if getter is not None else self.model


class _Gauge:
    """Reads a probe at the last token of every pass of a stream."""

    def __init__(self, lm: LM, call: Call, probe: Any) -> None:
        readout = getattr(probe, "readout", probe)
        if not isinstance(readout, Readout):
            raise PlaceError(f"read= takes a probe or a Readout, not {type(probe).__name__}")
        self.readout = readout
        place = readout.place.at(tokens="all")
        if (tied := getattr(probe, "meta", None)) is not None:
            check_model(tied, lm.describe())
        if len(layers := lm._layers(place)) != len(readout.weight):
            raise PlaceError(
                f"read= has weights for {len(readout.weight)} layers, but {str(place)!r} names "
                f"{len(layers)} in this model; was it made for another model?"
            )
        self.reader = lm._add_reader(call, place, [0] * call.rows, [FOREVER] * call.rows)

    def value(self) -> float:
        """The mean probability over the probe's layers at the newest token."""
        x = torch.stack([layer[-1:] for layer in self.reader.passes[-1][1]])  # [L, 1, D]
        values = {n: v[:, None].to(x.device) for n, v in self.readout.values().items()}
        self.reader.passes.clear()
        return float(torch.sigmoid(self.readout.margin(x, values)).mean())


def listed_prompts(prompts: Any) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether there was a single one."""
    if isinstance(prompts, str | bytes) or hasattr(prompts, "completion"):
        return [prompts], True
    if not isinstance(prompts, Iterable):
        raise ChatError(f"a prompt is text or a list of messages, not {prompts!r:.60}")
    if isinstance(prompts, Mapping):
        raise ChatError("a conversation is a list of messages; put the message into a list")
    listed = list(prompts)
    if listed and isinstance(listed[0], Mapping):
        return [listed], True
    return listed, False


def plain_prompts(prompts: Any) -> list[Any]:
    """Prompts as texts and lists of messages, as JSON holds them; an Example without its answer."""
    listed, _ = listed_prompts(prompts)
    return [list(p.messages) if hasattr(p, "messages") else p for p in listed]


def _places(record: Any) -> list[Place]:
    if record is None:
        return []
    listed = [record] if isinstance(record, str | Place) else list(record)
    if not listed:
        raise PlaceError('no place to record; name one, for example "resid@3 answer"')
    return list(dict.fromkeys(Place.parse(place) for place in listed))


def _taps(model: Any, anatomy: Anatomy) -> Taps:
    """The model's taps: one set, however many LMs are made of it."""
    taps: Taps | None = getattr(anatomy.trunk, "_trimtab_taps", None)
    if taps is None or taps.anatomy.trunk is not anatomy.trunk:  # a copied model's are its source's
        taps = Taps(anatomy)
        object.__setattr__(anatomy.trunk, "_trimtab_taps", taps)
    elif taps.anatomy.taps != anatomy.taps:  # modules were replaced since, by an adapter say
        taps.install(anatomy)
    return taps


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"dtype is a torch.dtype or its name such as 'float16', not {dtype!r}")
    return found


def _unsure(text: str, stop: str | Sequence[str] | None) -> int:
    """How many characters at the end may yet change: half a character, or the start of a stop."""
    ends = [stop] if isinstance(stop, str) else list(stop or [])
    begun = (n for end in ends for n in range(1, len(end)) if text.endswith(end[:n]))
    return max(begun, default=0) or int(text.endswith("\ufffd"))


def _until(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows in groups of at most ``size``: in their order if they are one, else by length."""
    if size < 1:
        raise ValueError(f"batch_size is 1 or more, not {size}")
    order = list(range(len(lengths)))
    if len(lengths) > size:
        order.sort(key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def _count(lengths: Sequence[int], batch_size: int, budget: int) -> int:
    """How many of the ascending lengths make one batch within the token budget."""
    count = 1
    while count < min(len(lengths), batch_size) and lengths[count] * (count + 1) <= budget:
        count += 1
    return count
