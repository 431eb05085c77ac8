"""Steps out of a recording: which tokens share a forward pass, and which rank holds which request.

Because every token carries its request and position, one recording can be re-batched into any batch size. Both
executors use these functions, so that simulated and measured runs see the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.tokens import Phase, TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """The T tokens of one step as they are known before any layer routes them."""

    request: NDArray[np.int32]
    """[T] the request that each token belongs to."""
    position: NDArray[np.int32]
    """[T] position in the request."""
    token_id: NDArray[np.int32] | None = None
    """[T] vocabulary ids; None where the recording does not say."""

    def __len__(self) -> int:
        return int(self.request.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step: `rows` [T] of a TokenTable, ordered by request and position."""

    index: int
    rows: NDArray[np.intp]
    tokens: StepTokens


def vocabulary_ids(tokens: TokenTable | StepTokens) -> NDArray[np.int32]:
    """[T] the vocabulary ids. Raises InputError where the recording has none."""
    if tokens.token_id is None:
        raise InputError("the recording does not say which tokens were routed (no vocabulary ids), and this needs them")
    return tokens.token_id


def batches(table: TokenTable, batch_tokens: int, phase: Phase) -> list[Batch]:
    """Cut the tokens of `phase` into steps of about `batch_tokens` tokens, requests in arrival order.

    Encoder and prefill: whole requests are added while the step stays within `batch_tokens` (a longer request is a step
    of its own). Decode: `batch_tokens` requests are in flight, each with one token a step; a finished one makes room
    for the next. Raises InputError where the budget is not positive or no token of the phase was recorded.
    """
    if batch_tokens < 1:
        raise InputError(f"batch tokens must be at least 1, got {batch_tokens}")
    requests = _rows_by_request(table, phase)
    if not requests:
        raise InputError(f"the trace has no {phase.name.lower()} tokens; record them, or choose another phase")
    groups = _decode_steps(requests, batch_tokens) if phase is Phase.DECODE else _whole_requests(requests, batch_tokens)
    return [Batch(index=i, rows=rows, tokens=step_tokens(table, rows)) for i, rows in enumerate(groups)]


def split_requests(table: TokenTable) -> tuple[TokenTable, TokenTable]:
    """Rows of the requests to fit on, and of those to score on."""
    score = held_out(table.request)
    return table.take(~score), table.take(score)


def held_out(request_T: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T] True for the half of the requests that policies and predictors are scored on, and never fitted on.

    A hash of the request's number decides (Knuth's multiplicative one). Every second request would not do: recordings
    take their texts in turn, and with an even number of texts whole kinds of text would lie on one side.
    """
    half = request_T.astype(np.uint64) * np.uint64(0x9E3779B9) % np.uint64(1 << 32) >= np.uint64(1 << 31)
    return np.asarray(half)


def assign_ranks(request_T: NDArray[np.int32], ranks: int) -> NDArray[np.int64]:
    """Rank that holds each token under data-parallel attention, [T].

    Whole requests go, in order, to the rank with the fewest tokens so far; ties to the lowest rank.
    """
    found, first, inverse, count = np.unique(request_T, return_index=True, return_inverse=True, return_counts=True)
    rank_of = np.zeros(len(found), np.int64)
    held = np.zeros(ranks, np.int64)
    for i in np.argsort(first, kind="stable"):
        rank_of[i] = int(np.argmin(held))
        held[rank_of[i]] += count[i]
    return rank_of[inverse]


def _rows_by_request(table: TokenTable, phase: Phase) -> list[NDArray[np.intp]]:
    rows = np.flatnonzero(table.phase == phase)
    if not len(rows):
        return []
    rows = rows[np.lexsort((table.position[rows], table.request[rows]))]
    return np.split(rows, np.flatnonzero(np.diff(table.request[rows])) + 1)


def _whole_requests(requests: list[NDArray[np.intp]], batch_tokens: int) -> Iterator[NDArray[np.intp]]:
    group: list[NDArray[np.intp]] = []
    size = 0
    for rows in requests:
        if group and size + len(rows) > batch_tokens:
            yield np.concatenate(group)
            group, size = [], 0
        group.append(rows)
        size += len(rows)
    yield np.concatenate(group)


def _decode_steps(requests: list[NDArray[np.intp]], batch_tokens: int) -> Iterator[NDArray[np.intp]]:
    waiting = deque(requests)
    active: list[deque[np.intp]] = []
    while waiting or active:
        while waiting and len(active) < batch_tokens:
            active.append(deque(waiting.popleft()))
        yield np.array([rows.popleft() for rows in active], np.intp)
        active = [rows for rows in active if rows]


def step_tokens(table: TokenTable, rows: NDArray[np.intp]) -> StepTokens:
    """What is known of the tokens at `rows` before they are routed."""
    token_id = None if table.token_id is None else table.token_id[rows]
    return StepTokens(token_id=token_id, request=table.request[rows], position=table.position[rows])
