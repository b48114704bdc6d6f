"""The bundle's manifest.json: the contract between the exporter and the runtime.

Any change of the fields raises VERSION. A newer bundle needs a newer runtime, an older bundle needs
a new export. The exporter writes only what it has checked, and the bundle's files are hashed, so
the runtime checks the version, the types and the file names, and trusts the values.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...core.errors import BundleError
from ...core.strict import decode, encode
from .normalization import Normalization

FORMAT = "smolvla-edge-bundle"
VERSION = 4
MANIFEST = "manifest.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

Precision = Literal["fp32", "fp16", "int8"]
# cpu: the graphs hold operators that only ONNX Runtime's CPU provider has.
Target = Literal["portable", "cpu"]
Dtype = Literal["float32", "float16", "int32", "bool"]
BYTES = {"float32": 4, "float16": 2, "int8": 1}
CAMERA_GRAPH = "camera.onnx"  # frames to images, on the device; only portable bundles have it


@dataclass(frozen=True)
class Work:
    """The cost of one run of a stage, in operations of matrix products (1 multiply-add = 2)."""

    gemm: dict[str, int]  # dtype of the weights -> operations of products with them
    attention: int  # operations of products of two activations, float in every precision
    weights: dict[str, int]  # dtype -> number of weights that these products read

    @property
    def flops(self) -> int:
        return sum(self.gemm.values()) + self.attention

    @property
    def weight_bytes(self) -> int:
        return sum(n * BYTES[dtype] for dtype, n in self.weights.items())


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Graph:
    """One ONNX graph and the cost of a run."""

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    stages: dict[str, Work]  # vision and language, or expert

    @property
    def flops(self) -> int:
        """Operations of matrix products, 1 multiply-add = 2."""
        return sum(work.flops for work in self.stages.values())


@dataclass(frozen=True)
class File:
    """What identifies a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class WeightsSource:
    """The checkpoint that the weights come from."""

    checkpoint: str  # as the user named it
    revision: str | None  # the resolved commit, from the Hub only
    weights_sha256: str
    demo: bool  # random weights: for tests and timing, never for a real robot


@dataclass(frozen=True)
class CameraSlot:
    """One image slot. The slots are in the order of the graph's input."""

    name: str  # the robot's name of the camera
    key: str  # the policy's feature


@dataclass(frozen=True)
class Vector:
    """State or action: `dim` values in robot units, padded with zeros to `padded` in the graph."""

    dim: int
    padded: int
    normalization: Normalization


@dataclass(frozen=True)
class Sampling:
    """The settings of the flow-matching solver, from the checkpoint."""

    chunk_size: int
    n_action_steps: int
    num_steps: int
    min_period: float
    max_period: float

    def problems(self) -> list[str]:
        """What is wrong with the values; the exporter checks a checkpoint with it."""
        found = []
        if not 1 <= self.n_action_steps <= self.chunk_size:
            found.append(
                f"n_action_steps is {self.n_action_steps}, "
                f"expected 1 to chunk_size {self.chunk_size}"
            )
        if not 1 <= self.num_steps <= 1000:
            found.append(f"num_steps is {self.num_steps}, expected 1 to 1000")
        if not 0 < self.min_period < self.max_period < math.inf:
            found.append(
                f"periods are {self.min_period} to {self.max_period}, "
                "expected 0 < min_period < max_period"
            )
        return found


@dataclass(frozen=True)
class Tokens:
    """Fixed length and padding of the tokenized instruction."""

    length: int
    pad_id: int


@dataclass(frozen=True)
class CalibrationData:
    """The observations that chose scales and smoothing, and that the gate was judged on."""

    source: str  # as the user named it
    kind: Literal["dataset", "recording", "synthetic"]
    sha256: str  # of the part that was used
    bytes: int
    frames: int
    episodes: int


@dataclass(frozen=True)
class Sensitivity:
    """The effect of one group of layers in INT8 alone."""

    saved_ms: float  # of a chunk, computed for the target's machine
    action_p99: float  # error of the worst joint over its standard deviation across seeds
    cache: float  # relative L2 error of the worst tensor


