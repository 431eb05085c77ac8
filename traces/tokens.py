"""Routed tokens of one stack: the arrays that every other module reads.

Shape letters: T tokens, L MoE layers of the stack, K experts per token, D lookahead distances, M lookahead width.
Knows nothing about files (store.py) or models (record.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import TraceError


class Phase(IntEnum):
    """What kind of forward pass computed a token."""

    ENCODER = 0
    PREFILL = 1
    DECODE = 2


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """Smallest dtype that holds every expert id."""
    return np.uint8 if num_experts <= 256 else np.uint16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """Routing of T tokens through the L MoE layers of one stack, in the order in which they were computed."""

    topk_ids: NDArray[np.uint8 | np.uint16]
    """[T, L, K] expert ids that the model's router chose, most probable first."""
    topk_weights: NDArray[np.float16] | None = None
    """[T, L, K] gate weights as the model applied them; None where the recording has ids only."""
    dropped: NDArray[np.bool_]
    """[T, L] True where none of the token's experts ran (all over capacity): it took the residual path."""
    token_id: NDArray[np.int32] | None = None
    """[T] vocabulary id that entered the stack; None where the recording does not say."""
    request: NDArray[np.int32]
    """[T] which request (sequence) the token belongs to."""
    position: NDArray[np.int32]
    """[T] position in its request, padding not counted."""
    step: NDArray[np.int32]
    """[T] the forward pass of the recording."""
    phase: NDArray[np.uint8]
    """[T] a `Phase`."""
    lookahead_ids: NDArray[np.uint8 | np.uint16] | None = None
    """[T, L, D, M] what the gates of MoE layers l+1..l+D say of layer l's router input; beyond the last layer: 0."""
    router_input: NDArray[np.float16] | None = None
    """[T, L, d_model] what each router was given; None where it was not recorded."""

    def __post_init__(self) -> None:
        if self.topk_ids.ndim != 3:
            raise TraceError(f"topk_ids must have shape [T, L, K], got {list(self.topk_ids.shape)}")
        T, L, K = self.topk_ids.shape
        per_token = dict.fromkeys(("token_id", "request", "position", "step", "phase"), (T,))
        expected: dict[str, tuple[int, ...]] = {"topk_weights": (T, L, K), "dropped": (T, L), **per_token}
        for name, shape in expected.items():
            column = getattr(self, name)
            if column is not None and column.shape != shape:
                raise TraceError(f"{name} must have shape {list(shape)}, got {list(column.shape)}")
        ahead = self.lookahead_ids
        if ahead is not None and (ahead.ndim != 4 or ahead.shape[:2] != (T, L)):
            raise TraceError(f"lookahead_ids must have shape [{T}, {L}, D, M], got {list(ahead.shape)}")
        given = self.router_input
        if given is not None and (given.ndim != 3 or given.shape[:2] != (T, L)):
            raise TraceError(f"router_input must have shape [{T}, {L}, d_model], got {list(given.shape)}")

    def __len__(self) -> int:
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """L, the MoE layers of the stack."""
        return int(self.topk_ids.shape[1])

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Column name to array, without the optional columns that are absent."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_] | slice) -> TokenTable:
        """The rows at `index`, in that order."""
        return TokenTable(**{name: column[index] for name, column in self.arrays().items()})  # type: ignore[arg-type] # names give the dtypes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTable:
    """Loads of one stack without the tokens behind them: N rows, each a step, a window or a request."""

    load: NDArray[np.int64]
    """[N, L, E] tokens routed to each expert."""
    step: NDArray[np.int32]
    """[N] where in the recording the row lies."""
    phase: NDArray[np.uint8]
    """[N] a `Phase`."""

    def __post_init__(self) -> None:
        if self.load.ndim != 3:
            raise TraceError(f"load must have shape [N, L, E], got {list(self.load.shape)}")
        for name in ("step", "phase"):
            if getattr(self, name).shape != (len(self.load),):
                raise TraceError(f"{name} must have shape [{len(self.load)}], got {list(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return int(self.load.shape[0])

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Column name to array."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_] | slice) -> LoadTable:
        """The rows at `index`, in that order."""
        return LoadTable(load=self.load[index], step=self.step[index], phase=self.phase[index])


def concat_loads(tables: list[LoadTable]) -> LoadTable:
    """All rows of `tables`, in order. Raises TraceError where their shapes differ."""
    try:
        return LoadTable(**{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(LoadTable)})
    except ValueError as error:
        raise TraceError(f"the parts of a trace do not fit together: {error}") from None


def concat(tables: list[TokenTable]) -> TokenTable:
    """All rows of `tables`, in order. Raises TraceError where they differ in columns or shapes."""
    names = tables[0].arrays().keys()
    if any(table.arrays().keys() != names for table in tables):
        raise TraceError("the parts of a trace do not have the same columns")
    try:
        return TokenTable(**{name: np.concatenate([table.arrays()[name] for table in tables]) for name in names})
    except ValueError as error:
        raise TraceError(f"the parts of a trace do not fit together: {error}") from None


def load_LE(
    topk_ids_TLK: NDArray[np.integer], num_experts: int, dropped_TL: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Tokens that each expert of each layer computes, [L, E]; dropped tokens are not computed and do not count."""
    T, L, K = topk_ids_TLK.shape
    key = topk_ids_TLK.astype(np.int64) + np.arange(L)[None, :, None] * num_experts
    if dropped_TL is not None:
        key = key[np.broadcast_to(~dropped_TL[:, :, None], (T, L, K))]
    return np.bincount(key.ravel(), minlength=L * num_experts).reshape(L, num_experts)


def total_load_LE(table: TokenTable | LoadTable, num_experts: int) -> NDArray[np.int64]:
    """[L, E] the load of a whole table, of either kind."""
    if isinstance(table, LoadTable):
        return np.asarray(table.load.sum(axis=0))
    return load_LE(table.topk_ids, num_experts, table.dropped)
