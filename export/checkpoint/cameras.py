"""Which of config.json's cameras the policy was trained with, and what the robot calls them.

A fine-tune keeps the camera list of its base. LeRobot leaves a camera that a batch does not have
out of the prefix (`SmolVLAPolicy.prepare_images`: the keys that are there, in the order of
input_features, then `empty_cameras` masked slots). A bundle therefore has the cameras of training
only: a picture in the place of another one, black or not, changes the actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import CheckpointError
from ...runtime.bundle.bundle import Bundle
from ...runtime.bundle.manifest import CameraSlot
from .policy_config import EMPTY, IMAGES


@dataclass(frozen=True)
class Named:
    """Some cameras, and who names them."""

    by: str
    cameras: tuple[str, ...]


def named_cameras(option: str, names: str | None) -> Named | None:
    """A command's option with names that commas separate; None where it is not given."""
    if names is None:
        return None
    return Named(option, tuple(name.strip() for name in names.split(",")))


def bundle_cameras(bundle: Bundle) -> Named:
    """The cameras that a bundle was exported with, to read its checkpoint in the same way."""
    return Named(str(bundle.folder), tuple(camera.name for camera in bundle.manifest.cameras))


def dataset_cameras(info: Mapping[str, Any]) -> Named:
    """The camera features in a dataset's meta/info.json; none where that is empty or damaged."""
    features = info.get("features")
    cameras = [
        key
        for key, feature in (features.items() if isinstance(features, dict) else ())
        if isinstance(feature, dict) and feature.get("dtype") in ("image", "video")
    ]
    return Named("the training dataset's meta/info.json", tuple(cameras))


def choose_cameras(
    keys: Sequence[str],
    rename_map: Mapping[str, str],
    evidence: Sequence[Named],
    asked: Named | None,
) -> tuple[tuple[CameraSlot, ...], str]:
    """The cameras of training in the order of `keys`, and one line on those that are left out.

    Args:
        keys: config.json's cameras.
        rename_map: The dataset's features to the policy's.
        evidence: The dataset's camera features. The first that has any counts.
        asked: The user's choice, in the robot's names.

    Returns:
        The cameras, and "" where none is left out.

    Raises:
        CheckpointError: The choice contradicts the evidence or names no cameras of the policy, or
            nothing tells which cameras training had.
    """
    names = _robot_names(keys, rename_map)
    found = next((e for e in evidence if e.cameras), Named("", ()))
    there = {rename_map.get(feature, feature): feature for feature in found.cameras}
    trained = [key for key in keys if key in there]
    unmapped = [_short(feature) for key, feature in there.items() if key not in keys]
    settled = bool(trained) and (len(trained) == len(keys) or not unmapped)

    def listed(some: Sequence[str]) -> str:
        return ", ".join(names[key] for key in some)

    if asked is not None:
        chosen, by = [key for key in keys if names[key] in asked.cameras], asked.by
        if sorted(names[key] for key in chosen) != sorted(asked.cameras) or not chosen:
            raise CheckpointError(
                f"{by} names the cameras {', '.join(asked.cameras)}, expected some of the policy's "
                f"({listed(keys)}), each once"
            )
        if not set(trained) <= set(chosen) or (settled and chosen != trained):
            raise CheckpointError(
                f"{by} names the cameras {listed(chosen)}, but according to {found.by} training "
                f"had {listed(trained)}: use these"
            )
    elif settled:
        chosen, by = trained, found.by
    else:
        if unmapped:
            doubt = (
                f"according to {found.by} training had {', '.join(unmapped)}, which neither "
                "config.json nor the rename_map knows"
            )
        elif unnamed := _unnamed(keys, rename_map):
            doubt = f"the rename_map leaves out {listed(unnamed)}, and no image statistics tell"
        else:
            return tuple(CameraSlot(names[key], key) for key in keys), ""
        raise CheckpointError(
            f"it is not clear which cameras training had. config.json has {listed(keys)}; {doubt}. "
            "Name those of config.json that training had with smolvla-export --cameras NAME,NAME "
            "(smolvla-bench frontier: --trained-cameras)"
        )
    left = [key for key in keys if key not in chosen]
    line = (
        f"leaving out {listed(left)}: according to {by}, training had only {listed(chosen)}"
        if left
        else ""
    )
    return tuple(CameraSlot(names[key], key) for key in chosen), line


def _short(feature: str) -> str:
    return feature.removeprefix(IMAGES).removeprefix("observation.")


def _robot_names(keys: Sequence[str], rename_map: Mapping[str, str]) -> dict[str, str]:
    """What the robot calls each of the policy's cameras."""
    robot = {policy: name for name, policy in rename_map.items()}
    names = {key: _short(robot.get(key, key)) for key in keys}
    problems = [
        f"rename_map puts {robot[key]} into the empty slot {key}"
        for key in robot
        if key.startswith(EMPTY)
    ]
    if len(robot) < len(rename_map):
        problems.append(f"rename_map gives a camera two sources: {dict(rename_map)}")
    if len(set(names.values())) < len(names):
        problems.append(
            f"cameras {list(keys)} get the robot names {list(names.values())}: two are equal"
        )
    if problems:
        raise CheckpointError(f"the cameras cannot be exported: {'; '.join(problems)}")
    return names


def _unnamed(keys: Sequence[str], rename_map: Mapping[str, str]) -> list[str]:
    """Cameras that the map leaves out although it names others of their series, such as camera3
    beside camera1 and camera2: names of a base, which a robot's own cameras rarely have."""

    def series(key: str) -> str:
        return key.rstrip("0123456789")

    renamed = {key for key in keys if key in rename_map.values()}
    return [
        key
        for key in keys
        if key not in renamed and series(key) in {series(other) for other in renamed}
    ]
