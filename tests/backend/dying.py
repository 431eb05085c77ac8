"""A rank that ends badly while the others wait for it: `python dying.py FOLDER HOW`."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moesim.backend.launch import end_with_parent, report_error
from moesim.traces import InputError


def main():
    folder, how = Path(sys.argv[1]), sys.argv[2]
    rank = int(os.environ["RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    end_with_parent()
    dist.init_process_group("gloo")
    dist.barrier()
    try:
        if rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and how == "input":
            raise InputError("the trace does not fit")
        if rank == 1 and how == "bug":
            raise ZeroDivisionError("oops")
        if rank == 1 and how == "memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        dist.barrier()
        signal.pause()
    except BaseException as error:
        report_error(folder, rank, error)
        os._exit(1)


if __name__ == "__main__":
    main()
