"""Small recordings and qualities made by hand, for tests that need no model."""

from dataclasses import replace

import numpy as np

from moesim.sim.policies import POLICIES, recipe_digest
from moesim.sim.quality import Quality
from moesim.traces import Gates, ModelSpec, StackSpec, TokenTable, Widths, id_dtype


def make_spec(layers=3, experts=8, **changes):
    fields = {
        "family": "switch",
        "num_experts": experts,
        "top_k": 1,
        "capacity": 64,
        "groups": 1,
        "top_groups": 1,
        "vocab_size": 100,
        "dtype": "float32",
        "widths": Widths(d_model=16, d_ff=32, num_heads=2, d_kv=8, kv_width=32, gated=False, dense_d_ff=32),
        "stacks": (StackSpec(name="encoder", num_layers=layers, moe_layers=tuple(range(layers))),),
    }
    return ModelSpec(**{**fields, **changes})


def make_table(requests=16, length=32, layers=3, experts=8, top_k=1, seed=0, phase=0, noise=0.2, skew=1.3):
    """Tokens whose experts follow from their vocabulary id and from the layer before, with noise: predictable."""
    rng = np.random.default_rng(seed)
    T = requests * length
    token = rng.zipf(skew, T) % 50
    ids = np.empty((T, layers, top_k), np.int64)
    ids[:, 0, 0] = (token * 3) % experts
    for layer in range(1, layers):
        ids[:, layer, 0] = (ids[:, layer - 1, 0] * 5 + 1) % experts
    random = rng.random((T, layers)) < noise
    ids[:, :, 0] = np.where(random, rng.integers(0, experts, (T, layers)), ids[:, :, 0])
    for k in range(1, top_k):
        ids[:, :, k] = (ids[:, :, 0] + k) % experts
    return TokenTable(
        topk_ids=ids.astype(id_dtype(experts)),
        topk_weights=np.full((T, layers, top_k), 0.5, np.float16),
        dropped=rng.random((T, layers)) < 0.02,
        token_id=token.astype(np.int32),
        request=np.repeat(np.arange(requests), length).astype(np.int32),
        position=np.tile(np.arange(length), requests).astype(np.int32),
        step=np.zeros(T, np.int32),
        phase=np.full(T, phase, np.uint8),
    )


def with_router_inputs(table, experts=8, d_model=16, seed=0):
    """(the table with router inputs and two layers of lookahead, gates that say what the routers chose): inputs are the
    chosen gates' rows and noise, and lean towards what the next layers will choose."""
    rng = np.random.default_rng(seed)
    T, L, _ = table.topk_ids.shape
    weight = rng.normal(size=(L, experts, d_model)).astype(np.float32)
    weight /= np.linalg.norm(weight, axis=2, keepdims=True)
    own = np.stack([weight[layer][table.topk_ids[:, layer]].sum(axis=1) for layer in range(L)], axis=1)
    ahead = np.concatenate([own[:, 1:], own[:, -1:]], axis=1)
    given = (2 * own + ahead + 0.1 * rng.normal(size=own.shape)).astype(np.float16)
    wide = min(4, experts)
    lookahead = np.zeros((T, L, 2, wide), table.topk_ids.dtype)
    for layer in range(L):
        for distance in range(1, min(2, L - 1 - layer) + 1):
            logits = given[:, layer].astype(np.float32) @ weight[layer + distance].T
            lookahead[:, layer, distance - 1] = np.argsort(-logits, axis=1, kind="stable")[:, :wide]
    return replace(table, router_input=given, lookahead_ids=lookahead), Gates(
        weight=weight, bias=np.zeros((L, experts), np.float32)
    )


def make_quality(policy, **changes):
    """What `moesim quality` might have measured of a named policy."""
    fields = {
        "policy": policy,
        "policy_digest": recipe_digest(POLICIES[policy]),
        "model_digest": "abc",
        "phase": "prefill",
        "resident": None,
        "copy_dtype": None,
        "loss": 2.25,
        "exact_loss": 2.0,
        "loss_error": 0.01,
        "top1_agreement": 0.875,
        "output_error": 0.05,
        "shares": {},
        "config": {"requests": 3},
    }
    return Quality(**{**fields, **changes})
