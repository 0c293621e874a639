"""Predicted depth beside the true one: maps in colours with a scale in metres, and distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.ticker import MaxNLocator
from pycocotools import mask as coco_mask

from mrcnn_jax.evaluation.average_precision import mask_score
from mrcnn_jax.evaluation.depth_errors import depth_figures, known, object_depth
from mrcnn_jax.figures.draw import (
    FONT,
    INK,
    MARGIN,
    Color,
    Image,
    class_label,
    distance_label,
    draw_instances,
    resized,
)
from mrcnn_jax.figures.png_pages import drawn_size, row_of_columns, write_pages
from mrcnn_jax.pixels.rle import segmentation_rle

# Lighter is nearer, also without colours. Of errors, blue is too near, white right, red too far.
DEPTHS, ERRORS = "viridis_r", "RdBu_r"
UNKNOWN: tuple[Color, Color] = (112, 112, 112), (144, 144, 144)  # in stripes
STRIPE = 4  # pixels
BAR_HEIGHT, TICK_SCALE = 14, 0.42
MIN_SCORE = 0.5  # results below it are not drawn


@dataclass(frozen=True)
class DepthExample:
    """An image with its depth."""

    title: str
    image: Image
    true: Float[np.ndarray, "h w"]
    """Metres of the image's pixels; 0 is unknown."""
    predicted: Float[np.ndarray, "h w"]
    """Metres of the image's pixels; NaN is unknown."""
    objects: Sequence[Mapping[str, Any]]
    """COCO annotations."""
    found: Sequence[Mapping[str, Any]]
    """COCO results; `depth` is their distance in metres."""


def depth_figure(
    examples: Sequence[DepthExample],
    class_names: Mapping[int, str],
    out_dir: Path,
) -> list[Path]:
    """Draw two lines for each image: its depth, true, predicted and their error; then its objects.

    True and predicted depth share one scale, from the first to the last percentile of the true
    depth; what is beyond has the colours of its ends. Labels have the distance of each object: the
    median of the true depth under its mask, or that of the result.

    Args:
        examples: the images; results with a score of MIN_SCORE or more are drawn.
        class_names: category id -> name.
        out_dir: folder of the pages, created if need be.

    Returns:
        The pages, `depth_1.png`, `depth_2.png`, ...
    """
    drawn = [_drawn(example, class_names) for example in examples]
    colors = {"depth unknown": UNKNOWN[0]}
    return write_pages(drawn, out_dir, "depth", rows=2, colors=colors)


def depth_colours(
    metres: Float[np.ndarray, "h w"], limits: tuple[float, float]
) -> UInt8[np.ndarray, "h w 3"]:
    """Depth as colours, the lighter the nearer.

    Args:
        metres: of each pixel; what is not finite or not positive is unknown: striped grey.
        limits: nearest and farthest metres of the scale; beyond it are the colours of its ends.

    Returns:
        RGB.
    """
    return _coloured(metres, known(metres), limits, DEPTHS)


def depth_limits(metres: Float[np.ndarray, "*n"]) -> tuple[float, float]:
    """The first and the last percentile of the known depths: stray pixels set no scale."""
    values = metres[known(metres)]
    if not values.size:
        return 0.0, 1.0
    near, far = np.quantile(values.astype(np.float64), (0.01, 0.99)).tolist()
    return near, max(far, near + 0.01)


