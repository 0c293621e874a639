"""Image files as pixels: the one place where the package decodes an image, so that no two parts of
it see different ones."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

# What Pillow thinks of a file is said by our own reports.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")

# No others: some of Pillow's formats run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
# data.max_pixels takes its place: it is the user's to change, and Pillow's is a warning first
Image.MAX_IMAGE_PIXELS = None

KINDS = {
    "1": "1-bit",
    "L": "grey",
    "LA": "grey with alpha (cut off)",
    "P": "palette",
    "RGBA": "RGBA (alpha cut off)",
    "RGBX": "RGB with a fourth channel (cut off)",
    "CMYK": "CMYK",
}
DEEP = "16-bit (scaled by 1/256)"
# How the stored picture is turned to be seen, by EXIF orientation (1: as stored).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS = (5, 6, 7, 8)  # orientations that exchange height and width


@dataclass(frozen=True)
class Kind:
    """What a decoded file is: its size as stored, its EXIF orientation (1..8), and how it differs
    from 8-bit RGB, or None."""

    height: int
    width: int
    orientation: int
    converted: str | None


def header_size(path: Path) -> tuple[int, int]:
    """(height, width) of the stored picture by the file's header alone; ValueError if it has none
    that can be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # of a broken file, Pillow raises what its parsers happen to meet
        raise ValueError(f"not an image that can be read: {_line(error)}") from None


def image_kind(encoded: bytes, *, max_pixels: int) -> Kind:
    """Decodes an image to see whether that is possible; ValueError as of `decode_image`."""
    return _decode(encoded, max_pixels)[1]


def decode_image(encoded: bytes, *, upright: bool, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels; grey becomes RGB, alpha is cut off, 16 bits are scaled to 8.

    Args:
        encoded: the file's bytes.
        upright: turned as the EXIF orientation says, as people see the picture; else as the pixels
            lie in the file. (In a TIFF the orientation is no matter of EXIF but of the format, and
            is always followed.)
        max_pixels: a larger picture is not decoded.

    Raises:
        ValueError: not an image, cut off, over `max_pixels`, or of values that are no colours (more
            than 4 channels, floats).
    """
    image, kind = _decode(encoded, max_pixels)
    if upright and kind.orientation in TURNS:
        image = image.transpose(TURNS[kind.orientation])
    return np.asarray(image)


def decode_labels(encoded: bytes, *, max_pixels: int) -> Int64[np.ndarray, "h w"]:
    """The values of an image whose pixels are numbers, not light: palette indices, grey values (8
    or 16 bits), 0x1RRGGBB of colours but 0 of black.

    ValueError: not an image, cut off, over `max_pixels`, of a lossy format, or of values that are
    no labels (floats, colours of more than 8 bits).
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=LOSSLESS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.height} x {image.width} is over {max_pixels} pixels")
        if image.format == "PNG" and b"IEND" not in encoded:
            raise ValueError("cut off")
        if image.mode in ("RGB", "RGBA") and ";16" in str(image.tile):
            raise ValueError("colours of 16 bits are no labels")
        values = np.asarray(image)
        if values.dtype.kind not in "biu":
            raise ValueError("its values are floats")
    except UnidentifiedImageError:
        raise ValueError(
            f"not an image that can hold labels: none of {', '.join(LOSSLESS)}"
        ) from None
    except Exception as error:  # of a broken file, Pillow raises what its parsers happen to meet
        raise ValueError(f"not an image that can be decoded: {_line(error)}") from None
    values = values.astype(np.int64)
    if values.ndim == 3 and values.shape[2] > 2:
        colours = values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]
        return np.where(colours == 0, 0, colours | 1 << 24)
    return values[..., 0] if values.ndim == 3 else values


def _decode(encoded: bytes, max_pixels: int) -> tuple[Image.Image, Kind]:
    """The stored picture in RGB."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{image.height} x {image.width} is over {max_pixels} pixels (data.max_pixels)"
            )
        channels = (
            image.tag_v2.get(ExifTags.Base.SamplesPerPixel, 1)
            if isinstance(image, TiffImageFile)
            else 0
        )
        if channels > 4:
            raise ValueError(f"{channels} channels")
        if image.format == "PNG" and b"IEND" not in encoded:
            raise ValueError("cut off")  # the other formats' decoders notice
        deep = ";16" in str(image.tile)
        mode = "RGBX" if channels == 4 and image.mode == "RGB" else image.mode
        image.load()
        # Only now, since a PNG's may come behind its pixels.
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        converted = (
            DEEP
            if deep or mode.startswith("I")
            else None
            if mode == "RGB"
            else KINDS.get(mode, f"of mode {mode}")
        )
        return _rgb(image), Kind(
            image.height, image.width, orientation if orientation in TURNS else 1, converted
        )
    except Exception as error:  # of a broken file, Pillow raises what its parsers happen to meet
        raise ValueError(f"not an image that can be decoded: {_line(error)}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its values are floats")
    if image.mode.startswith("I"):  # Pillow itself would clip these at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values have more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of what it finds odd on the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"  # instead of a memory address
    return " ".join(str(error).split()) or type(error).__name__
