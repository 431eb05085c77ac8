"""What the router will do: predictors and the one place where they are registered."""

from collections.abc import Callable
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
from moesim.predictors.oracle import Oracle
from moesim.predictors.paths import Paths
from moesim.predictors.ridge import OnlineRidge, Ridge


def _learned(module: str, name: str) -> Callable[[], Predictor]:
    """The class `name` of a module of `learned`, which imports torch, imported when one is made."""

    def make() -> Predictor:
        predictor: Predictor = getattr(import_module(f"moesim.predictors.learned.{module}"), name)()
        return predictor

    return make


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
    "sida": _learned("sida", "Sida"),
    "predictive-replication": _learned("replication", "Replication"),
    "gru": _learned("gru", "Gru"),
    "gate": _learned("gate_mlp", "Gate"),
    "gate-mlp": _learned("gate_mlp", "GateMlp"),
    "gate-mlp-online": _learned("gate_mlp", "GateMlpOnline"),
    "gate-attention": _learned("gate_attention", "GateAttention"),
    "path-transformer": _learned("path_transformer", "PathTransformer"),
    "oracle": Oracle,
}

__all__ = [
    "PREDICTORS",
    "Adapting",
    "Cost",
    "Forecast",
    "Frequency",
    "Ids",
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
