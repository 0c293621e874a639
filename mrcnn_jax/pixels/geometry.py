"""Where pixels go: an image onto its canvas, and detections back into the image.

NumPy alone. `mrcnn_jax export` copies this file into every exported model, so that the package and
an exported model compute the same pixels with the same code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# -- an image onto its canvas ----------------------------------------------------------------------


def check_image(image: Any) -> None:
    """ValueError, one line, if it is not uint8 [H, W, 3] with H, W > 0."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image: {type(image).__name__} is no NumPy array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: {image.dtype} {list(image.shape)} is not uint8 RGB [H, W, 3]")


def resize_plan(
    height: int, width: int, short_side: int, long_side: int, canvases: Any
) -> tuple[int, tuple[int, int], tuple[float, float]]:
    """Where an image of height x width goes: number of the canvas (height, width), size there,
    scale (y, x) = that size / original.

    Scale min(short_side / short, long_side / long), sides rounded down: in integers, since 300 *
    (800 / 300) must not become 799. A side is at least 1 px. The canvas is the smallest that holds
    the image, the first of equals.
    """
    short, long = min(height, width), max(height, width)
    by_long = long_side * short < short_side * long
    numerator, denominator = (long_side, long) if by_long else (short_side, short)
    resized = max(1, height * numerator // denominator), max(1, width * numerator // denominator)
    fitting = [i for i, (h, w) in enumerate(canvases) if h >= resized[0] and w >= resized[1]]
    canvas = min(fitting, key=lambda i: canvases[i][0] * canvases[i][1])
    return canvas, resized, (resized[0] / height, resized[1] / width)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, c] to `size` (height, width): bilinear when it grows, area mean when it shrinks;
    rounded as OpenCV 5 does on x86, whose pixels these are (another build's may differ by one grey
    level).
    """
    if size[0] < image.shape[0]:
        mean = _area_means(_area_means(image, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)
        halved = (2 * size[0], 2 * size[1]) == image.shape[
            :2
        ]  # OpenCV rounds these means up, where others go to the even number
        return (
            (np.floor(mean + np.float32(0.5)) if halved else np.rint(mean))
            .clip(0, 255)
            .astype(np.uint8)
        )
    left, right, *weights = _neighbours(image.shape[1], size[1])
    rows = (image[:, left] * weights[0][:, None] + image[:, right] * weights[1][:, None]) >> 4
    top, bottom, *weights = _neighbours(image.shape[0], size[0])
    above, below = (
        (rows[i] * weight[:, None, None]) >> 16
        for i, weight in zip((top, bottom), weights, strict=True)
    )
    return ((above + below + 2) >> 2).astype(np.uint8)


def _area_means(values: np.ndarray, cells: int) -> np.ndarray:
    """The first axis of `values` averaged over `cells` equal cells, fewer than it has; float32."""
    # A cell is the sum of the values from the one that holds its start to the one before that which
    # holds its end, and parts of these two.
    whole, rest = np.divmod(
        np.arange(cells + 1) * len(values), cells
    )  # in integers: the last cell ends where the axis does
    parts = (rest / cells).astype(np.float32)[:, None, None] * values[
        np.minimum(whole, len(values) - 1)
    ]
    sums = np.add.reduceat(values, whole[:-1], axis=0, dtype=np.float32) + parts[1:] - parts[:-1]
    return sums / np.float32(len(values) / cells)


def _neighbours(length: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of `cells` equal cells of an axis: the two values around the centre of each, and their
    weights, int32 that add up to 2048."""
    places = ((np.arange(cells) + 0.5) * (length / cells) - 0.5).astype(np.float32)
    low = np.floor(places)
    share = places - low
    ends = (np.clip(low + i, 0, length - 1).astype(np.intp) for i in (0, 1))
    return (
        *ends,
        np.rint((1 - share) * 2048).astype(np.int32),
        np.rint(share * 2048).astype(np.int32),
    )


# -- boxes and detections into the image ---------------------------------------------------------------------


