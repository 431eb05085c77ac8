"""What the host reads of a layer's routing: one message from the device, once a layer; and what a predictor sees of it.

Shape letters: N tokens, D lookahead distances, M lookahead width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.switch import Routed
from moesim.predictors import RoutedLayer
from moesim.traces import TokenTable, id_dtype

HALF_MAX = float(torch.finfo(torch.float16).max)
LOOKAHEAD_WIDTH = 4
"""As recordings have it (traces/routers.py)."""
DROPPED = 1 << 16
"""Added to an expert's number where the token is over its capacity, so that one int32 tells both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the host has read of a layer's routing."""

    ids_N: NDArray[np.int32]
    dropped_N: NDArray[np.bool_]
    weight_N: NDArray[np.float16] | None

    @classmethod
    def of(cls, message_X: NDArray[np.int32], tokens: int | None, *, weighed: bool) -> Told:
        """What a message of `coded` says of the first `tokens` of its tokens; of the gate weights where they are asked
        for."""
        told_N, prob_N = message_X.reshape(2, -1)[:, :tokens]
        weight_N = prob_N.view(np.float32).astype(np.float16) if weighed else None
        return cls(ids_N=told_N % DROPPED, dropped_N=told_N >= DROPPED, weight_N=weight_N)


def coded(routed: Routed) -> torch.Tensor:
    """[2N] int32 what the host has to know: of each token its expert, and DROPPED more where that is over capacity;
    then the bits of each token's gate weight in float32."""
    code_N = (routed.ids_N + routed.dropped_N * DROPPED).int()
    return torch.cat([code_N, routed.prob_N.float().view(torch.int32)])


class Seer:
    """What a predictor sees of a layer that has routed, as a recording would hold it. Not worked out is what it does
    not need. `recorded`: of a step whose routing is replayed; what later gates say of the random numbers that a
    random model computes with is worked out all the same, as it takes its time, and what was recorded is shown."""

    def __init__(self, routers: list[Any], needs: Sequence[str]) -> None:
        self._routers, self._needs = routers, needs
        self._gates: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, layer: int, routed: Routed, told: Told, recorded: TokenTable | None) -> RoutedLayer:
        """Layer `layer`, its first tokens being those that `told` speaks of."""
        kind = id_dtype(int(self._routers[layer].num_experts))
        given: NDArray[np.float16] | None = None
        ahead: NDArray[np.integer] | None = None
        tokens = len(told.ids_N)
        if "router_input" in self._needs:
            given = routed.x_ND[:tokens].float().clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy()
        if "lookahead" in self._needs:
            ahead = np.asarray(self._ahead(layer, routed.x_ND[:tokens]).cpu().numpy().astype(kind))
            if recorded is not None and recorded.lookahead_ids is not None:
                ahead = recorded.lookahead_ids[:, layer]
        return RoutedLayer(
            ids=np.asarray(told.ids_N.astype(kind)[:, None]),
            weights=None if told.weight_N is None else told.weight_N[:, None],
            lookahead=ahead,
            router_input=given,
        )

    def _ahead(self, layer: int, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, D, M] what the gates of all later layers say of this layer's router input; zero past the last."""
        later, experts = len(self._routers) - layer - 1, int(self._routers[layer].num_experts)
        width = min(LOOKAHEAD_WIDTH, experts)
        told = torch.zeros(len(x_ND), max(len(self._routers) - 1, 1), width, dtype=torch.long, device=x_ND.device)
        if later:
            weight, bias = self._later(layer)
            scores = torch.nn.functional.linear(x_ND.to(weight.dtype), weight, bias)
            told[:, :later] = scores.view(len(x_ND), later, experts).topk(width, dim=-1).indices
        return told

    def _later(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gates of all later layers as one, made once."""
        if layer not in self._gates:
            gates = [router.classifier.to(router.dtype) for router in self._routers[layer + 1 :]]
            bias = None if gates[0].bias is None else torch.cat([gate.bias for gate in gates])
            self._gates[layer] = (torch.cat([gate.weight for gate in gates]), bias)
        return self._gates[layer]
