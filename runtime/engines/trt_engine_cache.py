"""TensorRT engines of this machine, each built once: `$XDG_CACHE_HOME/smolvla-edge/engines/<key>/`.

    engine.plan  the engine
    engine.json  Record: its key, its layers, and the self-checks that it passed

An engine is code. It is never read from a bundle, only from a folder that no other user can write
to. Its key is the hash of everything that decides what it computes: another graph, TensorRT, GPU or
precision gives another engine.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...core.errors import BackendError
from ...core.files import cache_home, private_folder, sha256_of, write_whole
from ...core.strict import decode, encode
from ..bundle.bundle import Bundle
from .cuda import Stream
from .trt_engine import Engine, Shapes, build, load_tensorrt

PLAN, RECORD = "engine.plan", "engine.json"
SETTINGS = 1  # raised with every change of what `engine.build` asks TensorRT for


@dataclass(frozen=True)
class Key:
    """Everything that decides what an engine computes."""

    graph: str  # file name in the bundle
    graph_sha256: str  # of the graph and its weights
    precision: str
    shapes: dict[str, tuple[int, ...]]  # of inputs with dynamic shapes
    tensorrt: str
    gpu: str
    settings: int = SETTINGS

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Record:
    """engine.json."""

    key: Key
    bundle: str  # the folder it was built from, for people
    plan_sha256: str
    layers: dict[str, int]  # dtype -> layers, by TensorRT's inspector
    proved: dict[str, dict[str, float]]  # digest of a bundle -> its self-check with this engine


class EngineCache:
    """Engines of one bundle on one GPU."""

    def __init__(self, bundle: Bundle, stream: Stream, say: Callable[[str], None]) -> None:
        """say: receives the progress of builds, which take minutes.

        Raises BackendError where another user can write to the cache.
        """
        self.bundle, self.stream, self.say = bundle, stream, say
        self.folder = _engines_folder()
        self.tensorrt, self.gpu = str(load_tensorrt().__version__), stream.gpu()
        self.records: dict[str, Record] = {}

    def engine(self, graph: str, shapes: Shapes | None = None) -> Engine:
        """The engine of the bundle's file `graph`; built where none fits, or where it is damaged.

        Raises BackendError where it cannot be built or loaded.
        """
        key = self._key(graph, dict(shapes or {}))
        folder = self.folder / key.digest
        record = _fitting(folder, key)
        if record is None:
            if folder.exists():
                self.say(f"the engine of {graph} is damaged: building it again")
                shutil.rmtree(folder)
            record = self._build(key, folder)
        try:
            engine = Engine((folder / PLAN).read_bytes(), self.stream)
        except BackendError as e:
            raise BackendError(
                f"{e}. If memory is not the reason, build it again: rm -r {folder}"
            ) from e
        if not record.layers:
            record = replace(record, layers=engine.precisions())
            self._keep(folder, record)
        if not shapes:  # an engine of one frame size is checked by its user
            self.records[graph] = record
        return engine

    def proof(self) -> dict[str, float] | None:
        """The self-check that this bundle passed with all loaded engines, or None."""
        proofs = [record.proved.get(self.bundle.digest) for record in self.records.values()]
        return proofs[0] if proofs and all(proofs) else None

    def prove(self, errors: dict[str, float]) -> None:
        """Keep a self-check that the bundle passed with the loaded engines."""
        for graph, record in self.records.items():
            proved = replace(record, proved=record.proved | {self.bundle.digest: errors})
            self.records[graph] = proved
            self._keep(self.folder / record.key.digest, proved)

    def _keep(self, folder: Path, record: Record) -> None:
        try:
            _write(folder, record)
        except OSError as e:
            self.say(f"the record of {record.key.graph} cannot be written: {e}")

    def _key(self, graph: str, shapes: dict[str, tuple[int, ...]]) -> Key:
        m = self.bundle.manifest
        parts = [m.files[name].sha256 for name in (graph, f"{graph}.data") if name in m.files]
        return Key(graph, "-".join(parts), m.precision, shapes, self.tensorrt, self.gpu)

    def _build(self, key: Key, folder: Path) -> Record:
        self.say(f"building the TensorRT engine of {key.graph}, once; large ones take minutes")
        for left in self.folder.glob(".building-*"):
            if time.time() - left.stat().st_mtime > 86400:  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
        timing = (
            self.folder
            / f"timing-{hashlib.sha256((key.tensorrt + key.gpu).encode()).hexdigest()[:16]}.cache"
        )
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.folder) as scratch:
            new = Path(scratch) / "engine"
            new.mkdir(mode=0o700)
            try:
                build(self.bundle.path(key.graph), new / PLAN, timing, key.shapes, self.say)
                record = Record(key, str(self.bundle.folder), sha256_of(new / PLAN), {}, {})
                _write(new, record)
                new.rename(folder)
            except OSError as e:
                other = _fitting(folder, key)
                if other is not None:  # another process has built the same engine
                    return other
                raise BackendError(
                    f"the engine of {key.graph} cannot be kept in {self.folder}: {e}"
                ) from e
        return record


def engine_records() -> list[tuple[Path, Record | str]]:
    """Folder and record of every engine of this user, or what is wrong with it, in words."""
    found: list[tuple[Path, Record | str]] = []
    for file in sorted((cache_home() / "engines").glob(f"*/{RECORD}")):
        try:
            found.append((file.parent, _read(file.parent)))
        except (OSError, ValueError) as e:
            found.append((file.parent, f"is damaged: {e}"))
    return found


def _engines_folder() -> Path:
    """The folder of engines. Raises BackendError where another user can write to it."""
    folder = cache_home() / "engines"
    try:
        return private_folder(folder)
    except PermissionError as e:
        raise BackendError(
            f"{e}: another user could put code there. Remove it, or set XDG_CACHE_HOME to another "
            "folder"
        ) from e
    except OSError as e:
        raise BackendError(
            f"engines cannot be kept in {folder}: {e}. Set XDG_CACHE_HOME to another folder"
        ) from e


def _fitting(folder: Path, key: Key) -> Record | None:
    """The record of an undamaged engine of `key`, or None."""
    try:
        record = _read(folder)
    except (OSError, ValueError):
        return None
    return record if record.key == key else None


def _read(folder: Path) -> Record:
    """Raises OSError or ValueError for a damaged engine."""
    problems: list[str] = []
    record = decode(Record, json.loads((folder / RECORD).read_text()), problems)
    if record is None:
        raise ValueError("; ".join(problems))
    if sha256_of(folder / PLAN) != record.plan_sha256:
        raise ValueError("its hash differs")
    return record


def _write(folder: Path, record: Record) -> None:
    write_whole(folder / RECORD, json.dumps(encode(record), indent=1, sort_keys=True).encode())
