"""Offloading for real, on one device, under a Hugging Face Switch model: whoever calls it.

An `Offload` takes the experts out of one stack and stands in their place. Every forward pass of the stack is a step of
the driver that the simulator uses, too: `model(...)`, `generate`, a scenario's step. Knows nothing about files or
commands. Shape letters: B sequences, S positions, N real tokens, D = d_model, L MoE layers.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.offload_core import OffloadedExperts, Options
from moesim.backend.switch import Routed, patch, sparse_layers
from moesim.traces import StepTokens


class Offload(OffloadedExperts):
    """The experts of one stack, offloaded. `start` a policy, call the model, then `finish`. Without a policy the model
    computes what it always did, its experts coming from host memory for every layer.

    Raises InputError where the stack has no MoE layers, or its experts cannot be run.
    """

    def __init__(
        self,
        model: Any,
        stack: Literal["encoder", "decoder"],
        device: torch.device,
        *,
        asynchronous: bool = False,
        poison: bool = False,
        copy_dtype: str | None = None,
        kernel: str = "auto",
    ) -> None:
        module = getattr(model, stack)
        routers = [layer.mlp.router for layer in sparse_layers(module).values()]
        options = Options(asynchronous=asynchronous, poison=poison, copy_dtype=copy_dtype, kernel=kernel)
        super().__init__(patch(module, self._exchange), routers, device, options)
        self.requests: NDArray[np.integer] | None = None
        """[B] numbers of the requests in the batches to come, ascending; None: 0, 1, 2, ..."""
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def _before(self, _module: Any, _args: Any, given: dict[str, Any]) -> None:
        tokens, sequence_N = self._tokens(given)
        if self.policy is not None:
            self.begin(tokens, sequence_N)

    def _after(self, _module: Any, _args: Any, _output: Any) -> None:
        if self.policy is not None:
            self.end()

    def _tokens(self, given: dict[str, Any]) -> tuple[StepTokens, torch.Tensor]:
        """The real tokens of a batch, sequence by sequence, and the sequence of each; notes where they lie in it."""
        ids_BS, mask_BX = given["input_ids"], given.get("attention_mask")
        # transformers renamed it.
        past = given["cache"] if given.get("cache") is not None else given.get("past_key_values")
        begin, (B, S) = int(past.get_seq_length()) if past is not None else 0, ids_BS.shape
        # With a cache the mask is as long as all that has been read; where there is none, everything is real.
        real_BS = torch.ones_like(ids_BS) if mask_BX is None else mask_BX[:, -S:].long()
        place_BS = begin + torch.arange(S, device=ids_BS.device).expand(B, S)
        index_N = real_BS.reshape(-1).nonzero().reshape(-1)
        self.patched.real.index_N = index_N
        sequence_N = index_N // S
        request_B = np.arange(B) if self.requests is None else self.requests
        tokens = StepTokens(
            request=request_B[sequence_N.cpu().numpy()].astype(np.int32),
            position=place_BS.reshape(-1)[index_N].cpu().numpy().astype(np.int32),
            token_id=ids_BS.reshape(-1)[index_N].cpu().numpy().astype(np.int32),
        )
        return tokens, sequence_N

    def _exchange(self, layer: int, routed: Routed) -> torch.Tensor:
        """[N, D] what stands in the place of the model's experts."""
        if self.policy is None:
            return self.directly(layer, routed)
        return self.compute(layer, routed, self.ask(routed))
