"""Offloading for real against the Hugging Face forward of the same model, and against the simulator's decisions.

The tolerances: 1e-12 where the model is float64 (sums in another order would show at 1e-16), 1e-5 in float32.
"""

from dataclasses import replace

import cases
import numpy as np
import offload_cases as small
import pytest
import torch

from moesim.backend.offload import Offload
from moesim.backend.slots import Inline, Threaded
from moesim.sim.driver import DecisionLog
from moesim.sim.engine import simulate
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.profile import load_profile
from moesim.traces import InputError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


EXACT = ["on-demand", "on-demand-cpu", "lfu", "arc", "prefetch-layer", "prefetch-ridge", "moe-infinity"]
"""Those that wait and learn from ids alone; test_quality.py runs the others on the shipped model."""
SOME = ["on-demand", "on-demand-cpu", "prefetch-layer"]


def difference(model, there):
    with torch.inference_mode():
        wanted, got = (one(**small.batch()).logits for one in (model, there))
    return float((wanted - got).abs().max())


@pytest.mark.parametrize(("name", "asynchronous"), [*((name, True) for name in EXACT), *((n, False) for n in SOME)])
def test_same_output_as_the_library_encoder_and_prefill(name, asynchronous):
    model, there, offloads = small.offloaded(asynchronous=asynchronous, poison=True)
    small.begin(offloads, name)
    assert difference(model, there) <= TOLERANCE[torch.float64]
    small.finish(offloads)
    pairs = offloads["encoder"].tally.pairs
    assert pairs.routed.sum() < 2 * 115, "the batch must exceed the capacity"
    assert sum(pairs.totals().values()) == pairs.totals()["host"]


@pytest.mark.parametrize("resident", [1, 2, cases.EXPERTS])
@pytest.mark.parametrize("name", SOME)
def test_any_number_of_slots_in_float32(name, resident):
    model, there, offloads = small.offloaded(torch.float32, poison=True)
    small.begin(offloads, name, resident)
    assert difference(model, there) <= TOLERANCE[torch.float32]
    small.finish(offloads)
    moved = sum(record.moved_bytes for record in offloads["encoder"].tally.records)
    assert (moved == 0) == (resident == cases.EXPERTS)


def test_everything_resident_is_a_policy_without_copies():
    model, there, offloads = small.offloaded()
    small.begin(offloads, "contiguous", None)
    assert difference(model, there) <= TOLERANCE[torch.float64]
    small.finish(offloads)
    assert sum(record.moved_bytes for record in offloads["decoder"].tally.records) == 0


@pytest.mark.parametrize("name", SOME)
def test_generates_the_same_tokens_step_by_step(name):
    model, there, offloads = small.offloaded(asynchronous=True, poison=True)
    small.begin(offloads, name)
    given = {name: tensor for name, tensor in small.batch().items() if name != "decoder_input_ids"}
    with torch.inference_mode():
        wanted, got = (one.generate(**given, max_new_tokens=12, do_sample=False) for one in (model, there))
    small.finish(offloads)
    assert torch.equal(wanted, got)
    steps = offloads["decoder"].tally.records
    assert len(steps) == wanted.shape[1] - 1
    assert {record.tokens for record in steps} == {3}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["on-demand", "lfu", "prefetch-layer", "contiguous"])
def test_decisions_and_loads_are_the_simulators(name, stack, asynchronous):
    """All of these wait for what they need, so that when a copy comes changes no decision."""
    resident = None if name == "contiguous" else small.RESIDENT
    scenario = small.scenario_of(stack, resident)
    simulated, measured = DecisionLog(), DecisionLog()
    policies = [make_policy(name, scenario.cluster, scenario.fit) for _ in range(2)]
    result = simulate(scenario, policies[0], load_profile("1xRTX4090-PCIe"), sink=simulated)
    there = cases.tiny_model()
    encoder = cases.tiny_model().encoder
    offload = Offload(there, stack, small.CPU, asynchronous=asynchronous)
    offload.start(policies[1], measured)
    for step in scenario.steps():
        run_step(there, encoder, offload, step, stack)
    offload.finish()
    assert measured.text() == simulated.text()
    assert [record.load_LG for record in offload.tally.records] == [step.load_LG for step in result.steps]
    bytes_sim, bytes_real = (sum(r.moved_bytes for r in some) for some in (result.steps, offload.tally.records))
    assert bytes_real == bytes_sim or name == "prefetch-layer"  # prefetches may be under way when the run ends


