"""Offloading for real, on one device: experts in host memory, slots on the device, the model's own router deciding.

An `Offload` takes the experts out of one stack of a Switch model and stands in their place. Every forward pass of the
stack is a step of the driver that the simulator uses, too, whoever calls it: a scenario's step, `model(...)` or
`generate`. What is missing is copied, run on the host, replaced or left out, as the policy says. Knows nothing about
files or commands. Shape letters: B sequences, S positions, N real tokens, D = d_model, E experts, L MoE layers.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moesim.backend.experts import ExpertSlots
from moesim.backend.predicted import PredictedRouting, logits
from moesim.backend.slots import FULL, Copy, HostExperts, Inline, Mover, Threaded, as_copies, carry
from moesim.backend.switch import Routed, patch, sparse_layers
from moesim.backend.tally import Tally
from moesim.predictors import RoutedLayer
from moesim.sim.dispatch import Ints
from moesim.sim.driver import Driver, Sink
from moesim.sim.offload import Cheaper, Executed
from moesim.sim.policies import Policy
from moesim.sim.residency import EMPTY, HOST, PRECISIONS, Transfer
from moesim.traces import InputError, StepTokens, id_dtype

HALF_MAX = float(torch.finfo(torch.float16).max)
LOOKAHEAD_WIDTH = 4
"""As recordings have it (traces/routers.py)."""
Truth = tuple[NDArray[np.integer], NDArray[np.integer] | None]


class Offload:
    """The experts of one stack, offloaded. `start` a policy, call the model, then `finish`.

    `asynchronous`: copies run beside the computation (a thread; on a GPU with a stream of its own); otherwise they are
    there at once and a run repeats to the bit. `poison`: slots hold NaN from the moment they are given away until their
    copy has come, so that computing too early shows. `copy_dtype`: copies in full precision are made in it instead.
    Raises InputError where the stack has no MoE layers.
    """

    def __init__(
        self,
        model: Any,
        stack: Literal["encoder", "decoder"],
        device: torch.device,
        *,
        asynchronous: bool = False,
        poison: bool = False,
        copy_dtype: str | None = None,
    ) -> None:
        module = getattr(model, stack)
        layers: list[Any] = list(sparse_layers(module).values())
        self.routers: list[Any] = [layer.mlp.router for layer in layers]
        self.patched = patch(module, self._exchange)
        self.host = HostExperts(self.patched.weights_LE, self.patched.shape, pinned=device.type == "cuda")
        self.device = device
        self.requests: NDArray[np.integer] | None = None
        """[B] numbers of the requests in the batches to come, ascending; None: 0, 1, 2, ..."""
        self._asynchronous, self._poison, self._copy_dtype = asynchronous, poison, copy_dtype
        self._policy: Policy | None = None
        self._expected: tuple[StepTokens | None, Truth | None] = (None, None)
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def start(
        self,
        policy: Policy,
        sink: Sink | None = None,
        *,
        cheaper: Cheaper | None = None,
        factor_L: NDArray[np.floating] | None = None,
    ) -> None:
        """Begin a run of `policy` from its placement. `cheaper` is asked by policies that run experts on the host;
        `factor_L` scales experts that were predicted (predicted.py).

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
        self._needs = policy.predictor.needs if policy.predictor else ()
        self._policy = policy
        self.driver = Driver(policy, sink, cheaper if policy.recipe.miss == "cpu" else None)
        self.slots = ExpertSlots(c.gpu_slots, self.patched.shape, self.patched.activation, self.device)
        self.tally = Tally(c.layers, self._synchronize)
        self._load()
        self.mover: Mover = (Threaded if self._asynchronous else Inline)(self.host, self.slots)

    def expect(self, queued: StepTokens | None = None, truth: Truth | None = None) -> None:
        """Tell what is known beside the next forward pass: the step that waits behind it, and for oracles the truth."""
        self._expected = (queued, truth)

    def finish(self) -> None:
        """End the run: no copy is under way when it returns."""
        self.mover.drain()
        self._policy = None

    def _load(self) -> None:
        """Fill the slots as the placement says."""
        residency = self.driver.residency
        if self._poison:
            self.slots.rows_SP.fill_(float("nan"))
        for slot in np.flatnonzero(residency.expert_GS[0] != EMPTY).tolist():
            layer, expert = int(residency.layer_GS[0, slot]), int(residency.expert_GS[0, slot])
            precision = PRECISIONS[residency.precision_LEG[layer, expert, 0]]
            placed = Transfer(layer=layer, expert=expert, source=HOST, target=0, slot=slot, precision=precision)
            carry(as_copies([placed], None), self.host, self.slots)

    def _before(self, _module: Any, _args: Any, given: dict[str, Any]) -> None:
        assert self._policy is not None, "start a policy before the model is called"
        tokens = self._tokens(given)
        (queued, truth), self._expected = self._expected, (None, None)
        self.tally.begin(len(tokens))
        with self.tally.phase("decide"):
            moves = self.driver.begin_step(tokens, queued=queued, truth=truth)
        self._begin(moves)

    def _after(self, _module: Any, _args: Any, _output: Any) -> None:
        self.tally.end()
        self.driver.end_step()

    def _tokens(self, given: dict[str, Any]) -> StepTokens:
        """The real tokens of a batch, sequence by sequence; notes where they lie in it."""
        ids_BS, mask_BX = given["input_ids"], given.get("attention_mask")
        # transformers renamed it.
        past = given["cache"] if given.get("cache") is not None else given.get("past_key_values")
        begin, (B, S) = int(past.get_seq_length()) if past is not None else 0, ids_BS.shape
        # With a cache the mask is as long as all that has been read; where there is none, everything is real.
        real_BS = torch.ones_like(ids_BS) if mask_BX is None else mask_BX[:, -S:].long()
        place_BS = begin + torch.arange(S, device=ids_BS.device).expand(B, S)
        index_N = real_BS.reshape(-1).nonzero().reshape(-1)
        self.patched.real.index_N = index_N
        self._sequence_N = index_N // S
        request_B = np.arange(B) if self.requests is None else self.requests
        return StepTokens(
            request=request_B[self._sequence_N.cpu().numpy()].astype(np.int32),
            position=place_BS.reshape(-1)[index_N].cpu().numpy().astype(np.int32),
            token_id=ids_BS.reshape(-1)[index_N].cpu().numpy().astype(np.int32),
        )

    def _exchange(self, layer: int, routed: Routed) -> torch.Tensor:
        """[N, D] what stands in the place of the model's experts."""
        self._synchronize()
        assert self._policy is not None
        dropped_N, weight_N = routed.dropped_N, routed.prob_N
        with self.tally.phase("decide"):
            if self._predicted is not None:
                told = self._predicted.choose(self.driver.foresee(layer), layer, routed.x_ND, self._sequence_N)
                self.tally.pairs.mispredicted[layer] += int(((told.ids_N != routed.ids_N) & ~told.dropped_N).sum())
                dropped_N, weight_N = told.dropped_N, told.weight_N
            moves = self.driver.routed(self._seen(layer, routed))
            dropped_T = dropped_N.cpu().numpy()
            wanted = self._policy.recipe.miss == "substitute"
            scores_TE = logits(self.routers[layer], routed.x_ND).float().cpu().numpy() if wanted else None
            executed = self.driver.executed(dropped_T, scores_TE)
        self._begin(moves)
        self._count(layer, dropped_T, executed)
        self._arrive()
        for copy in self.mover.pending:
            copy.late |= copy.transfer.layer == layer
        out_ND = self._waves(layer, routed.x_ND, np.where(dropped_T, EMPTY, executed.ids_TK[:, 0]))
        return out_ND * weight_N[:, None]

    def _ids(self, ids_N: torch.Tensor) -> NDArray[np.integer]:
        return self._small(ids_N)[:, None]

    def _small(self, ids: torch.Tensor) -> NDArray[np.integer]:
        """As a recording holds them."""
        found: NDArray[np.uint8 | np.uint16] = ids.cpu().numpy().astype(id_dtype(self.patched.experts))
        return found

    def _seen(self, layer: int, routed: Routed) -> RoutedLayer:
        """What the router did, as a recording would hold it; what the predictor does not need is not worked out."""
        given: NDArray[np.float16] | None = None
        ahead: NDArray[np.integer] | None = None
        if "router_input" in self._needs:
            given = routed.x_ND.float().clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy()
        if "lookahead" in self._needs:
            ahead = self._small(self._ahead(layer, routed.x_ND))
        return RoutedLayer(
            ids=self._ids(routed.ids_N),
            weights=routed.prob_N.float().cpu().numpy().astype(np.float16)[:, None],
            lookahead=ahead,
            router_input=given,
        )

    def _ahead(self, layer: int, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, D, M] what the gates of all later layers say of this layer's router input; zero past the last."""
        width = min(LOOKAHEAD_WIDTH, self.patched.experts)
        told = torch.zeros(len(x_ND), max(len(self.routers) - 1, 1), width, dtype=torch.long, device=x_ND.device)
        for distance, router in enumerate(self.routers[layer + 1 :]):
            told[:, distance] = logits(router, x_ND).topk(width, dim=-1).indices
        return told

    def _waves(self, layer: int, x_ND: torch.Tensor, ids_T: Ints) -> torch.Tensor:
        """[N, D] the experts' outputs, zero where nothing is computed; in waves where not all find a slot at once."""
        out_ND = torch.zeros_like(x_ND)
        left_GE = np.bincount(ids_T[ids_T != EMPTY], minlength=self.patched.experts)[None].astype(np.int64)
        self.tally.computed.append(0)
        while True:
            if self.driver.cache is not None:
                left_GE = self._fetch(layer, x_ND, ids_T, left_GE, out_ND)
            with self.tally.phase("decide"):
                tokens_E = self.driver.dispatch(left_GE)[0, :, 0]
            if tokens_E.any():
                self._compute(layer, x_ND, ids_T, tokens_E, out_ND)
            left_GE = left_GE - tokens_E
            if not left_GE.any():
                return out_ND

    def _fetch(self, layer: int, x_ND: torch.Tensor, ids_T: Ints, left_GE: Ints, out_ND: torch.Tensor) -> Ints:
        """Bring what the next wave needs, and compute what the host computes meanwhile; returns what is left for the
        device."""
        with self.tally.phase("decide"):
            fetch = self.driver.fetch(left_GE)
        started = self._begin(fetch.moves, wait=False)
        for expert in np.flatnonzero(fetch.host_E).tolist():
            rows = torch.from_numpy(np.flatnonzero(ids_T == expert)).to(x_ND.device)
            with self.tally.phase("experts"):
                out_ND[rows] = self._on_host(layer, expert, x_ND[rows])
            self.tally.pairs.host[layer] += len(rows)
        awaited = {expert for expert, _ in fetch.awaited}
        under_way = [c for c in self.mover.pending if c.transfer.layer == layer and c.transfer.expert in awaited]
        self._wait([*under_way, *started])
        return np.where(fetch.host_E, 0, left_GE)

    def _compute(self, layer: int, x_ND: torch.Tensor, ids_T: Ints, tokens_E: Ints, out_ND: torch.Tensor) -> None:
        """The experts of one wave, all tokens of each."""
        residency, (expert_X,) = self.driver.residency, np.nonzero(tokens_E)
        tokens_X, code_X = tokens_E[expert_X], residency.precision_LEG[layer, expert_X, 0]
        for code in np.unique(code_X[code_X > 0]).tolist():
            self.tally.pairs.precision[PRECISIONS[code]][layer] += int(tokens_X[code_X == code].sum())
        slot_X = [residency.slot(layer, expert, 0) for expert in expert_X.tolist()]
        mine = np.flatnonzero(np.isin(ids_T, expert_X))
        order = torch.from_numpy(mine[np.argsort(ids_T[mine], kind="stable")]).to(x_ND.device)
        with self.tally.phase("experts"):
            out_ND[order] = self.slots.forward(x_ND[order], slot_X, tokens_X.tolist())
        self.tally.computed[-1] += len(mine)

    def _on_host(self, layer: int, expert: int, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] one expert's output, computed by the host from its own memory."""
        shape, row_P = self.patched.shape, self.host.rows(FULL)[layer, expert]
        half = shape.params // 2
        wi_P, wo_P = row_P[:half], row_P[half:]
        inner_NF = self.patched.activation(functional.linear(x_ND.cpu(), wi_P.view(shape.d_ff, shape.d_model)))
        return functional.linear(inner_NF, wo_P.view(shape.d_model, shape.d_ff)).to(x_ND.device)

    def _count(self, layer: int, dropped_T: NDArray[np.bool_], executed: Executed) -> None:
        pairs = self.tally.pairs
        pairs.routed[layer] += int((~dropped_T).sum())
        pairs.skipped[layer] += executed.skipped
        pairs.substituted[layer] += executed.substituted

    def _begin(self, moves: list[Transfer], *, wait: bool = True) -> list[Copy]:
        """Start copies that the driver has begun; returns the blocking ones, waited for unless somebody does it
        later."""
        if not moves:
            return []
        copies = as_copies(moves, self._copy_dtype)
        slots = {copy.transfer.slot for copy in copies}
        self.mover.claim(slots)
        if self._poison:
            self.slots.rows_SP[sorted(slots)] = float("nan")
        self.mover.start(copies)
        blocking = [copy for copy in copies if copy.transfer.blocking]
        if wait:
            self._wait(blocking)
        return blocking

    def _wait(self, copies: list[Copy]) -> None:
        if not copies:
            return
        for copy in copies:
            copy.late = True
        with self.tally.phase("blocked"):
            self.mover.wait(copies)
        self._arrive()

    def _arrive(self) -> None:
        for copy in self.mover.arrived():
            nbytes = self.host.bytes(copy.precision)
            self.tally.moved += nbytes
            self.tally.hidden += 0 if copy.late or not self.driver.residency.holds(copy.transfer) else nbytes
            self.driver.arrived(copy.transfer, None if copy.precision == copy.transfer.precision else copy.precision)

    def _synchronize(self) -> None:
        """Wait for the computation, not for copies beside it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
