"""The depth heads: interpolation, the canvas, targets of boxes, losses."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import laws

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import DepthHeadConfig, MaskHeadConfig, PointRendConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.models.depth_head import (
    DepthHead,
    box_depth_config,
    box_depth_targets,
    depth_loss,
    upsample_bilinear,
)

STRIDES = (4, 8, 16, 32)
SILOG, BERHU, L1 = (DepthHeadConfig("dense", loss=loss) for loss in ("silog", "berhu", "l1"))  # type: ignore[arg-type]


# -- the network -----------------------------------------------------------------------------------


def doubled_loop(values: np.ndarray) -> np.ndarray:
    """One axis at twice the resolution, value by value: the centre of output i is at i / 2 - 1/4
    of the input, whose ends extend."""
    out = []
    for i in range(2 * len(values)):
        at = min(max(i / 2 - 0.25, 0), len(values) - 1)
        low = math.floor(at)
        high = min(low + 1, len(values) - 1)
        out.append(values[low] * (1 - (at - low)) + values[high] * (at - low))
    return np.array(out)


def test_doubling_is_bilinear_interpolation_at_the_same_places() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 2)).astype(np.float32)
    expected = np.stack([doubled_loop(image) for image in x])
    expected = np.stack([doubled_loop(image.swapaxes(0, 1)).swapaxes(0, 1) for image in expected])
    np.testing.assert_allclose(upsample_bilinear(jnp.array(x), (6, 10)), expected, atol=1e-6)
    np.testing.assert_allclose(
        upsample_bilinear(jnp.array(x), (5, 9)), expected[:, :5, :9], atol=1e-6
    )


@functools.cache
def head() -> tuple[Any, Any]:
    module = DepthHead(DepthHeadConfig("dense", channels=16), STRIDES)
    shapes = maps(64, 96)
    apply = jax.jit(
        lambda variables, maps, sizes, valid: module.apply(
            variables, maps, image_sizes=sizes, valid=valid
        )
    )
    ones = np.ones(len(shapes[0]), bool)
    init = functools.partial(module.init, image_sizes=SIZES, valid=ones)
    return jax.jit(init)(jax.random.key(0), shapes), apply


SIZES = np.array([[50, 70], [64, 96]], np.int32)


def maps(height: int, width: int) -> list[np.ndarray]:
    """Features of two images that are the same where both canvases have them."""
    found = []
    for stride in STRIDES:
        whole = np.random.default_rng(stride).normal(size=(2, 40, 40, 6)).astype(np.float32)
        found.append(whole[:, : height // stride, : width // stride])
    return found


def test_the_dense_head_predicts_a_map_at_stride_4_that_starts_near_a_metre() -> None:
    variables, apply = head()
    found = np.asarray(apply(variables, maps(64, 96), SIZES, np.ones(2, bool)))
    assert found.shape == (2, 16, 24)
    assert found.dtype == np.float32
    assert 0 < np.abs(found).max() < 1
    names = set(variables["params"])
    convs = {f"level{level}_conv{i}" for level in (2, 3, 4, 5) for i in range(1, max(level - 1, 2))}
    assert names == convs | {f"{name}_norm" for name in convs} | {"log_depth"}


def test_neither_the_canvas_nor_the_padding_nor_other_images_matter() -> None:
    """Not to the statistics of the group norm, the convolutions or the interpolation."""
    variables, apply = head()
    expected = np.asarray(apply(variables, maps(64, 96), SIZES, np.ones(2, bool)))
    rows, columns = (-(-side // 4) for side in SIZES[0])

    larger = np.asarray(apply(variables, maps(96, 128), SIZES, np.ones(2, bool)))
    np.testing.assert_allclose(
        larger[0, :rows, :columns], expected[0, :rows, :columns], rtol=1e-5, atol=1e-6
    )

    poison = maps(64, 96)
    for x, stride in zip(poison, STRIDES, strict=True):
        height, width = (-(-side // stride) for side in SIZES[0])
        x[0, height:], x[0, :, width:] = np.nan, np.nan
        x[1] = np.nan
    sizes = np.array([SIZES[0], [-7, 10**9]], np.int32)
    found = np.asarray(apply(variables, poison, sizes, np.array([True, False])))
    np.testing.assert_array_equal(found[0, :rows, :columns], expected[0, :rows, :columns])


def test_c4_is_refused_in_a_line() -> None:
    with pytest.raises(ConfigError, match=r"^model\.depth_head\.kind: dense needs model\.backbone"):
        ModelConfig(backbone="c4", depth_head=DepthHeadConfig("dense"))


def test_the_roi_head_is_the_mask_branch_without_what_depth_has_not() -> None:
    mask = MaskHeadConfig(convs=3, norm="frozen_batch", refine=PointRendConfig(steps=2))
    assert box_depth_config(mask) == MaskHeadConfig(convs=3)
    assert box_depth_config(replace(mask, norm="group")).norm == "group"


# -- targets of boxes ------------------------------------------------------------------------------


def test_the_depth_of_a_box_is_read_at_the_centres_of_its_cells() -> None:
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 9, (12, 16)).astype(np.float32)
    corners = rng.uniform(-8, 50, (20, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 30, (20, 2))], 1).astype(np.float32)
    valid = rng.random(20) < 0.8
    boxes[~valid] = np.nan
    found = np.asarray(
        box_depth_targets(jnp.array(depth), jnp.array(boxes), jnp.array(valid), size=5)
    )
    assert found.shape == (20, 5, 5)
    for box, exists, values in zip(boxes.astype(float), valid, found, strict=True):
        if not exists:
            assert (values == 0).all()
            continue
        for i in range(5):
            for j in range(5):
                y = box[1] + (box[3] - box[1]) * (i + 0.5) / 5
                x = box[0] + (box[2] - box[0]) * (j + 0.5) / 5
                row = min(max(math.floor(y / 4), 0), 11)
                assert values[i, j] == depth[row, min(max(math.floor(x / 4), 0), 15)]


# -- losses ----------------------------------------------------------------------------------------


def cells(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log depths, metres (unknown in a third of the cells, and in the whole last image), images."""
    rng = np.random.default_rng(seed)
    metres = rng.uniform(0.3, 8, (4, 6, 5)).astype(np.float32)
    metres[rng.random(metres.shape) < 0.3] = 0
    metres[3] = 0
    log_depth = np.log(np.where(metres > 0, metres, 1)) + rng.normal(scale=0.4, size=metres.shape)
    return log_depth.astype(np.float32), metres, np.array([True, False, True, True])


