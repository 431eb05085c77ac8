"""Our own, for recordings with router inputs: an approximate draft of the layers in between, read by the frozen gates.

From what the last routed layer's router was given, its true routing and the vocabulary ids, one attention block over
the request's tokens stands for the attention of the next layer, and its frozen gate reads the result. For later layers
the forecast itself says which experts act in between, and a further block follows. Trained to give what the gates gave,
all of it and not only the choice. In chunks and in decode the tokens of the step are all that it attends to.

Source: the frozen gate and distillation are PROBE's (arXiv 2602.00509), a draft read by the target's gates is SP-MoE's
(arXiv 2510.10302), relative positions in buckets are T5's (arXiv 1910.10683); the rest is ours. Shape letters: N tokens
of a batch, B requests, S positions of the longest, L layers, E experts, K experts per token, D router input, W inner
width, A heads, R rank, H the last H layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moesim.predictors.base import RouterSpec, Seen, tokens_of
from moesim.predictors.learned.gate_mlp import AskedEarly, GateNet
from moesim.predictors.learned.learned import kept, matrix_flops
from moesim.predictors.learned.parts import Vocabulary
from moesim.predictors.learned.requests import Batch, tensor_of
from moesim.predictors.learned.training import Budget
from moesim.traces import Phase, TokenTable, request_lengths

BUCKETS, FARTHEST = 32, 128
SAMPLE = 16_384
"""Tokens from which scales are taken."""
SOFTNESS = 0.1
"""Of the experts that are taken to act in between, in scales of the logits; at 1 nearly all would act alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """Inner width and heads of the first block and of the later ones, rank of an expert's map, distances."""

    inner: int = 128
    heads: int = 8
    later_inner: int = 64
    later_heads: int = 8
    rank: int = 8
    ahead: int = 3


@lru_cache(maxsize=32)
def buckets(positions: int) -> torch.Tensor:
    """[S, S] the bucket of each key's distance from each query: half of them for either side, the near ones exact and
    the far ones in logarithmic steps."""
    at = torch.arange(positions)
    far = at[None] - at[:, None]
    half = BUCKETS // 2
    exact = half // 2
    size = far.abs()
    coarse = torch.log(size.clamp(min=1) / exact) / math.log(FARTHEST / exact) * (half - exact)
    near = torch.where(size < exact, size, (exact + coarse.long()).clamp(max=half - 1))
    return near + half * (far > 0)


