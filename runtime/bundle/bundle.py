"""The bundle: a read-only folder that the exporter writes and the runtime reads.

manifest.json        the contract (manifest.py), with the sha256 of every other file
prefix.onnx(.data)   images, tokens, state -> KV cache and prefix mask
expert.onnx(.data)   one denoise step
tokenizer.json       in the format of the tokenizers library
selfcheck.npz        inputs and expected outputs (runtime/policy/selfcheck.py)
camera.onnx          raw frames -> images, on the device; only with the target portable
"""

import hashlib
import json
import stat
from contextlib import suppress
from pathlib import Path

from ...core.errors import BundleError
from ...core.files import cache_home, sha256_of, write_whole
from ...core.strict import encode
from .manifest import MANIFEST, Manifest, export_command, parse_manifest


class Bundle:
    """A bundle on disk. Its manifest has been read and its files have been checked."""

    def __init__(self, folder: Path, manifest: Manifest, digest: str) -> None:
        self.folder, self.manifest = folder, manifest
        self.digest = digest  # sha256 of manifest.json: the identity of the bundle

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Read and check a bundle.

        A file is hashed at the first open, and again when its size or time has changed.

        Args:
            folder: The folder that smolvla-export wrote.

        Raises:
            BundleError: The bundle is missing, damaged or of another version. The message lists
                every problem.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            problem = "has no manifest.json" if folder.is_dir() else "does not exist"
            raise BundleError(f"bundle {folder} {problem}: make one with smolvla-export") from None
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise BundleError(f"cannot read {path}: {e}") from e
        try:
            raw = json.loads(text)
        except ValueError as e:
            raise BundleError(f"{path} is not JSON ({e}): export the checkpoint again") from e
        bundle = cls(folder, parse_manifest(raw, path), hashlib.sha256(text).hexdigest())
        bundle._check_files()
        return bundle

    def export_command(self, target: str) -> str:
        """The command that makes this bundle again for another target."""
        return export_command(encode(self.manifest), self.folder, target)

    @property
    def cache_folder(self) -> Path:
        """The folder for files derived from this bundle."""
        return cache_home() / self.digest

    def path(self, name: str) -> Path:
        """The path of a file of the bundle."""
        return self.folder / name

    def _check_files(self) -> None:
        """Raises BundleError that lists every damaged file."""
        verified, now, problems = self._verified(), {}, []
        for name, file in self.manifest.files.items():
            path = self.path(name)
            try:
                info = path.lstat()
            except OSError as e:
                problems.append(f"{name} cannot be read ({e.strerror or e})")
                continue
            if not stat.S_ISREG(info.st_mode):
                problems.append(f"{name} is not a plain file")
                continue
            if info.st_size != file.bytes:
                problems.append(f"{name} has {info.st_size} bytes, expected {file.bytes}")
                continue
            now[name] = [str(path.resolve()), info.st_size, info.st_mtime_ns, info.st_ino]
            if verified.get(name) != now[name] and sha256_of(path) != file.sha256:
                problems.append(f"{name} has changed since the export (sha256 differs)")
        if problems:
            raise BundleError(
                f"bundle {self.folder} is damaged: {'; '.join(problems)}. Export or copy it again"
            )
        if verified != now:
            with suppress(OSError):  # without the file, the next start hashes again
                self.cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_whole(self.cache_folder / "verified.json", json.dumps(now).encode())

    def _verified(self) -> dict[str, object]:
        """File name -> path, size, time and inode when its hash was last correct."""
        with suppress(OSError, ValueError):
            known = json.loads((self.cache_folder / "verified.json").read_text())
            return known if isinstance(known, dict) else {}
        return {}
