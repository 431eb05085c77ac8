"""The frame of the GPU benchmarks: sections that fail, hang or die lose what they have not measured, nothing else."""

import json
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from processes import runs, wait_until

from moesim.backend import rates

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = """
import os
def environment(device):
    os.environ["TOUCHED"] = device
    return {"device": device, "device_name": "stand-in"}
"""
SECTIONS = {
    "layers": """
import os
first = "TOUCHED" not in os.environ
def run(report, *, device, small, budget_s):
    report("numbers", {"device": device, "small": small})
    report("numbers", {"device": device, "small": small, "less": 0 < budget_s < 24, "bad": float("nan")})
    report("imported before the device is used", {"first": first, "then": "TOUCHED" in os.environ})
    report("refused", {"error": "OutOfMemoryError: too much"})
""",
    "models": """
def run(report, **_):
    report("before", {"time": {"median_s": 0.5, "min_s": 0.4, "max_s": 0.6, "repeats": 3}})
    raise ValueError("oops\\nsecond line")
""",
    "partitions": """
import os, subprocess, sys, time
from pathlib import Path
def run(report, **_):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report("hanging", {"pid": os.getpid(), "child": child.pid})
    time.sleep(600)
""",
    "quality": """
import os, signal
def run(report, **_):
    report("before", {"loss": 2.5})
    os.kill(os.getpid(), signal.SIGKILL)
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the frame with sections that misbehave; `offload` is not there."""
    made = tmp_path_factory.mktemp("benchmarks")
    (made / "gpu").mkdir()
    shutil.copy(BENCHMARKS / "gpu/run_all.py", made / "gpu")
    shutil.copy(BENCHMARKS / "results_claims.py", made)
    (made / "gpu/timing.py").write_text(ENVIRONMENT)
    for name, text in SECTIONS.items():
        (made / f"gpu/{name}.py").write_text(text)
    return made


def run_all(folder, *arguments):
    words = [sys.executable, folder / "gpu/run_all.py", "--device", "cpu", "--small", *arguments]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """(gpu.json, stdout, folder) of a run in which every section goes wrong in its own way but the first."""
    out = tmp_path_factory.mktemp("out")
    done = run_all(folder, "--out", out, "--limit-s", 24, "--only", "partitions,layers,models,offload,quality")
    assert done.returncode == 0, done.stderr
    return json.loads((out / "gpu.json").read_text()), done.stdout, out


def test_every_section_says_how_it_ended(ran):
    report, _, out = ran
    status = {name: found["status"] for name, found in report["sections"].items()}
    assert status.pop("partitions").startswith("timed out after")
    assert status == {
        "layers": "ok",
        "models": "failed: ValueError: oops second line",
        "offload": "missing: there is no such script",
        "quality": "failed: killed by SIGKILL",
    }
    assert report["small"] and report["wall_s"] < 24
    assert "ValueError: oops" in (out / "models.log").read_text()


def test_what_was_measured_before_is_kept_beside_its_environment(ran):
    sections = ran[0]["sections"]
    assert sections["layers"]["entries"]["numbers"] == {"device": "cpu", "small": True, "less": True, "bad": "nan"}
    assert sections["models"]["entries"] == {
        "before": {"time": {"median_s": 0.5, "min_s": 0.4, "max_s": 0.6, "repeats": 3}}
    }
    assert sections["quality"]["entries"] == {"before": {"loss": 2.5}}
    assert all(sections[name]["environment"]["device_name"] == "stand-in" for name in SECTIONS)
    order = sections["layers"]["entries"]["imported before the device is used"]
    assert order == {"first": True, "then": True}, "a section can still set what the driver reads only once"


def test_a_section_that_hangs_leaves_no_process(ran):
    hanging = ran[0]["sections"]["partitions"]["entries"]["hanging"]
    assert not [pid for pid in hanging.values() if runs(pid)]


def test_stdout_has_a_line_a_measurement_and_ends_with_a_table(ran):
    lines = ran[1].splitlines()
    assert any(line.endswith("before: time=0.5") for line in lines)
    assert any(line.endswith("numbers: less=True bad=nan") for line in lines), "only what is new"
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("section ")) :]
    assert table[1].split()[:3] == ["partitions", "1", "0"]
    assert table[2].split()[:3] == ["layers", "3", "1"]
    assert table[3] == "  ! refused: OutOfMemoryError: too much"
    assert len(ran[1]) < 10_000


