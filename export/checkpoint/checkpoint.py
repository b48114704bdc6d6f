"""A LeRobot SmolVLA checkpoint, read whole: config, weights, VLM config, tokenizer, processors,
dataset facts.

safetensors only; nothing is ever unpickled.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...core.errors import CheckpointError
from ...core.files import sha256_of
from ...quantize.observations.hub import from_hub, is_hub_id
from ...runtime.bundle.manifest import CameraSlot, Manifest
from . import tokens
from .architecture import DEFAULT_VLM_CONFIG, Architecture, read_vlm_config
from .cameras import Named, choose_cameras, dataset_cameras
from .policy_config import DEFAULT_VLM, PolicyConfig
from .processors import Processors, read_processors

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
_COMPILED = "_orig_mod."  # torch.compile's prefix, anywhere in a key


@dataclass(frozen=True)
class Checkpoint:
    """Everything an export needs, in memory, checked."""

    name: str  # as the user gave it
    folder: Path
    revision: str | None  # resolved commit, when it came from the Hub
    weights_sha256: str
    config: PolicyConfig
    tensors: dict[str, Tensor]
    vlm: Any  # transformers' SmolVLMConfig
    tokenizer: Path  # tokenizer.json
    processors: Processors
    cameras: tuple[CameraSlot, ...]  # those of training, in the policy's order
    left_out: str  # one line on config.json's other cameras; empty where there are none
    joints: tuple[str, ...] | None
    fps: float | None
    demo: bool = False  # random weights: to be run and timed, never to move a robot

    @property
    def camera_names(self) -> tuple[str, ...]:
        """What the robot calls `cameras`."""
        return tuple(camera.name for camera in self.cameras)

    def differences_from(self, m: Manifest) -> list[str]:
        """What a bundle with this manifest has of another checkpoint, in words.

        Empty where the bundle can be made of this one.
        """
        around = self.processors
        same = {
            "weights": m.source.weights_sha256 == self.weights_sha256,
            "cameras": m.cameras == self.cameras,
            "tokens": m.tokens.length == around.token_length,
            "denoise steps": m.sampling == self.config.sampling,
            "statistics": (m.state.normalization, m.action.normalization)
            == (around.state, around.action),
        }
        return [name for name, holds in same.items() if not holds]


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """All sizes of a checkpoint."""
    config = checkpoint.config
    special: tuple[int, ...] = ()
    if config.add_image_special_tokens:
        special = tokens.image_special_tokens(tokens.read_tokenizer(checkpoint.tokenizer))
    cameras, token_length = len(checkpoint.cameras), checkpoint.processors.token_length
    return Architecture(config, checkpoint.vlm, cameras, token_length, special)


def load_checkpoint(
    name: str,
    *,
    revision: str | None = None,
    vlm: Path | None = None,
    cameras: Named | None = None,
) -> Checkpoint:
    """Read `name`: a folder, a training folder that holds `pretrained_model/`, or a Hub id.

    The VLM's config and tokenizer come from the checkpoint, from `vlm`, or from the Hub, in that
    order. cameras: those of training, in the robot's names, where the checkpoint does not say.
    Raises CheckpointError.
    """
    folder, commit = _locate(name, revision)
    config = PolicyConfig.from_json(_read_json(folder / "config.json"))
    if adapters := sorted(p.name for p in folder.glob("adapter_*")):
        raise CheckpointError(
            f"{folder} holds PEFT adapters ({', '.join(adapters)}), not whole weights: merge "
            "them first "
            "(peft's merge_and_unload, then save_pretrained) and export the merged checkpoint"
        )
    if not (folder / WEIGHTS).is_file():
        found = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors")
        )
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} (found {found or 'no weights'}): only safetensors are read"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{folder / WEIGHTS} cannot be read: {e}. Copy the checkpoint again"
        ) from e
    tensors = {key.replace(_COMPILED, ""): t for key, t in tensors.items()}
    wanted = config.vlm_model_name
    if vlm is not None and not vlm.is_dir():
        raise CheckpointError(f"--vlm {vlm} is not a folder")
    # Where the VLM's files may be, in the order they are tried; an absolute name stays itself.
    places = [
        p
        for p in (folder / wanted, folder / "tokenizer", folder, vlm)
        if p is not None and p.is_dir()
    ]
    configs, tokenizers = ([p / name for p in places] for name in ("config.json", TOKENIZER))
    vlm_config = next((file for file in configs if "text_config" in _optional_json(file)), None)
    if vlm_config is None and wanted == DEFAULT_VLM:
        vlm_config = DEFAULT_VLM_CONFIG
    tokenizer = next((file for file in tokenizers if file.is_file()), None)
    processors = read_processors(folder, config, tensors)
    info = _dataset_info(folder)
    evidence = Named("the normaliser's image statistics", processors.image_statistics)
    used, left_out = choose_cameras(
        config.cameras, processors.rename_map, (evidence, dataset_cameras(info)), cameras
    )
    joints, fps = _dataset_facts(info, config.action_dim)
    return Checkpoint(
        name=name,
        folder=folder,
        revision=commit,
        weights_sha256=sha256_of(folder / WEIGHTS),
        config=config,
        tensors={k: t for k, t in tensors.items() if torch.is_floating_point(t)},
        vlm=read_vlm_config(vlm_config or _vlm_from_hub("config.json", places, wanted)),
        tokenizer=tokenizer or _vlm_from_hub(TOKENIZER, places, wanted),
        processors=processors,
        cameras=used,
        left_out=left_out,
        joints=joints,
        fps=fps,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; CheckpointError when it is missing or not one."""
    try:
        raw = json.loads(path.read_text())
    except OSError as e:
        raise CheckpointError(
            f"{path} cannot be read ({e.strerror}): give a LeRobot checkpoint folder"
        ) from e
    except ValueError as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return raw


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _locate(name: str, revision: str | None) -> tuple[Path, str | None]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"--revision is for Hub checkpoints, but {name} is a folder: leave it out"
            )
        inside = [folder / "pretrained_model", folder / "checkpoints" / "last" / "pretrained_model"]
        if not (folder / "config.json").exists():  # a training run's folder, or one of its steps
            folder = next((p for p in inside if p.is_dir()), folder)
        return folder, None
    if folder.exists() or not is_hub_id(name):
        raise CheckpointError(
            f"{name} is neither a folder nor a Hub id such as lerobot/smolvla_base"
        )
    path = hub_folder(name, ["*.json", "*.safetensors", "tokenizer/*"], revision)
    return path, path.name


