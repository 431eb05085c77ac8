"""Whether processes still run, for tests of what must leave none behind."""

import time
from pathlib import Path


def runs(pid):
    """True while the process computes; one that waits to be reaped does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition):
    """Poll, so that the test needs no guess of how long something takes; the limit is only against a hang."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("did not happen in a minute")
