"""SigLIP and the connector: images -> image tokens of the language model's width.

Letters: B cameras, S image size, P patch size, N = (S / P)^2 patches, W vision width.
config: transformers' SmolVLMVisionConfig.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..checkpoint.architecture import Architecture
from .layers import Linear, Recipe, attention, exported, heads, ort_operator


class PatchEmbedding(nn.Module):
    """Non-overlapping patches times one matrix; equal to the checkpoint's strided convolution."""

    def __init__(self, config: Any, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.patch = recipe, config.patch_size
        self.weight = nn.Parameter(
            torch.empty(config.hidden_size, 3, self.patch, self.patch, dtype=recipe.matmul)
        )
        self.bias = nn.Parameter(torch.empty(config.hidden_size, dtype=recipe.matmul))

    def forward(self, images: Tensor) -> Tensor:
        b, _, size, _ = images.shape
        side = size // self.patch
        patches = images.to(self.weight.dtype).reshape(b, 3, side, self.patch, side, self.patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, 3 * self.patch**2)
        return F.linear(patches, self.weight.flatten(1), self.bias)  # [B, N, W]


class VisionAttention(nn.Module):
    """Full attention over one image's patches: no mask, so the graph holds no NaN guard."""

    def __init__(self, config: Any, recipe: Recipe) -> None:
        super().__init__()
        width, self.recipe, self.heads = config.hidden_size, recipe, config.num_attention_heads
        self.q_proj = Linear(width, width, bias=True, dtype=recipe.matmul)
        self.k_proj = Linear(width, width, bias=True, dtype=recipe.matmul)
        self.v_proj = Linear(width, width, bias=True, dtype=recipe.matmul)
        self.out_proj = Linear(width, width, bias=True, dtype=recipe.matmul)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.recipe.matmul)
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if exported(self.recipe):  # flash attention, which the CPU provider has in float32 only
            q, k, v = (t.to(self.recipe.stream) for t in (q, k, v))
            return self.out_proj(
                ort_operator("MultiHeadAttention", (q, k, v), q, num_heads=self.heads)
            )
        q, k, v = (heads(t, t.shape[-1] // self.heads) for t in (q, k, v))
        return self.out_proj(attention(q, k, v, None, self.recipe))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), tanh form."""

    def __init__(self, config: Any, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.fc1 = Linear(
            config.hidden_size, config.intermediate_size, bias=True, dtype=recipe.matmul
        )
        self.fc2 = Linear(
            config.intermediate_size, config.hidden_size, bias=True, dtype=recipe.matmul
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if exported(self.recipe):
            return self.fc2(ort_operator("FastGelu", (x,), x))
        return self.fc2(F.gelu(x, approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, config: Any, recipe: Recipe) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(
            config.hidden_size, config.layer_norm_eps, dtype=recipe.stream
        )
        self.self_attn = VisionAttention(config, recipe)
        self.layer_norm2 = nn.LayerNorm(
            config.hidden_size, config.layer_norm_eps, dtype=recipe.stream
        )
        self.mlp = VisionMLP(config, recipe)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x)).to(x.dtype)
        return x + self.mlp(self.layer_norm2(x)).to(x.dtype)


class VisionModel(nn.Module):
    """The vision tower: float32 [B, 3, S, S] in [-1, 1] -> [B, N, W] in the stream's dtype.

    Position ids are 0..N-1, as in training. transformers 4.55 to 4.57 shift them in float32 only
    (huggingface/transformers#41190).
    """

    def __init__(self, arch: Architecture, recipe: Recipe) -> None:
        super().__init__()
        config = arch.vision
        self.patch_embedding = PatchEmbedding(config, recipe)
        self.position_embedding = nn.Parameter(
            torch.empty(arch.patches, config.hidden_size, dtype=recipe.stream)
        )
        self.layers = nn.ModuleList(
            VisionLayer(config, recipe) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(
            config.hidden_size, config.layer_norm_eps, dtype=recipe.stream
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).to(self.position_embedding.dtype) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Connector(nn.Module):
    """Pixel shuffle and a projection: [B, N, W] -> [B, N / K^2, width]. K x K patches become one
    token.

    The sum has 12,288 products, so the stream's dtype holds it. The weight has the matmul dtype.
    """

    def __init__(self, arch: Architecture, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.factor = recipe, arch.vlm.scale_factor
        wide = arch.vision.hidden_size * arch.vlm.scale_factor**2
        self.proj = Linear(wide, arch.text.hidden_size, bias=False, dtype=recipe.matmul)
        self.proj.compute = recipe.stream

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        k, side = self.factor, int(n**0.5)
        x = x.reshape(b, side // k, k, side // k, k * w).transpose(2, 3)
        out: Tensor = self.proj(x.reshape(b, (side // k) ** 2, k * k * w))
        return out
