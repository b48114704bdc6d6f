"""The layers both views are made of: linear, norms, gated MLP, RoPE, attention.

Letters: B cameras or batch, N query tokens, M key tokens, H query heads, G query heads per KV head,
D head dim, W width.

Precision is a property of each layer. `Recipe.matmul` is the dtype of weights and of the operands
of matrix products. `Recipe.stream` is that of the residual stream, the norms and the softmax. A
float16 export uses float16 for the first and float32 for the second: trained SmolVLA activations
reach 1600, their squares overflow float16, and a norm that squares in float16 makes the token zero
without a NaN.

The target is a property of each layer too. With `Recipe.ort` a layer is exported as ONNX Runtime's
own operator where that measures faster on a CPU (docs/log.md). In torch both are the same formula.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

ROPE_BASE = 10_000.0  # LeRobot's apply_rope; the VLM's own rope_theta is not used


@dataclass(frozen=True)
class Recipe:
    """How a view computes: its dtypes, and whether ONNX Runtime's own operators are in its graph.

    `table` is the dtype in which the token embeddings are stored.
    """

    matmul: torch.dtype
    stream: torch.dtype
    table: torch.dtype
    ort: bool = False


FP32 = Recipe(torch.float32, torch.float32, torch.float32)
FP16 = Recipe(torch.float16, torch.float32, torch.float16)


def masked(dtype: torch.dtype) -> float:
    """The additive mask: finite, so that a row which is masked as a whole never becomes a NaN."""
    return max(-1e9, torch.finfo(dtype).min / 4)


def join_views(prefix: nn.Module, expert: nn.Module) -> nn.ModuleDict:
    """The two views as one module, whose paths begin with `prefix.` or `expert.`."""
    return nn.ModuleDict({"prefix": prefix, "expert": expert})


def pin(view: nn.Module, stages: Iterable[str]) -> None:
    """Let the modules at these paths of `view` compute in the stream's dtype.

    Raises KeyError for a path that is no stage.
    """
    modules = dict(view.named_modules())
    for name in stages:
        modules[name].to(modules[name].recipe.stream)
        for part in modules[name].modules():
            if hasattr(part, "recipe"):
                part.recipe = replace(part.recipe, matmul=part.recipe.stream)


def stages(view: nn.Module) -> set[str]:
    """Paths of the modules that `pin` takes: all that have a recipe, except the view itself."""
    return {name for name, module in view.named_modules() if name and hasattr(module, "recipe")}


def ort_operator(name: str, inputs: tuple[Tensor, ...], like: Tensor, **attributes: Any) -> Tensor:
    """A node of ONNX Runtime's own domain whose output has the shape and dtype of `like`."""
    return torch.onnx.ops.symbolic(
        f"com.microsoft::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )


def exported(recipe: Recipe) -> bool:
    """Whether this call is traced into a graph that may hold ONNX Runtime's own operators."""
    return recipe.ort and torch.compiler.is_exporting()


class Linear(nn.Linear):
    """`x @ weight.T + bias` in the weight's dtype, or in `compute` where the sum is long."""

    compute: torch.dtype | None = None

    def reset_parameters(self) -> None:
        """Nothing is drawn: the weights come from a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute or self.weight.dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in the stream's dtype.

    ONNX Runtime and TensorRT fuse this form.
    """

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.eps) * self.weight


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the Llama MLP."""

    def __init__(self, width: int, intermediate: int, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.gate_proj = Linear(width, intermediate, bias=False, dtype=recipe.matmul)
        self.up_proj = Linear(width, intermediate, bias=False, dtype=recipe.matmul)
        self.down_proj = Linear(intermediate, width, bias=False, dtype=recipe.matmul)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.recipe.matmul)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_tables(positions: int, head_dim: int) -> tuple[nn.Buffer, nn.Buffer]:
    """Cosine and sine of every position, as LeRobot computes them: two float32 [positions, D/2].

    They are buffers of a view, not weights.
    """
    exponent = (2.0 / head_dim) * torch.arange(head_dim // 2, dtype=torch.float32)
    radians = torch.arange(positions, dtype=torch.float32)[:, None] / ROPE_BASE**exponent
    return nn.Buffer(radians.cos(), persistent=False), nn.Buffer(radians.sin(), persistent=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, recipe: Recipe) -> Tensor:
    """RoPE on [B, H, N, D] with tables [N, D/2]: half-split layout, always in float32."""
    x = x.float()
    if exported(recipe):
        rows = torch.arange(x.shape[-2], dtype=torch.int64)[None]
        return ort_operator("RotaryEmbedding", (x, rows, cos, sin), x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.reshape(x.shape[0], x.shape[1], -1, head_dim).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, recipe: Recipe) -> Tensor:
    """Attention with grouped KV heads; -> [B, N, H * D] in the matmul dtype.

    q: [B, H, N, D]; k, v: [B, H / G, M, D]; mask: additive, broadcastable to [G * N, M], or None.
    The G query heads of one KV head are stacked as rows, so keys and values are never repeated.
    The scale is applied to the query: it is the smaller tensor, and scores stay small in float16.
    """
    batch, n_heads, n, d = q.shape
    kv_heads = k.shape[1]
    q = (
        (q.to(recipe.stream) * d**-0.5)
        .to(recipe.matmul)
        .reshape(batch, kv_heads, n_heads // kv_heads * n, d)
    )
    scores = (q @ k.to(recipe.matmul).transpose(2, 3)).to(recipe.stream)
    if mask is not None:
        scores = scores + mask
    out = scores.softmax(-1).to(recipe.matmul) @ v.to(recipe.matmul)
    return out.reshape(batch, n_heads, n, d).transpose(1, 2).reshape(batch, n, n_heads * d)
