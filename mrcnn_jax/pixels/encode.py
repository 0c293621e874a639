"""Pictures as files: written whole, or an error. The package writes images nowhere else."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from mrcnn_jax.cli import Failure
from mrcnn_jax.output import whole_file


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
        Failure: it cannot be written; names the file.
    """
    try:
        encoded = encode_image(image, path.suffix, quality=quality)
        with whole_file(path) as part:
            part.write_bytes(encoded)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {error.strerror}") from None
    except ValueError as error:
        raise Failure(f"{path}: cannot be written: {error}") from None
