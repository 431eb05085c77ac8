"""The picture of a run: tokens on each GPU over time, baseline above winner. Knows nothing about how it came about."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.sim.results import Result
from moesim.traces import InputError


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
    figure.suptitle(title, fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the picture cannot be written ({error})") from None
