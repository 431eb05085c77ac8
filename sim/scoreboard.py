"""Predictors on the same held-out steps: what they said, what it was worth, and what it took.

Every step is shown layer by layer, as the driver shows it, and every predictor is asked at every decision point. What a
forecast is worth is the balance that replicas planned on it would reach, between that of the placement without replicas
and that of replicas planned on the truth; copies are free and arrive at once here (`moesim simulate` charges for them).
Shape letters: L layers, E experts, G GPUs, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Adapting, Oracle, PastStep, Predictor, Seen, routed_layer
from moesim.predictors.base import Floats
from moesim.predictors.scores import Score, multinomial_floor
from moesim.sim.dispatch import Ints, exact_split
from moesim.sim.driver import HISTORY_STEPS
from moesim.sim.hedging import hedged_replicas
from moesim.sim.policies import balanced_placement
from moesim.sim.residency import EMPTY, Cluster
from moesim.sim.scenario import Scenario
from moesim.traces import Batch, InputError, total_load_LE

STATIC, ORACLE = "no replicas", "true loads"
"""The two ends between which a forecast's balance lies."""
Progress = Callable[[int, int], None]


@dataclass(slots=True, kw_only=True)
class Balance:
    """GPU loads of one layer over the steps."""

    steps: int = 0
    ratios: float = 0.0
    """Sum of mean / max."""
    means: float = 0.0
    maxima: float = 0.0

    def add(self, load_G: Ints) -> None:
        """One step."""
        mean, most = float(load_G.mean()), float(load_G.max())
        self.steps += 1
        self.ratios += mean / most
        self.means += mean
        self.maxima += most

    def mean_of_ratios(self) -> float:
        """As SGLang averages it."""
        return self.ratios / self.steps


@dataclass(slots=True, kw_only=True)
class Cell:
    """One predictor, one distance, one layer."""

    score: Score
    balance: dict[int, Balance]
    """By extra slots a GPU."""


@dataclass(slots=True, kw_only=True)
class Board:
    """All cells, with what they are measured against."""

    scenario: Scenario
    horizons: tuple[int, ...]
    extra_slots: tuple[int, ...]
    widths: tuple[int, ...]
    cells: dict[str, dict[tuple[int, int], Cell]]
    """Predictor to (distance, layer) to its cell."""
    ends: dict[str, dict[tuple[int, int], Balance]]
    """STATIC and ORACLE to (extra slots, layer) to their balance."""
    floor_L: list[list[float]] = field(default_factory=list)
    """Per layer and step: the multinomial floor of the load error."""


class Scoreboard:
    """Runs fitted predictors over the steps of `scenario`.

    A forecast of distance h for layer l is asked when layer l - h has routed; before the first layer has routed, layer
    h - 1 has the distance h from the embedded tokens. Raises InputError where a distance exceeds the layers or no extra
    slot fits.
    """

    def __init__(
        self,
        scenario: Scenario,
        predictors: Mapping[str, Predictor],
        *,
        horizons: tuple[int, ...] = (1,),
        extra_slots: tuple[int, ...] = (1, 2),
        widths: tuple[int, ...] | None = None,
    ) -> None:
        c = scenario.cluster
        if not horizons or not 1 <= min(horizons) <= max(horizons) <= c.layers:
            raise InputError(f"a distance must be 1 to the {c.layers} layers of the stack, got {list(horizons)}")
        widths = widths or tuple(sorted({m for m in (1, c.top_k, 2 * c.top_k, 4 * c.top_k) if m <= c.experts}))
        self._predictors = predictors
        self._home_LEG = _homes(scenario)
        keys = [(h, layer) for h in horizons for layer in range(h - 1, c.layers)]
        self.board = Board(
            scenario=scenario,
            horizons=horizons,
            extra_slots=extra_slots,
            widths=widths,
            cells={
                name: {
                    key: Cell(score=Score(widths=widths), balance={extra: Balance() for extra in extra_slots})
                    for key in keys
                }
                for name in predictors
            },
            ends={
                end: {(extra, layer): Balance() for extra in extra_slots for layer in range(c.layers)}
                for end in (STATIC, ORACLE)
            },
            floor_L=[[] for _ in range(c.layers)],
        )
        load_LE = total_load_LE(scenario.run, c.experts)
        self._share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)

    def run(self, progress: Progress | None = None) -> Board:
        """All steps, in order; predictors that adapt learn from each when it has ended."""
        batches = self.board.scenario.batches
        past: deque[PastStep] = deque(maxlen=HISTORY_STEPS)
        for i, batch in enumerate(batches):
            if progress:
                progress(i, len(batches))
            self._step(batch, past)
        if progress:
            progress(len(batches), len(batches))
        return self.board

    def _step(self, batch: Batch, past: deque[PastStep]) -> None:
        scenario, top_k = self.board.scenario, self.board.scenario.cluster.top_k
        table = scenario.run.take(batch.rows)
        # A Seen each: what one predictor leaves in its memo is no other's business.
        seen = {name: Seen(step=batch.index, tokens=batch.tokens, past=past) for name in self._predictors}
        for name, predictor in self._predictors.items():
            if isinstance(predictor, Oracle):
                predictor.reveal(table.topk_ids, None)
            for point in range(scenario.cluster.layers):
                self._ask(name, predictor, seen[name], point, table.topk_ids)
                seen[name].routed.append(routed_layer(table, point))
            if isinstance(predictor, Adapting):
                predictor.observe(seen[name])
        for layer in range(scenario.cluster.layers):
            self.board.floor_L[layer].append(multinomial_floor(self._share_LE[layer], len(table), top_k))
            self._add_ends(layer, _load(table.topk_ids[:, layer], scenario.cluster))
        past.append(PastStep(tokens=batch.tokens, topk_ids=table.topk_ids))

    def _ask(self, name: str, predictor: Predictor, seen: Seen, point: int, ids_TLK: NDArray[np.integer]) -> None:
        cluster = self.board.scenario.cluster
        for h in self.board.horizons:
            layer = point + h - 1
            if layer >= cluster.layers:
                continue
            begin = perf_counter()
            forecast = predictor.forecast(seen, layer)
            cell = self.board.cells[name][h, layer]
            cell.score.add(forecast, ids_TLK[:, layer], perf_counter() - begin)
            load_E = _load(ids_TLK[:, layer], cluster)
            for extra, balance in cell.balance.items():
                balance.add(self._loads(layer, load_E, forecast.load, forecast.load_sd, extra))

    def _add_ends(self, layer: int, load_E: Ints) -> None:
        for extra in self.board.extra_slots:
            self.board.ends[STATIC][extra, layer].add(load_E @ self._home_LEG[layer])
            exact = self._loads(layer, load_E, load_E.astype(float), np.zeros(len(load_E)), extra)
            self.board.ends[ORACLE][extra, layer].add(exact)

    def _loads(self, layer: int, load_E: Ints, forecast_E: Floats, sd_E: Floats | None, extra: int) -> Ints:
        """[G] the true loads, split exactly over homes and the replicas that the forecast asks for."""
        usable_EG = self._home_LEG[layer].copy()
        for expert, gpu in hedged_replicas(forecast_E, sd_E, self._home_LEG[layer], extra):
            usable_EG[expert, gpu] = True
        return np.asarray(exact_split(load_E, usable_EG).sum(axis=0))


