"""What `gate-attention` does for every token, compiled by numba and imported where it is needed only.

A draft is one compiled call, so that two threads can each make half of it. As in predictors/kernels.py, sizes that are
known are compiled in and there are none of Python's errors of division. Rows are added in eights: fewer would wait for
memory, more would not fit the registers. Shape letters: T tokens, L routed layers, E experts, K experts per token, D
router input, R rank, V vocabulary rows, B requests of S positions, A heads of w numbers, W all of these, P distances.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from moesim.predictors.kernels import add_product, from_bits
from moesim.traces.compiled import compiled, prefetch

ZERO, HALF, ONE, LOG2_E = np.float32(0), np.float32(0.5), np.float32(1), np.float32(1 / np.log(2))
LEAST = np.float32(np.finfo(np.float32).eps)
QUERIES = 128
"""That are attended for at a time, so that what is worked on stays near."""
N = QUERIES + 8
"""From one row of these to the next; at a power of 2 they would be in each other's way in the cache."""
SPARE = 3
"""Numbers before the biases, which are read of keys that are none."""
SOON = 4
"""Tokens that a row is asked of memory earlier than it is read."""
UNSEEN, FAR = np.float32(-1e30), np.float32(-100)
"""The score of a key that is not seen; how far below the highest one, in powers of 2, scores are told apart."""


@cache
def first(width: int, experts: int, rank: int, inner: int, heads: int) -> Any:
    """What makes the first draft, for D = `width`, E = `experts`, R = `rank`, W = `inner` and A = `heads`; 8 divides R
    and W / A."""
    D, E, R, W, A = width, experts, rank, inner, heads

    @compiled(fastmath=True, error_model="numpy")
    def draft(given: Any, rows: Any, scales: Any, block: Any, u_TD: Any, said: Any, part: Any) -> None:
        """See `_begin` and `_answer`."""
        _begin((D, E, R), given, rows, scales, part, u_TD)
        _answer((D, E, W, A), block, part, u_TD, said)

    return draft


@cache
def later(width: int, experts: int, inner: int, heads: int) -> Any:
    """What makes the drafts behind it, for the same sizes."""
    D, E, W, A = width, experts, inner, heads

    @compiled(fastmath=True, error_model="numpy")
    def draft(sharpness: Any, soft_ED: Any, last_TE: Any, block: Any, u_TD: Any, said: Any, part: Any) -> None:
        """See `_answer`; u_TD is the draft before, `last_TE` its logits, and softmax(sharpness * these) are the experts
        that act in between, each of which adds its row of `soft_ED`."""
        rows = slice(part[1], part[1] + part[2].sum())
        p_TE = np.empty(last_TE[rows].shape, np.float32)
        for t in range(len(p_TE)):
            _softened(last_TE[rows.start + t], sharpness * LOG2_E, p_TE[t])
        add_product((E, D), p_TE, soft_ED, u_TD[rows])
        _answer((D, E, W, A), block, part, u_TD, said)

    return draft


