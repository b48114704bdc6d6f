"""The checkpoint in PyTorch, in a process of its own: a benchmark times it in turns with bundles.

    PYTHON -m smolvla_edge.export.reference_process REQUEST

REQUEST is `ReferenceRequest` as JSON. The first answer says what runs. Then each line on stdin asks
for one chunk, and the answer is its wall seconds, preprocessing included. The observation is that
of the bundle's self-check, with the instruction that fills the bundle's token length, so that both
sides have the same number of tokens. `main` imports torch: the client imports this module too.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..quantize.observations.sample import Sample
from ..runtime import Bundle, SmolVLAError
from ..runtime.policy.preprocessing import Preprocessor
from ..runtime.policy.sampling import schedule
from ..runtime.policy.selfcheck import FILE

ANSWER = "smolvla-bench "  # begins an answer: LeRobot prints lines of its own


@dataclass(frozen=True)
class ReferenceRequest:
    """What the process runs.

    bfloat16: as LeRobot holds a policy whose config says `load_vlm_weights`.
    compiled: with torch.compile, as its config's `compile_model` does.
    """

    kind: Literal["lerobot", "views"]
    checkpoint: str
    vlm: str | None
    bundle: str  # of this checkpoint: has the observation, and the views' preprocessing and steps
    dtype: str  # float32, float16 (views) or bfloat16 (lerobot)
    device: str  # cpu, cuda
    compiled: bool

    @property
    def name(self) -> str:
        suffix = " compiled" if self.compiled else ""
        return f"{'LeRobot' if self.kind == 'lerobot' else 'torch views'} {self.dtype}{suffix}"


def observation(bundle: Bundle) -> tuple[dict[str, Any], Any, str, Any]:
    """-> images, state, task, noise of the self-check, as `Policy.predict_chunk` takes them."""
    with np.load(bundle.path(FILE), allow_pickle=False) as data:
        images = {c.name: data[f"image.{c.name}"] for c in bundle.manifest.cameras}
        return images, data["state"], str(data["task"][-1]), data["noise"]


def main() -> None:
    """Serve chunks until stdin ends."""
    import torch

    from .checkpoint.cameras import bundle_cameras
    from .checkpoint.checkpoint import load_checkpoint

    request = ReferenceRequest(**json.loads(sys.argv[1]))

    def answer(value: object) -> None:
        print(ANSWER, json.dumps(value), sep="", flush=True)

    with ExitStack() as stack:
        try:
            bundle = Bundle.open(request.bundle)
            checkpoint = load_checkpoint(
                request.checkpoint,
                vlm=Path(request.vlm) if request.vlm else None,
                cameras=bundle_cameras(bundle),
            )
            serve = serve_lerobot if request.kind == "lerobot" else serve_views
            chunk, tokens, note = serve(request, checkpoint, bundle, stack)
        except ImportError as e:
            answer(
                f"{sys.executable} cannot run LeRobot ({e}): name one that can (make lerobot-env)"
            )
            return
        except SmolVLAError as e:
            answer(str(e))
            return
        note = f"torch {torch.__version__}, {torch.get_num_threads()} threads{note}"
        answer([checkpoint.differences_from(bundle.manifest), tokens, note])
        for _ in sys.stdin:
            start = time.perf_counter()
            chunk()
            answer(time.perf_counter() - start)


# What runs a chunk, the tokens of its instruction, and a note.
Served = tuple[Callable[[], object], int, str]


def serve_views(
    request: ReferenceRequest, checkpoint: Any, bundle: Bundle, stack: ExitStack
) -> Served:
    """This project's modules, before ONNX."""
    import torch

    from .checkpoint.checkpoint import architecture_of
    from .views.layers import FP16, FP32
    from .views.weights import build_views

    m, preprocessor = bundle.manifest, Preprocessor(bundle)
    images, state, task, noise = observation(bundle)
    recipe = FP16 if request.dtype == "float16" else FP32
    views = build_views(architecture_of(checkpoint), checkpoint.tensors, recipe)
    prefix, expert = (
        torch.compile(v) if request.compiled else v for v in (v.to(request.device) for v in views)
    )
    width = next(t.shape[1] for t in m.expert.inputs if t.name == "time_embedding")

    @torch.no_grad()
    def chunk() -> Any:
        feeds = preprocessor.feeds(images, state, task)
        with torch.device(request.device):
            mask, *cache = prefix(*(torch.as_tensor(feeds[t.name]) for t in m.prefix.inputs))
            x = torch.as_tensor(noise)
            nothing = torch.zeros_like(x)
            for step in schedule(m.sampling.num_steps, width, m.sampling, None):
                given = (torch.as_tensor(step[name]) for name in ("time_embedding", "time", "dt"))
                _, x = expert(x, *given, nothing, nothing[:, :, :1], torch.zeros(1), mask, *cache)
        return m.action.normalization.unnormalize(x.cpu().numpy()[0, :, : m.action.dim])

    tokens = int(preprocessor.feeds(images, state, task)["token_mask"].sum())
    return chunk, tokens, ""


def serve_lerobot(
    request: ReferenceRequest, checkpoint: Any, bundle: Bundle, stack: ExitStack
) -> Served:
    """LeRobot itself, patched so that it runs offline and as trained."""
    import lerobot
    import torch
    import transformers

    from .lerobot_check import lerobot_batch, load_policy, vision_positions

    images, state, task, noise = observation(bundle)
    batch = lerobot_batch(checkpoint, Sample(images, state, task))
    note = f", lerobot {lerobot.__version__}, transformers {transformers.__version__}; "
    note += "patched: two token ids in place of the VLM's processor"
    if request.dtype == "float32" and transformers.__version__.startswith(("4.55", "4.56", "4.57")):
        stack.enter_context(vision_positions())
        note += ", vision positions 0..N-1 (transformers#41190)"
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    policy, preprocess = load_policy(checkpoint, Path(scratch) / "vlm")
    if request.dtype == "bfloat16":
        policy = to_bfloat16(policy)
    policy.to(request.device)
    if request.compiled:
        policy.model.sample_actions = torch.compile(policy.model.sample_actions)

    def chunk() -> Any:
        ready = preprocess(dict(batch))
        ready = {
            k: v.to(request.device) if isinstance(v, torch.Tensor) else v for k, v in ready.items()
        }
        return policy.predict_action_chunk(
            ready, noise=torch.from_numpy(noise).to(request.device)
        ).cpu()

    return chunk, int(preprocess(dict(batch))["observation.language.tokens"].shape[1]), note


def to_bfloat16(policy: Any) -> Any:
    """`policy` in the dtypes that LeRobot gives it with `load_vlm_weights`.

    Those of the published checkpoint: VLM and expert in bfloat16, except the cross layers' k_proj
    and v_proj and everything outside of both.
    """
    import torch

    expert = policy.model.vlm_with_expert.lm_expert.layers
    cross = [
        p
        for layer in expert
        for p in (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight)
    ]
    kept = {id(p) for p in cross if p.shape[0] == p.shape[1]}
    for p in policy.model.vlm_with_expert.parameters():
        if id(p) not in kept:
            p.data = p.data.to(torch.bfloat16)
    return policy
