"""Stage 1, the region proposal network: network, targets, loss and proposals.

Report table 1; Ren et al. 2015, section 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from mrcnn_jax.config.model import RPNConfig
from mrcnn_jax.models.layers import BatchNorm, Conv3x3, cell_mask, relu
from mrcnn_jax.models.outputs import OutputLayer, float32_outputs
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.anchors import level_anchors
from mrcnn_jax.ops.matching import best_anchor_mask, match
from mrcnn_jax.ops.nms import nms
from mrcnn_jax.ops.sampling import Samples, gather_samples, sample
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import Batch, Instances


class RPNOutput(flax.struct.PyTreeNode):
    """Predictions for the anchors of all levels, always float32.

    P2 comes first; within a level the order is by row, column, scale, ratio.
    """

    logits: Float[Array, "*b a"]
    deltas: Float[Array, "*b a 4"]


class RPNHead(nn.Module):
    """3x3 convolutions, batch norm and ReLU, then objectness and deltas.

    All levels share the weights and the batch statistics.
    """

    config: RPNConfig
    strides: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Sequence[Float[Array, "b h w c"]],
        *,
        image_sizes: Int32[Array, "b 2"],
        valid: Bool[Array, " b"],
        live: bool = False,
    ) -> RPNOutput:
        """Predicts objectness and deltas.

        Args:
            features: the maps of `strides`, fine to coarse.
            image_sizes: (height, width) of each image on its canvas, pixels.
            valid: False for images that fill up the batch.
            live: normalise by the statistics of this batch, over unpadded cells of valid images.
        """
        config = self.config
        batch = features[0].shape[0]
        channels = config.channels or features[0].shape[-1]
        anchors = len(level_scales(config, self.strides)[0]) * len(config.ratios)
        normal = nn.initializers.normal(0.01)
        convolutions = [
            Conv3x3(
                channels, normal, use_bias=not config.batch_norm, dtype=self.dtype, name=f"conv{i}"
            )
            for i in range(1, config.convs + 1)
        ]
        levels = list(features)
        if config.batch_norm:
            norm, (last,) = BatchNorm(channels, name="norm"), convolutions
            if live:
                # The statistics are those of all levels together.
                levels = [last(level) for level in levels]
                masks = [
                    cell_mask(image_sizes, valid, stride, (level.shape[1], level.shape[2]))
                    for level, stride in zip(levels, self.strides, strict=True)
                ]
                normalise = norm(levels, masks)
                levels = [relu(normalise(level)) for level in levels]
            else:
                running = norm()
                levels = [relu(last(level, fold=running)) for level in levels]
        else:
            for conv in convolutions:
                levels = [relu(conv(level)) for level in levels]
        # Level by level: a concatenation of the maps would be written out and read again.
        layers = (
            OutputLayer(anchors, normal, name="logits"),
            OutputLayer(4 * anchors, normal, name="deltas"),
        )
        logits, deltas = zip(*(float32_outputs(level, *layers) for level in levels), strict=True)
        return RPNOutput(
            logits=jnp.concatenate([x.reshape(batch, -1) for x in logits], axis=1),
            deltas=jnp.concatenate([x.reshape(batch, -1, 4) for x in deltas], axis=1),
        )


def level_scales(config: RPNConfig, strides: Sequence[int]) -> list[tuple[int, ...]]:
    """The anchor scales of each level: one per level of a pyramid, all of them on a single map."""
    return [config.scales] if len(strides) == 1 else [(scale,) for scale in config.scales]


def pyramid_anchors(
    config: RPNConfig, canvas: tuple[int, int], strides: Sequence[int]
) -> list[np.ndarray]:
    """float32 anchors [A_l, 4] of each level, in canvas pixels and in the order of `RPNOutput`.

    Args:
        canvas: (height, width) in pixels.
        strides: of the feature maps, fine to coarse.
    """
    torchvision = config.anchor_grid == "torchvision"
    levels = []
    for scales, stride in zip(level_scales(config, strides), strides, strict=True):
        rows, columns = -(-canvas[0] // stride), -(-canvas[1] // stride)
        exact = (canvas[0] // rows, canvas[1] // columns)
        levels.append(
            level_anchors(
                grid=(rows, columns),
                stride=exact if torchvision else (stride, stride),
                scales=scales,
                ratios=config.ratios,
                offset=0.5 if config.anchor_grid == "centre" else 0.0,
                whole_pixels=torchvision,
            )
        )
    return levels


def on_image(
    config: RPNConfig, anchors: Float[Array, "a 4"], image_size: Int32[Array, " 2"]
) -> Bool[Array, " a"]:
    """Whether each anchor's centre lies in the image, not in the padding of the canvas.

    With `anchors_in_padding`, all of them count.
    """
    if config.anchors_in_padding:
        return jnp.ones(len(anchors), bool)
    height, width = image_size.astype(jnp.float32)
    x1, y1, x2, y2 = (anchors[:, side] for side in range(4))
    return ((x1 + x2) / 2 < width) & ((y1 + y2) / 2 < height)


def usable_anchors(
    config: RPNConfig, anchors: Float[Array, "a 4"], image_size: Int32[Array, " 2"]
) -> Bool[Array, " a"]:
    """Anchors that may be trained on: centred in the image and, if so configured, inside it."""
    usable = on_image(config, anchors, image_size)
    if not config.anchors_across_border:
        height, width = image_size.astype(jnp.float32)
        x1, y1, x2, y2 = (anchors[:, side] for side in range(4))
        usable &= (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)
    return usable


class RPNTargets(flax.struct.PyTreeNode):
    """The mini-batch of one image: sampled anchors, and the deltas of the positive ones."""

    samples: Samples
    deltas: Float[Array, "*b s 4"]
    positive: Bool[Array, "*b a"]  # all anchors that it was sampled from
    negative: Bool[Array, "*b a"]


def rpn_labels(
    anchors: Float[Array, "a 4"],
    usable: Bool[Array, " a"],
    ground_truth: Instances,
    ignore: Instances,
    config: RPNConfig,
) -> tuple[Bool[Array, " a"], Bool[Array, " a"], Int32[Array, " a"]]:
    """(positive [A], negative [A], ground-truth index [A]) of one image's anchors.

    Positive: IoU >= positive_iou with some ground-truth box, or the best anchor of one. Negative:
    IoU < negative_iou with all, and less than crowd_overlap of its area inside any crowd region.
    The rest is ignored.
    """
    gt_boxes = box_ops.sanitize(ground_truth.boxes, ground_truth.valid)
    iou = box_ops.iou(anchors, gt_boxes)
    matches = match(iou, ground_truth.valid)
    positive = usable & (
        (matches.iou >= config.positive_iou) | best_anchor_mask(iou, usable, ground_truth.valid)
    )
    in_crowd = inside_crowd(anchors, ignore, config.crowd_overlap)
    negative = usable & ~positive & (matches.iou < config.negative_iou) & ~in_crowd
    return positive, negative, matches.gt_index


def inside_crowd(
    boxes: Float[Array, "n 4"], ignore: Instances, overlap: float
) -> Bool[Array, " n"]:
    """Whether each box has at least `overlap` of its own area inside one crowd region."""
    share = box_ops.intersection_over_area(boxes, box_ops.sanitize(ignore.boxes, ignore.valid))
    return jnp.any((share >= overlap) & ignore.valid[None, :], axis=1)


def rpn_targets(
    key: PRNGKeyArray,
    anchors: Float[Array, "a 4"],
    image_size: Int32[Array, " 2"],
    ground_truth: Instances,
    ignore: Instances,
    config: RPNConfig,
) -> RPNTargets:
    """Samples `config.samples` anchors of one image, at most `positive_fraction` of them positive.

    Negatives take the places that are left.
    """
    usable = usable_anchors(config, anchors, image_size)
    positive, negative, gt_index = rpn_labels(anchors, usable, ground_truth, ignore, config)
    samples = sample(
        key,
        positive=positive,
        negative=negative,
        count=config.samples,
        positive_fraction=config.positive_fraction,
    )
    gt_boxes = box_ops.sanitize(ground_truth.boxes, ground_truth.valid)[gt_index[samples.indices]]
    deltas = box_ops.encode(gt_boxes, anchors[samples.indices], weights=config.box_weights)
    return RPNTargets(samples=samples, deltas=deltas, positive=positive, negative=negative)


def draw_rpn_targets(
    keys: PRNGKeyArray,
    batch: Batch,
    config: RPNConfig,
    strides: Sequence[int],
    mesh: Mesh | None = None,
) -> RPNTargets:
    """Samples anchors of every image in a batch with `rpn_targets`.

    Args:
        keys: `ImageKeys.rpn`.
        strides: of the feature maps, fine to coarse.
        mesh: the devices that the rows of `batch` are spread over.
    """
    anchors = jnp.asarray(np.concatenate(pyramid_anchors(config, batch.images.shape[1:3], strides)))
    draw = per_image(
        lambda key, size, truth, ignore: rpn_targets(key, anchors, size, truth, ignore, config),
        mesh,
    )
    return draw(keys, batch.image_sizes, batch.ground_truth, batch.ignore)


def rpn_loss(
    output: RPNOutput, targets: RPNTargets, image_valid: Bool[Array, " b"], config: RPNConfig
) -> dict[str, Float[Array, ""]]:
    """Binary cross-entropy of a batch's samples and box loss of its positives.

    Both are divided by the number of samples.
    """
    samples = targets.samples
    logits = jax.vmap(gather_samples)(output.logits, samples)
    deltas = jax.vmap(gather_samples)(output.deltas, samples)
    valid = samples.valid & image_valid[:, None]
    positive = samples.positive & valid
    objectness = losses.binary_cross_entropy(
        jnp.where(valid, logits, 0.0), positive.astype(jnp.float32)
    )
    box = losses.box_regression(
        losses.zero_invalid(deltas, positive),
        losses.zero_invalid(targets.deltas, positive),
        kind=config.box_loss,
        beta=config.smooth_l1_beta,
        weights=config.box_weights,
    )
    return {
        "rpn_objectness": config.objectness_loss_weight * losses.masked_mean(objectness, valid),
        "rpn_box": config.box_loss_weight * losses.masked_mean(box, positive, jnp.sum(valid)),
    }


def rpn_losses(
    keys: PRNGKeyArray,
    output: RPNOutput,
    batch: Batch,
    config: RPNConfig,
    strides: Sequence[int],
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
    """Samples anchors of every image and compares the predictions with their targets.

    Args:
        keys: `ImageKeys.rpn`.
        output: predictions for the batch.
        strides: of the feature maps, fine to coarse.
        mesh: the devices that the rows of `batch` are spread over.
    """
    targets = draw_rpn_targets(keys, batch, config, strides, mesh)
    return rpn_loss(output, targets, batch.valid, config)


def rpn_proposals(
    output: RPNOutput,
    anchors: Sequence[np.ndarray],
    image_size: Int32[Array, " 2"],
    config: RPNConfig,
) -> Instances:
    """The best `config.proposals` boxes of one image over all levels, after per-level NMS.

    Args:
        output: predictions of one image, float32 [A] and [A, 4].
        anchors: anchors of each level, canvas pixels.
        image_size: (height, width) that boxes are clipped to, pixels.

    Returns:
        Boxes in canvas pixels, best first, with probabilities as scores.
    """
    candidates: list[Instances] = []
    start = 0
    for level in anchors:
        here = slice(start, start + len(level))
        logits, deltas = output.logits[here], output.deltas[here]
        start = here.stop
        boxes = jnp.asarray(level)
        in_image = on_image(config, boxes, image_size)
        top, indices = jax.lax.top_k(
            jnp.where(in_image, logits, -jnp.inf), min(config.pre_nms, len(level))
        )
        boxes = box_ops.decode(deltas[indices], boxes[indices], weights=config.box_weights)
        boxes = box_ops.clip(boxes, image_size)
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = in_image[indices] & jnp.all((sides >= config.min_size) & (sides > 0), axis=1)
        padding = min(config.pre_nms, max(len(a) for a in anchors)) - len(top)
        candidates.append(
            Instances(
                boxes=jnp.pad(boxes, ((0, padding), (0, 0))),
                # Logits: probabilities near 1 would tie.
                scores=jnp.pad(jnp.where(valid, top, 0.0), (0, padding)),
                valid=jnp.pad(valid, (0, padding)),
            )
        )
    levels = jax.tree.map(lambda *fields: jnp.stack(fields), *candidates)
    per_level = functools.partial(nms, iou_threshold=config.nms_iou, max_output=config.proposals)
    indices, kept = jax.vmap(per_level)(levels.boxes, levels.scores, levels.valid)
    survivors = jax.vmap(Instances.take)(levels, indices, kept)
    survivors = jax.tree.map(lambda field: field.reshape(-1, *field.shape[2:]), survivors)
    scores = jnp.where(survivors.valid, survivors.scores, -jnp.inf)
    _, best = jax.lax.top_k(scores, config.proposals)
    proposals = survivors.take(best, jnp.ones(config.proposals, bool))
    return proposals.replace(scores=jax.nn.sigmoid(proposals.scores))
