"""What a predictor may see, and what it says.

`Seen` holds copies of what has happened and nothing else: it cannot reach the future, because whoever runs the step
adds each layer's routing to it only after that layer has routed. Knows nothing about GPUs or policies.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.traces import InputError, LoadTable, StepTokens, TokenTable

Ids = NDArray[np.integer]
"""Expert ids, [T, K] for one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastStep:
    """A finished step: its tokens and the routing of all layers, [T, L, K]."""

    tokens: StepTokens
    topk_ids: Ids


@dataclass(slots=True, kw_only=True)
class Seen:
    """Everything that is known at a decision point of a running step."""

    step: int
    tokens: StepTokens
    queued: StepTokens | None = None
    """Tokens of the next step where they are already waiting (encoder, prefill); never known in decode."""
    routed: list[Ids] = field(default_factory=list)
    """Routing [T, K] of the layers of this step that have routed, in layer order."""
    past: deque[PastStep] = field(default_factory=deque)
    """Earlier steps, the latest last; how many are kept is up to the driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The load expected for one layer, [E] (float, sums to tokens x K), and where it is known per token, ids [T, K]."""

    load: NDArray[np.float64]
    topk: Ids | None = None


class Predictor(Protocol):
    """Fitted once on recorded requests, then asked before a layer has routed."""

    name: str
    needs_tokens: bool
    """True where loads alone teach it nothing: it must be told what every token chose."""

    def fit(self, table: TokenTable | LoadTable, num_experts: int, top_k: int) -> None:
        """Learn from `table`; its requests must not be the ones that are scored. Raises InputError where it holds loads
        and the predictor needs tokens."""

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Expected load of `layer` in this step or, with `queued`, in the next step, whose tokens are `seen.queued`."""


def token_table(table: TokenTable | LoadTable, predictor: str) -> TokenTable:
    """`table`, for predictors that need tokens. Raises InputError where it holds loads."""
    if isinstance(table, LoadTable):
        raise InputError(
            f"predictor {predictor!r} learns from what every token chose, and this recording has loads only"
        )
    return table


def tokens_of(seen: Seen, queued: bool) -> StepTokens:
    """The tokens that a forecast is about. Raises ValueError where the next step is not known yet."""
    if not queued:
        return seen.tokens
    if seen.queued is None:
        raise ValueError("the next step's tokens are not known: nothing can be forecast for it")
    return seen.queued


def from_probabilities(p_TE: NDArray[np.float64], top_k: int) -> Forecast:
    """Forecast from each token's expert probabilities (rows sum to 1): loads add up, ids are the K most probable."""
    return Forecast(load=p_TE.sum(axis=0) * top_k, topk=most_probable(p_TE, top_k))


def most_probable(p_TE: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """[T, count] the experts with the highest values, highest first; ties to the lowest id where count is 1."""
    if count == 1:
        return np.asarray(p_TE.argmax(axis=1)[:, None])
    some = np.argpartition(-p_TE, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(p_TE, some, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(some, order, axis=1))
