"""What figures are drawn from: images of a split, what runs see on them, and what training would
tell them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from mrcnn_jax.config.schema import ConfigError, DataConfig
from mrcnn_jax.data.coco import ImageRecord, ObjectRecord
from mrcnn_jax.data.loader import PlannedBatch, Split, load
from mrcnn_jax.inference.predictor import Predictor, predict_split
from mrcnn_jax.models.box_head import BoxSamples, box_samples
from mrcnn_jax.models.mask_rcnn import MaskRCNN, select_proposals
from mrcnn_jax.models.rpn import (
    RPNTargets,
    pyramid_anchors,
    rpn_labels,
    rpn_targets,
    usable_anchors,
)
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.pixels.decode import decode_image
from mrcnn_jax.pixels.geometry import boxes_to_canvas, boxes_to_image
from mrcnn_jax.pixels.rle import paste_rle
from mrcnn_jax.runs.run import Run
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import Batch, Instances

Image = UInt8[np.ndarray, "h w 3"]
Boxes = Float[np.ndarray, "_ 4"]


# -- images ----------------------------------------------------------------------------------------


def spread(candidates: Sequence[int], count: int) -> list[int]:
    """`count` of the candidates (or all), from all over them."""
    return list(candidates[:: max(1, len(candidates) // max(count, 1))][:count])


def choose(
    split: Split, count: int, ids: Sequence[int] = (), *, with_mask: bool = False
) -> list[int]:
    """Indices of the images to show: those of `ids`, else `count` from all over the split; with
    objects (with_mask: that have a mask).

    ConfigError if an id is none of the split's, or there is nothing to show on it.
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
        return [index[number] for number in ids]
    if not usable:
        raise ConfigError(f"{where}: no image has an {what}")
    return spread(usable, count)


def read_images(split: Split, indices: Sequence[int], data: DataConfig) -> list[Image]:
    """In original pixels."""
    records = [split.source[i] for i in indices]
    return [
        decode_image(r["image"], upright=bool(r["upright"]), max_pixels=data.max_pixels)
        for r in records
    ]


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
    """That with a mask and the largest box; no crowd."""
    return max(
        _objects(image, with_mask=True), key=lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1])
    )


def _objects(image: ImageRecord, with_mask: bool = False) -> list[ObjectRecord]:
    return [o for o in image.objects if not o.iscrowd and not (with_mask and o.rle is None)]


# -- what a run sees -------------------------------------------------------------------------------


def proposals(
    run: Run, split: Split, indices: Sequence[int]
) -> list[tuple[Boxes, Float[np.ndarray, " _"]]]:
    """(boxes in original pixels, scores) of the RPN's proposals on each image, best first."""

    def propose(model: MaskRCNN, batch: Batch) -> Instances:
        return model.proposals(model.features(batch.images, batch.image_sizes, batch.valid), batch)

    found = _each(run, split, indices, propose)
    return [
        (boxes_to_image(seen.boxes[seen.valid], batch.scales[0]), seen.scores[seen.valid])
        for batch, seen in found
    ]


def detections(run: Run, split: Split, indices: Sequence[int]) -> list[list[dict[str, Any]]]:
    """COCO results of each image."""
    predictor = Predictor(run)
    found = zip(indices, predict_split(predictor, split, _one_by_one(split, indices)), strict=True)
    return [
        predictor.results(batch, prediction, [split.dataset.images[i].id])
        for i, (batch, prediction) in found
    ]


