"""The driver with every policy: conservation, causality, scores, and the decision log."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import quick_policy

from helpers import make_spec, make_table, with_router_inputs
from moesim.sim.driver import DecisionLog, Driver
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.scenario import make_scenario, rank_counts
from moesim.traces import InputError, Phase, PolicyError, Workload

CAUSAL = [name for name, recipe in POLICIES.items() if not recipe.clairvoyant]


def scenario(gpus=2, extra_slots=1, batch_tokens=64, **table):
    made, gates = with_router_inputs(make_table(**table))
    spec = make_spec(made.num_layers, 8, top_k=made.topk_ids.shape[2])
    return make_scenario(
        spec,
        made,
        phase=Phase.ENCODER,
        gpus=gpus,
        workload=Workload(batch=batch_tokens),
        extra_slots=extra_slots,
        gates=gates,
    )


def run(scene, name, *, arrive=True, until=None, change=None):
    """All steps; copies arrive at once or never. `change` may alter the routing of a step before it is seen."""
    log = DecisionLog()
    driver = Driver(quick_policy(name, scene), log)
    sends = []
    for number, step in enumerate(scene.steps()):
        ids = step.ids if change is None else change(number, step.ids.copy())
        moves = driver.begin_step(step.tokens, queued=step.queued, truth=(ids, step.queued_ids))
        for layer in range(scene.cluster.layers):
            for t in moves:
                if arrive or t.blocking or t.free:
                    driver.arrived(t)
            if (number, layer) == until:
                return driver, log, sends
            moves = driver.routed(replace(step.layer(layer), ids=ids[:, layer]))
            for t in moves:
                if t.free:
                    driver.arrived(t)
            counts = rank_counts(ids[:, layer], step.dropped[:, layer], step.rank, scene.cluster)
            sends.append((counts, driver.dispatch(counts)))
        driver.end_step()
    return driver, log, sends


@pytest.mark.parametrize("name", POLICIES)
@given(seed=st.integers(0, 1000), gpus=st.integers(1, 4), extra=st.integers(0, 2), top_k=st.integers(1, 2))
@settings(max_examples=4, deadline=None)
def test_every_policy_carries_every_kept_token_exactly_k_times(name, seed, gpus, extra, top_k):
    scene = scenario(gpus=gpus, extra_slots=extra, requests=10, length=16, seed=seed, top_k=top_k)
    _, _, sends = run(scene, name)
    for counts, send in sends:
        assert (send.sum(axis=2) == counts).all()
    kept = sum(int((~step.dropped).sum()) for step in scene.steps())
    assert sum(int(send.sum()) for _, send in sends) == kept * top_k


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cut", [(2, 1), (3, 0), (5, 2)])
def test_scrambling_the_future_changes_no_earlier_decision(name, cut):
    scene = scenario(requests=32)
    rng = np.random.default_rng(7)

    def scramble(number, ids_TLK):
        if number > cut[0]:
            return rng.permutation(ids_TLK)
        if number == cut[0]:
            ids_TLK[:, cut[1] :] = rng.permutation(ids_TLK[:, cut[1] :])
        return ids_TLK

    _, plain, _ = run(scene, name, until=cut)
    _, scrambled, _ = run(scene, name, until=cut, change=scramble)
    assert plain.text() == scrambled.text()


def test_an_oracle_does_see_the_future_so_the_test_above_can_fail():
    scene = scenario(requests=32)
    rng = np.random.default_rng(7)

    def scramble(number, ids_TLK):
        return rng.integers(0, 8, ids_TLK.shape) if number >= 2 else ids_TLK

    _, plain, _ = run(scene, "oracle", until=(2, 1))
    _, scrambled, _ = run(scene, "oracle", until=(2, 1), change=scramble)
    assert plain.text() != scrambled.text()


def mean_balance(sends):
    loads = [send.sum(axis=(0, 1)) for _, send in sends]
    return np.mean([load.mean() / load.max() for load in loads])


def test_policies_rank_as_they_should_on_predictable_routing():
    scene = scenario(gpus=4, requests=160, noise=0.1, batch_tokens=128)
    names = ("balanced", "eplb", "predictive-layer", "predictive-batch", "oracle")
    balance = {name: mean_balance(run(scene, name)[2]) for name in names}
    assert balance["balanced"] < balance["eplb"] < balance["oracle"]
    assert balance["balanced"] < balance["predictive-layer"] <= balance["oracle"] + 0.01
    assert balance["balanced"] < balance["predictive-batch"] <= balance["oracle"] + 0.01


def test_balanced_placement_separates_neighbours_that_are_both_hot():
    scene = scenario(gpus=4, requests=64)

    two_hot = replace(scene.fit, topk_ids=scene.fit.topk_ids % 2)
    hot = make_policy("balanced", scene.cluster, two_hot)
    where = {int(e): g for g, row in enumerate(hot.placed_LGS[0]) for e in row}
    assert where[0] != where[1], "experts 0 and 1 take all tokens and share a GPU"


def test_a_replica_that_has_not_arrived_is_not_used_and_is_counted_late():
    scene = scenario(gpus=4, requests=64, noise=0.1, batch_tokens=128)
    late, _, without = run(scene, "predictive-layer", arrive=False)
    _, _, static = run(scene, "balanced")
    assert all((a[1] == b[1]).all() for a, b in zip(without, static, strict=True))
    assert late.scores.late > 0
    assert run(scene, "predictive-layer")[0].scores.late == 0


def test_scores_of_a_perfect_forecast():
    driver, _, _ = run(scenario(), "oracle")
    scores = driver.scores.summary()
    assert scores["load_error"] == 0 and scores["recall"] == 1 and scores["overloaded_recall"] == 1


def test_eplb_moves_only_every_eighth_step_and_blocks():
    scene = scenario(requests=64, batch_tokens=32)
    _, log, _ = run(scene, "eplb")
    moves = [line for line in log.lines if '"decision":"transfers"' in line]
    assert moves and all('"point":0' in line and '"blocking":false' not in line for line in moves)
    steps = {int(line.split('"step":')[1].split(",")[0]) for line in moves}
    assert steps <= {8, 16, 24}


def test_same_inputs_same_decisions():
    scene = scenario()
    assert run(scene, "predictive-batch")[1].text() == run(scene, "predictive-batch")[1].text()


def test_unknown_policy_lists_the_known_ones():
    scene = scenario()
    with pytest.raises(InputError, match="unknown policy 'best'; known: contiguous, balanced"):
        make_policy("best", scene.cluster, scene.fit)


def test_oracle_without_a_recording_is_an_error():
    scene = scenario()
    step = next(scene.steps())
    with pytest.raises(InputError, match="needs a recorded trace"):
        Driver(make_policy("oracle", scene.cluster, scene.fit)).begin_step(step.tokens)


def test_a_rule_that_asks_for_the_impossible_is_refused():
    scene = scenario()
    policy = make_policy("contiguous", scene.cluster, scene.fit)
    residency = policy.start()
    with pytest.raises(PolicyError, match="shape"):
        residency.place(np.zeros((1, 1, 1), np.int32))
