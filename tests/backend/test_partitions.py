"""Partitions of a CPU: exact under every policy, copies that cannot be read too early, records that add up."""

import copy
import threading
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch

from moesim.backend import partition_copies
from moesim.backend.experts import ExpertShape
from moesim.backend.green import split
from moesim.backend.partition_calibrate import Effort, calibrate_partitions
from moesim.backend.partition_copies import PartitionCopies
from moesim.backend.partition_experts import PartitionSlots
from moesim.backend.partition_fit import PhaseSamples
from moesim.backend.partition_session import calibration_executor
from moesim.backend.partitions import PartitionExecutor
from moesim.backend.queues import Queues
from moesim.sim.driver import DecisionLog
from moesim.sim.engine import simulate
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.profile import load_profile
from moesim.sim.residency import Cluster, Residency, Transfer
from moesim.sim.scenario import make_scenario
from moesim.sim.totals import PHASES
from moesim.traces import InputError, Phase, PolicyError, Workload

CPU = torch.device("cpu")
RUNNABLE = [name for name, parts in POLICIES.items() if not parts.simulated_only]
TIME_DOES_NOT_MATTER = ("contiguous", "balanced", "eplb")
TOLERANCE = 1e-5
RUNS = (
    (Phase.ENCODER, 1, ["contiguous"]),
    (Phase.ENCODER, 3, RUNNABLE),
    (Phase.PREFILL, 2, ["contiguous", "eplb", "predictive-layer", "oracle-batch"]),
)


@pytest.fixture(scope="module")
def found():
    """{(phase, partitions): (scenario, what the unpatched model says, {policy: facts})}, slots poisoned."""
    model = cases.tiny_model()
    seen = {}
    for phase, size, policies in RUNS:
        recording, encoder_table = cases.recorded(copy.deepcopy(model), phase is Phase.PREFILL)
        scenario = scenario_of(model, recording, phase, size)
        wanted = cases.expected(model, scenario, encoder_table, together=True)
        executor = PartitionExecutor(CPU, copy.deepcopy(model), scenario, encoder_table, poison=True)
        facts = {name: run(executor, name, wanted) for name in policies}
        executor.close()
        seen[phase.name, size] = (scenario, wanted, facts)
    return seen


def scenario_of(model, recording, phase, size, **more):
    workload = Workload(batch=cases.BATCH_TOKENS)
    return make_scenario(cases.spec_of(model), recording, phase=phase, gpus=size, workload=workload, **more)


def run(executor, name, wanted):
    scenario, differences = executor.scenario, []

    def keep(number, hidden):
        differences.append(float((hidden - wanted[number][0]).abs().max().nan_to_num(nan=9e9)))

    log = DecisionLog()
    records = executor.run(make_policy(name, scenario.cluster, scenario.fit), log, keep)
    return {"differences": differences, "records": records, "log": log.text(), "scores": executor.scores(),
            "spans": executor.spans(), "wrong": wrong_weights(executor)}  # fmt: skip


def wrong_weights(executor):
    """(layer, expert, partition) whose slot differs in any bit from the model's weights."""
    residency = executor.residency
    return [
        [layer, expert, gpu]
        for layer, expert, gpu in np.argwhere(residency.usable_LEG).tolist()
        if not torch.equal(
            executor.slots[gpu].rows_SP[residency.slot(layer, expert, gpu)], executor.patched.weights_LE[layer][expert]
        )
    ]


CASES = [(phase.name, size, name) for phase, size, policies in RUNS if size > 1 for name in policies]


@pytest.mark.parametrize(("phase", "size", "policy"), [("ENCODER", 1, "contiguous"), *CASES])
def test_same_output_as_the_unpatched_model_and_every_token_once(found, phase, size, policy):
    scenario, wanted, facts = found[phase, size]
    seen = facts[policy]
    assert len(seen["differences"]) == len(scenario.batches)
    assert max(seen["differences"]) <= TOLERANCE
    computed = [np.sum(record.load_LG, axis=1).tolist() for record in seen["records"]]
    assert computed == [(~dropped).sum(axis=0).tolist() for _, _, dropped in wanted]
    assert sum(dropped.sum() for _, _, dropped in wanted) > 0, "the cases must exceed the capacity"


