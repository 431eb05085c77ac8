"""Plans: what a policy has resident, in the files of three servers; and checks that find every way of being wrong."""

import json

import numpy as np
import pytest
import yaml

from helpers import make_spec, make_table
from moesim.sim.plan_checks import Server, check_deepseek, check_sglang, check_tensorrt, check_vllm
from moesim.sim.plans import PLAN_FORMATS, Plan, make_plan, plan_text
from moesim.sim.policies import POLICIES, is_trained
from moesim.sim.scenario import unsplit_scenario
from moesim.traces import InputError, LoadTable, Phase, StackSpec, Workload, load_LE

STACK = StackSpec(name="decoder", num_layers=5, moe_layers=(1, 2, 4))
PLANNED = [
    name
    for name, parts in POLICIES.items()
    if parts.miss is None and not (parts.clairvoyant or parts.double_buffered or is_trained(name))
    if "gate" not in (parts.predictor or "")
]
SERVER = Server(experts=8, gpus=4, num_layers=5, moe_layers=(1, 2, 4))


def scenario(table=None, gpus=4, extra_slots=1, experts=8):
    table = make_table(requests=24, phase=Phase.PREFILL) if table is None else table
    spec = make_spec(experts=experts, stacks=(STACK,))
    return unsplit_scenario(
        spec, table, phase=Phase.PREFILL, gpus=gpus, workload=Workload(batch=96), extra_slots=extra_slots
    )


@pytest.mark.parametrize("name", PLAN_FORMATS)
@pytest.mark.parametrize("policy", PLANNED)
def test_every_policy_gives_a_plan_that_every_server_accepts(policy, name):
    plan = make_plan(policy, scenario())
    PLAN_FORMATS[name].check(plan_text(plan, name), SERVER)
    assert (plan.slots, plan.redundant) == (12, 4)


@pytest.mark.parametrize(("gpus", "extra_slots", "slots"), [(1, 0, 8), (3, 0, 9), (3, 2, 15), (8, 3, 32), (2, 4, 16)])
@pytest.mark.parametrize("name", PLAN_FORMATS)
def test_slots_that_a_policy_leaves_empty_are_filled(gpus, extra_slots, slots, name):
    plan = make_plan("contiguous", scenario(gpus=gpus, extra_slots=extra_slots))
    server = Server(experts=8, gpus=gpus, num_layers=5, moe_layers=(1, 2, 4))
    PLAN_FORMATS[name].check(plan_text(plan, name), server)
    assert plan.slots == slots


def test_the_first_free_slot_gets_the_hottest_expert():
    table = make_table(requests=24, phase=Phase.PREFILL)
    plan = make_plan("contiguous", scenario(table))
    load_LE_ = load_LE(table.topk_ids, 8, table.dropped)
    slots_LGS = plan.physical_LP.reshape(3, 4, 3)
    assert (slots_LGS[:, :, :2] == np.arange(8).reshape(4, 2)).all()
    for layer in range(3):
        elsewhere = [e for e in np.argsort(-load_LE_[layer]) if e not in slots_LGS[layer, 0, :2]]
        assert slots_LGS[layer, 0, 2] == elsewhere[0]


def test_a_plan_spreads_what_is_hot():
    """Even split over replicas: the busiest GPU of the plan has less than that of the contiguous placement."""
    loads = load_LE(make_table(requests=24, phase=Phase.PREFILL).topk_ids, 8)

    def busiest(policy):
        slots_LGS = make_plan(policy, scenario()).physical_LP.reshape(3, 4, 3)
        worst = 0.0
        for layer, load_E in enumerate(loads):
            share_E = load_E / np.bincount(slots_LGS[layer].ravel(), minlength=8)
            worst += share_E[slots_LGS[layer]].sum(axis=1).max()
        return worst

    assert busiest("eplb") < busiest("balanced") < busiest("contiguous")


def test_a_single_row_of_loads_is_enough():
    """What DeepSeek's EPLB takes: one tensor of loads [L, E]."""
    load = np.array([[80, 10, 10, 10, 10, 10, 5, 5]] * 3, np.int64)[None]
    rows = LoadTable(load=load, step=np.zeros(1, np.int32), phase=np.full(1, Phase.PREFILL, np.uint8))
    plan = make_plan("eplb", scenario(rows))
    assert (np.bincount(plan.physical_LP[0], minlength=8)[0]) == 4  # as many copies as GPUs
    with pytest.raises(InputError, match="predictor 'markov' learns from what every token chose"):
        make_plan("predictive-layer", scenario(rows))


