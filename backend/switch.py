"""Hugging Face Switch models: find the MoE layers of a stack and put something else in their experts' place.

The router stays the model's own module, so its choice, probability and per-sequence capacity are the model's, whatever
its version. Knows nothing about ranks. Shape letters: B sequences, S their padded length, D = d_model, N real tokens,
L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesim.backend.experts import ExpertShape
from moesim.backend.grouped import Activation
from moesim.traces import InputError, ModelSpec

Exchange = Callable[[int, "Routed"], torch.Tensor]
"""(MoE layer, its routed tokens) -> [N, D] the experts' output times the router's probability, zero where dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The N real tokens of a rank as the router of one layer left them."""

    x_ND: torch.Tensor
    ids_N: torch.Tensor
    """The chosen expert, also where it was over capacity."""
    dropped_N: torch.Tensor
    prob_N: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchStack:
    """One patched stack. Set `real` before a forward pass."""

    stack: nn.Module
    real: RealTokens
    weights_LE: list[list[torch.Tensor]]
    """[L][E] flat expert weights [P], in host memory."""
    shape: ExpertShape
    activation: Activation
    layers: tuple[int, ...]
    """Which layers of the stack hold experts."""

    @property
    def experts(self) -> int:
        """E."""
        return len(self.weights_LE[0])


@dataclass(slots=True)
class RealTokens:
    """Where the real tokens lie in the padded batch that is being computed: flat indices [N] into B x S."""

    index_N: torch.Tensor


class ExpertParallelMLP(nn.Module):
    """Stands where the model's sparse MLP stood: same router, the experts are wherever `exchange` finds them."""

    def __init__(self, layer: int, router: nn.Module, real: RealTokens, exchange: Exchange) -> None:
        super().__init__()
        self.router = router
        self._layer, self._real, self._exchange = layer, real, exchange

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] zero at padding and at tokens over capacity, which take the residual path only."""
        mask_BSE, prob_BS1, logits_BSE = self.router(hidden_BSD)
        # The mask forgets what an over-full expert's tokens had chosen; the router's own arithmetic says it again.
        chosen_BS = torch.softmax(logits_BSE, dim=-1).to(hidden_BSD.dtype).argmax(dim=-1)
        index_N = self._real.index_N
        flat = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        routed = Routed(
            x_ND=flat[index_N],
            ids_N=chosen_BS.reshape(-1)[index_N],
            dropped_N=mask_BSE.sum(dim=-1).reshape(-1)[index_N] == 0,
            prob_N=prob_BS1.reshape(-1)[index_N],
        )
        out = torch.zeros_like(flat)
        out[index_N] = self._exchange(self._layer, routed)
        return out.view(hidden_BSD.shape)


def load_model(folder: Path, dtype: str) -> Any:
    """The Switch model in `folder`, in host memory, ready for inference.

    Raises InputError where it is not there or is another kind of model.
    """
    from transformers import SwitchTransformersForConditionalGeneration
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no model here (config.json is missing)")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = SwitchTransformersForConditionalGeneration.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), local_files_only=True, weights_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the model cannot be loaded ({error})") from None
    return model.eval()


def sparse_layers(stack: Any) -> dict[int, Any]:
    """Index in the stack, and the feed-forward module whose `mlp` holds router and experts, of every MoE layer."""
    return {i: block.layer[-1] for i, block in enumerate(stack.block) if block.layer[-1].is_sparse}


def patch(stack: Any, exchange: Exchange) -> SwitchStack:
    """Replace the sparse MLPs of `stack` in place and take their experts' weights out of it.

    Raises InputError where the stack has no MoE layer.
    """
    layers = sparse_layers(stack)
    if not layers:
        name = "decoder" if stack.is_decoder else "encoder"
        raise InputError(f"the model has no MoE layers in its {name}")
    real = RealTokens(torch.empty(0, dtype=torch.long))
    expert = next(iter(layers.values())).mlp.experts["expert_0"]
    d_ff, d_model = expert.wi.weight.shape
    shape = ExpertShape(d_model=d_model, d_ff=d_ff, dtype=expert.wi.weight.dtype)
    weights = []
    for layer, feed_forward in enumerate(layers.values()):
        mlp = feed_forward.mlp
        weights.append([shape.flatten(e.wi.weight.detach(), e.wo.weight.detach()) for e in mlp.experts.values()])
        feed_forward.mlp = ExpertParallelMLP(layer, mlp.router, real, exchange)
    return SwitchStack(
        stack=stack, real=real, weights_LE=weights, shape=shape, activation=expert.act, layers=tuple(layers)
    )


def check_trace(spec: ModelSpec, stack_name: str, patched: SwitchStack, *, replay: bool) -> None:
    """Raise InputError naming the first difference between a recording and the model that is to run it, or on whose
    layers its routing is to be forced: these need as many experts and MoE layers, and nothing else."""
    recorded = spec.stack(stack_name)
    model: Any = patched.stack
    pairs: dict[str, tuple[Any, Any]] = {"experts": (spec.num_experts, patched.experts), "top-k": (spec.top_k, 1)}
    if replay:
        pairs["MoE layers"] = (len(recorded.moe_layers), len(patched.layers))
    else:
        pairs |= {
            "d_model": (spec.sized().d_model, patched.shape.d_model),
            "d_ff": (spec.sized().d_ff, patched.shape.d_ff),
            "layers": (recorded.num_layers, len(model.block)),
            "MoE layers": (recorded.moe_layers, patched.layers),
            "vocabulary": (spec.vocab_size, model.embed_tokens.num_embeddings),
        }
    for what, (in_trace, in_model) in pairs.items():
        if in_trace != in_model:
            raise InputError(f"the trace was recorded with another model: {what} {in_trace}, the model has {in_model}")
