from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from roi_cases import CONFIGS, GRIDS, RECORDED, SIZE, STRIDES, TORCHVISION, Case, case

from mrcnn_jax.config.model import RoIConfig
from mrcnn_jax.ops.roi import assign_levels, roi_features

from .strategies import random_boxes

SAMPLED = [name for name, config in CONFIGS.items() if config.op in ("align", "warp")]


def features_of(
    case: Case, config: RoIConfig, size: int, strides: Sequence[int] = STRIDES
) -> np.ndarray:
    run = jax.jit(functools.partial(roi_features, strides=strides, output_size=size, config=config))
    valid = jnp.ones(len(case.boxes), bool)
    return np.asarray(
        run(
            [jnp.array(f) for f in case.features],
            jnp.array(case.boxes),
            valid,
            levels=jnp.array(case.levels),
        )
    )


def gradients_of(case: Case, config: RoIConfig, size: int) -> list[jax.Array]:
    def total(features: list[jax.Array]) -> jax.Array:
        valid, levels = jnp.ones(len(case.boxes), bool), jnp.array(case.levels)
        pooled = roi_features(
            features,
            jnp.array(case.boxes),
            valid,
            levels=levels,
            strides=STRIDES,
            output_size=size,
            config=config,
        )
        return jnp.sum(pooled * jnp.array(case.cotangent))

    return jax.jit(jax.grad(total))([jnp.array(f) for f in case.features])


