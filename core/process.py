"""Child processes of our own modules. A child imports only what its parent could: never from the current folder."""

import select
import subprocess
import sys
from typing import IO

# `python -c` and `python -m` put the current folder first on sys.path, where a file named like a
# library would run. Python 3.10 has no option -P, so the child removes the entry itself.
_ENTRY = (
    "import sys; getattr(sys.flags, 'safe_path', False) or sys.path.pop(0); "
    "from {module} import main; sys.exit(main())"
)


def module_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command line that runs `main()` of `module` in a new Python, with `arguments` in sys.argv[1:]."""
    return [python, "-c", _ENTRY.format(module=module), *arguments]


def first_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """The line that a child prints when it is ready; empty where it ends or says nothing within `limit_s`."""
    stream: IO[bytes] | None = process.stdout
    assert stream is not None, "the child has a pipe for its output"
    if not select.select([stream], [], [], limit_s)[0]:
        return b""
    return stream.readline()
