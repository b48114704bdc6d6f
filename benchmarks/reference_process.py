"""The checkpoint in PyTorch, in a process and a Python of its own, so that it can be timed in turns with bundles.

    PYTHON -m smolvla_edge.benchmarks.reference_process ASKED

ASKED is `Asked` as JSON. The first answer tells what runs; then one line on stdin is one chunk, and its wall seconds,
preprocessing included, are the line that comes back. The observation is the bundle's own of the self-check, with the
instruction that fills the bundle's token length, so that both sides have the same number of tokens.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.errors import BenchError
from ..core.process import module_command
from ..quantize.observations.sample import Sample
from ..runtime import Bundle, SmolVLAError
from ..runtime.policy.preprocessing import Preprocessor
from ..runtime.policy.sampling import schedule
from ..runtime.policy.selfcheck import FILE

_ANSWER = "smolvla-bench "  # LeRobot prints too
START_LIMIT_S = 900.0  # compiled, the first chunk takes minutes, but that is asked for later


@dataclass(frozen=True)
class Asked:
    """What such a process is to be. bfloat16: as LeRobot holds a policy whose config says `load_vlm_weights`;
    compiled: with torch.compile, as its config's `compile_model` would."""

    kind: Literal["lerobot", "views"]
    checkpoint: str
    vlm: str | None
    bundle: str  # of this checkpoint: lends the observation, and preprocessing and step schedule to the views
    dtype: str  # float32, float16 (views) or bfloat16 (lerobot)
    device: str  # cpu, cuda
    compiled: bool

    @property
    def name(self) -> str:
        suffix = " compiled" if self.compiled else ""
        return f"{'LeRobot' if self.kind == 'lerobot' else 'torch views'} {self.dtype}{suffix}"


class ReferenceProcess:
    """The other end: starts the process, waits until it is ready, runs one chunk at a time. Raises BenchError.

    unlike: what of the checkpoint is not the bundle's; tokens: of the instruction; note: what runs.
    """

    def __init__(self, python: str, asked: Asked) -> None:
        self.asked = asked
        line = module_command(__name__, json.dumps(asdict(asked)), python=python)
        try:
            self._process = (
                subprocess.Popen(  # a session of its own: Ctrl-C is for this process, which ends it
                    line,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env=_all_cores(os.environ),
                    start_new_session=True,
                )
            )
        except OSError as e:
            raise BenchError(
                f"{python} cannot be started ({e.strerror}): --lerobot names a Python"
            ) from e
        late = threading.Timer(START_LIMIT_S, self._process.kill)
        late.start()
        try:
            found: Any = self._answer()
            if not isinstance(found, list) or len(found) != 3:
                raise BenchError(
                    found
                    if isinstance(found, str)
                    else f"{python} answers {found!r}: it is no Python"
                )
            self.unlike: list[str] = found[0]
            self.tokens: int = found[1]
            self.note: str = found[2]
        except BaseException:
            self.close()
            raise
        finally:
            late.cancel()

    def __enter__(self) -> "ReferenceProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self) -> float:
        """-> wall seconds of one chunk as the process measured them."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_answer` says so
            self._process.stdin.write("chunk\n")
            self._process.stdin.flush()
        if not isinstance(seconds := self._answer(), float):
            raise BenchError(
                f"the process of {self.asked.name} answers a chunk with {seconds!r}, expected seconds"
            )
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                with suppress(ValueError):
                    return json.loads(line.removeprefix(_ANSWER))
                raise BenchError(
                    f"the process of {self.asked.name} answers {line!r}: is it another version's?"
                )
        self._process.communicate()
        raise BenchError(
            f"the process of {self.asked.name} ended with status {self._process.returncode}, or was not ready after "
            f"{START_LIMIT_S:.0f} s. --lerobot names a Python with this package, its [export] extra, and lerobot "
            "0.4.4 (make lerobot-env)"
        )


def _all_cores(environ: Mapping[str, str]) -> dict[str, str]:
    """As ONNX Runtime takes them: torch would heed these."""
    return {
        key: value
        for key, value in environ.items()
        if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }


def observation(bundle: Bundle) -> tuple[dict[str, Any], Any, str, Any]:
    """-> images, state, task, noise as `Policy.predict_chunk` takes them: what the self-check holds."""
    with np.load(bundle.path(FILE), allow_pickle=False) as data:
        images = {c.name: data[f"image.{c.name}"] for c in bundle.manifest.cameras}
        return images, data["state"], str(data["task"][-1]), data["noise"]


def main() -> None:
    """Serve chunks until stdin ends."""
    import torch

    from ..core.errors import ExportError
    from ..export.checkpoint.cameras import bundle_cameras
    from ..export.checkpoint.checkpoint import load_checkpoint

    asked = Asked(**json.loads(sys.argv[1]))

    def answer(value: object) -> None:
        print(_ANSWER, json.dumps(value), sep="", flush=True)

    with ExitStack() as stack:
        try:
            bundle = Bundle.open(asked.bundle)
            checkpoint = load_checkpoint(
                asked.checkpoint,
                vlm=Path(asked.vlm) if asked.vlm else None,
                cameras=bundle_cameras(bundle),
            )
            serve = _lerobot if asked.kind == "lerobot" else _views
            chunk, tokens, note = serve(asked, checkpoint, bundle, stack)
        except ImportError as e:
            answer(
                f"{sys.executable} cannot run LeRobot ({e}): name one that can (make lerobot-env)"
            )
            return
        except (ExportError, SmolVLAError) as e:
            answer(str(e))
            return
        note = f"torch {torch.__version__}, {torch.get_num_threads()} threads{note}"
        answer([checkpoint.unlike(bundle.manifest), tokens, note])
        for _ in sys.stdin:
            start = time.perf_counter()
            chunk()
            answer(time.perf_counter() - start)


Served = tuple[
    Callable[[], object], int, str
]  # a chunk, tokens of its instruction, what to know of it


def _views(asked: Asked, checkpoint: Any, bundle: Bundle, stack: ExitStack) -> Served:
    """This project's modules, before ONNX."""
    import torch

    from ..export.views.layers import FP16, FP32
    from ..export.views.weights import build_views
    from ..export.writer import architecture_of

    m, preprocessor = bundle.manifest, Preprocessor(bundle)
    images, state, task, noise = observation(bundle)
    recipe = FP16 if asked.dtype == "float16" else FP32
    views = build_views(architecture_of(checkpoint), checkpoint.tensors, recipe)
    prefix, expert = (
        torch.compile(v) if asked.compiled else v for v in (v.to(asked.device) for v in views)
    )
    width = next(t.shape[1] for t in m.expert.inputs if t.name == "time_embedding")

    @torch.no_grad()
    def chunk() -> Any:
        feeds = preprocessor.feeds(images, state, task)
        with torch.device(asked.device):
            mask, *cache = prefix(*(torch.as_tensor(feeds[t.name]) for t in m.prefix.inputs))
            x = torch.as_tensor(noise)
            nothing = torch.zeros_like(x)
            for step in schedule(m.sampling.num_steps, width, m.sampling, None):
                given = (torch.as_tensor(step[name]) for name in ("time_embedding", "time", "dt"))
                _, x = expert(x, *given, nothing, nothing[:, :, :1], torch.zeros(1), mask, *cache)
        return m.action.normalization.unnormalize(x.cpu().numpy()[0, :, : m.action.dim])

    tokens = int(preprocessor.feeds(images, state, task)["token_mask"].sum())
    return chunk, tokens, ""


