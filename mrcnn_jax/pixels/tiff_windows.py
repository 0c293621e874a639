"""Windows of a TIFF, for a picture that is too large to be decoded as a whole.

A TIFF holds its pixels in tiles or strips that are compressed one by one. Those that a window
touches are put into a small TIFF in memory, with the tags that say how they are to be read, which
`decode` then decodes: so a window has the pixels that the whole would have, and what Pillow reads
is read.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mrcnn_jax.pixels.decode import Kind, decode_with_kind, value_bits
from mrcnn_jax.pixels.headers import header_pages
from mrcnn_jax.pixels.tiff_tags import (
    NODATA,
    STRIP_BYTES,
    STRIPS,
    TILE_BYTES,
    TILES,
    nodata,
    refusal,
)
from mrcnn_jax.pixels.windows import Window

# Tags of the TIFF 6.0 specification and its supplements.
WIDTH, HEIGHT, BITS, COMPRESSION, CHANNELS, PLANES = 256, 257, 258, 259, 277, 284
ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT = 278, 322, 323
ORIENTATION = 274
SHORT, LONG, UNDEFINED = 3, 4, 7  # types of values
# They say how a tile or strip is decoded: as above, and photometric interpretation, fill order,
# predictor, colour map, inks, extra samples, sample format, tables of JPEG, YCbCr's subsampling.
DECODING = (BITS, COMPRESSION, 262, 266, CHANNELS, PLANES, 317, 320, 332, 338, 339, 347, 530, 531)
# Of the others, fax has options of its own, and the tables of old JPEG are at places of the file.
MOST = 2**32  # pixels of an image: COCO's run lengths have 32 bits
STEP = 1024  # pixels: the side of what is looked at first, for the largest value
RAW, ONE_BY_ONE = 1, (1, 5, 7, 8, 32773, 32946, 34925, 50000, 50001)


@dataclass(frozen=True)
class _Layout:
    """Where the tiles or strips of the first page are; strips are tiles of the whole width."""

    size: tuple[int, int]
    part: tuple[int, int]  # (height, width) of a tile or strip
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    in_tiles: bool
    bits: int  # of a value
    planes: int  # stored one after the other
    row_bytes: int | None  # of a strip that is not compressed, in one plane
    tags: Mapping[int, bytes | list[int]]  # those of DECODING, and NODATA
    order: str  # of bytes, as of `struct`: "<" or ">"

    @property
    def columns(self) -> int:
        """Parts side by side."""
        return -(-self.size[1] // self.part[1])


class TiffWindows:
    """The first page of a TIFF, of which windows are read."""

    def __init__(self, path: Path, layout: _Layout, max_pixels: int) -> None:
        self.size = layout.size
        """(height, width)."""
        if self.size[0] * self.size[1] >= MOST:
            raise ValueError(f"{self.size[0]} x {self.size[1]}: {MOST} pixels or more are not read")
        self._path, self._layout, self._max_pixels = path, layout, max_pixels
        self._least_bits = 8
        self._band: tuple[Window, UInt8[np.ndarray, "h w 3"]] | None = None
        if layout.bits > 8:
            # The scale of all windows is that of the largest value.
            parts = (self._encoded(window)[1] for window in self._pieces())
            self._least_bits = max(value_bits(part, max_pixels=max_pixels) for part in parts)
        kind, pages = self._decoded(Window(0, 0, 1, 1))[2], header_pages(path)
        self.kind = replace(kind, height=self.size[0], width=self.size[1], pages=pages)
        """As of the whole file."""

    def _pieces(self) -> Iterator[Window]:
        """Windows that cover the image, in strips over the whole width."""
        height, width = self.size
        rows = max(min(STEP, self._max_pixels // width), 1)
        for y in range(0, height, STEP if self._layout.in_tiles else rows):
            if self._layout.in_tiles:
                for x in range(0, width, STEP):
                    yield Window(y, x, min(y + STEP, height), min(x + STEP, width))
            else:
                yield Window(y, 0, min(y + rows, height), width)

    def read(self, window: Window) -> UInt8[np.ndarray, "h w 3"]:
        """The RGB pixels of a window.

        Of a TIFF in strips, the rows of a window are decoded over the whole width, and kept for the
        next window.

        Raises:
            ValueError: a part cannot be decoded, or more than `max_pixels` would have to be at
                once.
        """
        if self._band is None or self._band[0].common(window) != window:
            self._band = None  # not two of them at once
            self._band = self._decoded(window)[:2]
        place, band = self._band
        if self._layout.in_tiles:
            self._band = None
        rows = slice(window.y1 - place.y1, window.y2 - place.y1)
        # A view would keep the band in memory.
        return band[rows, window.x1 - place.x1 : window.x2 - place.x1].copy()

    def _decoded(self, window: Window) -> tuple[Window, UInt8[np.ndarray, "h w 3"], Kind]:
        """The parts that hold a window: their place, pixels and kind."""
        place, encoded = self._encoded(window)
        pixels, kind = decode_with_kind(
            encoded,
            upright=False,
            max_pixels=self._max_pixels,
            least_bits=self._least_bits,
        )
        return place, pixels, kind

    def _encoded(self, window: Window) -> tuple[Window, bytes]:
        """The parts that hold a window: their place, and a TIFF of them."""
        layout, (high, wide) = self._layout, self._layout.part
        rows = range(window.y1 // high, -(-window.y2 // high))
        columns = range(window.x1 // wide, -(-window.x2 // wide))
        place = Window(rows[0] * high, columns[0] * wide, rows[-1] * high + high, 0)
        place = place._replace(x2=columns[-1] * wide + wide)
        if not layout.in_tiles:
            y1, y2 = (window.y1, window.y2) if layout.row_bytes else (place.y1, place.y2)
            place = Window(y1, 0, min(y2, self.size[0]), self.size[1])
        height, width = place.size
        if height * width > self._max_pixels:
            parts = "tiles" if layout.in_tiles else "strips"
            raise ValueError(
                f"its {parts} are too large: {height} x {width} would have to be decoded at once, "
                f"which is over {self._max_pixels} pixels: save it in smaller {parts}"
            )
        numbers = [y * layout.columns + x for y in rows for x in columns]
        return place, _small_tiff(layout, place.size, self._parts(numbers, place))

    def _parts(self, numbers: list[int], place: Window) -> list[bytes]:
        """The bytes of tiles or strips; uncompressed strips are cut and joined to one."""
        layout, found = self._layout, []
        plane = len(layout.offsets) // layout.planes
        with self._path.open("rb") as file:
            held = os.fstat(file.fileno()).st_size
            for number in (p * plane + n for p in range(layout.planes) for n in numbers):
                offset, length = layout.offsets[number], layout.lengths[number]
                if layout.row_bytes:
                    first = number * layout.part[0]
                    skip = max(place.y1 - first, 0) * layout.row_bytes
                    last = min(first + layout.part[0], place.y2)
                    length = (last - max(place.y1, first)) * layout.row_bytes
                    offset += skip
                if offset + length > held:
                    raise ValueError("not an image that can be decoded: cut off")
                file.seek(offset)
                found.append(file.read(length))
        return [b"".join(found)] if layout.row_bytes else found


def open_windows(path: Path, *, max_pixels: int) -> TiffWindows | None:
    """Open a TIFF to read windows of its first page.

    Args:
        path: the file.
        max_pixels: the most that may have to be decoded at once.

    Returns:
        None if the file is no TIFF, or one that only decoding as a whole reads: turned by its
        orientation, of more than 16 bits, or in a compression of fax or of JPEG's old form. Of more
        than 8 bits, all of it is looked at once for the largest value, which decides the scale.

    Raises:
        ValueError: a part that is looked at cannot be decoded (see `TiffWindows.read`), parts have
            no data, it is a camera's raw file, or there are MOST pixels or more.
    """
    refused, layout = _first_page(path)
    if refused is not None:
        raise ValueError(f"not an image that can be decoded: {refused}")
    return TiffWindows(path, layout, max_pixels) if isinstance(layout, _Layout) else None


def not_by_windows(path: Path) -> str:
    """Why `open_windows` gives None for a file, and what to do, in words that end a sentence."""
    layout = _first_page(path)[1]
    if isinstance(layout, str):
        return (
            f"not read by windows, being {layout}: save it upright, with 8 or 16 bits, "
            "uncompressed or by Deflate"
        )
    return "not read by windows: save it as a TIFF of 8 or 16 bits in tiles or strips"


def _first_page(path: Path) -> tuple[str | None, _Layout | str | None]:
    """Why it is not read at all (`refusal`), and its layout; None, None if it is no TIFF."""
    try:
        with Image.open(path, formats=("TIFF",)) as image:
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            return refusal(tags), _layout(tags)
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        return None, None


def _layout(tags: Any) -> _Layout | str | None:
    """A reason why only decoding the whole reads it; None, or any exception, if the tags are those
    of no picture."""
    size = int(tags[HEIGHT]), int(tags[WIDTH])
    bits, compression = tags.get(BITS, (1,)), tags.get(COMPRESSION, RAW)
    if tags.get(ORIENTATION, 1) != 1:
        return "turned by its orientation"
    if max(bits) > 16:
        return "of more than 16 bits"
    if compression not in ONE_BY_ONE:
        return f"in compression {compression}"
    in_tiles, channels = TILES in tags, tags.get(CHANNELS, 1)
    planes = channels if tags.get(PLANES, 1) == 2 else 1
    part = (
        (int(tags[TILE_HEIGHT]), int(tags[TILE_WIDTH]))
        if in_tiles
        else (min(int(tags.get(ROWS_PER_STRIP, size[0])), size[0]), size[1])
    )
    offsets, lengths = (
        tuple(tags[tag]) for tag in ((TILES, TILE_BYTES) if in_tiles else (STRIPS, STRIP_BYTES))
    )
    count = math.prod(-(-whole // side) for whole, side in zip(size, part, strict=True)) * planes
    if not 0 < count == len(offsets) == len(lengths) or min(*size, *part) < 1:
        return None
    raw = compression == RAW and not in_tiles and planes == 1
    row_bytes = -(-size[1] * channels * max(bits) // 8) if raw else None
    decoding = {tag: tags[tag] for tag in DECODING if tag in tags}
    listed = {
        tag: value if isinstance(value, bytes) else [*np.atleast_1d(value).tolist()]
        for tag, value in decoding.items()
    }
    numbers = (number for v in listed.values() if isinstance(v, list) for number in v)
    if not all(isinstance(number, int) and 0 <= number < 1 << 16 for number in numbers):
        return None  # no other value is in the specification
    if (absent := nodata(tags)) is not None:
        listed[NODATA] = str(absent).encode()
    order = ">" if tags.prefix == b"MM" else "<"
    return _Layout(
        size, part, offsets, lengths, in_tiles, max(bits), planes, row_bytes, listed, order
    )


def _small_tiff(layout: _Layout, size: tuple[int, int], parts: list[bytes]) -> bytes:
    """A TIFF of `size` that consists of `parts`, in their order."""
    pixels = b"".join(parts)
    offsets = list(itertools.accumulate(map(len, parts[:-1]), initial=8))
    lengths = [len(part) for part in parts]
    of_parts = (
        {TILE_HEIGHT: [layout.part[0]], TILE_WIDTH: [layout.part[1]]}
        | {TILES: offsets, TILE_BYTES: lengths}
        if layout.in_tiles
        else {ROWS_PER_STRIP: [size[0] if layout.row_bytes else layout.part[0]]}
        | {STRIPS: offsets, STRIP_BYTES: lengths}
    )
    longs = {HEIGHT: [size[0]], WIDTH: [size[1]]} | of_parts
    tags: dict[int, bytes | list[int]] = {**layout.tags, **longs}
    kinds = {tag: UNDEFINED if isinstance(value, bytes) else SHORT for tag, value in tags.items()}
    kinds |= dict.fromkeys(longs, LONG)
    start = 8 + len(pixels)
    entries, values = [struct.pack(f"{layout.order}H", len(tags))], []
    place = start + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        count, kind = len(value), kinds[tag]
        packed = (
            value
            if isinstance(value, bytes)
            else struct.pack(f"{layout.order}{count}{'H' if kind == SHORT else 'L'}", *value)
        )
        held = packed
        if len(packed) > 4:
            held = struct.pack(f"{layout.order}L", place)
            values.append(packed)
            place += len(packed)
        entries.append(struct.pack(f"{layout.order}HHL", tag, kind, count) + held.ljust(4, b"\0"))
    magic = b"II*\0" if layout.order == "<" else b"MM\0*"
    begin = magic + struct.pack(f"{layout.order}L", start)
    return b"".join((begin, pixels, *entries, bytes(4), *values))
