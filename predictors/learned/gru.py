"""A gated recurrent unit over the layers of one token: what it has routed so far says what it routes next.

Source: Diff-MoE (SC'25), which forecasts the next layer. Further layers are beyond the paper: the state is rolled
forward on the expected embedding of what is forecast, and training does the same. Deviation: widths and optimiser are
ours.
Shape letters: T tokens of a step, N tokens, L layers, E experts, K experts per token, H the last H layers, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moesim.predictors.base import Need, RouterSpec, Seen
from moesim.predictors.learned.learned import Learned, kept, matrix_flops
from moesim.predictors.learned.parts import Heads, Routes
from moesim.predictors.learned.requests import Batch
from moesim.predictors.learned.training import Budget
from moesim.traces import TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class GruSettings:
    """Width, and how many layers ahead training looks."""

    width: int = 64
    ahead: int = 3


class GruNet(nn.Module):
    """Expert embeddings and heads of each layer around one cell that all layers share."""

    def __init__(self, layers: int, experts: int, width: int) -> None:
        super().__init__()
        self.start_W = nn.Parameter(torch.empty(width))
        self.routes = Routes(layers, experts, width)
        self.cell = nn.GRUCell(width, width)
        self.heads = Heads(layers, experts, width)

    def next(self, state_NW: torch.Tensor, route_NW: torch.Tensor) -> torch.Tensor:
        """[N, W] the state after one more layer has routed, as `route_NW` says."""
        after_NW: torch.Tensor = self.cell(route_NW, state_NW)
        return after_NW

    def rolled(self, state_NHW: torch.Tensor, logits_NHE: torch.Tensor) -> torch.Tensor:
        """[N, H-1, W] the states after the last H layers, less the very last, where they route as forecast."""
        input_NHW = self.routes.expected(logits_NHE.softmax(dim=-1))[:, :-1]
        state_NHW = state_NHW[:, :-1]
        after_XW: torch.Tensor = self.cell(input_NHW.flatten(0, 1), state_NHW.flatten(0, 1))
        return after_XW.view_as(state_NHW)

    def start(self, tokens: int) -> torch.Tensor:
        """[N, W] the state before any layer has routed."""
        return self.start_W.expand(tokens, -1)


class Gru(Learned[GruNet, GruSettings]):
    """Next layers from the layers so far, see the module. View v looks v + 1 layers ahead of the last routed one."""

    name = "gru"
    needs: tuple[Need, ...] = ("tokens",)
    budget = Budget(layer_tokens=5_000_000, learning_rate=5e-3)
    defaults = GruSettings()

    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """None beside E, K and L."""
        return {}

    def built(self) -> GruNet:
        """See GruNet."""
        return GruNet(self.shape.layers, self.shape.experts, self.settings.width)

    @property
    def view_count(self) -> int:
        """Every distance."""
        return self.shape.layers - 1

    @property
    def trained_views(self) -> int:
        """As far as the settings say."""
        return self.settings.ahead

    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """Ids are all that is read."""
        return {}

    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The next layer after each true prefix, then ever later ones on forecast layers in between."""
        states = [self.net.start(len(batch))]
        for route_NW in self.net.routes.paths(batch.columns["ids"][:, :-1]).unbind(1):
            states.append(self.net.next(states[-1], route_NW))
        state_NHW = torch.stack(states, dim=1)[:, 1:]
        while state_NHW.shape[1]:
            logits_NHE = self.net.heads.logits(state_NHW)
            yield logits_NHE
            state_NHW = self.net.rolled(state_NHW, logits_NHE)

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """From the state after the routed layers, which is kept in the memo; nothing before a layer has routed."""
        routed = len(seen.routed)
        if queued or routed == 0 or layer < routed:
            return None
        states: list[torch.Tensor] = kept(seen, (self.name, queued), lambda: [self.net.start(len(seen.tokens))])
        for source in range(len(states) - 1, routed):
            ids_TK = torch.from_numpy(seen.routed[source].ids.astype(np.int64)).to(self.device)
            states.append(self.net.next(states[-1], self.net.routes.chosen(source, ids_TK)))
        return self._ahead(states[routed], routed, layer), layer - routed

    def flops(self) -> float:
        """A turn of the cell and a head."""
        return matrix_flops(self.net.cell, self.net.heads.weight_LEW[0])

    def _ahead(self, state_TW: torch.Tensor, routed: int, layer: int) -> torch.Tensor:
        """[T, E] logits of `layer`, rolled over the layers between."""
        for between in range(routed, layer):
            p_TE = self.net.heads.one(between, state_TW).softmax(dim=-1)
            state_TW = self.net.next(state_TW, p_TE @ self.net.routes.table_LEW[between])
        return self.net.heads.one(layer, state_TW)
