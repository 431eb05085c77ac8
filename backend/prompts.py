"""What a decoder has read before its decode steps begin: keys and values of every request's prompt and encoded text.

Computed with the model itself, all experts from host memory, before anything is timed. Shape letters: H heads, C
width of a head.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.blocks import by_head
from moesim.backend.walk import RequestState
from moesim.sim.scenario import Scenario
from moesim.traces import InputError, TokenTable, vocabulary_ids


@torch.inference_mode()
def request_states(
    model: Any, scenario: Scenario, encoder_table: TokenTable | None, prompts: TokenTable | None, device: torch.device
) -> dict[int, RequestState]:
    """Of every request that the scenario decodes. `prompts`: the decoder's tokens that were recorded as prefill. Raises
    InputError where a request's text, or a token before its first decode step, was not recorded."""
    if encoder_table is None or prompts is None:
        raise InputError("decode needs the encoder's tokens and the decoder's prompts, too: record both stacks")
    found = {}
    for request in np.unique(scenario.run.request).tolist():
        read = _ids_of(encoder_table, request)
        first = int(scenario.run.position[scenario.run.request == request].min())
        prompt = _ids_of(prompts, request)[:first]
        if not len(read) or len(prompt) < first:
            raise InputError(f"request {request} decodes from position {first}, and what it had read was not recorded")
        found[request] = _state(model, torch.from_numpy(read).to(device), torch.from_numpy(prompt).to(device))
    return found


def _ids_of(table: TokenTable, request: int) -> NDArray[np.int64]:
    rows = np.flatnonzero(table.request == request)
    rows = rows[np.argsort(table.position[rows], kind="stable")]
    return vocabulary_ids(table)[rows].astype(np.int64)


def _state(model: Any, read_S: torch.Tensor, prompt_S: torch.Tensor) -> RequestState:
    from transformers import DynamicCache, EncoderDecoderCache

    states_1SD = model.encoder(input_ids=read_S[None]).last_hidden_state
    decoder = model.decoder
    crosses = [block.layer[1].EncDecAttention for block in decoder.block]
    read_keys, read_values = (
        torch.stack([by_head(cross, getattr(cross, name)(states_1SD))[0] for cross in crosses]) for name in "kv"
    )
    if not len(prompt_S):
        none = read_keys[:, :, :0]
        return RequestState(keys=none, values=none, read_keys=read_keys, read_values=read_values)
    # transformers renamed it, and warns of the old name.
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    decoder(input_ids=prompt_S[None], encoder_hidden_states=states_1SD, use_cache=True, **{name: cache})
    kept = cache.self_attention_cache.layers
    keys, values = (torch.stack([getattr(layer, part)[0] for layer in kept]) for part in ("keys", "values"))
    return RequestState(keys=keys, values=values, read_keys=read_keys, read_values=read_values)
