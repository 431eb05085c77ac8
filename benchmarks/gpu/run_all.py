"""Everything that is measured on one GPU, in one command and at most 8 minutes.

    python benchmarks/gpu/run_all.py --out FOLDER [--device cuda] [--only layers,models] [--limit-s 480]
    python benchmarks/gpu/run_all.py --out FOLDER --device cpu --small       # a rehearsal anywhere
    python benchmarks/gpu/run_all.py --out FOLDER --merge a.json b.json      # runs of different sections in one file

Every section (speed of layers and models, virtual GPUs, offloading, quality) runs in a process of its own within its
share of the time, and what it has measured is on disk at once: one that fails, hangs or is killed loses nothing else.
Leaves FOLDER/gpu.json, and FOLDER/SECTION.log with what sections say. Needs moesim importable and no network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FORMAT, VERSION = "moesim-gpu-benchmark", 1
SECTIONS = {"layers": 70, "models": 110, "partitions": 130, "offload": 130, "quality": 40}
"""Seconds of each at the full limit; what one does not use goes to those that follow."""
LIMIT_S = 480
OVERRUN_S = 4.0
"""Of a section's time (a tenth at most), what it is not told of: its last measurement may take longer than thought."""
GRACE_S = 3.0
"""From asking a process to end until it is killed."""
LINE = 150
"""Most characters of a line that says what was measured."""
SPREAD = (".min_s", ".max_s", ".repeats")
"""What such a line leaves out of a timing."""
HEADLINES = ("speedup", "over_floor", "error", "within", "identical", "busy_share", "step")
"""Ends of the names of what it tells first."""
MOST = 8
"""Most errors of a section that the table names."""


def main() -> None:
    args = parse(sys.argv[1:])
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        run_section(args)
    elif args.merge:
        write(args.out / "gpu.json", merged([read(path) for path in args.merge]))
    else:
        run_sections(args)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and the sections' logs")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for all sections together")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a rehearsal, whose numbers mean nothing")
    parser.add_argument("--merge", type=Path, nargs="+", help="combine gpu.json files; the last of a section counts")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.only = [name.strip() for name in args.only.split(",") if name.strip()]
    if unknown := set(args.only) - SECTIONS.keys():
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    return args


def run_sections(args: argparse.Namespace) -> None:
    """One after the other; gpu.json is complete after each."""
    # So that being told to end leaves no section behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    report = {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": args.device,
        "small": args.small,
        "limit_s": args.limit_s,
        "sections": {},
    }
    for i, name in enumerate(args.only):
        left = args.limit_s - (time.monotonic() - begin)
        limit_s = left * SECTIONS[name] / sum(SECTIONS[other] for other in args.only[i:])
        print(f"== {name}: at most {limit_s:.0f} s", flush=True)
        report["sections"][name] = section(args, name, limit_s)
        report["wall_s"] = round(time.monotonic() - begin, 1)
        write(args.out / "gpu.json", report)
    print(summary(report), flush=True)


def section(args: argparse.Namespace, name: str, limit_s: float) -> dict[str, Any]:
    """Run one in its own process and collect what it left."""
    kept = args.out / f"{name}.json"
    kept.unlink(missing_ok=True)
    if not (HERE / f"{name}.py").exists():
        return {"status": "missing: there is no such script", "wall_s": 0.0, "environment": {}, "entries": {}}
    words = [sys.executable, str(HERE / "run_all.py"), "--out", str(args.out), "--device", args.device]
    words += ["--section", name, "--limit-s", str(limit_s), *(["--small"] if args.small else [])]
    begin = time.monotonic()
    with (args.out / f"{name}.log").open("w", encoding="utf-8") as log, started(words, log) as process:
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
    wall_s = round(time.monotonic() - begin, 1)
    found = read(kept) if kept.exists() else {"environment": {}, "entries": {}}
    status = "ok" if code == 0 else failed(found, code, wall_s, args.out / f"{name}.log")
    found.pop("error", None)
    print(f"== {name}: {status}, {wall_s:.0f} s", flush=True)
    return {"status": status, "wall_s": wall_s, "small": args.small, **found}


