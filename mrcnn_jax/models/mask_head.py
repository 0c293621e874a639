"""Stage 3, the mask head and PointRend, which refines its masks: networks, targets and losses.

Report table 3; He et al. 2017, section 3; Kirillov et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from mrcnn_jax.config.heads import MaskHeadConfig, PointRendConfig
from mrcnn_jax.models.box_head import concatenate_boxes
from mrcnn_jax.models.convolution import stride1_conv2d
from mrcnn_jax.models.layers import Dense, add_bias, conv_norm_relu, relu
from mrcnn_jax.models.outputs import OutputLayer, float32_class_output, float32_outputs
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.classes import select_class
from mrcnn_jax.ops.masks import crop_targets, point_targets
from mrcnn_jax.ops.matching import match
from mrcnn_jax.ops.points import uncertain_points
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import Batch, Instances

he_normal = nn.initializers.he_normal()


class TransposedConv(nn.Module):
    """Transposed convolution of stride 2, H x W to 2H x 2W, as in torch: its four phases.

    3x3 with padding 1 and output padding 1, or 2x2 with neither: out[2i + ky - p, 2j + kx - p] +=
    x[i, j] @ kernel[ky, kx], p = 1 for 3x3 and 0 for 2x2. Written as a convolution to the phases of
    the output, because the weight gradient of lax.conv_transpose is ten times slower on a CPU.
    `depth_to_space` makes the map of them, best after all that is done cell by cell.
    """

    features: int
    kernel_size: Literal[2, 3] = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w 4*f"]:
        c = x.shape[-1]
        size = (self.kernel_size, self.kernel_size, c, self.features)
        kernel = self.param("kernel", he_normal, size, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        if self.kernel_size == 2:
            # [cell y, cell x, phase y, phase x, c, f]: each output sees one cell.
            phases = kernel[None, None]
        else:
            # Along one axis: even outputs see the cell (tap 1), odd ones the cell (tap 2) and the
            # next cell (tap 0). `vertical` is [cell, phase, kx, c, f].
            vertical = jnp.stack([kernel[1:], jnp.stack([jnp.zeros_like(kernel[0]), kernel[0]])])
            right = jnp.stack([jnp.zeros_like(vertical[:, :, 0]), vertical[:, :, 0]], axis=2)
            phases = jnp.stack([vertical[:, :, 1:], right], axis=1)
        cells = phases.shape[0]
        phases = phases.transpose(0, 1, 4, 2, 3, 5).reshape(cells, cells, c, -1)
        y = stride1_conv2d(x.astype(self.dtype), phases.astype(self.dtype), (0, cells - 1))
        return add_bias(y, jnp.tile(bias, 4))


def depth_to_space(phases: Float[Array, "n h w 4*f"]) -> Float[Array, "n 2*h 2*w f"]:
    """Interleaves the phases of `TransposedConv`: (0, 0), (0, 1), (1, 0), (1, 1)."""
    n, h, w, channels = phases.shape
    apart = phases.reshape(n, h, w, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return apart.reshape(n, 2 * h, 2 * w, channels // 4)


class PointHead(nn.Module):
    """Fully connected layers on the features of a point: one logit per class.

    Each layer also sees the mask branch's logit at the point. The paper gives it the logits of all
    classes; here it is that of the box's class, the only one trained on the box's mask.
    """

    config: PointRendConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "*n c"], coarse: Float[Array, "*n"]
    ) -> Float[Array, "*n k"]:
        config = self.config
        seen = coarse[..., None].astype(self.dtype)
        x = jnp.concatenate([features.astype(self.dtype), seen], axis=-1)
        for i in range(1, config.fcs + 1):
            x = relu(Dense(config.channels, he_normal, dtype=self.dtype, name=f"fc{i}")(x))
            x = jnp.concatenate([x, seen], axis=-1)
        (logits,) = float32_outputs(
            x, OutputLayer(self.num_classes, nn.initializers.normal(0.001), name="logits")
        )
        return logits


class MaskHead(nn.Module):
    """`convs` 3x3 convolutions, a stride-2 transposed one, and a 1x1 one to masks."""

    config: MaskHeadConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        if self.config.refine.steps:
            self.points = PointHead(self.config.refine, self.num_classes, dtype=self.dtype)

    @nn.compact
    def __call__(
        self, features: Float[Array, "n p p c"], labels: Int32[Array, " n"] | None = None
    ) -> Float[Array, "n m m k"]:
        """Predicts a mask per class; with `labels` (1..K) that of each row's own class, K = 1."""
        x = features.astype(self.dtype)
        config = self.config
        for i in range(1, config.convs + 1):
            x = conv_norm_relu(
                x,
                config.channels,
                config.norm,
                kernel_init=he_normal,
                dtype=self.dtype,
                name=f"conv{i}",
            )
        deconv = TransposedConv(
            config.channels, config.deconv_kernel, dtype=self.dtype, name="deconv"
        )
        phases = deconv(x)
        phases = relu(phases.reshape(*phases.shape[:3], 4, config.channels))
        layer = OutputLayer(self.num_classes, he_normal, name="logits")
        if labels is not None:
            return depth_to_space(float32_class_output(phases, layer, labels))
        (logits,) = float32_outputs(phases, layer)
        return depth_to_space(logits.reshape(*logits.shape[:3], -1))


