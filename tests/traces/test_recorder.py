"""Switch: what is recorded is what ran; the reference is the mask and weight that the experts were called with."""

import numpy as np
import pytest
import torch
from switch_models import random_switch, shipped_switch
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
    SwitchTransformersTop1Router,
)

from moesim.traces.routers import RouterRecorder

MODELS = {
    "8 experts": lambda: random_switch(8),
    "32 experts": lambda: random_switch(32, seed=1),
    "128 experts": lambda: random_switch(128, seed=2),
    "capacity 2": lambda: random_switch(8, capacity=2, seed=3),
    "bfloat16": lambda: random_switch(32, capacity=4, seed=4).to(torch.bfloat16),
    "gates with a bias": lambda: biased(random_switch(8, seed=6)),
    "switch-mini": shipped_switch,
}


def biased(model):
    for module in model.modules():
        if isinstance(module, SwitchTransformersTop1Router):
            weight = module.classifier.weight
            module.classifier = torch.nn.Linear(weight.shape[1], weight.shape[0])
            torch.nn.init.normal_(module.classifier.weight)
            torch.nn.init.normal_(module.classifier.bias, std=3.0)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def executed(monkeypatch):
    """Every (mask, weights) that experts were called with, in order."""
    calls = []
    plain = SwitchTransformersExperts.forward

    def spy(self, hidden_states, selected_experts, routing_weights):
        calls.append((selected_experts[:, 0].clone(), routing_weights[:, 0].clone()))
        return plain(self, hidden_states, selected_experts, routing_weights)

    monkeypatch.setattr(SwitchTransformersExperts, "forward", spy)
    return calls


def batch_of(model, rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


def check(selections, calls):
    """Compare selections of forward passes with the expert calls of the same layers, bit for bit."""
    calls = iter(calls)
    for selection in selections:
        B, S, L, _ = selection.ids.shape
        for layer in range(L):
            mask, weight = next(calls)
            kept = mask.any(dim=-1).numpy().reshape(B, S)
            ran = mask.argmax(dim=-1).numpy().reshape(B, S)
            assert (selection.dropped[:, :, layer] == ~kept).all()
            assert (selection.ids[:, :, layer, 0] == ran)[kept].all()
            expected = weight.float().numpy().astype(np.float16).reshape(B, S)
            assert (selection.weights[:, :, layer, 0] == expected).all()
    assert not list(calls)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_every_token_of_encoder_and_prefill(model, executed, rows, padding):
    ids, mask = batch_of(model, rows, 24), torch.ones(rows, 24, dtype=torch.long)
    if padding != "none":
        mask[0, slice(0, 7) if padding == "left" else slice(-7, None)] = 0
        ids = ids.masked_fill(mask == 0, 0)
    prompt = batch_of(model, rows, 9, seed=1)
    with RouterRecorder(model) as recorder, torch.inference_mode():
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=prompt)
    encoder_calls = len([r for r in recorder.routers if r.stack == "encoder"])
    check(recorder.take("encoder"), executed[:encoder_calls])
    check(recorder.take("decoder"), executed[encoder_calls:])
    assert recorder.take("encoder") == []


def test_every_decode_step(model, executed):
    ids, prompt = batch_of(model, 3, 16), batch_of(model, 3, 5, seed=2)
    prompt[:, 0] = model.config.decoder_start_token_id
    with RouterRecorder(model) as recorder, torch.inference_mode():
        model.generate(input_ids=ids, decoder_input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    encoder_calls = len([r for r in recorder.routers if r.stack == "encoder"])
    decoder = recorder.take("decoder")
    assert [s.ids.shape[1] for s in decoder] == [5, 1, 1, 1, 1, 1]
    check(decoder, executed[encoder_calls:])


def test_drops_are_recorded_with_the_expert_that_was_full():
    model = random_switch(8, capacity=2, seed=3)
    with RouterRecorder(model) as recorder, torch.inference_mode():
        model(input_ids=batch_of(model, 2, 30), decoder_input_ids=batch_of(model, 2, 3))
    (selection,) = recorder.take("encoder")
    assert selection.dropped.mean() > 0.3
    for row in range(2):
        for layer in range(selection.ids.shape[2]):
            seen = np.zeros(8, int)
            for expert, dropped in zip(selection.ids[row, :, layer, 0], selection.dropped[row, :, layer], strict=True):
                seen[expert] += 1
                assert dropped == (seen[expert] > 2)


def test_the_output_does_not_change_by_one_bit(model):
    ids, prompt = batch_of(model, 3, 20), batch_of(model, 3, 4)
    with torch.inference_mode():
        plain = model(input_ids=ids, decoder_input_ids=prompt).logits
        with RouterRecorder(model, lookahead=2):
            recorded = model(input_ids=ids, decoder_input_ids=prompt).logits
        after = model(input_ids=ids, decoder_input_ids=prompt).logits
    assert torch.equal(plain, recorded) and torch.equal(plain, after)


@pytest.mark.parametrize("name", MODELS)
def test_lookahead_is_what_the_next_gates_say(name):
    model = MODELS[name]()  # fresh: the first forward pass casts the gates to the router's dtype
    ids, prompt = batch_of(model, 4, 200), batch_of(model, 4, 3)  # gates in the wrong dtype differ for 1 token in 40
    inputs = []
    recorder = RouterRecorder(model, lookahead=2)
    routers = [r for r in recorder.routers if r.stack == "encoder"]
    hooks = [r.module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].clone())) for r in routers]
    with recorder, torch.inference_mode():
        model(input_ids=ids, decoder_input_ids=prompt)
    for hook in hooks:
        hook.remove()
    (selection,) = recorder.take("encoder")
    for layer in range(len(routers)):
        for ahead in (1, 2):
            told = selection.lookahead[:, :, layer, ahead - 1]
            if layer + ahead >= len(routers):
                assert (told == 0).all()
                continue
            router = routers[layer + ahead]
            with torch.inference_mode():
                logits = router.module.classifier(inputs[layer].to(router.module.dtype))
            assert (
                np.take_along_axis(logits.detach().numpy(), told[..., :1].astype(int), -1)[..., 0]
                >= logits.amax(-1).detach().numpy() - 1e-5
            ).all()
