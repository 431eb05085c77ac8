"""What `models.py` measures of the Hugging Face model as shipped: `generate`, its bare decode loop, its routing.

Shape letters: B sequences, S their length, K decoder positions, D = d_model, E experts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timing import Timing
from transformers import DynamicCache, EncoderDecoderCache


def generate(model: Any, ids_BS: torch.Tensor, tokens: int, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
    """[B, 1 + tokens] by the library, greedily."""
    mask = {} if mask_BS is None else {"attention_mask": mask_BS}
    out: torch.Tensor = model.generate(ids_BS, do_sample=False, max_new_tokens=tokens, **mask)
    return out


def per_token(whole: Timing, first: Timing, steps: int) -> dict[str, float]:
    """What `generate` takes for each of `steps` tokens after the first, by difference; extremes by the extremes."""
    return {
        "median_s": (whole.median_s - first.median_s) / steps,
        "min_s": (whole.min_s - first.max_s) / steps,
        "max_s": (whole.max_s - first.min_s) / steps,
        "repeats": whole.repeats,
    }


class Loop:
    """The library's decoder and its own cache in the barest greedy loop, without what `generate` does around it."""

    def __init__(self, model: Any, ids_BS: torch.Tensor) -> None:
        self._model, self._ids_BS = model, ids_BS
        # transformers 5.2x renamed the argument.
        names = inspect.signature(model.decoder.forward).parameters
        self._name = "cache" if "cache" in names else "past_key_values"

    def begin(self) -> None:
        self._encoded_BSD = self._model.encoder(input_ids=self._ids_BS).last_hidden_state
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._tokens_B1 = torch.zeros_like(self._ids_BS[:, :1])

    def step(self) -> None:
        out = self._model.decoder(
            input_ids=self._tokens_B1,
            encoder_hidden_states=self._encoded_BSD,
            use_cache=True,
            **{self._name: self._cache},
        )
        scaled_B1D = out.last_hidden_state * self._model.model_dim**-0.5
        self._tokens_B1 = self._model.lm_head(scaled_B1D).argmax(dim=-1)


def load(stack: Any, ids_BS: torch.Tensor) -> list[dict[str, float]]:
    """Of every MoE layer: tokens of its busiest expert over the mean, experts without any, and the dropped share."""
    masks: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, said: masks.append(said[0].sum(dim=(0, 1))))
        for module in stack.modules()
        if type(module).__name__ == "SwitchTransformersTop1Router"
    ]
    stack(input_ids=ids_BS)
    for hook in hooks:
        hook.remove()
    rows = []
    for load_E in masks:
        kept = int(load_E.sum())
        rows.append(
            {
                "max_over_mean": float(load_E.max()) * len(load_E) / kept,
                "unused_experts": int((load_E == 0).sum()),
                "dropped_share": 1 - kept / ids_BS.numel(),
            }
        )
    return rows
