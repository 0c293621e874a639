"""COCO's run-length encoding of masks: from a mask inside its box, from pixels, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64
from pycocotools import mask as coco_mask

from mrcnn_jax.pixels.geometry import paste_region
from mrcnn_jax.pixels.places import mask_extent

PasteStyle = Literal["exact", "torchvision"]


def paste_rle(
    mask: Float32[np.ndarray, "m m"],
    box: Float[np.ndarray, " 4"],
    size: tuple[int, int],
    style: PasteStyle = "exact",
) -> dict[str, Any]:
    """The object that `geometry.paste_region` shows, encoded without ever building the image.

    Args:
        mask: probabilities inside the box.
        box: (x1, y1, x2, y2) in pixels of the image; it may reach beyond the image.
        size: (height, width) of the image.
        style: the rule, see `geometry.paste`.

    Returns:
        A compressed RLE, {"size": [height, width], "counts": str}.
    """
    region, (y0, x0) = paste_region(mask, box, size, style)
    height = size[0]
    # COCO runs go down the columns. A 0 at both ends of each column of the region makes every run
    # start and end inside it.
    columns = np.pad(region.T, ((0, 0), (1, 1))).view(np.int8)
    steps = np.diff(columns, axis=1)
    x, y = np.nonzero(steps)  # in column order: starts and ends of runs alternate
    return _of_edges((x + x0) * height + y + y0, size)


def _of_edges(edges: Int64[np.ndarray, " n"], size: tuple[int, int]) -> dict[str, Any]:
    """The compressed RLE of the starts and ends of runs, in turn, which count down the columns."""
    height, width = size
    # An object that touches the bottom continues at the top of the next column: an end and a start
    # at the same place are no edges.
    joined = np.flatnonzero(np.diff(edges) == 0)
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges[edges < height * width], prepend=0, append=height * width)
    rle = {"size": [height, width], "counts": counts.tolist()}
    return _as_text(coco_mask.frPyObjects(rle, height, width))


def moved_rle(
    rle: Mapping[str, Any], corner: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """A mask in another image, encoded without ever building either.

    Args:
        rle: compressed.
        corner: the place (y, x) in the other image of the first pixel of this one; negative values
            cut a window out of it.
        size: (height, width) of the other image; what lies outside is cut off.

    Returns:
        A compressed RLE of `size`.
    """
    x, top, bottom = _column_runs(rle)
    top, bottom = (np.clip(rows + corner[0], 0, size[0]) for rows in (top, bottom))
    x = x + corner[1]
    return _of_column_runs(x, top, bottom, size)


def sampled_rle(rle: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A mask in its image made smaller: of each square of `step` pixels' side, the middle one.

    Args:
        rle: compressed.
        step: of an image [H, W], the smaller one has ceil(H / step) x ceil(W / step) pixels; the
            squares at its ends may be cut off, and are empty without their middle.

    Returns:
        A compressed RLE of the smaller image.
    """
    x, top, bottom = _column_runs(rle)
    middle = step // 2
    here = x % step == middle
    top, bottom = (-(-(rows[here] - middle) // step) for rows in (top, bottom))
    size = -(-rle["size"][0] // step), -(-rle["size"][1] // step)
    return _of_column_runs(x[here] // step, top, bottom, size)


def _column_runs(
    rle: Mapping[str, Any],
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """The runs of a compressed RLE, divided at the columns' ends: x, first row, row after the last.

    They are in the order of the columns.
    """
    height, counts = rle["size"][0], rle["counts"]
    runs = decompressed(counts.decode() if isinstance(counts, bytes) else counts)
    assert runs is not None  # of our own making
    ends = np.cumsum(runs, dtype=np.int64)
    stops = ends[1::2]
    starts = ends[::2][: len(stops)]
    starts, stops = starts[starts < stops], stops[starts < stops]
    columns = (stops - 1) // height - starts // height + 1
    within = np.arange(columns.sum()) - np.repeat(np.cumsum(columns) - columns, columns)
    x = np.repeat(starts // height, columns) + within
    top = np.maximum(np.repeat(starts, columns) - x * height, 0)
    bottom = np.minimum(np.repeat(stops, columns) - x * height, height)
    return x, top, bottom


def _of_column_runs(
    x: Int64[np.ndarray, " n"],
    top: Int64[np.ndarray, " n"],
    bottom: Int64[np.ndarray, " n"],
    size: tuple[int, int],
) -> dict[str, Any]:
    """The inverse of `_column_runs`; what has no row, or lies beside the image, is left out."""
    here = (x >= 0) & (x < size[1]) & (top < bottom)
    starts = x[here] * size[0]
    return _of_edges(np.stack([starts + top[here], starts + bottom[here]], axis=1).ravel(), size)


def decoded(rles: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Bool[np.ndarray, "n h w"]:
    """The masks of RLEs of an image of `size` (height, width)."""
    masks = np.zeros((len(rles), *size), bool)
    for mask, rle in zip(masks, rles, strict=True):
        mask[...] = coco_mask.decode(rle)
    return masks


def decoded_region(
    rle: dict[str, Any] | None,
) -> tuple[Bool[np.ndarray, "h w"], tuple[int, int]]:
    """The pixels of a mask in the box around them, without ever building the image.

    Args:
        rle: compressed; None: a mask without pixels.

    Returns:
        The pixels of the box, 0 x 0 without any, and the place (y, x) of its first in the image.
    """
    extent = mask_extent(rle)
    if rle is None or extent is None:
        return np.zeros((0, 0), bool), (0, 0)
    x1, y1, x2, y2 = map(int, extent)
    size = y2 - y1, x2 - x1
    return decoded([moved_rle(rle, (-y1, -x1), size)], size)[0], (y1, x1)


def encoded(masks: Iterable[Bool[np.ndarray, "h w"]]) -> list[dict[str, Any]]:
    """Masks as compressed RLEs, {"size": [height, width], "counts": str}."""
    return [_as_text(coco_mask.encode(np.asfortranarray(mask, np.uint8))) for mask in masks]


def segmentation_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A COCO segmentation as a compressed RLE.

    Args:
        segmentation: polygons, an RLE or a compressed RLE. Its numbers are trusted, as pycocotools
            trusts them: what comes from a user's file has been through `data.repair`.
        size: (height, width) of the image.

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
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    return _as_text(segmentation)


def decompressed(counts: str) -> list[int] | None:
    """Run lengths of COCO's compressed text (maskApi.c, rleFrString); None if it is malformed.

    Each run is a signed number in groups of 5 bits, low bits first, one character per group (bit 5:
    more follow). From the fourth run on, it is the difference to the run two before.
    """
    codes = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # more than 35 bits
        return None
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends] & 16) != 0
    values = values - (negative.astype(np.int64) << (5 * (place[ends] + 1)))
    # Runs 1, 3, 5, ... and 2, 4, 6, ... are two chains of differences; run 0 stands alone.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    """`rle` with Python's int and str, for JSON."""
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
