"""Several policies on the same inputs, one after the other or in worker processes, with the same results either way.

Every policy writes its logs into files of its own, which are joined in the order of the policies: the joined log is the
same to the byte whoever wrote the parts.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.sim.driver import Sink
from moesim.sim.engine import DEFAULT, simulate
from moesim.sim.execution import Execution
from moesim.sim.faults import Fault
from moesim.sim.policies import make_policy
from moesim.sim.profile import HardwareProfile
from moesim.sim.results import Result
from moesim.sim.scenario import Scenario
from moesim.sim.serving import Server, Serving, kv_tokens

Progress = Callable[[str, int], None]
"""Is told the policy and the steps that it has done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What every policy is run on."""

    scenario: Scenario
    profile: HardwareProfile
    execution: Execution = DEFAULT
    serving: Serving | None = None
    """An open loop, for a scenario made to be served."""
    faults: tuple[Fault, ...] = ()
    keep_steps: bool = False


def run_policies(
    names: Sequence[str],
    inputs: Inputs,
    *,
    logs: dict[str, Path],
    workers: int = 1,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Fit and simulate each of `names`; results come in that order, each as soon as it is there.

    `logs`: where to write `events` and `decisions`, as JSON lines; what is complete is there whenever a result is.
    `progress` is told steps where there is one worker. Raises what `make_policy` and `simulate` raise.
    """
    for path in logs.values():
        path.write_text("", encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="moesim-") as folder:
        parts = {name: {log: Path(folder) / f"{i}-{log}" for log in logs} for i, name in enumerate(names)}
        for result in _results(parts, inputs, workers, progress):
            for log, path in parts[result.policy].items():
                with path.open("rb") as part, logs[log].open("ab") as whole:
                    shutil.copyfileobj(part, whole)
                path.unlink()
            yield result


def _results(
    parts: dict[str, dict[str, Path]], inputs: Inputs, workers: int, progress: Progress | None
) -> Iterator[Result]:
    if workers == 1 or len(parts) == 1:
        for name, files in parts.items():
            yield run_policy(name, inputs, files, progress)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads that others have started
    pool = ProcessPoolExecutor(min(workers, len(parts)), context, _begin, (inputs,))
    try:
        yield from pool.map(_work, parts, parts.values())
    finally:
        # On Ctrl-C nobody waits for the rest.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


_inputs: Inputs


def _begin(inputs: Inputs) -> None:
    global _inputs  # noqa: PLW0603 # a worker process gets its inputs once, not with every policy
    _inputs = inputs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers


def _work(name: str, files: dict[str, Path]) -> Result:
    return run_policy(name, _inputs, files, None)


def run_policy(name: str, inputs: Inputs, files: dict[str, Path], progress: Progress | None) -> Result:
    """Fit and simulate one policy, writing its logs to `files`. Raises as `run_policies`."""
    scenario, execution = inputs.scenario, inputs.execution
    policy = make_policy(name, scenario.cluster, scenario.fit, scenario.gates)
    source = None
    if inputs.serving is not None:
        shared = execution.tensor_parallel
        room = kv_tokens(scenario, policy.cluster, inputs.profile, execution.dtype or scenario.spec.dtype, shared)
        source = Server(scenario, inputs.serving, scenario.cluster.gpus // shared, room)
    with ExitStack() as stack:
        sinks: dict[str, Sink] = {}
        for log, path in files.items():
            file = stack.enter_context(path.open("w", encoding="utf-8"))
            sinks[log] = _line_writer(file.write, name)
        return simulate(
            scenario,
            policy,
            inputs.profile,
            execution=execution,
            source=source,
            faults=inputs.faults,
            sink=sinks.get("decisions"),
            events=sinks.get("events"),
            keep_steps=inputs.keep_steps,
            progress=(lambda done: progress(name, done)) if progress else None,
        )


def _line_writer(write: Callable[[str], Any], policy: str) -> Sink:
    def line(record: dict[str, Any]) -> None:
        write(json.dumps({"policy": policy, **record}, sort_keys=True, separators=(",", ":")) + "\n")

    return line
