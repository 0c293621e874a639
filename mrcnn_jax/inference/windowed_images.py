"""Images of which windows are read: in memory, or in a file that may be larger than memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.images import report_kind
from mrcnn_jax.data.report import Report
from mrcnn_jax.inference.inputs import AT_ONCE, read_image
from mrcnn_jax.pixels.headers import header_size
from mrcnn_jax.pixels.tiff_windows import TiffWindows, not_by_windows, open_windows
from mrcnn_jax.pixels.transforms import resize_image
from mrcnn_jax.pixels.windows import Window


class WindowedImage(Protocol):
    """An image of which windows are read."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""

    def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
        """The RGB pixels of a window inside the image.

        Raises:
            ConfigError: they cannot be decoded.
        """


@dataclass(frozen=True)
class ArrayImage:
    """An image in memory."""

    image: UInt8[np.ndarray, "h w 3"]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.image.shape[:2]
        return height, width

    def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
        return self.image[window.y1 : window.y2, window.x1 : window.x2]


@dataclass(frozen=True)
class TiffImage:
    """An image in a TIFF, read window by window."""

    path: Path
    windows: TiffWindows

    @property
    def size(self) -> tuple[int, int]:
        return self.windows.size

    def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
        try:
            return self.windows.read(window)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: {error}") from None


class ImageWithOverview:
    """An image that keeps an overview, a smaller copy, of what is read of it."""

    def __init__(self, image: WindowedImage, longest: int) -> None:
        """`longest`: limit of the overview's sides in pixels."""
        self._image = image
        self.step = -(-max(image.size) // longest)
        """Pixels of the image on a pixel of the overview, each way."""
        height, width = (-(-side // self.step) for side in image.size)
        self.overview = np.zeros((height, width, 3), np.uint8)

    @property
    def size(self) -> tuple[int, int]:
        return self._image.size

    def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
        pixels = self._image.read(window)
        # Squares of step x step pixels; one that begins in a window before has its part of that.
        y, x = (-(-start // self.step) for start in (window.y1, window.x1))
        part = pixels[y * self.step - window.y1 :, x * self.step - window.x1 :]
        if 0 in part.shape:
            return pixels
        height, width = (-(-side // self.step) for side in part.shape[:2])
        lacking = height * self.step - part.shape[0], width * self.step - part.shape[1]
        part = np.pad(part, ((0, lacking[0]), (0, lacking[1]), (0, 0)), "edge")
        self.overview[y : y + height, x : x + width] = resize_image(part, (height, width), "area")
        return pixels


def open_windowed(path: Path, data: DataConfig, report: Report) -> WindowedImage:
    """Open an image file to read windows of it.

    A TIFF is read by windows, of any size, unless its way of storing pixels is one that only
    decoding it as a whole reads (`pixels.tiff_windows`). It and other formats are then decoded.

    Args:
        path: the file.
        data: the limits of the run, of which AT_ONCE replaces `max_pixels`.
        report: counts how the pixels differ from those of the file.

    Raises:
        ConfigError: it cannot be read or decoded, or more than AT_ONCE pixels would have to be
            decoded at once.
    """
    refuse_pipe(path)
    try:
        windows = open_windows(path, max_pixels=AT_ONCE)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if windows is not None:
        report_kind(report, path.name, windows.kind)
        return TiffImage(path, windows)
    try:
        height, width = header_size(path)
    except ValueError:
        height, width = 0, 0  # decoding it will say more
    if height * width > AT_ONCE:
        raise ConfigError(
            f"{path}: {height} x {width} is over {AT_ONCE} pixels, and is {not_by_windows(path)}"
        )
    return ArrayImage(read_image(path, limits(data), report))


def limits(data: DataConfig) -> DataConfig:
    """The limits of a run for images that are looked at in tiles."""
    return replace(data, max_pixels=AT_ONCE)
