"""The pictures that `predict` looks at: each as a whole, or in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.report import Report
from mrcnn_jax.inference.api import Model
from mrcnn_jax.inference.inputs import read_pictures
from mrcnn_jax.inference.tiles import Tiling
from mrcnn_jax.inference.windowed_images import ArrayImage, ImageWithOverview, open_windowed
from mrcnn_jax.pixels.headers import VIDEO_SUFFIXES

LONGEST_SIDE = 4096  # pixels of an overlay of tiles


def pictures(
    file: Path,
    tiling: Tiling | None,
    data: DataConfig,
    report: Report,
    tell: Callable[[str], object],
) -> Iterator[tuple[int | None, Any]]:
    """The pictures of a file, for tiles as windowed images; see `read_pictures`."""
    if tiling is None:
        return read_pictures(file, data, report, tell, tiles="--tile 1024")
    if file.suffix.lower() not in VIDEO_SUFFIXES:
        return iter([(None, open_windowed(file, data, report))])
    frames = read_pictures(file, data, report, tell)
    return ((frame, ArrayImage(image)) for frame, image in frames)


def see(model: Model, picture: Any, tiling: Tiling | None) -> tuple[Any, Any, int]:
    """Detect the objects in one of `pictures`.

    Returns:
        The detections, an image to draw them into, and by what factor it is smaller.
    """
    if tiling is None:
        return model.predict(picture, rle=True), picture, 1
    image = ImageWithOverview(picture, LONGEST_SIDE)
    seen = model.predict_in_tiles(image, tiling, progress=True)
    return seen, image.overview, image.step
