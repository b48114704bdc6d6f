"""The checkpoint's tensors under the views' names.

Every parameter of a view knows the one LeRobot key it comes from; what is missing, has another shape or would be
ignored is reported by name, all at once.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .errors import CheckpointError
from .expert import Expert
from .layers import Recipe, both, pin
from .prefix import Prefix

VLM = "model.vlm_with_expert.vlm.model."
EXPERT = "model.vlm_with_expert.lm_expert."
TIME_MLP_IN = "model.action_time_mlp_in.weight"

_ATTENTION = r"(q_proj|k_proj|v_proj|o_proj)"
_PREFIX_KEYS = (  # view name -> LeRobot key, first match wins
    (r"^vision_model\.patch_embedding\.", VLM + "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.position_embedding$", VLM + "vision_model.embeddings.position_embedding.weight"),
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
    r"lm_head\.|text_model\.norm\.|lm_expert\.embed_tokens\.|^(un)?normalize_(inputs|targets|outputs)\."
    r"|rotary_emb\.inv_freq$|embeddings\.position_ids$"
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
    """The two views with the checkpoint's weights, in eval mode. pinned: stages that stay in the stream's dtype,
    as `prefix.<module>` or `expert.<module>`.

    Raises CheckpointError that lists every missing key, wrong shape, non-finite tensor and unknown key.
    """
    with torch.device("meta"):
        shapes = [Prefix(arch, recipe), Expert(arch, recipe)]
    expected = {
        source_key(view, name): _source_shape(name, p) for view in shapes for name, p in view.named_parameters()
    }
    problems = [f"missing {key} {shape}" for key, shape in expected.items() if key not in tensors]
    for key, shape in expected.items():
        if key not in tensors:
            continue
        if tuple(tensors[key].shape) != shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)}, the configs say {shape}")
        elif not torch.isfinite(tensors[key]).all():
            problems.append(f"{key} holds NaN or Inf")
        elif recipe.matmul == torch.float16 and tensors[key].abs().max() > torch.finfo(torch.float16).max:
            problems.append(f"{key} reaches {tensors[key].abs().max():.0f}, beyond float16: use --precision fp32")
    last = f"text_model.layers.{arch.layers - 1}."  # beyond its keys and values, nothing reads the last layer
    problems += [
        f"unknown weight {key}, which no part of SmolVLA reads"
        for key in tensors
        if key not in expected and not _UNUSED.search(key) and last not in key
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"the weights do not fit the configs:\n  {shown}{more}")
    prefix, expert = Prefix(arch, recipe), Expert(arch, recipe)
    pin(both(prefix, expert), pinned)
    with torch.no_grad():
        for view in (prefix, expert):
            for name, parameter in view.named_parameters():
                source = tensors[source_key(view, name)]
                if name == "time_mlp_actions.weight":
                    source = source[:, : arch.expert_width]
                elif name == "time_mlp_time.weight":
                    source = source[:, arch.expert_width :]
                parameter.copy_(source)
                parameter.requires_grad_(False)
            view.eval()
    return prefix, expert


def _source_shape(name: str, parameter: Tensor) -> tuple[int, ...]:
    rows, *columns = parameter.shape
    return (rows, 2 * columns[0]) if name in ("time_mlp_actions.weight", "time_mlp_time.weight") else (rows, *columns)
