"""The laws of padded sets for every op and loss, each used as its docstring asks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.config.heads import BoxLoss
from mrcnn_jax.config.model import RoIConfig
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses, masks, matching, roi, sampling
from mrcnn_jax.ops.nms import nms

from .laws import Function, Outcome, Rows, assert_laws, poisoned
from .strategies import random_boxes

N = 11
RNG = np.random.default_rng(7)
OTHERS = jnp.array(random_boxes(RNG, N))  # a second set, all of it valid
FEATURES = [jnp.array(RNG.normal(size=(*grid, 3)), jnp.float32) for grid in ((5, 6), (3, 3))]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
ROWS: Rows = {
    "boxes": random_boxes(RNG, N),
    "anchors": random_boxes(RNG, N),
    "scores": RNG.normal(size=N).astype(np.float32),
    "pred": RNG.normal(size=(N, 4)).astype(np.float32),
    "target": RNG.normal(size=(N, 4)).astype(np.float32),
    "labels": RNG.integers(0, 4, N).astype(np.int32),
    "levels": RNG.integers(0, 2, N).astype(np.int32),
    "masks": RNG.integers(0, 256, (N, 6, 6)).astype(np.uint8),
}
VALID = np.array([True, False, True, True, False, True, True, False, True, True, True])


def geometry(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    boxes = box_ops.sanitize(rows["boxes"], valid)
    size = jnp.array([40, 50])
    return Outcome(
        rows=(box_ops.area(boxes), box_ops.clip(boxes, size), box_ops.iou(boxes, OTHERS),
              box_ops.iou(OTHERS, boxes).T, box_ops.intersection_over_area(boxes, OTHERS)),
        totals=jnp.max(losses.zero_invalid(box_ops.iou(boxes, OTHERS), valid), axis=0),
    )  # fmt: skip


def coding(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    boxes, anchors = (box_ops.sanitize(rows[name], valid) for name in ("boxes", "anchors"))
    deltas = losses.zero_invalid(rows["pred"], valid)
    return Outcome(
        rows=(
            box_ops.encode(boxes, anchors, weights=WEIGHTS),
            box_ops.decode(deltas, anchors, weights=WEIGHTS),
        )
    )


def matched_rows(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    """The rows are the boxes that are matched."""
    overlap = box_ops.iou(box_ops.sanitize(rows["boxes"], valid), OTHERS)
    everything = jnp.ones(N, bool)
    return Outcome(
        rows=(
            matching.match(overlap, everything),
            matching.best_anchor_mask(overlap, valid, everything),
        )
    )


def matched_ground_truth(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    """The rows are ground truth: other boxes get the same partner, whatever its index."""
    boxes = box_ops.sanitize(rows["boxes"], valid)
    overlap = box_ops.iou(OTHERS, boxes)
    matches = matching.match(overlap, valid)
    partners = losses.zero_invalid(
        boxes[matches.gt_index], matches.iou > 0
    )  # at IoU 0 all are equal: a tie
    return Outcome(
        totals=(matches.iou, partners, matching.best_anchor_mask(overlap, jnp.ones(N, bool), valid))
    )


def raw_overlaps(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    """Raw overlaps (targets have no gradient): matching alone ignores invalid ground truth."""
    overlap = jax.lax.stop_gradient(box_ops.iou(OTHERS, rows["boxes"]))
    return Outcome(
        totals=(
            matching.match(overlap, valid).iou,
            matching.best_anchor_mask(overlap, jnp.ones(N, bool), valid),
        )
    )


def suppression(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    indices, filled = nms(rows["boxes"], rows["scores"], valid, iou_threshold=0.2, max_output=6)
    kept = (
        jnp.zeros(valid.shape, bool)
        .at[jnp.where(filled, indices, valid.shape[0])]
        .set(True, mode="drop")
    )
    chosen = losses.zero_invalid(rows["scores"], valid)[indices]
    return Outcome(rows=kept, totals=(jnp.where(filled, chosen, 0), filled))


POOLING = {
    "align": RoIConfig(),
    "align_corner_adaptive": RoIConfig(aligned=False, sampling_ratio=0, max_sampling_ratio=2),
    "pool": RoIConfig(op="pool"),
    "warp": RoIConfig(op="warp"),
}


def pool(
    features: list[jax.Array], rows: dict[str, Any], valid: jax.Array, config: RoIConfig
) -> jax.Array:
    return roi.roi_features(
        features,
        rows["boxes"],
        valid,
        levels=rows["levels"],
        strides=(16, 32),
        output_size=3,
        config=config,
    )


def level_rule(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    return Outcome(
        rows=roi.assign_levels(
            rows["boxes"], canonical_size=16, canonical_level=4, min_level=2, max_level=5
        )
    )


def mask_targets_of_boxes(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    all_masks = jnp.array(ROWS["masks"])
    index = jnp.where(valid, rows["labels"], 0)
    return Outcome(rows=masks.crop_targets(all_masks, OTHERS, index, rows["boxes"], size=5))


def mask_targets_of_ground_truth(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    matches = matching.match(box_ops.iou(OTHERS, box_ops.sanitize(rows["boxes"], valid)), valid)
    return Outcome(
        totals=masks.crop_targets(rows["masks"], rows["boxes"], matches.gt_index, OTHERS, size=5)
    )


def regression_loss(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    pred, target = (
        losses.zero_invalid(rows["pred"], valid),
        losses.zero_invalid(rows["target"], valid),
    )
    kinds: tuple[BoxLoss, ...] = ("smooth_l1", "l1", "giou")
    values = [
        losses.box_regression(pred, target, kind=kind, beta=0.5, weights=WEIGHTS) for kind in kinds
    ]
    return Outcome(
        totals=[
            (losses.masked_sum(v, valid), losses.masked_mean(v, valid, denominator=jnp.sum(valid)))
            for v in values
        ]
    )


def encoded_loss(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    deltas = box_ops.encode(
        box_ops.sanitize(rows["boxes"], valid),
        box_ops.sanitize(rows["anchors"], valid),
        weights=WEIGHTS,
    )
    values = losses.smooth_l1(losses.zero_invalid(rows["pred"], valid), deltas, beta=1.0)
    return Outcome(totals=losses.masked_mean(values, valid))


def binary_loss(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    logits, targets = (
        losses.zero_invalid(rows["pred"], valid),
        (losses.zero_invalid(rows["target"], valid) > 0).astype(jnp.float32),
    )
    values = (
        losses.binary_cross_entropy(logits, targets),
        losses.focal(logits, targets, gamma=0.5, alpha=0.25),
    )
    return Outcome(
        totals=[(losses.masked_sum(v, valid), losses.masked_mean(v, valid)) for v in values]
    )


def competing_masks(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    logits = losses.zero_invalid(rows["pred"], valid).reshape(-1, 1, 2, 2)
    targets, labels = (
        losses.zero_invalid(rows["target"], valid)[:, None, :2] > 0,
        losses.zero_invalid(rows["labels"], valid),
    )
    values = losses.mask_cross_entropy(logits, targets.astype(jnp.float32), labels)
    return Outcome(
        rows=losses.mask_softmax(logits),
        totals=(losses.masked_sum(values, valid), losses.masked_mean(values, valid)),
    )


def class_loss(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    values = losses.cross_entropy(
        losses.zero_invalid(rows["pred"], valid), losses.zero_invalid(rows["labels"], valid)
    )
    return Outcome(totals=(losses.masked_sum(values, valid), losses.masked_mean(values, valid)))


def sums(rows: dict[str, Any], valid: jax.Array) -> Outcome:
    """The sums alone select on their input: NaN values that were computed elsewhere."""
    return Outcome(
        totals=(losses.masked_sum(rows["pred"], valid), losses.masked_mean(rows["pred"], valid))
    )


CASES: list[Function] = [
    geometry, coding, matched_rows, matched_ground_truth, raw_overlaps, suppression, level_rule,
    mask_targets_of_boxes, mask_targets_of_ground_truth, regression_loss, encoded_loss, binary_loss,
    competing_masks, class_loss, sums,
]  # fmt: skip


@pytest.mark.parametrize("function", CASES)
def test_laws(function: Function) -> None:
    assert_laws(function, ROWS, VALID)


@pytest.mark.parametrize("op", POOLING)
def test_laws_of_pooling(op: str) -> None:
    def pooling(rows: dict[str, Any], valid: jax.Array) -> Outcome:
        pooled = pool(FEATURES, rows, valid, POOLING[op])
        return Outcome(rows=pooled, totals=jnp.sum(pooled))

    assert_laws(pooling, ROWS, VALID)


@pytest.mark.parametrize("op", POOLING)
def test_features_get_the_same_gradient_whatever_invalid_boxes_hold(op: str) -> None:
    pooling = jax.jit(lambda features, rows: pool(features, rows, jnp.array(VALID), POOLING[op]))

    def gradient(rows: Rows, cotangent: jax.Array) -> list[jax.Array]:
        arrays = {name: jnp.array(rows[name]) for name in ("boxes", "levels")}
        pooled, vjp = jax.vjp(lambda features: pooling(features, arrays), FEATURES)
        assert (np.asarray(pooled)[~VALID] == 0).all()
        return vjp(cotangent)[0]

    cotangent = np.random.default_rng(8).normal(size=(N, 3, 3, 3)).astype(np.float32)
    reference = gradient(ROWS, jnp.array(cotangent))
    cotangent[~VALID] = np.nan
    for poison in (np.nan, 1e9):
        for ours, expected in zip(
            gradient(poisoned(ROWS, VALID, poison), jnp.array(cotangent)), reference, strict=True
        ):
            np.testing.assert_array_equal(ours, expected)


def test_sampling_keeps_counts_under_order_and_padding() -> None:
    rng = np.random.default_rng(9)
    positive, valid = rng.random(60) < 0.2, rng.random(60) < 0.8

    def counts(positive: np.ndarray, valid: np.ndarray) -> tuple[int, int]:
        drawn = sampling.sample(
            jax.random.key(0),
            positive=jnp.array(positive & valid),
            negative=jnp.array(~positive & valid),
            count=24,
            positive_fraction=0.25,
        )
        assert valid[np.asarray(drawn.indices)[np.asarray(drawn.valid)]].all()
        return int(drawn.positive.sum()), int(drawn.valid.sum())

    order = rng.permutation(60)
    longer = np.concatenate([valid, np.zeros(9, bool)])
    assert (
        counts(positive, valid)
        == counts(positive[order], valid[order])
        == counts(np.concatenate([positive, np.ones(9, bool)]), longer)
    )
