"""Child processes that run our own modules. They import nothing from the current folder."""

import select
import subprocess
import sys

# `python -c` and `python -m` put the current folder first on sys.path, where a file named like a
# library would run. Python 3.10 has no option -P, so the child removes the entry itself.
_ENTRY = (
    "import sys; getattr(sys.flags, 'safe_path', False) or sys.path.pop(0); "
    "from {module} import main; sys.exit(main())"
)


def module_command(module: str, *arguments: str, python: str | None = None) -> list[str]:
    """The command line that runs `main()` of `module` in a new Python.

    arguments: the child's sys.argv[1:]. python: the interpreter; this one if None.
    """
    return [python or sys.executable, "-c", _ENTRY.format(module=module), *arguments]


def first_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """The first line of a child; empty where it ends or prints nothing within `limit_s`."""
    assert process.stdout is not None, "the child has a pipe for its output"
    readable, _, _ = select.select([process.stdout], [], [], limit_s)
    return process.stdout.readline() if readable else b""
