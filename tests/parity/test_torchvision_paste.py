"""Masks pasted as torchvision pastes them, beside torchvision."""

from __future__ import annotations

import numpy as np
import pytest
from record_paste import BOXES, RECORDED, SIZE, cases, pasted_by_torchvision

from mrcnn_jax.pixels.geometry import paste

pytest.importorskip("torch")
pytest.importorskip("torchvision")


def test_recorded_masks_are_torchvisions() -> None:
    masks, boxes = cases(BOXES, 14)
    recorded = np.load(RECORDED)
    np.testing.assert_array_equal(recorded["masks"], masks)
    np.testing.assert_array_equal(recorded["boxes"], boxes)
    np.testing.assert_allclose(
        recorded["pasted"], pasted_by_torchvision(masks, boxes, SIZE), atol=1e-6
    )


@pytest.mark.parametrize("longest", [1, 20, 700])
def test_pasted_masks_are_torchvisions(longest: int) -> None:
    size = (240, 320)
    rng = np.random.default_rng(longest)
    corners, sides = rng.uniform(0, 240, (60, 2)), rng.uniform(0, longest, (60, 2))
    boxes = np.concatenate([corners - sides / 2, corners + sides / 2], axis=1)
    masks, boxes = cases(boxes.tolist(), 28)
    expected = pasted_by_torchvision(masks, boxes, size)
    for mask, box, theirs in zip(masks, boxes, expected, strict=True):
        probabilities, (y0, x0) = paste(mask, box, size, "torchvision")
        ours = np.zeros(size, np.float32)
        ours[y0 : y0 + probabilities.shape[0], x0 : x0 + probabilities.shape[1]] = probabilities
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
