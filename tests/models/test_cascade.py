"""A cascade of box heads against NumPy loops, the laws of padded sets, and what it must not learn
from."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.laws import Rows
from ops.test_boxes import iou_loop
from ops.test_nms import greedy
from rpn_cases import assert_loss_laws, decode_loop, encode_loop, smooth_l1_loop
from test_box_head import (
    CLASSES,
    CROWD,
    CROWD_VALID,
    GROUND_TRUTH,
    GT_LABELS,
    GT_VALID,
    PROPOSALS,
    PROPOSALS_VALID,
    samples_of,
)

from mrcnn_jax.config.heads import BoxHeadConfig
from mrcnn_jax.config.schema import BOX_LOSSES
from mrcnn_jax.models.box_head import BoxOutput, BoxSamples
from mrcnn_jax.models.cascade import box_losses, cascade_detections
from mrcnn_jax.models.mask_rcnn import example_batch
from mrcnn_jax.ops import losses
from mrcnn_jax.structures import Batch, Instances

CONFIG = BoxHeadConfig(
    foreground_iou=0.5,
    box_weights=(10.0, 10.0, 5.0, 5.0),
    samples=24,
    class_loss_weight=2.0,
    box_loss_weight=3.0,
    class_agnostic=True,
    cascade=(0.6, 0.7),
)
# By hand: what each head has of its own.
IOUS, FACTORS, SHARES = (0.5, 0.6, 0.7), (1, 2, 3), (1, 0.5, 0.25)
WEIGHTS = np.array(CONFIG.box_weights)
RNG = np.random.default_rng(11)
# Logits and deltas of each head are products with what the boxes are.
HEADS = [
    (
        RNG.normal(scale=1.0, size=(4, CLASSES + 1)).astype(np.float32),
        RNG.normal(scale=0.5, size=(4, 4)).astype(np.float32),
    )
    for _ in IOUS
]
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
SIZES = np.array([[60, 50], [40, 34]], np.int32)  # some boxes are outside of the second


def predict(boxes: jax.Array, valid: jax.Array, *, head: int, heads: Any = HEADS) -> BoxOutput:
    """Reads no row that does not exist, as the RoI operation, and answers it with NaN."""
    rows = jnp.sin(losses.zero_invalid(boxes, valid) / 10)
    exists = jnp.broadcast_to(valid[..., None], (*valid.shape, 1))
    logits, deltas = (jnp.where(exists, rows @ kernel, jnp.nan) for kernel in heads[head])
    return BoxOutput(logits=logits, deltas=deltas[..., None, :])


def predict_loop(box: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits, deltas)"""
    logits, deltas = (np.sin(box.astype(float) / 10) @ kernel for kernel in HEADS[head])
    return logits, deltas


def moved_loop(box: np.ndarray, head: int, size: np.ndarray) -> np.ndarray | None:
    """The box that a head makes of a box; None if nothing of it is left."""
    deltas = predict_loop(box, head)[1] / (FACTORS[head] * WEIGHTS)
    x1, y1, x2, y2 = found = decode_loop(deltas, box, size[[1, 0, 1, 0]])
    return found if x2 > x1 and y2 > y1 else None


# Training


@functools.cache
def samples() -> BoxSamples:
    """The first head's, of two images, some of them not valid."""
    drawn = [samples_of(seed, CONFIG) for seed in range(2)]
    found = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    return found.replace(valid=found.valid.at[:, 5:7].set(False))


def batch(ground_truth: Instances, ignore: Instances) -> Batch:
    both = jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=0), example_batch((64, 64)))
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (ground_truth, ignore))
    return both.replace(image_sizes=SIZES, ground_truth=twice[0], ignore=twice[1])


def truth() -> tuple[Instances, Instances]:
    return (
        Instances(boxes=GROUND_TRUTH, valid=GT_VALID, labels=GT_LABELS),
        Instances(boxes=CROWD, valid=CROWD_VALID),
    )


@functools.cache
def losses_of(wanted: tuple[Any, ...]) -> dict[str, float]:
    find = jax.jit(
        lambda samples, batch: box_losses(samples, batch, CONFIG, wanted, predict=predict),
        compiler_options=QUICK_COMPILE,
    )
    return jax.tree.map(float, find(samples(), batch(*truth())))


