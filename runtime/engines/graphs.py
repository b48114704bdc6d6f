"""What every engine offers: prefix and expert graph, joined by a KV cache on the device."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# By graph input name; `frame.<camera>` is a raw picture for engines that take frames.
Feeds = dict[str, NDArray[np.generic]]
# What one run of the expert graph takes beside actions and cache: float32 time, dt, guidance [1]
# and time_embedding [1, expert width].
Step = dict[str, Array]


class Graphs(Protocol):
    """Both graphs, loaded: `prefill` once per observation, then `denoise` against the same
    cache."""

    reason: str  # why this engine runs, in words
    device: str  # cpu, cuda or tensorrt
    takes_frames: bool  # the device resizes: feed `frame.<camera>` in place of `images`

    def prefill(self, feeds: Feeds) -> None:
        """Give the prefix graph its inputs. TensorRT runs it with the first denoise step."""

    def finish_prefill(self) -> None:
        """Run the prefix now where it has not run, and wait for it."""

    def denoise(
        self,
        noise: Array,
        steps: Sequence[Step],
        prev_chunk: Array,
        prev_weights: Array,
        velocities: list[Array] | None = None,
    ) -> Array:
        """Euler steps from `noise` to normalised actions, both float32 [1, chunk, max_action_dim].

        prev_chunk is normalised and padded like noise, prev_weights [1, chunk, 1]; zeros switch
        guidance off. `velocities`, where given, collects the velocity of each step.
        """

    def cache(self) -> dict[str, NDArray[np.generic]]:
        """Copies of the prefix graph's outputs: prefix_mask and every key.i and value.i."""

    def proof(self) -> dict[str, float] | None:
        """The errors of a self-check that these engines passed before; None where none is known."""

    def keep_proof(self, errors: dict[str, float]) -> None:
        """Remember a self-check that these engines passed, where they are kept."""

    def close(self) -> None:
        """Free the memory. The graphs cannot be used afterwards."""
