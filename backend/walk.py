"""Forward passes of one stack of a Switch model that stop at every MoE layer: what is there to compute, and by whom, is
asked of the caller.

Written over the library's own modules (projections, norms, dense layers, routers), with static tensors, so that what
lies between two MoE layers can be a CUDA graph (segments.py). Tokens are asked for in the order of a scenario's
step. With recorded routing the router runs all the same and its choice is replaced. Shape letters: B rows of a
batch, S positions, M = B S places, N = M tokens asked for (the real ones first), T recorded tokens, D = d_model, H
heads, C width of a head, K decoder positions, L MoE layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.attention import ALIGNMENT, aligned
from moesim.backend.blocks import DistanceBias, additive, attended, by_head, in_range
from moesim.backend.grouped import Groups, group_pairs
from moesim.backend.routing import SwitchRouting
from moesim.backend.segments import Cut, Segments
from moesim.backend.switch import Routed, sparse_layers
from moesim.backend.told import DROPPED, coded
from moesim.traces import InputError, TokenTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known when an MoE layer has routed."""

    routed: Routed
    code_2N: torch.Tensor
    """For the host, see `coded`."""
    groups: Groups
    """Of the tokens that are not dropped."""


class Choices:
    """Who is asked which experts a token takes: the routers, or a recording."""

    def __init__(self, stack: Any, recorded: TokenTable | None) -> None:
        self._routers = [layer.mlp.router for layer in sparse_layers(stack).values()]
        self._light = [SwitchRouting(router) for router in self._routers]
        self.experts = int(self._routers[0].num_experts)
        self._code_TL: torch.Tensor | None = None
        if recorded is not None:
            self._code_TL = self._codes(recorded).to(stack.embed_tokens.weight.device)

    def _codes(self, recorded: TokenTable) -> torch.Tensor:
        ids_TL = recorded.topk_ids[:, :, 0].astype(np.int64)
        if recorded.topk_ids.shape[2] > 1 or ids_TL.shape[1] != len(self._routers) or ids_TL.max() >= self.experts:
            raise InputError(
                f"the recorded routing has {ids_TL.shape[1]} layers, {recorded.topk_ids.shape[2]} experts a token and "
                f"expert {ids_TL.max()}; the model has {len(self._routers)} layers of {self.experts}, one a token"
            )
        return torch.from_numpy(ids_TL + recorded.dropped * DROPPED)

    def __call__(self, number: int, x_BSD: torch.Tensor, at: Walk) -> Known:
        """What MoE layer `number` does with the tokens."""
        chosen_BS, dropped_BS, prob_BS = self._asked(number, x_BSD)
        index_N = at.index_N
        ids_N, dropped_N, prob_N = (
            each.reshape(-1).index_select(0, index_N) for each in (chosen_BS, dropped_BS, prob_BS)
        )
        if self._code_TL is not None:
            code_N = self._code_TL[:, number].index_select(0, at.recorded_N)
            ids_N, dropped_N = code_N % DROPPED, code_N >= DROPPED
        dropped_N = dropped_N | ~at.real_N
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1]).index_select(0, index_N)
        routed = Routed(x_ND=x_ND, ids_N=ids_N, dropped_N=dropped_N, prob_N=prob_N)
        groups = group_pairs(ids_N.masked_fill(dropped_N, self.experts), self.experts)
        return Known(routed=routed, code_2N=coded(routed), groups=groups)

    def _asked(self, number: int, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S] each: the chosen expert, also over capacity; whether it is over; its probability."""
        if x_BSD.shape[1] <= self._routers[number].expert_capacity:
            ids_BS, prob_BS = self._light[number](x_BSD)
            return ids_BS.long(), torch.zeros_like(ids_BS, dtype=torch.bool), prob_BS
        mask_BSE, prob_BS1, logits_BSE = self._routers[number](x_BSD)
        ids_BS = torch.softmax(logits_BSE, dim=-1).to(x_BSD.dtype).argmax(dim=-1)
        return ids_BS, mask_BSE.sum(dim=-1) == 0, prob_BS1[..., 0]


class Walk(ABC):
    """What both passes share. `put` what a pass is about; after it `hidden_ND` are the last hidden states of its
    tokens, in their order. All inputs lie in one static tensor, so that they come in one copy: `pack` makes it."""

    def __init__(self, stack: Any, choices: Choices, rows: int, length: int) -> None:
        self._stack, self._choices = stack, choices
        weight = stack.embed_tokens.weight
        places, device = rows * length, weight.device
        self._places = places
        self._given = torch.zeros(5 * places + 1, dtype=torch.int64, device=device)
        parts = torch.split(self._given, [*[places] * 5, 1])
        ids, self.index_N, self.recorded_N, self._more, mask, self._tokens_1 = parts
        self.ids_BS, self.mask_BS = ids.view(rows, length), mask.view(rows, length)
        self._number_N = torch.arange(places, device=device)
        self.hidden_ND = weight.new_zeros((places, weight.shape[1]))
        self._segments: Segments[Known] | None = None
        self.put(self.pack(np.arange(places), np.zeros(places), np.zeros(places)))

    def pack(
        self,
        index_T: NDArray[np.integer],
        recorded_T: NDArray[Any],
        id_T: NDArray[Any] | None,
        position_T: NDArray[Any] | None = None,
    ) -> torch.Tensor:
        """What a pass is about, on the device: of every token its place in the batch, its row in the recording, its
        vocabulary id, and (decode) its position."""
        ids_M, more_M, mask_M, recorded_M = np.zeros((4, self._places), np.int64)
        mask_M[index_T] = 1
        if id_T is not None:
            ids_M[index_T] = id_T
        if position_T is not None:
            more_M[index_T] = position_T
        recorded_M[: len(index_T)] = recorded_T
        rest = np.flatnonzero(mask_M == 0)
        parts = (ids_M, np.concatenate([index_T, rest]), recorded_M, more_M, mask_M, [len(index_T)])
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self._given.device)

    def put(self, packed: torch.Tensor) -> None:
        """The next pass is about this."""
        self._given.copy_(packed)

    @property
    def real_N(self) -> torch.Tensor:
        """[N] the first ones are tokens of the step, the rest fills the batch."""
        return torch.lt(self._number_N, self._tokens_1)

    def graph(self) -> None:
        """Capture the pass, where there is CUDA."""
        self._segments = Segments(self._run, self.hidden_ND)

    @torch.inference_mode()
    def __call__(self, between: Cut[Known]) -> None:
        """One pass; `between` computes the experts of each MoE layer: [N, D], zero where a token is dropped."""
        (self._run if self._segments is None else self._segments)(between)

    def close(self) -> None:
        """Give the graphs' memory back."""
        if self._segments is not None:
            self._segments.close()

    @abstractmethod
    def _run(self, cut: Cut[Known]) -> None:
        """The pass itself; `cut` is called at every MoE layer."""

    def _feed_forward(self, number: int, layer: Any, hidden_BSD: torch.Tensor, cut: Cut[Known]) -> torch.Tensor:
        """A block's last part; MoE layer `number` of the stack, where it is one."""
        if not layer.is_sparse:
            dense: torch.Tensor = layer(hidden_BSD)
            return dense
        known = self._choices(number, layer.layer_norm(hidden_BSD), self)
        out_ND = cut(number, known)
        out_MD = torch.empty_like(out_ND).index_copy_(0, self.index_N, out_ND)
        return hidden_BSD + out_MD.view(hidden_BSD.shape)

    def _leave(self, hidden_BSD: torch.Tensor) -> None:
        hidden_MD = self._stack.final_layer_norm(hidden_BSD).flatten(0, 1)
        self.hidden_ND.copy_(hidden_MD.index_select(0, self.index_N))


