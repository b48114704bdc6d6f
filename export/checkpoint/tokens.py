"""What the exporter needs to know of the tokenizer beyond copying it."""

import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers

from ...core.errors import CheckpointError

FAKE_IMAGE, GLOBAL_IMAGE = "<fake_token_around_image>", "<global-img>"  # SmolVLM's names


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """As the file has it, but neither cutting nor padding. Raises CheckpointError."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def pad_id(path: Path, tokenizer: tokenizers.Tokenizer, fallback: int | None) -> int:
    """Id of the padding token. Padding is masked, so 0 does where none is named."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token: Any = json.loads(path.with_name(name).read_text()).get("pad_token")
        except (OSError, ValueError, AttributeError):
            continue
        content = token.get("content") if isinstance(token, dict) else token
        found = None if content is None else tokenizer.token_to_id(content)
        if found is not None:
            return int(found)
    return fallback if fallback is not None and 0 <= fallback < tokenizer.get_vocab_size() else 0


def image_special_tokens(tokenizer: tokenizers.Tokenizer) -> tuple[int, int, int]:
    """Ids before (two) and after (one) each image, where the checkpoint wraps images."""
    fake, whole = tokenizer.token_to_id(FAKE_IMAGE), tokenizer.token_to_id(GLOBAL_IMAGE)
    if fake is None or whole is None:
        raise CheckpointError(
            "add_image_special_tokens is set, but the tokenizer lacks "
            f"{FAKE_IMAGE} or {GLOBAL_IMAGE}: give the VLM's own tokenizer with --vlm PATH"
        )
    return fake, whole, fake


def instructions(tokenizer: tokenizers.Tokenizer, length: int) -> tuple[str, str, str]:
    """A short, a padded and a full-length instruction for `length` tokens (newline included)."""

    def count(task: str) -> int:
        return len(tokenizer.encode(task + "\n", add_special_tokens=True).ids)

    sentence = (
        "Pick up the red cube and place it on the plate, then push the button on the left side, and"
    )
    words = itertools.cycle(sentence.split())
    full, longer = "", next(words)
    while count(longer) <= length:
        full, longer = longer, f"{longer} {next(words)}"
    while count(full + ".") <= length:  # fill what whole words left over
        full += "."
    half = full[: len(full) // 2].rsplit(" ", 1)[0] or full
    return "Go.", half, full
