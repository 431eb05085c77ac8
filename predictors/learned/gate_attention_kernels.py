"""What `gate-attention` does for every token, but for its larger products of matrices; compiled by numba and imported
where it is needed only.

One thread, and, as in predictors/kernels.py, without Python's errors of division. Rows are added in eights: fewer would
wait for memory, more would not fit the registers. Shape letters: T tokens, L routed layers, E experts, K experts per
token, D router input, R rank, V vocabulary rows, B requests of S positions, A heads, W inner width, I three times that,
P distances.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from moesim.traces.compiled import compiled

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
BIAS, LOG2_E = np.float32(2.0**112), np.float32(1 / np.log(2))
LEAST = np.float32(np.finfo(np.float32).eps)
QUERIES = 128
"""That are attended for at a time, so that what is worked on stays near."""
N = QUERIES + 8
"""From one row of these to the next; at a power of 2 they would be in each other's way in the cache."""
UNSEEN, FAR = np.float32(-1e30), np.float32(-100)
"""The score of a key that is not seen; how far below the highest one, in powers of 2, scores are told apart."""


@compiled(fastmath=True, error_model="numpy", inline="always")
def act(sizes: Any, x_D: Any, down: Any, up: Any, weight: Any, u_D: Any) -> None:
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


@cache
def start(width: int, rank: int) -> Any:
    """What begins a draft, for D = `width` and R = `rank`, which 8 divides. They are compiled in: rows of a length that
    is known are not compared for overlap (see `add_linear` in predictors/kernels.py)."""
    D, R = width, rank

    @compiled(fastmath=True, error_model="numpy")
    def begin(order_T: Any, given: Any, rows: Any, scales: Any, u_TD: Any, scale_T: Any) -> None:
        """The draft before attention, and 1 over the root mean square of every row, of the tokens `order_T`: in the
        order of their experts, so that what belongs to one is read once. `given` are the router inputs of the layer and
        of the one before as the bits of float16, ids_LTK, weight_LTK and word_T; `rows` own_D, earlier_D, words_VD,
        routes_LED, down_ERD and up_ERD, flat; `scales` the logarithms of what the router input is scaled by: for each
        of its numbers, expert and vocabulary row."""
        bits_TD, before_TD, ids_LTK, weight_LTK, word_T = given
        own_D, earlier_D, words, routes, down, up = rows
        scale_D, scale_E, scale_V = scales
        x_D = np.empty(D, np.float32)
        for t in order_T:
            bits_D, before_D, u_D, word = bits_TD[t], before_TD[t], u_TD[t], word_T[t]
            ids_LK, weight_LK = ids_LTK[:, t], weight_LTK[:, t]
            log, row_D = scale_V[word], words[D * word :]
            for d in range(D):
                x_D[d] = _number(bits_D[d])
                log += x_D[d] * scale_D[d]
            for k in range(ids_LK.shape[1]):
                log += weight_LK[-1, k] * scale_E[ids_LK[-1, k]]
            scale = np.exp(log)
            for d in range(D):
                u_D[d] = (x_D[d] * own_D[d] + _number(before_D[d]) * earlier_D[d]) * scale + row_D[d]
            for layer in range(len(ids_LK)):
                for k in range(ids_LK.shape[1]):
                    row_D, weight = routes[D * (layer * len(scale_E) + ids_LK[layer, k]) :], weight_LK[layer, k]
                    for d in range(D):
                        u_D[d] += weight * row_D[d]
            for k in range(ids_LK.shape[1]):
                first = D * R * ids_LK[-1, k]
                act((D, R), x_D, down[first:], up[first:], weight_LK[-1, k], u_D)
            scale_T[t] = _over_root(u_D)

    return begin


@compiled(fastmath=True, inline="always")
def _number(bits: Any) -> Any:
    """float32 of the bits of a float16, unless that is no number: the exponent's bias differs by 112."""
    sign, rest = np.int32(bits) & np.int32(0x8000), np.int32(bits) & np.int32(0x7FFF)
    return np.int32((sign << np.int32(16)) | (rest << np.int32(13))).view(np.float32) * BIAS


@compiled(fastmath=True, error_model="numpy")
def over_roots(u_TD: Any, scale_T: Any) -> None:
    """1 over the root mean square of every row."""
    for t in range(len(u_TD)):
        scale_T[t] = _over_root(u_TD[t])


@compiled(fastmath=True, error_model="numpy")
def read(u_TD: Any, logits_TE: Any, bias_E: Any) -> None:
    """What gates say of every row over its root mean square, in place; `logits_TE` are what they say of the row."""
    for t in range(len(u_TD)):
        logits_E, scale = logits_TE[t], _over_root(u_TD[t])
        for e in range(len(bias_E)):
            logits_E[e] = logits_E[e] * scale + bias_E[e]


@compiled(fastmath=True, error_model="numpy")
def chances(logits_TE: Any, sharpness: Any, p_TE: Any, likeliest_T1: Any, load_E: Any) -> None:
    """softmax(sharpness * logits), the highest of each row, the lowest id of several, and the sum of the rows."""
    (T, E), sharpness = logits_TE.shape, sharpness * LOG2_E
    for t in range(T):
        logits_E, p_E, most, total, first = logits_TE[t], p_TE[t], UNSEEN, ZERO, E
        for e in range(E):
            most = max(most, logits_E[e])
        for e in range(E):
            p = _power(max(sharpness * (logits_E[e] - most), FAR))
            p_E[e] = p
            total += p
        for e in range(E):
            first = min(first, e if logits_E[e] == most else E)
        total = ONE / total
        for e in range(E):
            p_E[e] *= total
            load_E[e] += p_E[e]
        likeliest_T1[t, 0] = first


