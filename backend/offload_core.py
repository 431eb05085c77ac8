"""The experts of a stack in slots of one device, driven by a policy: decisions, copies, and what is computed.

The host reads what a router chose once a layer and decides; copies, waiting for them and the experts are given to the
device in order, so it waits for nothing else. Knows nothing about models but their routers. Shape letters: N tokens,
D = d_model, E experts, L MoE layers, S slots, P weights of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.backend.experts import ExpertSlots
from moesim.backend.grouped import Groups, SlotWeights, activation_name, group_pairs, grouped_mlp
from moesim.backend.predicted import PredictedRouting, logits
from moesim.backend.slots import FULL, Copy, HostExperts, Inline, Mover, Threaded, as_copies, carry
from moesim.backend.streams import Streamed
from moesim.backend.switch import Routed, SwitchStack
from moesim.backend.tally import Tally
from moesim.backend.told import Seer, Told, coded
from moesim.backend.uploads import Uploads
from moesim.sim.dispatch import Ints
from moesim.sim.driver import Driver, Sink
from moesim.sim.eviction import Future
from moesim.sim.offload import Cheaper
from moesim.sim.policies import Policy
from moesim.sim.residency import EMPTY, HOST, PRECISIONS, Transfer
from moesim.traces import InputError, StepTokens, TokenTable

Truth = tuple[NDArray[np.integer], NDArray[np.integer] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an `OffloadedExperts` works."""

    asynchronous: bool = False
    """Copies run beside the computation (on a CPU a thread, on a GPU streams of their own); otherwise they are there at
    once and a run repeats to the bit."""
    poison: bool = False
    """Slots hold NaN from the moment they are given away until their copy has come, so that computing too early
    shows."""
    copy_dtype: str | None = None
    """Copies in full precision are made in it instead."""
    kernel: str = "auto"
    """Of grouped.py."""


