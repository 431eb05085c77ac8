"""Rows of a recording that are no traffic: warm-up and profiling passes, padding, empty rows.

Servers run made-up batches before the first request (profiling, graph capture) and pad batches to fixed sizes; their
recorders write that down with the rest (up to 87% of the rows of public recordings). Such rows look like nothing else:
long runs of tokens that all choose the same experts in every layer, tokens that choose one expert twice, loads that lie
on exactly K experts. What may be traffic is never touched. Works on a stream: a run may span its parts.
Shape letters: T tokens, N rows of loads, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces.tokens import LoadTable, TokenTable, concat

RUN = 16
"""Equal neighbours that make a run; ordinary neighbours hardly ever agree in all L x K choices."""
MIN_CHOICES = 4
"""L x K below which equal neighbours prove nothing, unless the tokens are known to be equal, too."""

Bools = NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class Cleaning:
    """What was found among the rows that came in."""

    rows: int = 0
    warmup: int = 0
    """Made-up rows before the first ordinary one."""
    padding: int = 0
    """Made-up rows after it."""
    empty: int = 0
    """Rows of loads without a token."""
    kept: bool = False
    """Whether warm-up and padding were kept; empty rows never are."""

    @property
    def left(self) -> int:
        """Rows that were passed on."""
        return self.rows - self.empty - (0 if self.kept else self.warmup + self.padding)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: counts, shares of the rows, and what was dropped."""
        found = {"warmup": self.warmup, "padding": self.padding, "empty": self.empty}
        shares = {name: count / max(self.rows, 1) for name, count in found.items()}
        return {"rows": self.rows, "found": found, "shares": shares, "dropped": ["empty"] if self.kept else list(found)}


class Cleaner:
    """Passes a stream of tables on without the rows that are no traffic, and counts those in `found`."""

    def __init__(self, top_k: int, *, keep: bool = False) -> None:
        self.top_k = top_k
        self.found = Cleaning(kept=keep)
        self._ordinary = False  # an ordinary row has been seen
        self._run: NDArray[np.int64] | None = None  # the row that a made-up run consists of, while it goes on

    def clean(self, parts: Iterator[TokenTable] | Iterator[LoadTable]) -> Iterator[TokenTable] | Iterator[LoadTable]:
        """The parts without the rows that are no traffic; empty parts are not passed on."""
        waiting: TokenTable | None = None
        for part in parts:
            self.found.rows += len(part)
            if not len(part):
                continue
            if isinstance(part, LoadTable):
                yield from self._loads(part)
                continue
            table = part if waiting is None else concat([waiting, part])
            made_up_T, open_run = self._made_up(table)
            # A short run at the end may go on in the next part: it waits until that is known.
            yield from self._keep(table.take(slice(open_run)), made_up_T[:open_run])
            waiting = table.take(slice(open_run, None)) if open_run < len(table) else None
        if waiting is not None:
            yield from self._keep(waiting, _repeats(waiting))

    def _loads(self, part: LoadTable) -> Iterator[LoadTable]:
        sums_N = part.load.sum(axis=(1, 2))
        full = part.take(sums_N > 0)
        self.found.empty += len(part) - len(full)
        # Equal tokens lie on exactly K experts a layer, each with all of them.
        peak_NL = full.load.max(axis=2, initial=0)
        equal_NL = (full.load > 0).sum(axis=2) == self.top_k
        equal_NL &= (full.load == peak_NL[:, :, None]).sum(axis=2) == self.top_k
        yield from self._keep(full, (equal_NL & (peak_NL >= RUN)).all(axis=1))

    def _keep(self, rows: Any, made_up: Bools) -> Iterator[Any]:
        """Count the made-up rows of the next table and pass the others on (all, with `keep`)."""
        count = int(made_up.sum())
        early = len(rows) if not self._ordinary else 0
        if not self._ordinary and count < len(rows):
            early = int(np.argmin(made_up))
            self._ordinary = True
        warmup = int(made_up[:early].sum())
        self.found.warmup += warmup
        self.found.padding += count - warmup
        if not self.found.kept and count:
            rows = rows.take(~made_up)
        if len(rows):
            yield rows

    def _made_up(self, table: TokenTable) -> tuple[Bools, int]:
        """([T] rows that are no traffic, index of the first row of a run whose end is not known yet)."""
        rows_TC = table.topk_ids.reshape(len(table), -1)
        if table.token_id is not None:
            rows_TC = np.concatenate([table.token_id[:, None], rows_TC.astype(np.int32)], axis=1)
        elif rows_TC.shape[1] < MIN_CHOICES:
            return _repeats(table), len(table)
        start = np.concatenate([[0], 1 + np.flatnonzero((rows_TC[1:] != rows_TC[:-1]).any(axis=1))])
        length = np.diff(np.append(start, len(table)))
        long = length >= RUN
        if self._run is not None and np.array_equal(self._run, rows_TC[0]):
            long[0] = True
        self._run = rows_TC[-1].copy() if long[-1] else None
        made_up_T = np.repeat(long, length) | _repeats(table)
        return made_up_T, len(table) if long[-1] else int(start[-1])


def _repeats(table: TokenTable) -> Bools:
    """[T] tokens that have one expert twice in most layers, as no router chooses: padding written as one number."""
    ids = table.topk_ids
    if ids.shape[2] == 1:
        return np.zeros(len(ids), np.bool_)
    return np.asarray((ids[:, :, 0] == ids[:, :, -1]).sum(axis=1) * 2 > ids.shape[1])
