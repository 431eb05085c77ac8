"""What all learned predictors share: fitting, calibrated forecasts, cost, and files.

A family says what its net is (`built`), what it reads (`columns`) and what it says (`views`, `answer`). Shape letters:
T tokens, N tokens of a batch, L layers, E experts, K experts per token, V views (how far ahead a forecast looks), H
layers that a view can speak of, always the last ones.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Need,
    RouterSpec,
    Seen,
    from_probabilities,
    learnable,
    tokens_of,
)
from moesim.predictors.counting import Frequency
from moesim.predictors.learned.files import Facts, damaged, matching, read, write
from moesim.predictors.learned.requests import Batch, Requests
from moesim.predictors.learned.training import Budget, Training, initialise, train
from moesim.traces import LoadTable, TokenTable, load_LE

FORMAT = "moesim-predictor"
CALIBRATED = 2048
"""Held-out tokens that temperatures are fitted on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of the routers that are forecast."""

    experts: int
    top_k: int
    layers: int


Net = TypeVar("Net", bound=nn.Module)
Settings = TypeVar("Settings", bound=Any)


class Learned(ABC, Generic[Net, Settings]):
    """A predictor with a net, trained on recorded requests.

    Where the net has nothing to say (`answer` is None) the fitted frequency stands in. Probabilities are
    softmax(sharpness * logits), one sharpness (1 / temperature) for each view and layer, fitted on held-out requests.
    """

    name: str
    needs: tuple[Need, ...]
    version = 1
    """Of the net's layout; files of another one are refused."""
    defaults: Settings
    """Hyperparameters where none are given: a frozen dataclass of integers."""

    def __init__(self, settings: Settings | None = None, training: Training | None = None) -> None:
        self.settings: Settings = settings or self.defaults
        self.training = training or Training()
        self.seconds = 0.0
        """That the last `fit` took."""

    @property
    @abstractmethod
    def budget(self) -> Budget:
        """What training takes by default; `shape` and `sizes` are known by then."""

    @abstractmethod
    def sizes_of(self, table: TokenTable, router: RouterSpec) -> dict[str, int]:
        """Sizes of the net that follow from the recording, beside E, K and L."""

    @abstractmethod
    def built(self) -> Net:
        """The net for `shape`, `sizes` and `settings`. Called on torch's meta device: values come later."""

    def begin(self, table: TokenTable, router: RouterSpec) -> None:
        """Put into the net what is known before training: buffers, special initial values."""

    @abstractmethod
    def columns(self, table: TokenTable) -> dict[str, torch.Tensor]:
        """[T, ...] each: what the net reads. The harness adds "ids", [T, L, K]."""

    @abstractmethod
    def views(self, batch: Batch) -> Iterator[torch.Tensor]:
        """[N, H, E] logits of the last H layers, for each of the V views."""

    @property
    @abstractmethod
    def view_count(self) -> int:
        """V."""

    @property
    def trained_views(self) -> int:
        """Views that the loss looks at, the first ones."""
        return 1

    @abstractmethod
    def answer(self, seen: Seen, layer: int, queued: bool) -> tuple[torch.Tensor, int] | None:
        """[T, E] logits, and their view; None where the net cannot speak of `layer`. Keeps in `seen.memo`, under a key
        that begins with `name`, what the next layer needs again."""

    @abstractmethod
    def flops(self) -> float:
        """Arithmetic of a forecast for one token and layer; a pass that serves all layers counts by its share."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross entropy against the K chosen experts, each with weight 1/K."""
        views = islice(self.views(batch), self.trained_views)
        return torch.stack([cross_entropy(logits_NHE, batch.columns["ids"]) for logits_NHE in views]).mean()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Train as `training` says. Raises InputError: something that it `needs` is missing, or the checkpoint is not
        of this training; KeyboardInterrupt on Ctrl-C, when the checkpoint has been written."""
        start = time.perf_counter()
        table = learnable(table, router, self)
        self.shape = Shape(experts=router.num_experts, top_k=router.top_k, layers=table.num_layers)
        self.sizes = self.sizes_of(table, router)
        with torch.device("meta"):
            self.net = self.built()
        initialise(self.net, self.training.seed)
        self.begin(table, router)
        self._settle(load_LE(table.topk_ids, router.num_experts))
        columns = {"ids": torch.from_numpy(table.topk_ids.astype(np.int32)), **self.columns(table)}
        data = Requests(columns, table.request, table.position, seed=self.training.seed)
        if self.view_count and any(True for _ in self.net.parameters()):
            facts = {**self._facts(), "sizes": self.sizes, "data": _digest(table)}
            train(self.net, self.loss, data, self.training, self.budget, facts)
        self.sharpness_VL = self._calibrated(data)
        self.seconds = time.perf_counter() - start

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Calibrated probabilities of each token. Raises ValueError where the next step is not known yet."""
        tokens_of(seen, queued)
        with torch.no_grad():
            answer = self.answer(seen, layer, queued)
            if answer is None:
                return self._prior.forecast(seen, layer, queued=queued)
            logits_TE, view = answer
            p_TE = (logits_TE.double() * float(self.sharpness_VL[view, layer])).softmax(dim=1)
        return from_probabilities(p_TE.cpu().numpy(), self.shape.top_k)

    def cost(self) -> Cost:
        """`flops`, and the trained parameters."""
        return Cost(flops=self.flops(), parameters=sum(p.numel() for p in self.net.parameters()))

    def save(self, path: Path) -> None:
        """Write the fitted predictor, vocabulary and gates included. Raises InputError where that is impossible."""
        own = {"load_LE": torch.from_numpy(self.load_LE), "sharpness_VL": torch.from_numpy(self.sharpness_VL)}
        write(path, own | _prefixed(self.net), {**self._facts(), "sizes": self.sizes})

    def load(self, path: Path, router: RouterSpec, layers: int) -> None:
        """Take a saved predictor in place of `fit`, with its hyperparameters. Raises InputError: missing, damaged, of
        another predictor, or not for what `router` and `layers` say; what was fitted before is lost then."""
        self.shape = Shape(experts=router.num_experts, top_k=router.top_k, layers=layers)
        wanted = {name: value for name, value in self._facts().items() if name != "settings"}
        tensors, facts = read(path, wanted)
        defaults = asdict(self.defaults)
        self.settings = type(self.defaults)(**_integers(path, facts, "settings", set(defaults)))
        self.sizes = _integers(path, facts, "sizes")
        try:
            with torch.device("meta"):
                self.net = self.built()
                own_LE = torch.empty((layers, self.shape.experts), dtype=torch.int64)
                own_VL = torch.empty((self.view_count, layers), dtype=torch.float64)
        except (KeyError, ValueError, ArithmeticError, RuntimeError, AssertionError):
            raise damaged(path, "its sizes do not fit together") from None
        matching(path, tensors, {"load_LE": own_LE, "sharpness_VL": own_VL} | _prefixed(self.net))
        self.net.load_state_dict({name: tensors[f"net.{name}"] for name in self.net.state_dict()}, assign=True)
        self._settle(tensors["load_LE"].numpy())
        self.sharpness_VL = tensors["sharpness_VL"].numpy()

    def _settle(self, counted_LE: NDArray[np.int64]) -> None:
        """The net onto its device, and the frequency from loads."""
        self.device = self.training.where()
        self.net.to(self.device)
        self.load_LE = counted_LE
        self._prior = Frequency()
        loads = LoadTable(load=counted_LE[None], step=np.zeros(1, np.int32), phase=np.zeros(1, np.uint8))
        self._prior.fit(loads, RouterSpec(num_experts=self.shape.experts, top_k=self.shape.top_k))

    def _facts(self) -> Facts:
        shape = {"E": self.shape.experts, "K": self.shape.top_k, "L": self.shape.layers}
        settings = asdict(self.settings)
        return {"format": FORMAT, "predictor": self.name, "version": self.version, **shape, "settings": settings}

    def _calibrated(self, data: Requests) -> Floats:
        """[V, L] sharpness of each view and layer; 1 where a view does not reach."""
        sharpness_VL = np.ones((self.view_count, self.shape.layers))
        batch = data.batch(data.groups(data.check, CALIBRATED)[0], self.device)
        with torch.no_grad():
            for sharpness_L, logits_NHE in zip(sharpness_VL, self.views(batch), strict=True):
                sharpness_L[-logits_NHE.shape[1] :] = fitted_sharpness(logits_NHE, batch.columns["ids"]).cpu().numpy()
        return sharpness_VL


