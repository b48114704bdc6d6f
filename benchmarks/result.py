"""What a benchmark leaves: one JSON file a run. This module is its contract, and the report's only source.

    {"format": "smolvla-edge-result", "version": 3, "kind": "latency", "command": ..., "machine": {...}, ...}

Any change of the fields raises VERSION. Times are milliseconds where not said, shares are of 1.
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
    """Repeated measurements of one thing, in the order they were taken."""

    p50: float
    p95: float
    p99: float
    max: float
    spread: float  # (p95 - p5) / p50: how noisy they are
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(len(self.values) > 0, "a spread of no values")


def spread(values: ArrayLike) -> Spread:
    """values: [n], n at least 1."""
    v = np.asarray(values, np.float64)
    p5, p50, p95, p99 = (float(p) for p in np.percentile(v, [5, 50, 95, 99]))
    return Spread(
        p50,
        p95,
        p99,
        float(v.max()),
        (p95 - p5) / p50 if p50 else 0.0,
        tuple(np.round(v, 5).tolist()),
    )


@dataclass(frozen=True)
class Readings:
    """What changes while a benchmark runs; None where the machine does not tell."""

    cpu_mhz: float | None  # of the fastest core, or their mean where only that is told
    gpu_mhz: float | None
    temperature_c: float | None  # of the hottest sensor


@dataclass(frozen=True)
class Machine:
    """What it ran on."""

    cpu: str  # model and the vector units that matrix products use
    cores: int  # that this process may use
    threads: int  # ONNX Runtime's
    memory_mb: float
    gpu: str | None  # name, driver, memory, power limit
    board: str | None  # Jetson and the like, as its device tree says
    power_mode: str | None  # nvpmodel's
    system: str  # kernel
    versions: dict[str, str]  # package -> version
    load: float  # runnable processes over the minute before the run
    before: Readings
    after: Readings


@dataclass(frozen=True)
class Result:
    """The head of every result."""

    command: str
    made: str  # UTC, ISO 8601
    machine: Machine


@dataclass(frozen=True)
class Verdict:
    """On a target latency. measured: on this machine. projected: computed for a board, which nothing ran on."""

    kind: Literal["measured", "projected"]
    where: str  # the machine or board
    target_ms: float
    met: bool | None  # None: too noisy to say
    text: str  # the sentence to print


@dataclass(frozen=True)
class Limit:
    """What the hardware alone would need for one stage, from this machine's own rates; the larger of both counts."""

    stage: Literal["prefix", "denoise"]
    flops: int  # of matrix products, 1 multiply-add = 2
    int8_flops: int  # of them in INT8
    bytes: int  # weights and cache, read once each run
    compute_ms: float
    memory_ms: float
    share: float  # the larger one over the measured p50: 1 is the limit


@dataclass(frozen=True)
class Start:
    """From nothing to the second chunk in a fresh process; medians. Memory is of the whole process after that."""

    processes: int  # that were started
    python_s: float  # the interpreter and the imports
    open_s: float  # hashes known, files in the page cache
    load_s: float
    first_s: float
    second_s: float
    peak_mb: float
    anonymous_mb: float
    mapped_mb: float  # from files: can be dropped
    disk_mb: float


@dataclass(frozen=True)
class Runner:
    """One of those that took turns: a bundle, or what it is compared with."""

    name: str
    kind: Literal["bundle", "lerobot", "views"]  # views: this project's float32 modules in torch
    precision: str  # fp32, fp16, int8; float32, bfloat16 of LeRobot
    note: str  # provider and its reason; what was patched in LeRobot
    chunk_ms: Spread  # from pictures to actions in robot units; LeRobot: to normalised actions
    action_ms: float  # p50 over the actions of a chunk that are executed
    noise: str | None  # where it is too noisy: the sentence in place of the numbers
    # From here on of bundles. preprocess + prefix + denoise are the chunk; tokenize (part of preprocess), step 1 ...
    # step n and postprocess (parts of denoise) are measured apart, in the same turns; on TensorRT, prefix and denoise
    # are too.
    stages_ms: dict[str, Spread] = field(default_factory=dict)
    energy_j: float | None = None  # a chunk, where the board has a sensor
    selfcheck: dict[str, float] = field(default_factory=dict)  # stage -> error
    limits: tuple[Limit, ...] = ()
    start: Start | None = None
    verdicts: tuple[Verdict, ...] = ()  # of this machine, then of boards