def losses_loop(samples: BoxSamples) -> Iterator[dict[str, float]]:
    """The losses of each head, and how many boxes it had: lost, in the crowd, of each kind."""
    truth, labels = GROUND_TRUTH[GT_VALID], GT_LABELS[GT_VALID]
    rows = [
        [
            (np.array(box), int(label), np.array(deltas))
            for box, label, deltas, valid in zip(*image, strict=True)
            if valid
        ]
        for image in zip(samples.boxes, samples.labels, samples.deltas, samples.valid, strict=True)
    ]
    for head, (threshold, share) in enumerate(zip(IOUS, SHARES, strict=True)):
        lost = crowd = 0
        if head:
            after = []
            for image, size in zip(rows, SIZES, strict=True):
                here = []
                for box, *_ in image:
                    moved = moved_loop(box, head - 1, size)
                    if moved is None:
                        lost += 1
                        continue
                    overlap = iou_loop(moved[None], truth)[0]
                    best = int(overlap.argmax())
                    x1, y1, x2, y2 = moved.astype(float)
                    inside = max(min(x2, 40.5) - max(x1, 0.5), 0) * max(
                        min(y2, 64) - max(y1, 30.5), 0
                    )
                    if overlap[best] > threshold:
                        target = np.array(encode_loop(truth[best], moved)) * FACTORS[head] * WEIGHTS
                        here.append((moved, int(labels[best]), target))
                    elif inside / ((x2 - x1) * (y2 - y1)) < 0.5:
                        here.append((moved, 0, np.zeros(4)))
                    else:
                        crowd += 1
                after.append(here)
            rows = after
        classes = regression = 0.0
        everything = [row for image in rows for row in image]
        for box, label, target in everything:
            logits, deltas = predict_loop(box, head)
            classes += math.log(np.exp(logits).sum()) - logits[label]
            if label:
                regression += smooth_l1_loop(deltas, target)
        yield {
            "class": share * 2 * classes / len(everything),
            "box": share * 3 * regression / len(everything),
            "lost": lost,
            "crowd": crowd,
            "foreground": sum(label > 0 for _, label, _ in everything),
            "background": sum(label == 0 for _, label, _ in everything),
        }


def test_losses_equal_a_loop() -> None:
    """Each head has the boxes that the one before moved, matched anew, by its own constants."""
    found, expected = losses_of(BOX_LOSSES), list(losses_loop(samples()))
    assert set(found) == {f"{name}_{kind}" for name in BOX_LOSSES for kind in ("class", "box")}
    for name, values in zip(BOX_LOSSES, expected, strict=True):
        for kind in ("class", "box"):
            assert found[f"{name}_{kind}"] == pytest.approx(values[kind], rel=1e-4), (name, kind)
    # All that can become of a box does.
    for values in expected[1:]:
        assert min(values["foreground"], values["background"]) > 3
    assert expected[1]["lost"] > 0
    assert expected[1]["crowd"] > 0


def test_only_wanted_losses_are_there() -> None:
    """With the values that they have beside the others; the heads after the last are not run."""
    for wanted in (("box2",), ("rpn", "box", "box3", "mask")):
        found = losses_of(wanted)
        names = [name for name in wanted if name in BOX_LOSSES]
        assert set(found) == {f"{name}_{kind}" for name in names for kind in ("class", "box")}
        for name, value in found.items():
            assert value == pytest.approx(losses_of(BOX_LOSSES)[name], rel=1e-6)


def test_a_head_learns_nothing_from_the_boxes_that_it_hands_on() -> None:
    """Boxes are constants to the next head: its loss has no gradient by the heads before."""

    first, here = samples(), batch(*truth())

    def of_last(heads: Any) -> jax.Array:
        values = box_losses(
            first,
            here,
            CONFIG,
            ("box3",),
            predict=lambda boxes, valid, *, head: predict(boxes, valid, head=head, heads=heads),
        )
        return values["box3_class"] + values["box3_box"]

    gradients = jax.jit(jax.grad(of_last), compiler_options=QUICK_COMPILE)(HEADS)
    moving = [[bool(np.any(leaf)) for leaf in head] for head in gradients]
    assert moving == [[False, False], [False, False], [True, True]]


