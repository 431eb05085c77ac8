"""The net of `gate-attention` as it is trained: frozen gates, and drafts of later layers from all layers but the last.

The draft is laid out so that gate_attention_drafts.py can make it in a few products of narrow matrices: the residual
stream is scaled, not multiplied, and of the experts' maps only those of the chosen ones are needed. Source of the
relative positions in buckets: T5 (arXiv 1910.10683). Shape letters: N tokens of a batch, B requests, S positions of the
longest, L layers, E experts, K experts per token, D router input, W values, Y queries or keys, A heads, X what they
read, R rank, H the last H layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional

from moesim.predictors.learned.gate_mlp import GateNet
from moesim.predictors.learned.parts import Vocabulary
from moesim.predictors.learned.requests import Batch

BUCKETS, FARTHEST = 32, 128
SOFTNESS = 0.1
"""Of the experts that are taken to act in between, in scales of the logits; at 1 nearly all would act alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """Width of all values, of all queries and keys, and heads, of the first block and of the later ones; rank of an
    expert's map, distances."""

    inner: int = 32
    keys: int = 16
    heads: int = 4
    later_inner: int = 64
    later_keys: int = 48
    later_heads: int = 4
    rank: int = 16
    ahead: int = 3


@lru_cache(maxsize=32)
def buckets(positions: int) -> torch.Tensor:
    """[2 S - 1] the bucket of the distances -(S - 1) .. S - 1 of a key from its query: half of them for either side,
    the near ones exact and the far ones in logarithmic steps."""
    far = torch.arange(1 - positions, positions)
    half = BUCKETS // 2
    exact = half // 2
    size = far.abs()
    coarse = torch.log(size.clamp(min=1) / exact) / math.log(FARTHEST / exact) * (half - exact)
    near = torch.where(size < exact, size, (exact + coarse.long()).clamp(max=half - 1))
    return near + half * (far > 0)


class Block(nn.Module):
    """u + attention(rms(u)) over the tokens of each request; begins as u. A `latent` one reads queries and keys from
    the values, few numbers where u has many, as MLA (arXiv 2405.04434) reads keys and values from a short vector."""

    def __init__(self, width: int, inner: int, keys: int, heads: int, *, latent: bool) -> None:
        super().__init__()
        inner, keys = (max(heads, min(size, width) // heads * heads) for size in (inner, keys))
        self.heads, self.latent = heads, latent
        read = inner if latent else width
        self.weight = nn.Parameter(torch.empty(width))
        self.value_WD = nn.Parameter(torch.empty(inner, width))
        self.query_YX = nn.Parameter(torch.empty(keys, read))
        self.key_YX = nn.Parameter(torch.empty(keys, read))
        self.out_DW = nn.Parameter(torch.empty(width, inner))
        self.bucket_AX = nn.Parameter(torch.empty(heads, BUCKETS))

    def forward(self, u_ND: torch.Tensor, batch: Batch, mask_BSS: torch.Tensor) -> torch.Tensor:
        """[N, D]; `mask_BSS` is 0 where a query may attend to a key."""
        normal_BSD = batch.padded(functional.rms_norm(u_ND, u_ND.shape[1:], self.weight))
        B, S, _ = normal_BSD.shape
        value_BSW = normal_BSD @ self.value_WD.T
        read_BSX = value_BSW if self.latent else normal_BSD
        told = (read_BSX @ self.query_YX.T, read_BSX @ self.key_YX.T, value_BSW)
        q, k, v = (part.view(B, S, self.heads, -1).transpose(1, 2) for part in told)
        far_SS = torch.arange(S) - torch.arange(S)[:, None] + S - 1
        bias_ASS = self.bucket_AX[:, buckets(S)[far_SS].to(u_ND.device)]
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
        self.own_1D = nn.Parameter(torch.empty(1, width))
        self.before_1D = nn.Parameter(torch.empty(1, width)) if source else None
        self.words = Vocabulary(sizes["vocabulary"], width) if sizes["vocabulary"] else None
        self.word_scale = nn.Embedding(sizes["vocabulary"] + 1, 1) if sizes["vocabulary"] else None
        self.scale_1D = nn.Parameter(torch.empty(1, width))
        self.expert_scale_1E = nn.Parameter(torch.empty(1, experts))
        self.routes_LDE = nn.Parameter(torch.empty(source + 1, width, experts))
        self.down_XD = nn.Parameter(torch.empty(experts * self.rank, width))
        self.up_DX = nn.Parameter(torch.empty(width, experts * self.rank))
        nearest = Block(width, settings.inner, settings.keys, settings.heads, latent=True)
        sizes_of_later = (width, settings.later_inner, settings.later_keys, settings.later_heads)
        self.blocks = nn.ModuleList([nearest, *(Block(*sizes_of_later, latent=False) for _ in range(ahead - 1))])
        self.soft_DE = nn.ParameterList([torch.empty(width, experts) for _ in range(ahead - 1)])
        self.out_HD = nn.Parameter(torch.empty(ahead, width))
        self.bias_HE = nn.Parameter(torch.empty(ahead, experts))

    def begin(self, scale_L: torch.Tensor) -> None:
        """A draft that changes nothing: what was given is handed on in the scale of the layer that reads it."""
        with torch.no_grad():
            self.own_1D.fill_(1.0)
            zeros = [self.scale_1D, self.expert_scale_1E, self.up_DX, *self.soft_DE, *(b.out_DW for b in self.blocks)]
            zeros += [self.word_scale.weight] if self.word_scale else []
            for tensor in [*zeros, *([self.before_1D] if self.before_1D is not None else [])]:
                tensor.zero_()
            for tensor in [self.routes_LDE, *([self.words.table.weight] if self.words else [])]:
                tensor.mul_(0.02 * math.sqrt(tensor.shape[-1]))
            self.out_HD.copy_(scale_L[self.source + 1 : self.source + 1 + self.ahead, None].expand_as(self.out_HD))

    def start(self, columns: dict[str, torch.Tensor], noise: torch.Generator | None) -> torch.Tensor:
        """[N, D] the draft before attention. `columns`: "x" [N, L', D] router inputs in unit scale and "chosen" [N, L',
        E] gate weights of the chosen experts, mean 1, of the routed layers; "words" [N] where there are any."""
        x_ND, chosen_NLE = columns["x"][:, self.source], columns["chosen"][:, : self.source + 1]
        scale_N1 = x_ND @ self.scale_1D.T + chosen_NLE[:, -1] @ self.expert_scale_1E.T
        u_ND = x_ND * self.own_1D
        if self.before_1D is not None:
            u_ND = u_ND + columns["x"][:, self.source - 1] * self.before_1D
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

    def source(self, number: int) -> Source:
        """That of the last routed layer `number`."""
        own = self.sources[number]
        assert isinstance(own, Source), "the list holds nothing else"
        return own

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
        own = self.source(source)
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
