"""Our own: a net of radial units over what a token, the one before it and its request so far have routed.

Each unit is a fitted token and says how near to it another token is: exp(-distance) over all layers that have routed,
the last one weighing most. The readout, from the units to what is chosen in the next layers, is a ridge regression in
closed form: nothing descends, and the seed matters only where there are more fitted tokens than units. Gate weights of
the first layers are nearly a token's fingerprint; tokens that have routed alike go on alike, which no linear map says.

Source: kernel ridge regression (Saunders, Gammerman and Vovk, ICML 1998), which is a radial basis function network
(Broomhead and Lowe, Complex Systems 2, 1988) with a unit at every fitted token; what is read of a layer is `ridge`'s.
Shape letters: U units, T tokens of a step, S source layers (all but the last), L layers, E experts, K experts per
token, D distances, X numbers that are read of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moesim.predictors.base import Cost, Floats, Need, RouterSpec, Seen
from moesim.predictors.context import Context, Memory
from moesim.predictors.described import described_width
from moesim.predictors.learned.learned import Learned, _digest, kept
from moesim.predictors.learned.requests import Batch, Requests
from moesim.predictors.learned.routing_net_inputs import Reader
from moesim.predictors.learned.routing_net_solving import Solving, held_out
from moesim.predictors.learned.routing_net_units import RoutingNet, log_odds
from moesim.predictors.learned.training import Budget
from moesim.traces import InputError, TokenTable

MOST_NUMBERS = 250_000_000
"""Read of all units; they are kept in half precision."""
FEWEST = 64
"""Units; with less room it is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """Units at most (solving takes some 12 bytes times their square, and time with their cube), and distances."""

    units: int = 12_288
    ahead: int = 3


@dataclass(slots=True)
class State:
    """Of a running step."""

    reader: Reader
    far_TU: torch.Tensor | None = None
    near_TU: torch.Tensor | None = None


class RoutingPredictor(Learned[RoutingNet, RoutingSettings]):
    """See the module. View v looks v + 1 layers ahead of the last routed one. Adapting only in that it remembers the
    requests that go on: what they routed in earlier steps."""

    name = "routing-net"
    needs: tuple[Need, ...] = ("tokens",)
    budget = Budget(layer_tokens=0)
    defaults = RoutingSettings()

    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """Units, and whether there are gate weights. Raises InputError where there is room for too few."""
        weighted, L, E = table.topk_weights is not None, table.num_layers, router.num_experts
        width = 2 * described_width(E, weighted=weighted) + E
        units = min(self.settings.units, len(table), MOST_NUMBERS // (max(L - 1, 1) * width))
        if units < min(FEWEST, len(table)):
            raise InputError(f"predictor {self.name!r}: {L} layers of {E} experts are too many for it")
        return {"units": units, "weighted": int(weighted)}

    def built(self) -> RoutingNet:
        """See RoutingNet."""
        self._memory: Memory = {}
        return RoutingNet(self.shape, self.sizes["units"], bool(self.sizes["weighted"]), self.settings.ahead)

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """All there is to fit: units are whole requests in random order, as many as there is room for."""
        number_T = np.unique(table.request, return_inverse=True)[1]
        order_R = np.random.default_rng(self.training.seed).permutation(number_T.max() + 1)
        rows_U = np.lexsort((table.position, order_R[number_T]))[: self.sizes["units"]]
        units = table.take(rows_U)
        self.net.take(units)
        chosen_ULE = np.zeros((len(units), self.shape.layers, self.shape.experts), np.float32)
        np.put_along_axis(chosen_ULE, units.topk_ids.astype(np.int64), 1.0, axis=2)
        chosen = torch.from_numpy(chosen_ULE).to(self.training.where())
        facts = {**self._facts(), "seed": self.training.seed, "sizes": self.sizes, "data": _digest(table)}
        solving = Solving(self.net, chosen, held_out(units.request), self.training, facts)
        solving.run()
        self._sharpness_VL = solving.sharpness_DL

    @property
    def view_count(self) -> int:
        """Distances."""
        return min(self.settings.ahead, self.shape.layers - 1)

    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """None: nothing is learned in batches; so with the next."""
        return {}

    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """None."""
        return iter(())

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """Of the layers within reach of the last routed one; nothing before a layer has routed."""
        routed = len(seen.routed)
        if queued or routed == 0 or not 0 <= layer - routed < self.view_count:
            return None
        state, net = self._state(seen), self.net
        for source in range(len(state.reader.described), routed):
            x_TX = torch.from_numpy(state.reader.read(seen.routed[source])).to(self.device)
            state.far_TU = net.farther(state.far_TU, source, x_TX)
            state.near_TU = net.near(state.far_TU, source)
        assert state.near_TU is not None, "a layer was read"
        p_TE = state.near_TU @ net.readout_SDUE[routed - 1, layer - routed].float() + net.usual_LE[layer]
        return log_odds(p_TE), layer - routed

    def observe(self, seen: Seen) -> None:
        """Remember the ends of the step's requests."""
        reader = self._state(seen).reader
        for routed in seen.routed[len(reader.described) : self.shape.layers - 1]:
            reader.read(routed)
        if self.shape.layers > 1 and len(seen.tokens):
            reader.remember()

    def flops(self) -> float:
        """A distance to each unit, and its readout."""
        read = 2 * self.net.own + self.shape.experts
        return 2.0 * self.sizes["units"] * (read + self.shape.experts)

    def cost(self) -> Cost:
        """The readout, and what the units have routed; buffers all of them."""
        return Cost(flops=self.flops(), parameters=sum(buffer.numel() for buffer in self.net.buffers()))

    def _state(self, seen: Seen) -> State:
        def begun() -> State:
            return State(Reader(Context(seen.tokens, self.shape.experts, self._memory), self.net.describe))

        state: State = kept(seen, (self.name, False), begun)
        return state

    def _calibrated(self, data: Requests) -> Floats:
        """Found while solving."""
        return self._sharpness_VL
