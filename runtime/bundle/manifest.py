"""The bundle's manifest.json: what a bundle says of itself. This module is the contract.

Any change of the fields raises VERSION. A newer bundle asks for a newer runtime, an older one for a new export.
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
_SELFCHECK_LIMIT = 10_000_000  # bytes

Precision = Literal["fp32", "fp16", "int8"]
Target = Literal[
    "portable", "cpu"
]  # cpu: holds operators that only ONNX Runtime's CPU provider is known to run
Dtype = Literal["float32", "float16", "int32", "bool"]
BYTES = {"float32": 4, "float16": 2, "int8": 1}
CAMERA_GRAPH = "camera.onnx"  # frames to images, on the device; portable bundles have it


@dataclass(frozen=True)
class Work:
    """One run of a stage. Operations are of matrix products, 1 multiply-add = 2."""

    gemm: dict[str, int]  # dtype of the weights -> operations of products with them
    attention: int  # operations of products of two activations, float in every precision
    weights: dict[str, int]  # dtype -> values that these products read

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
    """One ONNX graph and what a run of it costs."""

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    stages: dict[str, Work]  # vision and language, or expert

    @property
    def flops(self) -> int:
        """Of matrix products, 1 multiply-add = 2."""
        return sum(work.flops for work in self.stages.values())


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    checkpoint: str  # as the user named it
    revision: str | None  # the resolved commit, from the Hub only
    weights_sha256: str
    demo: bool  # random weights: to be run and timed, never to move a robot


@dataclass(frozen=True)
class Camera:
    """One image slot, in the order the graph wants them."""

    name: str  # what the robot calls it
    key: str  # the policy's feature


@dataclass(frozen=True)
class Vector:
    """State or action: `dim` values in robot units, padded with zeros to `padded` in the graph."""

    dim: int
    padded: int
    normalization: Normalization


@dataclass(frozen=True)
class Sampling:
    """The flow-matching solver's settings, from the checkpoint."""

    chunk_size: int
    n_action_steps: int
    num_steps: int
    min_period: float
    max_period: float

    def problems(self) -> list[str]:
        """What the types alone do not catch."""
        found = []
        if not 1 <= self.n_action_steps <= self.chunk_size:
            found.append(
                f"n_action_steps is {self.n_action_steps}, expected 1 to chunk_size {self.chunk_size}"
            )
        if not 1 <= self.num_steps <= 1000:
            found.append(f"num_steps is {self.num_steps}, expected 1 to 1000")
        if not 0 < self.min_period < self.max_period < math.inf:
            found.append(
                f"periods are {self.min_period} to {self.max_period}, expected 0 < min_period < max_period"
            )
        return found


@dataclass(frozen=True)
class Tokens:
    """The instruction's fixed length and padding."""

    length: int
    pad_id: int


@dataclass(frozen=True)
class Calibration:
    """The observations that chose scales and smoothing, and that the gate was judged on."""

    source: str  # as the user named it
    kind: Literal["dataset", "recording", "synthetic"]
    sha256: str  # of what was used of it
    bytes: int
    frames: int
    episodes: int


@dataclass(frozen=True)
class Sensitivity:
    """One group of layers in INT8 alone."""

    saved_ms: float  # a chunk, computed for the target's machine
    action_p99: float  # of the worst joint's error, over its standard deviation across seeds
    cache: float  # relative L2 of the worst tensor


@dataclass(frozen=True)
class Int8:
    """How an INT8 bundle came to be, and what it claims."""

    groups: tuple[str, ...]  # of layers that are INT8, in the order they were taken
    weights: int  # that are INT8
    multiply_adds: int  # of a chunk that they are part of
    sensitivity: dict[str, Sensitivity]
    calibration: Calibration
    gate: dict[str, float]  # what gate.toml said, or its defaults
    gate_is_default: bool
    found: dict[
        str, float
    ]  # what the gate found; gripper_flips is missing where no joint is known to be one


