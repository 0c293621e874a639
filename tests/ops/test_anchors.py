from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from mrcnn_jax.ops.anchors import level_anchors


def test_by_hand() -> None:
    anchors = level_anchors(grid=(2, 2), stride=(16, 16), scales=(32,), ratios=(1.0, 4.0))
    assert anchors.dtype == np.float32
    assert anchors.tolist() == [
        [-8, -8, 24, 24], [0, -24, 16, 40],
        [8, -8, 40, 24], [16, -24, 32, 40],
        [-8, 8, 24, 40], [0, -8, 16, 56],
        [8, 8, 40, 40], [16, -8, 32, 56],
    ]  # fmt: skip


@pytest.mark.parametrize("offset", [0.5, 0.0])
@pytest.mark.parametrize(
    ("grid", "stride", "scales"),
    [
        ((3, 5), (4, 4), (32,)),
        ((2, 1), (61, 64), (512,)),
        ((1, 4), (8, 8), (45.5,)),
        ((2, 3), (16, 16), (32, 64, 128)),
    ],
)
def test_equals_loop(
    grid: tuple[int, int], stride: tuple[int, int], scales: tuple[float, ...], offset: float
) -> None:
    expected = []
    for row, column in np.ndindex(grid):
        for scale in scales:
            for ratio in (0.5, 1.0, 2.0):
                width = math.sqrt(scale * scale / ratio)
                height = width * ratio
                x, y = (column + offset) * stride[1], (row + offset) * stride[0]
                expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    anchors = level_anchors(
        grid=grid, stride=stride, scales=scales, ratios=(0.5, 1.0, 2.0), offset=offset
    )
    np.testing.assert_allclose(anchors, expected, rtol=1e-6, atol=1e-5)


def test_whole_pixels_are_torchvisions() -> None:
    """AnchorGenerator's base anchors of scale 32: 22.6 / 2 and 45.3 / 2 rounded; of 5 and 7, halves
    to even."""
    make = functools.partial(level_anchors, grid=(1, 1), stride=(4, 4), offset=0, whole_pixels=True)
    anchors = make(scales=(32,), ratios=(0.5, 1.0, 2.0))
    assert anchors.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    assert make(scales=(5, 7), ratios=(1.0,)).tolist() == [[-2, -2, 2, 2], [-4, -4, 4, 4]]
