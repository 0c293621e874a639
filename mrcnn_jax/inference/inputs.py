"""Images to predict on, from files, folders and videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.pixels.decode import decode_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def image_files(paths: Sequence[Path]) -> list[Path]:
    """List the given files, and the images directly in the given folders.

    Raises:
        ConfigError: a path does not exist, a folder has no images, or nothing was given.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise ConfigError(f"{path}: no images in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    if not files:
        raise ConfigError("paths: no image or folder was named")
    return files


def read_image(path: Path, data: DataConfig) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as RGB, upright as its EXIF says.

    Raises:
        ConfigError: the file cannot be read or decoded, or has more than data.max_pixels.
    """
    try:
        return decode_image(path.read_bytes(), upright=True, max_pixels=data.max_pixels)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def video_frames(path: str | Path) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Iterate over the frames of a video, RGB.

    Raises:
        ConfigError: at once, if OpenCV cannot read the file.
    """
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        exists = Path(path).is_file()
        reason = "not a video that OpenCV can read" if exists else "no such file"
        raise ConfigError(f"{path}: {reason}")
    return _frames(capture)


def _frames(capture: cv2.VideoCapture) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    try:
        while True:
            read, frame = capture.read()
            if not read:
                return
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        capture.release()
