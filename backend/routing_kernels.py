"""Routing and grouping in one launch each, for CUDA: what takes torch some ten small operations.

`route` and `group` fill what SwitchRouting and group_pairs return. Imports without triton. Shape letters: M pairs or
tokens, B sequences of length S, E experts, X groups.
"""

from __future__ import annotations

import torch

from moesim.backend.kernels import HAVE_TRITON, power_of_two

if HAVE_TRITON:
    from moesim.backend import triton_routing

MOST_PAIRS = 4096
"""Pairs up to which comparing all of them is faster than a sort."""
MOST_LENGTH = 4096
"""Of a sequence, the same for the capacity."""
ROWS = 64


def choose(logits_ME: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[M] the expert of the largest probability, the first of equals, and [M] that probability, rounded to `dtype`.

    Ids are uint8 where they, and E for none, fit.
    """
    M, E = logits_ME.shape
    ids_M = torch.empty(M, dtype=torch.uint8 if E <= 255 else torch.int32, device=logits_ME.device)
    prob_M = torch.empty(M, dtype=dtype, device=logits_ME.device)
    if M:
        rows = 16 if E <= 256 else 4
        grid = (-(-M // rows),)
        triton_routing.choose[grid](logits_ME, ids_M, prob_M, M, E, EXPERTS=power_of_two(E), ROWS=rows)
    return ids_M, prob_M


def drop(ids_BS: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """[B, S] as routing.drop_over_capacity, for contiguous ids and sequences of up to MOST_LENGTH."""
    (B, S), out_BS = ids_BS.shape, torch.empty_like(ids_BS)
    if B and S:
        triton_routing.drop[(B, -(-S // ROWS))](ids_BS, out_BS, S, capacity, experts, ROWS=ROWS)
    return out_BS


def group(ids_M: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [M] pairs sorted by expert, int32 [E + 1] where groups begin), as in Groups, of up to MOST_PAIRS pairs."""
    M = len(ids_M)
    order_M = torch.empty(M, dtype=torch.int64, device=ids_M.device)
    offsets_X1 = torch.empty(experts + 1, dtype=torch.int32, device=ids_M.device)
    pieces = -(-M // ROWS)
    grid = (pieces + -(-(experts + 1) // ROWS),)
    triton_routing.group[grid](ids_M, order_M, offsets_X1, M, experts, pieces, ROWS=ROWS)
    return order_M, offsets_X1
