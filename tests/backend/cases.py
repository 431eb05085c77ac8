"""Runs inside ranks: many small cases in one process group, each compared with the Hugging Face forward of its batches.

`python cases.py FOLDER` under torchrun's environment; every rank leaves FOLDER/cases-RANK.json.
"""

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import SwitchTransformersForConditionalGeneration

from moesim.backend import ranks as groups
from moesim.backend.launch import end_with_parent, report_error
from moesim.backend.parallel import Executor
from moesim.backend.shares import pad
from moesim.backend.switch import load_model, sparse_layers
from moesim.sim.driver import DecisionLog
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, TokenTable, Workload
from moesim.traces.routers import adapter_of

sys.path.insert(0, str(Path(__file__).parents[1]))  # a process of its own knows no conftest.py
from switch_models import SHIPPED, tiny_config

EXPERTS, CAPACITY, LAYERS, BATCH_TOKENS = 8, 5, 4, 14
ENCODER_LENGTHS = [7, 9, 5, 24, 16, 3, 11, 40, 6, 8, 2, 19, 30, 12, 4, 33, 21, 1, 14, 10, 26, 17, 13, 29, 9, 15]
DECODER_LENGTHS = [5, 8, 12, 3, 18, 30, 9, 2, 6, 11, 25, 7, 1, 16, 4, 10, 20, 8, 13, 22, 3, 14, 27, 6, 12, 19]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = tiny_config(LAYERS, LAYERS // 2, EXPERTS, CAPACITY)
    return SwitchTransformersForConditionalGeneration(config).eval()


def spec_of(model):
    adapter, routers = adapter_of(model)
    return adapter.spec(model, routers)


def shipped_model():
    return load_model(SHIPPED, "float32")


def tokens(lengths, seed):
    rng = np.random.default_rng(seed)
    return (
        (rng.zipf(1.4, sum(lengths)) % 96).astype(np.int32),
        np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
    )


class Reference:
    """The unpatched model; notes every router's choice while it runs."""

    def __init__(self, model, decoder):
        self.model, self.decoder = model, decoder
        self.seen = []
        for layer in sparse_layers(model.decoder if decoder else model.encoder).values():
            layer.mlp.router.register_forward_hook(self._note)
        model.decoder.register_forward_hook(self._keep)

    def _note(self, module, args, output):
        mask, _, logits = output
        self.seen.append((logits.argmax(-1), mask.sum(-1) == 0))

    def _keep(self, module, args, output):
        self.decoded = output.last_hidden_state

    @torch.inference_mode()
    def __call__(self, batch, decoder_batch=None):
        """(last hidden states [N, D] at real positions, ids [N, L], dropped [N, L]), the decoder's if it has a batch.

        The states are what a rank computes; the output head that follows is the model's own, and its sums over numbers
        of size 10 would add rounding of their own.
        """
        self.seen.clear()
        if decoder_batch is None:
            real, out = batch.real(), self.model.encoder(batch.ids_BS, attention_mask=batch.mask_BS).last_hidden_state
        else:
            real = decoder_batch.real()
            self.model(
                input_ids=batch.ids_BS,
                attention_mask=batch.mask_BS,
                decoder_input_ids=decoder_batch.ids_BS,
                decoder_attention_mask=decoder_batch.mask_BS,
            )
            out = self.decoded
        picked = [torch.stack([each[i].reshape(-1)[real] for each in self.seen], 1).numpy() for i in (0, 1)]
        return out.reshape(-1, out.shape[-1])[real], *picked


def recorded(model, decoder):
    """(table of the stack, encoder table): what a recorder would have written, one forward pass a request."""
    reference = Reference(model, decoder)
    enc, dec = tokens(ENCODER_LENGTHS, 1), tokens(DECODER_LENGTHS, 2)
    ids, dropped = [], []
    for request in range(len(ENCODER_LENGTHS)):
        batches = [pad(*(column[t[1] == request] for column in t)) for t in ((enc, dec) if decoder else (enc,))]
        _, i, d = reference(*batches)
        ids.append(i), dropped.append(d)
    if not decoder:
        return table(enc, np.concatenate(ids), np.concatenate(dropped), Phase.ENCODER), None
    none = np.zeros((len(enc[0]), ids[0].shape[1]), np.int64)
    encoder_table = table(enc, none, none > 0, Phase.ENCODER)
    return table(dec, np.concatenate(ids), np.concatenate(dropped), Phase.PREFILL), encoder_table


def table(columns, ids_TL, dropped_TL, phase):
    token, request, position = columns
    T, L = ids_TL.shape
    return TokenTable(
        topk_ids=ids_TL[:, :, None].astype(np.uint8),
        topk_weights=np.ones((T, L, 1), np.float16),
        dropped=dropped_TL,
        token_id=token,
        request=request,
        position=position,
        step=np.zeros(T, np.int32),
        phase=np.full(T, phase, np.uint8),
    )


def expected(model, scenario, encoder_table=None, *, together=False):
    """Output, ids and dropped of the unpatched model for every step, in the scenario's token order.

    Each rank's requests are one batch: attention then adds in the same order, and what differs is the experts' doing.
    `together`: so are all requests of a step, as partitions of one device have them.
    """
    reference = Reference(copy.deepcopy(model), encoder_table is not None)
    steps = list(scenario.steps())
    if together:
        steps = [replace(step, rank=np.zeros_like(step.rank)) for step in steps]
    return [expected_of(reference, step, encoder_table) for step in steps]


def expected_of(reference, step, encoder_table):
    parts, order = [], []
    for rank in np.unique(step.rank):
        mine = np.flatnonzero(step.rank == rank)
        token, request, position = (getattr(step.tokens, name)[mine] for name in ("token_id", "request", "position"))
        batches = [pad(token, request, position)]
        if encoder_table is not None:
            e = encoder_table
            rows = np.concatenate([np.flatnonzero(e.request == r) for r in np.unique(request)])
            batches.insert(0, pad(e.token_id[rows], e.request[rows], e.position[rows]))
        parts.append(reference(*batches))
        order.append(mine)
    back = np.argsort(np.concatenate(order))
    outputs, ids, dropped = zip(*parts, strict=True)
    return torch.cat(outputs)[back], np.concatenate(ids)[back], np.concatenate(dropped)[back]


def run_case(ranks, phase, model, policies):
    decoder = phase is Phase.PREFILL
    recording, encoder_table = recorded(copy.deepcopy(model), decoder)
    scenario = make_scenario(
        spec_of(model), recording, phase=phase, gpus=ranks.size, workload=Workload(batch=BATCH_TOKENS)
    )
    wanted = expected(model, scenario, encoder_table)
    executor = Executor(ranks, copy.deepcopy(model), scenario, encoder_table)
    found = {}
    for name in policies:
        differences = []

        def keep(number, hidden, differences=differences):
            mine = np.flatnonzero(list(scenario.steps())[number].rank == ranks.rank)
            if len(mine):
                differences.append(float((hidden - wanted[number][0][mine]).abs().max()))

        log = DecisionLog()
        policy = make_policy(name, scenario.cluster, scenario.fit)
        records = executor.run(policy, log, keep)
        found[name] = {
            "difference": max(differences, default=0.0),
            "shares": len(differences),
            "steps": len(records),
            "computed": [np.sum(record.load_LG, axis=1).tolist() for record in records],
            "routed": [(~dropped).sum(axis=0).tolist() for _, _, dropped in wanted],
            "dropped": int(sum(dropped.sum() for _, _, dropped in wanted)),
            "phases_add_up": all(sum(r.phase_s.values()) >= 0.999 * r.duration_s for r in records),
            "moved": sum(record.moved_bytes for record in records),
            "transfers": executor.scores()["transfers"],
            "log": log.text(),
            "wrong_weights": wrong_weights(executor, ranks.rank),
        }
    return found


def run_replay(ranks):
    """What was recorded of one model, without words, forced on the layers of another."""
    recording, _ = recorded(tiny_model(), False)
    model = tiny_model(seed=5)
    scenario = make_scenario(
        spec_of(model),
        replace(recording, token_id=None),
        phase=Phase.ENCODER,
        gpus=ranks.size,
        workload=Workload(batch=BATCH_TOKENS),
    )
    executor = Executor(ranks, model, scenario, routing="replay")
    records = executor.run(make_policy("eplb", scenario.cluster, scenario.fit))
    return {
        "computed": [np.sum(record.load_LG, axis=1).tolist() for record in records],
        "recorded": [(~step.dropped).sum(axis=0).tolist() for step in scenario.steps()],
    }


def wrong_weights(executor, rank):
    """(layer, expert) whose slot on this rank differs in any bit from the model's weights."""
    residency = executor.residency
    wrong = []
    for layer, expert in np.argwhere(residency.usable_LEG[:, :, rank]).tolist():
        row = executor.slots.rows_SP[residency.slot(layer, expert, rank)]
        if not torch.equal(row, executor.patched.weights_LE[layer][expert]):
            wrong.append([layer, expert])
    return wrong


def main():
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    end_with_parent()
    try:
        whole = groups.join("cpu")
        model, shipped = tiny_model(), shipped_model()
        found = {}
        policies = [name for name, parts in POLICIES.items() if not parts.simulated_only]
        for size in range(1, whole.size + 1):
            ranks = groups.group_of(list(range(size)), rank, whole.device)
            if ranks.rank >= 0:
                for phase in (Phase.ENCODER, Phase.PREFILL):
                    some = policies if size > 1 else ["contiguous"]
                    found[f"{phase.name.lower()}-{size}"] = run_case(ranks, phase, model, some)
                    if size == 2:
                        found[f"shipped-{phase.name.lower()}"] = run_case(ranks, phase, shipped, some)
                found[f"replay-{size}"] = run_replay(ranks)
            dist.barrier()
        (folder / f"cases-{rank}.json").write_text(json.dumps(found))
        groups.leave()
    except BaseException as error:
        import traceback

        traceback.print_exc()
        report_error(folder, rank, error)
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
