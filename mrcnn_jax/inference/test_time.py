"""Test-time augmentation: views of one image, merged as in detectron2's GeneralizedRCNNWithTTA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.inference.predictor import Predictor, batch_of_one
from mrcnn_jax.inference.results import Detections
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Pyramid
from mrcnn_jax.ops.nms import multiclass_nms
from mrcnn_jax.pixels.geometry import boxes_to_canvas, boxes_to_image, depth_map
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import DEPTH_STRIDE, Batch, Instances


class View(NamedTuple):
    """An image on a canvas, mirrored or not, with its features and depth map on the device."""

    features: Pyramid
    depth: Float32[np.ndarray, "h4 w4"] | None  # of a dense depth head
    scale: Float32[np.ndarray, " 2"]  # (y, x)
    mirrored_width: int | None  # of the original image, if it was mirrored

    def to_image(self, boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        """Canvas pixels -> pixels of the original image."""
        return self._unmirrored(boxes_to_image(boxes, self.scale))

    def to_canvas(self, boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        """The inverse of `to_image`."""
        return boxes_to_canvas(self._unmirrored(boxes), self.scale)

    def _unmirrored(self, boxes: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        if self.mirrored_width is None:
            return boxes
        x1, y1, x2, y2 = boxes.T
        return np.stack([self.mirrored_width - x2, y1, self.mirrored_width - x1, y2], axis=1)


class MergedViews:
    """Detections of several views merged into one.

    The boxes of all views go through one per-class NMS, which keeps the best of each object with
    its score. Then every view predicts masks for the boxes that are left, and their probabilities
    are averaged, as are their predicted IoUs and their depth. The features of all views stay on the
    device until then.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        config = predictor.run.config
        options = compile_options(deterministic=config.deterministic)
        network = MaskRCNN(predictor.run.network)
        self._detect = jax.jit(nn.apply(_detect, network), **options)
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
        """Detect objects in the views of one image.

        Args:
            image: uint8 RGB, original pixels.
            flip: use mirrored views too.
            scales: multiples of the run's image size, a view each.
            min_score: detections below it are left out (`Detections.ranking_scores`).

        Returns:
            The merged detections, with masks as RLEs.
        """
        run, variables = self._predictor.run, self._predictor.variables
        views: list[View] = []
        found: list[Instances] = []
        for scale in scales:
            for mirrored in (False, True)[: 1 + flip]:
                pixels = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
                batch = batch_of_one(pixels, scaled(run.config.data, scale))
                features, depth, seen = self._detect(variables, batch)
                width = image.shape[1] if mirrored else None
                views.append(View(features, depth, batch.scales[0], width))
                seen = jax.tree.map(lambda field: field[0], jax.device_get(seen))
                found.append(seen.replace(boxes=views[-1].to_image(seen.boxes)))
        together = jax.tree.map(lambda *fields: np.concatenate(fields), *found)
        merged = jax.device_get(self._merge(together))
        masks, ious, depths = [], [], []
        for view in views:
            boxes, step = view.to_canvas(merged.boxes), 1 if view.mirrored_width is None else -1
            here, iou, depth = self._masks(
                variables, view.features, boxes, merged.labels, merged.valid
            )
            masks.append(np.asarray(here)[..., ::step])
            if iou is not None:
                ious.append(np.clip(iou, 0, 1))
            if view.depth is not None:
                depth = depth_map(
                    np.asarray(view.depth), view.scale, image.shape[:2], stride=DEPTH_STRIDE
                )
            if depth is not None:
                depths.append(np.asarray(depth)[..., ::step])
        scores = merged.scores * np.mean(ious, axis=0) if ious else None
        return self._predictor.in_image(
            merged.replace(masks=np.mean(masks, axis=0), mask_scores=scores),
            np.ones(2, np.float32),
            image.shape[:2],
            depth=np.mean(depths, axis=0) if depths else None,
            stride=1,
            min_score=min_score,
        )


def scaled(data: DataConfig, scale: float) -> DataConfig:
    """Multiply the image sizes of a config by `scale`, with canvases that hold them."""
    return replace(
        data,
        short_side=max(1, round(data.short_side * scale)),
        long_side=max(1, round(data.long_side * scale)),
        canvases=tuple(
            (32 * -int(-height * scale // 32), 32 * -int(-width * scale // 32))
            for height, width in data.canvases
        ),
    )


def _detect(model: MaskRCNN, batch: Batch) -> tuple[Pyramid, Array | None, Instances]:
    features = model.features(batch)
    found = model.detections(features, model.proposals(features, batch), batch)
    dense = model.config.depth_head.kind == "dense"
    return features, jnp.exp(model.log_depth(features, batch))[0] if dense else None, found


def _masks(
    model: MaskRCNN,
    features: Pyramid,
    boxes: Float[Array, "n 4"],
    labels: Int32[Array, " n"],
    valid: Bool[Array, " n"],
) -> tuple[Float[Array, "n m m"], Float[Array, " n"] | None, Float[Array, "n m m"] | None]:
    """The masks of boxes, their IoUs if there is a head for them, and the depth of their cells if
    it is of boxes."""
    instances = Instances(boxes=boxes[None], labels=labels[None], valid=valid[None])
    masks, ious = model.scored_masks(features, instances)
    depth = None
    if model.config.depth_head.kind == "roi":
        depth = jnp.exp(model.box_log_depth(features, instances.boxes, instances.valid))[0]
    return masks[0], None if ious is None else ious[0], depth


def _merge(found: Instances, config: ModelConfig) -> Instances:
    """Keep the best `box_head.detections` of a set of labelled boxes after per-class NMS."""
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