class OffloadedExperts:
    """The experts that a stack was `patched` to do without. `start` a policy; for every forward pass `begin`, then for
    every layer `ask` and `compute`, then `end`; `finish`."""

    def __init__(self, patched: SwitchStack, routers: list[Any], device: torch.device, options: Options) -> None:
        self.patched, self.routers, self.device, self.options = patched, routers, device, options
        self.host = HostExperts(patched.weights_LE, patched.shape, pinned=device.type == "cuda")
        self.policy: Policy | None = None
        self._expected: tuple[StepTokens | None, Truth | None] = (None, None)
        self._recorded: TokenTable | None = None
        self._uploads = Uploads(device, patched.experts + 1)
        self._activation = activation_name(patched.activation)

    def start(
        self,
        policy: Policy,
        sink: Sink | None = None,
        *,
        cheaper: Cheaper | None = None,
        factor_L: NDArray[np.floating] | None = None,
        future: Future | None = None,
        continuous: bool = False,
    ) -> None:
        """Begin a run of `policy` from its placement. `cheaper` is asked by policies that run experts on the host;
        `factor_L` scales experts that were predicted (predicted.py); `future` is shown to evictions that are oracles;
        `continuous` is the tally's.

        Raises InputError where the policy is for another cluster, or asks what nobody answers.
        """
        c = policy.cluster
        if (c.gpus, c.layers, c.experts) != (1, len(self.routers), self.patched.experts):
            raise InputError(
                f"policy {policy.name} is fitted for {c.gpus} GPUs, {c.layers} layers, {c.experts} experts; this stack "
                f"has {len(self.routers)} layers of {self.patched.experts}, on one device"
            )
        if policy.recipe.miss == "cpu" and cheaper is None:
            raise InputError(f"policy {policy.name} asks when the host is faster than a copy: nobody says")
        predicted = policy.recipe.routing == "predicted"
        self._predicted = PredictedRouting(self.routers, factor_L) if predicted else None
        self._seen = Seer(self.routers, policy.predictor.needs if policy.predictor else ())
        self._weighs = policy.predictor is not None or policy.recipe.precision.needs_weights
        self.driver = Driver(policy, sink, cheaper if policy.recipe.miss == "cpu" else None, future)
        for name in ("slots", "_weights", "mover"):  # of the run before: not both at a time
            self.__dict__.pop(name, None)
        self.slots = ExpertSlots(c.gpu_slots, self.patched.shape, self.patched.activation, self.device)
        self._weights = self._matrices(self.slots.rows_SP)
        self.tally = Tally(c.layers, self.device, continuous=continuous)
        self._held: list[Copy] = []
        self._load()
        beside = Streamed if self.device.type == "cuda" else Threaded
        self.mover: Mover = (beside if self.options.asynchronous else Inline)(self.host, self.slots)
        self.policy = policy

    def expect(
        self, queued: StepTokens | None = None, truth: Truth | None = None, recorded: TokenTable | None = None
    ) -> None:
        """Tell what is known beside the next forward pass: the step that waits behind it, for oracles the truth, and
        what was recorded of its tokens where that is replayed."""
        self._expected, self._recorded = (queued, truth), recorded

    def finish(self) -> None:
        """End the run: no copy is under way when it returns."""
        self.mover.drain()
        self.policy = None

    def begin(self, tokens: StepTokens, sequence_N: torch.Tensor | None = None) -> None:
        """A forward pass of these tokens begins: decision point 0. `sequence_N`: the row of the batch that each
        token is in, for policies that do not obey the router."""
        (queued, truth), self._expected = self._expected, (None, None)
        self._sequence_N = sequence_N
        self.tally.begin(len(tokens))
        self._waited = False
        self._thinks()
        moves = self.driver.begin_step(tokens, queued=queued, truth=truth)
        self._wait(self._begin(as_copies(moves, self.options.copy_dtype)))
        self._decided()

    def end(self) -> None:
        """The forward pass that `begin` began has run."""
        self.tally.end()
        self._uploads.wait(self.mover.pump)
        self.driver.end_step()

    def ask(self, routed: Routed, code_2N: torch.Tensor | None = None, tokens: int | None = None) -> Told:
        """Wait until the host knows what a router chose; copies go on meanwhile. `code_2N`: as `coded` makes it,
        where it was made already; `tokens`: how many of the N are tokens of the step, the first ones."""
        self.tally.mark("attention")
        message = self._uploads.read(coded(routed) if code_2N is None else code_2N, self.mover.pump)
        return Told.of(message, tokens, weighed=self._weighs)

    def compute(self, layer: int, routed: Routed, told: Told, groups: Groups | None = None) -> torch.Tensor:
        """[N, D] what stands in the place of the model's experts. `groups`: of all tokens that are not dropped, where
        somebody has made them already."""
        assert self.policy is not None, "start a policy before layers are computed"
        self._thinks()
        ids_T, dropped_T = told.ids_N.astype(np.int64), told.dropped_N
        if self._predicted is not None:
            routed = self._as_predicted(layer, routed)
            dropped_T = routed.dropped_N.cpu().numpy()
        moves = self.driver.routed(self._seen(layer, routed, told, self._recorded))
        wanted = self.policy.recipe.miss == "substitute"
        scores_TE = logits(self.routers[layer], routed.x_ND).float().cpu().numpy() if wanted else None
        executed = self.driver.executed(dropped_T, scores_TE)
        pairs = self.tally.pairs
        pairs.routed[layer] += len(dropped_T) - int(dropped_T.sum())
        pairs.skipped[layer] += executed.skipped
        pairs.substituted[layer] += executed.substituted
        step = self.tally.step
        step.needed += np.array([len(executed.hit), len(executed.awaited), len(executed.missed)])
        self._arrive()
        self._plan(as_copies(moves, self.options.copy_dtype))
        for copy in self.mover.pending:
            copy.late |= copy.transfer.layer == layer
        changed = executed.skipped or executed.substituted or self._predicted is not None
        run_T = np.where(dropped_T, EMPTY, executed.ids_TK[:, 0] if changed else ids_T)
        if changed:
            ids = np.full(len(routed.x_ND), self.patched.experts)
            ids[: len(run_T)] = np.where(run_T == EMPTY, self.patched.experts, run_T)
            ids_N = torch.from_numpy(ids).to(self.device)
            return self._waves(layer, replace(routed, ids_N=ids_N), run_T, None)
        return self._waves(layer, routed, run_T, groups)

    def directly(self, layer: int, routed: Routed) -> torch.Tensor:
        """[N, D] without a policy, a slot or a count: the layer's experts come from host memory for this once."""
        ids_N = routed.ids_N.masked_fill(routed.dropped_N, self.patched.experts)
        weights = self._matrices(self.host.rows(FULL)[layer].to(self.device))
        groups = group_pairs(ids_N, self.patched.experts)
        return grouped_mlp(routed.x_ND, groups, weights, routed.prob_N, kernel=self.options.kernel)

    def multiply(self, x_ND: torch.Tensor, groups: Groups, scale_N: torch.Tensor) -> torch.Tensor:
        """[N, D] the experts in slots, `groups.slot_X` saying where; zero for a token in no group."""
        return grouped_mlp(x_ND, groups, self._weights, scale_N, kernel=self.options.kernel)

    def _matrices(self, rows_SP: torch.Tensor) -> SlotWeights:
        shape = self.patched.shape
        return SlotWeights.of_rows(
            rows_SP, d_model=shape.d_model, d_ff=shape.d_ff, activation=self._activation, gated=False
        )

    def _load(self) -> None:
        """Fill the slots as the placement says."""
        residency = self.driver.residency
        if self.options.poison:
            self.slots.rows_SP.fill_(float("nan"))
        for slot in np.flatnonzero(residency.expert_GS[0] != EMPTY).tolist():
            layer, expert = int(residency.layer_GS[0, slot]), int(residency.expert_GS[0, slot])
            precision = PRECISIONS[residency.precision_LEG[layer, expert, 0]]
            placed = Transfer(layer=layer, expert=expert, source=HOST, target=0, slot=slot, precision=precision)
            carry(as_copies([placed], None), self.host, self.slots)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _as_predicted(self, layer: int, routed: Routed) -> Routed:
        assert self._predicted is not None and self._sequence_N is not None
        found = self._predicted.choose(self.driver.foresee(layer), layer, routed.x_ND, self._sequence_N)
        self.tally.pairs.mispredicted[layer] += int(((found.ids_N != routed.ids_N) & ~found.dropped_N).sum())
        return replace(routed, ids_N=found.ids_N, dropped_N=found.dropped_N, prob_N=found.weight_N)

    def _waves(self, layer: int, routed: Routed, ids_T: Ints, groups: Groups | None) -> torch.Tensor:
        """[N, D] the experts' outputs, zero where nothing is computed; in waves where not all find a slot at once.
        `routed.ids_N`, and on the host `ids_T`: what is computed, E (EMPTY) for nothing."""
        out_ND: torch.Tensor | None = None
        left_GE = np.bincount(ids_T[ids_T != EMPTY], minlength=self.patched.experts)[None].astype(np.int64)
        self.tally.step.computed.append(0)
        while True:
            host_ND: torch.Tensor | None = None
            if self.driver.cache is not None:
                left_GE, host_ND = self._fetch(layer, routed, ids_T, left_GE)
            tokens_E = self.driver.dispatch(left_GE)[0, :, 0]
            left_GE = left_GE - tokens_E
            whole = out_ND is None and host_ND is None and not left_GE.any()
            part_ND = self._compute(layer, routed, tokens_E, groups if whole else None)
            for more_ND in (host_ND, part_ND):  # exact: what one of them computes is zero in the others
                if more_ND is not None:
                    out_ND = more_ND if out_ND is None else out_ND + more_ND
            if not left_GE.any():
                return torch.zeros_like(routed.x_ND) if out_ND is None else out_ND

    def _fetch(self, layer: int, routed: Routed, ids_T: Ints, left_GE: Ints) -> tuple[Ints, torch.Tensor | None]:
        """Bring what the next wave needs, and compute what the host computes meanwhile: (what is left for the
        device, the host's part [N, D] of the output)."""
        fetch = self.driver.fetch(left_GE)
        started = self._begin(as_copies(fetch.moves, self.options.copy_dtype))
        self._release()
        awaited = {expert for expert, _ in fetch.awaited}
        under_way = [c for c in self.mover.pending if c.transfer.layer == layer and c.transfer.expert in awaited]
        host_ND = None
        if fetch.host_E.any():
            self._decided()
            host_ND = self._on_host(layer, routed, np.flatnonzero(fetch.host_E), ids_T)
            self.tally.mark("experts")
            self._thinks()
        self._wait([*under_way, *started])
        return np.where(fetch.host_E, 0, left_GE), host_ND

    def _compute(self, layer: int, routed: Routed, tokens_E: Ints, groups: Groups | None) -> torch.Tensor | None:
        """[N, D] the experts of one wave, all tokens of each; None where there are none."""
        expert_X = np.flatnonzero(tokens_E)
        if not len(expert_X):
            self._decided()
            return None
        residency, E = self.driver.residency, self.patched.experts
        code_X = residency.precision_LEG[layer, expert_X, 0]
        for code in np.unique(code_X[code_X > 0]).tolist():
            self.tally.pairs.precision[PRECISIONS[code]][layer] += int(tokens_E[expert_X[code_X == code]].sum())
        sent_E1 = np.full(E + 1, EMPTY, np.int32)  # no slot for what this wave leaves out, and none for no expert
        sent_E1[expert_X] = self.slot_E(layer)[expert_X]
        slot_E1 = self._uploads.send(sent_E1)
        slot_E = slot_E1[:E].clamp(min=0)
        if groups is None:
            ids_N = routed.ids_N.masked_fill(routed.dropped_N, E)
            ids_N = ids_N.masked_fill(slot_E1.index_select(0, ids_N) < 0, E)
            groups = group_pairs(ids_N, E, slot_E)
        self._decided()
        out_ND = self.multiply(routed.x_ND, replace(groups, slot_X=slot_E, every_slot=False), routed.prob_N)
        self.tally.mark("experts")
        self._thinks()
        self.tally.step.computed[-1] += int(tokens_E.sum())
        return out_ND

    def slot_E(self, layer: int) -> NDArray[np.int32]:
        """[E] the slot of every expert of the layer that has one."""
        residency, window = self.driver.residency, self.driver.cluster.slots_of(layer)
        span = slice(window.start, window.stop)
        mine = np.flatnonzero(residency.layer_GS[0, span] == layer)
        slot_E = np.full(self.patched.experts, EMPTY, np.int32)
        slot_E[residency.expert_GS[0, span][mine]] = mine + window.start
        return slot_E

    def _on_host(self, layer: int, routed: Routed, experts: NDArray[np.intp], ids_T: Ints) -> torch.Tensor:
        """[N, D] the output of these experts, computed by the host from its own memory; zero elsewhere."""
        out_ND = torch.zeros_like(routed.x_ND)
        for expert in experts.tolist():
            rows = torch.from_numpy(np.flatnonzero(ids_T == expert)).to(self.device)
            y_XD = self.host.compute(layer, expert, routed.x_ND[rows].cpu(), self.patched.activation).to(self.device)
            out_ND[rows] = y_XD * routed.prob_N[rows, None]
            self.tally.pairs.host[layer] += len(rows)
        return out_ND

    def _plan(self, copies: list[Copy]) -> None:
        """Begin what a decision asked for: blocking copies now, others after what the layer itself is missing, which
        goes before them on the link."""
        held = [copy for copy in copies if not copy.transfer.blocking] if self.driver.cache is not None else []
        self.mover.claim({copy.transfer.slot for copy in held})
        self._poisoned(held)
        self._held = held
        self._wait(self._begin([copy for copy in copies if copy not in held]))

    def _release(self) -> None:
        """Begin what was held back, unless its slot has been given away since."""
        held, self._held = self._held, []
        if held:
            self.mover.start([copy for copy in held if self.driver.residency.holds(copy.transfer)])

    def _begin(self, copies: list[Copy]) -> list[Copy]:
        """Start copies that the driver has begun; returns the blocking ones, which somebody has to wait for."""
        if not copies:
            return []
        self.mover.claim({copy.transfer.slot for copy in copies})
        self._poisoned(copies)
        self.mover.start(copies)
        return [copy for copy in copies if copy.transfer.blocking]

    def _poisoned(self, copies: list[Copy]) -> None:
        if self.options.poison and copies:
            self.slots.rows_SP[sorted({copy.transfer.slot for copy in copies})] = float("nan")

    def _wait(self, copies: list[Copy]) -> None:
        """What is computed next has these copies."""
        if not copies:
            return
        for copy in copies:
            copy.late = True
        self._thought()
        self.tally.mark("decide")
        self.mover.wait(copies)
        self._waited = True
        self._thinks()
        self._arrive()

    def _decided(self) -> None:
        """It is known what is computed next; until now the device waited for that, or for a copy."""
        self._thought()
        self.tally.mark("blocked" if self._waited else "decide")
        self._waited = False

    def _thinks(self) -> None:
        self._since = perf_counter()

    def _thought(self) -> None:
        self.tally.step.decide_s += perf_counter() - self._since

    def _arrive(self) -> None:
        for copy in self.mover.arrived():
            nbytes = self.host.bytes(copy.precision)
            self.tally.step.moved += nbytes
            self.tally.step.hidden += 0 if copy.late or not self.driver.residency.holds(copy.transfer) else nbytes
            self.driver.arrived(copy.transfer, None if copy.precision == copy.transfer.precision else copy.precision)
