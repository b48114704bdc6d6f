"""Which Linears of the two views may become INT8, what they read, and their groups.

Left in float: the action-side Linears and state_proj (small, and their error goes straight into the
actions), the cross layers' k_proj and v_proj (small, and their output is the cache), the patch
embedding.
"""

from torch import nn

from ..quantize.int8.sites import Quantizable, Site
from .views.expert import Expert
from .views.layers import join_views
from .views.prefix import Prefix


def quantizable(prefix: Prefix, expert: Expert) -> Quantizable:
    """Both views as one model, with every site; paths as in `join_views`."""
    sites = []
    vision_layers = len(prefix.vision_model.layers)
    for i in range(vision_layers):
        group = "vision early" if 2 * i < vision_layers else "vision late"
        sites += _vision_layer(f"prefix.vision_model.layers.{i}", group)
    sites.append(Site("connector", ("prefix.connector.proj",), None))
    for i, layer in enumerate(prefix.layers):
        group = "language early" if 2 * i < len(prefix.layers) else "language late"
        sites += _layer(f"prefix.layers.{i}", layer, "language q/k/v", group, group)
    for i, layer in enumerate(expert.layers):
        attention = "expert attention"
        sites += _layer(f"expert.layers.{i}", layer, attention, attention, "expert MLP")
    return Quantizable(join_views(prefix, expert), tuple(sites))


def _vision_layer(at: str, group: str) -> list[Site]:
    qkv = tuple(f"{at}.self_attn.{n}_proj" for n in "qkv")
    return [
        Site(group, qkv, f"{at}.layer_norm1"),
        Site(group, (f"{at}.self_attn.out_proj",), f"{at}.self_attn.v_proj"),
        Site(group, (f"{at}.mlp.fc1",), f"{at}.layer_norm2"),
        Site(group, (f"{at}.mlp.fc2",), None),  # after GELU, which no scale passes
    ]


def _layer(at: str, layer: nn.Module, qkv: str, out: str, mlp: str) -> list[Site]:
    """A language or expert layer, by its groups.

    Cross layers have queries only. The last language layer has keys and values only.
    """
    inputs = tuple(f"{at}.{n}_proj" for n in "qkv" if hasattr(layer, f"{n}_proj"))
    first = Site(qkv, inputs, f"{at}.input_layernorm")
    if not hasattr(layer, "o_proj"):
        return [first]
    return [
        first,
        # v_proj cannot take its scale over: v_proj's output is the cache
        Site(out, (f"{at}.o_proj",), None),
        Site(mlp, (f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), f"{at}.post_attention_layernorm"),
        Site(mlp, (f"{at}.mlp.down_proj",), f"{at}.mlp.up_proj"),
    ]
