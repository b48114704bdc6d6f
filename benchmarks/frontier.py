"""What to give up to be faster: latency against error, for steps, precision and cameras.

Bundles and finished cells are kept in a work folder, one file a cell, so that a crash loses one cell:

    work.json                 which policy, observations and machine these cells belong to
    int8-2/                   the bundle in INT8 with two cameras, or int8-2.txt: why there is none
    int8-2-10.judged          how far that is from the reference with ten steps, until its steps are timed in turns
    int8-2-10.json            its cell with ten steps
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..core.errors import BenchError, GateError, ParityError, ResultError
from ..core.files import sha256_of
from ..core.progress import Progress
from ..core.strict import encode
from ..export.checkpoint.checkpoint import Checkpoint
from ..export.held_out import HeldOut, hold_out, prefill_policy
from ..export.reference import reference_of
from ..export.writer import write_bundle
from ..quantize.int8 import gate as gates
from ..quantize.int8.gate import Gate, Outputs
from ..quantize.observations.calibration import CalibrationSet
from ..quantize.observations.sample import Sample
from ..runtime import BackendError, BundleError, Policy
from ..runtime.bundle.manifest import Precision, Target
from ..runtime.engines.backend import choose
from . import machine
from .accuracy import Judge, load
from .latency import Effort, Reference, in_turns, noise, timed
from .result import Cell, Frontier, decoded, read_json, spread, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """What is tried. cameras: how many of the policy's, the first ones; all of them where empty."""

    steps: tuple[int, ...]
    precisions: tuple[Precision, ...]
    cameras: tuple[int, ...] = ()

    def check(self, there: int) -> "Grid":
        """Raises BenchError for a setting that cannot be had of a policy with `there` cameras."""
        if wrong := [n for n in self.cameras if not 1 <= n <= there]:
            raise BenchError(
                f"--cameras has {wrong[0]}, expected 1 to {there}, which the policy has"
            )
        if wrong := [n for n in self.steps if not 1 <= n <= 1000]:
            raise BenchError(f"--steps has {wrong[0]}, expected 1 to 1000")
        return replace(self, cameras=self.cameras or (there,))


def measure(
    given: Reference,
    grid: Grid,
    judge: Judge,
    device: str,
    budget_ms: float | None,
    effort: Effort,
    work: Path,
    say: Callable[[str], None],
) -> Frontier:
    """`judge`'s source calibrates INT8 too. Raises BenchError where the work folder belongs to something else."""
    head, gate = machine.watched(), judge.gate
    target: Target = "cpu" if choose(device).backends[0] == "ort-cpu" else "portable"
    say(f"reading {given.checkpoint}")
    checkpoint = load(given)
    grid = grid.check(len(checkpoint.config.cameras))
    data = judge.draw(checkpoint, say)
    here = head()["machine"]
    policy = (
        checkpoint.config,
        checkpoint.processors,
        checkpoint.vlm.to_dict(),
        sha256_of(checkpoint.tokenizer),
    )
    claim = {
        "weights": checkpoint.weights_sha256,
        "policy": repr(policy),
        "observations": data.record.sha256,
        "gate": encode(gate),
        "device": device,
        "effort": encode(effort),
        "cpu": here.cpu,
        "cores": here.cores,
        "gpu": here.gpu,
        "versions": here.versions,
    }
    with _claimed(work, claim):
        cells, skipped = _fill(work, checkpoint, grid, gate, data, target, device, effort, say)
    cells = pareto(cells)
    best, reason = recommend(cells, budget_ms, gate)
    return Frontier(
        **head(),
        reference=f"{given.checkpoint} in torch float32",
        observations=judge.drawn(data),
        budget_ms=budget_ms,
        cells=tuple(cells),
        skipped=skipped,
        recommended=best,
        reason=reason,
    )


