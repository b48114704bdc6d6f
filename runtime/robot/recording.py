"""What a run leaves behind: a log of its ticks, and, where asked for, all that the policy saw and answered.

    DIR/run.json                      RunMeta
    DIR/ticks.jsonl                   one JSON object per tick, as in a log without a recording
    DIR/chunks/000000.front.png       what camera `front` showed when chunk 0 was asked for; one for each camera
    DIR/chunks/000000.npz             what else computes it again bit for bit: state, noise, steps, prev_chunk (where
                                      there was one), delay; and what came of it: actions, time_s, latency_s.
                                      Written last, so a chunk without it was never finished

One thread writes, from one bounded queue: whoever reports to it returns at once, and never sees an error. A disk that
fails or a folder that is removed ends the recording, not the run. A chunk's files appear whole, by renaming; of the
log, a crash may cut the last line. runtime/replay.py reads all of it back.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from ...core.errors import SettingsError
from ...core.files import write_whole
from ...core.strict import encode
from ...devices.arm.calibration import JOINT_NAMES
from ..bundle.manifest import Precision
from ..policy.sampling import RealTimeChunking

if TYPE_CHECKING:
    from ..policy.policy import Policy
    from .inference import Chunk
    from .loop import Tick
    from .plan import Plan

FORMAT, VERSION = "smolvla-edge-recording", 1
META, TICKS, CHUNKS = "run.json", "ticks.jsonl", "chunks"
QUEUE_LIMIT = 256  # lines and chunks; six seconds of a stalled disk at 30 Hz, and well under 200 MB of pictures
CLOSE_LIMIT_S = 5.0  # a disk that hangs must not keep the process
KEPT_LOGS = 20
_LOG_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z\.jsonl")


@dataclass(frozen=True)
class RunMeta:
    """What was run. bundle: its folder, bundle_digest: its identity (Bundle.digest)."""

    bundle: str
    bundle_digest: str
    precision: Precision
    device: str  # the execution provider
    task: str
    fps: float
    units: str
    chunking: Literal["sync", "async", "rtc"]
    rtc: RealTimeChunking  # what the policy used wherever it was given a previous chunk
    cameras: tuple[str, ...]
    joints: tuple[str, ...]  # names of the action's values, empty where they are not known
    seed: int | None
    format: str = FORMAT
    version: int = VERSION


class RunLog:
    """Appends one JSON line per tick to a file. `problem` says why it is incomplete, and is empty while it is not."""

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises SettingsError where that is not possible."""
        self.path, self.problem = path, ""
        self.dropped = self.dropped_chunks = 0  # those that the disk was too slow for
        try:
            self._file = path.open("ab")
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise SettingsError(
                f"cannot write a log ({_reason(e)}): name a file in a folder that is there"
            ) from e
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_LIMIT)
        self._thread = threading.Thread(target=self._work, name="recording", daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Returns at once. Values: what JSON knows, numpy scalars and arrays, tuples; others become their text, NaN
        and infinity null. Floats are kept to 5 decimals."""
        # Encoded here: the caller may change its arrays afterwards, and a second busy thread would cost it more.
        data = json.dumps(_plain(line), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self.dropped += not self._put(partial(self._append, data))

    def tick(self, tick: Tick) -> None:
        """A line of what a tick read, sent and took."""
        log, emitted = tick.log, dict(vars(tick.emitted))
        line = {
            "t_s": tick.elapsed_s,
            "doing": tick.doing,
            "queued": tick.queued,
            "late_ms": log.late_ms[-1],
        }
        line |= {
            "read_ms": log.read_ms[-1],
            "write_ms": log.write_ms[-1],
            "missed": log.counts.missed,
        }
        line |= vars(tick.state)
        line |= {"goal": emitted.pop("raw"), "goal_position": emitted.pop("position")}
        # Of the pipeline's steps only those that bit, and where.
        line |= {name: value for name, value in emitted.items() if np.any(value)}
        if tick.seam_deg is not None:
            line["seam_deg"] = tick.seam_deg
        if tick.events:
            line["events"] = tick.events
        self.write(line)

    def wrote(self, servo_id: int, register: object, value: int) -> None:
        """The journal of everything that was written to a servo but goals."""
        self.write({"write": str(register), "id": servo_id, "value": value})

    def answered(self, chunk: Chunk) -> None:
        """A chunk of the policy's: only a Recorder keeps it."""

    def close(self) -> None:
        """Write what is queued, for so long as CLOSE_LIMIT_S, and end the thread. May be called again."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_LIMIT_S)
        self._thread.join(CLOSE_LIMIT_S)
        if self._thread.is_alive():
            self._end(f"the disk has not answered for {CLOSE_LIMIT_S:g} s")
        elif self.dropped or self.dropped_chunks:
            self._end(
                f"the disk was too slow for {self.dropped} ticks and {self.dropped_chunks} chunks"
            )

    def _put(self, job: Callable[[], None]) -> bool:
        """Whether there was room for it."""
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            return False
        return True

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                if not self.problem:
                    job()
            except Exception as e:  # whatever it is, it must not cost more than the recording
                self._end(_reason(e))
        with contextlib.suppress(OSError):  # a full disk is told again what it could not take
            self._file.close()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()

    def _end(self, why: str) -> None:
        if not self.problem:
            self.problem = why
            _warn(f"the record in {self.path.parent} is incomplete: {why}")


class Recorder(RunLog):
    """A run log, `ticks.jsonl` of a new folder, with the policy's chunks beside it."""

    def __init__(self, folder: Path, meta: RunMeta) -> None:
        """Raises SettingsError unless the folder is new or empty, and can be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise SettingsError(
                    f"{folder} is not empty: record into a new folder, so that two runs never mix"
                )
            (folder / CHUNKS).mkdir()
            write_whole(folder / META, json.dumps(encode(meta), indent=1).encode() + b"\n")
        except (OSError, ValueError) as e:
            raise SettingsError(
                f"cannot record into {folder} ({_reason(e)}): name a new folder"
            ) from e
        super().__init__(folder / TICKS)
        self.chunks = 0

    def answered(self, chunk: Chunk) -> None:
        """Returns at once. May be called from another thread than `write`. The arrays must not change afterwards."""
        self.dropped_chunks += not self._put(partial(self._save, self.chunks, chunk))
        self.chunks += 1

    def _save(self, number: int, chunk: Chunk) -> None:
        folder, seen = self.path.parent / CHUNKS, chunk.observation
        for camera, image in seen.images.items():
            bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
            write_whole(folder / f"{number:06d}.{camera}.png", png.tobytes())
        asked = {
            "state": seen.state,
            "prev_chunk": seen.ask.prev_chunk,
            "delay": seen.ask.delay,
            "time_s": seen.time_s,
        }
        said = {n: getattr(chunk, n) for n in ("noise", "steps", "actions", "latency_s")}
        arrays = io.BytesIO()
        np.savez(
            arrays, **{name: value for name, value in (asked | said).items() if value is not None}
        )
        write_whole(folder / f"{number:06d}.npz", arrays.getvalue())


@contextlib.contextmanager
def opened(plan: Plan, policy: Policy) -> Iterator[RunLog]:
    """The log of one run, closed on the way out. SettingsError when --record names a folder of no use."""
    chosen, manifest = plan.settings, plan.bundle.manifest
    if chosen.record:
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
            joints=manifest.joints or JOINT_NAMES * (manifest.action.dim == len(JOINT_NAMES)),
            seed=chosen.seed,
        )
        log: RunLog = Recorder(Path(chosen.record), meta)
        print(f"recording to {chosen.record}")
    else:
        log = RunLog(default_log_path())
        print(f"log: {log.path}")
    try:
        yield log
    finally:
        log.close()


def default_log_path() -> Path:
    """A new file for the log of a run that names none, in $XDG_STATE_HOME/smolvla-edge/runs (~/.local/state), of
    which the newest 20 are kept; where that cannot be written, a warning and /dev/null."""
    name = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ.jsonl")
    try:
        state = os.environ.get("XDG_STATE_HOME")
        folder = (
            (Path(state) if state else Path.home() / ".local" / "state") / "smolvla-edge" / "runs"
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / name).touch()
        logs = sorted(path for path in folder.iterdir() if _LOG_NAME.fullmatch(path.name))
        for old in logs[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as e:  # RuntimeError: a container's user may have no home at all
        _warn(f"this run leaves no log ({_reason(e)})")
        return Path(os.devnull)
    return folder / name


def _plain(value: Any) -> Any:
    """What json.dumps takes."""
    if value is None or isinstance(value, str | int):  # bool is an int
        return value
    if isinstance(value, float | np.floating):
        return round(float(value), 5) if math.isfinite(value) else None
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else str(value)


def _reason(e: Exception) -> str:
    """The system's words for an error, with the file where it has one."""
    return (
        f"{e.filename}: {e.strerror}"
        if isinstance(e, OSError) and e.filename
        else str(e) or repr(e)
    )


def _warn(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"warning: {text}", file=sys.stderr, flush=True)
