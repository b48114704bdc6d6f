"""camera.onnx: a raw frame of any size -> its slice of the prefix's images, on devices that take frames as they are.

Resizing is two weighted gathers whose indices and weights are inputs (runtime/preprocessing.py, `resampling`), so one
graph serves every camera, and padding is a weight of zero.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .graph import IR_VERSION, OPSET


def write_camera_graph(path: Path, size: int) -> None:
    """frame uint8 [height, width, 3], rows and columns int32 [2, size], their weights float32 [2, size, 1, 1] and
    [1, 2, size, 1] -> image float32 [1, 3, size, size] in [-1, 1], -1 where the weights are 0."""

    def constant(name: str, values: float | list[int], dtype: type) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, dtype), name)

    def tensor(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    u8, i32, f32 = TensorProto.UINT8, TensorProto.INT32, TensorProto.FLOAT
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Cast", ["frame"], "bytes", {"to": f32}),
        ("Mul", ["bytes", "scale"], "pixels", {}),  # [height, width, 3] in [0, 1]
        ("Gather", ["pixels", "rows"], "row_pairs", {"axis": 0}),  # [2, size, width, 3]
        ("Mul", ["row_pairs", "row_weights"], "weighted_rows", {}),
        ("ReduceSum", ["weighted_rows", "first"], "tall", {"keepdims": 0}),  # [size, width, 3]
        ("Gather", ["tall", "columns"], "column_pairs", {"axis": 1}),  # [size, 2, size, 3]
        ("Mul", ["column_pairs", "column_weights"], "weighted_columns", {}),
        ("ReduceSum", ["weighted_columns", "second"], "square", {"keepdims": 0}),  # [size, size, 3]
        ("Transpose", ["square"], "planes", {"perm": [2, 0, 1]}),
        ("Mul", ["planes", "two"], "doubled", {}),
        ("Sub", ["doubled", "one"], "centred", {}),
        ("Unsqueeze", ["centred", "first"], "image", {}),
    ]
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs, [output], name=output, **attributes)
            for op, inputs, output, attributes in nodes
        ],
        "camera",
        [
            tensor("frame", u8, "height", "width", 3),
            tensor("rows", i32, 2, size),
            tensor("row_weights", f32, 2, size, 1, 1),
            tensor("columns", i32, 2, size),
            tensor("column_weights", f32, 1, 2, size, 1),
        ],
        [tensor("image", f32, 1, 3, size, size)],
        [
            constant("scale", 1 / 255, np.float32),
            constant("two", 2, np.float32),
            constant("one", 1, np.float32),
            constant("first", [0], np.int64),
            constant("second", [1], np.int64),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
