"""The whole network, four calls: features -> proposals -> detections -> masks (He et al. 2017)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, assert_never

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, UInt8

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Loss
from mrcnn_jax.models.box_head import BoxHead, BoxOutput, box_detections
from mrcnn_jax.models.cascade import BOX_HEADS, cascade_detections
from mrcnn_jax.models.convnext import ConvNeXt
from mrcnn_jax.models.depth_head import DepthHead, box_depth_config
from mrcnn_jax.models.fpn import FPN
from mrcnn_jax.models.mask_head import MaskHead, mask_probabilities
from mrcnn_jax.models.mask_iou_head import MaskIoUHead, mask_scores
from mrcnn_jax.models.resnet import ResNet, resnet_stage
from mrcnn_jax.models.rpn import RPNHead, RPNOutput, pyramid_anchors, rpn_proposals
from mrcnn_jax.ops.classes import select_class
from mrcnn_jax.ops.points import sample_grids, sample_map, subdivide
from mrcnn_jax.ops.roi import assign_levels, roi_features
from mrcnn_jax.ops.rows import apply_to_valid_rows
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import Batch, Instances, blank_batch

# Rows that a head computes together (`apply_to_valid_rows`). A box is cheap beside the kernels of
# its head, which each chunk reads and whose gradients it adds up; a mask is not.
_BOX_CHUNK, _MASK_CHUNK = 256, 16

Pyramid = dict[str, Array]
Variables = dict[str, Any]


def modules_of(loss: Loss, config: ModelConfig) -> set[str]:
    """The modules of `MaskRCNN` that a loss reads: its own head and all below it."""
    trunk: set[str] = {config.trunk, *(("fpn",) if config.backbone == "fpn" else ())}
    box = trunk | {"rpn", "box_head"} | ({"res5"} if config.backbone == "c4" else set())
    boxes = box | set(BOX_HEADS[: len(config.box_head.heads)])
    match loss:
        case "rpn":
            return trunk | {"rpn"}
        case "box":
            return box
        case "box2":
            return box | set(BOX_HEADS[:2])
        case "box3":
            return box | set(BOX_HEADS)
        case "mask":
            return boxes | {"mask_head"}
        case "mask_iou":
            return boxes | {"mask_head", "mask_iou_head"}
        case "depth":
            below = boxes if config.depth_head.kind == "roi" else trunk
            return below | {"depth_head"}
        case _:
            assert_never(loss)


class Prediction(flax.struct.PyTreeNode):
    """Proposals and detections of a batch; boxes in canvas pixels."""

    proposals: Instances  # [B, P]: boxes, scores
    # [B, D]: boxes, labels 1..K, scores, masks float32 [B, D, M, M] (probabilities of the label);
    # with a mask-IoU head, mask_scores
    detections: Instances
    # Metres from the camera. A dense head's: at stride 4 of the canvas, where the image is; a RoI
    # head's: of the cells of each detection's box. None without a depth head.
    depth: Float[Array, "b h4 w4"] | Float[Array, "b d m m"] | None = None


class MaskRCNN(nn.Module):
    """Mask R-CNN with the modules `resnet`, `fpn` (or `res5`), `rpn`, `box_head` and `mask_head`.

    The config may ask for `convnext` in place of `resnet`, for `box_head2` and `box_head3` of a
    cascade, and for a `depth_head` and a `mask_iou_head` as well. Targets and losses are functions
    beside each head, outside the modules.
    """

    config: ModelConfig
    deterministic: bool = False  # sum gradients on a GPU so that their order does not matter
    mesh: Mesh | None = None  # the devices that the rows of a batch are spread over

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        if config.backbone == "fpn":
            if config.trunk == "convnext":
                self.convnext = ConvNeXt(config.convnext, remat=config.remat, dtype=dtype)
            else:
                self.resnet = ResNet(config.resnet, remat=config.remat, dtype=dtype)
            self.fpn = FPN(config.fpn_channels, config.fpn_norm, dtype=dtype)
        else:
            self.resnet = ResNet(config.resnet, last=4, remat=config.remat, dtype=dtype)
            self.res5 = resnet_stage(config.resnet, 5, remat=config.remat, dtype=dtype, name="res5")
        self.rpn = RPNHead(config.rpn, config.strides, dtype=dtype)
        for name in BOX_HEADS[: len(config.box_head.heads)]:
            setattr(self, name, BoxHead(config.box_head, config.num_classes, dtype=dtype))
        mask_classes = 1 if config.mask_head.class_agnostic else config.num_classes
        self.mask_head = MaskHead(config.mask_head, mask_classes, dtype=dtype)
        if config.mask_iou_head.enabled:
            self.mask_iou_head = MaskIoUHead(config.mask_iou_head, mask_classes, dtype=dtype)
        self.depth_head: Any = None
        if config.depth_head.kind == "dense":
            self.depth_head = DepthHead(config.depth_head, config.strides[:4], dtype=dtype)
        elif config.depth_head.kind == "roi":
            self.depth_head = MaskHead(box_depth_config(config.mask_head), 1, dtype=dtype)

    def features(
        self, batch: Batch, *, live: bool = False, keys: PRNGKeyArray | None = None
    ) -> Pyramid:
        """P2..P6, or C4.

        Args:
            batch: images.
            live: normalise by batch statistics where the config asks for it.
            keys: a key for each image, by which a ConvNeXt leaves branches out; None: none is.
        """
        sizes = batch.image_sizes
        pixels = normalise(batch.images, sizes, self.config)
        if self.config.trunk == "convnext":
            maps = self.convnext(pixels, image_sizes=sizes, valid=batch.valid, keys=keys)
        else:
            maps = self.resnet(pixels, image_sizes=sizes, valid=batch.valid, live=live)
        return self.fpn(maps) if self.config.backbone == "fpn" else {"c4": maps["c4"]}

    def rpn_output(self, features: Pyramid, batch: Batch, *, live: bool = False) -> RPNOutput:
        """Objectness and deltas of every anchor; `live` as in `features`."""
        sizes, valid = batch.image_sizes, batch.valid
        return self.rpn(_maps(features), image_sizes=sizes, valid=valid, live=live)

    def box_output(
        self,
        features: Pyramid,
        boxes: Float[Array, "b n 4"],
        valid: Bool[Array, "b n"],
        *,
        live: bool = False,
        head: int = 0,
    ) -> BoxOutput:
        """Class logits and deltas of boxes in canvas pixels; `live` concerns res5 (C4).

        Args:
            head: number of the head in a cascade, from 0.
        """
        size = self.config.box_head.pool_size
        pooled = self._roi_features(features, boxes, valid, size, live=live)
        if self.config.backbone == "c4":
            pooled = pooled.mean((-3, -2), keepdims=True)
        return self._apply_head(getattr(self, BOX_HEADS[head]), (pooled,), valid, chunk=_BOX_CHUNK)

    def mask_features(
        self, features: Pyramid, boxes: Float[Array, "b n 4"], valid: Bool[Array, "b n"]
    ) -> Float[Array, "b n p p c"]:
        """What the mask head and the mask-IoU head see of boxes in canvas pixels."""
        return self._roi_features(features, boxes, valid, self.config.mask_head.pool_size)

    def mask_logits(
        self,
        pooled: Float[Array, "b n p p c"],
        valid: Bool[Array, "b n"],
        labels: Int32[Array, "b n"] | None = None,
    ) -> Float[Array, "b n m m k"]:
        """Mask logits of `mask_features`, one mask per class; with labels, those of the label's
        class alone (K = 1), but in the loss softmax, where classes compete."""
        if self.config.mask_head.loss == "softmax":
            labels = None
        inputs = (pooled,) if labels is None else (pooled, labels)
        return self._apply_head(self.mask_head, inputs, valid, chunk=_MASK_CHUNK)

    def mask_ious(
        self,
        pooled: Float[Array, "b n p p c"],
        masks: Float[Array, "b n m m"],
        labels: Int32[Array, "b n"],
        valid: Bool[Array, "b n"],
    ) -> Float[Array, "b n"]:
        """The predicted IoU of masks with their objects, not clipped.

        Args:
            pooled: `mask_features` of the boxes.
            masks: the probabilities of the labels' masks, before any refinement.
            labels: 1..K.
            valid: boxes that exist.
        """
        ious = self._apply_head(self.mask_iou_head, (pooled, masks), valid, chunk=_MASK_CHUNK)
        return select_class(ious, labels)

    def log_depth(self, features: Pyramid, batch: Batch) -> Float[Array, "b h4 w4"]:
        """The dense head's log depth (metres) at stride 4 of the canvas."""
        sizes = batch.image_sizes
        return self.depth_head(_maps(features)[:4], image_sizes=sizes, valid=batch.valid)

    def box_log_depth(
        self, features: Pyramid, boxes: Float[Array, "b n 4"], valid: Bool[Array, "b n"]
    ) -> Float[Array, "b n m m"]:
        """The RoI head's log depth (metres) of the cells of boxes in canvas pixels."""
        pooled = self._roi_features(features, boxes, valid, self.config.mask_head.pool_size)
        return self._apply_head(self.depth_head, (pooled,), valid, chunk=_MASK_CHUNK)[..., 0]

    def point_logits(
        self,
        features: Pyramid,
        boxes: Float[Array, "b n 4"],
        labels: Int32[Array, "b n"],
        valid: Bool[Array, "b n"],
        coarse: Float[Array, "b n m m"],
        points: Float[Array, "b n q 2"],
    ) -> Float[Array, "b n q"]:
        """Logits of each box's class at points (x, y) in [0, 1] of the box.

        They are computed from the finest map and from `coarse`, the logits of the box's mask.
        """
        read = functools.partial(sample_map, stride=self.config.strides[0])
        fine = jax.vmap(read)(_maps(features)[0], boxes, valid, points)
        logits = self.mask_head.points(fine, jax.vmap(sample_grids)(coarse, points))
        return select_class(logits, labels)

    def scored_masks(
        self, features: Pyramid, instances: Instances
    ) -> tuple[Float[Array, "b n m m"], Float[Array, "b n"] | None]:
        """Mask probabilities of labelled boxes (canvas pixels), refined if so configured, and the
        predicted IoU of each; None without a mask-IoU head."""
        boxes, labels, valid = instances.boxes, instances.labels, instances.valid
        assert labels is not None
        config, refine = self.config.mask_head, self.config.mask_head.refine
        pooled, ious = self.mask_features(features, boxes, valid), None
        logits = self.mask_logits(pooled, valid, labels)
        if self.config.mask_iou_head.enabled:
            masks = mask_probabilities(logits, labels, config)
            ious = self.mask_ious(pooled, masks, labels, valid)
        if not refine.steps:
            return mask_probabilities(logits, labels, config), ious
        coarse = select_class(logits, labels)
        predict = functools.partial(self.point_logits, features, boxes, labels, valid, coarse)
        refined = subdivide(coarse, predict, steps=refine.steps, count=refine.points)
        return jax.nn.sigmoid(refined), ious

    def _apply_head(
        self, head: nn.Module, inputs: tuple[Array, ...], valid: Bool[Array, "b n"], *, chunk: int
    ) -> Any:
        """Applies a head to arrays [b, n, ...], `chunk` rows at a time as `apply_to_valid_rows`."""
        flat = tuple(x.reshape(-1, *x.shape[2:]) for x in inputs)
        if self.is_initializing() or self.mesh is not None:
            outputs = head(*flat)
        else:
            unbound, variables = head.unbind()

            def apply(variables: Variables, rows: tuple[Array, ...]) -> Any:
                with jax.named_scope(str(head.name)):  # as profiles have it
                    return unbound.apply(variables, *rows)

            outputs = apply_to_valid_rows(apply, variables, flat, valid.reshape(-1), chunk=chunk)
        return jax.tree.map(lambda x: x.reshape(*valid.shape, *x.shape[1:]), outputs)

    def _roi_features(
        self, features: Pyramid, boxes: Array, valid: Array, size: int, *, live: bool = False
    ) -> Float[Array, "b n p p c"]:
        """Features of each box for a head: the RoI operation's output, through res5 (C4)."""
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
                maps,
                boxes,
                valid,
                levels=levels,
                strides=strides,
                output_size=size,
                config=roi,
                deterministic=self.deterministic,
            )

        pooled = per_image(one_image, self.mesh)(maps, boxes, valid)
        if self.config.backbone == "fpn":
            return pooled
        rows = pooled.reshape(-1, *pooled.shape[2:])
        exists = valid.reshape(-1, 1, 1, 1)
        mask_in, mask_out = (
            jnp.broadcast_to(exists, (len(rows), side, side, 1)) for side in (size, (size + 1) // 2)
        )
        live = live and self.config.live_norm
        rows = self.res5(rows, live=live, mask_in=mask_in, mask_out=mask_out)
        return rows.reshape(*pooled.shape[:2], *rows.shape[1:])

    def __call__(self, batch: Batch) -> Prediction:
        """Predicts proposals, detections and masks in four calls, and depth in a fifth."""
        features = self.features(batch)
        proposals = self.proposals(features, batch)
        detections = self.detections(features, proposals, batch)
        assert detections.scores is not None
        masks, ious = self.scored_masks(features, detections)
        scores = None if ious is None else mask_scores(detections.scores, ious)
        return Prediction(
            proposals=proposals,
            detections=detections.replace(masks=masks, mask_scores=scores),
            depth=self.depth(features, detections, batch),
        )

    def proposals(self, features: Pyramid, batch: Batch) -> Instances:
        """The RPN's best boxes of each image."""
        output = self.rpn_output(features, batch)
        return select_proposals(output, batch, self.config, train=False)

    def depth(self, features: Pyramid, detections: Instances, batch: Batch) -> Array | None:
        """Metres as `Prediction.depth` holds them."""
        match self.config.depth_head.kind:
            case "none":
                return None
            case "dense":
                return jnp.exp(self.log_depth(features, batch))
            case "roi":
                return jnp.exp(self.box_log_depth(features, detections.boxes, detections.valid))
            case _:
                assert_never(self.config.depth_head.kind)

    def detections(self, features: Pyramid, proposals: Instances, batch: Batch) -> Instances:
        """The box head's best boxes of each image; of a cascade, its last head's."""
        config = self.config.box_head
        if config.cascade:
            predict = functools.partial(self.box_output, features)
            return cascade_detections(proposals, batch.image_sizes, config, predict=predict)
        output = self.box_output(features, proposals.boxes, proposals.valid)
        detect = functools.partial(box_detections, config=config)
        return jax.vmap(detect)(output, proposals, batch.image_sizes)


def _maps(features: Pyramid) -> list[Array]:
    """The maps, fine to coarse, which is the order of their names."""
    return [features[name] for name in sorted(features)]


def normalise(
    images: UInt8[Array, "b h w 3"], image_sizes: Int32[Array, "b 2"], config: ModelConfig
) -> Float[Array, "b h w 3"]:
    """Scales pixels to [0, 1], normalises by mean and deviation, and sets the padding to zero."""
    mean = jnp.asarray(np.array(config.pixel_mean, np.float32)).reshape(1, 1, 1, 3)
    std = jnp.asarray(np.array(config.pixel_std, np.float32)).reshape(1, 1, 1, 3)
    height, width = images.shape[1:3]
    rows = jnp.arange(height, dtype=jnp.int32)[None, :, None] < image_sizes[:, 0, None, None]
    columns = jnp.arange(width, dtype=jnp.int32)[None, None, :] < image_sizes[:, 1, None, None]
    pixels = (images.astype(jnp.float32) / 255.0 - mean) / std
    return jnp.where((rows & columns)[..., None], pixels, 0.0).astype(config.compute_dtype)


def select_proposals(
    output: RPNOutput, batch: Batch, config: ModelConfig, *, train: bool, mesh: Mesh | None = None
) -> Instances:
    """The RPN's proposals in each image, boxes in canvas pixels, best first.

    Args:
        output: predictions of the RPN for the batch.
        train: use the numbers of boxes set for training (`train_pre_nms`, `train_proposals`).
        mesh: the devices that the rows of `batch` are spread over.
    """
    rpn = config.rpn
    if train:
        before, after = rpn.train_pre_nms or rpn.pre_nms, rpn.train_proposals or rpn.proposals
        rpn = replace(rpn, pre_nms=before, proposals=after)
    anchors = pyramid_anchors(rpn, batch.images.shape[1:3], config.strides)
    select = per_image(lambda o, size: rpn_proposals(o, anchors, size, rpn), mesh)
    proposals = select(output, batch.image_sizes)
    proposals = proposals.replace(valid=proposals.valid & batch.valid[:, None])
    # Proposals are constants to the later stages: the one place where their gradient is cut.
    return jax.lax.stop_gradient(proposals)


def example_batch(canvas: tuple[int, int]) -> Batch:
    """One blank image without objects: the shapes that the parameters are made from."""
    size = np.array([canvas], np.int32)
    return blank_batch(1, canvas).replace(
        image_sizes=size, original_sizes=size, valid=np.ones(1, bool)
    )
