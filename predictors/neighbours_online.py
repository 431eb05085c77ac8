"""`neighbours` that goes on learning: tokens of finished steps become units.

What documents of one kind, or the rest of a long one, will choose is told best by what was chosen in them of late. A
step's tokens join the units of every layer, the oldest of those that joined make room; maps stay as they were fitted.

Source: our own; inserting into a graph of neighbours is Malkov and Yashunin's (TPAMI 42(4), 2020). Shape letters: T
tokens, U units, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import Cost, RoutedLayer, RouterSpec, Seen
from moesim.predictors.context import Context
from moesim.predictors.neighbours import UNWEIGHED, Neighbours
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
        self._cost = super().cost()
        self._fitted = self.units[0].residual_DUE.shape[1] if self.units else 0
        self._joined = 0
        self.units = [_with_room(units) for units in self.units]

    def cost(self) -> Cost:
        """As the other: room is not learned."""
        return self._cost

    def observe(self, seen: Seen) -> None:
        """As the other; and the step's tokens, the last ones of very many, become units."""
        from moesim.predictors.neighbours_kernels import settled

        T = len(seen.tokens)
        part = self._part(slice(max(T - ROOM, 0), T))
        place_T = self._fitted + (self._joined + np.arange(T - part.rows.start)) % ROOM
        self._joined += len(place_T)
        context, described = Context(seen.tokens, self.E, self._memory), []
        for source, routed in enumerate(seen.routed[: self.L - 1] if T else []):
            described.append(self._describe(routed, context.spare))
            self._follow(part, described)
            units = self.units[source]
            if source in self.orders:
                self.orders[source] = self.orders[source].joined(place_T, routed.ids[part.rows])
            if units.sketch:
                graph = units.sketch.unit_UQ, units.sketch.near_UN
                settled(place_T, part.z_TQ, part.found_2TN[0], part.far_2TN[0], *graph)
            beside = self._beside(context, described)
            for at, residual_UE in enumerate(units.residual_DUE):
                error_TE = self._chosen(seen.routed[source + 1 + at], part.rows)
                error_TE -= self._scores(part, described, beside, at, UNWEIGHED, near=False)
                residual_UE[place_T] = kept(error_TE, units.read_DEE[at])
        super().observe(seen)

    def _chosen(self, routed: RoutedLayer, rows: slice) -> NDArray[np.float32]:
        chosen_TE = np.zeros((rows.stop - rows.start, self.E), np.float32)
        np.put_along_axis(chosen_TE, routed.ids[rows].astype(np.int64), np.float32(1), axis=1)
        return chosen_TE


def _with_room(units: Units) -> Units:
    """Until there are units in them, nothing leads to these rows."""
    sketch = units.sketch
    if sketch:
        near_UN = np.pad(sketch.near_UN, ((0, ROOM), (0, 0))).astype(np.int32, copy=False)
        unit_UQ = np.pad(sketch.unit_UQ, ((0, ROOM), (0, 0))).astype(np.int8, copy=False)
        sketch = replace(sketch, unit_UQ=unit_UQ, near_UN=near_UN)
    residual_DUE = np.pad(units.residual_DUE, ((0, 0), (0, ROOM), (0, 0))).astype(np.int8, copy=False)
    return replace(units, sketch=sketch, residual_DUE=residual_DUE)
