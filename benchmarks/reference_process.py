"""The client of a process that runs the checkpoint in PyTorch, in turns with bundles.

export/reference_process.py is the program of that process.
"""

import json
import os
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ..core.errors import BenchError
from ..core.process import module_command
from ..export import reference_process
from ..export.reference_process import ANSWER, ReferenceRequest

START_LIMIT_S = 900.0  # compiled, the first chunk takes minutes, but that is asked for later


class ReferenceProcess:
    """Starts the process, waits until it is ready, and runs one chunk at a time.

    differences: what of the checkpoint is not the bundle's; tokens: of the instruction; note: what
    runs. Raises BenchError.
    """

    def __init__(self, python: str, request: ReferenceRequest) -> None:
        self.request = request
        line = module_command(
            reference_process.__name__, json.dumps(asdict(request)), python=python
        )
        try:
            self._process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                env=_all_cores(os.environ),
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        except OSError as e:
            raise BenchError(
                f"{python} cannot be started ({e.strerror}): --lerobot names a Python"
            ) from e
        late = threading.Timer(START_LIMIT_S, self._process.kill)
        late.start()
        try:
            found: Any = self._answer()
            if not isinstance(found, list) or len(found) != 3:
                is_message = isinstance(found, str)
                raise BenchError(
                    found if is_message else f"{python} answers {found!r}: it is no Python"
                )
            self.differences: list[str] = found[0]
            self.tokens: int = found[1]
            self.note: str = found[2]
        except BaseException:
            self.close()
            raise
        finally:
            late.cancel()

    def __enter__(self) -> "ReferenceProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self) -> float:
        """-> wall seconds of one chunk as the process measured them."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_answer` says so
            self._process.stdin.write("chunk\n")
            self._process.stdin.flush()
        seconds = self._answer()
        if not isinstance(seconds, float):
            raise BenchError(
                f"the process of {self.request.name} answers a chunk with {seconds!r}, "
                "expected seconds"
            )
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                with suppress(ValueError):
                    return json.loads(line.removeprefix(ANSWER))
                raise BenchError(
                    f"the process of {self.request.name} answers {line!r}: is it another version's?"
                )
        self._process.communicate()
        raise BenchError(
            f"the process of {self.request.name} ended with status {self._process.returncode}, or "
            f"was not ready after {START_LIMIT_S:.0f} s. --lerobot names a Python with this "
            "package, its [export] extra, and lerobot 0.4.4 (make lerobot-env)"
        )


def _all_cores(environ: Mapping[str, str]) -> dict[str, str]:
    """As ONNX Runtime takes them: torch would heed these."""
    return {
        key: value
        for key, value in environ.items()
        if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
