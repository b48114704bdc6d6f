"""Which Linears of the two views may become INT8, what they read, and in which group they are measured.

Left in float: the action-side Linears and state_proj (small, and their error goes straight into the actions), the
cross layers' k_proj and v_proj (small, and their output is the cache), the patch embedding.
"""

from torch import nn

from ..quantize.smoothing import Site
from .expert import Expert, ExpertLayer
from .prefix import Prefix, PrefixLayer

PREFIX_GROUPS = (
    "vision early",
    "vision late",
    "connector",
    "language q/k/v",
    "language early",
    "language late",
)
EXPERT_GROUPS = ("expert attention", "expert MLP")


def sites(view: Prefix | Expert) -> list[Site]:
    """Every site of a view, in the order in which it runs."""
    if isinstance(view, Expert):
        return [site for i, layer in enumerate(view.layers) for site in _expert_layer(f"layers.{i}", layer)]
    found = []
    for i in range(n := len(view.vision_model.layers)):
        found += _vision_layer(f"vision_model.layers.{i}", "vision early" if 2 * i < n else "vision late")
    found.append(Site("connector", ("connector.proj",), None))
    for i, layer in enumerate(view.layers):
        found += _language_layer(
            f"layers.{i}", layer, "language early" if 2 * i < len(view.layers) else "language late"
        )
    return found


def _vision_layer(at: str, group: str) -> list[Site]:
    qkv = tuple(f"{at}.self_attn.{n}_proj" for n in "qkv")
    return [
        Site(group, qkv, f"{at}.layer_norm1"),
        Site(group, (f"{at}.self_attn.out_proj",), f"{at}.self_attn.v_proj"),
        Site(group, (f"{at}.mlp.fc1",), f"{at}.layer_norm2"),
        Site(group, (f"{at}.mlp.fc2",), None),  # behind GELU, which no scale passes
    ]


def _language_layer(at: str, layer: nn.Module, group: str) -> list[Site]:
    assert isinstance(layer, PrefixLayer)
    qkv = [f"{at}.{n}_proj" for n in ("kv" if layer.last else "qkv")]
    first = Site("language q/k/v", tuple(qkv), f"{at}.input_layernorm")
    # v_proj cannot take o_proj's scale over: its output is the cache.
    return [first] if layer.last else [first, Site(group, (f"{at}.o_proj",), None), *_mlp(at, group)]


def _expert_layer(at: str, layer: nn.Module) -> list[Site]:
    assert isinstance(layer, ExpertLayer)
    qkv = tuple(f"{at}.{n}_proj" for n in ("qkv" if layer.is_self else "q"))
    attention = "expert attention"
    return [
        Site(attention, qkv, f"{at}.input_layernorm"),
        Site(attention, (f"{at}.o_proj",), None),
        *_mlp(at, "expert MLP"),
    ]


def _mlp(at: str, group: str) -> list[Site]:
    return [
        Site(group, (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), f"{at}.post_attention_layernorm"),
        Site(group, (f"{at}.mlp.down_proj",), f"{at}.mlp.up_proj"),
    ]
