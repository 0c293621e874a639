"""Figures show what the run does: compared with prediction, with validation's
losses, and with targets in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.loader import Split, load
from mrcnn_jax.data.order import PlannedBatch
from mrcnn_jax.figures import views
from mrcnn_jax.figures.draw import spread
from mrcnn_jax.inference.predictor import Predictor
from mrcnn_jax.models.mask_rcnn import MaskRCNN
from mrcnn_jax.models.rpn import pyramid_anchors
from mrcnn_jax.runs.run import Run, load_run, open_data
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.step import make_validation_step

SHOWN = (1, 4)  # indices of images


@pytest.fixture(scope="module")
def opened(kept_run: Path) -> tuple[Run, Split]:
    run = load_run(kept_run)
    return run, open_data(run, kept_run, "val")


@pytest.fixture(scope="module")
def batches(opened: tuple[Run, Split]) -> list[Batch]:
    """Each image of SHOWN in a batch of one."""
    run, split = opened
    return list(load(split, [PlannedBatch(0, (i,)) for i in SHOWN], run.config.data))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In NumPy, of every pair."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


# -- images ----------------------------------------------------------------------------------------


def test_images_come_from_all_over_the_split_or_as_asked_for(opened: tuple[Run, Split]) -> None:
    """Image 7 of the tiny data has no objects; ids are 94 + 7 times their place in the file, from
    1."""
    split = opened[1]
    ids = [image.id for image in split.dataset.images]
    empty = next(i for i, image in enumerate(split.dataset.images) if not image.annotations)
    everything = views.choose(split, 100)
    assert everything == [i for i in range(len(ids)) if i != empty]
    few = views.choose(split, 3)
    assert len(few) == 3
    assert max(few) >= len(ids) // 2
    assert views.choose(split, 1, [ids[3], ids[1], ids[3]]) == [3, 1]
    with pytest.raises(
        ConfigError, match=r"--images: 5: .*instances_val\.json has no image of this id"
    ):
        views.choose(split, 1, [ids[0], 5])
    with pytest.raises(ConfigError, match=f"--images: {ids[empty]}: has no object in"):
        views.choose(split, 1, [ids[empty]])


def test_what_is_spread_leaves_no_wide_gap() -> None:
    for length in range(1, 61):
        for count in range(25):
            chosen = spread(range(length), count)
            assert len(chosen) == min(count, length)
            if chosen:
                gaps = np.diff([-1, *chosen, length])
                assert gaps.max() <= -(-length // count) + 1


def test_the_largest_object_with_a_mask_is_shown(opened: tuple[Run, Split]) -> None:
    image = next(image for image in opened[1].dataset.images if len(image.annotations) > 1)
    largest = views.largest_object(image)
    assert all(
        np.prod(np.subtract(o.box[2:], o.box[:2]))
        <= np.prod(np.subtract(largest.box[2:], largest.box[:2]))
        for o in image.annotations
    )
    others = tuple(replace(o, iscrowd=True) if o is largest else o for o in image.annotations)
    assert (
        views.largest_object(replace(image, annotations=others))
        is not others[image.annotations.index(largest)]
    )


# -- what a run sees -------------------------------------------------------------------------------


def test_proposals_and_detections_are_those_of_prediction(
    opened: tuple[Run, Split], batches: list[Batch]
) -> None:
    run, split = opened
    predictor = Predictor(run)
    proposals, detections = views.proposals(run, split, SHOWN), views.detections(run, split, SHOWN)
    for batch, i, (boxes, scores), results in zip(
        batches, SHOWN, proposals, detections, strict=True
    ):
        prediction = predictor(batch)
        found = prediction.proposals
        assert len(boxes) == found.valid.sum() > 3
        np.testing.assert_allclose(
            boxes, found.boxes[0][found.valid[0]] / np.tile(batch.scales[0][::-1], 2), atol=1e-3
        )
        np.testing.assert_allclose(scores, found.scores[0][found.valid[0]], atol=1e-6)
        assert len(results) > 1
        ((_, seen),) = predictor.found(batch, prediction)
        assert results == seen.to_coco(split.dataset.images[i].id)


def test_the_mask_of_a_box_and_class_is_that_of_a_detection_there(
    opened: tuple[Run, Split],
) -> None:
    """A detection's box and class, handed over as those of an object, give the detection's mask."""
    run, split = opened
    wanted = [
        max(results, key=lambda result: result["score"])
        for results in views.detections(run, split, SHOWN)
    ]
    objects = []
    for i, result in zip(SHOWN, wanted, strict=True):
        x, y, width, height = result["bbox"]
        label = run.category_ids.index(result["category_id"]) + 1
        objects.append(
            replace(
                split.dataset.images[i].objects[0], box=(x, y, x + width, y + height), label=label
            )
        )
    masks = views.masks_of(run, split, SHOWN, objects)
    # Of a file that numbers its categories otherwise than the run.
    data = split.dataset
    backwards = replace(split, dataset=replace(data, categories=data.categories[::-1]))
    others = [replace(o, label=len(data.categories) + 1 - o.label) for o in objects]
    assert views.masks_of(run, backwards, SHOWN, others) == masks
    for mask, result in zip(masks, wanted, strict=True):
        assert coco_mask.area(mask) > 20
        assert (
            coco_mask.iou([mask], [result["segmentation"]], [0])[0, 0] > 0.98
        )  # a border pixel may differ: the box was clipped


# -- what training would tell it -------------------------------------------------------------------


def test_the_rpn_ground_truth_is_counted_as_in_numpy_and_drawn_as_in_validation(
    opened: tuple[Run, Split], batches: list[Batch]
) -> None:
    run, split = opened
    model = run.config.model
    levels = pyramid_anchors(model.rpn, (128, 128), model.strides)
    anchors = np.concatenate(levels).astype(np.float64)
    level_of = np.repeat(np.arange(5), [len(level) for level in levels])
    validate = jax.jit(make_validation_step(MaskRCNN(model), run.config.stages[0]))
    propose = jax.jit(
        nn.apply(
            lambda m, b: m.rpn_output(m.features(b), b),
            MaskRCNN(model),
        )
    )
    for batch, (canvas, found) in zip(
        batches, views.rpn_ground_truth(run, split, SHOWN), strict=True
    ):
        assert canvas.image.shape == (*batch.image_sizes[0], 3)
        np.testing.assert_array_equal(
            canvas.truth, batch.ground_truth.boxes[0][batch.ground_truth.valid[0]]
        )
        iou = _iou(anchors, canvas.truth.astype(np.float64))
        best = ((iou >= iou.max(axis=0) - 1e-7) & (iou > 0)).any(axis=1)
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        usable = (centres < batch.image_sizes[0][::-1]).all(axis=1)
        positive = usable & (best | (iou.max(axis=1) >= model.rpn.positive_iou))
        negative = usable & ~positive & (iou.max(axis=1) < model.rpn.negative_iou)
        assert [level.name for level in found] == ["P2", "P3", "P4", "P5", "P6"]
        assert [level.positives for level in found] == np.bincount(
            level_of[positive], minlength=5
        ).tolist()
        assert [level.negatives for level in found] == np.bincount(
            level_of[negative], minlength=5
        ).tolist()
        # Those that are drawn are of their kind and level, and give validation's loss.
        index = {tuple(anchor): i for i, anchor in enumerate(anchors)}
        drawn = {
            kind: [[index[tuple(a)] for a in getattr(level, kind)] for level in found]
            for kind in ("positive", "negative")
        }
        for kind, allowed in (("positive", positive), ("negative", negative)):
            for number, rows in enumerate(drawn[kind]):
                assert allowed[rows].all()
                assert (level_of[rows] == number).all()
        chosen = {kind: np.concatenate(rows).astype(int) for kind, rows in drawn.items()}
        assert len(chosen["positive"]) + len(chosen["negative"]) == model.rpn.samples
        logits = np.asarray(propose(run.variables, batch).logits[0], np.float64)
        losses = [
            np.log1p(np.exp(-logits[chosen["positive"]])),
            np.log1p(np.exp(logits[chosen["negative"]])),
        ]
        values, _ = validate(run.variables, batch, jax.random.key(run.config.seed))
        np.testing.assert_allclose(
            np.concatenate(losses).mean(), values["loss/rpn_objectness"], rtol=1e-5
        )


def test_the_box_ground_truth_is_matched_as_in_numpy_and_drawn_as_in_validation(
    opened: tuple[Run, Split], batches: list[Batch]
) -> None:
    run, split = opened
    model = run.config.model
    validate = jax.jit(make_validation_step(MaskRCNN(model), run.config.stages[1]))

    def logits_of(m: MaskRCNN, b: Batch, boxes: np.ndarray) -> jax.Array:
        features = m.features(b)
        return m.box_output(features, boxes, np.ones(boxes.shape[:2], bool)).logits

    classify = jax.jit(nn.apply(logits_of, MaskRCNN(model)))

    for batch, (canvas, found) in zip(
        batches, views.box_ground_truth(run, split, SHOWN), strict=True
    ):
        truth_labels = batch.ground_truth.labels[0][batch.ground_truth.valid[0]]
        iou = _iou(found.boxes.astype(np.float64), canvas.truth.astype(np.float64))
        foreground = iou.max(axis=1) > model.box_head.foreground_iou
        np.testing.assert_array_equal(
            found.labels, np.where(foreground, truth_labels[iou.argmax(axis=1)], 0)
        )
        assert 0 < foreground.sum() < len(foreground)
        np.testing.assert_allclose(
            found.taken_to[foreground], canvas.truth[iou.argmax(axis=1)][foreground], atol=1e-2
        )
        logits = np.asarray(classify(run.variables, batch, found.boxes[None])[0], np.float64)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), found.labels]
        values, _ = validate(run.variables, batch, jax.random.key(run.config.seed))
        np.testing.assert_allclose(losses.mean(), values["loss/box_class"], rtol=1e-4)
