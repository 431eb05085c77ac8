"""What the project set out to show on one GPU, each as a row: target, what was measured, met or not.

Reads what benchmarks/gpu/run_all.py wrote, and says "not run" of whatever is not in it. Knows nothing about how it was
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

Numbers = Mapping[str, Any]

ENCODER_TOKENS = (64, 1024, 4096, 32768)
DECODE_BATCHES = (1, 16, 64)
FLOOR_TOKENS = (4096, 32768)
DTYPES = ("float32", "bfloat16", "float16")
PREDICTIVE = ("predictive-layer", "predictive-batch")
PARTITIONS = (4, 8)
OFFLOADED = ("decode-1", "decode-16", "encoder-1024")
RESIDENT = ("10%", "25%", "50%")
EXECUTORS = ("dropin", "partitions", "offload")
LOSSY = ("hobbit", "fate", "on-demand:int8", "on-demand:int4", "predicted")
CONFIGURATIONS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row."""

    goal: str
    """What several rows are about; README has a row for each."""
    what: str
    """Which of them this is."""
    target: str
    measured: str = "not run"
    spread: str = ""
    met: bool | None = None
    """None where it was not run."""
    value: float | None = None
    """The number in `measured`, where it is one."""
    unit: str = ""
    device: str = ""

    @property
    def verdict(self) -> str:
        """For people."""
        return {True: "met", False: "not met", None: "not run"}[self.met]

    def line(self) -> str:
        """One line of a terminal."""
        spread = f" ({self.spread})" if self.spread else ""
        return f"{self.verdict:<8} {self.goal}, {self.what}: {self.measured}{spread}, target {self.target}"


def claims(report: Numbers) -> list[Claim]:
    """All of them, in the order of the project's goals."""
    made: list[Claim] = []
    for part in (correctness, models, floors, offloading, partitions, quality, fidelity):
        made += part(report)
    return made


def correctness(report: Numbers) -> Iterator[Claim]:
    """Equality with the Hugging Face forward: of the layers in float64, of whole models in float32."""
    rows, on = entries(report, "layers"), device(report, "layers")
    for dtype in DTYPES:
        told = {name: row for name, row in rows.items() if name.startswith("errors/") and dtype in name.split("/")}
        yield _errors(Claim(goal="MoE layer against float64", what=dtype, target="within tolerance", device=on), told)
    exact = entries(report, "models").get("exact float32", {})
    claim = Claim(goal="tokens of generate in float32", what="switch-base-8, with padding", target="those of HF")
    if "tokens_equal" in exact:
        batch, count = exact["tokens"]
        same = bool(exact["tokens_equal"])
        told = "equal" if same else "different"
        claim = replace(claim, measured=told, met=same, spread=f"{batch} x {count}", device=device(report, "models"))
    yield claim


def _errors(claim: Claim, rows: Numbers) -> Claim:
    """Fill in the largest error of all kernels, and name those that are beyond the tolerance or failed."""
    within = [row for row in rows.values() if "within" in row]
    if not within:
        return claim
    worst, tolerance = max(float(row["max_error"]) for row in within), within[0]["tolerance"]
    wrong = [name for name, row in rows.items() if not row.get("within")]
    told = f"{worst:.2g}" + (f"; not: {', '.join(wrong)}" if wrong else "")
    cases = f"{len(within)} kernels and cases"
    return replace(claim, target=f"<= {tolerance:g}", measured=told, spread=cases, met=not wrong, value=worst)


def models(report: Numbers) -> Iterator[Claim]:
    """Against the Hugging Face model as shipped."""
    rows, on = entries(report, "models"), device(report, "models")
    goal = "speedup over Hugging Face as shipped"
    for tokens in ENCODER_TOKENS:
        row = rows.get(f"encoder {tokens}", {})
        claim = Claim(goal=f"encoder, {goal}", what=f"{tokens:,} tokens", target="", unit="x", device=on)
        yield at_least(claim, 8.0 if tokens <= 4096 else 4.0, row.get("speedup"), row.get("speedup_range"))
    for batch in DECODE_BATCHES:
        row = rows.get(f"decode {batch}", {})
        claim = Claim(goal=f"decode, {goal}", what=f"batch {batch}", target="", unit="x", device=on)
        yield at_least(claim, 4.0, row.get("speedup"), row.get("speedup_range"))


