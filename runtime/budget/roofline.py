"""How fast a chunk can be on a board: the operations and bytes of each stage over the board's dense peaks.

A stage takes as long as its arithmetic or its reading of weights and cache, whichever is longer; the stages follow
one another. At the full peaks that is a floor, which nothing beats; at published efficiencies a projection, which is
not a measurement: one board's use of its peaks is assumed of another.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from ...core.errors import InputError
from ..bundle.manifest import Work


@dataclass(frozen=True)
class Board:
    """Dense peaks of a GPU, without sparsity and DLA; or what was measured of a CPU."""

    name: str
    float_tflops: float  # FP16 of a GPU, float32 of a CPU
    int8_tops: float
    gb_s: float
    source: str
    also: tuple[str, ...] = ()  # what people call it


def _orin(name: str, sms: int, mhz: int, gb_s: float, *also: str) -> Board:
    """An Ampere SM does 2048 FP16 and 4096 INT8 operations a clock (NVIDIA's Orin data sheets)."""
    tflops = sms * 2048 * mhz / 1e6
    return Board(name, tflops, 2 * tflops, gb_s, f"{sms} SMs at {mhz} MHz", also)


BOARDS = (
    _orin("Orin Nano 4GB", 4, 625, 34),
    _orin("Orin Nano 4GB Super", 4, 1020, 51),
    _orin("Orin Nano 8GB", 8, 625, 68, "Orin Nano"),
    _orin("Orin Nano 8GB Super", 8, 1020, 102, "Orin Nano Super"),
    _orin("Orin NX 8GB", 8, 765, 102.4),
    _orin("Orin NX 16GB", 8, 918, 102.4, "Orin NX"),
    _orin("Orin NX Super", 8, 1173, 102.4, "Orin NX 8GB Super", "Orin NX 16GB Super"),
    _orin("AGX Orin 32GB", 14, 930, 204.8),
    _orin("AGX Orin 64GB", 16, 1300, 204.8, "AGX Orin"),
    Board(
        "Thor T4000",
        150,
        300,
        273,
        "approximate, from 1200 sparse FP4 TFLOPS; INT8 is its FP8",
        ("T4000",),
    ),
    Board(
        "Thor T5000",
        258.5,
        517,
        273,
        "2070 sparse FP4 TFLOPS; INT8 is its FP8",
        ("T5000", "Thor", "AGX Thor"),
    ),
)
_NOISE = {"nvidia", "jetson", "engineering", "reference", "developer", "kit", "module"}


def find_board(*names: str) -> Board:
    """The board of BOARDS that people or a device tree call by the first of `names` that is known. Raises InputError
    that lists all."""
    for name, board in product(names, BOARDS):
        if _words(name) in [_words(known) for known in (board.name, *board.also)]:
            return board
    raise InputError(
        f"board {names[-1]!r} is unknown, expected one of: {', '.join(board.name for board in BOARDS)}"
    )


def _words(name: str) -> set[str]:
    return set(re.sub(r"(\d) +gb", r"\1gb", re.sub(r"[-_\s]+", " ", name.lower())).split()) - _NOISE


# Fitted to the best public run of SmolVLA without custom kernels: 133.6 ms with TensorRT engines from ONNX on an Orin
# Nano 8GB Super, FP16, 2 cameras, 10 steps (eetmie/jetson-orin-nano-vla on GitHub). INT8, of which no run is public,
# is given the same shares.
ONNX_ALONE = {"vision": 0.31, "language": 0.34, "memory": 0.49}


@dataclass(frozen=True)
class Chunk:
    """What one action chunk takes."""

    vision: Work  # all cameras
    language: Work
    expert: Work  # one step
    cache_bytes: int
    steps: int
    cameras: int
    prefix_tokens: int
    image_tokens: int  # of one camera

    def ms(
        self, board: Board, vision: float = 1, language: float = 1, memory: float = 1
    ) -> dict[str, float]:
        """Stage -> milliseconds; "denoise" is all steps. Of the board's peaks, such shares are reached: by the
        arithmetic of vision and of the language model, as which the expert's counts, and by what reads memory."""

        def stage(work: Work, share: float, cache_bytes: int = 0) -> float:
            int8 = work.gemm.get("int8", 0)
            arithmetic = (
                ((work.flops - int8) / board.float_tflops + int8 / board.int8_tops) / 1e9 / share
            )
            return max(arithmetic, (work.weight_bytes + cache_bytes) / board.gb_s / 1e6 / memory)

        return {
            "vision": stage(self.vision, vision),
            "language": stage(self.language, language),
            "denoise": self.steps * stage(self.expert, language, self.cache_bytes),
        }

    def with_cameras(self, count: int) -> "Chunk":
        """Computed, not counted: vision in proportion to the cameras, the rest to the prefix's tokens."""
        tokens = self.prefix_tokens + (count - self.cameras) * self.image_tokens
        more, images = tokens / self.prefix_tokens, count / self.cameras
        return replace(
            self,
            vision=_scaled(self.vision, images, images),
            language=_scaled(self.language, more, more**2),
            expert=_scaled(self.expert, 1.0, more),
            cache_bytes=round(self.cache_bytes * more),
            cameras=count,
            prefix_tokens=tokens,
        )

    def in_float16(self) -> "Chunk":
        """Where float32 is stored, float16 instead, the cache included."""
        return replace(self._stored({"float32": "float16"}), cache_bytes=self.cache_bytes // 2)

    def in_int8(self) -> "Chunk":
        """Every product with weights in INT8."""
        return self._stored({"float32": "int8", "float16": "int8"})

    def _stored(self, names: Mapping[str, str]) -> "Chunk":
        def renamed(counts: Mapping[str, int]) -> dict[str, int]:
            found = Counter[str]()
            for dtype, n in counts.items():
                found[names.get(dtype, dtype)] += n
            return dict(found)

        vision, language, expert = (
            Work(renamed(w.gemm), w.attention, renamed(w.weights))
            for w in (self.vision, self.language, self.expert)
        )
        return replace(self, vision=vision, language=language, expert=expert)


def _scaled(work: Work, gemm: float, attention: float) -> Work:
    """`work` over more or fewer tokens: the weights are read once all the same."""
    return replace(
        work,
        gemm={dtype: round(n * gemm) for dtype, n in work.gemm.items()},
        attention=round(work.attention * attention),
    )


def sustained_hz(actions: int, chunk_ms: float) -> float:
    """The fastest control loop that never starves: the next chunk, asked for with half of the `actions` left, must
    be there before they are used up (chunk_ms < actions * period / 2)."""
    return 1e3 * actions / (2 * chunk_ms)
