"""Errors of torch and of the driver become one line: real ones where a CPU has them, else torch's own words."""

import json

import click
import pytest
import torch
from click.testing import CliRunner

from moesim.backend.failures import explained, in_one_line, lost_connection
from moesim.backend.launch import report_error
from moesim.cli.main import LazyGroup
from moesim.traces import InputError, MoesimError

HUGE = 1 << 60


def raised(action):
    with pytest.raises(BaseException) as caught:  # whatever torch raises is what is to be explained
        action()
    return caught.value


@pytest.mark.parametrize("action", [lambda: torch.empty(HUGE, dtype=torch.uint8), lambda: bytearray(HUGE)])
def test_the_host_runs_out_of_memory(action):
    known = explained(raised(action))
    assert type(known) is MoesimError
    assert str(known).startswith("out of memory on the host") and "--batch-tokens" in str(known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    known = explained(raised(lambda: torch.zeros(1, device="cuda")))
    assert isinstance(known, InputError) and "use --device cpu" in str(known)
    assert "\n" not in str(known)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
                "3.00 GiB is free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
            ),
            MoesimError,
            "out of memory on the GPU (or in pinned host memory) (asked for 20.00 GiB): take fewer tokens",
        ),
        (
            RuntimeError(
                "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
            ),
            MoesimError,
            "out of memory on the GPU (or in pinned host memory): take fewer tokens",
        ),
        (
            RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
            InputError,
            "driver is missing or too old (Found no NVIDIA driver on your system): install it",
        ),
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update"),
            InputError,
            "driver is missing or too old",
        ),
        (RuntimeError("No CUDA GPUs are available"), InputError, "torch sees no such GPU here"),
        (
            RuntimeError(
                "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously"
            ),
            MoesimError,
            "stopped with an error (CUDA error: an illegal memory access was encountered): nothing computed since",
        ),
        (
            torch.distributed.DistBackendError("NCCL error in: NCCLUtils.hpp:77, remote process exited"),
            MoesimError,
            "communication between the ranks failed",
        ),
    ],
)
def test_what_torch_says_of_the_device(error, kind, says):
    known = explained(error)
    assert type(known) is kind
    assert says in str(known) and "\n" not in str(known) and len(str(known)) < 400


def test_a_bug_of_ours_stays_one():
    for error in (ZeroDivisionError("oops"), KeyError("GPU"), RuntimeError("shapes (2, 3) and (4, 5) do not match")):
        assert explained(error) is None
        with pytest.raises(type(error)), in_one_line():
            raise error


def test_ours_pass_and_torchs_are_translated():
    ours = InputError("the trace does not fit")
    assert explained(ours) is ours
    with pytest.raises(MoesimError, match="out of memory") as caught, in_one_line():
        torch.empty(HUGE, dtype=torch.uint8)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_echo_of_another_ranks_end_is_not_to_blame(tmp_path):
    echo = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0")
    assert lost_connection(echo) and not lost_connection(ZeroDivisionError("oops"))
    assert not lost_connection(ConnectionRefusedError("the hub cannot be reached"))
    report_error(tmp_path, 0, echo)
    report_error(tmp_path, 1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"))
    said = [json.loads((tmp_path / f"error-{rank}.json").read_text()) for rank in range(2)]
    assert [one["ours"] for one in said] == [False, True]


def test_a_command_ends_with_one_line(monkeypatch):
    @click.command()
    @click.argument("what")
    def fail(what):
        if what == "memory":
            torch.empty(HUGE, dtype=torch.uint8)
        raise RuntimeError("a bug")

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: fail)
    group = LazyGroup("moesim")
    result = CliRunner().invoke(group, ["fail", "memory"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: out of memory on the host")
    assert isinstance(CliRunner().invoke(group, ["fail", "bug"]).exception, RuntimeError)