def loss_of(config: DepthHeadConfig, *args: np.ndarray) -> jax.Array:
    return depth_loss(*map(jnp.array, args), config)["depth"]  # type: ignore[arg-type]


def loss_loop(
    config: DepthHeadConfig, log_depth: np.ndarray, metres: np.ndarray, images: np.ndarray
) -> float:
    rows = []
    for image in np.flatnonzero(images):
        pairs = zip(log_depth[image].ravel(), metres[image].ravel(), strict=True)
        rows.append([float(p) - math.log(float(t)) for p, t in pairs if t > 0])
    largest = max(abs(d) for row in rows for d in row)
    values = []
    for row in filter(None, rows):
        if config.loss == "silog":
            mean = sum(row) / len(row)
            value = sum(d * d for d in row) / len(row) - config.silog_lambda * mean**2
        elif config.loss == "l1":
            value = sum(map(abs, row)) / len(row)
        else:
            c = largest / 5
            value = sum(abs(d) if abs(d) <= c else (d * d + c * c) / (2 * c) for d in row)
            value /= len(row)
        values.append(value)
    return config.loss_weight * sum(values) / len(values)


@pytest.mark.parametrize("config", [SILOG, replace(BERHU, loss_weight=3.0), L1])
def test_losses_equal_a_loop(config: DepthHeadConfig) -> None:
    for seed in range(3):
        found = loss_of(config, *cells(seed))
        assert float(found) == pytest.approx(loss_loop(config, *cells(seed)), rel=1e-5)


@pytest.mark.parametrize("config", [SILOG, BERHU, L1])
def test_unknown_cells_may_hold_anything_and_cost_nothing(config: DepthHeadConfig) -> None:
    """To the bit, in the loss and in its gradient."""
    log_depth, metres, images = cells(0)
    gradient = jax.jit(jax.value_and_grad(lambda x, *rest: depth_loss(x, *rest, config)["depth"]))
    expected = gradient(log_depth, metres, images)
    counts = (metres > 0) & images[:, None, None]
    assert (np.asarray(expected[1])[~counts] == 0).all()
    assert (np.asarray(expected[1])[counts] != 0).mean() > 0.9
    for poison in (*laws.POISONS, np.inf):
        unknown = np.where(counts, log_depth, poison).astype(np.float32)
        # An unknown depth is not positive, or not finite.
        marks = np.where(counts, metres, -1 if poison > 0 else poison).astype(np.float32)
        found = gradient(unknown, np.where(images[:, None, None], marks, poison), images)
        for ours, theirs in zip(found, expected, strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("config", [SILOG, BERHU, L1])
def test_without_a_known_cell_the_loss_is_exactly_zero(config: DepthHeadConfig) -> None:
    log_depth, metres, images = cells(0)
    value, gradient = jax.value_and_grad(lambda x: loss_of(config, x, 0 * metres, images))(
        jnp.array(log_depth)
    )
    assert float(value) == 0
    assert (np.asarray(gradient) == 0).all()
    # And a perfect prediction, with a finite gradient.
    value, gradient = jax.value_and_grad(lambda x: loss_of(config, x, metres, images))(
        jnp.log(jnp.array(np.where(metres > 0, metres, 1)))
    )
    assert float(value) == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("factor", [0.01, 0.5, 3.0, 100.0])
def test_lambda_1_forgives_a_factor_on_all_depths_and_less_does_not(factor: float) -> None:
    log_depth, metres, images = cells(1)
    for share, same in ((1.0, True), (0.85, False)):
        config = replace(SILOG, silog_lambda=share)
        before = float(loss_of(config, log_depth, metres, images))
        after = float(loss_of(config, log_depth, (factor * metres).astype(np.float32), images))
        assert (after == pytest.approx(before, rel=1e-3)) == same