def boxes_to_image(boxes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] of a canvas in pixels of the image; `scale` (y, x) is canvas / image."""
    return boxes / np.tile(scale[::-1], 2)


def boxes_to_canvas(boxes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The inverse of `boxes_to_image`."""
    return boxes * np.tile(scale[::-1], 2)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tight (x1, y1, x2, y2) around the pixels of a mask [H, W] that are not 0; zeros if none is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def in_image(boxes: np.ndarray, scale: Any, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] of a canvas in pixels of the image, float64: as they are, and clipped to its
    `size` (height, width).

    Masks are pasted by the first: clipping a box first would shift the mask inside it. `scale` (y,
    x): canvas = image pixels * scale.
    """
    boxes = boxes_to_image(np.asarray(boxes, np.float64), np.asarray(scale, np.float32))
    return boxes, np.clip(boxes, 0, [size[1], size[0], size[1], size[0]])


def paste_region(
    mask: np.ndarray, box: np.ndarray, size: tuple[int, int], style: str
) -> tuple[np.ndarray, tuple[int, int]]:
    """The object that `paste` shows: bool, and the place (y0, x0) of its first pixel in the
    image."""
    probabilities, corner = paste(mask, box, size, style)
    return (probabilities > 0.5 if style == "torchvision" else probabilities >= 0.5), corner


def paste(
    mask: np.ndarray, box: np.ndarray, size: tuple[int, int], style: str = "exact"
) -> tuple[np.ndarray, tuple[int, int]]:
    """The probabilities of one mask's pixels, as the part of the image that its box covers.

    Exact: the cells of an M x M mask tile its box: the centre of cell i lies at (i + 0.5) / M of
    the box's side, the centre of pixel p at p + 0.5. A pixel takes the bilinear mixture of the
    cells around its centre, with zeros beyond the border; at least 0.5 is the object. A box's
    corners are thus cut a little when it is larger than M pixels; repeating the border cells
    instead keeps them but makes objects too large: through 28 x 28 crops, coco300's validation
    masks come back 0.7 % too large that way, against 0.06 % too small with zeros (mean IoU .988 and
    .991).

    Torchvision (roi_heads.paste_masks_in_image): a border of zeros goes around the mask, the box
    grows with it, and is then made of whole pixels, from the one that holds its first corner to the
    one that holds its second. More than 0.5 is the object.

    Args:
        mask: float32 [M, M], probabilities in [0, 1] inside the box.
        box: (x1, y1, x2, y2) in pixels of the image; it may reach beyond the image.
        size: (height, width) of the image.
        style: "exact" or "torchvision".

    Returns:
        (probabilities float32 [h, w], (y0, x0)): of the pixels whose centres lie in the box and the
        image, and the place of their first one in the image. A box that holds no pixel centre gives
        an empty array.
    """
    if style == "torchvision":
        mask, box = np.pad(mask, 1), _whole_pixels(box, (len(mask) + 2) / len(mask))
    x1, y1, x2, y2 = (float(side) for side in box)
    y0, rows = _bilinear_weights(y1, y2, mask.shape[0], size[0])
    x0, columns = _bilinear_weights(x1, x2, mask.shape[1], size[1])
    return rows @ mask @ columns.T, (y0, x0)


def _whole_pixels(box: np.ndarray, scale: float) -> np.ndarray:
    """`box` scaled about its centre, then grown to the pixels that its corners, cut to integers
    (towards 0), name."""
    box = box.astype(np.float32)  # as in torchvision: a rounding can move a corner by a pixel
    half, centre = (box[2:] - box[:2]) * 0.5 * scale, (box[2:] + box[:2]) * 0.5
    return np.concatenate([np.trunc(centre - half), np.trunc(centre + half) + 1])


def _bilinear_weights(low: float, high: float, cells: int, length: int) -> tuple[int, np.ndarray]:
    """The first pixel of 0..length-1 whose centre lies in [low, high), and the weights [P, cells]
    for it and those that follow."""
    first = min(max(int(np.ceil(low - 0.5)), 0), length)
    last = max(min(int(np.ceil(high - 0.5)), length), first)
    places = (np.arange(first, last) + 0.5 - low) / (high - low) * cells - 0.5  # in cells
    return first, np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(cells))).astype(
        np.float32
    )
