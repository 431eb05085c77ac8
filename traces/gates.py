"""The frozen gates of a recorded model: what predictors that look ahead through the model's own routers read.

A trace keeps them in one safetensors file beside its shards. Shape letters: L MoE layers of a stack, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moesim.traces.errors import TraceError
from moesim.traces.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """The routers' linear maps in one stack; a router ranks experts by weight @ input + bias."""

    weight: NDArray[np.float32]
    """[L, E, d_model]."""
    bias: NDArray[np.float32]
    """[L, E], zero where a router has none."""

    def __post_init__(self) -> None:
        if self.weight.ndim != 3 or self.bias.shape != self.weight.shape[:2]:
            raise TraceError(
                f"gates must have shapes [L, E, d_model] and [L, E], got {list(self.weight.shape)} and "
                f"{list(self.bias.shape)}"
            )
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise TraceError("a gate's weight is not a finite number")


def gates_to_bytes(gates: Mapping[str, Gates]) -> bytes:
    """The gates of every stack as one safetensors file."""
    named = {stack: {"weight": g.weight, "bias": g.bias} for stack, g in gates.items()}
    return save({f"{stack}.{name}": np.ascontiguousarray(a) for stack, g in named.items() for name, a in g.items()})


def gates_of_bytes(data: bytes, spec: ModelSpec) -> dict[str, Gates]:
    """Stack to gates, the inverse of `gates_to_bytes`. Raises TraceError where the file is damaged or does not fit the
    model."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise TraceError(f"cannot be read ({error})") from None
    found = {}
    for stack in sorted({name.partition(".")[0] for name in tensors}):
        try:
            weight, bias = (tensors[f"{stack}.{name}"] for name in ("weight", "bias"))
        except KeyError as error:
            raise TraceError(f"its tensors are wrong: {error} is missing") from None
        if weight.dtype != np.float32 or bias.dtype != np.float32:
            raise TraceError("its tensors are not float32")
        found[stack] = Gates(weight=weight, bias=bias)
        expected = (len(spec.stack(stack).moe_layers), spec.num_experts)
        if found[stack].bias.shape != expected:
            raise TraceError(f"gates of {stack} have shape {list(bias.shape)}, the model has {list(expected)}")
    return found
