"""Hooks on the routers of a Hugging Face model: what each router really selected, without changing what it computes.

One small adapter a family says where the routers are and how to read their selection; `RouterRecorder` does the rest.
Knows nothing about text, generation or files. Shape letters: B sequences, S positions, E experts, K experts per token,
D lookahead distances, M lookahead width.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moesim.traces.errors import InputError
from moesim.traces.spec import ModelSpec, StackSpec, Widths
from moesim.traces.tokens import id_dtype

LOOKAHEAD_WIDTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A router module of the model and the place of its layer."""

    stack: str
    layer: int
    """Index of the layer in its stack, dense layers counted."""
    module: nn.Module
    gate: nn.Linear
    """The linear map from the router's input to E logits."""
    dtype: torch.dtype
    """What the router computes its logits in; with bfloat16 weights still float32 in Switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the routers of one stack selected in one forward pass."""

    ids: np.ndarray[Any, np.dtype[Any]]
    """[B, S, L, K] expert ids; where the token was dropped, the expert that was full."""
    weights: np.ndarray[Any, np.dtype[np.float16]]
    """[B, S, L, K] gate weights as the model applied them."""
    dropped: np.ndarray[Any, np.dtype[np.bool_]]
    """[B, S, L]."""
    lookahead: np.ndarray[Any, np.dtype[Any]] | None
    """[B, S, L, D, M]."""


class Adapter(Protocol):
    """What the recorder needs to know about a model family."""

    looks_for: str
    """Class name of the router modules, for messages."""

    def routers(self, model: nn.Module) -> list[Router]:
        """The routers in the order in which they run; empty where the model is not of this family."""

    def spec(self, model: nn.Module, routers: list[Router]) -> ModelSpec:
        """The architecture, read from the model's configuration."""

    def select(self, router: Router, inputs: Tensor, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [B, S, K], weights [B, S, K], dropped [B, S]) from what the router module returned."""


class SwitchAdapter:
    """Switch Transformers: top-1 with a capacity per sequence (Fedus et al. 2021, section 2.1)."""

    looks_for = "SwitchTransformersTop1Router"

    def routers(self, model: nn.Module) -> list[Router]:
        """Every `SwitchTransformersTop1Router`, encoder before decoder."""
        found = []
        for name, module in model.named_modules():
            if type(module).__name__ == self.looks_for:
                parts = name.split(".")
                stack = "decoder" if "decoder" in parts else "encoder"
                layer = int(parts[parts.index("block") + 1])
                gate = module.classifier
                assert isinstance(gate, nn.Linear)
                found.append(Router(stack=stack, layer=layer, module=module, gate=gate, dtype=module.dtype))
        return found

    def spec(self, model: nn.Module, routers: list[Router]) -> ModelSpec:
        """Read from `SwitchTransformersConfig` and from where the sparse layers really are."""
        config: Any = model.config
        layers = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
        stacks = [
            StackSpec(name=name, num_layers=total, moe_layers=tuple(r.layer for r in routers if r.stack == name))
            for name, total in layers.items()
            if any(r.stack == name for r in routers)
        ]
        return ModelSpec(
            family="switch",
            num_experts=config.num_experts,
            top_k=1,
            capacity=config.expert_capacity,
            groups=1,
            top_groups=1,
            vocab_size=config.vocab_size,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            widths=Widths(
                d_model=config.d_model,
                d_ff=config.d_ff,
                num_heads=config.num_heads,
                d_kv=config.d_kv,
                kv_width=2 * config.num_heads * config.d_kv,
                gated=False,
                dense_d_ff=config.d_ff,
            ),
            stacks=tuple(stacks),
        )

    def select(self, router: Router, inputs: Tensor, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The dispatch mask says which expert runs; for a dropped token it is empty, and the model's own rule (softmax
        in the router's dtype, cast to the input's, argmax) says which expert was full."""
        mask, weight, logits = output
        ids = torch.softmax(logits, dim=-1, dtype=router.dtype).to(inputs.dtype).argmax(dim=-1, keepdim=True)
        kept = mask.gather(-1, ids).squeeze(-1).bool()
        if not torch.equal(kept, mask.sum(dim=-1).bool()):
            raise InputError(
                "the router's dispatch mask is not its own argmax: this version of transformers routes in a way that "
                "moesim does not know; install transformers>=5.18,<6"
            )
        return ids, weight, ~kept


