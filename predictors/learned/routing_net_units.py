"""The routing net itself: fitted tokens as units, how far a token is from each, and the readout.

Shape letters: U units, T tokens of a step, S source layers (all but the last), L layers, E experts, K experts per
token, D distances, X numbers that are read of a layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from moesim.predictors.base import RoutedLayer
from moesim.predictors.context import Context
from moesim.predictors.described import Describer, described_width
from moesim.predictors.learned.learned import Shape
from moesim.predictors.learned.requests import tensor_of
from moesim.predictors.learned.routing_net_inputs import Reader
from moesim.traces import StepTokens, TokenTable

NARROWNESS = 0.8
"""Factor on squared distances over their scale, the variance of what the layers say of a token itself."""
DECAY = 0.81
"""Weight in squared distances of a layer beside the one after it."""
LEAST = 4e-3
"""Forecast probabilities are kept this far from never and always."""


class RoutingNet(nn.Module):
    """Units and readout. Nothing of it changes once it is fitted, and it is large: copies of a predictor share it."""

    ids_USK: torch.Tensor
    weights_USK: torch.Tensor | None
    request_U: torch.Tensor
    position_U: torch.Tensor
    scale_S: torch.Tensor
    readout_SDUE: torch.Tensor
    usual_LE: torch.Tensor

    def __init__(self, shape: Shape, units: int, weighted: bool, ahead: int) -> None:
        super().__init__()
        S, E, K = max(shape.layers - 1, 0), shape.experts, shape.top_k
        self.describe = Describer(predictor="routing-net", experts=E, top_k=K, weighted=weighted)
        self.own = described_width(E, weighted=weighted)
        self.register_buffer("ids_USK", torch.empty(units, S, K, dtype=torch.int32))
        weights_USK = torch.empty(units, S, K, dtype=torch.float16) if weighted else None
        self.register_buffer("weights_USK", weights_USK)
        self.register_buffer("request_U", torch.empty(units, dtype=torch.int32))
        self.register_buffer("position_U", torch.empty(units, dtype=torch.int32))
        self.register_buffer("scale_S", torch.empty(S))
        self.register_buffer("readout_SDUE", torch.empty(S, ahead, units, E, dtype=torch.float16))
        self.register_buffer("usual_LE", torch.empty(shape.layers, E))
        self._unit_SUX: list[torch.Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingNet:
        return self

    def take(self, table: TokenTable) -> None:
        """The rows of `table` as units."""
        self.ids_USK.copy_(torch.from_numpy(table.topk_ids[:, :-1].astype(np.int32)))
        if self.weights_USK is not None and table.topk_weights is not None:
            self.weights_USK.copy_(tensor_of(table.topk_weights[:, :-1]))
        self.request_U.copy_(tensor_of(table.request))
        self.position_U.copy_(tensor_of(table.position))

    def unit_UX(self, source: int, device: torch.device) -> torch.Tensor:
        """[U, X] what is read of a layer of the units, worked out of all layers when it is first asked for."""
        if not self._unit_SUX:
            tokens = StepTokens(request=self.request_U.cpu().numpy(), position=self.position_U.cpu().numpy())
            reader = Reader(Context(tokens, self.describe.experts, {}), self.describe)
            ids_USK, weights_USK = self.ids_USK.cpu(), None if self.weights_USK is None else self.weights_USK.cpu()
            for s, ids_UK in enumerate(ids_USK.unbind(1)):
                weights_UK = None if weights_USK is None else weights_USK[:, s].numpy()
                read_UX = reader.read(RoutedLayer(ids=ids_UK.numpy(), weights=weights_UK))
                self._unit_SUX.append(torch.from_numpy(read_UX).to(device))
        return self._unit_SUX[source]

    def farther(self, far_TU: torch.Tensor | None, source: int, x_TX: torch.Tensor) -> torch.Tensor:
        """[T, U] squared distances after one more layer; `far_TU`, those before it, is lost."""
        unit_UX = self.unit_UX(source, x_TX.device).float()
        own_TU = torch.addmm(unit_UX.square().sum(dim=1), x_TX.float(), unit_UX.T, alpha=-2)
        own_TU += x_TX.float().square().sum(dim=1, keepdim=True)
        return own_TU if far_TU is None else far_TU.mul_(DECAY).add_(own_TU)

    def near(self, far_TU: torch.Tensor, source: int) -> torch.Tensor:
        """[T, U] 1 at a unit, less the farther from it."""
        return (far_TU * (-NARROWNESS / self.scale_S[source])).clamp_(max=0).exp_()


def log_odds(p_TE: torch.Tensor) -> torch.Tensor:
    """[T, E] of forecasts that may lie outside 0 and 1 a little."""
    return torch.logit(p_TE, eps=LEAST)
