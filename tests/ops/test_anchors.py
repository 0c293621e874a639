from __future__ import annotations

import math

import numpy as np
import pytest

from mrcnn_jax.ops.anchors import level_anchors


def test_by_hand() -> None:
    anchors = level_anchors(grid=(2, 2), stride=16, scale=32, ratios=(1.0, 4.0))
    assert anchors.dtype == np.float32
    assert anchors.tolist() == [
        [-8, -8, 24, 24], [0, -24, 16, 40],
        [8, -8, 40, 24], [16, -24, 32, 40],
        [-8, 8, 24, 40], [0, -8, 16, 56],
        [8, 8, 40, 40], [16, -8, 32, 56],
    ]  # fmt: skip


@pytest.mark.parametrize(("grid", "stride", "scale"), [((3, 5), 4, 32), ((2, 1), 64, 512), ((1, 4), 8, 45.5)])
def test_equals_loop(grid: tuple[int, int], stride: int, scale: float) -> None:
    expected = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            for ratio in (0.5, 1.0, 2.0):
                width = math.sqrt(scale * scale / ratio)
                height = width * ratio
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    np.testing.assert_allclose(level_anchors(grid=grid, stride=stride, scale=scale, ratios=(0.5, 1.0, 2.0)), expected, rtol=1e-6, atol=1e-5)
