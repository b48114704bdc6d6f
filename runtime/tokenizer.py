"""The instruction -> token ids at the bundle's fixed length."""

from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from .bundle import Tokens
from .errors import BundleError, InputError


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
        if not isinstance(task, str) or not task.strip() or any("\ud800" <= c <= "\udfff" for c in task):
            # A lone surrogate is what Python makes of bytes on the command line that are not UTF-8.
            raise InputError(f"the task is {task!r}, expected an instruction such as 'Pick up the red cube.'")
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