def failed(found: Mapping[str, Any], code: int | None, wall_s: float, log: Path) -> str:
    """One line: that its time was over, the section's own word, the signal, or the last line of its log."""
    if code is None:
        return f"timed out after {wall_s:.0f} s"
    if "error" in found:
        return f"failed: {found['error']}"
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f"failed: exit code {code}: {said[-1][:300] if said else 'it said nothing'}"


@contextmanager
def started(words: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group of its own, which is gone when the block is left, however that happens."""
    process = subprocess.Popen(words, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(GRACE_S)
            except (ProcessLookupError, PermissionError):
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()


def run_section(args: argparse.Namespace) -> None:
    """In the section's process: every report is a line on stdout and on disk before the section goes on."""
    sys.path.insert(0, str(HERE))
    begin, path = time.monotonic(), args.out / f"{args.section}.json"
    kept: dict[str, Any] = {"environment": {}, "entries": {}}

    def report(name: str, numbers: dict[str, Any]) -> None:
        before, now = kept["entries"].get(name, {}), plain(numbers)
        kept["entries"][name] = now
        write(path, kept)
        print(f"[{time.monotonic() - begin:6.1f} s] {told(name, before, now)}", flush=True)

    try:
        # Before anything touches CUDA: a section may set what the driver reads only once, as partitions does.
        module = importlib.import_module(args.section)
        from timing import environment

        check_device(args.device)
        kept["environment"] = environment(args.device)
        left_s = args.limit_s - min(OVERRUN_S, args.limit_s / 10) - (time.monotonic() - begin)
        module.run(report, device=args.device, small=args.small, budget_s=left_s)
    except Exception as error:
        traceback.print_exc()
        kept["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        write(path, kept)
        sys.exit(1)


def check_device(device: str) -> None:
    """Raise RuntimeError where there is none of the kind asked for."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device here; rehearse with --device cpu --small")


def told(name: str, before: Any, now: Any) -> str:
    """One line of at most `LINE` characters: what an entry says that it did not say before."""
    known = dict(flat(before))
    new = [(key, value) for key, value in flat(now) if key not in known or known[key] != value]
    new = [(key.removesuffix(".median_s"), value) for key, value in new if not key.endswith(SPREAD)]
    new.sort(key=lambda one: not one[0].endswith(HEADLINES))
    line = f"{name}: {' '.join(f'{key}={short(value)}' for key, value in new)}"
    return line if len(line) <= LINE else line[: LINE - 3] + "..."


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of what is not nested any further; lists only by their length."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}{key}.")
    else:
        yield prefix[:-1], f"[{len(value)}]" if isinstance(value, list) else value


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """JSON types only: scalars of numpy and torch as numbers, what is not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All sections of several runs, each with the environment it ran in; of a section the last one counts."""
    sections = {name: found for report in reports for name, found in report["sections"].items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": max(report["date"] for report in reports),
        "merged": len(reports),
        "small": any(report["small"] for report in reports),
        "wall_s": round(sum(found["wall_s"] for found in sections.values()), 1),
        "sections": {name: sections[name] for name in SECTIONS if name in sections},
    }


def summary(report: Mapping[str, Any]) -> str:
    """The table at the end: sections, then targets beside what was measured."""
    lines = ["", f"{'section':<12}{'entries':>9}{'errors':>8}{'seconds':>9}  status"]
    for name, found in report["sections"].items():
        wrong = {key: said for key, said in flat(found["entries"]) if key.endswith(".error")}
        counts = f"{len(found['entries']):>9}{len(wrong):>8}{found['wall_s']:>9.1f}"
        lines.append(f"{name:<12}{counts}  {found['status'][:200]}")
        lines += [f"  ! {key.removesuffix('.error')}: {str(said)[:160]}" for key, said in list(wrong.items())[:MOST]]
    sys.path.insert(0, str(HERE.parent))
    from results_claims import claims

    made = claims(report)
    judged = [claim.line() for claim in made if claim.met is not None]
    lines += ["", *judged, f"not run: {len(made) - len(judged)} further targets", f"{report['wall_s']:.0f} s in all"]
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Complete or not at all: the process may be killed at any moment."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
