"""What a router does, in numbers: skew, balance, activity and drift of its loads, beside the noise that none escapes.

Loads are counted window by window from a stream and reduced as each window ends, so memory does not grow with the
recording. Recordings without tokens have the same statistics, a row or several being a window. What follows from single
tokens is in overlap.py. Shape letters: W windows, L layers, E experts, T tokens, K experts per token, G GPU counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.tokens import LoadTable, TokenTable

Floats = NDArray[np.float64]
COLUMNS = ("max_over_mean", "active_fraction", "entropy_bits", "gini", "drift")
"""Of a window's values, in the order of kernels.summarise_window."""
PICTURE_COLUMNS = 256
LOG_TABLE = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """One MoE layer; means over windows, in the units that the names say."""

    layer: int
    max_over_mean: float
    """Load of the busiest expert over the mean load."""
    noise_max_over_mean: float
    """What max_over_mean would be if every expert were equally likely: the floor of this window and E."""
    active_fraction: float
    """Share of the experts with at least one token in a window."""
    entropy_bits: float
    """Of the loads; log2(E) for a uniform router."""
    gini: float
    """0 for equal loads, towards 1 for one expert that takes all."""
    drift: float | None
    """Half the absolute difference of adjacent windows' load shares (0 equal, 1 disjoint); None for one window."""
    balancedness: dict[int, dict[str, float]]
    """GPUs to {'sglang': mean over windows of (mean + 1e-5) / (max + 1e-5), 'vllm': sum of means / sum of maxima} of
    the GPU loads under contiguous placement; where GPUs do not divide E, the first ones hold one expert more."""
    top_experts: tuple[int, ...]
    """Experts with the most tokens over all windows, most loaded first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window, for whoever wants each of them."""

    index: int
    tokens: int
    noise: float
    load_LE: NDArray[np.int64]
    values_LC: Floats
    """[L, 5 + 3 G]: COLUMNS, then for each GPU count SGLang's balancedness, mean and maximum of the GPU loads. NaN
    where a layer has no tokens; drift is NaN in the first window."""