def _fill(
    work: Path,
    checkpoint: Checkpoint,
    grid: Grid,
    gate: Gate,
    data: CalibrationSet,
    target: Target,
    device: str,
    effort: Effort,
    say: Callable[[str], None],
) -> tuple[list[Cell], dict[str, str]]:
    """-> every cell of the grid, measured now or before; and what has none: why."""
    held_out: HeldOut | None = None
    cells: list[Cell] = []
    skipped = {}
    for precision, cameras in product(grid.precisions, grid.cameras):
        name = f"{precision}-{cameras}"
        none = work / f"{name}.txt"
        left = [n for n in grid.steps if not (work / f"{name}-{n}.json").is_file()]
        if left and not none.is_file():
            held_out = held_out or hold_out(
                reference_of(checkpoint, target), data.held_out, gate.seeds
            )
            if _export(work / name, checkpoint, precision, cameras, target, data, gate, say):
                policy = _load(work / name, device)
                judged = {
                    n: _judged(work / f"{name}-{n}.judged", policy, held_out, n, say) for n in left
                }
                say(f"timing {name} in turns")
                times = in_turns(
                    {str(n): partial(_chunk_ms, policy, held_out, n) for n in left}, effort
                )
                for n, far in judged.items():
                    t = spread(times[str(n)])
                    errors = far.worst, far.cache, far.flips
                    cell = Cell(precision, cameras, n, "euler", t, noise(t), *errors, pareto=False)
                    write_json(work / f"{name}-{n}.json", encode(cell))
                    (work / f"{name}-{n}.judged").unlink()
                del policy
        if none.is_file():
            skipped[name] = none.read_text()
        else:
            cells += [_kept(work / f"{name}-{n}.json", (precision, cameras, n)) for n in grid.steps]
    return cells, skipped


