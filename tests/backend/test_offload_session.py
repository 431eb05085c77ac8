"""Scenarios on the offload executor's own walks, against the Hugging Face forward of the same model and the simulator.

Float32: hidden states of size 1 agree within 2e-5, as sums and norms run in another order.
"""

import copy
from dataclasses import replace

import cases
import numpy as np
import offload_cases as small
import pytest
import torch

from moesim.backend.offload_session import OffloadRun, results_of, run_interleaved
from moesim.backend.routing import SwitchRouting
from moesim.backend.switch import sparse_layers
from moesim.sim.driver import DecisionLog
from moesim.sim.engine import simulate
from moesim.sim.policies import make_policy
from moesim.sim.profile import load_profile
from moesim.sim.scenario import make_scenario
from moesim.traces import InputError, Phase, Workload

TOLERANCE = 2e-5
POLICIES = ["on-demand", "lfu", "on-demand-cpu", "prefetch-layer", "prefetch-ridge", "oracle-prefetch"]
PROMPT = 2


def roomy():
    """The tiny model without a limit of capacity: a decode step never meets it, a whole pass would."""
    model = cases.tiny_model().float()
    for stack in (model.encoder, model.decoder):
        for layer in sparse_layers(stack).values():
            layer.mlp.router.expert_capacity = 1000
    return model


def decode_tables():
    table = small.tables()["decoder"]
    phase = np.where(table.position < PROMPT, Phase.PREFILL, Phase.DECODE).astype(np.uint8)
    return replace(table, phase=phase, dropped=np.zeros_like(table.dropped))


def scenario_of(phase, batch, resident=small.RESIDENT, max_steps=None):
    table = decode_tables() if phase is Phase.DECODE else small.tables()["encoder"]
    workload = Workload(batch=batch)
    spec = cases.spec_of(cases.tiny_model())
    return make_scenario(
        spec, table, phase=phase, gpus=1, workload=workload, extra_slots=0, resident=resident, max_steps=max_steps
    )


def run_of(model, scenario, **options):
    table = decode_tables()
    prompts = table.take(table.phase == Phase.PREFILL)
    options = {"replay": False, "encoder_table": small.tables()["encoder"], "prompts": prompts, **options}
    return OffloadRun(copy.deepcopy(model), scenario, small.CPU, **options)


def hidden_of(run, scenario, name, resident=small.RESIDENT):
    found = {}
    cluster = replace(scenario.cluster, resident=resident)
    record = run.run(
        make_policy(name, cluster, scenario.fit),
        DecisionLog(),
        keep=lambda number, hidden: found.update({number: hidden}),
    )
    return found, record


def wanted_of(model, scenario):
    """Request and position to the last hidden state, from one pass of the library over each whole request."""
    tables = small.tables()
    stack, found = scenario.stack, {}
    with torch.inference_mode():
        for request in np.unique(scenario.run.request).tolist():
            ids = {}
            for name in ("encoder", "decoder"):
                rows = np.flatnonzero(tables[name].request == request)
                ids[name] = torch.from_numpy(tables[name].token_id[rows].astype(np.int64))[None]
            states = model.encoder(input_ids=ids["encoder"]).last_hidden_state
            if stack == "decoder":
                states = model.decoder(input_ids=ids["decoder"], encoder_hidden_states=states).last_hidden_state
            for position, state in enumerate(states[0]):
                found[request, position] = state
    return found


@pytest.mark.parametrize("phase", [Phase.ENCODER, Phase.DECODE])
def test_every_policy_computes_what_the_library_computes(phase):
    model = roomy()
    scenario = scenario_of(phase, batch=14 if phase is Phase.ENCODER else 3, max_steps=12)
    wanted = wanted_of(model, scenario)
    run = run_of(model, scenario, poison=True)
    for name in [*POLICIES, "contiguous"]:
        found, told = hidden_of(run, scenario, name, None if name == "contiguous" else small.RESIDENT)
        assert len(found) == len(told.records) == len(scenario.batches)
        for number, batch in enumerate(scenario.batches):
            keys = zip(batch.tokens.request.tolist(), batch.tokens.position.tolist(), strict=True)
            expected = torch.stack([wanted[key] for key in keys])
            assert float((found[number] - expected).abs().max()) <= TOLERANCE, (name, number)
        moved = sum(record.moved_bytes for record in told.records)
        assert (moved == 0) == (name == "contiguous")
        assert all(sum(r.phase_s.values()) == pytest.approx(r.duration_s) for r in told.records)