def hub_folder(repo: str, patterns: list[str], revision: str | None = None) -> Path:
    """The snapshot folder, whose name is the resolved commit; from the local cache where the Hub
    does not answer."""
    from huggingface_hub import snapshot_download

    with from_hub(f"{repo} at revision {revision}" if revision else repo, CheckpointError):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _vlm_from_hub(wanted: str, places: list[Path], vlm_name: str) -> Path:
    """The file `wanted` of the VLM's Hub snapshot; CheckpointError names the folders that were
    looked at before."""
    looked = f"no {wanted} of the VLM in {', '.join(map(str, places)) or 'the checkpoint'}"
    if not is_hub_id(vlm_name):
        raise CheckpointError(
            f"{looked}, and {vlm_name} is no Hub id: give --vlm FOLDER with the VLM's files"
        )
    try:
        hub = hub_folder(vlm_name, ["config.json", "tokenizer*.json", "special_tokens_map.json"])
    except CheckpointError as e:
        raise CheckpointError(
            f"{looked}, and {e}, or give --vlm FOLDER with the VLM's files"
        ) from e
    if not (hub / wanted).is_file():
        raise CheckpointError(
            f"{looked}, and {vlm_name} on the Hub has none either: give --vlm FOLDER"
        )
    return hub / wanted


def _dataset_info(folder: Path) -> dict[str, Any]:
    """meta/info.json of the training dataset; empty where this machine does not have it."""
    dataset = _optional_json(folder / "train_config.json").get("dataset")
    if not isinstance(dataset, dict):
        return {}
    # os.path, because Path.expanduser raises where there is no home, and that is no error here
    default = os.path.expanduser("~/.cache/huggingface/lerobot")  # noqa: PTH111
    home = os.environ.get("HF_LEROBOT_HOME") or default
    root, repo, info = (
        str(dataset.get("root") or home),
        str(dataset.get("repo_id")),
        "meta/info.json",
    )
    return _optional_json(Path(root, info)) or _optional_json(Path(home, repo, info))


def _dataset_facts(
    info: Mapping[str, Any], dof: int
) -> tuple[tuple[str, ...] | None, float | None]:
    """Joint names and frame rate in a dataset's meta/info.json."""
    try:
        names = info["features"]["action"]["names"]
        if isinstance(names, dict):  # older datasets: {"motors": [...]}
            names = next(iter(names.values()))
        joints = tuple(str(name).removesuffix(".pos") for name in names)
    except (LookupError, TypeError, StopIteration):
        joints = ()
    fps = info.get("fps")
    return (
        joints if len(joints) == dof else None,
        float(fps) if isinstance(fps, int | float) and 0 < fps <= 200 else None,
    )
