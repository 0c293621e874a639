"""Masks as polygons, for annotation tools."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco_mask

from mrcnn_jax.pixels.geometry import mask_box

STRAY = 0.5  # px: the most by which a point of an outline is left out
KEPT = 0.98  # IoU with the mask that a simplified outline must have


def outlines(mask: Bool[np.ndarray, "h w"]) -> list[Float[np.ndarray, "n 2"]]:
    """The outlines of a mask, in continuous pixels: pixel (x, y) covers [x, x + 1] x [y, y + 1].

    An outline goes through the middles of the sides between pixels inside and outside, without the
    points from which it strays by at most STRAY. If the polygons, filled as COCO fills them, then
    had an IoU with the mask under KEPT (small or thin masks), they follow the sides themselves.

    Args:
        mask: pixels that only touch at a corner are of two parts.

    Returns:
        For each part and each hole a polygon (x, y) of at least three points, the largest first:
        parts clockwise on the screen, holes counterclockwise. Empty without a pixel.
    """
    x1, y1, x2, y2 = mask_box(mask)
    if x1 == x2:
        return []
    inside = np.pad(mask[y1:y2, x1:x2], 1)
    loops = _loops(inside)
    smooth = [_simplified(loop) for loop in loops]
    if any(len(loop) < 3 for loop in smooth) or _iou(smooth, inside) < KEPT:
        smooth = [_corners(loop) for loop in loops]
    smooth.sort(key=lambda loop: -abs(signed_area(loop)))
    return [loop + np.array([x1 - 1, y1 - 1]) for loop in smooth]


def signed_area(loop: Float[np.ndarray, "n 2"]) -> float:
    """The area inside a polygon in square pixels: negative if it runs counterclockwise."""
    x, y = (loop - loop[0]).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def joined(loops: list[Float[np.ndarray, "n 2"]]) -> Float[np.ndarray, "n 2"]:
    """Outlines as one polygon: each is reached by a seam of no width, there and back, from the
    nearest point of those before."""
    whole = loops[0]
    for loop in loops[1:]:
        # Point by point: all pairs of two long outlines would not fit into memory.
        distances = (((whole - point) ** 2).sum(-1) for point in loop)
        nearest = [(found.min(), found.argmin()) for found in distances]
        j = min(range(len(loop)), key=nearest.__getitem__)
        i = nearest[j][1]
        there = np.roll(loop, -j, axis=0)
        whole = np.concatenate([whole[: i + 1], there, there[:1], whole[i:]])
    return whole


def filled(loops: list[Float[np.ndarray, "n 2"]], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The pixels inside of an odd number of polygons, each filled as COCO fills it.

    Args:
        loops: polygons (x, y).
        size: (height, width) of the mask.
    """
    mask = np.zeros(size, bool)
    for loop in loops:  # each in the box around it: there may be hundreds of small ones
        x, y = np.floor(loop.min(axis=0)).astype(int)
        width, height = np.ceil(loop.max(axis=0)).astype(int) - (x, y) + 1
        (rle,) = coco_mask.frPyObjects([(loop - (x, y)).ravel().tolist()], height, width)
        part = mask[y : y + height, x : x + width]
        part ^= coco_mask.decode(rle).astype(bool)[: part.shape[0], : part.shape[1]]
    return mask


def _loops(inside: Bool[np.ndarray, "h w"]) -> list[Float[np.ndarray, "n 2"]]:
    """The corners of pixels along each border, in steps of one, the inside to the right.

    Args:
        inside: without a pixel at its own border.
    """
    above, left = np.roll(inside, 1, axis=0), np.roll(inside, 1, axis=1)
    across = np.roll(above, 1, axis=1)
    # From the upper left corner of a pixel: where a side between inside and outside leads.
    sides = {
        (1, 0): inside & ~above,
        (0, 1): left & ~inside,
        (-1, 0): across & ~left,
        (0, -1): above & ~across,
    }
    ways = {
        step: set(zip(*(axis.tolist() for axis in np.nonzero(there.T)), strict=True))
        for step, there in sides.items()
    }
    loops = []
    for start in sorted(ways[1, 0]):  # there is such a side on every border
        if start not in ways[1, 0]:
            continue
        corner, step = start, (1, 0)
        passed: list[tuple[tuple[int, int], tuple[int, int]]] = []
        while not passed or (corner, step) != (start, (1, 0)):
            passed.append((corner, step))
            corner = corner[0] + step[0], corner[1] + step[1]
            # Right before straight on before left: where two ways lead on, the same pixel is kept.
            turns = ((-step[1], step[0]), step, (step[1], -step[0]))
            step = next(turn for turn in turns if corner in ways[turn])
        for corner, step in passed:
            ways[step].discard(corner)
        loops.append(np.array([corner for corner, _ in passed], np.float64))
    return loops


def _corners(loop: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """The points at which a loop of steps turns."""
    turns = np.roll(loop, 1, axis=0) + np.roll(loop, -1, axis=0) != 2 * loop
    return loop[turns.any(axis=1)]


def _simplified(loop: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """The middles of the steps without those that lie on the way; the corners if they are no more.

    They are no more for a rectangle, whose corners the middles would cut off.
    """
    middles = (loop + np.roll(loop, -1, axis=0)) / 2
    kept = cv2.approxPolyDP(middles.astype(np.float32), STRAY, True)[:, 0].astype(np.float64)
    corners = _corners(loop)
    return corners if len(corners) <= len(kept) else kept


def _iou(loops: list[Float[np.ndarray, "n 2"]], mask: Bool[np.ndarray, "h w"]) -> float:
    found = filled(loops, mask.shape)  # type: ignore[arg-type]
    return float((found & mask).sum() / (found | mask).sum())
