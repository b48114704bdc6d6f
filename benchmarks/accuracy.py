"""A bundle against its checkpoint in float32, with the same noise: is it still the same policy?

Controls are the same bundle with a deliberate error. They must fail the gate: otherwise these
observations cannot show an error.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..core.errors import BenchError
from ..core.progress import Progress
from ..export import parity
from ..export.checkpoint.cameras import bundle_cameras
from ..export.checkpoint.checkpoint import Checkpoint, load_checkpoint
from ..export.held_out import HeldOut, hold_out, prefill_policy
from ..export.int8 import observations_for
from ..export.reference import ParityObservation, reference_of
from ..quantize.int8 import gate as gates
from ..quantize.int8.gate import TICK_DEG, Gate
from ..quantize.observations.calibration import CalibrationSet
from ..quantize.observations.sample import Sample
from ..runtime import Bundle, CheckFailed, Policy
from ..runtime.bundle.manifest import Manifest
from . import machine
from .latency import ReferenceOptions
from .result import Accuracy, Comparison, Joint, Observations

STAGES = 2  # observations that are compared stage by stage
SAME = 1e-4  # rounding of float32
CONTROL_SEEDS = 2


@dataclass(frozen=True)
class Judge:
    """Observations and gate. source: a LeRobot dataset, a recording, or `synthetic`."""

    source: str
    frames: int
    gate: Gate

    def draw(self, checkpoint: Checkpoint, say: Callable[[str], None]) -> CalibrationSet:
        """The held-out part is compared on: a calibration on the same source does not use it.

        Raises ObservationsError for a source that cannot be used.
        """
        data = observations_for(checkpoint, self.source, 4 * self.frames, Progress(say))
        if len(data.held_out) < 2:
            raise BenchError(
                f"{self.source} leaves {len(data.held_out)} frame to compare on, expected 2: "
                "record more"
            )
        return data

    def drawn(self, data: CalibrationSet) -> Observations:
        """The record of `draw`."""
        r, kept = data.record, data.held_out
        tasks = len({sample.task for sample in kept})
        return Observations(
            r.source, r.kind, r.sha256, len(kept), data.held_out_episodes, tasks, self.gate.seeds
        )


def measure(
    bundle: str, given: ReferenceOptions, judge: Judge, device: str, say: Callable[[str], None]
) -> Accuracy:
    """Raises BenchError if the reference is another policy, CheckFailed for NaN in an action."""
    head, opened = machine.watched(), Bundle.open(bundle)
    say(f"reading {given.checkpoint}")
    checkpoint = load(replace(given, cameras=bundle_cameras(opened)))
    require_source(opened, checkpoint)
    data, gate = judge.draw(checkpoint, say), judge.gate
    reference = reference_of(checkpoint, opened.manifest.target)
    say(
        f"running {given.checkpoint} in torch float32: {len(data.held_out)} observations, "
        f"{gate.seeds} seeds each"
    )
    held_out = hold_out(reference, data.held_out, gate.seeds)
    pairs = zip(data.held_out[:STAGES], held_out.noises, strict=False)
    few = [ParityObservation(s.images, s.state, s.task, noises[0]) for s, noises in pairs]
    expected = [reference.run(o) for o in few]
    del reference
    policy = Policy.load(opened, device)
    stages, _ = parity.measure(policy, few, expected)
    say(f"running {bundle}")
    comparisons = [compare("bundle", policy, held_out, gate)]
    for name in ("stale cache", "swapped cameras", "other seed"):
        if name != "swapped cameras" or len(opened.manifest.cameras) > 1:
            say(f"control: {name}")
            comparisons.append(compare(name, policy, held_out, gate))
    return Accuracy(
        **head(),
        bundle=bundle,
        precision=opened.manifest.precision,
        reference=f"{given.checkpoint} in torch float32",
        observations=judge.drawn(data),
        gate=asdict(gate),
        stages=stages,
        enters=enters(stages),
        comparisons=tuple(comparisons),
        passed=not comparisons[0].missed and all(c.missed for c in comparisons[1:]),
    )


def failure(result: Accuracy) -> str | None:
    """Why the check fails; None: it passes."""
    bundle, *controls = result.comparisons
    if bundle.missed:
        return f"the gate is not met: {', '.join(bundle.missed[:8])}"
    blind = [control.name for control in controls if not control.missed]
    if blind:
        return (
            f"the gate is also met by {', '.join(blind)}: these observations cannot show an "
            "error, give others"
        )
    return None


def load(given: ReferenceOptions) -> Checkpoint:
    """Raises CheckpointError."""
    vlm = Path(given.vlm) if given.vlm else None
    return load_checkpoint(given.checkpoint, vlm=vlm, cameras=given.cameras)


def require_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raises BenchError if the bundle was exported from another checkpoint."""
    if other := checkpoint.differences_from(bundle.manifest):
        raise BenchError(
            f"{bundle.folder} was exported from another checkpoint "
            f"({bundle.manifest.source.checkpoint}) than --reference {checkpoint.name}: other "
            f"{', '.join(other)}. Name its own checkpoint"
        )


