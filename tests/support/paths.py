"""Folders that tests read."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
STANDINS = TESTS / "standins"
# Facts and full-size goldens that are not part of the repository; tests that need them skip without
# them.
SHARED = Path(os.environ.get("SMOLVLA_EDGE_SHARED", ROOT.parent / "shared"))
