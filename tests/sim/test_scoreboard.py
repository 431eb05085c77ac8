"""The scoreboard: every forecast is asked where it says, and what it is worth lies between the two ends."""

import numpy as np
import pytest

from helpers import make_spec, make_table
from moesim.predictors import PREDICTORS, Cost, Forecast, RouterSpec
from moesim.predictors.scores import multinomial_floor
from moesim.sim.scenario import make_scenario
from moesim.sim.scoreboard import ORACLE, STATIC, Scoreboard, summaries
from moesim.traces import InputError, Phase, Workload, total_load_LE


def scene(layers=4, batch=64, gpus=4, **table):
    made = make_table(layers=layers, **{"requests": 48, "length": 16, "noise": 0.1, **table})
    spec = make_spec(layers, 8, top_k=made.topk_ids.shape[2])
    return make_scenario(spec, made, phase=Phase.ENCODER, gpus=gpus, workload=Workload(batch=batch))


def fitted(scenario, *names):
    ready = {name: PREDICTORS[name]() for name in names}
    for predictor in ready.values():
        predictor.fit(scenario.fit, RouterSpec(num_experts=8, top_k=scenario.cluster.top_k))
    return ready


def told(scenario, *names, **options):
    return summaries(Scoreboard(scenario, fitted(scenario, *names), **options).run())


class Spy:
    """Knows nothing, and writes down what it was asked when."""

    name, needs = "spy", ()

    def __init__(self):
        self.asked, self.observed = [], []

    def fit(self, table, router):
        pass

    def forecast(self, seen, layer, *, queued=False):
        self.asked.append((seen.step, len(seen.routed), layer, len(seen.past)))
        seen.memo[len(seen.routed)] = True
        return Forecast(load=np.full(8, len(seen.tokens) / 8))

    def observe(self, seen):
        self.observed.append((seen.step, len(seen.routed), sorted(seen.memo)))

    def cost(self):
        return Cost()


def test_every_forecast_is_asked_at_its_decision_point():
    scenario, spy = scene(), Spy()
    Scoreboard(scenario, {"spy": spy}, horizons=(1, 3)).run()
    steps = range(len(scenario.batches))
    # Distance 1 speaks of the layer that routes next, distance 3 of the third from there, as far as there are four.
    each = [(0, 0), (0, 2), (1, 1), (1, 3), (2, 2), (3, 3)]
    assert spy.asked == [(step, point, layer, step) for step in steps for point, layer in each]
    assert spy.observed == [(step, 4, [0, 1, 2, 3]) for step in steps]


def test_oracle_and_nothing_are_the_ends():
    report = told(scene(), "oracle", "frequency", "markov")
    numbers = {name: one["horizons"]["1"] for name, one in report["predictors"].items()}
    assert numbers["oracle"]["recall_at_1"] == 1.0 and numbers["oracle"]["load_error"] == 0.0
    assert numbers["oracle"]["gap_closed_1"] == pytest.approx(1.0)
    assert numbers["oracle"]["balancedness_2"] == pytest.approx(report["balancedness"][ORACLE]["2"])
    assert report["balancedness"][STATIC]["1"] == report["balancedness"][STATIC]["2"]
    assert numbers["frequency"]["recall_at_1"] < numbers["markov"]["recall_at_1"] > 0.7
    assert numbers["frequency"]["load_error"] > numbers["markov"]["load_error"]


def test_recall_is_that_of_the_steps_counted_directly():
    scenario = scene()
    markov = fitted(scenario, "markov")["markov"]
    report = summaries(Scoreboard(scenario, {"markov": markov}, horizons=(2,)).run())
    run = scenario.run.topk_ids[:, :, 0].astype(int)
    guess = (markov.step_LEE[0] @ markov.step_LEE[1]).argmax(axis=1)[run[:, 0]]
    assert report["predictors"]["markov"]["horizons"]["2"]["layers"]["2"]["recall_at_1"] == pytest.approx(
        (guess == run[:, 2]).mean()
    )


def test_means_leave_out_the_layers_that_nothing_has_routed_before():
    report = told(scene(), "markov", horizons=(1, 2))["predictors"]["markov"]["horizons"]
    for distance, first in (("1", 1), ("2", 2)):
        layers = report[distance]["layers"]
        assert min(map(int, layers)) == first - 1
        after = [row["recall_at_1"] for layer, row in layers.items() if int(layer) >= first]
        assert report[distance]["recall_at_1"] == pytest.approx(np.mean(after))


def test_the_floor_is_of_the_long_run_shares():
    scenario = scene()
    share = total_load_LE(scenario.run, 8)[2] / total_load_LE(scenario.run, 8)[2].sum()
    floors = [multinomial_floor(share, len(batch.tokens), 1) for batch in scenario.batches]
    assert told(scenario, "frequency")["multinomial_floor_by_layer"][2] == pytest.approx(np.mean(floors))


def test_loads_alone_say_nothing_of_tokens():
    numbers = told(scene(), "window")["predictors"]["window"]["horizons"]["1"]
    assert numbers["recall_at_1"] is None and numbers["load_error"] > 0 and numbers["gap_closed_1"] is not None


def test_top_k_is_asked_at_k_and_more():
    numbers = told(scene(top_k=2), "markov")["predictors"]["markov"]["horizons"]["1"]
    assert numbers["recall_at_1"] < numbers["recall_at_2"] < numbers["recall_at_4"] <= numbers["recall_at_8"] == 1.0
    assert numbers["precision_at_8"] == pytest.approx(0.25)


def test_a_distance_beyond_the_stack_is_refused():
    with pytest.raises(InputError, match="1 to the 4 layers"):
        Scoreboard(scene(), {}, horizons=(5,))


def test_a_stack_of_one_layer_is_scored_from_the_tokens():
    report = told(scene(layers=1), "token-table")
    assert report["predictors"]["token-table"]["horizons"]["1"]["recall_at_1"] > 0.8
