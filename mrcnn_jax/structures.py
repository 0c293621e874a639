"""The two containers that everything passes around, and the conventions that they obey.

- Boxes are (x1, y1, x2, y2) in absolute pixels of the canvas, continuous in [0, W] x [0, H]: a
  box that covers exactly the first pixel is (0, 0, 1, 1). There is no "+ 1" anywhere.
- Images and feature maps are NHWC (HWC inside single-image functions), RGB.
- Label 0 is the background; the classes of a data set are 1..K.
- A set of things is padded to a static length and carries `valid`. `valid` alone says whether a
  row exists: the other fields of an invalid row may hold anything, NaN included.
- Sizes are (height, width). Geometry, softmax and losses are float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

# Leaves are jax arrays on the device and NumPy arrays on the host (loader, evaluation). A static
# checker, which would want every use narrowed to one of the two, sees Any.
if TYPE_CHECKING:
    AnyArray: TypeAlias = Any
else:
    AnyArray = Array | np.ndarray


class Instances(flax.struct.PyTreeNode):
    """A padded set of N boxes of one image: ground truth, proposals, samples or detections.

    Fields that do not apply are None. With a leading batch axis, every field has it.
    """

    boxes: Float[AnyArray, "*b n 4"]
    valid: Bool[AnyArray, "*b n"]
    labels: Int32[AnyArray, "*b n"] | None = None
    scores: Float[AnyArray, "*b n"] | None = None
    # Ground truth: uint8 coverage 0..255 of the object inside its own box, on M x M cells.
    # Detections: float32 mask probabilities in [0, 1] inside the box.
    masks: UInt8[AnyArray, "*b n m m"] | Float[AnyArray, "*b n m m"] | None = None
    # Detections of a network with a mask-IoU head: score * predicted IoU of the mask.
    mask_scores: Float[AnyArray, "*b n"] | None = None
    # False for a valid object without a mask (only a box annotated, or lost in resizing).
    has_mask: Bool[AnyArray, "*b n"] | None = None

    def take(self, indices: Int32[Array, " k"], valid: Bool[Array, " k"]) -> Instances:
        """Returns the rows at `indices` (single image), valid if both the row and `valid` are."""
        rows = jax.tree.map(lambda field: jnp.take(field, indices, axis=0), self)
        return rows.replace(valid=rows.valid & valid)


class Batch(flax.struct.PyTreeNode):
    """Images of one canvas size with their ground truth: NumPy from the loader, jax in a step."""

    images: UInt8[AnyArray, "b h w 3"]  # top left of the canvas; the rest is zero
    # (height, width) of the resized image, or of the part of it that is on the canvas.
    image_sizes: Int32[AnyArray, "b 2"]
    original_sizes: Int32[AnyArray, "b 2"]  # (height, width) of the image on disk
    # (y, x): canvas pixels = original pixels * scale, float32. An augmented training image may be
    # mirrored and cropped as well: then it is only the ratio of the sizes.
    scales: Float[AnyArray, "b 2"]
    # Index of the image in its split: seeds its random numbers and leads back to its COCO id.
    indices: Int32[AnyArray, " b"]
    valid: Bool[AnyArray, " b"]  # False for the images that fill up an incomplete batch
    ground_truth: Instances  # boxes, labels, masks, has_mask
    ignore: Instances  # crowd regions: boxes only
    # Objects of an augmented image, pasted ones too, that are not in its ground truth: cropped
    # away, hidden, or over data.max_objects. None without augmentation.
    lost: Int32[AnyArray, " b"] | None = None
    # Metres from the camera on cells of DEPTH_STRIDE x DEPTH_STRIDE canvas pixels, 0 where unknown.
    # None: the data set has no depth, or the network no depth head.
    depth: Float[AnyArray, "b h4 w4"] | None = None


DEPTH_STRIDE = 4  # canvas pixels per cell of a depth map: those of P2


def blank_batch(
    size: int,
    canvas: tuple[int, int],
    *,
    objects: int = 0,
    ignored: int = 0,
    mask_crop: int | None = None,
    count_lost: bool = False,
    depth: bool = False,
) -> Batch:
    """A NumPy batch of `size` invalid images on a canvas (height, width), to be filled in.

    Sizes and scales are 1, since later code divides by them.

    Args:
        objects, ignored: rows of the ground truth and of the crowd regions.
        mask_crop: side of the objects' masks; None: boxes only, without labels and masks.
        count_lost: whether `lost` is counted.
        depth: whether there is a depth map.
    """
    annotated = (
        {}
        if mask_crop is None
        else {
            "labels": np.zeros((size, objects), np.int32),
            "masks": np.zeros((size, objects, mask_crop, mask_crop), np.uint8),
            "has_mask": np.zeros((size, objects), bool),
        }
    )

    def boxes(count: int, **fields: Any) -> Instances:
        return Instances(
            boxes=np.zeros((size, count, 4), np.float32),
            valid=np.zeros((size, count), bool),
            **fields,
        )

    cells = [side // DEPTH_STRIDE for side in canvas]
    return Batch(
        images=np.zeros((size, *canvas, 3), np.uint8),
        image_sizes=np.ones((size, 2), np.int32),
        original_sizes=np.ones((size, 2), np.int32),
        scales=np.ones((size, 2), np.float32),
        indices=np.zeros(size, np.int32),
        valid=np.zeros(size, bool),
        ground_truth=boxes(objects, **annotated),
        ignore=boxes(ignored),
        lost=np.zeros(size, np.int32) if count_lost else None,
        depth=np.zeros((size, *cells), np.float32) if depth else None,
    )


Params = dict[str, Any]  # nested dicts of arrays, as Flax makes them
