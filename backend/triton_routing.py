# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton is a language of its own: its parameters are pointers and constants, which Python's types do not describe.
"""The Triton programs behind routing_kernels.py, imported only where triton is installed. Letters as there.

They compare all pairs of places instead of sorting: more work, but one launch, and the sizes are small. Sizes of
batches are not specialised, or every new one would compile them again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def choose(logits_ME, ids_M, prob_M, rows, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Softmax, rounded to the dtype of `prob_M`, then the first of the largest."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.arange(0, EXPERTS)
    known = e[None, :] < experts
    at = logits_ME + row[:, None] * experts + e[None, :]
    logits = tl.load(at, mask=(row < rows)[:, None] & known, other=0.0)
    logits = tl.where(known, logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    prob = (share / tl.sum(share, 1)[:, None]).to(prob_M.dtype.element_ty).to(tl.float32)
    prob = tl.where(known, prob, -1.0)
    best = tl.max(prob, 1)
    first = tl.min(tl.where(prob == best[:, None], e[None, :], EXPERTS), 1)
    tl.store(ids_M + row, first.to(ids_M.dtype.element_ty), mask=row < rows)
    tl.store(prob_M + row, best.to(prob_M.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["length", "capacity"])
def drop(ids_BS, out_BS, length, capacity, none, ROWS: tl.constexpr):
    """The ids of one piece of a sequence, `none` where as many as `capacity` before it are the same."""
    sequence = ids_BS + tl.program_id(0).to(tl.int64) * length
    first = tl.program_id(1) * ROWS
    i = first + tl.arange(0, ROWS)
    mine = tl.load(sequence + i, mask=i < length, other=0).to(tl.int32)
    rank = tl.zeros((ROWS,), tl.int32)
    for start in range(0, first + ROWS, ROWS):
        j = start + tl.arange(0, ROWS)
        other = tl.load(sequence + j, mask=j < length, other=0).to(tl.int32)
        before = j[None, :] < i[:, None]
        rank += tl.sum(((mine[:, None] == other[None, :]) & before).to(tl.int32), 1)
    kept = tl.where(rank >= capacity, none, mine)
    out = out_BS + tl.program_id(0).to(tl.int64) * length
    tl.store(out + i, kept.to(out_BS.dtype.element_ty), mask=i < length)


@triton.jit(do_not_specialize=["rows", "pieces"])
def group(ids_M, order_M, offsets_X1, rows, experts, pieces, ROWS: tl.constexpr):
    """A stable counting sort: the first `pieces` programs place pairs, the others find where groups begin."""
    program = tl.program_id(0)
    place = program < pieces
    i = tl.where(place, program, program - pieces) * ROWS + tl.arange(0, ROWS)
    # What goes before pair i: smaller ids, and the same id earlier. What goes before group i: ids smaller than i.
    mine = i
    if place:
        mine = tl.load(ids_M + i, mask=i < rows, other=0).to(tl.int32)
        mine = tl.where((mine < 0) | (mine > experts), experts, mine)
    before = tl.zeros((ROWS,), tl.int32)
    for start in range(0, rows, ROWS):
        j = start + tl.arange(0, ROWS)
        other = tl.load(ids_M + j, mask=j < rows, other=0).to(tl.int32)
        other = tl.where((other < 0) | (other > experts), experts, other)
        earlier = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None]) & place
        goes = ((other[None, :] < mine[:, None]) | earlier) & (j < rows)[None, :]
        before += tl.sum(goes.to(tl.int32), 1)
    if place:
        tl.store(order_M + before, i.to(tl.int64), mask=i < rows)
    else:
        tl.store(offsets_X1 + i, before, mask=i <= experts)
