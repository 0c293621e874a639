"""Windows of a TIFF are those of its pixels decoded as a whole, whatever it is written like."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import tiff_pages
from PIL import Image

from mrcnn_jax.pixels.decode import decode_image, decode_with_kind
from mrcnn_jax.pixels.label_images import decode_labels
from mrcnn_jax.pixels.tiff_windows import open_windows
from mrcnn_jax.pixels.windows import Window, windows

RNG = np.random.default_rng(0)
# Smooth, so that JPEG is not at its limits, with noise.
ROWS, COLUMNS = np.mgrid[:150, :210]
RGB = np.stack([ROWS, COLUMNS, ROWS + COLUMNS], axis=2) // 2 + RNG.integers(0, 9, (150, 210, 3))
PIXELS = RGB.astype(np.uint8)


def written(
    path: Path, image: Image.Image, compression: str | None = None, **tags: object
) -> bytes:
    image.save(path, compression=compression, **tags)
    return path.read_bytes()


def tiled(
    pixels: np.ndarray,
    tile: tuple[int, int],
    order: str = "<",
    *,
    planes: bool = False,
    deflated: bool = False,
) -> bytes:
    """A TIFF in tiles, by hand: Pillow writes strips alone."""
    height, width, channels = pixels.shape
    rows, columns = (-(-side // length) for side, length in zip((height, width), tile, strict=True))
    padded = np.zeros((rows * tile[0], columns * tile[1], channels), np.uint8)
    padded[:height, :width] = pixels
    layers = [padded[..., [c]] for c in range(channels)] if planes else [padded]
    parts = [
        layer[y * tile[0] : (y + 1) * tile[0], x * tile[1] : (x + 1) * tile[1]].tobytes()
        for layer in layers
        for y in range(rows)
        for x in range(columns)
    ]
    parts = [zlib.compress(part) for part in parts] if deflated else parts
    count, places = len(parts), list(itertools.accumulate(map(len, parts), initial=8))
    body = b"".join(parts)
    after = 8 + len(body)
    lists = struct.pack(f"{order}{channels}H", *[8] * channels)
    offsets = struct.pack(f"{order}{count}L", *places[:-1])
    lengths = struct.pack(f"{order}{count}L", *map(len, parts))
    bits_at, offsets_at = after, after + len(lists)
    lengths_at = offsets_at + len(offsets)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, bits_at),
        (259, 4, 1, 8 if deflated else 1),
        (262, 4, 1, 2),
        (277, 4, 1, channels),
        (284, 4, 1, 2 if planes else 1),
        (322, 4, 1, tile[1]),
        (323, 4, 1, tile[0]),
        (324, 4, count, offsets_at),
        (325, 4, count, lengths_at),
    ]
    directory = struct.pack(f"{order}H", len(entries))
    directory += b"".join(struct.pack(f"{order}HHLL", *entry) for entry in entries) + bytes(4)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(f"{order}L", lengths_at + len(lengths))
    return magic + start + body + lists + offsets + lengths + directory


def assert_windows(path: Path, encoded: bytes) -> None:
    """Of several sizes, in another order than that of the rows too."""
    path.write_bytes(encoded)
    whole, kind = decode_with_kind(encoded, upright=True, max_pixels=10**6)
    image = open_windows(path, max_pixels=10**6)
    assert image is not None
    assert image.size == whole.shape[:2]
    assert image.kind == kind
    for tile, overlap in ((64, 10), (33, 0), (500, 0)):
        places = windows(image.size, tile, overlap)
        for window in (*places, *places[::-2]):
            expected = whole[window.y1 : window.y2, window.x1 : window.x2]
            np.testing.assert_array_equal(image.read(window), expected)


@pytest.mark.parametrize("rows", [7, 16, 150])
@pytest.mark.parametrize(
    "compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"]
)
def test_strips(tmp_path: Path, compression: str | None, rows: int) -> None:
    rows = 16 if compression == "jpeg" and rows == 7 else rows  # in multiples of 8
    encoded = written(
        tmp_path / "a.tif", Image.fromarray(PIXELS), compression, tiffinfo={278: rows}
    )
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.tag_v2[278] == rows
    assert_windows(tmp_path / "a.tif", encoded)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_kinds_of_pixels(tmp_path: Path, mode: str, compression: str | None) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    encoded = written(tmp_path / "a.tif", image, compression, tiffinfo={278: 16})
    assert_windows(tmp_path / "a.tif", encoded)


def test_a_predictor(tmp_path: Path) -> None:
    encoded = written(
        tmp_path / "a.tif", Image.fromarray(PIXELS), "tiff_lzw", tiffinfo={278: 16, 317: 2}
    )
    assert_windows(tmp_path / "a.tif", encoded)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("tile", [(32, 48), (16, 16), (80, 112)])
def test_tiles(
    tmp_path: Path, order: str, planes: bool, deflated: bool, tile: tuple[int, int]
) -> None:
    encoded = tiled(PIXELS, tile, order, planes=planes, deflated=deflated)
    whole, _ = decode_with_kind(encoded, upright=True, max_pixels=10**6)
    np.testing.assert_array_equal(whole, PIXELS)
    assert_windows(tmp_path / "a.tif", encoded)


@pytest.mark.parametrize("largest", [255, 1000, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_have_one_scale(tmp_path: Path, largest: int, channels: int) -> None:
    """That of the largest value, which only one window has."""
    values = RGB.astype(np.uint16)[..., : 3 if channels == 3 else 1]
    values[140, 205] = largest
    cv2.imwrite(str(tmp_path / "a.tif"), values, [cv2.IMWRITE_TIFF_ROWSPERSTRIP, 16])
    encoded = (tmp_path / "a.tif").read_bytes()
    whole, kind = decode_with_kind(encoded, upright=True, max_pixels=10**6)
    assert whole[140, 205, 0] >= 249
    assert kind.converted is not None
    assert "16-bit" in kind.converted
    assert_windows(tmp_path / "a.tif", encoded)


def with_nodata(encoded: bytes, text: bytes) -> bytes:
    """A little-endian TIFF with GDAL's tag."""
    start = struct.unpack_from("<L", encoded, 4)[0]
    count = struct.unpack_from("<H", encoded, start)[0]
    entries = encoded[start + 2 : start + 2 + 12 * count]
    place = len(encoded) + 2 + 12 * count + 12 + 4
    entries += struct.pack("<HHLL", 42113, 2, len(text), place)
    directory = struct.pack("<H", count + 1) + entries + bytes(4) + text
    return encoded[:4] + struct.pack("<L", len(encoded)) + encoded[8:] + directory


