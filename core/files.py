"""Files: hashes, whole writes, the cache, and folders that only this user can write to."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/smolvla-edge`, or its default."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:  # the user of a container can have no home
        folder = Path(tempfile.gettempdir()) / f"smolvla-edge-{os.getuid()}"
    return folder / "smolvla-edge"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely, or leave it as it was before. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def private_folder(folder: Path) -> Path:
    """Make `folder`, or check that only this user can write to it.

    Raises OSError; PermissionError where somebody else can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder
