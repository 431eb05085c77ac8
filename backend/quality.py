"""How well a policy's model still predicts, against the exact model on the same held-out requests.

The recording says which requests a policy is fitted on and which are run, as for every speedup. The encoder reads a
request's text; the decoder is fed the recorded continuation, in one pass (`prefill`) or token by token with a cache
(`decode`), and the loss is the model's training objective: the next token of the continuation. Knows nothing about
terminals. Shape letters: B requests of a batch, N tokens that the decoder was fed, P of these that have a next one,
L MoE layers.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.hub import model_digest
from moesim.backend.offload import Offload
from moesim.backend.predicted import mean_weights
from moesim.backend.session import device_name
from moesim.backend.shares import Padded, pad
from moesim.backend.switch import check_trace, load_model
from moesim.predictors import Oracle
from moesim.sim.policies import Policy, make_policy, recipe, recipe_digest
from moesim.sim.quality import Quality
from moesim.sim.residency import Cluster
from moesim.traces import InputError, Phase, StepTokens, TokenTable, split_requests, vocabulary_ids
from moesim.traces.store import Trace

STACKS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
HOST_TOKENS = 4
"""Experts with at most so many tokens count as cheaper on the host; which, changes no output."""
Progress = Callable[[str, float], None]
"""Is told what is being done, and which share of it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and how."""

    policies: tuple[str, ...]
    resident: int | None = None
    phase: str = "prefill"
    batch: int = 1
    """Requests in one forward pass: what a policy does depends on how many tokens a step has."""
    max_requests: int | None = None
    split: str = "request"
    copy_dtype: str | None = None
    gate: str = "fixed"
    """What multiplies an expert that was predicted: 'fixed', one factor a layer, or the 'router' (predicted.py)."""
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    asynchronous: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """One batch of requests."""

    requests_B: NDArray[np.int32]
    read: Padded
    """What the encoder reads."""
    fed: Padded
    """What the decoder is fed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a model made of one batch, at the real tokens, request by request."""

    hidden_ND: torch.Tensor
    """The decoder's last hidden states."""
    best_N: torch.Tensor
    """The likeliest next token."""
    loss_P: torch.Tensor
    """Nats for the true next token."""
    request_P: NDArray[np.int32]


def measure(folder: Path, trace: Trace, settings: Settings, progress: Progress | None = None) -> list[Quality]:
    """Every policy of the settings, fitted and run. Raises InputError where model, recording and policy do not fit."""
    tell = progress or _silent
    for name in settings.policies:
        if recipe(name).predictor == "oracle" and recipe(name).routing == "predicted":
            raise InputError(f"policy {name}: an oracle's forecast is the router's choice; its quality is the model's")
    digest = model_digest(folder)
    if trace.model_digest not in ("", digest):
        raise InputError(f"{trace.path} was recorded with other weights than those in {folder}; record this model")
    fit, run = _split(trace, settings)
    device = torch.device(settings.device)
    inputs = list(batches(run, settings.batch, settings.max_requests, device))
    torch.manual_seed(settings.seed)
    exact = load_model(folder, settings.dtype).to(device)
    wanted = []
    for i, batch in enumerate(inputs):
        tell("the exact model", i / len(inputs))
        wanted.append(outputs(exact, batch, settings.phase))
    del exact
    model = load_model(folder, settings.dtype)
    options: dict[str, Any] = {"copy_dtype": settings.copy_dtype, "asynchronous": settings.asynchronous}
    offloads: dict[str, Offload] = {stack: Offload(model, stack, device, **options) for stack in STACKS}
    for stack, offload in offloads.items():
        check_trace(trace.spec, stack, offload.patched, replay=False)
    model.to(device)
    config = _config(trace, settings, inputs, sum(len(one.best_N) for one in wanted))
    found = []
    for name in settings.policies:
        tell(f"{name}: fitting", 0.0)
        for stack, offload in offloads.items():
            _start(name, offload, fit[stack], trace, stack, settings)
        got = []
        for i, batch in enumerate(inputs):
            tell(name, i / len(inputs))
            _announce(offloads, inputs[i : i + 2], settings.phase)
            got.append(outputs(model, batch, settings.phase))
        for offload in offloads.values():
            offload.finish()
        shares = {stack: offload.tally.pairs.shares() for stack, offload in offloads.items()}
        found.append(compared(name, digest, settings, wanted, got, shares, config))
    return found


