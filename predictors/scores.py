"""How good forecasts are: sums over the steps of one layer and distance, and the ratios that follow from them.

Knows nothing about GPUs, policies or files. Shape letters: T tokens, E experts, K experts per token, M numbers of
forecast experts, B bins of a calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from moesim.predictors.base import Floats, Forecast, Ids, most_probable

OVERLOADED = 2.0
"""An expert is overloaded from this many times the mean load on."""
BINS = 20


@dataclass(slots=True, kw_only=True)
class Score:
    """Sums over steps; `widths` are the numbers m of forecast experts that recall and precision are asked at."""

    widths: tuple[int, ...]
    steps: int = 0
    tokens: int = 0
    """With a forecast for single tokens."""
    first_hits: int = 0
    """Tokens whose likeliest expert is one of theirs."""
    hits: dict[int, int] = field(default_factory=dict)
    """Of the T x K choices, those among each token's m likeliest."""
    choices: int = 0
    absolute: float = 0.0
    """Sum over steps and experts of |forecast - true load|, tokens."""
    routed: int = 0
    """Sum of the true loads."""
    experts: int = 0
    """Loads that were forecast: steps x E."""
    overloaded: int = 0
    overloaded_told: int = 0
    overloaded_found: int = 0
    within: int = 0
    """Loads within two standard deviations of the forecast."""
    bounded: int = 0
    """Loads that were forecast with a standard deviation."""
    told_B: Floats = field(default_factory=lambda: np.zeros(BINS))
    """Sum of the inclusion probabilities in each bin."""
    true_B: Floats = field(default_factory=lambda: np.zeros(BINS))
    count_B: Floats = field(default_factory=lambda: np.zeros(BINS))
    seconds: float = 0.0
    """That the forecasts took."""
    asked: int = 0
    """Tokens that were forecast for, with or without saying anything of single ones."""

    def add(self, forecast: Forecast, ids_TK: Ids, seconds: float) -> None:
        """One step's forecast against what the layer then routed."""
        truth_E = np.bincount(ids_TK.ravel(), minlength=len(forecast.load))
        self.steps += 1
        self.asked += len(ids_TK)
        self.seconds += seconds
        self.routed += ids_TK.size
        self.experts += len(truth_E)
        error_E = np.abs(forecast.load - truth_E)
        self.absolute += float(error_E.sum())
        hot_E, told_E = (load > OVERLOADED * load.mean() for load in (truth_E, forecast.load))
        self.overloaded += int(hot_E.sum())
        self.overloaded_told += int(told_E.sum())
        self.overloaded_found += int((hot_E & told_E).sum())
        if forecast.load_sd is not None:
            # Half a token: a load is a whole number, and a forecast of exactly 0 +- 0 may be right.
            self.within += int((error_E <= 2 * forecast.load_sd + 0.5).sum())
            self.bounded += len(error_E)
        if forecast.topk is not None:
            self._add_tokens(forecast, ids_TK)

    def _add_tokens(self, forecast: Forecast, ids_TK: Ids) -> None:
        self.tokens += len(ids_TK)
        self.choices += ids_TK.size
        if forecast.inclusion is not None:
            guess_TM: Ids = most_probable(forecast.inclusion, max(self.widths))
            self._calibrate(forecast.inclusion, ids_TK)
        else:
            assert forecast.topk is not None, "asked of forecasts for tokens only"
            guess_TM = forecast.topk
        hit_TM = (guess_TM[:, :, None] == ids_TK[:, None, :]).any(axis=2)
        self.first_hits += int(hit_TM[:, 0].sum())
        hits_M = np.cumsum(hit_TM.sum(axis=0))
        for m in self.widths:
            self.hits[m] = self.hits.get(m, 0) + int(hits_M[min(m, len(hits_M)) - 1])

    def _calibrate(self, inclusion_TE: NDArray[np.floating], ids_TK: Ids) -> None:
        bin_TE = np.minimum((inclusion_TE * BINS).astype(np.int64), BINS - 1)
        chosen = np.take_along_axis(bin_TE, ids_TK.astype(np.int64), axis=1)
        self.count_B += np.bincount(bin_TE.ravel(), minlength=BINS)
        self.told_B += np.bincount(bin_TE.ravel(), weights=inclusion_TE.ravel(), minlength=BINS)
        self.true_B += np.bincount(chosen.ravel(), minlength=BINS)

    def summary(self) -> dict[str, float | None]:
        """Ratios; None where nothing was said that could be judged.

        `calibration_error` weighs each bin's |said - came true| by what was said there, so that the many experts that
        nobody expects do not drown the few that matter.
        """
        per_token = {
            "first_recall": _ratio(self.first_hits, self.tokens),
            **{f"recall_at_{m}": _ratio(self.hits.get(m, 0), self.choices) for m in self.widths},
            **{f"precision_at_{m}": _ratio(self.hits.get(m, 0), self.tokens * m) for m in self.widths},
        }
        return {
            **per_token,
            "load_error_tokens": _ratio(self.absolute, self.experts),
            "load_error": _ratio(self.absolute / 2, self.routed),
            "overloaded_precision": _ratio(self.overloaded_found, self.overloaded_told),
            "overloaded_recall": _ratio(self.overloaded_found, self.overloaded),
            "loads_within_2sd": _ratio(self.within, self.bounded),
            "calibration_error": _ratio(float(np.abs(self.told_B - self.true_B).sum()), float(self.told_B.sum())),
            "us_per_token": _ratio(1e6 * self.seconds, self.asked),
        }


def multinomial_floor(share_E: Floats, tokens: int, top_k: int) -> float:
    """Expected load error (share of the choices forecast for the wrong expert) of whoever knows how often each expert
    is chosen in the long run and nothing of the tokens at hand.

    share_E sums to 1. Loads are taken as binomial; the mean absolute deviation is De Moivre's closed form.
    """
    q_E = np.clip(share_E * top_k, 1e-12, 1 - 1e-12)
    m_E = np.floor(tokens * q_E) + 1
    log_E = (
        math.log(2)
        + np.log(m_E)
        + gammaln(tokens + 1)
        - gammaln(m_E + 1)
        - gammaln(np.maximum(tokens - m_E, 0) + 1)
        + m_E * np.log(q_E)
        + (tokens - m_E + 1) * np.log1p(-q_E)
    )
    deviation_E = np.where(m_E <= tokens, np.exp(log_E), 0.0)
    return float(deviation_E.sum()) / 2 / (tokens * top_k)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
