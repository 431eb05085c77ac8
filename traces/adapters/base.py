"""What the recorder and the model specs need to know about a family, and how most families answer.

Most decoder-only families of transformers have a module a MoE layer with a router and an `experts` module that is
called with the hidden states, the chosen ids and their weights: `TopKAdapter` reads the choice from that call, so that
nothing is computed twice. Knows nothing about text, batches or files. Shape letters: B sequences, S positions,
T = B x S tokens, E experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesim.traces.spec import ModelSpec, StackSpec, Widths

Selected = tuple[Tensor, Tensor, Tensor]
"""ids [B, S, K], weights [B, S, K] as the model applied them, dropped [B, S]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A MoE layer of the model and its place."""

    stack: str
    layer: int
    """Index of the layer in its stack, dense layers counted."""
    block: nn.Module
    """The layer's feed-forward part; its first argument [B, S, d_model] is what is routed."""
    module: nn.Module
    """The router itself, a part of the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The linear map from a router's input to E logits."""

    weight: Tensor
    """[E, d_model]."""
    bias: Tensor | None
    """[E]."""
    dtype: torch.dtype
    """What the router computes its logits in; often wider than its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(ABC):
    """One model family: where its routers are, what they selected, and its shapes."""

    layers: ClassVar[str] = "layers"
    """Name of the list of layers in a stack."""
    model_type: str
    """What its configurations call it."""
    block: str
    """Class name of the modules that hold a router and experts."""
    router: str = "gate"
    """Name of the router in such a module."""

    def routers(self, model: nn.Module) -> list[Router]:
        """The MoE layers in the order in which they run; empty where the model is not of this family."""
        return [self._router(name, m) for name, m in model.named_modules() if type(m).__name__ == self.block]

    def spec(self, model: nn.Module, routers: list[Router]) -> ModelSpec:
        """The architecture, from the configuration and from where the MoE layers really are."""
        spec = self.spec_of(model.config)
        found = {s.name: tuple(r.layer for r in routers if r.stack == s.name) for s in spec.stacks}
        stacks = tuple(replace(stack, moe_layers=found[stack.name]) for stack in spec.stacks if found[stack.name])
        return replace(spec, stacks=stacks, dtype=_dtype_name(next(model.parameters()).dtype))

    def spec_of(self, config: Any) -> ModelSpec:
        """The architecture from a configuration alone; stacks without MoE layers are left out."""
        dense = any(len(stack.moe_layers) < stack.num_layers for stack in self.stacks(config))
        groups, top_groups = self.groups(config)
        return ModelSpec(
            family=self.model_type,
            num_experts=self.num_experts(config),
            top_k=self.top_k(config),
            capacity=self.capacity(config),
            groups=groups,
            top_groups=top_groups,
            vocab_size=config.vocab_size,
            dtype=_dtype_name(config.dtype),
            widths=self.widths(config, dense=dense),
            stacks=tuple(stack for stack in self.stacks(config) if stack.moe_layers),
        )

    @abstractmethod
    def stacks(self, config: Any) -> tuple[StackSpec, ...]:
        """All stacks of the model, those without MoE layers, too."""

    @abstractmethod
    def num_experts(self, config: Any) -> int:
        """E, routed experts of a layer."""

    @abstractmethod
    def top_k(self, config: Any) -> int:
        """K, routed experts of a token."""

    @abstractmethod
    def widths(self, config: Any, *, dense: bool) -> Widths:
        """The shapes; `dense` says whether some layer has no experts."""

    def capacity(self, config: Any) -> int | None:
        """Most tokens that an expert takes from one sequence; None where there is no such bound."""
        return None

    def groups(self, config: Any) -> tuple[int, int]:
        """(expert groups, groups that one token may choose from)."""
        return 1, 1

    def library_problem(self) -> str | None:
        """What is wrong with the installed transformers for this family, and what to do; None where nothing is."""
        return None

    def caveat(self, routers: list[Router]) -> str | None:
        """What a reader of the recording must know, in one sentence; None where there is nothing."""
        return None

    @abstractmethod
    def gate(self, router: Router) -> Gate:
        """The linear map of a router."""

    def scores(self, router: Router, logits: Tensor) -> Tensor:
        """[..., E] what the family ranks experts by, highest first, from logits [..., E]."""
        return logits

    @abstractmethod
    def watch(self, router: Router, keep: Callable[[Any], None]) -> RemovableHandle:
        """Add a hook that calls `keep` once a forward pass with what `select` needs, and that changes nothing."""

    @abstractmethod
    def select(self, router: Router, inputs: Tensor, kept: Any) -> Selected:
        """The model's selection from the block's input [B, S, d_model] and from what the hook kept."""

    def _router(self, name: str, block: nn.Module) -> Router:
        parts = name.split(".")
        layer = int(parts[parts.index(self.layers) + 1])
        return Router(stack=self._stack(parts), layer=layer, block=block, module=block.get_submodule(self.router))

    def _stack(self, parts: list[str]) -> str:
        return "decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKAdapter(Adapter):
    """Decoder-only models whose blocks call `experts(hidden_states, ids, weights)` on T flattened tokens."""

    experts: str = "num_local_experts"
    """Name of E in the configuration."""
    expert_width: str = "intermediate_size"
    """Name of a routed expert's inner width in the configuration."""

    def stacks(self, config: Any) -> tuple[StackSpec, ...]:
        """One stack, `decoder`."""
        return (stack_of("decoder", config.num_hidden_layers, partial(self.is_moe, config)),)

    def is_moe(self, config: Any, layer: int) -> bool:
        """Whether the layer has experts."""
        return True

    def num_experts(self, config: Any) -> int:
        """From the configuration's own name for it."""
        return int(getattr(config, self.experts))

    def top_k(self, config: Any) -> int:
        """The same name in all these families."""
        return int(config.num_experts_per_tok)

    def widths(self, config: Any, *, dense: bool) -> Widths:
        """Grouped-query attention and gated feed-forwards."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Widths(
            d_model=config.hidden_size,
            d_ff=getattr(config, self.expert_width),
            num_heads=config.num_attention_heads,
            d_kv=head,
            kv_width=2 * config.num_key_value_heads * head,
            gated=True,
            shared_d_ff=self.shared_width(config),
            dense_d_ff=config.intermediate_size if dense else 0,
        )

    def shared_width(self, config: Any) -> int:
        """Inner width of all shared experts of a layer together."""
        return 0

    def gate(self, router: Router) -> Gate:
        """The routers hold their parameters themselves and compute in the weights' dtype."""
        weight = router.module.get_parameter("weight")
        return Gate(weight=weight, bias=getattr(router.module, "bias", None), dtype=weight.dtype)

    def watch(self, router: Router, keep: Callable[[Any], None]) -> RemovableHandle:
        """The arguments of the experts are the selection that runs."""

        def before_experts(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, ids, weights = (*args, *kwargs.values())
            keep((ids, weights))

        experts = router.block.get_submodule("experts")
        return experts.register_forward_pre_hook(before_experts, with_kwargs=True)

    def select(self, router: Router, inputs: Tensor, kept: Any) -> Selected:
        """Ids and weights as the experts got them; these families drop nothing."""
        ids, weights = (column.reshape(*inputs.shape[:2], -1) for column in kept)
        return ids, weights, torch.zeros(inputs.shape[:2], dtype=torch.bool, device=ids.device)


def stack_of(name: str, layers: int, is_moe: Callable[[int], bool]) -> StackSpec:
    """A stack whose MoE layers follow a rule."""
    return StackSpec(name=name, num_layers=layers, moe_layers=tuple(filter(is_moe, range(layers))))


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")
