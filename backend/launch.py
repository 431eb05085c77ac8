"""Start ranks with torchrun underneath, wait for them, and leave nothing behind.

When one rank ends badly the others are stopped within seconds and its error is raised here. Knows nothing about what
the ranks compute.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesim.backend.job import Job, Progress
from moesim.traces import InputError, MoesimError

GRACE_S = 5
"""How long a rank that is told to end may take before it is killed."""
LAST_LINES = 5


def under_torchrun() -> bool:
    """True in a process that torchrun has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_device(device: str, ranks: int) -> str:
    """'cpu' or 'cuda'; 'auto' takes the GPUs where there are enough. Raises InputError where they do not suffice."""
    if device not in ("cpu", "cuda", "auto"):
        raise InputError(f"--device must be cpu, cuda or auto, got {device!r}")
    if device == "cpu":
        return "cpu"
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if gpus >= ranks else "cpu"
    if gpus == 0:
        cuda = torch.version.cuda
        why = "nvidia-smi tells whether there is a driver" if cuda else "this build of torch is for CPUs only"
        raise InputError(f"--device cuda: torch sees no CUDA GPU here ({why}); use --device cpu")
    if ranks > gpus:
        raise InputError(f"--ranks {ranks} is more than the {gpus} GPUs of this machine: use one rank a GPU")
    return "cuda"


def launch(job: Job, progress: Progress | None = None) -> None:
    """Start the job's ranks and return when all have ended well; what they found is in the job's folder.

    Raises InputError or MoesimError with the error of the rank that ended first.
    """
    job.write()
    with _reported(job, progress):
        run_ranks(["-m", "moesim.backend.worker", job.folder], job.ranks, Path(job.folder))


def run_ranks(arguments: list[str], ranks: int, folder: Path) -> None:
    """Run `python ARGUMENTS` as `ranks` processes under torchrun's agent; their output goes to `folder`/logs.

    Raises as `launch` does; a rank explains itself by `report_error`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )
    # The agent logs what we report ourselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    failures: dict[int, Any] = {}
    interrupted = False
    with _environment(), _own_signals(), _logs_closed():
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            failures = error.failures
        except SignalException:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        raise _explained(failures, folder)


def report_error(folder: Path, rank: int, error: BaseException) -> None:
    """Called by a rank: leave the error where the launcher looks for it, in one line where it is a known one."""
    from moesim.backend.failures import explained, lost_connection

    known = explained(error)
    data = {
        "rank": rank,
        "time_s": time.time(),
        # The others lose their connection when a rank ends: that explains nothing.
        "ours": known is not None and not lost_connection(error),
        "input": isinstance(known, InputError),
        "type": type(error).__name__,
        "message": str(known or error),
    }
    (folder / f"error-{rank}.json").write_text(json.dumps(data), encoding="utf-8")


def end_with_parent() -> None:
    """Called by a rank: end at once when the launcher is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _explained(failures: dict[int, Any], folder: Path) -> MoesimError:
    """The error of the rank that is to blame: one of ours, else a rank that ended without a word, else the first.

    A rank that only lost the connection to another one says so, later than the other; the agent stops with SIGTERM.
    """
    files = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("error-*.json")]
    said = sorted(files, key=lambda error: float(error["time_s"]))
    for error in said:
        if error["ours"] and error["input"]:
            return InputError(error["message"])
        if error["ours"]:
            return MoesimError(f"rank {error['rank']}: {error['message']}")
    spoken = {error["rank"] for error in said}
    for rank, failure in failures.items():
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            return MoesimError(f"rank {rank} was killed by {name}; the other ranks were stopped")
        if failure.exitcode > 0 and rank not in spoken:
            lines = _last_lines(folder / "logs", rank)
            return MoesimError(f"rank {rank} ended with exit code {failure.exitcode}. {lines}")
    if said:
        return MoesimError(f"rank {said[0]['rank']} failed with {said[0]['type']}: {said[0]['message']}")
    return MoesimError(f"the ranks were stopped from outside: {', '.join(str(rank) for rank in failures)}")


def _last_lines(logs: Path, rank: int) -> str:
    found = sorted(logs.glob(f"**/{rank}/stderr.log"))
    if not found:
        return "It said nothing."
    lines = found[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    return "It said: " + " | ".join(lines[-LAST_LINES:])


@contextmanager
def _environment() -> Iterator[None]:
    """Variables that the ranks inherit: one thread each, and the loopback interface, since all are on this machine."""
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    wanted |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S), "TOKENIZERS_PARALLELISM": "false"}
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        wanted["GLOO_SOCKET_IFNAME"] = loopback[0]
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextmanager
def _logs_closed() -> Iterator[None]:
    """The agent forgets to close the ranks' log files; collect them here, not with a warning in other people's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@contextmanager
def _own_signals() -> Iterator[None]:
    """The agent installs signal handlers and leaves them; put ours back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _reported(job: Job, progress: Progress | None) -> Iterator[None]:
    """While the ranks run, pass on what rank 0 says about its progress."""
    if progress is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            try:
                done, what = json.loads(job.progress_file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            progress(float(done), str(what))

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
