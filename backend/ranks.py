"""The ranks of one run: who am I, on which device, and the collectives that the executor needs.

Tensors only: nothing here pickles. Knows nothing about experts or policies. Shape letters: G ranks (a rank is a GPU).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moesim.traces import InputError

TIMEOUT = timedelta(minutes=10)
"""After this long without an answer a collective raises. A rank that dies is noticed at once; this is for a hang."""

# One function under two names: torch 2.13 warns of the old one, torch 2.9 lacks the new one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One rank's view of its group. `copies` is a second communicator, so that weights never queue behind tokens."""

    rank: int
    size: int
    device: torch.device
    main: dist.ProcessGroup
    copies: dist.ProcessGroup

    @property
    def on_gpu(self) -> bool:
        """True where the ranks compute on CUDA devices."""
        return self.device.type == "cuda"

    def barrier(self) -> None:
        """Return when all ranks have come here, their device work included."""
        token = torch.zeros(1, device=self.device)
        dist.all_reduce(token, group=self.main)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for this rank's device; nothing to wait for on a CPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def all_gather(self, mine_X: torch.Tensor) -> torch.Tensor:
        """[G, *X] what every rank passed; the shape must be the same on all of them. On the CPU when it returns."""
        flat = mine_X.to(self.device).reshape(-1)
        gathered = torch.empty(self.size * flat.numel(), dtype=flat.dtype, device=self.device)
        _all_gather(gathered, flat, group=self.main)
        return gathered.cpu().view(self.size, *mine_X.shape)

    def all_to_all(self, rows_ND: torch.Tensor, sent_G: list[int], received_G: list[int]) -> torch.Tensor:
        """[sum(received_G), D] rows from all ranks in rank order; `rows_ND` lies in the order of its receivers.

        Sent as bytes on a CPU, where gloo knows fewer dtypes than torch.
        """
        width = rows_ND.shape[1]
        received = torch.empty((sum(received_G), width), dtype=rows_ND.dtype, device=rows_ND.device)
        source, target = rows_ND.contiguous(), received
        if not self.on_gpu:
            source, target = source.view(torch.uint8), received.view(torch.uint8)
        dist.all_to_all_single(target, source, received_G, sent_G, group=self.main)
        return received


def join(device: str) -> Ranks:
    """Enter the group that torchrun described in the environment. `device` is 'cpu' or 'cuda'.

    Raises InputError where a rank has no GPU of its own.
    """
    rank, local, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device == "cuda":
        if not torch.cuda.is_available() or local >= torch.cuda.device_count():
            raise InputError(f"rank {rank} has no GPU: {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(local)
        where, backend = torch.device("cuda", local), "nccl"
    else:
        torch.set_num_threads(1)
        where, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    return group_of(list(range(size)), rank, where)


def group_of(members: list[int], rank: int, device: torch.device) -> Ranks:
    """The group of the given global ranks, `rank` being this process. Every process must call this, members or not."""
    main = dist.new_group(members, timeout=TIMEOUT)
    copies = dist.new_group(members, timeout=TIMEOUT)
    mine = members.index(rank) if rank in members else -1
    ranks = Ranks(rank=mine, size=len(members), device=device, main=main, copies=copies)
    if mine >= 0 and ranks.on_gpu:
        # A communicator's first use must be by all its ranks, and a copy between two of them is not.
        dist.all_reduce(torch.zeros(1, device=device), group=copies)
    return ranks


def leave() -> None:
    """Close all groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
