"""TensorRT engines of this machine, each built once: `$XDG_CACHE_HOME/smolvla-edge/engines/<key>/`.

    engine.plan  what TensorRT made
    engine.json  Record: what it was made of, where, and whether it was proved

An engine is code. It is never taken from a bundle, only from a folder that this user alone may write to. Its key is
the hash of everything that decides what it computes, so another graph, TensorRT, GPU or precision is another engine.
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
from .engine import Engine, Shapes, build, load_tensorrt

PLAN, RECORD = "engine.plan", "engine.json"
SETTINGS = 1  # raised with every change of what `engine.build` asks TensorRT for


@dataclass(frozen=True)
class Key:
    """What an engine is made of."""

    graph: str  # file name in the bundle
    graph_sha256: str  # of the graph and its weights
    precision: str
    shapes: dict[str, tuple[int, ...]]  # of inputs that the graph leaves open
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
        """say: is told about builds, which take minutes. Raises BackendError when the cache is not ours alone."""
        self.bundle, self.stream, self.say = bundle, stream, say
        self.folder = _engines_folder()
        self.tensorrt, self.gpu = str(load_tensorrt().__version__), stream.gpu()
        self.records: dict[str, Record] = {}

    def engine(self, graph: str, shapes: Shapes | None = None) -> Engine:
        """The engine of the bundle's file `graph`, built if there is none that fits or the one there is damaged.

        Raises BackendError when it cannot be built, or not be loaded right after."""
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
                f"{e}. If it is not for memory: rm -r {folder}, and it is built again"
            ) from e
        if not record.layers:
            record = replace(record, layers=engine.precisions())
            self._keep(folder, record)
        if not shapes:  # whoever gives shapes proves the engine with them
            self.records[graph] = record
        return engine

    def proof(self) -> dict[str, float] | None:
        """The self-check that this bundle passed with the engines loaded so far; None where one was not proved."""
        proofs = [record.proved.get(self.bundle.digest) for record in self.records.values()]
        return proofs[0] if proofs and all(proofs) else None

    def prove(self, errors: dict[str, float]) -> None:
        """Keep a self-check that was passed with the engines loaded so far."""
        for graph, record in self.records.items():
            proved = replace(record, proved=record.proved | {self.bundle.digest: errors})
            self.records[graph] = proved
            self._keep(self.folder / record.key.digest, proved)

    def _keep(self, folder: Path, record: Record) -> None:
        try:
            _write(folder, record)
        except OSError as e:
            self.say(f"what was found of {record.key.graph} is not kept: {e}")

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
                if (
                    theirs := _fitting(folder, key)
                ) is not None:  # somebody else's build of the same was quicker
                    return theirs
                raise BackendError(
                    f"the engine of {key.graph} cannot be kept in {self.folder}: {e}"
                ) from e
        return record


def engine_records() -> list[tuple[Path, Record | str]]:
    """Folder and record of every engine of this user, or what is wrong with it, in words; changes nothing."""
    found: list[tuple[Path, Record | str]] = []
    for file in sorted((cache_home() / "engines").glob(f"*/{RECORD}")):
        try:
            found.append((file.parent, _read(file.parent)))
        except (OSError, ValueError) as e:
            found.append((file.parent, f"is damaged: {e}"))
    return found


def _engines_folder() -> Path:
    """Where this user keeps engines. Raises BackendError where somebody else could put one there."""
    folder = cache_home() / "engines"
    try:
        return private_folder(folder)
    except PermissionError as e:
        raise BackendError(
            f"{e}, and an engine from it would be somebody's code: remove it, or set XDG_CACHE_HOME to another folder"
        ) from e
    except OSError as e:
        raise BackendError(
            f"engines cannot be kept in {folder}: {e}. Set XDG_CACHE_HOME to another folder"
        ) from e


def _fitting(folder: Path, key: Key) -> Record | None:
    """The record of an engine that is what it says it is, and of `key`; None of any other."""
    try:
        record = _read(folder)
    except (OSError, ValueError):
        return None
    return record if record.key == key else None


def _read(folder: Path) -> Record:
    """Raises OSError or ValueError for an engine that is not what it says it is."""
    problems: list[str] = []
    record = decode(Record, json.loads((folder / RECORD).read_text()), problems)
    if record is None:
        raise ValueError("; ".join(problems))
    if sha256_of(folder / PLAN) != record.plan_sha256:
        raise ValueError("its hash differs")
    return record


def _write(folder: Path, record: Record) -> None:
    write_whole(folder / RECORD, json.dumps(encode(record), indent=1, sort_keys=True).encode())
