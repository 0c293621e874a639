"""Where boxes and masks lie, in numbers worked out by hand."""

from __future__ import annotations

import numpy as np

from mrcnn_jax.pixels.places import agrees, clipped, far, mask_extent, outside
from mrcnn_jax.pixels.rle import encoded


def test_boxes_and_the_image() -> None:
    assert clipped((-3.0, 5.0, 90.0, 70.0), 60, 80) == (0, 5, 80, 60)
    assert outside((-3.0, 5.0, 90.0, 70.0), 60, 80) == 10
    assert outside((-3.0, 5.0, 80.0, 60.0), 60, 80) == 3
    assert outside((0.0, 5.0, 80.0, 60.0), 60, 80) == 0


def test_a_box_is_far_from_a_mask_by_their_overlap() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    assert not far(box, (0.0, 0.0, 10.0, 5.0))  # an IoU of .5
    assert far(box, (0.0, 0.0, 10.0, 4.9))
    assert not far((0.0, 0.0, 2.0, 2.0), (2.0, 2.0, 4.0, 4.0))  # two pixels are rounding
    assert far((0.0, 0.0, 2.0, 2.0), (2.1, 2.0, 4.0, 4.0))


def test_a_mask_without_a_pixel_agrees_with_a_small_box() -> None:
    (nothing,) = encoded([np.zeros((60, 80), bool)])
    assert mask_extent(nothing) is None
    assert agrees((3.0, 3.0, 5.0, 40.0), nothing, None, 60, 80)
    assert not agrees((3.0, 3.0, 6.0, 40.0), nothing, None, 60, 80)
    assert not agrees((3.0, 3.0, 5.0, 40.0), None, None, 60, 80)
