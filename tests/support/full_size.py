"""The full-size policy in counts."""

from smolvla_edge.runtime.budget.roofline import ChunkWork
from smolvla_edge.runtime.bundle.manifest import Work

# The exporter's counts: 2 cameras, 48 tokens, so 177 prefix tokens; K and V hoisted.
FULL = ChunkWork(
    vision=Work({"float32": 353328168960}, 77309411328, {"float32": 97320960}),
    language=Work({"float32": 52996976640}, 1804550400, {"float32": 149739520}),
    expert=Work({"float32": 9767692800}, 620544000, {"float32": 98184960}),
    cache_bytes=7249920,
    steps=10,
    cameras=2,
    prefix_tokens=177,
    image_tokens=64,
).in_float16()