@torch.inference_mode()
def run_step(model, encoder, offload, step, stack):
    """A step of a scenario, teacher-forced; its decoder reads what the model's own encoder makes of the texts."""
    tokens = step.tokens
    padded = cases.pad(tokens.token_id, tokens.request, tokens.position)
    offload.requests = np.unique(tokens.request)
    offload.expect(queued=step.queued, truth=(step.ids, step.queued_ids))
    given = {"input_ids": padded.ids_BS, "attention_mask": padded.mask_BS}
    if stack == "decoder":
        text = small.tables()["encoder"]
        rows = np.flatnonzero(np.isin(text.request, tokens.request))
        read = cases.pad(text.token_id[rows], text.request[rows], text.position[rows])
        states = encoder(input_ids=read.ids_BS, attention_mask=read.mask_BS).last_hidden_state
        given |= {"encoder_hidden_states": states, "encoder_attention_mask": read.mask_BS}
    getattr(model, stack)(**given)


class Lying(Inline):
    """Says that copies have come before they have."""

    def start(self, copies):
        self.pending += copies


def test_poison_shows_an_expert_that_computes_before_it_has_come(monkeypatch):
    monkeypatch.setattr("moesim.backend.offload_core.Inline", Lying)
    model, there, offloads = small.offloaded(poison=True)
    small.begin(offloads, "on-demand")
    assert np.isnan(difference(model, there))


class Slow(Threaded):
    """Prefetches take long."""

    def _carry(self, batch):
        if not batch[0].transfer.blocking:
            self.gate.wait(0.002)
        super()._carry(batch)

    def __init__(self, host, slots):
        import threading

        self.gate = threading.Event()
        super().__init__(host, slots)


@pytest.mark.parametrize("name", [name for name in EXACT if "prefetch" in name or name == "moe-infinity"])
def test_late_copies_cost_time_and_nothing_else(name, monkeypatch):
    monkeypatch.setattr("moesim.backend.offload_core.Threaded", Slow)
    model, there, offloads = small.offloaded(asynchronous=True, poison=True)
    small.begin(offloads, name)
    assert difference(model, there) <= TOLERANCE[torch.float64]
    small.finish(offloads)


def test_skipped_and_substituted_pairs_are_counted_and_change_the_output():
    for miss in ("skip", "substitute"):
        model, there, offloads = small.offloaded(poison=True)
        small.begin(offloads, replace(POLICIES["on-demand"], miss=miss))
        assert difference(model, there) > 1e-6
        small.finish(offloads)
        totals = offloads["encoder"].tally.pairs.totals()
        other = {"skip": "substituted", "substitute": "skipped"}[miss]
        assert totals["skipped" if miss == "skip" else "substituted"] > 0
        assert totals[other] == 0


def test_a_skipped_pair_adds_nothing_and_a_substituted_one_keeps_the_weight():
    """One layer by hand: three experts are there; every token's output follows from the router and the weights."""
    for miss in ("skip", "substitute"):
        model, there, offloads = small.offloaded(poison=True)
        small.begin(offloads, replace(POLICIES["on-demand"], miss=miss))
        offload, layer = offloads["encoder"], 0
        here = [e for e in range(cases.EXPERTS) if offload.driver.residency.usable_LEG[layer, e, 0]]
        sparse = next(block.layer[-1] for block in model.encoder.block if block.layer[-1].is_sparse)
        mlp = next(block.layer[-1] for block in there.encoder.block if block.layer[-1].is_sparse).mlp
        mlp.router.load_state_dict(sparse.mlp.router.state_dict())
        x_BSD = torch.randn(1, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        with torch.inference_mode():
            _, prob, scores = sparse.mlp.router(x_BSD)
            offload._before(None, None, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
            got = mlp(x_BSD)[0]
            wanted = []
            for i in range(4):
                expert = int(scores[0, i].argmax())
                if expert not in here:
                    expert = max(here, key=lambda e: float(scores[0, i, e])) if miss == "substitute" else None
                one = x_BSD[0, i]
                out = sparse.mlp.experts[f"expert_{expert}"](one) * prob[0, i] if expert is not None else 0 * one
                wanted.append(out)
        assert torch.allclose(got, torch.stack(wanted), atol=1e-12, rtol=0)


def test_what_does_not_fit_is_one_line():
    _, _, offloads = small.offloaded()
    policy = small.fitted("on-demand-cpu", "encoder")
    with pytest.raises(InputError, match="asks when the host is faster"):
        offloads["encoder"].start(policy)
    scenario = small.scenario_of("encoder", None)
    wide = make_policy("contiguous", replace(scenario.cluster, gpus=2), scenario.fit)
    with pytest.raises(InputError, match="fitted for 2 GPUs"):
        offloads["encoder"].start(wide)
