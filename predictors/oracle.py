"""The oracle: shown the true routing, so that there is something to measure the others against."""

from __future__ import annotations

import numpy as np

from moesim.predictors.base import Cost, Forecast, Ids, Need, RouterSpec, Seen
from moesim.traces import LoadTable, TokenTable


class Oracle:
    """Repeats the truth that the driver revealed. The only predictor that knows the future; its name says so."""

    name = "oracle"
    needs: tuple[Need, ...] = ()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Learns nothing; remembers E."""
        self.num_experts = router.num_experts

    def reveal(self, current_TLK: Ids, queued_TLK: Ids | None) -> None:
        """Take the true routing of this step and of the next one, [T, L, K]."""
        self._current, self._queued = current_TLK, queued_TLK

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """The true load and ids. Raises ValueError where the next step was not revealed."""
        truth = self._queued if queued else self._current
        if truth is None:
            raise ValueError("the next step was not revealed to the oracle")
        ids = truth[:, layer]
        certain_TE = np.zeros((len(ids), self.num_experts), np.float32)
        np.put_along_axis(certain_TE, ids.astype(np.int64), 1.0, axis=1)
        load = np.bincount(ids.ravel(), minlength=self.num_experts).astype(np.float64)
        return Forecast(load=load, topk=ids, inclusion_UE=certain_TE)

    def cost(self) -> Cost:
        """Nothing: no machine can have it."""
        return Cost()
