"""An observation -> the prefix graph's feeds. One visible ordered list: check, resize, normalise, tokenise."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tokenizers
from numpy.typing import NDArray

from ...core.errors import BackendError, BundleError, InputError
from ..bundle.bundle import Bundle
from ..bundle.manifest import Tokens

CAMERA_GRAPH = "camera.onnx"  # frames to images, on the device; portable bundles have it
RESIZE_TOLERANCE = 1e-5  # of pixels in [-1, 1]
Feeds = dict[str, NDArray[np.generic]]


class Preprocessor:
    """Turns what a robot sees into what `prefix.onnx` takes, as LeRobot's SmolVLA preprocessor does."""

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
        """images: camera name -> uint8 [H, W, 3] RGB; state: float [dof] in robot units; task: the instruction.
        raw: leave resizing to the device, and give `frame.<camera>` as they are in place of `images`.

        Raises InputError that lists everything wrong with the observation.
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
            elif min(_resized(image.shape[0], image.shape[1], self.manifest.image_size)) < 1:
                found.append(f"camera '{name}' has shape {image.shape}, too narrow to resize")
        return found

    def _state_problems(self, state: NDArray[np.floating]) -> list[str]:
        dim = self.manifest.state.dim
        if not isinstance(state, np.ndarray) or not np.issubdtype(state.dtype, np.floating):
            return [
                f"state is {getattr(state, 'dtype', type(state).__name__)}, expected a float numpy array"
            ]
        if state.shape != (dim,):
            return [f"state has shape {state.shape}, expected ({dim},)"]
        if not (np.abs(state) <= np.finfo(np.float32).max).all():  # a NaN fails this too
            return [f"state is not finite: {state.tolist()}"]
        return []


class Tokenizer:
    """The checkpoint's own tokenizer, read by the `tokenizers` library."""

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

        A newline is added unless the task ends with one, as in LeRobot. Raises InputError for an instruction
        longer than the bundle's length: cutting it costs task success without a word.
        """
        if (
            not isinstance(task, str)
            or not task.strip()
            or any("\ud800" <= c <= "\udfff" for c in task)
        ):
            # A lone surrogate is what Python makes of bytes on the command line that are not UTF-8.
            raise InputError(
                f"the task is {task!r}, expected an instruction such as 'Pick up the red cube.'"
            )
        ids = self._tokenizer.encode(task if task.endswith("\n") else task + "\n").ids
        if len(ids) > self._length:
            shown = task if len(task) <= 80 else task[:77] + "..."
            raise InputError(
                f"the task is {len(ids)} tokens long, this bundle takes {self._length}: shorten it "
                f"(the policy was trained on at most {self._length} too): {shown!r}"
            )
        tokens = np.full((1, self._length), self._pad_id, np.int32)
        tokens[0, : len(ids)] = ids
        return tokens, np.arange(self._length)[None] < len(ids)


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    ratio = max(width / size, height / size)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(image: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """uint8 [H, W, 3] -> float32 [3, size, size] in [-1, 1]: bilinear, aspect kept, padded left and top with -1.

    LeRobot's resize_with_pad (lerobot 0.4.4, modeling_smolvla.py): F.interpolate without align_corners or
    antialias, which is what OpenCV's INTER_LINEAR computes on float32.
    """
    height, width = _resized(image.shape[0], image.shape[1], size)
    pixels = image.astype(np.float32) / np.float32(255)
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    out = np.full((3, size, size), -1, np.float32)
    out[:, size - height :, size - width :] = pixels.transpose(2, 0, 1) * np.float32(
        2
    ) - np.float32(1)
    return out


def require_resized(got: NDArray[Any], frame: NDArray[Any]) -> None:
    """Raises BackendError where a device made other pixels of `frame` than the host, [3, size, size] in [-1, 1]."""
    worst = float(np.abs(got - resize_with_pad(frame, got.shape[-1])).max())
    if not worst <= RESIZE_TOLERANCE:
        raise BackendError(
            f"the device resizes frames of {frame.shape[1]} x {frame.shape[0]} otherwise than the host, by "
            f"{worst:.1e} (at most {RESIZE_TOLERANCE:.0e}): try another --backend"
        )


@lru_cache(maxsize=8)
def resampling(height: int, width: int, size: int) -> dict[str, NDArray[Any]]:
    """What camera.onnx takes beside a frame of [height, width, 3], so that it computes `resize_with_pad`.

    rows, columns int32 [2, size]: the two source rows or columns of each one written. row_weights float32
    [2, size, 1, 1], column_weights [1, 2, size, 1]: their shares, 0 where it is padding.
    """
    rows, row_weights = _bilinear(height, _resized(height, width, size)[0], size)
    columns, column_weights = _bilinear(width, _resized(height, width, size)[1], size)
    return {
        "rows": rows,
        "row_weights": row_weights[:, :, None, None],
        "columns": columns,
        "column_weights": column_weights[None, :, :, None],
    }


def _bilinear(source: int, target: int, size: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Neighbours and weights, [2, size], of the last `target` of `size` places; pixel centres are at halves."""
    at = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    first = np.minimum(at.astype(np.int32), source - 1)
    indices, weights = np.zeros((2, size), np.int32), np.zeros((2, size), np.float32)
    indices[:, size - target :] = first, np.minimum(first + 1, source - 1)
    weights[:, size - target :] = 1 - (at - first), at - first
    return indices, weights
