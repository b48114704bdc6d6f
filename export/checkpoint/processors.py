"""LeRobot's pre- and postprocessor files: statistics, token length, what renames the cameras.

Checkpoints before lerobot 0.4 have no such files and keep the statistics inside the weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...core.errors import CheckpointError
from ...core.strict import decode
from ...runtime.bundle.normalization import Normalization
from .policy_config import PolicyConfig

STATE, ACTION = "observation.state", "action"
_EPS = 1e-8  # LeRobot's default
_SHORTEST_INSTRUCTION = 8  # tokens
# Steps of LeRobot's SmolVLA pipelines; True: the runtime always does them, so the checkpoint must
# too.
_BEFORE = {
    "rename_observations_processor": False,
    "to_batch_processor": False,
    "smolvla_new_line_processor": True,
    "tokenizer_processor": True,
    "device_processor": False,
    "normalizer_processor": True,
}
_AFTER = {"unnormalizer_processor": True, "device_processor": False}
_OLD_BUFFERS = {
    "normalize_inputs.buffer_observation_state.": STATE,
    "unnormalize_outputs.buffer_action.": ACTION,
}
Step = tuple[dict[str, Any], dict[str, Tensor]]  # config, state
_NOTHING: Step = {}, {}


@dataclass(frozen=True)
class Processors:
    """What surrounds the model."""

    state: Normalization
    action: Normalization
    token_length: int
    rename_map: dict[str, str]  # the dataset's features to the policy's
    image_statistics: tuple[str, ...]  # the dataset's cameras, where the normaliser has theirs


def read_processors(
    folder: Path, config: PolicyConfig, tensors: Mapping[str, Tensor]
) -> Processors:
    """Raises CheckpointError with everything in the files that this runtime would not do as LeRobot
    does."""
    problems: list[str] = []
    old = {
        key + "." + name.removeprefix(prefix): tensor
        for prefix, key in _OLD_BUFFERS.items()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    try:
        before = _read_steps(folder, "preprocessor", _BEFORE, problems)
        after = _read_steps(folder, "postprocessor", _AFTER, problems)
        renaming = before.get("rename_observations_processor", _NOTHING)[0]
        rename_map = {str(k): str(v) for k, v in (renaming.get("rename_map") or {}).items()}
        text = before.get("tokenizer_processor", _NOTHING)[0]
        token_length = int(text.get("max_length") or config.tokenizer_max_length)
        _check_tokenizer(folder, config, text, problems)
        normalizer = before.get("normalizer_processor", _NOTHING) if before else ({}, old)
        unnormalizer = after.get("unnormalizer_processor", _NOTHING) if after else ({}, old)
        state = _normalization(STATE, config.state_dim, normalizer, config, problems)
        action = _normalization(ACTION, config.action_dim, unnormalizer, config, problems)
        # LeRobot keeps statistics of images, and of nothing else, as [channels, 1, 1].
        images = [
            path.rpartition(".")[0]
            for path, tensor in normalizer[1].items()
            if path.startswith("observation.") and tensor.ndim == 3
        ]
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError, OSError) as e:
        raise CheckpointError(
            f"a processor file in {folder} is damaged ({e!r}): copy the checkpoint again"
        ) from e
    if token_length < _SHORTEST_INSTRUCTION:
        problems.append(
            f"instructions are cut to {token_length} tokens, expected at least "
            f"{_SHORTEST_INSTRUCTION}"
        )
    if problems or state is None or action is None:
        raise CheckpointError(f"{folder} cannot be exported: {'; '.join(problems)}")
    return Processors(state, action, token_length, rename_map, tuple(dict.fromkeys(images)))


def _read_steps(
    folder: Path, side: str, known: Mapping[str, bool], problems: list[str]
) -> dict[str, Step]:
    """By registry name; empty when there is no such file."""
    path = folder / f"policy_{side}.json"
    if not path.is_file():
        return {}
    steps, names = {}, []
    for step in json.loads(path.read_text())["steps"]:
        names.append(name := str(step.get("registry_name") or step.get("class")))
        file = folder / (step.get("state_file") or ".")
        if file not in (folder, folder / file.name):
            problems.append(
                f"{path} names the state file {step['state_file']!r}, expected a plain file name"
            )
        # smolvla_base's files are listed but hold nothing for the policy: an absent one means no
        # statistics
        steps[name] = step.get("config") or {}, load_file(file) if file.is_file() else {}
    problems += [f"{side} step {name!r} is not supported" for name in names if name not in known]
    problems += [
        f"{side} step {name!r} is missing" for name in known if known[name] and name not in names
    ]
    problems += [
        f"{side} step {name!r} comes {names.count(name)} times"
        for name in known
        if names.count(name) > 1
    ]
    return steps


def _check_tokenizer(
    folder: Path, config: PolicyConfig, options: Mapping[str, Any], problems: list[str]
) -> None:
    name = str(options.get("tokenizer_name") or config.vlm_model_name)
    if name != config.vlm_model_name and not (folder / name / "tokenizer.json").is_file():
        problems.append(
            f"the preprocessor's tokenizer is {name}, the policy's VLM is "
            f"{config.vlm_model_name}: they must be one"
        )
    if options.get("padding_side", "right") != "right":
        problems.append("the tokenizer pads on the left, only right padding is supported")
    if options.get("task_key", "task") != "task":
        problems.append(
            f"the instruction is read from {options['task_key']!r}, only 'task' is supported"
        )


def _normalization(
    key: str, dim: int, step: Step, config: PolicyConfig, problems: list[str]
) -> Normalization | None:
    options, tensors = step
    modes = options.get("norm_map") or config.normalization_mapping or {}
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        problems.append(f"images are normalised by {modes['VISUAL']}, only IDENTITY is supported")
    keys = options.get("normalize_observation_keys")
    if key == STATE and (
        STATE not in options.get("features", {STATE})
        or STATE not in ({STATE} if keys is None else keys)
    ):
        problems.append("the normalizer leaves the state out, which is not supported")
    # Image statistics, counts and unset buffers (infinite) are no per-joint statistics.
    statistics = {
        name: tensor.float().flatten().tolist()
        for path, tensor in tensors.items()
        if (name := path.removeprefix(key + ".")) not in (path, "count")
        and "." not in name
        and tensor.isfinite().all()
    }
    mode = modes.get(key.removeprefix("observation.").upper(), "IDENTITY")
    raw = {"mode": mode, "eps": options.get("eps", _EPS), "statistics": statistics}
    found: list[str] = []
    result = decode(Normalization, raw, found, key)
    problems += (
        found if result is None else [f"{key}: {problem}" for problem in result.problems(dim)]
    )
    return result