def test_capacity_counts_within_each_sequence_as_the_library_counts_it():
    model = cases.tiny_model().float()
    scenario = scenario_of(Phase.ENCODER, batch=60)
    wanted = wanted_of(model, scenario)
    found, told = hidden_of(run_of(model, scenario), scenario, "on-demand")
    routed = sum(sum(row[0] for row in record.load_LG) for record in told.records)
    assert routed < sum(len(batch.tokens) for batch in scenario.batches) * 2, "some tokens must be over capacity"
    for number, batch in enumerate(scenario.batches):
        keys = zip(batch.tokens.request.tolist(), batch.tokens.position.tolist(), strict=True)
        assert float((found[number] - torch.stack([wanted[key] for key in keys])).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("phase", [Phase.ENCODER, Phase.DECODE])
@pytest.mark.parametrize("name", ["on-demand", "lfu", "belady", "prefetch-layer"])
def test_decisions_and_bytes_are_the_simulators(phase, name):
    scenario = scenario_of(phase, batch=20 if phase is Phase.ENCODER else 4)
    simulated, run = DecisionLog(), run_of(cases.tiny_model().float(), scenario, replay=True, asynchronous=False)
    result = simulate(
        scenario, make_policy(name, scenario.cluster, scenario.fit), load_profile("1xRTX4090-PCIe"), sink=simulated
    )
    measured = DecisionLog()
    told = run.run(make_policy(name, scenario.cluster, scenario.fit), measured)
    assert measured.text() == simulated.text()
    assert [record.load_LG for record in told.records] == [step.load_LG for step in result.steps]
    bytes_sim, bytes_real = (sum(r.moved_bytes for r in some) for some in (result.steps, told.records))
    assert bytes_real == bytes_sim or name == "prefetch-layer"  # prefetches may be under way when the run ends
    assert 0 < told.scores["hit_rate"] < 1


def test_an_oracle_moves_no_more_than_lru_and_hits_more():
    scenario = scenario_of(Phase.DECODE, batch=4)
    run = run_of(cases.tiny_model().float(), scenario, replay=True)
    policies = [
        make_policy(name, scenario.cluster, scenario.fit) for name in ("on-demand", "belady", "oracle-prefetch")
    ]
    passes = run_interleaved(run, policies, repeats=2, warmup=0, spans=True)
    results = {result.policy: result for result in results_of(passes, policies, run, {"model": "tiny"})}
    bytes_of = {name: result.totals.moved_bytes for name, result in results.items()}
    assert bytes_of["belady"] < bytes_of["on-demand"]
    assert results["oracle-prefetch"].scores["hit_rate"] > results["on-demand"].scores["hit_rate"]
    config = results["belady"].config
    assert (config["routing"], config["executor"], config["resident"]) == ("replay", "offload", small.RESIDENT)
    assert len(config["repeat_total_s"]) == 2 and passes["belady"][0].spans


def test_fewer_bits_move_fewer_bytes_and_are_counted():
    scenario = scenario_of(Phase.DECODE, batch=4)
    policy = make_policy("on-demand", scenario.cluster, scenario.fit)
    told = {}
    for dtype in (None, "int8"):
        run = run_of(cases.tiny_model().float(), scenario, replay=True, copy_dtype=dtype, poison=True)
        told[dtype] = run.run(policy).records
    full, packed = (sum(r.moved_bytes for r in told[dtype]) for dtype in (None, "int8"))
    assert packed / full == pytest.approx((1 + 2 / 128) / 4)
    assert sum(r.rounded_tokens for r in told["int8"]) > 0 == sum(r.rounded_tokens for r in told[None])


def test_what_a_gpu_does_differently_changes_nothing(monkeypatch):
    """torch's grouped product knows a group by its number, not its slot; the fused router says ids in a byte."""
    model, scenario = roomy(), scenario_of(Phase.DECODE, batch=3, max_steps=12)
    policies = [("on-demand", cases.EXPERTS - 1), ("on-demand", 1)]
    wanted = [hidden_of(run_of(model, scenario), scenario, *policy)[0] for policy in policies]
    said = SwitchRouting.__call__

    def narrow(self, x_BSD):
        ids_BS, prob_BS = said(self, x_BSD)
        return ids_BS.to(torch.uint8), prob_BS

    monkeypatch.setattr(SwitchRouting, "__call__", narrow)
    run = run_of(model, scenario, kernel="grouped_mm")
    for policy, states in zip(policies, wanted, strict=True):
        for number, hidden in hidden_of(run, scenario, *policy)[0].items():
            assert float((hidden - states[number]).abs().max()) <= TOLERANCE, (policy, number)


def test_what_cannot_be_run_is_one_line():
    scenario = scenario_of(Phase.DECODE, batch=4)
    with pytest.raises(InputError, match="record both stacks"):
        OffloadRun(cases.tiny_model(), scenario, small.CPU, replay=False)
    prefill = replace(scenario, phase=Phase.PREFILL)
    with pytest.raises(InputError, match="phases encoder and decode"):
        OffloadRun(cases.tiny_model(), prefill, small.CPU, replay=True)
    run = run_of(cases.tiny_model().float(), scenario, replay=True)
    with pytest.raises(InputError, match="moesim quality"):
        run.run(make_policy("predictive-replication-executed", replace(scenario.cluster, resident=None), scenario.fit))


@pytest.mark.parametrize("phase", [Phase.ENCODER, Phase.DECODE])
@pytest.mark.parametrize("replay", [True, False])
def test_a_pass_never_asks_the_device(phase, replay, monkeypatch):
    """Whatever waits for a GPU cannot become a CUDA graph."""
    run = run_of(
        cases.tiny_model().float(), scenario_of(phase, batch=60 if phase is Phase.ENCODER else 4), replay=replay
    )
    walks = {id(one.walk): one.walk for one in run._steps}.values()
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"asks the device: {name}"))
    for walk in walks:
        cuts = []

        def cut(number, known, cuts=cuts):
            cuts.append(number)
            return torch.zeros_like(known.routed.x_ND)

        with torch.inference_mode():
            walk._run(cut)
        assert cuts == list(range(cases.LAYERS // 2))
