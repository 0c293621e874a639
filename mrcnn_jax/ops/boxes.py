"""Box algebra. Boxes are float32 (x1, y1, x2, y2), continuous, no "+ 1" (mrcnn_jax.structures)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Num

# Decoded log sizes are clipped to this: a box is at most 62.5 times its anchor; exp never
# overflows.
MAX_LOG_SCALE = math.log(1000 / 16)

# Areas up to this count as 0: the gradient of a quotient divides by their square, which would
# underflow in float32.
EMPTY_AREA = 1e-19


def sanitize(boxes: Float32[Array, "n 4"], valid: Bool[Array, " n"]) -> Float32[Array, "*nm"]:
    """Replaces every invalid row by the unit box (0, 0, 1, 1), on which no formula divides by zero.

    This is the first half of the select-twice rule (see mrcnn_jax.ops.losses): invalid rows get no
    gradient, whatever they hold.
    """
    return jnp.where(valid[:, None], boxes, jnp.array([[0, 0, 1, 1]], boxes.dtype))


def area(boxes: Float32[Array, "*n 4"]) -> Float32[Array, "*n"]:
    """Returns areas in square pixels; 0 for a box turned inside out."""
    width = jnp.maximum(boxes[..., 2] - boxes[..., 0], 0)
    height = jnp.maximum(boxes[..., 3] - boxes[..., 1], 0)
    return width * height


def _intersection(a: Float32[Array, "*n 4"], b: Float32[Array, "*m 4"]) -> Float32[Array, "*nm"]:
    """Returns the areas that boxes of `a` and `b` share; leading axes broadcast."""
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    return jnp.maximum(width, 0) * jnp.maximum(height, 0)


def _ratio(part: Float32[Array, "*n"], whole: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Returns part / whole, or 0 where the whole is empty or overflows; gradients are never NaN."""
    usable = (whole > EMPTY_AREA) & (whole < jnp.inf)
    return jnp.where(usable, part / jnp.where(usable, whole, 1), 0)


def iou(a: Float32[Array, "n 4"], b: Float32[Array, "m 4"]) -> Float32[Array, "*nm"]:
    """Returns the intersection over union of every pair of boxes.

    It is 0 where the union is empty or overflows float32, and never NaN for finite boxes.
    """
    intersection = _intersection(a[:, None], b[None])
    return _ratio(intersection, area(a)[:, None] + area(b)[None] - intersection)


def giou(a: Float32[Array, "*n 4"], b: Float32[Array, "*n 4"]) -> Float32[Array, "*n"]:
    """Returns the generalised IoU of `a` and `b`, row by row, in [-1, 1].

    That is IoU minus the share of the smallest box around both that neither covers (Rezatofighi et
    al. 2019, algorithm 1). A share of an area that is empty or overflows float32 counts as 0: two
    equal boxes without area have 0.
    """
    intersection = _intersection(a, b)
    union = area(a) + area(b) - intersection
    hull = area(
        jnp.concatenate(
            [jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1
        )
    )
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def intersection_over_area(
    a: Float32[Array, "n 4"], b: Float32[Array, "m 4"]
) -> Float32[Array, "*nm"]:
    """Returns the share of each box of `a` that lies inside each of `b` (crowd regions).

    It is 0 for a box of `a` without area.
    """
    intersection = _intersection(a[:, None], b[None])
    return _ratio(intersection, jnp.broadcast_to(area(a)[:, None], intersection.shape))


def encode(
    boxes: Float32[Array, "n 4"], anchors: Float32[Array, "n 4"], *, weights: Sequence[float]
) -> Float32[Array, "*nm"]:
    """Encodes boxes as deltas (tx, ty, tw, th) from anchors (Faster R-CNN, equation 2).

    tx = (x - xa) / wa and ty = (y - ya) / ha on box centres, tw = log(w / wa), th = log(h / ha),
    each times its one of the four `weights`. A row whose box or anchor has no area (usually
    padding) gives 0, and no gradient.
    """
    defined = (area(boxes) > 0) & (area(anchors) > 0)
    boxes, anchors = sanitize(boxes, defined), sanitize(anchors, defined)
    size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    # The difference of the centres is taken corner by corner: large coordinates cancel before
    # anything is rounded.
    shift = ((boxes[:, :2] - anchors[:, :2]) + (boxes[:, 2:] - anchors[:, 2:])) / 2
    # Two logarithms: the quotient of extreme sizes would leave float32.
    deltas = jnp.concatenate([shift / anchor_size, jnp.log(size) - jnp.log(anchor_size)], axis=1)
    return deltas * jnp.array([weights], deltas.dtype)


def decode(
    deltas: Float[Array, "*n 4"], anchors: Float32[Array, "*n 4"], *, weights: Sequence[float]
) -> Float32[Array, "*n 4"]:
    """Decodes deltas to boxes, the inverse of `encode`; tw and th are cut to MAX_LOG_SCALE."""
    deltas = deltas.astype(jnp.float32) / jnp.broadcast_to(
        jnp.array(weights, jnp.float32), deltas.shape
    )
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + anchor_size / 2 + deltas[..., :2] * anchor_size
    half = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_size / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def clip(boxes: Float32[Array, "*n 4"], size: Num[Array, " 2"]) -> Float32[Array, "*n 4"]:
    """Clips boxes to an image of `size` = (height, width) pixels; one outside loses its area."""
    size = jnp.asarray(size).astype(boxes.dtype)
    limits = jnp.broadcast_to(size[jnp.array([1, 0, 1, 0])], boxes.shape)
    return jnp.clip(boxes, 0, limits)
