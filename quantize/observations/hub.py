"""The Hugging Face Hub, or its local cache where the Hub does not answer."""

from collections.abc import Iterator
from contextlib import contextmanager


def is_hub_id(name: str) -> bool:
    """Whether `name` is like lerobot/smolvla_base, and not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


@contextmanager
def from_hub(what: str, error: type[Exception]) -> Iterator[None]:
    """While open, every exception of huggingface_hub becomes an `error` that says what to do."""
    try:
        yield
    except Exception as e:  # requests, httpx, OSError and the library's own; some have no text
        first_line = str(e).partition("\n")[0]
        raise error(
            f"{what} cannot be had from the Hub ({type(e).__name__}: {first_line}). "
            "Check the name and the network, or give a folder"
        ) from e
