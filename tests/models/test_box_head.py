"""The box head against plain NumPy loops that spell out the report's constants, and the laws of
padded sets."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.laws import Rows
from ops.strategies import random_boxes
from ops.test_boxes import iou_loop
from ops.test_nms import greedy
from rpn_cases import (
    assert_loss_laws,
    decode_loop,
    encode_loop,
    giou_loop,
    instances,
    near,
    smooth_l1_loop,
)

from mrcnn_jax.config.heads import BoxHeadConfig
from mrcnn_jax.models.box_head import (
    BoxHead,
    BoxOutput,
    BoxSamples,
    box_detections,
    box_loss,
    box_samples,
)
from mrcnn_jax.structures import Instances

CONFIG = BoxHeadConfig()
ALL = replace(
    CONFIG, samples=200, box_weights=(10.0, 10.0, 5.0, 4.0)
)  # more slots than candidates, and than 3 : 1 takes away: nothing is left to chance
RNG = np.random.default_rng(0)
CLASSES = 3
GROUND_TRUTH = np.array(
    [[4, 4, 24, 30], [30, 10, 60, 28], [8, 36, 30, 60], [40, 40, 50, 62], [0, 0, 64, 64]],
    np.float32,
)
GT_VALID = np.array([True, True, True, True, False])
GT_LABELS = np.array([2, 1, 3, 1, 2], np.int32)
PROPOSALS = np.concatenate(
    [
        near(GROUND_TRUTH[:4].repeat(4, axis=0), seed=3, shift=0.3, growth=0.4),
        random_boxes(RNG, 20, extent=60, max_size=24),
    ]
)
PROPOSALS_VALID = RNG.random(len(PROPOSALS)) < 0.9
CROWD = np.array([[0.5, 30.5, 40.5, 64], [0, 0, 64, 64]], np.float32)
CROWD_VALID = np.array([True, False])

SAMPLE = jax.jit(box_samples, static_argnames="config")


def ground_truth() -> Instances:
    return instances(GROUND_TRUTH, GT_VALID, labels=jnp.array(GT_LABELS))


def samples_of(
    seed: int,
    config: BoxHeadConfig,
    proposals: np.ndarray = PROPOSALS,
    gt_valid: np.ndarray = GT_VALID,
) -> BoxSamples:
    valid = PROPOSALS_VALID[: len(proposals)]
    gt = ground_truth().replace(valid=jnp.array(gt_valid))
    drawn = SAMPLE(
        jax.random.key(seed),
        instances(proposals, valid),
        gt,
        instances(CROWD, CROWD_VALID),
        config=config,
    )
    return jax.tree.map(np.asarray, drawn)


def candidates_loop() -> tuple[
    list[tuple[np.ndarray, int, list[float]]], list[tuple[np.ndarray, int, list[float]]]
]:
    """(foreground, background): box, label and deltas of every candidate, proposals first."""
    boxes = np.concatenate([PROPOSALS[PROPOSALS_VALID], GROUND_TRUTH[GT_VALID]])
    overlap = iou_loop(boxes, GROUND_TRUTH[GT_VALID])
    assert (
        (overlap.max(1) > 0.4) & (overlap.max(1) < 0.5)
    ).any()  # so that 0.5 would be another result, as would 0.3
    assert ((overlap.max(1) > 0.3) & (overlap.max(1) < 0.4)).any()
    foreground, background = [], []
    for box, row in zip(boxes, overlap, strict=True):
        x1, y1, x2, y2 = box.astype(float)
        in_crowd = (
            max(min(x2, 40.5) - max(x1, 0.5), 0)
            * max(min(y2, 64) - max(y1, 30.5), 0)
            / ((x2 - x1) * (y2 - y1))
        )
        if row.max() > 0.4:
            foreground.append(
                (box, int(GT_LABELS[row.argmax()]), encode_loop(GROUND_TRUTH[row.argmax()], box))
            )
        elif in_crowd < 0.5:
            background.append((box, 0, [0.0] * 4))
    assert len(foreground) + len(background) < len(boxes)
    return foreground, background


# Network


def test_head_equals_matrix_products() -> None:
    head = BoxHead(replace(CONFIG, hidden=32), CLASSES)
    features = np.random.default_rng(1).normal(size=(2, 5, 4, 4, 6)).astype(np.float32)
    output, variables = jax.jit(head.init_with_output)(jax.random.key(0), features)
    params = jax.tree.map(np.asarray, variables["params"])
    x = features.reshape(2, 5, -1)
    for name in ("fc1", "fc2"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    np.testing.assert_allclose(output.logits, x @ params["logits"]["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        output.deltas,
        (x @ params["deltas"]["kernel"]).reshape(2, 5, CLASSES, 4),
        rtol=1e-4,
        atol=1e-6,
    )
    assert params["logits"]["kernel"].shape == (32, CLASSES + 1)
    assert float(params["logits"]["kernel"].std()) == pytest.approx(0.01, rel=0.2)
    assert float(params["deltas"]["kernel"].std()) == pytest.approx(0.001, rel=0.2)


# Targets


def test_samples_follow_the_rules() -> None:
    foreground, background = candidates_loop()
    drawn = samples_of(0, ALL)
    assert drawn.valid.sum() == len(foreground) + len(background)
    wanted = {tuple(box): (label, deltas) for box, label, deltas in foreground + background}
    assert len(wanted) == drawn.valid.sum()
    for box, label, deltas in zip(
        drawn.boxes[drawn.valid], drawn.labels[drawn.valid], drawn.deltas[drawn.valid], strict=True
    ):
        expected_label, expected_deltas = wanted.pop(tuple(box))
        assert label == expected_label
        if label > 0:
            expected_deltas = np.array(expected_deltas) * ALL.box_weights
            np.testing.assert_allclose(deltas, expected_deltas, rtol=1e-4, atol=1e-4)
    assert not wanted
    found = {tuple(box) for box in drawn.foreground.boxes[drawn.foreground.valid]}
    assert found == {tuple(box) for box, _, _ in foreground}


def test_samples_at_the_borders_of_the_rules() -> None:
    proposals = instances([[0, 0, 10, 4], [0, 0, 10, 4.1], [60, 0, 80, 10], [61, 0, 81, 10]])
    gt = instances([[0, 0, 10, 10]], labels=jnp.array([2], jnp.int32))
    drawn = SAMPLE(jax.random.key(0), proposals, gt, instances([[50, 0, 70, 20]]), config=ALL)
    found = {
        tuple(box.tolist()): int(label)
        for box, label in zip(drawn.boxes[drawn.valid], drawn.labels[drawn.valid], strict=True)
    }
    # IoU 0.4 is background; half in the crowd region is no background; ground truth is its own
    # match.
    assert found == {
        (0, 0, 10, 4): 0,
        (0, 0, 10, np.float32(4.1)): 2,
        (61, 0, 81, 10): 0,
        (0, 0, 10, 10): 2,
    }


def test_foreground_to_background_is_three_to_one() -> None:
    foreground, background = candidates_loop()
    assert len(foreground) > 12
    assert len(background) > 4
    seen = set()
    for seed in range(3):
        drawn = samples_of(seed, replace(CONFIG, samples=16))
        assert drawn.valid.all()
        assert (drawn.labels > 0).sum() == 12
        assert {tuple(box) for box in drawn.boxes[drawn.labels > 0]} <= {
            tuple(box) for box, *_ in foreground
        }
        assert {tuple(box) for box in drawn.boxes[drawn.labels == 0]} <= {
            tuple(box) for box, *_ in background
        }
        seen.add(drawn.boxes.tobytes())
    assert len(seen) == 3
    # Few of one kind: background fills up, foreground does not.
    few = samples_of(
        0, replace(CONFIG, samples=16), gt_valid=np.array([False, False, False, True, False])
    )
    assert 1 <= (few.labels > 0).sum() < 12
    assert few.valid.sum() == 16
    lacking = samples_of(0, replace(CONFIG, samples=16), proposals=PROPOSALS[:16])
    assert (lacking.labels > 0).sum() == 12
    assert 12 <= lacking.valid.sum() < 16


# Loss


def batch() -> tuple[BoxOutput, BoxSamples]:
    """Three images: objects, none, objects."""
    images = [
        samples_of(seed, replace(CONFIG, samples=24), gt_valid=GT_VALID & (seed != 1))
        for seed in range(3)
    ]
    samples = jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)
    rng = np.random.default_rng(4)
    logits, deltas = rng.normal(size=(3, 24, CLASSES + 1)), rng.normal(size=(3, 24, CLASSES, 4))
    return BoxOutput(
        logits=jnp.array(logits, jnp.float32), deltas=jnp.array(deltas, jnp.float32)
    ), samples


VALUE_AND_GRAD = jax.jit(
    lambda output, samples, image_valid, config: jax.value_and_grad(
        lambda output: (lambda values: (sum(values.values()), values))(
            box_loss(output, samples, image_valid, config)
        ),
        has_aux=True,
    )(output),
    static_argnames="config",
)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, smooth_l1_beta=0.5, class_loss_weight=2.0, box_loss_weight=3.0),
        replace(CONFIG, box_loss="giou"),
    ],
)
def test_loss_equals_a_loop(config: BoxHeadConfig) -> None:
    output, samples = batch()
    samples = samples.replace(valid=samples.valid.at[0, 20:].set(False))
    image_valid = np.array([True, True, False])
    classes, box, count = 0.0, 0.0, 0
    labels = np.asarray(samples.labels)
    assert set(labels[0, :20]) == {0, 1, 2, 3}
    for image, row in np.ndindex(labels.shape):
        if not (image_valid[image] and samples.valid[image, row]):
            continue
        count += 1
        logits, label = np.asarray(output.logits[image, row], float), labels[image, row]
        classes += math.log(np.exp(logits).sum()) - logits[label]
        if label > 0:
            deltas, target = output.deltas[image, row, label - 1], samples.deltas[image, row]
            if config.box_loss == "giou":  # which is the same around every proposal
                both = (np.asarray(d) / config.box_weights for d in (deltas, target))
                box += 1 - giou_loop(*(decode_loop(d, PROPOSALS[0], None) for d in both))
            else:
                box += smooth_l1_loop(deltas, target, config.smooth_l1_beta)
    (_, values), gradient = VALUE_AND_GRAD(output, samples, image_valid, config=config)
    assert float(values["box_class"]) == pytest.approx(
        config.class_loss_weight * classes / count, rel=1e-5
    )
    assert float(values["box_box"]) == pytest.approx(config.box_loss_weight * box / count, rel=1e-5)
    # Each foreground row moves the deltas of its class and of no other.
    moved = np.asarray(gradient.deltas != 0).any(-1)
    expected = (labels[..., None] == np.arange(1, CLASSES + 1)) & (
        np.asarray(samples.valid) & image_valid[:, None]
    )[..., None]
    np.testing.assert_array_equal(moved, expected)


def test_an_image_without_objects_has_no_box_loss() -> None:
    output, samples = batch()
    assert samples.valid[1].any()
    (_, values), gradient = VALUE_AND_GRAD(
        output, samples, np.array([False, True, False]), config=CONFIG
    )
    assert float(values["box_box"]) == 0
    assert float(values["box_class"]) > 0
    assert (np.asarray(gradient.deltas) == 0).all()
    assert np.isfinite(gradient.logits).all()
    (_, values), gradient = VALUE_AND_GRAD(output, samples, np.zeros(3, bool), config=CONFIG)
    assert [float(value) for value in values.values()] == [0, 0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_an_image_that_is_not_valid_changes_nothing() -> None:
    output, samples = batch()
    (_, expected), reference = VALUE_AND_GRAD(
        *jax.tree.map(lambda leaf: leaf[:2], (output, samples)), np.ones(2, bool), config=CONFIG
    )
    for poison in (np.nan, 1e9):
        output = jax.tree.map(lambda leaf: leaf.at[2].set(poison), output)  # noqa: B023
        samples = samples.replace(
            deltas=samples.deltas.at[2].set(poison), labels=samples.labels.at[2].set(10**9)
        )
        (_, values), gradient = VALUE_AND_GRAD(
            output, samples, np.array([True, True, False]), config=CONFIG
        )
        for name, value in expected.items():
            assert float(values[name]) == pytest.approx(float(value), rel=1e-6)
        for ours, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(ours[:2], leaf, rtol=1e-6)
            assert (np.asarray(ours[2]) == 0).all()


SETS: dict[str, tuple[Rows, np.ndarray]] = {
    "proposals": ({"boxes": PROPOSALS}, PROPOSALS_VALID),
    "ground_truth": ({"boxes": GROUND_TRUTH, "labels": GT_LABELS}, GT_VALID),
    "ignore": ({"boxes": CROWD}, CROWD_VALID),
}


@pytest.mark.parametrize("varied", SETS)
def test_laws_of_padded_sets(varied: str) -> None:
    """Losses and their gradients by the weights of a head that sees the sampled boxes, as functions
    of one of the sets they come from."""
    rng = np.random.default_rng(5)
    weights = [jnp.array(rng.normal(size=(4, n)), jnp.float32) for n in (CLASSES + 1, 4 * CLASSES)]

    def function(rows: Rows, valid: np.ndarray, config: BoxHeadConfig) -> Any:
        sets = {
            "proposals": instances(PROPOSALS, PROPOSALS_VALID),
            "ground_truth": ground_truth(),
            "ignore": instances(CROWD, CROWD_VALID),
        }
        sets[varied] = Instances(valid=jnp.asarray(valid), **rows)
        samples = box_samples(jax.random.key(0), config=config, **sets)

        def loss(weights: list[jax.Array]) -> dict[str, jax.Array]:
            logits, deltas = (jnp.sin(samples.boxes / 10) @ w for w in weights)
            output = BoxOutput(logits=logits[None], deltas=deltas.reshape(1, -1, CLASSES, 4))
            return box_loss(
                output, jax.tree.map(lambda leaf: leaf[None], samples), jnp.ones(1, bool), config
            )

        values, vjp = jax.vjp(loss, weights)
        return values, vjp({name: jnp.float32(1) for name in values})

    rows, valid = SETS[varied]
    assert_loss_laws(functools.partial(function, config=ALL), rows, valid)
    assert_loss_laws(
        functools.partial(function, config=replace(CONFIG, samples=8)), rows, valid, random=True
    )


# Detections


def predictions(seed: int, scale: float) -> BoxOutput:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(len(PROPOSALS), CLASSES + 1))
    deltas = rng.normal(scale=0.3, size=(len(PROPOSALS), CLASSES, 4))
    return BoxOutput(logits=jnp.array(logits, jnp.float32), deltas=jnp.array(deltas, jnp.float32))


def detections_loop(output: BoxOutput, limits: np.ndarray) -> list[tuple[float, int, np.ndarray]]:
    """(score, label, box), best first, no more than 20."""
    exp = np.exp(np.asarray(output.logits, float))
    scores = exp / exp.sum(1, keepdims=True)
    found = []
    for label in range(1, CLASSES + 1):
        boxes = np.array(
            [
                decode_loop(d, a, limits)
                for d, a in zip(np.asarray(output.deltas[:, label - 1]), PROPOSALS, strict=True)
            ]
        )
        valid = PROPOSALS_VALID & (scores[:, label] > 0.05) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        found += [
            (scores[i, label], label, boxes[i])
            for i in greedy(boxes, scores[:, label], valid, 0.5, len(boxes))
        ]
    return sorted(found, key=lambda row: -row[0])[:20]


# Many detections; few over the threshold, in a small image that some boxes are wholly outside of.
@pytest.mark.parametrize(
    ("scale", "background", "size"), [(1.0, 0.0, (60, 50)), (1.0, 3.5, (40, 45))]
)
def test_detections_equal_a_loop(scale: float, background: float, size: tuple[int, int]) -> None:
    output = predictions(7, scale)
    output = output.replace(logits=output.logits.at[:, 0].add(background))
    expected = detections_loop(output, np.array([size[1], size[0]] * 2, np.float32))
    assert len(expected) == 20 if background == 0 else 3 <= len(expected) < 20
    detect = jax.jit(
        lambda output, proposals, size: box_detections(output, proposals, size, CONFIG)
    )
    found = jax.tree.map(
        np.asarray, detect(output, instances(PROPOSALS, PROPOSALS_VALID), np.array(size, np.int32))
    )
    n = len(expected)
    assert found.valid.tolist() == [True] * n + [False] * (20 - n)
    np.testing.assert_array_equal(found.labels[:n], [label for _, label, _ in expected])
    np.testing.assert_allclose(found.scores[:n], [score for score, _, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(
        found.boxes[:n], [box for _, _, box in expected], rtol=1e-5, atol=1e-4
    )
    assert len(set(found.labels[:n])) > 1
    assert (
        found.labels[:n].min() >= 1
    )  # the background, though often likeliest, is never a detection


def test_detections_at_the_borders_of_the_rules() -> None:
    """A score has to be above its threshold; the least side is enough."""
    config = replace(CONFIG, score_threshold=0.5, min_size=8.0)
    output = BoxOutput(
        logits=jnp.array([[0, 0], [0, 0.1], [0, 0.2]], jnp.float32),
        deltas=jnp.zeros((3, 1, 4), jnp.float32),
    )
    proposals = instances([[40, 0, 60, 20], [0, 0, 8, 8], [20, 20, 27.9, 40]])
    detect = jax.jit(box_detections, static_argnames="config")
    found = detect(output, proposals, np.array([64, 64], np.int32), config=config)
    assert np.asarray(found.boxes)[found.valid].tolist() == [[0, 0, 8, 8]]


def test_one_box_for_all_classes_is_that_box_for_each() -> None:
    """Loss and detections of a class-agnostic head are those of a head with equal boxes."""
    agnostic = replace(CONFIG, class_agnostic=True)
    output, samples = batch()
    single = output.replace(deltas=output.deltas[:, :, :1])
    each = output.replace(deltas=jnp.repeat(single.deltas, CLASSES, axis=2))
    all_images = np.ones(3, bool)
    (_, ours), gradient = VALUE_AND_GRAD(single, samples, all_images, config=agnostic)
    (_, expected), by_class = VALUE_AND_GRAD(each, samples, all_images, config=CONFIG)
    for name, value in expected.items():
        assert float(ours[name]) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(gradient.deltas[:, :, 0], by_class.deltas.sum(2), rtol=1e-6)

    predicted = predictions(7, 1.0)
    single = predicted.replace(deltas=predicted.deltas[:, :1])
    each = predicted.replace(deltas=jnp.repeat(single.deltas, CLASSES, axis=1))
    found, expected = (
        jax.jit(box_detections, static_argnames="config")(
            output, instances(PROPOSALS, PROPOSALS_VALID), jnp.array([60, 50]), config=config
        )
        for output, config in ((single, agnostic), (each, CONFIG))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    head = BoxHead(replace(agnostic, hidden=8), CLASSES)
    shapes = jax.eval_shape(head.init_with_output, jax.random.key(0), np.zeros((5, 4, 4, 6)))[0]
    assert (shapes.logits.shape, shapes.deltas.shape) == ((5, CLASSES + 1), (5, 1, 4))


def test_invalid_proposals_have_no_part_in_detections() -> None:
    detect = jax.jit(
        lambda output, proposals: box_detections(output, proposals, jnp.array([60, 50]), CONFIG)
    )
    output, invalid = predictions(7, 1.0), ~PROPOSALS_VALID
    expected = detect(output, instances(PROPOSALS, PROPOSALS_VALID))
    for poison in (np.nan, 1e9):
        boxes = np.where(invalid[:, None], poison, PROPOSALS)
        poisoned = jax.tree.map(lambda leaf: leaf.at[invalid].set(poison), output)  # noqa: B023
        jax.tree.map(
            np.testing.assert_array_equal,
            detect(poisoned, instances(boxes, PROPOSALS_VALID)),
            expected,
        )
    assert not detect(output, instances(PROPOSALS, PROPOSALS_VALID & False)).valid.any()
