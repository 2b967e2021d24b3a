"""Training a reader: the frozen target is harvested once, the decoder learns to talk about it.

Latent interpretation tuning (Pan et al. 2024, arXiv 2412.08686). Knows batches, optimisers,
schedules, processes and checkpoints; how activations become a loss is the reader's business.

Under torchrun the same call trains with all processes: each takes its share of every step's rows,
and the adapter's gradients, which are small, are added up. A run of two processes follows the
curve of one at the same global batch. ``shard=True`` also shares the frozen weights (FSDP2).
"""

import hashlib
import importlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as dump
from torch import Tensor
from tqdm.auto import tqdm

from trimtab.artifact import Meta, check_free, user_path, write_file
from trimtab.errors import ArtifactError, TrimtabError
from trimtab.latentqa import data
from trimtab.latentqa.data import Item
from trimtab.latentqa.lora import Lora
from trimtab.latentqa.processes import World
from trimtab.latentqa.reader import Reader, Shown, View, Wiring, Write, record
from trimtab.lm import LM
from trimtab.place import LayerSpec, Place
from trimtab.recording import Recording

STATE, LOG = "checkpoint.json", "log.jsonl"
REMOTE = ("wandb", "trackio")


@dataclass(frozen=True)
class Plan:
    """How a reader is trained; a checkpoint goes on only under the same plan."""

    lr: float = 3e-5
    epochs: float = 5
    steps: int | None = None
    batch_size: int = 4
    accumulate: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float | None = None
    bf16: bool = False
    checkpointing: bool = False
    view: View = "real"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"batch_size": self.batch_size, "accumulate": self.accumulate}
        if self.steps is not None:
            counts["steps"] = self.steps
        if low := [name for name, count in counts.items() if count < 1]:
            raise ValueError(f"{low[0]} is 1 or more, not {counts[low[0]]!r}")
        if self.epochs <= 0:
            raise ValueError(f"epochs is more than 0, not {self.epochs!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: a linear warm-up, then half a cosine down to zero."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(
    lm: LM,
    items: Any,
    qa: Any = None,
    *,
    read_layer: LayerSpec | Literal["sampled"] = 15,
    write_layer: int = 0,
    write: Write = "replace",
    out: str | Path | None = None,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    lr: float = 3e-5,
    epochs: float = 5,
    steps: int | None = None,
    batch_size: int = 4,
    accumulate: int = 1,
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    ema: float | None = None,
    bf16: bool = False,
    checkpointing: bool = False,
    last: int | None = None,
    align: bool = True,
    role: str = "reflect",
    view: View = "real",
    held_out: float = 0.0,
    evaluate_every: int | None = None,
    evaluate_items: int = 64,
    save_every: int | None = None,
    harvest: bool | Recording = True,
    tracker: str | Callable[[dict[str, Any]], None] | None = None,
    shard: bool = False,
    seed: int = 0,
    name: str | None = None,
    show_progress: bool = True,
) -> Reader:
    """Train a decoder of a model's activations; the model itself is left as it is.

    ``items``: files, dicts or Items; ``qa``: {label: [[question, answer], ...]} or its file; each
    item is asked every question of its label. ``read_layer``: one layer, several (each row draws
    one), or "sampled" (any). ``write_layer``, ``write``, ``last``, ``align``, ``role``: see
    ``Wiring``. ``rank``, ``alpha``, ``dropout``: of the adapter, on all linear modules.

    A step takes ``batch_size * accumulate`` questions per process; questions about one item stand
    in one step and share its tokens. ``lr`` falls as half a cosine; ``ema`` keeps a running mean of
    the adapter. ``view`` other than "real" trains a baseline ("text", "words", "none") in the same
    way. ``held_out``: the fraction of labels kept aside, on which every ``evaluate_every`` steps
    the loss is measured with and without activations.

    ``harvest``: record the target once (True), at each step (False), or use a recording made with
    ``harvest_items``. ``out``: save there; ``<out>-training`` holds the log and, every
    ``save_every`` steps, a checkpoint from which the same call goes on exactly. ``tracker``:
    "jsonl" (that log alone), "wandb", "trackio", or a function that is given each record.
    """
    plan = Plan(
        lr,
        epochs,
        steps,
        batch_size,
        accumulate,
        warmup,
        weight_decay,
        clip,
        ema,
        bf16,
        checkpointing,
        view,
        seed,
    )
    if out is not None:
        check_free(out)
    layers = range(lm.n_layers) if read_layer == "sampled" else read_layer
    chosen = Place("resid", layers).layer_indices(lm.n_layers)
    wiring = Wiring(chosen, write_layer, write, last, align, role)
    lora = Lora.of(lm, rank, alpha, seed=seed)
    lora.dropout = dropout
    table = None if qa is None else data.read_qa(qa)
    listed = data.attach(data.read_items(items), table)
    if not listed:
        raise ArtifactError("none of the items has a question; does qa= have their labels?")
    train_items, aside = data.split(listed, held_out, seed)
    if evaluate_every and not aside:
        raise ValueError(
            f"evaluate_every={evaluate_every} needs labels that are not trained on: give held_out= "
            "(a fraction, such as 0.1), and items of two labels or more"
        )
    made_by = {"method": "latentqa", "items": len(train_items), **asdict(plan)}
    reader = Reader(lm, lora, wiring, Meta(name, lm.describe(), made_by), table or {})
    run = _Run(reader, plan, train_items, aside[:evaluate_items], out, World.join(lm.device))
    show_progress = show_progress and run.world.rank == 0
    with run.world.guarded(run.progress), run.world.sharded(lm, shard):
        run.resume()
        run.prepare(harvest, show_progress)
        run.train(evaluate_every, save_every, tracker, show_progress)
        return run.finish()


def harvest_items(
    lm: LM,
    items: Any,
    layers: LayerSpec,
    *,
    last: int | None = None,
    out: str | Path | None = None,
    show_progress: bool = True,
) -> Recording:
    """Record what a reader of ``layers`` is shown of each item, for ``train(harvest=...)``."""
    chosen = Place("resid", layers).layer_indices(lm.n_layers)
    rows = [data.seen(lm.tokenizer, item) for item in data.read_items(items)]
    folder = None if out is None else str(out)
    return record(lm, rows, chosen, last, out=folder, show_progress=show_progress)


# -- one run ---------------------------------------------------------------------------------------


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        items: Sequence[Item],
        aside: Sequence[Item],
        out: str | Path | None,
        world: World,
    ) -> None:
        self.reader, self.plan, self.items, self.aside = reader, plan, list(items), list(aside)
        self.world, self.out = world, None if out is None else user_path(out)
        self.folder = None if self.out is None else self.out.with_name(f"{self.out.name}-training")
        self.parameters = list(reader.lora.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=plan.lr,
            weight_decay=plan.weight_decay,
            fused=_fuses(self.parameters),
        )
        self.mean = [p.detach().clone() for p in self.parameters] if plan.ema else None
        self.pairs = [(i, k) for i, item in enumerate(self.items) for k in range(len(item.qa))]
        self.step, self.log = 0, list[dict[str, Any]]()

    @property
    def batch(self) -> int:
        """Questions in a step, over all processes."""
        return self.plan.batch_size * self.plan.accumulate * self.world.size

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch; what does not fill one is left out."""
        return max(1, len(self.pairs) // self.batch)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.plan.steps or max(1, round(self.plan.epochs * self.per_epoch))

    # -- what is read --

    def prepare(self, harvest: bool | Recording, show_progress: bool) -> None:
        """Record the target, once for all steps, unless each step is to do it."""
        self.rows: list[Tensor] | None = None
        if self.plan.view in ("text", "words") or harvest is False:
            return
        layers = self.reader.wiring.read_layers
        if isinstance(harvest, Recording):
            if len(harvest) != len(self.items) or not set(layers) <= set(harvest.layers):
                raise ArtifactError(
                    f"the recording holds {len(harvest)} rows at layers {list(harvest.layers)}, "
                    f"but there are {len(self.items)} items to be read at {list(layers)}"
                )
            recording = harvest
        else:
            folder = None if self.folder is None else self.folder / "activations"
            recording = harvest_items(
                self.reader.lm,
                self.items,
                layers,
                last=self.reader.wiring.last,
                out=folder,
                show_progress=show_progress,
            )
        self.layers, self.rows = recording.layers, recording.rows()

    def shown(self, index: int, layer: int) -> Shown:
        """What is shown of an item."""
        if self.rows is None:
            return self.reader.show([self.items[index]], layer)[0]
        values = self.rows[index][:, self.layers.index(layer)]
        return Shown(values, self.first(index, len(values)))

    def first(self, index: int, count: int) -> int:
        """The position of an item's first shown token in the target, for the alignment."""
        if not self.reader.wiring.align:
            return 0
        return len(data.seen(self.reader.lm.tokenizer, self.items[index]).ids) - count

    # -- steps --

    def train(
        self,
        evaluate_every: int | None,
        save_every: int | None,
        tracker: str | Callable[[dict[str, Any]], None] | None,
        show_progress: bool,
    ) -> None:
        """All steps that are left."""
        records = _tracking(tracker, self.folder, asdict(self.plan), self.world.rank)
        bar = tqdm(total=self.steps, initial=self.step, desc="training", disable=not show_progress)
        with bar, records as track:
            self.begin_log()
            while self.step < self.steps:
                record_ = self.one_step()
                self.step += 1
                if evaluate_every and self.step % evaluate_every == 0 and self.aside:
                    record_ |= self.evaluate()
                self.log.append(record_)
                track(record_)
                bar.set_postfix(loss=f"{record_['loss']:.3f}")
                bar.update()
                if save_every and self.step % save_every == 0 and self.step < self.steps:
                    self.save()

    def one_step(self) -> dict[str, Any]:
        """One optimiser step; the gradient is that of the mean over the global batch's labels."""
        plan, begun = self.plan, time.perf_counter()
        rate = plan.rate(self.step, self.steps)
        batch = self.batch_of(self.step)
        rows, shown = self.laid_out(batch)
        labels = sum(len(row.labels) for row in rows)
        total = 0.0
        with _seeded(plan.seed, self.step, self.world.rank, self.reader.lm.device):
            for part in self.world.share(_parts(len(rows), plan.batch_size)):
                total += self.backward([rows[i] for i in part], [shown[i] for i in part], labels)
        self.world.add_up(self.parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip or math.inf))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.mean is not None and plan.ema:
            decay = min(plan.ema, (self.step + 1) / (self.step + 10))  # short runs follow faster
            for kept, parameter in zip(self.mean, self.parameters, strict=True):
                kept.lerp_(parameter.detach(), 1 - decay)
        loss = self.world.sum(total)
        seconds = time.perf_counter() - begun
        facts = {"step": self.step + 1, "loss": loss, "lr": rate, "grad_norm": norm}
        return facts | {"labels": labels, "seconds": seconds}

    def backward(self, rows: Sequence[Any], shown: Sequence[Shown | None], labels: int) -> float:
        """Add the gradient of some rows; returns their part of the loss."""
        lora = self.reader.lora.train()
        try:
            with self.reader.training_pass(self.plan.checkpointing, self.plan.bf16) as losses:
                sums, _ = losses(rows, shown)
                loss = sums.sum() / labels
                loss.backward()
        finally:
            lora.eval()
        return float(loss.detach())

    def batch_of(self, step: int) -> list[tuple[int, int]]:
        """The (item, question) pairs of a step: items in a new order each epoch."""
        epoch, number = divmod(step, self.per_epoch)
        order = list(range(len(self.items)))
        random.Random(f"{self.plan.seed}-{epoch}").shuffle(order)
        pairs = [(i, k) for i in order for k in range(len(self.items[i].qa))]
        return pairs[number * self.batch : (number + 1) * self.batch]

    def laid_out(self, batch: Sequence[tuple[int, int]]) -> tuple[list[Any], list[Shown | None]]:
        """The decoder's rows of a step and what is written into each."""
        chosen = random.Random(f"{self.plan.seed}-{self.step}-layers")
        rows: list[Any] = []
        shown: list[Shown | None] = []
        for i in dict.fromkeys(i for i, _ in batch):
            layer = chosen.choice(self.reader.wiring.read_layers)
            item = replace(self.items[i], qa=tuple(self.items[i].qa[k] for j, k in batch if j == i))
            given = None if self.plan.view in ("text", "words") else [self.shown(i, layer)]
            more_rows, more_shown = self.reader.pairs([item], view=self.plan.view, shown=given)
            rows += more_rows
            shown += more_shown
        return rows, shown

    # -- evaluation --

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss on labels that are not trained on, with activations and without."""
        views: tuple[View, ...] = (
            ("real", "none") if self.plan.view == "real" else (self.plan.view,)
        )
        with self.averaged():
            return {f"held_out_{v}": float(self.reader.loss(self.aside, view=v)) for v in views}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the running mean in place of the newest parameters, if one is kept."""
        if self.mean is None:
            yield
            return
        newest = [p.detach().clone() for p in self.parameters]
        _copy(self.mean, self.parameters)
        try:
            yield
        finally:
            _copy(newest, self.parameters)

    def finish(self) -> Reader:
        """The trained reader, saved if a folder was named."""
        if self.mean is not None:
            _copy(self.mean, self.parameters)
        self.reader.lora.requires_grad_(False)
        told = {"steps": self.step, "losses": _thinned([r["loss"] for r in self.log])}
        last: dict[str, Any] = next((r for r in reversed(self.log) if "held_out_real" in r), {})
        scores = {k: v for k, v in last.items() if k.startswith("held_out")}
        meta = self.reader.meta
        meta = replace(meta, made_by=meta.made_by | told, scores=meta.scores | scores)
        self.reader.meta = meta
        if self.out is not None and self.world.rank == 0:
            self.reader.save(self.out)
            if self.folder is not None:
                self.sweep_out()
                shutil.rmtree(self.folder / "activations", ignore_errors=True)
        self.world.wait()
        return self.reader

    def begin_log(self) -> None:
        """A log of the steps that count: those up to the checkpoint, without what came after it."""
        if self.folder is not None and self.world.rank == 0:
            lines = [json.dumps(record_) + "\n" for record_ in self.log]
            write_file(self.folder / LOG, "".join(lines).encode())

    # -- checkpoints --

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on, as JSON gives it back."""
        facts = asdict(self.plan) | asdict(self.reader.wiring) | self.reader.lora.config()
        facts |= {"items": _hashed(self.items), "held out": _hashed(self.aside)}
        facts |= {"batch": self.batch, "model": self.reader.lm.describe()["fingerprint"]}
        return dict(json.loads(json.dumps(facts)))

    def save(self) -> None:
        """Write a checkpoint: the adapter, the optimiser and the log, whole or not at all.

        The state names its file of tensors, so that a run that is killed between the two goes on
        from the checkpoint before.
        """
        if self.folder is None or self.world.rank != 0:
            return
        tensors = {f"p.{i}": p.detach() for i, p in enumerate(self.parameters)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"o.{i}.{k}": v for k, v in state.items()}
        tensors |= {f"m.{i}": m for i, m in enumerate(self.mean or [])}
        plain = {k: v.cpu().contiguous() for k, v in tensors.items()}
        weights = f"checkpoint-{self.step}.safetensors"
        write_file(self.folder / weights, dump(plain))
        facts = {"step": self.step, "weights": weights, "facts": self.facts, "log": self.log}
        write_file(self.folder / STATE, json.dumps(facts).encode())
        self.sweep_out(keep=(STATE, weights))

    def sweep_out(self, keep: Sequence[str] = ()) -> None:
        """Delete older checkpoints, and what a kill in the middle of writing one left."""
        for file in [] if self.folder is None else self.folder.glob("*checkpoint*"):
            if file.name not in keep:
                file.unlink(missing_ok=True)

    def progress(self) -> str:
        """How far this run came, and where the same call goes on."""
        here = f"at step {min(self.step + 1, self.steps)} of {self.steps}."
        if self.folder is None or not (self.folder / STATE).is_file():
            why = "no out= was given" if self.folder is None else "none was written yet"
            return f"{here} There is no checkpoint ({why}): the same command begins anew"
        kept = json.loads((self.folder / STATE).read_text(encoding="utf-8"))["step"]
        where = f"The checkpoint after step {kept} is in {self.folder}"
        return f"{here} {where}: run the same command again to go on from there"

    def resume(self) -> None:
        """Go on where a checkpoint of the same run stopped, if there is one."""
        if self.folder is not None and (self.folder / STATE).is_file():
            self.restore(self.folder)
        if not self.world.agrees(self.step):
            raise ArtifactError(
                f"process {self.world.rank} would go on from step {self.step}, but not all others "
                f"would; give every process the same {self.folder}, on storage that they share"
            )

    def restore(self, folder: Path) -> None:
        """The state of the checkpoint in a folder, if it is one of this run."""
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            weights = state.get("weights", "checkpoint.safetensors")  # the older name of all
            tensors = load((folder / weights).read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(
                f"the checkpoint in {folder} cannot be read ({error}); delete that folder"
            ) from None
        there = state["facts"]
        if differing := [k for k, now in self.facts.items() if there.get(k) != now]:
            told = [f"{k} {there.get(k)!r:.60} there, {self.facts[k]!r:.60} now" for k in differing]
            raise ArtifactError(
                f"{folder} holds a checkpoint of another run ({'; '.join(told[:3])}); give what "
                "that run was given to go on with it, delete the folder to begin anew, or choose "
                "another out="
            )
        _copy([tensors[f"p.{i}"] for i in range(len(self.parameters))], self.parameters)
        if self.mean is not None:
            _copy([tensors[f"m.{i}"] for i in range(len(self.mean))], self.mean)
        held = self.optimizer.state_dict()
        held["state"] = {
            i: {k: tensors[f"o.{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            for i in range(len(self.parameters))
        }
        self.optimizer.load_state_dict(held)
        self.step, self.log = int(state["step"]), list(state["log"])


# -- small things ----------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Dropout that depends on the seed and the step only; other random state is left alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + step) * 4_099 + rank)
        yield


def _hashed(items: Sequence[Item]) -> str:
    """How many items, and a hash of all that they say and ask."""
    text = json.dumps([asdict(item) for item in items])
    return f"{len(items)} of hash {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _parts(count: int, size: int) -> list[list[int]]:
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def _fuses(parameters: Sequence[Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in parameters)


def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for new, old in zip(source, target, strict=True):
            old.copy_(new)


def _thinned(values: Sequence[float], count: int = 200) -> list[float]:
    """At most ``count`` means of neighbouring values, for the record."""
    width = max(1, -(-len(values) // count))
    groups = [values[i : i + width] for i in range(0, len(values), width)]
    return [round(sum(g) / len(g), 4) for g in groups]


@contextmanager
def _tracking(
    tracker: str | Callable[[dict[str, Any]], None] | None,
    folder: Path | None,
    config: dict[str, Any],
    rank: int,
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is done with each step's record: a line of the log, and whatever was asked for."""
    if not (tracker is None or callable(tracker) or tracker in ("jsonl", *REMOTE)):
        raise ValueError(f"tracker is 'jsonl', 'wandb', 'trackio' or a function, not {tracker!r}")
    more: Callable[[dict[str, Any]], None] | None = tracker if callable(tracker) else None
    remote = _remote(tracker) if isinstance(tracker, str) and tracker in REMOTE else None
    if rank != 0:
        yield lambda record_: None
        return
    with ExitStack() as stack:
        if remote is not None:
            run = remote.init(project="trimtab", config=config)
            stack.callback(run.finish)  # sends what is not sent yet
            more = _by_step(run.log)

        def track(record_: dict[str, Any]) -> None:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / LOG).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record_) + "\n")
            if more is not None:
                more(record_)

        yield track


def _by_step(log: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
    return lambda record_: log(
        {k: v for k, v in record_.items() if k != "step"}, step=record_["step"]
    )


def _remote(tracker: str) -> Any:
    try:
        return importlib.import_module(tracker)
    except ImportError:
        raise TrimtabError(f"{tracker} is not installed; run: pip install {tracker}") from None
