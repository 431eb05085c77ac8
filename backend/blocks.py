"""Attention of a Switch model over static tensors, written over the library's own modules: what encoder graphs, decode
graphs (graphs.py) and forward passes that stop at every MoE layer (walk.py) share. Nothing here waits for the device.

Shape letters: B sequences, S positions, D = d_model, H heads, C width of a head, K positions that keys and values have.
"""

from __future__ import annotations

from typing import Any

import torch

from moesim.backend.attention import attend


def by_head(attention: Any, x_BSI: torch.Tensor) -> torch.Tensor:
    """[B, H, S, C] a projection's output [B, S, H C], as a view."""
    width: int = attention.key_value_proj_dim
    return x_BSI.view(*x_BSI.shape[:-1], -1, width).transpose(1, 2)


def attended(
    attention: Any, x_BSD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[B, S, D] what a layer's attention adds, over keys and values [B, H, K, C]."""
    query = by_head(attention, attention.q(x_BSD))
    seen_BHSC = attend(query, keys, values, bias, attention.scaling)
    out_BSD: torch.Tensor = attention.o(seen_BHSC.transpose(1, 2).flatten(2))
    return out_BSD


def additive(mask_BS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, 1, S] zero at real tokens, the most negative number at padding."""
    return (1.0 - mask_BS.to(dtype))[:, None, None, :] * torch.finfo(dtype).min


def in_range(hidden: torch.Tensor) -> torch.Tensor:
    """The same, and in float16 as the library does after every sublayer: infinities become large numbers."""
    if hidden.dtype != torch.float16:
        return hidden
    # Not torch.where with numbers, as the library has it: it copies them to the device, and waits.
    bound = torch.finfo(hidden.dtype).max - 1000 * hidden.isinf().any()
    return hidden.clamp(min=-bound, max=bound)


class DistanceBias:
    """Position bias and causality of one decode step: the query at p sees its past and itself, the future is masked.

    `attention` is the one that holds the bias of its stack, `room` is K.
    """

    @torch.no_grad()
    def __init__(self, attention: Any, room: int) -> None:
        device = attention.relative_attention_bias.weight.device
        past_HK = attention.compute_bias(1, room, device=device, past_seen_tokens=room - 1)[0, :, 0]
        future = past_HK.new_full((attention.n_heads, room - 1), torch.finfo(past_HK.dtype).min)
        # By distance, [H, 2K-1]: from K-1-p on it is what the query at p sees.
        self._by_distance = torch.cat([past_HK, future], dim=1)
        self._window_K = torch.arange(room - 1, 2 * room - 1, device=device)

    def at(self, position_B: torch.Tensor) -> torch.Tensor:
        """[B, H, 1, K] for rows at these positions; one row where all stand at the same."""
        window_BK = self._window_K[None] - position_B[:, None]
        bias_HBK = self._by_distance.index_select(1, window_BK.flatten()).view(-1, *window_BK.shape)
        return bias_HBK.transpose(0, 1).contiguous()[:, :, None]