def masks_of(
    run: Run, split: Split, indices: Sequence[int], objects: Sequence[ObjectRecord]
) -> list[dict[str, Any]]:
    """The mask, a compressed RLE in original pixels, that the run gives to one ground-truth object
    of each image.

    The mask head is asked for the object's own box and class: what is seen is the mask head's work,
    not that of the stages before it.
    """

    def mask(model: MaskRCNN, batch: Batch) -> Float[Array, "b n m m"]:
        truth = batch.ground_truth
        assert truth.labels is not None
        features = model.features(batch.images, batch.image_sizes, batch.valid)
        return model.instance_masks(features, truth.boxes, truth.labels, truth.valid)

    asked = iter(objects)

    def with_object(batch: Batch) -> Batch:
        here = next(asked)
        box = boxes_to_canvas(np.asarray(here.box, np.float32), batch.scales[0])
        truth = Instances(
            boxes=box[None, None],
            labels=np.array([[here.label]], np.int32),
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


# -- what training would tell it -------------------------------------------------------------------


class LevelTargets(NamedTuple):
    """The RPN's ground truth on one level of one image, in canvas pixels."""

    name: str  # P2, ..., or C4
    positive: Boxes  # anchors that were drawn for the loss
    negative: Boxes
    positives: int  # how many there are to draw from
    negatives: int


class BoxTargets(NamedTuple):
    """The box head's ground truth on one image, in canvas pixels: the boxes that were drawn for the
    loss."""

    boxes: Boxes
    labels: Int32[np.ndarray, " _"]  # 0: background
    taken_to: Boxes  # each decoded with its regression target; of the background it means nothing


class Canvas(NamedTuple):
    """An image as the network sees it."""

    image: Image  # without the canvas's padding
    truth: Boxes  # in canvas pixels


def rpn_ground_truth(
    run: Run, split: Split, indices: Sequence[int]
) -> list[tuple[Canvas, list[LevelTargets]]]:
    """For each image a `LevelTargets` a level, of the mini-batch that validation draws for it
    (`training.step`)."""
    config = run.config.model

    def label(
        model: MaskRCNN, batch: Batch
    ) -> tuple[RPNTargets, Bool[Array, "b a"], Bool[Array, "b a"]]:
        anchors = jnp.asarray(
            np.concatenate(pyramid_anchors(config.rpn, batch.images.shape[1:3], config.strides))
        )
        keys = jax.vmap(lambda key: jax.random.split(key)[0])(_keys(run, batch))
        truth, ignore, sizes = batch.ground_truth, batch.ignore, batch.image_sizes
        targets = jax.vmap(
            lambda key, size, gt, crowd: rpn_targets(key, anchors, size, gt, crowd, config.rpn)
        )(keys, sizes, truth, ignore)
        usable = jax.vmap(lambda size: usable_anchors(config.rpn, anchors, size))(sizes)
        positive, negative, _ = jax.vmap(
            lambda use, gt, crowd: rpn_labels(anchors, use, gt, crowd, config.rpn)
        )(usable, truth, ignore)
        return targets, positive, negative

    found = []
    for batch, (targets, positive, negative) in _each(run, split, indices, label):
        levels = pyramid_anchors(config.rpn, batch.images.shape[1:3], config.strides)
        names = ["C4"] if config.backbone == "c4" else [f"P{level}" for level in range(2, 7)]
        samples, anchors = targets.samples, np.concatenate(levels)
        ends = np.cumsum([len(level) for level in levels])
        of_level = []
        for name, level, end in zip(names, levels, ends, strict=True):
            here = slice(end - len(level), end)
            drawn = samples.valid & (samples.indices >= here.start) & (samples.indices < end)
            of_level.append(
                LevelTargets(
                    name,
                    positive=anchors[samples.indices[drawn & samples.positive]],
                    negative=anchors[samples.indices[drawn & ~samples.positive]],
                    positives=int(positive[here].sum()),
                    negatives=int(negative[here].sum()),
                )
            )
        found.append((_canvas(batch), of_level))
    return found


def box_ground_truth(
    run: Run, split: Split, indices: Sequence[int]
) -> list[tuple[Canvas, BoxTargets]]:
    """For each image the mini-batch that validation draws from the proposals of the run's RPN
    (`training.step`)."""
    config = run.config.model

    def draw(model: MaskRCNN, batch: Batch) -> tuple[BoxSamples, Float[Array, "b s 4"]]:
        features = model.features(batch.images, batch.image_sizes, batch.valid)
        output = model.propose(features, batch.image_sizes, batch.valid)
        found = select_proposals(output, batch, config, train=True)
        keys = jax.vmap(lambda key: jax.random.split(key)[1])(_keys(run, batch))
        sample = jax.vmap(
            lambda key, boxes, gt, crowd: box_samples(key, boxes, gt, crowd, config.box_head)
        )
        samples = sample(keys, found, batch.ground_truth, batch.ignore)
        return samples, box_ops.decode(
            samples.deltas, samples.boxes, weights=config.box_head.box_weights
        )

    found = []
    for batch, (samples, taken_to) in _each(run, split, indices, draw):
        valid = samples.valid
        found.append(
            (
                _canvas(batch),
                BoxTargets(samples.boxes[valid], samples.labels[valid], taken_to[valid]),
            )
        )
    return found


def _keys(run: Run, batch: Batch) -> Array:
    """The randomness of each image in validation: the same in every run of one seed."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(run.config.seed), index))(
        batch.indices
    )


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
    """For each image (its batch of one, what `see` gives for it without the batch axis); one
    compiled program a canvas."""
    apply = jax.jit(
        nn.apply(see, MaskRCNN(run.config.model)),
        **compile_options(deterministic=run.config.deterministic),
    )
    variables = jax.device_put(run.variables)
    for batch in map(prepare, load(split, _one_by_one(split, indices), run.config.data)):
        yield batch, jax.tree.map(lambda field: field[0], jax.device_get(apply(variables, batch)))


def _one_by_one(split: Split, indices: Sequence[int]) -> list[PlannedBatch]:
    return [PlannedBatch(split.plans[i].canvas, (i,)) for i in indices]
