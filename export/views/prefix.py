"""The prefix view: images, instruction and state -> KV cache. Runs once per chunk.

Letters: B cameras, T language tokens, P prefix tokens, K KV heads, D head dim, W width.

The sequence is cameras, language, state. Rows that LeRobot always masks are not computed: empty
cameras and the padding of `prefix_length` have no row here. Valid language tokens come first (right
padding), so every position is a constant, except the state's: the number of valid tokens before it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..checkpoint.architecture import Architecture
from .layers import (
    GatedMLP,
    Linear,
    Recipe,
    RMSNorm,
    attention,
    exported,
    heads,
    masked,
    rope_tables,
    rotate,
)
from .vision import Connector, VisionModel


class PrefixLayer(nn.Module):
    """One language layer. `last`: only its keys and values are wanted, so nothing else is built."""

    def __init__(self, arch: Architecture, recipe: Recipe, *, last: bool) -> None:
        super().__init__()
        self.recipe, self.head_dim, self.last = recipe, arch.head_dim, last
        width, q_width, kv_width = arch.text.hidden_size, arch.q_width, arch.kv_width
        self.input_layernorm = RMSNorm(width, arch.text.rms_norm_eps, recipe.stream)
        self.k_proj = Linear(width, kv_width, bias=False, dtype=recipe.matmul)
        self.v_proj = Linear(width, kv_width, bias=False, dtype=recipe.matmul)
        if not last:
            self.q_proj = Linear(width, q_width, bias=False, dtype=recipe.matmul)
            self.o_proj = Linear(q_width, width, bias=False, dtype=recipe.matmul)
            self.post_attention_layernorm = RMSNorm(width, arch.text.rms_norm_eps, recipe.stream)
            self.mlp = GatedMLP(width, arch.text.intermediate_size, recipe)

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [1, P, W] -> x, keys after RoPE and values, both [1, K, P, D]."""
        normed = self.input_layernorm(x).to(self.recipe.matmul)
        k = rotate(heads(self.k_proj(normed), self.head_dim), cos, sin, self.recipe).to(
            self.recipe.matmul
        )
        v = heads(self.v_proj(normed), self.head_dim)
        if self.last:
            return x, k, v
        q = rotate(heads(self.q_proj(normed), self.head_dim), cos, sin, self.recipe)
        x = x + self.o_proj(attention(q, k, v, mask, self.recipe)).to(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype), k, v


class CrossProjection(nn.Module):
    """The expert's k_proj and v_proj of one cross layer: no denoise step changes their output."""

    def __init__(self, arch: Architecture, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.head_dim = recipe, arch.head_dim
        kv_width = arch.kv_width
        self.k_proj = Linear(kv_width, kv_width, bias=False, dtype=recipe.matmul)
        self.v_proj = Linear(kv_width, kv_width, bias=False, dtype=recipe.matmul)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Two [1, K, P, D] of the VLM -> two of the expert."""
        flat_k, flat_v = (t.transpose(1, 2).flatten(2) for t in (k, v))
        return heads(self.k_proj(flat_k), self.head_dim), heads(self.v_proj(flat_v), self.head_dim)


class Prefix(nn.Module):
    """Inputs: images float32 [B, 3, S, S] in [-1, 1], tokens int32 [1, T], token_mask bool [1, T]
    (valid tokens first), state float32 [1, max_state_dim], normalised.

    Outputs: prefix_mask bool [1, P], then key.i and value.i [1, K, P, D].
    """

    def __init__(self, arch: Architecture, recipe: Recipe) -> None:
        super().__init__()
        self.arch, self.recipe = arch, recipe
        self.scale = arch.text.hidden_size**0.5  # of every embedding
        self.shared = arch.q_width // arch.kv_width  # query heads to a KV head
        self.vision_model = VisionModel(arch, recipe)
        self.connector = Connector(arch, recipe)
        self.embed_tokens = nn.Parameter(
            torch.empty(arch.text.vocab_size, arch.text.hidden_size, dtype=recipe.table)
        )
        self.state_proj = Linear(
            arch.config.max_state_dim, arch.text.hidden_size, bias=True, dtype=recipe.stream
        )
        self.layers = nn.ModuleList(
            PrefixLayer(arch, recipe, last=i == arch.layers - 1) for i in range(arch.layers)
        )
        self.cross = nn.ModuleDict(
            {
                str(i): CrossProjection(arch, recipe)
                for i in range(arch.layers)
                if not arch.is_self(i)
            }
        )
        self.cos, self.sin = rope_tables(arch.prefix_tokens, arch.head_dim)
        # Images and language do not see the state, which is the last column; the state sees all.
        state_hidden = torch.zeros(arch.prefix_tokens, arch.prefix_tokens, dtype=recipe.stream)
        state_hidden[:-1, -1] = masked(recipe.stream)
        self.state_hidden = nn.Buffer(state_hidden, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embed_tokens).to(self.recipe.stream)

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, image tokens, W], before the sqrt(W) scale."""
        if exported(self.recipe):  # one camera at a time stays in a CPU's caches
            return torch.cat(
                [self.connector(self.vision_model(image)) for image in torch.split(images, 1)]
            )
        return self.connector(self.vision_model(images))

    def image_tokens(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [1, rows of all camera slots, W], scaled embeddings.

        Each image is between the special tokens where the checkpoint has them. An empty camera has
        only its special tokens: its image is masked.
        """
        arch = self.arch
        embeds = self.embed_images(images) * self.scale
        if not arch.image_special_tokens:
            return embeds.reshape(1, -1, embeds.shape[-1])
        special = self.embed(torch.tensor(arch.image_special_tokens, dtype=torch.int32))[None]
        parts: list[Tensor] = []
        for slot in range(arch.cameras + arch.config.empty_cameras):
            image = [embeds[slot : slot + 1]] if slot < arch.cameras else []
            parts += [special[:, :2], *image, special[:, 2:]]
        return torch.cat(parts, dim=1)

    def forward(
        self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, ...]:
        arch, stream = self.arch, self.recipe.stream
        image = self.image_tokens(images)
        language = self.embed(tokens) * self.scale
        x = torch.cat((image, language, self.state_proj(state)[:, None]), dim=1)  # [1, P, W]

        always = torch.ones(1, image.shape[1], dtype=torch.bool)
        prefix_mask = torch.cat((always, token_mask, always[:, :1]), dim=1)  # [1, P]
        hidden = torch.where(prefix_mask, 0.0, masked(stream)).to(stream)
        mask = (self.state_hidden + hidden).repeat(self.shared, 1)  # [G * P, P]

        # [1]
        state_position = image.shape[1] + token_mask.to(torch.int32).sum(1, dtype=torch.int32)
        cos = torch.cat((self.cos[:-1], self.cos.index_select(0, state_position)))  # [P, D/2]
        sin = torch.cat((self.sin[:-1], self.sin.index_select(0, state_position)))

        cache: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, mask, cos, sin)
            cache += [k, v] if arch.is_self(i) else self.cross[str(i)](k, v)
        return prefix_mask, *(t.to(self.recipe.matmul) for t in cache)