class EncoderWalk(Walk):
    """The encoder on [B, S] ids; `padded` where some sequences are shorter."""

    def __init__(self, stack: Any, choices: Choices, rows: int, length: int, *, padded: bool) -> None:
        super().__init__(stack, choices, rows, length)
        first = stack.block[0].layer[0].SelfAttention
        with torch.inference_mode():
            self._bias_1HSS = aligned(first.compute_bias(length, length, device=self.ids_BS.device))
        self._padded = padded

    def _run(self, cut: Cut[Known]) -> None:
        hidden_BSD, bias = self._stack.embed_tokens(self.ids_BS), self._bias_1HSS
        if self._padded:
            bias = aligned(bias + additive(self.mask_BS, bias.dtype))
        number = 0
        for block in self._stack.block:
            layer = block.layer[0]
            attention, x_BSD = layer.SelfAttention, layer.layer_norm(hidden_BSD)
            keys, values = (by_head(attention, project(x_BSD)) for project in (attention.k, attention.v))
            hidden_BSD = in_range(hidden_BSD + attended(attention, x_BSD, keys, values, bias))
            hidden_BSD = in_range(self._feed_forward(number, block.layer[-1], hidden_BSD, cut))
            number += block.layer[-1].is_sparse
        self._leave(hidden_BSD)


