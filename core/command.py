"""What every command line of this project does alike: exit statuses, `error:` lines, --version,
--debug."""

import importlib.metadata
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import typer

from .errors import SmolVLAError
from .worker import Worker

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
TWIN_SIGNAL_S = 0.5
UNSAID_LINES, SAID_LIMIT_S = 1000, 2.0
DONE, MISTAKE, INTERRUPTED = 0, 2, 130


def new_app() -> typer.Typer:
    """A typer application with plain text help and our own error handling."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def run(app: typer.Typer) -> NoReturn:
    """Run `app` and exit: 0 done, 1 a check failed or a safety stop, 2 wrong input or usage, 130
    interrupted.

    --debug anywhere on the line shows tracebacks.
    """
    try:
        status = app(standalone_mode=False)
        code, line = status if isinstance(status, int) else DONE, ""
    except (Exception, KeyboardInterrupt) as e:
        # Abort is what click raises at Ctrl-C.
        if isinstance(e, KeyboardInterrupt) or type(e).__name__ == "Abort":
            code, line = INTERRUPTED, ""
        elif isinstance(e, SmolVLAError):
            code, line = e.exit_status, f"error: {e}"
        elif isinstance(e, OSError):  # full disk, missing permission: the file is in the message
            code, line = MISTAKE, f"error: {e}"
        # Usage errors of click. typer ships click under different names.
        elif hasattr(e, "format_message"):
            code, line = MISTAKE, f"error: {e.format_message()}"
        else:
            raise
        if "--debug" in sys.argv:
            said()
            traceback.print_exc()
    said()
    sys.stdout.flush()  # so that the error is the last line in a log too
    if code == INTERRUPTED:  # typer can also end with this status and print nothing
        line = "interrupted"
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def version_option() -> Any:
    """The --version flag."""
    return typer.Option(
        None,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the version and leave.",
    )


def terminate_like_interrupt() -> None:
    """Every signal that ends or stops a program unwinds like Ctrl-C, so that each `finally` runs.

    SIGINT too: a shell that starts a program in the background has it ignored. SIGTSTP (Ctrl-Z) and
    SIGQUIT would leave an arm energised with nobody driving it.
    """

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)


@contextmanager
def first_signal_asks(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether a first signal has come. A second signal interrupts.

    A shell that closes sends SIGHUP twice, and `timeout` sends SIGTERM twice. So the same signal
    within TWIN_SIGNAL_S counts once, except Ctrl-C: a person pressed it twice.
    """
    asked: tuple[int, float] | None = None

    def note(number: int, frame: object) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is None:
            asked = number, now
            with suppress(Exception):  # the signal counts also if the line cannot be printed
                say(f"{signal.Signals(number).name}: once more switches the motors off at once")
        elif number == signal.SIGINT or number != asked[0] or now - asked[1] > TWIN_SIGNAL_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: asked is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_printer: Worker | None = None


def say(line: str) -> None:
    """Print while motors are on: returns at once, also when the terminal stalls or is closed.

    May be called from a signal handler. Lines are dropped while too many wait.
    """
    global _printer
    _printer = _printer or Worker("printer", UNSAID_LINES)
    _printer.submit(partial(print, line, flush=True))


def said() -> None:
    """Wait a moment until every line of `say` is printed, before anything is printed directly."""
    if _printer is not None:
        _printer.wait(SAID_LIMIT_S)


def _print_version(value: bool | None) -> None:
    if value:
        print(f"smolvla-edge {importlib.metadata.version('smolvla-edge')}")
        raise typer.Exit


def require_linux() -> None:
    """Serial ports, schedulers and pseudo-terminals are used as Linux has them."""
    if not sys.platform.startswith("linux"):
        print(
            f"error: smolvla-edge runs on Linux only, this is {sys.platform} ({os.name})",
            file=sys.stderr,
        )
        sys.exit(MISTAKE)
