"""What the router will do: predictors and the one place where they are registered."""

from collections.abc import Callable

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
from moesim.predictors.oracle import Oracle

PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "frequency": Frequency,
    "previous": lambda: Window(1, "previous"),
    "window": Window,
    "markov": Markov,
    "token-table": TokenTableLookup,
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
