"""LeRobot on one checkpoint, in a process and a Python of its own, so that it can be timed in turns with a bundle.

    PYTHON -m smolvla_edge.benchmarks.lerobot_process CHECKPOINT float32|bfloat16 cpu|cuda [compile]

One line on stdin is one chunk; its wall seconds are the line that comes back. That Python has lerobot 0.4.4 and this
package with its [export] extra.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..export.errors import ExportError


class LeRobotProcess:
    """The other end: starts the process, waits until it is ready, runs one chunk at a time."""

    def __init__(self, python: str, checkpoint: str, dtype: str, device: str = "cpu", compiled: bool = False) -> None:
        """dtype: float32, or bfloat16 as LeRobot holds a policy whose config says `load_vlm_weights`.

        compiled: with torch.compile, as its config's `compile_model` would.
        """
        command = [python, "-m", __name__, checkpoint, dtype, device, *(["compile"] if compiled else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self) -> float:
        """-> wall seconds of one chunk, preprocessing included, as the process measured them."""
        assert self._process.stdin is not None
        self._process.stdin.write("chunk\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("seconds "):  # LeRobot prints too
                return float(line.split()[1])
        self._process.communicate()
        raise ExportError(
            f"LeRobot's process ended with status {self._process.returncode}, see above. "
            "Its Python needs lerobot 0.4.4 and this package with its [export] extra"
        )


def as_loaded(policy: Any) -> Any:
    """`policy` in the dtypes that LeRobot gives it with `load_vlm_weights`, which are those of the published
    checkpoint: VLM and expert in bfloat16, but for the cross layers' k_proj and v_proj and all outside of both."""
    import torch

    expert = policy.model.vlm_with_expert.lm_expert.layers
    cross = [p for layer in expert for p in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight)]
    kept = {id(p) for p in cross if p.shape[0] == p.shape[1]}
    for p in policy.model.vlm_with_expert.parameters():
        if id(p) not in kept:
            p.data = p.data.to(torch.bfloat16)
    return policy


def main() -> None:
    """Serve chunks until stdin ends."""
    import torch

    from ..export.checkpoint import load_checkpoint
    from ..export.lerobot_check import load_policy
    from ..export.reference import fixed_observations
    from ..export.writer import architecture_of

    folder, dtype, device, *compiled = sys.argv[1:]
    checkpoint = load_checkpoint(folder)
    observation = fixed_observations(checkpoint, architecture_of(checkpoint))[-1]
    names = dict(zip(checkpoint.processors.camera_names, checkpoint.config.cameras, strict=True))
    batch: dict[str, Any] = {
        names[name]: torch.from_numpy(image).permute(2, 0, 1).float() / 255
        for name, image in observation.images.items()
    }
    batch |= {"observation.state": torch.from_numpy(observation.state), "task": observation.task}
    with tempfile.TemporaryDirectory() as scratch:
        policy, preprocess = load_policy(checkpoint, Path(scratch) / "vlm")
        if dtype == "bfloat16":
            policy = as_loaded(policy)
        policy.to(device)
        if compiled:
            policy.model.sample_actions = torch.compile(policy.model.sample_actions)
        print("seconds 0", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            ready = preprocess(dict(batch))
            ready = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in ready.items()}
            policy.predict_action_chunk(ready, noise=torch.from_numpy(observation.noise).to(device)).cpu()
            print("seconds", time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
