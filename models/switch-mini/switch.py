"""The model: its configuration, a faster but equal way through the experts, and the routers' losses.

Training uses the library's own SwitchTransformersForConditionalGeneration. Only the loop over the experts is
replaced, because with 32 small experts that loop's bookkeeping costs more than their arithmetic;
`assert_equal_to_library` shows before training that both give the same numbers.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SwitchTransformersConfig as Config
from transformers import SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts as Experts,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)


def make_config(vocab_size: int, d_model: int, d_ff: int, layers: int, experts: int) -> Config:
    """Every layer sparse: the library derives a step of 1 from as many sparse layers as layers."""
    return Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=32,
        d_ff=d_ff,
        num_heads=max(1, d_model // 32),
        num_layers=layers,
        num_decoder_layers=layers,
        num_sparse_encoder_layers=layers,
        num_sparse_decoder_layers=layers,
        num_experts=experts,
        expert_capacity=64,
        router_jitter_noise=0.01,
        router_dtype="float32",
        router_z_loss_coef=0.001,
        router_aux_loss_coef=0.01,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )


def make_model(config: Config, seed: int) -> Any:
    """A fresh model. Its routers start near indifference; the library's standard normal starts decided."""
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(config)
    for _, router in routers(model):
        nn.init.normal_(router.classifier.weight, std=config.d_model**-0.5)
    return model


def routers(model: nn.Module) -> list[tuple[str, SwitchTransformersTop1Router]]:
    """The routers in the order in which tokens meet them, named like 'encoder.0'."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, SwitchTransformersTop1Router)]
    return [(f"{name.split('.')[0]}.{name.split('.')[2]}", module) for name, module in found]


def sorted_experts(self: Any, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
    """The experts' outputs as in the library, with the tokens sorted once instead of searched 32 times."""
    mask = selected[:, 0, :]
    kept = mask.sum(-1).nonzero()[:, 0]
    expert = mask[kept].argmax(-1)
    order = kept[expert.argsort(stable=True)]
    counts = torch.bincount(expert, minlength=self.num_experts).tolist()
    chunks = torch.split(hidden[order], counts)
    outputs = [self[f"expert_{i}"](chunk) for i, chunk in enumerate(chunks) if len(chunk)]
    return torch.zeros_like(hidden).index_copy(0, order, torch.cat(outputs) * weights[order])


def use_sorted_experts(model: nn.Module) -> None:
    """Send the model's tokens through `sorted_experts` from now on."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = types.MethodType(sorted_experts, module)


def assert_equal_to_library(model: Any, source: Tensor, target: Tensor) -> None:
    """Compare logits and gradients of the sorted experts with the library's, then keep the sorted ones."""
    results = []
    model.eval()
    for _ in range(2):
        model.zero_grad()
        logits = model(input_ids=source, decoder_input_ids=target).logits
        logits.logsumexp(-1).mean().backward()
        results.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        use_sorted_experts(model)
    model.zero_grad()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-5)


@dataclass
class Routed:
    """What one router did in one forward pass."""

    logits: Tensor  # (sequences, tokens, experts)
    kept: Tensor  # one-hot, zero where the expert's capacity was used up

    @property
    def expert(self) -> Tensor:
        return self.logits.argmax(-1)


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Routed]]:
    """Collect each router's decisions; the dictionary holds those of the latest forward pass."""
    seen: dict[str, Routed] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            seen[name] = Routed(output[2], output[0])

        return hook

    handles = [router.register_forward_hook(keep(name)) for name, router in routers(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def router_losses(seen: dict[str, Routed]) -> tuple[Tensor, Tensor]:
    """Load balance (Switch Transformers, eq. 4) and z-loss, each the mean over layers.

    Balance is asked of the whole mixed batch, not of each sequence as in the library: experts may then prefer
    a kind of text, which is the skew that a real server sees. (The library also skips both losses when every
    layer is sparse.)
    """
    balance, z_loss = [], []
    for routed in seen.values():
        logits = routed.logits.flatten(0, 1)
        experts = logits.shape[-1]
        share = torch.bincount(logits.argmax(-1), minlength=experts) / len(logits)
        balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())
        z_loss.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z_loss).mean()
