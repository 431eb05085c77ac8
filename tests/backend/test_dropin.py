import copy
import weakref

import pytest
import torch
from switch_models import SHIPPED, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from moesim.backend import dropin
from moesim.backend.dropin import install, pack
from moesim.backend.replay import Replay
from moesim.backend.routing import SwitchRouting, drop_over_capacity
from moesim.backend.switch import load_model, sparse_layers
from moesim.traces import InputError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KERNELS = ("loop", "grouped_mm")
DTYPES = list(TOLERANCE)


def switch(capacity=64):
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(tiny_config(capacity=capacity)).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:  # the library starts them so small that a wrong expert would not be noticed
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def mixtral(cls=MixtralForCausalLM, config=MixtralConfig, **more):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    sizes |= {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    model = cls(config(**sizes, initializer_range=0.2, **more)).eval()
    model.set_experts_implementation("eager")
    return model


def qwen():
    return mixtral(Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=6, moe_intermediate_size=24, head_dim=8)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


FAMILIES = {"switch": switch, "mixtral": mixtral, "qwen3-moe": qwen}


def batch_of(model, rows=3, length=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 96, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, : length - 3]}
    return {"input_ids": ids, "attention_mask": mask}


def layer_input(dtype, rows=3, length=20, width=32, seed=2):
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.inference_mode()
def logits(model, **batch):
    return model(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_patched_model_gives_the_same_logits_and_the_same_tokens(family, kernel):
    model = FAMILIES[family]()
    batch = batch_of(model)
    want, installed = logits(model, **batch), install(model, kernel=kernel)
    got = logits(model, **batch)
    assert len(installed.sites) == (4 if family == "switch" else 2)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    prompt = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    ours = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    installed.enable(False)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), ours)
    assert torch.equal(logits(model, **batch), want)


