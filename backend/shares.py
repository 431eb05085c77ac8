"""What one rank, or a device that has all requests, computes of each step: requests padded to the right, for a decoder
their encoded text, and the recorded routing where that is forced on the layers.

Made before anything is timed. Knows nothing about experts or policies. Shape letters: B requests of a share, S their
padded length, N real tokens, L MoE layers, D = d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.sim.scenario import Scenario, StepInput
from moesim.traces import InputError, Phase, TokenTable, vocabulary_ids

STAND_IN_IDS = 1000
"""Vocabulary ids 0..999 stand in where a replayed trace has none: any model has as many."""


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
    """Part of a step; `batch` is None where there is no request in it."""

    tokens: int
    """N."""
    batch: Padded | None
    real_N: torch.Tensor
    encoded: tuple[torch.Tensor, torch.Tensor] | None = None
    """Encoder states [B, S', D] and their mask [B, S'], for a decoder."""
    recorded_LN: tuple[torch.Tensor, torch.Tensor] | None = None
    """Chosen experts (int64) and which of them were over capacity, where they are forced."""

    def forced(self, layer: int) -> dict[str, torch.Tensor]:
        """What is put in the place of a router's choice, as fields of `Routed`; nothing where the router decides."""
        if self.recorded_LN is None:
            return {}
        ids_LN, dropped_LN = self.recorded_LN
        return {"ids_N": ids_LN[layer], "dropped_N": dropped_LN[layer]}


def shares(
    scenario: Scenario, rank: int | None, device: torch.device, encode: Encoder | None = None, *, replay: bool = False
) -> list[Share]:
    """The share of `rank` (None: of all ranks together) in every step of the scenario, on `device`.

    Raises InputError where a request was recorded with holes, so that no forward pass can reproduce it.
    """
    made = []
    for step in scenario.steps():
        rows_N = np.arange(len(step.tokens)) if rank is None else np.flatnonzero(step.rank == rank)
        made.append(_share(step, rows_N, device, encode, replay=replay))
    return made


def _share(
    step: StepInput, rows_N: NDArray[np.intp], device: torch.device, encode: Encoder | None, *, replay: bool
) -> Share:
    recorded = None
    if replay:
        ids_LN, dropped_LN = step.ids[rows_N, :, 0].T.astype(np.int64), step.dropped[rows_N].T.copy()
        recorded = torch.from_numpy(ids_LN).to(device), torch.from_numpy(dropped_LN).to(device)
    if not len(rows_N):
        none = torch.empty(0, dtype=torch.long, device=device)
        return Share(tokens=0, batch=None, real_N=none, recorded_LN=recorded)
    tokens = step.tokens
    if replay and tokens.token_id is None:
        ids_N = (rows_N % STAND_IN_IDS).astype(np.int32)
    else:
        ids_N = vocabulary_ids(tokens)[rows_N]
    request_N = tokens.request[rows_N]
    batch = pad(ids_N, request_N, tokens.position[rows_N]).to(device)
    encoded = encode(request_N[np.sort(np.unique(request_N, return_index=True)[1])]) if encode else None
    return Share(tokens=len(rows_N), batch=batch, real_N=batch.real(), encoded=encoded, recorded_LN=recorded)


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


def check_scenario(scenario: Scenario, routing: str, encoder_table: TokenTable | None) -> None:
    """Raise InputError for scenarios that cannot run on ranks or partitions."""
    if routing not in ("model", "replay"):
        raise InputError(f"--routing must be model or replay, got {routing!r}")
    if scenario.phase is Phase.DECODE or scenario.workload.chunked:
        raise InputError("decode steps and chunked prefill run with --resident only: use encoder or prefill, whole")
    if scenario.phase is Phase.PREFILL and encoder_table is None:
        raise InputError("prefill needs the encoder's tokens too: record both stacks")