def _silent(_what: str, _done: float) -> None:
    pass


def _split(trace: Trace, settings: Settings) -> tuple[dict[str, TokenTable], dict[str, TokenTable]]:
    """({stack: fitted tokens}, {stack: held-out tokens}), split by the encoder's requests."""
    for stack in STACKS:
        if stack not in trace.stacks or trace.kind != "tokens":
            raise InputError(f"{trace.path} has no tokens of the {stack}: record the model with both stacks")
    encoder, decoder = (trace.table(stack) for stack in STACKS)
    fit, run = split_requests(encoder, settings.split, trace.request_texts)
    inside = np.isin(decoder.request, fit.request)
    mine = decoder.phase == (Phase.DECODE if settings.phase == "decode" else Phase.PREFILL)
    if settings.phase == "decode" and not (inside & mine).any():
        mine = decoder.phase == Phase.PREFILL  # no decode steps were recorded: prompts have the same routers
    fed = decoder.take(~inside & (decoder.phase == Phase.PREFILL))
    return {"encoder": fit, "decoder": decoder.take(inside & mine)}, {"encoder": run, "decoder": fed}


def batches(run: dict[str, TokenTable], size: int, most: int | None, device: torch.device) -> Iterator[Inputs]:
    """Requests in order of their number, `size` at a time, those that the decoder is fed at least two tokens of.

    Raises InputError where there is none.
    """
    numbers, counts = np.unique(run["decoder"].request, return_counts=True)
    chosen = np.intersect1d(numbers[counts > 1], run["encoder"].request)[:most]
    if not len(chosen):
        raise InputError("no held-out request has a prompt of two decoder tokens: there is nothing to predict")
    tables = [_in_order(run[stack]) for stack in STACKS]
    for begin in range(0, len(chosen), size):
        requests_B = chosen[begin : begin + size].astype(np.int32)
        read, fed = (_padded(table, requests_B).to(device) for table in tables)
        yield Inputs(requests_B=requests_B, read=read, fed=fed)


def _in_order(table: TokenTable) -> TokenTable:
    return table.take(np.lexsort((table.position, table.request)))


def _padded(table: TokenTable, requests_B: NDArray[np.int32]) -> Padded:
    rows = np.flatnonzero(np.isin(table.request, requests_B))
    return pad(vocabulary_ids(table)[rows], table.request[rows], table.position[rows])


@torch.inference_mode()
def outputs(model: Any, batch: Inputs, phase: str) -> Outputs:
    """Run one batch through encoder and decoder."""
    states = model.encoder(input_ids=batch.read.ids_BS, attention_mask=batch.read.mask_BS).last_hidden_state
    given = {"encoder_hidden_states": states, "encoder_attention_mask": batch.read.mask_BS}
    if phase == "decode":
        hidden_BSD = _token_by_token(model.decoder, batch.fed, given)
    else:
        hidden_BSD = model.decoder(
            input_ids=batch.fed.ids_BS, attention_mask=batch.fed.mask_BS, **given
        ).last_hidden_state
    scale = model.model_dim**-0.5 if model.config.tie_word_embeddings else 1.0
    logits_BSV = model.lm_head(hidden_BSD * scale).float()
    real_BS = batch.fed.mask_BS.bool()
    followed_BS = real_BS[:, 1:]
    loss_P = torch.nn.functional.cross_entropy(
        logits_BSV[:, :-1][followed_BS], batch.fed.ids_BS[:, 1:][followed_BS], reduction="none"
    )
    row_P = followed_BS.nonzero()[:, 0].cpu().numpy()
    return Outputs(
        hidden_ND=hidden_BSD[real_BS].cpu(),
        best_N=logits_BSV.argmax(dim=-1)[real_BS].cpu(),
        loss_P=loss_P.double().cpu(),
        request_P=batch.requests_B[row_P],
    )


