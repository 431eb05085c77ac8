"""What the router will do: predictors and the one place where they are registered."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from moesim.predictors.base import (
    Adapting,
    Cost,
    Forecast,
    Ids,
    Need,
    PastStep,
    Predictor,
    RoutedLayer,
    RouterSpec,
    Seen,
    from_inclusion,
    from_probabilities,
    missing,
    routed_layer,
    tokens_of,
)
from moesim.predictors.counting import Frequency, Markov, TokenTableLookup, Window
from moesim.predictors.draft import DraftGate
from moesim.predictors.gates import CrossGate, StackedGate
from moesim.predictors.history import Distribution, Ema, PreviousToken
from moesim.predictors.markov2 import Markov2
from moesim.predictors.matrices import NearestMatrix
from moesim.predictors.mixture import Mixture
from moesim.predictors.neighbours import Neighbours
from moesim.predictors.neighbours_online import OnlineNeighbours
from moesim.predictors.oracle import Oracle
from moesim.predictors.paths import Paths
from moesim.predictors.ridge import OnlineRidge, Ridge


@dataclass(frozen=True, slots=True)
class Learned:
    """Makes the predictor `name` of a module of `learned`, which imports torch, imported when one is made; fitting it
    takes minutes on large recordings."""

    module: str
    name: str

    def __call__(self) -> Predictor:
        """An unfitted one."""
        predictor: Predictor = getattr(import_module(f"moesim.predictors.learned.{self.module}"), self.name)()
        return predictor


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "frequency": Frequency,
    "previous": lambda: Window(1, "previous"),
    "window": Window,
    "markov": Markov,
    "token-table": TokenTableLookup,
    "ema": Ema,
    "distribution": Distribution,
    "previous-token": PreviousToken,
    "markov-2": Markov2,
    "path": Paths,
    "nearest-matrix": NearestMatrix,
    "cross-gate": CrossGate,
    "cross-gate-over": lambda: CrossGate(over=True, name="cross-gate-over"),
    "stacked-gate": StackedGate,
    "draft-gate": DraftGate,
    "mixture": Mixture,
    "ridge": Ridge,
    "ridge-online": OnlineRidge,
    "neighbours": Neighbours,
    "neighbours-online": OnlineNeighbours,
    "sida": Learned("sida", "Sida"),
    "predictive-replication": Learned("replication", "Replication"),
    "gru": Learned("gru", "Gru"),
    "gate": Learned("gate_mlp", "Gate"),
    "gate-mlp": Learned("gate_mlp", "GateMlp"),
    "gate-mlp-online": Learned("gate_mlp", "GateMlpOnline"),
    "gate-attention": Learned("gate_attention", "GateAttention"),
    "routing-net": Learned("routing_net", "RoutingPredictor"),
    "path-transformer": Learned("path_transformer", "PathTransformer"),
    "oracle": Oracle,
}

__all__ = [
    "PREDICTORS",
    "Adapting",
    "Cost",
    "Forecast",
    "Frequency",
    "Ids",
    "Learned",
    "Markov",
    "Need",
    "Oracle",
    "PastStep",
    "Predictor",
    "RoutedLayer",
    "RouterSpec",
    "Seen",
    "TokenTableLookup",
    "Window",
    "from_inclusion",
    "from_probabilities",
    "missing",
    "routed_layer",
    "tokens_of",
]
