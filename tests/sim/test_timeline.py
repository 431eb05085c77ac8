"""The timeline says what the event log says, and writing it changes no simulated time."""

import json
from dataclasses import replace

import pytest
from nodes import MS, node, scripted, two_layers

from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.profile import Link
from moesim.sim.residency import Transfer
from moesim.sim.results import Result, StepRecord, load_results, save_results
from moesim.sim.timeline import Span, span_timeline, spans_of, timeline
from moesim.traces import InputError

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


def test_spans_of_a_log_are_the_slices_of_its_timeline():
    _, events, made = run({(0, 0): [COPY]})
    slices = [e for e in made if e["ph"] == "X"]
    spans = spans_of(events)
    assert [s.name for s in spans] == [e["name"] for e in slices]
    assert [s.start_s * 1e6 for s in spans] == pytest.approx([e["ts"] for e in slices])
    assert {s.track for s in spans} == {"GPU 0", "GPU 1", "out of GPU 0", "into GPU 1"}


def test_simulated_and_measured_spans_are_two_processes_in_one_file():
    spans = [Span("experts", "GPU 10", 0.0, 1.0), Span("experts", "GPU 9", 0.5, 2.0), Span("decide", "GPU 9", 0.0, 0.0)]
    made = span_timeline({"eplb: simulated": spans[:2], "eplb: measured": spans})["traceEvents"]
    named = [(e["pid"], e["args"]["name"]) for e in made if e["name"] == "process_name"]
    assert named == [(1, "eplb: simulated"), (2, "eplb: measured")]
    rows = [e["args"]["name"] for e in made if e["name"] == "thread_name" and e["pid"] == 1]
    assert rows == ["GPU 9", "GPU 10"]
    slices = [(e["pid"], e["ts"], e["dur"]) for e in made if e["ph"] == "X"]
    assert slices == [(pid, *at) for pid in (1, 2) for at in ((0.0, 1e6), (0.5e6, 2e6))]
    with pytest.raises(InputError, match="no spans to draw"):
        span_timeline({"eplb: simulated": [], "eplb: measured": []})


def test_spans_survive_the_result_file(tmp_path):
    step = StepRecord(duration_s=1.0, tokens=1, phase_s={}, load_LG=[[1]], busy_s=[1.0])
    spans = [Span("experts", "GPU 0", 0.125, 1e-7), Span("experts", "GPU 1", 0.25, 0.5)]
    save_results([Result(kind="measured", policy="eplb", config={}, steps=[step], spans=spans)], tmp_path / "r.json")
    (back,) = load_results(tmp_path / "r.json")
    assert back.spans == spans
    damaged = (tmp_path / "r.json").read_text().replace('"tracks"', '"track"')
    (tmp_path / "r.json").write_text(damaged)
    with pytest.raises(InputError, match="damaged result"):
        load_results(tmp_path / "r.json")
