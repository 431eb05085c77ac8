"""What `gate-attention` does for every token, compiled by numba and imported where it is needed only.

A draft is one compiled call, so that two threads can each make half of it. As in predictors/kernels.py, sizes that are
known are compiled in and there are none of Python's errors of division. Rows are added in eights: fewer would wait for
memory, more would not fit the registers. Shape letters: T tokens, L routed layers, E experts, K experts per token, D
router input, R rank, V vocabulary rows, B requests of S positions, A heads, W values, Y queries or keys, I twice that,
P distances.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from moesim.predictors.kernels import add_product, from_bits
from moesim.predictors.learned.gate_attention_heads import FAR, ONE, UNSEEN, ZERO, attend, power, room
from moesim.traces.compiled import compiled, prefetch

LOG2_E, LEAST = np.float32(1 / np.log(2)), np.float32(np.finfo(np.float32).eps)
SOON = 4
"""Tokens that a row is asked of memory earlier than it is read."""


@compiled(error_model="numpy")
def rows_of(known_V: Any, ids_T: Any) -> Any:
    """[T] the vocabulary row of each id, the last one where it is none of `known_V`; as Vocabulary.rows."""
    row_T = np.full(len(ids_T), len(known_V))
    for t in range(len(ids_T) if len(known_V) else 0):
        row, left = 0, len(known_V)
        while left > 1:  # always as often, and without a jump that would have to be guessed
            half = left // 2
            row += half if known_V[row + half] <= ids_T[t] else 0
            left -= half
        if known_V[row] == ids_T[t]:
            row_T[t] = row
    return row_T


@cache
def first(width: int, experts: int, rank: int, inner: int, keys: int, heads: int) -> Any:
    """What makes the first draft, for D = `width`, E = `experts`, R = `rank`, W = `inner`, Y = `keys` and A = `heads`;
    8 divides R and W / A, 4 divides Y / A."""
    D, E, R, W, Y, A = width, experts, rank, inner, keys, heads

    @compiled(fastmath=True, error_model="numpy")
    def draft(given: Any, rows: Any, scales: Any, block: Any, u_TD: Any, said: Any, part: Any) -> None:
        """See `_begin` and `_answer`."""
        _begin((D, E, R), given, rows, scales, part, u_TD)
        _answer((D, E, W, Y, A), True, block, part, u_TD, said)

    return draft


@cache
def later(width: int, experts: int, inner: int, keys: int, heads: int) -> Any:
    """What makes the drafts behind it, for the same sizes."""
    D, E, W, Y, A = width, experts, inner, keys, heads

    @compiled(fastmath=True, error_model="numpy")
    def draft(sharpness: Any, soft_ED: Any, last_TE: Any, block: Any, u_TD: Any, said: Any, part: Any) -> None:
        """See `_answer`; u_TD is the draft before, `last_TE` its logits, and softmax(sharpness * these) are the experts
        that act in between, each of which adds its row of `soft_ED`."""
        rows = slice(part[1], part[1] + part[2].sum())
        p_TE = np.empty(last_TE[rows].shape, np.float32)
        for t in range(len(p_TE)):
            _softened(last_TE[rows.start + t], sharpness * LOG2_E, p_TE[t])
        add_product((E, D), p_TE, soft_ED, u_TD[rows])
        _answer((D, E, W, Y, A), False, block, part, u_TD, said)

    return draft


@compiled(fastmath=True, error_model="numpy", inline="always")
def _begin(sizes: Any, given: Any, rows: Any, scales: Any, part: Any, u_TD: Any) -> None:
    """The draft before attention of the tokens of `part`. `given` are the router inputs of the layer and of the one
    before as the bits of float16, ids_LTK, weight_LTK, id_T and known_V; `rows` own_D, earlier_D, words_VD, routes_LED,
    down_ERD and up_ERD, flat; `scales` the logarithms of what the router input is scaled by: for each of its numbers,
    expert and vocabulary row."""
    D, E, R = sizes
    bits_TD, before_TD, ids_LTK, weight_LTK, id_T, known_V = given
    own_D, earlier_D, words, routes, down, up = rows
    scale_D, scale_E, scale_V = scales
    x_D = np.empty(D, np.float32)
    begin, end = part[1], part[1] + part[2].sum()
    word_N, order_T = rows_of(known_V, id_T[begin:end]), _by_expert(ids_LTK[-1], begin, end, E)
    for number in range(len(order_T)):
        t, soon = order_T[number], order_T[min(number + SOON, len(order_T) - 1)]
        soon_D, row_D = words[D * word_N[soon - begin] :], u_TD[soon]
        for d in range(0, D, 16):
            prefetch(soon_D[d:])
            prefetch(row_D[d:])
        bits_D, before_D = bits_TD[soon], before_TD[soon]
        for d in range(0, D, 32):
            prefetch(bits_D[d:])
            prefetch(before_D[d:])
        bits_D, before_D, u_D, word = bits_TD[t], before_TD[t], u_TD[t], word_N[t - begin]
        ids_LK, weight_LK = ids_LTK[:, t], weight_LTK[:, t]
        log, row_D = scale_V[word], words[D * word :]
        for d in range(D):
            x_D[d] = from_bits(bits_D[d])
            log += x_D[d] * scale_D[d]
        for k in range(ids_LK.shape[1]):
            log += weight_LK[-1, k] * scale_E[ids_LK[-1, k]]
        scale = np.exp(log)
        for d in range(D):
            u_D[d] = (x_D[d] * own_D[d] + from_bits(before_D[d]) * earlier_D[d]) * scale + row_D[d]
        for layer in range(len(ids_LK)):
            for k in range(ids_LK.shape[1]):
                row_D, weight = routes[D * (layer * len(scale_E) + ids_LK[layer, k]) :], weight_LK[layer, k]
                for d in range(D):
                    u_D[d] += weight * row_D[d]
        for k in range(ids_LK.shape[1]):
            at = D * R * ids_LK[-1, k]
            _act((D, R), x_D, down[at:], up[at:], weight_LK[-1, k], u_D)


@compiled(fastmath=True, error_model="numpy", inline="always")
def _act(sizes: Any, x_D: Any, down: Any, up: Any, weight: Any, u_D: Any) -> None:
    """What an expert adds: up relu(down x), times its weight."""
    D, R = sizes
    for r in range(0, R, 8):
        i, j = down[D * r :], up[D * r :]
        a, b, c, d, e, f, g, h = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        for n in range(D):
            x = x_D[n]
            a, b, c, d = a + x * i[n], b + x * i[n + D], c + x * i[n + 2 * D], d + x * i[n + 3 * D]
            e, f, g, h = e + x * i[n + 4 * D], f + x * i[n + 5 * D], g + x * i[n + 6 * D], h + x * i[n + 7 * D]
        a, b, c, d = max(a, ZERO) * weight, max(b, ZERO) * weight, max(c, ZERO) * weight, max(d, ZERO) * weight
        e, f, g, h = max(e, ZERO) * weight, max(f, ZERO) * weight, max(g, ZERO) * weight, max(h, ZERO) * weight
        for n in range(D):
            near = a * j[n] + b * j[n + D] + c * j[n + 2 * D] + d * j[n + 3 * D]
            u_D[n] += near + e * j[n + 4 * D] + f * j[n + 5 * D] + g * j[n + 6 * D] + h * j[n + 7 * D]


@compiled(error_model="numpy")
def _by_expert(ids_TK: Any, begin: int, end: int, experts: int) -> Any:
    """These tokens in the order of their first experts, so that what belongs to one is read once."""
    at_E, order_T = np.zeros(experts + 1, np.int64), np.empty(end - begin, np.int64)
    for t in range(begin, end):
        at_E[ids_TK[t, 0] + 1] += 1
    for e in range(experts):
        at_E[e + 1] += at_E[e]
    for t in range(begin, end):
        expert = ids_TK[t, 0]
        order_T[at_E[expert]] = t
        at_E[expert] += 1
    return order_T


@compiled(fastmath=True, error_model="numpy", inline="always")
def _answer(sizes: Any, latent: bool, block: Any, part: Any, u_TD: Any, said: Any) -> None:
    """u += attention(u over its root mean square), and what the gate says of u over its new one. `part` is its number,
    first row, and the lengths of its requests and of the longest of all; `block` is the map of u to values in heads,
    the one to queries and keys, which a `latent` block reads from the values and others from u, the one back, gate_DE,
    bias_E, bias_AP and whether later tokens are hidden; bias_AP[:, SPARE + P // 2 + far] is of a key `far` before its
    query. `said` are a sharpness, logits_TE, and what follows from both: p_TE, the likeliest expert of each token, and
    by part the sum of p_TE."""
    D, E, W, Y, A = sizes
    sharpness, logits_TE, p_TE, likeliest_T1, load_PE = said
    number, row, length_B, longest = part
    value_DW, told_XI, out_WD, gate_DE, bias_E, bias_AP, causal = block
    load_E = np.zeros(E)  # not those of another part beside it: two threads would wait for the line that both are in
    value_SW, mixed_SW = np.empty((longest, W), np.float32), np.empty((longest, W), np.float32)
    told_SI = np.empty((longest, 2 * Y), np.float32)
    place = room(longest, W // A, Y // A)
    for S in length_B:
        u_SD, logits_SE = u_TD[row : row + S], logits_TE[row : row + S]
        value_SW[:S], told_SI[:S] = ZERO, ZERO
        add_product((D, W), u_SD, value_DW, value_SW)
        if not latent:
            add_product((D, 2 * Y), u_SD, told_XI, told_SI)
        for s in range(S):
            scale, value_W, told_I = _over_root(u_SD[s]), value_SW[s], told_SI[s]
            for w in range(W):
                value_W[w] *= scale
            for i in range(2 * Y):
                told_I[i] *= scale  # of a latent block still zeros
        if latent:
            add_product((W, 2 * Y), value_SW[:S], told_XI, told_SI)
        for head in range(A):
            attend((W // A, Y // A), head, S, told_SI, value_SW, bias_AP[head], causal, place, mixed_SW)
        add_product((W, D), mixed_SW[:S], out_WD, u_SD)
        logits_SE[:] = ZERO
        add_product((D, E), u_SD, gate_DE, logits_SE)
        for s in range(S):
            scale, logits_E = _over_root(u_SD[s]), logits_SE[s]
            for e in range(E):
                logits_E[e] = logits_E[e] * scale + bias_E[e]
            likeliest_T1[row + s, 0] = _softened(logits_E, sharpness * LOG2_E, p_TE[row + s])
            for e in range(E):
                load_E[e] += p_TE[row + s, e]
        row += S
    load_PE[number] = load_E


@compiled(fastmath=True, error_model="numpy", inline="always")
def _softened(logits_E: Any, sharpness: Any, p_E: Any) -> Any:
    """softmax(sharpness * logits), to the base of 2; returns where it is highest, the lowest id of several."""
    most, total, best = UNSEEN, ZERO, len(p_E)
    for e in range(len(p_E)):
        most = max(most, logits_E[e])
    for e in range(len(p_E)):
        p = power(max(sharpness * (logits_E[e] - most), FAR))
        p_E[e] = p
        total += p
    for e in range(len(p_E)):
        best = min(best, e if logits_E[e] == most else len(p_E))
    total = ONE / total
    for e in range(len(p_E)):
        p_E[e] *= total
    return best


@compiled(fastmath=True, error_model="numpy")
def _over_root(u_D: Any) -> Any:
    """1 over the root mean square, as torch's rms_norm takes it."""
    squares = ZERO
    for d in range(len(u_D)):
        squares += u_D[d] * u_D[d]
    return ONE / np.sqrt(squares / np.float32(len(u_D)) + LEAST)
