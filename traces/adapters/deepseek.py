"""DeepSeek-V2 and V3: shared experts, latent attention, a choice limited to some groups of experts.

V2 (arXiv 2405.04434, section 2.2) ranks by softmax and a group by its best expert; V3 (arXiv 2412.19437, section 2.1.2)
ranks by sigmoid plus a correction bias, which the gate weights do not contain, and a group by its two best experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesim.traces.adapters.base import Gate, Router, Selected, TopKAdapter
from moesim.traces.spec import Widths


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekAdapter(TopKAdapter):
    """What both versions share."""

    experts: str = "n_routed_experts"
    expert_width: str = "moe_intermediate_size"

    def is_moe(self, config: Any, layer: int) -> bool:
        """The first layers are dense."""
        return bool(layer >= config.first_k_dense_replace)

    def widths(self, config: Any, *, dense: bool) -> Widths:
        """Latent attention: the cache holds one compressed vector and one rotary key a token, whatever the heads."""
        return Widths(
            d_model=config.hidden_size,
            d_ff=config.moe_intermediate_size,
            num_heads=config.num_attention_heads,
            d_kv=config.v_head_dim,
            kv_width=config.kv_lora_rank + config.qk_rope_head_dim,
            gated=True,
            shared_d_ff=config.n_shared_experts * config.moe_intermediate_size,
            dense_d_ff=config.intermediate_size if dense else 0,
        )

    def groups(self, config: Any) -> tuple[int, int]:
        """As configured; models without groups leave them out."""
        return config.n_group or 1, config.topk_group or 1

    def gate(self, router: Router) -> Gate:
        """Both compute their logits in float32."""
        return Gate(weight=router.module.get_parameter("weight"), bias=None, dtype=torch.float32)

    def select(self, router: Router, inputs: Tensor, kept: Any) -> Selected:
        """The routers do not sort what they chose; a trace has the largest weight first."""
        ids, weights, dropped = TopKAdapter.select(self, router, inputs, kept)
        order = weights.argsort(dim=-1, descending=True, stable=True)
        return ids.gather(-1, order), weights.gather(-1, order), dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV2Adapter(DeepseekAdapter):
    """Groups count only with `topk_method` group_limited_greedy (the full V2; V2-Lite is greedy)."""

    def groups(self, config: Any) -> tuple[int, int]:
        """One group where the method is greedy."""
        return DeepseekAdapter.groups(self, config) if config.topk_method == "group_limited_greedy" else (1, 1)

    def scores(self, router: Router, logits: Tensor) -> Tensor:
        """Probabilities, zero in the groups that are out."""
        probs = logits.softmax(dim=-1)
        module: Any = router.module
        if module.topk_method != "group_limited_greedy":
            return probs
        best = _grouped(probs, module.num_group).amax(dim=-1)
        return _keep_groups(probs, best, module.topk_group, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekV3Adapter(DeepseekAdapter):
    """Always group-limited, if only to the one group."""

    def scores(self, router: Router, logits: Tensor) -> Tensor:
        """Sigmoid plus bias, minus infinity in the groups that are out."""
        module: Any = router.module
        scores = logits.sigmoid() + module.e_score_correction_bias
        best_two = _grouped(scores, module.num_group).topk(2, dim=-1).values.sum(dim=-1)
        return _keep_groups(scores, best_two, module.topk_group, float("-inf"))


def _grouped(scores: Tensor, groups: int) -> Tensor:
    return scores.reshape(*scores.shape[:-1], groups, -1)


def _keep_groups(scores: Tensor, group_scores: Tensor, top_groups: int, out: float) -> Tensor:
    """`scores` [..., E] with `out` in all but the `top_groups` best of the groups, whose scores are [..., groups]."""
    inside = torch.zeros_like(group_scores, dtype=torch.bool)
    inside.scatter_(-1, group_scores.topk(top_groups, dim=-1).indices, value=True)
    width = scores.shape[-1] // group_scores.shape[-1]
    return scores.masked_fill(~inside.repeat_interleave(width, dim=-1), out)


DEEPSEEK_V2 = DeepseekV2Adapter(model_type="deepseek_v2", block="DeepseekV2Moe")
DEEPSEEK_V3 = DeepseekV3Adapter(model_type="deepseek_v3", block="DeepseekV3MoE")
