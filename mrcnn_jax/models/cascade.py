"""A cascade of box heads, each of which refines the boxes of the one before.

Cai & Vasconcelos 2018. `config.heads` has the options of each head; all of them are one `BoxHead`
after the other, with parameters of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from mrcnn_jax.config.heads import BoxHeadConfig
from mrcnn_jax.config.schema import BOX_LOSSES, Loss
from mrcnn_jax.models.box_head import (
    BoxOutput,
    BoxSamples,
    best_detections,
    box_loss,
    label_boxes,
)
from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops import losses
from mrcnn_jax.parallel import per_image
from mrcnn_jax.structures import Batch, Instances

BOX_HEADS = ("box_head", "box_head2", "box_head3")
"""Modules of the first, second and third head; their losses are `BOX_LOSSES`."""


class Predict(Protocol):
    """(boxes [B, N, 4] in canvas pixels, valid [B, N], number of the head) -> its output."""

    def __call__(
        self, boxes: Float[Array, "b n 4"], valid: Bool[Array, "b n"], *, head: int
    ) -> BoxOutput: ...


def refine_boxes(
    output: BoxOutput, boxes: Instances, image_size: Int32[Array, " 2"], config: BoxHeadConfig
) -> Instances:
    """Boxes of one image as a class-agnostic head corrects them, constants to the next head.

    Args:
        output: predictions of the head for the boxes, [N, K+1] and [N, 1, 4].
        boxes: in canvas pixels.
        image_size: (height, width) that they are clipped to, pixels.
        config: of this head.

    Returns:
        As many boxes in the same order; one that lost its area, outside the image, is not valid.
    """
    deltas = losses.zero_invalid(output.deltas[:, 0], boxes.valid)
    anchors = box_ops.sanitize(boxes.boxes, boxes.valid)
    moved = box_ops.clip(box_ops.decode(deltas, anchors, weights=config.box_weights), image_size)
    valid = boxes.valid & jnp.all(moved[:, 2:] > moved[:, :2], axis=-1)
    return jax.lax.stop_gradient(Instances(boxes=moved, valid=valid))


def label_refined_boxes(
    boxes: Instances, ground_truth: Instances, ignore: Instances, config: BoxHeadConfig
) -> BoxSamples:
    """All boxes of one image as samples of a further head, matched anew by its foreground_iou.

    Nothing is drawn, as in the paper and detectron2: the boxes are those of the first head's
    samples, which include the ground truth, as the heads before moved them. The better they are,
    the more of them are foreground at the higher IoU. A background box in a crowd region is not
    valid.
    """
    labelled = label_boxes(boxes, ground_truth, ignore, config)
    assert ground_truth.labels is not None
    return BoxSamples(
        boxes=labelled.boxes,
        labels=jnp.where(labelled.foreground, ground_truth.labels[labelled.gt_index], 0),
        deltas=box_ops.encode(
            labelled.gt_boxes[labelled.gt_index], labelled.boxes, weights=config.box_weights
        ),
        valid=labelled.foreground | labelled.background,
    )


def box_losses(
    samples: BoxSamples,
    batch: Batch,
    config: BoxHeadConfig,
    wanted: Collection[Loss],
    *,
    predict: Predict,
    mesh: Mesh | None = None,
) -> dict[str, Float[Array, ""]]:
    """Losses of the box heads that are `wanted`, box_class and box_box, box2_class and so on.

    The heads run one after the other as far as the last of these. By default the losses of the
    further ones count by 1/2 and 1/4, as in mmdetection; detectron2 has 1 for all, and divides the
    gradient of the features by the number of heads instead.

    Args:
        samples: boxes that the first head is trained on.
        batch: rows may be spread over the devices of `mesh`.
        predict: of the network.
    """
    names = BOX_LOSSES[: 1 + max(i for i, name in enumerate(BOX_LOSSES) if name in wanted)]
    heads = config.heads
    values: dict[str, Float[Array, ""]] = {}
    output = predict(samples.boxes, samples.valid, head=0)
    for number, name in enumerate(names):
        if number > 0:
            resample = functools.partial(
                _next_samples, before=heads[number - 1], config=heads[number]
            )
            samples = per_image(resample, mesh)(
                output, samples, batch.ground_truth, batch.ignore, batch.image_sizes
            )
            output = predict(samples.boxes, samples.valid, head=number)
        if name in wanted:
            own = box_loss(output, samples, batch.valid, heads[number])
            values |= {key.replace("box", name, 1): value for key, value in own.items()}
    return values


def _next_samples(
    output: BoxOutput,
    samples: BoxSamples,
    ground_truth: Instances,
    ignore: Instances,
    image_size: Int32[Array, " 2"],
    *,
    before: BoxHeadConfig,
    config: BoxHeadConfig,
) -> BoxSamples:
    boxes = Instances(boxes=samples.boxes, valid=samples.valid)
    boxes = refine_boxes(output, boxes, image_size, before)
    return label_refined_boxes(boxes, ground_truth, ignore, config)


def cascade_detections(
    proposals: Instances,
    image_sizes: Int32[Array, "b 2"],
    config: BoxHeadConfig,
    *,
    predict: Predict,
) -> Instances:
    """The best boxes of each image of a batch: those of the last head.

    Their scores are the means of the probabilities that each head has for the box that it was
    given, as in detectron2. mmdetection takes the mean of the logits; the authors' code runs all
    heads on the last boxes.

    Args:
        proposals: of each image, canvas pixels.
        image_sizes: (height, width) that boxes are clipped to, pixels.
        predict: of the network.

    Returns:
        As of `box_detections`.
    """
    boxes, heads = proposals, config.heads
    output = predict(boxes.boxes, boxes.valid, head=0)
    scores = jax.nn.softmax(output.logits, axis=-1)
    for number in range(1, len(heads)):
        refine = functools.partial(refine_boxes, config=heads[number - 1])
        boxes = jax.vmap(refine)(output, boxes, image_sizes)
        output = predict(boxes.boxes, boxes.valid, head=number)
        scores += jax.nn.softmax(output.logits, axis=-1)
    detect = functools.partial(best_detections, config=heads[-1])
    return jax.vmap(detect)(scores[..., 1:] / len(heads), output.deltas, boxes, image_sizes)
