"""From expert phases on partitions, measured with unequal loads, to the terms of the cost model. Torch-free.

A partition's time depends on its experts' tokens one by one, rounded up to tiles, not on their mean, and on how many of
the others compute at the same time. Both are terms of the simulator's own functions, which are what is fitted. Shape
letters: N samples, E experts, G partitions.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.backend.fit import Floats, closest
from moesim.sim.cost import RankTokens, attention_seconds, expert_seconds_of, together_seconds
from moesim.sim.dispatch import Ints
from moesim.sim.profile import Attention, Gpu
from moesim.traces import ModelSpec, StackSpec

TILES = (1, 16, 32, 64, 128)
"""Rows of a tile that are tried; the kernel's own is among them, and what fits best is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSamples:
    """Measured expert phases."""

    tokens_NEG: Ints
    """Tokens of each expert on each partition."""
    busy_NG: Floats
    """Seconds of each partition, 0 where it had no tokens."""
    phase_N: Floats
    """Seconds from the common start until the last partition is done."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the tokens, which are many small numbers, packed in a text."""
        packed = base64.b64encode(zlib.compress(self.tokens_NEG.astype(np.int32).tobytes())).decode()
        seconds = {"busy_NG": self.busy_NG.tolist(), "phase_N": self.phase_N.tolist()}
        return {"tokens_shape": list(self.tokens_NEG.shape), "tokens_NEG": packed, **seconds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PhaseSamples:
        """The inverse of `to_dict`; other keys are left alone."""
        flat = np.frombuffer(zlib.decompress(base64.b64decode(data["tokens_NEG"])), np.int32)
        return cls(
            tokens_NEG=flat.reshape(data["tokens_shape"]).astype(np.int64),
            busy_NG=np.array(data["busy_NG"]),
            phase_N=np.array(data["phase_N"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRates:
    """What one partition showed beside its expert phases."""

    memory_bytes: int
    bytes_per_s: float
    flops_per_s: float
    """Plain copy and matrix product of the whole device, divided by the partitions: where the fit starts."""
    ranks: RankTokens
    attention_s: Floats
    """[N'] tokens of the whole device in each step, divided by the partitions, and seconds of attention of a step."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        ranks = {name: getattr(self.ranks, name).tolist() for name in ("tokens_G", "pairs_G", "cached_G")}
        plain = {name: getattr(self, name) for name in ("memory_bytes", "bytes_per_s", "flops_per_s")}
        return {**plain, "attention_ranks": ranks, "attention_s": self.attention_s.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PartitionRates:
        """The inverse of `to_dict`; other keys are left alone."""
        plain = {name: data[name] for name in ("memory_bytes", "bytes_per_s", "flops_per_s")}
        ranks = RankTokens(**{name: np.array(counts) for name, counts in data["attention_ranks"].items()})
        return cls(**plain, ranks=ranks, attention_s=np.array(data["attention_s"]))


def fit_partitions(
    samples: PhaseSamples, rates: PartitionRates, spec: ModelSpec, stack: StackSpec, dtype: str
) -> tuple[Gpu, dict[str, float]]:
    """(the partition whose cost functions come closest to all samples, median relative error of experts and attention).

    Every partition of every sample counts alike. What a phase takes longer than its slowest partition goes to the
    launch.
    """
    found = [_fit_experts(samples, rates, spec, dtype, tile) for tile in TILES]
    gpu, error = min(found, key=lambda one: one[1])
    slowest_N = samples.busy_NG.max(axis=1)
    gpu = replace(gpu, launch_s=gpu.launch_s + float(np.median(samples.phase_N - slowest_N)))
    attention = closest(
        lambda p: attention_seconds(rates.ranks, stack, _with_attention(gpu, p, dtype), spec, dtype).sum(axis=0),
        rates.attention_s,
        np.array([1e-4, rates.flops_per_s]),
        np.array([1e4, 1e2]),
    )
    gpu = _with_attention(gpu, attention, dtype)
    fitted_s = attention_seconds(rates.ranks, stack, gpu, spec, dtype).sum(axis=0)
    off = float(np.median(np.abs(fitted_s / rates.attention_s - 1)))
    return gpu, {"experts": error, "attention": off}


def _fit_experts(
    samples: PhaseSamples, rates: PartitionRates, spec: ModelSpec, dtype: str, tile: int
) -> tuple[Gpu, float]:
    busy = samples.busy_NG > 0
    distinct_NG, rows_NG = _counts(samples.tokens_NEG, tile)

    def seconds(p: Floats) -> Floats:
        gpu = _gpu(p, rates, tile, dtype)
        alone_NG = expert_seconds_of(distinct_NG, rows_NG, gpu, spec, dtype)
        return np.asarray(together_seconds(alone_NG, gpu.shared_slowdown)[busy])

    start = np.array([2e-5, 1e-6, rates.flops_per_s, rates.bytes_per_s, 0.1])
    span = np.array([1e3, 1e4, 10.0, 10.0, 1e2])
    found = closest(seconds, samples.busy_NG[busy], start, span)
    error = float(np.median(np.abs(seconds(found) / samples.busy_NG[busy] - 1)))
    return _gpu(found, rates, tile, dtype), error


def _counts(tokens_NEG: Ints, tile: int) -> tuple[Ints, Ints]:
    """[N, G] distinct experts, and rows in whole tiles."""
    return (tokens_NEG > 0).sum(axis=1), (-(-tokens_NEG // tile)).sum(axis=1) * tile


def _gpu(p: Floats, rates: PartitionRates, tile: int, dtype: str) -> Gpu:
    launch_s, expert_s, flops, nbytes, slowdown = (float(value) for value in p)
    return Gpu(
        memory_bytes=rates.memory_bytes,
        hbm_bytes_per_s=nbytes,
        matmul_flops_per_s={dtype: flops},
        tile_rows=tile,
        launch_s=launch_s,
        expert_s=expert_s,
        attention=Attention(launch_s=0.0, efficiency=1.0),
        shared_slowdown=slowdown,
    )


def _with_attention(gpu: Gpu, p: Floats, dtype: str) -> Gpu:
    """Rates are measured, so efficiencies are shares of the faster of expert and attention products."""
    expert_rate, rate = gpu.matmul_rate(dtype), float(p[1])
    peak = max(expert_rate, rate)
    return replace(
        gpu,
        matmul_flops_per_s={dtype: peak},
        attention=Attention(launch_s=float(p[0]), efficiency=rate / peak),
        matmul_efficiency=expert_rate / peak,
    )
