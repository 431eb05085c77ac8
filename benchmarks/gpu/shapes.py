"""The model that the GPU benchmarks measure: Switch-base-128, and for a rehearsal a small one of that form."""

from __future__ import annotations

from typing import Any

from moesim.backend.random_model import STACKS, switch_config

SMALL = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "vocab_size": 4096}


def config_of(
    *, small: bool, stacks: tuple[str, ...] = STACKS, experts: int | None = None, layers: int | None = None
) -> Any:
    """Its config, with experts in these stacks; so many experts and layers (of each stack) in place of its own."""
    if not small:
        return switch_config("switch-base-128", stacks=stacks, experts=experts, layers=layers)
    config = switch_config("switch-base-128", stacks=stacks, experts=experts or 8, layers=layers or 4)
    for name, value in SMALL.items():
        setattr(config, name, value)
    return config
