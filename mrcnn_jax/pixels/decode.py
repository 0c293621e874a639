"""Image files as RGB pixels. Images are decoded nowhere else, so all parts see the same."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

from mrcnn_jax.pixels.headers import (
    FORMATS,
    TURNS,
    decoding,
    one_line,
    open_encoded,
    orientation,
    pages,
)
from mrcnn_jax.pixels.samples import Samples, bits_of, deep_values, eight_bits
from mrcnn_jax.pixels.tiff_tags import THREE_BANDS

KINDS = {
    "1": "1-bit",
    "L": "grey",
    "LA": "grey with alpha (cut off)",
    "La": "grey with alpha (cut off)",
    "P": "palette",
    "PA": "palette with alpha (cut off)",
    "RGBA": "RGBA (alpha cut off)",
    "RGBX": "RGB with a fourth channel (cut off)",
    "LX": "grey with a second channel (cut off)",
    "CMYK": "CMYK",
}
DEEP = "16-bit (scaled by 1/256)"


@dataclass(frozen=True)
class Kind:
    """The kind of a decoded file."""

    height: int  # as stored
    width: int
    orientation: int  # of EXIF, 1..8
    converted: str | None  # how it differs from 8-bit RGB
    pages: int | None = 1  # of a stack or animation, whose first is read; None: some are broken


def image_kind(encoded: bytes, *, max_pixels: int) -> Kind:
    """The kind of an image that was decoded to see whether that is possible.

    Args:
        encoded: the file's bytes.
        max_pixels: a larger picture is not decoded.

    Raises:
        ValueError: see `decode_image`.
    """
    return decode_with_kind(encoded, upright=False, max_pixels=max_pixels)[1]


def decode_image(encoded: bytes, *, upright: bool, max_pixels: int) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels; grey becomes RGB, alpha is dropped, more bits are scaled to 8.

    The values of a file of 16 bits are scaled by the least of 8, 10, 12, 14 and 16 bits that holds
    its largest, so that the 12 bits of a camera keep their contrast.

    Args:
        encoded: the file's bytes.
        upright: turn the stored pixels as EXIF says, to what people see. (In a TIFF the orientation
            belongs to the format instead of EXIF and is always followed.)
        max_pixels: a larger picture is not decoded.

    Raises:
        ValueError: the file is not an image, cut off, over `max_pixels`, or its values are not
            colours (more than 4 channels, floats).
    """
    return _upright(*_decode(encoded, max_pixels), upright)


def decode_with_kind(
    encoded: bytes, *, upright: bool, max_pixels: int, least_bits: int = 8
) -> tuple[UInt8[np.ndarray, "h w 3"], Kind]:
    """`decode_image` and `image_kind` in one.

    Args:
        least_bits: the least bit depth, from `value_bits` of the whole file where `encoded` is a
            window of it.
    """
    image, kind = _decode(encoded, max_pixels, least_bits)
    # Opened again: counting the pages moves on from the first.
    count = pages(Image.open(io.BytesIO(encoded), formats=FORMATS))
    return _upright(image, kind, upright), replace(kind, pages=count)


def _upright(image: Image.Image, kind: Kind, upright: bool) -> UInt8[np.ndarray, "h w 3"]:
    turn = TURNS.get(kind.orientation) if upright else None
    return np.asarray(image if turn is None else image.transpose(turn))


def pillow_pixels(image: Image.Image) -> tuple[UInt8[np.ndarray, "h w 3"], Kind]:
    """RGB pixels of an open image of Pillow, as it is: not turned, of the page that it is at.

    Raises:
        ValueError: it cannot be decoded, or its values are not colours.
    """
    try:
        bits = 16 if image.mode.startswith("I") else 8
        rgb, converted = _rgb(image.copy(), Samples(bits=bits), b"")
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError(f"not an image that can be decoded: {one_line(error)}") from None
    return np.asarray(rgb), Kind(image.height, image.width, 1, converted)


def value_bits(encoded: bytes, *, max_pixels: int) -> int:
    """The least of 8, 10, 12, 14 and 16 bits that holds the values of an image file, as far as the
    scale of its pixels depends on them; otherwise 8.

    Raises:
        ValueError: as of `decode_image`.
    """
    with decoding(encoded):
        image, samples = _loaded(encoded, max_pixels)
        values = deep_values(image, samples, encoded)
        return 8 if values is None or samples.bits < 16 else bits_of(values, samples.nodata)


def _decode(encoded: bytes, max_pixels: int, least_bits: int = 8) -> tuple[Image.Image, Kind]:
    """The stored picture in RGB, and its kind but for the pages."""
    with decoding(encoded):
        image, samples = _loaded(encoded, max_pixels)
        # Only now: in a PNG it may follow the pixels.
        turn = orientation(image)
        rgb, converted = _rgb(image, replace(samples, least_bits=least_bits), encoded)
        return rgb, Kind(image.height, image.width, turn, converted)


def _loaded(encoded: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, Samples]:
    """The stored picture as Pillow decodes it; any exception if it does not."""
    image = open_encoded(encoded, FORMATS, max_pixels, option=" (data.max_pixels)")
    samples = Samples.of(image)
    if samples.channels > 4:
        raise ValueError(f"{samples.channels} channels ({THREE_BANDS})")
    if samples.planes and samples.bits == 16 and image.tile[0].codec_name == "raw":
        # Pillow itself would take the upper and lower bytes for pixels.
        order = "16B" if encoded[:2] == b"MM" else "16L"
        image.tile = [
            tile._replace(args=(f"{tile.args[0]};{order}", *tile.args[1:]))  # type: ignore[index]
            for tile in image.tile
        ]
    image.load()
    return image, samples


def _rgb(image: Image.Image, samples: Samples, encoded: bytes) -> tuple[Image.Image, str | None]:
    """A loaded image as RGB, and how it differed from that."""
    mode = image.mode
    if mode == "F":
        raise ValueError("its values are floats (save it with 8 or 16 bits)")
    if samples.signed and samples.bits == 8 and np.asarray(image).max() > 127:
        raise ValueError("its values are negative")
    deep = deep_values(image, samples, encoded)
    if mode.startswith("I"):
        assert deep is not None
        eight, told = eight_bits(deep, samples)
        return Image.fromarray(eight).convert("RGB"), told
    more = {("RGB", 4): "RGBX", ("L", 2): "LX"}.get((mode, samples.channels), mode)
    parts = [] if more == "RGB" else [KINDS.get(more, f"of mode {mode}")]
    if "transparency" in image.info:
        parts = [f"{parts[0] if parts else 'RGB'} with transparency (cut off)"]
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about odd files
    if samples.bits > 8:
        told = DEEP
        if deep is not None:
            eight, told = eight_bits(deep, samples)
            image = Image.fromarray(eight)
        parts.insert(0, told)
    if mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB"), ", ".join(parts) or None
