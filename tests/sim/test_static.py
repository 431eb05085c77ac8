"""The fast way for policies that move nothing gives, to the bit, what deciding layer by layer gives."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import MS, node, quick_policy

from helpers import make_spec, make_table, with_router_inputs
from moesim.sim.engine import simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.profile import Link
from moesim.sim.scenario import make_scenario
from moesim.sim.static import is_static
from moesim.traces import Phase, StackSpec, Workload

NETWORK = Link(latency_s=2 * MS, bytes_per_s=32e3)
STATIC = ("contiguous", "balanced")
MOVE_NOTHING = (*STATIC, "exflow", "moetuner")


def scenario(gpus, experts, top_k, phase, batch, seed):
    stack = "encoder" if phase is Phase.ENCODER else "decoder"
    table, gates = with_router_inputs(make_table(24, 8, 3, experts, top_k, seed, phase), experts)
    spec = make_spec(experts=experts, top_k=top_k, stacks=(StackSpec(name=stack, num_layers=4, moe_layers=(0, 1, 3)),))
    return make_scenario(spec, table, phase=phase, gpus=gpus, workload=Workload(batch=batch), gates=gates)


@given(
    gpus=st.sampled_from([1, 2, 4, 6]),
    node_size=st.sampled_from([None, 1, 2]),
    experts=st.sampled_from([6, 8, 11]),
    top_k=st.integers(1, 3),
    phase=st.sampled_from(list(Phase)),
    batch=st.integers(1, 60),
    policy=st.sampled_from(STATIC),
    contention=st.sampled_from(["none", "share"]),
    decide_s=st.sampled_from([0.0, 1e-3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_both_ways_agree_to_the_bit(gpus, node_size, experts, top_k, phase, batch, policy, contention, decide_s, seed):
    scene = scenario(gpus, experts, top_k, phase, batch, seed)
    profile = node(gpus=6, network=NETWORK, gpus_per_node=node_size, decide_s={policy: decide_s})
    made = make_policy(policy, scene.cluster, scene.fit)
    logs = [[], []]
    fast = simulate(scene, made, profile, execution=Execution(contention=contention), events=logs[0].append)
    slow = simulate(
        scene, made, profile, execution=Execution(contention=contention), events=logs[1].append, sink=[].append
    )
    assert asdict(fast) == asdict(slow)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", POLICIES)
def test_only_policies_that_move_nothing_take_it(name):
    scene = scenario(2, 8, 1, Phase.ENCODER, 32, 0)
    policy = quick_policy(name, scene)
    assert is_static(scene, policy, node(), "float32", policy.start().usable_LEG) == (name in MOVE_NOTHING)
    twice = np.ones_like(policy.start().usable_LEG)
    assert not is_static(scene, policy, node(), "float32", twice)
