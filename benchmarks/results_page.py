"""docs/results.md and README's table, written whole from the committed JSON under benchmarks/results/.

    python benchmarks/results_page.py            # writes both
    python benchmarks/results_page.py --check    # fails where they are not what the JSON says

The newest run of benchmarks/gpu/run_all.py that is no rehearsal counts. Whatever its numbers say is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marks import with_part
from results_claims import Claim, claims
from results_tables import TITLES, table, tables

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "moesim-gpu-benchmark"
NO_RUN = "No GPU run is committed yet: every row below says so, and no GPU number of this project is a measurement."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    args = parser.parse_args()
    report = newest(ROOT / "benchmarks/results")
    readme = ROOT / "README.md"
    wanted = {
        ROOT / "docs/results.md": page(report),
        readme: with_part(readme.read_text(encoding="utf-8"), readme_part(report), "results", readme.name),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if args.check:
        sys.exit("\n".join(f"{path.name} is not what the JSON says: run {Path(__file__).name}" for path in stale) or 0)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: written")


def newest(folder: Path) -> Mapping[str, Any] | None:
    """The latest committed run, with the name of its file; None where there is none."""
    found = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and report.get("format") == FORMAT and not report["small"]:
            found.append({**report, "file": path.name})
    return max(found, key=lambda report: str(report["date"]), default=None)


def page(report: Mapping[str, Any] | None) -> str:
    """All of docs/results.md."""
    head = (
        "# Measured on a GPU\n\n"
        "Written by `benchmarks/results_page.py` from the JSON under `benchmarks/results/`; do not edit it by hand.\n\n"
    )
    if report is None:
        return f"{head}{NO_RUN}\n\n{claims_table(claims({}))}\n{RULES}"
    return (
        f"{head}From [{report['file']}](../benchmarks/results/{report['file']}), {report['date'][:10]}, "
        f"{report['wall_s']:.0f} s in all.\n\n{sections_table(report)}\n"
        f"## What was to be shown\n\n{claims_table(claims(report))}\n{RULES}\n{tables(report)}"
    )


RULES = (
    "Medians over repeats; the spread is that of the smallest and largest repeat. All ratios come from one run. "
    "How each number is made stands at the top of the section's script in `benchmarks/gpu/`.\n"
)


def readme_part(report: Mapping[str, Any] | None) -> str:
    """What stands between the marks of README: a row for each goal, over all its claims."""
    if report is None:
        return "No GPU run is committed yet; [docs/results.md](docs/results.md) says what will be measured.\n"
    goals: dict[str, list[Claim]] = {}
    for claim in claims(report):
        goals.setdefault(claim.goal, []).append(claim)
    lines = table(["on one GPU", "target", "measured", "met"], [goal_row(goal, made) for goal, made in goals.items()])
    ran = [claim for made in goals.values() for claim in made if claim.met is not None]
    devices = ", ".join(dict.fromkeys(claim.device for claim in ran))
    where = f"Measured on {devices}, {report['date'][:10]}"
    return f"{lines}\n{where}; all tables are in [docs/results.md](docs/results.md).\n"


def goal_row(goal: str, made: list[Claim]) -> list[str]:
    """Targets, the range of what was measured, and how many of the claims are met."""
    ran = [claim for claim in made if claim.met is not None]
    targets = ", ".join(dict.fromkeys(claim.target for claim in made))
    if not ran:
        return [goal, targets, "not run", "not run"]
    values = [claim.value for claim in ran if claim.value is not None]
    unit = ran[0].unit
    told = f"{min(values):.3g}{unit} .. {max(values):.3g}{unit}" if len(set(values)) > 1 else ran[0].measured
    left = f", {len(made) - len(ran)} not run" if len(ran) < len(made) else ""
    return [goal, targets, told, f"{sum(bool(claim.met) for claim in ran)} of {len(ran)}{left}"]


def claims_table(made: list[Claim]) -> str:
    """One row a claim."""
    rows = []
    for c in made:
        rows.append([c.goal, c.what, c.target, c.measured, c.spread, c.verdict, "" if c.met is None else c.device])
    return table(["goal", "case", "target", "measured", "spread", "", "device"], rows)


def sections_table(report: Mapping[str, Any]) -> str:
    """What ran, on what, and how it ended."""
    rows = []
    for name in TITLES:
        found = report["sections"].get(name)
        if found is None:
            rows.append([name, "not run", "", "", "", ""])
            continue
        about = found["environment"]
        versions = {key: number for key, number in about.get("versions", {}).items() if number}
        told = ", ".join(f"{key} {number}" for key, number in versions.items())
        driver = f"driver {about['driver']}, CUDA {about['cuda']}" if about.get("driver") else ""
        commit = str(about.get("commit") or "")
        seconds = f"{found['wall_s']:.0f}"
        rows.append([name, found["status"], seconds, f"{about.get('device_name', '')} {driver}".strip(), told, commit])
    return table(["section", "ended", "seconds", "device", "versions", "commit"], rows)


if __name__ == "__main__":
    main()
