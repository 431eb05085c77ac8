"""The Triton kernels of routing and grouping: run by Triton's interpreter on the CPU, and compiled for an H100."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moesim.backend import grouped, routing, routing_kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before triton is imported"
)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (37, 6), (50, 128), (20, 300)])
def test_the_choice_is_the_first_of_the_largest_rounded_probabilities(tokens, experts, dtype):
    logits = 3 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts))
    logits[:, experts // 2] = logits.max(dim=1).values  # a tie, in most rows with one that comes later or before
    logits[tokens // 2] = 0
    prob, ids = torch.softmax(logits, -1).to(dtype).max(dim=-1)
    got_ids, got_prob = routing_kernels.choose(logits, dtype)
    assert got_ids.dtype == (torch.uint8 if experts <= 255 else torch.int32)
    assert got_prob.dtype == dtype and torch.equal(got_ids.long(), ids)
    assert torch.allclose(got_prob, prob, rtol=1e-6 if dtype == torch.float32 else 1e-2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(("length", "capacity"), [(1, 1), (70, 1), (130, 7), (64, 30)])
def test_capacity_drops_the_same_tokens_as_a_sort(length, capacity, dtype):
    ids = torch.randint(0, 5, (3, length), generator=torch.Generator().manual_seed(length)).to(dtype)
    want = routing.drop_over_capacity(ids, 5, capacity)
    assert torch.equal(routing_kernels.drop(ids, 5, capacity).long(), want)
    assert (want == 5).any() == (length > 1 and capacity < 30)


@interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize(("pairs", "experts"), [(0, 4), (1, 4), (64, 70), (150, 6), (300, 128)])
def test_groups_are_those_of_a_stable_sort(pairs, experts, dtype):
    low = 0 if dtype == torch.uint8 else -2
    ids = torch.randint(low, experts + 3, (pairs,), generator=torch.Generator().manual_seed(pairs)).to(dtype)
    order, offsets = routing_kernels.group(ids, experts)
    want = grouped._sorted(ids, experts)
    none = order[int(offsets[-1]) :].tolist()
    assert torch.equal(offsets, want[1]) and offsets.dtype == torch.int32
    assert torch.equal(order[: int(offsets[-1])], want[0][: int(offsets[-1])])
    assert sorted(none) == sorted(want[0][int(offsets[-1]) :].tolist())


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_classifier_that_fits_the_dtype_of_the_input_chooses_as_the_router_does(monkeypatch, dtype):
    """On CUDA the product takes narrow inputs and sums in float32; a CPU has none of that kind, so written out."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a.double() @ b.double()).to(out_dtype))
    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=32, num_experts=8, expert_capacity=5)
    router = SwitchTransformersTop1Router(config).to(dtype).eval()
    x = 4 * torch.randn(3, 40, 32).to(dtype)
    mask, prob, _ = router(x)
    weight = routing.SwitchRouting(router)._exact[dtype]
    ids, got = routing._narrow_choice(x, weight)
    assert torch.allclose(got, prob[..., 0], rtol=1e-2)
    ids = routing_kernels.drop(ids, 8, 5)
    assert torch.equal(torch.nn.functional.one_hot(ids.long(), 9)[..., :8], mask)
    router.classifier.weight.data.mul_(1.0001)  # no longer what the dtype can hold
    assert dtype not in routing.SwitchRouting(router)._exact


def test_the_kernels_compile_for_hopper():
    script = Path(__file__).with_name("compile_routing.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["choose", "choose", "drop", "group", "group"]
