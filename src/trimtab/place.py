"""Places: which site, layers and tokens. Knows numbers and their text; no model, no tokenizer.

    "resid@10:28 answer[:16]"      site @ layers tokens[slice]
    "norm@0: all"                  every layer
    "resid@-1 [[3, 5], [2]]"       explicit positions, one list per row
    "attn@4,7 prompt before"       what was there before an edit
    "embed answer"                 the embeddings have no layers

Layer i is the output of 0-based block i; negative layers count from the top. Positions count real
tokens from the start of a row: padding never counts. ``answer`` begins at the *last prompt token*,
the one that predicts the first token of the answer.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import PlaceError

SITES = ("resid", "norm", "attn", "mlp", "embed", "q", "k", "v", "heads")
WRITABLE = ("resid", "norm", "attn", "mlp", "embed")
SPANS = ("all", "prompt", "answer")
FOREVER = 2**62  # the end of a span that grows while a model generates

_GRAMMAR = re.compile(
    r"\s*(?P<site>\w+)\b\s*(?:@\s*(?P<layers>all|[-\d:,]+))?\s*"
    r"(?P<tokens>(?:all|prompt|answer)(?:\[[-\d:]+\])?|\[[\d\s,\[\]]*\])?\s*(?P<before>before)?\s*"
)
_NUMBER = r"\d{1,18}"  # what int() and int64 hold, whatever was typed
_SLICE = re.compile(r"(?P<span>all|prompt|answer)(?:\[(?P<slice>[-\d:]+)\])?")

LayerSpec = int | str | range | slice | Iterable[int] | Tensor
TokenSpec = str | Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Place:
    """Where something is read or written: a site, layers, and tokens.

    ``site`` is one of ``SITES``. ``layers`` takes an int, a range, a slice, a list or text such as
    ``"10:28"``, ``"3,5"``, ``"all"``, and is kept as text; however they are listed, tensors hold
    layers in ascending order. ``tokens`` takes ``"all"``, ``"prompt"``, ``"answer"``, each with an
    optional slice, or positions: one list for every row, or one list per row, each in ascending
    order. ``before`` names the value before an edit at the
    same place (recordings only). A whole place may also be given as one text. Raises PlaceError.

    >>> Place("resid", range(10, 28), "answer")
    Place('resid@10:28 answer')
    >>> Place.parse("norm@0: answer[:16]").layer_indices(4)
    (0, 1, 2, 3)
    """

    site: str
    layers: str
    tokens: str
    before: bool

    def __init__(
        self, site: str, layers: LayerSpec = "all", tokens: TokenSpec = "all", before: bool = False
    ) -> None:
        if isinstance(site, str) and "@" in site:
            if (str(layers), str(tokens), before) != ("all", "all", False):
                raise PlaceError(
                    f"{site!r} is a whole place; give it alone, or change a part of it with .at()"
                )
            site, layers, tokens, before = _parts(site)
        if site not in SITES:
            raise PlaceError(f"no site {site!r}; a site is one of {', '.join(SITES)}")
        layers = "0" if site == "embed" else layers
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "layers", _layers_text(layers))
        object.__setattr__(self, "tokens", str(Tokens.of(tokens)))
        object.__setattr__(self, "before", before)

    @staticmethod
    def parse(place: "Place | str") -> "Place":
        """Read a place from its text form (a ``Place`` is returned as it is)."""
        return place if isinstance(place, Place) else Place(*_parts(place))

    def __str__(self) -> str:
        return f"{self.site}@{self.layers} {self.tokens}" + (" before" if self.before else "")

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def at(
        self,
        *,
        site: str | None = None,
        layers: LayerSpec | None = None,
        tokens: TokenSpec | None = None,
        before: bool | None = None,
    ) -> "Place":
        """The same place with another site, layers, tokens or before."""
        return Place(
            site or self.site,
            self.layers if layers is None else layers,
            self.tokens if tokens is None else tokens,
            self.before if before is None else before,
        )

    def layer_indices(self, n_layers: int) -> tuple[int, ...]:
        """The 0-based layers of this place in a model of ``n_layers`` blocks, ascending."""
        if self.layers == "all":
            return tuple(range(n_layers))
        found: list[int] = []
        for piece in self.layers.split(","):
            found += _piece_indices(piece, n_layers, self)
        if not found:
            raise PlaceError(f"{self!r} names no layer of a model with layers 0..{n_layers - 1}")
        return tuple(sorted(set(found)))


@dataclass(frozen=True)
class Tokens:
    """A token selector: a span with a slice, or explicit positions. Text in, text out."""

    span: str = "all"
    start: int | None = None
    stop: int | None = None
    step: int = 1
    positions: tuple[tuple[int, ...], ...] | None = None

    @staticmethod
    def of(spec: TokenSpec) -> "Tokens":
        """Read a selector from text or from positions."""
        if not isinstance(spec, str):
            return Tokens(positions=_positions(spec))
        match = _SLICE.fullmatch(spec.strip())
        if match is not None:
            return Tokens(match["span"], *_slice_parts(match["slice"], spec))
        if spec.strip().startswith("["):
            try:
                return Tokens(positions=_positions(ast.literal_eval(spec.strip())))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise PlaceError(
                    f"cannot read the positions {spec!r:.80} ({error}); write [3, 5] for all rows, "
                    "or [[3, 5], [2]] for one list per row"
                ) from None
        raise PlaceError(
            f"cannot read the tokens {spec!r}; write all, prompt or answer, each with an optional "
            "slice such as prompt[-1:], or positions such as [[3, 5], [2]]"
        )

    def __str__(self) -> str:
        if self.positions is not None:
            rows = [list(row) for row in self.positions]
            return str(rows[0]) if len(rows) == 1 else str(rows)
        if self.start is None and self.stop is None and self.step == 1:
            return self.span
        ends = f"{_blank(self.start)}:{_blank(self.stop)}"
        return f"{self.span}[{ends}{f':{self.step}' if self.step != 1 else ''}]"

    def interval(self, prompt_len: int, length: int) -> tuple[int, int]:
        """First position and end (exclusive) in a row; ``length`` is ``FOREVER`` while it grows."""
        first = max(prompt_len - 1, 0) if self.span == "answer" else 0
        last = prompt_len if self.span == "prompt" else length
        return self._bound(self.start, first, last, first), self._bound(
            self.stop, first, last, last
        )

    def _bound(self, value: int | None, first: int, last: int, default: int) -> int:
        if value is None:
            return default
        if value >= 0:
            return min(first + value, last)
        if last >= FOREVER:
            raise PlaceError(
                f"tokens {str(self)!r} count from the end of a text that is still growing, so they "
                "would differ with and without a cache; count from the start (answer[:16]) or from "
                "the end of the prompt (prompt[-1:])"
            )
        return max(last + value, first)


@dataclass(frozen=True)
class Selection:
    """The chosen tokens of each row of a batch, as numbers: ``mask`` and ``order`` look them up.

    ``start``, ``stop``, ``step`` [B] for rows with a span (others start at ``FOREVER``); ``table``
    [B, N] of positions for rows that list them, padded with -1.
    """

    start: Tensor
    stop: Tensor
    step: Tensor
    table: Tensor | None = None

    @staticmethod
    def of(
        tokens: Sequence[Tokens], prompt_len: Sequence[int], lengths: Sequence[int]
    ) -> "Selection":
        """One selector per row; ``lengths`` are the rows' ends, ``FOREVER`` while they grow."""
        spans = [
            (FOREVER, FOREVER) if t.positions is not None else t.interval(p, n)
            for t, p, n in zip(tokens, prompt_len, lengths, strict=True)
        ]
        start, stop = (torch.tensor([s[i] for s in spans], dtype=torch.long) for i in (0, 1))
        step = torch.tensor([t.step for t in tokens], dtype=torch.long)
        explicit = [t.positions or ((),) for t in tokens]
        if wrong := [p for p in explicit if len(p) not in (1, len(tokens))]:
            raise PlaceError(
                f"positions for {len(wrong[0])} rows in a batch of {len(tokens)}; list them once "
                "for every row, or one list per row"
            )
        rows = [p[i if len(p) > 1 else 0] for i, p in enumerate(explicit)]
        if not any(rows):
            return Selection(start, stop, step)
        table = torch.full((len(rows), max(map(len, rows))), -1, dtype=torch.long)
        for i, row in enumerate(rows):
            table[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return Selection(start, stop, step, table)

    def mask(self, positions: Tensor) -> Tensor:
        """Which of ``positions`` [B, T] (-1 for padding) are chosen, as bool [B, T]."""
        offset = positions - self.start[:, None]
        inside = (offset >= 0) & (positions < self.stop[:, None])
        chosen = inside & (offset % self.step[:, None] == 0)
        if self.table is not None:
            chosen |= (positions[:, :, None] == self.table[:, None, :]).any(-1)
        return chosen & (positions >= 0)

    def order(self, positions: Tensor) -> Tensor:
        """The ordinal of each position among its row's chosen ones [B, T] (0 where unchosen)."""
        along = ((positions - self.start[:, None]) // self.step[:, None]).clamp_min(0)
        if self.table is None:
            return along
        listed = positions[:, :, None] == self.table[:, None, :]
        return torch.where(listed.any(-1), listed.long().argmax(-1), along)

    def repeat(self, times: int) -> "Selection":
        """Each row ``times`` times in a row, as beams are laid out."""
        return self.take(torch.arange(len(self.start)).repeat_interleave(times))

    def take(self, rows: Tensor) -> "Selection":
        """The given rows only."""
        table = None if self.table is None else self.table[rows]
        return Selection(self.start[rows], self.stop[rows], self.step[rows], table)


def _parts(text: object) -> tuple[str, str, str, bool]:
    """The text of a place, taken apart: site, layers, tokens, before."""
    match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match["layers"] is None and match["site"] != "embed"):
        raise PlaceError(
            f"cannot read the place {text!r:.80}; write site@layers tokens, "
            'for example "resid@10:28 answer[:16]" or "norm@0: all"'
        )
    return match["site"], match["layers"] or "0", match["tokens"] or "all", bool(match["before"])


def _layers_text(layers: LayerSpec) -> str:
    if isinstance(layers, str):
        return _checked_layers(layers)
    if isinstance(layers, slice):
        start, stop, step = (_blank(_plain(b)) for b in (layers.start, layers.stop, layers.step))
        return _checked_layers(f"{start}:{stop}" + (f":{step}" if step not in ("", "1") else ""))
    plain = _plain(layers)
    listed = [_plain(i) for i in plain] if isinstance(plain, Iterable) else [plain]
    if not listed or not all(type(i) is int for i in listed):
        raise PlaceError(
            "layers must be an int, or one int at least in a range, a slice or a list, "
            f"not {layers!r:.60}"
        )
    ordered = sorted(set(listed))
    if len(ordered) > 1 and ordered[0] >= 0 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}:{ordered[-1] + 1}"
    return ",".join(str(i) for i in ordered)


