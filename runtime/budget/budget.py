"""Whether a chunk of a bundle can take 30 ms on a board, and which changes would make it so.

A number is of one of three kinds. floor: the board's peaks fully used; no program is faster.
projected: with the efficiencies of the best public run without custom kernels, which was on another
board. measured: on this machine.
"""

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..policy.policy import Policy, Timing
from ..policy.preprocessing import EXAMPLE_TASK
from .roofline import BOARDS, ONNX_ALONE, BoardPeaks, ChunkWork, find_board, sustained_hz

TARGET_MS = 30.0
WARM_UP_CHUNKS, MEASURED_CHUNKS = 4, 20
FEWER_STEPS = (5, 4)  # of ten; published cosines of the actions are 0.98 and 0.96
DEFAULT_HZ = 30.0
_VERDICTS = {  # kind -> verdict where the target is met, and where it is not
    "floor": ("not ruled out", "ruled out, even with the peaks fully used"),
    "projected": ("met", "not met"),
    "measured": ("met", "not met"),
}
_BOARDS_HEADER = (
    "| board | floor, ms | projected, ms | 30 ms, projected | projected under 30 ms "
    "| sustained, projected |\n|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class PolicyChange:
    """Other settings of the policy, with times computed from the bundle's counts."""

    cameras: int
    steps: int
    int8: bool  # every product with weights; an export's gate can allow fewer
    ms: dict[str, float]  # kind -> milliseconds of a chunk


@dataclass(frozen=True)
class Budget:
    """The answer for one bundle on one board."""

    board: BoardPeaks
    bundle: str  # what was counted
    target_ms: float
    stages: dict[str, dict[str, float]]  # stage -> kind -> ms; the last stage is the chunk
    verdicts: dict[str, str]  # kind -> whether the target is met
    options: dict[str, tuple[PolicyChange, ...]]  # kind -> the smallest changes that meet it
    actions: int  # of a chunk that are executed
    control_hz: float  # the dataset's rate, or the default
    sustained_hz: dict[str, float]  # kind -> the fastest loop that chunks keep up with


def report(
    m: Manifest, board_name: str | None, measured: Timing | None = None
) -> tuple[str, dict[str, Any]]:
    """The budget as text and for json.dump: on one board, or on all where None is named.

    measured: a chunk of this bundle on that very board. Raises InputError for an unknown board.
    """
    if board_name is None:
        return boards_table(m), {"boards": [asdict(budget(m, board)) for board in BOARDS]}
    found = budget(m, find_board(board_name), measured)
    return text(found), asdict(found)


def measure(policy: Policy) -> Timing:
    """Medians over MEASURED_CHUNKS chunks of grey images."""
    m = policy.manifest
    images = {c.name: np.full((480, 640, 3), 127, np.uint8) for c in m.cameras}
    state, rows = np.zeros(m.state.dim, np.float32), []
    for _ in range(WARM_UP_CHUNKS + MEASURED_CHUNKS):
        start = time.perf_counter()
        feeds = policy.preprocessor.feeds(
            images, state, EXAMPLE_TASK, raw=policy.graphs.takes_frames
        )
        ready = time.perf_counter()
        policy.graphs.prefill(feeds)
        policy.graphs.finish_prefill()
        filled = time.perf_counter()
        policy.robot_units(policy.denoise(policy.draw_noise()))
        rows.append((ready - start, filled - ready, time.perf_counter() - filled))
    return Timing(*(1e3 * float(s) for s in np.median(rows[WARM_UP_CHUNKS:], axis=0)))


def chunk_of(m: Manifest) -> ChunkWork:
    """The work of a chunk, as this bundle stores and computes it."""
    rows = next(t.shape[1] for t in m.prefix.outputs if t.name == "prefix_mask")
    return ChunkWork(
        **m.prefix.stages,
        **m.expert.stages,
        cache_bytes=m.cache_bytes,
        steps=m.sampling.num_steps,
        cameras=len(m.cameras),
        prefix_tokens=rows,
        image_tokens=(rows - m.tokens.length - 1) // len(m.cameras),  # one row is the state
    )


def budget(m: Manifest, board: BoardPeaks, measured: Timing | None = None) -> Budget:
    """The budget of a bundle; measured: a chunk of it on that very board."""
    chunk = chunk_of(m)
    counted = (
        f"{m.precision}, {_count(chunk.cameras, 'camera')}, {m.tokens.length} tokens, "
        f"{chunk.steps} steps"
    )
    if any(t.dtype == "float32" for t in m.prefix.outputs):
        chunk = chunk.in_float16()
        counted += "; float32 is counted as float16, as exported for a GPU"
    stages = _times(chunk, board)
    if measured is not None:
        stages["prefix"]["measured"] = measured.prefix_ms
        stages["denoise"]["measured"] = measured.denoise_ms
        stages["chunk"]["measured"] = (
            measured.preprocess_ms + measured.prefix_ms + measured.denoise_ms
        )
    total, actions = stages["chunk"], m.sampling.n_action_steps
    return Budget(
        board=board,
        bundle=counted,
        target_ms=TARGET_MS,
        stages=stages,
        verdicts={kind: _VERDICTS[kind][ms > TARGET_MS] for kind, ms in total.items()},
        options=_smallest_changes(chunk, board, m.precision == "int8"),
        actions=actions,
        control_hz=m.fps or DEFAULT_HZ,
        sustained_hz={kind: sustained_hz(actions, ms) for kind, ms in total.items()},
    )


def _times(chunk: ChunkWork, board: BoardPeaks) -> dict[str, dict[str, float]]:
    """Stage -> kind -> milliseconds."""
    kinds = {"floor": chunk.ms(board), "projected": chunk.ms(board, **ONNX_ALONE)}
    for ms in kinds.values():
        ms["prefix"] = ms["vision"] + ms["language"]
        ms["chunk"] = ms["prefix"] + ms["denoise"]
    stages = ("vision", "language", "prefix", "denoise", "chunk")
    return {stage: {kind: ms[stage] for kind, ms in kinds.items()} for stage in stages}


def _smallest_changes(
    chunk: ChunkWork, board: BoardPeaks, is_int8: bool
) -> dict[str, tuple[PolicyChange, ...]]:
    """Kind -> the changes that meet the target, without those larger than another one."""
    cameras = range(chunk.cameras, 0, -1)
    steps = [chunk.steps, *(n for n in FEWER_STEPS if n < chunk.steps)]
    changes = []
    for count, n, int8 in product(cameras, steps, (True,) if is_int8 else (False, True)):
        changed = replace(chunk.with_cameras(count), steps=n)
        if int8 and not is_int8:
            changed = changed.in_int8()
        changes.append(PolicyChange(count, n, int8, _times(changed, board)["chunk"]))
    found = {}
    for kind in ("floor", "projected"):
        met = [change for change in changes if change.ms[kind] <= TARGET_MS]
        found[kind] = tuple(c for c in met if not any(_is_larger(c, other) for other in met))
    return found


def _is_larger(a: PolicyChange, b: PolicyChange) -> bool:
    """Whether `a` changes the policy at least as much as `b` does."""
    return a is not b and a.cameras <= b.cameras and a.steps <= b.steps and a.int8 >= b.int8


def text(b: Budget) -> str:
    """The budget for a person."""
    peaks = (
        f"{b.board.float_tflops:.4g} TFLOPS FP16, {b.board.int8_tops:.4g} TOPS INT8, "
        f"{b.board.gb_s:g} GB/s"
    )
    table = [f"{'milliseconds':<14}" + "".join(f"{kind:>11}" for kind in _VERDICTS)]
    for stage, ms in b.stages.items():
        cells = (f"{ms[kind]:.1f}" if kind in ms else "-" for kind in _VERDICTS)
        table.append(f"{stage:<14}" + "".join(f"{cell:>11}" for cell in cells))
    sustained = ", ".join(f"{hz:.0f} Hz {kind}" for kind, hz in b.sustained_hz.items())
    needed_ms = 1e3 * b.actions / (2 * b.control_hz)
    lines = [
        f"board     {b.board.name}: {peaks}, dense ({b.board.source})",
        f"bundle    {b.bundle}",
        "",
        *table,
        "",
        *(
            f"{b.target_ms:g} ms     {kind} {b.stages['chunk'][kind]:.1f} ms: {verdict}"
            for kind, verdict in b.verdicts.items()
        ),
        *(f"options   {kind}: {_ways(b, kind)}" for kind in b.options),
        "          fewer cameras need another policy; fewer steps and INT8 change the actions",
        f"control   chunks of {b.actions} actions sustain {sustained}; "
        f"{b.control_hz:g} Hz needs {needed_ms:.0f} ms",
    ]
    return "\n".join(lines)


def boards_table(m: Manifest) -> str:
    """Every board, as a Markdown table."""
    lines = [_BOARDS_HEADER]
    for b in (budget(m, board) for board in BOARDS):
        ms, met, hz = b.stages["chunk"], b.verdicts["projected"], b.sustained_hz["projected"]
        lines.append(
            f"| {b.board.name} | {ms['floor']:.1f} | {ms['projected']:.1f} | {met} "
            f"| {_ways(b, 'projected')} | {hz:.0f} Hz |"
        )
    return "\n".join(lines)


def _ways(b: Budget, kind: str) -> str:
    """The changes that meet the target by `kind`, in words."""
    if b.stages["chunk"][kind] <= b.target_ms:
        return "as it is"
    ways = []
    for change in b.options[kind]:
        int8 = ", INT8" if change.int8 else ""
        cameras = _count(change.cameras, "camera")
        ways.append(f"{cameras}, {change.steps} steps{int8} ({change.ms[kind]:.1f})")
    return " or ".join(ways) or "none"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
