"""A made-up recording with the statistics of Switch routing, for models with random weights, whose own routers say
nothing.

Each layer's popularity of experts is log-normal, of a spread that gives the published loads of Switch-base-128 (max
/ mean 6 to 31 a layer). A token id has an expert of its own in every layer, drawn by popularity, and takes it with
probability OWN; otherwise the expert is drawn anew. Ids follow Zipf's law in a few topics, each request having one;
a request repeats one of its last ids with probability AGAIN. OWN is set so that a table of token ids, fitted on
other requests, finds .44 of the experts, as it does in the decoder of the trained model that the repository ships.
What later gates would say is made up, too. Shape letters: T tokens, L MoE layers, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.traces import Phase, TokenTable, id_dtype

VOCABULARY, TOPICS, RECENT = 4096, 8, 16
OWN, AGAIN = 0.52, 0.1
GATES = ((0.53, 0.85), (0.38, 0.74), (0.25, 0.57))
"""Of the gates one, two and three layers on: how often the expert is the first, and among the first four, that they
name for this layer's router input. As measured on the decoder of the shipped model."""
SPREAD = (1.1, 1.8)
"""Standard deviation of the logarithm of popularity, first and last layer."""


def switch_like(
    requests: int, length: int, *, layers: int, experts: int, phase: Phase, seed: int, model: int = 0
) -> TokenTable:
    """`requests` of `length` tokens each. The same `model` has the same popularity and the same experts of token
    ids."""
    fixed, rng = np.random.default_rng([model, 1]), np.random.default_rng([seed, 2])
    spread_L1 = np.linspace(*SPREAD, layers)[:, None]
    popularity_LE = np.exp(spread_L1 * fixed.standard_normal((layers, experts)))
    popularity_LE /= popularity_LE.sum(axis=1, keepdims=True)
    own_LV = np.stack([fixed.choice(experts, VOCABULARY, p=p_E) for p_E in popularity_LE])
    topics = [np.random.default_rng([model, 3, topic]).permutation(VOCABULARY) for topic in range(TOPICS)]
    ids_T = np.concatenate([_text(length, topics[request % TOPICS], rng) for request in range(requests)])
    T = len(ids_T)
    anything_TL = np.stack([rng.choice(experts, T, p=p_E) for p_E in popularity_LE], axis=1)
    chosen_TL = np.where(rng.random((T, layers)) < OWN, own_LV[:, ids_T].T, anything_TL)
    return TokenTable(
        topk_ids=chosen_TL[:, :, None].astype(id_dtype(experts)),
        lookahead_ids=_lookahead(chosen_TL, popularity_LE, rng).astype(id_dtype(experts)),
        dropped=np.zeros((T, layers), np.bool_),
        token_id=ids_T.astype(np.int32),
        request=np.repeat(np.arange(requests), length).astype(np.int32),
        position=np.tile(np.arange(length), requests).astype(np.int32),
        step=np.zeros(T, np.int32),
        phase=np.full(T, phase, np.uint8),
    )


def _text(length: int, order_V: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """[length] token ids of one request, `order_V` being those of its topic, the most frequent first."""
    ids = order_V[(rng.zipf(1.3, length) - 1) % VOCABULARY]
    for i in range(1, length):
        if rng.random() < AGAIN:
            ids[i] = ids[i - 1 - rng.integers(min(i, RECENT))]
    return ids


def _lookahead(
    chosen_TL: NDArray[np.integer], popularity_LE: NDArray[np.floating], rng: np.random.Generator
) -> NDArray[np.integer]:
    """[T, L, D, 4] what the gates of the next layers would have said, as right as GATES; else what is popular."""
    (T, L), D = chosen_TL.shape, len(GATES)
    ahead = np.zeros((T, L, D, 4), np.int64)
    for layer in range(L):
        for d, (first, named) in enumerate(GATES[: L - 1 - layer]):
            later = layer + 1 + d
            ahead[:, layer, d] = rng.choice(popularity_LE.shape[1], (T, 4), p=popularity_LE[later])
            rank_T = np.where(rng.random(T) < first / named, 0, rng.integers(1, 4, T))
            there = np.flatnonzero(rng.random(T) < named)
            ahead[there, layer, d, rank_T[there]] = chosen_TL[there, later]
    return ahead
