"""The steps of a scenario as one device computes them: all requests of a step in one padded batch.

Made before anything is timed. Shape letters: T tokens of the step, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moesim.backend.shares import Encoder, Share, pad
from moesim.sim.scenario import Scenario, StepInput
from moesim.traces import InputError, Phase, StepTokens, TokenTable, vocabulary_ids

STAND_IN_IDS = 1000
"""Vocabulary ids 0..999 stand in where a replayed trace has none: any model has as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One step, ready to run."""

    step: StepInput
    share: Share
    ids_TL: torch.Tensor
    """int64, the recorded experts on the device; empty unless they are replayed."""
    dropped_TL: torch.Tensor

    @property
    def tokens(self) -> StepTokens:
        """The step's tokens."""
        return self.step.tokens


def whole_steps(scenario: Scenario, device: torch.device, encode: Encoder | None, *, replay: bool) -> list[StepShare]:
    """Every step of the scenario, on `device`.

    Raises InputError where a request was recorded with holes, or a decoder's trace is to be replayed without the text
    that its encoder read.
    """
    if scenario.phase is Phase.PREFILL and encode is None:
        raise InputError("prefill needs the encoder's tokens too: record both stacks, or run the encoder phase")
    made = []
    for step in scenario.steps():
        tokens = step.tokens
        if replay and tokens.token_id is None:
            ids_T = (np.arange(len(tokens)) % STAND_IN_IDS).astype(np.int32)
        else:
            ids_T = vocabulary_ids(tokens)
        batch = pad(ids_T, tokens.request, tokens.position).to(device)
        requests = tokens.request[np.sort(np.unique(tokens.request, return_index=True)[1])]
        encoded = encode(requests) if encode else None
        recorded = (step.ids[:, :, 0], step.dropped) if replay else (step.ids[:0, :, 0], step.dropped[:0])
        made.append(
            StepShare(
                step=step,
                share=Share(tokens=len(tokens), batch=batch, real_N=batch.real(), encoded=encoded),
                ids_TL=torch.from_numpy(recorded[0].astype(np.int64)).to(device),
                dropped_TL=torch.from_numpy(np.ascontiguousarray(recorded[1])).to(device),
            )
        )
    return made


def check_scenario(scenario: Scenario, routing: str, encoder_table: TokenTable | None) -> None:
    """Raise InputError for scenarios that cannot run on partitions."""
    if routing not in ("model", "replay"):
        raise InputError(f"--routing must be model or replay, got {routing!r}")
    if scenario.phase is Phase.DECODE or scenario.workload.chunked:
        raise InputError("decode steps and chunked prefill are not available on partitions: use encoder or prefill")
    if scenario.phase is Phase.PREFILL and encoder_table is None and routing == "model":
        raise InputError("prefill needs the encoder's tokens too: record both stacks")
    if scenario.spec.top_k != 1:
        raise InputError(f"Switch models choose one expert a token, the trace has {scenario.spec.top_k}")