class MaskSamples(flax.struct.PyTreeNode):
    """The boxes of an image that the mask head is trained on, with classes and target masks."""

    boxes: Float[Array, "*b s 4"]
    labels: Int32[Array, "*b s"]
    targets: Float[Array, "*b s m m"]
    valid: Bool[Array, "*b s"]
    gt_index: Int32[Array, "*b s"]  # ground-truth row of the mask
    left_out: Int32[Array, "*b"]  # boxes that qualified, beyond `config.samples`


def mask_samples(
    found: Instances, ground_truth: Instances, config: MaskHeadConfig, size: int
) -> MaskSamples:
    """The first `config.samples` boxes whose best ground-truth box has IoU >= match_iou and a mask.

    Args:
        found: by `config.train_on`, either the box head's detections, best first, which the
            ground-truth boxes are put before, or the foreground of the box head's mini-batch, which
            contains ground truth already.
        size: side of the targets, pixels.
    """
    gt = ground_truth
    assert gt.labels is not None and gt.masks is not None and gt.has_mask is not None  # noqa: PT018
    with_mask = gt.valid & gt.has_mask
    candidates = found
    if config.train_on == "detections":
        candidates = concatenate_boxes(gt.replace(valid=with_mask), found)
    boxes = box_ops.sanitize(candidates.boxes, candidates.valid)
    gt_boxes = box_ops.sanitize(gt.boxes, gt.valid)
    matches = match(box_ops.iou(boxes, gt_boxes), gt.valid)
    # A ground-truth box is its own match, also where another object has the very same box.
    rows = jnp.arange(len(boxes), dtype=jnp.int32)
    is_gt = rows < len(boxes) - len(found.valid)
    gt_index = jnp.where(is_gt, jnp.minimum(rows, len(gt.valid) - 1), matches.gt_index)
    usable = candidates.valid & (
        is_gt | ((matches.iou >= config.match_iou) & with_mask[matches.gt_index])
    )
    # Usable rows first, in their order.
    count = min(config.samples, len(boxes))
    rank, chosen = jax.lax.top_k(jnp.where(usable, len(boxes) - rows, 0), count)
    return MaskSamples(
        boxes=boxes[chosen],
        labels=gt.labels[gt_index[chosen]],
        targets=crop_targets(
            gt.masks,
            gt_boxes,
            gt_index[chosen],
            boxes[chosen],
            size=size,
            soft=config.soft_targets,
        ),
        valid=rank > 0,
        gt_index=gt_index[chosen],
        left_out=jnp.sum(usable, dtype=jnp.int32) - jnp.sum(rank > 0, dtype=jnp.int32),
    )


