# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton is a language of its own: its parameters are pointers and constants, which Python's types do not describe.
"""The Triton programs behind kernels.py: which tile is this, and the two matrix products.

Every program finds its group from the prefix sums of the groups' sizes. Imported only where triton is installed.
Shape letters as in kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find(offsets_X1, groups, GROUPS: tl.constexpr, ROWS: tl.constexpr, tile):
    """(group, first row, end of the group's rows) of the tile with this number; group == groups past the last."""
    g = tl.arange(0, GROUPS)
    start = tl.load(offsets_X1 + g, mask=g < groups, other=0)
    end = tl.load(offsets_X1 + g + 1, mask=g < groups, other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    group = tl.sum(((upto <= tile) & (g < groups)).to(tl.int32), 0)
    here = g == group
    first = tl.sum(tl.where(here, start + (tile - (upto - tiles)) * ROWS, 0), 0)
    return group, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of kernels.ACTIVATIONS, in float32."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    # tanh(u) = 2 sigmoid(2 u) - 1
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def up(
    x_ND,
    source_M,
    offsets_X1,
    slot_X,
    up_SFD,
    h_MF,
    groups,
    slot_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the first product: gather tokens, multiply, activate (and gate), rows in the order of the groups."""
    across = tl.cdiv(F, COLUMNS)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    group, first, end = find(offsets_X1, groups, GROUPS, ROWS, tile)
    if group >= groups:
        return
    row = first + tl.arange(0, ROWS)
    source = tl.load(source_M + row, mask=row < end, other=0).to(tl.int64)
    f = column * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    weights = up_SFD + tl.load(slot_X + group).to(tl.int64) * slot_stride
    x_at = x_ND + source[:, None] * D + d[None, :]
    w_at = weights + f[:, None] * D + d[None, :]
    gate_at = w_at
    if GATED:  # the gate's rows lie before the others
        w_at += F * D
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, tl.cdiv(D, DEPTH)):
        inside = d[None, :] < D - k * DEPTH
        x = tl.load(x_at, mask=inside & (row < end)[:, None], other=0.0)
        w = tl.load(w_at, mask=inside & (f < F)[:, None], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
        if GATED:
            v = tl.load(gate_at, mask=inside & (f < F)[:, None], other=0.0)
            gate = tl.dot(x, tl.trans(v), gate, input_precision=PRECISION)
            gate_at += DEPTH
        x_at += DEPTH
        w_at += DEPTH
    h = activate(gate, ACTIVATION) * total if GATED else activate(total, ACTIVATION)
    h_at = h_MF + row[:, None].to(tl.int64) * F + f[None, :]
    tl.store(h_at, h.to(h_MF.dtype.element_ty), mask=(row < end)[:, None] & (f < F)[None, :])


@triton.jit
def down(
    h_MF,
    target_M,
    scale_M,
    offsets_X1,
    slot_X,
    down_SDF,
    out_PD,
    groups,
    slot_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the second product: multiply, round, scale, and write every row to its token."""
    across = tl.cdiv(D, COLUMNS)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    group, first, end = find(offsets_X1, groups, GROUPS, ROWS, tile)
    if group >= groups:
        return
    row = first + tl.arange(0, ROWS)
    d = column * COLUMNS + tl.arange(0, COLUMNS)
    f = tl.arange(0, DEPTH)
    weights = down_SDF + tl.load(slot_X + group).to(tl.int64) * slot_stride
    h_at = h_MF + row[:, None].to(tl.int64) * F + f[None, :]
    w_at = weights + d[:, None] * F + f[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, tl.cdiv(F, DEPTH)):
        inside = f[None, :] < F - k * DEPTH
        h = tl.load(h_at, mask=inside & (row < end)[:, None], other=0.0)
        w = tl.load(w_at, mask=inside & (d < D)[:, None], other=0.0)
        total = tl.dot(h, tl.trans(w), total, input_precision=PRECISION)
        h_at += DEPTH
        w_at += DEPTH
    out = total.to(out_PD.dtype.element_ty)  # rounded before it is scaled, as separate operations would
    target = tl.load(target_M + row, mask=row < end, other=0).to(tl.int64)
    if SCALED:
        scale = tl.load(scale_M + target, mask=row < end, other=0.0)
        out = (out.to(tl.float32) * scale.to(tl.float32)[:, None]).to(out_PD.dtype.element_ty)
    tl.store(out_PD + target[:, None] * D + d[None, :], out, mask=(row < end)[:, None] & (d < D)[None, :])
