"""From measured seconds to the terms of the cost model. Torch-free.

The simulator's own cost functions are what is fitted, so a profile means here exactly what it means there. Errors are
relative: a microsecond counts as much in a short phase as a millisecond in a long one, and outliers count little. Shape
letters: E experts, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from moesim.sim.cost import RankTokens, attention_seconds, expert_seconds
from moesim.sim.curves import MessageCurve
from moesim.sim.dispatch import Ints
from moesim.sim.profile import Attention, Gpu, Link
from moesim.traces import ModelSpec, StackSpec

Floats = NDArray[np.float64]
SMALLEST = 1e-9
"""Seconds below which an overhead counts as none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What one device showed: expert phases and attention, and the plain rates that the fit starts from."""

    tokens_EN: Ints
    experts_s: Floats
    """[N] seconds of the expert phase of each sample."""
    ranks: RankTokens
    attention_s: Floats
    """[N'] seconds of attention and dense parts of a whole step."""
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float


def fit_gpu(found: Compute, spec: ModelSpec, stack: StackSpec, dtype: str) -> Gpu:
    """The device whose cost functions come closest to all samples; rates are measured, so efficiencies are shares of
    the faster of expert and attention matmuls."""

    def device(expert: Floats, attention: Floats) -> Gpu:
        launch_s, expert_s, flops, nbytes = expert
        peak = max(flops, attention[1])
        return Gpu(
            memory_bytes=found.memory_bytes,
            hbm_bytes_per_s=nbytes,
            matmul_flops_per_s={dtype: peak},
            tile_rows=1,
            launch_s=launch_s,
            expert_s=expert_s,
            attention=Attention(launch_s=attention[0], efficiency=attention[1] / peak),
            matmul_efficiency=flops / peak,
        )

    start = np.array([2e-5, 2e-5, found.flops_per_s, found.bytes_per_s])
    no_attention = np.array([1e-4, found.flops_per_s])
    # An expert's fixed overhead and the reading of its weights grow alike, so only the plain rate tells them apart.
    expert = closest(
        lambda p: expert_seconds(found.tokens_EN, device(p, no_attention), spec, dtype),
        found.experts_s,
        start,
        np.array([1e4, 1e4, 1e2, 3.0]),
    )
    attention = closest(
        lambda p: attention_seconds(found.ranks, stack, device(expert, p), spec, dtype).sum(axis=0),
        found.attention_s,
        no_attention,
        np.array([1e4, 1e2]),
    )
    return device(expert, attention)


def fit_link(nbytes_N: Floats, seconds_N: Floats) -> Link:
    """Latency and bandwidth of messages, by least relative squares, neither negative, and the samples as a curve."""
    terms = np.stack([np.ones_like(nbytes_N), nbytes_N], axis=1) / seconds_N[:, None]
    (latency_s, per_byte), _ = nnls(terms, np.ones_like(seconds_N))
    return Link(
        latency_s=float(latency_s),
        bytes_per_s=1 / max(float(per_byte), 1e-13),
        curve=message_curve(nbytes_N, seconds_N),
    )


def message_curve(nbytes_N: Floats, seconds_N: Floats) -> MessageCurve | None:
    """The samples in order of size, the median where a size is there twice; empty messages are left out, as they have
    no place on a logarithmic scale. None where fewer than two sizes remain."""
    sizes = [float(size) for size in np.unique(nbytes_N[nbytes_N > 0])]
    if len(sizes) < 2:
        return None
    seconds = tuple(float(np.median(seconds_N[nbytes_N == size])) for size in sizes)
    return MessageCurve(nbytes=tuple(sizes), seconds=seconds)


def relative_error(gpu: Gpu, found: Compute, spec: ModelSpec, stack: StackSpec, dtype: str) -> dict[str, float]:
    """Median of |fitted / measured - 1| for the expert phase and for attention."""
    fitted = {
        "experts": expert_seconds(found.tokens_EN, gpu, spec, dtype) / found.experts_s,
        "attention": attention_seconds(found.ranks, stack, gpu, spec, dtype).sum(axis=0) / found.attention_s,
    }
    return {what: float(np.median(np.abs(ratio - 1))) for what, ratio in fitted.items()}


def without_noise(gpu: Gpu) -> Gpu:
    """Overheads too small to have been measured become 0."""

    def clean(seconds: float) -> float:
        return seconds if seconds > SMALLEST else 0.0

    attention = replace(gpu.attention, launch_s=clean(gpu.attention.launch_s))
    return replace(gpu, launch_s=clean(gpu.launch_s), expert_s=clean(gpu.expert_s), attention=attention)


def closest(model: Callable[[Floats], Floats], seconds_N: Floats, start: Floats, span: Floats) -> Floats:
    """Parameters for which `model` comes closest to the measured seconds, on a logarithmic scale; each within a factor
    of `span` of its start."""

    def off(log_p: Floats) -> Floats:
        return np.log(model(np.exp(log_p)) / seconds_N)

    bounds = np.log(start / span), np.log(start * span)
    found = least_squares(off, np.log(start), bounds=bounds, loss="soft_l1", f_scale=0.2)
    return np.exp(found.x)
