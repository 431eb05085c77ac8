"""What a predictor may see, and what it says.

`Seen` holds copies of what has happened and nothing else: it cannot reach the future, because whoever runs the step
adds each layer's routing to it only after that layer has routed. Knows nothing about GPUs or policies. Shape letters: T
tokens, L layers, E experts, K experts per token, D lookahead distances, M lookahead width.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moesim.traces import Gates, InputError, LoadTable, StepTokens, TokenTable

Ids = NDArray[np.integer]
"""Expert ids, [T, K] for one layer."""
Floats = NDArray[np.float64]

Need = Literal["tokens", "vocabulary", "weights", "lookahead", "router_input", "gates"]
"""What a recording must hold for a predictor to learn from it; the names of the trace's columns, more or less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """What is known of the routers before anything is routed."""

    num_experts: int
    top_k: int
    gates: Gates | None = None
    """The frozen gates of the model, where the recording holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastStep:
    """A finished step: its tokens and the routing of all layers, [T, L, K]."""

    tokens: StepTokens
    topk_ids: Ids


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedLayer:
    """What the router of one layer has done with the T tokens of a step."""

    ids: Ids
    """[T, K]."""
    weights: NDArray[np.float16] | None = None
    """[T, K] gate weights."""
    lookahead: Ids | None = None
    """[T, D, M] what the gates of the next D layers say of this layer's router input."""
    router_input: NDArray[np.float16] | None = None
    """[T, d_model]."""


def routed_layer(table: TokenTable, layer: int, rows: NDArray[np.intp] | slice = slice(None)) -> RoutedLayer:
    """One layer of recorded routing, as a step sees it once the layer has routed."""
    return RoutedLayer(
        ids=np.ascontiguousarray(table.topk_ids[rows, layer]),
        weights=None if table.topk_weights is None else np.ascontiguousarray(table.topk_weights[rows, layer]),
        lookahead=None if table.lookahead_ids is None else table.lookahead_ids[rows, layer],
        router_input=None if table.router_input is None else np.ascontiguousarray(table.router_input[rows, layer]),
    )


