"""Windows of one size that cover an image."""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np

from mrcnn_jax.config.errors import ConfigError

LEAST = 32  # pixels: a smaller tile is one of an object, not of a scene


class Window(NamedTuple):
    """A part of an image, in whole pixels; it has the first row and column, not the last ones."""

    y1: int
    x1: int
    y2: int
    x2: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.y2 - self.y1, self.x2 - self.x1

    def common(self, other: Window) -> Window:
        """What lies in both; empty if a side is not positive."""
        low, high = np.maximum(self[:2], other[:2]), np.minimum(self[2:], other[2:])
        return Window(*low.tolist(), *high.tolist())


def check_tiles(tile: int, overlap: int) -> None:
    """ConfigError, one line, unless windows of `tile` pixels' side can share `overlap` pixels."""
    for name, pixels in (("tile", tile), ("overlap", overlap)):
        try:
            operator.index(pixels)
        except TypeError:
            raise ConfigError(f"{name}: {pixels!r}: must be a whole number of pixels") from None
    if tile < LEAST:
        raise ConfigError(f"tile: {tile}: at least {LEAST} pixels are needed")
    if not 0 <= overlap < tile:
        raise ConfigError(f"overlap: {overlap}: must be in 0..{tile - 1}, less than a tile")


def windows(size: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """The windows that cover an image, row by row.

    All have the same size: that of a tile, or the image's side where that is less. The last of a
    row or column is shifted inwards, so it shares more than `overlap` with the one before.

    Args:
        size: (height, width) of the image.
        tile: side of a window in pixels.
        overlap: the least number of pixels that neighbours share, in 0..tile - 1.
    """
    rows, columns = (_starts(side, tile, overlap) for side in size)
    height, width = (min(side, tile) for side in size)
    return [Window(y, x, y + height, x + width) for y in rows for x in columns]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]
