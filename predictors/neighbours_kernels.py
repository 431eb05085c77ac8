"""What `neighbours` does for every token, compiled by numba; imported where it is needed only.

Distances are squared and whole: of 16-bit numbers, products are added up in pairs. A list of neighbours has no order;
it is searched by keys, the distance before the place, whose extremes are found in vectors. Shape letters: T tokens, U
units, Q numbers that distances are measured in, N neighbours of a unit, K neighbours of a token, E experts, B
bandwidths, J layers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from moesim.predictors.kernels import _exp, add_linear, add_product, weighed
from moesim.predictors.neighbours_fit import FAR, MEASURED, NEIGHBOURS, SKETCH
from moesim.traces.compiled import compiled, prefetch

BANDWIDTHS = 4
"""B: each half as wide as the one before."""
SOFT = (0.2, 0.1, 0.05, 0.02)
"""Added to the sum of the weights, by bandwidth: who has no near neighbour hears little of them."""
K, Q = 8, 64  # written out, as machine code is kept for as long as this file is the same
assert (K, Q) == (NEIGHBOURS, MEASURED), "both are compiled in"
BLOCK, SOON = 8, 4
"""Tokens that are searched for together, and how many earlier what is read of a unit is asked for: memory takes longer
than what is done with it."""
LINKED = 4
WINDOW = 32
"""Units next to a token in the order of their choices, from where a search begins."""
PLACES = np.int32(16)
"""Room for a place in a key, at least K."""


@compiled(fastmath=True, error_model="numpy")
def measured(z_TR: Any, step: Any, most: Any, z_TQ: Any) -> None:
    """The first numbers of the sketches in steps, at most `most` from 0."""
    for t in range(len(z_TR)):
        for q in range(Q):
            z_TQ[t, q] = np.int16(np.rint(min(max(z_TR[t, q] / step, -most), most)))


@compiled(fastmath=True, error_model="numpy")
def next_to(ids_NK: Any, row_T: Any, experts: int, places: int, word_U: Any, first_T: Any) -> None:
    """Where in an order of words those begin that are around each token's: the first of WINDOW."""
    last = max(len(word_U) - WINDOW, 0)
    for t in range(len(row_T)):
        word, low, high = np.int64(0), 0, len(word_U)
        for k in range(places):
            word = word * experts + np.int64(ids_NK[row_T[t], k])
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if word_U[middle] < word else (low, middle)
        first_T[t] = min(max(low - WINDOW // 2, 0), last)


@compiled(fastmath=True, error_model="numpy")
def started(first_T: Any, unit_U: Any, z_TQ: Any, unit_UQ: Any, found_TK: Any, far_TK: Any) -> None:
    """The nearest of the WINDOW units from there on join those found; a distance FAR is of nobody."""
    key_K = np.empty(K, np.int32)
    for t in range(len(first_T)):
        soon, first = first_T[min(t + 1, len(first_T) - 1)], first_T[t]
        for unit in unit_U[soon : soon + WINDOW]:
            prefetch(unit_UQ[unit])
        for k in range(K):
            key_K[k] = far_TK[t, k] * PLACES + np.int32(k)
        _join(unit_U[first : first + WINDOW], z_TQ[t], unit_UQ, found_TK[t], key_K)
        for k in range(K):
            far_TK[t, k] = key_K[k] // PLACES


@compiled(fastmath=True, error_model="numpy")
def followed(near_UN: Any, z_TQ: Any, unit_UQ: Any, found_TK: Any, far_TK: Any, best: int) -> None:
    """What was found under earlier layers, measured anew; then the neighbours of the `best` nearest join."""
    key_BK, from_BK = np.empty((BLOCK, K), np.int32), np.empty((BLOCK, K), np.int32)
    for begin in range(0, len(found_TK), BLOCK):
        block = range(begin, min(begin + BLOCK, len(found_TK)))
        for t in block:
            for k in range(K):
                prefetch(unit_UQ[found_TK[t, k]])
        for t in block:
            key_K, from_N = key_BK[t - begin], from_BK[t - begin, :best]
            _measure(z_TQ[t], unit_UQ, found_TK[t], key_K)
            _nearest(key_K, found_TK[t], from_N)
            for unit in from_N:
                prefetch(near_UN[unit])
        for t in block:
            for unit in from_BK[t - begin, :best]:
                for near in near_UN[unit]:
                    prefetch(unit_UQ[near])
        for t in block:
            key_K = key_BK[t - begin]
            for unit in from_BK[t - begin, :best]:
                _join(near_UN[unit], z_TQ[t], unit_UQ, found_TK[t], key_K)
            for k in range(K):
                far_TK[t, k] = key_K[k] // PLACES


@compiled(fastmath=True, error_model="numpy")
def settled(place_T: Any, z_TQ: Any, found_TK: Any, far_TK: Any, unit_UQ: Any, near_UN: Any) -> None:
    """Tokens become units, at these places: the nearest found are their neighbours, and they are those of the LINKED
    nearest, in the place of the farthest, where they are nearer."""
    key_K, N = np.empty(K, np.int32), near_UN.shape[1]
    for t in range(len(place_T)):
        place, near_N = place_T[t], near_UN[place_T[t]]
        for q in range(Q):
            unit_UQ[place, q] = np.int8(min(max(z_TQ[t, q], -127), 127))
        for k in range(K):
            key_K[k] = far_TK[t, k] * PLACES + np.int32(k)
        _nearest(key_K, found_TK[t], near_N)
        for n in range(N):
            near_N[n] = near_N[n] if near_N[n] >= 0 else place
        for unit in near_N[:LINKED]:
            high = np.int32(-1)
            for n in range(N):
                high = max(high, _distance(unit_UQ[unit], unit_UQ[near_UN[unit, n]]) * PLACES + np.int32(n))
            if _distance(unit_UQ[unit], unit_UQ[place]) < high // PLACES and unit != place:
                near_UN[unit, high % PLACES] = place


@compiled(fastmath=True, error_model="numpy")
def closest(far_TU: Any, own_T: Any, owner_U: Any, found_TK: Any, best_TK: Any) -> None:
    """The K nearest units of every row that are not of the row's own request, the nearest first."""
    for t in range(len(found_TK)):
        found_K, best_K = found_TK[t], best_TK[t]
        best_K[:] = np.float32(FAR)
        for u in range(len(owner_U)):
            distance = far_TU[t, u]
            if distance < best_K[K - 1] and owner_U[u] != own_T[t]:
                k = K - 1
                while k > 0 and best_K[k - 1] > distance:
                    best_K[k], found_K[k] = best_K[k - 1], found_K[k - 1]
                    k -= 1
                best_K[k], found_K[k] = distance, u


@compiled(fastmath=True, error_model="numpy")
def mixed(found_TK: Any, far_TK: Any, narrow: Any, gain_B: Any, residual_UE: Any, step: Any, told_TE: Any) -> None:
    """told[t] += the neighbours' residuals, weighed in each bandwidth by its gain and by
    exp(-2^b narrow far) over the sum of these."""
    weight_K, power_K, soft_B = np.empty(K, np.float32), np.empty(K, np.float32), np.array(SOFT, np.float32)
    for t in range(min(SOON, len(found_TK))):
        for k in range(K):
            prefetch(residual_UE[found_TK[t, k]])
    for t in range(len(found_TK)):
        for k in range(K if t + SOON < len(found_TK) else 0):
            prefetch(residual_UE[found_TK[t + SOON, k]])
        for k in range(K):
            power_K[k] = _exp(-narrow * np.float32(far_TK[t, k]))
            weight_K[k] = np.float32(0)
        for b in range(BANDWIDTHS):
            total = soft_B[b]
            for k in range(K):
                total += power_K[k]
            share = gain_B[b] * step / total
            for k in range(K):
                weight_K[k] += share * power_K[k]
                power_K[k] *= power_K[k]
        told_E = told_TE[t]
        for k in range(0, K, 4):  # four rows at a time
            a, b, c, d = weight_K[k], weight_K[k + 1], weight_K[k + 2], weight_K[k + 3]
            i, j = residual_UE[found_TK[t, k]], residual_UE[found_TK[t, k + 1]]
            x, y = residual_UE[found_TK[t, k + 2]], residual_UE[found_TK[t, k + 3]]
            for e in range(len(told_E)):
                told_E[e] += a * np.float32(i[e]) + b * np.float32(j[e]) + c * np.float32(x[e]) + d * np.float32(y[e])


@compiled(fastmath=True, inline="always")
def _distance(z_Q: Any, unit_Q: Any) -> Any:
    """Squared, in the units' steps."""
    total = np.int32(0)
    for q in range(Q):
        apart = np.int32(np.int16(z_Q[q] - np.int16(unit_Q[q])))
        total = np.int32(total + np.int32(apart * apart))
    return total


@compiled(fastmath=True, inline="always")
def _measure(z_Q: Any, unit_UQ: Any, found_K: Any, key_K: Any) -> None:
    for k in range(K):
        distance = _distance(z_Q, unit_UQ[found_K[k]]) if found_K[k] >= 0 else FAR
        key_K[k] = distance * PLACES + np.int32(k)


@compiled(fastmath=True, inline="always")
def _nearest(key_K: Any, found_K: Any, unit_N: Any) -> None:
    """The N nearest of those found, the nearest first."""
    last = np.int32(-1)
    for n in range(len(unit_N)):
        low = FAR * PLACES
        for k in range(K):
            low = min(low, key_K[k] if key_K[k] > last else low)
        unit_N[n], last = found_K[low % PLACES], low


@compiled(fastmath=True, inline="always")
def _join(candidate_C: Any, z_Q: Any, unit_UQ: Any, found_K: Any, key_K: Any) -> None:
    """Who is nearer than the farthest of those found takes its place."""
    high = _highest(key_K)
    for unit in candidate_C:
        key = np.int32(_distance(z_Q, unit_UQ[unit]) * PLACES)
        if key < high and not _there(unit, found_K):
            at = high % PLACES
            found_K[at], key_K[at] = unit, key + at
            high = _highest(key_K)


@compiled(fastmath=True, inline="always")
def _there(unit: Any, found_K: Any) -> Any:
    """Whether it is one of them."""
    there = np.int32(0)
    for k in range(K):
        there |= np.int32(found_K[k] == unit)
    return there != 0


@compiled(fastmath=True, inline="always")
def _highest(key_K: Any) -> Any:
    high = np.int32(0)
    for k in range(K):
        high = max(high, key_K[k])
    return high


@compiled(fastmath=True, error_model="numpy")
def shares(ids_TK: Any, first_R: Any, count_RE: Any, tokens_R: Any, share_TE: Any) -> None:
    """How often each expert was chosen since the request's first row, over its tokens; both start as given."""
    for r in range(len(first_R)):
        count_E, tokens = count_RE[r], tokens_R[r]
        for t in range(first_R[r], first_R[r + 1] if r + 1 < len(first_R) else len(ids_TK)):
            for k in range(ids_TK.shape[1]):
                count_E[ids_TK[t, k]] += np.float32(1)
            tokens += np.float32(1)
            for e in range(len(count_E)):
                share_TE[t, e] = count_E[e] / tokens


@compiled(fastmath=True, error_model="numpy")
def shared(ids_TK: Any, first_R: Any, count_RE: Any, tokens_R: Any, map_EE: Any, begin: int, told_TE: Any) -> None:
    """told[t - begin] += shares[t] @ map, of the shares that `shares` makes: a token adds its rows to those of its
    request so far."""
    T, E = begin + len(told_TE), len(map_EE)
    row_E = np.empty(E, np.float32)
    for r in range(np.searchsorted(first_R, begin, side="right") - 1, len(first_R)):
        first, last = first_R[r], first_R[r + 1] if r + 1 < len(first_R) else len(ids_TK)
        if first >= T:
            break
        row_E[:] = np.float32(0)
        for e in range(E if tokens_R[r] else 0):
            for to in range(E):
                row_E[to] += count_RE[r, e] * map_EE[e, to]
        for t in range(first, min(last, T)):
            for k in range(ids_TK.shape[1]):
                map_E = map_EE[ids_TK[t, k]]
                for e in range(E):
                    row_E[e] += map_E[e]
            if t >= begin:
                share = np.float32(1) / (tokens_R[r] + np.float32(t - first + 1))
                for e in range(E):
                    told_TE[t - begin, e] += share * row_E[e]


@cache
def sketcher(experts: int, numbers: int) -> Any:
    """For E = `experts` and C = `numbers`; all in one, as `reader`."""
    E, C, R = experts, numbers, SKETCH

    @compiled(fastmath=True, error_model="numpy")
    def sketch(last_TR: Any, layers: Any, turned: Any, step: Any, most: Any, z_TR: Any, z_TQ: Any) -> None:
        """The sketches after `layers`, tuples as `add_linear` takes them, and their first numbers in steps; `last_TR`
        are those before, and `turned` is turn_RR, map_JXR and shift_R."""
        turn_RR, map_JXR, shift_R = turned
        z_TR[:] = shift_R
        if len(turn_RR):
            add_product((R, R), last_TR, turn_RR, z_TR)
        for j in range(len(layers)):
            row_T, ids_NK, values_NKC, own_N = layers[j]
            add_linear((E, C, R), row_T, ids_NK, values_NKC, own_N, map_JXR[j], z_TR)
        measured(z_TR, step, most, z_TQ)

    return sketch


@cache
def reader(experts: int, numbers: int) -> Any:
    """For E = `experts` and C = `numbers`, all in one: a thread that comes back to Python in between may have to wait
    there for the other one."""
    E, C, R = experts, numbers, SKETCH

    @compiled(fastmath=True, error_model="numpy")
    def read(
        usual_E: Any, z_TR: Any, layers: Any, begun: Any, begin: int, map_FE: Any, near: Any, told_TE: Any, by: Any
    ) -> None:
        """What is said of the tokens from the row `begin` on. `layers` are tuples as `add_linear` takes them, `begun`
        the ids of the last layer and what `shared` takes beside them, `near` what `mixed` takes, several times, and
        `by` what `weighed` takes behind it."""
        told_TE[:] = usual_E
        add_product((R, E), z_TR, map_FE[:R], told_TE)
        X = (len(map_FE) - R - E) // len(layers)
        for j in range(len(layers)):
            row_T, ids_NK, values_NKC, own_N = layers[j]
            map_XE = map_FE[R + j * X : R + (j + 1) * X]
            add_linear((E, C, E), row_T, ids_NK, values_NKC, own_N, map_XE, told_TE)
        ids_TK, first_R, count_RE, tokens_R = begun
        shared(ids_TK, first_R, count_RE, tokens_R, map_FE[len(map_FE) - E :], begin, told_TE)
        found_JTN, far_JTN, narrow_J, gain_JB, residual_UE, step = near
        for j in range(len(gain_JB)):
            mixed(found_JTN[j], far_JTN[j], narrow_J[j], gain_JB[j], residual_UE, step, told_TE)
        weight_J, bias, least, inclusion_TE, top_TK, load_E = by
        if len(weight_J):
            weighed(told_TE.reshape((1, len(told_TE), E)), weight_J, bias, least, inclusion_TE, top_TK, load_E)

    return read
