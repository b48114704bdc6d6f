"""The expert view: one denoise step of the action chunk against the prefix's KV cache.

Letters: C chunk length, A max action dim, P prefix tokens, K KV heads, D head dim, E expert width.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..checkpoint.architecture import Architecture
from .layers import GatedMLP, Linear, Recipe, RMSNorm, attention, heads, masked, rope_tables, rotate


class ExpertLayer(nn.Module):
    """One expert layer. A self layer sees the prefix and the earlier actions.

    A cross layer sees the prefix only.
    """

    def __init__(self, arch: Architecture, recipe: Recipe, *, is_self: bool) -> None:
        super().__init__()
        self.recipe, self.head_dim, self.is_self = recipe, arch.head_dim, is_self
        width, q_width = arch.expert_width, arch.q_width
        self.input_layernorm = RMSNorm(width, arch.text.rms_norm_eps, recipe.stream)
        self.q_proj = Linear(width, q_width, bias=False, dtype=recipe.matmul)
        if is_self:
            self.k_proj = Linear(width, arch.kv_width, bias=False, dtype=recipe.matmul)
            self.v_proj = Linear(width, arch.kv_width, bias=False, dtype=recipe.matmul)
        self.o_proj = Linear(q_width, width, bias=False, dtype=recipe.matmul)
        self.post_attention_layernorm = RMSNorm(width, arch.text.rms_norm_eps, recipe.stream)
        self.mlp = GatedMLP(width, arch.expert_intermediate, recipe)

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """x: [1, C, E]; k, v: [1, K, P, D]; mask: additive over P (cross) or P + C (self) keys."""
        normed = self.input_layernorm(x).to(self.recipe.matmul)
        q = rotate(heads(self.q_proj(normed), self.head_dim), cos, sin, self.recipe)
        if self.is_self:
            own_k = rotate(heads(self.k_proj(normed), self.head_dim), cos, sin, self.recipe).to(
                self.recipe.matmul
            )
            k = torch.cat((k.to(own_k.dtype), own_k), dim=2)
            v = torch.cat((v.to(own_k.dtype), heads(self.v_proj(normed), self.head_dim)), dim=2)
        x = x + self.o_proj(attention(q, k, v, mask, self.recipe)).to(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)


class Expert(nn.Module):
    """One Euler step, with real-time chunking's guidance in closed form.

    noisy_actions float32 [1, C, A]; time_embedding float32 [1, E]; time, dt, guidance float32 [1];
    prev_chunk float32 [1, C, A]; prev_weights float32 [1, C, 1]; prefix_mask bool [1, P];
    key.i, value.i [1, K, P, D] -> velocity, next_actions float32 [1, C, A].

    The guidance is LeRobot's: its correction is the error itself, because LeRobot computes the
    velocity before it enables gradients (lerobot 0.4.4, policies/rtc/modeling_rtc.py). With
    prev_weights of 0 there is no guidance.
    """

    def __init__(self, arch: Architecture, recipe: Recipe) -> None:
        super().__init__()
        self.arch, self.recipe = arch, recipe
        width = arch.expert_width
        self.shared = arch.q_width // arch.kv_width  # query heads to a KV head
        # Small, and their error goes straight into the actions: float32 in every precision.
        self.action_in_proj = Linear(
            arch.config.max_action_dim, width, bias=True, dtype=recipe.stream
        )
        self.time_mlp_actions = Linear(width, width, bias=True, dtype=recipe.stream)
        self.time_mlp_time = Linear(width, width, bias=False, dtype=recipe.stream)
        self.action_time_mlp_out = Linear(width, width, bias=True, dtype=recipe.stream)
        self.action_out_proj = Linear(
            width, arch.config.max_action_dim, bias=True, dtype=recipe.stream
        )
        self.layers = nn.ModuleList(
            ExpertLayer(arch, recipe, is_self=arch.is_self(i)) for i in range(arch.layers)
        )
        self.norm = RMSNorm(width, arch.text.rms_norm_eps, recipe.stream)
        chunk = arch.config.chunk_size
        self.cos, self.sin = rope_tables(arch.prefix_tokens + chunk, arch.head_dim)
        later = torch.full((chunk, chunk), masked(recipe.stream), dtype=recipe.stream).triu(1)
        self.later_hidden = nn.Buffer(later, persistent=False)

    def forward(
        self,
        noisy_actions: Tensor,
        time_embedding: Tensor,
        time: Tensor,
        dt: Tensor,
        prev_chunk: Tensor,
        prev_weights: Tensor,
        guidance: Tensor,
        prefix_mask: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        arch, chunk = self.arch, self.arch.config.chunk_size
        # concat(actions, time) @ W + b, with W cut in two: the time half is one row, not C rows.
        mixed = self.time_mlp_actions(self.action_in_proj(noisy_actions)) + self.time_mlp_time(
            time_embedding
        )
        x = self.action_time_mlp_out(F.silu(mixed))  # [1, C, E]

        # [1, P]
        hidden = torch.where(prefix_mask, 0.0, masked(self.recipe.stream)).to(self.recipe.stream)
        self_mask = torch.cat((hidden.expand(chunk, -1), self.later_hidden), dim=1)
        self_mask = self_mask.repeat(self.shared, 1)  # [G * C, P + C]

        # In self layers the actions follow the valid prefix. In cross layers they start at 0.
        positions = prefix_mask.to(torch.int32).sum(1, dtype=torch.int32) + torch.arange(
            chunk, dtype=torch.int32
        )
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        for i, layer in enumerate(self.layers):
            k, v = cache[2 * i], cache[2 * i + 1]
            if arch.is_self(i):
                x = layer(x, k, v, self_mask, cos, sin)
            else:
                x = layer(x, k, v, hidden, self.cos[:chunk], self.sin[:chunk])
        velocity = self.action_out_proj(self.norm(x))  # [1, C, A]
        error = (prev_chunk - (noisy_actions - time * velocity)) * prev_weights
        velocity = velocity - guidance * error
        return velocity, noisy_actions + dt * velocity
