"""The manifest of a candidate's graphs, before they are hashed and measured."""

from collections.abc import Collection
from importlib.metadata import distributions
from pathlib import Path

from ..runtime.bundle import manifest as contract
from .checkpoint import tokens
from .checkpoint.checkpoint import Checkpoint, architecture_of
from .graph import describe_graph

_PACKAGES = (
    "smolvla-edge",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "transformers",
)


def describe(
    checkpoint: Checkpoint,
    folder: Path,
    precision: contract.Precision,
    target: contract.Target,
    *,
    pinned: Collection[str],
    int8: contract.Int8 | None,
) -> contract.Manifest:
    """The manifest of the graphs in `folder`; files and parity are empty."""
    config, processors = checkpoint.config, checkpoint.processors
    arch = architecture_of(checkpoint)
    prefix, expert = describe_graph(folder / "prefix.onnx"), describe_graph(folder / "expert.onnx")
    pad = tokens.pad_id(
        checkpoint.tokenizer,
        tokens.read_tokenizer(checkpoint.tokenizer),
        getattr(checkpoint.vlm.text_config, "pad_token_id", None),
    )
    return contract.Manifest(
        format=contract.FORMAT,
        version=contract.VERSION,
        source=contract.Source(
            checkpoint.name, checkpoint.revision, checkpoint.weights_sha256, checkpoint.demo
        ),
        files={},
        prefix=prefix,
        expert=expert,
        cache_bytes=sum(t.bytes for t in prefix.outputs if t.name != "prefix_mask"),
        cameras=tuple(
            contract.Camera(name, key)
            for name, key in zip(processors.camera_names, config.cameras, strict=True)
        ),
        image_size=arch.vision.image_size,
        tokens=contract.Tokens(arch.token_length, pad),
        state=contract.Vector(config.state_dim, config.max_state_dim, processors.state),
        action=contract.Vector(config.action_dim, config.max_action_dim, processors.action),
        joints=checkpoint.joints,
        sampling=config.sampling,
        units=None,  # no LeRobot file records them
        fps=checkpoint.fps,
        precision=precision,
        target=target,
        parity={},
        pinned=tuple(sorted(pinned)),
        int8=int8,
        float16_largest=None,
        built_with={d.name: d.version for d in distributions() if d.name in _PACKAGES},
    )