def _checked_layers(text: str) -> str:
    text = text.replace(" ", "")
    if text in ("all", ":", "0:"):
        return "all"
    pieces = text.split(",")
    for piece in pieces:
        if not re.fullmatch(
            rf"-?{_NUMBER}|(-?{_NUMBER})?:(-?{_NUMBER})?(:(?=0*[1-9]){_NUMBER})?", piece
        ):
            raise PlaceError(
                f'cannot read the layers {text!r:.80}; write "3", "10:28", "2,5,9" or "all"'
            )
    return ",".join(f"0{piece}" if piece.startswith(":") else piece for piece in pieces)


def _piece_indices(piece: str, n_layers: int, place: Place) -> list[int]:
    bounds = [int(b) if b else None for b in piece.split(":")]
    edges = [(b, 0 if len(bounds) == 1 or i != 1 else 1) for i, b in enumerate(bounds[:2])]
    for value, extra in edges:
        if value is not None and not -n_layers <= value < n_layers + extra:
            raise PlaceError(
                f"{str(place)!r} asks for layer {value - extra}, but this model has layers "
                f"0..{n_layers - 1} (or -{n_layers}..-1 from the top)"
            )
    if len(bounds) == 1:
        assert bounds[0] is not None
        return [bounds[0] % n_layers]
    return list(range(n_layers)[slice(*bounds)])


