"""Makes `tests/helpers.py` importable under importlib mode, keeps torch to one thread, interprets Triton.

One thread: tests run two at a time on two cores, and threads that wait for each other make them crawl. The variables
are set before torch is first imported, and subprocesses inherit them. Triton's kernels run in its interpreter where
there is no GPU; that, too, is decided when they are first imported.
"""

import os
import shutil
import sys
from pathlib import Path

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))

# The same examples on every run; `make fuzz` looks for new ones.
settings.register_profile("moesim", derandomize="MOESIM_FUZZ_EXAMPLES" not in os.environ)
settings.load_profile("moesim")