def test_what_cannot_be_planned():
    for name in ("oracle", "oracle-batch"):
        with pytest.raises(InputError, match="is shown the future"):
            make_plan(name, scenario())
    with pytest.raises(InputError, match="9 slots a GPU and layer for 8 experts"):
        make_plan("balanced", scenario(gpus=1, extra_slots=1))


def good():
    """Two GPUs, four slots each, in three MoE layers: experts 0 and 5 have two copies."""
    row = [0, 1, 2, 3, 0, 4, 5, 6]
    return Plan(
        physical_LP=np.array([[*row[:4], 5, *row[4:], 7]] * 3), experts=8, gpus=2, moe_layers=(1, 2, 4), num_layers=5
    )


TWO = Server(experts=8, gpus=2, num_layers=5, moe_layers=(1, 2, 4))


def test_what_the_files_look_like():
    plan = good()
    row = [0, 1, 2, 3, 5, 0, 4, 5, 6, 7]
    sglang = json.loads(plan_text(plan, "sglang-plan"))
    assert sglang == {"physical_to_logical_map": [[*range(8), 0, 1], row, row, [*range(8), 0, 1], row]}
    assert json.loads(plan_text(plan, "vllm-plan")) == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 2,
        "num_slots": 10,
        "initial_global_assignments": {"0": row, "1": row, "2": row},
    }
    text = plan_text(plan, "tensorrt-plan")
    assert text.startswith("# ep_size: 2\n") and "1: [0, 1, 2, 3, 5, 0, 4, 5, 6, 7]" in text
    assert yaml.safe_load(text)["initial_global_assignments"] == {1: row, 2: row, 4: row}
    deepseek = json.loads(plan_text(plan, "deepseek-plan"))
    assert deepseek["phy2log"][0] == row
    assert deepseek["log2phy"][0][:2] == [[0, 5], [1, -1]]
    assert deepseek["logcnt"][0] == [2, 1, 1, 1, 1, 2, 1, 1]


CHECKS = {
    "sglang-plan": (check_sglang, json, "physical_to_logical_map", 1),
    "vllm-plan": (check_vllm, json, "initial_global_assignments", "0"),
    "tensorrt-plan": (check_tensorrt, yaml, "initial_global_assignments", 1),
    "deepseek-plan": (check_deepseek, json, "phy2log", 0),
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 1, 2, 3, 5, 0, 4, 5, 6, 6], "logical expert 7 is in no slot"),
        ([0, 1, 2, 3, 0, 5, 4, 5, 6, 7], "rank 0 holds an expert twice|rank 1 holds an expert twice"),
        ([0, 1, 2, 3, 5, 0, 4, 5, 6, 8], r"not a logical expert 0..7"),
        ([0, 1, 2, 3, 5, 0, 4, 5, 6, -1], r"not a logical expert 0..7"),
        ([0, 1, 2, 3, 5, 0, 4, 5, 6], "slots, a multiple of 2 ranks"),
        ("row", "slots, a multiple of 2 ranks"),
    ],
)
@pytest.mark.parametrize("name", CHECKS)
def test_a_broken_row_is_found(name, row, message):
    check, parser, field, layer = CHECKS[name]
    data = (json.loads if parser is json else yaml.safe_load)(plan_text(good(), name))
    data[field][layer] = row
    with pytest.raises(InputError, match=message):
        check(json.dumps(data) if parser is json else yaml.safe_dump(data), TWO)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sglang-plan", {"physical_to_logical_map": []}, "must have 5 rows"),
        ("vllm-plan", {"version": 2}, "not an eplb_initial_mapping of version 1"),
        ("vllm-plan", {"num_redundant_experts": 1}, "is not 8 experts plus num_redundant_experts"),
        ("vllm-plan", {"initial_global_assignments": {}}, "must have the layers"),
        ("tensorrt-plan", {"ep_size": 2}, "field 'ep_size' is not one of the load balancer's"),
        ("tensorrt-plan", {"num_slots": 9}, "must be at least 8 and divide among 2 ranks"),
        ("deepseek-plan", {"logcnt": []}, "must have 3 layers"),
        ("deepseek-plan", {"logcnt": [[1] * 8] * 3}, "does not agree with phy2log"),
    ],
)
def test_a_broken_file_is_found(name, change, message):
    check, parser, *_ = CHECKS[name]
    data = {**(json.loads if parser is json else yaml.safe_load)(plan_text(good(), name)), **change}
    with pytest.raises(InputError, match=message):
        check(json.dumps(data) if parser is json else yaml.safe_dump(data), TWO)
