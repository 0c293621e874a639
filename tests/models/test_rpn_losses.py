"""Targets and losses of the RPN against plain NumPy loops, and the laws of padded sets."""

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
from ops.test_boxes import iou_loop
from rpn_cases import (
    ANCHORS,
    CONFIG,
    SIZE,
    WEIGHTS,
    assert_loss_laws,
    decode_loop,
    encode_loop,
    giou_loop,
    instances,
    near,
    smooth_l1_loop,
)

from mrcnn_jax.config.model import RPNConfig
from mrcnn_jax.models.rpn import (
    RPNOutput,
    RPNTargets,
    rpn_labels,
    rpn_loss,
    rpn_targets,
    usable_anchors,
)
from mrcnn_jax.structures import Instances

GROUND_TRUTH = near(ANCHORS[[256, 693, 1232, 1242, 1461, 1463, 1509]], seed=2)
GROUND_TRUTH = np.concatenate([GROUND_TRUTH, [[18.5, 30.1, 24.6, 34.9], [5, 5, 25, 25]]]).astype(
    np.float32
)
GT_VALID = np.array([True] * 8 + [False])
CROWD = np.array([[0, 0, 30.7, 21.3], [40.3, 30.9, 60.1, 48.3], [0, 0, 70, 50]], np.float32)
CROWD_VALID = np.array([True, True, False])


def usable_loop(across_border: bool) -> np.ndarray:
    usable = []
    for x1, y1, x2, y2 in ANCHORS.astype(float):
        inside = x1 >= 0 and y1 >= 0 and x2 <= 70 and y2 <= 50
        usable.append((x1 + x2) / 2 < 70 and (y1 + y2) / 2 < 50 and (across_border or inside))
    return np.array(usable)


@pytest.mark.parametrize("across_border", [True, False])
def test_labels_equal_a_loop(across_border: bool) -> None:
    config = replace(CONFIG, anchors_across_border=across_border)
    usable = usable_loop(across_border)
    np.testing.assert_array_equal(
        jax.jit(functools.partial(usable_anchors, config))(ANCHORS, SIZE), usable
    )

    overlap = iou_loop(ANCHORS, GROUND_TRUTH[GT_VALID])
    best = overlap.max(1)
    positive = usable & (best >= 0.7)
    for column in overlap.T:
        touched = np.where(usable, column, 0)
        if touched.max() > 0:
            assert (
                np.sort(touched)[-1] - np.sort(touched)[-2] > 1e-5
            )  # no ties: these are a test by hand below
            positive[touched.argmax()] = True
    crowded = np.zeros(len(ANCHORS), bool)
    for i, (x1, y1, x2, y2) in enumerate(ANCHORS.astype(float)):
        for c1, d1, c2, d2 in CROWD[CROWD_VALID].astype(float):
            shared = max(min(x2, c2) - max(x1, c1), 0) * max(min(y2, d2) - max(y1, d1), 0)
            crowded[i] |= shared / ((x2 - x1) * (y2 - y1)) >= 0.5
    negative = usable & ~positive & (best < 0.3) & ~crowded

    labels = jax.jit(functools.partial(rpn_labels, config=config))
    result = labels(
        ANCHORS, usable, instances(GROUND_TRUTH, GT_VALID), instances(CROWD, CROWD_VALID)
    )
    np.testing.assert_array_equal(result[0], positive)
    np.testing.assert_array_equal(result[1], negative)
    np.testing.assert_array_equal(np.asarray(result[2])[positive], overlap.argmax(1)[positive])
    # Every rule decides about some anchor here, so that another threshold would be another result.
    rest = usable & ~positive
    assert (positive & (best < 0.7)).any()
    assert (rest & crowded & (best < 0.3)).any()
    for low, high, among in (
        (0.7, 0.75, positive),
        (0.6, 0.7, rest),
        (0.3, 0.35, rest),
        (0.25, 0.3, negative),
    ):
        assert (among & (best > low) & (best < high)).any()


