"""An observation -> the prefix graph's inputs: check, tokenise, normalise, resize."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ...core.errors import BundleError, InputError
from ..bundle.bundle import Bundle
from ..bundle.manifest import Tokens
from ..engines.graphs import Feeds
from ..engines.resizing import resize_with_pad, resized_shape

EXAMPLE_TASK = "Pick up the red cube and place it on the plate."


class Preprocessor:
    """Makes the inputs of `prefix.onnx`, as LeRobot's SmolVLA preprocessor does."""

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        self.tokenizer = Tokenizer(bundle.path("tokenizer.json"), self.manifest.tokens)

    def feeds(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[np.floating],
        task: str,
        *,
        raw: bool = False,
    ) -> Feeds:
        """The prefix graph's inputs by name.

        Args:
            images: Camera name -> uint8 [H, W, 3] RGB.
            state: float [dof], in robot units.
            task: The instruction.
            raw: The device resizes: give each image unchanged as `frame.<camera>`, not `images`.

        Raises:
            InputError: The observation does not fit; the message lists every problem.
        """
        m = self.manifest
        problems = self._camera_problems(images) + self._state_problems(state)
        if problems:
            raise InputError("the observation does not fit the bundle: " + "; ".join(problems))
        tokens, mask = self.tokenizer.encode(task)
        padded = np.zeros((1, m.state.padded), np.float32)
        padded[0, : m.state.dim] = m.state.normalization.normalize(np.asarray(state, np.float32))
        feeds: Feeds = {"tokens": tokens, "token_mask": mask, "state": padded}
        if raw:
            return feeds | {f"frame.{camera.name}": images[camera.name] for camera in m.cameras}
        stack = [resize_with_pad(images[camera.name], m.image_size) for camera in m.cameras]
        return feeds | {"images": np.stack(stack)}

    def _camera_problems(self, images: Mapping[str, NDArray[np.uint8]]) -> list[str]:
        wanted = [c.name for c in self.manifest.cameras]
        found = [f"camera '{name}' is missing" for name in wanted if name not in images]
        found += [
            f"camera '{n}' is unknown (expected {', '.join(wanted)})"
            for n in images
            if n not in wanted
        ]
        for name, image in images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
                kind = getattr(image, "dtype", type(image).__name__)
                found.append(f"camera '{name}' gives {kind}, expected uint8")
            elif image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 1:
                found.append(
                    f"camera '{name}' has shape {image.shape}, expected [height, width, 3] RGB"
                )
            elif min(resized_shape(image.shape[0], image.shape[1], self.manifest.image_size)) < 1:
                found.append(f"camera '{name}' has shape {image.shape}, too narrow to resize")
        return found

    def _state_problems(self, state: NDArray[np.floating]) -> list[str]:
        dim = self.manifest.state.dim
        if not isinstance(state, np.ndarray) or not np.issubdtype(state.dtype, np.floating):
            return [
                f"state is {getattr(state, 'dtype', type(state).__name__)}, "
                "expected a float numpy array"
            ]
        if state.shape != (dim,):
            return [f"state has shape {state.shape}, expected ({dim},)"]
        if not (np.abs(state) <= np.finfo(np.float32).max).all():  # a NaN fails this too
            return [f"state is not finite: {state.tolist()}"]
        return []


class Tokenizer:
    """The checkpoint's tokenizer."""

    def __init__(self, path: Path, tokens: Tokens) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception
            raise BundleError(f"{path} is not a tokenizer: {e}. Export the checkpoint again") from e
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._length, self._pad_id = tokens.length, tokens.pad_id

    def encode(self, task: str) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """-> ids int32 [1, length] and mask bool [1, length], valid tokens first.

        A newline is added unless the task ends with one, as in LeRobot. Raises InputError for an
        instruction that is too long: a policy that gets a cut one fails without a message.
        """
        if (
            not isinstance(task, str)
            or not task.strip()
            or any("\ud800" <= c <= "\udfff" for c in task)
        ):
            # Python makes lone surrogates of bytes on the command line that are not UTF-8.
            raise InputError(
                f"the task is {task!r}, expected an instruction such as 'Pick up the red cube.'"
            )
        ids = self._tokenizer.encode(task if task.endswith("\n") else task + "\n").ids
        if len(ids) > self._length:
            shown = task if len(task) <= 80 else task[:77] + "..."
            raise InputError(
                f"the task is {len(ids)} tokens long, this bundle takes {self._length}, as many as "
                f"the policy was trained on: shorten it: {shown!r}"
            )
        tokens = np.full((1, self._length), self._pad_id, np.int32)
        tokens[0, : len(ids)] = ids
        return tokens, np.arange(self._length)[None] < len(ids)
