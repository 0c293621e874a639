"""The depth head: metres from the camera, for the whole image or for each box.

The report names depth as future work: "the use of mask branch along with different FPN levels can
be extended to depth estimation". `DepthHead` is the dense head of Panoptic FPN (Kirillov et al.
2019, figure 3) with one channel; the literal form, a `MaskHead` with one channel, is built in
`MaskRCNN`. Both predict log depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from mrcnn_jax.config.heads import DepthHeadConfig, MaskHeadConfig, PointRendConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.models.layers import cell_mask, conv_norm_relu
from mrcnn_jax.models.mask_head import mask_samples
from mrcnn_jax.models.outputs import OutputLayer, float32_outputs
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import DEPTH_STRIDE, Batch, Instances

he_normal = nn.initializers.he_normal()


def upsample_bilinear(
    x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Doubles a map bilinearly, as torch without align_corners, and cuts it to `size` = (h2, w2).

    `size` is at most (2h, 2w). The centres of cells stay where they are in the image; the outermost
    values extend to its border. By shifts: on a CPU the gradient of `jax.image.resize` is many
    times slower.
    """
    for axis in (1, 2):
        length = x.shape[axis]
        first, last = (jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, length - 1))
        padded = jnp.concatenate([first, x, last], axis=axis)
        before = jax.lax.slice_in_dim(padded, 0, length, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, length + 2, axis=axis)
        pairs = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * length, *x.shape[axis + 1 :])
    return x[:, : size[0], : size[1]]


class DepthHead(nn.Module):
    """P2..P5, each brought to stride 4 and summed, then a 1x1 convolution to log depth.

    Each doubling follows a 3x3 convolution with group norm and ReLU; P2 has one convolution. Cells
    outside the image are 0 before each convolution, and count neither in the statistics of the
    group norm nor in the interpolation: the canvas does not matter.
    """

    config: DepthHeadConfig
    strides: Sequence[int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        maps: Sequence[Float[Array, "b _h _w _c"]],
        *,
        image_sizes: Int32[Array, "b 2"],
        valid: Bool[Array, " b"],
    ) -> Float[Array, "b h w"]:
        """Predicts log depth on the cells of the finest map.

        Args:
            maps: from fine to coarse, at `strides`, each half as fine as the one before.
            image_sizes: (height, width) in canvas pixels.
            valid: images that exist; the others have one cell.
        """
        sizes = jnp.where(valid[:, None], image_sizes, 1)
        masks = [
            cell_mask(sizes, jnp.ones_like(valid), stride, (x.shape[1], x.shape[2]))
            for x, stride in zip(maps, self.strides, strict=True)
        ]
        total = None
        for level, x in enumerate(maps):
            for number in range(max(level, 1)):
                mask = masks[level - number]
                x = conv_norm_relu(
                    losses.zero_invalid(x, mask[..., 0]),
                    self.config.channels,
                    "group",
                    kernel_init=he_normal,
                    dtype=self.dtype,
                    name=f"level{level + 2}_conv{number + 1}",
                    mask=mask,
                )
                if level:
                    x = _upsample_inside(x, mask, masks[level - number - 1])
            total = x if total is None else total + x
        assert total is not None
        # The features are positive, so that a step of Adam moves all depths one way, by its rate
        # times their sum.
        total = total.astype(jnp.float32) / math.sqrt(self.config.channels)
        (log_depth,) = float32_outputs(
            total, OutputLayer(1, nn.initializers.normal(0.1), name="log_depth")
        )
        return log_depth[..., 0]


def _upsample_inside(
    x: Float[Array, "b h w c"], mask: Bool[Array, "b h w 1"], finer: Bool[Array, "b h2 w2 1"]
) -> Float[Array, "b h2 w2 c"]:
    """`upsample_bilinear` as if the map ended where the image does; 0 outside of it."""
    size = (finer.shape[1], finer.shape[2])
    inside = jnp.broadcast_to(mask, x.shape)
    weights = upsample_bilinear(mask.astype(x.dtype), size)
    doubled = upsample_bilinear(jnp.where(inside, x, 0), size)
    doubled = doubled / jnp.where(weights > 0, weights, 1)
    return losses.zero_invalid(doubled, finer[..., 0])


