"""A small transformer over the path of one token: its vocabulary id, then the experts of layer after layer.

Source: ExpertFlow's routing path predictor (arXiv 2410.17954) and MoE-Beyond (arXiv 2508.17137). Deviations:
ExpertFlow's T5 and MoE-Beyond's encoder run over the tokens of a sequence; here each token is a sequence of its own and
its layers are the positions, so that a forecast gets better with every layer that routes; later layers come from one
shared map with the distance as an input; MoE-Beyond's binary cross entropy per expert is a cross entropy here.
Shape letters: T tokens of a step, N tokens, L layers, E experts, K experts per token, H the last H layers, P positions,
D distances, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moesim.predictors.base import Need, RouterSpec, Seen, tokens_of
from moesim.predictors.learned.learned import Learned, cross_entropy, kept, matrix_flops
from moesim.predictors.learned.parts import Heads, Routes, Vocabulary
from moesim.predictors.learned.requests import Batch, tensor_of
from moesim.predictors.learned.training import Budget
from moesim.traces import StepTokens, TokenTable, vocabulary_ids

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each block, [N, heads, P, W / heads], of the positions so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSettings:
    """Width, attention heads and blocks."""

    width: int = 64
    heads: int = 4
    blocks: int = 2


class Block(nn.Module):
    """Causal attention, then a feed-forward part twice as wide, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm_wide = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def run(
        self, x_NPW: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """[N, P, W], and all keys and values. After `before` there may be one position only."""
        N, P, W = x_NPW.shape
        parts = self.inputs(self.norm(x_NPW)).view(N, P, 3, self.heads, W // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if before is not None:
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=before is None)
        x_NPW = x_NPW + self.output(mixed.transpose(1, 2).reshape(N, P, W))
        return x_NPW + self.narrow(functional.gelu(self.wide(self.norm_wide(x_NPW)))), (key, value)


class PathNet(nn.Module):
    """Embeddings, blocks, and heads that are told how far ahead they look."""

    def __init__(self, tokens: int, layers: int, experts: int, settings: PathSettings) -> None:
        super().__init__()
        width = settings.width
        self.vocabulary = Vocabulary(tokens, width)
        self.routes = Routes(layers, experts, width)
        self.position_LW = nn.Parameter(torch.empty(layers, width))
        self.blocks = nn.ModuleList([Block(width, settings.heads) for _ in range(settings.blocks)])
        self.distance_DW = nn.Parameter(torch.empty(layers, width))
        self.turn = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.heads = Heads(layers, experts, width)

    def states(self, x_NPW: torch.Tensor, first: int, cache: Cache) -> torch.Tensor:
        """[N, P, W] of the positions from `first` on; `cache` holds those before, and these afterwards."""
        x_NPW = x_NPW + self.position_LW[first : first + x_NPW.shape[1]]
        before: list[tuple[torch.Tensor, torch.Tensor] | None] = [*cache] if cache else [None] * len(self.blocks)
        cache.clear()
        for block, past in zip(self.blocks, before, strict=True):
            assert isinstance(block, Block)
            x_NPW, now = block.run(x_NPW, past)
            cache.append(now)
        return x_NPW

    def towards(self, state: torch.Tensor, distance: int) -> torch.Tensor:
        """[..., W] what the heads of the layer `distance` after the next one read."""
        turned = functional.gelu(self.turn(state) + self.distance_DW[distance])
        out: torch.Tensor = self.norm(state + turned)
        return out


class PathTransformer(Learned[PathNet, PathSettings]):
    """Next layers from a token's path so far, see the module. View v looks v + 1 layers past the last routed one."""

    name = "path-transformer"
    needs: tuple[Need, ...] = ("tokens",)
    budget = Budget(layer_tokens=5_000_000)
    defaults = PathSettings()

    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """Different ids; 0 where the recording does not say which tokens were routed."""
        return {"vocabulary": 0 if table.token_id is None else len(np.unique(vocabulary_ids(table)))}

    def built(self) -> PathNet:
        """See PathNet."""
        return PathNet(self.sizes["vocabulary"], self.shape.layers, self.shape.experts, self.settings)

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """The vocabulary."""
        if self.sizes["vocabulary"]:
            self.net.vocabulary.learn(vocabulary_ids(table))

    @property
    def view_count(self) -> int:
        """Every distance."""
        return self.shape.layers

    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """Vocabulary ids, where there are any."""
        return {"token": self._ids(table)}

    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """One pass over the true paths, then a head for each distance."""
        state_NLW = self._states(batch)
        for distance in range(self.shape.layers):
            yield self._logits(state_NLW, distance)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the next layer, and in training of one other distance, drawn for this step."""
        state_NLW, ids_NLK = self._states(batch), batch.columns["ids"]
        loss = cross_entropy(self._logits(state_NLW, 0), ids_NLK)
        if batch.noise is None or self.shape.layers == 1:
            return loss
        distance = int(torch.randint(1, self.shape.layers, (), generator=batch.noise))
        return (loss + cross_entropy(self._logits(state_NLW, distance), ids_NLK)) / 2

    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """From the state at the last routed layer; keys, values and states of the path are kept in the memo. Nothing
        before a layer has routed where there is no vocabulary."""
        routed = 0 if queued else len(seen.routed)
        if layer < routed or (routed == 0 and not self.sizes["vocabulary"]):
            return None
        cache, states = kept(seen, (self.name, queued), lambda: ([], []))
        for position in range(len(states), routed + 1):
            x_TW = self._step(tokens_of(seen, queued), seen, position)
            states.append(self.net.states(x_TW[:, None], position, cache)[:, 0])
        towards_TW = self.net.towards(states[routed], layer - routed)
        return self.net.heads.one(layer, towards_TW), layer - routed

    def flops(self) -> float:
        """One position through the blocks, a turn and a head; not the attention's scores, which grow with the layer."""
        return matrix_flops(self.net.blocks, self.net.turn, self.net.heads.weight_LEW[0])

    def _states(self, batch: Batch) -> torch.Tensor:
        """[N, L, W] after 0 .. L-1 routed layers."""
        net, ids_NLK = self.net, batch.columns["ids"]
        first_NW = net.vocabulary.vectors(batch.columns["token"], batch.noise)
        return net.states(torch.cat([first_NW[:, None], net.routes.paths(ids_NLK[:, :-1])], dim=1), 0, [])

    def _logits(self, state_NLW: torch.Tensor, distance: int) -> torch.Tensor:
        towards_NHW = self.net.towards(state_NLW[:, : self.shape.layers - distance], distance)
        return self.net.heads.logits(towards_NHW)

    def _step(self, tokens: StepTokens, seen: Seen, position: int) -> torch.Tensor:
        """[T, W] the input at one position of a running step."""
        if position == 0:
            return self.net.vocabulary.vectors(self._ids(tokens).to(self.device))
        ids_TK = torch.from_numpy(seen.routed[position - 1].ids.astype(np.int64)).to(self.device)
        return self.net.routes.chosen(position - 1, ids_TK)

    def _ids(self, tokens: TokenTable | StepTokens) -> torch.Tensor:
        """[T] vocabulary ids; where none were fitted, or there are none, all the same unknown one."""
        if tokens.token_id is None or not self.sizes["vocabulary"]:
            return torch.full((len(tokens),), -1, dtype=torch.int32)
        return tensor_of(tokens.token_id)
