"""What the ridge does for every token, compiled by numba; imported where it is needed only.

All let other threads run (see halves.py), and are written so that LLVM finds vectors: without Python's errors of
division, and with the number of experts known where rows are added up. Shape letters: J opinions, T tokens, E experts,
K experts per token, C numbers that describe a chosen expert, X numbers that describe a layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from moesim.traces.compiled import compiled

ONE, HALF, BIAS = np.float32(1), np.float32(0.5), np.float32(2.0**112)


@compiled(fastmath=True, error_model="numpy", inline="always")
def add_linear(sizes: Any, row_T: Any, ids_NK: Any, values_NKC: Any, own_N: Any, map_XW: Any, to_TW: Any) -> None:
    """to[t] += sum over experts and numbers of values[n, k, c] * map[C * ids[n, k] + c] where n = row[t] is 0 or more,
    and own[n] * map[C * E] where the layer has a number of its own (map has C * E + 1 rows then).

    `sizes` are E, C and W. Whoever calls this has them as constants: rows of a length known only when it runs would be
    compared for overlap and cut into vectors again for every expert, which takes as long as adding them.
    """
    E, C, W = sizes
    K = ids_NK.shape[1]
    flat, own = map_XW.reshape(map_XW.size), map_XW.shape[0] > C * E
    paired = K - K % 2 if C > 1 else 0
    for t in range(len(row_T)):
        row_W = to_TW[t]
        if row_T[t] < 0:
            continue
        n = np.uint64(row_T[t])  # known not to count from the end
        for k in range(0, paired, 2):  # the usual cases, four or six rows at a time
            i, j = flat[C * W * np.int64(ids_NK[n, k]) :], flat[C * W * np.int64(ids_NK[n, k + 1]) :]
            a, b, x, y = values_NKC[n, k, 0], values_NKC[n, k, 1], values_NKC[n, k + 1, 0], values_NKC[n, k + 1, 1]
            if C == 2:
                for w in range(W):
                    row_W[w] += (a * i[w] + b * i[w + W]) + (x * j[w] + y * j[w + W])
            else:
                c, z = values_NKC[n, k, C - 1], values_NKC[n, k + 1, C - 1]
                for w in range(W):
                    near, far = a * i[w] + b * i[w + W] + c * i[w + 2 * W], x * j[w] + y * j[w + W] + z * j[w + 2 * W]
                    row_W[w] += near + far
        for k in range(paired, K):
            for number in range(C):
                i, a = flat[W * (C * np.int64(ids_NK[n, k]) + number) :], values_NKC[n, k, number]
                for w in range(W):
                    row_W[w] += a * i[w]
        if own:
            i, a = flat[C * E * W :], own_N[n]
            for w in range(W):
                row_W[w] += a * i[w]


@cache
def linear(experts: int, numbers: int) -> Any:
    """`add_linear` for E = W = `experts` and C = `numbers`."""
    E, C = experts, numbers

    @compiled(fastmath=True, error_model="numpy")
    def add(row_T: Any, ids_NK: Any, values_NKC: Any, own_N: Any, map_XE: Any, score_TE: Any) -> None:
        """See there."""
        add_linear((E, C, E), row_T, ids_NK, values_NKC, own_N, map_XE, score_TE)

    return add


@compiled(fastmath=True, error_model="numpy", inline="always")
def add_product(sizes: Any, from_TR: Any, map_RW: Any, to_TW: Any) -> None:
    """to[t] += from[t] @ map; eight rows of the map at a time stay in the nearest cache for sixteen tokens. `sizes` are
    R and W, as in `add_linear`. BLAS would wake its own threads, for pieces this small."""
    R, W = sizes
    flat, T = map_RW.reshape(R * W), len(from_TR)
    for begin in range(0, T, 16):
        for r in range(0, R - R % 8, 8):
            m = flat[r * W :]
            for t in range(begin, min(begin + 16, T)):
                row_W, at_R = to_TW[t], from_TR[t, r : r + 8]
                a, b, c, d, e, f, g, h = at_R[0], at_R[1], at_R[2], at_R[3], at_R[4], at_R[5], at_R[6], at_R[7]
                for w in range(W):
                    row_W[w] += (
                        (a * m[w] + b * m[w + W] + c * m[w + 2 * W] + d * m[w + 3 * W])
                        + (e * m[w + 4 * W] + f * m[w + 5 * W] + g * m[w + 6 * W] + h * m[w + 7 * W])
                    )  # fmt: skip
        for r in range(R - R % 8, R):
            m = flat[r * W :]
            for t in range(begin, min(begin + 16, T)):
                row_W, a = to_TW[t], from_TR[t, r]
                for w in range(W):
                    row_W[w] += a * m[w]


@compiled(fastmath=True, inline="always")
def from_bits(bits: Any) -> Any:
    """float32 of the bits of a float16, unless that is no number: the exponent's bias differs by 112."""
    sign, rest = np.int32(bits) & np.int32(0x8000), np.int32(bits) & np.int32(0x7FFF)
    return np.int32((sign << np.int32(16)) | (rest << np.int32(13))).view(np.float32) * BIAS


