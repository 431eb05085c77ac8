"""What one rank computes of each step: its own requests, padded to the right, and for a decoder their encoded text.

Made before anything is timed. Knows nothing about experts or policies. Shape letters: B requests of a rank in a step,
S their padded length, N real tokens, T tokens of the step, D = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.sim.scenario import Scenario
from moesim.traces import InputError, TokenTable, vocabulary_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """B token sequences with padding on the right."""

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    """1 at real tokens, 0 at padding."""

    def real(self) -> torch.Tensor:
        """[N] flat indices of the real tokens, sequence by sequence."""
        return self.mask_BS.reshape(-1).nonzero().reshape(-1)

    def to(self, device: torch.device) -> Padded:
        """The same on another device."""
        return Padded(ids_BS=self.ids_BS.to(device), mask_BS=self.mask_BS.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part of a step; `batch` is None where it has no request."""

    tokens: int
    """N."""
    batch: Padded | None
    real_N: torch.Tensor
    encoded: tuple[torch.Tensor, torch.Tensor] | None = None
    """Encoder states [B, S', D] and their mask [B, S'], for a decoder."""


def shares(scenario: Scenario, rank: int, device: torch.device, encode: Encoder | None = None) -> list[Share]:
    """The share of `rank` in every step of the scenario, on `device`.

    Raises InputError where a request was recorded with holes, so that no forward pass can reproduce it.
    """
    made = []
    for step in scenario.steps():
        mine = step.rank == rank
        if not mine.any():
            made.append(Share(tokens=0, batch=None, real_N=torch.empty(0, dtype=torch.long, device=device)))
            continue
        request, position = step.tokens.request[mine], step.tokens.position[mine]
        batch = pad(vocabulary_ids(step.tokens)[mine], request, position).to(device)
        requests = request[np.sort(np.unique(request, return_index=True)[1])]
        encoded = encode(requests) if encode else None
        made.append(Share(tokens=int(mine.sum()), batch=batch, real_N=batch.real(), encoded=encoded))
    return made


def pad(token_id_N: NDArray[np.int32], request_N: NDArray[np.int32], position_N: NDArray[np.int32]) -> Padded:
    """Tokens that lie request by request, as rows. Raises InputError where positions are not 0, 1, 2, ..."""
    starts = np.flatnonzero(np.diff(request_N, prepend=request_N[0] - 1))
    lengths = np.diff(starts, append=len(request_N))
    if (position_N != np.concatenate([np.arange(n) for n in lengths])).any():
        raise InputError("a recorded request does not have the positions 0, 1, 2, ...: record it whole")
    ids = np.zeros((len(lengths), int(lengths.max())), np.int64)
    mask = np.arange(ids.shape[1])[None, :] < lengths[:, None]
    ids[mask] = token_id_N
    return Padded(ids_BS=torch.from_numpy(ids), mask_BS=torch.from_numpy(mask.astype(np.int64)))


class Encoder:
    """Runs the model's own encoder, all experts on this rank, over the recorded text of given requests."""

    def __init__(self, encoder: Any, table: TokenTable, device: torch.device) -> None:
        self._encoder, self._table, self._device = encoder, table, device

    @torch.inference_mode()
    def __call__(self, requests: NDArray[np.int32]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder states [B, S, D] and mask [B, S]. Raises InputError where a request's text was not recorded."""
        rows = [np.flatnonzero(self._table.request == request) for request in requests]
        for request, found in zip(requests, rows, strict=True):
            if not len(found):
                raise InputError(f"request {request} has decoder tokens but no encoder tokens: record both stacks")
        index = np.concatenate([found[np.argsort(self._table.position[found])] for found in rows])
        table = self._table
        batch = pad(vocabulary_ids(table)[index], table.request[index], table.position[index]).to(self._device)
        states = self._encoder(input_ids=batch.ids_BS, attention_mask=batch.mask_BS).last_hidden_state
        return states, batch.mask_BS


def forward(stack: Any, share: Share) -> torch.Tensor:
    """[N, D] last hidden states at the real tokens of a share that has requests."""
    assert share.batch is not None
    inputs = {"input_ids": share.batch.ids_BS, "attention_mask": share.batch.mask_BS}
    if share.encoded is not None:
        states, mask = share.encoded
        inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    hidden_BSD: torch.Tensor = stack(**inputs).last_hidden_state
    return hidden_BSD.reshape(-1, hidden_BSD.shape[-1])[share.real_N]
