import pytest
import torch
from switch_models import tiny_config

from moesim.backend.dropin import install
from moesim.backend.random_model import NAMES, random_switch, switch_config
from moesim.traces import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_random_model_runs_generates_and_stays_finite(dtype):
    model = random_switch(tiny_config(), dtype, "cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}
    ids = torch.randint(2, 96, (4, 30), generator=torch.Generator().manual_seed(1))
    states = model.encoder(input_ids=ids).last_hidden_state
    assert states.isfinite().all() and 0.1 < states.float().std() < 10
    want = model.generate(ids, max_new_tokens=4, min_new_tokens=4)
    install(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, min_new_tokens=4), want)


def test_routers_are_neither_certain_nor_indifferent():
    model = random_switch(tiny_config(), torch.float32, "cpu")
    said = []
    for name, module in model.encoder.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(lambda _m, _a, out: said.append(out))
    model.encoder(input_ids=torch.arange(2, 64)[None])
    assert len(said) == 2
    for mask, prob, _ in said:
        assert 0.2 < prob.mean() < 0.9
        assert (mask.sum((0, 1)) > 0).sum() >= 5  # of 8 experts


def test_the_same_seed_gives_the_same_weights_and_ties_are_kept():
    one, same, other = (random_switch(tiny_config(), torch.float32, "cpu", seed=seed) for seed in (0, 0, 1))
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["shared.weight"], states[2]["shared.weight"])
    assert one.encoder.embed_tokens.weight.data_ptr() == one.shared.weight.data_ptr()


def test_experts_lie_in_one_tensor_from_the_start():
    model = random_switch(tiny_config(), torch.bfloat16, "cpu")
    before = [p.data_ptr() for name, p in model.named_parameters() if "experts" in name]
    installed = install(model)
    assert [p.data_ptr() for name, p in model.named_parameters() if "experts" in name] == before
    assert installed.sites[0].grouped.weights.up_SFD.data_ptr() == before[0]


def test_published_shapes():
    config = switch_config("switch-base-128")
    params = 128 * 2 * config.d_model * config.d_ff * 12  # 7.4 B in all
    assert (config.num_experts, config.num_layers, config.num_decoder_layers, params) == (128, 12, 12, 7_247_757_312)
    assert config.encoder_sparse_step == config.decoder_sparse_step == 2
    one = switch_config("switch-large-128", stacks=("encoder",), experts=4, layers=6)
    assert (one.num_experts, one.num_layers, one.num_decoder_layers, one.d_ff) == (4, 6, 6, 4096)
    assert one.num_sparse_encoder_layers == 3 and one.num_sparse_decoder_layers == 0
    with pytest.raises(InputError, match="switch-base-8, switch-base-16"):
        switch_config("switch-base-7")
    with pytest.raises(InputError, match="stacks have to be some of encoder, decoder"):
        switch_config("switch-base-8", stacks=("encoders",))
    assert len(NAMES) == 7


def test_a_stack_that_is_left_out_has_no_experts():
    config = switch_config("switch-base-8", stacks=("decoder",), experts=2, layers=4)
    for name in ("d_model", "d_ff", "d_kv", "vocab_size"):
        setattr(config, name, 16)
    model = random_switch(config, torch.float32, "cpu")
    installed = install(model)
    assert [site.stack for site in installed.sites] == ["decoder"] * 2
