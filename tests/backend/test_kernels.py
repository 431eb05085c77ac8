"""The Triton kernels: run by Triton's interpreter on the CPU, against float64, and compiled for an H100 without one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesim.backend import grouped, kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = kernels.Tile(rows=16, columns=32, depth=32, warps=4, stages=2)
D, F, SLOTS, EXPERTS = 48, 80, 7, 6


def weights(gated, dtype, activation):
    rows = 0.1 * torch.randn(SLOTS, (3 if gated else 2) * D * F)
    return grouped.SlotWeights.of_rows(rows.to(dtype), d_model=D, d_ff=F, activation=activation, gated=gated)


def double(parts):
    return grouped.SlotWeights(
        up_SFD=parts.up_SFD.double(),
        down_SDF=parts.down_SDF.double(),
        activation=parts.activation,
        gated=parts.gated,
    )


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")
@pytest.mark.parametrize(
    ("gated", "activation", "dtype", "tolerance"),
    [
        (False, "relu", torch.float32, 1e-6),
        (True, "silu", torch.float32, 1e-6),
        (True, "gelu_new", torch.float32, 1e-6),
        (False, "relu", torch.float16, 2e-3),
    ],
)
@pytest.mark.parametrize(("tokens", "top_k"), [(40, 1), (9, 2)])
def test_equal_to_float64_with_slots_out_of_order_and_tokens_of_no_expert(
    gated, activation, dtype, tolerance, tokens, top_k
):
    torch.manual_seed(tokens)
    parts = weights(gated, dtype, activation)
    ids = torch.randint(0, EXPERTS + 1, (tokens * top_k,))
    ids[ids == 2] = EXPERTS  # an expert without tokens
    groups = grouped.group_pairs(ids, EXPERTS, torch.tensor([3, 1, 0, 6, 5, 2], dtype=torch.int32))
    x, scale = torch.randn(tokens, D).to(dtype), torch.rand(tokens * top_k).to(dtype)
    found = grouped._triton(x, groups, parts, scale, top_k)
    exact = grouped._loop(x.double(), groups, double(parts), scale.double(), top_k)
    assert (found.double() - exact).norm() <= tolerance * exact.norm()
    assert (found[(ids.view(tokens, top_k) == EXPERTS).all(dim=1)] == 0).all()


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")
def test_rows_of_no_expert_are_never_written():
    torch.manual_seed(0)
    parts = weights(False, torch.float32, "relu")
    groups = grouped.group_pairs(torch.tensor([0, EXPERTS, 3, EXPERTS, 0]), EXPERTS)
    bounds = groups.offsets_X1, groups.slot_X
    h = kernels.grouped_up(
        torch.randn(5, D), groups.order_M, *bounds, parts.up_SFD, activation="relu", gated=False, tile=SMALL
    )
    out = torch.full((5, D), torch.nan)
    kernels.grouped_down(h, groups.order_M, None, *bounds, parts.down_SDF, out, tile=SMALL)
    assert out.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert not out[[0, 2, 4]].isnan().any()


@pytest.mark.parametrize(("itemsize", "matrices"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_every_tile_suits_the_tensor_cores(itemsize, matrices):
    for rows in (1, 8, 64, 300, 1024, 4096, 32768, 2**20):
        for columns in (768, 3072):
            tile = kernels.tile_of(rows, 128, columns, itemsize=itemsize, matrices=matrices)
            assert min(tile.rows, tile.columns, tile.depth) >= 16 and tile.stages >= 2
            stage = (tile.rows + matrices * tile.columns) * tile.depth * itemsize
            assert stage * tile.stages <= 227 * 1024, "more shared memory than a multiprocessor of an H100 has"


def test_the_kernels_compile_for_hopper():
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "wgmma" in ran.stdout, "large tiles use Hopper's own matrix instructions"
