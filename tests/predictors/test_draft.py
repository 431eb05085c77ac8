"""The draft's gates on routing that was drawn from them."""

from dataclasses import replace

import numpy as np
import pytest

from helpers import make_table
from moesim.predictors import DraftGate, Frequency, RouterSpec, Seen, routed_layer
from moesim.traces import Gates, StepTokens

EXPERTS = 6


def drawn(temperature, random=0.0, tokens=6000):
    """Layers 1 and 2 choose by softmax(gate @ layer 0's input / temperature), or anything with chance `random`."""
    rng = np.random.default_rng(0)
    gates = Gates(
        weight=rng.normal(size=(3, EXPERTS, 4)).astype(np.float32),
        bias=rng.normal(size=(3, EXPERTS)).astype(np.float32),
    )
    table = make_table(requests=60, length=tokens // 60, layers=3, experts=EXPERTS)
    given = rng.normal(size=(tokens, 3, 4)).astype(np.float16)
    for layer in (1, 2):
        logits = given[:, 0].astype(np.float64) @ gates.weight[layer].T + gates.bias[layer]
        ids = (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)
        table.topk_ids[:, layer, 0] = np.where(rng.random(tokens) < random, rng.integers(0, EXPERTS, tokens), ids)
    return replace(table, router_input=given), RouterSpec(num_experts=EXPERTS, top_k=1, gates=gates)


def fitted(table, router, predictor=None):
    predictor = predictor or DraftGate()
    predictor.fit(table, router)
    return predictor


def seen_of(table, point, count=500):
    rows = slice(0, count)
    tokens = StepTokens(request=table.request[rows], position=table.position[rows])
    return Seen(step=0, tokens=tokens, routed=[routed_layer(table, i, rows) for i in range(point)])


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_temperature_that_it_was_drawn_at_is_found(temperature):
    predictor = fitted(*drawn(temperature))
    assert predictor.temperature_L[1:] == pytest.approx(temperature, rel=0.25)
    assert (predictor.trust_L[1:] > 0.9).all()


def test_what_is_random_is_left_to_the_frequency():
    predictor = fitted(*drawn(0.2, random=0.5))
    assert predictor.trust_L[1:] == pytest.approx(0.5, abs=0.1)
    assert (fitted(*drawn(0.2, random=1.0)).trust_L[1:] < 0.1).all()


def test_all_layers_are_told_from_the_first():
    table, router = drawn(0.1)
    predictor, seen = fitted(table, router), seen_of(table, 1)
    for layer in (1, 2):
        assert (predictor.forecast(seen, layer).topk == table.topk_ids[:500, layer]).mean() > 0.8
    seen.routed.append(routed_layer(table, 1, slice(0, 500)))
    assert predictor.forecast(seen, 2).load == pytest.approx(predictor.forecast(seen_of(table, 1), 2).load)


def test_before_the_first_layer_it_is_the_frequency():
    table, router = drawn(0.1)
    predictor, frequency = fitted(table, router), fitted(table, router, Frequency())
    start, later = seen_of(table, 0), seen_of(table, 2)
    later.queued = start.tokens
    without = seen_of(replace(table, router_input=None), 1)
    for seen, layer, queued in ((start, 2, False), (later, 2, True), (without, 2, False)):
        expected = frequency.forecast(seen, layer, queued=queued).load
        assert predictor.forecast(seen, layer, queued=queued).load == pytest.approx(expected)