@dataclass(frozen=True)
class Manifest:
    format: str
    version: int
    source: Source
    files: dict[str, File]
    prefix: Graph
    expert: Graph
    cache_bytes: int
    cameras: tuple[Camera, ...]
    image_size: int
    tokens: Tokens
    state: Vector
    action: Vector
    sampling: Sampling
    joints: tuple[str, ...] | None  # names of the action's values, where the dataset records them
    units: str | None
    fps: float | None
    precision: Precision
    target: Target
    parity: dict[
        str, float
    ]  # stage -> worst error against the checkpoint, over max(1, max abs reference)
    pinned: tuple[
        str, ...
    ]  # stages of a float16 bundle that compute in float32, found by the range pass
    int8: Int8 | None
    float16_largest: (
        float | None
    )  # largest magnitude of a float16 tensor on the fixed observations (limit 65504)
    built_with: dict[str, str]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Of both graphs by name: what both call the same is the same memory."""
        return {t.name: t for g in (self.prefix, self.expert) for t in (*g.inputs, *g.outputs)}


def parse_manifest(raw: object, path: Path) -> Manifest:
    """Check a parsed manifest. Raises BundleError with every problem, the version first."""
    fields = raw if isinstance(raw, dict) else {}
    if fields.get("format") != FORMAT:
        raise BundleError(
            f"{path} has format {fields.get('format')!r}, expected {FORMAT!r}: not a bundle"
        )
    version = fields.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{path} has version {version!r}, expected an integer")
    if version != VERSION:
        again = export_command(fields, path.parent, fields.get("target", "portable"))
        newer = "upgrade the runtime (pip install --upgrade smolvla-edge)"
        do = newer if version > VERSION else f"export again with {again}"
        raise BundleError(f"{path} has version {version}, this runtime reads {VERSION}: {do}")
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
    """smolvla-export with what made the bundle at `folder`; fields: its manifest, of any version."""
    source = fields.get("source")
    source = source if isinstance(source, dict) else {}
    checkpoint = "--demo" if source.get("demo") else source.get("checkpoint", "CHECKPOINT")
    command = f"smolvla-export {checkpoint} --precision {fields.get('precision', 'fp32')} --target {target}"
    if fields.get("precision") == "int8":
        command += " --calibration SOURCE"
    return f"{command} --output {folder} --force"


def _contradictions(m: Manifest) -> list[str]:
    """What the types alone do not catch."""
    found = [
        f"file name {name!r} is not a plain name"
        for name in m.files
        if not _PLAIN_NAME.fullmatch(name)
    ]
    wanted = [m.prefix.file, m.expert.file, "tokenizer.json", "selfcheck.npz"]
    found += [f"file {name!r} is not listed under files" for name in wanted if name not in m.files]
    if "selfcheck.npz" in m.files and m.files["selfcheck.npz"].bytes > _SELFCHECK_LIMIT:
        found.append("selfcheck.npz is over 10 MB")
    for label, vector in (("state", m.state), ("action", m.action)):
        if not 1 <= vector.dim <= vector.padded:
            found.append(f"{label}.dim is {vector.dim}, expected 1 to {vector.padded}")
        found += [f"{label}: {p}" for p in vector.normalization.problems(vector.dim)]
    names = [c.name for c in m.cameras]
    if not names or len(set(names)) != len(names):
        found.append(f"cameras are {names}, expected at least one and no name twice")
    counts = {
        "image_size": (1, m.image_size),
        "tokens.length": (1, m.tokens.length),
        "pad_id": (0, m.tokens.pad_id),
    }
    found += [
        f"{name} is {n}, expected {low} to {2**31 - 1}"
        for name, (low, n) in counts.items()
        if not low <= n < 2**31
    ]
    found += m.sampling.problems()
    inputs = {t.name: t for t in (*m.prefix.inputs, *m.expert.inputs)}
    shapes: dict[str, tuple[int, ...]] = {
        "images": (len(m.cameras), 3, m.image_size, m.image_size),
        "tokens": (1, m.tokens.length),
        "state": (1, m.state.padded),
        "noisy_actions": (1, m.sampling.chunk_size, m.action.padded),
    }
    for name, shape in shapes.items():
        if name not in inputs or inputs[name].shape != shape:
            found.append(f"graph input {name} is {inputs.get(name)}, expected the shape {shape}")
    if m.joints is not None and len(m.joints) != m.action.dim:
        found.append(f"{len(m.joints)} joints are named, the action has {m.action.dim} values")
    if m.fps is not None and not 0 < m.fps <= 200:
        found.append(f"fps is {m.fps}, expected above 0 and at most 200")
    found += [
        f"the expert takes {t.name} not as the prefix leaves it"
        for t in m.prefix.outputs
        if inputs.get(t.name) != t
    ]
    kinds = {t.dtype for t in m.prefix.outputs if t.name != "prefix_mask"}
    if kinds != {
        "float32"
        if m.precision == "fp32" or (m.precision, m.target) == ("int8", "cpu")
        else "float16"
    }:
        found.append(f"precision is {m.precision}, but the cache is {', '.join(sorted(kinds))}")
    for graph, stages in ((m.prefix, {"vision", "language"}), (m.expert, {"expert"})):
        dtypes = {dtype for work in graph.stages.values() for dtype in (*work.gemm, *work.weights)}
        if set(graph.stages) != stages or dtypes - set(BYTES):
            found.append(
                f"{graph.file} has stages {', '.join(graph.stages)} in {', '.join(sorted(dtypes))}, expected "
                f"{', '.join(sorted(stages))} in some of {', '.join(BYTES)}"
            )
    if m.int8 is not None and min(m.int8.weights, m.int8.multiply_adds, len(m.int8.groups)) < 1:
        found.append("int8 claims no weights, multiply-adds or groups")
    if (m.precision == "int8") != (m.int8 is not None):
        found.append(
            f"precision is {m.precision}, but int8 is {'missing' if m.int8 is None else 'given'}"
        )
    return found


def manifest_json(manifest: Manifest) -> str:
    """The manifest's text: sorted keys, so that equal bundles have equal hashes."""
    return json.dumps(encode(manifest), indent=1, sort_keys=True, allow_nan=False) + "\n"
