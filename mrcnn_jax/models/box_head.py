"""Stage 2, the box head: network, targets, loss and detections.

Report table 2; Girshick 2015, section 2.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from mrcnn_jax.config.heads import BoxHeadConfig
from mrcnn_jax.models.layers import Dense, conv_norm_relu, he_normal_fan_out, relu
from mrcnn_jax.models.outputs import OutputLayer, float32_outputs
from mrcnn_jax.models.rpn import inside_crowd
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.ops.classes import select_class
from mrcnn_jax.ops.matching import match
from mrcnn_jax.ops.nms import multiclass_nms
from mrcnn_jax.ops.sampling import sample
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import Batch, Instances


class BoxOutput(flax.struct.PyTreeNode):
    """Predictions for R boxes, always float32.

    Class 0 is the background; deltas exist for the K foreground classes only, or once for all.
    """

    logits: Float[Array, "*r classes"]
    deltas: Float[Array, "*r k 4"]


class BoxHead(nn.Module):
    """Convolutions, fully connected layers, then class logits and one box per foreground class.

    The report has no convolution and two fully connected layers on the flattened RoI features. A
    class-agnostic head has a single box.
    """

    config: BoxHeadConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "*r p p c"]) -> BoxOutput:
        config = self.config
        boxes = features.shape[:-3]
        x = features.reshape(-1, *features.shape[-3:]).astype(self.dtype)
        for i in range(1, config.convs + 1):
            x = conv_norm_relu(
                x,
                config.conv_channels,
                config.norm,
                kernel_init=he_normal_fan_out,
                dtype=self.dtype,
                name=f"conv{i}",
            )
        x = x.reshape(*boxes, -1)
        for i in range(1, config.fcs + 1):
            x = relu(Dense(config.hidden, dtype=self.dtype, name=f"fc{i}")(x))
        normal = nn.initializers.normal
        box_classes = 1 if config.class_agnostic else self.num_classes
        logits, deltas = float32_outputs(
            x,
            OutputLayer(self.num_classes + 1, normal(0.01), name="logits"),
            OutputLayer(4 * box_classes, normal(0.001), name="deltas"),
        )
        return BoxOutput(logits=logits, deltas=deltas.reshape(*deltas.shape[:-1], box_classes, 4))


class BoxSamples(flax.struct.PyTreeNode):
    """The boxes of an image that the box head is trained on, with their targets."""

    boxes: Float[Array, "*b s 4"]
    labels: Int32[Array, "*b s"]  # 0: background
    deltas: Float[Array, "*b s 4"]
    valid: Bool[Array, "*b s"]

    @property
    def foreground(self) -> Instances:
        """The boxes with an object."""
        return Instances(boxes=self.boxes, valid=self.valid & (self.labels > 0))


def concatenate_boxes(*sets: Instances) -> Instances:
    """Boxes and validity of several sets as one set."""
    return Instances(
        boxes=jnp.concatenate([s.boxes for s in sets]),
        valid=jnp.concatenate([s.valid for s in sets]),
    )


def box_samples(
    key: PRNGKeyArray,
    proposals: Instances,
    ground_truth: Instances,
    ignore: Instances,
    config: BoxHeadConfig,
) -> BoxSamples:
    """Samples `config.samples` of one image's proposals and ground-truth boxes.

    At most `positive_fraction` of them are foreground, as `label_boxes` says; background takes the
    places that are left.
    """
    candidates = label_boxes(
        concatenate_boxes(proposals, ground_truth), ground_truth, ignore, config
    )
    samples = sample(
        key,
        positive=candidates.foreground,
        negative=candidates.background,
        count=config.samples,
        positive_fraction=config.positive_fraction,
    )
    chosen = candidates.boxes[samples.indices]
    gt_index = candidates.gt_index[samples.indices]
    assert ground_truth.labels is not None
    return BoxSamples(
        boxes=chosen,
        labels=jnp.where(samples.positive & samples.valid, ground_truth.labels[gt_index], 0),
        deltas=box_ops.encode(candidates.gt_boxes[gt_index], chosen, weights=config.box_weights),
        valid=samples.valid,
    )


class LabelledBoxes(NamedTuple):
    """Boxes of one image, each with its ground truth, as foreground, background or neither."""

    boxes: Float[Array, "n 4"]  # sanitized
    gt_boxes: Float[Array, "g 4"]  # sanitized
    gt_index: Int32[Array, " n"]
    foreground: Bool[Array, " n"]
    background: Bool[Array, " n"]


def label_boxes(
    candidates: Instances, ground_truth: Instances, ignore: Instances, config: BoxHeadConfig
) -> LabelledBoxes:
    """Labels the candidates of one image as foreground or background.

    A candidate takes the ground-truth box of highest IoU if that is above foreground_iou; else it
    is background, unless it lies in a crowd region.
    """
    boxes = box_ops.sanitize(candidates.boxes, candidates.valid)
    gt_boxes = box_ops.sanitize(ground_truth.boxes, ground_truth.valid)
    matches = match(box_ops.iou(boxes, gt_boxes), ground_truth.valid)
    foreground = candidates.valid & (matches.iou > config.foreground_iou)
    background = candidates.valid & ~foreground & ~inside_crowd(boxes, ignore, config.crowd_overlap)
    return LabelledBoxes(boxes, gt_boxes, matches.gt_index, foreground, background)


def draw_box_samples(
    keys: PRNGKeyArray,
    proposals: Instances,
    batch: Batch,
    config: BoxHeadConfig,
    mesh: Mesh | None = None,
) -> BoxSamples:
    """Samples boxes of every image in a batch with `box_samples`.

    Args:
        keys: `ImageKeys.box`.
        proposals: of each image, canvas pixels.
        mesh: the devices that the rows of `batch` are spread over.
    """
    draw = per_image(
        lambda key, found, truth, ignore: box_samples(key, found, truth, ignore, config), mesh
    )
    return draw(keys, proposals, batch.ground_truth, batch.ignore)


def box_loss(
    output: BoxOutput, samples: BoxSamples, image_valid: Bool[Array, " b"], config: BoxHeadConfig
) -> dict[str, Float[Array, ""]]:
    """Cross-entropy of a batch's samples, and box loss on the true class's deltas of foreground.

    Both are divided by the number of samples. Class-agnostic deltas are those of any class.
    """
    valid = samples.valid & image_valid[:, None]
    labels = jnp.where(valid, samples.labels, 0)
    foreground = labels > 0
    classes = losses.cross_entropy(jnp.where(valid[..., None], output.logits, 0.0), labels)
    deltas = select_class(output.deltas, labels, axis=-2)
    box = losses.box_regression(
        losses.zero_invalid(deltas, foreground),
        losses.zero_invalid(samples.deltas, foreground),
        kind=config.box_loss,
        beta=config.smooth_l1_beta,
        weights=config.box_weights,
    )
    return {
        "box_class": config.class_loss_weight * losses.masked_mean(classes, valid),
        "box_box": config.box_loss_weight * losses.masked_mean(box, foreground, jnp.sum(valid)),
    }


def box_detections(
    output: BoxOutput, proposals: Instances, image_size: Int32[Array, " 2"], config: BoxHeadConfig
) -> Instances:
    """The best `config.detections` boxes of one image after per-class NMS.

    Args:
        output: predictions for the proposals, [P, K+1] and [P, K, 4], or [P, 1, 4].
        proposals: boxes in canvas pixels.
        image_size: (height, width) that boxes are clipped to, pixels.

    Returns:
        Refined boxes in canvas pixels, best first, with labels 1..K and probabilities as scores.
    """
    scores = jax.nn.softmax(output.logits, axis=-1)[:, 1:]
    return best_detections(scores, output.deltas, proposals, image_size, config)


def best_detections(
    scores: Float[Array, "p k"],
    deltas: Float[Array, "p box_classes 4"],
    proposals: Instances,
    image_size: Int32[Array, " 2"],
    config: BoxHeadConfig,
) -> Instances:
    """As `box_detections`, from the probabilities of the foreground classes."""
    anchors = box_ops.sanitize(proposals.boxes, proposals.valid)[:, None]
    boxes = box_ops.decode(
        deltas, jnp.broadcast_to(anchors, deltas.shape), weights=config.box_weights
    )
    boxes = box_ops.clip(boxes, image_size)
    if config.class_agnostic:
        boxes = jnp.broadcast_to(boxes, (*scores.shape, 4))
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = (
        proposals.valid[:, None]
        & (scores > config.score_threshold)
        & jnp.all((sides > 0) & (sides >= config.min_size), axis=-1)
    )
    rows, classes, filled = multiclass_nms(
        boxes, scores, valid, iou_threshold=config.nms_iou, max_output=config.detections
    )
    found = Instances(
        boxes=boxes[rows, classes], labels=classes + 1, scores=scores[rows, classes], valid=filled
    )
    assert found.scores is not None
    return found.replace(
        boxes=losses.zero_invalid(found.boxes, filled),
        scores=losses.zero_invalid(found.scores, filled),
    )
