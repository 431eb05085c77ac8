"""What a trace says about the model that was recorded.

The shapes here are what the cost model needs to turn token counts into bytes and FLOPs. Knows nothing about weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moesim.traces.errors import TraceError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """How wide the model is: what turns token counts into bytes and FLOPs."""

    d_model: int
    d_ff: int
    """Inner width of one routed expert."""
    num_heads: int
    d_kv: int
    """Width of one attention head."""
    kv_width: int
    """Numbers that one token adds to one layer's KV cache: 2 x key-value heads x d_kv, or MLA's compressed width."""
    gated: bool
    """True for three-matrix (gated) feed-forwards, False for two (Switch)."""
    shared_d_ff: int = 0
    """Inner width of all shared experts of a layer together, 0 where there are none."""
    dense_d_ff: int = 0
    """Inner width of the feed-forward in layers without experts, 0 where there are none."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "num_heads", "d_kv", "kv_width"):
            if getattr(self, name) < 1:
                raise TraceError(f"model widths: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("shared_d_ff", "dense_d_ff"):
            if getattr(self, name) < 0:
                raise TraceError(f"model widths: {name} must not be negative, got {getattr(self, name)}")

    def ffn_params(self, inner: int) -> int:
        """Weights of a feed-forward of `inner` width: two matrices, three where it is gated."""
        return (3 if self.gated else 2) * self.d_model * inner


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
    num_experts: int
    top_k: int
    capacity: int | None
    """Most tokens that an expert takes from one sequence (Switch); None where the model drops nothing."""
    groups: int
    """Expert groups of group-limited routing (DeepSeek); 1 where there are none."""
    top_groups: int
    """Groups that one token may choose its experts from."""
    vocab_size: int | None
    """None where the recording does not say (imports)."""
    dtype: str
    widths: Widths | None
    """None where the recording does not say (imports); what needs them asks `sized`."""
    stacks: tuple[StackSpec, ...]

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "groups", "top_groups", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TraceError(f"model spec: {name} must be at least 1, got {value}")
        if self.top_groups > self.groups:
            raise TraceError(f"model spec: top_groups {self.top_groups} exceeds {self.groups} groups")
        if self.top_k > self.num_experts:
            raise TraceError(f"model spec: top_k {self.top_k} exceeds {self.num_experts} experts")
        if self.num_experts > 65_535:
            raise TraceError(f"model spec: {self.num_experts} experts do not fit the 16-bit ids of a trace")
        if self.dtype not in DTYPE_BYTES:
            raise TraceError(f"model spec: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if len({stack.name for stack in self.stacks}) != len(self.stacks) or not self.stacks:
            raise TraceError("model spec: needs one or two stacks with different names")

    @classmethod
    def of_routing(cls, family: str, num_experts: int, top_k: int, stack: StackSpec) -> ModelSpec:
        """A model of which nothing but its routing is known. Raises TraceError for impossible numbers."""
        return cls(
            family=family,
            num_experts=num_experts,
            top_k=top_k,
            capacity=None,
            groups=1,
            top_groups=1,
            vocab_size=None,
            dtype="bfloat16",
            widths=None,
            stacks=(stack,),
        )

    def stack(self, name: str) -> StackSpec:
        """The stack called `name`. Raises TraceError naming the stacks that exist."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        known = ", ".join(stack.name for stack in self.stacks)
        raise TraceError(f"the model has no stack {name!r}; it has: {known}")

    def with_widths(self, name: str) -> ModelSpec:
        """The same routing in a model of published widths. Raises TraceError listing the known ones."""
        if name not in PUBLISHED:
            raise TraceError(f"unknown shapes {name!r}; known: {', '.join(PUBLISHED)}")
        return replace(self, widths=PUBLISHED[name])

    def sized(self) -> Widths:
        """The widths. Raises TraceError where the recording does not know them."""
        if self.widths is None:
            raise TraceError(
                "the recording does not say how wide the model is, and this needs it: import it with --model, "
                "or name a published model's widths with --shapes"
            )
        return self.widths

    def expert_params(self) -> int:
        """Weights of one routed expert. Raises TraceError where the widths are not known."""
        widths = self.sized()
        return widths.ffn_params(widths.d_ff)

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
        widths = data["widths"]
        if widths is not None:
            widths = Widths(**_checked(Widths, widths, "model widths"))
        return cls(**{**data, "widths": widths, "stacks": tuple(stacks)})


PUBLISHED: dict[str, Widths] = {
    "switch-base": Widths(d_model=768, d_ff=3072, num_heads=12, d_kv=64, kv_width=1536, gated=False, dense_d_ff=3072),
    "switch-large": Widths(d_model=1024, d_ff=4096, num_heads=16, d_kv=64, kv_width=2048, gated=False, dense_d_ff=4096),
    "mixtral-8x7b": Widths(d_model=4096, d_ff=14336, num_heads=32, d_kv=128, kv_width=2048, gated=True),
    "olmoe-1b-7b": Widths(d_model=2048, d_ff=1024, num_heads=16, d_kv=128, kv_width=4096, gated=True),
    "qwen3-30b-a3b": Widths(d_model=2048, d_ff=768, num_heads=32, d_kv=128, kv_width=1024, gated=True),
    "qwen3-235b-a22b": Widths(d_model=4096, d_ff=1536, num_heads=64, d_kv=128, kv_width=1024, gated=True),
    "deepseek-v2-lite": Widths(
        d_model=2048, d_ff=1408, num_heads=16, d_kv=128, kv_width=576, gated=True, shared_d_ff=2816, dense_d_ff=10944
    ),
    "deepseek-v3": Widths(
        d_model=7168, d_ff=2048, num_heads=128, d_kv=128, kv_width=576, gated=True, shared_d_ff=2048, dense_d_ff=18432
    ),
    "gpt-oss-20b": Widths(d_model=2880, d_ff=2880, num_heads=64, d_kv=64, kv_width=1024, gated=True),
    "gpt-oss-120b": Widths(d_model=2880, d_ff=2880, num_heads=64, d_kv=64, kv_width=1024, gated=True),
}
"""Widths of published models, from Fedus et al. 2021 (table 9) and from the models' own configurations; to ask what a
recorded routing would cost at their size."""

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
