"""Tokens that reproduce recorded loads, for recordings that counted and kept no tokens.

Which token got which expert is not known, so it is drawn at random: sums over tokens are exact, everything about single
tokens (what follows what, which request) means nothing. What needs that refuses a recording of loads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.tokens import LoadTable, TokenTable, concat, id_dtype

SEED = 0
"""The draw is part of the definition: the same loads give the same tokens."""

MAX_CHOICES = 1 << 29


def tokens_of_loads(loads: LoadTable, top_k: int) -> TokenTable:
    """A token table whose loads are exactly `loads`: rows become steps, every token a request of its own.

    Raises InputError where a row cannot come from top-`top_k` routing (layers with different sums, a sum that K does
    not divide, an expert with more tokens than there are), and where the choices would not fit in memory.
    """
    choices = int(loads.load.sum())
    if choices > MAX_CHOICES:
        raise InputError(
            f"these loads stand for {choices:,} choices, more than the {MAX_CHOICES:,} that are drawn at once: run "
            "fewer steps (--max-steps)"
        )
    rng = np.random.default_rng(SEED)
    parts = [_step(loads, row, top_k, rng) for row in range(len(loads))]
    table = concat(parts) if parts else _step(loads, 0, top_k, rng)
    request = np.arange(len(table), dtype=np.int32)
    return TokenTable(**{**table.arrays(), "request": request})  # type: ignore[arg-type] # names give the dtypes


def _step(loads: LoadTable, row: int, top_k: int, rng: np.random.Generator) -> TokenTable:
    load_LE = loads.load[row]
    L, E = load_LE.shape
    sums = load_LE.sum(axis=1)
    tokens = int(sums[0]) // top_k
    if (sums != tokens * top_k).any() or int(load_LE.max(initial=0)) > tokens:
        raise InputError(
            f"row {row} of the loads cannot come from top-{top_k} routing (every layer must count tokens x {top_k}, no "
            "expert more than all tokens): say the right --top-k or --model at import"
        )
    ids_TLK = np.empty((tokens, L, top_k), id_dtype(E))
    for layer in range(L):
        ids_TLK[:, layer] = rng.permutation(_deal(load_LE[layer], tokens, top_k))
    return TokenTable(
        topk_ids=ids_TLK,
        dropped=np.zeros((tokens, L), np.bool_),
        request=np.zeros(tokens, np.int32),
        position=np.zeros(tokens, np.int32),
        step=np.full(tokens, loads.step[row], np.int32),
        phase=np.full(tokens, loads.phase[row], np.uint8),
    )


def _deal(load_E: NDArray[np.int64], tokens: int, top_k: int) -> NDArray[np.intp]:
    """[T, K] like cards dealt one by one: an expert's run is at most T long, so that no token gets it twice."""
    return np.repeat(np.arange(len(load_E)), load_E).reshape(top_k, tokens).T
