"""Stage 3, the mask head: network, targets and loss (report table 3; He et al. 2017, section 3)."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from mrcnn_jax.config import MaskHeadConfig
from mrcnn_jax.models.box_head import concatenate_boxes
from mrcnn_jax.models.layers import relu
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.masks import crop_targets
from mrcnn_jax.ops.matching import match
from mrcnn_jax.structures import Instances

he_normal = nn.initializers.he_normal()


class TransposedConv(nn.Module):
    """3x3 transposed convolution of stride 2, padding 1, output padding 1 (as torch's): H x W to 2H x 2W.

    out[2i + ky - 1, 2j + kx - 1] += x[i, j] @ kernel[ky, kx]. Written as a 2x2 convolution to the four phases of the output and a
    depth-to-space, because the weight gradient of lax.conv_transpose is ten times slower on a CPU.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        n, h, w, c = x.shape
        kernel = self.param("kernel", he_normal, (3, 3, c, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        # Along one axis: even outputs see the cell (tap 1), odd ones the cell (tap 2) and the next cell (tap 0).
        vertical = jnp.stack([kernel[1:], jnp.stack([jnp.zeros_like(kernel[0]), kernel[0]])])  # [cell, phase, kx, c, f]
        left, right = vertical[:, :, 1:], jnp.stack([jnp.zeros_like(vertical[:, :, 0]), vertical[:, :, 0]], axis=2)
        phases = jnp.stack([left, right])  # [cell x, cell y, phase y, phase x, c, f]
        phases = phases.transpose(1, 0, 4, 2, 3, 5).reshape(2, 2, c, -1)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), phases.astype(self.dtype), (1, 1), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = y.reshape(n, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, self.features)
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


class MaskHead(nn.Module):
    """Four 3x3 convolutions, a stride-2 transposed convolution, and a 1x1 convolution to one mask a class: float32 logits."""

    config: MaskHeadConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "n p p c"]) -> Float[Array, "n m m k"]:
        x = features.astype(self.dtype)
        for i in range(self.config.convs):
            x = relu(nn.Conv(self.config.channels, (3, 3), dtype=self.dtype, kernel_init=he_normal, name=f"conv{i + 1}")(x))
        x = relu(TransposedConv(self.config.channels, dtype=self.dtype, name="deconv")(x)).astype(jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=he_normal, name="logits")(x)


class MaskSamples(flax.struct.PyTreeNode):
    """The boxes of one image that the mask head is trained on; each has a true class and a target mask."""

    boxes: Float[Array, "s 4"]
    labels: Int32[Array, " s"]
    targets: Float[Array, "s m m"]
    valid: Bool[Array, " s"]
    left_out: Int32[Array, ""]  # boxes that would have qualified, beyond `config.samples`


def mask_samples(detections: Instances, ground_truth: Instances, config: MaskHeadConfig) -> MaskSamples:
    """Ground-truth boxes with a mask, then detections whose best ground-truth box has IoU >= match_iou, up to `config.samples`."""
    gt = ground_truth
    assert gt.labels is not None and gt.masks is not None and gt.has_mask is not None  # noqa: PT018
    with_mask = gt.valid & gt.has_mask
    candidates = concatenate_boxes(gt.replace(valid=with_mask), detections)
    boxes = box_ops.sanitize(candidates.boxes, candidates.valid)
    gt_boxes = box_ops.sanitize(gt.boxes, gt.valid)
    matches = match(box_ops.iou(boxes, gt_boxes), gt.valid)
    # A ground-truth box is its own match, also where another object has the very same box.
    own = jnp.arange(len(boxes), dtype=jnp.int32)
    is_gt = own < len(gt.valid)
    gt_index = jnp.where(is_gt, jnp.minimum(own, len(gt.valid) - 1), matches.gt_index)
    usable = candidates.valid & (is_gt | ((matches.iou >= config.match_iou) & with_mask[matches.gt_index]))
    # Usable rows first, in order: ground truth, then detections, which come sorted by score.
    count = min(config.samples, len(boxes))
    rank, chosen = jax.lax.top_k(jnp.where(usable, len(boxes) - own, 0), count)
    size = 2 * config.pool_size
    return MaskSamples(
        boxes=boxes[chosen],
        labels=gt.labels[gt_index[chosen]],
        targets=crop_targets(gt.masks, gt_boxes, gt_index[chosen], boxes[chosen], size=size),
        valid=rank > 0,
        left_out=jnp.sum(usable, dtype=jnp.int32) - jnp.sum(rank > 0, dtype=jnp.int32),
    )


def true_class(logits: Float[Array, "*s m m k"], labels: Int32[Array, "*s"]) -> Float[Array, "*s m m"]:
    """The mask of each box's class (labels 1..K; a label outside is read as the nearest)."""
    channel = jnp.clip(labels - 1, 0, logits.shape[-1] - 1)
    return jnp.take_along_axis(logits, channel[..., None, None, None], axis=-1)[..., 0]


def mask_loss(
    logits: Float[Array, "b s m m k"], samples: MaskSamples, image_valid: Bool[Array, " b"], config: MaskHeadConfig
) -> dict[str, Float[Array, ""]]:
    """Pixel-wise binary cross-entropy on the true class's mask, averaged over the pixels and the samples of a batch."""
    valid = samples.valid & image_valid[:, None]
    chosen = valid[..., None, None]
    values = jnp.where(chosen, true_class(logits, jnp.where(valid, samples.labels, 1)), 0.0)
    pixels = losses.binary_cross_entropy(values, jnp.where(chosen, samples.targets, 0.0))
    return {"mask": config.loss_weight * losses.masked_mean(pixels.mean((-2, -1)), valid)}
