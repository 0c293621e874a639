"""Run lengths: of pasted masks, of COCO's segmentations, and read from COCO's text."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask

from mrcnn_jax.pixels.geometry import mask_box, paste
from mrcnn_jax.pixels.rle import (
    PasteStyle,
    decoded_region,
    decompressed,
    moved_rle,
    paste_rle,
    sampled_rle,
    segmentation_rle,
)

SIZE = (23, 31)


def _encoded(mask: np.ndarray, box: tuple[float, ...], style: PasteStyle = "exact") -> str:
    """The pasted mask's text by way of the whole image."""
    probabilities, (y, x) = paste(mask, np.array(box), SIZE, style)
    shown = probabilities >= 0.5 if style == "exact" else probabilities > 0.5
    pixels = np.zeros(SIZE, np.uint8)
    pixels[y : y + shown.shape[0], x : x + shown.shape[1]] = shown
    return coco_mask.encode(np.asfortranarray(pixels))["counts"].decode()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.floats(-10, 40) for _ in range(2)], *[st.floats(0, 50) for _ in range(2)]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from(get_args(PasteStyle)),
)
def test_run_lengths_are_those_of_pycocotools(
    seed: int, corner_and_sides: tuple[float, ...], cells: int, style: PasteStyle
) -> None:
    x, y, w, h = corner_and_sides
    mask = np.random.default_rng(seed).integers(0, 2, (cells, cells)).astype(np.float32)
    rle = paste_rle(mask, np.array([x, y, x + w, y + h]), SIZE, style)
    assert rle == {"size": list(SIZE), "counts": _encoded(mask, (x, y, x + w, y + h), style)}


def test_run_lengths_join_full_columns() -> None:
    """A run that reaches the bottom of a column continues at the top of the next, to the end."""
    ones = np.ones((2, 2), np.float32)
    for box in ((-100, -100, 100, 100), (0, -100, 100, 100), (10, -100, 100, 100)):
        assert paste_rle(ones, np.array(box), SIZE)["counts"] == _encoded(ones, box)


def test_segmentations_of_every_form_are_the_same_mask() -> None:
    polygon = [[2.0, 3.0, 12.0, 3.0, 12.0, 9.0, 2.0, 9.0]]
    expected = np.zeros(SIZE, np.uint8)
    expected[3:9, 2:12] = 1
    compressed = coco_mask.encode(np.asfortranarray(expected))
    flat = expected.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(changes, prepend=0, append=flat.size).tolist()
    text = {"size": list(SIZE), "counts": compressed["counts"].decode()}
    for form in (polygon, compressed, {"size": list(SIZE), "counts": counts}, text):
        assert segmentation_rle(form, SIZE) == text


@pytest.mark.parametrize(
    "bad",
    [None, [], {}, "abc", 3, {"size": [31, 23], "counts": "abc"}, [["a", "b", "c", "d", "e", "f"]]],
)
def test_what_is_no_segmentation_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="segmentation"):
        segmentation_rle(bad, SIZE)


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1))
)
@settings(deadline=None, max_examples=60)
def test_run_lengths_are_those_of_a_loop(mask: np.ndarray) -> None:
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    assert decompressed(coco_mask.encode(np.asfortranarray(mask))["counts"].decode()) == runs


MASKS = arrays(
    np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 1)
)


def text_of(mask: np.ndarray) -> dict[str, object]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


@given(MASKS, st.integers(-22, 22), st.integers(-22, 22), st.integers(1, 25), st.integers(1, 25))
@settings(deadline=None, max_examples=200)
def test_a_moved_mask_is_that_of_its_pixels(
    mask: np.ndarray, y: int, x: int, height: int, width: int
) -> None:
    expected = np.zeros((height, width), np.uint8)
    for row, column in np.argwhere(mask).tolist():
        if 0 <= row + y < height and 0 <= column + x < width:
            expected[row + y, column + x] = 1
    assert moved_rle(text_of(mask), (y, x), (height, width)) == text_of(expected)


@given(MASKS, st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_a_sampled_mask_has_the_middle_pixels(mask: np.ndarray, step: int) -> None:
    height, width = (-(-side // step) for side in mask.shape)
    expected = np.zeros((height, width), np.uint8)
    sampled = mask[step // 2 :: step, step // 2 :: step]
    expected[: sampled.shape[0], : sampled.shape[1]] = sampled
    assert sampled_rle(text_of(mask), step) == text_of(expected)


@given(MASKS)
@settings(deadline=None, max_examples=100)
def test_the_region_of_a_mask_is_its_box(mask: np.ndarray) -> None:
    region, (y, x) = decoded_region(text_of(mask))
    x1, y1, x2, y2 = mask_box(mask)
    assert (y, x, *region.shape) == (y1, x1, y2 - y1, x2 - x1)
    np.testing.assert_array_equal(region, mask[y1:y2, x1:x2])


def test_masks_of_huge_images_are_moved_without_them() -> None:
    """20,000 x 20,000 pixels, of which the mask has 12; as bytes too."""
    small = np.ones((3, 4), np.uint8)
    encoded = coco_mask.encode(np.asfortranarray(small))
    far = moved_rle(encoded, (19_990, 19_995), (20_000, 20_000))
    assert coco_mask.area(far) == 12
    assert coco_mask.toBbox(far).tolist() == [19_995, 19_990, 4, 3]
    assert moved_rle(far, (-19_990, -19_995), (3, 4)) == text_of(small)
