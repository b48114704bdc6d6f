"""Whether a bundle's chunk can take 30 ms on a board, and what would bring it there.

Every number is one of three kinds. floor: all peaks fully used; nothing beats it. projected: at the efficiencies of
the best public run without custom kernels, on whichever board that was. measured: on this machine.
"""

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..policy.policy import Policy, Timing
from ..policy.preprocessing import EXAMPLE_TASK
from .roofline import BOARDS, ONNX_ALONE, Board, Chunk, find_board, sustained_hz

TARGET_MS = 30.0
WARM_UP = 4  # chunks that do not count
FEWER_STEPS = (5, 4)  # of ten; their loss is published: a cosine of the actions of 0.98 and 0.96
USUAL_HZ = 30.0
_VERDICTS = {  # kind -> the target is met, is not
    "floor": ("not ruled out", "ruled out, even with the peaks fully used"),
    "projected": ("met", "not met"),
    "measured": ("met", "not met"),
}


@dataclass(frozen=True)
class Option:
    """A setting of the policy, computed from the bundle's counts."""

    cameras: int
    steps: int
    int8: bool  # every product with weights; the gate may allow less
    ms: dict[str, float]  # kind -> milliseconds of a chunk


@dataclass(frozen=True)
class Budget:
    """The answer for one bundle on one board."""

    board: Board
    bundle: str  # what was counted
    target_ms: float
    stages: dict[
        str, dict[str, float]
    ]  # stage -> kind -> milliseconds; the last stage is the chunk
    verdicts: dict[str, str]  # kind -> whether the target is met
    options: dict[
        str, tuple[Option, ...]
    ]  # kind -> the smallest changes that meet the target by it, or none at all
    actions: int  # executed of a chunk
    control_hz: float  # the dataset's rate, else the usual one
    sustained_hz: dict[str, float]  # kind -> fastest loop that chunks keep up with


def report(
    m: Manifest, board_name: str | None, measured: Timing | None = None
) -> tuple[str, dict[str, Any]]:
    """The bundle on a board, or on every one that is known where None is named: as text, and for json.dump.

    measured: a chunk of this bundle on that very board. Raises InputError for an unknown board.
    """
    if board_name is None:
        return boards_table(m), {"boards": [asdict(budget(m, board)) for board in BOARDS]}
    found = budget(m, find_board(board_name), measured)
    return text(found), asdict(found)


def measure(policy: Policy) -> Timing:
    """Medians of twenty chunks, of grey pictures."""
    m = policy.manifest
    images = {c.name: np.full((480, 640, 3), 127, np.uint8) for c in m.cameras}
    state, rows = np.zeros(m.state.dim, np.float32), []
    for _ in range(WARM_UP + 20):
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
    return Timing(*(1e3 * float(ms) for ms in np.median(rows[WARM_UP:], axis=0)))


def chunk_of(m: Manifest) -> Chunk:
    """A chunk as this bundle stores and computes it."""
    rows = next(t.shape[1] for t in m.prefix.outputs if t.name == "prefix_mask")
    return Chunk(
        **m.prefix.stages,
        **m.expert.stages,
        cache_bytes=m.cache_bytes,
        steps=m.sampling.num_steps,
        cameras=len(m.cameras),
        prefix_tokens=rows,
        image_tokens=(rows - m.tokens.length - 1) // len(m.cameras),  # one row is the state's
    )


def budget(m: Manifest, board: Board, measured: Timing | None = None) -> Budget:
    """measured: a chunk of this bundle on that very board."""
    chunk, int8 = chunk_of(m), m.precision == "int8"
    counted = f"{m.precision}, {_count(chunk.cameras, 'camera')}, {m.tokens.length} tokens, {chunk.steps} steps"
    if any(t.dtype == "float32" for t in m.prefix.outputs):
        chunk, counted = (
            chunk.in_float16(),
            f"{counted}; float32 is counted as float16, as exported for a GPU",
        )
    stages = _times(chunk, board)
    if measured is not None:
        stages["prefix"]["measured"], stages["denoise"]["measured"] = (
            measured.prefix_ms,
            measured.denoise_ms,
        )
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
        options=_options(chunk, board, int8),
        actions=actions,
        control_hz=m.fps or USUAL_HZ,
        sustained_hz={kind: sustained_hz(actions, ms) for kind, ms in total.items()},
    )


