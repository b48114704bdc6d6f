"""INT8 linear layers: modules that compute in torch what a backend computes from the operators they
are exported as.

Weights are signed and symmetric with one scale per output channel. Activations are quantised per
tensor: `Dynamic` at run time, from the tensor's own extremes (ONNX Runtime's
DynamicQuantizeMatMul); `Static` with a scale found by calibration, as QuantizeLinear and
DequantizeLinear around a standard MatMul (TensorRT's explicit quantisation).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .rounding import step


def fake_dynamic(x: Tensor) -> Tensor:
    """`x` as DynamicQuantizeLinear would round it: uint8 over [min, max] with 0 inside, for each
    leading index (the exported vision tower sees one camera at a time)."""
    rest = tuple(range(1, x.ndim))
    low, high = x.amin(rest, keepdim=True).clamp(max=0), x.amax(rest, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale)


def fake_static(x: Tensor, largest: Tensor) -> Tensor:
    """`x` as QuantizeLinear would round it with the scale that makes `largest` [] 127, and zero
    point 0."""
    scale = step(largest)
    return (x / scale).round().clamp(-128, 127) * scale


@dataclass(frozen=True)
class Quantized:
    """What one INT8 layer is made of; float32 but for `outliers`."""

    rounded: Tensor  # whole numbers [out, in]
    scale: Tensor  # [out]
    bias: Tensor | None  # [out]
    largest: Tensor  # [], magnitude of the activation that is quantised
    # [in]: multiplies the activation first, where no layer before it can include the smoothing.
    factor: Tensor | None
    # int64 [n]: channels that are multiplied in float; their factor is 0.
    outliers: Tensor | None
    outlier_weight: Tensor | None  # [n, out]


class Int8Linear(nn.Module):
    """What both kinds share: everything but how the activation is rounded."""

    def __init__(self, parts: Quantized) -> None:
        super().__init__()
        # [in, out], the layout of MatMul
        self.weight = nn.Buffer(parts.rounded.to(torch.int8).T.contiguous())
        self.scale = nn.Buffer(parts.scale.clone())
        self.bias, self.factor, self.outliers, self.outlier_weight = (
            None if value is None else nn.Buffer(value.detach().clone())
            for value in (parts.bias, parts.factor, parts.outliers, parts.outlier_weight)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.dtype)
        out = self.product(x if self.factor is None else x * self.factor)
        if self.outliers is not None and self.outlier_weight is not None:
            out = out + x.index_select(-1, self.outliers) @ self.outlier_weight
        return out

    def product(self, x: Tensor) -> Tensor:
        """INT8 product and bias: [..., in] -> [..., out]."""
        raise NotImplementedError  # Dynamic and Static differ in this alone


class Dynamic(Int8Linear):
    """[1, N, in] -> [1, N, out], float32: activations quantised at run time."""

    def product(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            given = x, self.weight, self.scale, None, self.bias
            shape = (*x.shape[:-1], self.weight.shape[1])
            return torch.onnx.ops.symbolic(
                "com.microsoft::DynamicQuantizeMatMul",
                given,
                {},
                dtype=x.dtype,
                shape=shape,
                version=1,
            )
        out = fake_dynamic(x) @ (self.weight * self.scale)
        return out if self.bias is None else out + self.bias


class Static(Int8Linear):
    """[..., N, in] -> [..., N, out] in the dtype of the scales: activations quantised with one
    calibrated scale.

    The zero points are inputs of the operators because TensorRT takes them for the integer type;
    all are 0.
    """

    def __init__(self, parts: Quantized) -> None:
        super().__init__(parts)
        self.activation = nn.Buffer(step(parts.largest))
        self.zero = nn.Buffer(torch.tensor(0, dtype=torch.int8))
        self.zeros = nn.Buffer(torch.zeros(len(parts.scale), dtype=torch.int8))

    def product(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            q = _standard("QuantizeLinear", (x, self.activation, self.zero), x, torch.int8)
            x = _standard("DequantizeLinear", (q, self.activation, self.zero), x, x.dtype)
            weight = _standard(
                "DequantizeLinear",
                (self.weight, self.scale, self.zeros),
                self.weight,
                self.scale.dtype,
                axis=1,
            )
        else:
            x = fake_static(x, 127 * self.activation)
            weight = self.weight * self.scale
        out = x @ weight
        return out if self.bias is None else out + self.bias


def _standard(
    name: str, inputs: tuple[Tensor, ...], like: Tensor, dtype: torch.dtype, **attributes: int
) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"::{name}", inputs, {**attributes}, dtype=dtype, shape=like.shape
    )
