"""Image files as pixels. The package decodes images nowhere else, so all its parts see the same."""

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

# Our own reports say what is wrong with a file.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")

# No others: some of Pillow's formats run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
# Replaced by data.max_pixels, which users can change; Pillow's limit begins with a warning.
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
# By EXIF orientation: the turn from the stored to the upright picture (1: none).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS = (5, 6, 7, 8)  # orientations that swap height and width


@dataclass(frozen=True)
class Kind:
    """The kind of a decoded file."""

    height: int  # as stored
    width: int
    orientation: int  # of EXIF, 1..8
    converted: str | None  # how it differs from 8-bit RGB


def header_size(path: Path) -> tuple[int, int]:
    """(height, width) of the stored picture, from the file's header alone; ValueError if that
    cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError(f"not an image that can be read: {_line(error)}") from None


def image_kind(encoded: bytes, *, max_pixels: int) -> Kind:
    """The kind of an image that was decoded to see whether that is possible.

    Args:
        encoded: the file's bytes.
        max_pixels: a larger picture is not decoded.

    Raises:
        ValueError: see `decode_image`.
    """
    return _decode(encoded, max_pixels)[1]


def decode_image(encoded: bytes, *, upright: bool, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels; grey becomes RGB, alpha is dropped, 16 bits are scaled to 8.

    Args:
        encoded: the file's bytes.
        upright: turn the stored pixels as EXIF says, to what people see. (In a TIFF the orientation
            belongs to the format instead of EXIF and is always followed.)
        max_pixels: a larger picture is not decoded.

    Raises:
        ValueError: the file is not an image, cut off, over `max_pixels`, or its values are not
            colours (more than 4 channels, floats).
    """
    image, kind = _decode(encoded, max_pixels)
    if upright and kind.orientation in TURNS:
        image = image.transpose(TURNS[kind.orientation])
    return np.asarray(image)


def decode_labels(encoded: bytes, *, max_pixels: int) -> Int64[np.ndarray, "h w"]:
    """The values of an image whose pixels are labels.

    Args:
        encoded: the file's bytes.
        max_pixels: a larger picture is not decoded.

    Returns:
        Palette indices, grey values (8 or 16 bits), or 0x1RRGGBB for colours and 0 for black.

    Raises:
        ValueError: the file is not an image, cut off, over `max_pixels`, of a lossy format, or its
            values are not labels (floats, colours of more than 8 bits).
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=LOSSLESS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.height} x {image.width} is over {max_pixels} pixels")
        if image.format == "PNG" and b"IEND" not in encoded:
            raise ValueError("cut off")
        if image.mode in ("RGB", "RGBA") and ";16" in str(image.tile):
            raise ValueError("16-bit colours are not labels")
        values = np.asarray(image)
        if values.dtype.kind not in "biu":
            raise ValueError("its values are floats")
    except UnidentifiedImageError:
        raise ValueError(
            f"not an image that can hold labels: none of {', '.join(LOSSLESS)}"
        ) from None
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
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
        channels = 0
        if isinstance(image, TiffImageFile):
            channels = image.tag_v2.get(ExifTags.Base.SamplesPerPixel, 1)
        if channels > 4:
            raise ValueError(f"{channels} channels")
        if image.format == "PNG" and b"IEND" not in encoded:
            raise ValueError("cut off")  # the decoders of the other formats notice
        deep = ";16" in str(image.tile)
        mode = "RGBX" if channels == 4 and image.mode == "RGB" else image.mode
        image.load()
        # Only now: in a PNG it may follow the pixels.
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        converted = None if mode == "RGB" else KINDS.get(mode, f"of mode {mode}")
        if deep or mode.startswith("I"):
            converted = DEEP
        turn = orientation if orientation in TURNS else 1
        return _rgb(image), Kind(image.height, image.width, turn, converted)
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
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
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about odd files
    return image if image.mode == "RGB" else image.convert("RGB")


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"  # Pillow's text holds a memory address
    return " ".join(str(error).split()) or type(error).__name__
