"""Harvesting: record many examples with the fewest passes, tokens and bytes. Knows token ids.

Knows nothing of text. Four savings over a plain forward pass per example: tokens after the last
asked one are never computed; the pass ends at the deepest asked layer, before the LM head; rows are
sorted so that little is padding; and a prefix that rows share is computed once, by laying rows out
as a tree in one sequence whose attention mask lets a token see its own ancestors only. Whether a
model takes such a layout is measured once, against the plain one, not looked up.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from trimtab.edits import Edit
from trimtab.errors import PlaceError
from trimtab.merge import fingerprint, merge, spread
from trimtab.place import Place, Tokens
from trimtab.recording import Chunk, Recording, ShardWriter, Track
from trimtab.taps import Call, Clock, Reader, Stop

if TYPE_CHECKING:
    from trimtab.lm import LM

TREE_WIDTH = 256  # tokens in one tree: attention inside a tree is quadratic, so trees stay small


@dataclass(frozen=True)
class Row:
    """One example: its number, its ids up to the last asked token, and the asked positions."""

    number: int
    ids: tuple[int, ...]
    prompt_len: int
    length: int  # real tokens before truncation
    asked: tuple[tuple[int, ...], ...]  # per place


@dataclass(frozen=True)
class Sheet:
    """One forward pass: ids [R, N], and where each example's asked tokens lie in R * N."""

    ids: Tensor
    mask: Tensor | None  # [R, 1, N, N] for trees, None where plain causal attention is meant
    position_ids: Tensor
    rows: list[Row]
    where: list[list[list[int]]]  # per place, per row: indices into the flattened sheet


class FlatReader(Reader):
    """Reads fixed places of a sheet instead of positions of a growing text."""

    def __init__(
        self, place: Place, layers: tuple[int, ...], where: list[list[int]], dtype: Any
    ) -> None:
        self.place, self.layers, self.dtype = place, layers, dtype
        self.index = torch.tensor([i for row in where for i in row], dtype=torch.long)
        self.lengths = tuple(len(row) for row in where)
        self.kept: list[Tensor] = []
        self.devices: dict[torch.device, Tensor] = {}

    def begin(self, positions: Tensor) -> None:
        self.kept, self.devices = [], {}

    def read(self, x: Tensor) -> None:
        if x.device not in self.devices:
            self.devices[x.device] = self.index.to(x.device)
        picked = x.flatten(0, 1)[self.devices[x.device]]
        self.kept.append(picked if self.dtype is None else picked.to(self.dtype))

    def chunk(self, rows: tuple[int, ...]) -> Chunk:
        """What was read, [sum of lengths, L, D]."""
        first = self.kept[0].device
        return Chunk(rows, self.lengths, torch.stack([k.to(first) for k in self.kept], 1).cpu())


def tokens_a_pass(device: torch.device) -> int:
    """Of rows side by side: a CPU gains nothing by more, a GPU would be idle with fewer."""
    return 8192 if device.type == "cuda" else 1024