def _times(chunk: Chunk, board: Board) -> dict[str, dict[str, float]]:
    """Stage -> kind -> milliseconds."""
    kinds = {"floor": chunk.ms(board), "projected": chunk.ms(board, **ONNX_ALONE)}
    for ms in kinds.values():
        ms["prefix"] = ms["vision"] + ms["language"]
        ms["chunk"] = ms["prefix"] + ms["denoise"]
    stages = ("vision", "language", "prefix", "denoise", "chunk")
    return {stage: {kind: ms[stage] for kind, ms in kinds.items()} for stage in stages}


def _options(chunk: Chunk, board: Board, int8: bool) -> dict[str, tuple[Option, ...]]:
    """int8: whether the chunk is so already, and is then left as it is."""
    cameras, steps = (
        range(chunk.cameras, 0, -1),
        [chunk.steps, *(n for n in FEWER_STEPS if n < chunk.steps)],
    )
    tried = []
    for count, n, to_int8 in product(cameras, steps, (False,) if int8 else (False, True)):
        other = replace(chunk.with_cameras(count), steps=n)
        ms = _times(other.in_int8() if to_int8 else other, board)["chunk"]
        tried.append(Option(count, n, int8 or to_int8, ms))
    met = {kind: [o for o in tried if o.ms[kind] <= TARGET_MS] for kind in ("floor", "projected")}
    return {
        kind: tuple(o for o in found if not any(_milder(p, o) for p in found))
        for kind, found in met.items()
    }


def _milder(a: Option, b: Option) -> bool:
    return a is not b and a.cameras >= b.cameras and a.steps >= b.steps and a.int8 <= b.int8


def text(b: Budget) -> str:
    """The answer for a person."""
    peaks = f"{b.board.float_tflops:.4g} TFLOPS FP16, {b.board.int8_tops:.4g} TOPS INT8, {b.board.gb_s:g} GB/s"
    lines = [
        f"board     {b.board.name}: {peaks}, dense ({b.board.source})",
        f"bundle    {b.bundle}",
        "",
    ]
    lines.append(f"{'milliseconds':<14}" + "".join(f"{kind:>11}" for kind in _VERDICTS))
    for stage, ms in b.stages.items():
        lines.append(
            f"{stage:<14}"
            + "".join(f"{ms[k]:>11.1f}" if k in ms else f"{'-':>11}" for k in _VERDICTS)
        )
    lines.append("")
    for kind, verdict in b.verdicts.items():
        lines.append(f"{b.target_ms:g} ms     {kind} {b.stages['chunk'][kind]:.1f} ms: {verdict}")
    lines += [f"options   {kind}: {_ways(b, kind)}" for kind in b.options]
    lines.append(
        "          fewer cameras are another policy; fewer steps and INT8 change the actions: measure it"
    )
    sustained = ", ".join(f"{hz:.0f} Hz {kind}" for kind, hz in b.sustained_hz.items())
    needed = 1e3 * b.actions / (2 * b.control_hz)
    lines.append(
        f"control   chunks of {b.actions} actions sustain {sustained}; {b.control_hz:g} Hz needs {needed:.0f} ms"
    )
    return "\n".join(lines)


def boards_table(m: Manifest) -> str:
    """Every board in Markdown."""
    lines = [
        "| board | floor, ms | projected, ms | 30 ms, projected | projected under 30 ms | sustained, projected |",
        "|---|---|---|---|---|---|",
    ]
    for b in (budget(m, board) for board in BOARDS):
        ms, verdict, hz = b.stages["chunk"], b.verdicts["projected"], b.sustained_hz["projected"]
        cells = f"{ms['floor']:.1f} | {ms['projected']:.1f} | {verdict} | {_ways(b, 'projected')} | {hz:.0f} Hz"
        lines.append(f"| {b.board.name} | {cells} |")
    return "\n".join(lines)


def _ways(b: Budget, kind: str) -> str:
    """Under the target by `kind`."""
    if b.stages["chunk"][kind] <= b.target_ms:
        return "as it is"
    ways = [
        f"{_count(o.cameras, 'camera')}, {o.steps} steps{', INT8' * o.int8} ({o.ms[kind]:.1f})"
        for o in b.options[kind]
    ]
    return " or ".join(ways) or "none"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
