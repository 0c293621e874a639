"""Image files as pixels. The package decodes images nowhere else, so all its parts see the same."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from mrcnn_jax.pixels.samples import Samples, bits_of, deep_values, eight_bits, integers
from mrcnn_jax.pixels.tiff_tags import THREE_BANDS, holds_thumbnail, refusal, unknown

# Our own reports say what is wrong with a file.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")

# No others: some of Pillow's formats run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
# Of these formats: by them, all commands know the images of a folder.
# fmt: off
SUFFIXES = {
    ".apng", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff",
    ".webp",
}
# Of videos; OpenCV reads what FFmpeg knows, also under other names.
VIDEO_SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}
HEIF_SUFFIXES = {".avif", ".heic", ".heif", ".hif"}  # what phones write, and is not read
# fmt: on
# Replaced by data.max_pixels, which users can change; Pillow's limit begins with a warning.
Image.MAX_IMAGE_PIXELS = None

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
    pages: int | None = 1  # of a stack or animation, whose first is read; None: some are broken


def header_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
    """The size of a picture, from the file's header alone.

    Args:
        path: the file.
        upright: after the turn that its EXIF asks for.

    Returns:
        (height, width).

    Raises:
        ValueError: it is unreadable.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = image.height, image.width
            # Pillow gives a TIFF's size as seen.
            if not upright or isinstance(image, TiffImageFile):
                return size
            return size[::-1] if _orientation(image) in SWAPS else size
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError(f"not an image that can be read: {_line(error)}") from None


def is_camera_raw(path: Path) -> bool:
    """Whether a file is a camera's raw file, which holds a thumbnail that could be decoded."""
    try:
        with Image.open(path, formats=("TIFF",)) as image:
            return holds_thumbnail(image.tag_v2)  # type: ignore[attr-defined]
    except Exception:  # as of `header_size`
        return False


def suffix_of(path: Path) -> str:
    """A suffix for a picture by what it is, ".jpeg" for example; ValueError if it is unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            kind = str(image.format).lower()
    except Exception as error:  # as of `header_size`
        raise ValueError(f"not an image that can be read: {_line(error)}") from None
    return ".jp2" if kind == "jpeg2000" else f".{kind}"


def header_pages(path: Path) -> int | None:
    """The pages of a file, as in `Kind`; 1 if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _pages(image)
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        return 1


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
    """`decode_image` and `image_kind` in one; `least_bits`: `value_bits` of other parts."""
    image, kind = _decode(encoded, max_pixels, least_bits)
    pages = _pages(Image.open(io.BytesIO(encoded), formats=FORMATS))
    return _upright(image, kind, upright), replace(kind, pages=pages)


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
        raise ValueError(f"not an image that can be decoded: {_line(error)}") from None
    return np.asarray(rgb), Kind(image.height, image.width, 1, converted)


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
        image = Image.open(io.BytesIO(encoded), formats=LOSSLESS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.height} x {image.width} is over {max_pixels} pixels")
        if image.format == "PNG" and b"IEND" not in encoded:
            raise ValueError("cut off")
        _refuse_page(image)
        if (pages := _pages(image)) != 1:
            raise ValueError(f"{pages or 'several'} pages: a mask file has one (split it)")
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
        raise ValueError(f"not an image that can be decoded: {_line(error)}") from None
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
    with _told(encoded):
        image = Image.open(io.BytesIO(encoded), formats=("PNG",))
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.height} x {image.width} is over {max_pixels} pixels")
        if b"IEND" not in encoded:
            raise ValueError("cut off")
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
    colours, alpha = (
        (values[..., :1], values[..., 1:])
        if values.shape[2] == 2
        else (
            values[..., :3],
            values[..., 3:],
        )
    )
    if alpha.size and np.ptp(alpha) and not np.ptp(colours, axis=(0, 1)).any():
        raise ValueError("its shape is in the alpha channel alone: write it as grey values")
    if colours.shape[2] == 1:
        return colours[..., 0]
    codes = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
    return np.where(codes == 0, 0, codes | 1 << 24)


