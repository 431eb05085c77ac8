"""Which policy, with which settings: chosen on some held-out requests, confirmed on others that the choice never saw.

Requests are divided in three, never sharing one: those that policies are fitted on; of the others, by the next bit of
the hash that divides requests in `traces.workload.held_out`, those to tune and those to confirm. Recordings of loads,
which know no requests, are divided by time.

Candidates go through successive halving (Jamieson and Talwalkar, AISTATS 2016, algorithm 1, eta = 2): all are run on
the first steps, the better half on twice as many, until the rest has run all. Only simulated time decides. Among those
that are as fast as the fastest, within the noise of its steps, the simplest is chosen: the fewest bytes moved, then the
least memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moesim.predictors import Predictor
from moesim.sim.engine import DEFAULT, simulate
from moesim.sim.execution import Execution
from moesim.sim.policies import POLICIES, Policy, Recipe, make_policy, recipe
from moesim.sim.profile import HardwareProfile
from moesim.sim.quality import NOT_MEASURED, Quality, is_lossy, quality_of
from moesim.sim.results import Result
from moesim.sim.scenario import Scenario
from moesim.sim.sweep import every_policy
from moesim.traces import InputError, LoadTable, MoesimError, TokenTable, batches

BASELINE = "contiguous"
INTERVALS = (0.5, 2.0, 4.0)
"""Factors on the interval of a rule that acts every so many steps."""
SURVIVORS = 4
"""Candidates that run all steps at least."""
FIRST_STEPS = 16
"""Steps of the first round at least: a rule that acts every 8 steps must have acted."""
SMALLEST = 0.001
"""Differences in time below this share are noise, however steady they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What a winner must keep."""

    memory_bytes: int | None = None
    """Of the expert slots of a GPU."""
    latency_s: float | None = None
    """95th percentile of a step's time."""
    allow_lossy: bool = False
    """Whether policies count whose results are not the model's; only those whose quality was measured do."""
    qualities: tuple[Quality, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A policy with settings."""

    policy: str
    extra_slots: int
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the rule that differ from the named policy's, with their values."""

    @property
    def name(self) -> str:
        """For tables."""
        changed = "".join(f", {name} {value}" for name, value in self.changes)
        return f"{self.policy}{changed}, {self.extra_slots} extra slot{'s' * (self.extra_slots != 1)}"

    def recipe(self) -> Recipe:
        """The parts, changes included."""
        parts = recipe(self.policy)
        return replace(parts, rule=replace(cast(Any, parts.rule), **dict(self.changes))) if self.changes else parts


@dataclass(slots=True, kw_only=True)
class Trial:
    """What became of a candidate. Times are of the last round that it ran in."""

    candidate: Candidate
    reason: str | None = None
    """Why it is out of the question; None where it is not."""
    steps: int = 0
    speedup: float = math.nan
    """On the tuning requests."""
    latency_p95_s: float = math.nan
    moved_bytes: int = 0
    memory_bytes: int = 0
    step_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    confirmed: float | None = None
    """Speedup on the confirmation requests, where it was run there."""
    confirmed_p95_s: float | None = None
    quality: str = "exact"
    """What it costs in quality, in words."""

    def simplicity(self) -> tuple[float, int, int]:
        """Smaller is simpler; the least memory before the number in the list of policies."""
        names = list(POLICIES)
        policy = self.candidate.policy
        return self.moved_bytes, self.memory_bytes, names.index(policy) if policy in names else len(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The outcome."""

    winner: Trial
    trials: list[Trial]
    """All candidates: those that ran longest first, by speedup; then those that are out, with the reason."""
    ties: list[str]
    """Names of candidates that were faster than the winner, but not by more than the noise."""
    requests: dict[str, int]
    """Part (fit, tune, confirm) to its number of requests, or rows of loads."""
    steps: dict[str, int]
    """Part (tune, confirm) to its number of steps."""
    baseline: str
    cut_short: bool = False
    """True where the budget ended before all candidates had run all steps."""


def confirmation(request_T: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T] True for the half of the held-out requests that only confirms. `held_out` takes the highest bit of the hash
    of a request's number, this the next one, so that the two halvings are independent."""
    bit = request_T.astype(np.uint64) * np.uint64(0x9E3779B9) % np.uint64(1 << 32) >> np.uint64(30) & np.uint64(1)
    return np.asarray(bit.astype(np.bool_))


def three_parts(scenario: Scenario, max_steps: int | None = None) -> tuple[Scenario, Scenario]:
    """(tuning, confirmation): the held-out requests of `scenario` in two, both fitted on the same others.

    Raises InputError where a part would be empty.
    """
    if isinstance(scenario.fit, LoadTable):
        half = len(scenario.batches) // 2
        cut = [scenario.batches[:half], scenario.batches[half:]]
        parts = [replace(scenario, batches=steps[:max_steps]) for steps in cut]
    else:
        last_T = confirmation(scenario.run.request)
        parts = [_only(scenario, scenario.run.take(rows), max_steps) for rows in (~last_T, last_T) if rows.any()]
    if len(parts) < 2 or not all(part.batches for part in parts):
        raise InputError("too few requests to tune on some and confirm on others: record more, or smaller batches")
    return parts[0], parts[1]


def _only(scenario: Scenario, run: TokenTable, max_steps: int | None) -> Scenario:
    return replace(scenario, run=run, batches=tuple(batches(run, scenario.workload, scenario.phase)[:max_steps]))


def candidates(names: Sequence[str], extra_slots: Sequence[int], *, as_named: bool = False) -> list[Candidate]:
    """Every policy with every number of extra slots and, unless `as_named`, other intervals of rules that have one."""
    found = []
    for name in names:
        rule = recipe(name).rule
        variants: list[tuple[tuple[str, Any], ...]] = [()]
        if not as_named and is_dataclass(rule) and "interval" in {one.name for one in fields(rule)}:
            usual = cast(Any, rule).interval
            variants += [(("interval", max(1, round(usual * factor))),) for factor in INTERVALS]
        found += [Candidate(policy=name, extra_slots=extra, changes=v) for v in variants for extra in extra_slots]
    return list(dict.fromkeys(found))


def default_policies(*, offload: bool) -> list[str]:
    """Those that do not know the future and run on machines, too, trained ones left out; with `offload` those for
    fewer slots than experts, whether machines run them or not."""
    fair = [name for name in every_policy(offload=offload) if not POLICIES[name].clairvoyant]
    return [name for name in fair if offload or not POLICIES[name].simulated_only]


class Judge:
    """Runs candidates on one part of the requests; a predictor is fitted once."""

    def __init__(self, profile: HardwareProfile, execution: Execution) -> None:
        self._profile, self._execution = profile, execution
        self._fitted: dict[str, Predictor] = {}

    def run(self, candidate: Candidate, scenario: Scenario, steps: int) -> tuple[Result, Policy]:
        """The first `steps` steps. Raises what `make_policy` and `simulate` raise."""
        cluster = replace(scenario.cluster, extra_slots=candidate.extra_slots)
        scenario = replace(scenario, cluster=cluster, batches=scenario.batches[:steps])
        known = deepcopy(self._fitted.get(candidate.policy))
        policy = make_policy(candidate.policy, cluster, scenario.fit, scenario.gates, fitted=known)
        if known is None and policy.predictor is not None:
            self._fitted[candidate.policy] = deepcopy(policy.predictor)
        # The name stays the named policy's: the profile charges its decisions by name.
        policy = replace(policy, recipe=candidate.recipe())
        return simulate(scenario, policy, self._profile, execution=self._execution), policy


Progress = Callable[[str, int, int], None]
"""Is told the candidate that begins, how many runs are done, and of how many at most."""


def tune(
    scenario: Scenario,
    profile: HardwareProfile,
    choice: Sequence[Candidate],
    *,
    baseline: str = BASELINE,
    execution: Execution = DEFAULT,
    constraints: Constraints | None = None,
    max_steps: int | None = None,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Choose among `choice` on half of the held-out requests of `scenario`, and confirm on the other half.

    `budget_s`: seconds of wall clock after which no further run begins; without it, equal inputs give equal outcomes.
    Raises InputError where the recording is too short, or no candidate runs and keeps the constraints.
    """
    constraints = constraints or Constraints()
    tuning, confirming = three_parts(scenario, max_steps)
    judge, deadline = Judge(profile, execution), math.inf if budget_s is None else time.monotonic() + budget_s
    plain = Candidate(policy=baseline, extra_slots=0)
    base, _ = judge.run(plain, tuning, len(tuning.batches))
    base_s = np.array([step.duration_s for step in base.steps])
    trials = [Trial(candidate=one) for one in dict.fromkeys([plain, *choice])]
    rounds = list(_rounds(len(trials), len(tuning.batches)))
    done, total, cut_short = 0, sum(left for left, _ in rounds), False
    running = trials
    for left, steps in rounds:
        running = sorted(running, key=lambda trial: -trial.speedup if trial.steps else 0)[:left]
        for trial in running:
            if time.monotonic() > deadline and trial.candidate != plain:
                cut_short = True
                continue
            if progress:
                progress(trial.candidate.name, done, total)
            _measure(trial, judge, tuning, steps, base_s, constraints)
            done += 1
        running = [trial for trial in running if trial.reason is None and trial.steps]
    full = max((trial.steps for trial in running), default=0)
    finalists = [trial for trial in running if trial.steps == full]
    if not finalists:
        raise InputError(_nobody(trials))
    winner, ties = choose(finalists)
    by_speed = sorted(finalists, key=lambda trial: (-trial.speedup, trial.simplicity()))
    _confirm([winner, *by_speed], judge, confirming, baseline)
    order = sorted(trials, key=lambda t: (t.reason is not None, -t.steps, -t.speedup if t.steps else 0))
    return Tuned(
        winner=winner,
        trials=order,
        ties=[trial.candidate.name for trial in ties],
        requests=_sizes(scenario, tuning, confirming),
        steps={"tune": len(tuning.batches), "confirm": len(confirming.batches)},
        baseline=baseline,
        cut_short=cut_short,
    )


def _rounds(count: int, steps: int) -> Iterator[tuple[int, int]]:
    """(candidates, steps) of every round: the candidates halve and the steps double, and the last runs all."""
    halvings = max(0, math.ceil(math.log2(max(count, 1) / SURVIVORS)))
    halvings = min(halvings, max(0, math.floor(math.log2(max(steps / FIRST_STEPS, 1)))))
    for number in range(halvings + 1):
        yield max(SURVIVORS, -(-count >> number)) if number else count, steps >> (halvings - number)


def _measure(
    trial: Trial,
    judge: Judge,
    tuning: Scenario,
    steps: int,
    base_s: NDArray[np.float64],
    constraints: Constraints,
) -> None:
    try:
        result, policy = judge.run(trial.candidate, tuning, steps)
    except MoesimError as error:
        trial.reason = " ".join(str(error).split())
        return
    trial.steps, trial.step_s = steps, np.array([step.duration_s for step in result.steps])
    trial.speedup = float(base_s[:steps].sum() / trial.step_s.sum())
    trial.latency_p95_s = result.metrics()["latency_p95_s"]
    trial.moved_bytes = result.totals.moved_bytes
    trial.memory_bytes = policy.cluster.gpu_slots * tuning.spec.expert_bytes(result.config["dtype"])
    trial.reason = _against(trial, result, constraints)


def _against(trial: Trial, result: Result, constraints: Constraints) -> str | None:
    """Why the candidate is out of the question, None where it is not; writes what its quality is."""
    if is_lossy(result):
        measured = quality_of(result, constraints.qualities)
        trial.quality = measured.text() if measured else NOT_MEASURED
        if not constraints.allow_lossy:
            return "not exact (--allow-lossy)"
        if measured is None:
            return "not ranked: not exact, and its quality has not been measured (--quality)"
    if result.totals.lost_tokens:
        return "some tokens found no expert"
    if constraints.memory_bytes is not None and trial.memory_bytes > constraints.memory_bytes:
        return f"expert slots take {trial.memory_bytes / 2**30:.2f} GiB a GPU"
    if constraints.latency_s is not None and trial.latency_p95_s > constraints.latency_s:
        return f"95% of its steps take up to {1e3 * trial.latency_p95_s:.3f} ms"
    return None


def choose(finalists: Sequence[Trial]) -> tuple[Trial, list[Trial]]:
    """(winner, candidates that were faster within the noise): the simplest of those that cannot be told from the
    fastest by their steps."""
    fastest = max(finalists, key=lambda trial: (trial.speedup, *(-x for x in trial.simplicity())))
    equal = [trial for trial in finalists if is_noise(trial.step_s, fastest.step_s)]
    winner = min(equal, key=lambda trial: (trial.simplicity(), -trial.speedup))
    return winner, [trial for trial in equal if trial.speedup > winner.speedup]


def is_noise(slow_s: NDArray[np.float64], fast_s: NDArray[np.float64]) -> bool:
    """Whether the mean difference of paired steps lies within twice its standard error, or is below 0.1% of the time.

    Steps are taken as independent, though copies reach from one into the next. Of fewer than four steps no spread is
    known, and only the 0.1% counts.
    """
    gap_S = slow_s - fast_s
    error = gap_S.std(ddof=1) / math.sqrt(len(gap_S)) if len(gap_S) >= 4 else 0.0
    return bool(gap_S.mean() <= max(2 * error, SMALLEST * fast_s.mean()))


def _confirm(finalists: Sequence[Trial], judge: Judge, confirming: Scenario, baseline: str) -> None:
    steps = len(confirming.batches)
    base, _ = judge.run(Candidate(policy=baseline, extra_slots=0), confirming, steps)
    for trial in finalists[: SURVIVORS + 1]:
        if trial.confirmed is None:
            result, _ = judge.run(trial.candidate, confirming, steps)
            trial.confirmed = base.total_s / result.total_s
            trial.confirmed_p95_s = result.metrics()["latency_p95_s"]


def _nobody(trials: Sequence[Trial]) -> str:
    reasons: Mapping[str, str] = {trial.candidate.name: trial.reason or "not run" for trial in trials}
    told = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    return f"no candidate runs and keeps the constraints ({len(reasons)} tried): {told}"


def _sizes(scenario: Scenario, tuning: Scenario, confirming: Scenario) -> dict[str, int]:
    """Requests of every part; of a recording of loads, whose tokens are requests of their own, rows and steps."""
    if isinstance(scenario.fit, LoadTable):
        return {"fit": len(scenario.fit), "tune": len(tuning.batches), "confirm": len(confirming.batches)}
    tables = {"fit": scenario.fit, "tune": tuning.run, "confirm": confirming.run}
    return {part: len(np.unique(table.request)) for part, table in tables.items()}
