"""The timeline says what the event log says, and writing it changes no simulated time."""

import json
from dataclasses import replace

import pytest
from nodes import MS, node, scripted, two_layers

from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.profile import Link
from moesim.sim.residency import Transfer
from moesim.sim.timeline import timeline

COPY = Transfer(layer=1, expert=0, source=0, target=1, slot=3)


def run(moves, profile=None, **options):
    events = []
    scene = two_layers()
    result = simulate(scene, scripted(scene, moves), profile or node(), events=events.append, **options)
    return result, events, timeline({"scripted": events})["traceEvents"]


def test_slices_counters_and_flows():
    result, events, made = run({(0, 0): [COPY]})
    rows = {e["args"]["name"]: e["tid"] for e in made if e["name"] == "thread_name"}
    assert list(rows) == ["GPU 0", "GPU 1", "out of GPU 0", "into GPU 1"]
    assert next(e for e in made if e["name"] == "process_name")["args"]["name"] == "scripted"
    slices = [e for e in made if e["ph"] == "X"]
    copies = [e for e in slices if e["name"] == "layer 1 expert 0 to GPU 1"]
    assert {e["tid"] for e in copies} == {rows["out of GPU 0"], rows["into GPU 1"]}
    assert all(e["dur"] == pytest.approx(4500) for e in copies)
    assert [e["ph"] for e in made if e["name"] == "copy"] == ["s", "f"]
    # What a GPU computed is what the result says, and nothing lasts beyond the step.
    busy = sum(e["dur"] for e in slices if e["tid"] == rows["GPU 0"] and e["name"] in ("attention", "experts"))
    assert busy == pytest.approx(result.steps[0].busy_s[0] * 1e6)
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(result.steps[0].duration_s * 1e6)
    assert [e["args"]["max / mean"] for e in made if e["ph"] == "C"] == [1, 1]
    assert len(json.dumps(made)) > 100 and len(events) > 5


def test_imbalance_and_waiting_for_a_blocking_copy():
    _, _, made = run({(0, 2): [replace(COPY, blocking=True)]})
    assert sum(e["name"] == "blocked" for e in made) == 2  # both GPUs wait
    _, _, alone = run({})
    assert [e["args"]["max / mean"] for e in alone if e["ph"] == "C"] == [1, 2]


@pytest.mark.parametrize("contention", ["none", "pause", "share"])
def test_looking_changes_no_simulated_time(contention):
    scene = two_layers(steps=3)
    moves = {(0, 0): [COPY], (1, 0): [replace(COPY, target=1, layer=0, slot=1)]}
    slow = node(p2p=Link(latency_s=20 * MS, bytes_per_s=1.024e6))

    def times(**options):
        result = simulate(scene, scripted(scene, moves), slow, execution=Execution(contention=contention), **options)
        return [(step.duration_s, step.phase_s, step.load_LG) for step in result.steps]

    assert times() == times(events=[].append) == times(events=[].append, sink=[].append)


def test_contention_lengthens_what_meets():
    """A copy that is longer than layer 0's attention meets its all-to-alls."""
    moves, slow = {(0, 0): [COPY]}, node(p2p=Link(latency_s=12 * MS, bytes_per_s=1.024e6))
    spent = {
        c: run(moves, slow, execution=Execution(contention=c))[0].phase_s()["communication"]
        for c in ("none", "pause", "share")
    }
    assert spent["none"] == pytest.approx(spent["pause"]) and spent["share"] > 1.1 * spent["none"]

    def ended(contention):
        return next(
            e["time_s"]
            for e in run(moves, slow, execution=Execution(contention=contention))[1]
            if e["what"] == "transfer ends"
        )

    assert ended("none") < ended("pause")
