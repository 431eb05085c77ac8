"""What the routing net reads of a token: what it has routed, what the token before it has, and its request so far.

Nothing here is learned. Tokens behind a token are never read. Shape letters: T tokens, E experts, F numbers that
describe a routed layer, X = 2 F + E numbers that are read of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import RoutedLayer
from moesim.predictors.context import Context
from moesim.predictors.described import Described, Describer

BEFORE, SO_FAR = 0.2, 3.0
"""Weight in squared distances of the token before, and of the request so far, beside the token itself."""


@dataclass(slots=True)
class Reader:
    """Takes layer after layer of a step."""

    context: Context
    describe: Describer
    described: list[Described] = field(default_factory=list)
    """Of the layers that were read."""

    def read(self, routed: RoutedLayer) -> NDArray[np.float16]:
        """[T, X] of the next layer."""
        one, source = self.describe(routed, self.context.spare), len(self.described)
        self.described.append(one)
        before_TF = self.describe.dense(self.context.before(one, source))
        share_TE = np.empty((len(one.row_T), self.describe.experts), np.float32)
        self.context.shares(one.ids, source, share_TE)
        parts = [self.describe.dense(one), BEFORE**0.5 * before_TF, SO_FAR**0.5 * share_TE]
        return np.concatenate(parts, axis=1).astype(np.float16)

    def remember(self) -> None:
        """Put the ends of the requests into the memory, once all source layers were read."""
        self.context.remember(self.described)
