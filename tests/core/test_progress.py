"""A long command shows what it is doing: lines in a log, a moving row in a terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

from smolvla_edge.core import extras, progress
from smolvla_edge.core.errors import SmolVLAError
from smolvla_edge.core.progress import Progress

LONG = """
import contextlib, io, time
from smolvla_edge.core import progress
progress.LINE_EVERY_S = 0.2
with progress.Progress() as p:
    p.stage("exporting [prefix]")
    p.count(1, 3)
    with contextlib.redirect_stdout(io.StringIO()):
        time.sleep(0.7)
    p.note("a note")
progress.print_table(("group", "saves"), [("vision [early]", "1 ms"), ("expert", "20 ms")])
"""


def test_a_log_gets_lines_even_while_a_stage_goes_on():
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True)
    assert done.stderr == ""
    lines = [re.sub(r"^\[ +[\d.]+ s\] ", "", line) for line in done.stdout.splitlines()]
    assert lines[:2] == ["exporting [prefix]", "  exporting [prefix]: 1 of 3"]
    assert lines[-4:] == ["a note", "group           saves", "vision [early]  1 ms", "expert          20 ms"]  # fmt: skip
    assert "\x1b" not in done.stdout


def test_a_terminal_gets_a_row_that_moves_and_a_drawn_table():
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", LONG], stdout=theirs, env=os.environ | {"TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += block
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "exporting [prefix], 1 of 3" in text
    assert "\x1b[2K" in text  # the row is drawn again
    assert "vision [early]" in text
    assert "┃" in text


def test_lines_go_to_whoever_asks_for_them(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines = []
    with Progress(lines.append) as shown:
        shown.stage("one")
        shown.count(2, 2)
    assert lines[0] == "one"
    assert set(lines[1:]) <= {"  one: not finished yet", "  one: 2 of 2"}


def test_every_missing_module_is_named_with_its_extra():
    extras.require_modules(["json", "os"], "export")
    with pytest.raises(SmolVLAError, match=r"needs no_such, nor_this: .* \[export\] extra"):
        extras.require_modules(["no_such", "json", "nor_this"], "export")
