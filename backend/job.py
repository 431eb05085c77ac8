"""What a run or a calibration is asked to do: the note that the command leaves for the ranks.

Imports without torch, so that a wrong option is reported at once. Knows nothing about processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesim.sim.policies import recipe
from moesim.sim.scenario import STACK_OF_PHASE
from moesim.traces import InputError, Phase, Workload

Progress = Callable[[float, str], None]
"""Takes the share that is done, 0..1, and what is being done."""

JOB_FILE = "job.json"
PHASES = ("encoder", "prefill")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One invocation; every rank reads the same. Paths are strings so that it is JSON."""

    kind: str
    """'run' or 'calibrate'."""
    folder: str
    """Where the ranks leave results, errors and progress."""
    model: str
    ranks: int
    device: str
    """'cpu' or 'cuda'."""
    dtype: str = "float32"
    trace: str = ""
    phase: str = "encoder"
    policies: tuple[str, ...] = ()
    workload: Workload = field(default_factory=Workload)
    extra_slots: int = 1
    max_steps: int | None = None
    repeats: int = 3
    warmup: int = 1
    decisions: bool = False
    """Keep the decision log of the reported repeat."""
    timeline: bool = False
    """Keep what happened when in the reported repeat."""
    partitions: int = 0
    """Partitions of one device, in one process; 0: ranks."""
    random: str = ""
    """Name of a published model that gets random weights, in place of `model`."""
    routing: str = "model"
    """'model', or 'replay': what was recorded is forced on the layers."""

    def write(self) -> None:
        """Leave the note in the job's folder."""
        (Path(self.folder) / JOB_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The note that `write` left."""
        data = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        return cls(**{**data, "policies": tuple(data["policies"]), "workload": Workload(**data["workload"])})

    def decision_file(self, policy: str) -> Path:
        """Where the decision log of `policy` is left."""
        # By its place: the name of a policy of one's own is a path.
        return Path(self.folder) / f"decisions-{self.policies.index(policy)}.jsonl"

    @property
    def result_file(self) -> Path:
        """Where rank 0 leaves what came out."""
        return Path(self.folder) / "result.json"

    @property
    def progress_file(self) -> Path:
        """Where rank 0 says how far it is: JSON [done, what]."""
        return Path(self.folder) / "progress.json"

    def say(self, rank: int, done: float, what: str) -> None:
        """Rank 0 notes that the share `done` (0..1) is finished, and what comes now; the others keep quiet."""
        if rank == 0:
            temporary = self.progress_file.with_suffix(".partial")
            temporary.write_text(json.dumps([done, what]), encoding="utf-8")
            temporary.replace(self.progress_file)


def check_options(job: Job) -> None:
    """Raise InputError for whatever ranks and partitions can see to be wrong before a model is loaded."""
    if job.ranks < 1:
        raise InputError(f"--ranks must be at least 1, got {job.ranks}")
    if job.phase not in PHASES:
        raise InputError(
            f"--phase {job.phase} runs with --resident only so far: use encoder or prefill, or add --resident 100%"
        )
    if job.random and job.phase != "encoder":
        raise InputError("--random runs the encoder phase: a random encoder's text means nothing to a decoder")
    check_inputs(job)
    for policy in job.policies:
        parts = recipe(policy)
        if parts.simulated_only and parts.miss is not None:
            raise InputError(f"policy {policy!r} is about experts in host memory: add --resident 25%, say")
        if parts.simulated_only:
            raise InputError(
                f"policy {policy!r} runs in the simulator only: a bound that no machine can reach, or a mechanism that "
                "the real executor does not have yet"
            )
    if not job.model:
        return
    experts = int(model_config(Path(job.model)).get("num_experts", 0))
    if job.partitions > experts:
        raise InputError(f"--partitions {job.partitions} is more than the {experts} experts of the model")
    if job.ranks > experts:
        raise InputError(f"--ranks {job.ranks} is more than the {experts} experts of the model: at most one rank each")


def check_inputs(job: Job) -> None:
    """Raise InputError where model, routing and passes cannot be run, on whatever executor."""
    if job.random and job.model:
        raise InputError(f"give a MODEL or --random {job.random}, not both")
    if job.repeats < 1 or job.warmup < 0:
        raise InputError("--repeats must be at least 1 and --warmup at least 0")
    stack = STACK_OF_PHASE[Phase[job.phase.upper()]]
    if job.model and not int(model_config(Path(job.model)).get(f"num_sparse_{stack}_layers", 0)):
        raise InputError(f"{job.model}: the model has no MoE layers in its {stack}")
    if job.kind != "run":
        return
    if not job.random and not job.model:
        raise InputError("nothing to run: give the folder of a MODEL, or --random switch-base-128 with a --trace")
    if job.random and job.routing != "replay":
        raise InputError("a random router says nothing: --random goes with --routing replay and a --trace")
    if job.routing == "replay" and not job.trace:
        raise InputError("--routing replay needs the recorded routing: give --trace")


def model_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises InputError where it is missing or not a Switch model."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder}: not a model folder (config.json is missing or unreadable)") from None
    if not isinstance(config, dict) or config.get("model_type") != "switch_transformers":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise InputError(f"{folder}: model type {kind!r}; Switch models (switch_transformers) can be run so far")
    return config
