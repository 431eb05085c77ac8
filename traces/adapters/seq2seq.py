"""Encoder-decoder families, whose routers enforce a capacity: Switch Transformers and NLLB-MoE.

Their experts get masks instead of ids, so the choice is read from what the router returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moesim.traces.adapters.base import Adapter, Gate, Router, Selected, stack_of
from moesim.traces.errors import InputError
from moesim.traces.spec import ModelSpec, StackSpec, Widths

BROKEN_SWITCH = ((5, 0), (5, 18))
"""transformers versions from, below: their Switch router returns its values in another order and drops no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqAdapter(Adapter):
    """What both families share: two stacks, a linear classifier as the gate, plain feed-forwards."""

    router: str = "router"

    def num_experts(self, config: Any) -> int:
        """The same name in both families."""
        return int(config.num_experts)

    def gate(self, router: Router) -> Gate:
        """A linear layer, used in the router's own dtype; with bfloat16 weights still float32."""
        classifier: Any = router.module.classifier
        return Gate(weight=classifier.weight, bias=classifier.bias, dtype=_router_dtype(router))

    def watch(self, router: Router, keep: Callable[[Any], None]) -> RemovableHandle:
        """What the router returns."""

        def after_router(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            keep(output)

        return router.module.register_forward_hook(after_router)

    def _stack(self, parts: list[str]) -> str:
        return "decoder" if "decoder" in parts else "encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchAdapter(Seq2SeqAdapter):
    """Switch Transformers: top-1 with a capacity per sequence (Fedus et al. 2021, section 2.1)."""

    layers: ClassVar[str] = "block"

    def spec_of(self, config: Any) -> ModelSpec:
        """`switch`, as traces have always called the family."""
        return replace(Adapter.spec_of(self, config), family="switch")

    def stacks(self, config: Any) -> tuple[StackSpec, ...]:
        """Every n-th layer of a stack is sparse, from the second on."""

        def is_moe(step: int, layer: int) -> bool:
            return step > 0 and (step == 1 or layer % step == 1)

        return (
            stack_of("encoder", config.num_layers, partial(is_moe, config.encoder_sparse_step)),
            stack_of("decoder", config.num_decoder_layers, partial(is_moe, config.decoder_sparse_step)),
        )

    def top_k(self, config: Any) -> int:
        """One expert."""
        return 1

    def capacity(self, config: Any) -> int | None:
        """Counted per sequence."""
        return int(config.expert_capacity)

    def widths(self, config: Any, *, dense: bool) -> Widths:
        """Experts and dense layers are equally wide."""
        return Widths(
            d_model=config.d_model,
            d_ff=config.d_ff,
            num_heads=config.num_heads,
            d_kv=config.d_kv,
            kv_width=2 * config.num_heads * config.d_kv,
            gated=False,
            dense_d_ff=config.d_ff if dense else 0,
        )

    def library_problem(self) -> str | None:
        """Some versions have a Switch router that is wrong."""
        installed = version("transformers")
        release = tuple(int(part) for part in installed.split(".")[:2])
        if not BROKEN_SWITCH[0] <= release < BROKEN_SWITCH[1]:
            return None
        return (
            f"transformers {installed} has a Switch router that mixes up its outputs and drops no token; install "
            "transformers>=5.18,<6"
        )

    def select(self, router: Router, inputs: Tensor, kept: Any) -> Selected:
        """The dispatch mask says which expert runs; for a dropped token it is empty, and the model's own rule (softmax
        in the router's dtype, cast to the input's, argmax) says which expert was full."""
        mask, weight, logits = kept
        probs = torch.softmax(logits, dim=-1, dtype=_router_dtype(router)).to(inputs.dtype)
        ids = probs.argmax(dim=-1, keepdim=True)
        runs = mask.gather(-1, ids).squeeze(-1).bool()
        if not torch.equal(runs, mask.sum(dim=-1).bool()):
            raise InputError(
                "the router's dispatch mask is not its own argmax: this version of transformers routes in a way that "
                "moesim does not know; install transformers>=5.18,<6"
            )
        return ids, weight, ~runs


@dataclass(frozen=True, slots=True, kw_only=True)
class NllbAdapter(Seq2SeqAdapter):
    """NLLB-MoE: top-2, with a capacity that is a share of the batch's tokens (arXiv 2207.04672, section 6.2).

    A choice that is over the capacity, or that the policy for second experts left out, has weight 0; a token counts as
    dropped where both have. The constant by which the model scales every expert's output at inference (1 - its token
    dropout) is not part of the weights.
    """

    def stacks(self, config: Any) -> tuple[StackSpec, ...]:
        """The last of every n layers is sparse."""

        def is_moe(step: int, layer: int) -> bool:
            return step > 0 and (layer + 1) % step == 0

        return (
            stack_of("encoder", config.encoder_layers, partial(is_moe, config.encoder_sparse_step)),
            stack_of("decoder", config.decoder_layers, partial(is_moe, config.decoder_sparse_step)),
        )

    def top_k(self, config: Any) -> int:
        """Two experts."""
        return 2

    def widths(self, config: Any, *, dense: bool) -> Widths:
        """Raises InputError where the two stacks have experts of different widths, which a trace cannot say."""
        if config.encoder_ffn_dim != config.decoder_ffn_dim:
            raise InputError("nllb-moe: encoder and decoder experts of different widths are not supported")
        return Widths(
            d_model=config.d_model,
            d_ff=config.encoder_ffn_dim,
            num_heads=config.encoder_attention_heads,
            d_kv=config.d_model // config.encoder_attention_heads,
            kv_width=2 * config.d_model,
            gated=False,
            dense_d_ff=config.encoder_ffn_dim if dense else 0,
        )

    def caveat(self, routers: list[Router]) -> str | None:
        """Route one token to the last expert alone: some versions of transformers then run another expert."""
        experts: Any = routers[0].block.experts
        last: Any = experts[f"expert_{experts.num_experts - 1}"]
        token = torch.ones(1, last.fc1.in_features, dtype=last.fc1.weight.dtype, device=last.fc1.weight.device)
        choice = torch.zeros(1, experts.num_experts, dtype=torch.long, device=token.device)
        choice[0, -1] = 1
        with torch.inference_mode():
            ran, expected = experts(token, choice, choice.to(token.dtype)), last(token)
        if torch.allclose(ran, expected * (1 - experts.moe_token_dropout), rtol=1e-2):
            return None
        return (
            f"transformers {version('transformers')} does not run the experts that the NLLB-MoE router selects, so the "
            "routing of all but the first MoE layer follows from wrong hidden states"
        )

    def select(self, router: Router, inputs: Tensor, kept: Any) -> Selected:
        """The router returns its combining weights [T, E], zero where nothing runs, so the two choices themselves are
        taken as the router takes them: the first before noise, the second from the logits that it returned."""
        _, combined, logits = kept
        clean: Tensor = router.module.classifier(inputs.flatten(0, 1).to(logits.dtype))  # type: ignore[operator] # a Linear
        first = clean.softmax(dim=-1, dtype=_router_dtype(router)).to(inputs.dtype).argmax(dim=-1, keepdim=True)
        second = logits.scatter(-1, first, float("-inf")).argmax(dim=-1, keepdim=True)
        ids = torch.cat([first, second], dim=-1)
        weights = combined.gather(-1, ids)
        shape = inputs.shape[:2]
        return ids.reshape(*shape, 2), weights.reshape(*shape, 2), (weights == 0).all(dim=-1).reshape(shape)


def _router_dtype(router: Router) -> torch.dtype:
    dtype = router.module.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


SWITCH = SwitchAdapter(model_type="switch_transformers", block="SwitchTransformersSparseMLP")
NLLB_MOE = NllbAdapter(model_type="nllb-moe", block="NllbMoeSparseMLP")
