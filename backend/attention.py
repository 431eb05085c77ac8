"""Fused attention and fused layer norms for Hugging Face Switch models, put in place and taken out again.

The library's eager attention writes every score to memory some seven times and its layer norm runs six kernels; both
are one kernel here. Weights stay the model's own. Knows nothing about experts or graphs. Shape letters: B sequences,
H heads, Q queries, K keys, C width of a head, D = d_model.

Tolerances against the library, relative to the largest value: 1e-5 in float32. In bfloat16 and float16 these kernels
round once at the end, where the library rounds scores, biased scores, probabilities and normalised values one by one,
so that a block differs by its rounding (2e-2 in bfloat16, 2e-3 in float16), and these are the more exact ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesim.traces import InputError

NAME = "moesim_fused"
"""The attention's name in the library's registry and in `config._attn_implementation`."""

WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The memory-efficient kernel takes an additive bias that is broadcast by strides of zero; flash attention takes none.
cuDNN's is left out: it plans every new shape for a good fraction of a second and its support of broadcasts varies."""
WITHOUT_BIAS = [SDPBackend.FLASH_ATTENTION, *WITH_BIAS]
ALIGNMENT = 8
"""Keys in a bias's row are a multiple of this, or torch copies the bias into such rows at every call."""


@dataclass(frozen=True, slots=True)
class Patch:
    """Something changed in a model in place; `remove` undoes it, once."""

    remove: Callable[[], None]


def attend(
    q_BHQC: torch.Tensor, k_BHKC: torch.Tensor, v_BHKC: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """[B, H, Q, C] softmax(scale * q k + bias) v; `bias` broadcasts to [B, H, Q, K] and is never made that large."""
    if bias is not None:
        # The model's own bias is a permuted view of [Q, K, H]; kernels want the keys of a row side by side.
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias = bias.expand(q_BHQC.shape[0], q_BHQC.shape[1], q_BHQC.shape[2], k_BHKC.shape[2])
    backends = WITHOUT_BIAS if bias is None else WITH_BIAS
    # On a CPU torch has a fused kernel of its own, which takes a bias but bears none of these names alone.
    with sdpa_kernel(backends) if q_BHQC.is_cuda else nullcontext():
        return functional.scaled_dot_product_attention(q_BHQC, k_BHKC, v_BHKC, attn_mask=bias, scale=scale)


def fused_attention(
    _module: Any,
    query_BHQC: torch.Tensor,
    key_BHKC: torch.Tensor,
    value_BHKC: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The library's attention interface: ([B, Q, H, C], no weights).

    `attention_mask` [B or 1, 1, Q or 1, K] is additive, as `position_bias` [1 or B, H, Q, K] is. Where both are given
    their sum may be [B, H, Q, K]: callers that know of no padding pass no mask. Raises InputError with dropout.
    """
    if dropout:
        raise InputError("the fused attention is for inference: call model.eval() first")
    if position_bias is not None and attention_mask is not None:
        bias: torch.Tensor | None = position_bias + attention_mask
    else:
        bias = position_bias if attention_mask is None else attention_mask
    scale = query_BHQC.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query_BHQC, key_BHKC, value_BHKC, bias, scale).transpose(1, 2).contiguous(), None


def stacks_of(model: Any) -> list[Any]:
    """The encoder and decoder stacks of a Hugging Face Switch model, those that it has.

    Raises InputError where it is another kind of model.
    """
    stacks = [stack for name in ("encoder", "decoder") if (stack := getattr(model, name, None)) is not None]
    if not stacks or any(type(stack).__name__ != "SwitchTransformersStack" for stack in stacks):
        raise InputError(f"{type(model).__name__}: not a Hugging Face Switch model (encoder and decoder stacks)")
    return stacks


def fuse_attention(model: Any) -> Patch:
    """Let the model's attention run as one kernel.

    Raises InputError where it is not a Switch model.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, fused_attention)
    # Without masks of its own name the library would pass none at all, and a decoder would see the future.
    AttentionMaskInterface.register(NAME, eager_mask)
    configs = [stack.config for stack in stacks_of(model)]
    before = [config._attn_implementation for config in configs]

    def use(names: list[str | None]) -> None:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name

    use([NAME] * len(configs))
    return Patch(lambda: use(before))


def fuse_norms(model: Any) -> Patch:
    """Let the model's layer norms run as one kernel each.

    Raises InputError where it is not a Switch model.
    """
    norms = [
        module
        for stack in stacks_of(model)
        for module in stack.modules()
        if type(module).__name__ == "SwitchTransformersLayerNorm"
    ]
    for norm in norms:
        norm.forward = _norm_of(norm)

    def remove() -> None:
        for norm in norms:
            vars(norm).pop("forward", None)

    return Patch(remove)


def _norm_of(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm's forward pass in one kernel; it looks the weight up at every call, as it may be loaded or moved."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)

    return forward


def fuse(model: Any) -> Patch:
    """Both: attention and layer norms.

    Raises InputError where it is not a Switch model.
    """
    patches = [fuse_attention(model), fuse_norms(model)]

    def remove() -> None:
        for patch in patches:
            patch.remove()

    return Patch(remove)


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same bias [..., K] in memory that kernels take as it is: rows begin at multiples of `ALIGNMENT` keys."""
    keys = bias.shape[-1]
    room = bias.new_zeros((*bias.shape[:-1], -(-keys // ALIGNMENT) * ALIGNMENT))[..., :keys]
    return room.copy_(bias)
