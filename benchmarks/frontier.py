"""Latency against error for steps, precision and cameras: what to give up for speed.

The work folder keeps bundles and finished points. An interrupted run continues there:

    work.json         the policy, observations and machine that these points belong to
    int8-2/           the INT8 bundle with two cameras, or int8-2.txt: why there is none
    int8-2-10.json    its point with ten steps
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

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
from .latency import Effort, ReferenceOptions, in_turns, noise, timed
from .result import Frontier, FrontierPoint, Machine, decoded, read_json, spread, write_json


@dataclass(frozen=True)
class Grid:
    """The settings to try. cameras: numbers of the policy's first cameras; empty: all of them."""

    steps: tuple[int, ...]
    precisions: tuple[Precision, ...]
    cameras: tuple[int, ...] = ()

    def check(self, there: int) -> "Grid":
        """Raises BenchError for a setting that a policy with `there` cameras does not have."""
        wrong = [n for n in self.cameras if not 1 <= n <= there]
        if wrong:
            raise BenchError(f"--cameras has {wrong[0]}, expected 1 to {there}, as the policy has")
        wrong = [n for n in self.steps if not 1 <= n <= 1000]
        if wrong:
            raise BenchError(f"--steps has {wrong[0]}, expected 1 to 1000")
        return replace(self, cameras=self.cameras or (there,))


def measure(
    given: ReferenceOptions,
    grid: Grid,
    judge: Judge,
    device: str,
    budget_ms: float | None,
    effort: Effort,
    work: Path,
    say: Callable[[str], None],
) -> Frontier:
    """The source of `judge` calibrates INT8 too.

    Raises BenchError if the work folder belongs to something else.
    """
    head, gate = machine.watched(), judge.gate
    target: Target = "cpu" if choose(device).backends[0] == "ort-cpu" else "portable"
    say(f"reading {given.checkpoint}")
    checkpoint = load(given)
    grid = grid.check(len(checkpoint.cameras))
    data = judge.draw(checkpoint, say)
    search = _Search(checkpoint, data, gate, target, device, effort, work, say)
    with _claimed(work, search.identity(head()["machine"])):
        points, skipped = search.fill(grid)
    points = pareto(points)
    best, reason = recommend(points, budget_ms, gate)
    return Frontier(
        **head(),
        reference=f"{given.checkpoint} in torch float32",
        observations=judge.drawn(data),
        budget_ms=budget_ms,
        cells=tuple(points),
        skipped=skipped,
        recommended=best,
        reason=reason,
    )


@dataclass(frozen=True)
class _Search:
    """Exports, judges and times bundles in one work folder."""

    checkpoint: Checkpoint
    data: CalibrationSet
    gate: Gate
    target: Target
    device: str
    effort: Effort
    work: Path
    say: Callable[[str], None]

    def identity(self, here: Machine) -> dict[str, Any]:
        """What all points of a work folder have in common."""
        c = self.checkpoint
        policy = c.config, c.processors, c.cameras, c.vlm.to_dict(), sha256_of(c.tokenizer)
        return {
            "weights": c.weights_sha256,
            "policy": repr(policy),
            "observations": self.data.record.sha256,
            "gate": encode(self.gate),
            "device": self.device,
            "effort": encode(self.effort),
            "cpu": here.cpu,
            "cores": here.cores,
            "gpu": here.gpu,
            "versions": here.versions,
        }

    def fill(self, grid: Grid) -> tuple[list[FrontierPoint], dict[str, str]]:
        """-> every point of the grid, measured now or before; the settings without one: why."""
        held_out: HeldOut | None = None
        points: list[FrontierPoint] = []
        skipped = {}
        for precision, cameras in product(grid.precisions, grid.cameras):
            name = f"{precision}-{cameras}"
            none = self.work / f"{name}.txt"
            files = {n: self.work / f"{name}-{n}.json" for n in grid.steps}
            left = {n: file for n, file in files.items() if not file.is_file()}
            if left and not none.is_file() and self.export(name, precision, cameras):
                if held_out is None:
                    reference = reference_of(self.checkpoint, self.target)
                    held_out = hold_out(reference, self.data.held_out, self.gate.seeds)
                self.point_files(left, precision, cameras, held_out)
            if none.is_file():
                skipped[name] = none.read_text()
            else:
                points += [_read_point(file) for file in files.values()]
        return points, skipped

    def point_files(
        self, files: Mapping[int, Path], precision: Precision, cameras: int, held_out: HeldOut
    ) -> None:
        """Judge and time a bundle with each number of steps, in turns; files: by steps."""
        folder = self.work / f"{precision}-{cameras}"
        try:
            policy = Policy.load(folder, self.device)
        except BundleError as e:
            raise BenchError(f"{e}. Remove {folder} to export it again") from e
        judged = {}
        for n in files:
            self.say(f"judging {folder.name}: {n} steps")
            judged[n] = _errors(policy, held_out, n)
        self.say(f"timing {folder.name} in turns")
        runs = {str(n): partial(_chunk_ms, policy, held_out, n) for n in files}
        times = in_turns(runs, self.effort)
        for n, file in files.items():
            t, (worst, cache, flips) = spread(times[str(n)]), judged[n]
            point = FrontierPoint(
                precision, cameras, n, "euler", t, noise(t), worst, cache, flips, pareto=False
            )
            write_json(file, encode(point))

    def export(self, name: str, precision: Precision, cameras: int) -> bool:
        """Export the policy's first cameras, if not done before; -> whether there is a bundle."""
        folder, c = self.work / name, self.checkpoint
        if folder.is_dir():
            return True
        self.say(f"exporting {name}")
        fewer = replace(c, cameras=c.cameras[:cameras])
        parts = [
            tuple(_with_cameras(sample, fewer.camera_names) for sample in part)
            for part in (self.data.calibration, self.data.held_out)
        ]
        data = replace(self.data, calibration=parts[0], held_out=parts[1])
        try:
            write_bundle(
                fewer,
                folder,
                precision,
                target=self.target,
                calibration=data if precision == "int8" else None,
                gate=self.gate,
                progress=Progress(self.say),
            )
        except (BackendError, GateError, ParityError) as e:
            self.say(f"left out: {e}")
            folder.with_suffix(".txt").write_text(str(e))
            return False
        return True


