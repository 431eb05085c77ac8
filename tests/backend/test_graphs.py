"""Graphed encoder and decoder against the library's model. Without CUDA what would be captured is called.

Tolerances, relative to the largest value: 1e-12 in float64 (1e-6 with fused norms, as the library takes a variance in
float32), 1e-5 in float32; tokens are equal.
"""

from contextlib import nullcontext

import cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesim.backend import dropin
from moesim.backend.attention import fuse
from moesim.backend.blocks import in_range
from moesim.backend.capture import WARM_UPS, GraphedCall, GraphPool
from moesim.backend.graphs import GraphedDecoder, GraphedEncoder, rules_of
from moesim.traces import InputError

LENGTH = 21


def batch(model, seed=1, length=LENGTH):
    ids = torch.randint(2, model.config.vocab_size, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 13:] = mask[2, 5:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def greedy(model, ids, mask, tokens):
    ask = {} if mask is None else {"attention_mask": mask}
    return model.generate(ids, do_sample=False, max_new_tokens=tokens, **ask)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("fused", "dtype", "tolerance"),
    [(False, torch.float64, 1e-12), (True, torch.float64, 1e-6), (True, torch.float32, 1e-5)],
)
def test_encoder_is_the_library_encoder(padded, fused, dtype, tolerance):
    model = cases.tiny_model().to(dtype)
    graphed = None
    for seed in (1, 2):
        ids, mask = batch(model, seed)
        given = mask if padded else None
        with torch.no_grad():
            wanted = model.encoder(input_ids=ids, attention_mask=given).last_hidden_state
        if graphed is None:
            patch = fuse(model) if fused else None
            graphed = GraphedEncoder(model, 3, LENGTH, padded=padded)
        got = graphed(ids, given)
        real = mask.bool() if padded else slice(None)
        assert (got - wanted)[real].abs().max() <= tolerance * wanted.abs().max()
        if patch:
            patch.remove()
    ids, _ = batch(model, seed=3)
    with torch.no_grad():
        assert torch.allclose(graphed(ids), model.encoder(input_ids=ids).last_hidden_state, atol=1e-4)


@pytest.fixture(scope="module")
def shipped():
    return cases.shipped_model()


@pytest.mark.parametrize(
    ("padded", "installed", "check_every"), [(False, False, 1), (False, True, 16), (True, True, 5), (True, False, 16)]
)
def test_same_tokens_as_generate_until_all_have_ended(shipped, padded, installed, check_every):
    ids, mask = batch(shipped)
    given = mask if padded else None
    plain = greedy(shipped, ids, given, 7)
    # Ends that this model does reach, after different numbers of tokens.
    ends = [int(plain[0, 6]), int(plain[1, 3]), int(plain[2, 2])]
    before, shipped.generation_config.eos_token_id = shipped.generation_config.eos_token_id, ends
    there = dropin.install(shipped) if installed else None
    try:
        wanted = greedy(shipped, ids, given, 20)
        decoder = GraphedDecoder(shipped, 3, 20, LENGTH, padded=padded)
        assert 1 < wanted.shape[1] < 20
        for _ in range(2):
            assert torch.equal(decoder.generate(ids, given, max_new_tokens=20, check_every=check_every), wanted)
        few = decoder.generate(ids, given, max_new_tokens=2, check_every=check_every)
        assert torch.equal(few, wanted[:, :3])
    finally:
        shipped.generation_config.eos_token_id = before
        if there is not None:
            there.remove()


@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_every_step_far_beyond_the_last_distance_bucket(padded):
    model, steps = cases.tiny_model().double(), 140
    model.generation_config.eos_token_id = None
    ids, mask = batch(model)
    given = mask if padded else None
    decoder = GraphedDecoder(model, 3, steps, LENGTH, padded=padded)
    decoder.begin(ids, given)
    logits = []
    for _ in range(steps):
        decoder.step()
        logits.append(decoder.logits_BV.clone())
    # The library's decoder drops tokens over capacity within one pass, which a decode step cannot see.
    for block in model.decoder.block:
        if block.layer[-1].is_sparse:
            block.layer[-1].mlp.router.expert_capacity = steps
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=given, decoder_input_ids=decoder.out_BK[:, :steps])
    difference = (torch.stack(logits, dim=1) - out.logits).abs().max()
    assert difference <= 1e-12 * out.logits.abs().max()
    assert torch.equal(decoder.out_BK[:, 1 : steps + 1], out.logits.argmax(dim=-1))


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: sizes and values that the host asks for, and numbers copied from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        asks = (aten._local_scalar_dense, aten.nonzero, aten.lift_fresh, aten.scalar_tensor, aten.masked_select)
        packet = func.overloadpacket
        # On a GPU torch.where copies a number for one of its branches to the device, and waits for that.
        number = packet is aten.where and any(branch.ndim == 0 for branch in args[1:])
        masks = packet in (aten.index, aten.index_put_) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if packet in asks or number or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "installed"), [(torch.bfloat16, True), (torch.float16, False)])
