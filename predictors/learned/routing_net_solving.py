"""Solving the routing net: one kernel ridge regression for each layer that may be the last routed one.

Shape letters: U units, H of them held out, S source layers, D distances, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.predictors.base import Floats
from moesim.predictors.learned.files import Facts, damaged, matching, read, write
from moesim.predictors.learned.learned import fitted_sharpness
from moesim.predictors.learned.routing_net_units import DECAY, RoutingNet, log_odds
from moesim.predictors.learned.training import Training

PENALTY = 0.1
HELD_OUT, MOST_HELD_OUT = 0.1, 2048
"""Units whose forecast by the others the sharpness is fitted on: their share, and how many suffice."""
FORMAT = "moesim-solving"


def held_out(request_U: NDArray[np.int32]) -> int:
    """H, the last units: whole requests, unless there is but one."""
    U = len(request_U)
    least = U - max(1, min(int(HELD_OUT * U), MOST_HELD_OUT))
    starts = np.flatnonzero(np.diff(request_U)) + 1
    return U - int(next((start for start in starts if start >= least), least))


@dataclass(slots=True)
class Solving:
    """Source after source. A checkpoint holds those that are done, and solving goes on from there."""

    net: RoutingNet
    chosen_ULE: torch.Tensor
    """1 where an expert was chosen; on the device to solve on."""
    held: int
    training: Training
    facts: Facts
    sharpness_DL: Floats = field(init=False)
    done: int = 0
    _kept_at: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Solve what is not done. Interrupted, it leaves the checkpoint."""
        S, D = self.net.readout_SDUE.shape[:2]
        self.sharpness_DL = np.ones((min(D, S), S + 1))
        self.net.usual_LE.copy_(self.chosen_ULE.mean(dim=0))
        self._resume()
        far_UU = None
        try:
            for source in range(S):
                far_UU = self._farther(far_UU, source)
                if source >= self.done:
                    self._solve(far_UU, source)
                if self.training.progress:
                    self.training.progress(source + 1, S, 0.0)
        finally:
            self._keep()

    def _farther(self, far_UU: torch.Tensor | None, source: int) -> torch.Tensor:
        unit_UX = self.net.unit_UX(source, self.chosen_ULE.device)
        own = unit_UX[:, : self.net.own].float().var(dim=0, correction=0).sum().cpu()
        before = self.net.scale_S[source - 1] if source else 0.0
        self.net.scale_S[source] = (DECAY * before + own).clamp(min=1e-6)
        return self.net.farther(far_UU, source, unit_UX)

    def _solve(self, far_UU: torch.Tensor, source: int) -> None:
        """The readout of all units; what those held out would be told by the others follows from the same factor.

        With K + penalty = F F' and weights w, the errors of the last H units, each forecast without them, are
        ((K + penalty)^-1 of these units)^-1 w, and that block of the inverse is (F F')^-1 of the last H rows alone.
        """
        net, targets = self.net, slice(source + 1, source + 1 + len(self.sharpness_DL))
        true_UAE = self.chosen_ULE[:, targets]
        near_UU = net.near(far_UU, source)
        near_UU.diagonal().add_(PENALTY)
        factor_UU = torch.linalg.cholesky(near_UU, out=near_UU)  # in place: it is large
        weight_UY = torch.cholesky_solve((true_UAE - true_UAE.mean(dim=0)).flatten(1), factor_UU)
        weight_UAE = weight_UY.view(true_UAE.shape)
        net.readout_SDUE[source, : true_UAE.shape[1]] = weight_UAE.transpose(0, 1)
        last_HH = factor_UU[-self.held :, -self.held :]
        error_HAE = (last_HH @ (last_HH.T @ weight_UY[-self.held :])).view(-1, *true_UAE.shape[1:])
        true_HAE = true_UAE[-self.held :]
        ids_HAK = true_HAE.topk(net.ids_USK.shape[2], dim=2).indices
        sharpness_A = fitted_sharpness(log_odds(true_HAE - error_HAE), ids_HAK).cpu().numpy()
        for distance, sharpness in enumerate(sharpness_A):
            self.sharpness_DL[distance, source + 1 + distance] = sharpness
        self.done = source + 1
        if time.monotonic() - self._kept_at > self.training.checkpoint_s:
            self._keep()

    def _keep(self) -> None:
        """Write the checkpoint, where one is wanted."""
        self._kept_at = time.monotonic()
        if self.training.checkpoint:
            write(self.training.checkpoint, self._tensors(), {**self.facts, "format": FORMAT, "done": self.done})

    def _resume(self) -> None:
        """Take what is done from the checkpoint, where there is one. Raises InputError: damaged, or of another
        solving."""
        path = self.training.checkpoint
        if path is None or not path.exists():
            return
        tensors, facts = read(path, {**self.facts, "format": FORMAT})
        matching(path, tensors, self._tensors())
        done = facts.get("done")
        if type(done) is not int or not 0 <= done <= len(self.net.readout_SDUE):
            raise damaged(path, "its state is not one")
        self.done = done
        self.net.readout_SDUE.copy_(tensors["readout_SDUE"])
        self.sharpness_DL = tensors["sharpness_DL"].numpy()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"readout_SDUE": self.net.readout_SDUE, "sharpness_DL": torch.from_numpy(self.sharpness_DL)}
