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
from .policy_config import EMPTY, IMAGES, PolicyConfig

STATE, ACTION = "observation.state", "action"
_EPS = 1e-8  # LeRobot's default
_SHORTEST_INSTRUCTION = 8  # tokens
# Steps of LeRobot's SmolVLA pipelines; True: the runtime always does them, so the checkpoint must too.
_BEFORE = {
    "rename_observations_processor": False,
    "to_batch_processor": False,
    "smolvla_new_line_processor": True,
    "tokenizer_processor": True,
    "device_processor": False,
    "normalizer_processor": True,
}
_AFTER = {"unnormalizer_processor": True, "device_processor": False}
Step = tuple[str, dict[str, Any], dict[str, Tensor]]  # registry name, config, state
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
    before, after = _read_steps(folder, "policy_preprocessor"), _read_steps(folder, "policy_postprocessor")
    problems = _step_problems("preprocessor", before, _BEFORE) + _step_problems("postprocessor", after, _AFTER)
    try:
        rename: dict[str, str] = {}
        token_length = config.tokenizer_max_length
        for name, options, _ in before:
            if name == "rename_observations_processor":
                rename = dict(options.get("rename_map") or {})
            elif name == "tokenizer_processor":
                token_length = int(options.get("max_length") or token_length)
                problems += _tokenizer_problems(folder, config, options)
        state = _normalization(STATE, before, "normalizer_processor", config, tensors, problems)
        action = _normalization(ACTION, after, "unnormalizer_processor", config, tensors, problems)
        problems += [
            f"rename_map puts {robot} into the empty slot {policy}"
            for robot, policy in rename.items()
            if policy.startswith(EMPTY)
        ]
        names = [_robot_name(key, rename, problems) for key in config.cameras]
    except (TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"a processor file in {folder} is damaged ({e}): copy the checkpoint again") from e
    if len(set(names)) != len(names):
        problems.append(f"cameras {list(config.cameras)} get the robot names {names}: two are equal")
    if token_length < _SHORTEST_INSTRUCTION:
        problems.append(f"instructions are cut to {token_length} tokens, expected at least {_SHORTEST_INSTRUCTION}")
    if problems:
        raise CheckpointError(f"{folder} cannot be exported: {'; '.join(problems)}")
    return Processors(state, action, token_length, tuple(names))


def _step_problems(side: str, steps: list[Step], known: dict[str, bool]) -> list[str]:
    """Steps nobody here knows, required ones that are missing, and steps that come twice."""
    if not steps:
        return []  # a checkpoint without processor files
    names = [name for name, _, _ in steps]
    found = [f"{side} step {name!r} is not supported" for name in names if name not in known]
    found += [f"{side} step {n!r} is missing" for n, required in known.items() if required and n not in names]
    return found + [f"{side} step {n!r} comes {names.count(n)} times" for n in known if names.count(n) > 1]


def _tokenizer_problems(folder: Path, config: PolicyConfig, options: dict[str, Any]) -> list[str]:
    found = []
    name = str(options.get("tokenizer_name") or config.vlm)
    if name != config.vlm and not (folder / name / "tokenizer.json").is_file():
        found.append(f"the preprocessor's tokenizer is {name}, the policy's VLM is {config.vlm}: they must be one")
    if options.get("padding_side", "right") != "right":
        found.append("the tokenizer pads on the left, only right padding is supported")
    if options.get("task_key", "task") != "task":
        found.append(f"the instruction is read from {options['task_key']!r}, only 'task' is supported")
    return found


def _read_steps(folder: Path, name: str) -> list[Step]:
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
            result.append((str(step.get("registry_name") or step.get("class")), step.get("config") or {}, state))
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} cannot be read ({e!r}): copy the checkpoint again") from e
    return result


def _normalization(
    key: str,
    steps: list[Step],
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
            normalized = set(options.get("features", {STATE: None}))
            if options.get("normalize_observation_keys") is not None:
                normalized &= set(options["normalize_observation_keys"])
            if key == STATE and STATE not in normalized:
                problems.append("the normalizer leaves the state out, which is not supported")
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
