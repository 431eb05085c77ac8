"""What is computed from the event log alone equals what the engine says; critical paths; worker processes."""

import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from nodes import MS, node, quick_policy, scripted, two_layers

from helpers import make_spec, make_table, with_router_inputs
from moesim.sim.engine import simulate
from moesim.sim.events import result_of
from moesim.sim.execution import Execution
from moesim.sim.log import critical_path, read_log
from moesim.sim.policies import POLICIES, offloading
from moesim.sim.residency import Transfer
from moesim.sim.runs import Inputs, run_policies
from moesim.sim.scenario import make_scenario
from moesim.traces import InputError, Phase, Workload

COPY = Transfer(layer=1, expert=0, source=0, target=1, slot=3)
EXECUTIONS = {
    "plain": Execution(),
    "two micro-batches": Execution(micro_batches=2),
    "in turn": Execution(micro_batches=2, overlap=False),
    "tensor-parallel": Execution(tensor_parallel=2, send="per-gpu", contention="share"),
    "rounded": Execution(copy_dtype="int4", contention="pause"),
}


def scenario(resident=None, **table):
    made, gates = with_router_inputs(make_table(**{"requests": 40, "length": 16, **table}))
    workload = Workload(batch=96)
    return make_scenario(
        make_spec(), made, phase=Phase.ENCODER, gpus=4, workload=workload, resident=resident, gates=gates
    )


def logged(scene, name, profile=None, **options):
    lines = []
    policy = quick_policy(name, scene)
    result = simulate(scene, policy, profile or node(), events=lambda e: lines.append(json.dumps(e)), **options)
    return result, [json.loads(line) for line in lines]


@pytest.mark.parametrize("how", EXECUTIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_result_can_be_computed_from_its_log_alone_to_the_bit(name, how):
    scene = scenario(resident=1 if name in offloading() else None)
    result, events = logged(scene, name, execution=EXECUTIONS[how])
    assert asdict(result_of(events)) == asdict(result)
    assert json.dumps(result.metrics()) == json.dumps(result_of(events).metrics())


@pytest.mark.parametrize("how", EXECUTIONS)
@pytest.mark.parametrize("name", ["balanced", "eplb", "predictive-layer", "on-demand"])
def test_a_critical_path_is_as_long_as_its_step_and_has_no_gap(name, how):
    scene = scenario(resident=1 if name in offloading() else None)
    result, events = logged(scene, name, node(decide_s={name: 1e-3}), execution=EXECUTIONS[how])
    for number, step in enumerate(result.steps):
        path = critical_path(events, number)
        assert sum(link.seconds for link in path) == pytest.approx(step.duration_s, rel=1e-9)
        assert all(a.end_s == pytest.approx(b.begin_s, abs=1e-9) for a, b in pairwise(path))
        assert "waiting" not in {link.what for link in path}


def test_a_critical_path_by_hand():
    scene = two_layers()
    events = []
    simulate(scene, scripted(scene, {(0, 2): [replace(COPY, blocking=True)]}), node(), events=events.append)
    path = critical_path(events, 0)
    assert [link.text() for link in path] == [
        "attention layer 0 (GPU 0)",
        "communication layer 0",
        "experts layer 0 (GPU 0)",
        "communication layer 0",
        "attention layer 1 (GPU 0)",
        "blocked layer 1 (copy of layer 1 expert 0 from GPU 0 to GPU 1)",
        "communication layer 1",
        "experts layer 1 (GPU 0)",
        "communication layer 1",
    ]
    assert path[5].seconds == pytest.approx(4.5 * MS)
    with pytest.raises(InputError, match="no step 7"):
        critical_path(events, 7)


def test_logs_are_the_same_from_one_and_from_two_worker_processes(tmp_path):
    scene = scenario()
    names = ["contiguous", "eplb", "predictive-layer", "oracle"]
    texts = []
    for workers in (1, 2):
        logs = {log: tmp_path / f"{workers}-{log}" for log in ("events", "decisions")}
        results = list(run_policies(names, Inputs(scenario=scene, profile=node()), logs=logs, workers=workers))
        assert [result.policy for result in results] == names
        texts.append(([asdict(r) for r in results], {log: path.read_bytes() for log, path in logs.items()}))
    assert texts[0] == texts[1]
    found = read_log(tmp_path / "2-events")
    assert list(found) == names and result_of(found["eplb"]).totals == results[1].totals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no events"),
        ('{"policy": "a"}\n', "line 1: not an event"),
        ('{"policy": "a", "what": "idle", "time_s": 0}\n{"pol', "line 2: not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_damaged_logs_are_named(tmp_path, text, message):
    path = tmp_path / "events.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as error:
        read_log(path)
    assert "events.jsonl" in str(error.value)


def test_a_log_that_was_cut_short_is_refused():
    _, events = logged(scenario(), "eplb")
    with pytest.raises(InputError, match="does not hold a whole run"):
        result_of(events[:-1])
    with pytest.raises(InputError, match="does not hold a whole run"):
        result_of(events[1:])
    with pytest.raises(InputError, match="damaged"):
        result_of([{k: v for k, v in event.items() if k != "gpu_s"} for event in events])
