"""What the tags of a TIFF say about its first page, before its pixels are decoded."""

from __future__ import annotations

import struct
from typing import Any

# Tags of the TIFF 6.0 specification and its supplements.
KIND_OF_PAGE, SUB_PAGES = 254, 330
STRIPS, STRIP_BYTES, TILES, TILE_BYTES = 273, 279, 324, 325
NODATA = 42113  # of GDAL: a number as text
THREE_BANDS = (
    "save three bands as RGB of 8 or 16 bits: gdal_translate -b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB"
)
COMPRESSION, RAW = 259, 1
REDUCED = 1  # bit of KIND_OF_PAGE: a smaller picture of another one


def refusal(tags: Any) -> str | None:
    """Why the first page is refused: a decoder would give a thumbnail, or pixels for missing tiles.

    Args:
        tags: of the page, as Pillow reads them.
    """
    if holds_thumbnail(tags):
        return "a camera's raw file, which holds a thumbnail (save it as JPEG or PNG)"
    for parts, offsets, lengths in (
        ("tiles", TILES, TILE_BYTES),
        ("strips", STRIPS, STRIP_BYTES),
    ):
        counts = tags.get(lengths, ())
        # Writers may leave out all lengths, without which only what is not compressed is read.
        left_out = not any(counts) and (len(counts) == 1 or tags.get(COMPRESSION, RAW) == RAW)
        if 0 in tags.get(offsets, ()) or (0 in counts and not left_out):
            return (
                f"{parts} without data (sparse): write it with gdal_translate -co SPARSE_OK=FALSE"
            )
    return None


def holds_thumbnail(tags: Any) -> bool:
    """Whether the first page is a smaller picture, as in NEF and DNG, and others lie below it.

    The smaller pictures of a pyramid are later pages, or below a first one of full size.
    """
    return bool(tags.get(KIND_OF_PAGE, 0) & REDUCED) and SUB_PAGES in tags


def nodata(tags: Any) -> int | None:
    """The whole number that stands for no value; None without one, or for 0, which is black."""
    try:
        value = float(tags[NODATA])
    except (KeyError, TypeError, ValueError):
        return None
    return int(value) or None if value.is_integer() and abs(value) < 1 << 31 else None


def unknown(encoded: bytes) -> str | None:
    """What a file is that begins like a TIFF, and that Pillow does not know; None: no TIFF."""
    for magic, order in ((b"II*\0", "<"), (b"MM\0*", ">"), (b"II+\0", "<"), (b"MM\0+", ">")):
        if encoded.startswith(magic):
            place, count, entry = ("Q", "Q", 20) if b"+" in magic else ("L", "H", 12)
            try:
                (start,) = struct.unpack_from(f"{order}{place}", encoded, 4 if entry == 12 else 8)
                (entries,) = struct.unpack_from(f"{order}{count}", encoded, start)
            except (struct.error, OverflowError):
                return "cut off"
            if start + entries * entry > len(encoded):
                return "cut off"
            return f"a TIFF of bands or values that are not read ({THREE_BANDS})"
    return None
