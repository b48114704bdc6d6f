"""In which types the written graphs store their weights, and whether the label says so."""

import math
from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto

from ..runtime.bundle.bundle import Bundle
from ..runtime.policy.audit import percents

_NAMES = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "int8"}
_NO_WEIGHTS = (TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)  # shapes, indices, masks


def stored_weights(path: Path) -> Counter[str]:
    """Type -> number of weights that the matrices of an ONNX file store in it.

    8-bit integers are int8, signed or not.
    """
    found = Counter[str]()
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type not in _NO_WEIGHTS:
            name = TensorProto.DataType.Name(tensor.data_type).lower()
            found[_NAMES.get(tensor.data_type, name)] += math.prod(tensor.dims)
    return found


def stored_contradictions(bundle: Bundle) -> list[str]:
    """What the stored weights say against the bundle's label; empty where nothing does."""
    m = bundle.manifest
    weights = stored_weights(bundle.path(m.prefix.file)) + stored_weights(
        bundle.path(m.expert.file)
    )
    claimed = m.int8.weights if m.int8 is not None else 0
    true = {
        "fp32": weights["float32"] == weights.total(),
        "fp16": 2 * weights["float16"] >= weights.total(),
        "int8": weights["int8"] == claimed > 0,
    }
    if true[m.precision]:
        return []
    return [f"labelled {m.precision}, but stored are {percents(weights)} of the weights"]
