"""Images of any kind become RGB; other files, and those cut off, raise a ValueError."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pictures import STORED, by_cv2, encoded, tiff, tiff_pages
from PIL import Image

from mrcnn_jax.pixels.decode import (
    DEEP,
    KINDS,
    decode_image,
    decode_with_kind,
    image_kind,
    pillow_pixels,
)
from mrcnn_jax.pixels.headers import header_pages, header_size

LIMIT = 1_000_000
RNG = np.random.default_rng(0)
RGB = cv2.resize(RNG.integers(0, 256, (4, 5, 3)).astype(np.uint8), (30, 20))
PICTURE = Image.fromarray(RGB)
DEEP_RGB, DEEP_GREY = (
    RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16),
    RNG.integers(0, 65536, (20, 30)).astype(np.uint16),
)


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
            "palette with transparency (cut off)",
            np.asarray(PICTURE.convert("P").convert("RGB")),
        ),
        (
            encoded(PICTURE, "PNG", transparency=(1, 2, 3)),
            "RGB with transparency (cut off)",
            RGB,
        ),
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
        (tiff(4), KINDS["RGBX"], np.arange(96, dtype=np.uint8).reshape(4, 6, 4)[..., :3]),
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


GREY = RGB[..., 0].copy()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("pixels", "options", "expected"),
    [
        (GREY, {"photometric": 0}, 255 - GREY),
        (GREY, {"extra": ()}, GREY),
        (RGB, {"photometric": 2, "planar": 2}, RGB),
        (DEEP_GREY, {}, DEEP_GREY >> 8),
        (DEEP_RGB, {"photometric": 2}, DEEP_RGB >> 8),
        (DEEP_RGB, {"photometric": 2, "planar": 2}, DEEP_RGB >> 8),
        (DEEP_RGB, {"photometric": 2, "turn": 3}, DEEP_RGB[::-1, ::-1] >> 8),
        ((DEEP_GREY >> 1).astype(np.int16), {"sample": 2}, DEEP_GREY >> 9),
        (DEEP_GREY.astype(np.int32), {"sample": 2}, DEEP_GREY >> 8),
        (np.dstack([GREY, GREY[::-1]]), {"extra": (0,)}, GREY),
        (
            np.dstack([RGB.astype(int) * 3 // 5, np.full((20, 30), 153)]).astype(np.uint8),
            {"photometric": 2, "extra": (1,)},
            (RGB.astype(int) * 3 // 5) * 255 // 153,
        ),
        (
            np.dstack([GREY.astype(int) * 3 // 5, np.full((20, 30), 153)]).astype(np.uint8),
            {"extra": (1,)},
            (GREY.astype(int) * 3 // 5) * 255 // 153,
        ),
        (
            np.dstack([DEEP_RGB, DEEP_GREY]),
            {"photometric": 5},
            np.asarray(
                Image.frombytes(
                    "CMYK", (30, 20), (np.dstack([DEEP_RGB, DEEP_GREY]) >> 8).astype("u1").tobytes()
                ).convert("RGB")
            ),
        ),
    ],
)
def test_tiffs_of_every_layout(
    pixels: np.ndarray, options: dict[str, Any], expected: np.ndarray, compressed: bool, order: str
) -> None:
    """Both orders of bytes, planes one by one, white as zero, signed, with a second channel, inks,
    multiplied by alpha."""
    file = tiff_pages([pixels], compressed=compressed, order=order, **options)
    found = decode_image(file, upright=False, max_pixels=LIMIT)
    assert (found == expected.reshape(20, 30, -1)).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("stored", [DEEP_GREY, DEEP_RGB], ids=["grey", "colours"])
@pytest.mark.parametrize(
    ("bits", "told"),
    [
        (8, "16-bit with values of 8 bits (as they are)"),
        (10, "16-bit with values of 10 bits (scaled by 1/4)"),
        (12, "16-bit with values of 12 bits (scaled by 1/16)"),
        (14, "16-bit with values of 14 bits (scaled by 1/64)"),
        (16, DEEP),
    ],
)
def test_bits_of_a_camera_in_16_keep_their_contrast(
    bits: int, told: str, stored: np.ndarray, suffix: str
) -> None:
    """As the same picture in 8 bits."""
    pixels, kind = decode_with_kind(
        by_cv2(stored >> 16 - bits, suffix), upright=False, max_pixels=LIMIT
    )
    assert (pixels == (stored >> 8).reshape(20, 30, -1)).all()
    assert kind.converted == told


@pytest.mark.parametrize("bits", [8, 12])
def test_few_bits_of_16_that_cannot_be_read_are_refused_not_darkened(bits: int) -> None:
    colours = DEEP_RGB >> 16 - bits
    opaque = np.dstack([colours, np.full(colours.shape[:2], 65535, np.uint16)])
    for pixels, options, how in (
        (colours, {"planar": 2}, "plane by plane"),
        (opaque, {"extra": (1,)}, "multiplied by alpha"),
    ):
        file = tiff_pages([pixels], photometric=2, **options)
        with pytest.raises(ValueError, match=f"16 bits use fewer, and cannot be read {how}"):
            decode_image(file, upright=False, max_pixels=LIMIT)


def test_transparency_in_16_bits_leaves_the_colours() -> None:
    """Also of a grey file with a transparent value."""
    for stored, colour in ((DEEP_GREY, b"\0\7"), (DEEP_RGB, b"\0\7" * 3)):
        file = by_cv2(stored, ".png")
        chunk = b"tRNS" + colour
        chunk = struct.pack(">I", len(colour)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        file = file.replace(
            file[file.index(b"IDAT") - 4 :], chunk + file[file.index(b"IDAT") - 4 :]
        )
        pixels = decode_image(file, upright=False, max_pixels=LIMIT)
        assert (pixels == (stored >> 8).reshape(20, 30, -1)).all()


def test_white_may_be_zero_in_16_bits() -> None:
    file = tiff_pages([DEEP_GREY >> 4], photometric=0)
    pixels, kind = decode_with_kind(file, upright=False, max_pixels=LIMIT)
    assert (pixels[..., 0] == 255 - (DEEP_GREY >> 8)).all()
    assert kind.converted == "16-bit with values of 12 bits (scaled by 1/16)"


def test_formats_that_say_their_depth_are_taken_at_their_word() -> None:
    """A dark picture of 16 bits in a PGM is dark; 12 bits are scaled by the format."""
    for top, values in ((65535, DEEP_GREY >> 8), (4095, DEEP_GREY >> 4)):
        file = b"P5 30 20 %d\n" % top + values.astype(">u2").tobytes()
        pixels = decode_image(file, upright=False, max_pixels=LIMIT)
        assert np.abs(pixels[..., 0] - values / top * 255).max() <= 1


BLACK_FIRST = [Image.new("RGB", (8, 6), colour) for colour in ("black", "white", "red")]


@pytest.mark.parametrize("form", ["TIFF", "GIF", "WEBP", "PNG"])
def test_only_the_first_page_is_read_and_the_others_are_counted(form: str, tmp_path: Path) -> None:
    file = encoded(BLACK_FIRST[0], form, save_all=True, append_images=BLACK_FIRST[1:])
    pixels, kind = decode_with_kind(file, upright=True, max_pixels=LIMIT)
    assert (pixels.max(), kind.pages) == (0, 3)
    (tmp_path / "a").write_bytes(file)
    assert header_pages(tmp_path / "a") == 3
    single = encoded(BLACK_FIRST[0], form)
    assert image_kind(single, max_pixels=LIMIT).pages == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_phones_second_picture_and_a_broken_page_after_the_first() -> None:
    """A JPEG of a phone holds previews of itself; a page that cannot be read loses no first one."""
    phone = encoded(BLACK_FIRST[0], "MPO", save_all=True, append_images=BLACK_FIRST[1:])
    assert image_kind(phone, max_pixels=LIMIT).pages == 1
    stack = bytearray(tiff_pages([GREY, GREY]))
    stack[-4:] = struct.pack("<I", len(stack) + 1000)  # a third page that is not there
    pixels, kind = decode_with_kind(bytes(stack), upright=True, max_pixels=LIMIT)
    assert (pixels[..., 0] == GREY).all()
    assert kind.pages != 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_no_picture(form: str, tmp_path: Path) -> None:
    options = {"dpi": (72, 72)} if form == "JPEG" else {}
    file = encoded(PICTURE, form, exif=b"Exif\0\0no header of a TIFF", **options)
    pixels, kind = decode_with_kind(file, upright=True, max_pixels=LIMIT)
    whole = decode_image(encoded(PICTURE, form, **options), upright=True, max_pixels=LIMIT)
    assert (pixels == whole).all()
    assert kind.orientation == 1
    (tmp_path / "x").write_bytes(file)
    assert header_size(tmp_path / "x", upright=True) == pixels.shape[:2]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_images_of_pillow_are_taken_as_they_are(mode: str) -> None:
    """Not turned as their EXIF says: their user sees them as they are."""
    image = Image.fromarray(DEEP_GREY) if mode == "I;16" else PICTURE.convert(mode)
    image.getexif()[0x0112] = 6
    pixels, _ = pillow_pixels(image)
    expected = DEEP_GREY >> 8 if mode == "I;16" else np.asarray(image.convert("RGB"))
    assert (pixels == expected.reshape(20, 30, -1)).all()
    with pytest.raises(ValueError, match="floats"):
        pillow_pixels(Image.new("F", (3, 3)))


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
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"HEIC or AVIF \(save it as JPEG or PNG\)"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", r"HEIC or AVIF \(save it as JPEG or PNG\)"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video"),
        (b"RIFF\0\0\0\0AVI LIST", "a video"),
        (b"\x1aE\xdf\xa3" + bytes(40), "a video"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "unknown format",
        ),  # Pillow would run Ghostscript
        (tiff(5), "5 channels"),
        (tiff(7), "not an image"),
        (by_cv2(DEEP_GREY.astype(np.float32), ".tif"), "floats"),
        (tiff_pages([DEEP_GREY.astype(np.uint32) << 8]), "more than 16 bits"),
        (tiff_pages([-np.abs(GREY.astype(np.int16)) - 1], sample=2), "negative"),
        (tiff_pages([GREY.astype(np.int8) | -128], sample=2), "negative"),
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


BANDS = np.zeros((20, 30, 8), np.uint16)


@pytest.mark.parametrize(
    "file",
    [
        tiff_pages([BANDS]),
        tiff_pages([BANDS[..., :5].astype(np.uint8)], order=">"),
        tiff_pages([BANDS[..., :3].astype(np.float32)], photometric=2, sample=3),
        tiff_pages([BANDS[..., 0].astype(np.float64)], sample=3),
        tiff_pages([BANDS[..., :3]], photometric=1),
        b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1) + bytes(28),
        b"MM\0+\0\x08\0\0" + struct.pack(">QQ", 16, 1) + bytes(28),
        tiff(5),
    ],
)
def test_bands_and_values_of_other_tiffs_have_a_way_on(file: bytes) -> None:
    """By what Pillow does not know, and by the number of channels; a part of one is cut off."""
    told = (
        r"a TIFF of bands or values that are not read|5 channels) \(save three bands as RGB of "
        r"8 or 16 bits: gdal_translate -b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB\)$"
    )
    with pytest.raises(ValueError, match=f"decoded: ({told}"):
        decode_image(file, upright=True, max_pixels=LIMIT)
    for length in (4, 15, 30):
        with pytest.raises(ValueError, match=r"decoded: cut off$"):
            decode_image(file[:length], upright=True, max_pixels=LIMIT)


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


def test_opencv_writes_no_lines_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """It reads compressed integers, and has its own words for what is wrong with a file."""
    values = np.arange(48 * 64, dtype=np.int32).reshape(48, 64)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", compression="tiff_lzw")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(200):
        flipped = bytearray(buffer.getvalue())
        flipped[-rng.integers(1, 250)] ^= 1 << rng.integers(8)  # among its tags
        try:
            decode_image(bytes(flipped), upright=True, max_pixels=10**6)
        except ValueError:
            refused += 1
    assert refused > 20
    assert "grfmt_tiff" not in capfd.readouterr().err
