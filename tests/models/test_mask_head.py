"""The mask head against plain NumPy loops that spell out the report's constants, and the laws of
padded sets."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.laws import Rows
from ops.test_boxes import iou_loop
from ops.test_masks import coverage_loop
from rpn_cases import assert_loss_laws, instances, near
from test_resnet import numpy_conv

from mrcnn_jax.config.heads import MaskHeadConfig, PointRendConfig
from mrcnn_jax.models.mask_head import (
    MaskHead,
    MaskSamples,
    PointHead,
    PointSamples,
    TransposedConv,
    depth_to_space,
    mask_loss,
    mask_losses,
    mask_probabilities,
    mask_samples,
    point_loss,
    point_samples,
)
from mrcnn_jax.ops.masks import crop_targets
from mrcnn_jax.structures import Instances, blank_batch

CONFIG = MaskHeadConfig(channels=5, convs=2, pool_size=3)
CLASSES = 3
RNG = np.random.default_rng(0)
GROUND_TRUTH = np.array(
    [[4, 4, 24, 30], [30, 10, 60, 28], [8, 36, 30, 60], [40, 40, 50, 62], [0, 0, 64, 64]],
    np.float32,
)
GT: Rows = {
    "boxes": GROUND_TRUTH,
    "labels": np.array([2, 1, 3, 1, 2], np.int32),
    "masks": RNG.integers(0, 256, (5, 7, 7)).astype(np.uint8),
    "has_mask": np.array([True, False, True, True, True]),
}
GT_VALID = np.array([True, True, True, True, False])
# As the box head gives them: by falling score, empty slots last; one row in between that is not
# valid.
DETECTIONS = near(np.tile(GROUND_TRUTH, (4, 1)), seed=2, shift=0.25, growth=0.4)
DETECTIONS_VALID = np.arange(20) < 17
DETECTIONS_VALID[3] = False


# Network


def scatter_loop(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    n, h, w, _ = x.shape
    out = np.zeros((n, 2 * h, 2 * w, kernel.shape[-1])) + bias
    padding = len(kernel) - 2
    for i, j, ky, kx in np.ndindex(h, w, *kernel.shape[:2]):
        y, z = 2 * i + ky - padding, 2 * j + kx - padding
        if 0 <= y < 2 * h and 0 <= z < 2 * w:
            out[:, y, z] += x[:, i, j] @ kernel[ky, kx]
    return out


def scatter(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """`scatter_loop` in a form that autodiff takes: strided additions to a canvas with a border."""
    n, h, w, _ = x.shape
    size = len(params["kernel"])
    out = jnp.zeros((n, 2 * h + 2, 2 * w + 2, params["bias"].shape[0]), jnp.float32)
    for ky, kx in np.ndindex(size, size):
        out = out.at[:, ky : ky + 2 * h : 2, kx : kx + 2 * w : 2].add(
            jnp.tensordot(x, params["kernel"][ky, kx], axes=1)
        )
    padding = size - 2
    return out[:, padding : padding + 2 * h, padding : padding + 2 * w] + params["bias"].reshape(
        1, 1, 1, -1
    )


@pytest.mark.parametrize("size", [2, 3])
def test_transposed_convolution_equals_a_scatter_loop_and_so_does_its_gradient(
    size: Literal[2, 3],
) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = {
        "kernel": rng.normal(size=(size, size, 5, 6)).astype(np.float32),
        "bias": rng.normal(size=6).astype(np.float32),
    }
    shapes = jax.eval_shape(TransposedConv(6, size).init, jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == {
        name: leaf.shape for name, leaf in params.items()
    }
    cotangent = rng.normal(size=(2, 6, 8, 6)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def pull(function: Any, params: Any, x: Any) -> Any:
        result, vjp = jax.vjp(function, params, x)
        return result, vjp(jnp.asarray(cotangent))

    ours, gradients = pull(
        lambda params, x: depth_to_space(TransposedConv(6, size).apply({"params": params}, x)),
        params,
        x,
    )
    np.testing.assert_allclose(ours, scatter_loop(x, **params), rtol=1e-4, atol=1e-5)
    plain, expected = pull(scatter, params, x)
    np.testing.assert_allclose(plain, ours, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradients, expected
    )


def test_head_equals_a_loop() -> None:
    head = MaskHead(CONFIG, CLASSES)
    features = np.random.default_rng(2).normal(size=(4, 3, 3, 5)).astype(np.float32)
    logits, variables = jax.jit(head.init_with_output)(jax.random.key(0), features)
    params = jax.tree.map(np.asarray, variables["params"])
    x = features
    for name in ("conv1", "conv2"):
        x = np.maximum(
            numpy_conv(x, params[name]["kernel"].transpose(3, 2, 0, 1)) + params[name]["bias"], 0
        )
    x = np.maximum(scatter_loop(x, **params["deconv"]), 0)
    assert logits.shape == (4, 6, 6, CLASSES)
    np.testing.assert_allclose(
        logits, x @ params["logits"]["kernel"] + params["logits"]["bias"], rtol=1e-4, atol=1e-5
    )
    labels = jnp.array([3, 1, 2, 0], jnp.int32)  # 0, an empty slot, is clipped to 1
    own = head.apply(variables, features, labels)
    expected = [mask[..., max(label, 1) - 1] for mask, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(own[..., 0], expected, atol=1e-5)
    for name in ("conv1", "deconv"):
        # 225 draws: seven standard deviations are a third.
        assert float(params[name]["kernel"].std()) == pytest.approx(math.sqrt(2 / 45), rel=0.33), (
            name
        )
    assert float(np.abs(params["deconv"]["bias"]).max()) == 0


def test_one_output_is_the_mask_of_any_label() -> None:
    head = MaskHead(CONFIG, 1)
    features = np.random.default_rng(3).normal(size=(3, 3, 3, 5)).astype(np.float32)
    labels = jnp.array([1, 2, 3], jnp.int32)
    logits, variables = jax.jit(head.init_with_output)(jax.random.key(0), features)
    own = head.apply(variables, features, labels)
    np.testing.assert_allclose(own, logits, atol=1e-5)


# Targets


def ground_truth(valid: np.ndarray = GT_VALID) -> Instances:
    return Instances(
        valid=jnp.asarray(valid), **{name: jnp.asarray(values) for name, values in GT.items()}
    )


SAMPLE = jax.jit(functools.partial(mask_samples, size=6), static_argnames="config")


def samples_of(config: MaskHeadConfig, gt_valid: np.ndarray = GT_VALID) -> MaskSamples:
    return jax.tree.map(
        np.asarray,
        SAMPLE(instances(DETECTIONS, DETECTIONS_VALID), ground_truth(gt_valid), config=config),
    )


def samples_loop() -> list[tuple[np.ndarray, int]]:
    """(box, index of its ground truth)."""
    rows = [(GROUND_TRUTH[i], i) for i in range(5) if GT_VALID[i] and GT["has_mask"][i]]
    overlap = iou_loop(DETECTIONS, GROUND_TRUTH[:4])
    best = overlap.max(1)[DETECTIONS_VALID]
    assert ((best > 0.4) & (best < 0.5)).any()  # so that another threshold would be another result
    assert ((best > 0.5) & (best < 0.6)).any()
    assert (
        (overlap.argmax(1) == 1) & (overlap[:, 1] >= 0.5) & DETECTIONS_VALID
    ).any()  # the object without a mask
    for i in range(20):
        index = int(overlap[i].argmax())
        if DETECTIONS_VALID[i] and overlap[i, index] >= 0.5 and GT["has_mask"][index]:
            rows.append((DETECTIONS[i], index))
    return rows


@pytest.mark.parametrize("cap", [64, 7, 2])
def test_samples_equal_a_loop(cap: int) -> None:
    """Ground truth that has a mask, then detections by score, until the slots are full."""
    everything = samples_loop()
    assert len(everything) > 7
    expected = everything[:cap]
    samples = samples_of(replace(CONFIG, samples=cap))
    n = len(expected)
    assert samples.left_out == len(everything) - n
    assert len(samples.valid) == min(cap, 25)
    assert samples.valid.tolist() == [True] * n + [False] * (len(samples.valid) - n)
    boxes, index = np.array([box for box, _ in expected]), np.array([i for _, i in expected])
    np.testing.assert_array_equal(samples.boxes[:n], boxes)
    np.testing.assert_array_equal(samples.labels[:n], GT["labels"][index])
    coverage = coverage_loop(GT["masks"], GROUND_TRUTH, index, boxes, 6)  # twice the pooled size
    clear = np.abs(coverage - 127.5) > 0.01
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(samples.targets[:n][clear], (coverage >= 127.5)[clear])
    soft = samples_of(replace(CONFIG, samples=cap, soft_targets=True)).targets[:n]
    expected_soft = crop_targets(
        jnp.array(GT["masks"]),
        jnp.array(GROUND_TRUTH),
        jnp.array(index, jnp.int32),
        jnp.array(boxes),
        size=6,
        soft=True,
    )
    np.testing.assert_allclose(soft, expected_soft, atol=1e-5)
    assert ((soft > 0.1) & (soft < 0.9)).mean() > 0.3


def test_samples_at_the_borders_of_the_rules() -> None:
    """IoU of exactly 0.5 is a match; two objects with one box keep a mask and a class each."""
    masks = jnp.stack([jnp.full((4, 4), value, jnp.uint8) for value in (0, 255)])
    gt = instances(
        [[0, 0, 10, 10]] * 2,
        labels=jnp.array([1, 2], jnp.int32),
        masks=masks,
        has_mask=jnp.ones(2, bool),
    )
    samples = SAMPLE(instances([[0, 0, 10, 5], [0, 0, 10, 4.9]]), gt, config=CONFIG)
    assert samples.valid.tolist() == [True, True, True, False]
    assert samples.boxes[2].tolist() == [0, 0, 10, 5]
    assert samples.labels[:2].tolist() == [1, 2]
    assert samples.targets[:2].mean((1, 2)).tolist() == [0, 1]
    # A box of an object without a mask is not given to another that it matches less.
    gt = gt.replace(
        boxes=jnp.array([[0, 0, 10, 10], [0, 0, 10, 8]], jnp.float32),
        has_mask=jnp.array([False, True]),
    )
    samples = SAMPLE(instances([[0, 0, 10, 9.5], [0, 0, 10, 8.5]]), gt, config=CONFIG)
    assert samples.boxes[samples.valid].tolist() == [[0, 0, 10, 8], [0, 0, 10, 8.5]]


# Loss


def batch() -> tuple[jax.Array, MaskSamples]:
    """Three images: objects, none, objects."""
    images = [
        samples_of(replace(CONFIG, samples=8), gt_valid=valid)
        for valid in (GT_VALID, GT_VALID & False, np.arange(5) == 2)
    ]
    samples = jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)
    return jnp.array(
        np.random.default_rng(3).normal(scale=2, size=(3, 8, 6, 6, CLASSES)), jnp.float32
    ), samples


VALUE_AND_GRAD = jax.jit(
    lambda logits, samples, image_valid, config: jax.value_and_grad(
        lambda x: mask_loss(x, samples, image_valid, config)["mask"]
    )(logits),
    static_argnames="config",
)


@pytest.mark.parametrize(("weight", "agnostic"), [(1.0, False), (2.0, False), (1.0, True)])
def test_loss_equals_a_loop(weight: float, agnostic: bool) -> None:
    logits, samples = batch()
    logits = logits[..., :1] if agnostic else logits
    total, count, expected = 0.0, 0, np.zeros(logits.shape)
    valid = np.asarray(samples.valid)
    assert not valid[1].any()
    assert not valid[2].all()
    for image, row in zip(*np.nonzero(valid), strict=True):
        count += 1
        channel = 0 if agnostic else int(samples.labels[image, row]) - 1
        p = 1 / (1 + np.exp(-np.asarray(logits[image, row, :, :, channel], float)))
        t = np.asarray(samples.targets[image, row])
        total += np.mean(-t * np.log(p) - (1 - t) * np.log(1 - p))
        expected[image, row, :, :, channel] = (p - t) / 36
    value, gradient = VALUE_AND_GRAD(
        logits,
        samples,
        np.ones(3, bool),
        config=replace(CONFIG, loss_weight=weight, class_agnostic=agnostic),
    )
    assert float(value) == pytest.approx(weight * total / count, rel=1e-5)
    np.testing.assert_allclose(
        gradient, weight * expected / count, rtol=1e-4, atol=1e-7
    )  # the true class's channel alone


def pixel_loop(logits: np.ndarray, label: int, target: float, config: MaskHeadConfig) -> float:
    """The loss of one pixel with the logits of all classes."""
    if config.loss == "softmax":
        exp = np.exp(np.concatenate([[0.0], logits]))  # the background's logit is 0
        return -math.log(exp[label if target else 0] / exp.sum())
    p = 1 / (1 + math.exp(-logits[label - 1]))
    p_t, alpha_t = (p, config.focal_alpha) if target else (1 - p, 1 - config.focal_alpha)
    return -alpha_t * (1 - p_t) ** config.focal_gamma * math.log(p_t)


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, loss="focal"),
        replace(CONFIG, loss="focal", focal_gamma=0.5, focal_alpha=0.6),
        replace(CONFIG, loss="softmax"),
    ],
)
def test_other_losses_equal_a_loop(config: MaskHeadConfig) -> None:
    logits, samples = batch()
    rows = list(zip(*np.nonzero(np.asarray(samples.valid)), strict=True))
    values = [
        pixel_loop(
            np.asarray(logits[i, s, y, x], float),
            int(samples.labels[i, s]),
            float(samples.targets[i, s, y, x]),
            config,
        )
        for i, s in rows
        for y, x in np.ndindex(6, 6)
    ]
    value, gradient = VALUE_AND_GRAD(logits, samples, np.ones(3, bool), config=config)
    assert float(value) == pytest.approx(np.mean(values), rel=1e-5)
    others = np.asarray(gradient).any((2, 3)).sum(-1)[tuple(np.transpose(rows))]
    assert (
        others == (CLASSES if config.loss == "softmax" else 1)
    ).all()  # the classes compete, or they don't
    poisoned_logits = jnp.where(samples.valid[..., None, None, None], logits, jnp.nan)
    jax.tree.map(
        np.testing.assert_array_equal,
        VALUE_AND_GRAD(poisoned_logits, samples, np.ones(3, bool), config=config),
        (value, gradient),
    )


def test_probabilities_are_those_that_the_loss_trains() -> None:
    """-log of them is the loss of a full mask."""
    logits = jnp.array(
        np.random.default_rng(4).normal(scale=2, size=(1, 2, 6, 6, CLASSES)), jnp.float32
    )
    labels, full = jnp.array([[3, 1]], jnp.int32), jnp.ones((1, 2, 6, 6), jnp.float32)
    zeros = jnp.zeros((1, 2, 4), jnp.float32)
    rows = {"gt_index": jnp.zeros((1, 2), jnp.int32), "valid": jnp.ones((1, 2), bool)}
    samples = MaskSamples(
        boxes=zeros, labels=labels, targets=full, left_out=jnp.zeros(1, jnp.int32), **rows
    )
    for config in (
        CONFIG,
        replace(CONFIG, loss="softmax"),
        replace(CONFIG, loss="focal", focal_gamma=0.0, focal_alpha=1.0),
    ):
        probabilities = mask_probabilities(logits, labels, config)
        loss = mask_loss(logits, samples, jnp.ones(1, bool), config)["mask"]
        assert float(-jnp.log(probabilities).mean()) == pytest.approx(float(loss), rel=1e-5)


def test_the_box_heads_mini_batch_brings_its_own_ground_truth() -> None:
    """Of its rows those that match an object with a mask, as they are and in their order: no box is
    added."""
    config = replace(CONFIG, train_on="box_samples")
    everything = samples_of(replace(CONFIG, samples=64))
    found = SAMPLE(
        instances(DETECTIONS, DETECTIONS_VALID), ground_truth(), config=replace(config, samples=64)
    )
    n, with_mask = int(found.valid.sum()), int((GT["has_mask"] & GT_VALID).sum())
    assert n == int(everything.valid.sum()) - with_mask > 5
    for name in ("boxes", "labels", "targets", "gt_index"):
        np.testing.assert_array_equal(
            getattr(found, name)[:n], getattr(everything, name)[with_mask : with_mask + n]
        )


def test_an_image_without_objects_has_no_loss() -> None:
    logits, samples = batch()
    value, gradient = VALUE_AND_GRAD(logits, samples, np.array([False, True, False]), config=CONFIG)
    assert float(value) == 0
    assert (np.asarray(gradient) == 0).all()


def test_an_image_that_is_not_valid_changes_nothing() -> None:
    logits, samples = batch()
    expected, reference = VALUE_AND_GRAD(
        *jax.tree.map(lambda leaf: leaf[:2], (logits, samples)), np.ones(2, bool), config=CONFIG
    )
    for poison in (np.nan, 1e9):
        logits = logits.at[2].set(poison)
        samples = samples.replace(
            targets=samples.targets.at[2].set(poison), labels=samples.labels.at[2].set(10**9)
        )
        value, gradient = VALUE_AND_GRAD(
            logits, samples, np.array([True, True, False]), config=CONFIG
        )
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
        np.testing.assert_allclose(gradient[:2], reference, rtol=1e-6)
        assert (np.asarray(gradient[2]) == 0).all()


@pytest.mark.parametrize("varied", ["ground_truth", "found"])
def test_laws_of_padded_sets(varied: str) -> None:
    """The loss and its gradient by the weights of a head that sees the sampled boxes, as functions
    of one of the sets they come from."""
    weights = jnp.array(np.random.default_rng(5).normal(size=(4, 36 * CLASSES)), jnp.float32)

    def function(rows: Rows, valid: np.ndarray, cap: int) -> Any:
        sets = {"ground_truth": ground_truth(), "found": instances(DETECTIONS, DETECTIONS_VALID)}
        sets[varied] = Instances(valid=jnp.asarray(valid), **rows)
        samples = mask_samples(config=replace(CONFIG, samples=cap), size=6, **sets)

        def loss(weights: jax.Array) -> jax.Array:
            logits = (jnp.sin(samples.boxes / 10) @ weights).reshape(1, -1, 6, 6, CLASSES)
            return mask_loss(
                logits, jax.tree.map(lambda leaf: leaf[None], samples), jnp.ones(1, bool), CONFIG
            )["mask"]

        return jax.value_and_grad(loss)(weights)

    rows, valid = (
        (GT, GT_VALID) if varied == "ground_truth" else ({"boxes": DETECTIONS}, DETECTIONS_VALID)
    )
    assert_loss_laws(functools.partial(function, cap=64), rows, valid)
    assert_loss_laws(
        functools.partial(function, cap=6), rows, valid, random=True
    )  # the cut goes by order


# Refinement


def test_point_head_equals_a_loop() -> None:
    """Each layer sees the mask branch's logit beside what the one before it gave."""
    head = PointHead(PointRendConfig(steps=1, channels=7, fcs=2), CLASSES)
    rng = np.random.default_rng(6)
    features, coarse = (
        rng.normal(size=(2, 9, 5)).astype(np.float32),
        rng.normal(size=(2, 9)).astype(np.float32),
    )
    shapes = jax.eval_shape(head.init, jax.random.key(0), features, coarse)["params"]
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    seen, x = coarse[..., None], features
    for layer in ("fc1", "fc2"):
        x = np.maximum(
            np.concatenate([x, seen], axis=-1) @ params[layer]["kernel"] + params[layer]["bias"], 0
        )
    expected = (
        np.concatenate([x, seen], axis=-1) @ params["logits"]["kernel"] + params["logits"]["bias"]
    )
    assert set(params) == {"fc1", "fc2", "logits"}
    np.testing.assert_allclose(
        jax.jit(head.apply)({"params": params}, features, coarse), expected, rtol=1e-4, atol=1e-5
    )


