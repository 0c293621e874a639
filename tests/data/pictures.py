"""Image files of every kind, for the tests of this folder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import cv2
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


def by_cv2(pixels: np.ndarray, suffix: str) -> bytes:
    """RGB or grey values, as OpenCV writes them: also those of 16 bits and floats."""
    return cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


def tiff(channels: int, height: int = 4, width: int = 6) -> bytes:
    """An uncompressed TIFF, RGB and further channels that it does not name."""
    count = height * width * channels
    pixels = (np.arange(count) % 251).astype(np.uint8).reshape(height, width, channels)
    return tiff_pages([pixels], photometric=2, extra=(0,) * (channels - 3))


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
