"""smolvla-doctor: what a run would find on this machine, and what would stop it.

The command changes nothing. It writes a new file with --write-config, and the bundle's cache of
checked hashes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ...core import command
from ...core.errors import CheckFailed, SettingsError
from ...core.files import write_whole
from ..robot import doctor as examination
from ..robot import settings
from ..robot.checkup import Finding
from ..robot.doctor import MachineFacts
from ..robot.settings import Settings

ROBOT_TOML = Path("robot.toml")

app = command.new_app()


@app.command()
def doctor(
    bundle: str | None = typer.Option(None, help="Bundle folder.  [default: bundle]"),
    device: str | None = typer.Option(None, help="cpu, cuda, jetson or auto.  [default: auto]"),
    port: str | None = typer.Option(
        None, help="Serial port of the arm, or auto, or sim (the virtual arm)."
    ),
    budget: bool = typer.Option(
        False, "--budget", help="Print whether a chunk can take 30 ms on this board."
    ),
    board_name: str | None = typer.Option(
        None,
        "--board",
        metavar="NAME",
        help="The budget of a named board, such as 'orin nano super', or of all boards.",
    ),
    write_config: Path | None = typer.Option(
        None,
        metavar="PATH",
        help="Write a draft of robot.toml from the findings. Never overwrites a file.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Check the machine, the bundle, the cameras and the arm before a run.

    Reads the settings from ./robot.toml if it exists. Changes nothing and writes to no servo.

    Exit status: 0 nothing would stop a run, 1 something would stop a run, 2 wrong input.
    """
    if write_config is not None and write_config.exists():
        raise SettingsError(f"{write_config} exists already: give another name")
    findings = []
    stored = Settings()
    try:
        stored = settings.read_settings(ROBOT_TOML, required=False)
    except SettingsError as e:
        findings.append(Finding("settings", "stop", str(e)))
    chosen = settings.override(stored, bundle=bundle, device=device, port=port)
    if budget or board_name is not None:
        text, data = examination.budget(chosen, board_name)
        print(json.dumps(data, indent=1) if as_json else text)
        return
    facts = examination.read_machine()
    more, drafted = examination.examine(chosen, facts)
    findings += more
    if as_json:
        print(json.dumps(_json(findings, facts), indent=1))
    else:
        print("\n".join(map(_lines, findings)))
    if write_config is not None:
        write_whole(write_config, drafted.encode())
        print(f"wrote {write_config}", file=sys.stderr)
    stops = [f.area for f in findings if f.status == "stop"]
    if stops:
        areas = ", ".join(dict.fromkeys(stops))
        raise CheckFailed(f"{len(stops)} of these would stop a run: {areas}")


def _lines(finding: Finding) -> str:
    text = finding.text + (f"\ndo: {finding.do}" if finding.do else "")
    return f"{finding.area:<10}{finding.status:<9}" + text.replace("\n", "\n" + " " * 19)


def _json(findings: Sequence[Finding], facts: MachineFacts) -> dict[str, Any]:
    return {
        "format": "smolvla-edge-doctor",
        "version": 1,
        "board": {**asdict(facts.board), "processes": sorted(facts.board.processes)},
        "gpu": asdict(facts.gpu),
        "cameras": [asdict(node) for node in facts.video_nodes],
        "findings": [asdict(finding) for finding in findings],
    }


def main() -> None:
    """Entry point of `smolvla-doctor`."""
    command.require_linux()
    command.run(app)
