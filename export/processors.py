"""LeRobot's pre- and postprocessor files: statistics, token length, camera names.

Checkpoints before lerobot 0.4 have no such files and keep the statistics inside the weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..runtime.normalization import Mode, Normalization
from .errors import CheckpointError
from .policy_config import IMAGES, PolicyConfig

STATE, ACTION = "observation.state", "action"
_EPS = 1e-8  # LeRobot's default
_OLD_BUFFERS = {
    STATE: "normalize_inputs.buffer_observation_state.",
    ACTION: "unnormalize_outputs.buffer_action.",
}


@dataclass(frozen=True)
class Processors:
    """What surrounds the model."""

    state: Normalization
    action: Normalization
    token_length: int
    camera_names: tuple[str, ...]  # the robot's name of each of config.cameras


def read_processors(folder: Path, config: PolicyConfig, tensors: Mapping[str, Tensor]) -> Processors:
    """Raises CheckpointError with everything in the files that this runtime would not do as LeRobot does."""
    steps = _read_steps(folder, "policy_preprocessor")
    problems = [f"preprocessor step {name!r} is not supported" for name, _, _ in steps if name not in _KNOWN_STEPS]
    rename: dict[str, str] = {}
    token_length = config.tokenizer_max_length
    for name, options, _ in steps:
        if name == "rename_observations_processor":
            rename = options.get("rename_map") or {}
        elif name == "tokenizer_processor":
            token_length = options.get("max_length") or token_length
            if options.get("padding_side", "right") != "right":
                problems.append("the tokenizer pads on the left, only right padding is supported")
    sides = {}
    for key, steps_of, kind in (
        (STATE, steps, "normalizer_processor"),
        (ACTION, _read_steps(folder, "policy_postprocessor"), "unnormalizer_processor"),
    ):
        sides[key] = _normalization(key, steps_of, kind, config, tensors, problems)
    names = [_robot_name(key, rename, problems) for key in config.cameras]
    if len(set(names)) != len(names):
        problems.append(f"cameras {list(config.cameras)} get the robot names {names}: two are equal")
    if problems:
        raise CheckpointError(f"{folder} cannot be exported: {'; '.join(problems)}")
    return Processors(sides[STATE], sides[ACTION], token_length, tuple(names))


_KNOWN_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    "smolvla_new_line_processor",
    "tokenizer_processor",
    "device_processor",
    "normalizer_processor",
}


def _read_steps(folder: Path, name: str) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """(registry name, config, state) of each step; empty when there is no such file."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return []
    try:
        steps = json.loads(path.read_text())["steps"]
        result = []
        for step in steps:
            state_file = step.get("state_file")
            if state_file is not None and Path(state_file).name != state_file:
                raise CheckpointError(f"{path} names the state file {state_file!r}, expected a plain file name")
            file = folder / state_file if state_file else None
            # smolvla_base's files are listed but hold nothing for the policy: an absent one means no statistics
            state = load_file(file) if file is not None and file.is_file() else {}
            result.append((step.get("registry_name") or step.get("class"), step.get("config") or {}, state))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read ({e!r}): copy the checkpoint again") from e
    return result


def _normalization(
    key: str,
    steps: list[tuple[str, dict[str, Any], dict[str, Tensor]]],
    kind: str,
    config: PolicyConfig,
    tensors: Mapping[str, Tensor],
    problems: list[str],
) -> Normalization:
    feature = "STATE" if key == STATE else "ACTION"
    modes, eps, state = dict(config.normalization), _EPS, {}
    for name, options, tensors_of_step in steps:
        if name == kind:
            modes, eps = options.get("norm_map") or modes, options.get("eps", _EPS)
            state = tensors_of_step
    if not steps:
        state = {
            k.replace(_OLD_BUFFERS[key], key + "."): t for k, t in tensors.items() if k.startswith(_OLD_BUFFERS[key])
        }
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        problems.append(f"images are normalised by {modes['VISUAL']}, only IDENTITY is supported")
    named = modes.get(feature, "IDENTITY")
    mode: Mode = next((m for m in get_args(Mode) if m == named), "IDENTITY")
    if mode != named:
        problems.append(f"{feature} has the unknown normalisation mode {named!r}")
    statistics = {
        k.removeprefix(key + "."): tuple(float(x) for x in t.float().flatten())
        for k, t in state.items()
        if k.startswith(key + ".") and "." not in k.removeprefix(key + ".")
    }
    dim = config.state_dim if key == STATE else config.action_dim
    # Image statistics, counts and unset buffers (infinite) are no per-joint statistics.
    statistics = {n: v for n, v in statistics.items() if n != "count" and np.isfinite(v).all()}
    result = Normalization(mode=mode, eps=float(eps), statistics=statistics)
    problems += [f"{key}: {p}" for p in result.problems(dim)]
    return result


def _robot_name(key: str, rename: Mapping[str, str], problems: list[str]) -> str:
    sources = [robot for robot, policy in rename.items() if policy == key]
    if len(sources) > 1:
        problems.append(f"rename_map gives {key} two sources: {sources}")
    name = sources[0] if sources else key
    return name.removeprefix(IMAGES).removeprefix("observation.")
