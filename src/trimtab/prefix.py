"""Prefix controllers: one learned edit that does what many prompts' own edits do.

After SelfControl (Cai et al. 2024, arXiv 2406.02721, section 3.3). Knows prompts with edits, hidden
states and gradients; knows no judge and no search. Letters: L layers, N pairs, D width, T tokens.

The paper's controller is m learned tokens before the prompt and, in every layer, learned keys and
values that each query attends to (LLaMA-Adapter). What later tokens see of a learned token *is* a
key and a value per layer, so both parts are one ``Attend`` here: a pure function of the activation,
which works on any architecture, with a cache, in every row of a batch, and costs no token.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from trimtab import chat
from trimtab.artifact import Meta, user_path, write_file
from trimtab.chat import Encoded
from trimtab.edits import Attend, Edit, LowRank
from trimtab.errors import ArtifactError, PlaceError
from trimtab.lm import LM
from trimtab.merge import fingerprint
from trimtab.place import LayerSpec, Place, TokenSpec
from trimtab.products import frozen

Loss = Literal["relative", "mse"]
LOSSES = ("relative", "mse")
EVERYWHERE = Place("resid")  # what is matched: every block's output at every token
SAMPLE = 512  # tokens that the first keys are chosen from


@dataclass(frozen=True)
class _Recipe:
    """How a controller is trained; two runs of one recipe on the same targets end the same."""

    kind: str
    layers: str
    tokens: str
    length: int
    adapter_length: int
    loss: str
    epochs: int
    batch_size: int
    lr: float
    held_out: float
    seed: int

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(LOSSES)}, not {self.loss!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more, not {getattr(self, name)!r}")
        if min(self.length, self.adapter_length) < 0 or not self.pairs:
            raise ValueError(
                f"length {self.length} and adapter_length {self.adapter_length} are 0 or more, and "
                "one of them at least 1"
            )
        if not self.lr > 0:
            raise ValueError(f"lr is a positive number, not {self.lr!r}; 0.003 is the paper's")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a fraction in [0, 1), not {self.held_out!r}")

    @property
    def pairs(self) -> int:
        return self.length + self.adapter_length

    @property
    def place(self) -> Place:
        return Place("resid", self.layers, self.tokens)

    def edit(self, pairs: Mapping[str, Tensor], meta: Meta | None = None) -> Attend | LowRank:
        made = LowRank if self.kind == "lowrank" else Attend
        return made(self.place, pairs["key"], pairs["value"], meta=meta or Meta())


@dataclass(frozen=True)
class _Targets:
    """Token ids with answers, and the hidden states of the controlled model at each of them."""

    rows: list[Encoded]
    states: list[Tensor]  # per row [T, L, D]

    def batches(self, order: Sequence[int], size: int) -> Iterator[tuple[list[Encoded], Tensor]]:
        """Rows and their states [sum of T, L, D], ``size`` rows at a time."""
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            yield [self.rows[i] for i in chosen], torch.cat([self.states[i] for i in chosen])


def distill(
    lm: LM,
    solutions: Sequence[Any],
    length: int = 16,
    adapter_length: int = 32,
    *,
    rank: int | None = None,
    layers: LayerSpec = "all",
    tokens: TokenSpec = "prompt",
    answer_tokens: int = 16,
    loss: Loss = "relative",
    epochs: int = 20,
    batch_size: int = 8,
    lr: float = 3e-3,
    held_out: float = 0.1,
    seed: int = 0,
    out: str | Path | None = None,
    name: str | None = None,
    show_progress: bool = True,
) -> Attend | LowRank:
    """Learn one edit for all prompts from ``solutions``: objects with ``prompt`` and ``edit``.

    (prompt, edit) pairs will do; a solution's ``answer``, where it has one, is used too. The frozen
    model runs once with each prompt's own edit, on the prompt and the first ``answer_tokens``
    tokens of its answer (given, else generated under that edit), and its block outputs are kept.
    Then the controller is trained so that the model's block outputs with it are those: loss
    ``"relative"`` is the mean over layers and tokens of |h' - h|^2 / |h|^2, ``"mse"`` the paper's
    plain mean square, which the largest layers and tokens rule. AdamW with a cosine to 0, gradient
    norm clipped to 1; the epoch with the best loss on a fraction ``held_out`` of the solutions (on
    the training ones if 0) is returned.

    The controller is an ``Attend`` with ``length + adapter_length`` learned keys and values at each
    of ``layers``, for ``tokens``: those of the prompt, as the solutions' own edits, so decoding
    costs what it costs without; ``"all"`` lets generated tokens attend too, as in the paper. Values
    start at zero: no effect. The first ``length`` keys start where activations lie (at random
    tokens of the targets, where the paper takes the embeddings of a neutral text), the others at
    random; ``length=0`` is the adapter alone. Unlike the paper's, the prefix takes no positions and
    no room in the context. ``rank`` gives a ``LowRank`` of that rank instead (LoRA only).
    ``0.4 * a + 0.6 * b`` applies both controllers with these weights, each with an attention of its
    own; the paper averages their parameters.

    ``meta.scores``: ``plain`` and ``loss``, the held-out loss without and with the controller, and
    ``matched`` = 1 - loss / plain. ``out``: a folder where what is finished is kept; the same call
    after an interruption goes on there and ends with the same controller. No global random state is
    used, and the model is as before. Raises PlaceError for what is no solution, ArtifactError where
    ``out`` belongs to other work.
    """
    kind, pairs = (
        ("lowrank", (0, rank)) if rank is not None else ("attend", (length, adapter_length))
    )
    where = Place("resid", layers, tokens)
    recipe = _Recipe(
        *(kind, where.layers, where.tokens, *pairs, loss),
        *(epochs, batch_size, lr, held_out, seed),
    )
    prompts, answers, edits = _taken_apart(solutions)
    folder = None if out is None else user_path(out)
    rows = _encoded(lm, prompts, answers, answer_tokens)
    job = _job(lm, recipe, rows, edits, answer_tokens)
    if folder is not None:
        _claim(folder, job)
    if answer_tokens and (missing := [i for i, a in enumerate(answers) if not a]):
        found = _answers(lm, rows, edits, missing, answer_tokens, batch_size, folder)
        for i, ids in zip(missing, found, strict=True):
            rows[i] = Encoded([*rows[i].ids, *ids], rows[i].prompt_len)
    recording = lm.record(
        chat.pad(rows, chat.pad_id(lm.tokenizer)),
        EVERYWHERE,
        show_progress=show_progress,
        edits=edits,
        out=None if folder is None else str(folder / "states"),
    )
    training = _Training(lm, _Targets(rows, recording.rows()), recipe, folder)
    training.run(show_progress)
    made_by = {"method": "distill", "solutions": len(rows), **asdict(recipe)}
    meta = Meta(name, lm.describe(), made_by, training.scores())
    return recipe.edit(training.best, meta)


class _Training:
    """The parameters of a controller on their way, and the best of them so far."""

    def __init__(
        self, lm: LM, targets: _Targets, recipe: _Recipe, folder: Path | None = None
    ) -> None:
        self.lm, self.targets, self.recipe = lm, targets, recipe
        self.file = None if folder is None else folder / "training.safetensors"
        order = torch.randperm(len(targets.rows), generator=self._random(0)).tolist()
        aside = min(round(recipe.held_out * len(order)) or int(recipe.held_out > 0), len(order) - 1)
        self.train, self.aside = order[aside:], order[:aside] or order
        self.parameters = self._start()
        self.optimizer = torch.optim.AdamW([*self.parameters.values()], lr=recipe.lr)
        self.best = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.losses: list[float] = []  # held-out, before training and after each epoch

    def run(self, show_progress: bool) -> None:
        """Train all epochs, or those that are left."""
        if not self._resume():
            self.losses = [self._held_out_loss()]
        done = len(self.losses) - 1
        with tqdm(
            total=self.recipe.epochs,
            initial=done,
            desc="distilling",
            unit=" epochs",
            disable=not show_progress,
        ) as bar:
            for epoch in range(done, self.recipe.epochs):
                self._epoch(epoch)
                self._judge()
                self._keep()
                bar.set_postfix(matched=f"{self.scores()['matched']:.3f}")
                bar.update()

    def scores(self) -> dict[str, Any]:
        """How well the best controller matches; see ``distill``."""
        plain, best = self.losses[0], min(self.losses)
        matched = 1 - best / plain if plain > 0 else 0.0
        return {"plain": plain, "loss": best, "matched": matched, "losses": self.losses}

    def _start(self) -> dict[str, Tensor]:
        """Keys of unit length, at activations and at random; values of zero."""
        recipe, width, random = self.recipe, self.lm.width, self._random(1)
        layers = list(self.lm._layers(recipe.place))
        key = torch.randn(len(layers), recipe.pairs, width, generator=random)
        if recipe.length:
            states = torch.cat([self.targets.states[i] for i in self.train])[:, layers].float()
            chosen = torch.randperm(len(states), generator=random)[:SAMPLE]
            unit = torch.nn.functional.normalize(states[chosen].transpose(0, 1).cpu(), dim=-1)
            unit = unit - unit.mean(1, keepdim=True)
            repeated = torch.arange(recipe.length) % len(chosen)
            key[:, : recipe.length] = unit[:, repeated]
        key = torch.nn.functional.normalize(key, dim=-1).to(self.lm.device)
        return {"key": key.requires_grad_(), "value": torch.zeros_like(key, requires_grad=True)}

    def _epoch(self, epoch: int) -> None:
        recipe = self.recipe
        order = torch.randperm(len(self.train), generator=self._random(2 + epoch)).tolist()
        size, steps = recipe.batch_size, -(-len(order) // recipe.batch_size)
        batches = self.targets.batches([self.train[i] for i in order], size)
        parameters = list(self.parameters.values())
        for number, (rows, wanted) in enumerate(batches):
            done = (epoch * steps + number) / (recipe.epochs * steps)
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    recipe.lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
                )
            for parameter, gradient in zip(parameters, self._gradients(rows, wanted), strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()

    def _gradients(self, rows: list[Encoded], wanted: Tensor) -> tuple[Tensor, ...]:
        """Of the loss with respect to the controller; the model's own weights get none."""
        parameters = list(self.parameters.values())
        with torch.enable_grad():
            states, call = _states(self.lm, rows, self.recipe.edit(self.parameters))
            loss = _loss(states, wanted.to(states.device), self.recipe.loss)
            with self.lm.replay(call):
                return torch.autograd.grad(loss, parameters)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        total, tokens = 0.0, 0
        for rows, wanted in self.targets.batches(self.aside, self.recipe.batch_size):
            states, _ = _states(self.lm, rows, self.recipe.edit(self.parameters))
            loss = _loss(states, wanted.to(states.device), self.recipe.loss)
            total, tokens = total + float(loss) * len(wanted), tokens + len(wanted)
        return total / tokens

    def _judge(self) -> None:
        self.losses.append(self._held_out_loss())
        if self.losses[-1] <= min(self.losses):
            self.best = {n: p.detach().clone() for n, p in self.parameters.items()}

    def _random(self, stream: int) -> torch.Generator:
        """A generator of its own for each use, so that a resumed run draws what the other drew."""
        return torch.Generator().manual_seed(1_000_003 * self.recipe.seed + stream)

    def _keep(self) -> None:
        """Write everything that the next epoch depends on: whole, or the last file stays."""
        if self.file is None:
            return
        tensors = {f"best.{n}": t for n, t in self.best.items()}
        for n, parameter in self.parameters.items():
            tensors |= {f"{n}.{k}": v for k, v in self.optimizer.state[parameter].items()}
            tensors[n] = parameter.detach()
        tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
        made = self.file.with_name(f".{self.file.name}-{os.getpid()}")
        save_file(tensors, made, metadata={"losses": json.dumps(self.losses)})
        os.replace(made, self.file)

    def _resume(self) -> bool:
        if self.file is None or not self.file.is_file():
            return False
        try:
            with safe_open(self.file, "pt", device=str(self.lm.device)) as stored:
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                self.losses = json.loads(stored.metadata()["losses"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{self.file} cannot be read ({error}); delete it") from None
        for n, parameter in self.parameters.items():
            parameter.data.copy_(found[n])
            state = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {k: found[f"{n}.{k}"] for k in state}
            self.optimizer.state[parameter]["step"] = found[f"{n}.step"].cpu()
            self.best[n] = found[f"best.{n}"]
        return True


def _states(lm: LM, rows: Sequence[Encoded], edit: Edit) -> tuple[Tensor, Any]:
    """The block outputs at all real tokens, [sum of T, L, D], and the call that made them."""
    batch = chat.pad(rows, chat.pad_id(lm.tokenizer)).to(lm.device)
    lengths = batch.lengths.tolist()
    call = lm._call(batch, edit, lengths)
    reader = lm._add_reader(call, EVERYWHERE, batch.prompt_len.tolist(), lengths)
    with frozen(lm.model), lm.taps.carry(call, lm.waits):
        lm.forward(batch.ids, batch.mask, batch.positions, keep=1)
    layers = reader.passes[-1][1]
    return torch.stack([x.to(lm.device) for x in layers], 1), call


def _loss(states: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """How far ``states`` [T, L, D] are from those that are wanted; see ``distill``."""
    states, wanted = states.float(), wanted.float()
    if kind == "mse":
        return (states - wanted).square().mean()
    size = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((states - wanted).square().sum(-1) / size).mean()


def _taken_apart(solutions: Any) -> tuple[list[Any], list[Any], list[Edit | None]]:
    """Prompts, answers (None where there is none) and edits."""
    if hasattr(solutions, "edit") or not isinstance(solutions, Sequence):
        solutions = [solutions] if hasattr(solutions, "edit") else list(solutions)
    if not solutions:
        raise PlaceError("there are no solutions to learn from; give one at least")
    prompts, answers, edits = [], [], []
    for item in solutions:
        pair = item if isinstance(item, tuple) and len(item) == 2 else None
        if pair is None and not (hasattr(item, "prompt") and hasattr(item, "edit")):
            raise PlaceError(
                f"a solution has a prompt and an edit, or is such a pair; not {item!r:.60}"
            )
        prompt, edit = pair or (item.prompt, item.edit)
        if edit is not None and not isinstance(edit, Edit):
            raise PlaceError(f"a solution's edit is an Edit or None, not {edit!r:.60}")
        prompts.append(prompt)
        # Ids where they are known: a text may be tokenised in another way than it was written.
        ids = list(getattr(item, "answer_ids", None) or [])
        answers.append(ids or getattr(item, "answer", None) or None)
        edits.append(edit)
    if not any(bool(part.acts().any()) for e in edits if e is not None for part in e.parts()):
        raise PlaceError("none of the solutions has an edit: there is nothing to learn")
    return prompts, answers, edits


def _encoded(
    lm: LM, prompts: Sequence[Any], answers: Sequence[Any], answer_tokens: int
) -> list[Encoded]:
    """Prompts with the first tokens of their answers."""
    rows = lm._encode(prompts, list(answers))
    return [Encoded(row.ids[: row.prompt_len + answer_tokens], row.prompt_len) for row in rows]


def _answers(
    lm: LM,
    rows: Sequence[Encoded],
    edits: Sequence[Edit | None],
    missing: Sequence[int],
    answer_tokens: int,
    batch_size: int,
    folder: Path | None,
) -> list[list[int]]:
    """What the model answers to these rows under their own edits; read where it was written."""
    file = None if folder is None else folder / "answers.json"
    if file is not None and file.is_file():
        written: list[list[int]] = json.loads(file.read_text())
        return written
    order = sorted(missing, key=lambda i: len(rows[i].ids))
    found: dict[int, list[int]] = {}
    for first in range(0, len(order), 4 * batch_size):
        group = order[first : first + 4 * batch_size]
        batch = chat.pad([rows[i] for i in group], chat.pad_id(lm.tokenizer))
        own = [edits[i] for i in group]
        found |= dict(zip(group, lm.generate_ids(batch, own, answer_tokens), strict=True))
    answers = [found[i] for i in missing]
    if file is not None:
        write_file(file, json.dumps(answers).encode())
    return answers


def _job(
    lm: LM,
    recipe: _Recipe,
    rows: Sequence[Encoded],
    edits: Sequence[Edit | None],
    answer_tokens: int,
) -> dict[str, Any]:
    """What a folder of unfinished work belongs to."""
    texts = hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
    job = {"model": lm.describe()["fingerprint"], "rows": texts, "edits": fingerprint(edits)}
    return job | asdict(recipe) | {"answer_tokens": answer_tokens}


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Begin in a folder, or go on there; ArtifactError if it belongs to other work."""
    file = folder / "distill.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ArtifactError(f"{folder} holds something else; name an empty or a new folder")
        write_file(file, json.dumps(job, indent=2).encode())
    old = json.loads(file.read_text())
    if differing := [k for k in job if old.get(k) != job[k]]:
        raise ArtifactError(
            f"{folder} belongs to a distillation with another {', '.join(differing)}; name another "
            "folder, or delete that one"
        )
