"""Fits canvases to shapes of images, anchors to sizes of objects, and repetitions to classes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.pixels.transforms import plan_for

MULTIPLE = 32
SAVED = 0.1  # of all pixels: a further canvas, which is another program to compile, must save it
REACH = 1.5  # an anchor is for objects up to this much smaller or larger
RARE = 0.1  # of the images with the most frequent class: classes with fewer are repeated

Canvas = tuple[int, int]


def choose_canvases(
    sizes: Sequence[tuple[int, int]], short_side: int, long_side: int
) -> tuple[Canvas, ...]:
    """Chooses one to three canvases.

    Of all sets of one, two and three, those with the fewest pixels over all images, padding
    included, are compared: three are taken if they save a tenth against two, else two if they save
    a tenth against one.

    Args:
        sizes: (height, width) of the images after resizing; the short side at most `short_side`,
            the long side at most `long_side`.
        short_side, long_side: an image of these sides must fit, upright or on its side.

    Returns:
        (height, width) of each, multiples of 32.
    """
    cells, counts = np.unique(_rounded(np.array(sizes)), axis=0, return_counts=True)
    short, long = _rounded(np.array([short_side, long_side])).tolist()
    # A canvas that is as small as what it is for has a height and a width that images have.
    grid = np.meshgrid(np.unique(cells[:, 0]), np.unique(cells[:, 1]))
    candidates = np.stack(grid, axis=-1).reshape(-1, 2)
    costs = _costs(candidates, cells)

    def best(given: tuple[Canvas, ...], more: int) -> tuple[float, tuple[Canvas, ...]]:
        """(pixels, canvases) of the best set of `given` and `more` candidates."""
        cost = _costs(np.array(given), cells).min(0)
        firsts = range(len(candidates)) if more == 2 else [None]
        found = []
        for first in firsts:
            so_far = cost if first is None else np.minimum(cost, costs[first])
            totals = np.minimum(so_far, costs) @ counts if more else np.array([so_far @ counts])
            last = int(totals.argmin())
            added = [] if first is None else [candidates[first]]
            added += [candidates[last]] if more else []
            found.append((float(totals[last]), (*given, *((int(h), int(w)) for h, w in added))))
        return min(found)

    square, turned = ((long, long),), ((short, long), (long, short))
    one, two, three = best(square, 0), best(square, 1), best(square, 2)
    if short < long:  # every set holds both of `turned`, or the square
        two, three = min(two, best(turned, 0)), min(three, best(turned, 1))
    chosen = three
    for smaller in (two, one):
        if chosen[0] > (1 - SAVED) * smaller[0]:
            chosen = smaller
    return tuple(sorted(set(chosen[1])))


def _rounded(sides: np.ndarray) -> np.ndarray:
    """Sides rounded up to whole multiples."""
    return -(-sides // MULTIPLE) * MULTIPLE


def _costs(canvases: np.ndarray, cells: np.ndarray) -> Float[np.ndarray, "canvases cells"]:
    """The pixels of a canvas where it holds a size; else infinity."""
    holds = (canvases[:, None] >= cells).all(-1)
    return np.where(holds, canvases.prod(-1)[:, None], np.inf)


def object_sides(dataset: CocoDataset, data: DataConfig) -> Float[np.ndarray, " n"]:
    """The square root of each object's box area on the canvas, in pixels."""
    sides = []
    for image in dataset.images:
        y, x = plan_for(image.height, image.width, data).scale
        for record in image.objects:
            x1, y1, x2, y2 = record.box
            sides.append(math.sqrt((x2 - x1) * (y2 - y1) * x * y))
    return np.array(sides)


def choose_scales(sides: Float[np.ndarray, " n"], usual: int) -> tuple[int, ...]:
    """Chooses the anchors of the five levels.

    Args:
        sides: of the objects, in canvas pixels.
        usual: the smallest scale if it covers them.

    Returns:
        Powers of two, each twice the one before: the nearest to the usual ones that cover the 5th
        to the 95th percentile of the sides, up to a factor of `REACH`. Where none do, the usual
        ones if they miss by less than a factor of two, else those that miss the least.
    """
    low, high = np.log2(np.quantile(sides, (0.05, 0.95)))

    def missed(smallest: int) -> tuple[float, float]:
        below = max(0.0, math.log2(smallest / REACH) - low)
        above = max(0.0, high - math.log2(16 * smallest * REACH))
        return below + above, abs(math.log2(smallest / usual))

    smallest = min((4, 8, 16, 32, 64, usual), key=missed)
    if missed(smallest)[0] > 0 and missed(usual)[0] < 1:
        smallest = usual
    return tuple(smallest * 2**level for level in range(5))


def choose_repeats(dataset: CocoDataset) -> tuple[float, int]:
    """The threshold of `repeat_factors`, 0 if no class is rare, and how many classes are.

    Args:
        dataset: with one object at least.
    """
    labels = [image.labels for image in dataset.images]
    images_with = Counter(label for found in labels for label in found)
    wanted = RARE * max(images_with.values())
    rare = sum(count < wanted for count in images_with.values())
    return (wanted / len(labels) if rare else 0.0), rare
