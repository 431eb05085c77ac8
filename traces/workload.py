"""Which recorded requests are run, and how they share steps: splits, batches and ranks.

Because every token carries its request and position, one recording can be re-batched into any batch size. Both
executors use these functions, so that simulated and measured runs see the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.tokens import LoadTable, Phase, TokenTable

Unit = Literal["tokens", "requests", "recorded"]
SPLITS = ("request", "alternate", "time", "dataset:NAME")
"""How requests are divided into those to fit on and those to run, see `split_requests`."""
EACH_DATASET = "dataset"
"""Every data set held out in turn: several divisions, which only a study of predictors knows what to do with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How a recording becomes the steps of a run."""

    batch: int = 2048
    """Tokens or requests of a step; in decode, where a request has one token a step, requests either way."""
    unit: Unit = "tokens"
    """What `batch` counts; 'recorded' keeps the steps of the recording, whatever `batch` says."""
    shuffle: int | None = None
    """Seed of a random order of the requests; None is the order of arrival."""
    split: str = "request"
    """One of SPLITS."""
    chunked: bool = False
    """Requests are cut so that every step has exactly `batch` tokens, the last one less (chunked prefill)."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"a batch must hold at least 1 of its {self.unit}, got {self.batch}")
        if self.unit not in get_args(Unit):
            raise InputError(f"unknown unit of a batch {self.unit!r}; known: {', '.join(get_args(Unit))}")
        if self.chunked and self.unit != "tokens":
            raise InputError(f"chunks are cut by tokens: a batch in {self.unit} and chunks exclude each other")
        if self.shuffle is not None and self.shuffle < 0:
            raise InputError(f"the seed of a shuffle must not be negative, got {self.shuffle}")
        if self.split not in (*SPLITS[:-1], EACH_DATASET) and not self.split.startswith("dataset:"):
            raise InputError(f"unknown split {self.split!r}; known: {', '.join(SPLITS)}")

    def describe(self) -> dict[str, str]:
        """For reports: batch, order and split in words."""
        return {
            "batch": self._batch(),
            "order": "arrival" if self.shuffle is None else f"shuffle {self.shuffle}",
            "split": self.split,
        }

    def _batch(self) -> str:
        if self.unit == "recorded":
            return "as recorded"
        return f"{self.batch} {self.unit}{' in chunks' if self.chunked else ''}"


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

    def take(self, rows: NDArray[np.intp]) -> StepTokens:
        """The tokens at `rows`, in that order."""
        token_id = None if self.token_id is None else self.token_id[rows]
        return StepTokens(request=self.request[rows], position=self.position[rows], token_id=token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step: `rows` [T] of a TokenTable, ordered by request and position."""

    index: int
    rows: NDArray[np.intp]
    tokens: StepTokens


def batches(table: TokenTable, workload: Workload, phase: Phase) -> list[Batch]:
    """Cut the tokens of `phase` into steps.

    Encoder and prefill: whole requests are added while the step stays within the batch (a longer request is a step of
    its own). In chunks: requests one after the other, cut every `batch` tokens, which only a prefill can do. Decode:
    `batch` requests are in flight, each with one token a step; a finished one makes room for the next. As recorded: the
    passes of the recording, as far as their requests are in `table`.
    Raises InputError where no token of the phase was recorded, or the phase cannot be cut.
    """
    if workload.chunked and phase is not Phase.PREFILL:
        raise InputError(f"only a prefill can be cut into chunks: in {phase.name.lower()} steps a request stays whole")
    rows = np.flatnonzero(table.phase == phase)
    if not len(rows):
        raise InputError(f"the trace has no {phase.name.lower()} tokens; record them, or choose another phase")
    recorded = workload.unit == "recorded"
    atoms = _shuffled(_grouped(table, rows, table.step if recorded else table.request), workload)
    if recorded:
        groups: Iterator[NDArray[np.intp]] = iter(atoms)
    elif workload.chunked:
        every = np.concatenate(atoms)
        groups = iter(np.split(every, range(workload.batch, len(every), workload.batch)))
    elif phase is Phase.DECODE:
        groups = _decode_steps(atoms, workload.batch)
    else:
        weights = [1 if workload.unit == "requests" else len(rows) for rows in atoms]
        groups = (np.concatenate(group) for group in _packed(atoms, weights, workload.batch))
    return [Batch(index=i, rows=rows, tokens=step_tokens(table, rows)) for i, rows in enumerate(groups)]


def merge_steps(loads: LoadTable, workload: Workload, top_k: int) -> LoadTable:
    """Rows of loads merged into steps of at most the batch (a larger row is a step of its own).

    Raises InputError where the batch counts requests, which loads do not know.
    """
    if workload.unit == "requests":
        raise InputError("a recording of loads knows no requests: give the batch in tokens, or keep the recorded steps")
    rows = _shuffled(list(np.arange(len(loads))[:, None]), workload)
    if workload.unit == "tokens":
        tokens_N = loads.load.sum(axis=2).max(axis=1, initial=0) // top_k
        groups = [np.concatenate(group) for group in _packed(rows, [int(tokens_N[r[0]]) for r in rows], workload.batch)]
    else:
        groups = rows
    first = np.array([group[0] for group in groups])
    return LoadTable(
        load=np.stack([loads.load[group].sum(axis=0) for group in groups]),
        step=np.arange(len(groups), dtype=np.int32),
        phase=loads.phase[first],
    )


def split_loads(loads: LoadTable, split: str) -> tuple[LoadTable, LoadTable]:
    """(rows to fit on, rows to run): the earlier and the later half, as no row knows its requests.

    Raises InputError for a split by request or data set, and where there are fewer than two rows.
    """
    if split not in ("request", "time"):
        raise InputError(f"split {split!r} needs requests, and this recording has loads only: it is split by time")
    if len(loads) < 2:
        raise InputError(
            f"the recording has {len(loads)} row of loads, and a run needs two: one to fit on and a later one to run"
        )
    half = -(-len(loads) // 2)
    return loads.take(slice(half)), loads.take(slice(half, None))


def split_requests(
    table: TokenTable, split: str = "request", request_texts: Sequence[str] = ()
) -> tuple[TokenTable, TokenTable]:
    """(rows of the requests to fit on, rows of those to run), never sharing a request.

    `request`: halves by a hash of the request's number (`held_out`). `alternate`: every second request is run. `time`:
    fitted on the requests that arrived in the first half, run on the later ones. `dataset:NAME`: run on the requests
    of the text NAME, fitted on all others, which is a shift of workload. Raises InputError where one side is empty or
    no request is of that text.
    """
    if split == EACH_DATASET:
        raise InputError("split 'dataset' holds out every data set in turn, for moesim predict: name one, dataset:NAME")
    if split.startswith("dataset:"):
        run_T = _of_text(table.request, split.removeprefix("dataset:"), request_texts)
    elif split == "request":
        run_T = held_out(table.request)
    else:
        found, first, inverse = np.unique(table.request, return_index=True, return_inverse=True)
        arrival = np.empty(len(found), np.int64)
        arrival[np.argsort(first, kind="stable")] = np.arange(len(found))
        run_R = arrival % 2 == 1 if split == "alternate" else arrival >= -(-len(found) // 2)
        run_T = run_R[inverse]
    if run_T.all() or not run_T.any():
        raise InputError(
            f"split {split!r} leaves nothing to {'fit on' if run_T.any() else 'run'}: the trace needs requests on both "
            "sides; record more of them, or choose another split"
        )
    return table.take(~run_T), table.take(run_T)


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
    lengths = request_lengths(request_T)
    rank_of = np.empty(len(lengths), np.int64)
    held = [(0, rank) for rank in range(ranks)]  # a heap: the rank with the fewest tokens, then the lowest, is first
    for i, length in enumerate(lengths.tolist()):
        tokens, rank = held[0]
        rank_of[i] = rank
        heapreplace(held, (tokens + length, rank))
    return np.repeat(rank_of, lengths)


def request_lengths(request_T: NDArray[np.int32]) -> NDArray[np.int64]:
    """[R] tokens of each request of a step, whose tokens stand together."""
    edge = np.ones(len(request_T) + 1, bool)
    np.not_equal(request_T[1:], request_T[:-1], out=edge[1:-1])
    return np.diff(np.flatnonzero(edge))


def vocabulary_ids(tokens: TokenTable | StepTokens) -> NDArray[np.int32]:
    """[T] the vocabulary ids. Raises InputError where the recording has none."""
    if tokens.token_id is None:
        raise InputError("the recording does not say which tokens were routed (no vocabulary ids), and this needs them")
    return tokens.token_id


def step_tokens(table: TokenTable, rows: NDArray[np.intp]) -> StepTokens:
    """What is known of the tokens at `rows` before they are routed."""
    token_id = None if table.token_id is None else table.token_id[rows]
    return StepTokens(token_id=token_id, request=table.request[rows], position=table.position[rows])


def _grouped(table: TokenTable, rows: NDArray[np.intp], by: NDArray[np.int32]) -> list[NDArray[np.intp]]:
    """`rows` in groups of equal `by`, ascending; in a group by request and position."""
    rows = rows[np.lexsort((table.position[rows], table.request[rows], by[rows]))]
    return np.split(rows, np.flatnonzero(np.diff(by[rows])) + 1)


def _shuffled(atoms: list[NDArray[np.intp]], workload: Workload) -> list[NDArray[np.intp]]:
    if workload.shuffle is None:
        return atoms
    return [atoms[i] for i in np.random.default_rng(workload.shuffle).permutation(len(atoms))]


def _packed(atoms: list[NDArray[np.intp]], weights: list[int], batch: int) -> Iterator[list[NDArray[np.intp]]]:
    """Neighbours together while their weights stay within the batch."""
    group: list[NDArray[np.intp]] = []
    size = 0
    for rows, weight in zip(atoms, weights, strict=True):
        if group and size + weight > batch:
            yield group
            group, size = [], 0
        group.append(rows)
        size += weight
    yield group


def _decode_steps(requests: list[NDArray[np.intp]], in_flight: int) -> Iterator[NDArray[np.intp]]:
    waiting = deque(requests)
    active: list[deque[np.intp]] = []
    while waiting or active:
        while waiting and len(active) < in_flight:
            active.append(deque(waiting.popleft()))
        yield np.array([rows.popleft() for rows in active], np.intp)
        active = [rows for rows in active if rows]


def _of_text(request_T: NDArray[np.int32], name: str, request_texts: Sequence[str]) -> NDArray[np.bool_]:
    if name not in request_texts:
        known = ", ".join(sorted(set(request_texts))) or "none (the recording names no texts)"
        raise InputError(f"no request comes from data set {name!r}; known: {known}")
    return np.array([text == name for text in request_texts])[request_T]
