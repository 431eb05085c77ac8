"""Expert parallelism on one device: partitions of it stand for GPUs, in one process, without a network.

Attention and routers run on the whole device. For every MoE layer the host gets the chosen experts, asks the same
driver as the ranks do, and tells the device which partition takes which token; all partitions then compute their
experts at the same time, each on its own multiprocessors and from its own copies of the weights. Replicas are copied
between the partitions' slots meanwhile. On a CPU threads take the place of streams and all else is the same code. Shape
letters: T tokens of the step, D = d_model, E experts, G partitions, L MoE layers, S slots of a partition and layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend import partition_experts as experts
from moesim.backend.copies import Arrival
from moesim.backend.gate import Gate
from moesim.backend.green import Groups, split
from moesim.backend.grouped import activation_name
from moesim.backend.partition_copies import PartitionCopies
from moesim.backend.partition_measure import (
    PartitionSpan,
    Shares,
    StepMoments,
    busy_seconds,
    step_record,
    step_spans,
    total,
)
from moesim.backend.partition_plan import Plan, make_plan, message_size, offsets_width, place
from moesim.backend.queues import Moment, Queues
from moesim.backend.shares import Encoder, Share, check_scenario, forward, shares
from moesim.backend.switch import Routed, SwitchStack, check_trace, patch
from moesim.predictors import RoutedLayer
from moesim.sim.dispatch import Ints
from moesim.sim.driver import Driver, Sink
from moesim.sim.policies import Policy
from moesim.sim.residency import EMPTY, Residency
from moesim.sim.results import StepRecord
from moesim.sim.scenario import Scenario, StepInput, rank_counts
from moesim.sim.timeline import Span
from moesim.traces import Phase, TokenTable, id_dtype

Beside = Callable[[Moment], None]


class PartitionExecutor:
    """Runs policies over the steps of a scenario on `cluster.gpus` partitions of a device. Patches `model` in place.

    `routing`: the model's own router decides ("model"), or what was recorded is forced on every layer ("replay", whose
    tokens need no vocabulary ids); the router runs in both. `poison`: slots hold NaN until their copy has come. Close
    it when done. Raises InputError where recording, model and options do not fit together.
    """

    def __init__(
        self,
        device: torch.device,
        model: Any,
        scenario: Scenario,
        encoder_table: TokenTable | None = None,
        *,
        routing: str = "model",
        kernel: str = "auto",
        poison: bool = False,
        groups: Groups | None = None,
    ) -> None:
        self.device, self.routing, self.poison = device, routing, poison
        check_scenario(scenario, routing, encoder_table)
        encode = None
        if scenario.phase is Phase.PREFILL and encoder_table is not None:
            encode = Encoder(model.encoder.to(device), encoder_table, device)
        stack = getattr(model, scenario.stack)
        self.patched: SwitchStack = patch(stack, self._exchange)
        check_trace(scenario.spec, scenario.stack, self.patched, replay=routing == "replay")
        stack.to(device)
        cluster = scenario.cluster
        self._own_groups = groups is None
        self.groups = groups or split(device, cluster.gpus)
        self.queues = Queues(device, self.groups, cluster.gpus)
        activation = activation_name(self.patched.activation)
        self.slots = [
            experts.PartitionSlots(cluster, self.patched.shape, activation, device) for _ in range(cluster.gpus)
        ]
        self._slot_S = torch.arange(cluster.layer_slots, dtype=torch.int32, device=device)
        like = torch.empty((0, self.patched.shape.d_model), dtype=self.patched.shape.dtype, device=device)
        self.kernel = experts.kernel_of(kernel, like, self.slots[0].layer(0))
        self._gate = Gate(device)
        self._messages: list[torch.Tensor] = []
        self.take(scenario, encode)

    def take(self, scenario: Scenario, encode: Encoder | None = None) -> None:
        """Prepare the steps of a scenario (of the same cluster, after the first one)."""
        self.scenario = scenario
        self._shares = shares(scenario, None, self.device, encode, replay=self.routing == "replay")
        longest = max((share.tokens for share in self._shares), default=0)
        on_gpu = self.device.type == "cuda"
        c = scenario.cluster
        self._tile_rows = max(longest // c.gpus, 1)
        self._code_T = torch.empty(longest, dtype=torch.int32, pin_memory=on_gpu)
        size = message_size(c.gpus, c.layer_slots, c.experts)
        # One a layer: the message of a layer may still be read while the next one's is written.
        self._messages = [torch.empty(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(c.layers)]

    @property
    def residency(self) -> Residency:
        """What the last run left in the slots."""
        return self._driver.residency

    @torch.inference_mode()
    def run(self, policy: Policy, sink: Sink | None = None, keep: Any = None) -> list[StepRecord]:
        """All steps under `policy`, from its starting placement. `keep(number, hidden_TD)` is given every output."""
        self.begin(policy, sink)
        records = []
        for number, (step, share) in enumerate(zip(self.scenario.steps(), self._shares, strict=True)):
            self._arrivals: list[Arrival] = []
            hidden_TD = self._step(step, share)
            self.shares.append(Shares(policy.cluster.gpus))
            nbytes = self.patched.shape.bytes
            self._spans += step_spans(self._moments, self._run_s)
            records.append(
                step_record(
                    self._moments,
                    self.shares[-1],
                    tokens=share.tokens,
                    moved=len(self._arrivals) * nbytes,
                    hidden=sum(arrival.hidden for arrival in self._arrivals) * nbytes,
                )
            )
            self._run_s += records[-1].duration_s
            self._driver.end_step()
            if keep is not None:
                keep(number, hidden_TD)
        self._copies.drain()
        self.queues.synchronize()
        return records

    def begin(self, policy: Policy, sink: Sink | None = None) -> None:
        """Forget the last run and fill the slots as the policy's placement says."""
        self._driver = Driver(policy, sink)
        self._load(policy)
        self._copies = PartitionCopies(self.queues, self.slots, poison=self.poison)
        self.shares: list[Shares] = []
        """Of every step."""
        self._spans: list[Span] = []
        self._run_s = 0.0

    @torch.inference_mode()
    def expert_phase(
        self, layer: int, x_TD: torch.Tensor, tokens_EG: Ints, beside: Beside | None = None
    ) -> tuple[float, list[float]]:
        """(seconds of the phase, [G] seconds of each partition) with as many tokens of each expert on each partition,
        as a layer of a step would compute them, from the slots that the last `begin` filled. For calibration; `beside`
        is told when the experts begin and may give the copy queues work from then on."""
        E = self.patched.experts
        ids_T = torch.from_numpy(np.repeat(np.arange(E), tokens_EG.sum(axis=1))).to(self.device)
        x_ND = x_TD[: len(ids_T)]
        routed = Routed(
            x_ND=x_ND,
            ids_N=ids_T,
            dropped_N=torch.zeros_like(ids_T, dtype=torch.bool),
            prob_N=torch.ones_like(x_ND[:, 0]),
        )
        plan = make_plan(tokens_EG, self.residency.experts_GS(layer))
        self.queues.synchronize()
        at: dict[str, Moment] = {}
        _, spans_G, _ = self._experts(layer, routed, plan, self._sorted(routed), at, beside)
        at["computed"].wait()
        return at["computed"].since(at["ready"]), busy_seconds(spans_G)

    def spans(self) -> list[Span]:
        """What happened when in the last run, steps end to end: what is not split, and every partition's experts."""
        return self._spans

    def scores(self) -> dict[str, float | int | None]:
        """The driver's scores of the last run, shares of the expert phase, and the copies' median seconds."""
        seconds = self._copies.seconds
        copy_s = float(np.median(seconds)) if seconds else None
        return {
            **self._driver.scores.summary(),
            **total(self.shares).summary(),
            "copies": len(seconds),
            "copy_s": copy_s,
        }

    def describe(self) -> dict[str, Any]:
        """What results say of this executor."""
        about = self.groups.describe()
        return {
            "executor": "partitions",
            **about,
            "kernel": self.kernel,
            "routing": self.routing,
            "gate": self._gate.on,
        }

    def close(self) -> None:
        """End threads and, where this executor made them, streams and contexts."""
        self.queues.synchronize()
        self.queues.close()
        if self._own_groups:
            self.groups.close()

    def _load(self, policy: Policy) -> None:
        """Fill the slots as the policy's placement says."""
        for gpu, slots in enumerate(self.slots):
            if self.poison:
                slots.rows_SP.fill_(float("nan"))
            for layer, i in np.argwhere(policy.placed_LGS[:, gpu] != EMPTY).tolist():
                expert = int(policy.placed_LGS[layer, gpu, i])
                row_P = slots.claim(layer * policy.cluster.layer_slots + i, (layer, expert))
                row_P.copy_(self.patched.weights_LE[layer][expert])
        self.queues.synchronize()

    def _step(self, step: StepInput, share: Share) -> torch.Tensor:
        main = self.queues.main
        self._input, self._share = step, share
        self.patched.real.index_N = share.real_N
        # The main queue is empty, and with it the partitions'; copies may be under way, and nobody waits for them.
        self._moments = moments = StepMoments(main.record())
        self._copies.start(self._driver.begin_step(step.tokens, queued=step.queued, truth=(step.ids, step.queued_ids)))
        moments.decided = main.record()
        self._arrive(self._copies.wait_blocking(self.residency))
        moments.unblocked = main.record()
        hidden_TD = forward(self.patched.stack, share)
        moments.end = main.record()
        moments.end.wait()
        return hidden_TD

    def _exchange(self, layer: int, routed: Routed) -> torch.Tensor:
        """[T, D] what stands in the place of the model's experts; moments are those of measure.LAYER_MOMENTS."""
        main, driver = self.queues.main, self._driver
        at: dict[str, Moment] = {"routed": main.record()}
        routed = replace(routed, **self._share.forced(layer))
        in_order = self._sorted(routed)
        ids_T, dropped_T = self._to_host(routed)
        at["gathered"] = main.record()
        self._arrive(self._copies.poll(driver.residency))
        self._copies.start(driver.routed(RoutedLayer(ids=ids_T[:, None])))
        at["asked"] = main.record()
        self._arrive(self._copies.wait_blocking(driver.residency))
        at["unblocked"] = main.record()
        self._copies.needed(layer)
        plan = self._planned(layer, ids_T, dropped_T)
        at["split"] = main.record()
        out_TD, spans_G, tokens_G = self._experts(layer, routed, plan, in_order, at)
        self._moments.layers.append(at)
        self._moments.spans_LG.append(spans_G)
        self._moments.tokens_LG.append(tokens_G)
        return out_TD

    def _experts(
        self,
        layer: int,
        routed: Routed,
        plan: Plan,
        in_order: tuple[torch.Tensor, torch.Tensor],
        at: dict[str, Moment],
        beside: Beside | None = None,
    ) -> tuple[torch.Tensor, list[PartitionSpan], list[int]]:
        """([T, D] output, begin and end of every partition, their tokens); notes placed, ready and computed."""
        c, main = self.scenario.cluster, self.queues.main
        self._messages[layer].copy_(torch.from_numpy(plan.message))
        message = self._messages[layer].to(self.device, non_blocking=True)
        token_T = place(message, *in_order, c.gpus, c.layer_slots)
        out_TD = torch.zeros_like(routed.x_ND)
        at["placed"] = main.record()
        tokens_G = plan.tokens_G
        width = offsets_width(c.layer_slots)
        work_G = [
            experts.Work(
                x_TD=routed.x_ND,
                token_M=token_T[first : first + tokens],
                offsets_S1=message[gpu * width : gpu * width + c.layer_slots + 1],
                scale_T=routed.prob_N,
                out_TD=out_TD,
                tile_rows=self._tile_rows,
            )
            for gpu, (first, tokens) in enumerate(zip(plan.first_G, tokens_G, strict=True))
        ]
        spans_G = self._compute(layer, work_G, at, beside)
        at["computed"] = main.record()
        return out_TD, spans_G, tokens_G

    def _compute(
        self, layer: int, work_G: list[experts.Work], at: dict[str, Moment], beside: Beside | None
    ) -> list[PartitionSpan]:
        """Launch every partition's experts behind the gate, and let the main queue wait for all of them.

        Tensors that the partitions share are of the main queue's memory. It waits for the partitions before it goes on,
        so the allocator gives none of it away while they read; what they allocate themselves stays with their stream.
        """
        main = self.queues.main
        launches = sum(len(work.token_M) > 0 for work in work_G) + (0 if beside is None else len(self.queues.copy))
        began = time.perf_counter()
        main.run(partial(self._gate.hold, launches))
        at["ready"] = main.record()
        if beside is not None:
            beside(at["ready"])
        spans_G: list[PartitionSpan] = []
        for gpu, work in enumerate(work_G):
            if not len(work.token_M):
                spans_G.append(None)
                continue
            queue = self.queues.compute[gpu]
            queue.after(at["ready"])
            begin = queue.record()
            queue.run(partial(experts.compute, work, self.slots[gpu].layer(layer), self._slot_S, self.kernel))
            spans_G.append((begin, queue.record()))
        self._gate.launched(launches, time.perf_counter() - began)
        for span in spans_G:
            if span is not None:
                main.after(span[1])
        return spans_G

    def _sorted(self, routed: Routed) -> tuple[torch.Tensor, torch.Tensor]:
        """([T] experts in order, those of dropped tokens as E and last; [T] which tokens these are)."""
        E = self.patched.experts
        narrow = torch.uint8 if E <= 255 else torch.int16
        key_T = torch.where(routed.dropped_N, E, routed.ids_N).to(narrow)
        expert_T, order_T = torch.sort(key_T, stable=True)
        return expert_T, order_T

    def _to_host(self, routed: Routed) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """([T] chosen expert, [T] dropped), in the scenario's order. The host waits."""
        code_T = self._code_T[: len(routed.ids_N)]
        code_T.copy_((routed.ids_N * 2 + routed.dropped_N).to(torch.int32), non_blocking=True)
        self.queues.main.record().wait()
        code = code_T.numpy()
        return (code // 2).astype(id_dtype(self.patched.experts)), code % 2 == 1

    def _planned(self, layer: int, ids_T: NDArray[Any], dropped_T: NDArray[np.bool_]) -> Plan:
        driver = self._driver
        counts_GE = rank_counts(ids_T[:, None], dropped_T, self._input.rank, driver.cluster)
        tokens_EG = driver.dispatch(counts_GE).sum(axis=0)
        # A slot whose copy is still under way gets no tokens: the split is over what is usable.
        return make_plan(tokens_EG, driver.residency.experts_GS(layer))

    def _arrive(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            self._driver.arrived(arrival.transfer)
        self._arrivals += arrivals
