"""Runs inside ranks: every policy against the Hugging Face forward of the same batches, on the device of the ranks.

Started by end_to_end.py through torch.distributed.run: equality.py MODEL TRACE DEVICE OUT.json
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch

from moesim.backend import ranks as groups
from moesim.backend.parallel import Executor
from moesim.backend.shares import pad
from moesim.backend.switch import load_model
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload
from moesim.traces.store import Trace

STEPS = 4


def main() -> None:
    folder, recording, device, out = sys.argv[1:]
    ranks = groups.join(device)
    model, trace = load_model(Path(folder), "float32"), Trace.open(recording)
    scenario = make_scenario(
        trace.spec,
        trace.table("encoder"),
        phase=Phase.ENCODER,
        gpus=ranks.size,
        workload=Workload(batch=2048),
        max_steps=STEPS,
    )
    plain = copy.deepcopy(model.encoder).to(ranks.device)
    steps = list(scenario.steps())
    wanted = []
    with torch.inference_mode():
        for step in steps:
            batch = pad(step.tokens.token_id, step.tokens.request, step.tokens.position).to(ranks.device)
            states = plain(input_ids=batch.ids_BS, attention_mask=batch.mask_BS).last_hidden_state
            wanted.append(states.reshape(-1, states.shape[-1])[batch.real()])
    executor = Executor(ranks, model, scenario)
    largest = {}
    for name, recipe in POLICIES.items():
        if recipe.simulated_only:
            continue
        worst = [0.0]

        def keep(number: int, hidden: torch.Tensor, worst: list[float] = worst) -> None:
            mine = np.flatnonzero(steps[number].rank == ranks.rank)
            if len(mine):
                worst.append(float((hidden - wanted[number][mine]).abs().max()))

        executor.run(make_policy(name, scenario.cluster, scenario.fit), keep=keep)
        largest[name] = float(ranks.all_gather(torch.tensor([max(worst)])).max())
    if ranks.rank == 0:
        about = {"steps": STEPS, "ranks": ranks.size, "dtype": "float32", "largest_difference": largest}
        Path(out).write_text(json.dumps(about), encoding="utf-8")
    groups.leave()


if __name__ == "__main__":
    main()