class DecodeWalk(Walk):
    """One token for each of B rows, which may stand at different positions: requests come and go one by one.

    `room`: decoder positions that the caches have; `read`: encoder positions. All keys and values are 0 until somebody
    fills them (`admit`), or `make_up` does.
    """

    def __init__(self, stack: Any, choices: Choices, rows: int, room: int, read: int) -> None:
        super().__init__(stack, choices, rows, 1)
        room = -(-room // ALIGNMENT) * ALIGNMENT
        attention, device = stack.block[0].layer[0].SelfAttention, self.ids_BS.device
        shape = (len(stack.block), rows, attention.n_heads)
        self.position_B = self._more
        self.keys, self.values = (self.hidden_ND.new_zeros((*shape, room, attention.key_value_proj_dim)) for _ in "kv")
        self.read_keys, self.read_values = (
            self.hidden_ND.new_zeros((*shape, read, attention.key_value_proj_dim)) for _ in "kv"
        )
        self._read_bias = aligned(self.hidden_ND.new_zeros((rows, 1, 1, read)))
        self._row_B = torch.arange(rows, device=device)
        self._bias = DistanceBias(attention, room)

    def make_up(self, seed: int = 0) -> None:
        """Fill the caches with random numbers: what is timed does not depend on them."""
        generator = torch.Generator(self.keys.device).manual_seed(seed)
        for cache in (self.keys, self.values, self.read_keys, self.read_values):
            cache.normal_(0, 0.02, generator=generator)

    def admit(self, row: int, state: RequestState) -> None:
        """A request begins in a row, with what its prompt and its encoded text left."""
        for cache, kept in ((self.keys, state.keys), (self.values, state.values)):
            cache[:, row, :, : kept.shape[2]].copy_(kept)
        for cache, kept in ((self.read_keys, state.read_keys), (self.read_values, state.read_values)):
            cache[:, row].zero_()
            cache[:, row, :, : kept.shape[2]].copy_(kept)
        self._read_bias[row].fill_(torch.finfo(self._read_bias.dtype).min)
        self._read_bias[row, ..., : state.read_keys.shape[2]].zero_()

    def _run(self, cut: Cut[Known]) -> None:
        hidden_B1D = self._stack.embed_tokens(self.ids_BS)
        bias_BH1K = self._bias.at(self.position_B)
        number = 0
        for i, block in enumerate(self._stack.block):
            hidden_B1D = in_range(self._self_attention(i, block.layer[0], hidden_B1D, bias_BH1K))
            hidden_B1D = in_range(self._cross_attention(i, block.layer[1], hidden_B1D))
            hidden_B1D = in_range(self._feed_forward(number, block.layer[-1], hidden_B1D, cut))
            number += block.layer[-1].is_sparse
        self._leave(hidden_B1D)

    def _self_attention(self, i: int, layer: Any, hidden_B1D: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        attention, x_B1D = layer.SelfAttention, layer.layer_norm(hidden_B1D)
        for cache, project in ((self.keys[i], attention.k), (self.values[i], attention.v)):
            here_BHC = by_head(attention, project(x_B1D))[:, :, 0]
            cache.transpose(1, 2).index_put_((self._row_B, self.position_B), here_BHC)
        return hidden_B1D + attended(attention, x_B1D, self.keys[i], self.values[i], bias)

    def _cross_attention(self, i: int, layer: Any, hidden_B1D: torch.Tensor) -> torch.Tensor:
        read = (self.read_keys[i], self.read_values[i], self._read_bias)
        return hidden_B1D + attended(layer.EncDecAttention, layer.layer_norm(hidden_B1D), *read)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestState:
    """Keys and values of one request in all blocks, [blocks, H, positions, C]: its prompt, and its encoded text."""

    keys: torch.Tensor
    values: torch.Tensor
    read_keys: torch.Tensor
    read_values: torch.Tensor