def _lerobot(asked: Asked, checkpoint: Any, bundle: Bundle, stack: ExitStack) -> Served:
    """LeRobot itself, with what must be patched to run it offline and as trained."""
    import lerobot
    import torch
    import transformers

    from ..export.lerobot_check import lerobot_batch, load_policy, vision_positions

    images, state, task, noise = observation(bundle)
    batch = lerobot_batch(checkpoint, Sample(images, state, task))
    note = f", lerobot {lerobot.__version__}, transformers {transformers.__version__}; "
    note += "patched: two token ids in place of the VLM's processor"
    if asked.dtype == "float32" and transformers.__version__.startswith(("4.55", "4.56", "4.57")):
        stack.enter_context(vision_positions())
        note += ", vision positions 0..N-1 (transformers#41190)"
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    policy, preprocess = load_policy(checkpoint, Path(scratch) / "vlm")
    if asked.dtype == "bfloat16":
        policy = as_loaded(policy)
    policy.to(asked.device)
    if asked.compiled:
        policy.model.sample_actions = torch.compile(policy.model.sample_actions)

    def chunk() -> Any:
        ready = preprocess(dict(batch))
        ready = {
            k: v.to(asked.device) if isinstance(v, torch.Tensor) else v for k, v in ready.items()
        }
        return policy.predict_action_chunk(
            ready, noise=torch.from_numpy(noise).to(asked.device)
        ).cpu()

    return chunk, int(preprocess(dict(batch))["observation.language.tokens"].shape[1]), note


def as_loaded(policy: Any) -> Any:
    """`policy` in the dtypes that LeRobot gives it with `load_vlm_weights`, which are those of the published
    checkpoint: VLM and expert in bfloat16, but for the cross layers' k_proj and v_proj and all outside of both."""
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
