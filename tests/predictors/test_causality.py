"""No predictor sees the future: scramble everything after a decision point, and what was forecast is the same bit by
bit. Every registered predictor is in this test; a new one is by being registered."""

from collections import deque
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from helpers import make_table, with_router_inputs
from moesim.predictors import PREDICTORS, Adapting, Oracle, PastStep, RouterSpec, Seen, missing, routed_layer
from moesim.traces import Phase, Workload, batches, split_requests

EXPERTS, LAYERS = 8, 4


@pytest.fixture(scope="module")
def recording():
    table, gates = with_router_inputs(make_table(requests=40, length=12, layers=LAYERS, top_k=2, noise=0.1))
    fit, run = split_requests(table)
    return fit, run, RouterSpec(num_experts=EXPERTS, top_k=2, gates=gates)


@pytest.fixture(scope="module")
def fitted(recording):
    """A function that gives a fitted predictor of that name, each time as if nobody had used it yet."""
    fit, _, router = recording

    @cache
    def made(name):
        predictor = PREDICTORS[name]()
        assert missing(predictor, fit, router) is None, "the recording of this test holds everything"
        if hasattr(predictor, "training"):
            predictor.training = replace(predictor.training, epochs=1)
        predictor.fit(fit, router)
        return predictor

    return lambda name: deepcopy(made(name))


def scrambled(table, rows, layers, seed=3):
    """The recording with everything that the routers of `layers` did with `rows` exchanged for something else."""
    rng = np.random.default_rng(seed)
    columns = {"topk_ids": None, "topk_weights": None, "lookahead_ids": None, "router_input": None}
    for name in columns:
        column = getattr(table, name).copy()
        part = column[np.ix_(rows, layers)]
        column[np.ix_(rows, layers)] = rng.permuted(part, axis=0)
        columns[name] = column
    return replace(table, **columns)


def forecasts(predictor, table, cut, phase):
    """Everything that is forecast up to and at the cut (step, point), for all layers to come."""
    told = []
    past = deque(maxlen=8)
    steps = batches(table, Workload(batch=40), phase)
    for number, batch in enumerate(steps):
        part = table.take(batch.rows)
        queued = steps[number + 1].tokens if number + 1 < len(steps) and phase is not Phase.DECODE else None
        seen = Seen(step=number, tokens=batch.tokens, queued=queued, past=past)
        if isinstance(predictor, Oracle):
            predictor.reveal(part.topk_ids, part.topk_ids)
        for point in range(LAYERS + 1):
            told += [predictor.forecast(seen, layer) for layer in range(point, LAYERS)]
            if queued is not None:
                told += [predictor.forecast(seen, layer, queued=True) for layer in range(LAYERS)]
            if (number, point) == cut:
                return told
            if point < LAYERS:
                seen.routed.append(routed_layer(part, point))
        if isinstance(predictor, Adapting):
            predictor.observe(seen)
        past.append(PastStep(tokens=batch.tokens, topk_ids=part.topk_ids))
    raise AssertionError("the cut lies beyond the recording")


def same(one, other):
    return all(
        (a is None and b is None) or np.array_equal(a, b)
        for f, g in zip(one, other, strict=True)
        for a, b in ((f.load, g.load), (f.topk, g.topk), (f.inclusion, g.inclusion))
    )


def future(table, cut, phase):
    """The recording with all that lies behind the cut scrambled."""
    steps = batches(table, Workload(batch=40), phase)
    later = np.concatenate([batch.rows for batch in steps[cut[0] + 1 :]])
    changed = scrambled(table, later, range(LAYERS))
    return scrambled(changed, steps[cut[0]].rows, range(cut[1], LAYERS)) if cut[1] < LAYERS else changed


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "oracle"])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_scrambling_what_comes_later_changes_no_forecast(name, phase, recording, fitted):
    run = replace(recording[1], phase=np.full(len(recording[1]), phase, np.uint8))
    for cut in ((0, 1), (2, 0), (3, 2)):
        plain = forecasts(fitted(name), run, cut, phase)
        assert same(plain, forecasts(fitted(name), future(run, cut, phase), cut, phase)), cut


def test_an_oracle_fails_it(recording, fitted):
    run = replace(recording[1], phase=np.full(len(recording[1]), Phase.PREFILL, np.uint8))
    cut = (2, 0)
    plain = forecasts(fitted("oracle"), run, cut, Phase.PREFILL)
    assert not same(plain, forecasts(fitted("oracle"), future(run, cut, Phase.PREFILL), cut, Phase.PREFILL))


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "oracle"])
def test_the_past_is_what_forecasts_come_from(name, recording, fitted):
    """The counterpart: what has routed matters to whoever says that it reads it, so that the test above can fail."""
    reads_routing = not {"sida", "predictive-replication", "token-table", "frequency"} & {name}
    phase = Phase.DECODE if name == "previous-token" else Phase.PREFILL  # which has nothing to say in a prefill
    run = replace(recording[1], phase=np.full(len(recording[1]), phase, np.uint8))
    steps = batches(run, Workload(batch=40), phase)
    before = np.concatenate([batch.rows for batch in steps[:3]])
    changed = scrambled(run, before, range(LAYERS))
    plain = forecasts(fitted(name), run, (3, 0), phase)
    assert same(plain, forecasts(fitted(name), changed, (3, 0), phase)) != reads_routing