@pytest.mark.parametrize(("phase", "size", "policy"), CASES)
def test_replicas_are_the_models_weights_and_every_copy_is_counted(found, phase, size, policy):
    scenario, _, facts = found[phase, size]
    seen = facts[policy]
    assert seen["wrong"] == []
    # Copies that are still under way when the last step ends are finished, but belong to no step.
    moved = sum(record.moved_bytes for record in seen["records"])
    assert seen["scores"]["copies"] == seen["scores"]["transfers"]
    assert moved <= seen["scores"]["transfers"] * scenario.spec.expert_bytes("float32")
    assert (seen["scores"]["transfers"] > 0) == bool(POLICIES[policy].predictor)


@pytest.mark.parametrize(("phase", "size", "policy"), CASES)
def test_phases_fill_the_step_and_busy_times_fit_into_it(found, phase, size, policy):
    for record in found[phase, size][2][policy]["records"]:
        assert set(record.phase_s) == set(PHASES) and min(record.phase_s.values()) >= 0
        assert sum(record.phase_s.values()) == pytest.approx(record.duration_s, rel=1e-9)
        assert max(record.busy_s) <= record.phase_s["attention"] + record.phase_s["experts"] + 1e-9
    shares = found[phase, size][2][policy]["scores"]
    assert 0 < shares["expert_busy_share"] <= 1
    spans = found[phase, size][2][policy]["spans"]
    assert {f"GPU {g}" for g in range(size)} <= {span.track for span in spans}
    total_s = sum(record.duration_s for record in found[phase, size][2][policy]["records"])
    assert max(span.start_s + span.duration_s for span in spans) == pytest.approx(total_s)


@pytest.mark.parametrize(("phase", "size", "policy"), [case for case in CASES if case[2] in TIME_DOES_NOT_MATTER])
def test_decisions_equal_those_of_the_simulator(found, phase, size, policy):
    scenario, _, facts = found[phase, size]
    log = DecisionLog()
    made = make_policy(policy, scenario.cluster, scenario.fit)
    simulate(scenario, made, load_profile("8xA100-NVLink"), sink=log)
    assert log.text() == facts[policy]["log"]


def test_a_replica_is_not_used_before_its_copy_is_done(monkeypatch):
    """Copies that end only when the run is over: all are late, none is computed from, and outputs stay right."""
    model = cases.tiny_model()
    recording, _ = cases.recorded(copy.deepcopy(model), False)
    scenario = scenario_of(model, recording, Phase.ENCODER, 2, max_steps=3)
    wanted = cases.expected(model, scenario, together=True)
    over, write = threading.Event(), partition_copies._write

    def slow(target_P, source_P):
        over.wait(60)
        write(target_P, source_P)

    monkeypatch.setattr(partition_copies, "_write", slow)
    executor = PartitionExecutor(CPU, copy.deepcopy(model), scenario, poison=True)
    drain = PartitionCopies.drain
    monkeypatch.setattr(PartitionCopies, "drain", lambda self: (over.set(), drain(self)))
    seen = run(executor, "predictive-batch", wanted)
    executor.close()
    assert seen["scores"]["transfers"] > 0 and seen["scores"]["late_transfers"] > 0
    assert max(seen["differences"]) <= TOLERANCE
    assert sum(record.moved_bytes for record in seen["records"]) == 0


