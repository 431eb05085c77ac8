"""Fitting recovers a device that the cost model itself describes, from the samples that calibration takes."""

import numpy as np
import pytest

from helpers import make_spec
from moesim.backend.fit import Compute, fit_gpu, fit_link, message_curve, relative_error
from moesim.sim.cost import RankTokens, attention_seconds, expert_seconds
from moesim.sim.curves import MessageCurve
from moesim.sim.profile import Attention, Gpu
from moesim.traces import Widths

DTYPE = "float32"
WIDTHS = Widths(d_model=256, d_ff=512, num_heads=2, d_kv=8, kv_width=32, gated=False, dense_d_ff=512)


def device(**changes):
    fields = {
        "memory_bytes": 2**34,
        "hbm_bytes_per_s": 8e9,
        "matmul_flops_per_s": {DTYPE: 4e10},
        "tile_rows": 1,
        "launch_s": 5e-5,
        "expert_s": 3e-5,
        "attention": Attention(launch_s=4e-4, efficiency=0.5),
    }
    return Gpu(**{**fields, **changes})


def samples(gpu, spec, noise=0.0):
    rng = np.random.default_rng(0)
    grid = [(tokens, n) for tokens in (1, 4, 16, 64, 256, 1024) for n in (1, 2, 4, 8) if n <= tokens]
    tokens_EN = np.stack([np.bincount(np.arange(t) % n, minlength=spec.num_experts) for t, n in grid], axis=1)
    lengths = [(1, 16), (16, 16), (1, 64), (16, 64), (4, 256), (2, 512)]
    ranks = RankTokens(
        tokens_G=np.array([c * n for c, n in lengths]),
        pairs_G=np.array([c * n * n for c, n in lengths]),
        cached_G=np.zeros(len(lengths), np.int64),
    )
    attention_s = attention_seconds(ranks, spec.stack("encoder"), gpu, spec, DTYPE).sum(axis=0)
    experts_s = expert_seconds(tokens_EN, gpu, spec, DTYPE)
    return Compute(
        tokens_EN=tokens_EN,
        experts_s=experts_s * np.exp(noise * rng.standard_normal(len(experts_s))),
        ranks=ranks,
        attention_s=attention_s * np.exp(noise * rng.standard_normal(len(attention_s))),
        memory_bytes=2**34,
        bytes_per_s=8e9,
        flops_per_s=6e10,
    )


def test_exact_samples_give_the_device_back():
    spec, gpu = make_spec(widths=WIDTHS), device()
    found = samples(gpu, spec)
    fitted = fit_gpu(found, spec, spec.stack("encoder"), DTYPE)
    assert max(relative_error(fitted, found, spec, spec.stack("encoder"), DTYPE).values()) < 0.01
    assert fitted.matmul_rate(DTYPE) == pytest.approx(gpu.matmul_rate(DTYPE), rel=0.05)
    assert fitted.attention_rate(DTYPE) == pytest.approx(gpu.attention_rate(DTYPE), rel=0.05)
    assert fitted.attention.launch_s == pytest.approx(gpu.attention.launch_s, rel=0.05)
    assert fitted.launch_s == pytest.approx(gpu.launch_s, rel=0.1)


def test_noise_moves_the_fit_little():
    spec, gpu = make_spec(widths=WIDTHS), device()
    clean, noisy = samples(gpu, spec), samples(gpu, spec, noise=0.1)
    fitted = fit_gpu(noisy, spec, spec.stack("encoder"), DTYPE)
    assert max(relative_error(fitted, clean, spec, spec.stack("encoder"), DTYPE).values()) < 0.1


def test_links():
    sizes = np.array([0.0, 1e3, 1e5, 1e7])
    link = fit_link(sizes, 2e-5 + sizes / 3e9)
    assert link.latency_s == pytest.approx(2e-5) and link.bytes_per_s == pytest.approx(3e9)
    assert link.curve.nbytes == (1e3, 1e5, 1e7), "no message of no bytes"
    assert link.seconds(sizes[1:]) == pytest.approx(2e-5 + sizes[1:] / 3e9), "as measured"


def test_message_curves_are_sorted_and_merge_equal_sizes():
    curve = message_curve(np.array([8.0, 2.0, 8.0, 8.0]), np.array([5.0, 1.0, 4.0, 9.0]))
    assert curve == MessageCurve(nbytes=(2.0, 8.0), seconds=(1.0, 5.0))
    assert message_curve(np.array([0.0, 8.0, 8.0]), np.ones(3)) is None
