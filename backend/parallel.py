"""Expert parallelism for real: one rank's executor.

Every rank computes attention for its own requests and the experts that lie in its slots; tokens travel to their experts
and back by all-to-all. All ranks run the same driver on the same routing, which they exchange after every router, so
that they decide alike without asking each other. Knows nothing about processes or files. Shape letters:
T tokens of the step, N tokens of this rank, D = d_model, E experts, G ranks, L MoE layers, X experts with tokens here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moesim.backend.clock import Clock
from moesim.backend.copies import Arrival, Copies
from moesim.backend.experts import ExpertSlots
from moesim.backend.measure import Timeline
from moesim.backend.ranks import Ranks
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

Keep = Callable[[int, torch.Tensor], None]
"""Takes a step's number and this rank's last hidden states [N, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where this rank's tokens of one layer go, and what it gets."""

    order_N: NDArray[np.intp]
    """The tokens that have an expert, by receiver, then expert, then token."""
    sent_G: list[int]
    received_G: list[int]
    group: NDArray[np.intp]
    """Permutation of the received rows that brings each expert's together."""
    expert_X: list[int]
    tokens_X: list[int]


def route(send_FEG: Ints, rank: int, ids_N: NDArray[np.integer], dropped_N: NDArray[np.bool_]) -> Route:
    """Turn the send matrix [G_from, E, G_to] into row orders for `rank`, whose tokens chose `ids_N`."""
    _, experts, gpus = send_FEG.shape
    kept = np.flatnonzero(~dropped_N)
    # 16-bit keys: numpy sorts them by radix, several times faster.
    by_expert = kept[np.argsort(ids_N[kept].astype(np.uint16), kind="stable")]
    target = np.repeat(np.tile(np.arange(gpus, dtype=np.uint16), experts), send_FEG[rank].ravel())
    coming_GE = send_FEG[:, :, rank]
    expert = np.repeat(np.tile(np.arange(experts, dtype=np.uint16), gpus), coming_GE.ravel())
    tokens_E = coming_GE.sum(axis=0)
    present = np.flatnonzero(tokens_E)
    return Route(
        order_N=by_expert[np.argsort(target, kind="stable")],
        sent_G=send_FEG[rank].sum(axis=0).tolist(),
        received_G=coming_GE.sum(axis=1).tolist(),
        group=np.argsort(expert, kind="stable"),
        expert_X=present.tolist(),
        tokens_X=tokens_E[present].tolist(),
    )


class Executor:
    """Runs policies over the steps of a scenario, as one rank of a group. Patches `model` in place.

    `routing` as of PartitionExecutor. Raises InputError where the recording and the model do not fit together.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: Any,
        scenario: Scenario,
        encoder_table: TokenTable | None = None,
        *,
        routing: str = "model",
    ) -> None:
        self.ranks, self._replay = ranks, routing == "replay"
        check_scenario(scenario, routing, encoder_table)
        encode = None
        if scenario.phase is Phase.PREFILL and encoder_table is not None:
            encode = Encoder(model.encoder.to(ranks.device), encoder_table, ranks.device)
        stack = getattr(model, scenario.stack)
        self.patched: SwitchStack = patch(stack, self._exchange)
        check_trace(scenario.spec, scenario.stack, self.patched, replay=self._replay)
        stack.to(ranks.device)
        self.take(scenario, encode)
        cluster = scenario.cluster
        self.slots = ExpertSlots(
            cluster.layers * cluster.layer_slots, self.patched.shape, self.patched.activation, ranks.device
        )
        self._clock = Clock(ranks.device)

    def take(self, scenario: Scenario, encode: Encoder | None = None) -> None:
        """Prepare the steps of a scenario (of the same cluster, after the first one)."""
        self.scenario = scenario
        self._shares = shares(scenario, self.ranks.rank, self.ranks.device, encode, replay=self._replay)

    @property
    def residency(self) -> Residency:
        """What the last run left in the slots."""
        return self._driver.residency

    @torch.inference_mode()
    def run(self, policy: Policy, sink: Sink | None = None, keep: Keep | None = None) -> list[StepRecord]:
        """All steps under `policy`, from its starting placement. Every rank must call this with the same policy."""
        self._driver = Driver(policy, sink)
        self._load(policy)
        self._copies = Copies(self.ranks, self.slots)
        timeline = Timeline(self.scenario.cluster.layers)
        for number, (step, share) in enumerate(zip(self.scenario.steps(), self._shares, strict=True)):
            self._moved = self._hidden = 0
            self._computed: list[int] = []
            self.ranks.barrier()
            hidden = self._step(step, share)
            timeline.add(
                self._clock.read(), self._computed, tokens=len(step.tokens), moved=self._moved, hidden=self._hidden
            )
            self._driver.end_step()
            if keep is not None:
                keep(number, hidden)
        self._copies.drain()
        self.ranks.synchronize()
        self.measured = timeline.exchange(self.ranks)
        return self.measured.records()

    def scores(self) -> dict[str, float | int | None]:
        """The driver's scores of the last run."""
        return self._driver.scores.summary()

    def spans(self) -> list[Span]:
        """What every rank did when in the last run."""
        return self.measured.spans()

    def _load(self, policy: Policy) -> None:
        """Fill the slots as the policy's placement says; the weights come from host memory."""
        mine_LS = policy.placed_LGS[:, self.ranks.rank]
        for layer, i in np.argwhere(mine_LS != EMPTY).tolist():
            expert = int(mine_LS[layer, i])
            slot = layer * policy.cluster.layer_slots + i
            self.slots.write(slot, (layer, expert), self.patched.weights_LE[layer][expert])

    def _step(self, step: StepInput, share: Share) -> torch.Tensor:
        clock = self._clock
        self._input, self._share = step, share
        self._rows_G = [np.flatnonzero(step.rank == g) for g in range(self.ranks.size)]
        self.patched.real.index_N = share.real_N
        clock.mark()
        self._copies.start(self._driver.begin_step(step.tokens, queued=step.queued, truth=(step.ids, step.queued_ids)))
        clock.mark()
        self._arrive(self._copies.wait_blocking(self.residency))
        clock.mark()
        hidden_ND = forward(self.patched.stack, share) if share.batch is not None else self._take_part()
        clock.mark()
        return hidden_ND

    def _take_part(self) -> torch.Tensor:
        """A rank without requests: it has experts all the same, and every collective waits for it."""
        shape, device = self.patched.shape, self.ranks.device
        nothing = torch.empty((0, shape.d_model), dtype=shape.dtype, device=device)
        none = torch.empty(0, dtype=torch.long, device=device)
        routed = Routed(x_ND=nothing, ids_N=none, dropped_N=none.bool(), prob_N=nothing.new_empty(0))
        for layer in range(self.scenario.cluster.layers):
            self._exchange(layer, routed)
        return nothing

    def _exchange(self, layer: int, routed: Routed) -> torch.Tensor:
        """[N, D] what stands in the place of the model's experts; marks are those of measure.LAYER_MARKS."""
        driver, clock, rank = self._driver, self._clock, self.ranks.rank
        routed = replace(routed, **self._share.forced(layer))
        clock.mark()
        ids_T, dropped_T = self._agree(routed)
        clock.mark()
        self._copies.start(driver.routed(RoutedLayer(ids=ids_T[:, None])))
        clock.mark()
        self._arrive(self._copies.wait_blocking(driver.residency))
        clock.mark()
        self._copies.needed(layer)
        send_FEG = driver.dispatch(rank_counts(ids_T[:, None], dropped_T, self._input.rank, driver.cluster))
        rows_N = self._rows_G[rank]
        way = route(send_FEG, rank, ids_T[rows_N], dropped_T[rows_N])
        slot_X = [driver.residency.slot(layer, expert, rank) for expert in way.expert_X]
        order_N = torch.from_numpy(way.order_N).to(self.ranks.device)
        group = torch.from_numpy(way.group).to(self.ranks.device)
        clock.mark()
        x_ND = self.ranks.all_to_all(routed.x_ND[order_N], way.sent_G, way.received_G)
        clock.mark()
        y_ND = self.slots.apply(x_ND, group, slot_X, way.tokens_X)
        self._computed.append(len(x_ND))
        clock.mark()
        back_ND = self.ranks.all_to_all(y_ND, way.received_G, way.sent_G)
        out_ND = torch.zeros_like(routed.x_ND)
        out_ND[order_N] = back_ND * routed.prob_N[order_N, None]
        clock.mark()
        return out_ND

    def _agree(self, routed: Routed) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """([T] chosen expert, [T] dropped) of all ranks' tokens, in the scenario's order.

        The same message says which copies have arrived; those that all ranks have seen become usable here.
        """
        widest = max(len(rows) for rows in self._rows_G)
        code_N = (routed.ids_N * 2 + routed.dropped_N).to(torch.int32)
        arrived = torch.from_numpy(self._copies.arrived()).to(code_N.device)
        message = torch.cat([functional.pad(code_N, (0, widest - len(code_N))), arrived])
        said_GX = self.ranks.all_gather(message).numpy()
        code_T = np.empty(len(self._input.tokens), np.int32)
        for rows, said_X in zip(self._rows_G, said_GX, strict=True):
            code_T[rows] = said_X[: len(rows)]
        agreed: NDArray[np.bool_] = np.all(said_GX[:, widest:] == 1, axis=0)
        self._arrive(self._copies.commit(agreed, self.residency))
        return (code_T // 2).astype(id_dtype(self.patched.experts)), code_T % 2 == 1

    def _arrive(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            self._driver.arrived(arrival.transfer)
            self._moved += self.patched.shape.bytes
            self._hidden += self.patched.shape.bytes * arrival.hidden
