"""What the executors cost in quality on the trained model that the repository ships: nothing where they are exact.

Loss of the next token on held-out requests against the library's model in the same dtype (bfloat16, float32), tokens of
`generate` in float32, and the measured loss of what is not exact: mixed precision, copies of fewer bits, predicted
routing. Entries: `exact/EXECUTOR/DTYPE`, `tokens/EXECUTOR`, `lossy/POLICY`. Shape letters: B requests, S positions,
D = d_model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Report, guarded

from moesim.backend.dropin import install
from moesim.backend.offload import Offload
from moesim.backend.partitions import PartitionExecutor
from moesim.backend.quality import Inputs, Settings, batches, measure, outputs
from moesim.backend.switch import load_model
from moesim.sim.policies import POLICIES, make_policy
from moesim.sim.residency import Cluster
from moesim.sim.scenario import make_scenario
from moesim.traces import Phase, Workload, split_requests
from moesim.traces import record as recording
from moesim.traces.store import Trace
from moesim.traces.texts import read_texts

MODEL = Path(__file__).parents[2] / "models/switch-mini"
LOSS_TOLERANCE = 1e-3
"""Nats, between exact executors and the library in bfloat16."""
RESIDENT, PARTS = 8, 4
OFFLOADED = ("on-demand", "prefetch-ridge", "hobbit-exact")
MIXED = ("hobbit", "fate")
PREDICTED = ("token-table", "markov")
NEW_TOKENS = 24


def run(report: Report, *, device: str, small: bool, budget_s: float) -> None:
    """All of it; a rehearsal with few requests."""
    del budget_s  # a small model: it takes what it takes
    there = torch.device(device)
    requests = 3 if small else 48
    with tempfile.TemporaryDirectory(prefix="moesim-quality-") as folder:
        trace = recorded(Path(folder), device, 3000 if small else 9000)
        for dtype in ("bfloat16",) if small else ("bfloat16", "float32"):
            settings = Settings(policies=OFFLOADED, resident=RESIDENT, batch=8, max_requests=requests, dtype=dtype)
            settings = replace(settings, device=device, asynchronous=True)
            with guarded(report, f"exact/dropin/{dtype}"):
                dropin(report, trace, settings, there)
            with guarded(report, f"exact/partitions/{dtype}"):
                partitions(report, trace, settings, there)
            with guarded(report, f"exact/offload/{dtype}"):
                for one in measure(MODEL, trace, settings):
                    report(
                        f"exact/offload-{one.policy}/{dtype}", exactness(one.loss, one.exact_loss, one.top1_agreement)
                    )
        with guarded(report, "tokens"):
            tokens(report, trace, there, small=small)
        settings = replace(settings, dtype="bfloat16")
        for copy_dtype, names in ((None, MIXED), ("int8", ("on-demand",)), ("int4", ("on-demand",))):
            with guarded(report, f"lossy/{copy_dtype or 'mixed'}"):
                for one in measure(MODEL, trace, replace(settings, policies=names, copy_dtype=copy_dtype)):
                    report(f"lossy/{one.policy}" + (f":{copy_dtype}" if copy_dtype else ""), lossy(one))
        with guarded(report, "lossy/predicted"), registered() as names:
            for one in measure(MODEL, trace, replace(settings, policies=names, resident=None)):
                report(f"lossy/{one.policy}", lossy(one))


def recorded(folder: Path, device: str, tokens: int) -> Trace:
    """The model's samples as it routes them in float32."""
    model, tokenizer = recording.load_model(str(MODEL), device=device, dtype="float32")
    options = recording.RecordOptions(max_tokens=tokens, lookahead=3)
    texts = read_texts([MODEL / "samples"])
    return Trace.open(recording.record(model, tokenizer, texts, folder / "t.moetrace", options, source=str(MODEL)))


def exactness(loss: float, wanted: float, agreement: float) -> dict[str, Any]:
    """An entry of an executor that should compute what the library computes."""
    change = loss - wanted
    return {
        "loss": loss,
        "library_loss": wanted,
        "loss_change": change,
        "top1_agreement": agreement,
        "tolerance": LOSS_TOLERANCE,
        "within": abs(change) <= LOSS_TOLERANCE,
    }


def lossy(one: Any) -> dict[str, Any]:
    """An entry of a policy that changes what is computed."""
    kept = ("loss", "exact_loss", "loss_error", "top1_agreement", "output_error", "resident", "copy_dtype")
    return {
        "loss_change": one.loss - one.exact_loss,
        **{name: value for name, value in asdict(one).items() if name in kept},
    }


def inputs_of(trace: Trace, settings: Settings, device: torch.device) -> list[Inputs]:
    """The held-out requests, as `measure` has them."""
    encoder, decoder = trace.table("encoder"), trace.table("decoder")
    _, run = split_requests(encoder, settings.split, trace.request_texts)
    fed = decoder.take(np.isin(decoder.request, run.request) & (decoder.phase == Phase.PREFILL))
    return list(batches({"encoder": run, "decoder": fed}, settings.batch, settings.max_requests, device))


