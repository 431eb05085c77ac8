"""Made-up recordings with gate weights, and what a predictor says of them; for predictors that read routing alone."""

from dataclasses import replace

import numpy as np

from helpers import make_table
from moesim.predictors import Seen, routed_layer
from moesim.traces import step_tokens

EXPERTS, LAYERS = 8, 5


def table(top_k=2, layers=LAYERS, **changes):
    made = make_table(**{"requests": 40, "length": 12, "layers": layers, "top_k": top_k, "noise": 0.1, **changes})
    weights = np.random.default_rng(5).dirichlet(np.ones(EXPERTS), made.topk_ids.shape[:2])
    return replace(made, topk_weights=np.sort(weights, axis=2)[:, :, ::-1][:, :, :top_k].astype(np.float16))


def seen_of(rows, layers):
    tokens = step_tokens(rows, np.arange(len(rows)))
    return Seen(step=0, tokens=tokens, routed=[routed_layer(rows, layer) for layer in range(layers)])


def told(predictor, rows, layer, distance=1):
    return predictor.forecast(seen_of(rows, layer - distance + 1), layer)


def recall(predictor, rows, layer, distance=1):
    topk = told(predictor, rows, layer, distance).topk
    return (topk[:, :, None] == rows.topk_ids[:, None, layer]).any(axis=1).mean()


def pairs(requests, seed=0):
    """Layer 2 routes to the sum of what layers 0 and 1 routed to: no linear map says which expert that is."""
    made = make_table(requests=requests, length=12, layers=3, seed=seed, noise=1.0)
    ids = made.topk_ids.copy()
    ids[:, 2] = (ids[:, 0] + ids[:, 1]) % EXPERTS
    return replace(made, topk_ids=ids, topk_weights=None, token_id=None)
