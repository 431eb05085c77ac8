"""How fast the simulator is, as a ratio to a bare SimPy loop that yields as many events, in the same run; JSON lines.

    python benchmarks/engine_speed.py

Aims: 12 layers x 128 experts on 8 GPUs at least 0.35; 58 x 256 x top-8 on 32 GPUs at least 0.25; a step on 320 GPUs at
most 1.3 times one on 32. Static policy (contiguous), made-up routing; setting up the cluster is counted.
"""

import json
import statistics
import time
from dataclasses import replace

import simpy

from moesim.sim.engine import simulate
from moesim.sim.policies import make_policy
from moesim.sim.profile import load_profile
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload, concat
from moesim.traces.synthetic import Knobs, Shape, generate, synthetic_spec

TURNS = 9
CASES = (
    ("small", {"layers": 12, "experts": 128, "top_k": 1}, "8xH100-NVLink", 8, 512),
    ("large", {"layers": 58, "experts": 256, "top_k": 8}, "32xH100-IB", 32, 256),
    ("320 GPUs", {"layers": 58, "experts": 320, "top_k": 8}, "32xH100-IB", 320, 256),
    ("32 GPUs, same model", {"layers": 58, "experts": 320, "top_k": 8}, "32xH100-IB", 32, 256),
)
STEPS = 200


def bare(events):
    """Seconds of a SimPy process that yields that many timeouts."""
    env = simpy.Environment()

    def process():
        for _ in range(events):
            yield env.timeout(1.0)

    env.process(process())
    begin = time.perf_counter()
    env.run()
    return time.perf_counter() - begin


def prepared(sizes, profile, gpus, batch):
    shape = Shape(**sizes, requests=2 * STEPS * batch // 32, request_tokens=32, window_tokens=4096)
    table = concat(list(generate(shape, Knobs(sigma_L=(0.5,) * shape.layers), 0)))
    spec = synthetic_spec(shape).with_widths("deepseek-v3")
    workload = Workload(batch=batch, split="alternate")
    scene = make_scenario(
        spec, table, phase=Phase.PREFILL, gpus=gpus, workload=workload, max_steps=STEPS, extra_slots=0
    )
    policy, node = make_policy("contiguous", scene.cluster, scene.fit), load_profile(profile)
    node = replace(node, gpus=max(node.gpus, gpus))
    simulate(scene, policy, node, keep_steps=False)  # compiles
    return scene, policy, node


def turn(scene, policy, node):
    """(steps a second, ratio to the bare loop)."""
    begin = time.perf_counter()
    simulate(scene, policy, node, keep_steps=False)
    took = time.perf_counter() - begin
    return len(scene.batches) / took, bare(len(scene.batches) * scene.cluster.layers * 4) / took


def main():
    scenes = {name: prepared(*rest) for name, *rest in CASES}
    turns = [{name: turn(*scene) for name, scene in scenes.items()} for _ in range(TURNS)]
    for name, sizes, _, gpus, batch in CASES:
        ratios = [one[name][1] for one in turns]
        found = {
            "case": name,
            "gpus": gpus,
            **sizes,
            "tokens_a_step": batch,
            "steps": len(scenes[name][0].batches),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "steps_per_s": statistics.median(one[name][0] for one in turns),
        }
        print(json.dumps(found), flush=True)
    growth = [one["32 GPUs, same model"][0] / one["320 GPUs"][0] for one in turns]
    found = {"ratio": statistics.median(growth), "ratio_range": [min(growth), max(growth)]}
    print(json.dumps({"case": "a step on 320 GPUs over one on 32", **found}))


if __name__ == "__main__":
    main()
