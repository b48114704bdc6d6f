"""smolvla-calibrate: homing offsets and ranges of an arm that a person moves by hand."""

from pathlib import Path

import typer

from ...core import command
from ...core.errors import SettingsError
from ..robot.calibrate import calibrate_arm

app = command.new_app()


@app.command()
def calibrate(
    port: str = typer.Option("auto", help="Serial port of the arm, or auto."),
    robot_id: str | None = typer.Option(
        None, "--id", metavar="NAME", help="Save in LeRobot's folder under this id."
    ),
    output: Path | None = typer.Option(
        None, metavar="FILE.json", help="Save in this file instead."
    ),
    restore: str | None = typer.Option(
        None, metavar="FILE_OR_ID", help="Write this calibration to servos that lost it."
    ),
    yes: bool = typer.Option(False, "--yes", help="Write without a question."),
    force: bool = typer.Option(False, "--force", help="Overwrite an existing calibration file."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Calibrate an SO-101 arm by hand. Configure its servos as LeRobot does.

    The motors stay off. Nothing is written before you agree.

    Exit status: 0 done, 2 something is wrong, 130 interrupted or declined.
    """
    command.terminate_like_interrupt()
    if sum(given is not None for given in (robot_id, output, restore)) != 1:
        raise SettingsError(
            "give one of --id NAME, --output FILE.json (where to save) and --restore FILE_OR_ID"
        )
    port = calibrate_arm(port, robot_id, output, restore, yes, force)
    print(f"done: smolvla-run --port {port} --calibration {robot_id or output or restore}")


def main() -> None:
    """Entry point of `smolvla-calibrate`."""
    command.require_linux()
    command.run(app)