@compiled(fastmath=True, error_model="numpy", inline="always")
def _begin(sizes: Any, given: Any, rows: Any, scales: Any, part: Any, u_TD: Any) -> None:
    """The draft before attention of the tokens of `part`. `given` are the router inputs of the layer and of the one
    before as the bits of float16, ids_LTK, weight_LTK and word_T; `rows` own_D, earlier_D, words_VD, routes_LED,
    down_ERD and up_ERD, flat; `scales` the logarithms of what the router input is scaled by: for each of its numbers,
    expert and vocabulary row."""
    D, E, R = sizes
    bits_TD, before_TD, ids_LTK, weight_LTK, word_T = given
    own_D, earlier_D, words, routes, down, up = rows
    scale_D, scale_E, scale_V = scales
    x_D = np.empty(D, np.float32)
    order_T = _by_expert(ids_LTK[-1], part[1], part[1] + part[2].sum(), E)
    for number in range(len(order_T)):
        t, soon = order_T[number], order_T[min(number + SOON, len(order_T) - 1)]
        soon_D, row_D = words[D * word_T[soon] :], u_TD[soon]
        for d in range(0, D, 16):
            prefetch(soon_D[d:])
            prefetch(row_D[d:])
        bits_D, before_D = bits_TD[soon], before_TD[soon]
        for d in range(0, D, 32):
            prefetch(bits_D[d:])
            prefetch(before_D[d:])
        bits_D, before_D, u_D, word = bits_TD[t], before_TD[t], u_TD[t], word_T[t]
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
def _answer(sizes: Any, block: Any, part: Any, u_TD: Any, said: Any) -> None:
    """u += attention(u over its root mean square), and what the gate says of u over its new one. `part` is its number,
    first row, and the lengths of its requests and of the longest of all; `block` is the map of u to queries, keys and
    values in heads, the one back, gate_DE, bias_E, bias_AP and whether later tokens are hidden; bias_AP[:, SPARE + P //
    2 + far] is of a key `far` before its query. `said` are a sharpness, logits_TE, and what follows from both: p_TE,
    the likeliest expert of each token, and by part the sum of p_TE."""
    D, E, W, A = sizes
    sharpness, logits_TE, p_TE, likeliest_T1, load_PE = said
    number, row, length_B, longest = part
    map_DI, out_WD, gate_DE, bias_E, bias_AP, causal = block
    load_E = np.zeros(E)  # not those of another part beside it: two threads would wait for the line that both are in
    told_SI, mixed_SW = np.empty((longest, 3 * W), np.float32), np.empty((longest, W), np.float32)
    room = _room(longest, W // A)
    for S in length_B:
        u_SD, logits_SE = u_TD[row : row + S], logits_TE[row : row + S]
        told_SI[:S] = ZERO
        add_product((D, 3 * W), u_SD, map_DI, told_SI)
        for s in range(S):
            scale, told_I = _over_root(u_SD[s]), told_SI[s]
            for i in range(3 * W):
                told_I[i] *= scale
        for head in range(A):
            _attend(W, head, S, told_SI, bias_AP[head], causal, room, mixed_SW)
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


@compiled(error_model="numpy")
def _room(longest: int, width: int) -> Any:
    """Where a head is worked on: key_Sw, value_Sw, query_wN, score_SN, mixed_wN, and the highest and summed scores."""
    S = (longest + 3) // 4 * 4
    key_Sw, value_Sw = np.zeros((S, width), np.float32), np.zeros((S, width), np.float32)
    query, score, mixed = np.empty(width * N, np.float32), np.empty(S * N, np.float32), np.empty(width * N, np.float32)
    return key_Sw, value_Sw, query, score, mixed, np.empty(N, np.float32), np.empty(N, np.float32)


@compiled(fastmath=True, error_model="numpy")
def _attend(W: int, head: int, S: int, told_SI: Any, bias_P: Any, causal: Any, room: Any, mixed_SW: Any) -> None:
    """softmax(queries keys + bias) values of a head over the tokens of a request, to the base of 2."""
    key_Sw, value_Sw, query, score, mixed, most, total = room
    width = key_Sw.shape[1]
    column, centre = head * width, (len(bias_P) - SPARE) // 2
    for s in range(S):
        for w in range(width):
            key_Sw[s, w], value_Sw[s, w] = told_SI[s, column + W + w], told_SI[s, column + 2 * W + w]
    for t0 in range(0, S, QUERIES):
        n = min(QUERIES, S - t0)
        keys = t0 + n if causal else S
        for t in range(n):
            for w in range(width):
                query[w * N + t] = told_SI[t0 + t, column + w]
            most[t], total[t] = UNSEEN, ZERO
        mixed[:] = ZERO
        _score(keys, bias_P, centre + t0, key_Sw, query, score, most, n)
        _mix(keys, value_Sw, score, most, total, mixed, n)
        for t in range(n):
            over = ONE / total[t]
            for w in range(width):
                mixed_SW[t0 + t, column + w] = mixed[w * N + t] * over


@compiled(fastmath=True, error_model="numpy")
def _score(keys: int, bias_P: Any, at: int, key_Sw: Any, query: Any, score: Any, most: Any, n: int) -> None:
    """What the keys, four at a time, are to `n` queries, and the highest of it; bias_P[SPARE + at + query - key] is
    that of a pair."""
    for s in range(0, keys, 4):
        rows, near = score[s * N :], bias_P[at - s :]
        a, b, c, d = key_Sw[s], key_Sw[s + 1], key_Sw[s + 2], key_Sw[s + 3]
        for t in range(n):
            i, j, k, m = near[t + 3], near[t + 2], near[t + 1], near[t]
            for w in range(8):
                x = query[w * N + t]
                i, j, k, m = i + a[w] * x, j + b[w] * x, k + c[w] * x, m + d[w] * x
            rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t] = i, j, k, m
        for v in range(8, len(a), 8):
            more, a, b, c, d = query[v * N :], a[8:], b[8:], c[8:], d[8:]
            for t in range(n):
                i, j, k, m = rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t]
                for w in range(8):
                    x = more[w * N + t]
                    i, j, k, m = i + a[w] * x, j + b[w] * x, k + c[w] * x, m + d[w] * x
                rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t] = i, j, k, m
        for none in range((keys - s) * N, 4 * N):
            rows[none] = UNSEEN
        for t in range(n):
            i, j = max(rows[t], rows[N + t]), max(rows[2 * N + t], rows[3 * N + t])
            top = max(i, j)
            most[t] = max(most[t], top)  # of two at a time vectors are made


