"""A recording's description, and chunks that no policy computed."""

from dataclasses import replace

import numpy as np

from smolvla_edge.runtime import RealTimeChunking
from smolvla_edge.runtime.policy.policy import Timing
from smolvla_edge.runtime.robot.chunks import Continuation
from smolvla_edge.runtime.robot.inference import ActionChunk, ChunkRequest
from smolvla_edge.runtime.robot.recording import Recorder, RunMeta

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


META = RunMeta(
    bundle="bundle",
    bundle_digest="0" * 64,
    precision="fp32",
    device="cpu",
    task="Pick up the red cube.",
    fps=30.0,
    units="degrees",
    chunking="rtc",
    rtc=RealTimeChunking("exp", execution_horizon=20, max_guidance_weight=3.3),
    cameras=("front", "wrist"),
    joints=JOINTS,
    seed=None,
)


def chunk(images, state, noise, steps, prev_chunk, delay, actions, time_s, latency_s):
    """What the writer takes, of what a reader gives back."""
    request = ChunkRequest(images, state, Continuation(0, prev_chunk, delay), time_s)
    return ActionChunk(actions, noise, steps, request, latency_s, Timing(0.0, 0.0, 0.0))


def some_chunk(seed=0, height=6, width=8, rows=50):
    """No policy has computed it."""
    rng = np.random.default_rng(seed)
    return chunk(
        images={n: rng.integers(0, 256, (height, width, 3), np.uint8) for n in META.cameras},
        state=rng.normal(size=6),
        noise=rng.normal(size=(1, rows, 32)).astype(np.float32),
        steps=10,
        prev_chunk=None,
        delay=0,
        actions=rng.normal(size=(rows, 6)).astype(np.float32),
        time_s=123456.789,
        latency_s=0.25,
    )


def record(folder, task="Push.", chunks=10):
    """A recording of `chunks` chunks; -> its folder."""
    recorder = Recorder(folder, replace(META, task=task))
    for i in range(chunks):
        recorder.answered(some_chunk(seed=i))
    recorder.close()
    return folder
