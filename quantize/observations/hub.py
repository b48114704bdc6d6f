"""What comes from the Hugging Face Hub, or from its local cache where the Hub does not answer."""

from collections.abc import Iterator
from contextlib import contextmanager


def is_hub_id(name: str) -> bool:
    """Whether `name` is like lerobot/smolvla_base, and not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


@contextmanager
def from_hub(what: str, error: type[Exception]) -> Iterator[None]:
    """While open, whatever goes wrong in huggingface_hub becomes an `error` that says what to do."""
    try:
        yield
    except (
        Exception
    ) as e:  # the library's errors span requests, httpx, OSError and its own; some have no text
        raise error(
            f"{what} cannot be had from the Hub ({type(e).__name__}: {str(e).partition(chr(10))[0]}). "
            "Check the name and the network, or give a folder"
        ) from e