@compiled(fastmath=True, error_model="numpy")
def _mix(keys: int, value_Sw: Any, score: Any, most: Any, total: Any, mixed: Any, n: int) -> None:
    """The values, four at a time, each times 2 ** (score - most); and the sum of these."""
    for s in range(0, keys, 4):
        rows = score[s * N :]
        for t in range(n):
            top = most[t]
            i, j = _power(max(rows[t] - top, FAR)), _power(max(rows[N + t] - top, FAR))
            k, m = _power(max(rows[2 * N + t] - top, FAR)), _power(max(rows[3 * N + t] - top, FAR))
            rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t] = i, j, k, m
            total[t] += (i + j) + (k + m)
        for v in range(0, value_Sw.shape[1], 8):
            a, b, c, d = value_Sw[s, v:], value_Sw[s + 1, v:], value_Sw[s + 2, v:], value_Sw[s + 3, v:]
            sums = mixed[v * N :]
            for t in range(n):
                i, j, k, m = rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t]
                for w in range(8):
                    sums[w * N + t] += (a[w] * i + b[w] * j) + (c[w] * k + d[w] * m)


@compiled(fastmath=True, error_model="numpy", inline="always")
def _softened(logits_E: Any, sharpness: Any, p_E: Any) -> Any:
    """softmax(sharpness * logits), to the base of 2; returns where it is highest, the lowest id of several."""
    most, total, best = UNSEEN, ZERO, len(p_E)
    for e in range(len(p_E)):
        most = max(most, logits_E[e])
    for e in range(len(p_E)):
        p = _power(max(sharpness * (logits_E[e] - most), FAR))
        p_E[e] = p
        total += p
    for e in range(len(p_E)):
        best = min(best, e if logits_E[e] == most else len(p_E))
    total = ONE / total
    for e in range(len(p_E)):
        p_E[e] *= total
    return best


@compiled(fastmath=True, inline="always")
def _power(x: Any) -> Any:
    """2 ** x: what is left of the whole number by a polynomial, right to a part in 10^7."""
    whole = np.floor(x + HALF)
    m = x - whole
    y = np.float32(1.3400432e-3)
    y = y * m + np.float32(9.6760371e-3)
    y = y * m + np.float32(5.5503272e-2)
    y = y * m + np.float32(2.4022107e-1)
    y = y * m + np.float32(6.9314721e-1)
    return (y * m + ONE) * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled(fastmath=True, error_model="numpy")
def _over_root(u_D: Any) -> Any:
    """1 over the root mean square, as torch's rms_norm takes it."""
    squares = ZERO
    for d in range(len(u_D)):
        squares += u_D[d] * u_D[d]
    return ONE / np.sqrt(squares / np.float32(len(u_D)) + LEAST)