def mask_losses(
    keys: PRNGKeyArray,
    logits: Float[Array, "b s m m k"],
    samples: MaskSamples,
    batch: Batch,
    config: MaskHeadConfig,
    *,
    refine: Callable[[Array, Array, Array, Array, Array], Array],
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
    """Compares the masks predicted in the boxes of a batch, and their points, with their targets.

    Args:
        keys: `ImageKeys.points`.
        logits: `MaskRCNN.mask_logits` of the samples.
        samples: `mask_samples` of every image.
        batch: with the ground truth.
        config: which loss.
        refine: `MaskRCNN.point_logits` on the features of the batch; called if `config.refine` has
            steps.
        mesh: the devices that the rows of `batch` are spread over.
    """
    truth = batch.ground_truth
    values = mask_loss(logits, samples, batch.valid, config)
    if config.refine.steps:
        coarse = select_class(logits, samples.labels)
        draw = per_image(lambda k, c, s, gt: point_samples(k, c, s, gt, config.refine), mesh)
        points = draw(keys, coarse, samples, truth)
        refined = refine(samples.boxes, samples.labels, samples.valid, coarse, points.points)
        values |= point_loss(refined, points, samples, batch.valid, config.refine)
    return values


def mask_probabilities(
    logits: Float[Array, "*s m m k"], labels: Int32[Array, "*s"], config: MaskHeadConfig
) -> Float[Array, "*s m m"]:
    """The mask of each box's class as probabilities, as `mask_loss` reads logits.

    Args:
        logits: `MaskRCNN.mask_logits` of the boxes.
        labels: 1..K.
        config: its loss says whether classes compete (softmax) or not (sigmoid).

    Returns:
        Probabilities that the cells are of the object.
    """
    if config.loss == "softmax":
        return select_class(losses.mask_softmax(logits), labels)
    return jax.nn.sigmoid(select_class(logits, labels))


def mask_loss(
    logits: Float[Array, "b s m m k"],
    samples: MaskSamples,
    image_valid: Bool[Array, " b"],
    config: MaskHeadConfig,
) -> dict[str, Float[Array, ""]]:
    """The loss of each pixel (config.loss), averaged over the pixels and samples of a batch."""
    valid = samples.valid & image_valid[:, None]
    targets = losses.zero_invalid(samples.targets, valid)
    labels = jnp.where(valid, samples.labels, 1)
    values = losses.zero_invalid(select_class(logits, labels), valid)
    match config.loss:
        case "bce":
            pixels = losses.binary_cross_entropy(values, targets)
        case "focal":
            gamma, alpha = config.focal_gamma, config.focal_alpha
            pixels = losses.focal(values, targets, gamma=gamma, alpha=alpha)
        case "softmax":
            pixels = losses.mask_cross_entropy(losses.zero_invalid(logits, valid), targets, labels)
        case _:
            assert_never(config.loss)
    return {"mask": config.loss_weight * losses.masked_mean(pixels.mean((-2, -1)), valid)}


class PointSamples(flax.struct.PyTreeNode):
    """Points (x, y) in [0, 1] of the boxes of an image's `MaskSamples`; targets are 0 or 1."""

    points: Float[Array, "*b s q 2"]
    targets: Float[Array, "*b s q"]


def point_samples(
    key: PRNGKeyArray,
    coarse: Float[Array, "s m m"],
    samples: MaskSamples,
    ground_truth: Instances,
    config: PointRendConfig,
) -> PointSamples:
    """Points of one image's boxes, most of them where `coarse`, the masks' logits, is unsure."""
    assert ground_truth.masks is not None
    points = uncertain_points(
        key,
        coarse,
        count=config.train_points,
        oversampling=config.oversampling,
        uncertain_fraction=config.uncertain_fraction,
    )
    gt_boxes = box_ops.sanitize(ground_truth.boxes, ground_truth.valid)
    targets = point_targets(ground_truth.masks, gt_boxes, samples.gt_index, samples.boxes, points)
    return PointSamples(points=points, targets=targets)


def point_loss(
    logits: Float[Array, "b s q"],
    points: PointSamples,
    samples: MaskSamples,
    image_valid: Bool[Array, " b"],
    config: PointRendConfig,
) -> dict[str, Float[Array, ""]]:
    """Cross-entropy of each point, averaged over the points and samples of a batch."""
    valid = samples.valid & image_valid[:, None]
    logits, targets = losses.zero_invalid(logits, valid), losses.zero_invalid(points.targets, valid)
    values = losses.binary_cross_entropy(logits, targets)
    return {"mask_points": config.loss_weight * losses.masked_mean(values.mean(-1), valid)}
