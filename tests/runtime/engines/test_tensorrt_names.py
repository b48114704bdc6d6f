"""Every name of TensorRT's and CUDA's that the runtime uses exists in each version it is for.

None of them runs here: the names are those of the real bindings (tests/support/tensorrt_names.py), found by
reading the code, in which an object of TensorRT's is known by its name.
"""

import ast
import re

import pytest

from support.paths import DATA, ROOT

API = DATA / "tensorrt_api"
VERSIONS = {  # of TensorRT, each with the CUDA that comes with it
    "10.3": ("10.3", "cuda_runtime_12"),
    "10.16": ("10.16", "cuda_runtime_13"),
    "11.4": ("11.4", "cuda_runtime_13"),
}
MODULES = {"tensorrt", "trt", "cudart"}
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "runtime": "Runtime",
}


def read_api(version):
    """-> {class: its members}; under "" the classes and what is in no class."""
    api = {"": []}
    for file in VERSIONS[version]:
        for line in (API / f"{file}.txt").read_text().splitlines()[1:]:
            name, _, members = line.partition(":")
            api[name] = api.get(name, []) + members.split()
            api[""].append(name)
    return api


def used(source):
    """-> (line, class or "" for a module, name) of every attribute of a known object, and of every
    text that is a CUDA function's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"cuda[A-Z]\w+", str(node.value)):
            yield node.lineno, "", node.value
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            *_, above, owner = (
                part.lstrip("_") for part in f"..{ast.unparse(node.value)}".split(".")
            )
            if owner in MODULES:
                yield node.lineno, "", node.attr
            elif above in MODULES and not owner.endswith("__"):
                yield node.lineno, owner, node.attr
            elif owner in OBJECTS:
                yield node.lineno, OBJECTS[owner], node.attr


def missing(source, version):
    """Names used in `source` that `version` does not have."""
    api = read_api(version)
    return [
        f"line {line}: {owner}.{name}"
        for line, owner, name in used(source)
        if name not in api.get(owner, [])
    ]


def users():
    """Files of the runtime that import TensorRT or CUDA."""
    pattern = re.compile(r"^\s*(import|from) (tensorrt|cuda)\b", re.MULTILINE)
    return [
        path
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        if pattern.search(path.read_text())
    ]


def test_the_files_that_use_them_are_found():
    assert [path.name for path in users()] == ["cuda.py", "trt_engine.py"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", users(), ids=lambda path: path.name)
def test_every_name_that_the_runtime_uses_is_in_the_bindings(path, version):
    assert missing(path.read_text(), version) == []


@pytest.mark.parametrize(
    ("source", "lacking"),
    [
        ("trt.Builder(log)", ""),
        ("trt.Bilder(log)", "10.3 10.16 11.4"),
        ("config.set_flag(trt.BuilderFlag.FP16)", "11.4"),
        ("self._engine.device_memory_size", "11.4"),
        ("self._engine.device_memory_size_v2", ""),
        ("builder.build_engine_with_config(network, config)", "10.3"),
        ("self._call('cudaMaloc', 1)", "10.3 10.16 11.4"),
        ("self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice", ""),
        ("self._cudart.cudaMemcpyKind.HostToDevice", "10.3 10.16 11.4"),
    ],
)
def test_a_name_that_a_version_lacks_is_found(source, lacking):
    assert " ".join(version for version in VERSIONS if missing(source, version)) == lacking
