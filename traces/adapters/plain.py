"""Families that differ in names only: every layer has experts, top-k of a softmax, no groups, nothing shared.

Mixtral (arXiv 2401.04088), OLMoE (arXiv 2409.02060), Granite-MoE, gpt-oss (routers with a bias, softmax over the chosen
logits). None of this matters here: the order of the raw logits is the order of the choice in all of them.
"""

from __future__ import annotations

from moesim.traces.adapters.base import TopKAdapter

MIXTRAL = TopKAdapter(model_type="mixtral", block="MixtralSparseMoeBlock")
OLMOE = TopKAdapter(model_type="olmoe", block="OlmoeSparseMoeBlock", experts="num_experts")
GRANITE = TopKAdapter(model_type="granitemoe", block="GraniteMoeMoE", router="router")
GPT_OSS = TopKAdapter(model_type="gpt_oss", block="GptOssMLP", router="router")