def test_runs_of_different_sections_become_one_file(ran, folder, tmp_path):
    report, _, out = ran
    newer = {**report["sections"]["models"], "status": "ok", "environment": {"device_name": "another"}}
    (tmp_path / "b.json").write_text(json.dumps({**report, "small": False, "sections": {"models": newer}}))
    done = run_all(folder, "--out", tmp_path, "--merge", out / "gpu.json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "gpu.json").read_text())
    assert list(both["sections"]) == ["layers", "models", "partitions", "offload", "quality"]
    assert both["sections"]["models"]["environment"] == {"device_name": "another"}
    assert both["sections"]["layers"] == report["sections"]["layers"]
    assert both["small"], "a rehearsal among them makes no result"


def test_told_to_end_it_ends_its_section(folder, tmp_path):
    words = [sys.executable, folder / "gpu/run_all.py", "--device", "cpu", "--out", tmp_path, "--only", "partitions"]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    wait_until(lambda: "hanging" in (tmp_path / "partitions.json").read_text() if list(tmp_path.glob("*.json")) else 0)
    hanging = json.loads((tmp_path / "partitions.json").read_text())["entries"]["hanging"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    wait_until(lambda: not [pid for pid in hanging.values() if runs(pid)])


def test_wrong_words_end_at_once(folder, tmp_path):
    done = run_all(folder, "--out", tmp_path, "--only", "layers,speed")
    assert done.returncode == 2 and "unknown sections: speed; known: layers" in done.stderr


@pytest.fixture
def timing(monkeypatch):
    """benchmarks/gpu/timing.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    import timing

    yield timing
    sys.modules.pop("timing")


def test_median_is_of_the_calls_alone(timing):
    said = []
    found = timing.median_s(
        lambda: said.append("call"), "cpu", repeats=3, warmup=2, calls=2, setup=lambda: said.append("setup")
    )
    assert said == ["setup", "call"] * 2 + ["setup", "call", "call"] * 3
    assert 0 < found.min_s <= found.median_s <= found.max_s and found.repeats == 3


def test_setup_is_not_timed(timing):
    found = timing.median_s(lambda: None, "cpu", repeats=3, warmup=0, setup=lambda: time.sleep(0.02))
    assert found.max_s < 0.02


def test_a_failure_is_an_entry_and_lets_go_of_its_tensors(timing):
    kept, entries = [], {}

    class Big:
        """Stands for a tensor."""

    def fails():
        big = Big()
        kept.append(weakref.ref(big))
        torch.empty(1 << 60, dtype=torch.uint8)

    with timing.guarded(entries.__setitem__, "layer"):
        fails()
    assert entries["layer"]["error"].startswith("RuntimeError: ") and "fails" in entries["layer"]["at"]
    assert kept[0]() is None, "the frames of the traceback are cleared"
    with pytest.raises(KeyboardInterrupt), timing.guarded(entries.__setitem__, "other"):
        raise KeyboardInterrupt


def test_rates_and_environment(timing, monkeypatch):
    monkeypatch.setitem(rates.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(rates.ROWS, "cpu", 32)
    assert timing.copy_rate("cpu", repeats=2) > 0
    assert timing.matmul_rate("cpu", torch.float32, repeats=2) > 0
    monkeypatch.setenv("MOESIM_COMMIT", "abc")
    about = timing.environment("cpu")
    assert about["device"] == "cpu" and about["commit"] == "abc" and about["versions"]["torch"] == torch.__version__
