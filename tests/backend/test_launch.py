"""Ranks that end badly: the launcher raises their error, and nothing is left running."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from processes import runs, wait_until

from moesim.backend.launch import check_device, run_ranks
from moesim.traces import InputError, MoesimError

DYING = Path(__file__).with_name("dying.py")


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("killed", MoesimError, "rank 1 was killed by SIGKILL"),
        ("input", InputError, "^the trace does not fit$"),
        ("bug", MoesimError, "rank 1 failed with ZeroDivisionError: oops"),
        ("memory", MoesimError, "rank 1: out of memory on the host .*: take fewer tokens a step"),
    ],
)
def test_the_others_are_stopped_and_the_error_is_told(tmp_path, how, kind, says):
    with pytest.raises(kind, match=says):
        run_ranks([str(DYING), str(tmp_path), how], 2, tmp_path)
    assert not alive(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_launcher_is_interrupted(tmp_path, number):
    code = f"""
        from pathlib import Path
        from moesim.backend.launch import run_ranks
        try:
            run_ranks([{str(DYING)!r}, {str(tmp_path)!r}, "waits"], 2, Path({str(tmp_path)!r}))
        except KeyboardInterrupt:
            print("interrupted")
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    launcher.send_signal(number)
    said, _ = launcher.communicate()
    assert ("interrupted" in said) == (number == signal.SIGINT)
    wait_until(lambda: not alive(tmp_path))


def test_device_is_checked_before_anything_starts():
    assert check_device("cpu", 3) == "cpu"
    with pytest.raises(InputError, match="must be cpu, cuda or auto"):
        check_device("tpu", 1)


@pytest.mark.parametrize(
    ("cuda", "says"), [(None, "this build of torch is for CPUs only"), ("13.0", "there is a driver")]
)
def test_why_there_is_no_gpu(monkeypatch, cuda, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    with pytest.raises(InputError, match=says):
        check_device("cuda", 1)
    assert check_device("auto", 1) == "cpu"


def alive(folder):
    """Files of ranks that still run."""
    return [file.name for file in folder.glob("pid-*") if runs(file.read_text())]
