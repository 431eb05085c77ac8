"""docs/systems.md and its picture, from the results of benchmarks/systems.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from marks import write_part
from systems_claims import Claim
from systems_plan import CASES, Case

from moesim.sim.policies import POLICIES, recipe_digest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend is chosen first

SAME = 0.005
"""Speedups closer than this are called equal: the simulator is deterministic, but its profile is no measurement."""
NOT_MEASURED = "quality not measured"
BOUNDS = ("oracle", "oracle-weighed", "belady", "oracle-prefetch")
Runs = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Recording to policy to what was found."""


def report(
    out: Path, about: Mapping[str, Any], found: Mapping[str, Any], claims: Sequence[Claim], quality: Any
) -> None:
    """Write what stands between the marks of `out`, and the picture beside it."""
    cases = [case for case in CASES if case.name in found]
    picture = out.with_suffix(".png")
    draw(cases, found, picture)
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    quick = "A quick run: too little to conclude anything.\n\n" if about["quick"] else ""
    text = (
        f"{quick}Written on {about['date']} by `benchmarks/systems.py`, {versions}. Simulated, with data-sheet "
        f"profiles, not measured on a GPU.\n\n![Speedups by system]({picture.name})\n\n"
        "## What the papers report, and what came out\n\n"
        + claims_table(claims, found, quality)
        + "".join(case_text(case, found[case.name]["runs"], quality) for case in cases)
        + "\n## Deviations\n\n"
        + deviations(cases)
    )
    write_part(out, text)


def speedup(runs: Runs, policy: str, baseline: str) -> float | None:
    """Mean over the recordings of baseline seconds / policy seconds; None where one of them has no result."""
    pairs = [(one.get(baseline, {}).get("total_s"), one.get(policy, {}).get("total_s")) for one in runs.values()]
    return fmean(a / b for a, b in pairs) if pairs and all(a and b for a, b in pairs) else None


def verdict(ratio: float | None) -> str:
    """Whether an ordering holds."""
    if ratio is None:
        return "not run"
    return "equal" if abs(ratio - 1) <= SAME else "yes" if ratio > 1 else "no"


def claims_table(claims: Sequence[Claim], found: Mapping[str, Any], quality: Any) -> str:
    """One row a claim and case."""
    known = {case.name: case for case in CASES}
    lines = ["| system | reports | here | case | ratio of times | holds |", "|---|---|---|---|---|---|"]
    for claim in claims:
        for i, name in enumerate(case for case in claim.cases if case in found):
            ratio = speedup(found[name]["runs"], claim.faster, claim.slower)
            told = (claim.system, claim.reports, f"`{claim.faster}` over `{claim.slower}`") if i == 0 else ("", "", "")
            number = shown(claim.faster, ratio, known[name], quality)
            holds = verdict(ratio) if number != NOT_MEASURED else NOT_MEASURED
            lines.append(f"| {' | '.join(told)} | {name} | {number} | {holds} |")
    return "\n".join(lines) + "\n"


def case_text(case: Case, runs: Runs, quality: Any) -> str:
    """Settings and the table of one case, fastest first."""
    how = {key: value for key, value in case.describe().items() if value not in (None, False) and key != "title"}
    settings = ", ".join(f"{key} {_listed(value)}" for key, value in how.items())
    rows = {policy: speedup(runs, policy, case.baseline) for policy in case.policies}
    ran = sorted((p for p, s in rows.items() if s is not None), key=lambda p: -(rows[p] or 0))
    heads = ["policy", "speedup", *_columns(case), "moved GB", "hidden"]
    lines = [f"\n## {case.name}: {case.title}\n", f"{settings}; {_steps(runs)}.\n"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(_row(case, runs, policy, rows[policy], quality))} |" for policy in ran]
    why = {p: next((one[p]["why"] for one in runs.values() if "why" in one.get(p, {})), None) for p in case.policies}
    left = [f"- `{policy}`: {reason}" for policy, reason in why.items() if reason and policy not in ran]
    return "\n".join(lines) + "\n" + ("\nNot run:\n\n" + "\n".join(left) + "\n" if left else "")