@pytest.mark.parametrize("capacity", [3, 64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_switch_layers_are_right_in_every_dtype_with_and_without_capacity(dtype, kernel, capacity):
    """Against float64 with the same routing: near-ties between experts fall as they do in the dtype."""
    model = switch(capacity).to(dtype)
    x = layer_input(dtype)
    exact = copy.deepcopy(model).double()
    for site in install(model, kernel=kernel).sites:
        mask, prob, _ = copy.deepcopy(site.own.router)(x)
        assert (mask.sum(-1) == 0).any() == (capacity == 3)
        mlp = sparse_layers(getattr(exact, site.stack))[2 * site.layer + 1].mlp
        want = mlp.experts(x.double().view(-1, 32), mask.view(-1, 1, 8), prob.double().view(-1, 1)).view(x.shape)
        assert site.parent.mlp is site.grouped
        got = site.parent.mlp(x).double()
        assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
        assert torch.equal(got[mask.sum(-1) == 0], want[mask.sum(-1) == 0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_experts_are_right_in_every_dtype(dtype, kernel):
    model = mixtral().to(dtype)
    x = layer_input(dtype)
    own = model.model.layers[0].mlp
    exact = copy.deepcopy(own.experts).double()
    _, scale, ids = own.gate(x)
    want = exact(x.double().view(-1, 32), ids, scale.double()).view(x.shape)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    install(model, kernel=kernel)
    got = own(x).double()
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_on_a_cpu_the_loop_gives_the_same_bits():
    for model in (switch(3).bfloat16(), mixtral().bfloat16()):
        batch = batch_of(model)
        want = logits(model, **batch)
        install(model, kernel="loop")
        assert torch.equal(logits(model, **batch), want)


def test_the_shipped_model_gives_the_same_tokens():
    model = load_model(SHIPPED, "float32")
    ids = torch.randint(3, 6000, (2, 90), generator=torch.Generator().manual_seed(5))
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    install(model, kernel="grouped_mm")
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)


@pytest.mark.parametrize("capacity", [1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_routing_is_the_routers_own_to_the_bit_ties_included(dtype, capacity):
    model = switch(capacity).to(dtype)
    router = sparse_layers(model.encoder).popitem()[1].mlp.router
    router.classifier.weight.data[5] = router.classifier.weight.data[2]  # ties at every token
    router.classifier.weight.data[7] = -router.classifier.weight.data[0]
    x = layer_input(dtype, rows=4, length=30)
    x[1, 5:15] = 0  # all experts alike: the first is chosen
    mask, prob, _ = copy.deepcopy(router)(x)
    ids, got_prob = SwitchRouting(router)(x)
    assert torch.equal(got_prob, prob[..., 0])
    assert torch.equal(torch.nn.functional.one_hot(ids, 9)[..., :8], mask)
    assert (ids[mask.sum(-1) == 0] == 8).all() and not (ids == 5).any()
    handle = router.register_forward_hook(lambda *_: None)
    heard, _ = SwitchRouting(router)(x)
    handle.remove()
    assert torch.equal(heard, ids)


def test_capacity_counts_by_sequence_and_expert():
    ids = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    assert drop_over_capacity(ids, 2, 2).tolist() == [[1, 1, 0, 2, 0], [1, 0, 0, 2, 1]]


def test_weights_are_there_once_and_shared_with_the_models_own_layers():
    model = switch().bfloat16()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = live_bytes(model)
    installed = install(model)
    router = 8 * 32 * 4
    assert live_bytes(model) == before + 4 * router // 2  # the router keeps its classifier in float32
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value.to(state[name].dtype), state[name])
    for site in installed.sites:
        rows = site.grouped.weights.up_SFD
        assert rows[3].data_ptr() == site.own.experts["expert_3"].wi.weight.data_ptr()
        assert pack(site.own.experts).up_SFD.data_ptr() == rows.data_ptr()


def live_bytes(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def test_while_weights_move_one_layer_is_there_twice_at_most(monkeypatch):
    model = switch()
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    every = sum(p.nbytes for p in experts)
    old = [weakref.ref(p.untyped_storage()) for p in experts]  # dead when the memory has been given back
    peak, new = [], []
    allocated = dropin.SlotWeights.of_rows

    def counted(rows, **shape):
        new.append(rows.nbytes)
        peak.append(sum(ref().nbytes() for ref in old if ref()) + sum(new))
        return allocated(rows, **shape)

    monkeypatch.setattr(dropin.SlotWeights, "of_rows", counted)
    del experts
    install(model)
    assert len(peak) == 4 and max(peak) == every + every // 4
    assert not any(ref() for ref in old)


def test_moved_or_converted_models_gather_their_experts_again():
    model = switch()
    batch = batch_of(model)
    installed = install(model)
    want = logits(switch().double(), **batch)
    model.double()
    weights = installed.sites[0].grouped.weights
    assert weights.up_SFD.dtype == torch.float64
    assert weights.up_SFD[2].data_ptr() == installed.sites[0].own.experts["expert_2"].wi.weight.data_ptr()
    assert torch.allclose(logits(model, **batch), want, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_the_device(family):
    """Fake tensors hold no values: whatever needs one on the host raises."""
    model = FAMILIES[family]().bfloat16()
    installed = install(model, kernel="grouped_mm")
    layer = installed.sites[0].parent
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(layer_input(torch.bfloat16, length=70))  # longer than the capacity
        assert layer(x).shape == x.shape
        installed.enable(False)
        if family == "switch":
            with pytest.raises(Exception, match=r"aten\.(nonzero|_local_scalar_dense)"):
                layer(x)


def recording(model, batch):
    """[T, L, K] what the encoder's routers chose for a batch, and [T, L] what they dropped."""
    chosen, dropped = [], []

    def note(_router, _args, said):
        chosen.append(torch.softmax(said[2], -1).argmax(-1).reshape(-1, 1))
        dropped.append((said[0].sum(-1) == 0).reshape(-1))

    routers = [block.mlp.router for block in sparse_layers(model.encoder).values()]
    handles = [router.register_forward_hook(note) for router in routers]
    logits(model, **batch)
    for handle in handles:
        handle.remove()
    return torch.stack(chosen, 1), torch.stack(dropped, 1)


def test_a_replay_of_the_models_own_routing_changes_nothing():
    model = switch(3)
    batch = batch_of(model)
    want = logits(model, **batch)
    ids_TLK, dropped_TL = recording(model, batch)
    replay = Replay(ids_TLK.numpy(), 8, dropped_TL=dropped_TL)
    replay.select(torch.arange(60))
    installed = install(model, routing=replay)
    assert installed.routing == "replay" and install(switch()).routing == "model"
    assert torch.allclose(logits(model, **batch), want, atol=1e-4)
    installed.enable(False)
    assert torch.equal(logits(model, **batch), want)


@pytest.mark.parametrize("family", ["switch", "mixtral"])
def test_a_replay_forces_ours_and_the_models_own_layers_alike(family):
    model = FAMILIES[family]()
    stack, K = ("encoder", 1) if family == "switch" else ("decoder", 2)
    ids_TLK = torch.rand(90, 2, 8, generator=torch.Generator().manual_seed(3)).argsort(-1)[..., :K]
    replay = Replay(ids_TLK, 8, stack=stack)
    batch = batch_of(model)
    free = logits(model, **batch)
    installed = install(model, routing={stack: replay})
    index = torch.arange(60).flip(0)
    replay.select(index)
    where = replay._index_N.data_ptr()
    forced = logits(model, **batch)
    installed.enable(False)
    assert torch.allclose(logits(model, **batch), forced, atol=1e-4)
    installed.enable()
    replay.select(index + 30)
    assert replay._index_N.data_ptr() == where  # a captured graph reads it there
    assert not torch.allclose(logits(model, **batch), forced, atol=1e-2)
    installed.remove()
    assert torch.equal(logits(model, **batch), free)


def test_padding_of_a_replay_has_no_expert():
    replay = Replay(torch.zeros(5, 1, 1, dtype=torch.int64), 8)
    replay.select(torch.tensor([[4, -1], [0, -1]]))
    assert replay.ids(0, 4)[:, 0].tolist() == [0, 8, 0, 8]


def test_what_cannot_be_replayed_or_replaced_is_one_clear_line():
    ids = torch.zeros(5, 2, 1, dtype=torch.int64)
    with pytest.raises(InputError, match="names expert 8, the model has 8"):
        Replay(ids + 8, 8)
    with pytest.raises(InputError, match=r"tokens, layers"):
        Replay(ids[0], 8)
    with pytest.raises(InputError, match="has 3 MoE layers, the model's encoder has 2"):
        install(switch(), routing=Replay(torch.zeros(5, 3, 1), 8))
    with pytest.raises(InputError, match="unknown kernel"):
        install(switch(), kernel="fast")
    model = switch()
    install(model, routing=Replay(ids, 8))
    with pytest.raises(InputError, match="selected for 0 tokens, the batch has 60"):
        logits(model, **batch_of(model))
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 1}
    with pytest.raises(InputError, match="no MoE layers"):
        install(T5ForConditionalGeneration(T5Config(**sizes)))


@pytest.mark.parametrize("family", ["switch", "mixtral"])
@pytest.mark.parametrize("training", [True, False])
def test_where_gradients_are_recorded_the_models_own_layers_run(family, training):
    model = FAMILIES[family]()
    installed = install(model)
    model.train(training)
    site = installed.sites[0]
    with torch.enable_grad():
        model(**batch_of(model)).logits.square().sum().backward()
    own = site.grouped.experts if family == "switch" else site.grouped
    gradients = [parameter.grad for parameter in own.parameters()]
    assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients) >= len(gradients) // 2
