"""Predicted routing: what is executed is the forecast, and with a perfect forecast it is the model."""

from dataclasses import replace

import cases
import numpy as np
import offload_cases as small
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesim.backend.predicted import mean_weights, over_capacity
from moesim.sim.policies import POLICIES
from moesim.traces import PolicyError

PREDICTED = replace(POLICIES["on-demand"], predictor="token-table", routing="predicted")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 4))
def test_capacity_counts_earlier_tokens_of_the_sequence(tokens, capacity):
    tokens.sort(key=lambda pair: pair[0])  # sequences one after the other
    sequence, ids = (torch.tensor(column) for column in zip(*tokens, strict=True))
    expected = [tokens[:i].count(pair) >= capacity for i, pair in enumerate(tokens)]
    assert over_capacity(ids, sequence, capacity).tolist() == expected


def chosen(model, given, stack="encoder"):
    """[N, L, 1] what the routers of the model choose for a batch, and [N, L] whether the expert was full."""
    reference = cases.Reference(model, stack == "decoder")
    with torch.inference_mode():
        model(**given)
    real = given["attention_mask"].reshape(-1).nonzero().reshape(-1) if stack == "encoder" else slice(None)
    seen = reference.seen
    return [torch.stack([each[i].reshape(-1)[real] for each in seen], 1).numpy() for i in (0, 1)]


def test_a_perfect_forecast_is_the_model_capacity_included():
    model, there, offloads = small.offloaded(poison=True)
    recipe = replace(PREDICTED, predictor="oracle")
    given = small.batch()
    with torch.inference_mode():
        wanted = model(**given).logits
    small.begin(offloads, recipe)
    for stack, offload in offloads.items():
        ids, _ = chosen(cases.tiny_model().to(torch.float64), given, stack)
        offload.expect(truth=(ids[:, :, None].astype(np.uint8), None))
    with torch.inference_mode():
        got = there(**given).logits
    small.finish(offloads)
    assert float((wanted - got).abs().max()) <= 1e-12
    assert offloads["encoder"].tally.pairs.mispredicted.sum() == 0


def test_wrong_predictions_are_executed_and_counted():
    """In the first MoE layer nothing has gone wrong yet, so the router's choice is the exact model's."""
    _, there, offloads = small.offloaded()
    given = small.batch()
    small.begin(offloads, PREDICTED)
    with torch.inference_mode():
        there(**given)
    small.finish(offloads)
    offload = offloads["encoder"]
    ids_NL, _ = chosen(cases.tiny_model().to(torch.float64), given)
    past = offload.driver._past[-1]
    full_N = over_capacity(
        torch.from_numpy(past.topk_ids[:, 0, 0].astype(np.int64)), torch.from_numpy(past.tokens.request), cases.CAPACITY
    ).numpy()
    wrong_N = (past.topk_ids[:, 0, 0] != ids_NL[:, 0]) & ~full_N
    assert offload.tally.pairs.mispredicted[0] == wrong_N.sum() > 0
    assert offload.tally.pairs.routed[0] == (~full_N).sum()


def test_the_fixed_factor_multiplies_every_experts_output():
    """Scaled by 0 the experts add nothing: the model is left with its residual paths."""
    _, there, offloads = small.offloaded()
    _, skipping, other = small.offloaded()
    layers = len(offloads["encoder"].routers)
    small.begin(offloads, PREDICTED, factor_L=np.zeros(layers))
    small.begin(other, replace(POLICIES["on-demand"], miss="skip"), 1)
    for offload in other.values():
        offload.driver.residency.usable_LEG[:] = False  # nothing is there: all pairs are skipped
    with torch.inference_mode():
        got, wanted = (one(**small.batch()).logits for one in (there, skipping))
    assert torch.allclose(got, wanted, atol=1e-12, rtol=0)


def test_the_factor_is_the_mean_of_the_fitted_weights():
    table = small.tables()["encoder"]
    weights = np.linspace(0, 1, len(table) * table.num_layers).reshape(len(table), -1, 1).astype(np.float16)
    found = mean_weights(replace(table, topk_weights=weights))
    assert found.tolist() == pytest.approx(weights.astype(float).mean(axis=(0, 2)).tolist())


def test_a_forecast_of_loads_alone_cannot_be_executed():
    _, there, offloads = small.offloaded()
    small.begin(offloads, replace(PREDICTED, predictor="window"))
    with torch.inference_mode(), pytest.raises(PolicyError, match="say nothing of single tokens"):
        there(**small.batch())