def _row(case: Case, runs: Runs, policy: str, ratio: float | None, quality: Any) -> list[str]:
    name = f"`{policy}`" + (" (oracle)" if policy in BOUNDS else "")
    moved = fmean(one[policy]["moved_bytes"] for one in runs.values())
    hidden = fmean(one[policy]["hidden_bytes"] for one in runs.values())
    share = f"{hidden / moved:.2f}" if moved else "-"
    return [
        name,
        shown(policy, ratio, case, quality),
        *(f"{v:.3f}" for v in _values(case, runs, policy)),
        f"{moved / 1e9:.2f}",
        share,
    ]


def shown(policy: str, ratio: float | None, case: Case, quality: Any) -> str:
    """A speedup; of a policy that is not exact only beside the quality that was measured with as many slots."""
    if ratio is None or not POLICIES[policy].lossy:
        return "-" if ratio is None else f"{ratio:.3f}"
    entries = (quality or {}).get("entries", [])
    wanted = (policy, recipe_digest(POLICIES[policy]), case.resident)
    mine = [one for one in entries if (one["policy"], one.get("policy_digest"), one["resident"]) == wanted]
    if not mine or case.traces != ("switch-mini",):
        return NOT_MEASURED
    change, agree = mine[0]["loss"] - mine[0]["exact_loss"], mine[0]["top1_agreement"]
    return f"{ratio:.3f}, loss {change:+.4f}, top-1 agreement {agree:.1%}"


def _columns(case: Case) -> list[str]:
    return ["balancedness"] if case.resident is None else ["hit rate", "stalled"]


def _values(case: Case, runs: Runs, policy: str) -> list[float]:
    if case.resident is None:
        return [fmean(one[policy]["balancedness_mean_of_ratios"] for one in runs.values())]
    return [
        fmean(one[policy].get("cache", {}).get("hit_rate") or 0.0 for one in runs.values()),
        fmean(one[policy]["time_shares"]["weights"] for one in runs.values()),
    ]


def _steps(runs: Runs) -> str:
    counts = {(one["steps"], one["tokens"]) for run in runs.values() for one in run.values() if "steps" in one}
    steps, tokens = zip(*counts, strict=True)
    return f"{min(steps)} to {max(steps)} steps and {min(tokens):,} to {max(tokens):,} tokens a recording"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def deviations(cases: Sequence[Case]) -> str:
    """What each composition leaves out of its paper, as it says itself."""
    names = dict.fromkeys(policy for case in cases for policy in case.policies)
    told = [(name, " ".join(POLICIES[name].deviations.split())) for name in names]
    return "\n".join(f"- `{name}`: {text}" for name, text in told if text) + "\n"


def draw(cases: Sequence[Case], found: Mapping[str, Any], path: Path) -> None:
    """Speedups over the baseline, one panel a case, fastest on top; oracles hatched, systems that are not exact left
    out."""
    columns = 2
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 4.2 * rows), squeeze=False, layout="constrained")
    for case, ax in zip(cases, axes.flat, strict=False):
        runs = found[case.name]["runs"]
        known = {p: speedup(runs, p, case.baseline) for p in case.policies if not POLICIES[p].lossy}
        bars_of = sorted(((s, p) for p, s in known.items() if s is not None), key=lambda one: one[0])
        names, values = [p for _, p in bars_of], [s - 1 for s, _ in bars_of]
        bars = ax.barh(names, values, left=1.0, color=["#bbbbbb" if p in BOUNDS else "#0072b2" for p in names])
        ax.bar_label(bars, labels=[f"{v + 1:.2f}" for v in values], padding=2, fontsize=7)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_title(f"{case.name}: speedup over {case.baseline}", fontsize=9)
        ax.tick_params(labelsize=7)
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(axes.flat)[len(cases) :]:
        ax.remove()
    figure.suptitle("Simulated; oracles in grey", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
