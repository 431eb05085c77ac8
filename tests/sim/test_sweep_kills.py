"""A sweep that is killed, again and again: every run is there once in the end, and was run once."""

import json
import os
import signal
import subprocess
import sys
import time

from pyarrow import parquet

from helpers import make_spec, make_table
from moesim.sim.sweep_store import RUNS, TABLE
from moesim.traces.writer import TraceWriter

NODE = "8xH100-NVLink"


def test_five_hundred_runs_killed_three_times_are_five_hundred_runs(tmp_path):
    with TraceWriter(tmp_path / "small.moetrace", make_spec(), {}) as writer:
        writer.append("encoder", make_table(requests=12, length=16))
    axes = {
        "policy": ["contiguous", "balanced", "eplb", "predictive-layer"],
        "gpus": [1, 2, 3, 4, 8],
        "batch_tokens": [16, 32, 48, 64, 96],
        "extra_slots": [0, 1, 2, 3, 4],
    }
    grid, out = tmp_path / "grid.toml", tmp_path / "sweep"
    grid.write_text("".join(f"{name} = {json.dumps(values)}\n" for name, values in axes.items()))
    words = ["sweep", tmp_path / "small.moetrace", "--grid", grid, "--profile", NODE, "--max-steps", 1, "--out", out]
    written = {}
    # Once only the parent is killed: its workers must end by themselves, or the next start shares the folder with them.
    for kill_at, workers, kill in ((60, 1, os.killpg), (180, 2, os.kill), (340, 1, os.killpg)):
        process = command(*words, "--workers", workers)
        try:
            wait_for(out / RUNS, kill_at, process)
            kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_for_the_end_of(process.pid)
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        for path in (out / RUNS).glob("*.parquet"):
            assert written.setdefault(path, state(path)) == state(path), "a finished run was run again"
    assert 340 <= len(written) < 500
    process = command(*words, "--json", stdout=subprocess.PIPE)
    told = json.loads(process.communicate()[0])
    assert process.returncode == 0 and told["found"] == len(written)
    assert all(state(path) == before for path, before in written.items()), "a finished run was run again"
    assert len(list((out / RUNS).iterdir())) == 500, "a file for each run, and none that is half written"
    keys = parquet.read_table(out / TABLE).column("key").to_pylist()
    assert len(keys) == len(set(keys)) == 500 and keys == [row["key"] for row in told["rows"]]


def command(*words, **options):
    code = "import sys; from moesim.cli import main; main(sys.argv[1:], prog_name='moesim')"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], start_new_session=True, **options)


def state(path):
    return path.stat().st_mtime_ns, path.stat().st_ino


def wait_for(folder, count, process):
    while len(list(folder.glob("*.parquet"))) < count:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)


def wait_for_the_end_of(group):
    deadline = time.monotonic() + 30
    while alive(group):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
