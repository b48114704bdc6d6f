"""The log of a run: one JSON line per tick, written in its own thread, with bounded size.

Without --record a log goes to $XDG_STATE_HOME/smolvla-edge/runs (~/.local/state). All logs in that
folder together stay under `log_mb`. So a log has parts of a tenth of it: before a part is opened,
the oldest parts are deleted until it fits. In an endless run the newest hours are kept; the first
time that this deletes a part of the run itself, a warning says so.

A call that writes returns at once and raises nothing. A full disk ends the log, not the run.
"""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import SettingsError
from ...core.worker import Worker
from .inference import ActionChunk
from .loop import Tick

# Lines and chunks: six seconds of a stalled disk at 30 Hz, and under 200 MB of pictures.
QUEUE_LIMIT = 256
CLOSE_LIMIT_S = 5.0  # a disk that hangs must not keep the process alive
PARTS = 10
_LOG_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z\.jsonl")


class LogFolder:
    """The folder of all run logs; together they have at most `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        """Raises OSError, or RuntimeError where this user has no home folder."""
        self.limit_bytes, self.part_bytes = limit_bytes, limit_bytes // PARTS
        state = os.environ.get("XDG_STATE_HOME")
        base = Path(state) if state else Path.home() / ".local" / "state"
        self.path = base / "smolvla-edge" / "runs"
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own: list[Path] = []  # the parts of this run that are still there
        self._warned = False

    def new_part(self) -> Path:
        """A new empty file, after making room for it. Raises OSError."""
        logs = sorted(path for path in self.path.iterdir() if _LOG_NAME.fullmatch(path.name))
        sizes = {path: path.stat().st_size for path in logs}
        while logs and sum(sizes.values()) + self.part_bytes > self.limit_bytes:
            oldest = logs.pop(0)
            oldest.unlink(missing_ok=True)
            del sizes[oldest]
            if oldest in self._own:
                self._own.remove(oldest)
                if not self._warned:
                    warn(
                        f"the log of this run reached {self.limit_bytes / 1e6:g} MB (--log-mb): "
                        f"its oldest part {oldest.name} is deleted, the newest parts are kept"
                    )
                self._warned = True
        path = self.path / datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ.jsonl")
        path.touch()
        self._own.append(path)
        return path


class RunLog:
    """Appends JSON lines. `problem` says why the log is incomplete; empty while it is not."""

    def __init__(self, path: Path, folder: LogFolder | None = None) -> None:
        """folder: where the next parts go. Raises SettingsError where `path` cannot be opened."""
        self.path, self.problem = path, ""
        self.dropped = self.dropped_chunks = 0  # because the disk was too slow
        self._folder, self._written = folder, 0
        try:
            self._file = path.open("ab")
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise SettingsError(
                f"cannot write a log ({reason(e)}): name a file in an existing folder"
            ) from e
        self.worker = Worker("log", QUEUE_LIMIT)

    @classmethod
    def in_folder(cls, limit_bytes: int) -> "RunLog":
        """A log of a run without --record; where none can be written, a warning and /dev/null."""
        try:
            folder = LogFolder(limit_bytes)
            return cls(folder.new_part(), folder)
        except (OSError, ValueError, RuntimeError, SettingsError) as e:
            warn(f"this run leaves no log ({reason(e)})")
            return cls(Path(os.devnull))

    def write(self, line: Mapping[str, Any]) -> None:
        """Returns at once. Values: what JSON knows, numpy scalars and arrays, tuples; others become
        text, NaN and infinity null. Floats are rounded to 5 decimals."""
        # Encoded here: the caller may change its arrays afterwards.
        data = json.dumps(_plain(line), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if not self._submit(partial(self._append, data)):
            self.dropped += 1

    def tick(self, tick: Tick) -> None:
        """A line of what a tick read, sent and took."""
        emitted = dict(vars(tick.emitted))
        line = {
            "t_s": tick.elapsed_s,
            "doing": tick.doing,
            "queued": tick.queued,
            "late_ms": tick.late_ms,
            "read_ms": tick.read_ms,
            "write_ms": tick.write_ms,
            "missed": tick.missed,
        }
        line |= vars(tick.state)
        line |= {"goal": emitted.pop("raw"), "goal_position": emitted.pop("position")}
        # Of the steps between target and goal only those that changed something.
        line |= {name: value for name, value in emitted.items() if np.any(value)}
        if tick.seam_deg is not None:
            line["seam_deg"] = tick.seam_deg
        if tick.events:
            line["events"] = tick.events
        self.write(line)

    def wrote(self, servo_id: int, register: object, value: int) -> None:
        """A register that was written, other than a goal."""
        self.write({"write": str(register), "id": servo_id, "value": value})

    def answered(self, chunk: ActionChunk) -> None:
        """A chunk of the policy: only a Recorder keeps it."""

    def close(self) -> None:
        """Write what is queued, in at most CLOSE_LIMIT_S. May be called again."""
        if not self.worker.stop(CLOSE_LIMIT_S):
            self._end(f"the disk has not answered for {CLOSE_LIMIT_S:g} s")
            return
        with contextlib.suppress(OSError):  # a full disk
            self._file.close()
        if self.dropped or self.dropped_chunks:
            self._end(
                f"the disk was too slow for {self.dropped} ticks and {self.dropped_chunks} chunks"
            )

    def _submit(self, job: Callable[[], None]) -> bool:
        """Whether there was room for it."""
        return self.worker.submit(partial(self._guarded, job)) is not None

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            if not self.problem:
                job()
        except Exception as e:  # a run does not end because its log does
            self._end(reason(e))

    def _append(self, data: bytes) -> None:
        if self._folder is not None and self._written + len(data) > self._folder.part_bytes:
            self._file.close()
            self.path, self._written = self._folder.new_part(), 0
            self._file = self.path.open("ab")
        self._file.write(data)
        self._file.flush()
        self._written += len(data)

    def _end(self, why: str) -> None:
        if not self.problem:
            self.problem = why
            warn(f"the record in {self.path.parent} is incomplete: {why}")


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


def reason(e: Exception) -> str:
    """The system's words for an error, with the file where it has one."""
    if isinstance(e, OSError) and e.filename:
        return f"{e.filename}: {e.strerror}"
    return str(e) or repr(e)


def warn(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"warning: {text}", file=sys.stderr, flush=True)
