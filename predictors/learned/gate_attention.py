"""Our own, for recordings with router inputs: an approximate draft of the layers in between, read by the frozen gates.

From what the last routed layer's router was given, its true routing and the vocabulary ids, one attention block over
the request's tokens stands for the attention of the next layer, and its frozen gate reads the result. For later layers
the forecast itself says which experts act in between, and a further block follows. Trained to give what the gates gave,
all of it and not only the choice. In chunks and in decode the tokens of the step are all that it attends to.

Source: the frozen gate and distillation are PROBE's (arXiv 2602.00509), a draft read by the target's gates is SP-MoE's
(arXiv 2510.10302), relative positions in buckets are T5's (arXiv 1910.10683); the rest is ours. Shape letters: N tokens
of a batch, T of a step, L layers, E experts, K experts per token, D router input.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from moesim.predictors.base import Forecast, RouterSpec, Seen, from_probabilities, tokens_of
from moesim.predictors.halves import ENOUGH
from moesim.predictors.learned.gate_attention_drafts import Draft, ReadySource, Step
from moesim.predictors.learned.gate_attention_net import AttentionNet, AttentionSettings
from moesim.predictors.learned.gate_mlp import AskedEarly
from moesim.predictors.learned.learned import kept, matrix_flops
from moesim.predictors.learned.requests import Batch, tensor_of
from moesim.predictors.learned.training import Budget
from moesim.traces import LoadTable, Phase, TokenTable, request_lengths

SAMPLE = 16_384
"""Tokens from which scales are taken."""


class GateAttention(AskedEarly[AttentionSettings]):
    """See the module. View v looks v + 1 layers ahead; farther than `ahead` the frequency answers."""

    name = "gate-attention"
    version = 4
    defaults = AttentionSettings()
    budget = Budget(layer_tokens=11_250_000, learning_rate=3e-3, batch_tokens=1024)

    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """And the vocabulary, where there is one, and whether tokens see later ones (encoders)."""
        words = 0 if table.token_id is None else len(np.unique(table.token_id))
        causal = int(not (table.phase == Phase.ENCODER).all())
        return {**super().sizes_of(table, router), "vocabulary": words, "causal": causal}

    def built(self) -> AttentionNet:
        """See AttentionNet."""
        return AttentionNet(self.shape.layers, self.shape.experts, self.sizes, self.settings)

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """Gates, scales, vocabulary; drafts that hand on what was given."""
        super().begin(table, router)
        net = self._net()
        some = table.take(slice(None, None, -(-len(table) // SAMPLE)))
        assert some.router_input is not None, "it needs them"
        x_NLD = tensor_of(some.router_input).float()
        logits_NLE = torch.einsum("nld,led->nle", x_NLD, net.gate_LED) + net.gate_bias_LE
        net.input_scale_L.copy_(x_NLD.std(dim=(0, 2)).clamp(min=1e-6))
        net.logit_scale_L.copy_((logits_NLE - logits_NLE.mean(dim=2, keepdim=True)).std(dim=(0, 2)).clamp(min=1e-6))
        weights = some.topk_weights
        net.weight_scale_L.copy_(
            torch.ones(self.shape.layers)
            if weights is None
            else tensor_of(weights).float().mean(dim=(0, 2)).clamp(min=1e-6)
        )
        for number in range(len(net.sources)):
            source = net.source(number)
            source.begin(net.input_scale_L)
            if source.words is not None and table.token_id is not None:
                source.words.learn(table.token_id)

    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """Router inputs and, where there are any, gate weights and vocabulary ids."""
        found = super().columns(table)
        if table.topk_weights is not None:
            found["weights"] = tensor_of(table.topk_weights)
        if table.token_id is not None:
            found["words"] = tensor_of(table.token_id)
        return found

    @property
    def view_count(self) -> int:
        """Distances that it can speak of."""
        return min(self.settings.ahead, self.shape.layers - 1)

    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The logits of all drafts by distance."""
        drafts = self._drafts(batch)
        for view in range(self.view_count):
            yield torch.stack([of_source[view][1] for of_source in drafts if view < len(of_source)], dim=1)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross entropy to what the gates said of the true router inputs, and the squared error of these inputs."""
        net, x_NLD = self._net(), batch.columns["router_input"].float()
        losses = []
        for source, of_source in enumerate(self._drafts(batch)):
            for step, (x_ND, logits_NE) in enumerate(of_source):
                target = source + 1 + step
                true_NE = x_NLD[:, target] @ net.gate_LED[target].T + net.gate_bias_LE[target]
                scale = net.logit_scale_L[target]
                losses.append(functional.cross_entropy(logits_NE / scale, (true_NE / scale).softmax(dim=1)))
                losses.append(((x_ND - x_NLD[:, target]) / net.input_scale_L[target]).square().mean())
        return torch.stack(losses).sum() / max(self.shape.layers - 1, 1)

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """As the others."""
        super().fit(table, router)
        self._make_ready()

    def load(self, path: Path, router: RouterSpec, layers: int) -> None:
        """As the others."""
        super().load(path, router, layers)
        self._make_ready()

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """As the others, without torch."""
        tokens_of(seen, queued)
        said = None if queued else self._draft(seen, layer)
        if said is None:
            return self._prior.forecast(seen, layer, queued=queued)
        if self.shape.top_k > 1:
            return from_probabilities(said.p_TE.astype(np.float64), self.shape.top_k)
        return Forecast(load=said.load_PE.sum(axis=0), topk=said.likeliest_T1, inclusion_UE=said.p_TE)

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """From the last routed layer on; nothing before a layer has routed. Drafts go as far as they were asked."""
        said = None if queued else self._draft(seen, layer)
        return None if said is None else (torch.from_numpy(said.logits_TE), layer - len(seen.routed))

    def flops(self) -> float:
        """A start with the maps of the chosen experts, a block and a gate; attention's own products over 128 tokens."""
        net, settings = self._net(), self.settings
        if not len(net.sources):
            return 0.0
        own = net.source(0)
        chosen = self.shape.top_k / self.shape.experts
        maps = chosen * matrix_flops(own.down_XD, own.up_DX, own.routes_LDE)
        return maps + matrix_flops(own.blocks[0]) + super().flops() + 2.0 * 128 * (settings.keys + settings.inner)

    def _net(self) -> AttentionNet:
        assert isinstance(self.net, AttentionNet), "built above"
        return self.net

    def _drafts(self, batch: Batch) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """By source and distance."""
        net, columns = self._net(), batch.columns
        given = net.given(columns["ids"], columns.get("weights"), columns["router_input"])
        given |= {name: column for name, column in columns.items() if name == "words"}
        mask_BSS = net.mask(batch, self.device)
        return [list(net.drafts(source, given, batch, mask_BSS)) for source in range(self.shape.layers - 1)]

    def _draft(self, seen: Seen, layer: int) -> Draft | None:
        view, source = layer - len(seen.routed), len(seen.routed) - 1
        if source < 0 or not 0 <= view < self.view_count:
            return None
        known: list[Draft]
        known, drafts = kept(seen, (f"{self.name} {source}", False), lambda: ([], self._begun(seen, source)))
        while len(known) <= view:
            known.append(next(drafts))
        return known[view]

    def _begun(self, seen: Seen, source: int) -> Iterator[Draft]:
        step: Step = kept(seen, (self.name, False), lambda: self._step(seen))
        for layer in range(len(step.bits_LTD), len(seen.routed)):
            routed = seen.routed[layer]
            step.add(routed.ids, routed.weights, self._weight_L[layer], self._given(routed))
        return self._ready[source].drafts(step)

    def _step(self, seen: Seen) -> Step:
        tokens, id_T = seen.tokens, np.zeros(len(seen.tokens), np.int32)
        if self.sizes["vocabulary"]:
            assert tokens.token_id is not None, "it was fitted with vocabulary ids"
            id_T = tokens.token_id
        return Step.of(request_lengths(tokens.request), id_T, self.shape.layers, self.shape.top_k)

    def _make_ready(self) -> None:
        """Lay out what was fitted; and ask it once, so that no forecast of a step waits for the compiler, for a second
        thread or for memory."""
        net = self._net()
        self._ready = [
            ReadySource(net, net.source(number), self.sharpness_VL.diagonal(number + 1))
            for number in range(len(net.sources))
        ]
        self._weight_L = net.weight_scale_L.tolist()
        lengths, T = np.full(8, ENOUGH // 4), 2 * ENOUGH
        step = Step.of(lengths, np.zeros(T, np.int32), self.shape.layers, self.shape.top_k)
        ids_TK = np.broadcast_to(np.arange(T)[:, None] % self.shape.experts, (T, self.shape.top_k))
        for source in self._ready:
            step.add(ids_TK, None, 1.0, np.zeros((T, self.sizes["router_input"]), np.float16))
            for _ in source.drafts(step):
                pass
