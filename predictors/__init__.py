"""What the router will do: predictors and the one place where they are registered."""

from collections.abc import Callable

from moesim.predictors.base import Forecast, Ids, PastStep, Predictor, Seen, from_probabilities, tokens_of
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
    "Forecast",
    "Frequency",
    "Ids",
    "Markov",
    "Oracle",
    "PastStep",
    "Predictor",
    "Seen",
    "TokenTableLookup",
    "Window",
    "from_probabilities",
    "tokens_of",
]
