"""The least time of a chunk on a board: operations and bytes of each stage over the board's peaks.

A stage takes as long as its arithmetic, or as its reading of weights and cache: the longer counts.
The stages run one after the other. With the full peaks the result is a floor. With published
efficiencies it is a projection, not a measurement: it assumes that another board uses as much of
its peaks as the measured one.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from ...core.errors import InputError
from ..bundle.manifest import Work


@dataclass(frozen=True)
class BoardPeaks:
    """Dense peaks of a GPU, without sparsity and DLA, or measured rates of a CPU."""

    name: str
    float_tflops: float  # FP16 of a GPU, float32 of a CPU
    int8_tops: float
    gb_s: float
    source: str
    also: tuple[str, ...] = ()  # other common names


def _orin(name: str, sms: int, mhz: int, gb_s: float, *also: str) -> BoardPeaks:
    """2048 FP16 and 4096 INT8 operations a clock and SM (NVIDIA's Orin data sheets)."""
    tflops = sms * 2048 * mhz / 1e6
    return BoardPeaks(name, tflops, 2 * tflops, gb_s, f"{sms} SMs at {mhz} MHz", also)


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
    BoardPeaks(
        "Thor T4000",
        150,
        300,
        273,
        "approximate, from 1200 sparse FP4 TFLOPS; INT8 is its FP8",
        ("T4000",),
    ),
    BoardPeaks(
        "Thor T5000",
        258.5,
        517,
        273,
        "2070 sparse FP4 TFLOPS; INT8 is its FP8",
        ("T5000", "Thor", "AGX Thor"),
    ),
)
_NOISE = {"nvidia", "jetson", "engineering", "reference", "developer", "kit", "module"}


def find_board(*names: str) -> BoardPeaks:
    """The board of BOARDS that one of `names` means; the first name that is known counts.

    Raises InputError that lists all boards.
    """
    for name, board in product(names, BOARDS):
        if _words(name) in [_words(known) for known in (board.name, *board.also)]:
            return board
    known = ", ".join(board.name for board in BOARDS)
    raise InputError(f"board {names[-1]!r} is unknown, expected one of: {known}")


def _words(name: str) -> set[str]:
    """The words that distinguish a board, for people's spellings and the device tree's."""
    name = re.sub(r"[-_\s]+", " ", name.lower())
    return set(re.sub(r"(\d) +gb", r"\1gb", name).split()) - _NOISE


# The shares of the peaks that the best public run of SmolVLA without custom kernels reaches:
# 133.6 ms with TensorRT engines from ONNX on an Orin Nano 8GB Super, FP16, 2 cameras, 10 steps
# (eetmie/jetson-orin-nano-vla on GitHub). No INT8 run is public: INT8 gets the same shares.
ONNX_ALONE = {"vision": 0.31, "language": 0.34, "memory": 0.49}


@dataclass(frozen=True)
class ChunkWork:
    """The work of one action chunk."""

    vision: Work  # all cameras
    language: Work
    expert: Work  # one step
    cache_bytes: int
    steps: int
    cameras: int
    prefix_tokens: int
    image_tokens: int  # of one camera

    def ms(
        self, board: BoardPeaks, vision: float = 1, language: float = 1, memory: float = 1
    ) -> dict[str, float]:
        """Stage -> milliseconds; "denoise" is all steps.

        vision, language, memory: the shares of the board's peaks that are reached by the arithmetic
        of vision, by that of the language model and the expert, and by reading memory.
        """

        def stage(work: Work, share: float, cache_bytes: int = 0) -> float:
            int8 = work.gemm.get("int8", 0)
            seconds = (work.flops - int8) / board.float_tflops + int8 / board.int8_tops  # e-12
            read_bytes = work.weight_bytes + cache_bytes
            return max(seconds / 1e9 / share, read_bytes / board.gb_s / 1e6 / memory)

        return {
            "vision": stage(self.vision, vision),
            "language": stage(self.language, language),
            "denoise": self.steps * stage(self.expert, language, self.cache_bytes),
        }

    def with_cameras(self, count: int) -> "ChunkWork":
        """Scaled, not counted: vision by the cameras, the other stages by the prefix's tokens."""
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

    def in_float16(self) -> "ChunkWork":
        """With float16 in place of float32, in the weights and in the cache."""
        return replace(self._with_dtypes({"float32": "float16"}), cache_bytes=self.cache_bytes // 2)

    def in_int8(self) -> "ChunkWork":
        """With every product with weights in INT8."""
        return self._with_dtypes({"float32": "int8", "float16": "int8"})

    def _with_dtypes(self, names: Mapping[str, str]) -> "ChunkWork":
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
    """`work` over more or fewer tokens; the weights are read once in any case."""
    return replace(
        work,
        gemm={dtype: round(n * gemm) for dtype, n in work.gemm.items()},
        attention=round(work.attention * attention),
    )


def sustained_hz(actions: int, chunk_ms: float) -> float:
    """The fastest control loop that always has an action.

    The loop asks for the next chunk when half of the `actions` are left, so the chunk must take
    less than actions * period / 2.
    """
    return 1e3 * actions / (2 * chunk_ms)