def _slice_parts(text: str | None, spec: str) -> tuple[int | None, int | None, int]:
    if text is None:
        return None, None, 1
    parts = text.split(":")
    if len(parts) > 3 or not all(re.fullmatch(rf"(-?{_NUMBER})?", p) for p in parts):
        raise PlaceError(
            f"cannot read the slice in {spec!r:.80}; write it as Python does, e.g. [:16]"
        )
    numbers = [int(p) if p else None for p in parts]
    first = numbers[0] or None  # [0:16] is [:16]
    if len(numbers) == 1:
        only = int(parts[0])
        return first, (only + 1 if only != -1 else None), 1
    step = numbers[2] if len(numbers) == 3 and numbers[2] is not None else 1
    if step < 1:
        raise PlaceError(f"the slice in {spec!r} steps by {step}; a step is 1 or more")
    return first, numbers[1], step


def _positions(spec: object) -> tuple[tuple[int, ...], ...]:
    outer = _listed(spec)
    flat = outer is not None and (not outer or isinstance(outer[0], int))
    rows = [outer] if flat else [_listed(row) for row in outer or ()]
    if outer is None or any(row is None or any(type(i) is not int for i in row) for row in rows):
        raise PlaceError(
            "positions must be a list of ints (for every row) or one such list per row, not "
            f"{spec!r:.80}"
        )
    found = [tuple(row) for row in rows if row is not None]
    for row in found:
        if list(row) != sorted(set(row)) or any(not 0 <= i < FOREVER for i in row):
            raise PlaceError(
                "positions count from 0, from the start of a row, and stand once each in ascending "
                f"order, not {list(row)!r:.80}; list them ascending, and in that order the values "
                "of an edit that has one per token"
            )
    return tuple(found)


def _listed(value: object) -> list[Any] | None:
    """A sequence, an array or a tensor as a list of plain values; None for anything else."""
    value = _plain(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    return [_plain(item) for item in value]


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _blank(value: int | None) -> str:
    return "" if value is None else str(value)