def scale_bar(limits: tuple[float, float], width: int, name: str = DEPTHS) -> Image:
    """A scale's colours from its first to its last value, with round values in metres below."""
    low, high = limits
    bar = np.full((BAR_HEIGHT + 24, width, 3), 255, np.uint8)
    values = np.linspace(low, high, width)[None]
    bar[:BAR_HEIGHT] = _coloured(values, np.ones_like(values, bool), limits, name)
    step = np.diff(MaxNLocator(nbins=max(width // 75, 1)).tick_values(low, high))[0]
    right = -1
    for tick in step * np.arange(np.ceil(low / step), np.floor(high / step) + 1):
        text = f"{tick:.6g} m"
        length, x = cv2.getTextSize(text, FONT, TICK_SCALE, 1)[0][0], (tick - low) / (high - low)
        left = round(min(max(x * (width - 1) - length / 2, 0), width - length))
        if left <= right:
            continue
        place = round(x * (width - 1))
        cv2.line(bar, (place, BAR_HEIGHT), (place, BAR_HEIGHT + 4), INK, 1)
        at = left, BAR_HEIGHT + 18
        cv2.putText(bar, text, at, FONT, TICK_SCALE, INK, 1, cv2.LINE_AA)
        right = left + length + 4
    return bar


def _drawn(example: DepthExample, class_names: Mapping[int, str]) -> Image:
    maps = _maps(example)
    found = [result for result in example.found if mask_score(result) >= MIN_SCORE]
    shown = {
        f"ground truth ({len(example.objects)}), true distance": (
            example.objects,
            [_true_depth(example, annotation) for annotation in example.objects],
        ),
        f"found, score >= {MIN_SCORE:g} ({len(found)}), predicted distance": (
            found,
            [result.get("depth") for result in found],
        ),
    }
    size = drawn_size(example.image, 2)
    cells = []
    for objects, depths in shown.values():
        labels = [
            class_label(one, class_names) + distance_label(depth)
            for one, depth in zip(objects, depths, strict=True)
        ]
        cells.append(draw_instances(example.image, objects, class_names, size, labels, min_score=0))
    return np.concatenate([maps, row_of_columns(cells, list(shown), 2)])


def _maps(example: DepthExample) -> Image:
    """The image, its depth, the predicted one and the error, above their scales."""
    true, predicted = example.true, example.predicted
    size = drawn_size(example.image, 4)
    limits = depth_limits(true if known(true).any() else predicted)
    both = known(true) & known(predicted)
    error = np.where(both, predicted - true, np.nan)
    reach = max(float(np.quantile(np.abs(error[both]), 0.98)) if both.any() else 0.0, 0.001)
    drawn_error = _enlarged(error, size)
    figures = depth_figures(predicted, true)
    quality = f": AbsRel {figures['AbsRel']:.3f}" if figures else ""
    cells = {
        example.title: resized(example.image, size),
        "true depth": depth_colours(_enlarged(true, size), limits),
        f"predicted depth{quality}": depth_colours(_enlarged(predicted, size), limits),
        "error: blue is too near, red too far": _coloured(
            drawn_error, np.isfinite(drawn_error), (-reach, reach), ERRORS
        ),
    }
    row = row_of_columns(list(cells.values()), list(cells), 4)
    column = row.shape[1] // 4
    # The maps of depth share a scale, from the left of the first to the right of the second.
    bars = {1: scale_bar(limits, column + size[1]), 3: scale_bar((-reach, reach), size[1], ERRORS)}
    line = np.full((len(bars[1]), row.shape[1], 3), 255, np.uint8)
    for number, bar in bars.items():
        left = number * column + MARGIN
        line[:, left : left + bar.shape[1]] = bar
    return np.concatenate([row, line])


def _true_depth(example: DepthExample, annotation: Mapping[str, Any]) -> float | None:
    if not annotation.get("segmentation"):
        return None
    rle = segmentation_rle(annotation["segmentation"], example.image.shape[:2])
    return object_depth(example.true, np.asarray(coco_mask.decode(rle), bool))


def _enlarged(metres: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Another size; no depth is made up between two, as interpolation would."""
    return cv2.resize(metres.astype(np.float32), size[::-1], interpolation=cv2.INTER_NEAREST)


def _coloured(
    values: Float[np.ndarray, "h w"],
    shown: np.ndarray,
    limits: tuple[float, float],
    name: str,
) -> UInt8[np.ndarray, "h w 3"]:
    """Values as colours of a scale; striped grey where they are not shown."""
    table = np.round(255 * matplotlib.colormaps[name](np.arange(256))[:, :3]).astype(np.uint8)
    low, high = limits
    share = np.clip((np.where(shown, values, low) - low) / (high - low), 0, 1)
    y, x = np.mgrid[0 : shown.shape[0], 0 : shown.shape[1]]
    stripes = np.array(UNKNOWN, np.uint8)[(x + y) // STRIPE % 2]
    return np.where(shown[..., None], table[np.rint(255 * share).astype(int)], stripes)
