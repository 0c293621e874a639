"""Image files of every kind, for the tests of this folder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# how a picture is stored under an EXIF orientation, by the standard's words: where its row 0 and
# its column 0 are seen
STORED = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: a[::-1].swapaxes(0, 1),  # left, bottom
}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(channels: int, height: int = 4, width: int = 6) -> bytes:
    """An uncompressed TIFF, RGB and further channels, by hand."""
    data = bytes(i % 251 for i in range(height * width * channels))
    extra = channels - 3
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, 134),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 200),
    ]
    tags += [
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (338, 3, extra, 160 if extra > 2 else 0),
    ]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4)).ljust(134, b"\0")
    return (head + struct.pack(f"<{channels}H", *[8] * channels)).ljust(200, b"\0") + data


def tiff_pages(
    pages: Sequence[np.ndarray],
    *,
    photometric: int = 1,
    planar: int = 1,
    order: str = "<",
    sample: int = 1,
    extra: Sequence[int] = (),
    compressed: bool = False,
    turn: int = 1,
) -> bytes:
    """A TIFF by hand, with a page for each array [h, w] or [h, w, c].

    `photometric` 0: white is zero, 1: black is, 2: RGB. `sample` 1: unsigned, 2: signed, 3: float.
    """
    file = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    link = 4  # where the offset of the next page goes
    for page in pages:
        pixels = page.reshape(*page.shape[:2], -1)
        height, width, channels = pixels.shape
        planes = np.moveaxis(pixels, 2, 0) if planar == 2 else [pixels]
        kind = pixels.dtype.newbyteorder(order)
        parts = [np.ascontiguousarray(plane).astype(kind).tobytes() for plane in planes]
        parts = [zlib.compress(part) for part in parts] if compressed else parts
        offsets = []
        for part in parts:
            offsets.append(len(file))
            file += part + bytes(len(part) % 2)
        tags: dict[int, tuple[str, Sequence[int]]] = {
            256: ("I", [width]),
            257: ("I", [height]),
            258: ("H", [8 * pixels.itemsize] * channels),
            259: ("H", [8 if compressed else 1]),
            262: ("H", [photometric]),
            273: ("I", offsets),
            274: ("H", [turn]),
            277: ("H", [channels]),
            278: ("I", [height]),
            279: ("I", [len(part) for part in parts]),
            284: ("H", [planar]),
            **({338: ("H", extra)} if extra else {}),
            339: ("H", [sample] * channels),
        }
        entries = b""
        for tag, (form, values) in tags.items():
            packed = struct.pack(f"{order}{len(values)}{form}", *values).ljust(4, b"\0")
            if len(packed) > 4:
                packed, far = struct.pack(f"{order}I", len(file)), packed
                file += far + bytes(len(far) % 2)
            kind_of = 3 if form == "H" else 4
            entries += struct.pack(f"{order}HHI", tag, kind_of, len(values)) + packed
        file[link : link + 4] = struct.pack(f"{order}I", len(file))
        file += struct.pack(f"{order}H", len(tags)) + entries
        link = len(file)
        file += bytes(4)
    return bytes(file)