def half_away(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def sample_positions(low: float, high: float, config: RoIConfig, p: int) -> list[list[float]]:
    """Returns each bin's sample positions along one axis, in cells centred at integers."""
    start, extent = low, high - low
    if config.op == "warp":
        start, extent = half_away(low) - 0.5, max(half_away(high) - half_away(low) + 1, 1)
    elif config.aligned:
        start -= 0.5
    else:
        extent = max(extent, 1)
    count = config.sampling_ratio or min(max(math.ceil(extent / p), 0), config.max_sampling_ratio)
    return [[start + extent / p * (i + (s + 0.5) / count) for s in range(count)] for i in range(p)]


def positions_of(
    case: Case, config: RoIConfig, p: int
) -> list[tuple[list[list[float]], list[list[float]]]]:
    """(vertical, horizontal) sample positions of each box."""
    cells = case.boxes.astype(np.float64) / np.array(STRIDES)[case.levels, None]
    return [
        (sample_positions(y1, y2, config, p), sample_positions(x1, x2, config, p))
        for x1, y1, x2, y2 in cells
    ]


def loop(case: Case, config: RoIConfig, p: int) -> np.ndarray:
    result = np.zeros((len(case.boxes), p, p, case.features[0].shape[-1]))
    for n, (ys, xs) in enumerate(positions_of(case, config, p)):
        feature = case.features[case.levels[n]].astype(np.float64)
        height, width = feature.shape[:2]
        for i, j in np.ndindex(p, p):
            for y, x in [(y, x) for y in ys[i] for x in xs[j]]:
                if y < -1 or y > height or x < -1 or x > width:
                    continue
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                top, left = math.floor(y), math.floor(x)
                bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                upper = feature[top, left] * (left + 1 - x) + feature[top, right] * (x - left)
                lower = feature[bottom, left] * (left + 1 - x) + feature[bottom, right] * (x - left)
                result[n, i, j] += (upper * (top + 1 - y) + lower * (y - top)) / (
                    len(ys[i]) * len(xs[j])
                )
    return result


@pytest.mark.parametrize(("name", "p", "change"), [
    *[(name, SIZE, {}) for name in SAMPLED],
    ("align", 7, {}), ("align", 2, {"sampling_ratio": 1}), ("align", 3, {"sampling_ratio": 3}),
    ("align_adaptive", 2, {"max_sampling_ratio": 3}),
    ("warp_adaptive", 1, {"max_sampling_ratio": 4}),
])  # fmt: skip
def test_equals_loop(name: str, p: int, change: dict[str, int]) -> None:
    inputs, config = case(1), replace(CONFIGS[name], **change)
    np.testing.assert_allclose(features_of(inputs, config, p), loop(inputs, config, p), atol=2e-5)


@pytest.mark.parametrize("name", TORCHVISION)
def test_equals_torchvision(name: str) -> None:
    """Numbers of tests/parity/record_roi_ops.py."""
    recorded = np.load(RECORDED)
    inputs, config = case(0), CONFIGS[name]
    np.testing.assert_allclose(features_of(inputs, config, SIZE), recorded[name], atol=2e-5)
    for level, gradient in enumerate(gradients_of(inputs, config, SIZE)):
        np.testing.assert_allclose(gradient, recorded[f"{name}/gradient{level}"], atol=1e-4)


def ramps(offset: float) -> list[np.ndarray]:
    """Maps of x, y and a mixture, in canvas pixels, with cell i at (i + offset) * stride."""
    maps = []
    for (height, width), stride in zip(GRIDS, STRIDES, strict=True):
        y, x = np.meshgrid(
            (np.arange(height) + offset) * stride,
            (np.arange(width) + offset) * stride,
            indexing="ij",
        )
        maps.append(np.stack([x, y, 2 * x - 3 * y + 1], axis=-1).astype(np.float32))
    return maps


@pytest.mark.parametrize("name", SAMPLED)
def test_exact_on_a_linear_ramp(name: str) -> None:
    """A bin's average of a linear function is its value at the bin's centre, on any level."""
    boxes = random_boxes(
        np.random.default_rng(1), 10, extent=20, min_size=8, max_size=20
    ) + np.float32(8)  # away from the border
    levels = np.arange(10) % 2
    config = CONFIGS[name]
    corners = boxes.astype(np.float64)
    if config.op == "warp":
        stride = np.array(STRIDES)[levels, None]
        corners = np.round(corners / stride) * stride
        corners[:, 2:] += stride
    centres = (np.arange(7) + 0.5) / 7
    x = corners[:, [0]] + centres * (corners[:, [2]] - corners[:, [0]])
    y = corners[:, [1]] + centres * (corners[:, [3]] - corners[:, [1]])
    x, y = np.broadcast_to(x[:, None, :], (10, 7, 7)), np.broadcast_to(y[:, :, None], (10, 7, 7))
    inputs = Case(ramps(0.5 if config.aligned else 0), boxes, levels, np.empty(0))
    np.testing.assert_allclose(
        features_of(inputs, config, 7),
        np.stack([x, y, 2 * x - 3 * y + 1], axis=-1),
        rtol=1e-5,
        atol=1e-4,
    )


def test_border_rule_by_hand() -> None:
    """A sample up to one cell centre outside has the border's value, further out 0."""
    features = [np.ones((16, 20, 1), np.float32), np.ones((8, 10, 1), np.float32)]
    centres_and_values = [
        (-1.9, 1),
        (-2.1, 0),
        (81.9, 1),
        (82.1, 0),
    ]  # x; cells end at -0.5 * 4 = -2 and (20 + 0.5) * 4 = 82
    boxes = np.array([[x - 0.01, 20, x + 0.01, 21] for x, _ in centres_and_values], np.float32)
    inputs = Case(features, boxes, np.zeros(4, int), np.empty(0))
    pooled = features_of(inputs, RoIConfig(sampling_ratio=1), 1)
    assert pooled.ravel().tolist() == [value for _, value in centres_and_values]


def test_whole_bins_take_as_many_samples_as_they_have_cells() -> None:
    """21 / 7 = 3: one rounding up in this division would add a sample to each bin."""
    feature = np.random.default_rng(2).normal(size=(30, 30, 1)).astype(np.float32)
    inputs = Case(
        [feature],
        np.array([[4, 8, 4 + 4 * 21, 8 + 4 * 21]], np.float32),
        np.zeros(1, int),
        np.empty(0),
    )
    adaptive, fixed = (
        features_of(inputs, RoIConfig(sampling_ratio=ratio, max_sampling_ratio=4), 7, (4,))
        for ratio in (0, 3)
    )
    np.testing.assert_allclose(adaptive, fixed, atol=1e-6)


def dense(features: Sequence[jax.Array], case: Case, config: RoIConfig, p: int) -> jax.Array:
    """Averages samples by two matrix products per box: no gather to differentiate."""

    def weights(positions: list[list[float]], cells: int) -> jax.Array:
        at = np.array(positions)
        if at.shape[1] == 0:
            return jnp.zeros((p, cells), jnp.float32)
        within = (at >= -1) & (at <= cells)
        hat = np.maximum(0, 1 - np.abs(np.clip(at, 0, cells - 1)[..., None] - np.arange(cells)))
        return jnp.array((hat * within[..., None]).mean(axis=1), jnp.float32)

    rows = []
    for level, (ys, xs) in zip(case.levels, positions_of(case, config, p), strict=True):
        feature = features[level]
        rows.append(
            jnp.einsum(
                "ih,jw,hwc->ijc",
                weights(ys, feature.shape[0]),
                weights(xs, feature.shape[1]),
                feature,
            )
        )
    return jnp.stack(rows)


@pytest.mark.parametrize("name", SAMPLED)
def test_gradient_equals_autodiff_of_a_dense_formula(name: str) -> None:
    inputs = case(2)

    def expected(features: list[jax.Array]) -> jax.Array:
        return jnp.sum(dense(features, inputs, CONFIGS[name], SIZE) * jnp.array(inputs.cotangent))

    references = jax.jit(jax.grad(expected))([jnp.array(f) for f in inputs.features])
    for gradient, reference in zip(
        gradients_of(inputs, CONFIGS[name], SIZE), references, strict=True
    ):
        np.testing.assert_allclose(gradient, reference, atol=2e-5 * np.abs(reference).max())


OPS = ["align", "align_adaptive", "pool", "warp"]  # one of each code path
LIGHT = {name: replace(CONFIGS[name], max_sampling_ratio=2) for name in OPS}


@pytest.mark.parametrize("name", OPS)
def test_batched_gradient_equals_one_image_at_a_time(name: str) -> None:
    inputs = case(3)
    features = [jnp.stack([jnp.array(f), jnp.array(f) * 2 + 1]) for f in inputs.features]
    boxes, levels = (
        jnp.array(inputs.boxes).reshape(2, 12, 4),
        jnp.array(inputs.levels).reshape(2, 12),
    )

    def loss(features: list[jax.Array], boxes: jax.Array, levels: jax.Array) -> jax.Array:
        pooled = roi_features(
            features,
            boxes,
            jnp.ones(12, bool),
            levels=levels,
            strides=STRIDES,
            output_size=2,
            config=LIGHT[name],
        )
        return jnp.sum(pooled**2)

    together = jax.jit(jax.vmap(jax.grad(loss)))(features, boxes, levels)
    alone = jax.jit(jax.grad(loss))
    for image in range(2):
        for gradient, reference in zip(
            together, alone([f[image] for f in features], boxes[image], levels[image]), strict=True
        ):
            np.testing.assert_allclose(gradient[image], reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_bfloat16_is_rounded_once(name: str) -> None:
    """Features in bfloat16: sums in float32 there and back, one rounding at the end of each."""
    inputs = case(4)
    features = [jnp.array(f).astype(jnp.bfloat16) for f in inputs.features]
    cotangent = jnp.array(inputs.cotangent, jnp.bfloat16)

    def pull(features: list[jax.Array], dtype: jnp.dtype) -> tuple[jax.Array, list[jax.Array]]:
        def pool(features: list[jax.Array]) -> jax.Array:
            boxes, levels = jnp.array(inputs.boxes), jnp.array(inputs.levels)
            valid = jnp.ones(len(boxes), bool)
            return roi_features(
                features,
                boxes,
                valid,
                levels=levels,
                strides=STRIDES,
                output_size=SIZE,
                config=LIGHT[name],
            )

        def both(features: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, Any]:
            pooled, vjp = jax.vjp(pool, features)
            return pooled, vjp(cotangent)[0]

        # The code generator that users have: the other one of tests/conftest.py rounds in between.
        older = "xla_cpu_use_fusion_emitters" in os.environ["XLA_FLAGS"]
        options = {"xla_cpu_use_fusion_emitters": True} if older else None
        compiled = jax.jit(both, compiler_options=options)
        return compiled(features, cotangent.astype(dtype))

    half = pull(features, jnp.bfloat16)
    full = pull([f.astype(jnp.float32) for f in features], jnp.float32)
    for ours, reference in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            ours.astype(jnp.float32), reference.astype(jnp.bfloat16).astype(jnp.float32)
        )


@pytest.mark.parametrize("name", OPS)
def test_boxes_get_no_gradient_and_may_hold_anything(name: str) -> None:
    features = [jnp.array(f) for f in case(5).features]
    wild = [
        [np.nan] * 4,
        [np.inf] * 4,
        [-np.inf, -np.inf, np.inf, np.inf],
        [-1e30, 5, 1e30, 9],
        [2.0**31, 0, 2.0**32, 9],
        [5, np.nan, 9, 20],
    ]
    boxes = jnp.array([*wild, [5, 6, 40, 50]], jnp.float32)

    def total(features: list[jax.Array], boxes: jax.Array) -> jax.Array:
        levels = assign_levels(
            boxes, canonical_size=16.0, canonical_level=0, min_level=0, max_level=1
        )
        valid = jnp.ones(len(boxes), bool)
        pooled = roi_features(
            features,
            boxes,
            valid,
            levels=levels,
            strides=STRIDES,
            output_size=3,
            config=LIGHT[name],
        )
        return jnp.sum(pooled**2)

    value, (by_features, by_boxes) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(
        features, boxes
    )
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in by_features)
    assert (np.asarray(by_boxes) == 0).all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_no_loop_on_a_gpu(name: str, deterministic: bool) -> None:
    """And the gradient is summed in integers where its order may not matter."""
    inputs = case(6)

    def total(features: list[jax.Array]) -> jax.Array:
        boxes, levels = jnp.array(inputs.boxes), jnp.array(inputs.levels)
        valid = jnp.ones(len(boxes), bool)
        pooled = roi_features(
            features,
            boxes,
            valid,
            levels=levels,
            strides=STRIDES,
            output_size=3,
            config=LIGHT[name],
            deterministic=deterministic,
        )
        return jnp.sum(pooled**2)

    traced = jax.jit(jax.grad(total)).trace([jnp.array(f) for f in inputs.features])
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    sums = re.findall(r"stablehlo\.scatter.*?\^bb0\(%\w+: tensor<(\w+)>", program, re.DOTALL)
    assert set(sums) == {"i32" if deterministic and name != "pool" else "f32"}
    assert "stablehlo.while" not in program