def pareto(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points; `pareto`: no other one is at least as good in both, and better in one."""

    def beaten(p: FrontierPoint) -> bool:
        mine = p.chunk_ms.p50, p.worst
        others = [(o.chunk_ms.p50, o.worst) for o in points if not o.noise]
        return any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] for o in others)

    return [replace(p, pareto=not (p.noise or beaten(p))) for p in points]


def recommend(
    points: Sequence[FrontierPoint], budget_ms: float | None, gate: Gate
) -> tuple[int | None, str]:
    """-> the index of one point, and why.

    The least error within the budget; without a budget, the fastest within the gate.
    """
    speed = sorted(range(len(points)), key=lambda i: points[i].chunk_ms.p50)
    speed = [i for i in speed if not points[i].noise]
    if not speed:
        return None, "too noisy to recommend a setting" if points else "nothing was measured"
    limit = f"the gate ({gate.action_p99:g} of the spread over seeds)"
    if budget_ms is None:
        kept = [i for i in speed if _within(points[i], gate)]
        if not kept:
            return None, f"no setting is within {limit}"
        return kept[0], f"{_name(points[kept[0]])}: the fastest within {limit}"
    kept = [i for i in speed if points[i].chunk_ms.p95 <= budget_ms]
    if not kept:
        fastest = points[speed[0]]
        took = f"{_name(fastest)}, takes {fastest.chunk_ms.p95:.0f} ms (p95)"
        return None, f"no setting is within {budget_ms:g} ms: the fastest, {took}"
    best = min(kept, key=lambda i: points[i].worst)
    reason = f"{_name(points[best])}: the least error within {budget_ms:g} ms"
    if not _within(points[best], gate):
        reason += f"; but its error, {points[best].worst:.2f} of the spread, is over {limit}"
    return best, reason


def _within(p: FrontierPoint, gate: Gate) -> bool:
    return (
        p.worst <= gate.action_p99
        and (p.flips or 0) <= gate.gripper_flips
        and (p.cache or 0) <= gate.cache
    )


def _name(p: FrontierPoint) -> str:
    return f"{p.precision}, {p.cameras} cameras, {p.steps} steps"


def _read_point(path: Path) -> FrontierPoint:
    try:
        return decoded(FrontierPoint, read_json(path), path)
    except ResultError as e:
        raise BenchError(f"{e}. Remove {path} to measure it again") from e


@contextmanager
def _claimed(work: Path, ours: dict[str, Any]) -> Iterator[None]:
    """Lock the work folder; check that it is empty or belongs to the same search."""
    if work.exists() and not work.is_dir():
        raise BenchError(f"--work {work} is not a folder: give another")
    work.mkdir(parents=True, exist_ok=True)
    path, lock = work / "work.json", os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.is_file():
            if any(work.iterdir()):
                raise BenchError(f"{work} is not empty: give an empty folder with --work")
            write_json(path, ours)
        theirs = read_json(path)
        others = [key for key in ours if theirs.get(key) != ours[key]]
        if others:
            raise BenchError(
                f"the points in {work} were measured with another {', '.join(others)}: give "
                "another --work"
            )
        yield
    except BlockingIOError as e:
        raise BenchError(
            f"another frontier runs in {work}: wait until it ends, or give another --work"
        ) from e
    finally:
        os.close(lock)


def _errors(policy: Policy, held_out: HeldOut, n: int) -> tuple[float, float | None, int | None]:
    """-> p99 / spread of the worst joint, cache error (None with fewer cameras), gripper flips."""
    samples = _seen_by(policy, held_out)
    whole = len(held_out.samples[0].images) == len(policy.manifest.cameras)

    def ask(sample: Sample) -> gates.Prefilled:
        cache, _ = prefill_policy(policy, sample)
        return cache if whole else {}, lambda x: policy.robot_units(policy.denoise(x, n))

    got, expected = gates.outputs_of(map(ask, samples), held_out.noises), held_out.expected
    if not whole:
        expected = Outputs([{} for _ in samples], expected.chunks)
    errors = replace(held_out, expected=expected).compare(got)
    if not np.isfinite(errors.action):
        raise BenchError(
            f"{policy.bundle.folder} gives actions that are not finite with {n} steps: leave it out"
        )
    return errors.action, errors.worst_cache if whole else None, errors.flips


def _chunk_ms(policy: Policy, held_out: HeldOut, n: int) -> float:
    o, noise = _seen_by(policy, held_out)[0], held_out.noises[0][0]
    return 1e3 * timed(lambda: policy.predict_chunk(o.images, o.state, o.task, noise, n))


def _seen_by(policy: Policy, held_out: HeldOut) -> list[Sample]:
    names = [camera.name for camera in policy.manifest.cameras]
    return [_with_cameras(sample, names) for sample in held_out.samples]


def _with_cameras(sample: Sample, names: Sequence[str]) -> Sample:
    return replace(sample, images={name: sample.images[name] for name in names})
