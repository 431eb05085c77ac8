"""Made-up routing: seeded, valid, with the statistics that were asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.traces import InputError, concat, split_requests
from moesim.traces.synthetic import CHUNK, Knobs, Shape, domains_of_requests, generate
from moesim.traces.synthetic_fit import Statistics, fit, measure, not_reached


def made(shape, seed=0, **knobs):
    sigma = knobs.pop("sigma", 0.8)
    return concat(list(generate(shape, Knobs(sigma_L=(sigma,) * shape.layers, **knobs), seed)))


SMALL = Shape(experts=16, layers=3, top_k=2, requests=40, request_tokens=50, window_tokens=256)


@given(
    experts=st.integers(3, 40),
    top_k=st.integers(1, 2),
    requests=st.integers(1, 6),
    tokens=st.integers(1, 40),
    window=st.integers(1, 90),
    repeat=st.floats(0, 1),
    coupling=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_every_token_has_k_different_experts(experts, top_k, requests, tokens, window, repeat, coupling):
    shape = Shape(
        experts=experts, layers=2, top_k=top_k, requests=requests, request_tokens=tokens, window_tokens=window
    )
    table = made(shape, repeat=repeat, coupling=coupling, drift=0.3)
    assert table.topk_ids.shape == (requests * tokens, 2, top_k) and table.topk_ids.max() < experts
    ordered = np.sort(table.topk_ids, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    assert (table.request == np.repeat(np.arange(requests), tokens)).all()
    assert (table.position == np.tile(np.arange(tokens), requests)).all()


def test_a_seed_is_a_recording():
    assert (made(SMALL).topk_ids == made(SMALL).topk_ids).all()
    assert (made(SMALL).topk_ids != made(SMALL, seed=1).topk_ids).any()


def test_parts_are_bounded():
    shape = Shape(experts=4, layers=1, top_k=1, requests=3, request_tokens=CHUNK, window_tokens=2 * CHUNK)
    assert [len(part) for part in generate(shape, Knobs(sigma_L=(1.0,)), 0)] == [CHUNK, CHUNK, CHUNK]


@pytest.mark.parametrize(
    ("knob", "statistic", "values"),
    [
        ("sigma", lambda s: np.mean(s.skew), (0.1, 0.6, 1.5)),
        ("drift", lambda s: s.drift, (0.0, 0.4, 1.0)),
        ("coupling", lambda s: s.next_layer, (0.0, 0.6, 1.0)),
        ("repeat", lambda s: s.adjacent, (0.0, 0.4, 0.9)),
    ],
)
def test_each_knob_moves_its_statistic(knob, statistic, values):
    found = [statistic(measure(made(SMALL, **{knob: value}), 16, 256)) for value in values]
    assert found[0] < found[1] < found[2]


def test_coupling_and_repetition_leave_the_popularity_alone():
    """Both reuse the randomness of a choice, so what an expert gets on average stays."""
    shape = Shape(experts=8, layers=3, top_k=2, requests=400, request_tokens=50, window_tokens=100_000)
    plain, coupled = (
        np.bincount(made(shape, **knobs).topk_ids[:, 2].ravel(), minlength=8)
        for knobs in ({}, {"coupling": 0.9, "repeat": 0.5})
    )
    assert np.abs(plain - coupled).sum() / plain.sum() < 0.06


def test_domains_differ_and_can_be_split():
    shape = Shape(experts=16, layers=3, requests=40, request_tokens=50, domains=2, arrival="blocks")
    domains = domains_of_requests(shape, 0)
    assert domains.tolist() == [0] * 20 + [1] * 20
    assert sorted(domains_of_requests(Shape(requests=40, domains=2), 0)) == domains.tolist()
    near, far = (measure(made(shape, shift=shift), 16, 512, domains).domain for shift in (0.0, 0.9))
    assert far > 3 * near
    fitted, run = split_requests(made(shape), "dataset:1", [str(d) for d in domains])
    assert set(run.request.tolist()) == set(range(20, 40)) and len(fitted) == len(run)


@pytest.mark.parametrize(
    "target",
    [
        Statistics(skew=(2.0, 3.0, 4.0)),
        Statistics(skew=(2.5,) * 3, adjacent=0.4),
        Statistics(skew=(2.5,) * 3, next_layer=0.4, drift=0.3),
    ],
)
def test_targets_are_reached(target):
    shape = Shape(experts=16, layers=3, top_k=1, requests=80, request_tokens=50, window_tokens=256)
    knobs = fit(target, shape, 0)
    reached = measure(concat(list(generate(shape, knobs, 0))), 16, 256)
    assert not_reached(target, reached) == []
    assert np.allclose(reached.skew, target.skew, rtol=0.15)


def test_what_cannot_be_is_refused_or_said():
    with pytest.raises(
        InputError, match="a max/mean of 9 cannot be: with 16 experts and top-2 it lies between 1 and 8"
    ):
        fit(Statistics(skew=(9.0, 2.0, 2.0)), SMALL, 0)
    with pytest.raises(InputError, match="experts must be more than top-k 4"):
        Shape(experts=4, top_k=4)
    with pytest.raises(InputError, match="5 domains need at least as many requests"):
        Shape(requests=4, domains=5)
    unreachable = Statistics(skew=(3.0,) * 3, drift=0.0)
    knobs = fit(unreachable, SMALL, 0)
    assert knobs.drift == 0.0  # sampling noise alone is above the target
    assert "drift" in not_reached(unreachable, measure(made(SMALL), 16, 256))
