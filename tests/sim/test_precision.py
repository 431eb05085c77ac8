"""Fewer bits, pairs left out and pairs given to others: thresholds, bytes, counts, and who is not exact."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import decoding, node, quick_policy

from helpers import make_table
from moesim.predictors import RoutedLayer
from moesim.sim.driver import Driver
from moesim.sim.engine import simulate
from moesim.sim.execution import COPY_BYTES, Execution, copy_bytes
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.policies.precision import FULL, ByPopularity, ByScore, scores
from moesim.sim.residency import EMPTY, PRECISIONS
from moesim.traces import InputError, Phase

LOW = PRECISIONS.index("int4")


def scene(resident=3, top_k=3, batch=1, weights=True, seed=0, requests=10):
    table = make_table(requests=requests, length=10, top_k=top_k, seed=seed, phase=Phase.DECODE, noise=0.4)
    rng = np.random.default_rng(seed)
    weight = rng.dirichlet(np.ones(top_k), table.topk_ids.shape[:2])
    table = replace(table, topk_weights=-np.sort(-weight, axis=2).astype(np.float16) if weights else None)
    return decoding(table, resident, batch=batch)


def run(made, name="hobbit", **parts):
    events = []
    policy = quick_policy(name, made)
    policy = replace(policy, recipe=replace(policy.recipe, **parts))
    return simulate(made, policy, node(), events=events.append), events


def wanted(weights, top_k_ids, experts=8, **options):
    ids_TK, weights_TK = np.array(top_k_ids), np.array(weights)
    kept_T = np.ones(len(ids_TK), bool)
    return ByScore(**options).wanted(0, ids_TK, weights_TK, kept_T, np.ones((1, experts), np.int64))


def test_the_score_is_the_share_of_what_ranks_higher():
    score = scores(np.array([[0.5, 0.3, 0.2], [1.0, 2.0, 1.0]]))
    assert score[0] == pytest.approx([0, 0.5, 0.8])
    assert score[1] == pytest.approx([0.5, 0, 0.75]), "of equal ones the first ranks higher"


def test_thresholds_decide_between_full_low_and_nothing():
    found = wanted([[0.55, 0.40, 0.05]], [[4, 2, 6]])
    assert (found.code_E[4], found.code_E[2], found.code_E[6]) == (0, 0, LOW)
    assert found.skip_E[6] and not found.skip_E[[4, 2]].any(), "scores 0, 0.55 and 0.95"
    found = wanted([[0.7, 0.2, 0.1]], [[4, 2, 6]])
    assert (found.code_E[2], found.code_E[6]) == (LOW, LOW) and not found.skip_E[[2, 6]].any(), "0.7 and 0.9"


def test_of_several_tokens_the_one_that_leans_on_an_expert_most_decides():
    found = wanted([[0.95, 0.04, 0.01], [0.6, 0.3, 0.1]], [[0, 1, 2], [2, 3, 1]])
    assert found.code_E[2] == 0 and not found.skip_E[2], "the second token's first expert"
    assert found.code_E[1] == LOW and not found.skip_E[1], "0.95 would be skipped, 0.9 is low"


@given(seed=st.integers(0, 999), top_k=st.integers(1, 6), tokens=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_heaviest_expert_of_every_token_is_always_full(seed, top_k, tokens):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(8)[:top_k] for _ in range(tokens)])
    weights = rng.random((tokens, top_k))
    found = wanted(weights, ids)
    first = np.take_along_axis(ids, weights.argmax(axis=1)[:, None], axis=1)
    assert (found.code_E[first] == 0).all() and not found.skip_E[first].any()


def test_with_one_expert_a_token_hobbit_is_exact_and_needs_no_weights():
    made = scene(top_k=1, weights=False)
    dynamic, exact = run(made)[0], run(made, precision=FULL)[0]
    assert dynamic.totals == exact.totals and dynamic.totals.rounded_tokens == 0


def test_without_gate_weights_it_says_so():
    made = scene(weights=False)
    with pytest.raises(InputError, match="hobbit weighs experts by their gate weights, and this recording has none"):
        make_policy("hobbit", made.cluster, made.fit, made.gates)
    ids = np.array([[0, 1]])
    with pytest.raises(InputError, match="reads gate weights, and this recording has none"):
        ByScore().wanted(0, ids, None, np.ones(1, bool), np.ones((1, 8), np.int64))


@pytest.mark.parametrize("low", list(COPY_BYTES))
def test_bytes_follow_from_the_precision_and_every_pair_is_accounted_for(low):
    made = scene(batch=2)
    result, events = run(made, precision=ByScore(low=low))
    cache = result.metrics()["cache"]
    copies = {
        name: sum(e["what"] == "transfer ends" and e.get("precision", "full") == name for e in events)
        for name in ("full", low)
    }
    expert = made.spec.expert_bytes("float32")
    assert copies[low] > 0 and cache["bytes_by_precision"] == {
        "full": copies["full"] * expert,
        low: copies[low] * copy_bytes(made.spec.expert_params(), expert, low),
    }
    assert sum(cache["bytes_by_precision"].values()) == result.totals.moved_bytes
    kept = sum(3 * int((~step.dropped).sum()) for step in made.steps())
    computed = sum(np.sum(step.load_LG) for step in result.steps)
    assert computed + result.totals.skipped_tokens == kept and result.totals.skipped_tokens > 0
    assert result.totals.precision_pairs == {low: result.totals.rounded_tokens} and result.totals.rounded_tokens > 0


def test_sizes_of_copies():
    assert [copy_bytes(1280, 2560, name) for name in PRECISIONS] == [2560, 1300, 660, 340]


def test_no_pair_that_wants_full_is_computed_in_less():
    """Against the residency at every dispatch; low copies are brought anew when a token leans on them."""
    made = scene(resident=4, batch=2, seed=3)
    policy = quick_policy("hobbit", made)
    driver, upgrades = Driver(policy), 0
    for step in made.steps():
        for t in driver.begin_step(step.tokens):
            driver.arrived(t)
        for layer in range(3):
            ahead = driver.routed(step.layer(layer))
            chosen = driver.executed(step.dropped[:, layer])
            kept_TK = ~step.dropped[:, layer][:, None] & (chosen.ids_TK != EMPTY)
            left_E = np.bincount(chosen.ids_TK[kept_TK], minlength=8)
            table = step.layer(layer)
            need = ByScore().wanted(layer, chosen.ids_TK, table.weights, ~step.dropped[:, layer], policy.popularity_LE)
            while left_E.any():
                before = driver.residency.usable_LEG[layer, :, 0].copy()
                moves = driver.fetch(left_E[None]).moves
                upgrades += sum(bool(before[t.expert]) for t in moves)
                for t in [*moves, *ahead]:
                    driver.arrived(t)
                ahead = []
                done_E = driver.dispatch(left_E[None]).sum(axis=(0, 2))
                there = np.flatnonzero(done_E)
                assert (driver.residency.precision_LEG[layer, there, 0] <= need.code_E[there]).all()
                left_E = left_E - done_E
        driver.end_step()
    assert upgrades > 0


def test_the_rare_quarter_comes_in_int2_and_the_rest_in_int4():
    popularity = np.array([[5, 1, 9, 9, 0, 9, 9, 9]])
    code = ByPopularity().placed_LE(popularity)[0]
    assert [PRECISIONS[c] for c in code] == ["int4", "int2", "int4", "int4", "int2", "int4", "int4", "int4"]
    result, _ = run(scene(), "fate")
    pairs = result.totals.precision_pairs
    assert set(pairs) == {"int4", "int2"} and sum(pairs.values()) == sum(np.sum(s.load_LG) for s in result.steps)


def test_missing_pairs_are_skipped_or_given_to_the_best_expert_that_is_there():
    made = scene(resident=3)
    skip, _ = run(made, "on-demand", miss="skip")
    other, _ = run(made, "on-demand", miss="substitute")
    kept = sum(3 * int((~step.dropped).sum()) for step in made.steps())
    for result in (skip, other):
        assert result.totals.moved_bytes == 0 and result.phase_s()["blocked"] == 0
        assert sum(np.sum(s.load_LG) for s in result.steps) + result.totals.skipped_tokens == kept
    assert skip.totals.skipped_tokens > 0 and skip.totals.substituted_tokens == 0
    assert other.totals.substituted_tokens > 0 and other.totals.skipped_tokens < skip.totals.skipped_tokens


def test_a_substitute_is_the_best_scored_one_that_the_token_has_not_got():
    made = scene(resident=3, top_k=2)
    policy = make_policy("on-demand", made.cluster, made.fit)
    policy = replace(policy, recipe=replace(policy.recipe, miss="substitute"))
    driver, step = Driver(policy), next(made.steps())
    driver.begin_step(step.tokens)
    there = np.flatnonzero(driver.residency.usable_LEG[0, :, 0]).tolist()
    gone = [e for e in range(8) if e not in there]
    ids = np.array([[there[0], gone[0]], [gone[0], gone[1]]])
    driver.routed(RoutedLayer(ids=ids))
    scored = np.zeros((2, 8))
    scored[:, there] = [[9, 1, 2], [1, 3, 2]]
    chosen = driver.executed(np.zeros(2, bool), scored)
    assert chosen.ids_TK.tolist() == [[there[0], there[2]], [there[1], there[2]]]
    assert (chosen.substituted, chosen.skipped) == (3, 0)


def test_copies_that_only_come_rounded_are_good_enough():
    """--copy-dtype int4 under a policy that wants everything in full: a hit stays a hit."""
    made = scene()
    policy = quick_policy("on-demand", made)
    plain = simulate(made, policy, node())
    small = simulate(made, policy, node(), execution=Execution(copy_dtype="int4"))
    assert small.metrics()["cache"]["hit_rate"] == plain.metrics()["cache"]["hit_rate"]
    assert small.totals.moved_bytes < plain.totals.moved_bytes and small.totals.rounded_tokens > 0


def test_lossy_policies_are_known_by_their_parts():
    assert {name for name, parts in POLICIES.items() if parts.lossy} >= {"hobbit", "fate"}
    assert not any(POLICIES[name].lossy for name in ("on-demand", "hobbit-exact", "prefetch-ridge", "eplb"))
    assert replace(POLICIES["on-demand"], miss="skip").lossy and replace(POLICIES["on-demand"], miss="substitute").lossy
    assert replace(POLICIES["contiguous"], routing="predicted").lossy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByScore(low="int3"), "unknown precision 'int3'; known: full, int8"),
        (lambda: ByScore(full_below=0.9, low_below=0.5), "thresholds must grow"),
        (lambda: ByPopularity(rare_share=2.0), "rare_share must lie in 0 .. 1"),
    ],
)
def test_options_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()