def floors(report: Numbers) -> Iterator[Claim]:
    """The MoE layers against what the memory or the matrix units allow at best, by the fastest kernel."""
    rows, on = entries(report, "layers"), device(report, "layers")
    for tokens in FLOOR_TOKENS:
        for skew in ("zipf", "uniform"):
            start = f"speed/{tokens} tokens/{skew}/"
            ours = [row for name, row in rows.items() if name.startswith(start) and row.get("graph")]
            best: Numbers = min(ours, key=lambda row: float(row["layer_s"]), default={})
            ends = [best[key] / best["floor_s"] for key in ("layer_min_s", "layer_max_s")] if best else None
            claim = Claim(
                goal="MoE layer over its floor", what=f"{tokens:,} tokens, {skew}", target="", unit="x", device=on
            )
            yield at_most(claim, 1.5, best.get("over_floor"), ends)


def offloading(report: Numbers) -> Iterator[Claim]:
    """The best causal exact policy beside the oracle, and the best with int8 copies, over on-demand LRU."""
    rows, on = entries(report, "offload"), device(report, "offload")
    cases = [(f"{case}/{share}", f"{case}, {share} resident") for case in OFFLOADED for share in RESIDENT]
    known = {name: row for name, row in rows.items() if "ratio_to_oracle" in row}
    # A rehearsal has cases of its own.
    cases += [(name, name) for name in known if name not in dict(cases)]
    for name, what in cases:
        row = known.get(name, {})
        claim = Claim(
            goal="offloading: best causal exact policy over the oracle", what=what, target="", unit="x", device=on
        )
        claim = at_most(claim, 1.15, row.get("ratio_to_oracle"), row.get("ratio_to_oracle_range"))
        if row:
            own, best = (row[key] for key in ("speedup_over_lru", "oracle_speedup_over_lru"))
            told = f"{claim.measured}; over LRU {own:.3g}x ({row['best_causal']}), the oracle {best:.3g}x"
            claim = replace(claim, measured=told)
        yield claim
    for name, what in cases:
        row = known.get(name, {})
        claim = Claim(goal="offloading: int8 copies over on-demand LRU", what=what, target="", unit="x", device=on)
        yield at_least(claim, 1.7, row.get("int8_speedup_over_lru"), row.get("int8_speedup_over_lru_range"))


def partitions(report: Numbers) -> Iterator[Claim]:
    """Predictive replication against contiguous placement: the better of its two policies in every case that ran."""
    rows, on = entries(report, "partitions"), device(report, "partitions")
    cases = list(dict.fromkeys(n.rpartition("/")[0] for n in rows if n.endswith(PREDICTIVE) and n[0].isdigit()))
    best: dict[str, Numbers] = {}
    for case in cases:
        found = [rows[f"{case}/{name}"] for name in PREDICTIVE if "experts_speedup" in rows.get(f"{case}/{name}", {})]
        best[case] = max(found, key=lambda row: float(row["experts_speedup"]), default={})
    missing = [f"{parts} partitions" for parts in PARTITIONS if not any(c.startswith(f"{parts} ") for c in cases)]
    for case in [*cases, *missing]:
        row = best.get(case, {})
        goal = "virtual GPUs: expert phase, predictive replication over contiguous"
        claim = Claim(goal=goal, what=case.replace("/", ", "), target="", unit="x", device=on)
        yield at_least(claim, 1.4, row.get("experts_speedup"), row.get("experts_speedup_range"))
    for case in [*cases, *missing]:
        goal = "virtual GPUs: busy share of that phase"
        claim = Claim(goal=goal, what=case.replace("/", ", "), target="", unit="%", device=on)
        share = best.get(case, {}).get("busy_share")
        yield at_least(claim, 95, None if share is None else 100 * share, None)
    for name, row in rows.items():
        if name.startswith("exact/") and ("within" in row or "identical" in row):
            goal = "virtual GPUs: outputs under every policy, slots poisoned"
            met = bool(row.get("within", row.get("identical"))) and bool(row.get("finite", True))
            worst = float(row.get("max_error", row.get("max_difference")))
            target = f"<= {row['tolerance']:g}" if "tolerance" in row else "equal"
            what, told = name.removeprefix("exact/"), f"{worst:.2g}"
            yield Claim(goal=goal, what=what, target=target, measured=told, value=worst, met=met, device=on)


