"""From a mask inside its box to pixels of the image (SPEC section 6), and to COCO's run-length encoding.

Exact: the cells of an M x M mask tile its box: the centre of cell i lies at (i + 0.5) / M of the box's side, the centre of pixel p at
p + 0.5. A pixel takes the bilinear mixture of the cells around its centre, with zeros beyond the border; at least 0.5 is the object. A
box's corners are thus cut a little when it is larger than M pixels; repeating the border cells instead keeps them but makes objects too
large: through 28 x 28 crops, coco300's validation masks come back 0.7 % too large that way, against 0.06 % too small with zeros (mean IoU
.988 and .991).

Torchvision (roi_heads.paste_masks_in_image): a border of zeros goes around the mask, the box grows with it, and is then made of whole
pixels, from the one that holds its first corner to the one that holds its second. More than 0.5 is the object.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Float64
from pycocotools import mask as coco_mask

PasteStyle = Literal["exact", "torchvision"]


def paste(
    mask: Float32[np.ndarray, "m m"], box: Float[np.ndarray, " 4"], size: tuple[int, int], style: PasteStyle = "exact"
) -> tuple[Float32[np.ndarray, "h w"], tuple[int, int]]:
    """The probabilities of one mask's pixels, as the part of the image that its box covers.

    Args:
        mask: probabilities in [0, 1] inside the box.
        box: (x1, y1, x2, y2) in pixels of the image; it may reach beyond the image.
        size: (height, width) of the image.
        style: of the two above.

    Returns:
        (probabilities, (y0, x0)): of the pixels whose centres lie in the box and the image, and the place of their first one in the
        image. A box that holds no pixel centre gives an empty array.
    """
    if style == "torchvision":
        mask, box = np.pad(mask, 1), _whole_pixels(box, (len(mask) + 2) / len(mask))
    x1, y1, x2, y2 = (float(side) for side in box)
    y0, rows = _bilinear_weights(y1, y2, mask.shape[0], size[0])
    x0, columns = _bilinear_weights(x1, x2, mask.shape[1], size[1])
    return rows @ mask @ columns.T, (y0, x0)


def paste_rle(
    mask: Float32[np.ndarray, "m m"], box: Float[np.ndarray, " 4"], size: tuple[int, int], style: PasteStyle = "exact"
) -> dict[str, Any]:
    """The object that `paste` shows as a compressed RLE, {"size": [height, width], "counts": str}; the image itself is never built."""
    probabilities, (y0, x0) = paste(mask, box, size, style)
    region = probabilities > 0.5 if style == "torchvision" else probabilities >= 0.5
    height, width = size
    # COCO runs go down the columns. Each column of the region gets a 0 before and behind it, so that runs start and end inside it.
    columns = np.pad(region.T, ((0, 0), (1, 1))).view(np.int8)
    steps = np.diff(columns, axis=1)
    x, y = np.nonzero(steps)  # in column order; starts and ends of runs take turns
    edges = (x + x0) * height + y + y0
    # An object that touches the bottom goes on at the top of the next column: an end and a start at one place are no edges.
    joined = np.flatnonzero(np.diff(edges) == 0)
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges[edges < height * width], prepend=0, append=height * width)
    return _compressed({"size": [height, width], "counts": counts.tolist()}, size)


def segmentation_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A COCO segmentation (polygons, RLE or compressed RLE) as a compressed RLE for an image of `size` (height, width).

    Its numbers are trusted, as pycocotools trusts them; what comes from a user's file has been through `data.coco`.

    Raises:
        ValueError: it is none of the three, or an RLE of another size.
    """
    if not segmentation or not isinstance(segmentation, list | dict):
        raise ValueError("segmentation: neither polygons nor an RLE")
    if isinstance(segmentation, list):
        try:
            parts = coco_mask.frPyObjects(segmentation, *size)
        except Exception as error:  # pycocotools raises bare Exception
            raise ValueError(f"segmentation: {error}") from None
        return _as_text(coco_mask.merge(parts))
    if list(segmentation.get("size", ())) != list(size):
        raise ValueError(f"segmentation: an RLE of size {segmentation.get('size')} in an image of {list(size)}")
    return _compressed(segmentation, size) if isinstance(segmentation["counts"], list) else _as_text(segmentation)


def _whole_pixels(box: Float[np.ndarray, " 4"], scale: float) -> Float32[np.ndarray, " 4"]:
    """`box` scaled about its centre, then grown to the pixels that its corners, cut to integers (towards 0), name."""
    box = box.astype(np.float32)  # as in torchvision: a rounding can move a corner by a pixel
    half, centre = (box[2:] - box[:2]) * 0.5 * scale, (box[2:] + box[:2]) * 0.5
    return np.concatenate([np.trunc(centre - half), np.trunc(centre + half) + 1])


def _bilinear_weights(low: float, high: float, cells: int, length: int) -> tuple[int, Float32[np.ndarray, "p cells"]]:
    """The first pixel of 0..length-1 whose centre lies in [low, high), and the weights of the cells for it and those that follow."""
    first = min(max(int(np.ceil(low - 0.5)), 0), length)
    last = max(min(int(np.ceil(high - 0.5)), length), first)
    centres: Float64[np.ndarray, " p"] = np.arange(first, last) + 0.5
    places = (centres - low) / (high - low) * cells - 0.5  # in cells
    return first, np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(cells))).astype(np.float32)


def _compressed(rle: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    return _as_text(coco_mask.frPyObjects(rle, *size))


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    """`rle` with Python ints and text, as JSON wants it."""
    counts = rle["counts"]
    return {"size": [int(side) for side in rle["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}
