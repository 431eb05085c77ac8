"""Pieces of nets that several families use: vocabulary ids and routed experts as vectors, a head for each layer.

Shape letters: N tokens, L layers, E experts, K experts per token, H the last H layers, V fitted vocabulary ids, W
width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

HIDDEN = 0.05
"""Share of the tokens that training takes for unknown, so that there is something to say of those that are."""


class Vocabulary(nn.Module):
    """Vocabulary ids as vectors; ids that were not fitted share one."""

    known_V: torch.Tensor

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens + 1, width)
        self.register_buffer("known_V", torch.empty(tokens, dtype=torch.int64))

    def learn(self, ids_T: NDArray[np.int32]) -> None:
        """Take the ids of the fitted requests, as many different ones as there is room for."""
        self.known_V.copy_(torch.from_numpy(np.unique(ids_T).astype(np.int64)))

    def rows(self, ids_N: torch.Tensor) -> torch.Tensor:
        """[N] the row of each id, the last one where it was not fitted."""
        ids_N, unknown = ids_N.long(), len(self.known_V)
        if not unknown:
            return torch.full_like(ids_N, unknown)
        near_N = torch.searchsorted(self.known_V, ids_N).clamp(max=unknown - 1)
        return torch.where(self.known_V[near_N] == ids_N, near_N, unknown)

    def vectors(self, ids_N: torch.Tensor, noise: torch.Generator | None = None) -> torch.Tensor:
        """[N, W]; with `noise` some ids are taken for unknown."""
        row_N = self.rows(ids_N)
        if noise is not None:
            hidden_N = torch.rand(len(ids_N), generator=noise) < HIDDEN
            row_N = row_N.masked_fill(hidden_N.to(row_N.device), len(self.known_V))
        return self.table.weight[row_N]


class Routes(nn.Module):
    """The experts that a layer chose as a vector: the mean of theirs."""

    def __init__(self, layers: int, experts: int, width: int) -> None:
        super().__init__()
        self.table_LEW = nn.Parameter(torch.empty(layers, experts, width))

    def paths(self, ids_NLK: torch.Tensor) -> torch.Tensor:
        """[N, L, W] `chosen` of the first layers, as many as there are."""
        (N, layers, K), (_, E, W) = ids_NLK.shape, self.table_LEW.shape
        first_L1 = torch.arange(layers, device=ids_NLK.device)[:, None] * E
        rows_XK = (ids_NLK.long() + first_L1).view(-1, K)
        flat_XW: torch.Tensor = nn.functional.embedding_bag(rows_XK, self.table_LEW.flatten(0, 1), mode="mean")
        return flat_XW.view(N, layers, W)

    def chosen(self, layer: int, ids_NK: torch.Tensor) -> torch.Tensor:
        """[N, W] of the experts that `layer` chose."""
        return nn.functional.embedding_bag(ids_NK.long(), self.table_LEW[layer], mode="mean")

    def expected(self, p_NHE: torch.Tensor) -> torch.Tensor:
        """[N, H, W] what `chosen` is expected to be in the last H layers, given probabilities."""
        return torch.einsum("nhe,hew->nhw", p_NHE, self.table_LEW[-p_NHE.shape[1] :])


class Heads(nn.Module):
    """A linear map to experts for each layer."""

    def __init__(self, layers: int, experts: int, width: int) -> None:
        super().__init__()
        self.weight_LEW = nn.Parameter(torch.empty(layers, experts, width))
        self.bias_LE = nn.Parameter(torch.empty(layers, experts))

    def logits(self, state_NHW: torch.Tensor) -> torch.Tensor:
        """[N, H, E] of the last H layers, each from a state of its own."""
        H = state_NHW.shape[1]
        return torch.einsum("nhw,hew->nhe", state_NHW, self.weight_LEW[-H:]) + self.bias_LE[-H:]

    def all_logits(self, state_NW: torch.Tensor) -> torch.Tensor:
        """[N, L, E] of all layers from one state."""
        return torch.einsum("nw,lew->nle", state_NW, self.weight_LEW) + self.bias_LE

    def one(self, layer: int, state_NW: torch.Tensor) -> torch.Tensor:
        """[N, E] of one layer."""
        return state_NW @ self.weight_LEW[layer].T + self.bias_LE[layer]