def cross_entropy(logits_NHE: torch.Tensor, ids_NLK: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax at the K chosen experts of the last H layers."""
    chosen_NHK = ids_NLK[:, -logits_NHE.shape[1] :].long()
    return (logits_NHE.logsumexp(dim=-1) - logits_NHE.gather(-1, chosen_NHK).mean(dim=-1)).mean()


def fitted_sharpness(logits_NHE: torch.Tensor, ids_NLK: torch.Tensor) -> torch.Tensor:
    """[H] the factor on the logits that minimises the cross entropy, within 1/64 and 64.

    Convex in the factor; Newton steps of at most a factor of 2. Source: temperature scaling (Guo et al., ICML 2017).
    """
    logits_NHE = logits_NHE.double()
    chosen_NHK = ids_NLK[:, -logits_NHE.shape[1] :].long()
    target_H = logits_NHE.gather(-1, chosen_NHK).mean(dim=(0, 2))
    sharpness_H = torch.ones_like(target_H)
    for _ in range(12):
        p_NHE = (logits_NHE * sharpness_H[:, None]).softmax(dim=-1)
        mean_NH = (p_NHE * logits_NHE).sum(dim=-1)
        spread_H = ((p_NHE * logits_NHE.square()).sum(dim=-1) - mean_NH.square()).mean(dim=0)
        newton_H = sharpness_H - (mean_NH.mean(dim=0) - target_H) / spread_H.clamp(min=1e-12)
        sharpness_H = newton_H.clamp(sharpness_H / 2, sharpness_H * 2).clamp(1 / 64, 64)
    return sharpness_H


def kept(seen: Seen, key: tuple[str, bool], make: Callable[[], Any]) -> Any:
    """What `make` returns, made once per step; `key` is the predictor's name and whether it is of the queued step."""
    if key not in seen.memo:
        seen.memo[key] = make()
    return seen.memo[key]


def matrix_flops(*modules: nn.Module | torch.Tensor) -> float:
    """Arithmetic of every matrix in `modules` times a vector: 2 for each number."""
    tensors = [t for m in modules for t in ([m] if isinstance(m, torch.Tensor) else m.parameters())]
    return float(sum(2 * t.numel() for t in tensors if t.ndim >= 2))


def _prefixed(net: nn.Module) -> dict[str, torch.Tensor]:
    return {f"net.{name}": tensor for name, tensor in net.state_dict().items()}


def _integers(path: Path, facts: Facts, key: str, names: set[str] | None = None) -> dict[str, int]:
    """The fact `key`, a dict of integers; with just these `names`, where given."""
    found = facts.get(key)
    if not isinstance(found, dict) or (names is not None and found.keys() != names):
        raise damaged(path, f"its {key} are missing or not these")
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in found.values()):
        raise damaged(path, f"its {key} are no sizes")
    return found


def _digest(table: TokenTable) -> str:
    """Of the routing that is learned, so that a checkpoint is not taken up with other requests."""
    digest = hashlib.blake2b(digest_size=16)
    for column in (table.topk_ids, table.request, table.position):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
