"""Makes the modules that tests here share, and start in processes of their own, importable as tests/helpers.py is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
