"""What a long command is doing: a line for each stage, and in a terminal a moving row below them.

Outside of a terminal (a log, CI), the row is a line every few seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import rich.progress
import rich.table
from rich.console import Console
from rich.text import Text

LINE_EVERY_S = 8.0


class Progress:
    """A context manager: inside, something is shown at least every `LINE_EVERY_S` seconds.

    `say` takes the lines instead of standard output; then nothing moves.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._start_s = self._told_s = time.monotonic()
        self._say = say or self._print
        self._stream = sys.stdout  # torch's exporter runs with sys.stdout redirected
        self._doing, self._of = "", ""
        self._done = threading.Event()
        self._reminder = threading.Thread(target=self._remind, name="progress", daemon=True)
        self._live: rich.progress.Progress | None = None
        if say is None and sys.stdout.isatty():
            self._live = rich.progress.Progress(
                rich.progress.SpinnerColumn(),
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.TimeElapsedColumn(),
                console=Console(file=self._stream),
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._live is None:
            self._reminder.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._live is None:
            self._reminder.join()
        else:
            self._live.stop()

    def stage(self, text: str, *, own_bar: bool = False) -> None:
        """Begin a stage. own_bar: the stage draws a bar itself (a download), so there is no row."""
        self._doing, self._of = text, ""
        if self._live is not None:
            for row in self._live.task_ids:
                self._live.remove_task(row)
            self._live.stop()
        self.note(text)
        if self._live is not None and not own_bar:
            self._live.add_task(text, total=None)
            self._live.start()

    def count(self, done: int, total: int) -> None:
        """`done` of `total` parts of this stage are complete."""
        self._of = f"{done} of {total}"
        if self._live is not None:
            for row in self._live.task_ids:
                description = f"{self._doing}, {self._of}"
                self._live.update(row, completed=done, total=total, description=description)

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._told_s = time.monotonic()
        self._say(text)

    def _print(self, text: str) -> None:
        line = f"[{time.monotonic() - self._start_s:6.1f} s] {text}"
        if self._live is None:
            print(line, file=self._stream, flush=True)
        else:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _remind(self) -> None:
        while not self._done.wait(min(1.0, LINE_EVERY_S)):
            if self._doing and time.monotonic() - self._told_s >= LINE_EVERY_S:
                self.note(f"  {self._doing}: {self._of or 'not finished yet'}")


SILENT = Progress(lambda line: None)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, drawn by rich in a terminal; elsewhere plain text. Without `columns`: pairs."""
    console = Console()
    if console.is_terminal:
        table = rich.table.Table(*columns, show_header=len(columns) > 0)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    lines = [*([columns] if columns else []), *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())
