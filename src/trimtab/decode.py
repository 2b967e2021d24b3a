"""One decode loop: a column of tokens at a time, for generation, streams and evaluation.

Knows logits, caches and rows; knows no text. Rows that have ended leave the batch, so that a few
long answers do not cost as much as if all were long.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimtab.cache import growing
from trimtab.chat import Batch
from trimtab.taps import Call

if TYPE_CHECKING:
    from trimtab.lm import LM


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is 0 (greedy) or more, not {self.temperature!r}")

    def chooser(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (history [B, T], logits [B, V]) -> tokens [B], with its own random state."""
        process = self._processors()
        generator = torch.Generator(device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)

        def choose(history: Tensor, logits: Tensor) -> Tensor:
            scores = process(history, logits) if len(process) else logits  # type: ignore[arg-type]
            if self.temperature == 0:
                return scores.argmax(-1)
            return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

        return choose

    def _processors(self) -> LogitsProcessorList:
        made: list[Any] = []
        if self.repetition_penalty != 1.0:
            made.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            made.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.temperature not in (0.0, 1.0):
            made.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature > 0:
            made += [TopKLogitsWarper(self.top_k)] if self.top_k else []
            made += [TopPLogitsWarper(self.top_p)] if self.top_p is not None else []
            made += [MinPLogitsWarper(self.min_p)] if self.min_p is not None else []
        return LogitsProcessorList(made)


class Engine(Protocol):
    """What runs the passes of one generation: the prompt, then a token per row and pass.

    ``fixed``: whether the number of rows stays what it was at the start.
    """

    fixed: bool

    def start(self, batch: Batch, call: Call, room: int) -> Tensor:
        """Run the prompts; logits [B, V] of the next tokens. ``room``: how many may follow."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Run one token per row; logits [B, V] of the next ones."""
        ...

    def take(self, rows: Tensor) -> None:
        """Go on with these rows, repeated or dropped as given."""
        ...

    def close(self) -> None:
        """The generation is over, finished or not."""
        ...


class Eager:
    """Passes through the model as it is, on a cache that grows."""

    fixed = False

    def __init__(self, lm: "LM") -> None:
        self.lm = lm

    def start(self, batch: Batch, call: Call, room: int) -> Tensor:
        self.call, self.mask = call, batch.mask
        self.next = batch.lengths  # the position of the next token
        self.cache: Any = growing(self.lm.text_config)
        return self._run(batch.ids, batch.positions)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        positions, self.next = self.next[:, None], self.next + 1
        return self._run(tokens[:, None], positions)

    def take(self, rows: Tensor) -> None:
        self.call.take(rows)
        rows = rows.to(self.mask.device)
        self.mask, self.next = self.mask[rows], self.next[rows]
        self.cache.batch_select_indices(rows)

    def close(self) -> None:
        pass

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        taps = self.lm.taps.carry(self.call, self.lm.waits)
        with torch.no_grad(), taps:
            out = self.lm.forward(ids, self.mask, positions, cache=self.cache, keep=1)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits


class Whole(Eager):
    """The same for a model that takes no such cache: each pass runs the whole text again."""

    def start(self, batch: Batch, call: Call, room: int) -> Tensor:
        self.call, self.ids, self.mask = call, batch.ids, batch.mask
        return self._again()

    def step(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        return self._again()

    def take(self, rows: Tensor) -> None:
        self.call.take(rows)
        rows = rows.to(self.mask.device)
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def _again(self) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad(), self.lm.taps.carry(self.call, self.lm.waits):
            out = self.lm.forward(self.ids, self.mask, positions, use_cache=False, keep=1)
        logits: Tensor = out.logits[:, -1].float()
        return logits


def eager(lm: "LM") -> Eager:
    """The engine that runs the model as it is."""
    return Eager(lm) if lm.caches else Whole(lm)


@dataclass(frozen=True)
class Column:
    """One token for each row that is still going: ``rows`` and ``tokens``, both [live]."""

    rows: list[int]
    tokens: list[int]
    ended: list[bool]


def columns(
    lm: "LM",
    batch: Batch,
    call: Call,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    copies: int = 1,
    stop: Callable[[int, list[int]], bool] | None = None,
    engine: Engine | None = None,
) -> Iterator[Column]:
    """Decode ``copies`` answers for each row of the batch; row r's copies are r*copies + 0, 1, ...

    A row ends with one of the model's end tokens, or when ``stop(row, its tokens so far)`` says so.
    ``engine`` runs the passes (default: the model's own).
    """
    engine = lm.engine(call) if engine is None else engine
    rows = 0 if engine.fixed else len(batch) * copies
    try:
        with lm.products.packed(rows, max_new_tokens):
            yield from _columns(lm, engine, batch, call, sampling, max_new_tokens, copies, stop)
    finally:
        engine.close()


def _columns(
    lm: "LM",
    engine: Engine,
    batch: Batch,
    call: Call,
    sampling: Sampling,
    max_new_tokens: int,
    copies: int,
    stop: Callable[[int, list[int]], bool] | None,
) -> Iterator[Column]:
    choose = sampling.chooser(batch.ids.device)
    ends = set(lm.end_ids)
    each = torch.arange(len(batch)).repeat_interleave(copies)
    if engine.fixed and copies > 1:
        batch = batch.rows(each.tolist())
        call.take(each)
    logits = engine.start(batch, call, max_new_tokens)
    history, live = batch.ids, list(range(len(each)))
    if copies > 1 and not engine.fixed:  # the prompts were run once for all their copies
        engine.take(each)
        logits, history = logits[each.to(logits.device)], history[each.to(history.device)]
    texts: dict[int, list[int]] = {row: [] for row in live}
    done = torch.zeros(len(live), dtype=torch.bool)
    for number in range(max_new_tokens):
        tokens = choose(history, logits).to(batch.ids.device)
        listed = tokens.tolist()
        over = torch.tensor([token in ends for token in listed], dtype=torch.bool) | done
        if stop is not None:
            for i, row in enumerate(live):
                texts[row].append(listed[i])
                over[i] |= stop(row, texts[row])
        yield Column(
            [r for r, d in zip(live, done.tolist(), strict=True) if not d],
            [t for t, d in zip(listed, done.tolist(), strict=True) if not d],
            [o for o, d in zip(over.tolist(), done.tolist(), strict=True) if not d],
        )
        done = over
        if bool(done.all()) or number + 1 == max_new_tokens:
            return
        history = torch.cat([history, tokens[:, None]], 1)
        if not engine.fixed and 4 * int(done.sum()) >= len(live):
            # moving the cache pays once a quarter has ended
            kept = (~done).nonzero()[:, 0]
            engine.take(kept)
            there = kept.to(history.device)
            history, tokens, done = history[there], tokens[there], done[kept]
            live = [live[i] for i in kept.tolist()]
        logits = engine.step(tokens)
