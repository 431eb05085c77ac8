"""The entry point of a rank: `python -m moesim.backend.worker FOLDER`, started by launch.py under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moesim.backend.job import Job
from moesim.backend.launch import end_with_parent, report_error


def work(job: Job) -> None:
    """Do this rank's part of the job; rank 0 leaves the outcome in the job's folder."""
    from moesim.backend import ranks as groups

    ranks = groups.join(job.device)
    if job.kind == "calibrate":
        from moesim.backend.calibrate import calibrate_ranks

        calibrate_ranks(job, ranks)
    else:
        from moesim.backend.session import run_policies

        run_policies(job, ranks)
    groups.leave()


def main() -> None:
    """Work, and on any error leave it for the launcher and end at once.

    At once, because a thread that waits for a message of a rank that is gone would keep the process alive.
    """
    folder = Path(sys.argv[1])
    end_with_parent()
    try:
        work(Job.read(folder))
    except BaseException as error:
        import traceback

        traceback.print_exc()
        report_error(folder, int(os.environ["RANK"]), error)
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
