"""Run by hand: writes tests/data/tensorrt_api/*.txt, the names that the real TensorRT and CUDA
bindings have.

    python tests/support/tensorrt_names.py [VERSION ...]

It installs each wheel from PyPI into a scratch folder and imports it, which needs a C compiler and
a Python that the wheels are made for (3.10 to 3.12), but no GPU and no TensorRT: the bindings are
linked to TensorRT by nine functions only, and here they are empty. A name the files lack may exist
all the same: then its class belongs into CLASSES.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from support.paths import DATA

WHEELS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
    "cuda_runtime_12": "cuda-bindings==12.9.10",
    "cuda_runtime_13": "cuda-bindings==13.5.0",
}
CLASSES = """
    Builder BuilderFlag DataType EngineInspector HardwareCompatibilityLevel IBuilderConfig ICudaEngine
    IExecutionContext IHostMemory ILogger INetworkDefinition IProgressMonitor ITensor ITimingCache
    LayerInformationFormat Logger MemoryPoolType NetworkDefinitionCreationFlag OnnxParser ParserError PreviewFeature
    ProfilingVerbosity Runtime TensorIOMode cudaDeviceProp cudaError_t cudaMemcpyKind cudaStreamCaptureMode
"""
# Of the rest, what building and running an engine may need.
OTHERS = re.compile(
    "get_|init_|nptype|volume|cuda(Device(Get|Schedule|Set|Sync)|DriverGet|Event|Free|Get|Graph(Destroy|Exec|Inst|Launch)"
    "|Host|Malloc|Mem(cpy|set|Get)|RuntimeGet|Set|Stream)(?!.*(Array|Attr|Callback|Mem_|Node|3D|2D))"
)
LINKED = """
    createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
    createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry
    getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
"""


def write_names(version: str) -> None:
    requirement = WHEELS[version]
    module = "tensorrt_bindings" if "tensorrt" in requirement else "cuda.bindings.runtime"
    with tempfile.TemporaryDirectory() as scratch:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--target",
            scratch,
            "--only-binary=:all:",
        ]
        subprocess.run([*pip, "--no-deps", requirement, "cuda-pathfinder"], check=True)
        major = version.split(".")[0]
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            empty = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in LINKED.split())
            line = [
                "cc",
                "-shared",
                "-fPIC",
                "-xc",
                "-",
                "-o",
                f"{scratch}/lib{library}.so.{major}",
            ]
            subprocess.run(line, input=empty, text=True, check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": scratch, "PYTHONPATH": scratch}
        line = [sys.executable, __file__, "--import", module]
        text = subprocess.run(
            line, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    (DATA / f"{version}.txt").write_text(f"# {requirement}, by {Path(__file__).name}\n{text}")


def print_names(module: str) -> None:
    """`Class: member member ...` for each class of CLASSES, and `: name name ...` for the other
    names."""
    found = importlib.import_module(module)
    for name in CLASSES.split():
        if hasattr(found, name):
            print(f"{name}:", *(x for x in dir(getattr(found, name)) if x[0] != "_"))
    print(":", *(x for x in dir(found) if OTHERS.match(x) and x not in CLASSES.split()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--import"]:
        print_names(sys.argv[2])
    else:
        for version in sys.argv[1:] or WHEELS:
            write_names(version)
