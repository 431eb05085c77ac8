"""Switch models of published shapes with random weights, made on the device that is to run them.

For timing, where no trained weights are at hand: kernels and copies are real, what the model says means nothing.
Experts lie in one tensor [E, P] a layer from the start, as `dropin` puts them (E experts, P weights of one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesim.backend.dropin import SWITCH_MLP, place
from moesim.traces import InputError

BASE = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12}
LARGE = {"d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_heads": 16, "num_layers": 24}
NAMES: dict[str, dict[str, int]] = {
    **{f"switch-base-{experts}": {**BASE, "num_experts": experts} for experts in (8, 16, 32, 64, 128, 256)},
    "switch-large-128": {**LARGE, "num_experts": 128},
}
STACKS = ("encoder", "decoder")
SHARPNESS = 3.0
"""Standard deviation of the router's logits: a chosen expert has a probability of .1 to .9, as in trained models."""


def switch_config(
    name: str, *, stacks: tuple[str, ...] = STACKS, experts: int | None = None, layers: int | None = None
) -> Any:
    """The published config, every other layer sparse. A stack that is left out is dense.

    `experts` and `layers` (of each stack) replace the published numbers. Raises InputError for an unknown name.
    """
    from transformers import SwitchTransformersConfig

    if name not in NAMES:
        raise InputError(f"no random model named {name}; known: {', '.join(NAMES)}")
    if not stacks or set(stacks) - set(STACKS):
        raise InputError(f"stacks have to be some of {', '.join(STACKS)}, not {', '.join(stacks) or 'none'}")
    sizes = dict(NAMES[name])
    published = sizes.pop("num_layers")
    depth = layers or published
    sizes |= {"num_experts": experts or sizes["num_experts"]}
    config = SwitchTransformersConfig(
        **sizes,
        num_layers=depth,
        num_decoder_layers=depth,
        vocab_size=32128,
        expert_capacity=64,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.encoder_sparse_step, config.decoder_sparse_step = (2 if stack in stacks else 0 for stack in STACKS)
    config.num_sparse_encoder_layers, config.num_sparse_decoder_layers = (
        depth // 2 if stack in stacks else 0 for stack in STACKS
    )
    return config


def random_switch(
    name_or_config: Any,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    seed: int = 0,
    stacks: tuple[str, ...] = STACKS,
    experts: int | None = None,
    layers: int | None = None,
) -> Any:
    """A SwitchTransformersForConditionalGeneration for inference; the same weights for the same seed and device.

    A config is taken as it is; `stacks`, `experts` and `layers` go with a name (see `switch_config`). Raises InputError
    for an unknown name.
    """
    from transformers import SwitchTransformersForConditionalGeneration

    named = isinstance(name_or_config, str)
    config = switch_config(name_or_config, stacks=stacks, experts=experts, layers=layers) if named else name_or_config
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(config)
    for module in model.modules():
        if type(module).__name__ == SWITCH_MLP:
            place(module.experts, dtype, device)
    _materialise(model, dtype, torch.device(device))
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            std = _std(path, config)
            parameter.fill_(1.0) if std is None else parameter.normal_(std=std, generator=generator)
    return model.eval().requires_grad_(False)


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter and buffer that is still on "meta" memory; what was one tensor before is one afterwards."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    # The old one is kept, or its id could be given to another.
                    new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=device)
                    made[id(old)] = (old, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
                table[name] = made[id(old)][1]


def _std(path: str, config: Any) -> float | None:
    """Standard deviation by the last part of a parameter's name but "weight": outputs of about the size of the inputs,
    logits of attention and router of a few; None for the scales of norms."""
    inner, heads = config.d_model**-0.5, config.num_heads * config.d_kv
    by_name = {
        "wi": inner,
        "wo": config.d_ff**-0.5,
        "q": (config.d_model * config.d_kv) ** -0.5,
        "k": inner,
        "v": inner,
        "o": heads**-0.5,
        "classifier": SHARPNESS * inner,
        "relative_attention_bias": inner,
        "shared": 1.0,
        "embed_tokens": 1.0,
        "lm_head": 1.0,
    }
    name = path.split(".")[-2]
    return None if "norm" in name else by_name[name]