@dataclass(frozen=True)
class Int8Record:
    """How an INT8 bundle was made, and what it claims."""

    groups: tuple[str, ...]  # of layers in INT8, in the order they were chosen
    weights: int  # number of INT8 weights
    multiply_adds: int  # of a chunk, with INT8 weights
    sensitivity: dict[str, Sensitivity]
    calibration: CalibrationData
    gate: dict[str, float]  # the limits of gate.toml, or the defaults
    gate_is_default: bool
    # The errors that the gate judged; without gripper_flips where no joint is known as a gripper.
    found: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.json."""

    format: str
    version: int
    source: WeightsSource
    files: dict[str, File]
    prefix: Graph
    expert: Graph
    cache_bytes: int
    cameras: tuple[CameraSlot, ...]
    image_size: int
    tokens: Tokens
    state: Vector
    action: Vector
    sampling: Sampling
    joints: tuple[str, ...] | None  # names of the action's values, where the dataset has them
    units: str | None
    fps: float | None
    precision: Precision
    target: Target
    # Stage -> largest error against the checkpoint, over max(1, largest reference magnitude).
    parity: dict[str, float]
    pinned: tuple[str, ...]  # stages of a float16 bundle in float32, chosen by the range pass
    int8: Int8Record | None
    float16_largest: float | None  # largest float16 magnitude on fixed observations (limit 65504)
    built_with: dict[str, str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of both graphs. A tensor of the same name in both is the same memory."""
        return {t.name: t for g in (self.prefix, self.expert) for t in (*g.inputs, *g.outputs)}


def parse_manifest(raw: object, path: Path) -> Manifest:
    """Check parsed JSON. Raises BundleError with every problem, or with the version alone."""
    fields = raw if isinstance(raw, dict) else {}
    if fields.get("format") != FORMAT:
        raise BundleError(
            f"{path} has format {fields.get('format')!r}, expected {FORMAT!r}: not a bundle"
        )
    version = fields.get("version")
    if not isinstance(version, int):
        raise BundleError(f"{path} has version {version!r}, expected an integer")
    if version > VERSION:
        raise BundleError(
            f"{path} has version {version}, this runtime reads {VERSION}: "
            "upgrade the runtime (pip install --upgrade smolvla-edge)"
        )
    if version < VERSION:
        again = export_command(fields, path.parent, fields.get("target", "portable"))
        raise BundleError(
            f"{path} has version {version}, this runtime reads {VERSION}: export again with {again}"
        )
    problems: list[str] = []
    manifest = decode(Manifest, fields, problems)
    if manifest is not None:
        problems = _contradictions(manifest)
    if manifest is None or problems:
        raise BundleError(
            f"{path} is not valid: {'; '.join(problems)}. Export the checkpoint again"
        )
    return manifest


def export_command(fields: dict[str, Any], folder: Path, target: str) -> str:
    """The smolvla-export command that makes the bundle at `folder` again for `target`.

    fields: the bundle's manifest, of any version.
    """
    source = fields.get("source")
    source = source if isinstance(source, dict) else {}
    checkpoint = "--demo" if source.get("demo") else source.get("checkpoint", "CHECKPOINT")
    precision = fields.get("precision", "fp32")
    command = f"smolvla-export {checkpoint} --precision {precision} --target {target}"
    if precision == "int8":
        command += " --calibration SOURCE"
    return f"{command} --output {folder} --force"


def _contradictions(m: Manifest) -> list[str]:
    """A file name must not leave the folder, every file that the runtime reads is listed, and an
    INT8 bundle says how it came to be."""
    bad = [name for name in m.files if not _PLAIN_NAME.fullmatch(name)]
    needed = (m.prefix.file, m.expert.file, "tokenizer.json", "selfcheck.npz")
    missing = [name for name in needed if name not in m.files]
    found = [f"file name {name!r} is not a plain name" for name in bad]
    found += [f"file {name!r} is not listed under files" for name in missing]
    if m.precision == "int8" and m.int8 is None:
        found.append("precision is int8, but int8 is missing")
    return found


def manifest_json(manifest: Manifest) -> str:
    """The manifest as text. Keys are sorted: equal bundles have equal hashes."""
    return json.dumps(encode(manifest), indent=1, sort_keys=True, allow_nan=False) + "\n"
