"""Expert weights in slots, and the feed-forward of experts over them.

One expert is one flat row of weights, so that a copy is one message; the matrices are views of it. What should be in
which slot, and what may compute, is the Residency's; this only knows what is really there. Shape letters: S slots,
P weights of one expert, N tokens, D = d_model, F = d_ff, X experts with tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from moesim.backend.grouped import Activation, Groups, SlotWeights, activation_name, grouped_mlp

Key = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Shape of one two-matrix expert: wi [F, D], then wo [D, F], in one row of P = 2 D F weights."""

    d_model: int
    d_ff: int
    dtype: torch.dtype

    @property
    def params(self) -> int:
        """P, the weights of one expert."""
        return 2 * self.d_model * self.d_ff

    @property
    def bytes(self) -> int:
        """Bytes of one expert."""
        return self.params * self.dtype.itemsize

    def flatten(self, wi_FD: torch.Tensor, wo_DF: torch.Tensor) -> torch.Tensor:
        """[P] both matrices in one row."""
        return torch.cat([wi_FD.reshape(-1), wo_DF.reshape(-1)]).to(self.dtype)


class ExpertSlots:
    """The slots of one rank, [S, P] in one piece of its device's memory."""

    def __init__(self, slots: int, shape: ExpertShape, activation: Activation | str, device: torch.device) -> None:
        self.shape = shape
        self.rows_SP = torch.zeros((slots, shape.params), dtype=shape.dtype, device=device)
        self.weights = SlotWeights.of_rows(
            self.rows_SP,
            d_model=shape.d_model,
            d_ff=shape.d_ff,
            activation=activation_name(activation),
            gated=False,
        )
        self._slot_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    def write(self, slot: int, key: Key, row_P: torch.Tensor) -> None:
        """Fill a slot with an expert; on a GPU in stream order, so after what still computes from it."""
        self.claim(slot, key).copy_(row_P)

    def claim(self, slot: int, key: Key) -> torch.Tensor:
        """[P] the slot's row, which the caller fills with this expert; what was there is forgotten."""
        before = self._key_of.get(slot)
        if before is not None and self._slot_of.get(before) == slot:
            del self._slot_of[before]
        self._slot_of[key], self._key_of[slot] = slot, key
        return self.rows_SP[slot]

    def slot(self, key: Key) -> int:
        """Where the expert is: until something is written over it, also when its slot has been promised to another."""
        return self._slot_of[key]

    def snapshot(self, key: Key) -> torch.Tensor:
        """[P] a copy of the expert's weights."""
        return self.rows_SP[self.slot(key)].clone()

    def staging(self) -> torch.Tensor:
        """[P] a buffer that a copy can arrive in."""
        return torch.empty(self.shape.params, dtype=self.shape.dtype, device=self.rows_SP.device)

    def forward(self, x_ND: torch.Tensor, slot_X: list[int], tokens_X: list[int]) -> torch.Tensor:
        """[N, D] output of each token's expert; tokens lie expert by expert, `tokens_X[i]` for slot `slot_X[i]`."""
        if not slot_X:
            return torch.empty_like(x_ND)
        return grouped_mlp(x_ND, self._in_order(len(x_ND), slot_X, tokens_X), self.weights)

    def apply(self, x_ND: torch.Tensor, group: torch.Tensor, slot_X: list[int], tokens_X: list[int]) -> torch.Tensor:
        """[N, D] as `forward`, for tokens in any order: `group` [N] is the permutation that sorts them by expert."""
        y_ND = torch.empty_like(x_ND)
        y_ND[group] = self.forward(x_ND[group], slot_X, tokens_X)
        return y_ND

    def _in_order(self, tokens: int, slot_X: list[int], tokens_X: list[int]) -> Groups:
        """Groups of tokens that lie in their order already; sizes and slots cross to the device in one copy."""
        device = self.rows_SP.device
        ends = [0, *itertools.accumulate(tokens_X)]
        cut = -(-len(ends) // 4) * 4  # 16 bytes: kernels are compiled once more for what is aligned otherwise
        told = torch.tensor([*ends, *[0] * (cut - len(ends)), *slot_X], dtype=torch.int32)
        # From pinned memory the copy is asynchronous; torch keeps the block until the stream is done with it.
        there = told.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else told
        order = torch.arange(tokens, device=device)
        return Groups(order_M=order, offsets_X1=there[: len(ends)], slot_X=there[cut:], every_slot=False)
