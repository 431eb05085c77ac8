"""Tables and picture of benchmarks/predictors.py. Knows nothing about how the numbers came about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from predictor_plan import OURS
from predictor_studies import FROZEN, Kept

from moesim.sim.prediction import mean_of

Report = dict[str, Any]
RUNNING = 3
"""Steps that a stream's running mean is taken over."""
SHARES = (0.5, 0.9)


def groups_of(kept: Kept) -> dict[str, dict[str, Report]]:
    """Group to task to its report, folds averaged, of a study of scores."""
    found: dict[str, dict[str, Report]] = {}
    for task in kept.settings["tasks"]:
        reports = [mean_of(told[task["label"]]) for told in kept.predictors.values()]
        told = {name: numbers for report in reports for name, numbers in report["predictors"].items()}
        found.setdefault(task["group"], {})[task["label"]] = {**reports[0], "predictors": told}
    return found


def study_text(kept: Kept) -> str:
    """The tables of one study, markdown."""
    parts = [f"### {kept.settings['title']}"]
    if kept.settings["stream"]:
        return "\n\n".join([*parts, _stated(kept, ""), _stream_table(kept)]) + "\n"
    for group, reports in groups_of(kept).items():
        mean = mean_of(list(reports.values()))
        top_k = _top_k(mean)
        parts.append(_stated(kept, group, mean))
        parts += [_scores(mean, horizon, top_k) for horizon in mean["multinomial_floor"]]
        if len(reports) > 1:
            parts.append(_by_task(reports, top_k))
        parts.append(_costs(mean))
        parts.append(_by_layer(mean, top_k))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _stated(kept: Kept, group: str, mean: Report | None = None) -> str:
    """Batch, split, phase and window of the numbers below."""
    s = kept.settings
    tasks = [task for task in s["tasks"] if not group or task["group"] == group]
    batch, split = (", ".join(dict.fromkeys(str(task[key]) for task in tasks)) for key in ("batch", "split"))
    steps = ", ".join(dict.fromkeys(str(task["max_steps"]) for task in tasks))
    epochs = "each family's own" if s["epochs"] is None else s["epochs"]
    learned = f", {mean['fitted_tokens']:,.0f} tokens fitted on" if mean else ""
    run = f", {mean['steps']:.0f} steps and {mean['tokens']:,.0f} tokens scored (means)" if mean else ""
    return (
        f"{s['phase'].capitalize()}, {batch} a step, at most {steps} steps, split `{split}`, {s['gpus']} GPUs; "
        f"epochs of the learned ones: {epochs}{learned}{run}."
    )


def _top_k(report: Report) -> int:
    """K: the choices a token has, from the ratio of precision to recall."""
    for told in report["predictors"].values():
        for key, value in next(iter(told["horizons"].values())).items():
            if key.startswith("recall_at_") and value:
                m = int(key.removeprefix("recall_at_"))
                return round(next(iter(told["horizons"].values()))[f"precision_at_{m}"] * m / value)
    return 1


def _columns(top_k: int, extras: list[str]) -> dict[str, str]:
    return {
        "first_recall": "top-1",
        f"recall_at_{top_k}": f"recall@{top_k}",
        f"recall_at_{2 * top_k}": f"recall@{2 * top_k}",
        f"precision_at_{2 * top_k}": f"precision@{2 * top_k}",
        "load_error": "load error",
        "overloaded_precision": "hot precision",
        "overloaded_recall": "hot recall",
        "loads_within_2sd": "in 2 sd",
        "calibration_error": "calibration",
        **{f"balancedness_{n}": f"balanced +{n}" for n in extras},
        **{f"gap_closed_{n}": f"gap +{n}" for n in extras},
    }


def _scores(mean: Report, horizon: str, top_k: int) -> str:
    ends = mean["balancedness"]
    extras = list(ends["true loads"])
    columns = _columns(top_k, extras)
    rows = [
        [name, *(number(told["horizons"][horizon].get(key)) for key in columns)]
        for name, told in mean["predictors"].items()
    ]
    between = "; ".join(
        f"+{n}: {ends['no replicas'][n]:.3f} without replicas, {ends['true loads'][n]:.3f} planned on the true loads"
        for n in extras
    )
    head = f"**{horizon} layer{'s' if horizon != '1' else ''} ahead.** Multinomial floor of the load error: "
    return f"{head}{mean['multinomial_floor'][horizon]:.3f}. Balanced, {between}.\n\n" + markdown(
        ["predictor", *columns.values()], rows
    )


def _by_task(reports: dict[str, Report], top_k: int) -> str:
    """Recall@K, or the load error of whoever says nothing of tokens, for each task, at the first distance."""
    rows = []
    for name in next(iter(reports.values()))["predictors"]:
        cells = []
        for report in reports.values():
            told = next(iter(report["predictors"][name]["horizons"].values()))
            recall = told.get(f"recall_at_{top_k}")
            cells.append(f"({told['load_error']:.3f})" if recall is None else f"{recall:.3f}")
        rows.append([name, *cells])
    head = f"Recall@{top_k} by task; in brackets the load error of those that say nothing of single tokens."
    return head + "\n\n" + markdown(["predictor", *reports], rows)


def _costs(mean: Report) -> str:
    rows = []
    for name, told in mean["predictors"].items():
        us = next(iter(told["horizons"].values()))["us_per_token"]
        flops, parameters = (f"{told[key]:,.0f}" for key in ("flops_per_token", "parameters"))
        rows.append([name, f"{us:.2f}", f"{us * 1.024:.2f}", flops, parameters, f"{told['fit_seconds']:.1f}"])
    head = ["predictor", "us/token and layer", "ms/1,024 tokens and layer", "FLOPs/token", "parameters", "fit s"]
    return "What they take:\n\n" + markdown(head, rows)


