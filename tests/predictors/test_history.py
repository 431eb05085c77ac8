"""Predictors that continue the past, against numbers worked out by hand."""

import numpy as np
import pytest

from helpers import make_table
from moesim.predictors import Distribution, Ema, Frequency, PastStep, PreviousToken, RouterSpec, Seen
from moesim.traces import StepTokens


def tokens(request, position):
    return StepTokens(request=np.array(request, np.int32), position=np.array(position, np.int32))


def past(ids, request=None, position=None):
    """A finished step of one layer with one expert a token."""
    request = np.zeros(len(ids)) if request is None else request
    position = np.arange(len(ids)) if position is None else position
    return PastStep(tokens=tokens(request, position), topk_ids=np.array(ids, np.uint8)[:, None, None])


def seen_of(request, position, *steps):
    seen = Seen(step=len(steps), tokens=tokens(request, position))
    seen.past.extend(steps)
    return seen


def fitted(predictor, ids, experts):
    table = make_table(requests=1, length=len(ids), layers=1, experts=experts)
    table.topk_ids[:, 0, 0] = ids
    predictor.fit(table, RouterSpec(num_experts=experts, top_k=1))
    return predictor


def test_ema_by_hand():
    predictor = fitted(Ema(decay=0.5, prior_tokens=2), [0, 1], 2)
    seen = seen_of([7] * 16, range(16), past([0] * 8), past([1] * 2))
    # Prior (1, 1), the older step halved (4, 0), the latest (0, 2): (5, 3) of 8.
    assert predictor.forecast(seen, 0).load == pytest.approx([10, 6])


def test_distribution_weighs_all_tokens_alike():
    predictor = fitted(Distribution(prior_tokens=2), [0, 1], 2)
    seen = seen_of([7] * 12, range(12), past([0] * 8), past([1] * 2))
    forecast = predictor.forecast(seen, 0)  # (1 + 8, 1 + 2) of 12
    assert forecast.load == pytest.approx([9, 3])
    assert forecast.topk is None and forecast.inclusion is None


@pytest.mark.parametrize("predictor", [Ema(), Distribution()])
def test_loads_without_a_past_are_the_frequency(predictor):
    fitted(predictor, [0, 0, 0, 1], 2)
    assert predictor.forecast(seen_of([0] * 8, range(8)), 0).load == pytest.approx([6, 2])


def previous_token():
    # Expert 0 is followed by 0, 0, 1; expert 1 by 1, 2. Usual chances are (3, 2, 1, 0) of 6.
    return fitted(PreviousToken(smoothing=1), [0, 0, 0, 1, 1, 2], 4)


def test_chance_of_a_repeat_by_hand():
    repeat_E = previous_token().repeat_LE[0]
    assert repeat_E == pytest.approx([(2 + 3 / 6) / 4, (1 + 2 / 6) / 3, 1 / 6, 0], abs=1e-6)


def test_previous_token_by_hand():
    # Token 5 of request 3 had expert 0; of request 4 only an earlier token is known.
    seen = seen_of([3, 4], [6, 6], past([0, 1], request=[3, 4], position=[5, 4]))
    inclusion = previous_token().forecast(seen, 0).inclusion
    assert inclusion[0] == pytest.approx([0.625, 0.375 * 2 / 3, 0.375 / 3, 0], abs=1e-6)
    assert inclusion[1] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0], abs=1e-6)


def test_the_previous_token_may_be_several_steps_back():
    seen = seen_of([3], [6], past([1], request=[3], position=[5]), past([0], request=[9], position=[5]))
    assert previous_token().forecast(seen, 0).inclusion[0, 1] == pytest.approx(4 / 9)


def test_prefill_has_no_previous_token_in_an_earlier_step():
    seen = seen_of([3, 3, 3], [0, 1, 2], past([0, 0, 0], request=[2, 2, 2]))
    frequency = fitted(Frequency(), [0, 0, 0, 1, 1, 2], 4)
    assert previous_token().forecast(seen, 0).inclusion == pytest.approx(frequency.forecast(seen, 0).inclusion)


def test_requests_do_not_run_into_each_other():
    table = make_table(requests=2, length=1, layers=1, experts=2)
    table.topk_ids[:] = 1
    predictor = PreviousToken(smoothing=1)
    predictor.fit(table, RouterSpec(num_experts=2, top_k=1))
    assert predictor.repeat_LE == pytest.approx(predictor.usual_LE), "nothing was counted"


def test_several_experts_repeat_as_often_as_they_did():
    # Two experts of eight; the first stays for a whole request, the second changes with every token.
    rng = np.random.default_rng(0)
    table = make_table(requests=40, length=10, layers=1, experts=8, top_k=2)
    table.topk_ids[:, 0, 0] = np.repeat(rng.integers(0, 4, 40), 10)
    table.topk_ids[:, 0, 1] = rng.integers(4, 8, 400)
    predictor = PreviousToken()
    predictor.fit(table, RouterSpec(num_experts=8, top_k=2))
    seen = seen_of([3], [6])
    seen.past.append(PastStep(tokens=tokens([3], [5]), topk_ids=np.array([[[2, 6]]], np.uint8)))
    forecast = predictor.forecast(seen, 0)
    assert forecast.topk[0, 0] == 2
    assert forecast.inclusion[0, 2] > 0.9 and 0.15 < forecast.inclusion[0, 6] < 0.35
    assert forecast.inclusion.sum() == pytest.approx(2)