def pareto(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, marked where no other is at least as fast and as close, and better in one of them."""

    def beaten(c: Cell) -> bool:
        mine = c.chunk_ms.p50, c.worst
        theirs = [(o.chunk_ms.p50, o.worst) for o in cells if not o.noise]
        return any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] for o in theirs)

    return [replace(c, pareto=not (c.noise or beaten(c))) for c in cells]


def recommend(cells: Sequence[Cell], budget_ms: float | None, gate: Gate) -> tuple[int | None, str]:
    """-> the index of one cell, and why: the closest within the budget, or the fastest within the gate."""
    order = [i for i, c in enumerate(cells) if not c.noise]
    if not order:
        return (
            None,
            "the machine is too noisy to recommend anything"
            if cells
            else "nothing could be measured",
        )
    fastest = min(order, key=lambda i: cells[i].chunk_ms.p50)
    if budget_ms is None:
        kept = [i for i in order if _within(cells[i], gate)]
        if not kept:
            return (
                None,
                f"no setting is within the gate ({gate.action_p99:g} of the spread over seeds)",
            )
        best = min(kept, key=lambda i: cells[i].chunk_ms.p50)
        return (
            best,
            f"{_said(cells[best])}: the fastest within the gate ({gate.action_p99:g} of the spread)",
        )
    kept = [i for i in order if cells[i].chunk_ms.p95 <= budget_ms]
    if not kept:
        c = cells[fastest]
        return (
            None,
            f"nothing is within {budget_ms:g} ms: the fastest, {_said(c)}, takes {c.chunk_ms.p95:.0f} ms (p95)",
        )
    best = min(kept, key=lambda i: (cells[i].worst, cells[i].chunk_ms.p50))
    reason = f"{_said(cells[best])}: the closest to the reference within {budget_ms:g} ms"
    if not _within(cells[best], gate):
        reason += f"; but its error is over the gate ({cells[best].worst:.2f} of the spread, at most {gate.action_p99:g})"
    return best, reason


def _within(c: Cell, gate: Gate) -> bool:
    return (
        c.worst <= gate.action_p99
        and (c.flips or 0) <= gate.gripper_flips
        and (c.cache or 0) <= gate.cache
    )


def _said(c: Cell) -> str:
    return f"{c.precision}, {c.cameras} cameras, {c.steps} steps"


def _kept(path: Path, setting: tuple[str, int, int]) -> Cell:
    """A finished cell, read back."""
    cell = _read(Cell, path)
    if (cell.precision, cell.cameras, cell.steps) != setting:
        raise BenchError(
            f"{path} holds another cell ({_said(cell)}): remove it, and it is measured again"
        )
    return cell


def _read(cls: type[T], path: Path) -> T:
    try:
        return decoded(cls, read_json(path), path)
    except ResultError as e:
        raise BenchError(f"{e}. Remove {path}, and it is measured again") from e


def _load(folder: Path, device: str) -> Policy:
    try:
        return Policy.load(folder, device)
    except BundleError as e:
        raise BenchError(f"{e}. Remove {folder}, and it is exported again") from e


@contextmanager
def _claimed(work: Path, ours: dict[str, Any]) -> Iterator[None]:
    """Make the work folder ours, or find that it is, and keep others out of it."""
    if work.exists() and not work.is_dir():
        raise BenchError(f"--work {work} is not a folder: give another")
    work.mkdir(parents=True, exist_ok=True)
    path, lock = work / "work.json", os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.is_file():
            if any(work.iterdir()):
                raise BenchError(f"{work} holds something else: give an empty folder with --work")
            write_json(path, ours)
        theirs = read_json(path)
        if not isinstance(theirs, dict):
            raise BenchError(f"{path} is not this program's: give another --work")
        if others := [key for key in ours if theirs.get(key) != ours[key]]:
            raise BenchError(
                f"the cells in {work} were measured with another {', '.join(others)}: give another --work"
            )
        yield
    except BlockingIOError as e:
        raise BenchError(
            f"another frontier is at work in {work}: wait for it, or give another --work"
        ) from e
    finally:
        os.close(lock)


def _export(
    folder: Path,
    checkpoint: Checkpoint,
    precision: Precision,
    cameras: int,
    target: Target,
    data: CalibrationSet,
    gate: Gate,
    say: Callable[[str], None],
) -> bool:
    """Make a bundle of the policy's first cameras, unless it is there; whether there is one now."""
    if folder.is_dir():
        return True
    say(f"exporting {folder.name}")
    first = checkpoint.processors.camera_names[:cameras]
    dropped = checkpoint.config.cameras[cameras:]
    features = {n: f for n, f in checkpoint.config.input_features.items() if n not in dropped}
    fewer = replace(
        checkpoint,
        config=replace(checkpoint.config, input_features=features),
        processors=replace(checkpoint.processors, camera_names=first),
    )
    parts = [
        tuple(replace(s, images={name: s.images[name] for name in first}) for s in part)
        for part in (data.calibration, data.held_out)
    ]
    given = replace(data, calibration=parts[0], held_out=parts[1]) if precision == "int8" else None
    try:
        write_bundle(
            fewer,
            folder,
            precision,
            target=target,
            calibration=given,
            gate=gate,
            progress=Progress(say),
        )
    except (BackendError, GateError, ParityError) as e:
        say(f"left out: {e}")
        folder.with_suffix(".txt").write_text(str(e))
        return False
    return True


@dataclass(frozen=True)
class _Judged:
    """How far a setting is from the reference: what takes longest of a cell."""

    worst: float
    cache: float | None
    flips: int | None


def _judged(
    path: Path, policy: Policy, held_out: HeldOut, n: int, say: Callable[[str], None]
) -> _Judged:
    """`n` steps of this policy, from `path` where that was interrupted before it was timed."""
    if path.is_file():
        return _read(_Judged, path)
    say(f"judging {path.stem}: {n} steps")
    asked = _asked(policy, held_out)
    whole = len(held_out.samples[0].images) == len(policy.manifest.cameras)

    def ask(sample: Sample) -> gates.Prefilled:
        cache, _ = prefill_policy(policy, sample)
        return cache if whole else {}, lambda x: policy.robot_units(policy.denoise(x, n))

    got = gates.outputs_of(map(ask, asked), held_out.noises)
    expected = (
        held_out.expected if whole else Outputs([{} for _ in asked], held_out.expected.chunks)
    )
    errors = replace(held_out, expected=expected).compare(got)
    if not np.isfinite(errors.action):
        raise BenchError(
            f"{policy.bundle.folder} answers what is not finite with {n} steps: leave it out"
        )
    found = _Judged(errors.action, errors.worst_cache if whole else None, errors.flips)
    write_json(path, encode(found))
    return found


def _chunk_ms(policy: Policy, held_out: HeldOut, n: int) -> float:
    o, noise = _asked(policy, held_out)[0], held_out.noises[0][0]
    return 1e3 * timed(lambda: policy.predict_chunk(o.images, o.state, o.task, noise, n))


def _asked(policy: Policy, held_out: HeldOut) -> list[Sample]:
    """The observations as this policy sees them, who may have fewer cameras."""
    names = [c.name for c in policy.manifest.cameras]
    return [replace(s, images={name: s.images[name] for name in names}) for s in held_out.samples]
