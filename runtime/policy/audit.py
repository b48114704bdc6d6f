"""In which precision a bundle computes on this machine, and whether its label says so.

The files are hashed, and the exporter checks the stored weights (export/stored.py). An engine can
still compute otherwise: ONNX Runtime computes float16 graphs in float32 on most CPUs. So the audit
asks the engine. ONNX Runtime's profiler records every operator with the types of its operands;
TensorRT's inspector tells the precision of each layer.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.manifest import Precision
from ..engines.backend import PROVIDER, Backend, choose_for
from ..engines.ort import OrtGraphs
from ..engines.ort_profile import OperatorRuns, last_runs
from .policy import Policy
from .sampling import RealTimeChunking
from .selfcheck import run_selfcheck

FLOPS_TOLERANCE = 0.02
CPU, CUDA = PROVIDER["ort-cpu"], PROVIDER["ort-cuda"]
_NARROW = ("float16", "bfloat16", "int8")


@dataclass(frozen=True)
class OrtAudit:
    """One chunk of a bundle, as ONNX Runtime ran it."""

    provider: str  # the requested one
    operators: tuple[OperatorRuns, ...]  # the slowest first
    chunk_ms: float  # both graphs, with the time between operators
    expected: int  # multiply-adds of a chunk, by the manifest
    claimed_int8: int  # multiply-adds of a chunk that the manifest claims in INT8 on this device

    @property
    def multiply_adds(self) -> int:
        return sum(o.multiply_adds for o in self.operators)

    def shares(self) -> dict[str, dict[str, float]]:
        """Provider -> precision -> share of the multiply-adds that ran."""
        found: dict[str, Counter[str]] = {}
        for o in self.operators:
            if o.precision:
                found.setdefault(o.provider, Counter())[o.precision] += o.multiply_adds
        total = max(self.multiply_adds, 1)
        return {
            provider: {precision: n / total for precision, n in counts.most_common()}
            for provider, counts in found.items()
        }

    def elsewhere(self) -> dict[str, int]:
        """Operator -> its runs on another provider than the requested one."""
        found: Counter[str] = Counter()
        for o in self.operators:
            if o.provider != self.provider:
                found[o.operator] += o.runs
        return dict(found.most_common())


@dataclass(frozen=True)
class TrtAudit:
    """The engines of a bundle, as TensorRT's inspector describes them."""

    layers: dict[str, dict[str, int]]  # graph -> dtype -> number of layers


def audit(
    bundle: Bundle, device: str = "cpu", say: Callable[[str], None] = print
) -> OrtAudit | TrtAudit:
    """Audit the first backend of `device` that this machine can run.

    say: receives the progress of engine builds. Raises BundleError for a damaged self-check,
    BackendError for the device.
    """
    backend = choose_for(bundle, device).backends[0]
    if backend == "tensorrt":
        from ..engines.trt import engine_layers

        return TrtAudit(engine_layers(bundle, say))
    return _audit_ort(bundle, backend)


def _audit_ort(bundle: Bundle, backend: Backend) -> OrtAudit:
    """Run the self-check under the profiler; its last instruction counts, the others warm up."""
    m = bundle.manifest
    graphs = {"prefix": m.prefix, "expert": m.expert}
    runs = {"prefix": 1, "expert": m.sampling.num_steps}
    operators: list[OperatorRuns] = []
    chunk_ms = 0.0
    with tempfile.TemporaryDirectory(prefix="smolvla-audit-") as folder:
        sessions = OrtGraphs(bundle, backend, profile=Path(folder))
        run_selfcheck(Policy(bundle, sessions, RealTimeChunking(), None))
        for name, profile in zip(graphs, sessions.end_profiling(), strict=True):
            more, ms = last_runs(name, json.loads(profile.read_text()), runs[name])
            operators += more
            chunk_ms += ms
    # A portable INT8 bundle claims integer products on TensorRT only (ort.EXACT_INT8).
    claims = m.target == "cpu" and sessions.provider == CPU
    return OrtAudit(
        provider=sessions.provider,
        operators=tuple(sorted(operators, key=lambda o: -o.ms)),
        chunk_ms=chunk_ms,
        expected=sum(g.flops * runs[name] for name, g in graphs.items()) // 2,
        claimed_int8=m.int8.multiply_adds if m.int8 is not None and claims else 0,
    )


def contradictions(found: OrtAudit | TrtAudit, label: Precision) -> list[str]:
    """What contradicts the label, or the manifest's count; empty where nothing does."""
    if isinstance(found, OrtAudit):
        return _contradictions_ort(found, label)
    from ..engines.trt import mislabelled

    problems = {graph: mislabelled(label, layers) for graph, layers in found.layers.items()}
    return [f"the engine of {graph} is not {label}: {p}" for graph, p in problems.items() if p]


def _contradictions_ort(found: OrtAudit, label: Precision) -> list[str]:
    problems = []
    if abs(found.multiply_adds - found.expected) > FLOPS_TOLERANCE * found.expected:
        problems.append(
            f"by the manifest a chunk has {found.expected / 1e9:.6g} G multiply-adds, but "
            f"{found.multiply_adds / 1e9:.6g} G ran"
        )
    ran = Counter[str]()
    for o in found.operators:
        ran[o.precision] += o.multiply_adds
    wrong = {
        "fp32": any(ran[precision] for precision in _NARROW),
        # A CPU computes float16 graphs in float32, which is more precise.
        "fp16": found.provider == CUDA and 2 * ran["float32"] > ran.total(),
        "int8": ran["int8"] < found.claimed_int8 * (1 - FLOPS_TOLERANCE),
    }
    if wrong[label]:
        problems.append(
            f"labelled {label}, but computed on {found.provider} were {percents(ran)} of the "
            "multiply-adds"
        )
    return problems


def percents(counts: Counter[str]) -> str:
    """float16 98.0 %, float32 2.0 %"""
    total = max(counts.total(), 1)
    shares = [f"{name} {100 * n / total:.1f} %" for name, n in counts.most_common() if n]
    return ", ".join(shares) or "none"