def test_nothing_waits_for_the_device(padded, dtype, installed):
    model = cases.tiny_model().to(dtype)
    if installed:
        # The kernel "loop", which is the way on a CPU, does ask for sizes.
        dropin.install(model, kernel="grouped_mm")
    else:
        for stack in (model.encoder, model.decoder):
            for block in stack.block:
                block.layer[-1] = stack.block[0].layer[-1]
    fuse(model)
    decoder = GraphedDecoder(model, 3, 5, LENGTH, padded=padded)
    ids, mask = batch(model)
    with NoWaiting():
        decoder.begin(ids, mask if padded else None)
        decoder.step()
        decoder.step()
        with pytest.raises(AssertionError, match="waits"):
            decoder.generate(ids, max_new_tokens=2, check_every=1)
        for waits in (lambda: torch.where(mask == 0, 1, mask), lambda: ids[mask == 0], lambda: torch.tensor(1)):
            with pytest.raises(AssertionError, match="waits"):
                waits()
    assert decoder.logits_BV.isfinite().all()


def test_infinities_in_float16_are_clamped_as_the_library_does():
    hidden = torch.tensor([1.0, torch.inf, -torch.inf, 65504.0], dtype=torch.float16)
    bound = torch.where(torch.isinf(hidden).any(), 65504.0 - 1000, 65504.0)
    assert torch.equal(in_range(hidden), hidden.clamp(min=-bound, max=bound))
    assert in_range(hidden).tolist() == [1.0, 64512.0, -64512.0, 64512.0]
    assert in_range(hidden[[0, 3]]).tolist() == [1.0, 65504.0]
    assert torch.equal(in_range(hidden.float()), hidden.float())


def test_what_does_not_fit_is_one_clear_line():
    model = cases.tiny_model()
    ids, mask = batch(model)
    encoder = GraphedEncoder(model, 3, LENGTH)
    with pytest.raises(InputError, match=r"shape \(3, 20\), but the graph was made for \(3, 21\)"):
        encoder(ids[:, :20])
    with pytest.raises(InputError, match="padded=True"):
        encoder(ids, mask)
    decoder = GraphedDecoder(model, 3, 2, LENGTH, graph=False)
    with pytest.raises(InputError, match="made for 1 to 2"):
        decoder.generate(ids, max_new_tokens=3)
    decoder.generate(ids, max_new_tokens=2)
    with pytest.raises(InputError, match="2 tokens, all of which"):
        decoder.step()
    with pytest.raises(InputError, match="eval"):
        GraphedEncoder(model.train(), 3, LENGTH)
    with pytest.raises(InputError, match="Linear: this model has no encoder"):
        GraphedEncoder(torch.nn.Linear(2, 2), 3, LENGTH)


@pytest.mark.parametrize(
    ("setting", "value"), [("num_beams", 4), ("repetition_penalty", 1.2), ("forced_bos_token_id", 3)]
)
def test_settings_that_are_not_plainly_greedy_are_refused(setting, value):
    model = cases.tiny_model()
    setattr(model.generation_config, setting, value)
    with pytest.raises(InputError, match=f"{setting}={value}"):
        GraphedDecoder(model, 3, 2, LENGTH)


def test_rules_of_models_with_several_ends_or_none():
    model = cases.tiny_model()
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = [7, 9], None
    rules = rules_of(model)
    assert (rules.start, rules.pad, rules.end_E) == (0, 7, (7, 9))
    config.eos_token_id = None
    assert rules_of(model).end_E == ()
    config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(InputError, match="decoder_start_token_id"):
        rules_of(model)


def test_a_closed_call_is_refused_and_holds_nothing():
    calls = []
    call = GraphedCall(lambda: calls.append(1), torch.device("cpu"), GraphPool())
    call()
    call()
    assert len(calls) == 2, "no warm-up where nothing is captured"
    call.close()
    with pytest.raises(InputError, match="closed"):
        call()
    model = cases.tiny_model()
    decoder = GraphedDecoder(model, 3, 2, LENGTH)
    decoder.close()
    with pytest.raises(InputError, match="closed"):
        decoder.begin(batch(model)[0])


class Graph:
    """Stands for a CUDA graph."""


def test_a_pool_gets_a_new_id_when_its_graphs_are_gone(monkeypatch):
    ids = iter(range(10))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(ids))
    pool, first, second = GraphPool(), Graph(), Graph()
    assert [pool.handle(first), pool.handle(second)] == [0, 0]
    pool.discard(first)
    assert pool.handle(first) == 0
    pool.discard(first)
    del second
    assert pool.handle(first) == 1


class Stream:
    """Stands for a CUDA stream."""

    def wait_stream(self, _):
        pass


class BadCapture:
    """A capture that ends with an error of its own after one in its body, as CUDA's does."""

    def __init__(self, graph, pool=None):
        pass

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if error is not None:
            raise RuntimeError("capture was invalidated")


def test_a_body_that_waits_for_the_device_is_named(monkeypatch):
    here, now, calls = Stream(), [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_stream", now.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device, priority: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", BadCapture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    over = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *told: over.append(told))
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())

    def body():
        calls.append(1)
        if len(calls) == WARM_UPS + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(InputError, match=r"\(test_graphs.py:\d+: operation not permitted when stream is capturing\)"):
        GraphedCall(body, torch.device("cuda"))
    assert now == [here] and over == [(0, 7)]
    calls.clear()
    calls.extend([0] * 100)
    GraphedCall(body, torch.device("cuda"))
    assert len(calls) == 100 + WARM_UPS + 1
