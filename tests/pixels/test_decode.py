"""Images of any kind become RGB; other files, and those cut off, raise a ValueError."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pictures import STORED, encoded, tiff
from PIL import Image

from mrcnn_jax.pixels.decode import (
    DEEP,
    KINDS,
    decode_image,
    decode_labels,
    header_size,
    image_kind,
)

LIMIT = 1_000_000
RNG = np.random.default_rng(0)
RGB = cv2.resize(RNG.integers(0, 256, (4, 5, 3)).astype(np.uint8), (30, 20))
PICTURE = Image.fromarray(RGB)
DEEP_RGB, DEEP_GREY = (
    RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16),
    RNG.integers(0, 65536, (20, 30)).astype(np.uint16),
)


def by_cv2(pixels: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


@pytest.mark.parametrize(
    ("file", "converted", "expected"),
    [
        (encoded(PICTURE, "PNG"), None, RGB),
        (encoded(PICTURE, "BMP"), None, RGB),
        (encoded(PICTURE, "TIFF"), None, RGB),
        (encoded(PICTURE, "WEBP", lossless=True), None, RGB),
        (
            encoded(PICTURE.convert("L"), "PNG"),
            KINDS["L"],
            np.asarray(PICTURE.convert("L"))[..., None],
        ),
        (
            encoded(PICTURE.convert("LA"), "PNG"),
            KINDS["LA"],
            np.asarray(PICTURE.convert("L"))[..., None],
        ),
        (
            encoded(PICTURE.convert("P"), "PNG"),
            KINDS["P"],
            np.asarray(PICTURE.convert("P").convert("RGB")),
        ),
        (
            encoded(PICTURE.convert("P"), "PNG", transparency=bytes(range(256))),
            KINDS["P"],
            np.asarray(PICTURE.convert("P").convert("RGB")),
        ),
        (encoded(PICTURE, "PNG", transparency=(1, 2, 3)), None, RGB),
        (
            encoded(Image.fromarray(np.dstack([RGB, np.full((20, 30), 7, np.uint8)])), "PNG"),
            KINDS["RGBA"],
            RGB,
        ),
        (encoded(PICTURE.convert("CMYK"), "TIFF"), KINDS["CMYK"], RGB),
        (
            encoded(PICTURE.convert("1"), "PNG"),
            KINDS["1"],
            255 * np.asarray(PICTURE.convert("1"))[..., None].astype(int),
        ),
        (by_cv2(DEEP_GREY, ".png"), DEEP, DEEP_GREY[..., None] // 256),
        (by_cv2(DEEP_GREY, ".tif"), DEEP, DEEP_GREY[..., None] // 256),
        (by_cv2(DEEP_RGB, ".png"), DEEP, DEEP_RGB // 256),
        (by_cv2(DEEP_RGB, ".tif"), DEEP, DEEP_RGB // 256),
        (tiff(4), KINDS["RGBX"], np.frombuffer(tiff(4)[200:], np.uint8).reshape(4, 6, 4)[..., :3]),
    ],
)
def test_any_kind_becomes_rgb(file: bytes, converted: str | None, expected: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode_image(file, upright=False, max_pixels=LIMIT)
        kind = image_kind(file, max_pixels=LIMIT)
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    assert (kind.height, kind.width) == pixels.shape[:2]
    assert kind.orientation == 1
    assert kind.converted == converted
    assert (pixels == expected).all()


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpegs_of_any_kind_become_rgb(mode: str) -> None:
    """CMYK as Adobe writes it, inverted: read the wrong way, bright becomes dark."""
    file = encoded(PICTURE.convert(mode), "JPEG", quality=100, subsampling=0)
    expected = np.asarray(PICTURE.convert(mode).convert("RGB")).astype(int)
    assert np.abs(decode_image(file, upright=False, max_pixels=LIMIT) - expected).mean() < 2
    assert image_kind(file, max_pixels=LIMIT).converted == KINDS.get(mode)


@pytest.mark.data
def test_photographs_have_the_pixels_of_another_decoder(data_folder: Path) -> None:
    files = sorted((data_folder / "coco_mini" / "images").iterdir())[::40]
    assert len(files) > 10
    for file in files:
        theirs = cv2.imdecode(
            np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        assert (
            np.abs(
                decode_image(file.read_bytes(), upright=False, max_pixels=LIMIT).astype(int)
                - theirs
            ).max()
            <= 1
        )


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_all_eight_orientations_give_one_picture(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    file = encoded(Image.fromarray(stored), form, exif=exif, **options)
    upright = decode_image(file, upright=True, max_pixels=LIMIT).astype(int)
    assert upright.shape == RGB.shape
    assert np.abs(upright - RGB).max() <= (8 if form == "JPEG" else 0)
    if form != "TIFF":  # there the orientation is always followed
        assert np.abs(
            decode_image(file, upright=False, max_pixels=LIMIT).astype(int) - stored
        ).max() <= (8 if form == "JPEG" else 0)
        kind = image_kind(file, max_pixels=LIMIT)
        assert (kind.orientation, kind.height, kind.width) == (orientation, *stored.shape[:2])


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_is_none_is_passed_over(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(PICTURE, "PNG", exif=exif)
    assert image_kind(file, max_pixels=LIMIT).orientation == 1
    assert (decode_image(file, upright=True, max_pixels=LIMIT) == RGB).all()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "unknown format"),
        (b"<html><body>404 Not Found</body></html>", "unknown format"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "unknown format",
        ),  # Pillow would run Ghostscript
        (tiff(5), "5 channels"),
        (tiff(7), "not an image"),
        (by_cv2(DEEP_GREY.astype(np.float32), ".tif"), "floats"),
        (encoded(PICTURE.resize((1001, 1000)), "PNG"), "1000 x 1001 is over 1000000 pixels"),
    ],
)
def test_refused(file: bytes, message: str) -> None:
    for call in (
        lambda: decode_image(file, upright=True, max_pixels=LIMIT),
        lambda: image_kind(file, max_pixels=LIMIT),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "JPEG"},
        {"form": "JPEG", "progressive": True},
        {"form": "PNG"},
        {"form": "WEBP"},
        {"form": "TIFF"},
    ],
)
@pytest.mark.filterwarnings(
    "ignore:.*:UserWarning"
)  # ours is set when the module is imported, and pytest sets its own
def test_cut_off_anywhere(options: dict[str, Any]) -> None:
    """JPEG, PNG, WebP and TIFF files that end too early are refused; only a PNG may lack its last
    checksum."""
    whole = encoded(PICTURE, **options)
    for length in {*range(0, len(whole) - 4, 7), *range(len(whole) - 40, len(whole) - 4)}:
        with pytest.raises(ValueError, match="not an image"):
            decode_image(whole[:length], upright=False, max_pixels=LIMIT)


def test_the_limit_is_seen_in_the_header(tmp_path: Path) -> None:
    """A bomb: a header for 40,000 x 50,000 pixels, and hardly any data."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 40_000, 8, 2, 0, 0, 0)
    bomb = bytearray(encoded(PICTURE, "PNG"))
    bomb[12:33] = chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert header_size(tmp_path / "bomb.png") == (40_000, 50_000)
    with pytest.raises(ValueError, match="40000 x 50000 is over"):
        decode_image(bytes(bomb), upright=False, max_pixels=100_000_000)
    with pytest.raises(ValueError, match="not an image"):
        header_size(tmp_path)


INDICES = RNG.integers(0, 256, (20, 30)).astype(np.uint8)
CODES = (RGB.astype(int) @ [65536, 256, 1]) + 2**24 * RGB.any(-1)


def _palette() -> Image.Image:
    image = Image.fromarray(INDICES, "P")
    image.putpalette(RNG.integers(0, 256, 768).tolist())
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
        (by_cv2(DEEP_GREY, ".png"), DEEP_GREY),
        (by_cv2(DEEP_GREY, ".tif"), DEEP_GREY),
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
        (encoded(Image.new("1", (601, 1)), "PNG"), "1 x 601 is over 600 pixels"),
    ],
)
def test_what_is_no_label_image_is_refused(file: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        decode_labels(file, max_pixels=600)
    assert "\n" not in str(raised.value)