def box_depth_config(config: MaskHeadConfig) -> MaskHeadConfig:
    """Layers of the RoI head: the mask branch's, without refinement and imported batch norm."""
    norm = "none" if config.norm == "frozen_batch" else config.norm
    return replace(config, norm=norm, refine=PointRendConfig())


def box_depth_targets(
    depth: Float[Array, "h w"], boxes: Float[Array, "s 4"], valid: Bool[Array, " s"], *, size: int
) -> Float[Array, "s m m"]:
    """Reads the depth map of an image at the centres of size x size cells of each box.

    Args:
        depth: metres at stride 4, 0 where unknown.
        boxes: in canvas pixels.
        valid: boxes that exist; the others read 0.
        size: cells along a side.
    """
    boxes = box_ops.sanitize(boxes, valid)
    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size

    def cells(
        low: Float[Array, " s"], high: Float[Array, " s"], length: int
    ) -> Int32[Array, "s m"]:
        at = low[:, None] + (high - low)[:, None] * centres[None]
        return jnp.clip(jnp.floor(at / DEPTH_STRIDE).astype(jnp.int32), 0, length - 1)

    rows = cells(boxes[:, 1], boxes[:, 3], depth.shape[0])
    columns = cells(boxes[:, 0], boxes[:, 2], depth.shape[1])
    return losses.zero_invalid(depth[rows[:, :, None], columns[:, None, :]], valid)


def box_depth_loss(
    found: Instances,
    batch: Batch,
    config: ModelConfig,
    *,
    predict: Callable[[Array, Array], Array],
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
    """Chooses boxes as the mask head does, and compares the depth of their cells with the map's.

    Args:
        found: boxes of each image to choose from, as in `mask_samples`.
        batch: with depth maps.
        config: of the network.
        predict: `MaskRCNN.box_log_depth` on the features of the batch.
        mesh: the devices that the rows of `batch` are spread over.
    """
    size = config.mask_size
    choose = per_image(lambda f, gt: mask_samples(f, gt, config.mask_head, size), mesh)
    samples = choose(found, batch.ground_truth)
    read = per_image(lambda d, s: box_depth_targets(d, s.boxes, s.valid, size=size), mesh)
    log_depth = predict(samples.boxes, samples.valid)
    return depth_loss(log_depth, read(batch.depth, samples), batch.valid, config.depth_head)


def depth_loss(
    log_depth: Float[Array, "b ..."],
    metres: Float[Array, "b ..."],
    image_valid: Bool[Array, " b"],
    config: DepthHeadConfig,
) -> dict[str, Float[Array, ""]]:
    """The loss over the cells of known depth of each image, averaged over the images with any.

    Args:
        log_depth: predicted log depth of each cell of an image.
        metres: true depth; not finite or not positive where it is unknown.
        image_valid: images that exist.
        config: which loss.
    """
    rows = len(image_valid)
    log_depth, metres = log_depth.reshape(rows, -1), metres.reshape(rows, -1)
    known = (metres > 0) & jnp.isfinite(metres) & image_valid[:, None]
    true = jnp.log(jnp.where(known, metres, 1))
    differences = losses.zero_invalid(log_depth, known) - losses.zero_invalid(true, known)
    match config.loss:
        case "silog":
            values = losses.silog(differences, known, lambda_=config.silog_lambda)
        case "berhu":
            values = losses.row_means(losses.berhu(differences, known), known)
        case "l1":
            values = losses.row_means(jnp.abs(differences), known)
        case _:
            assert_never(config.loss)
    return {"depth": config.loss_weight * losses.masked_mean(values, known.any(axis=1))}