class Block(nn.Module):
    """u + attention(rms(u)) over the tokens of each request; begins as u."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        inner = max(heads, min(inner, width) // heads * heads)
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(width))
        self.query_WD = nn.Parameter(torch.empty(inner, width))
        self.key_WD = nn.Parameter(torch.empty(inner, width))
        self.value_WD = nn.Parameter(torch.empty(inner, width))
        self.out_DW = nn.Parameter(torch.empty(width, inner))
        self.bucket_AX = nn.Parameter(torch.empty(heads, BUCKETS))

    def forward(self, u_ND: torch.Tensor, batch: Batch, mask_BSS: torch.Tensor) -> torch.Tensor:
        """[N, D]; `mask_BSS` is 0 where a query may attend to a key."""
        normal_BSD = batch.padded(functional.rms_norm(u_ND, u_ND.shape[1:], self.weight))
        B, S, _ = normal_BSD.shape
        rows = torch.cat([self.query_WD, self.key_WD, self.value_WD])
        q, k, v = (normal_BSD @ rows.T).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias_ASS = self.bucket_AX[:, buckets(S).to(u_ND.device)]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias_ASS[None] + mask_BSS[:, None])
        flat_NW = mixed.transpose(1, 2).reshape(B, S, -1)[batch.real_BS(u_ND.device)]
        return u_ND + flat_NW @ self.out_DW.T


class Source(nn.Module):
    """The forecasts from one last routed layer."""

    def __init__(
        self, source: int, sizes: dict[str, int], experts: int, ahead: int, settings: AttentionSettings
    ) -> None:
        super().__init__()
        width = sizes["router_input"]
        self.source, self.ahead = source, ahead
        self.rank = max(1, min(settings.rank, 512 // experts))
        self.in_DD = nn.Parameter(torch.empty(width, width))
        self.before_DD = nn.Parameter(torch.empty(width, width)) if source else None
        self.words = Vocabulary(sizes["vocabulary"], width) if sizes["vocabulary"] else None
        self.word_scale = nn.Embedding(sizes["vocabulary"] + 1, 1) if sizes["vocabulary"] else None
        self.scale_1D = nn.Parameter(torch.empty(1, width))
        self.expert_scale_1E = nn.Parameter(torch.empty(1, experts))
        self.routes_LDE = nn.Parameter(torch.empty(source + 1, width, experts))
        self.down_XD = nn.Parameter(torch.empty(experts * self.rank, width))
        self.up_DX = nn.Parameter(torch.empty(width, experts * self.rank))
        later = [Block(width, settings.later_inner, settings.later_heads) for _ in range(ahead - 1)]
        self.blocks = nn.ModuleList([Block(width, settings.inner, settings.heads), *later])
        self.soft_DE = nn.ParameterList([torch.empty(width, experts) for _ in range(ahead - 1)])
        self.out_HD = nn.Parameter(torch.empty(ahead, width))
        self.bias_HE = nn.Parameter(torch.empty(ahead, experts))

    def begin(self, scale_L: torch.Tensor) -> None:
        """A draft that changes nothing: what was given is handed on in the scale of the layer that reads it."""
        with torch.no_grad():
            nn.init.eye_(self.in_DD)
            zeros = [self.scale_1D, self.expert_scale_1E, self.up_DX, *self.soft_DE, *(b.out_DW for b in self.blocks)]
            for tensor in [*zeros, *([self.word_scale.weight] if self.word_scale else [])]:
                tensor.zero_()
            small = [self.routes_LDE, *([self.words.table.weight] if self.words else [])]
            for tensor in [*small, *([self.before_DD] if self.before_DD is not None else [])]:
                tensor.mul_(0.02 * math.sqrt(tensor.shape[-1]))
            self.out_HD.copy_(scale_L[self.source + 1 : self.source + 1 + self.ahead, None].expand_as(self.out_HD))

    def start(self, columns: dict[str, torch.Tensor], noise: torch.Generator | None) -> torch.Tensor:
        """[N, D] the draft before attention. `columns`: "x" [N, L', D] router inputs in unit scale and "chosen" [N, L',
        E] gate weights of the chosen experts, mean 1, of the routed layers; "words" [N] where there are any."""
        x_ND, chosen_NLE = columns["x"][:, self.source], columns["chosen"][:, : self.source + 1]
        scale_N1 = x_ND @ self.scale_1D.T + chosen_NLE[:, -1] @ self.expert_scale_1E.T
        u_ND = x_ND @ self.in_DD.T
        if self.before_DD is not None:
            u_ND = u_ND + columns["x"][:, self.source - 1] @ self.before_DD.T
        if self.words is not None and self.word_scale is not None:
            row_N = self.words.rows(columns["words"])
            scale_N1 = scale_N1 + self.word_scale.weight[row_N]
            u_ND = u_ND * scale_N1.exp() + self.words.vectors(columns["words"], noise)
        else:
            u_ND = u_ND * scale_N1.exp()
        u_ND = u_ND + torch.einsum("nle,lde->nd", chosen_NLE, self.routes_LDE)
        hidden_NER = functional.relu(x_ND @ self.down_XD.T).view(len(x_ND), -1, self.rank)
        return u_ND + (hidden_NER * chosen_NLE[:, -1, :, None]).flatten(1) @ self.up_DX.T


class AttentionNet(GateNet):
    """The frozen gates, the scales that everything is measured in, and a `Source` for every layer but the last."""

    input_scale_L: torch.Tensor
    logit_scale_L: torch.Tensor
    weight_scale_L: torch.Tensor

    def __init__(self, layers: int, experts: int, sizes: dict[str, int], settings: AttentionSettings) -> None:
        super().__init__(layers, experts, sizes["router_input"])
        for name in ("input_scale_L", "logit_scale_L", "weight_scale_L"):
            self.register_buffer(name, torch.empty(layers))
        reach = [min(settings.ahead, layers - 1 - source) for source in range(layers - 1)]
        self.sources = nn.ModuleList([Source(s, sizes, experts, n, settings) for s, n in enumerate(reach)])
        self.causal = bool(sizes["causal"])

    def mask(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """[B, S, S] 0 where a query may attend to a key: of its request, and not later where the stack is causal."""
        real_BS = batch.real_BS(device)
        seen_BSS = real_BS[:, None, :].expand(-1, real_BS.shape[1], -1)
        if self.causal:
            seen_BSS = seen_BSS & torch.ones_like(seen_BSS[0]).tril()
        # A padded query attends to itself: a row that attends to nothing is not a number.
        seen_BSS = seen_BSS | torch.eye(real_BS.shape[1], dtype=torch.bool, device=device)
        return torch.zeros(seen_BSS.shape, device=device).masked_fill(~seen_BSS, -1e9)

    def given(
        self, ids_NLK: torch.Tensor, weights_NLK: torch.Tensor | None, x_NLD: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What sources read, of the first layers, as many as there are."""
        layers, E = ids_NLK.shape[1], self.gate_LED.shape[1]
        ones_NLK = torch.ones(ids_NLK.shape, device=ids_NLK.device) if weights_NLK is None else weights_NLK.float()
        chosen_NLE = torch.zeros((*ids_NLK.shape[:2], E), device=ids_NLK.device)
        chosen_NLE.scatter_(2, ids_NLK.long(), ones_NLK / self.weight_scale_L[:layers, None])
        return {"x": x_NLD.float() / self.input_scale_L[:layers, None], "chosen": chosen_NLE}

    def drafts(
        self, source: int, columns: dict[str, torch.Tensor], batch: Batch, mask_BSS: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(router input [N, D], logits [N, E]) of the layers source + 1, source + 2, .., each made when it is asked."""
        own = self.sources[source]
        assert isinstance(own, Source), "the list holds nothing else"
        u_ND = own.start(columns, batch.noise)
        logits_NE = torch.empty(0)
        for step, block in enumerate(own.blocks):
            target = source + 1 + step
            if step:
                soft_NE = (logits_NE / (SOFTNESS * self.logit_scale_L[target - 1])).softmax(dim=1)
                u_ND = u_ND + soft_NE @ own.soft_DE[step - 1].T
            u_ND = block(u_ND, batch, mask_BSS)
            x_ND = functional.rms_norm(u_ND, u_ND.shape[1:]) * own.out_HD[step]
            logits_NE = x_ND @ self.gate_LED[target].T + self.gate_bias_LE[target] + own.bias_HE[step]
            yield x_ND, logits_NE


class GateAttention(AskedEarly[AttentionSettings]):
    """See the module. View v looks v + 1 layers ahead; farther than `ahead` the frequency answers."""

    name = "gate-attention"
    version = 2
    defaults = AttentionSettings()
    budget = Budget(layer_tokens=5_000_000, learning_rate=3e-3, batch_tokens=1024)

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
        for source in net.sources:
            assert isinstance(source, Source), "the list holds nothing else"
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

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """From the last routed layer on; nothing before a layer has routed. Drafts go as far as they were asked."""
        view, source = layer - len(seen.routed), len(seen.routed) - 1
        if queued or source < 0 or not 0 <= view < self.view_count:
            return None
        known, drafts = kept(seen, (f"{self.name} {source}", False), lambda: ([], self._begun(seen, source)))
        while len(known) <= view:
            known.append(next(drafts)[1])
        return known[view], view

    def flops(self) -> float:
        """A start, a block and a gate; attention's own products over 128 tokens."""
        net = self._net()
        if not len(net.sources):
            return 0.0
        own = net.sources[0]
        assert isinstance(own, Source), "the list holds nothing else"
        parts = (own.in_DD, own.down_XD, own.up_DX, own.routes_LDE, own.blocks[0])
        return matrix_flops(*parts) + super().flops() + 4.0 * 128 * self.settings.inner

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

    def _begun(self, seen: Seen, source: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        net, tokens = self._net(), tokens_of(seen, False)
        x_NLD = torch.stack([self._inputs(one).to(self.device) for one in seen.routed], dim=1)
        ids_NLK = torch.from_numpy(np.stack([one.ids for one in seen.routed], axis=1).astype(np.int64))
        weights = [one.weights for one in seen.routed if one.weights is not None]
        weights_NLK = torch.from_numpy(np.stack(weights, axis=1)) if len(weights) == len(seen.routed) else None
        given = net.given(ids_NLK.to(self.device), None if weights_NLK is None else weights_NLK.to(self.device), x_NLD)
        if self.sizes["vocabulary"]:
            assert tokens.token_id is not None, "it was fitted with vocabulary ids"
            given["words"] = tensor_of(tokens.token_id).to(self.device)
        batch = Batch(columns=given, lengths=request_lengths(tokens.request).tolist())
        return net.drafts(source, given, batch, net.mask(batch, self.device))
