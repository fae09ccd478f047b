"""The processes of one run: which of them this one is, and what all of them agree on.

Owns collectives. Control messages go through the CPU, so that agreeing on a flag at the edge of a step
stalls no GPU; only the trained weights' gradients travel between devices.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_train.contracts import UserError
from ltx_train.memory.origin import Exchange
from ltx_train.model import sequence
from ltx_train.model.sequence import Together
from ltx_train.training.environment import names

T = TypeVar("T")
# torch 2.13 has given them other names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor")  # noqa: B009
_all_reduce: Any = dist.all_reduce
_BUCKET_BYTES = 64 * 2**20


class AgreedError(UserError):
    """An error that another rank has raised and prints; this one ends with it, silently."""

    def __init__(self, error: UserError) -> None:
        super().__init__("")
        self.exit_code = error.exit_code


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank of world; local: which device of its machine. The default is a run of one process."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Files, the tracker and the console belong to rank 0."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.world == 1:
            return flag
        said = torch.tensor([int(flag)])
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def lead(self, work: Callable[[], T]) -> T:
        """Rank 0 works, every rank gets the result; its UserError ends every rank and is printed once."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        error: UserError | None = None
        if self.leads:
            try:
                outcome[0] = work()
            except UserError as raised:
                error = raised
                outcome[1] = (str(raised), int(raised.exit_code), type(raised))
        dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise AgreedError(outcome[1][2](outcome[1][0]))
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def exchange(self) -> Exchange:
        """Shares to wholes and back, over connections of its own, because it runs beside other collectives. Every rank
        must ask for it."""
        if self.world == 1:
            return Exchange(0, 1, _copy, _copy, lambda _values: None, self.gather)
        group = dist.new_group()
        return Exchange(
            self.rank, self.world, partial(_all_gather, group=group), partial(_reduce_scatter, group=group),
            partial(_all_reduce, group=group), self.gather,
        )  # fmt: skip

    def together(self, count: int) -> Together | None:
        """Those that take samples together, `count` neighbours each. Every rank must ask for it."""
        if self.world == 1 or count == 1:
            return None
        groups = [dist.new_group(list(range(first, first + count))) for first in range(0, self.world, count)]
        return sequence.joined(groups[self.rank // count], self.rank % count, count)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replaces gradients by their mean over the ranks, in flat pieces of 64 MiB."""
        if self.world == 1:
            return
        for piece in _pieces(gradients):
            flat = torch.cat([g.reshape(-1) for g in piece])
            dist.all_reduce(flat)
            flat /= self.world
            parts = flat.split([g.numel() for g in piece])
            torch._foreach_copy_(list(piece), [part.view_as(g) for g, part in zip(piece, parts, strict=True)])


ALONE = Ranks()


def found(environment: Mapping[str, str]) -> Ranks:
    """Who this process is, from what torchrun, our launcher or srun has set."""
    given = names(environment)
    return Ranks() if given is None else Ranks(*(int(environment.get(name, "0")) for name in given))


@contextmanager
def joined(ranks: Ranks, device: torch.device, timeout_s: float) -> Generator[Ranks]:
    """The process group of a run, left again at the end however it ends."""
    if ranks.world == 1:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events belong to the present device where none is named
    for name, value in _meeting_place(os.environ).items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=timeout_s))
    try:
        yield ranks
        gc.collect()
        ranks.any(False)  # none may leave while another still holds its device's memory
    finally:
        dist.destroy_process_group()


def _meeting_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Address and port under srun: the first node, and a port that jobs on one node do not share."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "127.0.0.1"
    address = environment.get("SLURM_LAUNCH_NODE_IPADDR") or first_host(nodes)
    port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9],login` is gpu03."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UserError(f"the SLURM node list {nodes!r} cannot be read: set MASTER_ADDR")
    return match[1] + (match[2] or "")


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _pieces(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    pieces: list[list[Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        size += gradient.numel() * gradient.element_size()
        if pieces[-1] and size > _BUCKET_BYTES:
            pieces.append([])
            size = gradient.numel() * gradient.element_size()
        pieces[-1].append(gradient)
    return pieces
