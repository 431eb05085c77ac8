"""Expert weights in fewer bits, as they travel: groups of 128 neighbouring weights share a scale.

A level is (code - middle) * scale, with all 2^bits codes in use and none of them zero; the scale is the one of a few
that leaves the smallest squared error, since with two bits most weights of a group are far from its largest. A packed
expert is one row of bytes, scales first, so that a copy stays one message whose length is what the simulator charges.
Knows nothing about slots or policies. Shape letters: N experts, P weights of one, Q groups of one, C bytes of one.
"""

from __future__ import annotations

import torch

from moesim.traces import InputError

GROUP = 128
"""Weights that share a scale, as in GPTQ and AWQ (arXiv 2210.17323, 2306.00978)."""
BITS = {"int8": 8, "int4": 4, "int2": 2}
CLIPS = tuple(step / 20 for step in range(6, 21))
"""Shares of a group's largest weight that the outermost level may lie at."""
SCALE_BYTES = 2


def packed_bytes(params: int, dtype: str) -> int:
    """C, bytes of one expert of `params` weights. Raises InputError for an unknown dtype."""
    groups = -(-params // GROUP)
    return groups * SCALE_BYTES + -(-params * bits_of(dtype) // 8)


def bits_of(dtype: str) -> int:
    """Bits of a weight. Raises InputError for an unknown dtype."""
    if dtype not in BITS:
        raise InputError(f"unknown dtype of copies {dtype!r}; known: {', '.join(BITS)}")
    return BITS[dtype]


def quantise(rows_NP: torch.Tensor, dtype: str) -> torch.Tensor:
    """[N, C] uint8 the rows, packed. Raises InputError for an unknown dtype."""
    bits, (N, P) = bits_of(dtype), rows_NP.shape
    groups_NQX = torch.nn.functional.pad(rows_NP.float(), (0, -P % GROUP)).view(N, -1, GROUP)
    scale_NQ1 = _scales(groups_NQX, bits)
    codes_NP = _codes(groups_NQX, scale_NQ1.float(), bits).to(torch.uint8).view(N, -1)
    per_byte = 8 // bits
    lanes_NBX = codes_NP[:, : -(-P // per_byte) * per_byte].view(N, -1, per_byte)
    shift_X = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows_NP.device)
    bytes_NB = (lanes_NBX << shift_X).sum(dim=-1, dtype=torch.uint8)
    return torch.cat([scale_NQ1.squeeze(-1).contiguous().view(torch.uint8), bytes_NB], dim=1)


def dequantise(packed_NC: torch.Tensor, dtype: str, params: int, out_NP: torch.Tensor) -> None:
    """Fill `out_NP` [N, P], on the same device and of any float dtype, with the weights that packed rows stand for.

    In two passes over the weights (int8), or four: on a GPU this runs beside the next copy and has to be faster. Raises
    InputError for an unknown dtype.
    """
    bits, N, groups = bits_of(dtype), len(packed_NC), -(-params // GROUP)
    head = groups * SCALE_BYTES
    # A copy, as a row of odd length or offset could not be seen as float16.
    scale_NQ = packed_NC[:, :head].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    codes_NP = packed_NC[:, head:]
    if bits < 8:
        shift_X = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_NC.device)
        codes_NP = (codes_NP[:, :, None] >> shift_X).bitwise_and_(2**bits - 1).view(N, -1)[:, :params]
    level_NP = torch.sub(codes_NP, _middle(bits))  # float32
    if params % GROUP:
        out_NP.copy_(level_NP * scale_NQ.repeat_interleave(GROUP, dim=1)[:, :params])
        return
    for n in range(N):  # a view of each row, as rows of `out_NP` need not lie side by side
        torch.mul(level_NP[n].view(groups, GROUP), scale_NQ[n, :, None], out=out_NP[n].view(groups, GROUP))


def _middle(bits: int) -> float:
    return float(2**bits - 1) / 2


def _codes(groups_NQX: torch.Tensor, scale_NQ1: torch.Tensor, bits: int) -> torch.Tensor:
    # A group of zeros has the scale 0; whatever its codes, it stays zero.
    level_NQX = groups_NQX / scale_NQ1.clamp(min=torch.finfo(torch.float32).tiny) + _middle(bits)
    return level_NQX.round().clamp(0, 2**bits - 1)


def _scales(groups_NQX: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, Q, 1] float16 scales, of those that CLIPS allow the one with the smallest squared error."""
    largest_NQ1 = groups_NQX.abs().amax(dim=-1, keepdim=True)
    best_NQ1 = torch.zeros_like(largest_NQ1, dtype=torch.float16)
    least_NQ1 = torch.full_like(largest_NQ1, torch.inf)
    for clip in CLIPS:
        scale_NQ1 = (largest_NQ1 * (clip / _middle(bits))).half()
        told_NQX = (_codes(groups_NQX, scale_NQ1.float(), bits) - _middle(bits)) * scale_NQ1.float()
        error_NQ1 = (told_NQX - groups_NQX).square().sum(dim=-1, keepdim=True)
        better = error_NQ1 < least_NQ1
        best_NQ1, least_NQ1 = torch.where(better, scale_NQ1, best_NQ1), torch.where(better, error_NQ1, least_NQ1)
    return best_NQ1