@dataclass(slots=True, kw_only=True)
class Seen:
    """Everything that is known at a decision point of a running step."""

    step: int
    tokens: StepTokens
    queued: StepTokens | None = None
    """Tokens of the next step where they are already waiting (encoder, prefill); never known in decode."""
    routed: list[RoutedLayer] = field(default_factory=list)
    """The layers of this step that have routed, in layer order."""
    past: deque[PastStep] = field(default_factory=deque)
    """Earlier steps, the latest last; how many are kept is up to the driver."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """For predictors: what they have worked out of this step, so that the next layer does not start again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is expected of one layer."""

    load: Floats
    """[E] expected tokens of each expert; sums to tokens x K."""
    topk: Ids | None = None
    """[T, >= K] experts of each token, the likeliest first; None where nothing is said of single tokens."""
    inclusion_UE: NDArray[np.floating] | None = None
    """Probability that the expert is among a token's K, rows sum to K: of every token, or of U kinds of tokens."""
    kind_T: Ids | None = None
    """[T] the row that holds for each token; None where every token has its own. Thousands of tokens are of few kinds
    where a forecast looks at little, and then nothing of the size [T, E] need be made."""

    @property
    def inclusion(self) -> NDArray[np.floating] | None:
        """[T, E] probability that the expert is among the token's K."""
        if self.inclusion_UE is None or self.kind_T is None:
            return self.inclusion_UE
        return np.asarray(self.inclusion_UE[self.kind_T])

    @property
    def load_sd(self) -> Floats | None:
        """[E] standard deviation of the loads, tokens taken as independent given the forecast; None without
        `inclusion`."""
        if self.inclusion_UE is None:
            return None
        return np.asarray(np.sqrt(summed(self.inclusion_UE * (1 - self.inclusion_UE), self.kind_T)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a forecast for one layer takes."""

    flops: float = 0.0
    """Arithmetic of one token."""
    parameters: int = 0
    """Numbers that were learned, tables included."""


class Predictor(Protocol):
    """Fitted once on recorded requests, then asked before a layer has routed."""

    name: str
    needs: tuple[Need, ...]
    """What it learns from; () where loads alone are enough."""

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Learn from `table`; its requests must not be the ones that are scored. Raises InputError where the recording
        lacks something that the predictor `needs`."""

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """What is expected of `layer` in this step or, with `queued`, in the next step, whose tokens are
        `seen.queued`."""

    def cost(self) -> Cost:
        """What one forecast takes, once fitted."""


@runtime_checkable
class Adapting(Protocol):
    """A predictor that goes on learning while it is used."""

    def observe(self, seen: Seen) -> None:
        """A step has ended: `seen` holds the routing of all its layers."""


def missing(predictor: Predictor, table: TokenTable | LoadTable, router: RouterSpec) -> Need | None:
    """The first thing that the predictor needs and the recording lacks; None where it has all."""
    if isinstance(table, LoadTable):
        return next(iter(predictor.needs), None)
    there: dict[Need, bool] = {
        "tokens": True,
        "vocabulary": table.token_id is not None,
        "weights": table.topk_weights is not None,
        "lookahead": table.lookahead_ids is not None,
        "router_input": table.router_input is not None,
        "gates": router.gates is not None,
    }
    return next((need for need in predictor.needs if not there[need]), None)


WITHOUT: dict[Need, str] = {
    "tokens": "learns from what every token chose, and this recording has loads only",
    "vocabulary": "learns from vocabulary ids, and this recording does not say which tokens were routed",
    "weights": "reads gate weights, and this recording has ids only",
    "lookahead": "asks the gates of later layers: record with --lookahead 1 or more",
    "router_input": "reads what the routers were given: record with --router-input",
    "gates": "reads the routers' own weights: record with --router-input",
}


def learnable(table: TokenTable | LoadTable, router: RouterSpec, predictor: Predictor) -> TokenTable:
    """`table`, which holds all that the predictor needs. Raises InputError where it does not."""
    lacks = missing(predictor, table, router)
    if lacks is not None or isinstance(table, LoadTable):
        raise InputError(f"predictor {predictor.name!r} {WITHOUT[lacks or 'tokens']}")
    return table


def tokens_of(seen: Seen, queued: bool) -> StepTokens:
    """The tokens that a forecast is about. Raises ValueError where the next step is not known yet."""
    if not queued:
        return seen.tokens
    if seen.queued is None:
        raise ValueError("the next step's tokens are not known: nothing can be forecast for it")
    return seen.queued


def from_probabilities(p_UE: NDArray[np.floating], top_k: int, kind_T: Ids | None = None) -> Forecast:
    """Forecast from the distribution over experts (rows sum to 1) of each token, or of each kind: inclusion
    probabilities are K times it, at most 1, what is over going to the others."""
    return from_inclusion(inclusion_of(p_UE, top_k), top_k, kind_T)


def from_inclusion(inclusion_UE: NDArray[np.floating], top_k: int, kind_T: Ids | None = None) -> Forecast:
    """Forecast from inclusion probabilities (rows sum to K) of all tokens, or of kinds of tokens: loads add up, ids are
    the K most probable."""
    topk_UK = most_probable(inclusion_UE, top_k)
    return Forecast(
        load=summed(inclusion_UE, kind_T),
        topk=topk_UK if kind_T is None else topk_UK[kind_T],
        inclusion_UE=inclusion_UE,
        kind_T=kind_T,
    )


def summed(value_UE: NDArray[np.floating], kind_T: Ids | None) -> Floats:
    """[E] sum over the tokens of the rows of their kinds; of all rows where every token has its own."""
    if kind_T is None:
        return np.asarray(value_UE.sum(axis=0, dtype=np.float64))
    return np.bincount(kind_T, minlength=len(value_UE)).astype(np.float64) @ value_UE


def inclusion_of(p_TE: NDArray[np.floating], top_k: int) -> NDArray[np.floating]:
    """[T, E] inclusion probabilities, rows summing to K, in proportion to `p_TE` as far as none exceeds 1."""
    if top_k == 1:
        return p_TE
    wanted_TE = p_TE * (top_k / p_TE.sum(axis=1, keepdims=True))
    for _ in range(top_k):  # each turn fills at least one more expert of every row that is still over
        over_TE = wanted_TE >= 1
        if not (wanted_TE > 1).any():
            break
        rest_T1 = top_k - over_TE.sum(axis=1, keepdims=True)
        free_TE = np.where(over_TE, 0, wanted_TE)
        scale_T1 = rest_T1 / np.maximum(free_TE.sum(axis=1, keepdims=True), 1e-30)
        wanted_TE = np.where(over_TE, 1, free_TE * scale_T1)
    return np.asarray(np.minimum(wanted_TE, 1))


def filled(known_TE: NDArray[np.floating], usual_E: NDArray[np.floating], top_k: int) -> NDArray[np.floating]:
    """[T, E] inclusion probabilities, rows summing to K: what is known where it is not 0, and what is missing to K
    divided among the other experts as usual (`usual_E`). Where these cannot take it all, everything grows."""
    other_TE = np.where(known_TE > 0, 0, usual_E)
    rest_T1 = np.maximum(top_k - known_TE.sum(axis=1, keepdims=True), 0)
    whole_TE = known_TE + other_TE * (rest_T1 / np.maximum(other_TE.sum(axis=1, keepdims=True), 1e-30))
    return inclusion_of(whole_TE / whole_TE.sum(axis=1, keepdims=True), top_k)


def most_probable(p_TE: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """[T, count] the experts with the highest values, highest first; ties to the lowest id where count is 1."""
    if count == 1:
        return np.asarray(p_TE.argmax(axis=1)[:, None])
    some = np.argpartition(-p_TE, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(p_TE, some, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(some, order, axis=1))