def _by_layer(mean: Report, top_k: int) -> str:
    """Recall of our own, layer by layer."""
    own = next((name for name in OURS if name in mean["predictors"]), None)
    if own is None:
        return ""
    told = mean["predictors"][own]["horizons"]
    last = max(int(layer) for one in told.values() for layer in one["layers"])
    rows = [
        [str(layer), *(number(one["layers"].get(str(layer), {}).get(f"recall_at_{top_k}")) for one in told.values())]
        for layer in range(last + 1)
    ]
    head = ["layer", *(f"{horizon} ahead" for horizon in told)]
    words = (
        f"Recall@{top_k} of `{own}` by the layer that is forecast; the first row of a column is from the tokens alone."
    )
    return words + "\n\n" + markdown(head, rows)


def series_of(kept: Kept, name: str, key: str) -> np.ndarray | None:
    """[steps] mean over tasks and folds, as far as all of them go; None where nothing was said."""
    runs = [fold[key] for folds in kept.predictors[name].values() for fold in folds]
    if any(value is None for run in runs for value in run):
        return None
    shortest = min(map(len, runs))
    return np.array([run[:shortest] for run in runs]).mean(axis=0)


def adapting(kept: Kept) -> Iterator[tuple[str, str, np.ndarray, np.ndarray | None]]:
    """(predictor, measure, its series, what adapting has gained a step) of everybody. Gained over the same predictor
    frozen; for those that say loads only, in load error, over the frequency."""
    for name in kept.predictors:
        series, key = series_of(kept, name, "recall"), "recall"
        rival: str | None = name + FROZEN
        if series is None:
            series, key, rival = series_of(kept, name, "load_error"), "load_error", "frequency"
        assert series is not None, "every forecast has loads"
        other = series_of(kept, rival, key) if rival in kept.predictors else None
        gain = None if other is None else (series - other) * (1 if key == "recall" else -1)
        if name.endswith(FROZEN) and np.array_equal(series, series_of(kept, name.removesuffix(FROZEN), key)):
            continue  # a variant that is made not to adapt
        yield name, key.replace("_", " "), series, gain if gain is not None and gain.any() else None


def steps_until(gain: np.ndarray, share: float) -> int | None:
    """Steps that have ended when the running mean of the gain first reaches that share of its last quarter's mean; None
    where there is no gain in the end."""
    final = _last_quarter(gain)
    if final <= 0:
        return None
    smooth = np.convolve(gain, np.ones(RUNNING) / RUNNING, mode="valid") if len(gain) >= RUNNING else gain
    reached = np.flatnonzero(smooth >= share * final)
    return int(reached[0]) + (len(gain) - len(smooth)) // 2 if len(reached) else None


def _last_quarter(series: np.ndarray) -> float:
    return float(series[-max(1, len(series) // 4) :].mean())


def _stream_table(kept: Kept) -> str:
    rows = []
    for name, key, series, gain in adapting(kept):
        until = [None if gain is None else steps_until(gain, share) for share in SHARES]
        gained = None if gain is None else _last_quarter(gain)
        ends = [number(series[0]), number(_last_quarter(series)), number(gained, "+.3f")]
        rows.append([name, key, *ends, *(number(steps, "d") for steps in until)])
    head = ["predictor", "measure", "first step", "last quarter", "gained by adapting", "steps to half", "to 90%"]
    return markdown(head, rows)


def draw(studies: dict[str, Kept], path: Path) -> None:
    """Recall one layer ahead and the gap closed, a row for each study of scores; below, the streams."""
    scored = {name: kept for name, kept in studies.items() if not kept.settings["stream"]}
    streams = {name: kept for name, kept in studies.items() if kept.settings["stream"]}
    most = max((len(kept.predictors) for kept in scored.values()), default=1)
    count = len(scored) + bool(streams)
    figure = Figure(figsize=(11, (1.0 + 0.14 * most) * count), layout="constrained")
    axes = figure.subplots(count, 2, squeeze=False)
    for row, kept in zip(axes, scored.values(), strict=False):
        _draw_scores(row, kept)
    for axis, kept in zip(axes[-1], streams.values(), strict=False):
        _draw_stream(axis, kept)
    for axis in figure.axes:
        axis.set_visible(axis.has_data())
    figure.savefig(path, dpi=110)


def _draw_scores(axes: Any, kept: Kept) -> None:
    group, reports = next(iter(groups_of(kept).items()))
    mean = mean_of(list(reports.values()))
    first = {name: next(iter(told["horizons"].values())) for name, told in mean["predictors"].items()}
    top_k = _top_k(mean)
    for axis, key, label in (
        (axes[0], f"recall_at_{top_k}", f"recall@{top_k}, 1 ahead"),
        (axes[1], "gap_closed_1", "gap closed, 1 extra slot a GPU"),
    ):
        shown = {name: told[key] for name, told in first.items() if told.get(key) is not None and name != "oracle"}
        colors = ["tab:orange" if name.split(",")[0] in OURS else "tab:blue" for name in shown]
        axis.barh(list(shown), list(shown.values()), color=colors)
        axis.set_xlim(left=min(0.0, *shown.values()), right=1.0)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=6)
        axis.set_xlabel(label, fontsize=8)
        axis.grid(alpha=0.25, axis="x")
    axes[0].set_title(f"{kept.settings['title']}, {group}", loc="left", fontsize=9)


def _draw_stream(axis: Any, kept: Kept) -> None:
    for name, key, series, _ in adapting(kept):
        if key == "recall":
            axis.plot(series, linewidth=1, linestyle="--" if name.endswith(FROZEN) else "-", label=name)
    axis.set_title(kept.settings["title"], loc="left", fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("recall, 1 ahead", fontsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=6)