def test_experts_that_change_places_at_once_are_read_before_they_are_overwritten():
    cluster = Cluster(layers=1, experts=3, gpus=3, extra_slots=1)
    groups = split(CPU, 3)
    queues = Queues(CPU, groups, 3)
    shape = ExpertShape(d_model=4, d_ff=8, dtype=torch.float32)
    slots = [PartitionSlots(cluster, shape, "relu", CPU) for _ in range(3)]
    rows = torch.randn(3, shape.params)
    residency = Residency(cluster)
    residency.place(np.array([[[0, -1], [1, -1], [2, -1]]]))
    for gpu in range(3):
        slots[gpu].claim(0, (0, gpu)).copy_(rows[gpu])
    copies = PartitionCopies(queues, slots, poison=True)
    # Round in a circle, each into the slot that another is read from, and one more copy of an expert that moves.
    moves = [
        Transfer(layer=0, expert=(g + 1) % 3, source=(g + 1) % 3, target=g, slot=0, blocking=True, serial=g)
        for g in range(3)
    ]
    moves.append(Transfer(layer=0, expert=0, source=0, target=0, slot=1, blocking=True, serial=3))
    residency.begin(moves)
    copies.start(moves)
    arrivals = copies.wait_blocking(residency)
    assert [arrival.transfer for arrival in arrivals] == moves and not any(a.hidden for a in arrivals)
    for gpu in range(3):
        assert torch.equal(slots[gpu].rows_SP[0], rows[(gpu + 1) % 3])
    assert torch.equal(slots[0].rows_SP[1], rows[0])
    with pytest.raises(PolicyError, match="not available between partitions"):
        copies.start([replace(moves[0], free=True)])
    queues.close()


def test_a_failing_partition_ends_the_run_with_its_error(monkeypatch):
    from moesim.backend import partition_experts

    model = cases.tiny_model()
    recording, _ = cases.recorded(copy.deepcopy(model), False)
    executor = PartitionExecutor(CPU, copy.deepcopy(model), scenario_of(model, recording, Phase.ENCODER, 2))

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(partition_experts, "compute", fail)
    with pytest.raises(RuntimeError, match="no such kernel"):
        executor.run(make_policy("contiguous", executor.scenario.cluster, executor.scenario.fit))
    executor.queues.close()


def test_recorded_routing_is_forced_on_random_weights():
    model = cases.tiny_model(seed=5)
    recording, _ = cases.recorded(cases.tiny_model(), False)
    no_words = replace(recording, token_id=None)
    scenario = scenario_of(model, no_words, Phase.ENCODER, 2, max_steps=2)
    executor = PartitionExecutor(CPU, model, scenario, routing="replay")
    records = executor.run(make_policy("balanced", scenario.cluster, scenario.fit))
    executor.close()
    for record, step in zip(records, scenario.steps(), strict=True):
        assert np.sum(record.load_LG, axis=1).tolist() == (~step.dropped).sum(axis=0).tolist()
    assert executor.describe()["routing"] == "replay"


def test_what_cannot_run_is_said_in_one_line():
    model = cases.tiny_model()
    recording, _ = cases.recorded(copy.deepcopy(model), False)
    scenario = scenario_of(model, recording, Phase.ENCODER, 2)
    two, more = replace(scenario.spec, top_k=2), replace(scenario.spec, num_experts=9)
    for wrong, routing, says in (
        (replace(scenario, phase=Phase.DECODE), "model", "decode steps"),
        (replace(scenario, phase=Phase.PREFILL), "model", "record both stacks"),
        (replace(scenario, spec=two), "model", "top-k 2, the model has 1"),
        (replace(scenario, workload=replace(scenario.workload, chunked=True)), "model", "chunked prefill"),
        (scenario, "guess", "--routing must be"),
        (replace(scenario, spec=more), "replay", "experts 9, the model has 8"),
    ):
        with pytest.raises(InputError, match=says):
            PartitionExecutor(CPU, copy.deepcopy(model), wrong, routing=routing)
    with pytest.raises(InputError, match="unknown kernel 'grouped_mm'"):
        PartitionExecutor(CPU, copy.deepcopy(model), scenario, kernel="grouped_mm")


