"""Test-time augmentation: several views of one image, merged as detectron2's GeneralizedRCNNWithTTA
merges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from mrcnn_jax.config.schema import DataConfig, ModelConfig
from mrcnn_jax.inference.predictor import Predictor, batch_of_one
from mrcnn_jax.inference.results import Detections
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Pyramid
from mrcnn_jax.ops.nms import multiclass_nms
from mrcnn_jax.pixels.geometry import boxes_to_canvas, boxes_to_image
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import Batch, Instances


class View(NamedTuple):
    """An image on a canvas, mirrored or not, and its features there (on the device)."""

    features: Pyramid
    scale: Float32[np.ndarray, " 2"]  # (y, x)
    mirrored_width: int | None  # of the original image, if it was mirrored

    def to_image(self, boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        """Boxes of the canvas in pixels of the original image."""
        return self._turned(boxes_to_image(boxes, self.scale))

    def to_canvas(self, boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        """The inverse of `to_image`."""
        return boxes_to_canvas(self._turned(boxes), self.scale)

    def _turned(self, boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        if self.mirrored_width is None:
            return boxes
        x1, y1, x2, y2 = boxes.T
        return np.stack([self.mirrored_width - x2, y1, self.mirrored_width - x1, y2], axis=1)


class MergedViews:
    """Boxes: those found in every view go through one NMS a class, which keeps the best of each
    object with its score. Masks: every view is asked for the masks of the boxes that are left, and
    the probabilities are averaged.

    The features of all views of an image are held on the device until its masks are made.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        config, options = (
            predictor.run.config,
            compile_options(deterministic=predictor.run.config.deterministic),
        )
        network = MaskRCNN(config.model)
        self._see = jax.jit(nn.apply(_see, network), **options)
        self._masks = jax.jit(nn.apply(_masks, network), **options)
        self._merge = jax.jit(lambda found: _merge(found, config.model), **options)

    def detections(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        *,
        flip: bool,
        scales: Sequence[float],
        min_score: float = 0.0,
    ) -> Detections:
        """What the views at all `scales`, with `flip` also mirrored, see together."""
        run, variables = self._predictor.run, self._predictor.variables
        views: list[View] = []
        found: list[Instances] = []
        for scale in scales:
            for mirrored in (False, True)[: 1 + flip]:
                batch = batch_of_one(
                    np.ascontiguousarray(image[:, ::-1]) if mirrored else image,
                    scaled(run.config.data, scale),
                )
                features, seen = self._see(variables, batch)
                views.append(View(features, batch.scales[0], image.shape[1] if mirrored else None))
                seen = jax.tree.map(lambda field: field[0], jax.device_get(seen))
                found.append(seen.replace(boxes=views[-1].to_image(seen.boxes)))
        merged = jax.device_get(
            self._merge(jax.tree.map(lambda *fields: np.concatenate(fields), *found))
        )
        masks = []
        for view in views:
            here = np.asarray(
                self._masks(
                    variables,
                    view.features,
                    view.to_canvas(merged.boxes),
                    merged.labels,
                    merged.valid,
                )
            )
            masks.append(here if view.mirrored_width is None else here[..., ::-1])
        return self._predictor.in_image(
            merged.replace(masks=np.mean(masks, axis=0)),
            np.ones(2, np.float32),
            image.shape[:2],
            min_score=min_score,
        )


def scaled(data: DataConfig, scale: float) -> DataConfig:
    """The same with image sizes times `scale`, and canvases that hold them."""
    canvases = tuple(
        (32 * -int(-height * scale // 32), 32 * -int(-width * scale // 32))
        for height, width in data.canvases
    )
    short_side, long_side = (
        max(1, round(side * scale)) for side in (data.short_side, data.long_side)
    )
    return replace(data, short_side=short_side, long_side=long_side, canvases=canvases)


def _see(model: MaskRCNN, batch: Batch) -> tuple[Pyramid, Instances]:
    features = model.features(batch.images, batch.image_sizes, batch.valid)
    return features, model.detections(features, model.proposals(features, batch), batch)


def _masks(
    model: MaskRCNN,
    features: Pyramid,
    boxes: Float[Array, "n 4"],
    labels: Int32[Array, " n"],
    valid: Bool[Array, " n"],
) -> Float[Array, "n m m"]:
    return model.instance_masks(features, boxes[None], labels[None], valid[None])[0]


def _merge(found: Instances, config: ModelConfig) -> Instances:
    """The best `box_head.detections` of a set of labelled boxes after NMS a class."""
    assert found.labels is not None
    assert found.scores is not None
    here = found.valid[:, None] & (found.labels[:, None] == jnp.arange(1, config.num_classes + 1))
    boxes = jnp.broadcast_to(found.boxes[:, None], (*here.shape, 4))
    scores = jnp.broadcast_to(found.scores[:, None], here.shape)
    head = config.box_head
    rows, classes, filled = multiclass_nms(
        boxes, scores, here, iou_threshold=head.nms_iou, max_output=head.detections
    )
    return Instances(
        boxes=found.boxes[rows], labels=classes + 1, scores=found.scores[rows], valid=filled
    )
