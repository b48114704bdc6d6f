"""One TensorRT engine: built from a typed ONNX graph in a process of its own, loaded, and run.

The networks are strongly typed: the engine has the graph's types, without precision flags or a
calibrator. So TensorRT 10.3, 10.16 and 11 build the same engine. Source of the API:
docs.nvidia.com.
tests/runtime/engines/test_tensorrt_names.py compares each name with the bindings of those versions.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...core.errors import BackendError
from ...core.process import module_command
from ..bundle.manifest import Tensor
from .cuda import Stream

OLDEST, NEWEST = (10, 3), (11,)
PROGRESS_EVERY_S = 10.0
# TensorRT's name of a type -> the bundle's.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT8": "int8",
    "BOOL": "bool",
    "UINT8": "uint8",
}
_NARROWEST_FIRST = {
    "int8": r"\bint8\b",
    "float16": r"\b(half|fp16)\b",
    "float32": r"\b(float|fp32)\b",
}

Shapes = Mapping[str, tuple[int, ...]]  # of inputs with dynamic shapes


def load_tensorrt() -> Any:
    """The module `tensorrt`. Raises BackendError where it is missing or of another version."""
    try:
        import tensorrt
    except ImportError as e:
        raise BackendError(f"the Python module tensorrt does not load: {e}") from e
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST or version[:1] > NEWEST:
        raise BackendError(
            f"TensorRT {tensorrt.__version__} found, expected 10.3 to 11: "
            "it comes with JetPack 6.1 or newer"
        )
    return tensorrt


def build(onnx: Path, plan: Path, timing: Path, shapes: Shapes, say: Callable[[str], None]) -> None:
    """Build `plan` from `onnx` in a process of its own.

    All memory of a build is free afterwards, and a build that the system kills for memory does not
    end this process. timing: TensorRT's timing cache, read and written. say: receives progress.
    Raises BackendError with TensorRT's message.
    """
    files = str(onnx), str(plan), str(timing)
    line = module_command(__name__, *files, json.dumps(dict(shapes)))
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            last = ""
            for last in process.stdout:
                say(last.rstrip())
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code < 0:
        raise BackendError(
            f"the build of {onnx.name} was ended by {signal.Signals(-code).name}; SIGKILL means "
            "that memory ran out: stop other programs, leave the desktop (sudo systemctl isolate "
            "multi-user.target), or add swap"
        )
    if code:
        raise BackendError(
            f"TensorRT could not build {onnx.name}: {last.strip() or f'exit status {code}'}"
        )


def _build_here(trt: Any, onnx: Path, plan: Path, timing: Path, shapes: Shapes) -> None:
    log = _logger(trt)
    builder = trt.Builder(log)
    # In 11 every network is strongly typed and the flag is 0; in 10 it must be asked for.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        found = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"its parser refuses the graph: {found}")
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.name in shapes:
            tensor.shape = tuple(shapes[tensor.name])
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # it rounds the operands of float32 products to 10 bits
    # The inspector then tells the precision of each layer.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _progress(trt)
    cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # The cache is damaged, or of another machine.
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError("; ".join(log.errors[-3:]) or "it gave no reason")
    plan.write_bytes(memoryview(serialized))
    with suppress(OSError):  # a full disk: it only saves time
        fresh = plan.with_name("timing.cache")  # a folder of this build alone
        fresh.write_bytes(memoryview(config.get_timing_cache().serialize()))
        fresh.replace(timing)


class Engine:
    """A loaded engine and its execution context, on one stream."""

    def __init__(self, plan: bytes, stream: Stream) -> None:
        """Raises BackendError where TensorRT refuses `plan`, as of another version or GPU."""
        trt = load_tensorrt()
        self._log, self._stream = _logger(trt), stream
        try:
            self._runtime = trt.Runtime(self._log)
        except TypeError as e:  # the bindings raise it where TensorRT cannot start
            raise BackendError(
                f"TensorRT does not start ({e}): does its version fit the driver?"
            ) from e
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendError(
                f"TensorRT does not load the engine: {'; '.join(self._log.errors[-3:])}"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(
                "TensorRT has no memory for the engine's activations: stop other programs"
            )
        engine = self._engine
        self.tensors: list[Tensor] = []  # a type that no bundle has is None
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            dtype: Any = _DTYPES.get(engine.get_tensor_dtype(name).name)
            self.tensors.append(Tensor(name, dtype, tuple(engine.get_tensor_shape(name))))
        self._inspector = trt.LayerInformationFormat.JSON

    def precisions(self) -> dict[str, int]:
        """dtype -> number of layers, by TensorRT's inspector."""
        inspector = self._engine.create_engine_inspector()
        return count_precisions(str(inspector.get_engine_information(self._inspector)))

    def run(self, addresses: Mapping[str, int]) -> None:
        """Put one run on the stream; addresses: of every input and output. Raises BackendError."""
        context = self._context
        for tensor in self.tensors:
            if not context.set_tensor_address(tensor.name, addresses[tensor.name]):
                raise BackendError(
                    f"TensorRT refuses the address of {tensor.name}: {self._log.errors[-1:]}"
                )
        if not context.execute_async_v3(int(self._stream.handle)):
            raise BackendError(
                f"TensorRT could not start a run: {'; '.join(self._log.errors[-3:])}"
            )


def count_precisions(information: str) -> dict[str, int]:
    """The inspector's JSON -> dtype -> number of layers whose narrowest input has it.

    A format is `Half` in new versions and `Row major linear FP16 format` in old ones. Layers
    without a floating-point or int8 input, and layers without details, are not counted.
    """
    found: Counter[str] = Counter()
    for layer in json.loads(information).get("Layers", []):
        inputs = layer.get("Inputs", []) if isinstance(layer, dict) else []
        told = " ".join(str(tensor.get("Format/Datatype", "")) for tensor in inputs).lower()
        for dtype, words in _NARROWEST_FIRST.items():
            if re.search(words, told):
                found[dtype] += 1
                break
    return dict(found)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # mypy does not see the module
        """Keeps TensorRT's errors for our messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _progress(trt: Any) -> Any:
    class Progress(trt.IProgressMonitor):  # type: ignore[misc]  # mypy does not see the module
        """Prints a line for each outermost phase, and one every ten seconds."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.printed_s = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                print(f"{phase}", flush=True)

        def step_complete(self, phase: str, step: int) -> bool:
            if time.monotonic() - self.printed_s > PROGRESS_EVERY_S:
                self.printed_s = time.monotonic()
                print(f"{phase}: step {step + 1}", flush=True)
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Progress()


def main() -> None:
    """The build process. Arguments: graph, plan, timing cache, shapes. Prints the progress."""
    try:
        graph, plan, timing = (Path(word) for word in sys.argv[1:4])
        _build_here(load_tensorrt(), graph, plan, timing, json.loads(sys.argv[4]))
    except (BackendError, OSError, TypeError) as e:  # TypeError: TensorRT cannot start
        sys.exit(str(e))
