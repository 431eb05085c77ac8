"""The executor against the Hugging Face forward of the same batches: 1, 2 and 3 ranks, every policy, both phases."""

import json
from pathlib import Path

import cases
import numpy as np
import pytest

from moesim.backend.launch import run_ranks
from moesim.sim.driver import DecisionLog
from moesim.sim.engine import simulate
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.profile import load_profile
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload

HERE = Path(__file__).parent
SIZES, PHASES = (1, 2, 3), ("encoder", "prefill")
RUNNABLE = [name for name, parts in POLICIES.items() if not parts.simulated_only]
CASES = [
    (phase, size, name) for phase in PHASES for size in SIZES for name in (RUNNABLE if size > 1 else ["contiguous"])
]
TIME_DOES_NOT_MATTER = ("contiguous", "balanced", "eplb")
"""Their copies, if any, block: decisions cannot depend on when something arrives."""
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Rank by rank what cases.py saw: {case: {policy: facts}}."""
    folder = tmp_path_factory.mktemp("cases")
    run_ranks([str(HERE / "cases.py"), str(folder)], max(SIZES), folder)
    return [json.loads((folder / f"cases-{rank}.json").read_text()) for rank in range(max(SIZES))]


@pytest.fixture(scope="module")
def recordings():
    """Phase to the recording of the tiny model."""
    return {phase: cases.recorded(cases.tiny_model(), phase == "prefill")[0] for phase in PHASES}


def facts(found, phase, size, policy):
    return [rank[f"{phase}-{size}"][policy] for rank in found[:size]]


@pytest.mark.parametrize(("phase", "size", "policy"), CASES)
def test_same_output_as_the_unpatched_model(found, phase, size, policy):
    ranks = facts(found, phase, size, policy)
    assert max(rank["difference"] for rank in ranks) <= TOLERANCE
    assert sum(rank["shares"] for rank in ranks) > 0


@pytest.mark.parametrize(("phase", "size", "policy"), CASES)
def test_every_token_is_computed_once_and_dropped_ones_never(found, phase, size, policy):
    for rank in facts(found, phase, size, policy):
        assert rank["computed"] == rank["routed"]
        assert rank["dropped"] > 0, "the cases must exceed the capacity"


@pytest.mark.parametrize("policy", RUNNABLE)
@pytest.mark.parametrize("phase", PHASES)
def test_the_shipped_model_too(found, phase, policy):
    ranks = [rank[f"shipped-{phase}"][policy] for rank in found[:2]]
    assert max(rank["difference"] for rank in ranks) <= TOLERANCE
    assert [rank["wrong_weights"] for rank in ranks] == [[], []]


@pytest.mark.parametrize("size", SIZES)
def test_recorded_routing_is_forced_on_the_layers_of_another_model(found, size):
    for rank in found[:size]:
        assert rank[f"replay-{size}"]["computed"] == rank[f"replay-{size}"]["recorded"]


@pytest.mark.parametrize("size", (2, 3))
def test_the_cases_cover_ranks_without_requests(found, size):
    for phase in PHASES:
        ranks = facts(found, phase, size, "contiguous")
        assert min(rank["shares"] for rank in ranks) < ranks[0]["steps"]
        assert max(rank["shares"] for rank in ranks) == ranks[0]["steps"]


@pytest.mark.parametrize("policy", RUNNABLE)
def test_all_ranks_decide_alike_and_phases_fill_the_step(found, policy):
    for size in (2, 3):
        for phase in PHASES:
            ranks = facts(found, phase, size, policy)
            assert len({rank["log"] for rank in ranks}) == 1
            assert all(rank["phases_add_up"] for rank in ranks)


@pytest.mark.parametrize("policy", [name for name in RUNNABLE if POLICIES[name].predictor])
def test_replicas_are_bit_identical_to_the_models_weights(found, policy):
    for size in (2, 3):
        ranks = facts(found, "encoder", size, policy)
        assert ranks[0]["transfers"] > 0 and ranks[0]["moved"] > 0, "the cases must copy something"
        assert [rank["wrong_weights"] for rank in ranks] == [[]] * size


@pytest.mark.parametrize(("phase", "size", "policy"), [case for case in CASES if case[2] in TIME_DOES_NOT_MATTER])
def test_decisions_equal_those_of_the_simulator(found, recordings, phase, size, policy):
    which = Phase[phase.upper()]
    scenario = make_scenario(
        cases.spec_of(cases.tiny_model()),
        recordings[phase],
        phase=which,
        gpus=size,
        workload=Workload(batch=cases.BATCH_TOKENS),
    )
    log = DecisionLog()
    result = simulate(
        scenario, make_policy(policy, scenario.cluster, scenario.fit), load_profile("8xA100-NVLink"), sink=log
    )
    (measured, *_) = facts(found, phase, size, policy)
    assert log.text() == measured["log"]
    assert [np.sum(step.load_LG, axis=1).tolist() for step in result.steps] == measured["computed"]
