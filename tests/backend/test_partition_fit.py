"""The fit finds the terms that made-up measurements were made from."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moesim.backend.partition_fit import PartitionRates, PhaseSamples, fit_partitions
from moesim.sim.cost import RankTokens, attention_seconds, expert_seconds
from moesim.sim.profile import Attention, Gpu
from moesim.traces.spec import ModelSpec, StackSpec, Widths

DTYPE = "bfloat16"
WIDTHS = Widths(d_model=768, d_ff=3072, num_heads=12, d_kv=64, kv_width=1536, gated=False, dense_d_ff=3072)
SPEC = ModelSpec(
    family="switch", num_experts=32, top_k=1, capacity=None, groups=1, top_groups=1, vocab_size=100, dtype=DTYPE,
    widths=WIDTHS, stacks=(StackSpec(name="encoder", num_layers=6, moe_layers=(1, 3, 5)),),
)  # fmt: skip
TRUE = Gpu(
    memory_bytes=10**11,
    hbm_bytes_per_s=6e11,
    matmul_flops_per_s={DTYPE: 8e13},
    tile_rows=64,
    launch_s=1.5e-5,
    expert_s=1.2e-6,
    attention=Attention(launch_s=3e-4, efficiency=0.5),
    shared_slowdown=0.25,
)


def phase_seconds(tokens_NEG, gpu):
    """[N, G] what the cost model says of each sample."""
    return np.stack([expert_seconds(tokens_EG, gpu, SPEC, DTYPE) for tokens_EG in tokens_NEG])


def made_up(rng, noise):
    """Samples as TRUE would give them, and how they were made."""
    tokens = []
    for spread in (0.0, 0.5, 1.0, 1.5):
        for total in (500, 2000, 8000):
            for _ in range(3):
                share_E = np.exp(spread * rng.standard_normal(32))
                load_E = rng.multinomial(total, share_E / share_E.sum())
                tokens_EG = np.zeros((32, 4), np.int64)
                tokens_EG[np.arange(32), np.arange(32) // 8] = load_E
                alone_EG = tokens_EG * (np.arange(4) == len(tokens) % 4)
                tokens += [tokens_EG, alone_EG]
    tokens_NEG = np.stack(tokens)
    busy_NG = phase_seconds(tokens_NEG, TRUE) * (1 + noise * rng.standard_normal((len(tokens), 4)))
    return PhaseSamples(tokens_NEG=tokens_NEG, busy_NG=busy_NG, phase_N=busy_NG.max(axis=1) + 5e-6)


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(3)
    samples = made_up(rng, noise=0.01)
    tokens_N = np.array([1024, 2048, 4096])
    ranks = RankTokens(tokens_G=tokens_N, pairs_G=tokens_N * 128, cached_G=0 * tokens_N)
    stack = SPEC.stacks[0]
    attention_s = attention_seconds(ranks, stack, TRUE, SPEC, DTYPE).sum(axis=0)
    rates = PartitionRates(
        memory_bytes=10**11, bytes_per_s=4e11, flops_per_s=6e13, ranks=ranks, attention_s=attention_s
    )
    # Through JSON, as whoever fits a recorded calibration once more has them.
    told = json.loads(json.dumps({**samples.to_dict(), **rates.to_dict()}))
    again = PhaseSamples.from_dict(told), PartitionRates.from_dict(told)
    assert (again[0].tokens_NEG == samples.tokens_NEG).all() and (again[0].busy_NG == samples.busy_NG).all()
    return fit_partitions(*again, SPEC, stack, DTYPE), (ranks, attention_s)


def test_other_loads_are_predicted_within_a_few_percent(fitted):
    (gpu, error), _ = fitted
    assert gpu.tile_rows == 64 and error["experts"] < 0.02
    other = made_up(np.random.default_rng(4), noise=0.0)
    told_NG = phase_seconds(other.tokens_NEG, replace(gpu, launch_s=gpu.launch_s - 5e-6))
    busy = other.busy_NG > 0
    assert np.abs(told_NG[busy] / other.busy_NG[busy] - 1).max() < 0.05
    assert gpu.shared_slowdown == pytest.approx(0.25, abs=0.03)


def test_what_a_phase_takes_beyond_its_slowest_partition_is_launch(fitted):
    (gpu, _), _ = fitted
    assert gpu.launch_s == pytest.approx(2e-5, rel=0.2)


def test_attention_is_found(fitted):
    (gpu, error), (ranks, attention_s) = fitted
    assert error["attention"] < 0.01
    told_s = attention_seconds(ranks, SPEC.stacks[0], gpu, SPEC, DTYPE).sum(axis=0)
    assert told_s == pytest.approx(attention_s, rel=0.02)
