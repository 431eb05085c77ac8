"""The training loop that all learned predictors share: mini-batches, best epoch, checkpoints, Ctrl-C.

What is random in step n depends on the seed and n alone, so the number of the step is all the random state there is,
and a training that goes on from a checkpoint ends, on the CPU, with the bits of one that was never interrupted. Knows
nothing about routing: the loss is the predictor's.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moesim.predictors.learned.files import Facts, damaged, matching, read, write
from moesim.predictors.learned.requests import Batch, Requests
from moesim.traces import InputError

FORMAT = "moesim-training"
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; then it falls to 0 in a line."""
WEIGHT_DECAY = 0.01
PATIENCE = 5
"""Epochs without a better one before training ends."""
CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a family takes by default."""

    layer_tokens: int
    """Tokens times layers that are learned from, whatever the recording's size; this gives the epochs, at most 60."""
    learning_rate: float = 3e-3
    batch_tokens: int = 1024
    """At most: a small recording is cut into 24 mini-batches, of 128 tokens or more."""

    def epochs(self, tokens: int, layers: int) -> int:
        """For `tokens` to train on."""
        return min(60, -(-self.layer_tokens // (tokens * layers)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train. Raises InputError for a negative seed or number, or a device that torch does not have."""

    seed: int = 0
    epochs: int | None = None
    """None: the family's own; so with the next two."""
    learning_rate: float | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    """auto: CUDA where there is a device, else the CPU."""
    progress: Callable[[int, int, float], None] | None = None
    """Told after each step: steps done, steps in all, this step's loss."""
    checkpoint: Path | None = None
    """Written while training, read before it; a finished one saves the training."""
    checkpoint_s: float = 30.0
    """Seconds between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("seed", "epochs", "learning_rate", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name == "batch_tokens")):
                raise InputError(f"{name} of a training must not be {value}")

    def plan(self, budget: Budget, data: Requests) -> _Plan:
        """What `budget` makes of the requests, changed where this says so."""
        tokens, layers = int(data.tokens_P[data.fit].sum()), data.columns["ids"].shape[1]
        batch_tokens = min(budget.batch_tokens, max(128, tokens // 24))
        return _Plan(
            epochs=budget.epochs(tokens, layers) if self.epochs is None else self.epochs,
            learning_rate=budget.learning_rate if self.learning_rate is None else self.learning_rate,
            batch_tokens=batch_tokens if self.batch_tokens is None else self.batch_tokens,
        )

    def where(self) -> torch.device:
        """The device to train on. Raises InputError where there is no such device."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"cannot train on {self.device!r}: {str(error).splitlines()[0][:120]}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The numbers of one training."""

    epochs: int
    learning_rate: float
    batch_tokens: int


def initialise(net: nn.Module, seed: int) -> None:
    """Give memory and values to a net that was built on the meta device: biases 0, gains (vectors named weight) 1,
    matrices, which are summed over their last dimension, uniform with variance 1/fan-in; the rest 0."""
    net.to_empty(device="cpu")
    generator = generator_of(seed, 0)
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        with torch.no_grad():
            if values.ndim >= 2 and values.is_floating_point() and "bias" not in name:
                bound = math.sqrt(3 / values.shape[-1])
                values.uniform_(-bound, bound, generator=generator)
            else:
                values.fill_(1 if values.ndim == 1 and name.endswith("weight") else 0)


def generator_of(seed: int, number: int) -> torch.Generator:
    """The random numbers of step `number` of a training with `seed`, on the CPU."""
    (state,) = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))


def train(
    net: nn.Module,
    loss: Callable[[Batch], torch.Tensor],
    data: Requests,
    training: Training,
    budget: Budget,
    facts: Facts,
) -> None:
    """Minimise `loss` over `data.fit`; `net` ends with the parameters that were best on `data.check` after an epoch.

    `facts` say what is trained on what; a checkpoint with other ones raises InputError. On Ctrl-C the step is ended,
    the checkpoint written, and KeyboardInterrupt raised.
    """
    session = _Session(net, loss, data, training, training.plan(budget, data), facts)
    session.resume()
    with _interrupts_wait() as interrupted:
        try:
            while not session.finished:
                session.advance()
                if interrupted.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            session.keep()
            raise
    session.keep()
    session.take_best()


@dataclass(slots=True)
class _Session:
    """A training under way: all that a checkpoint holds, and how it goes on."""

    net: nn.Module
    loss: Callable[[Batch], torch.Tensor]
    data: Requests
    training: Training
    plan: _Plan
    facts: Facts
    optimiser: torch.optim.AdamW = field(init=False)
    best: dict[str, torch.Tensor] = field(init=False)
    steps_per_epoch: int = field(init=False)
    step: int = 0
    best_loss: float = math.inf
    stale: int = 0
    """Epochs since the best one."""
    _device: torch.device = field(init=False)
    _kept_at: float = field(init=False)
    _epoch: tuple[int, list[NDArray[np.intp]]] = (-1, [])

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=0.0, weight_decay=WEIGHT_DECAY, fused=True)
        for p in self.net.parameters():  # its moments are made now, so that a checkpoint has them at every step
            step = torch.zeros((), device=p.device)
            zeros = torch.zeros_like(p, requires_grad=False)
            self.optimiser.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        self.steps_per_epoch = len(self.data.groups(self.data.fit, self.plan.batch_tokens))
        self.best = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        self._device = next(self.net.parameters()).device
        self._kept_at = time.monotonic()

    @property
    def total(self) -> int:
        return self.plan.epochs * self.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.step >= self.total or self.stale >= PATIENCE

    def advance(self) -> None:
        """One step; after the last one of an epoch, see whether it was the best."""
        epoch, at = divmod(self.step, self.steps_per_epoch)
        pieces = self._groups(epoch)[at]
        loss = self._learn(pieces)
        self.step += 1
        if self.step % self.steps_per_epoch == 0:
            self._judge()
        if self.training.progress:
            self.training.progress(self.step, self.total, loss)
        if time.monotonic() - self._kept_at > self.training.checkpoint_s:
            self.keep()

    def keep(self) -> None:
        """Write the checkpoint, where one is wanted."""
        self._kept_at = time.monotonic()
        if self.training.checkpoint:
            state = {"step": self.step, "best_loss": self.best_loss, "stale": self.stale}
            write(self.training.checkpoint, self._tensors(), {**self._facts(), "state": state})

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one. Raises InputError: damaged, or of another training."""
        path = self.training.checkpoint
        if path is None or not path.exists():
            return
        tensors, facts = read(path, self._facts())
        match facts.get("state"):
            case {"step": int(step), "best_loss": float(best_loss), "stale": int(stale)} if 0 <= step <= self.total:
                self.step, self.best_loss, self.stale = step, best_loss, stale
            case _:
                raise damaged(path, "its state is not one")
        now = self._tensors()
        matching(path, tensors, now)
        with torch.no_grad():
            for name, tensor in now.items():
                tensor.copy_(tensors[name])

    def take_best(self) -> None:
        """Leave the net as it was after its best epoch."""
        self.net.load_state_dict(self.best)

    def _groups(self, epoch: int) -> list[NDArray[np.intp]]:
        if self._epoch[0] != epoch:
            order = np.random.default_rng((self.training.seed, epoch)).permutation(self.data.fit)
            self._epoch = epoch, self.data.groups(order, self.plan.batch_tokens)
        return self._epoch[1]

    def _learn(self, pieces: NDArray[np.intp]) -> float:
        done = (self.step + 1) / (self.total + 1)
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.learning_rate * min(1.0, done / WARM_UP) * (1 - done)
        noise = generator_of(self.training.seed, self.step + 1)
        loss = self.loss(self.data.batch(pieces, self._device, noise))
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        self.optimiser.step()
        return float(loss.detach())

    def _judge(self) -> None:
        total = 0.0
        with torch.no_grad():
            for pieces in self.data.groups(self.data.check, self.plan.batch_tokens):
                batch = self.data.batch(pieces, self._device)
                total += float(self.loss(batch)) * len(batch)
        self.stale += 1
        if total < self.best_loss:
            self.best_loss, self.stale = total, 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}

    def _facts(self) -> Facts:
        how = {"seed": self.training.seed, "epochs": self.plan.epochs, "learning_rate": self.plan.learning_rate}
        return {"format": FORMAT, **self.facts, **how, "batch_tokens": self.plan.batch_tokens}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that change: now, best, and the optimiser's, by parameter."""
        moments = {
            f"{key}.{i}": value
            for i, p in enumerate(self.net.parameters())
            for key, value in self.optimiser.state[p].items()
        }
        now = {f"now.{name}": tensor for name, tensor in self.net.state_dict().items()}
        return now | {f"best.{name}": tensor for name, tensor in self.best.items()} | moments


@contextmanager
def _interrupts_wait() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising wherever the program is; only the main thread is ever interrupted."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