def value_bits(encoded: bytes, *, max_pixels: int) -> int:
    """The least of 8, 10, 12, 14 and 16 bits that holds the values of an image file, as far as the
    scale of its pixels depends on them; otherwise 8.

    Raises:
        ValueError: as of `decode_image`.
    """
    with _told(encoded):
        image, samples = _loaded(encoded, max_pixels)
        values = deep_values(image, samples, encoded)
        return 8 if values is None or samples.bits < 16 else bits_of(values, samples.nodata)


def _decode(encoded: bytes, max_pixels: int, least_bits: int = 8) -> tuple[Image.Image, Kind]:
    """The stored picture in RGB, and its kind but for the pages."""
    with _told(encoded):
        image, samples = _loaded(encoded, max_pixels)
        # Only now: in a PNG it may follow the pixels.
        turn = _orientation(image)
        rgb, converted = _rgb(image, replace(samples, least_bits=least_bits), encoded)
        return rgb, Kind(image.height, image.width, turn, converted)


def _orientation(image: Image.Image) -> int:
    """That of EXIF, 1..8; 1 without any, or where it is damaged: the pixels may be whole."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        return 1
    return int(found) if found in TURNS else 1


@contextlib.contextmanager
def _told(encoded: bytes) -> Iterator[None]:
    """Turns whatever decoding raises into a ValueError of one line."""
    try:
        yield
    except UnidentifiedImageError as error:
        what = _other_format(encoded) or _line(error)
        raise ValueError(f"not an image that can be decoded: {what}") from None
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError(f"not an image that can be decoded: {_line(error)}") from None


def _loaded(encoded: bytes, max_pixels: int) -> tuple[ImageFile.ImageFile, Samples]:
    """The stored picture as Pillow decodes it; any exception if it does not."""
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{image.height} x {image.width} is over {max_pixels} pixels (data.max_pixels)"
        )
    _refuse_page(image)
    samples = Samples.of(image)
    if samples.channels > 4:
        raise ValueError(f"{samples.channels} channels ({THREE_BANDS})")
    if image.format == "PNG" and b"IEND" not in encoded:
        raise ValueError("cut off")  # the decoders of the other formats notice
    if samples.planes and samples.bits == 16 and image.tile[0].codec_name == "raw":
        # Pillow itself would take the upper and lower bytes for pixels.
        order = "16B" if encoded[:2] == b"MM" else "16L"
        image.tile = [
            tile._replace(args=(f"{tile.args[0]};{order}", *tile.args[1:]))  # type: ignore[index]
            for tile in image.tile
        ]
    image.load()
    return image, samples


def _refuse_page(image: ImageFile.ImageFile) -> None:
    """ValueError for a TIFF whose pixels would be others than those of the picture."""
    if isinstance(image, TiffImageFile) and (why := refusal(image.tag_v2)) is not None:
        raise ValueError(why)


def _pages(image: Image.Image) -> int | None:
    """See `Kind`. The image may be at another page afterwards."""
    if image.format == "MPO":  # a phone's JPEG: what follows is made from the first
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        return None


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


def _other_format(encoded: bytes) -> str | None:
    """What a file is that Pillow does not read, as far as users are likely to have it."""
    brand = encoded[8:12] if encoded[4:8] == b"ftyp" else None
    if brand is not None and brand[:3] in (b"hei", b"hev", b"mif", b"msf", b"avi"):
        return "HEIC or AVIF (save it as JPEG or PNG)"
    matroska, avi = encoded.startswith(b"\x1aE\xdf\xa3"), encoded[8:12] == b"AVI "
    return "a video" if brand is not None or matroska or avi else unknown(encoded)


def _line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"  # Pillow's text holds a memory address
    return " ".join(str(error).split()) or type(error).__name__
