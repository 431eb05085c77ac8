"""Hooks on the routers of a Hugging Face model: what each router really selected, without changing what it computes.

The adapters (moesim.traces.adapters) say where the routers are and how to read their selection; `RouterRecorder` does
the rest. Knows nothing about text, generation or files. Shape letters: B sequences, S positions, E experts, K experts
per token, D lookahead distances, M lookahead width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesim.traces.adapters import adapter_of
from moesim.traces.errors import InputError
from moesim.traces.gates import Gates
from moesim.traces.tokens import id_dtype

LOOKAHEAD_WIDTH = 4
"""M at least; models that choose more experts a token are asked for as many."""
HALF_MAX = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the routers of one stack selected in one forward pass."""

    ids: np.ndarray[Any, np.dtype[Any]]
    """[B, S, L, K] expert ids, largest weight first; where the token was dropped, the expert that was full."""
    weights: np.ndarray[Any, np.dtype[np.float16]]
    """[B, S, L, K] gate weights as the model applied them."""
    dropped: np.ndarray[Any, np.dtype[np.bool_]]
    """[B, S, L] True where none of the token's experts ran."""
    lookahead: np.ndarray[Any, np.dtype[Any]] | None
    """[B, S, L, D, M]."""
    router_input: np.ndarray[Any, np.dtype[np.float16]] | None
    """[B, S, L, d_model] what the routers were given, rounded to float16."""


class RouterRecorder:
    """Keeps what every router selects while the `with` block runs.

    The hooks only keep references and return None, so the model computes what it would compute anyway; the work is done
    in `take`. `lookahead` is D, how many of the following gates are asked what they think of a layer's router input;
    `router_input` keeps these inputs themselves.
    Raises InputError where the model has no MoE layer of a known family.
    """

    def __init__(self, model: nn.Module, *, lookahead: int = 0, router_input: bool = False) -> None:
        if lookahead < 0:
            raise InputError(f"lookahead must not be negative, got {lookahead}")
        self.adapter, self.routers = adapter_of(model)
        self.spec = self.adapter.spec(model, self.routers)
        self.lookahead, self.router_input = lookahead, router_input
        self._inputs: list[list[Tensor]] = [[] for _ in self.routers]
        self._kept: list[list[Any]] = [[] for _ in self.routers]
        self._hooks: list[Any] = []
        self._gates = [self._following_gates(i) for i in range(len(self.routers))]

    def __enter__(self) -> RouterRecorder:
        for inputs, kept, router in zip(self._inputs, self._kept, self.routers, strict=True):
            self._hooks.append(router.block.register_forward_pre_hook(_keep_input(inputs)))
            self._hooks.append(self.adapter.watch(router, kept.append))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def take(self, stack: str) -> list[Selection]:
        """Everything that `stack` routed since the last call, one `Selection` a forward pass, oldest first.

        Raises InputError where a layer ran without its selection being seen, as in a fused kernel.
        """
        chosen = [i for i, router in enumerate(self.routers) if router.stack == stack]
        for i in chosen:
            if len(self._inputs[i]) != len(self._kept[i]):
                raise InputError(
                    f"{self.routers[i].stack} layer {self.routers[i].layer} ran {len(self._inputs[i])} times, but its "
                    f"selection was seen {len(self._kept[i])} times: a fused kernel hides it; load the model without"
                )
        passes = list(zip(*(zip(self._inputs[i], self._kept[i], strict=True) for i in chosen), strict=True))
        for i in chosen:
            self._inputs[i].clear()
            self._kept[i].clear()
        with torch.inference_mode():
            return [self._selection(chosen, calls) for calls in passes]

    def discard(self) -> None:
        """Forget what was routed so far (warm-up)."""
        for calls in (*self._inputs, *self._kept):
            calls.clear()

    def _selection(self, chosen: list[int], calls: tuple[tuple[Tensor, Any], ...]) -> Selection:
        parts = [self.adapter.select(self.routers[i], *call) for i, call in zip(chosen, calls, strict=True)]
        ids, weights, dropped = (torch.stack(column, dim=2).cpu() for column in zip(*parts, strict=True))
        small = id_dtype(self.spec.num_experts)
        ahead = None
        if self.lookahead:
            told = [self._ask_ahead(i, call[0]) for i, call in zip(chosen, calls, strict=True)]
            ahead = torch.stack(told, dim=2).cpu().numpy().astype(small)
        given = None
        if self.router_input:
            inputs = torch.stack([call[0] for call in calls], dim=2).float().clamp(-HALF_MAX, HALF_MAX)
            given = inputs.half().cpu().numpy()
        return Selection(
            ids=ids.numpy().astype(small),
            weights=weights.detach().float().numpy().astype(np.float16),
            dropped=dropped.numpy(),
            lookahead=ahead,
            router_input=given,
        )

    def gates(self) -> dict[str, Gates]:
        """The routers' own weights, by stack."""
        found = {}
        for stack in self.spec.stacks:
            gates = [self.adapter.gate(router) for router in self.routers if router.stack == stack.name]
            weight = torch.stack([gate.weight.detach().float() for gate in gates])
            bias = torch.zeros(weight.shape[:2])
            for row, gate in zip(bias, gates, strict=True):
                if gate.bias is not None:
                    row.copy_(gate.bias.detach())
            found[stack.name] = Gates(weight=weight.cpu().numpy(), bias=bias.numpy())
        return found

    def _following(self, i: int) -> list[int]:
        """The next at most D routers of the same stack."""
        after = range(i + 1, min(i + 1 + self.lookahead, len(self.routers)))
        return [j for j in after if self.routers[j].stack == self.routers[i].stack]

    def _following_gates(self, i: int) -> tuple[Tensor, Tensor | None] | None:
        """Weights [n * E, d_model] and biases [n * E] of the next n <= D gates of the stack, one under the other."""
        gates = [self.adapter.gate(self.routers[j]) for j in self._following(i)]
        if not gates:
            return None
        weight = torch.cat([gate.weight.detach().to(gate.dtype) for gate in gates])
        biases = [gate.bias.detach().to(gate.dtype) for gate in gates if gate.bias is not None]
        return weight, torch.cat(biases) if biases else None

    def _ask_ahead(self, i: int, inputs: Tensor) -> Tensor:
        """[B, S, D, M] experts that the following routers rank highest for this input; zeros past the last layer."""
        E = self.spec.num_experts
        width = min(max(LOOKAHEAD_WIDTH, self.spec.top_k), E)
        told = torch.zeros(*inputs.shape[:2], self.lookahead, width, dtype=torch.long, device=inputs.device)
        gates = self._gates[i]
        if gates is not None:
            weight, bias = gates
            logits = nn.functional.linear(inputs.to(weight.dtype), weight, bias).reshape(*inputs.shape[:2], -1, E)
            for distance, j in enumerate(self._following(i)):
                scores = self.adapter.scores(self.routers[j], logits[:, :, distance])
                told[:, :, distance] = scores.topk(width, dim=-1).indices
        return told


def _keep_input(calls: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before_block(_module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append(args[0])

    return before_block


__all__ = ["LOOKAHEAD_WIDTH", "RouterRecorder", "Selection", "adapter_of"]
