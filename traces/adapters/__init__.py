"""One small adapter a model family: where its routers are, how to read what they select, and the model's shapes.

Torch and transformers are imported here, so callers that can do without import this package lazily.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from moesim.traces.adapters.base import Adapter, Gate, Router, TopKAdapter
from moesim.traces.adapters.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moesim.traces.adapters.plain import GPT_OSS, GRANITE, MIXTRAL, OLMOE
from moesim.traces.adapters.qwen import QWEN2_MOE, QWEN3_MOE
from moesim.traces.adapters.seq2seq import NLLB_MOE, SWITCH
from moesim.traces.errors import InputError, TraceError
from moesim.traces.spec import ModelSpec

_ALL: tuple[Adapter, ...] = (
    SWITCH,
    NLLB_MOE,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
    GRANITE,
)
ADAPTERS: dict[str, Adapter] = {adapter.model_type: adapter for adapter in _ALL}
"""`model_type` of a configuration to adapter; a new family is one more entry."""

MOST_LAYERS = 10_000
"""More are taken for a damaged configuration."""


def adapter_of(model: nn.Module) -> tuple[Adapter, list[Router]]:
    """The adapter that finds routers in `model`, and the routers. Raises InputError saying what was looked for."""
    for adapter in ADAPTERS.values():
        routers = adapter.routers(model)
        if routers:
            return adapter, routers
    raise _unknown(type(model).__name__)


def adapter_for(config: Any) -> Adapter:
    """The adapter of a configuration. Raises InputError saying what was looked for, as `adapter_of` does."""
    if config.model_type not in ADAPTERS:
        raise _unknown(", ".join(config.architectures or ()) or f"model type {config.model_type!r}")
    return ADAPTERS[config.model_type]


def spec_of_config(config: Any) -> ModelSpec:
    """The architecture that a transformers configuration describes, without weights.

    Raises InputError where the family is not known, has no MoE layer in this configuration, or a size is missing or
    impossible.
    """
    adapter = adapter_for(config)
    try:
        if not any(stack.moe_layers for stack in adapter.stacks(config)):
            raise InputError(f"this {adapter.model_type} configuration has no MoE layer: all its layers are dense")
        return adapter.spec_of(config)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, TraceError) as error:
        raise InputError(f"the {adapter.model_type} configuration cannot be used: {error}") from None


def load_config(name: str) -> Any:
    """The configuration of a hub id or a local folder; runs no code of the model's repository.

    Raises InputError in one line where there is none or it cannot be read.
    """
    folder = Path(name)
    if (folder.exists() or name.startswith((".", "/"))) and not (folder / "config.json").is_file():
        raise InputError(f"{name}: no model there (config.json is missing)")
    options = {"local_files_only": folder.exists()}
    try:
        content, _ = transformers.PreTrainedConfig.get_config_dict(name, **options)
        layers = [value for key, value in content.items() if "layers" in key and isinstance(value, int)]
        if max(layers, default=0) > MOST_LAYERS:  # the library makes lists that long while it reads a configuration
            raise ValueError(f"{max(layers)} layers in its config.json")
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # the library checks fields with exception classes of several packages
        raise cannot_load(name, error) from None


def load_spec(name: str) -> ModelSpec:
    """The architecture of a hub id or a local folder, from its config.json. Raises InputError naming the model."""
    config = load_config(name)
    try:
        return spec_of_config(config)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def cannot_load(name: str, error: Exception) -> InputError:
    """One line for what a library said in several."""
    return InputError(f"{name}: the model cannot be loaded: {' '.join(str(error).split())[:300]}")


def _unknown(what: str) -> InputError:
    looked = ", ".join(f"{adapter.block} ({name})" for name, adapter in ADAPTERS.items())
    return InputError(f"{what} has no MoE layers that moesim knows (looked for modules: {looked})")


__all__ = [
    "ADAPTERS",
    "Adapter",
    "Gate",
    "Router",
    "TopKAdapter",
    "adapter_for",
    "adapter_of",
    "cannot_load",
    "load_config",
    "load_spec",
    "spec_of_config",
]
