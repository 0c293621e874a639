"""What an image file is, by its suffix and its header: no pixel is decoded here."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from mrcnn_jax.pixels.tiff_tags import holds_thumbnail, refusal, unknown

# Our own reports say what is wrong with a file.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")
# Replaced by data.max_pixels, which users can change; Pillow's limit begins with a warning.
Image.MAX_IMAGE_PIXELS = None

# No others: some of Pillow's formats run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")
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


# -- files -----------------------------------------------------------------------------------------


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
    with _header(path) as image:
        size = image.height, image.width
        # Pillow gives a TIFF's size as seen.
        if not upright or isinstance(image, TiffImageFile):
            return size
        return size[::-1] if orientation(image) in SWAPS else size


def suffix_of(path: Path) -> str:
    """A suffix for a picture by what it is, ".jpeg" for example; ValueError if it is unreadable."""
    with _header(path) as image:
        kind = str(image.format).lower()
    return ".jp2" if kind == "jpeg2000" else f".{kind}"


def header_pages(path: Path) -> int | None:
    """The pages of a file, as of `pages`; 1 if it cannot be read."""
    try:
        with _header(path) as image:
            return pages(image)
    except ValueError:
        return 1


def is_camera_raw(path: Path) -> bool:
    """Whether a file is a camera's raw file, which holds a thumbnail that could be decoded."""
    try:
        with _header(path, ("TIFF",)) as image:
            return holds_thumbnail(image.tag_v2)  # type: ignore[attr-defined]
    except ValueError:
        return False


@contextlib.contextmanager
def _header(path: Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Opens a file; ValueError for whatever that, or the block, raises."""
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError(f"not an image that can be read: {one_line(error)}") from None


# -- open images -----------------------------------------------------------------------------------


def open_encoded(
    encoded: bytes, formats: tuple[str, ...], max_pixels: int, option: str = ""
) -> ImageFile.ImageFile:
    """The image in a file's bytes, ready to be decoded.

    Args:
        encoded: the file's bytes.
        formats: those of Pillow that it may have.
        max_pixels: the most that it may have.
        option: what sets them, for the message.

    Raises:
        ValueError: it has more pixels, is a PNG that is cut off, or a TIFF whose pixels would be
            others than those of the picture.
        Exception: whatever else Pillow raises.
    """
    image = Image.open(io.BytesIO(encoded), formats=formats)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.height} x {image.width} is over {max_pixels} pixels{option}")
    if isinstance(image, TiffImageFile) and (why := refusal(image.tag_v2)) is not None:
        raise ValueError(why)
    if image.format == "PNG" and b"IEND" not in encoded:
        raise ValueError("cut off")  # the decoders of the other formats notice
    return image


def orientation(image: Image.Image) -> int:
    """That of EXIF, 1..8; 1 without any, or where it is damaged: the pixels may be whole."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        return 1
    return int(found) if found in TURNS else 1


def pages(image: Image.Image) -> int | None:
    """Those of a stack or animation, else 1; None if some are broken.

    The image may be at another page afterwards.
    """
    if image.format == "MPO":  # a phone's JPEG: what follows is made from the first
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        return None


@contextlib.contextmanager
def decoding(encoded: bytes) -> Iterator[None]:
    """Turns whatever the decoding of a file's bytes raises into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # for broken files, Pillow raises whatever its parsers meet
        what = _other_format(encoded) if isinstance(error, UnidentifiedImageError) else None
        raise ValueError(f"not an image that can be decoded: {what or one_line(error)}") from None


def _other_format(encoded: bytes) -> str | None:
    """What a file is that Pillow does not read, as far as users are likely to have it."""
    brand = encoded[8:12] if encoded[4:8] == b"ftyp" else None
    if brand is not None and brand[:3] in (b"hei", b"hev", b"mif", b"msf", b"avi"):
        return "HEIC or AVIF (save it as JPEG or PNG)"
    matroska, avi = encoded.startswith(b"\x1aE\xdf\xa3"), encoded[8:12] == b"AVI "
    return "a video" if brand is not None or matroska or avi else unknown(encoded)


def one_line(error: Exception) -> str:
    """The text of an error of Pillow's."""
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"  # Pillow's text holds a memory address
    return " ".join(str(error).split()) or type(error).__name__
