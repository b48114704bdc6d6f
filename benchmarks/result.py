"""The result file: a benchmark writes one JSON file per run, and the report reads nothing else.

    {"format": "smolvla-edge-result", "version": 3, "kind": "latency", "command": ..., ...}

Any change of the fields raises VERSION. Times are milliseconds unless the name says seconds. Shares
are of 1.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..core.errors import ResultError
from ..core.files import write_whole
from ..core.strict import decode, encode

FORMAT, VERSION = "smolvla-edge-result", 3
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, in time order."""

    p50: float
    p95: float
    p99: float
    max: float
    spread: float  # (p95 - p5) / p50: how noisy they are
    values: tuple[float, ...]


def spread(values: ArrayLike) -> Spread:
    """values: [n], n at least 1."""
    v = np.asarray(values, np.float64)
    p5, p50, p95, p99 = (float(p) for p in np.percentile(v, [5, 50, 95, 99]))
    noise = (p95 - p5) / p50 if p50 else 0.0
    return Spread(p50, p95, p99, float(v.max()), noise, tuple(np.round(v, 5).tolist()))


@dataclass(frozen=True)
class Readings:
    """What changes while a benchmark runs. None: the machine does not report it."""

    cpu_mhz: float | None  # the fastest core; on a virtual machine the first
    gpu_mhz: float | None
    temperature_c: float | None  # the hottest sensor


@dataclass(frozen=True)
class Machine:
    """The machine card."""

    cpu: str  # model, and its vector instructions for matrix products
    cores: int  # available to this process
    threads: int  # of ONNX Runtime for the policy; the control loop keeps one core
    memory_mb: float
    gpu: str | None  # name, driver, memory, power limit
    board: str | None  # a Jetson, by its device tree
    power_mode: str | None  # of nvpmodel
    system: str  # kernel
    versions: dict[str, str]  # package -> version
    load: float  # load average of the minute before the run
    before: Readings
    after: Readings


@dataclass(frozen=True)
class Result:
    """The fields of every result."""

    command: str
    made: str  # UTC, ISO 8601
    machine: Machine


@dataclass(frozen=True)
class TargetVerdict:
    """Is a target latency met? measured: on this machine. projected: computed for a board."""

    kind: Literal["measured", "projected"]
    where: str  # the machine or board
    target_ms: float
    met: bool | None  # None: too noisy to say
    text: str  # one sentence


@dataclass(frozen=True)
class HardwareLimit:
    """The time that this machine's rates allow for one stage: the larger of compute and memory."""

    stage: Literal["prefix", "denoise"]
    flops: int  # of matrix products, 1 multiply-add = 2
    int8_flops: int  # of them in INT8
    bytes: int  # weights and cache, read once each run
    compute_ms: float
    memory_ms: float
    share: float  # the larger one / the measured p50; 1 is the limit


@dataclass(frozen=True)
class ColdStart:
    """A new process, up to its second chunk: medians. Memory: the whole process, at the end."""

    processes: int  # measured
    python_s: float  # the interpreter and the imports
    open_s: float  # hashes are cached, files are in the page cache
    load_s: float
    first_s: float
    second_s: float
    peak_mb: float
    anonymous_mb: float
    mapped_mb: float  # file pages: the kernel can drop them
    disk_mb: float


@dataclass(frozen=True)
class Runner:
    """One participant of the turns: a bundle, or what it is compared with."""

    name: str
    kind: Literal["bundle", "lerobot", "views"]  # views: this project's torch modules
    precision: str  # fp32, fp16, int8; float32, bfloat16 of LeRobot
    note: str  # provider and reason; patches of LeRobot
    chunk_ms: Spread  # pictures to actions in robot units; LeRobot: to normalized actions
    action_ms: float  # p50 / executed actions of a chunk
    noise: str | None  # a sentence that replaces the numbers if they are too noisy
    # The rest is of bundles only. preprocess + prefix + denoise are the chunk. Measured separately
    # in the same turns: tokenize (part of preprocess), step 1 ... step n and postprocess (parts of
    # denoise); on TensorRT also prefix and denoise.
    stages_ms: dict[str, Spread] = field(default_factory=dict)
    energy_j: float | None = None  # per chunk, if the board has a sensor
    selfcheck: dict[str, float] = field(default_factory=dict)  # stage -> error
    limits: tuple[HardwareLimit, ...] = ()
    start: ColdStart | None = None
    verdicts: tuple[TargetVerdict, ...] = ()  # this machine, then boards


@dataclass(frozen=True)
class Ratio:
    """Time of `against` / time of `runner` in each turn. At 2, `runner` is twice as fast."""

    runner: str
    against: str
    p50: float
    min: float
    max: float
    values: tuple[float, ...]
    noise: str | None  # a sentence that replaces the numbers if they are too noisy


@dataclass(frozen=True)
class Rates:
    """Products and copies through ONNX Runtime on this machine: (before, after) the timed runs."""

    gflops: dict[str, tuple[float, ...]]  # float32, float16 (GPU), int8 (CPU)
    copy_gbs: tuple[float, ...]  # bytes read plus bytes written


