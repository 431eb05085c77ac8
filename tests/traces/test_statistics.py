"""Statistics against hand-worked values, and DeepSeek-V2-Lite figures where that data lies beside the project."""

from pathlib import Path

import numpy as np
import pytest

from helpers import make_table
from moesim.traces import InputError, TokenTable
from moesim.traces.statistics import balancedness, entropy_bits, gini, layer_stats, noise_floor, overlaps, window_loads

ESFT = Path(__file__).parents[3] / "shared/data/esft_deepseek_v2_lite"


def test_loads_of_windows_by_hand():
    table = make_table(requests=1, length=5, layers=2, experts=3)
    table.topk_ids[:, :, 0] = [[0, 1], [0, 2], [1, 2], [2, 2], [1, 1]]
    assert window_loads(table, 3, 2).tolist() == [[[2, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 0, 2]]]
    assert window_loads(table, 3, 100).sum() == 10


def test_load_statistics_by_hand():
    loads = np.array([[[6, 2, 0, 0]], [[0, 2, 6, 0]]])
    (s,) = layer_stats(loads, gpus=(2,), top=2)
    assert s.max_over_mean == 3
    assert s.active_fraction == 0.5
    assert s.entropy_bits == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert s.drift == 0.75
    assert s.balancedness[2] == (pytest.approx((0.5 + 4 / 6) / 2), pytest.approx(8 / 14))
    assert s.top_experts == (0, 2)


def test_formulas_at_their_ends():
    even, one = np.full((1, 8), 5.0), np.eye(1, 8) * 40
    assert gini(even) == pytest.approx(0) and gini(one) == pytest.approx(7 / 8)
    assert entropy_bits(even / 40) == pytest.approx(3) and entropy_bits(one / 40) == pytest.approx(0)
    assert balancedness(even, 4) == (1, 1) and balancedness(one, 4) == (0.25, 0.25)


def test_noise_floor_reproduces_the_known_figures():
    # 128 experts: 6.2, 2.5 and 1.5 at 64, 512 and 4,096 tokens a window.
    assert [noise_floor(n, 128) for n in (64, 512, 4096)] == pytest.approx([6.2, 2.5, 1.5], rel=0.03)


def test_overlap_tells_structure_from_chance():
    noisy = overlaps(make_table(requests=40, noise=1.0, layers=2), 8)[0]
    clear = overlaps(make_table(requests=40, noise=0.05, layers=2), 8)[0]
    assert noisy.next_layer == pytest.approx(noisy.next_layer_chance, abs=0.06)
    assert clear.next_layer > 0.9 > clear.next_layer_chance
    assert noisy.adjacent_tokens == pytest.approx(noisy.adjacent_chance, abs=0.05)


def test_clear_errors():
    with pytest.raises(InputError, match="9 GPUs for 8 experts"):
        layer_stats(np.ones((1, 1, 8), int), gpus=(9,))
    with pytest.raises(InputError, match="layer 0 has no tokens"):
        layer_stats(np.zeros((2, 1, 8), int))
    with pytest.raises(InputError, match="at least 1, got 0"):
        window_loads(make_table(), 8, 0)


@pytest.mark.skipif(not ESFT.exists(), reason="the DeepSeek-V2-Lite recordings are not beside the project")
@pytest.mark.parametrize(("task", "skew"), [("intent", 3.81), ("law", 3.52), ("summary", 4.28), ("translation", 5.62)])
def test_recorded_deepseek_skew(task, skew):
    data = np.load(ESFT / f"{task}.npz", allow_pickle=False)
    T, L = data["topk_ids"].shape[:2]
    zero = np.zeros(T, np.int32)
    table = TokenTable(
        topk_ids=data["topk_ids"],
        topk_weights=data["topk_weights"],
        dropped=np.zeros((T, L), bool),
        token_id=zero,
        request=zero,
        position=np.arange(T, dtype=np.int32),
        step=zero,
        phase=np.ones(T, np.uint8),
    )
    stats = layer_stats(window_loads(table, 64, T))
    assert np.mean([s.max_over_mean for s in stats]) == pytest.approx(skew, abs=0.005)
