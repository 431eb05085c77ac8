"""Real devices: ranks, expert slots, copies, executor, calibration. Importing this imports no torch.

The executor is `moesim.backend.parallel.Executor`; import it from there, since it needs torch.
"""

from moesim.backend.job import Job, check_options
from moesim.backend.launch import check_device, launch, under_torchrun

__all__ = ["Job", "check_device", "check_options", "launch", "under_torchrun"]