@pytest.mark.parametrize("varied", ["samples", "ground_truth"])
def test_laws_of_padded_sets(varied: str) -> None:
    """Losses of two heads and their gradients by the weights, as functions of one of the sets."""
    config, heads = replace(CONFIG, cascade=(0.6,)), HEADS[:2]
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[0], samples())
    sets: dict[str, tuple[Rows, np.ndarray]] = {
        "samples": (
            {"boxes": first.boxes, "labels": first.labels, "deltas": first.deltas},
            first.valid,
        ),
        "ground_truth": ({"boxes": GROUND_TRUTH, "labels": GT_LABELS}, GT_VALID),
    }

    def function(rows: Rows, valid: np.ndarray) -> Any:
        chosen = sets | {varied: (rows, valid)}
        made: dict[str, Any] = {
            name: (BoxSamples if name == "samples" else Instances)(
                valid=jnp.asarray(mask), **fields
            )
            for name, (fields, mask) in chosen.items()
        }
        drawn = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), made["samples"])
        here = batch(made["ground_truth"], truth()[1])

        def loss(heads: Any) -> Any:
            return box_losses(
                drawn,
                here,
                config,
                BOX_LOSSES[:2],
                predict=lambda boxes, valid, *, head: predict(boxes, valid, head=head, heads=heads),
            )

        values, vjp = jax.vjp(loss, heads)
        return values, vjp({name: jnp.float32(1) for name in values})

    assert_loss_laws(function, *sets[varied])


# Detections


def detections_loop(size: np.ndarray) -> list[tuple[float, int, np.ndarray]]:
    """(score, label, box), best first, no more than 20."""
    scores, boxes = [], []
    for box in PROPOSALS[PROPOSALS_VALID]:
        total, moved = np.zeros(CLASSES + 1), box
        for head in range(3):
            exp = np.exp(predict_loop(moved, head)[0])
            total += exp / exp.sum()
            after = moved_loop(moved, head, size)
            if after is None:
                break
            moved = after
        else:
            scores.append(total / 3)
            boxes.append(moved)
    assert len(boxes) < PROPOSALS_VALID.sum() or size[0] == 60
    found, last = [], np.array(boxes)
    for label in range(1, CLASSES + 1):
        ours = np.array(scores)[:, label]
        rows = greedy(last, ours, ours > 0.05, 0.5, len(last))
        found += [(ours[i], label, last[i]) for i in rows]
    return sorted(found, key=lambda row: -row[0])[:20]


def test_detections_equal_a_loop() -> None:
    """Refined thrice, with the mean of the three probabilities, each of its own boxes."""
    both = Instances(
        boxes=jnp.stack([PROPOSALS, PROPOSALS]), valid=jnp.stack([PROPOSALS_VALID] * 2)
    )
    detect = jax.jit(
        lambda proposals: cascade_detections(proposals, SIZES, CONFIG, predict=predict),
        compiler_options=QUICK_COMPILE,
    )
    found = jax.tree.map(np.asarray, detect(both))
    for image, size in enumerate(SIZES):
        expected = detections_loop(size)
        n = len(expected)
        assert n > 10
        assert found.valid[image].tolist() == [True] * n + [False] * (20 - n)
        np.testing.assert_array_equal(found.labels[image, :n], [label for _, label, _ in expected])
        np.testing.assert_allclose(
            found.scores[image, :n], [score for score, _, _ in expected], rtol=1e-4
        )
        np.testing.assert_allclose(
            found.boxes[image, :n], [box for _, _, box in expected], rtol=1e-4, atol=1e-3
        )
    assert len(set(found.labels[found.valid])) == CLASSES
    for poison in (np.nan, 1e9):
        boxes = jnp.where(both.valid[..., None], both.boxes, poison)
        jax.tree.map(np.testing.assert_array_equal, detect(both.replace(boxes=boxes)), found)


# Options


def test_each_head_has_its_options() -> None:
    first, second, third = CONFIG.heads
    assert first == replace(CONFIG, cascade=())
    assert (second.foreground_iou, third.foreground_iou) == (0.6, 0.7)
    assert (second.box_weights, third.box_weights) == ((20, 20, 10, 10), (30, 30, 15, 15))
    assert (second.class_loss_weight, third.box_loss_weight) == (1.0, 0.75)
    assert BoxHeadConfig().heads == (BoxHeadConfig(),)
