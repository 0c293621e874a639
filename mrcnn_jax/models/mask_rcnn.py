"""The whole network: features -> proposals -> detections -> masks, each one call (He et al.
2017)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from mrcnn_jax.config.schema import Loss, ModelConfig
from mrcnn_jax.models.box_head import BoxHead, BoxOutput, box_detections
from mrcnn_jax.models.fpn import FPN
from mrcnn_jax.models.mask_head import MaskHead, mask_probabilities, true_class
from mrcnn_jax.models.resnet import ResNet, stage
from mrcnn_jax.models.rpn import RPNHead, RPNOutput, pyramid_anchors, rpn_proposals
from mrcnn_jax.ops.points import sample_grids, sample_map, subdivide
from mrcnn_jax.ops.roi import assign_levels, roi_features
from mrcnn_jax.structures import Batch, Instances, blank_batch

Pyramid = dict[str, Array]

_RPN = {"resnet", "fpn", "rpn"}
_BOX = _RPN | {"res5", "box_head"}
# The modules of `MaskRCNN` that a loss reads (of fpn and res5, the one that the backbone has): its
# head stands on all the others.
MODULES_OF: dict[Loss, set[str]] = {"rpn": _RPN, "box": _BOX, "mask": _BOX | {"mask_head"}}


class Prediction(flax.struct.PyTreeNode):
    """What is seen on a batch; boxes in canvas pixels."""

    proposals: Instances  # [B, P]: boxes, scores
    # [B, D]: boxes, labels 1..K, scores, masks float32 [B, D, M, M] (probabilities for the label's
    # class)
    detections: Instances


class MaskRCNN(nn.Module):
    """Parameters live in `resnet`, `fpn` (or `res5`), `rpn`, `box_head` and `mask_head`; nothing in
    here knows of targets or losses."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        if config.backbone == "fpn":
            self.resnet = ResNet(config.resnet, remat=config.remat, dtype=dtype)
            self.fpn = FPN(config.fpn_channels, config.fpn_norm, dtype=dtype)
        else:
            self.resnet = ResNet(config.resnet, last=4, remat=config.remat, dtype=dtype)
            self.res5 = stage(config.resnet, 5, remat=config.remat, dtype=dtype, name="res5")
        self.rpn = RPNHead(config.rpn, config.strides, dtype=dtype)
        self.box_head = BoxHead(config.box_head, config.num_classes, dtype=dtype)
        self.mask_head = MaskHead(config.mask_head, config.num_classes, dtype=dtype)

    def features(
        self,
        images: UInt8[Array, "b h w 3"],
        image_sizes: Int32[Array, "b 2"],
        valid: Bool[Array, " b"],
        *,
        live: bool = False,
    ) -> Pyramid:
        """P2..P6, or C4, of uint8 RGB canvases; `live`: normalise by batch statistics where the
        config asks for it."""
        maps = self.resnet(
            normalise(images, image_sizes, self.config),
            image_sizes=image_sizes,
            valid=valid,
            live=live,
        )
        return self.fpn(maps) if self.config.backbone == "fpn" else {"c4": maps["c4"]}

    def propose(
        self,
        features: Pyramid,
        image_sizes: Int32[Array, "b 2"],
        valid: Bool[Array, " b"],
        *,
        live: bool = False,
    ) -> RPNOutput:
        """Objectness and deltas of every anchor."""
        return self.rpn(_maps(features), image_sizes=image_sizes, valid=valid, live=live)

    def boxes(
        self,
        features: Pyramid,
        boxes: Float[Array, "b n 4"],
        valid: Bool[Array, "b n"],
        *,
        live: bool = False,
    ) -> BoxOutput:
        """Class logits and deltas of boxes; `live`: res5 (C4) normalises by batch statistics where
        the config asks for it."""
        pooled = self._roi_features(
            features, boxes, valid, self.config.box_head.pool_size, live=live
        )
        if self.config.backbone == "c4":
            pooled = pooled.mean((-3, -2), keepdims=True)
        return self.box_head(pooled)

    def masks(
        self, features: Pyramid, boxes: Float[Array, "b n 4"], valid: Bool[Array, "b n"]
    ) -> Float[Array, "b n m m k"]:
        """Mask logits of boxes, one mask a class."""
        pooled = self._roi_features(features, boxes, valid, self.config.mask_head.pool_size)
        logits = self.mask_head(pooled.reshape(-1, *pooled.shape[2:]))
        return logits.reshape(*pooled.shape[:2], *logits.shape[1:])

    def points(
        self,
        features: Pyramid,
        boxes: Float[Array, "b n 4"],
        labels: Int32[Array, "b n"],
        valid: Bool[Array, "b n"],
        coarse: Float[Array, "b n m m"],
        points: Float[Array, "b n q 2"],
    ) -> Float[Array, "b n q"]:
        """Logits of each box's class at points (x, y) in [0, 1] of the box, by the finest map and
        `coarse`, the logits of its mask."""
        read = functools.partial(sample_map, stride=self.config.strides[0])
        fine = jax.vmap(read)(_maps(features)[0], boxes, valid, points)
        logits = self.mask_head.points(fine, jax.vmap(sample_grids)(coarse, points))
        return true_class(logits[..., None, :], labels)[..., 0]

    def instance_masks(
        self,
        features: Pyramid,
        boxes: Float[Array, "b n 4"],
        labels: Int32[Array, "b n"],
        valid: Bool[Array, "b n"],
    ) -> Float[Array, "b n m m"]:
        """Mask probabilities of boxes for their labels, refined where the config asks for it."""
        logits = self.masks(features, boxes, valid)
        refine = self.config.mask_head.refine
        if not refine.steps:
            return mask_probabilities(logits, labels, self.config.mask_head)
        coarse = true_class(logits, labels)
        predict = functools.partial(self.points, features, boxes, labels, valid, coarse)
        return jax.nn.sigmoid(subdivide(coarse, predict, steps=refine.steps, count=refine.points))

    def _roi_features(
        self, features: Pyramid, boxes: Array, valid: Array, size: int, *, live: bool = False
    ) -> Float[Array, "b n p p c"]:
        """What the heads see of each box: the RoI operation's output, behind it res5 (C4)."""
        roi = self.config.roi
        maps = _maps(features)[:4]  # P6 is for the RPN alone
        strides = self.config.strides[:4]

        def one_image(maps: list[Array], boxes: Array, valid: Array) -> Array:
            levels = jnp.zeros(len(boxes), jnp.int32)
            if len(maps) > 1:
                levels = assign_levels(
                    boxes,
                    canonical_size=roi.canonical_size,
                    canonical_level=roi.canonical_level,
                    min_level=2,
                    max_level=5,
                    epsilon=roi.level_epsilon,
                )
                levels -= 2
            return roi_features(
                maps, boxes, valid, levels=levels, strides=strides, output_size=size, config=roi
            )

        pooled = jax.vmap(one_image)(maps, boxes, valid)
        if self.config.backbone == "fpn":
            return pooled
        rows = pooled.reshape(-1, *pooled.shape[2:])
        exists = valid.reshape(-1, 1, 1, 1)
        before, after = (
            jnp.broadcast_to(exists, (len(rows), side, side, 1)) for side in (size, (size + 1) // 2)
        )
        live = live and self.config.resnet.norm == "live"
        rows = self.res5(rows, live=live, mask_in=before, mask_out=after)
        return rows.reshape(*pooled.shape[:2], *rows.shape[1:])

    def __call__(self, batch: Batch) -> Prediction:
        """What is seen on a batch: four calls."""
        features = self.features(batch.images, batch.image_sizes, batch.valid)
        proposals = self.proposals(features, batch)
        detections = self.detections(features, proposals, batch)
        assert detections.labels is not None
        masks = self.instance_masks(features, detections.boxes, detections.labels, detections.valid)
        return Prediction(proposals=proposals, detections=detections.replace(masks=masks))

    def proposals(self, features: Pyramid, batch: Batch) -> Instances:
        """The RPN's best boxes of each image."""
        return select_proposals(
            self.propose(features, batch.image_sizes, batch.valid), batch, self.config, train=False
        )

    def detections(self, features: Pyramid, proposals: Instances, batch: Batch) -> Instances:
        """The box head's best boxes of each image."""
        output = self.boxes(features, proposals.boxes, proposals.valid)
        return jax.vmap(lambda o, p, size: box_detections(o, p, size, self.config.box_head))(
            output, proposals, batch.image_sizes
        )


def _maps(features: Pyramid) -> list[Array]:
    """The maps, fine to coarse (a jit hands dicts on in the order of their names, which is the
    same)."""
    return [features[name] for name in sorted(features)]


def normalise(
    images: UInt8[Array, "b h w 3"], image_sizes: Int32[Array, "b 2"], config: ModelConfig
) -> Float[Array, "b h w 3"]:
    """Pixels to [0, 1], mean and standard deviation, and zeros outside the image (the padding is
    zero after normalisation)."""
    mean = jnp.asarray(np.array(config.pixel_mean, np.float32)).reshape(1, 1, 1, 3)
    std = jnp.asarray(np.array(config.pixel_std, np.float32)).reshape(1, 1, 1, 3)
    height, width = images.shape[1:3]
    rows = jnp.arange(height, dtype=jnp.int32)[None, :, None] < image_sizes[:, 0, None, None]
    columns = jnp.arange(width, dtype=jnp.int32)[None, None, :] < image_sizes[:, 1, None, None]
    pixels = (images.astype(jnp.float32) / 255.0 - mean) / std
    return jnp.where((rows & columns)[..., None], pixels, 0.0).astype(config.compute_dtype)


def select_proposals(
    output: RPNOutput, batch: Batch, config: ModelConfig, *, train: bool
) -> Instances:
    """Proposals of each image. They are constants to the later stages: the one place where their
    gradient is cut.

    train: as many as the losses of later stages are given.
    """
    height, width = batch.images.shape[1:3]
    rpn = config.rpn
    if train:
        rpn = replace(
            rpn,
            pre_nms=rpn.train_pre_nms or rpn.pre_nms,
            proposals=rpn.train_proposals or rpn.proposals,
        )
    anchors = pyramid_anchors(rpn, (height, width), config.strides)
    proposals = jax.vmap(lambda o, size: rpn_proposals(o, anchors, size, rpn))(
        output, batch.image_sizes
    )
    return jax.lax.stop_gradient(proposals.replace(valid=proposals.valid & batch.valid[:, None]))


def example_batch(canvas: tuple[int, int]) -> Batch:
    """One blank image without objects: the shapes that the parameters are made from."""
    size = np.array([canvas], np.int32)
    return blank_batch(1, canvas).replace(
        image_sizes=size, original_sizes=size, valid=np.ones(1, bool)
    )


Variables = dict[str, Any]
