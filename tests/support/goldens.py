"""One golden case of the real LeRobot, and the comparisons every test of it makes."""

from pathlib import Path

import numpy as np

from smolvla_edge.runtime import Policy, RealTimeChunking
from smolvla_edge.runtime.policy.selfcheck import error


class Golden:
    """A case folder: its golden.npz by name, and its raw inputs in the robot's terms."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / "golden.npz") as file:
            self.data = dict(file)
        self.images = {
            k.removeprefix("image."): v for k, v in self.data.items() if k.startswith("image.")
        }
        self.state, self.task = self.data["state"], str(self.data["task"])
        self.noise = self.data["noise"]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.data[name]


def stage_errors(policy: Policy, golden: Golden, tensors: dict) -> dict[str, float]:
    """Error of every stage that the goldens hold, worst over layers and steps.

    tensors: the checkpoint's weights; the goldens hold the VLM's own keys and values, so those of
    cross layers are projected by the expert first, as the prefix graph does.
    """
    m, errors = policy.manifest, {}
    feeds = policy.prefill(golden.images, golden.state, golden.task)
    errors["images"] = error(feeds["images"], golden["images_preprocessed"][: len(m.cameras)])
    valid_tokens = golden["tokens"][golden["token_mask"].astype(bool)]
    assert np.array_equal(feeds["tokens"][feeds["token_mask"]], valid_tokens)
    if golden["tokens"].shape == feeds["tokens"].shape:
        assert np.array_equal(feeds["tokens"], golden["tokens"])  # padding too
    errors["state"] = error(feeds["state"], golden["state_normalized"])

    cache = policy.graphs.cache()
    valid, golden_valid = cache["prefix_mask"][0], golden["prefix_pad_mask"][0]
    errors["cache"] = 0.0
    for layer in range(sum(name.startswith("key.") for name in cache)):
        if f"key.{layer}" not in golden.data:
            continue  # the full-size cases hold some layers only
        for kind in ("key", "value"):
            expected = golden[f"{kind}.{layer}"][0][golden_valid]  # [valid, KV heads, D]
            proj = f"model.vlm_with_expert.lm_expert.layers.{layer}.self_attn.{kind[0]}_proj.weight"
            weight = tensors[proj].float().numpy()
            if weight.shape[0] == weight.shape[1]:  # a cross layer
                expected = (expected.reshape(len(expected), -1) @ weight.T).reshape(expected.shape)
            got = cache[f"{kind}.{layer}"][0].transpose(1, 0, 2)[valid]
            errors["cache"] = max(errors["cache"], error(got, expected))

    velocities = []
    actions = policy.denoise(golden.noise, velocities=velocities)
    errors["velocity"] = error(np.stack(velocities), golden["velocity"])
    errors["x_t"] = error(actions, golden["x_t"][-1])
    errors["actions normalized"] = error(
        actions[:, :, : m.action.dim], golden["actions_normalized"]
    )
    errors["actions"] = error(
        policy.predict_chunk(golden.images, golden.state, golden.task, golden.noise),
        golden["actions"],
    )

    policy.rtc = RealTimeChunking("exp", execution_horizon=10, max_guidance_weight=10.0)
    scale = m.action.normalization
    chunk = policy.predict_chunk(
        golden.images,
        golden.state,
        golden.task,
        golden["rtc.noise"],
        prev_chunk=scale.unnormalize(golden["rtc.prev_chunk_left_over"][0]),
        delay=int(golden["rtc.inference_delay"]),
    )
    errors["rtc"] = error(scale.normalize_inverse(chunk)[None], golden["rtc.actions_normalized"])
    return errors
