"""What a head of `gate-attention` does with the tokens of a request, compiled by numba; see gate_attention_kernels.py.

Shape letters: S tokens of a request, w numbers of a head's value in W of all, y of its query or key in Y, I twice Y, N
from one row of what is worked on to the next, P distances.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.traces.compiled import compiled

ZERO, ONE, MAGIC = np.float32(0), np.float32(1), np.float32(1.5 * 2**23)
QUERIES = 128
"""That are attended for at a time, so that what is worked on stays near."""
N = QUERIES + 8
"""From one row of these to the next; at a power of 2 they would be in each other's way in the cache."""
SPARE = 3
"""Numbers before the biases, which are read of keys that are none."""
UNSEEN, FAR = np.float32(-1e30), np.float32(-100)
"""The score of a key that is not seen; how far below the highest one, in powers of 2, scores are told apart."""


@compiled(error_model="numpy")
def room(longest: int, width: int, key_width: int) -> Any:
    """Where a head is worked on: key_Sy, value_Sw, query_yN, score_SN, mixed_wN, and the highest and summed scores."""
    S = (longest + 3) // 4 * 4
    key_Sy, value_Sw = np.zeros((S, key_width), np.float32), np.zeros((S, width), np.float32)
    query, mixed = np.empty(key_width * N, np.float32), np.empty(width * N, np.float32)
    return key_Sy, value_Sw, query, np.empty(S * N, np.float32), mixed, np.empty(N, np.float32), np.empty(N, np.float32)


@compiled(fastmath=True, error_model="numpy", inline="always")
def attend(
    sizes: Any, head: int, S: int, told_SI: Any, value_SW: Any, bias_P: Any, causal: Any, room: Any, mixed_SW: Any
) -> None:
    """softmax(queries keys + bias) values of a head over the tokens of a request, to the base of 2. `sizes` are w and
    y, which whoever calls this has as constants."""
    key_Sy, value_Sw, query, score, mixed, most, total = room
    (width, key_width), centre = sizes, (len(bias_P) - SPARE) // 2
    column, at = head * width, head * key_width
    Y = told_SI.shape[1] // 2
    for s in range(S):
        for y in range(key_width):
            key_Sy[s, y] = told_SI[s, Y + at + y]
        for w in range(width):
            value_Sw[s, w] = value_SW[s, column + w]
    for t0 in range(0, S, QUERIES):
        n = min(QUERIES, S - t0)
        keys = t0 + n if causal else S
        for t in range(n):
            for y in range(key_width):
                query[y * N + t] = told_SI[t0 + t, at + y]
            most[t], total[t] = UNSEEN, ZERO
        mixed[:] = ZERO
        _score(key_width, keys, bias_P, centre + t0, key_Sy, query, score, most, n)
        _mix(keys, value_Sw, score, most, total, mixed, n)
        for t in range(n):
            over = ONE / total[t]
            for w in range(width):
                mixed_SW[t0 + t, column + w] = mixed[w * N + t] * over


@compiled(fastmath=True, error_model="numpy", inline="always")
def _score(width: int, keys: int, bias_P: Any, at: int, key_Sy: Any, query: Any, score: Any, most: Any, n: int) -> None:
    """What the keys, four at a time, are to `n` queries, and the highest of it; bias_P[SPARE + at + query - key] is
    that of a pair."""
    for s in range(0, keys, 4):
        rows, near = score[s * N :], bias_P[at - s :]
        a, b, c, d = key_Sy[s], key_Sy[s + 1], key_Sy[s + 2], key_Sy[s + 3]
        for t in range(n):
            i, j, k, m = near[t + 3], near[t + 2], near[t + 1], near[t]
            for y in range(width):
                x = query[y * N + t]
                i, j, k, m = i + a[y] * x, j + b[y] * x, k + c[y] * x, m + d[y] * x
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
            i, j = power(max(rows[t] - top, FAR)), power(max(rows[N + t] - top, FAR))
            k, m = power(max(rows[2 * N + t] - top, FAR)), power(max(rows[3 * N + t] - top, FAR))
            rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t] = i, j, k, m
            total[t] += (i + j) + (k + m)
        for v in range(0, value_Sw.shape[1], 8):
            a, b, c, d = value_Sw[s, v:], value_Sw[s + 1, v:], value_Sw[s + 2, v:], value_Sw[s + 3, v:]
            sums = mixed[v * N :]
            for t in range(n):
                i, j, k, m = rows[t], rows[N + t], rows[2 * N + t], rows[3 * N + t]
                for w in range(8):
                    sums[w * N + t] += (a[w] * i + b[w] * j) + (c[w] * k + d[w] * m)


@compiled(fastmath={"contract", "nnan", "ninf", "nsz"}, error_model="numpy")
def power(x: Any) -> Any:
    """2 ** x for -126 < x < 1, right to 3 parts in 10^6: a whole number, which what is added leaves in the lowest bits,
    and a polynomial of the rest. So sums must not be rearranged here."""
    whole = x + MAGIC
    m = x - (whole - MAGIC)
    y = np.float32(9.58285e-3)
    y = y * m + np.float32(5.590642e-2)
    y = y * m + np.float32(2.4024099e-1)
    y = y * m + np.float32(6.9312419e-1)
    bits = np.float32(y * m + ONE).view(np.int32) + (np.float32(whole).view(np.int32) << np.int32(23))
    return np.int32(bits).view(np.float32)