def summaries(board: Board) -> dict[str, Any]:
    """Everything as JSON types: per predictor and distance the means over the layers that have that many routed ones
    before them, the forecast for the first layer from the tokens alone, and every layer."""
    floor = [float(np.mean(steps)) for steps in board.floor_L]
    told = {name: _of_predictor(board, cells) for name, cells in board.cells.items()}
    ends = {
        end: {
            str(extra): _mean([balances[extra, layer].mean_of_ratios() for layer in _after(board, 1)])
            for extra in board.extra_slots
        }
        for end, balances in board.ends.items()
    }
    return {
        "predictors": told,
        "balancedness": ends,
        "multinomial_floor": {str(h): _mean([floor[layer] for layer in _after(board, h)]) for h in board.horizons},
        "multinomial_floor_by_layer": floor,
    }


def _after(board: Board, h: int) -> range:
    """The layers that have a routed one at distance h before them; all there are in a stack of one layer."""
    layers = board.scenario.cluster.layers
    return range(min(h, layers - 1), layers)


def _of_predictor(board: Board, cells: dict[tuple[int, int], Cell]) -> dict[str, Any]:
    by_layer = {key: _of_cell(board, key[1], cell) for key, cell in cells.items()}
    return {
        "horizons": {
            str(h): {
                **_means([by_layer[h, layer] for layer in _after(board, h)]),
                "layers": {str(layer): by_layer[h, layer] for (d, layer) in cells if d == h},
            }
            for h in board.horizons
        }
    }


def _of_cell(board: Board, layer: int, cell: Cell) -> dict[str, float | None]:
    told = cell.score.summary()
    for extra, balance in cell.balance.items():
        reached = balance.mean_of_ratios()
        static, best = (board.ends[end][extra, layer].mean_of_ratios() for end in (STATIC, ORACLE))
        told[f"balancedness_{extra}"] = reached
        told[f"static_{extra}"], told[f"oracle_{extra}"] = static, best
    return told


def _means(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of every number over layers; None where a layer has none. `gap_closed` is taken of the means."""
    out: dict[str, float | None] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        known = [v for v in values if v is not None]
        out[key] = _mean(known) if known else None
    for key in [k for k in out if k.startswith("balancedness_")]:
        extra = key.removeprefix("balancedness_")
        static, best, reached = out.pop(f"static_{extra}"), out.pop(f"oracle_{extra}"), out[key]
        assert static is not None and best is not None and reached is not None, "every cell has a balance"
        out[f"gap_closed_{extra}"] = (reached - static) / (best - static) if best > static else None
    return out


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _homes(scenario: Scenario) -> NDArray[np.bool_]:
    """[L, E, G] where each expert lies: packed by the loads of the fitted requests."""
    c = scenario.cluster
    placed_LGS = balanced_placement(c, scenario.fit)
    home_LEG = np.zeros((c.layers, c.experts, c.gpus), np.bool_)
    layer, gpu, slot = np.nonzero(placed_LGS != EMPTY)
    home_LEG[layer, placed_LGS[layer, gpu, slot], gpu] = True
    return home_LEG


def _load(ids_TK: NDArray[np.integer], cluster: Cluster) -> Ints:
    return np.bincount(ids_TK.ravel(), minlength=cluster.experts)


__all__ = ["ORACLE", "STATIC", "Balance", "Board", "Cell", "Scoreboard", "summaries"]
