"""The model's own gates, asked early: a later layer's frozen gate on what the last routed layer's router was given.

`gate` is the frozen gate alone, `gate-mlp` adds a trained correction of its input, `gate-mlp-online` goes on training
while it is used. Source: PROBE (arXiv 2602.00509), whose lookahead predictor is a frozen copy of the target layer's
router and a trainable residual MLP, distilled online. Deviations: the target is what the router chose, not its softmax;
the MLP's width and activation (GELU) are ours; the online one starts from the fitted one.
Shape letters: T tokens of a step, N tokens, L layers, E experts, H the last H layers, D router input, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from moesim.predictors.base import WITHOUT, Need, RoutedLayer, RouterSpec, Seen
from moesim.predictors.learned.learned import Learned, Settings, matrix_flops
from moesim.predictors.learned.requests import Batch, tensor_of
from moesim.predictors.learned.training import CLIP, Budget
from moesim.traces import InputError, LoadTable, TokenTable

ONLINE_TOKENS = 1024
"""Tokens of a step that the online predictor learns from; of more, evenly spaced ones."""
ONLINE_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateMlpSettings:
    """Hidden width, and for how many distances there are MLPs; farther ones ask the frozen gate."""

    width: int = 64
    ahead: int = 2

    updates: int = 2
    """Steps of the optimiser for each step that is observed, online only."""


class GateNet(nn.Module):
    """Frozen gates."""

    gate_LED: torch.Tensor
    gate_bias_LE: torch.Tensor

    def __init__(self, layers: int, experts: int, width: int) -> None:
        super().__init__()
        self.register_buffer("gate_LED", torch.empty(layers, experts, width))
        self.register_buffer("gate_bias_LE", torch.empty(layers, experts))

    def corrected(self, x_NHD: torch.Tensor, view: int, first: int = 0) -> torch.Tensor:
        """[N, H, D] what the gates `view` + 1 layers after the sources `first`, `first` + 1, .. are given: as it is."""
        return x_NHD

    def logits(self, x_NHD: torch.Tensor, view: int, first: int = 0) -> torch.Tensor:
        """[N, H, E] of the layers `view` + 1 after the sources `first`, `first` + 1, .., whose inputs are `x_NHD`."""
        targets = slice(first + view + 1, first + view + 1 + x_NHD.shape[1])
        corrected_NHD = self.corrected(x_NHD, view, first)
        return torch.einsum("nhd,hed->nhe", corrected_NHD, self.gate_LED[targets]) + self.gate_bias_LE[targets]


class GateMlpNet(GateNet):
    """Frozen gates whose input is corrected, x + up(gelu(down(x))), by an MLP for each source and distance."""

    def __init__(self, layers: int, experts: int, width: int, settings: GateMlpSettings) -> None:
        super().__init__(layers, experts, width)
        sources = [layers - 1 - view for view in range(min(settings.ahead, layers - 1))]
        self.down_HWD = nn.ParameterList([torch.empty(n, settings.width, width) for n in sources])
        self.bias_HW = nn.ParameterList([torch.empty(n, settings.width) for n in sources])
        self.up_HDW = nn.ParameterList([torch.empty(n, width, settings.width) for n in sources])

    def corrected(self, x_NHD: torch.Tensor, view: int, first: int = 0) -> torch.Tensor:
        """[N, H, D], by the MLPs of these sources and this distance, where there are any."""
        if view >= len(self.up_HDW):
            return x_NHD
        some = slice(first, first + x_NHD.shape[1])
        hidden_NHW = torch.einsum("nhd,hwd->nhw", x_NHD, self.down_HWD[view][some]) + self.bias_HW[view][some]
        return x_NHD + torch.einsum("nhw,hdw->nhd", functional.gelu(hidden_NHW), self.up_HDW[view][some])


class AskedEarly(Learned[GateNet, Settings]):
    """What the three share. View v looks v + 1 layers ahead of the last routed one, whose input there must be."""

    needs: tuple[Need, ...] = ("tokens", "router_input", "gates")

    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """The routers' width. Raises InputError where gates and recording are not of one model."""
        assert router.gates is not None and table.router_input is not None, "what it needs is there"
        width = table.router_input.shape[2]
        wanted, found = (table.num_layers, router.num_experts, width), router.gates.weight.shape
        if found != wanted:
            raise InputError(
                f"predictor {self.name!r}: the gates have shape {list(found)}, and the recording, as [layers, experts, "
                f"router input], {list(wanted)}"
            )
        return {"router_input": width}

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """The gates."""
        assert router.gates is not None, "sizes_of has seen them"
        self.net.gate_LED.copy_(tensor_of(router.gates.weight))
        self.net.gate_bias_LE.copy_(tensor_of(router.gates.bias))

    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """Router inputs, as they are stored."""
        assert table.router_input is not None, "it needs them"
        return {"router_input": tensor_of(table.router_input)}

    @property
    def view_count(self) -> int:
        """Every distance."""
        return self.shape.layers - 1

    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Gates 1, 2, .. layers after the inputs."""
        x_NLD = batch.columns["router_input"].float()
        for view in range(self.view_count):
            yield self.net.logits(x_NLD[:, : self.view_count - view], view)

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """From the last routed layer's input; nothing before a layer has routed. Nothing is worth keeping."""
        view = layer - len(seen.routed)
        if queued or not seen.routed or view < 0:
            return None
        x_TD = self._inputs(seen.routed[-1]).to(self.device).float()
        return self.net.logits(x_TD[:, None], view, first=len(seen.routed) - 1)[:, 0], view

    def flops(self) -> float:
        """A gate, and for the next layer an MLP."""
        return matrix_flops(self.net.gate_LED[0])

    def _given(self, routed: RoutedLayer) -> NDArray[np.float16]:
        """[T, D]. Raises InputError where the executor does not say what the router was given."""
        if routed.router_input is None:
            raise InputError(f"predictor {self.name!r} {WITHOUT['router_input']}")
        return routed.router_input

    def _inputs(self, routed: RoutedLayer) -> torch.Tensor:
        return tensor_of(self._given(routed))