def test_labels_at_the_borders_of_the_rules() -> None:
    ground_truth = instances([[0, 0, 10, 10], [42, 2, 52, 12], [100, 100, 104, 104]])
    cases = [
        ([0, 0, 10, 10], "positive"),
        ([0, 0, 10, 7], "positive"),  # IoU 0.7
        ([0, 0, 10, 6.9], "ignored"),
        ([0, 0, 10, 3], "ignored"),  # IoU 0.3
        ([0, 0, 10, 2.9], "negative"),
        ([50, 0, 70, 10], "ignored"),  # half of it in the crowd region
        ([51, 0, 71, 10], "negative"),
        ([42, 2, 52, 12], "positive"),  # in the crowd region: that is no matter to a positive
        ([98, 98, 108, 108], "positive"),  # IoU 0.16, and the best
        ([98, 98, 108, 108], "positive"),  # as good
        ([97, 98, 108, 108], "negative"),
    ]
    anchors = np.array([box for box, _ in cases], np.float32)
    labels = jax.jit(functools.partial(rpn_labels, config=CONFIG))
    positive, negative, _ = labels(
        anchors, np.ones(len(cases), bool), ground_truth, instances([[40, 0, 60, 20]])
    )
    found = [
        "positive" if p else "negative" if n else "ignored"
        for p, n in zip(positive, negative, strict=True)
    ]
    assert found == [label for _, label in cases]


TARGETS = jax.jit(rpn_targets, static_argnames="config")
SMALL = replace(CONFIG, samples=24)


def test_samples_are_one_to_one_as_far_as_there_are_positives() -> None:
    usable = usable_loop(across_border=True)
    ignore = instances(CROWD, CROWD_VALID)
    labels = jax.jit(functools.partial(rpn_labels, config=CONFIG))
    many = near(ANCHORS[np.flatnonzero(usable)[::60]], seed=1, shift=0.05, growth=0.1)
    drawn = []
    for boxes, key in ((many, 0), (many, 1), (many[:2], 2), (np.zeros((1, 4)), 3)):
        ground_truth = instances(boxes, boxes[:, 2] > 0)
        positive, negative, gt_index = map(
            np.asarray, labels(ANCHORS, usable, ground_truth, ignore)
        )
        targets = jax.tree.map(
            np.asarray,
            TARGETS(jax.random.key(key), ANCHORS, SIZE, ground_truth, ignore, config=SMALL),
        )
        indices, chosen = targets.samples.indices, targets.samples.positive
        wanted = min(12, positive.sum())
        assert targets.samples.valid.all()
        assert chosen.sum() == wanted
        assert positive[indices[chosen]].all()
        assert negative[indices[~chosen]].all()
        assert len(set(indices)) == 24
        for row in np.flatnonzero(chosen):
            deltas = encode_loop(boxes[gt_index[indices[row]]], ANCHORS[indices[row]])
            expected = np.array(deltas) * WEIGHTS
            np.testing.assert_allclose(targets.deltas[row], expected, rtol=1e-4, atol=1e-5)
        drawn.append((wanted, set(indices)))
    assert drawn[0][0] == 12
    assert drawn[0][1] != drawn[1][1]  # another key, another draw
    assert 2 <= drawn[2][0] < 12
    assert drawn[3][0] == 0


def batch_of_targets() -> tuple[RPNOutput, RPNTargets]:
    """Three images: objects, none, objects."""
    rng = np.random.default_rng(2)
    images = [
        TARGETS(
            jax.random.key(i),
            ANCHORS,
            SIZE,
            instances(GROUND_TRUTH, valid),
            instances(CROWD, CROWD_VALID),
            config=SMALL,
        )
        for i, valid in enumerate((GT_VALID, GT_VALID & False, GT_VALID))
    ]
    logits, deltas = (
        rng.normal(size=(3, len(ANCHORS))),
        rng.normal(scale=1.5, size=(3, len(ANCHORS), 4)),
    )
    output = RPNOutput(logits=jnp.array(logits, jnp.float32), deltas=jnp.array(deltas, jnp.float32))
    return output, jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)


