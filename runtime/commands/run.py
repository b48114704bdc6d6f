"""smolvla-run: a bundle drives an arm."""

from pathlib import Path
from typing import Any

import typer

from ...core import command
from ...core.errors import SettingsError
from ..policy.policy import Policy
from ..policy.selfcheck import TOLERANCE, require, run_selfcheck, summary
from ..robot.drive import Mode, drive
from ..robot.replay import replay
from ..robot.settings import override, read_settings
from .options import settings_options

app = command.new_app()


@app.command()
@settings_options
def run(
    given: dict[str, Any],
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check everything, show the first chunk, and leave."
    ),
    rehearse: bool = typer.Option(
        False, "--rehearse", help="Run with the motors off, and write rehearsal.json."
    ),
    replay_: Path | None = typer.Option(
        None, "--replay", metavar="DIR", help="Compute a recording again and compare; needs no arm."
    ),
    allow_far_start: bool = typer.Option(
        False,
        "--allow-far-start",
        help="Start although the arm is outside the range seen in training.",
    ),
    write_eeprom: bool = typer.Option(
        False,
        "--write-eeprom",
        help="First give the servos LeRobot's configuration; only what differs is written.",
    ),
    config: Path | None = typer.Option(
        None,
        help="Settings, which options override; motion limits are set here.  "
        "[default: ./robot.toml]",
    ),
    self_check: bool = typer.Option(
        False, "--self-check", help="Check the bundle on this device and leave."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Drive an SO-101 arm, or the virtual one, with an exported SmolVLA.

    Exit status: 0 done, 1 a check failed or a safety stop, 2 something in the input is wrong, 130
    interrupted. The stop of a real arm is its power switch, not this program.
    """
    command.terminate_like_interrupt()
    stored = read_settings(config or Path("robot.toml"), required=config is not None)
    chosen = override(stored, **given)
    if sum([dry_run, rehearse, self_check, replay_ is not None]) > 1:
        raise SettingsError("--dry-run, --rehearse, --replay and --self-check exclude each other")
    if not self_check and replay_ is None:
        mode: Mode = "dry-run" if dry_run else "rehearse" if rehearse else "drive"
        flags = {
            "--dry-run": dry_run,
            "--rehearse": rehearse,
            "--allow-far-start": allow_far_start,
            "--write-eeprom": write_eeprom,
        }
        words = [flag for flag, is_given in flags.items() if is_given]
        if config is not None:
            words += ["--config", str(config)]
        drive(chosen, mode, far=allow_far_start, write_eeprom=write_eeprom, words=words)
        return
    policy = Policy.load(chosen.bundle, chosen.device, backend=chosen.backend)
    if replay_ is not None:
        replay(replay_, policy)
    else:
        _self_check(policy)


def _self_check(policy: Policy) -> None:
    print(policy.graphs.reason)
    errors = run_selfcheck(policy)
    for stage, value in summary(errors).items():
        print(f"{stage:<8} {value:.2e}  (at most {TOLERANCE[policy.manifest.precision]:.0e})")
    require(policy.manifest.precision, errors)
    print("self-check passed")


def main() -> None:
    """Entry point of `smolvla-run`."""
    command.require_linux()
    command.run(app)
