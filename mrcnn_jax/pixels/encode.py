"""Pictures as files: written whole, or an error. The package writes images nowhere else."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8, UInt16

from mrcnn_jax.cli import Failure
from mrcnn_jax.output import write_file
from mrcnn_jax.pixels.depth import SATURATED


def encode_image(
    image: UInt8[np.ndarray, "h w 3"], suffix: str, *, quality: int | None = None
) -> bytes:
    """The bytes of an image file.

    Args:
        image: RGB.
        suffix: of the format: ".png", ".jpg".
        quality: of a JPEG, 1..100; by default OpenCV's.

    Raises:
        ValueError: the format cannot hold the image, such as a JPEG of 70,000 pixels' width.
    """
    options = [] if quality is None else [cv2.IMWRITE_JPEG_QUALITY, quality]
    try:
        done, encoded = cv2.imencode(suffix, image[..., ::-1], options)
    except cv2.error as error:
        raise ValueError(f"cannot be encoded: {error.err or error}") from None
    if not done:
        height, width = image.shape[:2]
        raise ValueError(f"{height} x {width} pixels cannot be encoded as {suffix}")
    return encoded.tobytes()


def write_image(
    path: Path, image: UInt8[np.ndarray, "h w 3"], *, quality: int | None = None
) -> None:
    """Writes an image file as a whole: `path` is the old file or the new one.

    Args:
        path: the file; its suffix says the format.
        image: RGB.
        quality: of a JPEG, 1..100; by default OpenCV's.

    Raises:
        OSError: it cannot be written; has the file's name.
        Failure: its format cannot hold the image.
    """
    try:
        encoded = encode_image(image, path.suffix, quality=quality)
    except ValueError as error:
        raise Failure(f"{path}: cannot be written: {error}") from None
    write_file(path, encoded)


def depth_millimetres(metres: Float[np.ndarray, "h w"]) -> UInt16[np.ndarray, "h w"]:
    """Depth as a 16-bit PNG holds it: 1..65534 mm, rounded; 0 where it is unknown or beyond."""
    rounded = np.rint(np.nan_to_num(metres.astype(np.float64), posinf=0.0, neginf=0.0) * 1000)
    return np.where((rounded >= 1) & (rounded < SATURATED), rounded, 0).astype(np.uint16)


def write_depth(path: Path, metres: Float[np.ndarray, "h w"]) -> int:
    """Writes depth as a 16-bit PNG in millimetres, whole or not at all.

    Args:
        path: the file.
        metres: what is not finite, not positive or over 65.534 m is unknown: 0.

    Returns:
        How many pixels are known, but beyond.

    Raises:
        OSError: it cannot be written; has the file's name.
    """
    millimetres = depth_millimetres(metres)
    done, encoded = cv2.imencode(".png", millimetres)
    assert done, metres.shape
    write_file(path, encoded.tobytes())
    return int(np.count_nonzero(np.isfinite(metres) & (metres > 1) & (millimetres == 0)))
