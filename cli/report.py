"""Tables and JSON for the results of one command. Knows nothing about how the results came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moesim.sim.quality import Quality, comparable, how_to_measure, is_lossy, quality_of, speedup, speedup_text
from moesim.sim.results import PHASES, Result

WIDTH = 110
"""Columns that the widest table needs; used where the output is not a terminal."""


def results_json(results: list[Result], baseline: str, qualities: Sequence[Quality] = ()) -> dict[str, Any]:
    """{baseline, config, results: [{policy, speedup, quality, metrics, phase_s}]}, the baseline first.

    The speedup is None where something lossy would be compared whose quality was not measured; `quality` is 'exact', or
    what was measured, or None. `config` is what all results share; what differs between policies stands in each entry's
    own `config`.
    """
    base = _named(results, baseline)
    shared = {k: v for k, v in base.config.items() if all(r.config.get(k, v) == v for r in results)}
    entries = [
        {
            "policy": result.policy,
            "speedup": speedup(result, base) if comparable(result, base, qualities) else None,
            "quality": _quality_json(result, qualities),
            "metrics": result.metrics(),
            "phase_s": result.phase_s(),
            "config": {k: v for k, v in result.config.items() if k not in shared},
        }
        for result in results
    ]
    return {"baseline": baseline, "kind": base.kind, "config": shared, "results": entries}


def _quality_json(result: Result, qualities: Sequence[Quality]) -> Any:
    found = quality_of(result, qualities)
    return "exact" if not is_lossy(result) else asdict(found) if found else None


def print_results(
    results: list[Result], baseline: str, console: Console | None = None, qualities: Sequence[Quality] = ()
) -> None:
    """Four tables (speed, the critical path, where the GPUs' time goes, copies and forecasts), in an open loop one of
    the requests, with offloading one of the caches, and the footnotes. Rows of lossy policies hold no times unless
    their quality is among `qualities`, and then beside it."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    base = _named(results, baseline)
    timed = {result.policy: comparable(result, base, qualities) for result in results}
    tables = [_speed_table(results, base, qualities), _phase_table(results, timed)]
    tables += [_share_table(results), _copy_table(results)]
    if base.serving:
        tables.insert(1, _request_table(results, timed))
    if any("cache" in result.metrics() for result in results):
        tables.append(_cache_table(results))
    for table in tables:
        console.print(table)
    for line in footnotes(results, baseline, qualities):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def footnotes(results: list[Result], baseline: str, qualities: Sequence[Quality] = ()) -> list[str]:
    """What the numbers refer to: baseline, window, split, profile, and whether deciding took time."""
    config, kind = _named(results, baseline).config, results[0].kind
    of = "the median request's latency" if "arrivals" in config else "all steps"
    lines = [
        f"speedup: time of {baseline} / time of the policy, {of}, same inputs ({kind}). balancedness: mean / max "
        "of the GPU loads, mean over layers and steps. utilisation: share of the time that a GPU computes. barrier: "
        "waiting for the slowest GPU of a phase. weights: waiting for blocking copies.",
        f"window: {window(config)}, {config['extra_slots']} extra slots a GPU and layer.",
        "hidden: share of the moved bytes that arrived before they were needed. late: copies that had not arrived when "
        "their layer ran (it ran without them). recall, load error: of the forecasts; those of oracles are the truth.",
    ]
    lines += _conditions(config) + _not_exact(results, qualities)
    if any("cache" in result.metrics() for result in results):
        lines.append(
            "hits: experts that a layer needed and that were there when it had routed. precision: prefetched copies "
            "that were needed before they were displaced. recall: of the experts that the cache alone would not have "
            "had, those that were prefetched. wasted: prefetched and displaced unused. late: prefetched and waited for."
        )
    if config["recorded"] == "loads":
        lines.append(
            "the recording counts tokens and kept none: tokens are drawn so that every load comes out, each a request "
            "of its own. Loads and expert times are the recording's, attention is underestimated."
        )
    if "profile" in config:
        measured = config["profile_kind"] == "measured"
        how = "measured on" if measured else "from spec sheets, not measured:"
        lines.append(f"profile: {config['profile']} ({how} {config['profile_device']}).")
        lines += _measured_ranges(results, config)
        lines.append(_decisions(results))
    return lines


def _measured_ranges(results: list[Result], config: dict[str, Any]) -> list[str]:
    """Where curves were left: what is beyond them is a guess."""
    ranges = "; ".join(f"{name} {words}" for name, words in config.get("measured", {}).items())
    found = [f"{r.policy} {r.totals.extrapolated:,}" for r in results if r.totals.extrapolated]
    if not found:
        return [f"measured curves: {ranges}; nothing lies outside."] if ranges else []
    return [
        f"extrapolated: phases and copies outside what was measured, by policy: {', '.join(found)}. Measured: {ranges}."
    ]


def window(config: dict[str, Any]) -> str:
    """What was run, in words: without it no number means anything."""
    return (
        f"{config['phase']} of {config['family']}, {config['gpus']} GPUs, {config['batch']} a step in order of "
        f"{config['order']}, {_amount(config)}, {config['dtype']}; fitted on one part "
        f"of the requests and run on the other, split by {config['split']}"
    )


def _amount(config: dict[str, Any]) -> str:
    if "arrivals" in config:
        return f"{config['requests']} requests that arrive by themselves ({config['arrivals']}, seed {config['seed']})"
    return f"{config['steps']} steps, {config['tokens']} tokens"


def _conditions(config: dict[str, Any]) -> list[str]:
    """What differs from the plainest run."""
    found = []
    if config.get("resident") is not None:
        found.append(f"{config['resident']} resident slots a GPU and layer, the host's memory has the rest")
    if n := config.get("tensor_parallel"):
        found.append(f"attention tensor-parallel over {n} GPUs")
    if n := config.get("micro_batches"):
        how = "one after the other" if config.get("overlap") is False else "in flight together"
        found.append(f"{n} micro-batches {how}")
    if config.get("send"):
        found.append(f"tokens sent {config['send'].replace('-', ' ')}")
    if config.get("contention", "none") != "none":
        found.append(f"contention: {config['contention']}")
    found += [f"fault {fault}" for fault in config.get("faults", ())]
    return [f"conditions: {'; '.join(found)}."] if found else []


def _not_exact(results: list[Result], qualities: Sequence[Quality]) -> list[str]:
    """Which results are not what the model computes."""
    lines = []
    for result in results:
        totals = result.totals
        if totals.lost_tokens:
            lines.append(
                f"{result.policy}: {totals.lost_tokens:,} (token, expert) pairs were not computed, no living GPU held "
                "their expert. Its results are not the model's, its time is not comparable."
            )
        counts = {f"computed with copies in {name}": n for name, n in sorted(totals.precision_pairs.items())}
        counts |= {"left out": totals.skipped_tokens, "given to another expert": totals.substituted_tokens}
        done = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
        if done:
            lines.append(
                f"{result.policy}: of the (token, expert) pairs {done}. Its results are not exact, and their quality "
                "was not measured here."
            )
        if is_lossy(result) and (found := quality_of(result, qualities)):
            c = found.config
            lines.append(
                f"quality of {result.policy}: {c['requests']} held-out requests of {c['trace']}, {c['batch_requests']} "
                f"a step, {found.phase}, {c['dtype']} on {c['device_name']}. Loss in nats a token of the exact model, "
                f"and its change (standard error {found.loss_error:.4f}); output tokens alike; error of the last "
                "hidden states."
            )
    command = how_to_measure(results, qualities)
    return [*lines, command] if command else lines


def _decisions(results: list[Result]) -> str:
    missing = [result.policy for result in results if result.config.get("decide_s") is None]
    if not missing:
        return "time of decisions: modelled, as the profile gives it for each policy."
    which = "not modelled" if len(missing) == len(results) else f"not modelled for {', '.join(missing)}"
    return f"time of decisions: {which}, the profile does not say how long they take (0 is assumed)."


def _speed_table(results: list[Result], base: Result, qualities: Sequence[Quality]) -> Table:
    table = _table(f"Speedup over {base.policy} ({base.kind})")
    lossy = any(is_lossy(result) for result in results)
    for column in ("speedup", "p50 ms/step", "p95", "p99", "tokens/s", "balancedness", "utilisation"):
        table.add_column(column, justify="right")
    if lossy:
        table.add_column("quality")
    for result in results:
        m = result.metrics()
        gained, quality = speedup_text(result, base, qualities)
        latency = [f"{1e3 * m[f'latency_{p}_s']:.3f}" for p in ("p50", "p95", "p99")]
        used = m["utilisation_G"]
        table.add_row(
            result.policy,
            *_times([gained, *latency, f"{m['throughput_tokens_per_s']:,.0f}"], comparable(result, base, qualities)),
            f"{m['balancedness_mean_of_ratios']:.3f}",
            f"{min(used):.0%} .. {max(used):.0%}",
            *([quality] if lossy else []),
        )
    return table


def _times(cells: list[str], shown: bool) -> list[str]:
    return cells if shown else ["-"] * len(cells)


def _request_table(results: list[Result], timed: dict[str, bool]) -> Table:
    table = _table("Requests: milliseconds from arrival to start, to the first token, per further token, to the end")
    names = {"queueing_s": "queue", "ttft_s": "TTFT", "tpot_s": "TPOT", "latency_s": "total"}
    shown = {name: label for name, label in names.items() if name in results[0].serving}
    for label in shown.values():
        table.add_column(f"{label} p50", justify="right")
        table.add_column("p99", justify="right")
    for column in ("req/s", "good/s"):
        table.add_column(column, justify="right")
    for result in results:
        s = result.serving
        marks = [f"{1e3 * s[name][mark]:.2f}" for name in shown for mark in ("p50", "p99")]
        good = f"{s['goodput_per_s']:,.1f}" if "goodput_per_s" in s else "-"
        table.add_row(result.policy, *_times([*marks, f"{s['requests_per_s']:,.1f}", good], timed[result.policy]))
    return table


def _phase_table(results: list[Result], timed: dict[str, bool]) -> Table:
    table = _table("Milliseconds a step by phase, on the critical path")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    for result in results:
        spent = result.phase_s()
        cells = [f"{1e3 * spent[phase] / result.totals.steps:.3f}" for phase in PHASES]
        table.add_row(result.policy, *_times(cells, timed[result.policy]))
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


def _cache_table(results: list[Result]) -> Table:
    table = _table("Experts that were there when they were needed, and what copying ahead was worth")
    for column in ("hits", "lowest layer", "precision", "recall", "wasted MiB", "late MiB", "stall s", "bytes in full"):
        table.add_column(column, justify="right")
    for result in results:
        cache = result.metrics().get("cache")
        if cache is None:
            continue
        moved = sum(cache["bytes_by_precision"].values())
        table.add_row(
            result.policy,
            _percent(cache["hit_rate"]),
            _percent(min((rate for rate in cache["hit_rate_L"] if rate is not None), default=None)),
            _percent(cache["prefetch_precision"]),
            _percent(cache["prefetch_recall"]),
            f"{cache['wasted_bytes'] / 2**20:,.1f}",
            f"{cache['late_bytes'] / 2**20:,.1f}",
            f"{cache['stall_s']:.3f}",
            _percent(cache["bytes_by_precision"].get("full", 0) / moved if moved else None),
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


def how_measured(config: dict[str, Any]) -> str:
    """The end of the line under every table of measured results."""
    routing = "true router" if config["routing"] == "model" else "recorded routing replayed"
    return (
        f"{config['weights']} weights, {config['dtype']}, {routing}, median of {config['repeats']} repeats after "
        f"{config['warmup']} to warm up, policies interleaved."
    )