def test_points_are_drawn_where_the_mask_of_the_boxs_class_is_unsure() -> None:
    """On ramps with their outline at x = 0.5, by each image's own key."""
    refine = PointRendConfig(steps=1, train_points=100, oversampling=3, uncertain_fraction=0.75)
    config = replace(CONFIG, refine=refine)
    _, samples = batch()
    ramp = np.broadcast_to(np.arange(6) - 2.5, (3, 8, 6, 6))
    own = np.asarray(samples.labels)[..., None, None, None] == np.arange(1, CLASSES + 1)
    logits = np.where(own, ramp[..., None], ramp.swapaxes(2, 3)[..., None]).astype(np.float32)
    truth = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), ground_truth())
    images = blank_batch(3, (64, 64)).replace(ground_truth=truth, valid=np.ones(3, bool))

    @jax.jit
    def draw(keys: jax.Array) -> Any:
        asked = []

        def answer(boxes: Any, labels: Any, valid: Any, coarse: Any, points: jax.Array) -> Any:
            asked.append(points)
            return points[..., 0]

        values = mask_losses(keys, logits, samples, images, config, refine=answer)
        return asked[0], values["mask_points"]

    keys = jax.random.split(jax.random.key(0), 3)
    points, value = draw(keys)
    assert np.isfinite(value)
    distance = np.abs(np.asarray(points)[..., 0] - 0.5)
    assert distance[..., :75].max() < 0.2  # the nearest quarter of 300: about 0.125
    assert distance[..., 75:].mean() == pytest.approx(0.25, abs=0.03)
    assert len(np.unique(points[..., 0])) > 3 * 8 * 100 - 5  # of 2^23 numbers, two may be equal
    np.testing.assert_array_equal(draw(keys[::-1])[0], points[::-1])


