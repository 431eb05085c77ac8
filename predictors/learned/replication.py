"""Predictive replication's hash function: simple recurrent units over token embeddings, a head per layer.

Source: Fast MoE Inference via Predictive Prefetching and Expert Replication (arXiv 2605.11537); the unit is from Lei et
al., Simple Recurrent Units for Highly Parallelizable Recurrence (EMNLP 2018). Deviations: as for `sida`, the
embedding is learned and the loss is the cross entropy alone (the paper: L1 to the 30 largest values of the router's
softmax + 0.005 cross entropy); widths are smaller; the highway path is not scaled.
"""

from __future__ import annotations

import torch
from torch import nn

from moesim.predictors.learned.sequence import Mixer, SequencePredictor
from moesim.predictors.learned.training import Budget


class Sru(nn.Module):
    """One layer. A state depends on the one before element by element, so all matrices run over all positions at once.

    f_t = sigmoid(U_f x_t + v_f c_{t-1} + b_f)       c_t = f_t c_{t-1} + (1 - f_t) U x_t
    r_t = sigmoid(U_r x_t + v_r c_{t-1} + b_r)       h_t = r_t c_t + (1 - r_t) x_t
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.recurrent_2W = nn.Parameter(torch.empty(2, width))

    def outputs(self, x_BSW: torch.Tensor) -> torch.Tensor:
        """[B, S, W] h of every position, from a state of 0."""
        new_BSW, forget_BSW, reset_BSW = self.inputs(x_BSW).chunk(3, dim=-1)
        state_BW = torch.zeros_like(x_BSW[:, 0])
        states = [state_BW]
        for new_BW, forget_BW in zip(new_BSW.unbind(1), forget_BSW.unbind(1), strict=True):
            keep_BW = torch.sigmoid(forget_BW + self.recurrent_2W[0] * state_BW)
            state_BW = torch.lerp(new_BW, state_BW, keep_BW)
            states.append(state_BW)
        before_BSW, now_BSW = torch.stack(states[:-1], dim=1), torch.stack(states[1:], dim=1)
        return torch.lerp(x_BSW, now_BSW, torch.sigmoid(reset_BSW + self.recurrent_2W[1] * before_BSW))


class SruStack(Mixer):
    """Layers of simple recurrent units; a token sees those before it, in encoders too, as in the paper."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Sru(width) for _ in range(depth)])

    def mixed(self, x_BSW: torch.Tensor, real_BS: torch.Tensor) -> torch.Tensor:
        """See the class."""
        for layer in self.layers:
            assert isinstance(layer, Sru)
            x_BSW = layer.outputs(x_BSW)
        return x_BSW


class Replication(SequencePredictor):
    """The predictor of predictive replication, see the module."""

    name = "predictive-replication"
    budget = Budget(layer_tokens=5_000_000, learning_rate=4e-3, batch_tokens=2048)

    def mixer(self) -> Mixer:
        """Simple recurrent units."""
        return SruStack(self.settings.width, self.settings.depth)
