import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moesim.backend import grouped
from moesim.backend.experts import ExpertShape, ExpertSlots
from moesim.backend.grouped import ACTIVATIONS, SlotWeights, activation_name, choose, group_pairs, grouped_mlp
from moesim.traces import InputError

TOKENS, EXPERTS, D, F = 37, 6, 16, 24
KERNELS = ("loop", "grouped_mm")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def weights_of(*, slots=EXPERTS, gated=False, activation="relu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((slots, (3 if gated else 2) * D * F), generator=generator) / 4
    return SlotWeights.of_rows(rows.to(dtype), d_model=D, d_ff=F, activation=activation, gated=gated)


def ids_of(top_k=1, seed=1):
    """Skewed, some of no expert (on either side of the range), expert 3 without tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, EXPERTS + 1, (TOKENS * top_k,), generator=generator)
    return torch.where(ids == 3, 0, ids)


def written_out(x, ids, weights, scale, top_k, slot_of=range(EXPERTS)):
    """The sum over pairs, in float64, one pair at a time."""
    out = torch.zeros(len(x), D, dtype=torch.float64)
    for pair, expert in enumerate(ids.tolist()):
        if not 0 <= expert < EXPERTS:
            continue
        up, down = weights.up_SFD[slot_of[expert]].double(), weights.down_SDF[slot_of[expert]].double()
        inner = up @ x[pair // top_k].double()
        act = ACTIVATIONS[weights.activation]
        inner = act(inner[:F]) * inner[F:] if weights.gated else act(inner)
        out[pair // top_k] += down @ inner * (1 if scale is None else scale[pair].double())
    return out


@pytest.mark.parametrize("experts", [6, 255, 256, 300])
def test_pairs_are_grouped_in_their_own_order_and_those_of_no_expert_are_last(experts):
    generator = torch.Generator().manual_seed(experts)
    ids = torch.randint(-3, experts + 3, (1000,), generator=generator)
    groups = group_pairs(ids, experts)
    offsets = groups.offsets_X1.tolist()
    assert groups.offsets_X1.dtype == torch.int32 and groups.order_M.dtype == torch.int64
    for g in range(experts):
        assert groups.order_M[offsets[g] : offsets[g + 1]].tolist() == torch.where(ids == g)[0].tolist()
    assert sorted(groups.order_M.tolist()) == list(range(1000))
    assert groups.slot_X.tolist() == list(range(experts))


@pytest.mark.parametrize("experts", [6, 255, 300])
def test_ids_of_a_byte_are_grouped_as_others(experts):
    ids = torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(experts))
    want, got = group_pairs(ids, experts), group_pairs(ids.to(torch.uint8), experts)
    assert torch.equal(got.offsets_X1, want.offsets_X1)
    assert torch.equal(got.order_M[: want.offsets_X1[-1]], want.order_M[: want.offsets_X1[-1]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_slots_of_a_rank_are_groups_of_tokens_in_their_order(kernel):
    """What ExpertSlots.forward does on a GPU, on the CPU."""
    slots = ExpertSlots(
        5, ExpertShape(d_model=D, d_ff=F, dtype=torch.float32), torch.nn.functional.relu, torch.device("cpu")
    )
    torch.nn.init.normal_(slots.rows_SP, generator=torch.Generator().manual_seed(0))
    x, slot_X, tokens_X = torch.randn(10, D, generator=torch.Generator().manual_seed(1)), [4, 0, 2], [3, 6, 1]
    groups = slots._in_order(10, slot_X, tokens_X)
    assert groups.offsets_X1.tolist() == [0, 3, 9, 10] and groups.slot_X.tolist() == slot_X
    assert groups.slot_X.data_ptr() % 16 == 0
    got = grouped_mlp(x, groups, slots.weights, kernel=kernel)
    assert torch.allclose(got, slots.forward(x, slot_X, tokens_X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("gated", "activation", "top_k"), [(False, "relu", 1), (True, "silu", 2), (True, "gelu_new", 3)]
)
def test_equals_the_sum_written_out(kernel, dtype, gated, activation, top_k):
    weights = weights_of(gated=gated, activation=activation, dtype=dtype)
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    scale = torch.rand(TOKENS * top_k, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids = ids_of(top_k)
    got = grouped_mlp(x, group_pairs(ids, EXPERTS), weights, scale, top_k=top_k, kernel=kernel)
    want = written_out(x, ids, weights, scale, top_k)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    none = [n for n in range(TOKENS) if not any(0 <= e < EXPERTS for e in ids.view(TOKENS, top_k)[n].tolist())]
    assert top_k > 1 or none
    assert torch.equal(got[none], torch.zeros(len(none), D, dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_may_lie_in_any_slots_and_others_are_not_read(kernel):
    slot_of = [7, 2, 0, 4, 6, 1]
    weights = weights_of(slots=9)
    for unused in (3, 5, 8):
        weights.up_SFD[unused] = weights.down_SDF[unused] = torch.nan
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))
    ids = ids_of()
    groups = group_pairs(ids, EXPERTS, torch.tensor(slot_of, dtype=torch.int32))
    got = grouped_mlp(x, groups, weights, kernel=kernel)
    assert torch.allclose(got.double(), written_out(x, ids, weights, None, 1, slot_of), atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ids", [[], [-1, EXPERTS, 99], [2, 2, 2]])
def test_no_tokens_no_experts_or_one(kernel, ids):
    x = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor(ids, dtype=torch.int64)
    got = grouped_mlp(x, group_pairs(ids, EXPERTS), weights := weights_of(), kernel=kernel)
    assert torch.allclose(got.double(), written_out(x, ids, weights, None, 1), atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_was_in_memory_does_not_reach_the_output(kernel):
    weights, ids = weights_of(dtype=torch.bfloat16), ids_of()
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2)).bfloat16()
    x[(ids < 0) | (ids >= EXPERTS)] = torch.nan
    scale = torch.ones(TOKENS, dtype=torch.bfloat16)
    for _ in range(5):  # freed blocks of the right sizes, full of NaN, are what an uninitialised buffer gets
        _poison = [torch.full((TOKENS, width), torch.nan, dtype=torch.bfloat16) for width in (D, F)]
        del _poison
        assert grouped_mlp(x, group_pairs(ids, EXPERTS), weights, scale, kernel=kernel).isfinite().all()


def test_the_device_is_never_waited_for():
    """Fake tensors hold no values: whatever needs one on the host (item, nonzero, tolist) raises."""
    with FakeTensorMode():
        weights = SlotWeights(
            up_SFD=torch.empty(EXPERTS, F, D).bfloat16(),
            down_SDF=torch.empty(EXPERTS, D, F).bfloat16(),
            activation="relu",
        )
        x, scale = torch.empty(TOKENS, D).bfloat16(), torch.empty(TOKENS).bfloat16()
        for slots in (None, torch.empty(EXPERTS, dtype=torch.int32)):
            groups = group_pairs(torch.empty(TOKENS, dtype=torch.int64), EXPERTS, slots)
            assert grouped_mlp(x, groups, weights, scale, kernel="grouped_mm").shape == x.shape
            with pytest.raises(DataDependentOutputException):
                grouped_mlp(x, groups, weights, kernel="loop")


def test_activations_are_known_by_name_function_and_module():
    assert activation_name("swish") == activation_name(torch.nn.SiLU()) == activation_name(torch.nn.functional.silu)
    assert activation_name(torch.nn.ReLU()) == "relu"
    with pytest.raises(InputError, match="mish"):
        activation_name("mish")


def test_a_kernel_that_is_not_there_is_named():
    x, weights = torch.zeros(1, D), weights_of()
    assert choose("auto", x, weights) == "loop"
    with pytest.raises(InputError, match="no Triton kernel"):
        choose("triton", x, weights)
    with pytest.raises(InputError, match="unknown kernel"):
        choose("fast", x, weights)


@pytest.mark.parametrize(("gated", "top_k", "scaled"), [(False, 1, True), (True, 2, True), (True, 2, False)])
def test_what_the_triton_kernels_are_asked_for(monkeypatch, gated, top_k, scaled):
    """The kernels' contract, written out row by row, stands in for them: rows of no expert are never written."""

    def up(x, source, offsets, slot, up_SFD, *, activation, gated):
        weights = SlotWeights(up_SFD=up_SFD, down_SDF=up_SFD, activation=activation, gated=gated)
        h = torch.full((len(source), F), torch.nan)
        for g in range(len(slot)):
            for row in range(offsets[g], offsets[g + 1]):
                h[row] = weights.act(up_SFD[slot[g]] @ x[source[row]])
        return h

    def down(h, target, scale, offsets, slot, down_SDF, out):
        for g in range(len(slot)):
            for row in range(offsets[g], offsets[g + 1]):
                y = down_SDF[slot[g]] @ h[row]
                out[target[row]] = y if scale is None else y * scale[target[row]]

    monkeypatch.setattr(grouped.kernels, "grouped_up", up)
    monkeypatch.setattr(grouped.kernels, "grouped_down", down)
    monkeypatch.setattr(grouped, "choose", lambda kernel, *_: kernel)
    weights, ids = weights_of(gated=gated), ids_of(top_k)
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(TOKENS * top_k, generator=torch.Generator().manual_seed(3)) if scaled else None
    got = grouped_mlp(x, group_pairs(ids, EXPERTS), weights, scale, top_k=top_k, kernel="triton")
    assert torch.allclose(got.double(), written_out(x, ids, weights, scale, top_k), atol=1e-5)
