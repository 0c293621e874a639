"""Image files whose pixels are labels or masks instead of colours."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError

from mrcnn_jax.pixels.headers import decoding, one_line, open_encoded, pages
from mrcnn_jax.pixels.samples import Samples, integers

LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")


def decode_labels(encoded: bytes, *, max_pixels: int) -> Int64[np.ndarray, "h w"]:
    """The values of an image whose pixels are labels.

    Args:
        encoded: the file's bytes.
        max_pixels: a larger picture is not decoded.

    Returns:
        Palette indices, grey values (8 to 32 bits), or 0x1RRGGBB for colours and 0 for black.

    Raises:
        ValueError: the file is not an image, cut off, over `max_pixels`, of a lossy format or of
            several pages, or its values are not labels (floats, negative, colours of more than 8
            bits, alpha alone, a palette whose black is not the first).
    """
    try:
        image = open_encoded(encoded, LOSSLESS, max_pixels)
        if (count := pages(image)) != 1:
            raise ValueError(f"{count or 'several'} pages: a mask file has one (split it)")
        samples = Samples.of(image)
        if image.mode in ("RGB", "RGBA") and samples.bits > 8:
            raise ValueError("16-bit colours are not labels")
        # Decoded again: counting the pages moved on from the first.
        image = Image.open(io.BytesIO(encoded), formats=LOSSLESS)
        values = integers(image, samples, encoded) if image.mode == "I" else np.asarray(image)
        if samples.white_is_zero and image.mode == "L":
            values = 255 - values  # as stored: Pillow inverts them for the eye
        if values.dtype.kind not in "biu":
            raise ValueError("its values are floats")
        if image.mode == "P":
            _refuse_palette(image, values)
        values = _one_label(values.astype(np.int64))
        if samples.signed and (values > 127 if samples.bits == 8 else values < 0).any():
            raise ValueError("its values are negative")
    except UnidentifiedImageError:
        raise ValueError(
            f"not an image that can hold labels: none of {', '.join(LOSSLESS)}"
        ) from None
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError(f"not an image that can be decoded: {one_line(error)}") from None
    return values


def opacity(encoded: bytes, *, max_pixels: int) -> UInt8[np.ndarray, "h w"]:
    """How opaque the pixels of a PNG are that holds a mask.

    Args:
        encoded: the file's bytes.
        max_pixels: a larger picture is not decoded.

    Returns:
        Its alpha, 0 to 255, also that of a palette; without any, the largest of its colours.

    Raises:
        ValueError: the file is no PNG, cut off, or over `max_pixels`.
    """
    with decoding(encoded):
        image = open_encoded(encoded, ("PNG",), max_pixels)
        image.load()
        if "A" in image.getbands() or "transparency" in image.info:
            return np.asarray(image.convert("RGBA"))[..., 3]
        return np.asarray(image.convert("RGB")).max(axis=2)


def _refuse_palette(image: Image.Image, values: np.ndarray) -> None:
    """ValueError if black, the background, has another index than 0 (after a change of colours)."""
    colours = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
    used = [index for index in np.unique(values).tolist() if index < len(colours)]
    black = [index for index in used if not colours[index].any()]
    if colours[0].any() and black:
        raise ValueError(
            f"black has index {black[0]} in its palette, but background is 0: save it as grey"
        )


def _one_label(values: Int64[np.ndarray, "h w *c"]) -> Int64[np.ndarray, "h w"]:
    """One number for each pixel; alpha is left out."""
    if values.ndim == 2:
        return values
    count = 1 if values.shape[2] == 2 else 3
    colours, alpha = values[..., :count], values[..., count:]
    if alpha.size and np.ptp(alpha) and not np.ptp(colours, axis=(0, 1)).any():
        raise ValueError("its shape is in the alpha channel alone: write it as grey values")
    if count == 1:
        return colours[..., 0]
    codes = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
    return np.where(codes == 0, 0, codes | 1 << 24)
