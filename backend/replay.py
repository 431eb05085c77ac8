"""Recorded routing, forced onto the layers of a model: kernels and transfers are real, the choice is the recording's.

The router runs all the same, and gives the probabilities; results of such runs are labelled `routing: "replay"`. Shape
letters: T recorded tokens, L MoE layers of the stack, K experts a token, E experts, N tokens of a forward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moesim.traces import InputError


class Replay:
    """The recorded experts of one stack, and which recorded tokens the next forward pass holds.

    `select` keeps the place of its indices in memory while their number stays the same, so that a captured CUDA graph
    reads those of its replay.
    """

    def __init__(
        self,
        ids_TLK: np.ndarray[Any, Any] | torch.Tensor,
        experts: int,
        *,
        dropped_TL: np.ndarray[Any, Any] | torch.Tensor | None = None,
        stack: str = "encoder",
        device: str | torch.device = "cpu",
    ) -> None:
        """`dropped_TL`: tokens that no expert computed. Raises InputError where ids are no experts of the model."""
        ids = torch.as_tensor(np.asarray(ids_TLK).astype(np.int64))
        if ids.ndim != 3 or not len(ids):
            raise InputError(f"routing to replay has to be [tokens, layers, experts a token], not {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= experts:
            raise InputError(f"the routing names expert {int(ids.max())}, the model has {experts}")
        if dropped_TL is not None:
            ids = ids.masked_fill(torch.as_tensor(np.asarray(dropped_TL).astype(bool))[..., None], experts)
        self.tokens, self.layers, self.top_k = ids.shape
        self.experts, self.stack = experts, stack
        nobody = torch.full((1, self.layers, self.top_k), experts)
        self._table = torch.cat([ids, nobody]).to(torch.int32).to(device)
        self._index_N: torch.Tensor | None = None

    def select(self, index_N: torch.Tensor) -> None:
        """Recorded token of every place of the next pass, row by row of its batch; -1 for padding: no expert."""
        index_N = index_N.reshape(-1).to(self._table.device, torch.int64).remainder(self.tokens + 1)
        if self._index_N is not None and self._index_N.shape == index_N.shape:
            self._index_N.copy_(index_N)
        else:
            self._index_N = index_N

    def ids(self, layer: int, tokens: int) -> torch.Tensor:
        """[N, K] int64 experts of the selected tokens, E for none. Raises InputError unless `tokens` were selected."""
        if self._index_N is None or len(self._index_N) != tokens:
            selected = 0 if self._index_N is None else len(self._index_N)
            raise InputError(f"routing to replay was selected for {selected} tokens, the batch has {tokens}")
        return self._table[:, layer].index_select(0, self._index_N).to(torch.int64)
