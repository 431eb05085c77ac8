"""The frozen gates of a recorded model: what predictors that look ahead through the model's own routers read.

Shape letters: L MoE layers of a stack, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """The routers' linear maps; a router ranks experts by weight @ input + bias."""

    weight: NDArray[np.float32]
    """[L, E, d_model]."""
    bias: NDArray[np.float32]
    """[L, E], zero where a router has none."""

    def __post_init__(self) -> None:
        if self.weight.ndim != 3 or self.bias.shape != self.weight.shape[:2]:
            raise TraceError(
                f"gates must have shapes [L, E, d_model] and [L, E], got {list(self.weight.shape)} and "
                f"{list(self.bias.shape)}"
            )
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise TraceError("a gate's weight is not a finite number")
