"""What the routing net reads of a token: what it has routed, what the token before it has, and its request so far.

Nothing here is learned. Tokens stand by request and position; of a request that began in an earlier step it is
remembered what its last token routed and how often each expert was chosen. Tokens behind a token are never read, and
nothing is remembered of a step before it has ended. Shape letters: T tokens, S source layers (all but the last), E
experts, K experts per token, F numbers that describe a routed layer, X = 2 F + E numbers that are read of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import RoutedLayer
from moesim.traces import InputError, StepTokens

Numbers = NDArray[np.float32]

BEFORE, SO_FAR = 0.2, 3.0
"""Weight in squared distances of the token before, and of the request so far, beside the token itself."""
REMEMBERED = 1024
"""Requests, the latest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What finished steps left of a request."""

    position: int
    """Of its last token; with that token's description."""
    own_SF: Numbers
    count_SE: Numbers
    """How often it has chosen each expert, in `tokens` tokens."""
    tokens: int


Memory = dict[int, Remembered]
"""Request to what is remembered of it, the latest last."""


def described_width(experts: int, *, weighted: bool) -> int:
    """F."""
    return 3 * experts + 1 if weighted else experts


def described(routed: RoutedLayer, experts: int, *, weighted: bool) -> Numbers:
    """[T, F] 1 for a chosen expert and, with gate weights, their logarithm and that over the weight of an average
    expert that was not chosen; the last number is how much weight those have. As `ridge` does."""
    ids_TK = routed.ids.astype(np.int64)
    T, K = ids_TK.shape
    found_TCE = np.zeros((T, 3 if weighted else 1, experts), np.float32)
    row_T1 = np.arange(T)[:, None]
    found_TCE[row_T1, 0, ids_TK] = 1
    if not weighted:
        return found_TCE[:, 0]
    if routed.weights is None:
        raise InputError("predictor 'routing-net' was fitted with gate weights, and here there are none")
    w_TK = np.maximum(routed.weights.astype(np.float32), 1e-4)
    rest_T1 = np.log(np.clip(1 - w_TK.sum(axis=1, keepdims=True), 1e-3, 1) / max(experts - K, 1))
    found_TCE[row_T1, 1, ids_TK] = np.log(w_TK) + 3
    found_TCE[row_T1, 2, ids_TK] = 0.7 * (np.log(w_TK) - rest_T1 - 1.5)
    return np.concatenate([found_TCE.reshape(T, -1), 2 * (rest_T1 + 5)], axis=1)


@dataclass(slots=True)
class Context:
    """Tokens among those of their requests; `read` takes layer after layer."""

    tokens: StepTokens
    experts: int
    weighted: bool
    memory: Memory
    own_STF: list[Numbers] = field(default_factory=list)
    """Of the layers that were read; so with the next."""
    count_STE: list[Numbers] = field(default_factory=list)
    """How often the request has chosen each expert, this token included."""
    _first_T: NDArray[np.intp] = field(init=False)
    """Row of the first token of the same request."""
    _number_T: Numbers = field(init=False)
    """Tokens of the request so far, as far as they are known."""
    _known: list[tuple[int, Remembered]] = field(init=False)
    """First row of a request that goes on."""

    def __post_init__(self) -> None:
        request_T, T = self.tokens.request, len(self.tokens)
        starts = np.flatnonzero(np.diff(request_T, prepend=request_T[:1] - 1))
        self._first_T = np.repeat(starts, np.diff(starts, append=T))
        self._number_T = (np.arange(T) - self._first_T + 1).astype(np.float32)
        self._known = []
        for row in starts.tolist():
            found = self.memory.get(int(request_T[row]))
            # At another position it is another request of that number, or there are tokens between that nobody saw.
            if found is not None and found.position + 1 == int(self.tokens.position[row]):
                self._known.append((row, found))
                self._number_T[self._first_T == row] += found.tokens

    def read(self, routed: RoutedLayer) -> NDArray[np.float16]:
        """[T, X] of the next layer."""
        source = len(self.own_STF)
        own_TF = described(routed, self.experts, weighted=self.weighted)
        before_TF = np.roll(own_TF, 1, axis=0)
        before_TF[self._first_T] = 0
        chosen_TE = own_TF[:, : self.experts]
        total_TE = chosen_TE.cumsum(axis=0)  # of ones: exact up to 2^24 tokens
        count_TE = total_TE - (total_TE - chosen_TE)[self._first_T]
        for row, found in self._known:
            before_TF[row] = found.own_SF[source]
            count_TE[self._first_T == row] += found.count_SE[source]
        self.own_STF.append(own_TF)
        self.count_STE.append(count_TE)
        share_TE = count_TE / self._number_T[:, None]
        return np.concatenate([own_TF, BEFORE**0.5 * before_TF, SO_FAR**0.5 * share_TE], axis=1).astype(np.float16)

    def remember(self) -> None:
        """Put the ends of the requests into the memory, once all source layers were read."""
        for row in np.flatnonzero(np.diff(self._first_T, append=-1)).tolist():
            request = int(self.tokens.request[row])
            self.memory.pop(request, None)
            self.memory[request] = Remembered(
                position=int(self.tokens.position[row]),
                own_SF=np.stack([own_TF[row] for own_TF in self.own_STF]),
                count_SE=np.stack([count_TE[row] for count_TE in self.count_STE]),
                tokens=int(self._number_T[row]),
            )
        for request in list(self.memory)[:-REMEMBERED]:
            del self.memory[request]
