"""Depth maps: their files as metres, and as the cells that a network is trained on.

A map has the annotated size of its image, whatever EXIF says of that one. 0 means unknown.
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

if TYPE_CHECKING:
    from mrcnn_jax.pixels.transforms import Transform

SATURATED = 65535  # in a PNG: no measurement, but what sensors and tools clip to
PNG, NPY = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}  # of a PNG's header
HEADER = 16384  # bytes: more than any header that is read


class _Header(NamedTuple):
    """What a file says of itself before its values."""

    height: int
    width: int
    dtype: np.dtype[Any] | None = None  # of an .npy file; None: a PNG
    columns_first: bool = False
    start: int = 0  # of the values


def depth_size(path: Path) -> tuple[int, int]:
    """(height, width) of a depth map, from the file's header alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no depth map.
    """
    with path.open("rb") as file:
        header = _header(file.read(HEADER))
    return header.height, header.width


def decode_depth(
    encoded: bytes,
    *,
    scale: float,
    limits: tuple[float, float] = (0.0, math.inf),
    max_pixels: int,
) -> Float[np.ndarray, "h w"]:
    """The metres of a depth map.

    Args:
        encoded: the bytes of a 16-bit grey PNG, or of an .npy file of numbers, which are metres.
        scale: value of the PNG for a metre.
        limits: least and largest depth in metres.
        max_pixels: a larger map is not decoded.

    Returns:
        float32; 0, unknown, where the file has 0, `SATURATED`, a negative value, NaN, infinity, or
        a depth beyond `limits`.

    Raises:
        ValueError: the file is something else, cut off, or over `max_pixels`.
    """
    header = _header(encoded[:HEADER])
    count = header.height * header.width
    if count > max_pixels:
        raise ValueError(
            f"{header.height} x {header.width} is over {max_pixels} pixels (data.max_pixels)"
        )
    if header.dtype is None:
        values = _png_values(encoded)
        metres = np.where(values == SATURATED, 0, values).astype(np.float32) / np.float32(scale)
    else:
        if len(encoded) - header.start < count * header.dtype.itemsize:
            raise ValueError("an .npy file that is cut off")
        values = np.frombuffer(encoded, header.dtype, count, header.start)
        with np.errstate(over="ignore"):  # to infinity
            values = values.astype(np.float32)
        size = header.height, header.width
        metres = values.reshape(size[::-1]).T if header.columns_first else values.reshape(size)
    low, high = limits
    known = (metres > 0) & (metres >= low) & (metres <= high) & (metres < math.inf)
    return np.where(known, metres, np.float32(0))


def _header(head: bytes) -> _Header:
    """The header at the beginning of a file; ValueError if it is no depth map."""
    if head.startswith(PNG):
        if len(head) < 26:
            raise ValueError("a PNG that is cut off")
        width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
        if (bits, colour) != (16, 0):
            raise ValueError(
                f"a PNG of {bits} bits, {COLOURS.get(colour, 'of no known colours')}: a picture to "
                "look at has no metres; a depth map is a grey PNG of 16 bits, or .npy"
            )
        return _Header(height, width)
    if head.startswith(NPY):
        return _npy_header(head)
    raise ValueError("neither a PNG nor an .npy file")


def _npy_header(head: bytes) -> _Header:
    file = io.BytesIO(head)
    try:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(file)]
        shape, columns_first, dtype = read(file)
    except Exception:  # whatever the parser of a damaged header meets
        raise ValueError("an .npy file with a damaged header") from None
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise ValueError(f"an .npy file of {dtype}: metres are floats or integers")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"an .npy file of shape {shape}: a depth map has (height, width)")
    return _Header(*shape, dtype, columns_first, file.tell())


def _png_values(encoded: bytes) -> np.ndarray:
    try:
        if b"IEND" not in encoded:
            raise ValueError
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            image.verify()  # the checksums, which decoding leaves out; ends the use of the image
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            return np.asarray(image)
    except Exception:  # for broken files, Pillow raises whatever its parsers meet
        raise ValueError("a PNG that is damaged or cut off") from None


def depth_cells(
    metres: Float[np.ndarray, "h w"], transform: Transform, canvas: tuple[int, int]
) -> Float[np.ndarray, "h4 w4"]:
    """Depth on cells of DEPTH_STRIDE x DEPTH_STRIDE canvas pixels.

    Each canvas pixel has the depth of the image's pixel at its centre. A cell's is the lower median
    of those known in it: one of the depths that are there, never one between two surfaces.

    Args:
        metres: of the image's own pixels, 0 where unknown.
        transform: of the image on its canvas.
        canvas: (height, width) in pixels, multiples of DEPTH_STRIDE.

    Returns:
        float32, 0 where no pixel of the cell is known, or the image is not.
    """
    from mrcnn_jax.structures import DEPTH_STRIDE  # late: reading annotations does without jax

    rows, columns = (_sources(transform, axis, side) for axis, side in enumerate(canvas))
    seen = np.ix_(rows >= 0, columns >= 0)
    pixels = np.full(canvas, np.inf, np.float32)
    pixels[seen] = metres[np.ix_(rows[rows >= 0], columns[columns >= 0])]
    pixels[pixels == 0] = np.inf
    height, width = (side // DEPTH_STRIDE for side in canvas)
    cells = pixels.reshape(height, DEPTH_STRIDE, width, DEPTH_STRIDE).swapaxes(1, 2)
    cells = np.sort(cells.reshape(height, width, DEPTH_STRIDE**2))
    known = np.isfinite(cells).sum(axis=-1, keepdims=True)
    median = np.take_along_axis(cells, np.maximum(known - 1, 0) // 2, axis=-1)
    return np.where(known, median, np.float32(0))[..., 0]


def _sources(transform: Transform, axis: int, side: int) -> Int[np.ndarray, " side"]:
    """The image's row or column at the centre of each of the canvas; -1 outside of its window."""
    window = np.arange(side)
    resized, original = transform.resized[axis], transform.original[axis]
    place = window + transform.offset[axis]
    outside = (window >= transform.size[axis]) | (place < 0) | (place >= resized)
    if axis == 1 and transform.flip:
        place = resized - 1 - place
    return np.where(outside, -1, (2 * place + 1) * original // (2 * resized))