def dropin(report: Report, trace: Trace, settings: Settings, device: torch.device) -> None:
    """The drop-in layers, over the model's own weights."""
    model = load_model(MODEL, settings.dtype).to(device)
    inputs = inputs_of(trace, settings, device)
    wanted = [outputs(model, batch, "prefill") for batch in inputs]
    install(model)
    report(f"exact/dropin/{settings.dtype}", compared([outputs(model, batch, "prefill") for batch in inputs], wanted))


def compared(got: list[Any], wanted: list[Any]) -> dict[str, Any]:
    """Losses and best tokens of two runs over the same batches."""
    losses = [float(torch.cat([one.loss_P for one in side]).mean()) for side in (got, wanted)]
    best, exact = (torch.cat([one.best_N for one in side]) for side in (got, wanted))
    return exactness(losses[0], losses[1], float((best == exact).double().mean()))


def partitions(report: Report, trace: Trace, settings: Settings, device: torch.device) -> None:
    """The encoder on partitions of the device; its states go to an unchanged decoder."""
    plain, model = (load_model(MODEL, settings.dtype).to(device) for _ in range(2))
    workload = Workload(batch=settings.batch, unit="requests")
    scenario = make_scenario(trace.spec, trace.table("encoder"), phase=Phase.ENCODER, gpus=PARTS, workload=workload)
    scenario = replace(scenario, batches=scenario.batches[: max((settings.max_requests or 8) // settings.batch, 1)])
    states: dict[int, list[torch.Tensor]] = {}

    def keep(number: int, hidden_ND: torch.Tensor) -> None:
        request_T = scenario.batches[number].tokens.request
        for row, request in enumerate(request_T.tolist()):
            states.setdefault(request, []).append(hidden_ND[row])

    executor = PartitionExecutor(device, model, scenario)
    try:
        executor.run(make_policy("predictive-batch", scenario.cluster, scenario.fit), keep=keep)
    finally:
        executor.close()
    done = [
        one
        for one in inputs_of(trace, replace(settings, batch=1, max_requests=None), device)
        if one.requests_B[0] in states
    ]
    wanted = [outputs(plain, one, "prefill") for one in done]
    own = plain.encoder.forward
    got = []
    for one in done:
        hidden_1SD = torch.stack(states[int(one.requests_B[0])])[None]
        plain.encoder.forward = lambda hidden_1SD=hidden_1SD, **_given: _States(hidden_1SD)
        got.append(outputs(plain, one, "prefill"))
    plain.encoder.forward = own
    report(f"exact/partitions/{settings.dtype}", {"partitions": PARTS, "requests": len(done), **compared(got, wanted)})


class _States:
    """What an encoder gives back."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state


def tokens(report: Report, trace: Trace, device: torch.device, *, small: bool) -> None:
    """Greedy tokens in float32: drop-in layers, and both stacks offloaded with a prefetching policy."""
    settings = Settings(policies=(), batch=4, max_requests=4 if small else 16)
    inputs = inputs_of(trace, settings, device)

    def generated(model: Any) -> list[torch.Tensor]:
        given = [{"input_ids": one.read.ids_BS, "attention_mask": one.read.mask_BS} for one in inputs]
        with torch.inference_mode():
            return [model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False).cpu() for one in given]

    model = load_model(MODEL, "float32").to(device)
    wanted = generated(model)
    install(model)
    report("tokens/dropin", same(generated(model), wanted))
    model = load_model(MODEL, "float32")
    offloads = [Offload(model, stack, device, asynchronous=True, poison=True) for stack in ("encoder", "decoder")]
    model.to(device)
    for stack, offload in zip(("encoder", "decoder"), offloads, strict=True):
        table = trace.table(stack)
        cluster = Cluster(
            layers=table.num_layers, experts=trace.spec.num_experts, gpus=1, extra_slots=0, resident=RESIDENT
        )
        offload.start(make_policy("prefetch-ridge", cluster, table))
    got = generated(model)
    for offload in offloads:
        offload.finish()
    report("tokens/offload-prefetch-ridge", same(got, wanted))


def same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict[str, Any]:
    """Whether all sequences have the same tokens."""
    equal = [torch.equal(a, b) for a, b in zip(got, wanted, strict=True)]
    return {"batches": len(equal), "tokens": sum(one.numel() for one in wanted), "equal": all(equal)}


@contextmanager
def registered() -> Iterator[tuple[str, ...]]:
    """Policies that execute forecasts of predictors that need no training, by their names."""
    names = tuple(f"predicted-{name}" for name in PREDICTED)
    for name, predictor in zip(names, PREDICTED, strict=True):
        POLICIES[name] = replace(POLICIES["contiguous"], predictor=predictor, routing="predicted")
    try:
        yield names
    finally:
        for name in names:
            del POLICIES[name]
