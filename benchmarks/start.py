"""A cold start: seconds and memory of a bundle in a new process, up to the second chunk.

    PYTHON -m smolvla_edge.benchmarks.start BUNDLE DEVICE BEGUN

is that process, started at the monotonic time BEGUN. Its last line is JSON.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ..core.errors import BenchError
from ..core.process import module_command
from ..runtime import Bundle, Policy
from .result import ColdStart

_SECONDS = ("python_s", "open_s", "load_s", "first_s", "second_s")
_MEMORY = {"peak_mb": "VmHWM", "anonymous_mb": "RssAnon", "mapped_mb": "RssFile"}


def cold_start(bundle: Bundle, device: str, processes: int = 3) -> ColdStart:
    """Medians over `processes`. Raises BenchError with the output of a process that fails."""
    runs = []
    for _ in range(processes):
        line = module_command(__name__, str(bundle.folder), device, str(time.monotonic()))
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(
                f"the process for {bundle.folder} ended with status {done.returncode}: "
                f"{done.stderr.strip()}"
            )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {key: round(float(np.median([run[key] for run in runs])), 4) for key in runs[0]}
    disk_mb = 1e-6 * sum(f.bytes for f in bundle.manifest.files.values())
    return ColdStart(processes=processes, disk_mb=round(disk_mb, 1), **medians)


def main() -> None:
    """Run as that process."""
    name, device, begun = sys.argv[1:]
    clock = [float(begun), time.monotonic()]
    bundle = Bundle.open(name)
    clock.append(time.monotonic())
    policy = Policy.load(bundle, device)
    clock.append(time.monotonic())
    images = {c.name: np.zeros((480, 640, 3), np.uint8) for c in policy.manifest.cameras}
    state = np.zeros(policy.manifest.state.dim, np.float32)
    for _ in range(2):
        policy.predict_chunk(images, state, "Pick up the red cube.")
        clock.append(time.monotonic())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {key: int(status[field].split()[0]) for key, field in _MEMORY.items()}
    seconds = dict(zip(_SECONDS, np.diff(clock).tolist(), strict=True))
    print(json.dumps(seconds | {key: 1.024e-3 * value for key, value in kib.items()}))