class Gate(AskedEarly[GateSettings]):
    """The frozen gate with a fitted temperature: where PROBE starts from, and what Fate does without training."""

    name = "gate"
    budget = Budget(layer_tokens=0)
    defaults = GateSettings()

    def built(self) -> GateNet:
        """Nothing to train."""
        return GateNet(self.shape.layers, self.shape.experts, self.sizes["router_input"])


class GateMlp(AskedEarly[GateMlpSettings]):
    """The frozen gate on a corrected input, see the module. It begins as the frozen gate."""

    name = "gate-mlp"
    defaults = GateMlpSettings()

    @property
    def budget(self) -> Budget:
        """Less for wide inputs, which cost more, and smaller steps, because more of them add up."""
        narrow = min(1.0, 128 / self.sizes["router_input"]) ** 0.5
        return Budget(layer_tokens=int(6_000_000 * narrow), learning_rate=6e-3 * narrow, batch_tokens=512)

    @property
    def trained_views(self) -> int:
        """Those with an MLP."""
        return self.settings.ahead

    def built(self) -> GateMlpNet:
        """See GateMlpNet."""
        return GateMlpNet(self.shape.layers, self.shape.experts, self.sizes["router_input"], self.settings)

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """The gates, and corrections of 0."""
        super().begin(table, router)
        assert isinstance(self.net, GateMlpNet), "built above"
        for up_HDW in self.net.up_HDW:
            nn.init.zeros_(up_HDW)

    def flops(self) -> float:
        """A gate and an MLP."""
        assert isinstance(self.net, GateMlpNet), "built above"
        mlp = [part[0][0] for part in (self.net.down_HWD, self.net.up_HDW) if len(part)]
        return super().flops() + matrix_flops(*mlp)


class GateMlpOnline(GateMlp):
    """`gate-mlp` that learns from every finished step; a copy that two runs share goes on where the first one ended."""

    name = "gate-mlp-online"

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """As `gate-mlp`; what was observed before is forgotten."""
        super().fit(table, router)
        self._start()

    def load(self, path: Path, router: RouterSpec, layers: int) -> None:
        """As the others; the optimiser starts anew."""
        super().load(path, router, layers)
        self._start()

    def observe(self, seen: Seen) -> None:
        """A few steps on what the routers of this step were given and chose. The temperatures stay."""
        tokens = len(seen.tokens)
        if self._optimiser is None or not tokens:
            return
        rows = slice(None, None, -(-tokens // ONLINE_TOKENS))
        columns = {
            "ids": torch.from_numpy(np.stack([r.ids[rows] for r in seen.routed], axis=1).astype(np.int64)),
            "router_input": torch.stack([self._inputs(r)[rows] for r in seen.routed], dim=1),
        }
        columns = {name: column.to(self.device) for name, column in columns.items()}
        batch = Batch(columns=columns, lengths=[len(columns["ids"])])
        for _ in range(self.settings.updates):
            self._optimiser.zero_grad()
            torch.autograd.backward(self.loss(batch))
            nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
            self._optimiser.step()

    def _start(self) -> None:
        trained = list(self.net.parameters())
        self._optimiser = torch.optim.AdamW(trained, lr=ONLINE_RATE, weight_decay=0.0) if trained else None