def harvest(
    lm: "LM",
    encoded: Sequence[tuple[Sequence[int], int]],
    places: Sequence[Place],
    *,
    edits: Edit | Sequence[Edit | None] | None = None,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    out: str | None = None,
    show_progress: bool = True,
) -> Recording:
    """Record ``places`` for rows of (ids, prompt length); see ``LM.record``."""
    layers = [lm._layers(place) for place in places]
    edits = spread(edits, len(encoded))
    _check_positions(places, len(encoded))
    rows = [_row(i, ids, n, places) for i, (ids, n) in enumerate(encoded)]
    tracks = {p: Track(numbers, []) for p, numbers in zip(places, layers, strict=True)}
    rank, world = _rank()
    writer = None
    if out is not None:
        meta: dict[str, Any] = {"model": lm.describe(), "examples": _digest(rows)}
        meta |= {"dtype": str(dtype), "edits": fingerprint(edits)}
        writer = ShardWriter(out, tracks, meta, len(rows), rank)
        _barrier(world)  # every process knows what is done before any of them writes more
    lay_out = _shared_once if edits is None and lm.takes_trees() else _plain
    budget = tokens_a_pass(lm.device)
    sheets = list(lay_out(rows, batch_size, budget))
    if writer is not None and writer.done:
        sheets = _remaining(sheets, writer.done, lambda rows: lay_out(rows, batch_size, budget))
    sheets = sheets[rank::world]
    bar = tqdm(
        total=sum(len(s.rows) for s in sheets),
        desc="recording",
        unit=" rows",
        disable=not show_progress,
    )
    try:
        for sheet in sheets:
            chunks = read_sheet(lm, sheet, places, layers, dtype=dtype, edits=edits)
            for track, chunk in zip(tracks.values(), chunks, strict=True):
                track.chunks.append(chunk) if writer is None else None
            if writer is not None:
                writer.add(chunks)
            bar.update(len(sheet.rows))
    finally:
        bar.close()
        if writer is not None:
            writer.flush()  # nothing that was computed is lost, also on Ctrl-C
    if writer is None:
        return _gather(Recording(tracks, {"model": lm.describe()}), world)
    _barrier(world)
    if rank == 0:
        writer.finish(len(encoded))
    _barrier(world)
    return Recording.load(out or "")


def _remaining(
    sheets: Sequence[Sheet], done: set[int], lay_out: Callable[[list[Row]], Iterator[Sheet]]
) -> list[Sheet]:
    """The sheets that are still to run. They keep their shape, so that a run that was stopped and
    goes on gives the same bits as one that was not; only a sheet that is half done (because the
    batch size or the device is another) is laid out anew.
    """
    left = [[row for row in sheet.rows if row.number not in done] for sheet in sheets]
    whole = [s for s, rows in zip(sheets, left, strict=True) if len(rows) == len(s.rows)]
    parts = [
        r for s, rows in zip(sheets, left, strict=True) if len(rows) < len(s.rows) for r in rows
    ]
    return whole + list(lay_out(parts))


def _check_positions(places: Sequence[Place], n_rows: int) -> None:
    for place in places:
        listed = len(Tokens.of(place.tokens).positions or ((),))
        if listed not in (1, n_rows):
            raise PlaceError(
                f"{str(place)!r} lists positions for {listed} rows, but there are {n_rows} "
                "examples; list them once for every row, or one list per row"
            )


def read_sheet(
    lm: "LM",
    sheet: Sheet,
    places: Sequence[Place],
    layers: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype | None = None,
    edits: Edit | Sequence[Edit | None] | None = None,
) -> list[Chunk]:
    """Run one sheet as far as the deepest asked layer; a chunk per place."""
    readers = [
        FlatReader(place, numbers, where, dtype)
        for place, numbers, where in zip(places, layers, sheet.where, strict=True)
    ]
    real = torch.ones(sheet.ids.shape, dtype=torch.long)
    steps = []
    if edits is not None:
        own = edits if isinstance(edits, Edit) else [edits[row.number] for row in sheet.rows]
        prompt_len = [row.prompt_len for row in sheet.rows]
        steps = merge(own, prompt_len, [row.length for row in sheet.rows], lm.n_layers, lm.width)
    call = Call(Clock(real), steps, list(readers), stop=True)
    with torch.no_grad(), lm.taps.carry(call, lm.waits), suppress(Stop):
        lm.forward(sheet.ids, sheet.mask, sheet.position_ids, use_cache=False)
    return [reader.chunk(tuple(row.number for row in sheet.rows)) for reader in readers]