class LoadSummary:
    """Takes a recording in parts; `finish` gives the statistics of its layers.

    `window` counts tokens; None makes one window of everything. With loads, rows are merged until they have `window`
    tokens, and `row_windows` makes every row a window. A short rest is left out unless it is all there is. Dropped
    tokens count: they were routed. `sink` is given every window. Raises InputError where a GPU count does not suit E.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        *,
        window: int | None,
        row_windows: bool = False,
        gpus: tuple[int, ...] = (),
        sink: Callable[[Window], None] | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise InputError(f"window tokens must be at least 1, got {window}")
        for gpu_count in gpus:
            if not 1 <= gpu_count <= experts:
                raise InputError(f"{gpu_count} GPUs for {experts} experts: use 1 to {experts}")
        self.windows = self.tokens = 0
        self.total_LE = np.zeros((layers, experts), np.int64)
        self._top_k, self._window, self._row_windows = top_k, window, row_windows
        self._gpus, self._sink = gpus, sink
        self._bounds_GC = _bounds(experts, gpus)
        n = np.arange(LOG_TABLE)
        self._log_table = n * np.log2(np.maximum(n, 1))
        self._load_LE, self._filled = np.zeros_like(self.total_LE), 0
        self._before_LE = np.zeros_like(self.total_LE)
        self._sum_LC = np.zeros((layers, len(COLUMNS) + 3 * len(gpus)))
        self._count_LC = np.zeros_like(self._sum_LC)
        self._noise_sum = 0.0
        self._noise: dict[int, float] = {}
        self._picture: list[NDArray[np.int64]] = []
        self._per_column = self._in_column = 1

    def add(self, part: TokenTable | LoadTable) -> None:
        """The next rows of the recording."""
        if isinstance(part, LoadTable):
            self._add_loads(part)
        else:
            self._add_tokens(part)

    def finish(self, top: int = 5) -> list[LayerStats]:
        """The statistics of every layer. Raises InputError where nothing was counted in some layer."""
        if self._filled and not self.windows:
            self._close()
        if not self.windows:
            raise InputError("no tokens to count")
        if empty := np.flatnonzero(self._count_LC[:, 0] == 0).tolist():
            raise InputError(f"layer {empty[0]} has no tokens in any window")
        return [self._layer(layer, top) for layer in range(len(self.total_LE))]

    def over_time(self) -> tuple[NDArray[np.int64], int]:
        """([W', L, E] loads over time with at most 256 columns, windows in a column)."""
        return np.stack(self._picture), self._per_column

    def vllm_balancedness(self) -> dict[int, float]:
        """GPUs to the sum of mean GPU loads over the sum of maxima, over windows and layers."""
        sums = self._sum_LC.sum(axis=0)
        at = len(COLUMNS)
        return {count: float(sums[at + 3 * g + 1] / sums[at + 3 * g + 2]) for g, count in enumerate(self._gpus)}

    def _add_tokens(self, part: TokenTable) -> None:
        from moesim.traces.kernels import count  # compiled: only who counts pays for it

        begin = 0
        while begin < len(part):
            room = len(part) - begin if self._window is None else self._window - self._filled
            end = min(begin + room, len(part))
            count(np.ascontiguousarray(part.topk_ids[begin:end]), self._load_LE)
            self._filled += end - begin
            begin = end
            if self._filled == self._window:
                self._close()

    def _add_loads(self, part: LoadTable) -> None:
        for load_LE in part.load:
            self._load_LE += load_LE
            self._filled += int(load_LE.sum(axis=1).max()) // self._top_k
            if self._row_windows or (self._window is not None and self._filled >= self._window):
                self._close()

    def _close(self) -> None:
        """The window is complete: add its values to the sums and begin the next one."""
        from moesim.traces.kernels import summarise_window

        values_LC = np.empty_like(self._sum_LC)
        summarise_window(self._load_LE, self._before_LE, self._log_table, self._bounds_GC, values_LC)
        noise = self._noise_of(int(self._load_LE.sum(axis=1).max()))
        there_LC = ~np.isnan(values_LC)
        self._sum_LC += np.where(there_LC, values_LC, 0.0)
        self._count_LC += there_LC
        self._noise_sum += noise
        if self._sink:
            self._sink(
                Window(
                    index=self.windows,
                    tokens=self._filled,
                    noise=noise,
                    load_LE=self._load_LE.copy(),
                    values_LC=values_LC,
                )
            )
        self.total_LE += self._load_LE
        self.windows += 1
        self.tokens += self._filled
        self._draw(self._load_LE)
        self._before_LE, self._load_LE = self._load_LE, self._before_LE
        self._load_LE[:] = 0
        self._filled = 0

    def _draw(self, load_LE: NDArray[np.int64]) -> None:
        """Keep the load for the picture; when that has too many columns, two become one."""
        if self._picture and self._in_column < self._per_column:
            self._picture[-1] += load_LE
            self._in_column += 1
            return
        if len(self._picture) == PICTURE_COLUMNS:
            self._picture = [a + b for a, b in zip(self._picture[::2], self._picture[1::2], strict=True)]
            self._per_column *= 2
        self._picture.append(load_LE.copy())
        self._in_column = 1

    def _noise_of(self, choices: int) -> float:
        """The floor of a window with so many choices; to two digits, as rows of loads differ by a few."""
        scale = max(10 ** (len(str(choices)) - 3), 1)
        rounded = choices // scale * scale
        if rounded not in self._noise:
            self._noise[rounded] = noise_floor(rounded, self.total_LE.shape[1])
        return self._noise[rounded]

    def _layer(self, layer: int, top: int) -> LayerStats:
        count_C = self._count_LC[layer]
        mean_C = self._sum_LC[layer] / np.maximum(count_C, 1)
        at = len(COLUMNS)
        return LayerStats(
            layer=layer,
            **{name: float(mean_C[i]) for i, name in enumerate(COLUMNS[:4])},
            noise_max_over_mean=self._noise_sum / self.windows,
            drift=float(mean_C[4]) if count_C[4] else None,
            balancedness={
                gpus: {
                    "sglang": float(mean_C[at + 3 * g]),
                    "vllm": float(mean_C[at + 3 * g + 1] / mean_C[at + 3 * g + 2]),
                }
                for g, gpus in enumerate(self._gpus)
            },
            top_experts=tuple(int(e) for e in np.argsort(-self.total_LE[layer], kind="stable")[:top]),
        )


def noise_floor(choices: int, experts: int, seed: int = 0, draws: int = 200) -> float:
    """Mean max/mean of `choices` made uniformly at random over `experts`: skew below this is chance, not routing.

    A multinomial: for K > 1 it leaves out that a token's K experts differ, which makes the true floor a little lower.
    """
    rng = np.random.default_rng(seed)
    counted = rng.multinomial(max(choices, 1), np.full(experts, 1 / experts), size=draws)
    return float((counted.max(axis=1) / counted.mean(axis=1)).mean())


def _bounds(experts: int, gpus: tuple[int, ...]) -> NDArray[np.int64]:
    """[G, C] first expert of each GPU and E after the last, for contiguous placement; padded with E."""
    bounds = np.full((len(gpus), max(gpus, default=0) + 1), experts, np.int64)
    for g, count in enumerate(gpus):
        sizes = [len(part) for part in np.array_split(np.arange(experts), count)]
        bounds[g, : count + 1] = np.cumsum([0, *sizes])
    return bounds