LEVELS = [
    ((1, 1), 2), ((111.99, 111.99), 2), ((112, 112), 3), ((223.99, 223.99), 3), ((224, 224), 4),
    ((447.9, 447.9), 4), ((448, 448), 5), ((895, 895), 5), ((896, 896), 5), ((4000, 4000), 5),
    ((112, 448), 4), ((56, 223), 2), ((56, 224), 3), ((0, 0), 2), ((0, 900), 2),
]  # fmt: skip


@pytest.mark.parametrize(("size", "level"), LEVELS)
def test_level_rule_at_the_borders(size: tuple[float, float], level: int) -> None:
    boxes = jnp.array([[8, 16, 8 + size[0], 16 + size[1]]], jnp.float32)
    assert assign_levels(
        boxes, canonical_size=224.0, canonical_level=4, min_level=2, max_level=5
    ).tolist() == [level]


@pytest.mark.parametrize("epsilon", [0.0, 0.125])
def test_level_rule_equals_the_formula(epsilon: float) -> None:
    boxes = random_boxes(np.random.default_rng(6), 500, min_size=2, max_size=900)
    expected = []
    for x1, y1, x2, y2 in boxes.astype(np.float64):
        k = math.floor(3 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 100) + epsilon)
        expected.append(min(max(k, 1), 6))
    levels = assign_levels(
        jnp.array(boxes),
        canonical_size=100.0,
        canonical_level=3,
        min_level=1,
        max_level=6,
        epsilon=epsilon,
    )
    assert levels.dtype == jnp.int32
    np.testing.assert_array_equal(levels, expected)


def test_epsilon_lifts_boxes_just_under_a_border() -> None:
    boxes = jnp.array([[0, 0, side, side] for side in (447.9999, 447.99)], jnp.float32)
    assert assign_levels(
        boxes, canonical_size=224.0, canonical_level=4, min_level=2, max_level=5, epsilon=1e-6
    ).tolist() == [5, 4]
