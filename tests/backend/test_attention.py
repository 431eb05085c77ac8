"""Fused attention and norms against the library's own, in the tolerances that `backend/attention.py` states."""

import cases
import pytest
import torch

from moesim.backend.attention import ALIGNMENT, aligned, attend, fuse, fuse_attention, fuse_norms, fused_attention
from moesim.traces import InputError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
WITH_NORMS = TOLERANCE | {torch.float64: 1e-6}
"""The library's norm takes the variance in float32, whatever the model's dtype."""
ROUNDED = (torch.bfloat16, torch.float16)
LENGTH = 21


def apart(got, wanted):
    """Largest difference over the largest value."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch():
    ids = torch.randint(2, 96, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 13:] = mask[2, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias_shape", [None, (1, 4, 5, LENGTH), (3, 1, 1, LENGTH), (3, 4, 5, LENGTH)])
def test_attend_is_a_softmax_of_biased_scores(dtype, bias_shape):
    q, k, v = (random(3, 4, n, 8, seed=seed, dtype=dtype) for seed, n in enumerate((5, LENGTH, LENGTH)))
    bias = None if bias_shape is None else random(*bias_shape, seed=3, dtype=dtype)
    scores = 0.5 * q.double() @ k.double().transpose(2, 3) + (0 if bias is None else bias.double())
    wanted = scores.softmax(dim=-1) @ v.double()
    assert apart(attend(q, k, v, bias, 0.5), wanted) < TOLERANCE[dtype]


def test_the_interface_adds_mask_to_bias_and_refuses_dropout():
    q, k, v = (random(3, 4, LENGTH, 8, seed=seed) for seed in range(3))
    bias, mask = random(1, 4, LENGTH, LENGTH, seed=3), random(3, 1, 1, LENGTH, seed=4)
    wanted = ((q @ k.transpose(2, 3) * 8**-0.5 + bias + mask).softmax(dim=-1) @ v).transpose(1, 2)
    got, weights = fused_attention(None, q, k, v, mask, position_bias=bias)
    assert weights is None
    assert apart(got, wanted) < TOLERANCE[torch.float64]
    assert got.is_contiguous()
    with pytest.raises(InputError, match="eval"):
        fused_attention(None, q, k, v, mask, dropout=0.1)


@pytest.mark.parametrize("keys", [1, 7, 8, 21])
def test_aligned_bias_is_the_same_in_rows_that_kernels_take(keys):
    bias = random(2, 3, keys, 4).permute(0, 3, 1, 2)
    there = aligned(bias)
    assert torch.equal(there, bias)
    assert there.stride(-1) == 1
    assert all(stride % ALIGNMENT == 0 for stride in there.stride()[:-1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_block_of_each_stack_is_the_library_block(dtype):
    model = cases.tiny_model().to(dtype)
    hidden, encoded = random(3, LENGTH, 32, dtype=dtype), random(3, 9, 32, seed=1, dtype=dtype)
    mask = torch.full((LENGTH, LENGTH), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]

    def outputs():
        dense = model.encoder.block[0](hidden)[0], model.decoder.block[0](hidden, mask, None, encoded)[0]
        return [out.detach() for out in dense]

    wanted = outputs()
    patch = fuse(model)
    got = outputs()
    patch.remove()
    for ours, theirs in zip(got, wanted, strict=True):
        assert apart(ours, theirs) < WITH_NORMS[dtype]
        assert dtype not in ROUNDED or not torch.equal(ours, theirs), "it was never put in place"
    assert all(torch.equal(*pair) for pair in zip(outputs(), wanted, strict=True)), "it was not taken out"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_over_large_and_tiny_values(dtype):
    model = cases.tiny_model().to(dtype)
    norm = model.encoder.final_layer_norm
    norm.weight.data = random(32, seed=5, dtype=dtype)
    hidden = random(4, 7, 32, dtype=dtype) * torch.tensor([1e-3, 1.0, 30.0, 1000.0], dtype=dtype)[:, None, None]
    wanted = norm(hidden).detach()
    fuse_norms(model)
    assert apart(norm(hidden).detach(), wanted) < WITH_NORMS[dtype]


@pytest.mark.parametrize("masked", [False, True])
def test_generate_of_the_library_gives_the_same_tokens(masked):
    model = cases.tiny_model()
    ids, mask = batch()
    ask = {"attention_mask": mask} if masked else {}
    wanted = model.generate(ids, do_sample=False, max_new_tokens=12, **ask)
    patch = fuse_attention(model)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=12, **ask), wanted)
    patch.remove()


def test_another_model_is_refused():
    with pytest.raises(InputError, match="Linear: not a Hugging Face Switch model"):
        fuse(torch.nn.Linear(2, 2))
