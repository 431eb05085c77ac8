"""`neighbours` that goes on learning: tokens of finished steps become units.

What documents of one kind, or the rest of a long one, will choose is told best by what was chosen in them of late. A
step's tokens join the units of every layer, the oldest of those that joined make room; maps stay as they were fitted.

Source: our own; inserting into a graph of neighbours is Malkov and Yashunin's (TPAMI 42(4), 2020). Shape letters: T
tokens, U units, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import RoutedLayer, RouterSpec, Seen
from moesim.predictors.context import Context
from moesim.predictors.neighbours import Neighbours
from moesim.predictors.neighbours_fit import Units, kept
from moesim.traces import LoadTable, TokenTable

ROOM = 8192
"""Tokens of finished steps, the latest ones."""


class OnlineNeighbours(Neighbours):
    """See the module."""

    name = "neighbours-online"

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """As the other, with room for more units."""
        super().fit(table, router)
        self._fitted = self.units[0].residual_DUE.shape[1] if self.units else 0
        self._joined = 0
        self.units = [_with_room(units) for units in self.units]

    def observe(self, seen: Seen) -> None:
        """As the other; and the step's tokens, the last ones of very many, become units."""
        tokens = seen.tokens
        T = len(tokens)
        rows = slice(max(T - ROOM, 0), T)
        state = self._begun_rows(Context(tokens, self.E, self._memory), rows)
        place_T = self._fitted + (self._joined + np.arange(T - rows.start)) % ROOM
        self._joined += len(place_T)
        for source, routed in enumerate(seen.routed[: self.L - 1] if T else []):
            self._follow(state, routed)
            units = self.units[source]
            if source < len(self.orders):
                self.orders[source] = self.orders[source].joined(place_T, routed.ids[rows])
            if units.sketch:
                self._settle(units.sketch, state, place_T)
            for at, residual_UE in enumerate(units.residual_DUE):
                error_TE = self._chosen(seen.routed[source + 1 + at], rows) - self._linear(state, at)
                residual_UE[place_T] = kept(error_TE, units.read_DEE[at])
        super().observe(seen)

    def _settle(self, sketch: Any, state: Any, place_T: NDArray[np.intp]) -> None:
        from moesim.predictors.neighbours_kernels import settled

        settled(place_T, state.z_TQ, state.found_2TN[0], state.far_2TN[0], sketch.unit_UQ, sketch.near_UN)

    def _chosen(self, routed: RoutedLayer, rows: slice) -> NDArray[np.float32]:
        chosen_TE = np.zeros((rows.stop - rows.start, self.E), np.float32)
        np.put_along_axis(chosen_TE, routed.ids[rows].astype(np.int64), np.float32(1), axis=1)
        return chosen_TE


def _with_room(units: Units) -> Units:
    """Until there are units in them, nothing leads to these rows."""
    sketch = units.sketch
    if sketch:
        unit_UQ, near_UN = (np.pad(rows, ((0, ROOM), (0, 0))) for rows in (sketch.unit_UQ, sketch.near_UN))
        sketch = replace(sketch, unit_UQ=unit_UQ, near_UN=near_UN)
    return replace(units, sketch=sketch, residual_DUE=np.pad(units.residual_DUE, ((0, 0), (0, ROOM), (0, 0))))
