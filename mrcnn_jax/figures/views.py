"""Data for figures: images of a split, a run's predictions on them, and its training targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.loader import Split, image_of, load
from mrcnn_jax.data.order import PlannedBatch
from mrcnn_jax.data.records import ImageRecord, ObjectRecord
from mrcnn_jax.figures.draw import Image, spread
from mrcnn_jax.inference.predictor import Predictor, predict_split
from mrcnn_jax.models.box_head import BoxSamples, draw_box_samples
from mrcnn_jax.models.mask_rcnn import MaskRCNN, select_proposals
from mrcnn_jax.models.rpn import RPNTargets, draw_rpn_targets, pyramid_anchors
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops.sampling import ImageKeys, image_keys
from mrcnn_jax.pixels.geometry import boxes_to_canvas, boxes_to_image
from mrcnn_jax.pixels.rle import paste_rle
from mrcnn_jax.runs.run import Run
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import Batch, Instances

Boxes = Float[np.ndarray, "_ 4"]


# -- images ----------------------------------------------------------------------------------------


def choose(
    split: Split, count: int, ids: Sequence[int] = (), *, with_mask: bool = False
) -> list[int]:
    """Indices in the split of the images to show.

    Args:
        count: how many, spread over the split; not used with `ids`.
        ids: COCO ids of the images.
        with_mask: take only images with an object that has a mask, not any object.

    Raises:
        ConfigError: the split has no image of an id, or there is no such object to show.
    """
    images = split.dataset.images
    usable = [i for i, image in enumerate(images) if _objects(image, with_mask)]
    where, what = split.dataset.annotations_path, "object with a mask" if with_mask else "object"
    if ids:
        index = {image.id: i for i, image in enumerate(images)}
        unknown = [number for number in ids if number not in index]
        if unknown:
            raise ConfigError(f"--images: {unknown[0]}: {where} has no image of this id")
        empty = [number for number in ids if index[number] not in usable]
        if empty:
            raise ConfigError(f"--images: {empty[0]}: has no {what} in {where}")
        return [index[number] for number in dict.fromkeys(ids)]
    if not usable:
        raise ConfigError(f"{where}: no image has an {what}")
    return spread(usable, count)


def read_images(split: Split, indices: Sequence[int], data: DataConfig) -> list[Image]:
    """Decodes images of a split: uint8 RGB [H, W, 3] at their original size; Failure as of
    `image_of`."""
    return [image_of(split, i, data) for i in indices]


def annotations_of(split: Split, indices: Sequence[int]) -> list[list[dict[str, Any]]]:
    """COCO annotations of each image."""
    by_image: dict[int, list[dict[str, Any]]] = {split.dataset.images[i].id: [] for i in indices}
    for annotation in split.dataset.to_coco()["annotations"]:
        if annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(annotation)
    return list(by_image.values())


def truth_boxes(split: Split, indices: Sequence[int]) -> list[Boxes]:
    """Ground-truth boxes (x1, y1, x2, y2) of each image in original pixels, without crowds."""
    return [
        np.array([o.box for o in _objects(split.dataset.images[i])], np.float64).reshape(-1, 4)
        for i in indices
    ]


def largest_object(image: ImageRecord) -> ObjectRecord:
    """The object (no crowd) with a mask and the largest box."""
    return max(
        _objects(image, with_mask=True), key=lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])
    )


def _objects(image: ImageRecord, with_mask: bool = False) -> list[ObjectRecord]:
    return [o for o in image.objects if not (with_mask and o.rle is None)]


# -- predictions -----------------------------------------------------------------------------------


def proposals(
    run: Run, split: Split, indices: Sequence[int]
) -> list[tuple[Boxes, Float[np.ndarray, " _"]]]:
    """(boxes in original pixels, scores) of the RPN's proposals on each image, best first."""

    def propose(model: MaskRCNN, batch: Batch) -> Instances:
        return model.proposals(model.features(batch), batch)

    found = _each(run, split, indices, propose)
    return [
        (boxes_to_image(seen.boxes[seen.valid], batch.scales[0]), seen.scores[seen.valid])
        for batch, seen in found
    ]


def detections(run: Run, split: Split, indices: Sequence[int]) -> list[list[dict[str, Any]]]:
    """COCO results of each image."""
    predictor = Predictor(run)
    batches = predict_split(predictor, split, _one_by_one(split, indices))
    return [
        found.to_coco(split.dataset.images[i].id)
        for i, (batch, prediction) in zip(indices, batches, strict=True)
        for _, found in predictor.found(batch, prediction)
    ]


