"""Depth maps as metres, and as cells: against values by hand and a loop over pixels."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mrcnn_jax.pixels.depth import decode_depth, depth_cells, depth_size
from mrcnn_jax.pixels.encode import write_depth
from mrcnn_jax.pixels.transforms import Transform

LIMITS = (0.02, 100.0)
LIMIT = 10_000  # pixels


def png(values: np.ndarray) -> bytes:
    return cv2.imencode(".png", values)[1].tobytes()


def npy(values: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version, allow_pickle=True)
    return file.getvalue()


def decoded(encoded: bytes, scale: float = 1000, limits: tuple[float, float] = LIMITS) -> list:
    metres = decode_depth(encoded, scale=scale, limits=limits, max_pixels=LIMIT)
    assert metres.dtype == np.float32
    return metres.tolist()


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1000, 8000, 256, 0.5])
def test_a_png_holds_metres_times_the_scale(scale: float) -> None:
    values = np.array([[0, 1, 255, 256, 4000], [8000, 20_000, 30_001, 65_534, 65_535]], np.uint16)
    expected = [[float(np.float32(v / scale)) for v in row] for row in values.tolist()]
    expected[1][4] = 0.0  # saturated: no measurement
    assert decoded(png(values), scale, (0.0, math.inf)) == expected


def test_what_the_package_writes_is_read_back(tmp_path: Path) -> None:
    metres = np.array([[0.5, 0.0, np.nan], [1.2345, 65.534, 65.535]])
    write_depth(tmp_path / "x.png", metres)
    assert decoded((tmp_path / "x.png").read_bytes()) == [
        [0.5, 0.0, 0.0],
        [float(np.float32(1.234)), float(np.float32(65.534)), 0.0],
    ]
    assert depth_size(tmp_path / "x.png") == (2, 3)


def test_limits_belong_to_the_range() -> None:
    values = np.array([[19, 20, 21, 1999, 2000, 2001]], np.uint16)
    expected = [0.0, 0.02, 0.021, 1.999, 2.0, 0.0]
    assert decoded(png(values), limits=(0.02, 2.0)) == [[float(np.float32(v)) for v in expected]]


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_holds_metres(kind: str, version: tuple[int, int], order: str) -> None:
    values = np.array([[1.5, 0.0, -2.0], [np.nan, np.inf, -np.inf], [0.25, 0.0078125, 128]])
    stored = np.asarray(values, kind, order=order)
    expected = [[1.5, 0, 0], [0, 0, 0], [0.25, 0, 0]]
    assert decoded(npy(stored, version), scale=7) == expected


@pytest.mark.parametrize("kind", ["u1", "<i2", ">i4", "<u8"])
def test_an_npy_file_of_whole_metres(kind: str) -> None:
    assert decoded(npy(np.array([[0, 3], [100, 101]], kind))) == [[0, 3], [100, 0]]


def test_what_float32_cannot_hold_is_unknown() -> None:
    assert decoded(npy(np.array([[1e39, 1e-50, 2.0]])), limits=(0.0, math.inf)) == [[0, 0, 2]]


def test_a_masked_view_of_a_larger_array_is_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(1, 13, dtype=np.float32).reshape(3, 4)[::2, 1:].T)
    assert depth_size(path) == (3, 2)
    assert decoded(path.read_bytes()) == [[2, 10], [3, 11], [4, 12]]


VIEWED = "a picture to look at has no metres; a depth map is a grey PNG of 16 bits, or .npy"


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (png(np.full((2, 3), 9, np.uint8)), f"a PNG of 8 bits, grey: {VIEWED}"),
        (png(np.full((2, 3, 3), 9, np.uint8)), f"a PNG of 8 bits, RGB: {VIEWED}"),
        (png(np.full((2, 3, 4), 9, np.uint8)), f"a PNG of 8 bits, RGBA: {VIEWED}"),
        (png(np.full((2, 3, 3), 9, np.uint16)), f"a PNG of 16 bits, RGB: {VIEWED}"),
        (png(np.full((101, 100), 9, np.uint16)), "101 x 100 is over 10000 pixels"),
        (png(np.full((2, 3), 9, np.uint16))[:20], "a PNG that is cut off"),
        (png(np.full((40, 30), 9, np.uint16))[:-20], "a PNG that is damaged or cut off"),
        (b"", "neither a PNG nor an .npy file"),
        (cv2.imencode(".jpg", np.full((2, 3), 9, np.uint8))[1].tobytes(), "neither a PNG nor"),
        (npy(np.ones((101, 100))), "101 x 100 is over 10000 pixels"),
        (npy(np.ones((4, 5)))[:-1], "an .npy file that is cut off"),
        (npy(np.ones((4, 5)))[:40], "an .npy file with a damaged header"),
        (npy(np.ones((4, 5))).replace(b"'shape'", b"'shaqe'"), "an .npy file with a damaged"),
        (npy(np.ones((4, 5))).replace(b"(4, 5)", b"(4,-5)"), "an .npy file of shape (4, -5)"),
        (npy(np.ones((4, 5, 1))), "an .npy file of shape (4, 5, 1)"),
        (npy(np.ones((0, 5))), "an .npy file of shape (0, 5)"),
        (npy(np.ones((4, 5), bool)), "an .npy file of bool"),
        (npy(np.ones((4, 5), complex)), "an .npy file of complex128"),
        (npy(np.full((4, 5), {1: 2}, object)), "an .npy file of object"),  # a pickle: never loaded
        (npy(np.ones((4, 5), [("z", "f4")])), "an .npy file of [('z', '<f4')]"),
    ],
)
def test_what_is_no_depth_map_is_told(encoded: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        decoded(encoded)
    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)


def test_a_header_that_promises_more_is_believed_by_nobody() -> None:
    """Nothing of that size is allocated."""
    huge = npy(np.ones((4, 5))).replace(b"(4, 5), }" + 12 * b" ", b"(4000000, 5000000), }")
    assert b"(4000000, 5000000)" in huge
    with pytest.raises(ValueError, match="4000000 x 5000000 is over 10000 pixels"):
        decoded(huge)


def test_a_flipped_bit_of_a_png_is_noticed() -> None:
    """Without the checksum, most of them would leave other depths that look right."""
    whole = png(np.arange(1, 1201, dtype=np.uint16).reshape(40, 30))
    begin, end = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    for at in range(begin, end, 7):
        changed = bytearray(whole)
        changed[at] ^= 4
        with pytest.raises(ValueError, match="a PNG that is damaged or cut off"):
            decoded(bytes(changed))


def test_a_png_of_a_palette_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("P", (3, 2)).save(path)
    with pytest.raises(ValueError, match=r"a PNG of \d bits, palette"):
        depth_size(path)


# -- cells -----------------------------------------------------------------------------------------


def loop(metres: np.ndarray, transform: Transform, canvas: tuple[int, int]) -> np.ndarray:
    """Pixel after pixel of the canvas, in exact fractions."""
    cells = np.zeros((canvas[0] // 4, canvas[1] // 4), np.float32)
    for top in range(0, canvas[0], 4):
        for left in range(0, canvas[1], 4):
            known = []
            for y in range(top, top + 4):
                for x in range(left, left + 4):
                    if y >= transform.size[0] or x >= transform.size[1]:
                        continue
                    at_y = y + transform.offset[0] + Fraction(1, 2)
                    at_x = x + transform.offset[1] + Fraction(1, 2)
                    if transform.flip:
                        at_x = transform.resized[1] - at_x
                    row = math.floor(at_y * transform.original[0] / transform.resized[0])
                    column = math.floor(at_x * transform.original[1] / transform.resized[1])
                    inside = (
                        0 <= row < transform.original[0] and 0 <= column < transform.original[1]
                    )
                    if inside and metres[row, column] > 0:
                        known.append(metres[row, column])
            if known:
                cells[top // 4, left // 4] = sorted(known)[(len(known) - 1) // 2]
    return cells


@pytest.mark.parametrize("seed", range(24))
def test_cells_are_those_of_a_loop(seed: int) -> None:
    """Over flips, windows in and around the image, scales of .2 to 3 per axis, and holes."""
    rng = np.random.default_rng(seed)
    original = tuple(int(n) for n in rng.integers(5, 40, 2))
    resized = tuple(max(1, round(side * rng.uniform(0.2, 3))) for side in original)
    canvas = (32, 64)
    size = tuple(min(a, b) for a, b in zip(resized, canvas, strict=True))
    offset = (0, 0)
    if seed % 3 == 1:  # a window inside
        offset = tuple(int(rng.integers(0, a - b + 1)) for a, b in zip(resized, size, strict=True))
    elif seed % 3 == 2:  # the image inside of the window
        size, offset = canvas, (-int(rng.integers(0, 9)), -int(rng.integers(0, 9)))
    transform = Transform(original, resized, size, offset, flip=bool(seed % 2))
    metres = rng.uniform(0.5, 5, original).astype(np.float32)
    metres[rng.random(original) < (0, 0.3, 0.9)[seed % 3]] = 0
    cells = depth_cells(metres, transform, canvas)
    assert cells.dtype == np.float32
    assert cells.shape == (8, 16)
    np.testing.assert_array_equal(cells, loop(metres, transform, canvas))
    assert (cells > 0).any()


def test_a_cell_on_an_edge_has_one_of_the_two_surfaces() -> None:
    """Half of its pixels at 1 m, half at 3 m: the nearer one, never 2 m."""
    metres = np.full((32, 32), 3, np.float32)
    metres[:, :6] = 1  # in the middle of the second column of cells
    transform = Transform((32, 32), (32, 32), (32, 32))
    cells = depth_cells(metres, transform, (32, 32))
    assert cells[0].tolist() == [1, 1] + 6 * [3]
    metres[:, 5] = 0  # of 1 m, 4 pixels are left
    assert depth_cells(metres, transform, (32, 32))[0, 1] == 3
    metres[:, 4:8] = 0
    assert depth_cells(metres, transform, (32, 32))[0, 1] == 0


def test_cells_and_pixels_show_the_same() -> None:
    """The map painted in grey goes the way of the image: a cell is what is seen there."""
    steps = np.repeat(np.arange(1, 9, dtype=np.float32), 8)
    metres = np.broadcast_to(steps, (64, 64)).copy()
    for flip in (False, True):
        transform = Transform((64, 64), (128, 128), (64, 96), (16, 24), flip)
        seen = transform.pixels((metres * 20).astype(np.uint8))
        cells = depth_cells(metres, transform, (64, 96))
        centres = seen[1::4, 1::4] / 20
        assert np.abs(centres - cells).max() <= 0.25  # bilinear at the steps
        assert (centres == cells).mean() > 0.7