VALUE_AND_GRAD = jax.jit(
    lambda output, targets, image_valid, config: jax.value_and_grad(
        lambda output: (lambda values: (sum(values.values()), values))(
            rpn_loss(output, targets, image_valid, config)
        ),
        has_aux=True,
    )(output),
    static_argnames="config",
)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, smooth_l1_beta=0.5, objectness_loss_weight=2.0, box_loss_weight=3.0),
        replace(SMALL, box_loss="giou"),
    ],
)
def test_loss_equals_a_loop(config: RPNConfig) -> None:
    output, targets = batch_of_targets()
    # Slots that stayed empty, in the first image.
    valid = targets.samples.valid.at[0, 20:].set(False)
    targets = targets.replace(samples=replace(targets.samples, valid=valid))
    image_valid = np.array([True, True, False])
    samples = jax.tree.map(np.asarray, targets.samples)
    objectness, box, count = 0.0, 0.0, 0
    for image, slot in np.ndindex(samples.indices.shape):
        if not (image_valid[image] and samples.valid[image, slot]):
            continue
        count += 1
        anchor, logit = (
            samples.indices[image, slot],
            float(output.logits[image, samples.indices[image, slot]]),
        )
        probability = 1 / (1 + math.exp(-logit))
        objectness -= math.log(probability if samples.positive[image, slot] else 1 - probability)
        if samples.positive[image, slot]:
            deltas, target = np.asarray(output.deltas[image, anchor]), targets.deltas[image, slot]
            if config.box_loss == "giou":
                box += 1 - giou_loop(
                    *(decode_loop(d / WEIGHTS, ANCHORS[anchor], None) for d in (deltas, target))
                )
            else:
                box += smooth_l1_loop(deltas, target, config.smooth_l1_beta)
    assert count == 44
    (_, values), _ = VALUE_AND_GRAD(output, targets, image_valid, config=config)
    assert float(values["rpn_objectness"]) == pytest.approx(
        config.objectness_loss_weight * objectness / count, rel=1e-5
    )
    assert float(values["rpn_box"]) == pytest.approx(config.box_loss_weight * box / count, rel=1e-5)


def test_an_image_without_objects_has_no_box_loss() -> None:
    output, targets = batch_of_targets()
    (_, values), gradient = VALUE_AND_GRAD(
        output, targets, np.array([False, True, False]), config=SMALL
    )
    assert float(values["rpn_box"]) == 0
    assert float(values["rpn_objectness"]) > 0
    assert (np.asarray(gradient.deltas) == 0).all()
    assert np.isfinite(gradient.logits).all()
    assert np.count_nonzero(gradient.logits[1]) == SMALL.samples  # negatives all
    # Nor is there anything to divide by where no image is valid.
    (_, values), gradient = VALUE_AND_GRAD(output, targets, np.zeros(3, bool), config=SMALL)
    assert [float(value) for value in values.values()] == [0, 0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_an_image_that_is_not_valid_changes_nothing() -> None:
    output, targets = batch_of_targets()
    first = jax.tree.map(lambda leaf: leaf[:2], (output, targets))
    (_, expected), reference = VALUE_AND_GRAD(*first, np.ones(2, bool), config=SMALL)
    for poison in (np.nan, 1e9):
        output = jax.tree.map(lambda leaf: leaf.at[2].set(poison), output)  # noqa: B023
        targets = targets.replace(deltas=targets.deltas.at[2].set(poison))
        (_, values), gradient = VALUE_AND_GRAD(
            output, targets, np.array([True, True, False]), config=SMALL
        )
        for name, value in expected.items():
            assert float(values[name]) == pytest.approx(float(value), rel=1e-6)
        for ours, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(ours[:2], leaf, rtol=1e-6)
            assert (np.asarray(ours[2]) == 0).all()


@pytest.mark.parametrize("varied", ["ground_truth", "ignore"])
def test_laws_of_padded_sets(varied: str) -> None:
    """Losses and their gradients by the predictions, as functions of one of the two sets that the
    targets are made from."""
    output = jax.tree.map(lambda leaf: leaf[:1], batch_of_targets()[0])

    def function(rows: Rows, valid: np.ndarray) -> Any:
        sets = {
            "ground_truth": instances(GROUND_TRUTH, GT_VALID),
            "ignore": instances(CROWD, CROWD_VALID),
        }
        sets[varied] = Instances(valid=jnp.asarray(valid), **rows)
        targets = rpn_targets(
            jax.random.key(4), jnp.asarray(ANCHORS), jnp.asarray(SIZE), config=SMALL, **sets
        )
        batch = jax.tree.map(lambda leaf: leaf[None], targets)
        values, vjp = jax.vjp(
            lambda output: rpn_loss(output, batch, jnp.ones(1, bool), SMALL), output
        )
        return values, vjp({name: jnp.float32(1) for name in values})

    boxes, valid = (GROUND_TRUTH, GT_VALID) if varied == "ground_truth" else (CROWD, CROWD_VALID)
    assert_loss_laws(function, {"boxes": boxes}, valid)
