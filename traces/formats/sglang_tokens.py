"""SGLang's recorder in mode per_token: what every token of every forward pass chose.

A record is one pass on one rank: `topk_ids_of_layer` int32 [L, T, 8], physical ids, -1 where a layer is dense, a column
is beyond K, or a row is padding. Ranks of data parallelism hold different tokens; ranks that repeat them count once.
No record names its requests: `extend_seq_lens` cuts a pass into them, or where that is missing (verification of drafts)
every break in the positions; in a decode pass each token is one request's. A piece that begins at position n > 0 goes
on with the oldest request whose tokens so far end at n - 1, else it begins a request (its prefix came from the cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.formats.base import ImportOptions, Recording
from moesim.traces.formats.loads import Counts
from moesim.traces.formats.routed import Ints, Known, Piece, apply_map, recording_of
from moesim.traces.formats.torch_files import array_of
from moesim.traces.tokens import Phase

DECODE = 2
"""SGLang's ForwardMode of a decode pass; extend is 1, a mixed pass (3) counts as prefill."""

Records = list[tuple[Path, dict[str, Any]]]


def read(path: Path, records: Records, map_LP: Counts, options: ImportOptions) -> Recording:
    """Passes in order, in each the ranks. Raises InputError where records lack something or contradict each other."""
    passes = by_pass(records)
    used_L, used_K = _used(records, map_LP)
    if not used_L.any():
        raise InputError(f"{path}: no token chose an expert")
    known = Known(layers=tuple(int(i) for i in np.flatnonzero(used_L)), num_layers=len(used_L))
    known.notes["physical_ids"] = "made logical by last_physical_to_logical_map"
    map_LP = map_LP[used_L]
    experts = options.spec.num_experts if options.spec else options.experts
    if experts is not None and int(map_LP.max(initial=0)) >= experts:
        raise InputError(f"{path}: its map names expert {int(map_LP.max())}, there are {experts}")

    def pieces() -> Iterator[Piece]:
        return _pieces(passes, used_L, used_K, map_LP, known.notes)

    return recording_of(path, pieces, options, known)


def by_pass(records: Records) -> dict[int, Records]:
    """Number of the pass to its records, one a rank, in order of pass. Raises InputError: a record without a number, or
    two of one rank (recordings of several servers in one folder, which must not be summed)."""
    passes: dict[int, Records] = {}
    ranks: set[tuple[int, str, str]] = set()
    for file, record in records:
        number = record.get("forward_pass_id")
        if type(number) is not int:
            raise InputError(f"{file}: a record lacks forward_pass_id")
        rank = number, str(record.get("rank"))[:80], str(record.get("gatherer_key"))[:80]
        if rank in ranks:
            raise InputError(f"{file}: pass {number} of rank {rank[1]} is there twice; import one recording at a time")
        ranks.add(rank)
        passes.setdefault(number, []).append((file, record))
    return dict(sorted(passes.items()))


def _used(records: Records, map_LP: Counts) -> tuple[NDArray[np.bool_], int]:
    """([L] layers that route, K): columns and layers that are not -1 throughout."""
    used_L, used_K = np.zeros(len(map_LP), np.bool_), 0
    for file, record in records:
        ids = _ids(file, record)
        if len(ids) != len(used_L):
            raise InputError(f"{file}: topk_ids_of_layer has {len(ids)} layers, the map {len(used_L)}")
        used_L |= (ids >= 0).any(axis=(1, 2))
        columns = np.flatnonzero((ids >= 0).any(axis=(0, 1)))
        used_K = max(used_K, int(columns[-1]) + 1 if len(columns) else 0)
    return used_L, used_K


def _pieces(
    passes: dict[int, Records], used_L: NDArray[np.bool_], top_k: int, map_LP: Counts, notes: dict[str, Any]
) -> Iterator[Piece]:
    requests = _Requests()
    padding = repeated = 0
    for step, (number, of_ranks) in enumerate(passes.items()):
        seen: list[tuple[Ints, Ints, Ints]] = []
        for file, record in of_ranks:
            where = f"{file}, pass {number}"
            token_id, position = _column(record, "input_ids", where), _column(record, "positions", where)
            raw = _ids(file, record)[used_L][:, :, :top_k].transpose(1, 0, 2)
            raw = raw[: len(token_id)]
            real_T = (raw >= 0).any(axis=(1, 2))
            padding += len(token_id) - int(real_T.sum())
            if len(position) != len(token_id) or len(raw) != len(token_id):
                raise InputError(f"{where}: input_ids, positions and topk_ids_of_layer differ in length")
            columns = token_id, position, raw
            if len(raw) and any(all(map(np.array_equal, columns, other)) for other in seen):
                repeated += 1
                continue
            seen.append(columns)
            mode = record.get("forward_mode")
            decode = type(mode) is int and mode == DECODE
            request = requests.of(position, [1] * len(position) if decode else _lengths(record, where, position))
            if real_T.any():
                yield Piece(
                    where=where,
                    ids=apply_map(raw[real_T], map_LP, where),
                    request=request[real_T],
                    step=step,
                    token_id=token_id[real_T],
                    position=position[real_T],
                    phase=Phase.DECODE if decode else Phase.PREFILL,
                )
    notes.update({"padding_rows": padding} if padding else {})
    notes.update({"ranks": f"{repeated} records repeat another rank's tokens and were left out"} if repeated else {})


class _Requests:
    """Numbers requests, and finds the one that goes on at a position."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: dict[int, list[int]] = {}  # next position to the requests that wait for it, oldest first

    def of(self, position_T: Ints, lengths: list[int]) -> NDArray[np.int64]:
        """[T] request of each token of a pass that `lengths` cuts into requests."""
        request_T = np.empty(len(position_T), np.int64)
        at = 0
        for length in filter(None, lengths):
            request_T[at : at + length] = self._next(int(position_T[at]), int(position_T[at + length - 1]))
            at += length
        return request_T

    def _next(self, first: int, last: int) -> int:
        open_here = self._waiting.get(first) if first else None
        number = open_here.pop(0) if open_here else self._count
        self._count += number == self._count
        self._waiting.setdefault(last + 1, []).append(number)
        return number


def _ids(file: Path, record: dict[str, Any]) -> NDArray[Any]:
    what = f"{file}, pass {record.get('forward_pass_id')}: topk_ids_of_layer"
    ids = array_of(record.get("topk_ids_of_layer"), what, 3)
    if ids.dtype.kind not in "iu" or ids.shape[2] > 256 or int(ids.min(initial=0)) < -1:
        raise InputError(f"{what}: must be physical expert ids [L, T, 8], -1 where there is none")
    return ids


def _column(record: dict[str, Any], name: str, where: str) -> NDArray[np.int64]:
    found = array_of(record.get(name), f"{where}: {name}", 1)
    if found.dtype.kind not in "iu" or (found.size and not 0 <= found.min() <= found.max() < 1 << 31):
        raise InputError(f"{where}: {name} must be whole numbers from 0")
    return found.astype(np.int64)


def _lengths(record: dict[str, Any], where: str, position_T: Ints) -> list[int]:
    """Tokens of each request of a pass; what they leave over, mostly padding, is one more."""
    T = len(position_T)
    if record.get("extend_seq_lens") is None:
        cuts = np.flatnonzero(np.diff(position_T) != 1) + 1
        return [int(length) for length in np.diff([0, *cuts.tolist(), T])]
    lengths = _column(record, "extend_seq_lens", where).tolist()
    if sum(lengths) > T:
        raise InputError(f"{where}: extend_seq_lens sum to {sum(lengths)} for {T} tokens")
    return [*lengths, T - sum(lengths)]
