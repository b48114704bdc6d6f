"""The checkpoint's tensors under the views' names.

Every parameter of a view comes from one LeRobot key. Keys that are missing, have another shape or
would be ignored are reported by name, all at once.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError
from ..checkpoint.architecture import Architecture
from .expert import Expert
from .layers import Recipe, join_views, pin
from .prefix import Prefix

VLM = "model.vlm_with_expert.vlm.model."
EXPERT = "model.vlm_with_expert.lm_expert."
TIME_MLP_IN = "model.action_time_mlp_in.weight"
# Which half of the columns of action_time_mlp_in each tensor of the expert view is.
_HALVES = {
    "time_mlp_actions.weight": 0,
    "time_mlp_time.weight": 1,
}
_FLOAT16_MAX = torch.finfo(torch.float16).max

_ATTENTION = r"(q_proj|k_proj|v_proj|o_proj)"
_PREFIX_KEYS = (  # view name -> LeRobot key, first match wins
    (r"^vision_model\.patch_embedding\.", VLM + "vision_model.embeddings.patch_embedding."),
    (
        r"^vision_model\.position_embedding$",
        VLM + "vision_model.embeddings.position_embedding.weight",
    ),
    (r"^vision_model\.layers\.", VLM + "vision_model.encoder.layers."),
    (r"^vision_model\.", VLM + "vision_model."),
    (r"^connector\.", VLM + "connector.modality_projection."),
    (r"^embed_tokens$", VLM + "text_model.embed_tokens.weight"),
    (r"^state_proj\.", "model.state_proj."),
    (rf"^layers\.(\d+)\.{_ATTENTION}\.", VLM + r"text_model.layers.\1.self_attn.\2."),
    (r"^layers\.", VLM + "text_model.layers."),
    (r"^cross\.(\d+)\.", EXPERT + r"layers.\1.self_attn."),
)
_EXPERT_KEYS = (
    (r"^time_mlp_(actions|time)\.weight$", TIME_MLP_IN),
    (r"^time_mlp_actions\.bias$", "model.action_time_mlp_in.bias"),
    (r"^(action_\w+)\.", r"model.\1."),
    (rf"^layers\.(\d+)\.{_ATTENTION}\.", EXPERT + r"layers.\1.self_attn.\2."),
    (r"^", EXPERT),
)
# Weights that inference never reads: LeRobot keeps them, the views do not have them.
_UNUSED = re.compile(
    r"lm_head\.|text_model\.norm\.|lm_expert\.embed_tokens\."
    r"|^(un)?normalize_(inputs|targets|outputs)\.|rotary_emb\.inv_freq$|embeddings\.position_ids$"
)


def source_key(view: nn.Module, name: str) -> str:
    """The LeRobot key of a view's parameter."""
    for pattern, replacement in _PREFIX_KEYS if isinstance(view, Prefix) else _EXPERT_KEYS:
        key, hits = re.subn(pattern, replacement, name)
        if hits:
            return key
    raise AssertionError(f"no LeRobot key for {name}")


def build_views(
    arch: Architecture, tensors: Mapping[str, Tensor], recipe: Recipe, pinned: Collection[str] = ()
) -> tuple[Prefix, Expert]:
    """The two views with the checkpoint's weights, in eval mode.

    pinned: stages that stay in the stream's dtype, as `prefix.<module>` or `expert.<module>`.
    Raises CheckpointError that lists every missing key, wrong shape, non-finite tensor and
    unknown key.
    """
    prefix, expert = Prefix(arch, recipe), Expert(arch, recipe)
    views = join_views(prefix, expert).requires_grad_(False).eval()
    pin(views, pinned)
    problems: dict[str, str] = {}  # by LeRobot key
    expected = set()
    for view in (prefix, expert):
        for name, parameter in view.named_parameters():
            key = source_key(view, name)
            expected.add(key)
            half = _HALVES.get(name)
            rows, *columns = parameter.shape
            shape = (rows, *columns) if half is None else (rows, 2 * columns[0])
            if key not in tensors:
                problems[key] = f"missing {key} {shape}"
                continue
            tensor = tensors[key]
            if tuple(tensor.shape) != shape:
                problems[key] = f"{key} is {tuple(tensor.shape)}, the configs say {shape}"
            elif not torch.isfinite(tensor).all():
                problems[key] = f"{key} holds NaN or Inf"
            elif recipe.matmul == torch.float16 and (tensor.abs() > _FLOAT16_MAX).any():
                largest = tensor.abs().max()
                problems[key] = f"{key} reaches {largest:.0f}, beyond float16: use --precision fp32"
            else:
                parameter.copy_(tensor if half is None else tensor.chunk(2, dim=1)[half])
    # Of the last layer, only its keys and values are used.
    last = f"text_model.layers.{arch.layers - 1}."
    for key in sorted(tensors.keys() - expected):
        if not _UNUSED.search(key) and last not in key:
            problems[key] = f"unknown weight {key}, which no part of SmolVLA reads"
    if problems:
        shown = "\n  ".join(list(problems.values())[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"the weights do not fit the configs:\n  {shown}{more}")
    return prefix, expert
