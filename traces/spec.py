"""What a trace says about the model that was recorded.

The shapes here are what the cost model needs to turn token counts into bytes and FLOPs. Knows nothing about weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moesim.traces.errors import TraceError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

SHAPES: dict[str, dict[str, int]] = {
    "switch-base": {"d_model": 768, "d_ff": 3072, "num_heads": 12, "d_kv": 64},
    "switch-large": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "d_kv": 64},
}
"""Widths of published models (Fedus et al. 2021, table 9), to ask what a recorded routing would cost at their size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSpec:
    """One stack of layers: the encoder or the decoder (decoder-only models have one stack, `decoder`)."""

    name: str
    num_layers: int
    """All layers of the stack, dense ones included."""
    moe_layers: tuple[int, ...]
    """Indices (0-based, in the stack) of the layers that hold experts; L = len(moe_layers)."""

    def __post_init__(self) -> None:
        if self.name not in ("encoder", "decoder"):
            raise TraceError(f"stack name {self.name!r} is neither 'encoder' nor 'decoder'")
        if list(self.moe_layers) != sorted(set(self.moe_layers)):
            raise TraceError(f"stack {self.name}: MoE layers must be unique and ascending, got {self.moe_layers}")
        if self.moe_layers and not 0 <= self.moe_layers[0] <= self.moe_layers[-1] < self.num_layers:
            raise TraceError(f"stack {self.name}: MoE layer outside 0..{self.num_layers - 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Architecture of the recorded model, in the letters of docs/architecture.md (E experts, K per token)."""

    family: str
    d_model: int
    d_ff: int
    """Inner width of one expert."""
    num_heads: int
    d_kv: int
    """Width of one attention head."""
    num_experts: int
    top_k: int
    gated: bool
    """True for three-matrix (gated) experts, False for two (Switch)."""
    capacity: int | None
    """Most tokens that an expert takes from one sequence (Switch); None where the model drops nothing."""
    shared_experts: int
    vocab_size: int
    dtype: str
    stacks: tuple[StackSpec, ...]

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "num_heads", "d_kv", "num_experts", "top_k", "vocab_size"):
            if getattr(self, name) < 1:
                raise TraceError(f"model spec: {name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise TraceError(f"model spec: top_k {self.top_k} exceeds {self.num_experts} experts")
        if self.num_experts > 65_535:
            raise TraceError(f"model spec: {self.num_experts} experts do not fit the 16-bit ids of a trace")
        if self.dtype not in DTYPE_BYTES:
            raise TraceError(f"model spec: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if len({stack.name for stack in self.stacks}) != len(self.stacks) or not self.stacks:
            raise TraceError("model spec: needs one or two stacks with different names")

    def stack(self, name: str) -> StackSpec:
        """The stack called `name`. Raises TraceError naming the stacks that exist."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        known = ", ".join(stack.name for stack in self.stacks)
        raise TraceError(f"the model has no stack {name!r}; it has: {known}")

    def with_shapes(self, name: str) -> ModelSpec:
        """The same routing in a model of other widths. Raises TraceError listing the known ones."""
        if name not in SHAPES:
            raise TraceError(f"unknown shapes {name!r}; known: {', '.join(SHAPES)}")
        wider = SHAPES[name]
        return replace(
            self,
            d_model=wider["d_model"],
            d_ff=wider["d_ff"],
            num_heads=wider["num_heads"],
            d_kv=wider["d_kv"],
        )

    def expert_params(self) -> int:
        """Weights of one expert: two matrices, three where the expert is gated."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    def expert_bytes(self, dtype: str | None = None) -> int:
        """Bytes of one expert's weights in `dtype` (default: the recorded dtype)."""
        return self.expert_params() * DTYPE_BYTES[dtype or self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ModelSpec:
        """Read what `to_dict` wrote. Raises TraceError naming a missing, unknown or ill-typed field."""
        data = _checked(cls, data, "model spec")
        if not isinstance(data["stacks"], list | tuple):
            raise TraceError("model spec: 'stacks' must be a list")
        stacks = []
        for entry in data["stacks"]:
            item = _checked(StackSpec, entry, "stack")
            layers = item["moe_layers"]
            if not isinstance(layers, list | tuple) or not all(type(i) is int for i in layers):
                raise TraceError("stack: 'moe_layers' must be a list of integers")
            stacks.append(StackSpec(**{**item, "moe_layers": tuple(layers)}))
        return cls(**{**data, "stacks": tuple(stacks)})


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "int | None": (int, type(None)),
}


def _checked(cls: type, data: Any, what: str) -> dict[str, Any]:
    """Raise TraceError unless `data` is a mapping with exactly the fields of the dataclass `cls`, of their types."""
    if not isinstance(data, dict):
        raise TraceError(f"{what}: expected an object, got {type(data).__name__}")
    types = {f.name: str(f.type) for f in fields(cls)}
    if missing := sorted(types.keys() - data.keys()):
        raise TraceError(f"{what}: missing field {missing[0]!r}")
    if unknown := sorted(data.keys() - types.keys()):
        raise TraceError(f"{what}: unknown field {unknown[0]!r}")
    for name, value in data.items():
        allowed = _TYPES.get(types[name])
        if allowed and type(value) not in allowed:
            raise TraceError(f"{what}: {name!r} must be {types[name]}, got {value!r}")
    return data
