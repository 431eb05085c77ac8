"""Pictures: the load of GPUs over a run, and of experts in a recording. Knows nothing about how they came about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.sim.results import Result
from moesim.traces import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_over_time(results: list[Result], path: Path, title: str) -> None:
    """Write a PNG: for each result one panel with each GPU's share of the tokens, layer after layer, step after step.

    1.0 is a perfectly even share; the black line is the busiest GPU, which the others wait for.
    """
    from matplotlib.figure import Figure  # a second of start-up that only pictures pay for

    figure = Figure(figsize=(10, 2.6 * len(results) + 0.6), layout="constrained")
    axes = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        load = np.array([step.load_LG for step in result.steps], float)
        share = (load / np.maximum(load.mean(axis=2, keepdims=True), 1e-9)).reshape(-1, load.shape[2])
        x = np.arange(len(share)) / load.shape[1]
        for gpu in range(share.shape[1]):
            axis.plot(x, share[:, gpu], linewidth=0.9, alpha=0.7, label=f"GPU {gpu}")
        axis.plot(x, share.max(axis=1), color="black", linewidth=1.1, label="busiest")
        balanced = result.metrics()["balancedness_mean_of_ratios"]
        axis.set_title(f"{result.policy} ({result.kind}): balancedness {balanced:.2f}", loc="left", fontsize=10)
        axis.set_ylabel("tokens / even share")
        axis.grid(alpha=0.25)
    axes[-1].set_xlabel("step (its layers side by side)")
    axes[0].legend(ncols=min(9, share.shape[1] + 1), fontsize=7, loc="upper right")
    save_figure(figure, path, title)


def load_heat_map(loads_WLE: NDArray[np.integer], path: Path, title: str, windows: int = 1) -> None:
    """Write a PNG: above, layers x experts in multiples of the mean load; below, the busiest expert over time, each
    point being the sum of `windows` windows."""
    from matplotlib.figure import Figure

    total_LE = loads_WLE.sum(axis=0).astype(float)
    share_LE = total_LE / np.maximum(total_LE.mean(axis=1, keepdims=True), 1e-9)
    loads = loads_WLE.astype(float)
    peak_WL = loads.max(axis=2) / np.maximum(loads.mean(axis=2), 1e-9)
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1)
    drawn = above.imshow(share_LE, aspect="auto", cmap="viridis", interpolation="nearest")
    above.set_xlabel("expert")
    above.set_ylabel("MoE layer")
    figure.colorbar(drawn, ax=above, label="tokens / mean")
    for layer in range(peak_WL.shape[1]):
        below.plot(peak_WL[:, layer], linewidth=0.9, label=f"layer {layer}")
    below.set_xlabel("window" if windows == 1 else f"{windows} windows together")
    below.set_ylabel("busiest expert / mean")
    below.grid(alpha=0.25)
    if peak_WL.shape[1] <= 12:
        below.legend(ncols=6, fontsize=7)
    save_figure(figure, path, title)


def save_figure(figure: Figure, path: Path, title: str) -> None:
    """Write it as PNG. Raises InputError where that is impossible."""
    figure.suptitle(title, fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the picture cannot be written ({error})") from None
