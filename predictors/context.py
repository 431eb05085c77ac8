"""What can be read beside a token itself: what the token before it has routed, and its request so far.

Nothing here is learned. Tokens stand by request and position; of a request that began in an earlier step the end of it
is remembered, once that step has ended. Shape letters: T tokens, S source layers (all but the last), E experts, K
experts per token, C numbers that describe a chosen expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.described import Described, Half
from moesim.traces import StepTokens

REMEMBERED = 1024
"""Requests, the latest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What finished steps left of a request."""

    position: int
    """Of its last token; with what that has routed, layer by layer."""
    last_S: list[tuple[Any, Half, Any]]
    count_SE: Half
    """How often it has chosen each expert, in `tokens` tokens."""
    tokens: int


Memory = dict[int, Remembered]
"""Request to what is remembered of it, the latest last."""


@dataclass(slots=True)
class Context:
    """Tokens among those of their requests."""

    tokens: StepTokens
    experts: int
    memory: Memory
    _first_R: NDArray[np.intp] = field(init=False)
    """Rows at which a request begins or goes on."""
    _before_T: NDArray[np.intp] = field(init=False)
    """The row before each; below 0 where that is of another request."""
    _known: list[tuple[int, int, Remembered]] = field(init=False)
    """Of those that go on, which of these rows, the row, and what is remembered."""

    def __post_init__(self) -> None:
        request_T = self.tokens.request
        self._first_R = np.flatnonzero(np.diff(request_T, prepend=request_T[:1] - 1))
        self._before_T = np.arange(-1, len(request_T) - 1)
        self._before_T[self._first_R] = -1
        self._known = []
        for number, row in enumerate(self._first_R.tolist()):
            found = self.memory.get(int(request_T[row]))
            # At another position it is another request of that number, or there are tokens between that nobody saw.
            if found is not None and found.position + 1 == int(self.tokens.position[row]):
                self._known.append((number, row, found))

    @property
    def spare(self) -> int:
        """Rows that `before` needs behind those of a layer's tokens."""
        return len(self._known)

    def before(self, one: Described, source: int) -> Described:
        """What the tokens before have routed: nothing before a request's first token."""
        row_T = self._before_T.copy() if self._known else self._before_T
        for number, (_, row, found) in enumerate(self._known, len(self.tokens)):
            one.ids[number], one.values_NKC[number], one.own_N[number] = found.last_S[source]
            row_T[row] = number
        return Described(ids=one.ids, values_NKC=one.values_NKC, own_N=one.own_N, row_T=row_T)

    def begun(self, source: int) -> tuple[NDArray[np.intp], Half, Half]:
        """Of each request the row of its first token here, and how often the tokens before it, and how many these are,
        have chosen each expert."""
        count_RE = np.zeros((len(self._first_R), self.experts), np.float32)
        tokens_R = np.zeros(len(self._first_R), np.float32)
        for number, _, found in self._known:
            count_RE[number], tokens_R[number] = found.count_SE[source], found.tokens
        return self._first_R, count_RE, tokens_R

    def shares(self, ids_TK: NDArray[np.integer], source: int, share_TE: Half) -> Half:
        """[T, E] how often the request has chosen each expert, a token, this one included; put into `share_TE`."""
        from moesim.predictors.neighbours_kernels import shares

        shares(ids_TK[: len(self.tokens)], *self.begun(source), share_TE)
        return share_TE

    def remember(self, described: list[Described]) -> None:
        """Put the ends of the requests into the memory, once all source layers were read."""
        last_R = np.append(self._first_R[1:], len(self.tokens)) - 1
        before_R = {number: found.tokens for number, _, found in self._known}
        share_TE = np.empty((len(self.tokens), self.experts), np.float32)
        share_SRE = [self.shares(one.ids, source, share_TE)[last_R] for source, one in enumerate(described)]
        for number, row in enumerate(last_R.tolist()):
            request = int(self.tokens.request[row])
            tokens = int(row - self._first_R[number]) + 1 + before_R.get(number, 0)
            self.memory.pop(request, None)
            self.memory[request] = Remembered(
                position=int(self.tokens.position[row]),
                last_S=[(one.ids[row].copy(), one.values_NKC[row].copy(), one.own_N[row]) for one in described],
                count_SE=np.stack([share_RE[number] * tokens for share_RE in share_SRE]),
                tokens=tokens,
            )
        for request in list(self.memory)[:-REMEMBERED]:
            del self.memory[request]