@contextmanager
def head_at(model: Any, index: Tensor, ids: Tensor) -> Iterator[None]:
    """The LM head sees only the tokens ``index`` of flattened ``ids`` [R, T]: logits [1, n, V].

    Tokens that the model itself puts before each row (as PEFT's prompt tuning does) are passed
    over.
    """

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, width = args[0].flatten(0, -2), ids.shape[1]
        more = len(x) // len(ids) - width
        at = index + (index // width + 1) * more
        return (x[at.to(x.device)][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def logits_at(
    lm: "LM", rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 32
) -> Iterator[tuple[list[int], Tensor]]:
    """The logits after chosen positions of rows of ids, without edits and gradients.

    ``rows``: ids and the positions asked for. Yields the numbers of some rows and the logits at
    their positions, end to end, [n, V], until all rows have come; never more than one pass's
    logits at a time. What rows share at their beginning is computed once where the model allows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, not {batch_size}")
    for ids, _ in rows:
        lm._check_length(len(ids))
    asked = [Row(i, tuple(ids), 0, len(ids), (tuple(at),)) for i, (ids, at) in enumerate(rows)]
    lay_out = _shared_once if len(rows) > 1 and lm.takes_trees() else _plain
    for sheet in lay_out(asked, batch_size, tokens_a_pass(lm.device)):
        (where,) = sheet.where
        index = torch.tensor([i for row in where for i in row], dtype=torch.long)
        with torch.no_grad(), lm.taps.held(lm.waits), head_at(lm.model, index, sheet.ids):
            out = lm.forward(sheet.ids, sheet.mask, sheet.position_ids, use_cache=False)
        yield [row.number for row in sheet.rows], out.logits[0]


def fits_trees(lm: "LM") -> bool:
    """Whether this model reads the same at the end of a full tree as in a row of its own."""
    places, layers = [Place("resid", lm.n_layers - 1)], [(lm.n_layers - 1,)]
    top, room = int(lm.embedding.shape[0]) - 1, TREE_WIDTH - 16
    depth = min(room, lm.context or room)
    if depth < 24:
        return False
    first = max(0, top - room // depth)  # the rows come in this order, the last two sharing 8 ids
    rows = [
        Row(i, (first + i, *((7 * j + 3) % top for j in range(depth - 1))), 1, 0, ((),))
        for i in range(room // depth)
    ]
    end = Row(
        len(rows), (*rows[-1].ids[:8], *[top] * 16), 1, 0, (tuple(range(8, 24)),) * len(places)
    )
    try:
        tree = list(_trees([*rows, end], TREE_WIDTH))
        found = read_sheet(lm, tree[0], places, layers)
    except Exception:  # a model that takes no 4-d mask says so in its own way
        return False
    plain = read_sheet(lm, next(_plain([end], 1, TREE_WIDTH)), places, layers)
    return len(tree) == 1 and all(_close(a, b) for a, b in zip(found, plain, strict=True))


def _close(tree: Chunk, plain: Chunk) -> bool:
    """Compares the last row of a tree with the only row of a plain sheet, layer by layer."""
    a, b = tree.values[-plain.lengths[0] :].float(), plain.values.float()
    scale = b.flatten(2).norm(dim=(0, 2)).clamp_min(1e-12)
    limit = 1e-4 if plain.values.dtype in (torch.float32, torch.float64) else 5e-2
    return bool(((a - b).norm(dim=(0, 2)) / scale < limit).all())


def _row(number: int, ids: Sequence[int], prompt_len: int, places: Sequence[Place]) -> Row:
    """Cut a row after the last asked token."""
    asked = []
    for place in places:
        tokens = Tokens.of(place.tokens)
        if tokens.positions is not None:
            listed = tokens.positions[number if len(tokens.positions) > 1 else 0]
            asked.append(tuple(p for p in listed if p < len(ids)))
        else:
            start, stop = tokens.interval(prompt_len, len(ids))
            asked.append(tuple(range(start, stop, tokens.step)))
    end = 1 + max((a[-1] for a in asked if a), default=0)
    return Row(number, tuple(ids[:end]), prompt_len, len(ids), tuple(asked))


def _plain(rows: Sequence[Row], batch_size: int, budget: int) -> Iterator[Sheet]:
    """Rows of similar length side by side, padded on the right, where no token ever looks.

    At most about ``budget`` tokens, and ``batch_size`` rows, make one sheet.
    """
    ordered = sorted(rows, key=lambda r: len(r.ids), reverse=True)
    while ordered:
        width = len(ordered[0].ids)
        count = max(1, min(batch_size, budget // width))
        batch, ordered = ordered[:count], ordered[count:]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
        positions = torch.arange(width).expand(len(batch), width)
        where = [
            [[i * width + p for p in row.asked[k]] for i, row in enumerate(batch)]
            for k in range(len(batch[0].asked))
        ]
        yield Sheet(ids, None, positions, batch, where)


def _shared_once(rows: Sequence[Row], batch_size: int, budget: int) -> Iterator[Sheet]:
    """Trees; rows too long for one, which a mask would only make slower, side by side."""
    yield from _trees([r for r in rows if len(r.ids) <= TREE_WIDTH], budget)
    yield from _plain([r for r in rows if len(r.ids) > TREE_WIDTH], batch_size, budget)


class _Tree:
    """Rows that share prefixes, laid out in one sequence: a token's ancestors come before it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depth: list[int] = []
        self.rows: list[Row] = []
        self.paths: list[list[int]] = []

    def cost(self, row: Row) -> int:
        """How many tokens the row would add."""
        return len(row.ids) - self._common(row)

    def add(self, row: Row) -> None:
        """Lay the row out beside the others."""
        common = self._common(row)
        path = self.paths[-1][:common] if self.paths else []
        for depth in range(common, len(row.ids)):
            path.append(len(self.ids))
            self.ids.append(row.ids[depth])
            self.depth.append(depth)
        self.rows.append(row)
        self.paths.append(path)

    def _common(self, row: Row) -> int:
        """The prefix shared with the row before: rows come sorted, so that is the longest."""
        if not self.rows:
            return 0
        return _shared(self.rows[-1].ids, row.ids)


def _trees(rows: Sequence[Row], budget: int) -> Iterator[Sheet]:
    """Rows in lexical order, packed into trees; trees of similar size side by side."""
    trees: list[_Tree] = []
    for row in sorted(rows, key=lambda r: r.ids):
        fits = trees and len(trees[-1].ids) + trees[-1].cost(row) <= TREE_WIDTH
        if not fits:
            trees.append(_Tree())
        trees[-1].add(row)
    trees.sort(key=lambda t: len(t.ids), reverse=True)
    while trees:
        count = max(1, budget // len(trees[0].ids))
        yield _tree_sheet(trees[:count])
        trees = trees[count:]


def _tree_sheet(trees: Sequence[_Tree]) -> Sheet:
    width = max(len(tree.ids) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)  # [R, 1, N, N]
    where: list[list[list[int]]] = [[] for _ in trees[0].rows[0].asked]
    for i, tree in enumerate(trees):
        ids[i, : len(tree.ids)] = torch.tensor(tree.ids)
        positions[i, : len(tree.ids)] = torch.tensor(tree.depth)
        for row, path in zip(tree.rows, tree.paths, strict=True):
            line = torch.tensor(path)
            mask[i, 0, line[:, None], line[None]] = torch.ones(len(path), len(path)).tril().bool()
            for k, asked in enumerate(row.asked):
                where[k].append([i * width + path[p] for p in asked])
    return Sheet(ids, mask, positions, [row for tree in trees for row in tree.rows], where)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _digest(rows: Sequence[Row]) -> str:
    """A hash of what is asked of which ids, so that a rerun knows its own shards."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.ids, row.prompt_len, row.asked)).encode())
    return digest.hexdigest()


def _rank() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def _gather(recording: Recording, world: int) -> Recording:
    """Under torchrun every process gets the whole recording."""
    if world == 1:
        return recording
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, recording)
    return Recording.join(parts)
