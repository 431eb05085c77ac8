"""What is recorded of each family is what its experts were called with; shapes are those of the published models."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from moe_models import CONFIGS, tiny, tiny_nllb
from switch_models import random_switch
from torch import nn

from moesim.traces import InputError
from moesim.traces.adapters import ADAPTERS, adapter_of, load_spec, spec_of_config
from moesim.traces.routers import RouterRecorder
from moesim.traces.spec import PUBLISHED

MODELS = {
    **{name: lambda name=name: tiny(name) for name in CONFIGS},
    "olmoe bfloat16": lambda: tiny("olmoe", dtype=torch.bfloat16),
    "deepseek_v3 bfloat16": lambda: tiny("deepseek_v3", dtype=torch.bfloat16),
}
SEQ2SEQ = {
    "all second experts": {},
    "over capacity": {"moe_eval_capacity_token_fraction": 0.2},
    "capacity, normalised before": {
        "moe_eval_capacity_token_fraction": 0.2,
        "normalize_router_prob_before_dropping": True,
        "batch_prioritized_routing": True,
    },
    "random second expert": {"second_expert_policy": "random"},
    "sampled second expert": {"second_expert_policy": "sampling"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def watch_experts(model, monkeypatch):
    """What each call of any MoE layer's experts got, in order: [ids or mask, weights]; a patched `forward`, no hook."""
    calls = []
    for router in adapter_of(model)[1]:
        experts = router.block.experts

        def forward(*args, plain=experts.forward, **kwargs):
            calls.append([argument.clone() for argument in (*args, *kwargs.values())[1:]])
            return plain(*args, **kwargs)

        monkeypatch.setattr(experts, "forward", forward)
    return calls


def ids_of(rows, length, seed=0):
    return torch.randint(3, 6000, (rows, length), generator=torch.Generator().manual_seed(seed))


def check(selections, calls, experts=8):
    """Each token's set of (expert, weight) equals that of the experts' call, bit for bit; weights fall."""
    calls = iter(calls)
    for selection in selections:
        B, S, L, K = selection.ids.shape
        assert not selection.dropped.any()
        for layer in range(L):
            ids, weights = next(calls)
            expected = np.zeros((B * S, experts), np.float16)
            np.put_along_axis(expected, ids.numpy().reshape(B * S, K), half(weights).reshape(B * S, K), axis=1)
            found = np.zeros_like(expected)
            mine = selection.weights[:, :, layer].reshape(B * S, K)
            np.put_along_axis(found, selection.ids[:, :, layer].reshape(B * S, K).astype(int), mine, axis=1)
            assert (found == expected).all() and (np.diff(mine, axis=1) <= 0).all()
            assert ((expected > 0).sum(axis=1) == K).all()
    assert not list(calls)


def half(weights):
    return weights.float().numpy().astype(np.float16)


def test_every_token_of_prefill_and_decode(model, monkeypatch):
    calls = watch_experts(model, monkeypatch)
    with RouterRecorder(model) as recorder, torch.inference_mode():
        model(input_ids=ids_of(3, 20))
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        model.generate(input_ids=ids_of(3, 9, seed=1), attention_mask=torch.ones(3, 9), **options)
    selections = recorder.take("decoder")
    assert [s.ids.shape[1] for s in selections] == [20, 9, 1, 1, 1, 1]
    check(selections, calls)
    used = np.unique(selections[0].ids[:, :, 0])
    assert len(used) > 4, "the routers should differ between tokens, or the test sees little"
    assert recorder.take("decoder") == [] and recorder.take("encoder") == []


def test_experts_that_were_not_recorded_do_not_run(model):
    """No reference but the arithmetic: poison all other experts, and nothing changes; poison one more, and all does."""
    model = copy.deepcopy(model)
    ids = ids_of(1, 1)
    with RouterRecorder(model) as recorder, torch.inference_mode():
        plain = model(input_ids=ids).logits
    (selection,) = recorder.take("decoder")
    layers = [router.block.experts for router in recorder.routers]
    for layer, experts in enumerate(layers):
        poison(experts, set(range(8)) - set(selection.ids[0, 0, layer].tolist()))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, plain)
        poison(layers[-1], {int(selection.ids[0, 0, -1, -1])})
        assert model(input_ids=ids).logits.isnan().all()