def _token_by_token(decoder: Any, fed: Padded, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, S, D] as a server would decode that had sampled these tokens."""
    from transformers import DynamicCache, EncoderDecoderCache

    # transformers renamed it, and warns of the old name.
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    states = []
    for i in range(fed.ids_BS.shape[1]):
        told = decoder(
            input_ids=fed.ids_BS[:, i : i + 1],
            attention_mask=fed.mask_BS[:, : i + 1],
            use_cache=True,
            **given,
            **{name: cache},
        )
        states.append(told.last_hidden_state)
    return torch.cat(states, dim=1)


def _start(name: str, offload: Offload, fit: TokenTable, trace: Trace, stack: str, settings: Settings) -> None:
    """Fit the policy to one stack and begin."""
    spec = trace.spec
    cluster = Cluster(
        layers=fit.num_layers,
        experts=spec.num_experts,
        gpus=1,
        extra_slots=0,
        top_k=spec.top_k,
        resident=settings.resident,
    )
    policy: Policy = make_policy(name, cluster, fit, trace.gates(stack))
    if isinstance(policy.predictor, Oracle):
        raise InputError(f"policy {name} is shown recorded routing, and here the model routes anew: nothing to show")
    fixed = policy.recipe.routing == "predicted" and settings.gate == "fixed"
    offload.start(policy, cheaper=lambda tokens: tokens <= HOST_TOKENS, factor_L=mean_weights(fit) if fixed else None)


def _announce(offloads: dict[str, Offload], inputs: list[Inputs], phase: str) -> None:
    """Tell the executors whose requests come, and what waits behind them, where a server would know."""
    now, *later = inputs
    for stack, offload in offloads.items():
        offload.requests = now.requests_B
        if later and not (stack == "decoder" and phase == "decode"):
            padded = later[0].read if stack == "encoder" else later[0].fed
            offload.expect(queued=_step_tokens(padded, later[0].requests_B))


def _step_tokens(padded: Padded, requests_B: NDArray[np.int32]) -> StepTokens:
    row_N, place_N = (index.cpu().numpy() for index in padded.mask_BS.nonzero(as_tuple=True))
    return StepTokens(
        request=requests_B[row_N],
        position=place_N.astype(np.int32),
        token_id=padded.ids_BS.cpu().numpy()[row_N, place_N].astype(np.int32),
    )


def compared(
    name: str,
    digest: str,
    settings: Settings,
    wanted: list[Outputs],
    got: list[Outputs],
    shares: dict[str, dict[str, list[float]]],
    config: dict[str, Any],
) -> Quality:
    """The numbers of one policy; the standard error is over requests, whose tokens hang together."""
    exact_P, loss_P = (torch.cat([one.loss_P for one in side]).numpy() for side in (wanted, got))
    _, request_P = np.unique(np.concatenate([one.request_P for one in wanted]), return_inverse=True)
    mean_R = np.bincount(request_P, loss_P - exact_P) / np.bincount(request_P)
    best, exact_best = (torch.cat([one.best_N for one in side]) for side in (got, wanted))
    hidden, exact_hidden = (torch.cat([one.hidden_ND for one in side]).double() for side in (got, wanted))
    return Quality(
        policy=name,
        policy_digest=recipe_digest(recipe(name)),
        model_digest=digest,
        phase=settings.phase,
        resident=settings.resident,
        copy_dtype=settings.copy_dtype,
        loss=float(loss_P.mean()),
        exact_loss=float(exact_P.mean()),
        loss_error=float(mean_R.std(ddof=1) / len(mean_R) ** 0.5) if len(mean_R) > 1 else 0.0,
        top1_agreement=float((best == exact_best).double().mean()),
        output_error=float((hidden - exact_hidden).norm() / exact_hidden.norm()),
        shares=shares,
        config={**config, **({"gate": settings.gate} if recipe(name).routing == "predicted" else {})},
    )


def _config(trace: Trace, settings: Settings, inputs: list[Inputs], tokens: int) -> dict[str, Any]:
    from moesim.traces.versions import version

    names = ("moesim", "torch", "transformers", "numpy")
    return {
        "model": trace.provenance.get("model"),
        "family": trace.spec.family,
        "experts": trace.spec.num_experts,
        "trace": trace.path.name,
        "split": settings.split,
        "requests": sum(len(batch.requests_B) for batch in inputs),
        "decoder_tokens": tokens,
        "batch_requests": settings.batch,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "device": settings.device,
        "device_name": device_name(torch.device(settings.device)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }
