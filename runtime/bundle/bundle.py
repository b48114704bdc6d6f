"""The bundle: a read-only folder that the exporter writes and the runtime reads.

manifest.json        what it is (manifest.py), with the sha256 of every other file
prefix.onnx(.data)   images, tokens, state -> KV cache and prefix mask
expert.onnx(.data)   one denoise step
tokenizer.json       the tokenizers library's format
selfcheck.npz        inputs and expected outputs (runtime/selfcheck.py)
camera.onnx          raw frames -> images, on the device; of the target portable only
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
    """A bundle on disk whose manifest has been read and whose files have been checked."""

    def __init__(self, folder: Path, manifest: Manifest, digest: str) -> None:
        self.folder, self.manifest = folder, manifest
        self.digest = digest  # sha256 of manifest.json: the identity of the bundle

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Read and check a bundle. Hashes are computed at the first open and when a size or time has changed.

        Raises BundleError with everything that is wrong.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            what = "has no manifest.json" if folder.is_dir() else "is not there"
            raise BundleError(f"bundle {folder} {what}: make one with smolvla-export") from None
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise BundleError(f"cannot read {path}: {e}") from e
        try:
            raw = json.loads(text)
        except ValueError as e:
            raise BundleError(f"{path} is not JSON ({e}): export the checkpoint again") from e
        bundle = cls(folder, parse_manifest(raw, path), hashlib.sha256(text).hexdigest())
        bundle._verify()
        return bundle

    def export_command(self, target: str) -> str:
        """The command that makes this bundle again for another target."""
        return export_command(encode(self.manifest), self.folder, target)

    @property
    def cache_folder(self) -> Path:
        """Where anything derived from this bundle is kept."""
        return cache_home() / self.digest

    def path(self, name: str) -> Path:
        return self.folder / name

    def _verify(self) -> None:
        known, now, problems = None, {}, []
        with suppress(OSError, ValueError):
            known = json.loads((self.cache_folder / "verified.json").read_text())
        known = known if isinstance(known, dict) else {}
        for name, file in self.manifest.files.items():
            try:
                info = self.path(name).lstat()
            except OSError as e:
                problems.append(f"{name} cannot be read ({e.strerror or e})")
                continue
            if not stat.S_ISREG(info.st_mode):
                problems.append(f"{name} is not a plain file")
            elif info.st_size != file.bytes:
                problems.append(f"{name} has {info.st_size} bytes, expected {file.bytes}")
            else:
                now[name] = [
                    str(self.path(name).resolve()),
                    info.st_size,
                    info.st_mtime_ns,
                    info.st_ino,
                ]
                if known.get(name) != now[name] and sha256_of(self.path(name)) != file.sha256:
                    problems.append(f"{name} has changed since the export (sha256 differs)")
        if problems:
            raise BundleError(
                f"bundle {self.folder} is damaged: {'; '.join(problems)}. Export or copy it again"
            )
        with suppress(OSError):  # a read-only home only costs the hashing at the next start
            if known != now:
                self.cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_whole(self.cache_folder / "verified.json", json.dumps(now).encode())