def enters(stages: dict[str, float]) -> str:
    """The first stage with an error over the rounding of float32."""
    for name, error in stages.items():
        if error > SAME:
            return (
                f"the error starts at {name}: {error:.1e}; all stages before are within {SAME:.0e}"
            )
    return f"no stage differs by more than {SAME:.0e}"


def compare(name: str, policy: Policy, held_out: HeldOut, gate: Gate) -> Comparison:
    """name: bundle, or a control."""
    control = name != "bundle"
    noises, rng = held_out.noises, np.random.default_rng(3)
    asked = [_mistaken(name, held_out.samples, i) for i in range(len(noises))]
    if control:
        noises = [seeds[:CONTROL_SEEDS] for seeds in noises]
    if name == "other seed":
        noises = [
            [rng.standard_normal(n.shape, dtype=np.float32) for n in seeds] for seeds in noises
        ]
    got = gates.outputs_of((prefill_policy(policy, s) for s in asked), noises)
    if not np.isfinite(got.chunks).all():
        raise CheckFailed(
            f"{policy.bundle.folder} gives actions that are not finite ({name}): export it again"
        )
    found = held_out.compare(got)
    names, spread = joint_names(policy.manifest), np.array(found.spread)
    difference = np.abs(got.chunks - held_out.expected.chunks[:, : len(noises[0])]).astype(
        np.float64
    )
    p50, largest = np.percentile(difference, 50, axis=(0, 1, 2)), difference.max(axis=(0, 1, 2))
    ticks = [None if i in held_out.grippers else p99 / TICK_DEG for i, p99 in enumerate(found.p99)]
    joints = [
        Joint(n, float(p50[i]), p99, float(largest[i]), ticks[i], s, p99 / max(s, 1e-9))
        for i, (n, p99, s) in enumerate(zip(names, found.p99, found.spread, strict=True))
    ]
    rms = np.sqrt((difference**2).mean(axis=(0, 1)))  # [chunk, dof]
    return Comparison(
        name=name,
        control=control,
        joints=tuple(joints),
        worst=found.action,
        flips=found.flips,
        cache=found.worst_cache,
        drift=tuple(np.round((rms / np.maximum(spread, 1e-9)).max(axis=1), 7).tolist()),
        missed=tuple(gates.missed(found, gate, names)),
    )


def _mistaken(name: str, samples: tuple[Sample, ...], i: int) -> Sample:
    """Observation `i` as a policy with this error sees it."""
    o = samples[i]
    if name == "stale cache":  # of another moment; the same instruction, so the same cache rows
        other = samples[i - len(samples) // 2]
        return replace(o, images=other.images, state=other.state)
    if name == "swapped cameras":
        first, *rest = o.images.values()
        return replace(o, images=dict(zip(o.images, [*rest, first], strict=True)))
    return o


def joint_names(m: Manifest) -> tuple[str, ...]:
    return m.joints or tuple(f"joint {i}" for i in range(m.action.dim))
