"""Label images keep their values, masks their opacity; what is neither is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pictures import by_cv2, encoded, tiff_pages
from PIL import Image

from mrcnn_jax.pixels.label_images import decode_labels, opacity

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3)).astype(np.uint8)
PICTURE = Image.fromarray(RGB)
DEEP_RGB, DEEP_GREY = (
    RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16),
    RNG.integers(0, 65536, (20, 30)).astype(np.uint16),
)
INDICES = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
CODES = (RGB.astype(int) @ [65536, 256, 1]) + 2**24 * RGB.any(-1)


def _palette(*, white_first: bool = False) -> Image.Image:
    image = Image.fromarray(INDICES, "P")
    start = [255, 255, 255, 0, 0, 0] if white_first else [0, 0, 0, 0, 0, 0]
    image.putpalette(start + RNG.integers(0, 256, 762).tolist())
    return image


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (encoded(Image.fromarray(INDICES), "PNG"), INDICES),
        (encoded(_palette(), "PNG"), INDICES),
        (encoded(_palette(), "PNG", transparency=bytes(range(256))), INDICES),
        (encoded(_palette(), "BMP"), INDICES),
        (encoded(Image.fromarray(np.dstack([INDICES, INDICES[::-1]]), "LA"), "PNG"), INDICES),
        (encoded(Image.fromarray(INDICES > 99), "PNG"), INDICES > 99),
        *(  # ImageJ's, whose table of colours is inverted: the values stay
            (tiff_pages([values], photometric=zero, compressed=compressed), values)
            for values in (INDICES, DEEP_GREY)
            for zero in (0, 1)
            for compressed in (False, True)
        ),
        # Two values are a picture, of which white is the object.
        (encoded(Image.fromarray(INDICES > 99), "TIFF", tiffinfo={262: 0}), INDICES > 99),
        (by_cv2(DEEP_GREY, ".png"), DEEP_GREY),
        (by_cv2(DEEP_GREY, ".tif"), DEEP_GREY),
        (tiff_pages([DEEP_GREY.astype(np.int32)], sample=2, order=">", compressed=True), DEEP_GREY),
        (encoded(PICTURE, "PNG"), CODES),
        (encoded(Image.fromarray(np.dstack([RGB, INDICES])), "PNG"), CODES),
        (encoded(Image.new("RGB", (3, 2)), "PNG"), np.zeros((2, 3))),
    ],
)
def test_label_images_keep_their_values(file: bytes, expected: np.ndarray) -> None:
    values = decode_labels(file, max_pixels=600)
    assert values.dtype == np.int64
    assert (values == expected).all()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            encoded(PICTURE, "JPEG"),
            "not an image that can hold labels: none of PNG, TIFF, BMP, GIF",
        ),
        (b"", "not an image that can hold labels"),
        (by_cv2(DEEP_RGB, ".png"), "16-bit colours are not labels"),
        (by_cv2(DEEP_GREY.astype(np.float32), ".tiff"), "its values are floats"),
        (encoded(PICTURE, "PNG")[:-12], "cut off"),
        (
            encoded(_palette(white_first=True), "PNG"),
            "black has index 1 in its palette, but background is 0",
        ),
        (tiff_pages([INDICES, INDICES]), "2 pages: a mask file has one"),
        (tiff_pages([-np.ones((4, 4), np.int16)], sample=2), "its values are negative"),
        (
            encoded(Image.fromarray(np.dstack([0 * RGB, INDICES])), "PNG"),
            "its shape is in the alpha channel alone",
        ),
        (encoded(Image.new("1", (601, 1)), "PNG"), "1 x 601 is over 600 pixels"),
    ],
)
def test_what_is_no_label_image_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        decode_labels(file, max_pixels=600)
    assert "\n" not in str(raised.value)


def palette(values: np.ndarray, **options: Any) -> bytes:
    image = Image.fromarray(values)
    image.putpalette([0, 0, 0, 9, 8, 7])
    return encoded(image, "PNG", **options)


MASK = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
ALPHA = np.array([[0, 255, 3], [128, 0, 0]], np.uint8)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (palette(MASK, transparency=0), MASK * 255),
        (palette(MASK), MASK * 9),
        (by_cv2(ALPHA, ".png"), ALPHA),
        (encoded(Image.fromarray(np.dstack([MASK, ALPHA]), "LA"), "PNG"), ALPHA),
        (encoded(Image.fromarray(np.dstack([MASK] * 3 + [ALPHA]), "RGBA"), "PNG"), ALPHA),
        (encoded(Image.fromarray(MASK > 0), "PNG"), MASK * 255),
    ],
)
def test_the_opacity_of_a_mask(file: bytes, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(opacity(file, max_pixels=6), expected)


@pytest.mark.parametrize(
    ("file", "limit", "message"),
    [
        (palette(MASK), 5, "2 x 3 is over 5 pixels"),
        (palette(MASK)[:-12], 6, "cut off"),
        (encoded(PICTURE, "BMP"), 600, "unknown format"),
    ],
)
def test_what_is_no_png_of_a_mask_is_refused(file: bytes, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opacity(file, max_pixels=limit)
