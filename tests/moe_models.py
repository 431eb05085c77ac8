"""Tiny random models of the real classes of every family, with spread-out routers, for tests of the recorder."""

import shutil

import torch
import transformers
from switch_models import SHIPPED

VOCABULARY = 6000  # as many as the tokenizer of models/switch-mini knows
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPS = {"n_group": 4, "topk_group": 2}
QWEN = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8, "mlp_only_layers": [1]}
NLLB = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 8,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, intermediate_size=24, num_local_experts=8),
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, intermediate_size=24, num_experts=8),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**COMMON, **QWEN, shared_expert_intermediate_size=20),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **QWEN, head_dim=8, norm_topk_prob=True),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**LATENT, **GROUPS, topk_method="group_limited_greedy"),
    "deepseek_v2 greedy": lambda: transformers.DeepseekV2Config(**LATENT),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**LATENT, **GROUPS),
    "gpt_oss": lambda: transformers.GptOssConfig(**COMMON, intermediate_size=24, num_local_experts=8, head_dim=8),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**COMMON, intermediate_size=24, num_local_experts=8),
}
"""Decoder-only configurations; the part of the name before a space is the model type."""


def tiny(name, seed=0, dtype=torch.float32):
    return _spread(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()), seed).to(dtype).eval()


def tiny_nllb(seed=0, **changes):
    config = transformers.NllbMoeConfig(**{**NLLB, **changes})
    return _spread(transformers.NllbMoeForConditionalGeneration(config), seed).eval()


def saved(model, folder):
    """The model with the shipped tokenizer in a folder, as a user has it."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SHIPPED / file, folder)
    return folder


def _spread(model, seed):
    """Weights of a size that makes tokens differ; the classes' own start leaves routers near indifference or empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "correction_bias" in name or name.endswith("router.bias"):
                tensor.normal_(std=0.3, generator=generator)
            elif tensor.ndim >= 2 and "norm" not in name:
                tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    return model
