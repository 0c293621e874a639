"""Inputs of the RoI operations that NumPy alone can make again: for their tests, and for
torchvision's recorded numbers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mrcnn_jax.config.model import RoIConfig

RECORDED = Path(__file__).parent / "recorded" / "roi_ops.npz"
STRIDES = (4, 8)
GRIDS = ((16, 20), (8, 10))  # a canvas of 64 x 80
SIZE = 5
CONFIGS = {
    "align": RoIConfig(),
    "align_adaptive": RoIConfig(sampling_ratio=0),
    "align_corner": RoIConfig(aligned=False),
    "align_corner_adaptive": RoIConfig(aligned=False, sampling_ratio=0),
    "pool": RoIConfig(op="pool"),
    "warp": RoIConfig(op="warp"),
    "warp_adaptive": RoIConfig(op="warp", sampling_ratio=0),
}
TORCHVISION = [name for name, config in CONFIGS.items() if config.op in ("align", "pool")]

AWKWARD = [
    (-30, -30, -10, -10),  # outside
    (100, 100, 140, 120),
    (20, 20, 20, 20),  # a point
    (20, 20, 20, 40),  # a line
    (40, 30, 20, 10),  # inside out
    (-10, -6, 30, 20),  # across the border
    (60, 40, 95, 80),
    (0, 0, 80, 64),  # the canvas
    (76, 60, 80, 64),  # in its corner
    (-40, -30, 110, 90),  # around it
    (0, 30, 80, 33),  # elongated
    (38, 0, 40, 64),
    (6, 10, 18, 30),  # sides that are rounded at a half, on both levels
    (-6, -2, 12, 4),
]


class Case(NamedTuple):
    features: list[np.ndarray]  # float32 [h, w, c] a level
    boxes: np.ndarray  # float32 [n, 4]
    levels: np.ndarray  # int32 [n]
    cotangent: np.ndarray  # float32 [n, p, p, c]


def case(seed: int, *, size: int = SIZE, channels: int = 2, ordinary: int = 10) -> Case:
    """Ordinary and awkward boxes on random maps; a third of the values are 0, as after a ReLU, so
    that maxima are often equal."""
    rng = np.random.default_rng(seed)
    features = [rng.normal(size=(*grid, channels)) for grid in GRIDS]
    features = [np.where(rng.random(f.shape) < 1 / 3, 0, f).astype(np.float32) for f in features]
    corners, sides = rng.uniform(-5, 60, (ordinary, 2)), rng.uniform(1, 45, (ordinary, 2))
    boxes = np.concatenate([np.concatenate([corners, corners + sides], axis=1), AWKWARD]).astype(
        np.float32
    )
    levels = rng.integers(0, len(GRIDS), len(boxes)).astype(np.int32)
    cotangent = rng.normal(size=(len(boxes), size, size, channels)).astype(np.float32)
    return Case(features, boxes, levels, cotangent)
