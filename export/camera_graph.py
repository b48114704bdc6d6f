"""camera.onnx: a raw frame of any size -> its slice of the prefix's images, on the device.

Resizing is two weighted gathers. Their indices and weights are inputs (`resampling` in
runtime/engines/resizing.py), so one graph serves every camera, and padding is a weight of zero.
"""

from pathlib import Path

import onnx

from .graph import IR_VERSION, OPSET

# ONNX's own text form; onnx.parser reads it.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
camera (
    uint8[height, width, 3] frame,
    int32[2, {size}] rows, float[2, {size}, 1, 1] row_weights,
    int32[2, {size}] columns, float[1, 2, {size}, 1] column_weights
) => (float[1, 3, {size}, {size}] image)
<float scale = {{{scale}}}, float two = {{2}}, float one = {{1}}, int64[1] first = {{0}}, int64[1] second = {{1}}>
{{
    bytes = Cast <to = 1> (frame)
    pixels = Mul (bytes, scale)  # [height, width, 3] in [0, 1]
    row_pairs = Gather <axis = 0> (pixels, rows)  # [2, size, width, 3]
    weighted_rows = Mul (row_pairs, row_weights)
    tall = ReduceSum <keepdims = 0> (weighted_rows, first)  # [size, width, 3]
    column_pairs = Gather <axis = 1> (tall, columns)  # [size, 2, size, 3]
    weighted_columns = Mul (column_pairs, column_weights)
    square = ReduceSum <keepdims = 0> (weighted_columns, second)  # [size, size, 3]
    planes = Transpose <perm = [2, 0, 1]> (square)
    doubled = Mul (planes, two)
    centred = Sub (doubled, one)
    image = Unsqueeze (centred, first)
}}
"""


def write_camera_graph(path: Path, size: int) -> None:
    """Write the graph.

    Inputs: frame uint8 [height, width, 3], rows and columns int32 [2, size], their weights float32
    [2, size, 1, 1] and [1, 2, size, 1].
    Output: image float32 [1, 3, size, size] in [-1, 1], -1 where the weights are 0.
    """
    text = _GRAPH.format(ir_version=IR_VERSION, opset=OPSET, size=size, scale=1 / 255)
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