def masks_of(
    run: Run, split: Split, indices: Sequence[int], objects: Sequence[ObjectRecord]
) -> list[dict[str, Any]]:
    """The run's mask of one ground-truth object in each image, as RLE in original pixels.

    The mask head is given the object's own box and class, so the result shows the mask head's work,
    not that of the stages before it.
    """

    def mask(model: MaskRCNN, batch: Batch) -> Float[Array, "b n m m"]:
        return model.scored_masks(model.features(batch), batch.ground_truth)[0]

    asked = iter(objects)
    # A file with only some of the run's categories numbers them in its own way.
    labels = {number: label for label, number in enumerate(run.category_ids, start=1)}

    def with_object(batch: Batch) -> Batch:
        here = next(asked)
        box = boxes_to_canvas(np.asarray(here.box, np.float32), batch.scales[0])
        truth = Instances(
            boxes=box[None, None],
            labels=np.array([[labels[split.dataset.category_id(here.label)]]], np.int32),
            valid=np.ones((1, 1), bool),
        )
        return batch.replace(ground_truth=truth)

    found = []
    for here, (batch, seen) in zip(
        objects, _each(run, split, indices, mask, with_object), strict=True
    ):
        size = tuple(batch.original_sizes[0].tolist())
        found.append(
            paste_rle(
                seen[0], np.asarray(here.box, np.float64), size, run.config.model.mask_head.paste
            )
        )
    return found


# -- training targets ------------------------------------------------------------------------------


class LevelTargets(NamedTuple):
    """The RPN's ground truth on one level of one image, in canvas pixels."""

    name: str  # P2, ..., or C4
    positive: Boxes  # anchors sampled for the loss
    negative: Boxes
    positives: int  # how many there are to sample from
    negatives: int


class BoxTargets(NamedTuple):
    """The box head's ground truth on one image: the boxes sampled for the loss, canvas pixels."""

    boxes: Boxes
    labels: Int32[np.ndarray, " _"]  # 0: background
    taken_to: Boxes  # each box decoded with its regression target; meaningless for background


class Canvas(NamedTuple):
    """An image as the network gets it."""

    image: Image  # without the padding of the canvas
    truth: Boxes  # in canvas pixels


def rpn_ground_truth(
    run: Run, split: Split, indices: Sequence[int]
) -> list[tuple[Canvas, list[LevelTargets]]]:
    """For each image the mini-batch that validation samples, one `LevelTargets` per level."""
    config = run.config.model

    def draw(model: MaskRCNN, batch: Batch) -> RPNTargets:
        return draw_rpn_targets(_keys(run, batch).rpn, batch, config.rpn, config.strides)

    found = []
    for batch, targets in _each(run, split, indices, draw):
        levels = pyramid_anchors(config.rpn, batch.images.shape[1:3], config.strides)
        names = ["C4"] if config.backbone == "c4" else [f"P{level}" for level in range(2, 7)]
        samples, anchors = targets.samples, np.concatenate(levels)
        of_level, start = [], 0
        for name, level in zip(names, levels, strict=True):
            here = slice(start, start + len(level))
            start = here.stop
            drawn = samples.valid & (samples.indices >= here.start) & (samples.indices < here.stop)
            of_level.append(
                LevelTargets(
                    name,
                    positive=anchors[samples.indices[drawn & samples.positive]],
                    negative=anchors[samples.indices[drawn & ~samples.positive]],
                    positives=int(targets.positive[here].sum()),
                    negatives=int(targets.negative[here].sum()),
                )
            )
        found.append((_canvas(batch), of_level))
    return found


def box_ground_truth(
    run: Run, split: Split, indices: Sequence[int]
) -> list[tuple[Canvas, BoxTargets]]:
    """For each image the mini-batch that validation samples from the proposals of the run's RPN."""
    config = run.config.model

    def draw(model: MaskRCNN, batch: Batch) -> tuple[BoxSamples, Float[Array, "b s 4"]]:
        features = model.features(batch)
        output = model.rpn_output(features, batch)
        found = select_proposals(output, batch, config, train=True)
        samples = draw_box_samples(_keys(run, batch).box, found, batch, config.box_head)
        return samples, box_ops.decode(
            samples.deltas, samples.boxes, weights=config.box_head.box_weights
        )

    found = []
    for batch, (samples, taken_to) in _each(run, split, indices, draw):
        valid = samples.valid
        targets = BoxTargets(samples.boxes[valid], samples.labels[valid], taken_to[valid])
        found.append((_canvas(batch), targets))
    return found


def _keys(run: Run, batch: Batch) -> ImageKeys:
    """The keys of validation."""
    return image_keys(jax.random.key(run.config.seed), batch.indices)


def _canvas(batch: Batch) -> Canvas:
    height, width = batch.image_sizes[0]
    return Canvas(
        batch.images[0, :height, :width], batch.ground_truth.boxes[0][batch.ground_truth.valid[0]]
    )


def _each(
    run: Run,
    split: Split,
    indices: Sequence[int],
    see: Callable[[MaskRCNN, Batch], Any],
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[tuple[Batch, Any]]:
    """For each image, its batch of one and the result of `see` for it, without the batch axis.

    `see` is compiled once per canvas.
    """
    apply = jax.jit(
        nn.apply(see, MaskRCNN(run.network)),
        **compile_options(deterministic=run.config.deterministic),
    )
    variables = jax.device_put(run.variables)
    for batch in map(prepare, load(split, _one_by_one(split, indices), run.config.data)):
        yield batch, jax.tree.map(lambda field: field[0], jax.device_get(apply(variables, batch)))


def _one_by_one(split: Split, indices: Sequence[int]) -> list[PlannedBatch]:
    return [PlannedBatch(split.plans[i].canvas, (i,)) for i in indices]
