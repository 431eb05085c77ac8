"""Qwen2-MoE and Qwen3-MoE: dense layers may stand between MoE layers, and Qwen2-MoE has a shared expert (arXiv
2407.10671, 2505.09388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.traces.adapters.base import TopKAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenAdapter(TopKAdapter):
    """`mlp_only_layers` and `decoder_sparse_step` say which layers are dense."""

    experts: str = "num_experts"
    expert_width: str = "moe_intermediate_size"

    def is_moe(self, config: Any, layer: int) -> bool:
        """The rule of the models' decoder layers."""
        sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        return sparse and layer not in config.mlp_only_layers

    def shared_width(self, config: Any) -> int:
        """Qwen2-MoE has one shared expert (behind a gate of its own), Qwen3-MoE has none."""
        return int(getattr(config, "shared_expert_intermediate_size", 0))


QWEN2_MOE = QwenAdapter(model_type="qwen2_moe", block="Qwen2MoeSparseMoeBlock")
QWEN3_MOE = QwenAdapter(model_type="qwen3_moe", block="Qwen3MoeSparseMoeBlock")