@pytest.mark.parametrize("compression", [1, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_nodata_leaves_the_scale(tmp_path: Path, channels: int, compression: int) -> None:
    """The other pixels are those of the picture without it; it is black."""
    path, whole = tmp_path / "a.tif", {}
    values = PIXELS.astype(np.uint16)[..., :channels] << 4
    options = [cv2.IMWRITE_TIFF_ROWSPERSTRIP, 16, cv2.IMWRITE_TIFF_COMPRESSION, compression]
    for absent in (0, 65535):
        values[40:60] = absent
        cv2.imwrite(str(path), values, options)
        encoded = with_nodata(path.read_bytes(), b"65535\0")
        whole[absent], kind = decode_with_kind(encoded, upright=True, max_pixels=10**6)
        told = "16-bit with values of 12 bits (scaled by 1/16), nodata (65535) as black"
        assert str(kind.converted).startswith(told)
        assert_windows(path, encoded)
    np.testing.assert_array_equal(whole[65535], whole[0])
    assert whole[0].max() > 50


def test_nodata_hides_no_few_bits_that_cannot_be_read() -> None:
    for values, few in ((PIXELS.astype(np.uint16) << 4, True), (0 * RGB.astype(np.uint16), False)):
        values[40 if few else 0 :] = 65535
        file = with_nodata(tiff_pages([values], photometric=2, planar=2), b"65535\0")
        told = pytest.raises(ValueError, match="use fewer, and cannot be read plane by plane")
        with told if few else contextlib.nullcontext():
            decode_image(file, upright=True, max_pixels=10**6)


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_grey_values_and_floats(tmp_path: Path, bits: int) -> None:
    """Uncompressed, written by Pillow."""
    grey = (PIXELS[..., 0].astype(np.uint16) << bits - 8) + 1
    encoded = written(tmp_path / "a.tif", Image.fromarray(grey), None, tiffinfo={278: 16})
    assert_windows(tmp_path / "a.tif", encoded)
    floats = Image.fromarray(PIXELS[..., 0].astype(np.float32))
    written(tmp_path / "b.tif", floats)
    assert open_windows(tmp_path / "b.tif", max_pixels=10**6) is None  # decoding it says why


def test_big_tiff_and_pages(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    encoded = written(tmp_path / "a.tif", image, "tiff_lzw", big_tiff=True, tiffinfo={278: 16})
    assert_windows(tmp_path / "a.tif", encoded)
    encoded = written(tmp_path / "b.tif", image, save_all=True, append_images=[image.rotate(90)])
    assert_windows(tmp_path / "b.tif", encoded)


def test_what_only_decoding_as_a_whole_reads(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    written(tmp_path / "turned.tif", image, tiffinfo={274: 6})
    written(tmp_path / "deep.tif", Image.fromarray(PIXELS[..., 0].astype(np.int32)))
    image.save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(b"II*\0nothing")
    for name in ("turned.tif", "deep.tif", "a.png", "b.tif", "missing.tif"):
        assert open_windows(tmp_path / name, max_pixels=10**6) is None


def changed(encoded: bytes, tags: Mapping[int, int], entry: int = -1) -> bytes:
    """A little-endian TIFF with another value in an entry of the lists of some tags."""
    file = bytearray(encoded)
    start = struct.unpack_from("<L", file, 4)[0]
    for number in range(struct.unpack_from("<H", file, start)[0]):
        place = start + 2 + 12 * number
        tag, kind, count = struct.unpack_from("<HHL", file, place)
        if tag in tags:
            size = {3: 2, 4: 4}[kind]
            held = place + 8 if count * size <= 4 else struct.unpack_from("<L", file, place + 8)[0]
            struct.pack_into(
                "<H" if size == 2 else "<L", file, held + entry % count * size, tags[tag]
            )
    return bytes(file)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize(
    ("kind", "tags"),
    [("tiles", {324: 0, 325: 0}), ("tiles", {325: 0}), ("strips", {273: 0, 279: 0})],
)
def test_parts_without_data_are_refused(
    tmp_path: Path, kind: str, tags: Mapping[int, int], deflated: bool
) -> None:
    """A sparse file of GDAL: decoders give the pixels of other places."""
    path = tmp_path / "a.tif"
    if kind == "tiles":
        whole = tiled(PIXELS, (32, 48), deflated=deflated)
    else:
        compression = "tiff_adobe_deflate" if deflated else None
        whole = written(path, Image.fromarray(PIXELS), compression, tiffinfo={278: 16})
    for entry in (0, -1):
        path.write_bytes(changed(whole, tags, entry))
        for read in (
            lambda: open_windows(path, max_pixels=10**6),
            lambda: decode_image(path.read_bytes(), upright=True, max_pixels=10**6),
            lambda: decode_labels(path.read_bytes(), max_pixels=10**6),
        ):
            told = rf"decoded: {kind} without data \(sparse\): write it with gdal_translate "
            with pytest.raises(ValueError, match=told + "-co SPARSE_OK=FALSE$"):
                read()


def test_a_single_strip_may_lack_its_length(tmp_path: Path) -> None:
    encoded = written(tmp_path / "a.tif", Image.fromarray(PIXELS), tiffinfo={278: 150})
    assert_windows(tmp_path / "a.tif", changed(encoded, {279: 0}))


def test_damage_and_limits_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    encoded = written(path, Image.fromarray(PIXELS), "tiff_adobe_deflate", tiffinfo={278: 150})
    with pytest.raises(ValueError, match=r"its strips are too large: 150 x 210 .* smaller strips$"):
        open_windows(path, max_pixels=150 * 210 - 1)
    raw = written(path, Image.fromarray(PIXELS))
    image = open_windows(path, max_pixels=40 * 210)
    assert image is not None
    with pytest.raises(ValueError, match="50 x 210 would have to be decoded at once"):
        image.read(Window(0, 0, 50, 10))
    np.testing.assert_array_equal(image.read(Window(0, 0, 40, 10)), PIXELS[:40, :10])
    path.write_bytes(raw[: len(raw) // 2])
    image = open_windows(path, max_pixels=10**6)
    if image is not None:  # its tags were before the cut
        with pytest.raises(ValueError, match="cut off"):
            image.read(Window(140, 0, 150, 10))
    assert len(encoded) < len(raw)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_flipped_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """Mostly in the tags: whatever they say, no other exception, and windows of their size."""
    path, rng = tmp_path / "a.tif", np.random.default_rng(0)
    image = Image.fromarray(PIXELS)
    files = [written(path, image, "tiff_lzw", tiffinfo={278: 16}), tiled(PIXELS, (32, 48))]
    read, refused = 0, []
    for number in range(400):
        flipped = bytearray(files[number % 2])
        start = int.from_bytes(flipped[4:8], "little")
        for place in rng.integers(start, min(start + 160, len(flipped)), 2).tolist():
            flipped[place] = rng.choice([0, 1, 127, 255, rng.integers(256)])
        path.write_bytes(flipped)
        try:
            windows_of = open_windows(path, max_pixels=10**6)
            if windows_of is not None:
                height, width = windows_of.size
                last = Window(max(height - 9, 0), max(width - 9, 0), height, width)
                assert windows_of.read(last).shape == (*last.size, 3)
                read += 1
        except ValueError as error:
            refused.append(str(error))
    assert read > 50
    assert len(refused) > 5
    assert not any("\n" in line for line in refused)


def test_memory_is_that_of_a_band(tmp_path: Path) -> None:
    """Of a picture of 108 MB in a sparse file."""
    side, path = 6000, tmp_path / "large.tif"
    tags = {256: side, 257: side, 259: 1, 262: 2, 277: 3, 278: side, 273: 8, 279: 3 * side * side}
    end = 8 + 3 * side * side
    directory = struct.pack("<H", len(tags) + 1)
    for tag, value in sorted({**tags, 258: 0}.items()):
        kind, count = (3, 3) if tag == 258 else (4, 1)
        place = end + 2 + 12 * (len(tags) + 1) + 4 if tag == 258 else value
        directory += struct.pack("<HHLL", tag, kind, count, place)
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<L", end))
        file.seek(8 + 3 * (3000 * side + 3000))
        file.write(bytes([255, 0, 0]))
        file.seek(end)
        file.write(directory + bytes(4) + struct.pack("<3H", 8, 8, 8))
    tracemalloc.start()
    try:
        image = open_windows(path, max_pixels=10**7)
        assert image is not None
        total = sum(int(image.read(window).sum()) for window in windows(image.size, 512, 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 255
    assert peak < 60e6
