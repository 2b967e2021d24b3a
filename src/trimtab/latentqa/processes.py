"""The processes of one training run: who does what, and sums over all. Knows torch.distributed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.lm import LM

PATIENCE = timedelta(minutes=10)  # how long the others may take until they count as lost


class _Told(BaseException):
    """SIGTERM came. No Exception, so that nothing on the way takes it for a failure of its own."""


class World:
    """The processes that train together; alone, it does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def join(device: torch.device) -> "World":
        """The processes that torchrun started, or this one alone; ``device``: where it computes."""
        dist = torch.distributed
        if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return World()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE)
            except RuntimeError as error:
                raise TrimtabError(
                    f"the {os.environ['WORLD_SIZE']} processes of this run did not find each other "
                    f"({_brief(error)}); did one of them end? Start the same command again"
                ) from error
        return World(dist.get_rank(), dist.get_world_size())

    @contextmanager
    def guarded(self, progress: Callable[[], str]) -> Iterator[None]:
        """Where another process is lost, say so, how far this run came and what to do.

        A process that is killed closes its connections, and one that hangs is given up after
        ``PATIENCE``: both fail the next exchange of the others, which torchrun may end by SIGTERM
        even before. Raises TrimtabError for these; other errors from inside are left as they are.
        """
        if self.size == 1:
            yield
            return
        try:
            with _sigterm_raises():
                yield
        except _Told:
            told = (
                f"process {self.rank} of {self.size} was told to end (SIGTERM), as torchrun does "
            )
            raise TrimtabError(f"{told}when another one has ended, {progress()}") from None
        except RuntimeError as error:
            if not _of_an_exchange(error):
                raise
            _spare_one_sigterm()
            lost = f"process {1 - self.rank}" if self.size == 2 else "another process"
            raise TrimtabError(
                f"{lost} of this run has ended or no longer answers ({_brief(error)}), so process "
                f"{self.rank} of {self.size} stopped too, {progress()}"
            ) from error

    def share(self, parts: Sequence[Any]) -> list[Any]:
        """This process's parts of a step."""
        return list(parts[self.rank :: self.size])

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of all processes, in one message."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
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

    def agrees(self, value: int) -> bool:
        """Whether every process has the same number."""
        return self.sum(float(value)) == value * self.size

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


# -- what is lost ----------------------------------------------------------------------------------


def _of_an_exchange(error: RuntimeError) -> bool:
    """Whether torch.distributed failed, not the work itself; gloo raises plain RuntimeErrors."""
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def _brief(error: Exception) -> str:
    """The first sentence, without the place in torch's own source."""
    first = (str(error).splitlines() or [""])[0]
    told = first.split("] ", 1)[-1] if first.startswith("[") else first
    return told.split(". ")[0].strip()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises ``_Told``, if nobody else handles it."""
    ours = _free_for_sigterm()
    if ours:
        signal.signal(signal.SIGTERM, _raise_told)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _spare_one_sigterm() -> None:
    """Let one SIGTERM pass: torchrun sends it about now, and the message is to be read first."""
    if _free_for_sigterm():
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _free_for_sigterm() -> bool:
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _raise_told(*_: object) -> NoReturn:
    raise _Told
