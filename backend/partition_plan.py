"""From the split of one layer's tokens to what each partition computes: who takes which token, in which order.

The device sorts the tokens by expert while the host decides. The split then says how many of an expert's tokens go to
each partition, and every token finds its place by its rank among its expert's: the first ones go to the first partition
that takes any. A partition's tokens lie together, slot by slot of the layer, so that one grouped product serves them.
Shape letters: T tokens, E experts, G partitions, S slots of a partition and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.sim.dispatch import Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the device is told of one layer, in one message."""

    message: NDArray[np.int32]
    """offsets [G, W], W being `offsets_width`; then for E experts and one row for tokens of none: start [E + 1], upper
    [E + 1, G] and shift [E + 1, G], see `place`."""
    first_G: list[int]
    """Where each partition's tokens begin: at even places, so that kernels find all of them alike aligned (16 bytes),
    or each alignment would be compiled anew."""
    tokens_GS: Ints
    """Tokens of every slot."""

    @property
    def tokens_G(self) -> list[int]:
        """Tokens of every partition."""
        found: list[int] = self.tokens_GS.sum(axis=1).tolist()
        return found


def offsets_width(slots: int) -> int:
    """Numbers from one partition's offsets to the next one's: S + 1 in whole 16 bytes, for the same reason."""
    return -(-(slots + 1) // 4) * 4


def message_size(gpus: int, slots: int, experts: int) -> int:
    """Numbers in a plan's message."""
    return gpus * offsets_width(slots) + (experts + 1) * (1 + 2 * gpus)


def make_plan(tokens_EG: Ints, experts_GS: NDArray[np.integer]) -> Plan:
    """`tokens_EG` of each expert to each partition; `experts_GS` which expert is in which slot, negative where none.

    An expert that has tokens on a partition must be in one of its slots.
    """
    E, G = tokens_EG.shape
    S = experts_GS.shape[1]
    here_GS = experts_GS >= 0
    tokens_GS = np.where(here_GS, tokens_EG[np.where(here_GS, experts_GS, 0), np.arange(G)[:, None]], 0)
    assert tokens_GS.sum() == tokens_EG.sum(), "tokens go where their expert is"
    offsets_GW = np.zeros((G, offsets_width(S)), np.int64)
    np.cumsum(tokens_GS, axis=1, out=offsets_GW[:, 1 : S + 1])
    even_G = -(-tokens_GS.sum(axis=1) // 2) * 2
    first_G = np.cumsum(even_G) - even_G
    upper_EG = np.cumsum(tokens_EG, axis=1)
    at_EG = np.zeros((E, G), np.int64)
    gpu, slot = np.nonzero(here_GS)
    at_EG[experts_GS[gpu, slot], gpu] = first_G[gpu] + offsets_GW[gpu, slot]
    shift_EG = at_EG - (upper_EG - tokens_EG)
    load_E = upper_EG[:, -1]
    none = np.full((1, G), np.iinfo(np.int32).max)
    message = np.concatenate(
        [
            offsets_GW.ravel(),
            np.append(np.cumsum(load_E) - load_E, load_E.sum()),
            np.concatenate([upper_EG, none]).ravel(),
            np.concatenate([shift_EG, np.full((1, G), even_G.sum())]).ravel(),
        ]
    )
    return Plan(message=message.astype(np.int32), first_G=first_G.tolist(), tokens_GS=tokens_GS)


def place(message: torch.Tensor, expert_T: torch.Tensor, order_T: torch.Tensor, gpus: int, slots: int) -> torch.Tensor:
    """[T + G] the tokens in the order in which the partitions compute them: each partition's from its `first_G` on,
    those of no expert after all others, and zeros where nothing is.

    `expert_T` are the tokens' experts, sorted (E: none), `order_T` which tokens these are. A token's rank among its
    expert's is its place minus the expert's start; the first partition whose upper bound is above the rank takes it, at
    rank plus shift. Does not wait for the device.
    """
    T = len(expert_T)
    rest = message[gpus * offsets_width(slots) :]
    rows = len(rest) // (1 + 2 * gpus)
    start_E = rest[:rows]
    upper_EG, shift_EG = rest[rows:].view(2, rows, gpus)
    expert_T = expert_T.long()
    rank_T = torch.arange(T, dtype=torch.int32, device=message.device) - start_E[expert_T]
    taker_T = (rank_T[:, None] >= upper_EG[expert_T]).sum(dim=1)
    at_T = rank_T + shift_EG[expert_T, taker_T]
    return order_T.new_zeros(T + gpus).index_copy_(0, at_T.long(), order_T)
