"""What the tags of a TIFF say about its first page, before its pixels are decoded."""

from __future__ import annotations

from typing import Any

# Tags of the TIFF 6.0 specification and its supplements.
KIND_OF_PAGE, SUB_PAGES = 254, 330
STRIPS, STRIP_BYTES, TILES, TILE_BYTES = 273, 279, 324, 325
NODATA = 42113  # of GDAL: a number as text
REDUCED = 1  # bit of KIND_OF_PAGE: a smaller picture of another one


def refusal(tags: Any) -> str | None:
    """Why the first page is not read, although a decoder would give pixels: they are others.

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
        # Old writers leave out the length of a single part: all that follows is it.
        if 0 in tags.get(offsets, ()) or (len(counts) > 1 and 0 in counts):
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
