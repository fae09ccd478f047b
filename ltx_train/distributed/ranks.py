"""The processes of one run: which of them this process is, and the agreements between them.

Owns the process group and its collectives. Control messages go through the CPU (gloo), so that agreeing on a flag at
the end of a step stalls no GPU. Between devices travel gradients, slices of weights and, under sequence parallelism,
tokens.
"""

from __future__ import annotations

import gc
import os
import re
import socket
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_train.contracts import Exit, UserError
from ltx_train.distributed import sequence
from ltx_train.distributed.environment import rank_variables
from ltx_train.distributed.exchange import Exchange, single_process
from ltx_train.distributed.sequence import SequenceGroup

T = TypeVar("T")
# torch 2.13 has given it another name.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor")  # noqa: B009
_all_reduce: Any = dist.all_reduce
_BUCKET_BYTES = 64 * 2**20
# Ports at which the ranks of SLURM jobs meet, by the number of the job.
MEETING_PORTS = range(20_000, 40_000)


class AgreedError(UserError):
    """An error that another rank has raised and printed. This rank ends with the same exit code and prints nothing."""

    def __init__(self, exit_code: Exit) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank of world; local: the index of this process's device on its machine. The default is a single process."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Rank 0 writes files, feeds the tracker and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective."""
        if self.world == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def lead(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its result on every rank. Collective.

        A UserError of rank 0 ends every rank: rank 0 raises it, the others raise AgreedError.
        """
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        error: UserError | None = None
        if self.leads:
            try:
                outcome[0] = work()
            except UserError as raised:
                error = raised
                outcome[1] = raised.exit_code
        dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise AgreedError(outcome[1])
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. Collective."""
        return [value] if self.world == 1 else _gathered(value, self.world, None)

    def exchange(self, size: int | None = None) -> Exchange:
        """Collectives of `size` neighbouring ranks (None: of all) over connections of their own, because they run
        beside other collectives. Every rank must call it."""
        size = size or self.world
        if size == 1:
            return single_process()
        group = self._neighbours(size)
        return Exchange(
            rank=self.rank % size, world=size, all_gather=partial(sequence.all_gather, group=group),
            reduce_scatter=partial(_reduce_scatter, group=group), all_reduce=partial(_all_reduce, group=group),
            gather_objects=partial(_gathered, world=size, group=group),
        )  # fmt: skip

    def sequence_group(self, size: int) -> SequenceGroup | None:
        """The group of `size` neighbouring ranks that share each sample's tokens; None for groups of one. Every rank
        must call it."""
        if self.world == 1 or size == 1:
            return None
        return sequence.register_group(self._neighbours(size), self.rank % size, size)

    def _neighbours(self, size: int) -> Any:
        """A new group of this rank with its neighbours: ranks 0 to size - 1, size to 2 * size - 1, ..."""
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.world, size)]
        return groups[self.rank // size]

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replaces gradients by their mean over the ranks (all-reduce in buckets of 64 MiB)."""
        if self.world == 1:
            return
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= self.world
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(list(bucket), [part.view_as(g) for g, part in zip(bucket, parts, strict=True)])


ALONE = Ranks()


def ranks_from_environment(environment: Mapping[str, str]) -> Ranks:
    """The ranks that torchrun, this project's launcher or srun have set; a single process without them."""
    names = rank_variables(environment)
    return Ranks() if names is None else Ranks(*(int(environment.get(name, "0")) for name in names))


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_s: float) -> Generator[Ranks]:
    """The default process group within the context; nothing for a single process."""
    if ranks.world == 1:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events belong to the current device where none is named
    for name, value in rendezvous(os.environ).items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=timeout_s))
    try:
        yield ranks
        gc.collect()
        ranks.any(False)  # a barrier: no rank may exit while another still has its device memory mapped
    finally:
        dist.destroy_process_group()


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Address and port under srun: the first node of the step, and a port that two jobs on one node do not share."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "127.0.0.1"
    port = MEETING_PORTS[int(environment.get("SLURM_JOB_ID", "0")) % len(MEETING_PORTS)]
    return {"MASTER_ADDR": _address(first_host(nodes), environment), "MASTER_PORT": str(port)}


def _address(host: str, environment: Mapping[str, str]) -> str:
    """The host's name, or the address of the node that started the step where names of nodes are not host names.

    That address does not come first: in a step that was started from a login node it is the login node's.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", host)
    return host


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9].cluster,login` gives gpu03.cluster."""
    # A part is a text without commas and brackets; a range in brackets stands for its first number.
    match = re.match(r"((?:[^\[\],]+|\[[^\]]+\])+)", nodes)
    if match is None:
        raise UserError(f"the SLURM node list {nodes!r} cannot be read: set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[1])


def _gathered(value: Any, world: int, group: Any) -> list[Any]:
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        size += gradient.numel() * gradient.element_size()
        if buckets[-1] and size > _BUCKET_BYTES:
            buckets.append([])
            size = gradient.numel() * gradient.element_size()
        buckets[-1].append(gradient)
    return buckets
