"""From nothing to the second chunk: seconds and memory of a bundle, each time in a fresh process, in turns.

    python -m smolvla_edge.benchmarks.start --bundle A --bundle B

python is the interpreter and the imports; open finds hashes checked before and files in the page cache; load makes
the sessions. Memory is that of the whole process after two chunks: its peak, what is anonymous, and what is mapped
from files and can be dropped. The last line is JSON (kind "start", see machine.py).
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import typer

from ..runtime import BackendError, Bundle, Policy, SmolVLAError, command
from .machine import machine, report

SECONDS = ("python_s", "open_s", "load_s", "first_s", "second_s")
MEMORY = {"peak_mb": "VmHWM", "anonymous_mb": "RssAnon", "mapped_mb": "RssFile"}

app = command.new_app()


@app.command()
def start(
    bundle: list[str] = typer.Option(["bundle"], help="Bundle folder; give it again for each to compare."),
    device: str = typer.Option("cpu", help="auto, cpu, cuda or jetson."),
    repeats: int = typer.Option(3, min=1, help="Processes for each bundle."),
    output: str | None = typer.Option(None, help="Write the result to this file too."),
    since: float | None = typer.Option(None, hidden=True, help="Be such a process, begun at this monotonic time."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
) -> None:
    """Start each bundle in processes of its own and tell what that takes."""
    if since is not None:
        print(json.dumps(_once(bundle[0], device, since)))
        return
    disk_mb = {name: 1e-6 * sum(f.bytes for f in Bundle.open(name).manifest.files.values()) for name in bundle}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in bundle}
    for _ in range(repeats):
        for name in bundle:
            line = [sys.executable, "-m", f"{__package__}.start", "--bundle", name, "--device", device]
            done = subprocess.run([*line, "--since", str(time.monotonic())], capture_output=True, text=True)
            if done.returncode:
                raise BackendError(f"a process for {name} ended with status {done.returncode}: {done.stderr.strip()}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"machine    {machine()}")
    print("medians    " + "".join(f"{key:>14}" for key in (*SECONDS, *MEMORY, "disk_mb")))
    for name, values in runs.items():
        seconds = [float(np.median([v[key] for v in values])) for key in SECONDS]
        memory = [*(float(np.median([v[key] for v in values])) for key in MEMORY), disk_mb[name]]
        cells = [f"{s:14.3f}" for s in seconds] + [f"{mb:14.0f}" for mb in memory]
        print(f"{name}\n           {''.join(cells)}")
    report("start", output, disk_mb=disk_mb, runs=runs)


def _once(name: str, device: str, since: float) -> dict[str, float]:
    clock = [since, time.monotonic()]
    bundle = Bundle.open(name)
    clock.append(time.monotonic())
    policy = Policy.load(bundle, device)
    clock.append(time.monotonic())
    images = {c.name: np.zeros((480, 640, 3), np.uint8) for c in policy.manifest.cameras}
    for _ in range(2):
        policy.predict_chunk(images, np.zeros(policy.manifest.state.dim, np.float32), "Pick up the red cube.")
        clock.append(time.monotonic())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {key: 1.024e-3 * int(status[field].split()[0]) for key, field in MEMORY.items()}  # from KiB
    return dict(zip(SECONDS, np.diff(clock).tolist(), strict=True)) | memory


def main() -> None:
    """Entry point of `python -m smolvla_edge.benchmarks.start`."""
    command.run(app, mistakes=(SmolVLAError,), failures=())


if __name__ == "__main__":
    main()
