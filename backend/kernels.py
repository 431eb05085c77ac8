"""Triton kernels for the feed-forward of routed experts: a gathered and a scattered matrix product over groups of rows.

Every group of rows (the tokens of one expert) meets the weights of its own slot. Sizes of groups stay on the device:
each program finds its tile from the prefix sums, so nothing is copied to the host and the launches can be captured in a
CUDA graph. `grouped_up` gathers tokens, `grouped_down` writes each result to its token, scaled; no permuted copy of the
activations is made. Imports without triton. Shape letters: N tokens, M rows in the order of the groups, X groups,
S slots, D = d_model, F = d_ff.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

try:
    from moesim.backend import triton_kernels
except ImportError:  # a build of torch for the CPU comes without triton
    HAVE_TRITON = False
else:
    HAVE_TRITON = True

ACTIVATIONS = ("relu", "silu", "gelu_new")
SHARED_BYTES = 227 * 1024
"""Most shared memory that a program can have on an H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows, columns and depth of one program's tile, its warps and software-pipelining stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, matrices: int) -> int:
        """Shared memory for all stages of one tile of rows and one of each of the weight matrices."""
        return (self.rows + matrices * self.columns) * self.depth * itemsize * self.stages


def tile_of(rows: int, groups: int, columns: int, *, itemsize: int = 2, matrices: int = 1) -> Tile:
    """The tile that suits `rows` rows in at most `groups` groups and so many output columns.

    `itemsize`: bytes of a number; `matrices`: that a program multiplies with, two where experts are gated. Tiles of
    wider numbers are as many bytes deep. Where two matrices would not fit into shared memory there are fewer stages.
    """
    tile = _suited(rows, groups, columns)
    tile = replace(tile, depth=tile.depth * 2 // itemsize)
    while tile.shared_bytes(itemsize, matrices) > SHARED_BYTES:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def _suited(rows: int, groups: int, columns: int) -> Tile:
    """See `tile_of`, for bfloat16 and one matrix."""
    mean = rows / max(min(groups, rows), 1)
    if rows <= 8:  # a decode step of few requests: latency, so many small programs
        return Tile(rows=16, columns=16 if columns <= 1024 else 32, depth=256, warps=4, stages=3)
    if mean <= 16:
        return Tile(rows=16, columns=64, depth=128, warps=4, stages=4)
    if mean <= 48:
        return Tile(rows=32, columns=128, depth=64, warps=4, stages=4)
    if mean <= 128:
        return Tile(rows=64, columns=128, depth=64, warps=4, stages=4)
    return Tile(rows=64, columns=256, depth=64, warps=8, stages=4)


def grouped_up(
    x_ND: torch.Tensor,
    source_M: torch.Tensor,
    offsets_X1: torch.Tensor,
    slot_X: torch.Tensor,
    up_SFD: torch.Tensor,
    *,
    activation: str,
    gated: bool,
    tile: Tile | None = None,
) -> torch.Tensor:
    """[M, F] activation of the first matrix product, rows in the order of the groups.

    Row i reads token `source_M[i]`; group g has the rows from offsets[g] to offsets[g + 1] and the weights of slot
    `slot_X[g]`, [F, D] or, gated, [2F, D]: gate, then up. Rows past the last offset are left as they are: undefined.
    """
    M, D, width = len(source_M), x_ND.shape[1], up_SFD.shape[1]
    F = width // 2 if gated else width
    tile = tile or tile_of(M, len(slot_X), F, itemsize=x_ND.itemsize, matrices=1 + gated)
    h_MF = torch.empty((M, F), dtype=x_ND.dtype, device=x_ND.device)
    if M:
        triton_kernels.up[_grid(M, len(slot_X), tile, F)](
            x_ND,
            source_M,
            offsets_X1,
            slot_X,
            up_SFD,
            h_MF,
            len(slot_X),
            up_SFD.stride(0),
            D=D,
            F=F,
            ACTIVATION=activation,
            GATED=gated,
            **_constants(tile, len(slot_X), x_ND.dtype),
        )
    return h_MF


def grouped_down(
    h_MF: torch.Tensor,
    target_M: torch.Tensor,
    scale_P: torch.Tensor | None,
    offsets_X1: torch.Tensor,
    slot_X: torch.Tensor,
    down_SDF: torch.Tensor,
    out_PD: torch.Tensor,
    *,
    tile: Tile | None = None,
) -> None:
    """Second matrix product: row i goes to `out_PD[target_M[i]]`, times `scale_P[target_M[i]]` where there are scales.

    Rows past the last offset are not written.
    """
    M, F, D = len(target_M), h_MF.shape[1], out_PD.shape[1]
    tile = tile or tile_of(M, len(slot_X), D, itemsize=h_MF.itemsize)
    if M:
        triton_kernels.down[_grid(M, len(slot_X), tile, D)](
            h_MF,
            target_M,
            scale_P,
            offsets_X1,
            slot_X,
            down_SDF,
            out_PD,
            len(slot_X),
            down_SDF.stride(0),
            D=D,
            F=F,
            SCALED=scale_P is not None,
            **_constants(tile, len(slot_X), h_MF.dtype),
        )


def _grid(rows: int, groups: int, tile: Tile, columns: int) -> tuple[int]:
    """As many tiles as the groups can fill at most: every group may leave its last one nearly empty."""
    down = min(rows, rows // tile.rows + groups)
    return (down * -(-columns // tile.columns),)


def power_of_two(size: int) -> int:
    """The least one, from 2 on, that is not smaller: what Triton's ranges are long."""
    return 1 << max((size - 1).bit_length(), 1)


def _constants(tile: Tile, groups: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "GROUPS": power_of_two(groups),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
