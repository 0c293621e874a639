"""The RoI operations and the level rule beside torchvision's, values and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from record_roi_ops import torchvisions
from roi_cases import CONFIGS, RECORDED, SIZE, TORCHVISION, Case, case

from mrcnn_jax.config import tables
from mrcnn_jax.config.model import RoIConfig
from mrcnn_jax.ops.roi import assign_levels, roi_features

pytest.importorskip("torch")
pytest.importorskip("torchvision")

STRIDES = (4, 8, 16, 32)
CANVAS = (256, 320)


def large_case(seed: int, size: int) -> Case:
    """Boxes across and beyond a canvas, on levels where bins fit the adaptive sampling ratio."""
    rng = np.random.default_rng(seed)
    features = [
        rng.normal(size=(CANVAS[0] // stride, CANVAS[1] // stride, 3)).astype(np.float32)
        for stride in STRIDES
    ]
    levels = rng.integers(0, len(STRIDES), 120).astype(np.int32)
    longest = np.minimum(
        np.array(STRIDES)[levels, None] * size * RoIConfig().max_sampling_ratio, 500
    )
    corners, sides = (
        rng.uniform(-30, 300, (120, 2)),
        np.exp(rng.uniform(0, np.log(longest), (120, 2))),
    )
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    return Case(features, boxes, levels, rng.normal(size=(120, size, size, 3)).astype(np.float32))


def close(ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


@pytest.mark.parametrize("name", TORCHVISION)
def test_recorded_numbers_are_torchvisions(name: str) -> None:
    recorded = np.load(RECORDED)
    pooled, gradients = torchvisions(case(0), CONFIGS[name], SIZE)
    np.testing.assert_allclose(recorded[name], pooled, atol=1e-6)
    for level, gradient in enumerate(gradients):
        np.testing.assert_allclose(recorded[f"{name}/gradient{level}"], gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 7) for name in TORCHVISION), ("align", 14), ("pool", 14)]
)
def test_values_and_gradients_are_torchvisions(name: str, size: int) -> None:
    inputs, config = large_case(size, size), CONFIGS[name]

    def pool(features: list[jax.Array]) -> jax.Array:
        boxes, levels = jnp.array(inputs.boxes), jnp.array(inputs.levels)
        return roi_features(
            features,
            boxes,
            jnp.ones(len(boxes), bool),
            levels=levels,
            strides=STRIDES,
            output_size=size,
            config=config,
        )

    @jax.jit
    def run(features: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        pooled, vjp = jax.vjp(pool, features)
        return pooled, vjp(cotangent)[0]

    ours, our_gradients = run([jnp.array(f) for f in inputs.features], jnp.array(inputs.cotangent))
    theirs, their_gradients = torchvisions(inputs, config, size, STRIDES)
    if config.op == "pool":
        np.testing.assert_array_equal(ours, theirs)
    close(np.asarray(ours), theirs, 1e-5)
    for gradient, reference in zip(our_gradients, their_gradients, strict=True):
        close(np.asarray(gradient), reference, 1e-5)


def proposals(n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    centres, sides = (
        rng.uniform(0, 1, (n, 2)) * (800, 800),
        np.exp(rng.uniform(np.log(4), np.log(900), (n, 2))),
    )
    border = [
        (0, 0, side + shift, side + shift) for side in (112, 224, 448) for shift in (-0.01, 0, 0.01)
    ]
    boxes = np.concatenate(
        [np.concatenate([centres - sides / 2, centres + sides / 2], axis=1), border]
    )
    return np.clip(boxes, 0, 800).astype(np.float32)


def levels_of(boxes: np.ndarray) -> jax.Array:
    rule = functools.partial(
        assign_levels, canonical_size=224.0, canonical_level=4, min_level=2, max_level=5
    )
    return rule(jnp.array(boxes), epsilon=tables.TORCHVISION.roi.level_epsilon) - 2


def test_levels_are_torchvisions() -> None:
    import torch
    from torchvision.ops.poolers import LevelMapper

    boxes = proposals(100_000)
    np.testing.assert_array_equal(
        levels_of(boxes), LevelMapper(2, 5, eps=1e-6)([torch.from_numpy(boxes)]).numpy()
    )


def test_pyramid_features_are_torchvisions() -> None:
    """MultiScaleRoIAlign, which gets the boxes and finds the levels and strides itself."""
    import torch
    from torchvision.ops import MultiScaleRoIAlign

    boxes = proposals(150)
    rng = np.random.default_rng(1)
    features = [
        rng.normal(size=(800 // stride, 800 // stride, 2)).astype(np.float32) for stride in STRIDES
    ]
    maps = {
        str(level): torch.from_numpy(f).permute(2, 0, 1)[None] for level, f in enumerate(features)
    }
    pooler = MultiScaleRoIAlign(list(maps), output_size=7, sampling_ratio=2)
    theirs = pooler(maps, [torch.from_numpy(boxes)], [(800, 800)]).permute(0, 2, 3, 1).numpy()
    ours = roi_features(
        [jnp.array(f) for f in features], jnp.array(boxes), jnp.ones(len(boxes), bool),
        levels=levels_of(boxes), strides=STRIDES, output_size=7, config=tables.TORCHVISION.roi,
    )  # fmt: skip
    close(np.asarray(ours), theirs, 1e-4)  # float32 positions along 200 cells, in noise