@dataclass(frozen=True)
class Ratio:
    """How many times as fast `runner` is as `against`, turn by turn."""

    runner: str
    against: str
    p50: float
    min: float
    max: float
    values: tuple[float, ...]
    noise: str | None  # where they spread too much: the sentence in place of the numbers


@dataclass(frozen=True)
class Rates:
    """What this machine multiplies and copies through ONNX Runtime: [before, after] the timed runs."""

    gflops: dict[str, tuple[float, ...]]  # float32, float16 (GPU), int8 (CPU)
    copy_gbs: tuple[float, ...]  # bytes read plus bytes written

    def __post_init__(self) -> None:
        _require(
            all(len(pair) == 2 for pair in (self.copy_gbs, *self.gflops.values())),
            "rates that are not pairs",
        )


@dataclass(frozen=True)
class Latency(Result):
    """Seconds a chunk takes, everybody in turns on the same observation."""

    cameras: int
    tokens: int  # on both sides
    steps: int
    warmup: int  # turns thrown away
    reference: str  # in words: LeRobot or the torch views, and why; empty without one
    runners: tuple[Runner, ...]
    ratios: tuple[Ratio, ...]
    rates: Rates | None

    def __post_init__(self) -> None:
        _require(len(self.runners) > 0, "no runners")
        _require(all(ratio.values for ratio in self.ratios), "a ratio of no values")


@dataclass(frozen=True)
class Observations:
    """What policies were asked about."""

    source: str  # as the user named it, or "synthetic"
    kind: Literal["dataset", "recording", "synthetic"]
    sha256: str
    frames: int
    episodes: int
    tasks: int
    seeds: int  # noises for each frame


@dataclass(frozen=True)
class Joint:
    """The error of one joint over frames, seeds and the chunk, in robot units."""

    name: str
    p50: float
    p99: float
    max: float
    ticks: (
        float | None
    )  # p99 in servo ticks of 0.088 degrees, if its unit is degrees; None of grippers
    spread: float  # the reference's own standard deviation over noise seeds
    share: float  # p99 / spread: what the gate limits


@dataclass(frozen=True)
class Comparison:
    """One against the reference, with the same noise. A control is wrong on purpose and must miss the gate."""

    name: str  # "bundle"; "stale cache", "swapped cameras", "other seed"
    control: bool
    joints: tuple[Joint, ...]
    worst: float  # of the joints' shares
    flips: int | None  # of grippers; None where no joint is known to be one
    cache: float  # relative L2 of the worst key or value tensor
    drift: tuple[
        float, ...
    ]  # along the chunk: RMS error over spread of the worst joint, each action
    missed: tuple[str, ...]  # what the gate says; empty: it is met


@dataclass(frozen=True)
class Accuracy(Result):
    """Is it still the same policy?"""

    bundle: str
    precision: str
    reference: str
    observations: Observations
    gate: dict[str, float]
    stages: dict[
        str, float
    ]  # images, tokens, state, cache, velocity, actions, chunk -> worst error
    enters: str  # the sentence that names the stage where the error enters
    comparisons: tuple[Comparison, ...]  # the bundle first
    passed: bool  # the bundle meets the gate, and every control misses it

    def __post_init__(self) -> None:
        sizes = {(len(c.joints), len(c.drift)) for c in self.comparisons}
        _require(
            len(sizes) == 1 and all(*sizes),
            f"comparisons of {sorted(sizes) or 'no'} joints and actions",
        )


