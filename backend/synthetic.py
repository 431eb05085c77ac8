"""Made-up inputs for calibration: random tokens with a made-up routing to fit policies on, and a random model.

Never the requests that are measured later. Torch only where a model is made. Shape letters: T tokens, L MoE layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.sim.residency import Cluster
from moesim.sim.scenario import Scenario
from moesim.traces import Batch, ModelSpec, Phase, TokenTable, Workload, id_dtype, step_tokens

Random = np.random.Generator


def synthetic_scenario(
    spec: ModelSpec, cluster: Cluster, steps: list[list[int]], rng: Random, workload: Workload
) -> Scenario:
    """Encoder steps with requests of the given lengths, one list a step."""
    lengths = [length for step in steps for length in step]
    table = synthetic_table(spec, cluster.layers, lengths, rng)
    ends = np.cumsum([sum(step) for step in steps])
    batches = []
    for index, rows in enumerate(np.split(np.arange(len(table)), ends[:-1])):
        tokens = step_tokens(table, rows)
        batches.append(Batch(index=index, rows=rows, tokens=tokens))
    return Scenario(
        spec=spec,
        phase=Phase.ENCODER,
        cluster=cluster,
        workload=workload,
        fit=synthetic_table(spec, cluster.layers, lengths, rng),
        run=table,
        batches=tuple(batches),
    )


def synthetic_table(spec: ModelSpec, layers: int, lengths: list[int], rng: Random) -> TokenTable:
    """Tokens with Zipf-like ids, whose experts follow from the id for the most part, so that predictors have work."""
    T = sum(lengths)
    assert spec.vocab_size is not None, "the spec comes from a loaded model"
    token: NDArray[np.int64] = rng.zipf(1.3, T) % spec.vocab_size
    chosen = (token[:, None] * 3 + np.arange(layers)[None, :] * 5) % spec.num_experts
    anything = rng.integers(0, spec.num_experts, (T, layers))
    ids_TL = np.where(rng.random((T, layers)) < 0.2, anything, chosen)
    ids_TLK = (ids_TL[:, :, None] + np.arange(spec.top_k)) % spec.num_experts
    return TokenTable(
        topk_ids=ids_TLK.astype(id_dtype(spec.num_experts)),
        topk_weights=np.ones(ids_TLK.shape, np.float16),
        dropped=np.zeros((T, layers), np.bool_),
        token_id=token.astype(np.int32),
        request=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        step=np.zeros(T, np.int32),
        phase=np.full(T, Phase.ENCODER, np.uint8),
    )


def random_model(dtype: str, seed: int = 0) -> Any:
    """A small Switch model with random weights, for a calibration without a model at hand."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(seed)
    config = SwitchTransformersConfig(
        vocab_size=8192,
        d_model=256,
        d_kv=32,
        d_ff=1024,
        num_heads=8,
        num_layers=6,
        num_decoder_layers=2,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=1,
        num_experts=32,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config).to(getattr(torch, dtype)).eval()


WORDS = 4096
"""Vocabulary of `skewed_table`."""


def skewed_table(
    experts: int, layers: int, tokens: int, rng: Random, *, spread: float, known: float = 0.8, request_tokens: int = 128
) -> TokenTable:
    """Top-1 routing of an encoder with the skew of trained Switch models, to be replayed onto random weights.

    `spread`: standard deviation of the logarithm of the experts' popularity, another for every layer; at 128 experts
    0.9 gives a max / mean of about 9, 1.4 of about 21. Every word has a favourite expert in each layer, drawn by
    popularity, to which it goes with probability `known`; else its expert is drawn anew. So what a word or the layer
    before says of the next choice is worth something and never certain.
    """
    popularity_LE = np.exp(spread * rng.standard_normal((layers, experts)))
    popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
    favourite_LW = np.stack([rng.choice(experts, WORDS, p=p_E) for p_E in popularity_LE])
    frequency_W = 1 / (np.arange(WORDS) + 20.0)
    count = -(-tokens // request_tokens) * request_tokens
    word_T = rng.choice(WORDS, count, p=frequency_W / frequency_W.sum())
    anew_TL = np.stack([rng.choice(experts, count, p=p_E) for p_E in popularity_LE], axis=1)
    ids_TL = np.where(rng.random((count, layers)) < known, favourite_LW[:, word_T].T, anew_TL)
    return TokenTable(
        topk_ids=ids_TL[:, :, None].astype(id_dtype(experts)),
        topk_weights=np.ones((count, layers, 1), np.float16),
        dropped=np.zeros((count, layers), np.bool_),
        token_id=word_T.astype(np.int32),
        request=(np.arange(count) // request_tokens).astype(np.int32),
        position=(np.arange(count) % request_tokens).astype(np.int32),
        step=np.zeros(count, np.int32),
        phase=np.full(count, Phase.ENCODER, np.uint8),
    )
