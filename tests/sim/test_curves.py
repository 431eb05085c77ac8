"""Measured curves: exact at their points, monotone and continuous between, a stated rule beyond; and who uses them."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import MS, node

from helpers import make_spec, make_table
from moesim.sim.cost import (
    all_to_all_seconds,
    exchange_outside,
    expert_curve,
    expert_seconds,
    expert_seconds_of,
    experts_outside,
    measured_ranges,
)
from moesim.sim.curves import ExpertCurve, MessageCurve
from moesim.sim.engine import simulate
from moesim.sim.policies import make_policy
from moesim.sim.profile import HostLink, Link, load_profile
from moesim.sim.scenario import make_scenario
from moesim.traces import InputError, Phase, Workload

SPEC = make_spec()  # d_model 16, d_ff 32, two matrices, 8 experts, float32
MESSAGES = MessageCurve(nbytes=(64.0, 1024.0, 4096.0), seconds=(1e-3, 2e-3, 8e-3))
EXPERTS = ExpertCurve(
    d_model=16,
    d_ff=32,
    gated=False,
    dtype="float32",
    distinct=(1, 2, 4),
    rows=(1, 8, 64),
    seconds=((1e-3, 2e-3, 9e-3), (2e-3, 4e-3, 2e-2), (4e-3, 8e-3, 4e-2)),
)


def exactly(value):
    return pytest.approx(value, rel=1e-12)


def no_roofline(distinct, rows):
    raise AssertionError("asked for inside the grid")


def product(distinct, rows):
    return distinct * rows**2


def measured_node(**changes):
    """The node of the other tests with the curves above."""
    plain = node(a2a=Link(latency_s=1 * MS, bytes_per_s=64e3, curve=MESSAGES), **changes)
    return replace(plain, gpu=replace(plain.gpu, expert_curves=(EXPERTS,)))


increasing = st.lists(st.integers(1, 10**9).map(float), min_size=2, max_size=8, unique=True).map(sorted)


@st.composite
def message_curves(draw):
    nbytes = draw(increasing)
    seconds = sorted(draw(st.lists(st.floats(1e-9, 1e3), min_size=len(nbytes), max_size=len(nbytes))))
    return MessageCurve(nbytes=tuple(nbytes), seconds=tuple(seconds))


@st.composite
def expert_curves(draw):
    axis = st.lists(st.integers(1, 5000), min_size=2, max_size=5, unique=True).map(sorted)
    distinct, rows = draw(axis), draw(axis)
    steps = [[draw(st.floats(0.0, 2.0)) for _ in rows] for _ in distinct]
    log_s = np.cumsum(np.cumsum(steps, axis=0), axis=1) - 10
    seconds = tuple(tuple(float(s) for s in line) for line in np.exp(log_s))
    return replace(EXPERTS, distinct=tuple(distinct), rows=tuple(rows), seconds=seconds)


@given(message_curves(), st.lists(st.floats(0, 1e11), min_size=2, max_size=30))
@settings(max_examples=100, deadline=None)
def test_a_message_curve_is_exact_at_its_points_and_monotone_as_they_are(curve, asked):
    assert curve.seconds_at(np.array(curve.nbytes)) == exactly(curve.seconds)
    assert not curve.outside(curve.nbytes).any()
    seconds = curve.seconds_at(np.sort(asked))
    assert (np.diff(seconds) >= -1e-12 * seconds[1:]).all()
    assert [curve.seconds_at(x) for x in sorted(asked)] == seconds.tolist(), "one by one gives the same to the bit"


@given(message_curves())
@settings(max_examples=50, deadline=None)
def test_a_message_curve_is_continuous_at_its_points(curve):
    gaps = np.diff(np.log(curve.nbytes)).min()  # between points that are almost one the curve is steep
    for x, s in zip(curve.nbytes, curve.seconds, strict=True):
        near = curve.seconds_at(np.array([x * (1 - 1e-15), x * (1 + 1e-15)]))
        assert near == pytest.approx(s, rel=1e-12 + 1e-14 * 30 / gaps)


def test_between_and_beyond_the_points_of_a_message_curve():
    assert MESSAGES.seconds_at(256.0) == exactly(1e-3 * 2**0.5), "half way in logs"
    assert MESSAGES.seconds_at(np.array([0, 1, 63])).tolist() == exactly([1e-3] * 3), "latency"
    assert MESSAGES.seconds_at(40_960) == exactly(80e-3), "the last point's bytes/s"
    assert isinstance(MESSAGES.seconds_at(7), float) and MESSAGES.seconds_at(np.ones((2, 3))).shape == (2, 3)
    assert MESSAGES.outside([0, 1, 64, 4096, 4097]).tolist() == [False, True, False, False, True]
    assert MESSAGES.range_text() == "64 B to 4.1 kB (3 points)"


@given(expert_curves(), st.data())
@settings(max_examples=60, deadline=None)
def test_an_expert_curve_is_exact_at_its_points_and_monotone_as_they_are(curve, data):
    d, r = np.array(curve.distinct)[:, None], np.array(curve.rows)[None, :]
    assert curve.seconds_at(d, r, no_roofline) == exactly(np.array(curve.seconds))
    p, q = (np.sort(data.draw(st.lists(st.floats(0, 1), min_size=6, max_size=6))) for _ in range(2))
    inside_d = curve.distinct[0] + p * (curve.distinct[-1] - curve.distinct[0])
    inside_r = curve.rows[0] + q * (curve.rows[-1] - curve.rows[0])
    seconds = curve.seconds_at(inside_d[:, None], inside_r[None, :], no_roofline)
    for axis in (0, 1):
        assert (np.diff(seconds, axis=axis) >= -1e-9 * seconds.max()).all()


def test_beyond_its_grid_an_expert_curve_goes_on_like_the_roofline():
    assert EXPERTS.seconds_at(2, 8**0.5, no_roofline) == exactly(2e-3 * 2**0.5), "half way in logs"
    asked = [(8, 8, 8e-3 * 2), (2, 128, 2e-2 * 4), (8, 128, 4e-2 * 2 * 4), (1, 0.5, 1e-3 / 4), (0, 0, 0.0), (0, 9, 0.0)]
    d, r, expected = (np.array(column) for column in zip(*asked, strict=True))
    assert EXPERTS.seconds_at(d, r, product) == exactly(expected)
    assert EXPERTS.outside(d, r).tolist() == [True] * 4 + [False] * 2
    edge = EXPERTS.seconds_at([4, 4 * (1 + 1e-9)], [64, 64 * (1 + 1e-9)], product)
    assert edge == pytest.approx([4e-2] * 2, rel=1e-8), "continuous"
    assert EXPERTS.range_text().startswith("1 to 4 experts x 1 to 64 tokens each (3 x 3 points), d_model 16, d_ff 32")


def test_one_expert_a_rank_is_a_curve_too():
    one = replace(EXPERTS, distinct=(1,), seconds=EXPERTS.seconds[:1])
    assert one.seconds_at([1, 2], [8, 8], product) == exactly([2e-3, 4e-3])
    assert one.range_text().startswith("1 expert x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nbytes": (1.0,), "seconds": (1.0,)}, "nbytes must have at least 2 points, got 1"),
        ({"nbytes": (1.0, 1.0), "seconds": (1.0, 1.0)}, "nbytes must ascend, got 1.0 after 1.0"),
        ({"nbytes": (0.0, 1.0), "seconds": (1.0, 1.0)}, "nbytes must be positive numbers, got 0.0"),
        ({"nbytes": (1, 10**400), "seconds": (1.0, 1.0)}, "nbytes must be positive numbers"),
        ({"seconds": (1.0, 2.0)}, "seconds must have one time for each of 3 points, got 2"),
        ({"seconds": (1.0, -1.0, 2.0)}, "seconds must be positive numbers, got -1.0"),
        ({"seconds": (1.0, float("nan"), 2.0)}, "seconds must be positive numbers, got nan"),
        ({"seconds": (1.0, float("inf"), 2.0)}, "seconds must be positive numbers, got inf"),
    ],
)
def test_a_damaged_message_curve(change, message):
    with pytest.raises(InputError, match=message):
        replace(MESSAGES, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
        ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, got 'int4'"),
        ({"distinct": ()}, "distinct must have at least 1 points, got 0"),
        ({"distinct": (1, 4, 2)}, "distinct must ascend, got 2 after 4"),
        ({"rows": (1,)}, "rows must have at least 2 points"),
        ({"rows": (0, 1, 2)}, "rows must be positive numbers, got 0"),
        ({"seconds": EXPERTS.seconds[:2]}, "seconds must have one list for each of 3 points of distinct, got 2"),
        ({"seconds": (*EXPERTS.seconds[:2], (1.0,))}, r"seconds\[2\] must have one time for each of 3 points, got 1"),
        ({"seconds": (*EXPERTS.seconds[:2], (1.0, 0.0, 1.0))}, r"seconds\[2\] must be positive numbers, got 0.0"),
    ],
)
def test_a_damaged_expert_curve(change, message):
    with pytest.raises(InputError, match=message):
        replace(EXPERTS, **change)


def saved(tmp_path):
    profile = measured_node()
    links = replace(profile.links, host=replace(profile.links.host, curve=MESSAGES))
    profile = replace(profile, links=links)
    path = tmp_path / "here.json"
    profile.save(path)
    return profile, path


def test_curves_are_saved_and_read_back_equal_and_old_files_have_none(tmp_path):
    profile, path = saved(tmp_path)
    assert load_profile(path) == profile
    data = json.loads(path.read_text())
    del data["gpu"]["expert_curves"]
    for link in ("p2p", "host", "all_to_all"):
        del data["links"][link]["curve"]
    path.write_text(json.dumps(data))
    old = load_profile(path)
    assert old.gpu.expert_curves == () and old.links.all_to_all.curve is old.links.host.curve is None


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("gpu", "expert_curves"), 3, "field 'gpu.expert_curves' must be a list or an object, got 3"),
        (("gpu", "expert_curves", 0), 3, r"field 'gpu.expert_curves\[0\]' must be an object"),
        (("gpu", "expert_curves", 0, "gated"), 1, r"field 'gpu.expert_curves\[0\].gated' must be true or false, got 1"),
        (("gpu", "expert_curves", 0, "rows", 1), 8.5, r"field 'gpu.expert_curves\[0\].rows\[1\]' must be an integer"),
        (("gpu", "expert_curves", 0, "rows", 1), 99, r"gpu.expert_curves\[0\].rows must ascend, got 64 after 99"),
        (("gpu", "expert_curves", 0, "seconds", 1), 2, r"field 'gpu.expert_curves\[0\].seconds\[1\]' must be a list"),
        (
            ("gpu", "expert_curves", 0, "seconds", 1, 2),
            None,
            r"'gpu.expert_curves\[0\].seconds\[1\]\[2\]' must be a nu",
        ),
        (("gpu", "expert_curves", 0, "seconds", 1, 2), -1, r"gpu.expert_curves\[0\].seconds\[1\] must be positive"),
        (
            ("gpu", "expert_curves", 0, "dtype"),
            "float16",
            r"gpu.expert_curves\[0\].dtype float16 is not among matmul_fl",
        ),
        (("links", "all_to_all", "curve"), [], "field 'links.all_to_all.curve' must be an object"),
        (("links", "all_to_all", "curve", "nbytes"), [1], "links.all_to_all.curve.nbytes must have at least 2 points"),
        (("links", "host", "curve", "seconds", 0), 0, "links.host.curve.seconds must be positive numbers, got 0"),
        (("links", "host", "curve", "colour"), 0, "unknown field 'links.host.curve.colour'"),
    ],
)
def test_a_damaged_curve_in_a_file_is_one_line_with_file_and_field(tmp_path, where, value, message):
    _, path = saved(tmp_path)
    data = json.loads(path.read_text())
    at = data
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_two_curves_of_one_shape_are_refused():
    gpu = node().gpu
    with pytest.raises(InputError, match=r"expert_curves\[1\] is a second curve for one shape and dtype"):
        replace(gpu, expert_curves=(EXPERTS, EXPERTS))
    assert replace(gpu, expert_curves=(EXPERTS, replace(EXPERTS, gated=True)))


def test_links_use_their_curve():
    link = Link(latency_s=9.0, bytes_per_s=1.0, efficiency=0.5, curve=MESSAGES)
    assert link.seconds(1024) == exactly(2e-3) and link.outside([1, 64]).tolist() == [True, False]
    host = HostLink(latency_s=9.0, bytes_per_s=1.0, shared_by=2, curve=MESSAGES)
    assert host.link.curve is MESSAGES
    assert not Link(latency_s=9.0, bytes_per_s=1.0).outside(np.array([1.0, 1e99])).any()


def test_experts_use_a_curve_of_their_shape_and_ignore_others():
    gpu = measured_node().gpu
    tokens_EG = np.zeros((8, 3), np.int64)
    tokens_EG[:2, 0], tokens_EG[:2, 1] = 8, (4, 12)
    assert expert_seconds(tokens_EG, gpu, SPEC, "float32") == exactly([4e-3, 4e-3, 0]), "unequal loads at their mean"
    plain = node().gpu
    for changes in ({"d_model": 8}, {"d_ff": 8}, {"gated": True}, {"dtype": "bfloat16"}):
        rates = {"float32": 2.048e6, "bfloat16": 1e9}
        other = replace(plain, matmul_flops_per_s=rates, expert_curves=(replace(EXPERTS, **changes),))
        assert expert_curve(other, SPEC, "float32") is None
        assert (
            expert_seconds(tokens_EG, other, SPEC, "float32") == expert_seconds(tokens_EG, plain, SPEC, "float32")
        ).all()
        assert not experts_outside(np.array([9]), np.array([9]), other, SPEC, "float32").any()


def test_a_curve_takes_tokens_and_not_tiles():
    gpu = replace(measured_node().gpu, tile_rows=64)
    tokens_EG = np.array([[8], [8], [0]])
    assert expert_seconds(tokens_EG, gpu, SPEC, "float32") == exactly([4e-3])
    distinct, rows = np.array([2]), np.array([128])
    assert expert_seconds_of(distinct, rows, gpu, SPEC, "float32", tokens=np.array([16])) == exactly([4e-3])
    assert expert_seconds_of(distinct, rows, gpu, SPEC, "float32") == exactly([2e-2]), "rows stand in for tokens"


def test_beyond_the_grid_the_cost_model_gives_the_ratio():
    gpu, plain = measured_node().gpu, node().gpu
    distinct, tokens = np.array([8, 4]), np.array([8 * 128, 4 * 64])
    formula = expert_seconds_of(distinct, tokens, plain, SPEC, "float32")
    found = expert_seconds_of(distinct, tokens, gpu, SPEC, "float32")
    assert found == exactly([4e-2 * formula[0] / formula[1], 4e-2])
    assert experts_outside(distinct, tokens, gpu, SPEC, "float32").tolist() == [True, False]


def test_all_to_alls_use_the_curve_and_say_what_they_extrapolate():
    profile = measured_node(gpus=4, gpus_per_node=2, network=Link(latency_s=1e-9, bytes_per_s=1e18, curve=None))
    send_GG = np.array([[5, 16], [3, 0]])  # vectors of 64 bytes
    assert all_to_all_seconds(send_GG, profile, SPEC, "float32") == exactly(2e-3)
    near, far = np.array([0, 16, 65, 16]), np.array([0, 0, 0, 1])
    outside = [False, False, True, False]
    assert exchange_outside(near, far, 2, profile, SPEC, "float32").tolist() == outside
    assert exchange_outside(near, far, 4, profile, SPEC, "float32").tolist() == outside
    steep = replace(
        profile.links, network=Link(latency_s=0.0, bytes_per_s=1.0, curve=replace(MESSAGES, nbytes=(1, 2, 3)))
    )
    between = replace(profile, links=steep)
    assert exchange_outside(near, far, 4, between, SPEC, "float32").tolist() == [False, False, True, True]
    assert not exchange_outside(near, far, 1, between, SPEC, "float32").any()


def test_measured_ranges_name_what_a_simulation_reads_off_curves():
    profile = measured_node()
    assert measured_ranges(2, profile, SPEC, "float32") == {
        "experts": EXPERTS.range_text(),
        "all_to_all": MESSAGES.range_text(),
    }
    assert measured_ranges(1, profile, SPEC, "float32").keys() == {"experts"}
    assert measured_ranges(2, node(), SPEC, "float32") == {}
    host = replace(profile.links, p2p=None, host=replace(profile.links.host, curve=MESSAGES))
    assert "host" in measured_ranges(2, replace(profile, links=host), SPEC, "float32")


@pytest.mark.parametrize("name", ["contiguous", "predictive-layer"])
def test_a_simulation_runs_on_curves(name):
    scene = make_scenario(SPEC, make_table(), phase=Phase.ENCODER, gpus=2, workload=Workload(batch=64))
    policy = make_policy(name, scene.cluster, scene.fit)
    curved = simulate(scene, policy, measured_node())
    again = simulate(scene, policy, measured_node(), sink=[].append)
    assert asdict(curved) == asdict(again), "all layers at once and layer by layer give the same"
    assert json.loads(json.dumps(asdict(curved))), "nothing but plain numbers"
    plain = simulate(scene, policy, node())
    phases = [step.phase_s["experts"] for step in curved.steps]
    assert phases != [step.phase_s["experts"] for step in plain.steps] and all(s > 0 for s in phases)


def test_experts_that_take_twice_as_long():
    scene = make_scenario(SPEC, make_table(), phase=Phase.ENCODER, gpus=2, workload=Workload(batch=64))
    policy, once = make_policy("contiguous", scene.cluster, scene.fit), measured_node()
    doubled = replace(EXPERTS, seconds=tuple(tuple(2 * s for s in line) for line in EXPERTS.seconds))
    twice = replace(once, gpu=replace(once.gpu, expert_curves=(doubled,)))
    spent = [[step.phase_s["experts"] for step in simulate(scene, policy, p).steps] for p in (once, twice)]
    assert spent[1] == exactly([2 * s for s in spent[0]])


@given(
    gpus=st.sampled_from([1, 2, 4]),
    experts=st.sampled_from([6, 8, 11]),
    top_k=st.integers(1, 3),
    batch=st.integers(1, 80),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_fast_way_agrees_to_the_bit_with_curves(gpus, experts, top_k, batch, seed):
    spec = make_spec(experts=experts, top_k=top_k)
    table = make_table(8, 16, 3, experts, top_k, seed)
    scene = make_scenario(spec, table, phase=Phase.ENCODER, gpus=gpus, workload=Workload(batch=batch))
    policy = make_policy("contiguous", scene.cluster, scene.fit)
    fast, slow = (simulate(scene, policy, measured_node(), sink=sink) for sink in (None, [].append))
    assert asdict(fast) == asdict(slow)