@compiled(fastmath=True, error_model="numpy")
def described(bits_TK: Any, others: Any, values_TKC: Any, own_T: Any) -> None:
    """What gate weights say, which are given as the bits of float16: of each chosen expert 1, the logarithm of its
    weight, and that over the weight of an average one of the `others`, which were not chosen, or only the first two; of
    the token how much the others have. Each shifted to be near 0."""
    T, K = bits_TK.shape
    bits_N, log_N, rest_T = bits_TK.reshape(T * K), np.empty(T * K, np.float32), np.empty(T, np.float32)
    for n in range(T * K):
        log_N[n] = max(from_bits(bits_N[n]), np.float32(1e-4))
    for t in range(T):
        rest = ONE
        for k in range(K):
            rest -= log_N[t * K + k]
        rest_T[t] = rest
    for n in range(T * K):
        log_N[n] = _log(log_N[n])
    for t in range(T):
        rest_T[t] = _log(max(rest_T[t], np.float32(1e-3)) / others)
        own_T[t] = np.float32(2) * (rest_T[t] + np.float32(5))
    for t in range(T):
        for k in range(K):
            log = log_N[t * K + k]
            values_TKC[t, k, 0] = ONE
            values_TKC[t, k, 1] = log + np.float32(3)
            if values_TKC.shape[2] > 2:
                values_TKC[t, k, 2] = np.float32(0.7) * (log - rest_T[t] - np.float32(1.5))


@compiled(fastmath=True, error_model="numpy")
def weighed(
    opinion_JTE: Any, weight_J: Any, bias: Any, least: Any, inclusion_TE: Any, top_TK: Any, load_E: Any
) -> None:
    """Probabilities from the weighed log odds of the opinions, kept `least` from 0 and 1; each row scaled to sum to K
    with none above 1. And the row's likeliest experts, highest first; and `load_E`, to which the rows are added."""
    J, T, E = opinion_JTE.shape
    sum_E = np.zeros(E)  # nowhere near that of another part: two threads would wait for the line that both are in
    for t in range(T):
        row_E = inclusion_TE[t]
        for e in range(E):
            row_E[e] = -bias
        for j in range(J):
            told_E, weight = opinion_JTE[j, t], weight_J[j]
            for e in range(E):
                p = min(max(told_E[e], least), ONE - least)
                row_E[e] -= weight * _log(p / (ONE - p))
        for e in range(E):
            row_E[e] = ONE / (ONE + _exp(row_E[e]))
        _scale(row_E, top_TK.shape[1])
        _likeliest(row_E, top_TK[t])
        for e in range(E):
            sum_E[e] += row_E[e]
    for e in range(E):
        load_E[e] += sum_E[e]


@compiled(fastmath=True, inline="always")
def _log(x: Any) -> Any:
    """Natural logarithm of a positive, normal float32: Cephes' logf, as numba's own cannot be made vectors of."""
    bits = np.float32(x).view(np.int32)
    power = np.float32((bits >> np.int32(23)) - np.int32(126))
    part = np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    low = part < np.float32(0.70710678)
    power -= ONE if low else np.float32(0)
    m = (part + part if low else part) - ONE
    y = np.float32(7.0376836292e-2)
    y = y * m - np.float32(1.1514610310e-1)
    y = y * m + np.float32(1.1676998740e-1)
    y = y * m - np.float32(1.2420140846e-1)
    y = y * m + np.float32(1.4249322787e-1)
    y = y * m - np.float32(1.6668057665e-1)
    y = y * m + np.float32(2.0000714765e-1)
    y = y * m - np.float32(2.4999993993e-1)
    y = y * m + np.float32(3.3333331174e-1)
    return m + (y * m * m * m - HALF * m * m + power * np.float32(0.6931471806))


@compiled(fastmath=True, inline="always")
def _exp(x: Any) -> Any:
    """Exponential of a float32, which is kept within +-87: Cephes' expf, for the same reason."""
    x = min(max(x, np.float32(-87)), np.float32(87))
    power = np.floor(x * np.float32(1.44269504) + HALF)
    m = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * m + np.float32(1.3981999507e-3)
    y = y * m + np.float32(8.3334519073e-3)
    y = y * m + np.float32(4.1665795894e-2)
    y = y * m + np.float32(1.6666665459e-1)
    y = y * m + np.float32(5.0000001201e-1)
    scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (y * m * m + m + ONE) * scale


@compiled(fastmath=True, error_model="numpy")
def _scale(row_E: Any, top: int) -> None:
    """Those that reach 1 stay there, the others share what is left; again until no other one reaches it."""
    full, scale = np.float32(-1), np.float32(0)
    over, free = np.float32(0), np.float32(0)
    for e in range(len(row_E)):
        free += row_E[e]
    while over > full:
        full = over
        scale = max(scale, (np.float32(top) - full) / max(free, np.float32(1e-30)))
        over, free = np.float32(0), np.float32(0)
        for e in range(len(row_E)):
            below = np.float32(row_E[e] * scale < ONE)
            over += ONE - below
            free += row_E[e] * below
    for e in range(len(row_E)):
        row_E[e] = min(row_E[e] * scale, ONE)


@compiled(fastmath=True, error_model="numpy")
def _likeliest(row_E: Any, top_K: Any) -> None:
    """The highest below the last one, again and again; ties to the lower id. Compared are whole numbers, the bits of
    the probability before those of the id: these rank like positive floats, and their maximum is found in vectors."""
    E, last = len(row_E), np.int64(1) << 62
    for k in range(len(top_K)):
        best = np.int64(0)
        for e in range(E):
            both = (np.int64(np.float32(row_E[e]).view(np.int32)) << 32) | (E - 1 - e)
            best = max(best, both if both < last else np.int64(0))
        top_K[k] = E - 1 - (best & 0xFFFFFFFF)
        last = best
