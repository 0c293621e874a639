"""Detection in an image that is too large to be seen in one piece: tile by tile, then merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.inference.merging import TileDetection, detections, in_image, merge
from mrcnn_jax.inference.results import Detections, TileCounts
from mrcnn_jax.inference.windowed_images import WindowedImage
from mrcnn_jax.pixels.tiff_windows import MOST
from mrcnn_jax.pixels.windows import Window, check_tiles, windows

Detect: TypeAlias = Callable[[Sequence[UInt8[np.ndarray, "h w 3"]]], Sequence[Detections]]
"""The detections in each of some images, with masks as RLEs."""


@dataclass(frozen=True)
class Tiling:
    """How an image is looked at.

    Raises:
        ConfigError: (a ValueError) there are no such tiles.
    """

    tile: int
    """Side of a tile in pixels of the image."""
    overlap: int
    """Pixels that neighbouring tiles share at least: objects up to this size are seen whole."""

    def __post_init__(self) -> None:
        check_tiles(self.tile, self.overlap)

    @staticmethod
    def of(tile: int, overlap: int | None) -> Tiling:
        """By default an eighth of a tile is shared."""
        check_tiles(tile, 0)
        return Tiling(tile, tile // 8 if overlap is None else overlap)


def detect_in_tiles(
    image: WindowedImage,
    tiling: Tiling,
    detect: Detect,
    categories: Sequence[tuple[int, str]],
    *,
    batch: int,
    limit: int,
    min_score: float = 0.0,
    progress: bool = False,
) -> Detections:
    """Detect the objects in the tiles of an image, and merge them as `inference.merging` says.

    In memory are the tiles of a batch, and of each detection its box and run lengths.

    Args:
        image: the image.
        tiling: its tiles.
        detect: finds the objects in up to `batch` tiles.
        categories: (COCO id, name) of label 1, 2, ..., K.
        batch: tiles that `detect` is given at once.
        limit: the most objects that it finds in one.
        min_score: merged detections below it are left out.
        progress: show a progress bar.

    Raises:
        ConfigError: a tile cannot be read, or the image has too many pixels for run lengths.
    """
    height, width = image.size
    if height * width >= MOST:
        raise ConfigError(f"image: {height} x {width}: COCO's masks have fewer than {MOST} pixels")
    places = windows(image.size, tiling.tile, tiling.overlap)
    found: list[TileDetection] = []
    full: list[float] = []
    masks, mask_scores, depths = True, False, False
    each = _each(image, places, detect, batch)
    bar = tqdm(
        each, total=len(places), unit="tile", leave=False, disable=None if progress else True
    )
    for number, seen in enumerate(bar):
        if len(seen.scores) >= limit:
            full.append(float(seen.scores.min()))
        found += in_image(seen, number, places[number], image.size)
        of_tile = seen.masks, seen.mask_scores, seen.depths
        masks, mask_scores, depths = (field is not None for field in of_tile)
    merged = merge(found, places, image.size)
    counts = TileCounts(len(places), merged.joined, merged.repeated, merged.cut, tuple(full))
    result = detections(
        merged.objects,
        image.size,
        categories,
        masks=masks,
        mask_scores=mask_scores,
        depths=depths,
        min_score=min_score,
    )
    return replace(result, tiles=counts)


def _each(
    image: WindowedImage, places: Sequence[Window], detect: Detect, batch: int
) -> Iterator[Detections]:
    for first in range(0, len(places), batch):
        yield from detect([image.read(place) for place in places[first : first + batch]])


def tiles_line(tiling: Tiling, counts: Sequence[TileCounts]) -> str:
    """For people: how the detections in tiles were merged."""
    joined, repeated, cut = (
        sum(getattr(each, name) for each in counts) for name in ("joined", "repeated", "cut")
    )
    return (
        f"{sum(each.tiles for each in counts)} tiles of {tiling.tile} x {tiling.tile} pixels, "
        f"overlap {tiling.overlap}: {joined} objects joined from pieces, {repeated} detections of "
        f"objects seen in another tile left out, {cut} cut objects without another piece kept"
    )
