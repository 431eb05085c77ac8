"""Experts in fewer bits: the bytes that the simulator charges, and weights within half a step of the model's."""

import numpy as np
import offload_cases as small
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.backend.experts import ExpertShape
from moesim.backend.quantize import BITS, CLIPS, GROUP, dequantise, packed_bytes, quantise
from moesim.sim.execution import COPY_BYTES, copy_bytes
from moesim.sim.residency import PRECISIONS
from moesim.traces import InputError

SHAPES = [(128, 72), (768, 3072), (2048, 1408)]
"""(d_model, d_ff) of switch-mini, Switch-base and DeepSeek-V2-Lite."""


def rows(count=3, params=1024, seed=0):
    return torch.randn(count, params, generator=torch.Generator().manual_seed(seed)) * 0.05


def unpacked(packed, dtype, params, out=torch.float32):
    told = torch.full((len(packed), params), float("nan"), dtype=out)
    dequantise(packed, dtype, params, told)
    return told


def test_every_precision_of_the_simulator_is_real():
    assert set(BITS) == set(COPY_BYTES) == set(PRECISIONS[1:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", BITS)
def test_a_copy_has_the_bytes_that_the_simulator_charges(dtype, shape):
    params = ExpertShape(d_model=shape[0], d_ff=shape[1], dtype=torch.float32).params
    assert packed_bytes(params, dtype) == copy_bytes(params, 4 * params, dtype)
    if params < 100_000:
        assert quantise(rows(1, params), dtype).nbytes == packed_bytes(params, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_executor_moves_that_many(precision):
    _, _, offloads = small.offloaded(torch.float32)
    host = offloads["encoder"].host
    one = host.rows(precision)[0][0]
    assert one.nbytes == host.bytes(precision) == copy_bytes(host.shape.params, host.shape.bytes, precision)


@settings(max_examples=50, deadline=None)
@given(
    params=st.integers(1, 700), dtype=st.sampled_from(sorted(BITS)), scale=st.floats(1e-2, 1e2), seed=st.integers(0, 99)
)
def test_any_length_and_size_comes_back_near(params, dtype, scale, seed):
    """Inside the outermost levels the error is half a step; a group's largest weight may lie outside, by what was
    clipped off it. float16 rounds the scale by 2^-11."""
    true = rows(2, params, seed) * scale
    told = unpacked(quantise(true, dtype), dtype, params)
    steps = 2 ** BITS[dtype] - 1
    for start in range(0, params, GROUP):
        a, b = true[:, start : start + GROUP], told[:, start : start + GROUP]
        largest = a.abs().amax(dim=1, keepdim=True)
        allowed = torch.maximum(largest / steps, largest * (1 - min(CLIPS)))
        assert ((a - b).abs() <= allowed * (1 + 2e-3) + 1e-6).all()


def test_rounds_as_by_hand():
    """Two bits, one group: -3, -1, 1, 3 are levels of scale 2, and these exact values come back."""
    row = torch.tensor([[-3.0, -1.0, 1.0, 3.0] * 32])
    packed = quantise(row, "int2")
    assert packed[0, :2].view(torch.float16).item() == 2.0
    assert packed[0, 2].item() == 0b11_10_01_00  # the first weight in the lowest bits
    assert torch.equal(unpacked(packed, "int2", 128), row)


def test_more_bits_are_nearer_and_zeros_stay_zero():
    true = rows()
    errors = [
        float((unpacked(quantise(true, d), d, 1024, torch.float64) - true).norm() / true.norm())
        for d in ("int8", "int4", "int2")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 and errors[1] < 0.12 and errors[2] < 0.4
    assert not unpacked(quantise(torch.zeros(1, 130), "int2"), "int2", 130).any()


def test_fewer_bits_cost_what_their_rounding_costs():
    """The executor with int8 copies computes with exactly the weights that dequantising gives."""
    model, there, offloads = small.offloaded(torch.float32, copy_dtype="int8", poison=True)
    small.begin(offloads, "on-demand", 1)
    with torch.inference_mode():
        there(**small.batch())
        wanted = model(**small.batch()).logits
        got = there(**small.batch()).logits
    small.finish(offloads)
    offload = offloads["encoder"]
    expert = int(np.flatnonzero(offload.driver.residency.precision_LEG[0, :, 0])[0])
    slot = offload.driver.residency.slot(0, expert, 0)
    packed = offload.host.rows("int8")[0][expert : expert + 1]
    true = unpacked(packed, "int8", offload.host.shape.params)[0]
    assert torch.equal(offload.slots.rows_SP[slot], true)
    assert 0 < float((got - wanted).abs().max()) < 0.5
    assert offload.tally.pairs.precision["int8"].sum() > 0
    record = offload.tally.records[-1]
    assert record.moved_bytes % packed_bytes(offload.host.shape.params, "int8") == 0
    assert record.precision_pairs["int8"] == record.rounded_tokens


def test_an_unknown_precision_is_one_line():
    with pytest.raises(InputError, match="unknown dtype of copies 'int3'; known: int8, int4, int2"):
        packed_bytes(128, "int3")
