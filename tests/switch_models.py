"""Small random Switch models of the real class, and the shipped one, for tests of the recorder and the backend."""

from pathlib import Path

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

SHIPPED = Path(__file__).parents[1] / "models/switch-mini"


def tiny_config(layers=4, sparse=2, experts=8, capacity=64, d_model=32):
    """Both stacks have so many layers, `sparse` of them with experts."""
    return SwitchTransformersConfig(
        vocab_size=96,
        d_model=d_model,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=layers,
        num_decoder_layers=layers,
        num_sparse_encoder_layers=sparse,
        num_sparse_decoder_layers=sparse,
        num_experts=experts,
        expert_capacity=capacity,
        decoder_start_token_id=0,
    )


def random_switch(experts=8, capacity=64, seed=0, layers=2, d_model=32):
    torch.manual_seed(seed)
    config = tiny_config(layers, layers, experts, capacity, d_model)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    # The default start is so small that all tokens take one expert; spread the routers out.
    for name, parameter in model.named_parameters():
        if "router.classifier" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def shipped_switch():
    return SwitchTransformersForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32).eval()
