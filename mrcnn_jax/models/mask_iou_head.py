"""The mask-IoU head: network, targets and loss (Mask Scoring R-CNN, Huang et al. 2019, section 3).

It predicts the IoU of a mask with its object, which the class score says nothing of. Masks are then
ranked by the product of both.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from mrcnn_jax.config.heads import MaskIoUHeadConfig
from mrcnn_jax.models.layers import Conv3x3, Dense, he_normal_fan_out, relu
from mrcnn_jax.models.mask_head import MaskSamples
from mrcnn_jax.models.outputs import OutputLayer, float32_outputs
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.masks import area_outside
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import Batch, Instances


def max_pool_2x2(masks: Float[Array, "n m m"]) -> Float[Array, "n p p"]:
    """The maximum of each 2 x 2 cells, m = 2 p. Cells that tie share the gradient."""
    n, side = masks.shape[0], masks.shape[1] // 2
    return masks.reshape(n, side, 2, side, 2).max((2, 4))


class MaskIoUHead(nn.Module):
    """Convolutions on RoI features and mask, the last of stride 2, then fully connected layers."""

    config: MaskIoUHeadConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "n p p c"], masks: Float[Array, "n m m"]
    ) -> Float32[Array, "n k"]:
        """Predicts an IoU per class, not clipped.

        Args:
            features: those that the mask head is given.
            masks: the probabilities that it predicts for the box's class, m = 2 p.
        """
        config = self.config
        mask = max_pool_2x2(masks)[..., None]
        x = jnp.concatenate([features.astype(self.dtype), mask.astype(self.dtype)], axis=-1)
        for i in range(1, config.convs + 1):
            conv = Conv3x3(
                config.channels,
                he_normal_fan_out,
                strides=2 if i == config.convs else 1,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            x = relu(conv(x))
        x = x.reshape(len(x), -1)
        for i in range(1, config.fcs + 1):
            x = relu(Dense(config.hidden, dtype=self.dtype, name=f"fc{i}")(x))
        layer = OutputLayer(self.num_classes, nn.initializers.normal(0.01), name="ious")
        (ious,) = float32_outputs(x, layer)
        return ious


def mask_scores(scores: Float[Array, "*n"], ious: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The scores of masks: class score * predicted IoU, clipped to 0..1."""
    return scores * jnp.clip(ious, 0, 1)


def mask_iou_targets(
    masks: Float[Array, "*n m m"], targets: Float[Array, "*n m m"], outside: Float[Array, "*n"]
) -> Float32[Array, "*n"]:
    """The IoU of predicted masks with whole objects, also with what of them is outside the box.

    With P the cells of the box where the mask is at least one half, T those where the object is,
    and O the object's area outside the box, in cells of the box,

        IoU = |P and T| / (|P or T| + O),

    and 0 if there is neither mask nor object. A mask beyond its box is impossible, so this is the
    IoU in the image, but for the rounding to cells inside the box, which masks share: without
    anything outside, a mask equal to its target has exactly 1. (The published code divides |T| by
    the share of the object inside the box in place of adding O, which is undefined where none is,
    and takes P where the logit, not the probability, is over one half.)

    Args:
        masks: probabilities.
        targets: of `MaskSamples`; soft ones count from one half on.
        outside: `ops.masks.area_outside`.

    Returns:
        IoUs in [0, 1], through which there is no gradient.
    """
    predicted, true = masks >= 0.5, targets >= 0.5
    both, either = (
        jnp.sum(cells, axis=(-2, -1), dtype=jnp.float32)
        for cells in (predicted & true, predicted | true)
    )
    union = either + jax.lax.stop_gradient(outside)
    return both / jnp.where(union > 0, union, 1)


def mask_iou_loss(
    ious: Float[Array, "b s"],
    masks: Float[Array, "b s m m"],
    samples: MaskSamples,
    batch: Batch,
    config: MaskIoUHeadConfig,
    *,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
    """Half the squared error of the true class's IoU, averaged over the samples of a batch.

    (The published code leaves out masks whose IoU is 0, of which the paper says nothing.)

    Args:
        ious: predicted for the true class of each sample.
        masks: probabilities of that class, of which the IoUs are.
        samples: of the mask head.
        batch: with the whole masks of the objects.
        config: the factor.
        mesh: the devices that the rows of `batch` are spread over.
    """
    size = masks.shape[-1]

    def outside(samples: MaskSamples, truth: Instances) -> Float[Array, " s"]:
        boxes = box_ops.sanitize(samples.boxes, samples.valid)
        gt_boxes = box_ops.sanitize(truth.boxes, truth.valid)
        assert truth.masks is not None
        return area_outside(truth.masks, gt_boxes, samples.gt_index, boxes, size=size)

    valid = samples.valid & batch.valid[:, None]
    areas = losses.zero_invalid(per_image(outside, mesh)(samples, batch.ground_truth), valid)
    true = mask_iou_targets(
        losses.zero_invalid(masks, valid), losses.zero_invalid(samples.targets, valid), areas
    )
    errors = 0.5 * jnp.square(losses.zero_invalid(ious, valid) - true)
    return {"mask_iou": config.loss_weight * losses.masked_mean(errors, valid)}
