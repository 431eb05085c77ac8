"""Every token goes to a partition that holds its expert, in as many parts as the split says."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moesim.backend.partition_plan import make_plan, message_size, offsets_width, place


@st.composite
def layers(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, gpus = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    slots = -(-experts // gpus) + draw(st.integers(0, 2))
    experts_GS = np.full((gpus, slots), -1)
    for gpu in range(gpus):
        home = np.arange(gpu, experts, gpus)
        others = rng.permutation(np.setdiff1d(np.arange(experts), home))[: slots - len(home)]
        mine = rng.permutation(np.concatenate([home, others]))
        experts_GS[gpu, rng.permutation(slots)[: len(mine)]] = mine
    ids_T = rng.integers(0, experts + 1, draw(st.integers(0, 60)))  # `experts`: a dropped token
    holds_EG = np.stack([(experts_GS == e).any(axis=1) for e in range(experts)])
    load_E = np.bincount(ids_T, minlength=experts + 1)[:experts]
    weight_EG = holds_EG * rng.random(holds_EG.shape)
    split = [rng.multinomial(n, w / w.sum()) for n, w in zip(load_E, weight_EG, strict=True)]
    return ids_T, np.stack(split).astype(np.int64), experts_GS


@settings(max_examples=60, deadline=None)
@given(layers())
def test_tokens_are_conserved_and_lie_slot_by_slot(layer):
    ids_T, tokens_EG, experts_GS = layer
    (E, G), S = tokens_EG.shape, experts_GS.shape[1]
    plan = make_plan(tokens_EG, experts_GS)
    assert len(plan.message) == message_size(G, S, E)
    expert_T, order_T = torch.sort(torch.from_numpy(ids_T), stable=True)
    placed = place(torch.from_numpy(plan.message), expert_T, order_T, G, S).numpy()
    offsets_GS1 = plan.message[: G * offsets_width(S)].reshape(G, -1)[:, : S + 1]
    assert not any(first % 2 for first in plan.first_G)
    seen = []
    assert plan.tokens_G == offsets_GS1[:, -1].tolist() == tokens_EG.sum(axis=0).tolist()
    for gpu in range(G):
        assert gpu == 0 or plan.first_G[gpu] >= plan.first_G[gpu - 1] + plan.tokens_G[gpu - 1]
        mine = placed[plan.first_G[gpu] : plan.first_G[gpu] + plan.tokens_G[gpu]]
        for slot, expert in enumerate(experts_GS[gpu]):
            part = mine[offsets_GS1[gpu, slot] : offsets_GS1[gpu, slot + 1]]
            assert (ids_T[part] == expert).all()
            seen += part.tolist()
            assert len(part) == (tokens_EG[expert, gpu] if expert >= 0 else 0)
    begin = sum(-(-tokens // 2) * 2 for tokens in plan.tokens_G)
    dropped = placed[begin : begin + (ids_T == E).sum()]
    assert (ids_T[dropped] == E).all()
    assert sorted([*seen, *dropped.tolist()]) == list(range(len(ids_T)))


def test_placing_does_not_wait_for_the_device():
    """Nothing in it depends on data: a fake tensor would raise where the host asked for a value."""
    with FakeTensorMode():
        message = torch.empty(message_size(4, 3, 8), dtype=torch.int32)
        expert_T, order_T = torch.empty(32, dtype=torch.uint8), torch.empty(32, dtype=torch.int64)
        placed = place(message, expert_T, order_T, 4, 3)
        assert placed.shape == (36,)
