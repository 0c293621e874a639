"""From a mask inside its box to COCO's run-length encoding, and back to pixels; `exported.paste`
has the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32
from pycocotools import mask as coco_mask

from mrcnn_jax.pixels.geometry import paste_region

PasteStyle = Literal["exact", "torchvision"]


def paste_rle(
    mask: Float32[np.ndarray, "m m"],
    box: Float[np.ndarray, " 4"],
    size: tuple[int, int],
    style: PasteStyle = "exact",
) -> dict[str, Any]:
    """The object that `paste` shows as a compressed RLE, {"size": [height, width], "counts": str};
    the image itself is never built."""
    region, (y0, x0) = paste_region(mask, box, size, style)
    height, width = size
    # COCO runs go down the columns. Each column of the region gets a 0 before and behind it, so
    # that runs start and end inside it.
    columns = np.pad(region.T, ((0, 0), (1, 1))).view(np.int8)
    steps = np.diff(columns, axis=1)
    x, y = np.nonzero(steps)  # in column order; starts and ends of runs take turns
    edges = (x + x0) * height + y + y0
    # An object that touches the bottom goes on at the top of the next column: an end and a start at
    # one place are no edges.
    joined = np.flatnonzero(np.diff(edges) == 0)
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges[edges < height * width], prepend=0, append=height * width)
    return _compressed({"size": [height, width], "counts": counts.tolist()}, size)


def decoded(rles: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Bool[np.ndarray, "n h w"]:
    """RLEs of an image of `size` (height, width) as masks."""
    masks = np.zeros((len(rles), *size), bool)
    for mask, rle in zip(masks, rles, strict=True):
        mask[...] = coco_mask.decode(rle)
    return masks


def encoded(masks: Bool[np.ndarray, "n h w"]) -> list[dict[str, Any]]:
    """The inverse of `decoded`."""
    return [_as_text(coco_mask.encode(np.asfortranarray(mask, np.uint8))) for mask in masks]


def segmentation_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A COCO segmentation (polygons, RLE or compressed RLE) as a compressed RLE for an image of
    `size` (height, width).

    Its numbers are trusted, as pycocotools trusts them; what comes from a user's file has been
    through `data.coco`.

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
        raise ValueError(
            f"segmentation: an RLE of size {segmentation.get('size')} in an image of {list(size)}"
        )
    return (
        _compressed(segmentation, size)
        if isinstance(segmentation["counts"], list)
        else _as_text(segmentation)
    )


def _compressed(rle: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    return _as_text(coco_mask.frPyObjects(rle, *size))


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    """`rle` with Python ints and text, as JSON wants it."""
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