@compiled(fastmath=True, error_model="numpy")
def attend(told_IT: Any, scale_T: Any, length_B: Any, bias_AP: Any, causal: Any, mixed_WT: Any) -> None:
    """softmax(queries keys + bias) values over the tokens of each request, to the base of 2. `told_IT` are queries,
    keys and values, over `scale_T`, in heads of a width that 8 divides; bias_AP[:, P // 2 + far] is that of a key `far`
    before its query."""
    W, (A, P), longest, first = len(mixed_WT), bias_AP.shape, (max(length_B) + 7) // 8 * 8, 0
    width = W // A
    query, score = np.empty(width * N, np.float32), np.empty(longest * N, np.float32)
    key_SW, value_WS = np.empty((longest, width), np.float32), np.empty((width, longest), np.float32)
    for S in length_B:
        scale_S = scale_T[first : first + S]
        for head in range(A):
            rows = slice(head * width, head * width + width)
            mixed_WS, parts = mixed_WT[rows, first : first + S], told_IT[:, first : first + S]
            query_WS, keys_WS, values_WS = parts[rows], parts[W : 2 * W][rows], parts[2 * W :][rows]
            for w in range(width):
                for s in range(S):
                    key_SW[s, w] = keys_WS[w, s] * scale_S[s]
                    value_WS[w, s] = values_WS[w, s] * scale_S[s]
            value_WS[:, S : S + 8] = ZERO
            for t0 in range(0, S, QUERIES):
                n, bias = min(QUERIES, S - t0), bias_AP[head, P // 2 + t0 - S + 1 :]
                for w in range(width):
                    for t in range(n):
                        query[w * N + t] = query_WS[w, t0 + t] * scale_S[t0 + t]
                hidden, seen = (t0, t0 + n) if causal else (S, S)
                _attend(query, key_SW[:seen], value_WS, bias, S - 1, hidden, score, mixed_WS[:, t0 : t0 + n])
        first += S


@compiled(fastmath=True, error_model="numpy")
def _attend(
    query: Any, key_SW: Any, value_WS: Any, bias: Any, last: int, hidden: int, score: Any, mixed_WN: Any
) -> None:
    """Some queries of one head and request. bias[last - key + query] is that of a pair; the key hidden + i is not seen
    by the first i queries."""
    width, n = mixed_WN.shape
    keys = len(key_SW)
    most, total, mixed = np.full(N, UNSEEN), np.zeros(N, np.float32), np.zeros(width * N, np.float32)
    for s in range(0, keys, 8):
        for key in range(s, s + 8):
            row = score[key * N :]
            if key < keys:
                _score(row, bias[last - key :], key_SW[key], query, n)
            row[: n if key >= keys else min(max(key - hidden, 0), n)] = UNSEEN
        _raise(most, score[s * N :], n)
    for s in range(0, keys, 8):
        for key in range(s, s + 8):
            _soften(score[key * N :], most, total, n)
        for w in range(width):
            _add(mixed[w * N :], value_WS[w, s:], score[s * N :], n)
    for w in range(width):
        row, told = mixed[w * N :], mixed_WN[w]
        for t in range(n):
            told[t] = row[t] / total[t]


@compiled(fastmath=True, error_model="numpy")
def _score(row: Any, bias: Any, key_W: Any, query: Any, n: int) -> None:
    """What a key is to `n` queries."""
    a, b, c, d, e, f, g, h = key_W[0], key_W[1], key_W[2], key_W[3], key_W[4], key_W[5], key_W[6], key_W[7]
    for t in range(n):
        near = a * query[t] + b * query[N + t] + c * query[2 * N + t] + d * query[3 * N + t]
        far = e * query[4 * N + t] + f * query[5 * N + t] + g * query[6 * N + t] + h * query[7 * N + t]
        row[t] = bias[t] + near + far
    for w in range(8, len(key_W), 8):
        _add(row, key_W[w:], query[w * N :], n)


@compiled(fastmath=True, error_model="numpy")
def _add(row: Any, by: Any, rows: Any, n: int) -> None:
    """The sum of eight `rows`, which are N apart, each times its number."""
    a, b, c, d, e, f, g, h = by[0], by[1], by[2], by[3], by[4], by[5], by[6], by[7]
    for t in range(n):
        near = a * rows[t] + b * rows[N + t] + c * rows[2 * N + t] + d * rows[3 * N + t]
        far = e * rows[4 * N + t] + f * rows[5 * N + t] + g * rows[6 * N + t] + h * rows[7 * N + t]
        row[t] += near + far


@compiled(fastmath=True, error_model="numpy")
def _raise(most: Any, rows: Any, n: int) -> None:
    """The highest of eight rows and what was there."""
    for t in range(n):
        a, b = max(rows[t], rows[N + t]), max(rows[2 * N + t], rows[3 * N + t])
        c, d = max(rows[4 * N + t], rows[5 * N + t]), max(rows[6 * N + t], rows[7 * N + t])
        a, c = max(a, b), max(c, d)
        top = max(a, c)
        most[t] = max(most[t], top)  # of two at a time vectors are made


@compiled(fastmath=True, error_model="numpy")
def _soften(row: Any, most: Any, total: Any, n: int) -> None:
    """2 ** (row - most), and its sum."""
    for t in range(n):
        p = _power(max(row[t] - most[t], FAR))
        row[t] = p
        total[t] += p


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
