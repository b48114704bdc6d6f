"""smolvla-run: a bundle drives an arm."""

from dataclasses import fields
from pathlib import Path

import typer

from ...core import command
from ...core.errors import SettingsError
from ..policy.policy import Policy
from ..policy.selfcheck import TOLERANCE, require, run_selfcheck, summary
from ..robot import settings
from ..robot.chunks import Chunking
from ..robot.drive import Mode, drive
from ..robot.replay import replay
from ..robot.settings import Guarding, Settings

app = command.new_app()


@app.command()
def run(
    context: typer.Context,
    bundle: str | None = typer.Option(None, help="Bundle folder.  [default: bundle]"),
    device: str | None = typer.Option(
        None, help="cpu, cuda, jetson, or auto: CUDA where it is there, else CPU.  [default: auto]"
    ),
    backend: str | None = typer.Option(
        None,
        help="tensorrt, ort-cuda or ort-cpu, and no other.  [default: the device's first that works]",
    ),
    port: str | None = typer.Option(
        None,
        help="Serial port of the arm, auto, or sim: the virtual arm, which needs no other setting.",
    ),
    units: str | None = typer.Option(
        None,
        help="degrees (LeRobot 0.4.4 on) or range_m100_100 (before), as the policy was trained.",
    ),
    calibration: str | None = typer.Option(
        None, help="LeRobot calibration file, or the id the arm was calibrated under."
    ),
    camera: list[str] | None = typer.Option(
        None,
        metavar="NAME=SOURCE",
        help="Once for each camera: /dev/videoN, a number, csi:N, a picture or a video.",
    ),
    task: str | None = typer.Option(None, help="The instruction."),
    seconds: float | None = typer.Option(
        None, help="Stop so long after the first action.  [default: Ctrl-C]"
    ),
    fps: float | None = typer.Option(
        None, help="Control rate.  [default: the training data's, else 30]"
    ),
    steps: int | None = typer.Option(None, help="Denoise steps.  [default: the checkpoint's]"),
    seed: int | None = typer.Option(None, help="Seed of the noise.  [default: random]"),
    chunking: Chunking | None = typer.Option(
        None,
        help="How chunks are joined: sync holds between them, async eases in, rtc guides.  [default: sync]",
    ),
    guardian: Guarding | None = typer.Option(
        None,
        help="What becomes of the arm should this program die: soft, off or hold.  [default: soft]",
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check everything, show the first chunk, and leave."
    ),
    rehearse: bool = typer.Option(
        False,
        "--rehearse",
        help="Run with the motors off, and write rehearsal.json.  [--seconds default: 10]",
    ),
    record: str | None = typer.Option(
        None, metavar="DIR", help="Keep all the policy saw and said, in a new folder."
    ),
    replay_: Path | None = typer.Option(
        None, "--replay", metavar="DIR", help="Compute a recording again and compare; needs no arm."
    ),
    allow_far_start: bool = typer.Option(
        False, "--allow-far-start", help="Start where training never was."
    ),
    i_know_the_unit: bool = typer.Option(
        False, "--i-know-the-unit", help="Where the training statistics cannot confirm --units."
    ),
    write_eeprom: bool = typer.Option(
        False,
        "--write-eeprom",
        help="First give the servos LeRobot's configuration; only what differs is written.",
    ),
    config: Path | None = typer.Option(
        None,
        help="Settings that flags override; motion limits are set here.  [default: ./robot.toml]",
    ),
    self_check: bool = typer.Option(
        False, "--self-check", help="Check the bundle on this device and leave."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks."),
    version: bool | None = command.version_option(),
) -> None:
    """Drive an SO-101 arm, or the virtual one, with an exported SmolVLA.

    Exit status: 0 done, 1 a check failed or a safety stop, 2 something in the input is wrong, 130 interrupted.
    The stop of a real arm is its power switch, not this program.
    """
    command.terminate_like_interrupt()
    stored = settings.read_settings(config or Path("robot.toml"), required=config is not None)
    flags = {
        field.name: context.params.get(field.name) for field in fields(Settings)
    }  # by the same names
    flags["i_know_the_unit"] = i_know_the_unit or None
    chosen = settings.override(
        stored, **flags | {"cameras": stored.cameras | settings.parse_cameras(camera or [])}
    )
    chosen.check_values()
    if dry_run + rehearse + self_check + (replay_ is not None) > 1:
        raise SettingsError("--dry-run, --rehearse, --replay and --self-check exclude each other")
    if not self_check and replay_ is None:
        mode: Mode = "dry-run" if dry_run else "rehearse" if rehearse else "drive"
        drive(chosen, mode, far=allow_far_start, write_eeprom=write_eeprom)
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
