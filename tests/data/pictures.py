"""Image files of every kind, for the tests of this folder."""

from __future__ import annotations

import io
import struct
from typing import Any

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