ADAPTERS: tuple[Adapter, ...] = (SwitchAdapter(),)
"""The known families; a new one is a class above and an entry here."""


def adapter_of(model: nn.Module) -> tuple[Adapter, list[Router]]:
    """The adapter that finds routers in `model`. Raises InputError saying what was looked for."""
    for adapter in ADAPTERS:
        routers = adapter.routers(model)
        if routers:
            return adapter, routers
    looked = ", ".join(adapter.looks_for for adapter in ADAPTERS)
    raise InputError(
        f"{type(model).__name__} has no MoE layers that moesim knows (looked for router modules: {looked})"
    )


class RouterRecorder:
    """Keeps what every router returns while the `with` block runs.

    The hooks only keep references and return None, so the model computes what it would compute anyway; the work is done
    in `take`. `lookahead` is D, how many of the following gates are asked what they think of a layer's router input.
    """

    def __init__(self, model: nn.Module, *, lookahead: int = 0) -> None:
        if lookahead < 0:
            raise InputError(f"lookahead must not be negative, got {lookahead}")
        self.adapter, self.routers = adapter_of(model)
        self.spec = self.adapter.spec(model, self.routers)
        self.lookahead = lookahead
        self._calls: list[list[tuple[Tensor, Any]]] = [[] for _ in self.routers]
        self._hooks: list[Any] = []
        self._gates = [self._following_gates(i) for i in range(len(self.routers))]

    def __enter__(self) -> RouterRecorder:
        for calls, router in zip(self._calls, self.routers, strict=True):
            self._hooks.append(router.module.register_forward_hook(_keep_in(calls)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take(self, stack: str) -> list[Selection]:
        """Everything that `stack` routed since the last call, one `Selection` a forward pass, oldest first."""
        chosen = [i for i, router in enumerate(self.routers) if router.stack == stack]
        passes = list(zip(*(self._calls[i] for i in chosen), strict=True))
        for i in chosen:
            self._calls[i].clear()
        with torch.inference_mode():
            return [self._selection(chosen, calls) for calls in passes]

    def discard(self) -> None:
        """Forget what was routed so far (warm-up)."""
        for calls in self._calls:
            calls.clear()

    def _selection(self, chosen: list[int], calls: tuple[tuple[Tensor, Any], ...]) -> Selection:
        parts = [self.adapter.select(self.routers[i], *call) for i, call in zip(chosen, calls, strict=True)]
        ids, weights, dropped = (torch.stack(column, dim=2).cpu() for column in zip(*parts, strict=True))
        small = id_dtype(self.spec.num_experts)
        ahead = None
        if self.lookahead:
            told = [self._ask_ahead(i, call[0]) for i, call in zip(chosen, calls, strict=True)]
            ahead = torch.stack(told, dim=2).cpu().numpy().astype(small)
        return Selection(
            ids=ids.numpy().astype(small),
            weights=weights.detach().float().numpy().astype(np.float16),
            dropped=dropped.numpy(),
            lookahead=ahead,
        )

    def _following_gates(self, i: int) -> tuple[Tensor, Tensor | None] | None:
        """Weights [n * E, d_model] and biases [n * E] of the next n <= D gates of the stack, one under the other."""
        following = [r for r in self.routers[i + 1 : i + 1 + self.lookahead] if r.stack == self.routers[i].stack]
        if not following:
            return None
        weight = torch.cat([r.gate.weight.detach().to(r.dtype) for r in following])
        if following[0].gate.bias is None:
            return weight, None
        return weight, torch.cat([r.gate.bias.detach().to(r.dtype) for r in following])

    def _ask_ahead(self, i: int, inputs: Tensor) -> Tensor:
        """[B, S, D, M] most probable experts of the following gates for this input; zeros past the last layer."""
        E = self.spec.num_experts
        width = min(LOOKAHEAD_WIDTH, E)
        told = torch.zeros(*inputs.shape[:2], self.lookahead, width, dtype=torch.long, device=inputs.device)
        gates = self._gates[i]
        if gates is not None:
            weight, bias = gates
            logits = nn.functional.linear(inputs.to(weight.dtype), weight, bias).reshape(*inputs.shape[:2], -1, E)
            told[:, :, : logits.shape[2]] = logits.topk(width, dim=-1).indices
        return told


def _keep_in(calls: list[tuple[Tensor, Any]]) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        calls.append((args[0], output))

    return hook
