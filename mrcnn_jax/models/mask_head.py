"""Stage 3, the mask head: network, targets and loss (report table 3; He et al. 2017, section 3),
and what refines it (PointRend)."""

from __future__ import annotations

from typing import Literal, assert_never

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from mrcnn_jax.config.schema import MaskHeadConfig, PointRendConfig
from mrcnn_jax.models.box_head import concatenate_boxes
from mrcnn_jax.models.layers import Dense, add_bias, conv_relu, relu
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.masks import crop_targets, point_targets
from mrcnn_jax.ops.matching import match
from mrcnn_jax.ops.points import uncertain_points
from mrcnn_jax.structures import Instances

he_normal = nn.initializers.he_normal()


class TransposedConv(nn.Module):
    """Transposed convolution of stride 2, H x W to 2H x 2W, as torch's: 3x3 with padding 1 and
    output padding 1, or 2x2 with neither.

    out[2i + ky - p, 2j + kx - p] += x[i, j] @ kernel[ky, kx], p = 1 for 3x3 and 0 for 2x2. Written
    as a convolution to the four phases of the output and a depth-to-space, because the weight
    gradient of lax.conv_transpose is ten times slower on a CPU.
    """

    features: int
    kernel_size: Literal[2, 3] = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        n, h, w, c = x.shape
        kernel = self.param(
            "kernel", he_normal, (self.kernel_size, self.kernel_size, c, self.features), jnp.float32
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        if self.kernel_size == 2:
            phases = kernel[
                None, None
            ]  # [cell y, cell x, phase y, phase x, c, f]: each output sees one cell
        else:
            # Along one axis: even outputs see the cell (tap 1), odd ones the cell (tap 2) and the
            # next cell (tap 0).
            vertical = jnp.stack(
                [kernel[1:], jnp.stack([jnp.zeros_like(kernel[0]), kernel[0]])]
            )  # [cell, phase, kx, c, f]
            left, right = (
                vertical[:, :, 1:],
                jnp.stack([jnp.zeros_like(vertical[:, :, 0]), vertical[:, :, 0]], axis=2),
            )
            phases = jnp.stack([left, right], axis=1)
        cells = phases.shape[0]
        phases = phases.transpose(0, 1, 4, 2, 3, 5).reshape(cells, cells, c, -1)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            phases.astype(self.dtype),
            (1, 1),
            [(0, cells - 1)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = (
            y.reshape(n, h, w, 2, 2, self.features)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(n, 2 * h, 2 * w, self.features)
        )
        return add_bias(y, bias)


class PointHead(nn.Module):
    """Fully connected layers with ReLU on the features of a point, each of which sees the mask
    branch's logit there too; a logit a class.

    The paper gives them that branch's logits of all classes; here it is the one of the box's class,
    the only one trained on its mask.
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
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.001), name="logits")(
            x.astype(jnp.float32)
        )


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a stride-2 transposed convolution, and a 1x1 convolution to one mask a
    class: float32 logits."""

    config: MaskHeadConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        if self.config.refine.steps:
            self.points = PointHead(self.config.refine, self.num_classes, dtype=self.dtype)

    @nn.compact
    def __call__(self, features: Float[Array, "n p p c"]) -> Float[Array, "n m m k"]:
        x = features.astype(self.dtype)
        config = self.config
        for i in range(1, config.convs + 1):
            x = conv_relu(
                x,
                config.channels,
                config.norm,
                kernel_init=he_normal,
                dtype=self.dtype,
                name=f"conv{i}",
            )
        x = relu(
            TransposedConv(config.channels, config.deconv_kernel, dtype=self.dtype, name="deconv")(
                x
            )
        ).astype(jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=he_normal, name="logits")(x)


class MaskSamples(flax.struct.PyTreeNode):
    """The boxes of one image that the mask head is trained on; each has a true class and a target
    mask."""

    boxes: Float[Array, "s 4"]
    labels: Int32[Array, " s"]
    targets: Float[Array, "s m m"]
    valid: Bool[Array, " s"]
    gt_index: Int32[Array, " s"]  # whose mask it is
    left_out: Int32[Array, ""]  # boxes that would have qualified, beyond `config.samples`


def mask_samples(
    found: Instances, ground_truth: Instances, config: MaskHeadConfig, size: int
) -> MaskSamples:
    """Boxes whose best ground-truth box has IoU >= match_iou and a mask, in their order, up to
    `config.samples`.

    Args:
        found: the box head's detections, best first: ground-truth boxes go before them. Where
            config.train_on says so, the foreground of its mini-batch, which has ground truth among
            it already.
        size: side of the targets.
    """
    gt = ground_truth
    assert gt.labels is not None and gt.masks is not None and gt.has_mask is not None  # noqa: PT018
    with_mask = gt.valid & gt.has_mask
    candidates = (
        concatenate_boxes(gt.replace(valid=with_mask), found)
        if config.train_on == "detections"
        else found
    )
    boxes = box_ops.sanitize(candidates.boxes, candidates.valid)
    gt_boxes = box_ops.sanitize(gt.boxes, gt.valid)
    matches = match(box_ops.iou(boxes, gt_boxes), gt.valid)
    # A ground-truth box is its own match, also where another object has the very same box.
    own = jnp.arange(len(boxes), dtype=jnp.int32)
    is_gt = own < len(boxes) - len(found.valid)
    gt_index = jnp.where(is_gt, jnp.minimum(own, len(gt.valid) - 1), matches.gt_index)
    usable = candidates.valid & (
        is_gt | ((matches.iou >= config.match_iou) & with_mask[matches.gt_index])
    )
    # Usable rows first, in their order.
    count = min(config.samples, len(boxes))
    rank, chosen = jax.lax.top_k(jnp.where(usable, len(boxes) - own, 0), count)
    return MaskSamples(
        boxes=boxes[chosen],
        labels=gt.labels[gt_index[chosen]],
        targets=crop_targets(gt.masks, gt_boxes, gt_index[chosen], boxes[chosen], size=size),
        valid=rank > 0,
        gt_index=gt_index[chosen],
        left_out=jnp.sum(usable, dtype=jnp.int32) - jnp.sum(rank > 0, dtype=jnp.int32),
    )


def true_class(
    logits: Float[Array, "*s m m k"], labels: Int32[Array, "*s"]
) -> Float[Array, "*s m m"]:
    """The mask of each box's class (labels 1..K; a label outside is read as the nearest)."""
    channel = jnp.clip(labels - 1, 0, logits.shape[-1] - 1)
    return jnp.take_along_axis(logits, channel[..., None, None, None], axis=-1)[..., 0]


def mask_probabilities(
    logits: Float[Array, "*s m m k"], labels: Int32[Array, "*s"], config: MaskHeadConfig
) -> Float[Array, "*s m m"]:
    """The mask of each box's class (labels 1..K), as probabilities that mean what `mask_loss`
    trained."""
    if config.loss == "softmax":
        return true_class(losses.mask_softmax(logits), labels)
    return jax.nn.sigmoid(true_class(logits, labels))


def mask_loss(
    logits: Float[Array, "b s m m k"],
    samples: MaskSamples,
    image_valid: Bool[Array, " b"],
    config: MaskHeadConfig,
) -> dict[str, Float[Array, ""]]:
    """The loss of each pixel (config.loss), averaged over the pixels and the samples of a batch."""
    valid = samples.valid & image_valid[:, None]
    targets = losses.keep(samples.targets, valid)
    labels = jnp.where(valid, samples.labels, 1)
    values = losses.keep(true_class(logits, labels), valid)
    match config.loss:
        case "bce":
            pixels = losses.binary_cross_entropy(values, targets)
        case "focal":
            pixels = losses.focal(
                values, targets, gamma=config.focal_gamma, alpha=config.focal_alpha
            )
        case "softmax":
            pixels = losses.mask_cross_entropy(losses.keep(logits, valid), targets, labels)
        case _:
            assert_never(config.loss)
    return {"mask": config.loss_weight * losses.masked_mean(pixels.mean((-2, -1)), valid)}


class PointSamples(flax.struct.PyTreeNode):
    """Points of the boxes of an image's `MaskSamples`, with their targets, 0 or 1."""

    points: Float[Array, "s q 2"]
    targets: Float[Array, "s q"]


def point_samples(
    key: PRNGKeyArray,
    coarse: Float[Array, "s m m"],
    samples: MaskSamples,
    ground_truth: Instances,
    config: PointRendConfig,
) -> PointSamples:
    """Points of one image's boxes, most of them where `coarse`, the logits of each box's class, is
    uncertain."""
    assert ground_truth.masks is not None
    points = uncertain_points(
        key,
        coarse,
        count=config.train_points,
        oversampling=config.oversampling,
        uncertain_fraction=config.uncertain_fraction,
    )
    gt_boxes = box_ops.sanitize(ground_truth.boxes, ground_truth.valid)
    return PointSamples(
        points=points,
        targets=point_targets(
            ground_truth.masks, gt_boxes, samples.gt_index, samples.boxes, points
        ),
    )


def point_loss(
    logits: Float[Array, "b s q"],
    points: PointSamples,
    samples: MaskSamples,
    image_valid: Bool[Array, " b"],
    config: PointRendConfig,
) -> dict[str, Float[Array, ""]]:
    """Cross-entropy of each point, averaged over the points and the samples of a batch."""
    valid = samples.valid & image_valid[:, None]
    values = losses.binary_cross_entropy(
        losses.keep(logits, valid), losses.keep(points.targets, valid)
    )
    return {"mask_points": config.loss_weight * losses.masked_mean(values.mean(-1), valid)}
