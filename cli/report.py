"""Tables and JSON for the results of one command. Knows nothing about how the results came about."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from moesim.sim.results import PHASES, Result

WIDTH = 110
"""Columns that the widest table needs; used where the output is not a terminal."""


def results_json(results: list[Result], baseline: str) -> dict[str, Any]:
    """{baseline, config, results: [{policy, speedup, metrics, phase_s}]}, the baseline first.

    `config` is what all results share; what differs between policies stands in each entry's own `config`.
    """
    base = _named(results, baseline)
    shared = {k: v for k, v in base.config.items() if all(r.config.get(k, v) == v for r in results)}
    entries = [
        {
            "policy": result.policy,
            "speedup": base.total_s / result.total_s,
            "metrics": result.metrics(),
            "phase_s": result.phase_s(),
            "config": {k: v for k, v in result.config.items() if k not in shared},
        }
        for result in results
    ]
    return {"baseline": baseline, "kind": base.kind, "config": shared, "results": entries}


def print_results(results: list[Result], baseline: str, console: Console | None = None) -> None:
    """Four tables (speed, the critical path, where the GPUs' time goes, copies and forecasts) and the footnotes."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    base = _named(results, baseline)
    for table in (_speed_table(results, base), _phase_table(results), _share_table(results), _copy_table(results)):
        console.print(table)
    for line in footnotes(results, baseline):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def footnotes(results: list[Result], baseline: str) -> list[str]:
    """What the numbers refer to: baseline, window, split, profile, and whether deciding took time."""
    config, kind = _named(results, baseline).config, results[0].kind
    lines = [
        f"speedup: time of {baseline} / time of the policy, all steps, same inputs ({kind}). balancedness: mean / max "
        "of the GPU loads, mean over layers and steps. utilisation: share of the time that a GPU computes. barrier: "
        "waiting for the slowest GPU of a phase. weights: waiting for blocking copies.",
        f"window: {window(config)}, {config['extra_slots']} extra slots a GPU and layer.",
        "hidden: share of the moved bytes that arrived before they were needed. late: copies that had not arrived when "
        "their layer ran (it ran without them). recall, load error: of the forecasts; those of oracles are the truth.",
    ]
    if config["recorded"] == "loads":
        lines.append(
            "the recording counts tokens and kept none: tokens are drawn so that every load comes out, each a request "
            "of its own. Loads and expert times are the recording's, attention is underestimated."
        )
    if "profile" in config:
        measured = config["profile_kind"] == "measured"
        how = "measured on" if measured else "from spec sheets, not measured:"
        lines.append(f"profile: {config['profile']} ({how} {config['profile_device']}).")
        lines.append(_decisions(results))
    return lines


def window(config: dict[str, Any]) -> str:
    """What was run, in words: without it no number means anything."""
    return (
        f"{config['phase']} of {config['family']}, {config['gpus']} GPUs, {config['batch']} a step in order of "
        f"{config['order']}, {config['steps']} steps, {config['tokens']} tokens, {config['dtype']}; fitted on one part "
        f"of the requests and run on the other, split by {config['split']}"
    )


def _decisions(results: list[Result]) -> str:
    missing = [result.policy for result in results if result.config.get("decide_s") is None]
    if not missing:
        return "time of decisions: modelled, as the profile gives it for each policy."
    which = "not modelled" if len(missing) == len(results) else f"not modelled for {', '.join(missing)}"
    return f"time of decisions: {which}, the profile does not say how long they take (0 is assumed)."


def _speed_table(results: list[Result], base: Result) -> Table:
    table = _table(f"Speedup over {base.policy} ({base.kind})")
    for column in ("speedup", "p50 ms/step", "p95", "p99", "tokens/s", "balancedness", "utilisation"):
        table.add_column(column, justify="right")
    for result in results:
        m = result.metrics()
        latency = [f"{1e3 * m[f'latency_{p}_s']:.3f}" for p in ("p50", "p95", "p99")]
        used = m["utilisation_G"]
        table.add_row(
            result.policy,
            f"{base.total_s / result.total_s:.3f}x",
            *latency,
            f"{m['throughput_tokens_per_s']:,.0f}",
            f"{m['balancedness_mean_of_ratios']:.3f}",
            f"{min(used):.0%} .. {max(used):.0%}",
        )
    return table


def _phase_table(results: list[Result]) -> Table:
    table = _table("Milliseconds a step by phase, on the critical path")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for result in results:
        spent = result.phase_s()
        table.add_row(result.policy, *(f"{1e3 * spent[phase] / result.totals.steps:.3f}" for phase in PHASES))
    return table


def _share_table(results: list[Result]) -> Table:
    table = _table("Where the GPUs' time goes, mean over the GPUs")
    shares = [result.totals.time_shares() for result in results]
    for name in shares[0]:
        table.add_column(name, justify="right")
    for result, share in zip(results, shares, strict=True):
        table.add_row(result.policy, *(_percent(value) for value in share.values()))
    return table


def _copy_table(results: list[Result]) -> Table:
    table = _table("Copies and forecasts")
    for column in ("moved MiB", "hidden", "copies", "late", "recall", "load error"):
        table.add_column(column, justify="right")
    for result in results:
        m = result.metrics()
        moved = m["moved_bytes"]
        table.add_row(
            result.policy,
            f"{moved / 2**20:,.1f}",
            _percent(m["hidden_bytes"] / moved if moved else None),
            str(m.get("transfers", "-")),
            str(m.get("late_transfers", "-")),
            _percent(m.get("recall")),
            _percent(m.get("load_error")),
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _named(results: list[Result], policy: str) -> Result:
    return next(result for result in results if result.policy == policy)
