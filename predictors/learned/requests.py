"""Recorded requests as mini-batches of tensors: whole requests, one after the other, tokens by position.

Knows nothing about nets. Shape letters: T tokens of a recording, N tokens of a batch, B requests of a batch, S
positions of the longest of them, P pieces (requests, long ones cut).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

Columns = Mapping[str, torch.Tensor]
"""Name to [N, ...]; "ids" are the experts that were chosen, [N, L, K]."""

LONGEST = 1024
"""Positions of a piece; longer requests are cut, so that padding and attention stay small."""
CHECKED, MOST_CHECKED = 0.1, 8192
"""Tokens held out of the training to choose the best epoch: their share, and how many suffice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """N tokens of B requests."""

    columns: Columns
    lengths: list[int]
    """[B] tokens of each request; they stand together and sum to N."""
    noise: torch.Generator | None = None
    """Where training draws from; None: nothing is random."""

    def __len__(self) -> int:
        return sum(self.lengths)

    def padded(self, x_NX: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] the requests beside each other, zeros behind their ends."""
        return pad_sequence(list(torch.split(x_NX, self.lengths)), batch_first=True)

    def real_BS(self, device: torch.device) -> torch.Tensor:
        """[B, S] True where there is a token; `x_BSX[real_BS]` undoes `padded`."""
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        return torch.arange(max(self.lengths), device=device) < lengths_B1


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """`array` as a tensor, without a copy where torch can write to it: of others it warns."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class Requests:
    """A recording's requests, some of them held out (`check`) from those to train on (`fit`).

    `columns`: [T, ...] each. With a single request both are that one.
    """

    def __init__(
        self, columns: Columns, request_T: NDArray[np.int32], position_T: NDArray[np.int32], *, seed: int
    ) -> None:
        self.columns = columns
        order_T = np.lexsort((position_T, request_T))
        sorted_T = request_T[order_T]
        starts = np.flatnonzero(np.diff(sorted_T, prepend=sorted_T[0] - 1))
        ends = np.append(starts[1:], len(order_T))
        cuts = [
            (at, min(at + LONGEST, end))
            for start, end in zip(starts, ends, strict=True)
            for at in range(start, end, LONGEST)
        ]
        self.rows_P = [order_T[start:end] for start, end in cuts]
        self.tokens_P = np.array([len(rows) for rows in self.rows_P])
        held_P = _held_out(np.array([sorted_T[start] for start, _ in cuts]), self.tokens_P, seed)
        self.fit, self.check = (
            (np.flatnonzero(~held_P), np.flatnonzero(held_P)) if held_P.any() else (np.arange(len(cuts)),) * 2
        )

    def batch(self, pieces: NDArray[np.intp], device: torch.device, noise: torch.Generator | None = None) -> Batch:
        """The tokens of `pieces` on `device`."""
        rows_N = torch.from_numpy(np.concatenate([self.rows_P[p] for p in pieces]))
        columns = {name: column[rows_N].to(device) for name, column in self.columns.items()}
        return Batch(columns=columns, lengths=self.tokens_P[pieces].tolist(), noise=noise)

    def groups(self, pieces: NDArray[np.intp], tokens: int) -> list[NDArray[np.intp]]:
        """`pieces` in order, in groups of about `tokens`, none empty; their number is the same in any order."""
        ends_P = self.tokens_P[pieces].cumsum()
        number = min(len(pieces), -(-int(ends_P[-1]) // tokens))
        cut = np.arange(1, number)
        before = np.searchsorted(ends_P - self.tokens_P[pieces] / 2, ends_P[-1] * cut / number)
        spare = np.maximum.accumulate(before - cut).clip(0, len(pieces) - number)  # pieces beyond one for each group
        return np.split(pieces, spare + cut)


def _held_out(request_P: NDArray[np.int32], tokens_P: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[P] True for whole requests in a random order, until they have their share of the tokens; not the last one."""
    found, inverse_P = np.unique(request_P, return_inverse=True)
    tokens_R = np.bincount(inverse_P, weights=tokens_P)
    wanted = min(CHECKED * tokens_R.sum(), MOST_CHECKED)
    order_R = np.random.default_rng(seed).permutation(len(found))[:-1]
    before = tokens_R[order_R].cumsum() - tokens_R[order_R]
    return np.asarray(np.isin(inverse_P, order_R[before < wanted]))
