"""Runs inside two ranks: predictive replication against static expert parallelism, to the bit.

A library's matrix product may add in another order when it is given fewer rows, and replicas split an expert's tokens.
So the experts here get at least 16 rows, padded with zeros: a row's sum then does not depend on its neighbours, and
what is left to differ is the policy. `python replication_cases.py FOLDER` under torchrun's environment.
"""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import cases
import torch

from moesim.backend import ranks as groups
from moesim.backend.experts import ExpertSlots
from moesim.backend.launch import end_with_parent, report_error
from moesim.backend.parallel import Executor
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload

ROWS = 16
REPLICATION = replace(POLICIES["predictive-replication"], predictor="token-table")  # nothing to train


class Padded(ExpertSlots):
    def forward(self, x_ND, slot_X, tokens_X):
        rows_X = [max(tokens, ROWS) for tokens in tokens_X]
        parts = zip(torch.split(x_ND, tokens_X), rows_X, strict=True)
        padded = [torch.nn.functional.pad(part, (0, 0, 0, rows - len(part))) for part, rows in parts]
        if not padded:
            return super().forward(x_ND, slot_X, tokens_X)
        out = torch.split(super().forward(torch.cat(padded), slot_X, rows_X), rows_X)
        return torch.cat([part[:tokens] for part, tokens in zip(out, tokens_X, strict=True)])


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    end_with_parent()
    try:
        ranks = groups.join("cpu")
        model = cases.tiny_model()
        recording, _ = cases.recorded(copy.deepcopy(model), False)
        scenario = make_scenario(
            cases.spec_of(model), recording, phase=Phase.ENCODER, gpus=2, workload=Workload(batch=60)
        )
        executor = Executor(ranks, copy.deepcopy(model), scenario)
        c = scenario.cluster
        executor.slots = Padded(
            c.layers * c.layer_slots, executor.patched.shape, executor.patched.activation, ranks.device
        )
        POLICIES["under test"] = REPLICATION
        outputs, transfers = [], []
        for name in ("contiguous", "under test"):
            kept = []
            executor.run(make_policy(name, c, scenario.fit), None, lambda _, hidden, kept=kept: kept.append(hidden))
            outputs.append(torch.cat(kept))
            transfers.append(executor.scores()["transfers"])
        same = torch.equal(*outputs)
        found = {"same": same, "tokens": len(outputs[0]), "transfers": transfers}
        (folder / f"replication-{rank}.json").write_text(json.dumps(found))
        groups.leave()
    except BaseException as error:
        report_error(folder, rank, error)
        os._exit(1)


if __name__ == "__main__":
    main()