@dataclass(frozen=True)
class Cell:
    """One setting on the frontier."""

    precision: str
    cameras: int  # the first ones of the policy
    steps: int
    solver: Literal["euler"]
    chunk_ms: Spread
    noise: str | None
    worst: float  # p99 of the worst joint over its spread
    cache: float | None  # None with fewer cameras: its rows are others
    flips: int | None
    pareto: bool  # nothing is both faster and closer


@dataclass(frozen=True)
class Frontier(Result):
    """What to give up to be faster."""

    reference: str
    observations: Observations
    budget_ms: float | None
    cells: tuple[Cell, ...]
    skipped: dict[str, str]  # precision and cameras that could not be exported -> why
    recommended: int | None  # index in cells
    reason: str

    def __post_init__(self) -> None:
        index = self.recommended
        _require(
            index is None or 0 <= index < len(self.cells),
            f"recommended cell {index} of {len(self.cells)}",
        )


@dataclass(frozen=True)
class Loop:
    """One run of the control loop on the virtual arm."""

    fps: float
    seconds: float  # asked for
    counts: dict[str, int]  # ticks, missed, held ...
    period_error_ms: Spread | None  # start to start, off the period; None where there was none
    late_ms: Spread | None
    read_ms: Spread | None  # the arm
    capture_ms: Spread | None  # to take the cameras' newest pictures
    picture_age_ms: Spread | None  # since its capture, of the oldest
    write_ms: Spread | None
    busy_ms: Spread | None  # all work of a tick
    chunk_ms: Spread | None  # from request to answer
    seams_deg: Spread | None  # first step of a new chunk
    queued: tuple[int, ...]  # actions left, tick by tick

    def __post_init__(self) -> None:
        _require(self.fps > 0, f"a loop at {self.fps:g} Hz")


@dataclass(frozen=True)
class Control(Result):
    """Is the loop on time beside a policy that computes?"""

    bundle: str
    chunking: str
    loops: tuple[Loop, ...]


KINDS: dict[str, type[Result]] = {
    "latency": Latency, "accuracy": Accuracy, "frontier": Frontier, "control": Control
}  # fmt: skip


def read(path: Path) -> Result:
    """-> one of KINDS. Raises ResultError for what cannot be read, is no result, or of another version."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise ResultError(f"{path} is no result of smolvla-bench")
    if (version := raw.pop("version", None)) != VERSION:
        raise ResultError(
            f"{path} is of version {version!r}, expected {VERSION}: measure again with this version"
        )
    if not isinstance(kind := raw.pop("kind", None), str) or kind not in KINDS:
        raise ResultError(f"{path} is of kind {kind!r}, expected {', '.join(KINDS)}")
    return decoded(KINDS[kind], raw, path)


def read_json(path: Path) -> Any:
    """Raises ResultError."""
    try:
        raw = json.loads(path.read_text())
        json.dumps(
            raw, ensure_ascii=False
        ).encode()  # half a character, which JSON can write and nobody show
        return raw
    except (OSError, ValueError, RecursionError) as e:
        raise ResultError(f"{path} cannot be read: {e}") from e


def decoded(cls: type[T], raw: object, path: Path) -> T:
    """`raw`, read from `path`, as the dataclass. Raises ResultError with all that is wrong."""
    problems: list[str] = []
    try:
        if (found := decode(cls, raw, problems)) is not None:
            return found
    except ValueError as e:
        problems.append(str(e))
    raise ResultError(f"{path} is not valid: {'; '.join(problems)}")


def _require(valid: bool, otherwise: str) -> None:
    if not valid:
        raise ValueError(otherwise)


def write(path: Path, result: Result) -> None:
    """One line of JSON."""
    kind = next(name for name, cls in KINDS.items() if cls is type(result))
    write_json(path, {"format": FORMAT, "version": VERSION, "kind": kind} | encode(result))


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(value, allow_nan=False) + "\n").encode())
