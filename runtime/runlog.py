"""What a run leaves behind: always a log of its ticks, and with --record everything the policy saw and said."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..devices.calibration import JOINT_NAMES
from .control import Tick
from .inference import Chunk
from .plan import Plan
from .policy import Policy
from .recording import Asked, Recorder, RunLog, RunMeta, default_log_path


class Records:
    """Takes ticks and chunks; never waits for a disk."""

    def __init__(self, log: RunLog, steps: int) -> None:
        self._log, self._steps = log, steps

    def tick(self, tick: Tick) -> None:
        log = tick.log
        line: dict[str, Any] = {
            "t_s": tick.elapsed_s,
            "doing": tick.doing,
            "queued": tick.queued,
            "late_ms": log.late_ms[-1],
        }
        line |= {"read_ms": log.read_ms[-1], "write_ms": log.write_ms[-1], "missed": log.counts.missed}
        line |= vars(tick.state)
        emitted = dict(vars(tick.emitted))
        line["goal"] = emitted.pop("raw")
        line["goal_position"] = emitted.pop("position")
        # Of the pipeline's steps only those that bit, and where.
        line |= {name: value for name, value in emitted.items() if np.any(value)}
        if tick.seam_deg is not None:
            line["seam_deg"] = tick.seam_deg
        if tick.events:
            line["events"] = tick.events
        self._log.write(line)

    def wrote(self, servo_id: int, register: object, value: int) -> None:
        """The journal of everything that was written to a servo but goals."""
        self._log.write({"write": str(register), "id": servo_id, "value": value})

    def chunk(self, chunk: Chunk) -> None:
        if isinstance(self._log, Recorder):
            seen = chunk.observation
            self._log.chunk(
                Asked(
                    images=seen.images,
                    state=seen.state,
                    noise=chunk.noise,
                    steps=self._steps,
                    prev_chunk=seen.ask.prev_chunk,
                    delay=seen.ask.delay,
                    actions=chunk.actions,
                    time_s=seen.time_s,
                    latency_s=chunk.latency_s,
                )
            )


@contextmanager
def opened(plan: Plan, policy: Policy) -> Iterator[Records]:
    """The records of one run, closed on the way out. SettingsError when --record names a folder of no use."""
    chosen, manifest = plan.settings, plan.bundle.manifest
    if chosen.record:
        ours = JOINT_NAMES if manifest.action.dim == len(JOINT_NAMES) else ()
        meta = RunMeta(
            bundle=chosen.bundle,
            bundle_digest=plan.bundle.digest,
            precision=manifest.precision,
            device=policy.graphs.reason,
            task=plan.task,
            fps=plan.fps,
            units=plan.units.value,
            chunking=chosen.chunking,
            rtc=policy.rtc,
            cameras=tuple(c.name for c in manifest.cameras),
            joints=manifest.joints or ours,
            seed=chosen.seed,
        )
        log: RunLog = Recorder(Path(chosen.record), meta)
        print(f"recording to {chosen.record}")
    else:
        log = RunLog(default_log_path())
        print(f"log: {log.path}")
    try:
        yield Records(log, chosen.steps or manifest.sampling.num_steps)
    finally:
        log.close()
