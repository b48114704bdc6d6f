"""What an ONNX file stores, read without the onnx package: protobuf holds few kinds of things."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Numbers in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.dims and .data_type; then DataType's.
_GRAPH, _INITIALIZER, _DIMS, _DATA_TYPE = 7, 5, 1, 2
_NO_WEIGHTS = (6, 7, 9)  # int32, int64, bool: shapes, indices, masks
_DTYPES = {1: "float32", 2: "int8", 3: "int8", 10: "float16", 16: "bfloat16"}


def stored_weights(path: Path) -> dict[str, int]:
    """dtype -> how many values the matrices of an ONNX file have in it. Signed or not, 8-bit integers are int8."""
    found: Counter[str] = Counter()
    for graph in _values(memoryview(path.read_bytes()), _GRAPH):
        for tensor in _values(graph, _INITIALIZER):
            dims = [*_values(tensor, _DIMS)]
            kind = next(_values(tensor, _DATA_TYPE))
            if len(dims) > 1 and kind not in _NO_WEIGHTS:
                found[_DTYPES.get(kind, f"ONNX type {kind}")] += math.prod(dims)
    return dict(found)


def _values(message: memoryview, wanted: int) -> Iterator[Any]:
    """Every value of one field: an integer, or the bytes of a message or string."""
    at = 0
    while at < len(message):
        key, at = _integer(message, at)
        value: int | memoryview
        if key & 7 == 0:
            value, at = _integer(message, at)
        else:
            size, at = _integer(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        if key >> 3 == wanted:
            yield value


def _integer(message: memoryview, at: int) -> tuple[int, int]:
    """A varint: seven bits a byte, lowest first, the eighth says that more follow. -> (the integer, where it ends)"""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at
