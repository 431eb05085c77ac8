"""Open loops: arrivals, continuous batching by hand, and what must hold for whatever comes."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import node
from scipy import stats

from helpers import make_spec, make_table
from moesim.sim.arrivals import Arrivals, parse_arrivals
from moesim.sim.engine import simulate
from moesim.sim.events import result_of
from moesim.sim.policies import make_policy
from moesim.sim.requests import RequestTotals
from moesim.sim.scenario import make_scenario
from moesim.sim.serving import Server, Serving, kv_tokens
from moesim.traces import InputError, Phase, StackSpec, Workload, concat

PROMPT, OUTPUT = 6, 4
DECODER = make_spec(stacks=(StackSpec(name="decoder", num_layers=3, moe_layers=(0, 1, 2)),))


def recording(requests=24):
    """Prompts of 6 tokens, then 3 further passes: 4 output tokens."""
    table = make_table(requests=requests, length=PROMPT + OUTPUT - 1, phase=Phase.PREFILL)
    table.phase[table.position >= PROMPT] = Phase.DECODE
    return table


def scenario(budget=16, gpus=2, requests=24, **options):
    workload = Workload(batch=budget, split="alternate")
    return make_scenario(
        DECODER, recording(requests), phase=Phase.DECODE, gpus=gpus, workload=workload, served=True, **options
    )


def server(scene, times, kv=None, **options):
    arrivals = Arrivals(kind="recorded", recorded_s=tuple(times), name="here")
    return Server(scene, Serving(arrivals=arrivals, requests=len(times), **options), scene.cluster.gpus, kv)


def steps(made, seconds=1.0):
    """(time, [(request, position) ...]) of every step when each takes `seconds`."""
    now, found = 0.0, []
    while (step := made.next(now)) is not None:
        if isinstance(step, float):
            now = step
            continue
        found.append((now, list(zip(step.tokens.request.tolist(), step.tokens.position.tolist(), strict=True)), step))
        now += seconds
        made.ended(now)
    return found


def test_continuous_batching_by_hand():
    """A budget of 8: the first prompt and the beginning of the second; then decode goes first, prompts fill up."""
    found = [(now, tokens) for now, tokens, _ in steps(server(scenario(budget=8), [0.0, 0.0, 20.0]))]
    first, second = ([(r, p) for p in range(9)] for r in (0, 1))
    assert found[0] == (0.0, first[:6] + second[:2])
    assert found[1] == (1.0, [first[6], *second[2:6]])
    assert found[2] == (2.0, [first[7], second[6]])
    assert found[3] == (3.0, [first[8], second[7]])
    assert found[4] == (4.0, [second[8]])
    assert found[5] == (20.0, [(2, p) for p in range(6)]), "nothing to do until the third comes"


def test_a_prompt_longer_than_the_budget_is_cut_and_reads_its_cache():
    found = steps(server(scenario(budget=4), [0.0]))
    assert [len(tokens) for _, tokens, _ in found] == [4, 2, 1, 1, 1]
    assert [step.decode.any() for *_, step in found] == [False, False, True, True, True]
    assert found[1][1][0] == (0, 4), "the second part begins at position 4: the cost model counts what is cached"


def test_an_encoder_s_requests_are_not_cut():
    made = make_table(requests=24, length=6)
    scene = make_scenario(
        make_spec(), made, phase=Phase.ENCODER, gpus=2, workload=Workload(batch=8, split="alternate"), served=True
    )
    assert [len(tokens) for _, tokens, _ in steps(server(scene, [0.0] * 3))] == [6, 6, 6]


def test_requests_wait_for_room_in_the_kv_cache_and_for_their_turn():
    waiting = steps(server(scenario(budget=64, gpus=1), [0.0] * 3, kv=20))
    assert [len({r for r, _ in tokens}) for _, tokens, _ in waiting[:5]] == [2, 2, 2, 2, 1]
    one = steps(server(scenario(budget=64, gpus=1), [0.0] * 3, max_running=1))
    assert all(len({r for r, _ in tokens}) == 1 for _, tokens, _ in one)
    with pytest.raises(InputError, match="a request has 9 tokens, the KV cache of a GPU has room for 8"):
        server(scenario(), [0.0], kv=8)


@given(
    budget=st.integers(1, 40),
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=20),
    kv=st.integers(9, 60),
    running=st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_every_token_is_computed_once_in_order_and_within_all_limits(budget, gaps, kv, running):
    scene = scenario(budget=budget)
    times = np.cumsum(gaps).tolist()
    found = steps(server(scene, times, kv=kv, max_running=running))
    computed = [token for _, tokens, _ in found for token in tokens]
    assert sorted(computed) == [(r, p) for r in range(len(times)) for p in range(9)]
    home = {}
    for now, tokens, step in found:
        assert len(tokens) <= budget and len({r for r, _ in tokens}) <= running
        for (request, position), rank in zip(tokens, step.rank.tolist(), strict=True):
            assert now >= times[request] and home.setdefault(request, rank) == rank, "its KV cache lies there"
            assert not (position >= PROMPT) or len([t for t in tokens if t[0] == request]) == 1


def test_the_times_of_requests_from_a_whole_run():
    scene = scenario()
    arrivals = Arrivals(kind="poisson", rate_per_s=20.0)
    made = Server(scene, Serving(arrivals=arrivals, requests=40, seed=3, ttft_s=0.3, tpot_s=0.1), 2, None)
    events = []
    policy = make_policy("predictive-layer", scene.cluster, scene.fit)
    result = simulate(scene, policy, node(), source=made, events=events.append)
    done = [e for e in events if e["what"] == "request done"]
    assert len(done) == 40 and result.serving["requests"] == 40
    ttft = np.array([e["first_token_s"] - e["arrival_s"] for e in done])
    tpot = np.array([(e["time_s"] - e["first_token_s"]) / 3 for e in done])
    total = np.array([e["time_s"] - e["arrival_s"] for e in done])
    for name, seconds in {"ttft_s": ttft, "tpot_s": tpot, "latency_s": total}.items():
        expected = np.percentile(seconds, [50, 95, 99])
        assert [result.serving[name][p] for p in ("p50", "p95", "p99")] == pytest.approx(expected)
    good = ((ttft <= 0.3) & (tpot <= 0.1)).sum()
    assert 0 < good < 40, "the targets tell requests apart"
    assert result.serving["goodput_per_s"] == pytest.approx(good / events[-1]["time_s"])
    idle = sum(e["duration_s"] for e in events if e["what"] == "idle")
    assert result.totals.idle_s == pytest.approx(idle) and result.total_s == pytest.approx(events[-1]["time_s"])
    assert result.metrics()["time_shares"]["idle"] >= idle / result.total_s - 1e-9
    assert result_of(json.loads(json.dumps(events))).serving == result.serving


def test_little_s_law_on_requests():
    """Mean number in the system = arrival rate x mean latency, both counted from the log."""
    scene = scenario(requests=60)
    made = Server(scene, Serving(arrivals=Arrivals(kind="poisson", rate_per_s=40.0), requests=60), 2, None)
    events = []
    simulate(scene, make_policy("balanced", scene.cluster, scene.fit), node(), source=made, events=events.append)
    done = [e for e in events if e["what"] == "request done"]
    times = sorted([(e["arrival_s"], 1) for e in done] + [(e["time_s"], -1) for e in done])
    area, here = 0.0, 0
    for (now, change), (later, _) in pairwise(times):
        here += change
        area += here * (later - now)
    span = times[-1][0]
    rate, stay = len(done) / span, np.mean([e["time_s"] - e["arrival_s"] for e in done])
    assert area / span == pytest.approx(rate * stay, rel=1e-9)


def test_more_load_waits_longer():
    def queueing(rate):
        scene = scenario(requests=60)
        made = Server(scene, Serving(arrivals=Arrivals(kind="poisson", rate_per_s=rate), requests=60), 2, None)
        policy = make_policy("balanced", scene.cluster, scene.fit)
        return simulate(scene, policy, node(), source=made).serving["queueing_s"]["p95"]

    assert queueing(5.0) < queueing(20.0) < queueing(80.0)


@pytest.mark.parametrize(("text", "cv"), [("poisson:50", 1.0), ("gamma:50:3", 3.0), ("gamma:50:0.25", 0.25)])
def test_random_arrivals_have_the_rate_and_the_variation_that_were_asked_for(text, cv):
    gaps = np.diff(parse_arrivals(text).times(20_000, 1), prepend=0)
    half = stats.norm.ppf(0.995) * cv / np.sqrt(len(gaps))
    assert gaps.mean() * 50 == pytest.approx(1, abs=half)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert (parse_arrivals(text).times(5, 7) == parse_arrivals(text).times(5, 7)).all()


@pytest.mark.parametrize(
    "text",
    [
        "1.5\n1\n3.25\n",
        "arrival_s,x\n2,a\n1.5,b\n3.75,c\n",
        '{"timestamp": 500}\n{"timestamp": 0}\n{"timestamp": 2250}\n',
    ],
)
def test_recorded_arrivals_are_counted_from_the_first(tmp_path, text):
    (tmp_path / "times").write_text(text)
    arrivals = parse_arrivals(str(tmp_path / "times"))
    assert arrivals.times(3, 0).tolist() == [0, 0.5, 2.25]
    with pytest.raises(InputError, match="3 arrivals are recorded, 4 are asked for"):
        arrivals.times(4, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poisson", "not of the form poisson:RATE"),
        ("poisson:-1", "not of the form"),
        ("poisson:inf", "not of the form"),
        ("gamma:3", "not of the form"),
        ("gamma:3:0", "not of the form"),
        ("none.csv", "cannot be read"),
    ],
)
def test_arrivals_that_make_no_sense(text, message):
    with pytest.raises(InputError, match=message):
        parse_arrivals(text)


@pytest.mark.parametrize(
    "content", ["", "soon\n", "nan\n", '{"when": 1}\n', '{"timestamp": null}\n', "[1, 2]\n", "{" * 9999]
)
def test_damaged_files_of_arrivals(tmp_path, content):
    (tmp_path / "times").write_text(content)
    with pytest.raises(InputError, match="times"):
        parse_arrivals(str(tmp_path / "times"))


def test_what_cannot_be_served():
    with pytest.raises(InputError, match="give --batch-tokens"):
        workload = Workload(batch=4, unit="requests", split="alternate")
        scene = make_scenario(DECODER, recording(), phase=Phase.PREFILL, gpus=2, workload=workload, served=True)
        server(scene, [0.0])
    table = recording()
    only = table.take(table.phase == Phase.DECODE)
    scene = make_scenario(DECODER, only, phase=Phase.DECODE, gpus=2, workload=Workload(split="alternate"), served=True)
    with pytest.raises(InputError, match="12 recorded requests have no prompt"):
        server(scene, [0.0])
    with pytest.raises(InputError, match="ttft_s must be positive"):
        Serving(arrivals=Arrivals(kind="poisson", rate_per_s=1.0), ttft_s=0.0)


def test_room_for_keys_and_values_by_hand():
    scene = scenario()
    profile = node(memory=10_000_000)
    # 3 layers x (4 home + 1 extra) slots of 4096 bytes; attention 16 x (2 x 16 + 32) weights a layer; no dense FFN.
    room = 10_000_000 - 15 * 4096 - 3 * 16 * 64 * 4
    assert kv_tokens(scene, scene.cluster, profile, "float32", 1) == room // (3 * 32 * 4)
    assert kv_tokens(scene, scene.cluster, node(memory=1), "float32", 1) == 0


def test_requests_without_further_tokens_have_no_tpot():
    totals = RequestTotals()
    event = {"arrival_s": 1.0, "start_s": 2.0, "first_token_s": 4.0, "time_s": 4.0, "output_tokens": 1}
    totals.add(event, {"ttft_s": 3.0, "tpot_s": 0.1})
    found = totals.summary({"ttft_s": 3.0})
    assert "tpot_s" not in found and found["queueing_s"]["p50"] == 1 and found["goodput_per_s"] == 0.25


def test_the_recording_repeats_where_more_requests_come_than_it_has():
    scene = scenario(budget=64, requests=8)
    found = steps(server(scene, [float(i * 100) for i in range(9)]))
    prompts = [step for _, tokens, step in found if tokens[0][1] == 0]
    assert len(prompts) == 9 and len(scene.run) == 4 * 9
    assert (prompts[0].ids == prompts[4].ids).all() and not (prompts[0].ids == prompts[1].ids).all()
    assert concat([scene.run]).topk_ids.shape[0] == 36