def test_point_loss_equals_a_loop() -> None:
    """At points of each box, the truth there read from the object's own mask; what does not exist
    has no part in it."""
    config = PointRendConfig(steps=1, train_points=12, uncertain_fraction=0.5, loss_weight=0.5)
    _, samples = batch()
    rng = np.random.default_rng(7)
    coarse, logits = (
        rng.normal(size=(3, 8, 6, 6)).astype(np.float32),
        rng.normal(size=(3, 8, 12)).astype(np.float32),
    )
    images = np.array([True, True, False])

    @jax.jit
    def run(logits: jax.Array, coarse: jax.Array, samples: MaskSamples) -> Any:
        draw = jax.vmap(lambda key, c, s: point_samples(key, c, s, ground_truth(), config))
        points = draw(jax.random.split(jax.random.key(0), 3), coarse, samples)
        return points, *jax.value_and_grad(
            lambda x: point_loss(x, points, samples, images, config)["mask_points"]
        )(logits)

    points: PointSamples
    points, value, gradient = jax.tree.map(np.asarray, run(logits, coarse, samples))
    total, count, expected = 0.0, 0, np.zeros(logits.shape)
    for image, row in zip(*np.nonzero(np.asarray(samples.valid) & images[:, None]), strict=True):
        count += 1
        box, index = np.asarray(samples.boxes[image, row]), int(samples.gt_index[image, row])
        at = box[:2] + points.points[image, row] * (box[2:] - box[:2])
        coverage = coverage_loop(
            GT["masks"], GROUND_TRUTH, np.full(12, index), np.concatenate([at, at], axis=1), 1
        ).ravel()
        assert (np.abs(coverage - 127.5) > 0.01).all()
        t, p = (
            (coverage >= 127.5).astype(float),
            1 / (1 + np.exp(-logits[image, row].astype(float))),
        )
        total += np.mean(-t * np.log(p) - (1 - t) * np.log(1 - p))
        expected[image, row] = (p - t) / 12
    assert count > 3
    assert float(value) == pytest.approx(0.5 * total / count, rel=1e-5)
    np.testing.assert_allclose(gradient, 0.5 * expected / count, rtol=1e-4, atol=1e-7)
    exists = np.asarray(samples.valid) & images[:, None]
    for poison in (np.nan, 1e9):
        told, seen, said = (
            np.where(exists.reshape(3, 8, *[1] * (x.ndim - 2)), x, poison).astype(np.float32)
            for x in (np.asarray(samples.boxes), coarse, logits)
        )
        _, again, pulled = run(said, seen, samples.replace(boxes=told))
        np.testing.assert_array_equal(again, value)
        np.testing.assert_array_equal(pulled, gradient)
