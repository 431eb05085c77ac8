"""What a Switch router says, with less work: the same choice, probability and per-sequence capacity.

The model's own router builds one-hot tensors [B, S, E] of int64 and sums them along the sequence. Here the capacity
is counted by sorting the choices, and not at all where no sequence is longer than it. A router of another class, or one
that somebody listens to with hooks, is called as it is. For inference: no jitter. The device is not waited for.
Shape letters: B sequences of length S, M = B S, E experts, D = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesim.backend import kernels, routing_kernels
from moesim.backend.grouped import sort_key

LIGHT = "SwitchTransformersTop1Router"


class SwitchRouting:
    """The choices of one router. To be made when the weights have been loaded: it keeps what it derives from them."""

    def __init__(self, router: nn.Module) -> None:
        own: Any = router
        self._router = own
        # The router converts its classifier itself in its first call; done here, no call changes the model.
        classifier: nn.Linear = own.classifier.to(own.dtype)
        self._light = type(router).__name__ == LIGHT
        self._exact = _narrowed(classifier)

    def __call__(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S] the chosen expert (of any integer dtype), E where over capacity; [B, S] its probability, as x."""
        router = self._router
        if not self._light or router._forward_hooks or router._forward_pre_hooks:
            return self._heavy(x_BSD)
        weight_ED = self._exact.get(x_BSD.dtype)
        if weight_ED is None or not x_BSD.is_cuda:
            prob_BSE = torch.softmax(router.classifier(x_BSD.to(router.dtype)), dim=-1, dtype=router.dtype)
            prob_BS, ids_BS = prob_BSE.to(x_BSD.dtype).max(dim=-1)  # of equals the first, as argmax
        else:
            ids_BS, prob_BS = _narrow_choice(x_BSD, weight_ED)
        if x_BSD.shape[1] > router.expert_capacity:
            ids_BS = drop_over_capacity(ids_BS, router.num_experts, router.expert_capacity)
        return ids_BS, prob_BS

    def _heavy(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask_BSE, prob_BS1, logits_BSE = self._router(x_BSD)
        ids_BS = mask_BSE.argmax(dim=-1)
        return ids_BS.masked_fill(mask_BSE.sum(dim=-1) == 0, logits_BSE.shape[-1]), prob_BS1[..., 0]


def _narrow_choice(x_BSD: torch.Tensor, weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice and its probability on CUDA, from a weight in the dtype of x.

    Products of two bfloat16 or float16 numbers are exact in float32, and are summed in it: what the float32 product
    gives, but for the order of the sum, without a float32 copy of x and at the rate of tensor cores.
    """
    logits_ME = torch.mm(x_BSD.reshape(-1, x_BSD.shape[-1]), weight_ED.t(), out_dtype=torch.float32)
    if kernels.HAVE_TRITON:
        ids_M, prob_M = routing_kernels.choose(logits_ME, x_BSD.dtype)
    else:
        prob_M, ids_M = torch.softmax(logits_ME, dim=-1).to(x_BSD.dtype).max(dim=-1)
    return ids_M.view(x_BSD.shape[:-1]), prob_M.view(x_BSD.shape[:-1])


def _narrowed(classifier: nn.Linear) -> dict[torch.dtype, torch.Tensor]:
    """The float32 weight in each narrower dtype that holds it exactly, as one that was loaded in that dtype is."""
    weight_ED: torch.Tensor = classifier.weight.detach()
    if weight_ED.dtype != torch.float32 or weight_ED.is_meta or classifier.bias is not None:
        return {}
    narrow = {dtype: weight_ED.to(dtype) for dtype in (torch.bfloat16, torch.float16)}
    return {dtype: low for dtype, low in narrow.items() if torch.equal(low.to(weight_ED.dtype), weight_ED)}


def drop_over_capacity(ids_BS: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """[B, S] the same ids, `experts` where `capacity` tokens before it in the sequence had chosen the same expert."""
    batch, length = ids_BS.shape
    if kernels.HAVE_TRITON and ids_BS.is_cuda and length <= routing_kernels.MOST_LENGTH:
        return routing_kernels.drop(ids_BS.contiguous(), experts, capacity)
    ids_M = ids_BS.reshape(-1)
    # Stable, so what is sorted by expert is sorted by sequence and position within it.
    sorted_M, order_M = torch.sort(sort_key(ids_M, experts), stable=True)
    run_M = sorted_M.to(torch.int64) * batch + order_M // length
    rank_M = torch.arange(len(ids_M), device=ids_M.device) - torch.searchsorted(run_M, run_M)
    kept_M = sorted_M.to(torch.int64).masked_fill_(rank_M >= capacity, experts)
    return torch.empty_like(kept_M).index_copy_(0, order_M, kept_M).view(batch, length)


def one_hot(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """[..., E] int64, no one where the id is `experts`."""
    hot = torch.zeros((*ids.shape, experts + 1), dtype=torch.int64, device=ids.device)
    return hot.scatter_(-1, ids[..., None], 1)[..., :experts]
