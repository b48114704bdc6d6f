"""A stand-in for `tensorrt`: a plan names an ONNX graph, which ONNX Runtime computes.

STANDIN in the environment, JSON: version; fail: parse, build, killed or wait; wrong: an output and
its error; half: the graph of which the inspector says that it is float16.
"""

import enum
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cuda

_TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int32)": "INT32",
    "tensor(bool)": "BOOL",
}
_TYPES |= {"tensor(uint8)": "UINT8"}
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "BOOL": "bool", "UINT8": "uint8"}


def _said() -> dict:
    return json.loads(os.environ.get("STANDIN", "{}"))


__version__ = _said().get("version", "10.3.0")


class ILogger:
    ERROR, WARNING, INFO, VERBOSE, INTERNAL_ERROR = (
        "ERROR",
        "WARNING",
        "INFO",
        "VERBOSE",
        "INTERNAL_ERROR",
    )


class IProgressMonitor:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 1


class ProfilingVerbosity(enum.Enum):
    DETAILED = 1


class LayerInformationFormat(enum.Enum):
    JSON = 1


def _session(path, names=None):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


class _Config:
    def clear_flag(self, flag):
        self.cleared = flag

    def create_timing_cache(self, data):
        return SimpleNamespace(serialize=lambda: data + b"timed ")

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class Builder:
    def __init__(self, log):
        self._log = log

    def create_network(self, flags):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return SimpleNamespace(inputs=[], num_inputs=0)

    def create_builder_config(self):
        return _Config()

    def build_serialized_network(self, network, config):
        said = _said()
        assert config.cleared is BuilderFlag.TF32, "float32 would be rounded to TF32"
        assert config.profiling_verbosity is ProfilingVerbosity.DETAILED, (
            "the inspector would tell nothing"
        )
        config.progress_monitor.phase_start("Building engine", None, 2)
        if said.get("fail") == "wait":
            time.sleep(60)
        if said.get("fail") == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if said.get("fail") == "build":
            self._log.log(ILogger.ERROR, "no implementation for node MatMul_7")
            return None
        config.progress_monitor.step_complete("Building engine", 1)
        config.progress_monitor.phase_finish("Building engine")
        shapes = {t.name: list(t.shape) for t in network.inputs}
        return json.dumps(
            {"graph": network.graph, "shapes": shapes, "version": __version__}
        ).encode()


class OnnxParser:
    def __init__(self, network, log):
        self._network = network

    @property
    def num_errors(self):
        return 1

    def get_error(self, index):
        return "In node 3: UNSUPPORTED_NODE"

    def parse_from_file(self, path):
        if _said().get("fail") == "parse":
            return False
        inputs = [
            SimpleNamespace(name=t.name, shape=tuple(t.shape)) for t in _session(path).get_inputs()
        ]
        network = self._network
        network.graph, network.inputs, network.num_inputs = path, inputs, len(inputs)
        network.get_input = inputs.__getitem__
        return True


class Runtime:
    def __init__(self, log):
        self._log = log

    def deserialize_cuda_engine(self, plan):
        said = json.loads(plan)
        if said["version"] != __version__:
            self._log.log(
                ILogger.ERROR,
                f"The engine plan file is of {said['version']}, expected {__version__}",
            )
            return None
        return _Engine(said["graph"], said["shapes"])


class _Engine:
    def __init__(self, graph, shapes):
        self.graph, self._session = graph, _session(graph)
        self.outputs = [t.name for t in self._session.get_outputs()]
        self._tensors = {
            t.name: t for t in (*self._session.get_inputs(), *self._session.get_outputs())
        }
        self._names, self._shapes = list(self._tensors), shapes
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, i):
        return self._names[i]

    def get_tensor_shape(self, name):
        return self._shapes.get(name, self._tensors[name].shape)

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=_TYPES[self._tensors[name].type])

    def create_execution_context(self):
        return _Context(self)

    def create_engine_inspector(self):
        half = Path(self.graph).name == _said().get("half")
        layer = {"Inputs": [{"Format/Datatype": "Half" if half else "Float"}]}
        return SimpleNamespace(
            get_engine_information=lambda form: json.dumps({"Layers": [layer] * 3})
        )

    def array(self, name, address):
        dtype, shape = (
            np.dtype(_NUMPY[self.get_tensor_dtype(name).name]),
            tuple(self.get_tensor_shape(name)),
        )
        return np.frombuffer(
            cuda.view(address, dtype.itemsize * int(np.prod(shape))), dtype
        ).reshape(shape)


class _Context:
    def __init__(self, engine):
        self._engine, self._addresses = engine, {}

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        addresses = dict(self._addresses)  # as they are now: a captured graph keeps them
        cuda.enqueue(lambda: self._compute(addresses))
        return True

    def _compute(self, addresses):
        engine, (output, offset) = self._engine, _said().get("wrong", ("", 0))
        inputs = {n: engine.array(n, a) for n, a in addresses.items() if n not in engine.outputs}
        for name, value in zip(engine.outputs, engine._session.run(None, inputs), strict=True):
            cell = engine.array(name, addresses[name])
            cell[...] = value + np.asarray(offset, value.dtype) if name == output else value