@dataclass(frozen=True)
class Latency(Result):
    """Time per chunk; all participants run in turns on the same observation."""

    cameras: int
    tokens: int  # on both sides
    steps: int
    warmup: int  # turns not counted
    reference: str  # LeRobot or the torch views, and the reason; empty without one
    runners: tuple[Runner, ...]
    ratios: tuple[Ratio, ...]
    rates: Rates | None


@dataclass(frozen=True)
class Observations:
    """What the policies were run on."""

    source: str  # as the user named it, or "synthetic"
    kind: Literal["dataset", "recording", "synthetic"]
    sha256: str
    frames: int
    episodes: int
    tasks: int
    seeds: int  # noises per frame


@dataclass(frozen=True)
class Joint:
    """The error of one joint over frames, seeds and the chunk, in robot units."""

    name: str
    p50: float
    p99: float
    max: float
    ticks: float | None  # p99 in servo ticks of 0.088 degrees; None for a gripper
    spread: float  # standard deviation of the reference over noise seeds
    share: float  # p99 / spread: what the gate limits


@dataclass(frozen=True)
class Comparison:
    """A policy against the reference, with the same noise.

    A control has a deliberate error and must fail the gate.
    """

    name: str  # "bundle"; "stale cache", "swapped cameras", "other seed"
    control: bool
    joints: tuple[Joint, ...]
    worst: float  # the largest share of a joint
    flips: int | None  # of grippers; None: no joint is known to be a gripper
    cache: float  # largest relative L2 error of a key or value tensor
    drift: tuple[float, ...]  # for each action: RMS error / spread of the worst joint
    missed: tuple[str, ...]  # what is over the gate; empty: it is met


@dataclass(frozen=True)
class Accuracy(Result):
    """Does a bundle compute the same policy as its checkpoint?"""

    bundle: str
    precision: str
    reference: str
    observations: Observations
    gate: dict[str, float]
    stages: dict[str, float]  # images, tokens, ..., actions, chunk -> largest error
    enters: str  # one sentence: the first stage with an error
    comparisons: tuple[Comparison, ...]  # the bundle first
    passed: bool  # the bundle meets the gate, and every control fails it


@dataclass(frozen=True)
class FrontierPoint:
    """One setting of the frontier."""

    precision: str
    cameras: int  # the first ones of the policy
    steps: int
    solver: Literal["euler"]
    chunk_ms: Spread
    noise: str | None
    worst: float  # p99 / spread of the worst joint
    cache: float | None  # None with fewer cameras: the cache has other rows
    flips: int | None
    pareto: bool  # no other point is faster and has less error


@dataclass(frozen=True)
class Frontier(Result):
    """Latency against error, for steps, precision and cameras."""

    reference: str
    observations: Observations
    budget_ms: float | None
    cells: tuple[FrontierPoint, ...]
    skipped: dict[str, str]  # precision and cameras that cannot be exported -> reason
    recommended: int | None  # index in cells
    reason: str


@dataclass(frozen=True)
class LoopRun:
    """One run of the control loop on the virtual arm."""

    fps: float
    seconds: float  # requested
    counts: dict[str, int]  # ticks, missed, held ...
    period_error_ms: Spread | None  # start to start, minus the period
    late_ms: Spread | None
    read_ms: Spread | None  # the arm
    capture_ms: Spread | None  # to take the newest pictures
    picture_age_ms: Spread | None  # the oldest picture of a tick
    write_ms: Spread | None
    busy_ms: Spread | None  # all work in a tick
    chunk_ms: Spread | None  # request to answer
    seams_deg: Spread | None  # first step of a new chunk
    queued: tuple[int, ...]  # actions left at each tick


@dataclass(frozen=True)
class Control(Result):
    """Is the control loop on time while the policy computes?"""

    bundle: str
    chunking: str
    loops: tuple[LoopRun, ...]


RESULTS: tuple[type[Result], ...] = (Latency, Accuracy, Frontier, Control)
KINDS = {cls.__name__.lower(): cls for cls in RESULTS}


def read(path: Path) -> Result:
    """-> one of KINDS. Raises ResultError for a file that is no result, or of another version."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise ResultError(f"{path} is not a result of smolvla-bench")
    version, kind = raw.pop("version", None), raw.pop("kind", None)
    if version != VERSION:
        raise ResultError(f"{path} is version {version!r}, expected {VERSION}: measure again")
    if kind not in list(KINDS):
        raise ResultError(f"{path} is of kind {kind!r}, expected {', '.join(KINDS)}")
    return decoded(KINDS[kind], raw, path)


def read_json(path: Path) -> Any:
    """Raises ResultError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ResultError(f"cannot read {path}: {e}") from e


def decoded(cls: type[T], raw: object, path: Path) -> T:
    """`raw`, read from `path`, as the dataclass. Raises ResultError with all that is wrong."""
    problems: list[str] = []
    found = decode(cls, raw, problems)
    if found is None:
        raise ResultError(f"{path} is not valid: {'; '.join(problems)}")
    return found


def write(path: Path, result: Result) -> None:
    """One line of JSON."""
    kind = type(result).__name__.lower()
    write_json(path, {"format": FORMAT, "version": VERSION, "kind": kind} | encode(result))


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(value, allow_nan=False) + "\n").encode())