def quality(report: Numbers) -> Iterator[Claim]:
    """The shipped model on held-out text: every executor that is exact, then what is not, with its measured loss."""
    rows, on = entries(report, "quality"), device(report, "quality")
    goal = "quality: change of the loss by an exact executor, bfloat16"
    for name in _named(rows, "exact", EXECUTORS, "loss_change", "/bfloat16"):
        row = rows.get(f"exact/{name}/bfloat16", {})
        change = abs(float(row["loss_change"])) if "loss_change" in row else None
        yield at_most(Claim(goal=goal, what=name, target="", unit=" nats", device=on), 1e-3, change, None)
    for name in _named(rows, "tokens", ("dropin", "offload"), "equal"):
        row = rows.get(f"tokens/{name}", {})
        claim = Claim(goal="quality: tokens of generate, float32", what=name, target="equal", device=on)
        if "equal" in row:
            told = "equal" if row["equal"] else "different"
            claim = replace(claim, measured=told, met=bool(row["equal"]), spread=f"{row['tokens']} tokens")
        yield claim
    for name in _named(rows, "lossy", LOSSY, "loss_change"):
        row = rows.get(f"lossy/{name}", {})
        claim = Claim(goal="quality: loss of what is not exact", what=name, target="measured", unit=" nats", device=on)
        if "loss_change" in row:
            value = float(row["loss_change"])
            told, error = f"{value:+.2g} nats", f"standard error {row['loss_error']:.2g}"
            claim = replace(claim, measured=told, value=value, spread=error, met=True)
        yield claim


def _named(rows: Numbers, group: str, expected: Sequence[str], key: str, end: str = "") -> list[str]:
    """Names of a group's entries that have `key`, and of those expected that begin none of them."""
    there = [name for name, row in rows.items() if name.startswith(f"{group}/") and name.endswith(end) and key in row]
    parts = [name.removeprefix(f"{group}/").removesuffix(end) for name in there]
    return [*parts, *(name for name in expected if not any(part.startswith(name) for part in parts))]


def fidelity(report: Numbers) -> Iterator[Claim]:
    """Errors of the simulated speedups of whole steps, over everything that was both simulated and run."""
    errors, devices = [], []
    for name in ("partitions", "offload"):
        rows = [row for key, row in entries(report, name).items() if key.startswith("fidelity/") and "errors" in row]
        errors += [abs(float(row["errors"]["step"])) for row in rows]
        devices += [device(report, name)] * bool(rows)
    on = ", ".join(dict.fromkeys(devices))
    goal, count = "simulated against measured speedup", f"{len(errors)} configurations" if errors else ""
    claim = Claim(goal=f"{goal}, absolute error", what="median", target="", unit="%", device=on)
    yield replace(at_most(claim, 5, 100 * median(errors) if errors else None, None), spread=count)
    yield replace(at_most(replace(claim, what="worst"), 15, 100 * max(errors) if errors else None, None), spread=count)
    claim = Claim(goal=goal, what="configurations", target="", device=on)
    yield at_least(claim, CONFIGURATIONS, len(errors) or None, None)


def at_least(claim: Claim, target: float, value: float | None, spread: Sequence[float] | None) -> Claim:
    """The claim that `value` reaches `target`, filled in where there is one."""
    claim = replace(claim, target=f">= {target:g}{claim.unit}")
    return claim if value is None else _judged(claim, value, value >= target, spread)


def at_most(claim: Claim, target: float, value: float | None, spread: Sequence[float] | None) -> Claim:
    """The claim that `value` does not exceed `target`, filled in where there is one."""
    claim = replace(claim, target=f"<= {target:g}{claim.unit}")
    return claim if value is None else _judged(claim, value, value <= target, spread)


def _judged(claim: Claim, value: float, met: bool, spread: Sequence[float] | None) -> Claim:
    told = f"{spread[0]:.3g} .. {spread[1]:.3g}" if spread else ""
    return replace(claim, measured=f"{value:.3g}{claim.unit}", spread=told, met=met, value=value)


def entries(report: Numbers, name: str) -> Numbers:
    """A section's entries by name; none where it is not in the report."""
    found: Numbers = report.get("sections", {}).get(name, {}).get("entries", {})
    return found


def device(report: Numbers, name: str) -> str:
    """Name of the device that a section ran on."""
    return str(report.get("sections", {}).get(name, {}).get("environment", {}).get("device_name", ""))
