"""SiDA-MoE's hash function: an LSTM over token embeddings, sparse attention over the sequence, a head per layer.

Source: SiDA-MoE (arXiv 2310.18859) and its published code. Deviations: the embedding is learned from the fitted
requests, the paper takes the model's own; widths are smaller; the loss is the cross entropy alone, because traces hold
ids and not the router's softmax, whose 30 largest values the paper distils as well; attention scores are divided by the
square root of the width; outside of encoders a token sees only those before it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moesim.predictors.learned.sequence import Mixer, SequencePredictor
from moesim.predictors.learned.training import Budget


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """The point of the simplex that is nearest to `scores`, over the last dimension; most entries are exactly 0.

    Source: Martins and Astudillo, ICML 2016, algorithm 1. Scores of -inf stay out, one must be finite.
    """
    ordered = scores.sort(dim=-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    sums = ordered.cumsum(dim=-1)
    support = (1 + count * ordered > sums).sum(dim=-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


class SparseLstm(Mixer):
    """An LSTM whose outputs attend to each other, beside a linear path around both."""

    def __init__(self, width: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.lstm = nn.LSTM(width, width, depth, batch_first=True)
        self.around = nn.Linear(width, width)

    def mixed(self, x_BSW: torch.Tensor, real_BS: torch.Tensor) -> torch.Tensor:
        """See the class."""
        state_BSW = self.lstm(x_BSW)[0]
        scores_BSS = state_BSW @ state_BSW.transpose(1, 2) / math.sqrt(x_BSW.shape[-1])
        seen_BSS = real_BS[:, None].expand_as(scores_BSS)
        if self.causal:
            seen_BSS = seen_BSS.tril()
        weights_BSS = sparsemax(scores_BSS.masked_fill(~seen_BSS, -math.inf))
        mixed_BSW: torch.Tensor = weights_BSS @ state_BSW + self.around(x_BSW)
        return mixed_BSW


class Sida(SequencePredictor):
    """SiDA-MoE's LSTM with sparse attention, see the module."""

    name = "sida"
    budget = Budget(layer_tokens=5_000_000, learning_rate=4e-3, batch_tokens=2048)

    def mixer(self) -> Mixer:
        """LSTM and sparse attention."""
        return SparseLstm(self.settings.width, self.settings.depth, bool(self.sizes["causal"]))