def test_calibration_measures_every_term_and_the_profile_simulates():
    model = cases.tiny_model()
    recording, _ = cases.recorded(copy.deepcopy(model), False)
    scenario = scenario_of(model, recording, Phase.ENCODER, 2, max_steps=3)
    executor = calibration_executor(CPU, copy.deepcopy(model), 2, 1)
    effort = Effort(samples=1, repeats=1, decision_steps=2)
    profile, raw = calibrate_partitions(
        executor, dtype="float32", batch=256, policies=["contiguous"], source="tiny", effort=effort
    )
    executor.close()
    assert profile.gpus == 2 and profile.measured and "cpu threads" in profile.provenance.device
    assert profile.decide_s["contiguous"] > 0 and profile.links.p2p.curve is not None
    assert profile.gpu.attention.launch_s >= 0 and profile.gpu.shared_slowdown >= 0
    samples = PhaseSamples.from_dict(raw)
    tokens_NEG, busy_NG = samples.tokens_NEG, samples.busy_NG
    assert ((busy_NG > 0) == (tokens_NEG.sum(axis=1) > 0)).all()
    alone = (tokens_NEG.sum(axis=1) > 0).sum(axis=1) == 1
    assert 0 < alone.sum() < len(alone), "partitions are measured together and alone"
    assert (samples.phase_N >= busy_NG.max(axis=1)).all()
    result = simulate(scenario, make_policy("contiguous", scenario.cluster, scenario.fit), profile)
    assert result.phase_s()["experts"] > 0 and result.phase_s()["decide"] > 0


def test_the_kernels_get_what_they_document(monkeypatch):
    """The way of a GPU with stand-ins that do what kernels.py says of its own: the same results as the loop."""
    from moesim.backend import kernels, partition_experts

    seen = []

    def grouped_up(x_ND, source_M, offsets_X1, slot_X, up_SFD, *, activation, gated, tile):
        assert (activation, gated) == ("relu", False) and source_M.dtype == torch.int64
        assert offsets_X1.dtype == slot_X.dtype == torch.int32 and len(offsets_X1) == len(slot_X) + 1
        assert source_M.data_ptr() % 16 == offsets_X1.data_ptr() % 16 == 0, "or kernels are compiled for each alignment"
        assert int(offsets_X1[0]) == 0 and int(offsets_X1[-1]) == len(source_M)
        seen.append(tile)
        rows = [x_ND[source_M[a:b]] @ up_SFD[slot].T for slot, a, b in bounds(offsets_X1, slot_X)]
        return torch.cat(rows).relu()

    def grouped_down(h_MF, target_M, scale_P, offsets_X1, slot_X, down_SDF, out_PD, *, tile):
        for slot, a, b in bounds(offsets_X1, slot_X):
            out_PD[target_M[a:b]] = (h_MF[a:b] @ down_SDF[slot].T) * scale_P[target_M[a:b], None]

    def bounds(offsets_X1, slot_X):
        offsets = offsets_X1.tolist()
        return zip(slot_X.tolist(), offsets, offsets[1:], strict=False)

    monkeypatch.setattr(kernels, "grouped_up", grouped_up)
    monkeypatch.setattr(kernels, "grouped_down", grouped_down)
    monkeypatch.setattr(partition_experts, "kernel_of", lambda *_: "triton")
    model = cases.tiny_model()
    recording, _ = cases.recorded(copy.deepcopy(model), False)
    scenario = scenario_of(model, recording, Phase.ENCODER, 3, max_steps=4)
    wanted = cases.expected(model, scenario, together=True)
    executor = PartitionExecutor(CPU, copy.deepcopy(model), scenario)
    found = run(executor, "predictive-batch", wanted)
    executor.close()
    assert max(found["differences"]) <= TOLERANCE and len(set(seen)) == 1
