"""The processes of one training run: who does what, and sums over all. Knows torch.distributed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.lm import LM


class World:
    """The processes that train together; alone, it does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def join() -> "World":
        """The processes that torchrun started, or this one alone."""
        dist = torch.distributed
        if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return World()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return World(dist.get_rank(), dist.get_world_size())

    def share(self, parts: Sequence[Any]) -> list[Any]:
        """This process's parts of a step."""
        return list(parts[self.rank :: self.size])

    def add_up(self, parameters: Sequence[Tensor], step: int, folder: Path | None) -> None:
        """Add the gradients of all processes, in one message."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError as error:
            where = "there is no checkpoint" if folder is None else f"the checkpoint is in {folder}"
            raise TrimtabError(
                f"another process of this run was lost at step {step + 1}: {error}. Start the same "
                f"command again and it goes on from its last checkpoint; {where}"
            ) from error
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        if torch.distributed.get_backend() == "nccl":
            found = found.cuda()
        torch.distributed.all_reduce(found)
        return float(found)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    @contextmanager
    def sharded(self, lm: LM, wanted: bool) -> Iterator[None]:
        """The frozen weights of each block spread over the processes (FSDP2)."""
        if wanted and self.size > 1:
            from torch.distributed.fsdp import fully_shard

            for block in lm.anatomy.blocks:
                fully_shard(block)
        yield
