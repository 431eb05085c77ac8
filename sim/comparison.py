"""Simulated beside measured: speedups over the same baseline, phase by phase, with the error of the simulation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moesim.sim.results import PHASES, Result
from moesim.traces import InputError

MUST_AGREE = (
    "family",
    "d_model",
    "d_ff",
    "phase",
    "gpus",
    "extra_slots",
    "batch",
    "order",
    "split",
    "steps",
    "tokens",
    "dtype",
    "resident",
    "tensor_parallel",
    "micro_batches",
    "send",
    "copy_dtype",
    "arrivals",
    "faults",
)
"""Keys of `Result.config` without which a simulated and a measured run are not about the same thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy. A speedup is baseline time / policy time, each within its own run."""

    policy: str
    simulated: float
    measured: float
    measured_low: float
    """Smallest and largest measured speedup over the repeats of the run."""
    measured_high: float
    simulated_phase_s: dict[str, float]
    measured_phase_s: dict[str, float]

    @property
    def error(self) -> float:
        """simulated speedup / measured speedup - 1."""
        return self.simulated / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies that were both simulated and run, the baseline first."""

    baseline: str
    simulated_config: dict[str, Any]
    measured_config: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        rows = [{**asdict(row), "error": row.error} for row in self.rows]
        return {**asdict(self), "format": "moesim-comparison", "version": 1, "phases": PHASES, "rows": rows}


def compare(simulated: list[Result], measured: list[Result], baseline: str) -> Comparison:
    """Pair the results by policy. Raises InputError where the baseline is missing on a side, no other policy is on
    both, the runs had different inputs (naming the first key that differs), or the profile is of another executor."""
    sides = {"simulated": _by_policy(simulated, "simulated"), "measured": _by_policy(measured, "measured")}
    for kind, results in sides.items():
        if baseline not in results:
            raise InputError(f"the {kind} results lack the baseline {baseline!r}; they have: {', '.join(results)}")
    sim, real = sides["simulated"], sides["measured"]
    both = [baseline] + [policy for policy in real if policy in sim and policy != baseline]
    if len(both) == 1:
        raise InputError(f"no policy beside {baseline!r} is in both files")
    for policy in both:
        _check_same_inputs(sim[policy], real[policy])
    return Comparison(
        baseline=baseline,
        simulated_config=sim[baseline].config,
        measured_config=real[baseline].config,
        rows=[_row(sim[policy], sim[baseline], real[policy], real[baseline]) for policy in both],
    )


def _by_policy(results: list[Result], kind: str) -> dict[str, Result]:
    wrong = [result for result in results if result.kind != kind]
    if wrong:
        raise InputError(f"expected {kind} results, found a {wrong[0].kind} one of {wrong[0].policy}")
    return {result.policy: result for result in results}


def _check_same_inputs(simulated: Result, measured: Result) -> None:
    for key in MUST_AGREE:
        a, b = simulated.config.get(key), measured.config.get(key)
        if a != b:
            raise InputError(
                f"{measured.policy}: {key} is {a!r} in the simulation and {b!r} in the measurement; run both alike"
            )
    calibrated, ran = simulated.config.get("profile_executor"), measured.config.get("executor")
    if calibrated and ran and calibrated != ran:
        raise InputError(
            f"{measured.policy}: the simulation's profile was calibrated on {calibrated}, and the measurement ran on "
            f"{ran}; calibrate what is run"
        )


def _row(sim: Result, sim_base: Result, real: Result, real_base: Result) -> Row:
    ratios = [a / b for a, b in zip(repeat_totals(real_base), repeat_totals(real), strict=True)]
    return Row(
        policy=real.policy,
        simulated=sim_base.total_s / sim.total_s,
        measured=real_base.total_s / real.total_s,
        measured_low=min(ratios),
        measured_high=max(ratios),
        simulated_phase_s=sim.phase_s(),
        measured_phase_s=real.phase_s(),
    )


def repeat_totals(result: Result) -> list[float]:
    """Seconds of every repeat of a measured run, in the order in which they ran."""
    totals = result.config.get("repeat_total_s") or [result.total_s]
    return [float(total) for total in totals]
