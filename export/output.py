"""The folder of a new bundle: what may be written or replaced, and how it is put in place."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import ExportError
from ..runtime.bundle.manifest import FORMAT, MANIFEST


def require_output(output: Path, force: bool) -> None:
    """Raises ExportError when `output` may not be written. Call it before anything slow."""
    if output.name in ("", ".."):
        raise ExportError(f"--output is {str(output)!r}, expected the name of a new folder")
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as e:
        raise ExportError(
            f"{output} cannot be made: {parent} cannot be written to ({e.strerror})"
        ) from e
    _require_replaceable(output, force)


@contextmanager
def staging(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and is deleted otherwise.

    Raises ExportError when `output` may not be written.
    """
    require_output(output, force)
    root = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        folder = root / "new"
        folder.mkdir(mode=0o755)
        yield folder
        for file in folder.iterdir():
            file.chmod(0o444)
        _require_replaceable(output, force)  # the export took minutes
        if output.exists():
            output.rename(root / "old")
        try:
            folder.rename(output)
        except BaseException:
            if (root / "old").exists():
                (root / "old").rename(output)
            raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _require_replaceable(output: Path, force: bool) -> None:
    """Raises ExportError unless nothing is at `output`, or a bundle that `force` replaces."""
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise ExportError(f"{output} exists: give another --output, or --force to replace it")
    if output.is_symlink() or not output.is_dir():
        raise ExportError(
            f"{output} is not a folder, so --force does not replace it: give another --output"
        )
    foreign = _foreign_files(output)
    if foreign:
        raise ExportError(
            f"{output} holds files that are not of a bundle ({', '.join(foreign[:5])}), so --force "
            "does not replace it: give another --output, or move these files away"
        )


def _foreign_files(folder: Path) -> list[str]:
    """Names in `folder` that its manifest does not list; all of them where there is no manifest."""
    names = sorted(path.name for path in folder.iterdir())
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        known = {MANIFEST, *manifest["files"]} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    return [name for name in names if name not in known]