def poison(experts, which):
    for parameter in experts.parameters():
        parameter.data[sorted(which)] = float("nan")


def test_the_output_does_not_change_by_one_bit(model):
    ids = ids_of(2, 12)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with RouterRecorder(model, lookahead=2):
            recorded = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.equal(plain, recorded) and torch.equal(plain, after)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_lookahead_is_what_the_next_routers_would_select(model):
    """The reference is the family's own router module, run on the input of the layer before."""
    inputs = []
    recorder = RouterRecorder(model, lookahead=2)
    blocks = [router.block for router in recorder.routers]
    plain = [block.forward for block in blocks]
    for block, forward in zip(blocks, plain, strict=True):
        block.forward = lambda hidden, forward=forward: (inputs.append(hidden.clone()), forward(hidden))[1]
    with recorder, torch.inference_mode():
        model(input_ids=ids_of(4, 30))
    for block in blocks:
        del block.forward
    (selection,) = recorder.take("decoder")
    L, K = selection.ids.shape[2:]
    assert selection.lookahead.shape == (4, 30, L, 2, 4)
    for layer in range(L):
        for ahead in (1, 2):
            told = selection.lookahead[:, :, layer, ahead - 1].reshape(120, -1)
            if layer + ahead >= L:
                assert (told == 0).all()
                continue
            with torch.inference_mode():
                outputs = recorder.routers[layer + ahead].module(inputs[layer].flatten(0, 1))
            (chosen,) = [o for o in outputs if not o.is_floating_point()]
            agree = [set(a[:K]) == set(b) for a, b in zip(told.tolist(), chosen.tolist(), strict=True)]
            assert np.mean(agree) == 1


@pytest.mark.parametrize("changes", SEQ2SEQ.values(), ids=SEQ2SEQ)
def test_nllb_choices_weights_and_drops(monkeypatch, changes):
    model = tiny_nllb(**changes)
    calls = watch_experts(model, monkeypatch)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 8:] = 0
    torch.manual_seed(5)  # for the policies that draw
    with RouterRecorder(model, lookahead=1) as recorder, torch.inference_mode():
        model.generate(
            input_ids=ids_of(3, 12),
            attention_mask=mask,
            decoder_input_ids=torch.cat([torch.full((3, 1), 2), ids_of(3, 6, seed=1)], dim=1),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
    encoder, decoder = recorder.take("encoder"), recorder.take("decoder")
    assert [s.ids.shape for s in (*encoder, *decoder)] == [(3, 12, 2, 2), (3, 7, 2, 2)] + 3 * [(3, 1, 2, 2)]
    calls = iter(calls)
    for selection in (*encoder, *decoder):
        for layer in range(2):
            first, combined = next(calls)
            ids = selection.ids[:, :, layer].reshape(-1, 2).astype(int)
            weights = selection.weights[:, :, layer].reshape(-1, 2)
            assert (ids[:, 0] != ids[:, 1]).all()
            rebuilt = np.zeros(combined.shape, np.float16)
            np.put_along_axis(rebuilt, ids, weights, axis=1)
            assert (rebuilt == half(combined)).all(), "weights other than the router's, or on other experts"
            kept = first.bool().any(dim=-1).numpy()
            assert (first.argmax(dim=-1).numpy() == ids[:, 0])[kept].all() and ((weights[:, 0] > 0) == kept).all()
            assert (selection.dropped[:, :, layer].ravel() == (combined == 0).all(dim=-1).numpy()).all()
    assert not list(calls)
    real = encoder[0].weights[mask.numpy().astype(bool)]
    if "moe_eval_capacity_token_fraction" in changes:
        assert 0 < encoder[0].dropped[mask.numpy().astype(bool)].mean() < (real == 0).any(axis=-1).mean()
    elif changes.get("second_expert_policy") != "random":
        assert (real > 0).all()


def test_nllb_outputs_are_not_changed_and_its_library_is_doubted():
    model = tiny_nllb()
    inputs = {"input_ids": ids_of(2, 8), "decoder_input_ids": ids_of(2, 5, seed=1)}
    with torch.inference_mode():
        plain = model(**inputs).logits
        with RouterRecorder(model, lookahead=1) as recorder:
            recorded = model(**inputs).logits
    assert torch.equal(plain, recorded)
    caveat = recorder.adapter.caveat(recorder.routers)
    runs = []
    experts = recorder.routers[0].block.experts
    for name, expert in experts.items():
        expert.register_forward_hook(lambda _m, _a, _o, name=name: runs.append(name))
    with torch.inference_mode():
        experts(torch.ones(1, 32), torch.eye(8, dtype=torch.long)[5:6], torch.eye(8)[5:6])
    assert (caveat is None) == (runs == ["expert_5"])


def test_a_right_nllb_library_is_not_doubted(monkeypatch):
    model = tiny_nllb()
    adapter, routers = adapter_of(model)
    experts = routers[0].block.experts

    def forward(hidden, router_mask, router_probs):
        out = torch.zeros_like(hidden)
        for expert in range(experts.num_experts):
            rows = router_probs[:, expert] > 0
            scale = router_probs[rows, expert, None] * (1 - experts.moe_token_dropout)
            out[rows] += experts[f"expert_{expert}"](hidden[rows]) * scale
        return out

    monkeypatch.setattr(experts, "forward", forward)
    assert adapter.caveat(routers) is None


def test_a_selection_that_is_hidden_from_the_recorder_is_an_error():
    model = tiny("mixtral")
    with RouterRecorder(model) as recorder, torch.inference_mode():
        layer = recorder.routers[0].block
        layer.experts._forward_pre_hooks.clear()
        model(input_ids=ids_of(1, 4))
    with pytest.raises(InputError, match=r"decoder layer 0 ran 1 times, but its selection was seen 0 times"):
        recorder.take("decoder")


@pytest.mark.parametrize("name", [*CONFIGS, "nllb-moe", "switch_transformers"])
def test_the_configuration_alone_tells_what_the_model_is(name, tmp_path):
    builders = {"nllb-moe": tiny_nllb, "switch_transformers": lambda: random_switch(8, layers=4)}
    model = builders[name]() if name in builders else tiny(name)
    adapter, routers = adapter_of(model)
    assert adapter.model_type == name.split()[0] == model.config.model_type
    spec = adapter.spec(model, routers)
    assert spec_of_config(model.config) == spec and spec.dtype == "float32"
    model.config.save_pretrained(tmp_path)
    assert load_spec(str(tmp_path)) == spec
    parameters = sum(p.numel() for n, p in routers[0].block.experts.named_parameters() if "bias" not in n)
    assert spec.num_experts * spec.expert_params() == parameters
    cache = model.config.num_hidden_layers * spec.widths.kv_width
    if not model.config.is_encoder_decoder and "deepseek" not in name:
        with torch.inference_mode():
            layers = model(input_ids=ids_of(1, 1), use_cache=True).past_key_values.layers
        assert sum(layer.keys.numel() + layer.values.numel() for layer in layers) == cache


def test_dense_layers_shared_experts_and_groups():
    specs = {name: spec_of_config(build()) for name, build in CONFIGS.items()}
    moe_layers = {name: spec.stack("decoder").moe_layers for name, spec in specs.items()}
    assert moe_layers["mixtral"] == (0, 1, 2) and moe_layers["qwen2_moe"] == (0, 2)
    assert moe_layers["deepseek_v2"] == moe_layers["deepseek_v3"] == (1, 2)
    assert (specs["qwen2_moe"].widths.shared_d_ff, specs["qwen2_moe"].widths.dense_d_ff) == (20, 40)
    assert (specs["deepseek_v3"].widths.shared_d_ff, specs["deepseek_v3"].widths.dense_d_ff) == (48, 40)
    assert (specs["mixtral"].widths.shared_d_ff, specs["mixtral"].widths.dense_d_ff) == (0, 0)
    assert [(s.groups, s.top_groups) for s in map(specs.get, ("deepseek_v2", "deepseek_v3"))] == [(4, 2), (4, 2)]
    assert (specs["deepseek_v2 greedy"].groups, specs["deepseek_v2 greedy"].top_groups) == (1, 1)
    assert spec_of_config(tiny_nllb().config).capacity is None
    assert [spec_of_config(tiny_nllb().config).stack(s).moe_layers for s in ("encoder", "decoder")] == [(1, 3), (1, 3)]


def published():
    """The models' own published configurations, as far as they differ from the defaults of their classes."""
    t = transformers
    qwen3 = {"moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    lite = {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16}
    return {
        "mixtral-8x7b": (t.MixtralConfig(), (32, 8, 2)),
        "olmoe-1b-7b": (t.OlmoeConfig(intermediate_size=1024), (16, 64, 8)),
        "qwen3-30b-a3b": (t.Qwen3MoeConfig(hidden_size=2048, num_hidden_layers=48, **qwen3), (48, 128, 8)),
        "qwen3-235b-a22b": (
            t.Qwen3MoeConfig(
                **{**qwen3, "moe_intermediate_size": 1536, "num_attention_heads": 64},
                hidden_size=4096,
                num_hidden_layers=94,
            ),
            (94, 128, 8),
        ),
        "deepseek-v2-lite": (
            t.DeepseekV2Config(**lite, num_hidden_layers=27, first_k_dense_replace=1, num_experts_per_tok=6),
            (26, 64, 6),
        ),
        "deepseek-v3": (t.DeepseekV3Config(), (58, 256, 8)),
        "gpt-oss-120b": (t.GptOssConfig(), (36, 128, 4)),
        "switch-base": (
            t.SwitchTransformersConfig(
                d_ff=3072, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=128
            ),
            (6, 128, 1),
        ),
    }


@pytest.mark.parametrize("name", list(published()))
def test_published_models_have_their_published_shapes(name):
    config, (layers, experts, top_k) = published()[name]
    spec = spec_of_config(config)
    assert spec.widths == PUBLISHED[name]
    assert (len(spec.stack("decoder").moe_layers), spec.num_experts, spec.top_k) == (layers, experts, top_k)


def test_the_published_deepseek_v3_is_group_limited():
    spec = spec_of_config(transformers.DeepseekV3Config())
    assert (spec.groups, spec.top_groups) == (8, 4) and spec.stack("decoder").moe_layers[0] == 3


def test_a_model_that_is_not_known_is_refused_with_everything_that_was_looked_for(tmp_path):
    looked = [adapter.block for adapter in ADAPTERS.values()]
    with pytest.raises(InputError) as refused:
        adapter_of(nn.Linear(2, 2))
    assert str(refused.value).startswith("Linear has no MoE layers that moesim knows")
    assert all(name in str(refused.value) for name in looked) and len(looked) == 10
    dense = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    dense.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r": LlamaForCausalLM has no MoE layers .*MixtralSparseMoeBlock \(mixtral\)"):
        load_spec(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no model there \(config.json is missing\)"),
        ("{", "the model cannot be loaded"),
        ("[]", "the model cannot be loaded"),
        ('{"model_type": "mixtral", "num_local_experts": "many"}', "the model cannot be loaded|cannot be used"),
        ('{"model_type": "mixtral", "num_attention_heads": 0}', "cannot be loaded|cannot be used"),
        ('{"model_type": "deepseek_v2"}', "the deepseek_v2 configuration cannot be used"),
        ('{"model_type": "qwen3_moe", "num_experts": 0}', "all its layers are dense"),
        ('{"model_type": "mixtral", "num_experts_per_tok": 99}', "top_k 99 exceeds 8 experts"),
        ('{"model_type": "mixtral", "dtype": "int8"}', "cannot be"),
        ('{"model_type": "qwen2_moe", "num_hidden_layers": 99999999999}', "99999999999 layers in its config.json"),
        ('{"model_type": "nllb-moe", "encoder_ffn_dim": 8}', "experts of different widths"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}', "the model cannot be loaded"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path, content, message):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as refused:
        load_spec(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_the_dtype_is_the_one_of_the_weights():
    model = tiny("olmoe").to(torch.bfloat16)
    adapter, routers = adapter_of(model)
    assert adapter.spec(model, routers) == replace(spec_of_config(model.config), dtype="bfloat16")
