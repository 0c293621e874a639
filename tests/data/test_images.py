"""Image files: every accident with its outcome, and the cache. (Annotations: test_reading.py.)"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import STORED, encoded, tiff, tiff_pages
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data import cache as caches
from mrcnn_jax.data import images
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason
from mrcnn_jax.pixels.decode import decode_image

DATA = DataConfig(max_pixels=100_000)
OWN = {Reason.CATEGORY_IDS, Reason.RUN_LIST}  # what mixed_content has by itself
WriteJson = Callable[[Any], Path]


def check(
    path: Path, *, data: DataConfig = DATA, lost_images: bool = True, keep_empty: bool = True
) -> CocoDataset:
    root = path.parent
    read = read_coco(path, root / "images", data, lost_images=lost_images)
    dataset, _ = check_split(read, cache=root / "cache", data=data, keep_empty=keep_empty)
    if not lost_images:
        dataset.refuse_lost_images()
    return dataset


def found(dataset: CocoDataset) -> dict[str, tuple[int, list]]:
    return {
        text: (f.count, f.first_ids)
        for (reason, text), f in dataset.report.findings.items()
        if reason not in OWN
    }


# -- lost: listed together, refused above 1 % ------------------------------------------------------

BROKEN = {
    "photo 0.png": (b"", "unknown format"),
    "photo 1.png": (b"<!DOCTYPE html><html>404</html>", "unknown format"),
    "photo 2.png": (encoded(Image.new("RGB", (64, 64)), "JPEG")[:-60], "truncated"),
    "photo 3.png": (tiff(5, 50, 96), "5 channels"),
    "photo 4.png": (b"\x89PNG\r\n\x1a\n", "decoded"),
}


def test_images_that_cannot_be_decoded_are_dropped_and_listed_together(mixed_file: Path) -> None:
    folder = mixed_file.parent / "images"
    for name, (content, _) in BROKEN.items():
        (folder / name).write_bytes(content)
    (folder / "photo 5.png").unlink()
    for _ in range(2):  # from the images, then from the cache
        dataset = check(mixed_file)
        assert [image.id for image in dataset.images] == [17]
        assert found(dataset) == {
            Reason.MISSING.text: (1, [16]),
            Reason.UNDECODABLE.text: (5, [11, 12, 13, 14, 15]),
            Reason.OF_DROPPED_IMAGE.text: (1, [4]),
        }
        assert dataset.report.kept == {"images": 1, "objects": 0, "crowds": 0}
        with pytest.raises(
            ConfigError, match=r"6 of 7 images are lost \(at most 1 % may be\): "
        ) as caught:
            dataset.refuse_lost_images()
        assert "\n" not in str(caught.value)
        for name, (_, reason) in BROKEN.items():
            assert any(text.startswith(f"{name} (") and reason in text for text in dataset.lost)
        assert "'photo 5.png' (images whose file is missing)" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"1 of 7 images are lost"
    ):  # before any image is read: one is missing already
        check(mixed_file, lost_images=False)


def test_more_than_one_in_a_hundred_is_refused(mixed_file: Path) -> None:
    (mixed_file.parent / "images" / "photo 6.png").write_bytes(b"")
    with pytest.raises(
        ConfigError,
        match=r"1 of 7 images are lost \(at most 1 % may be\): photo 6.png \(not an image .*\)$",
    ):
        check(mixed_file, lost_images=False)


def test_no_usable_image_is_left(
    mixed_file: Path, mixed_content: dict[str, Any], write_json: WriteJson
) -> None:
    for image in mixed_content["images"]:
        (mixed_file.parent / "images" / image["file_name"]).write_bytes(b"")
    with pytest.raises(
        ConfigError, match="no usable image is left: dropped 7: images that cannot be decoded"
    ):
        check(mixed_file)
    with pytest.raises(
        ConfigError,
        match=r"no usable image is left: left out 7: images without objects \(data.keep_empty",
    ):
        check(write_json({**mixed_content, "annotations": []}), keep_empty=False)


# -- refused ---------------------------------------------------------------------------------------


def test_another_size_than_annotated(
    mixed_content: dict[str, Any], write_json: WriteJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in the header if neither way fits; after decoding if only a turn fits that EXIF does not
    ask for."""
    image = mixed_content["images"][-1]
    image["height"] = 61
    path = write_json(mixed_content)
    with monkeypatch.context() as patch:
        patch.setattr(images, "image_kind", _refuse)
        with pytest.raises(
            ConfigError,
            match=r"1 images have another size .*: 11 \(photo 0.png\) is 60 x 80, .* as 61 x 80",
        ):
            check(path)
    image |= {"height": 80, "width": 60}
    for annotation in mixed_content["annotations"][:2]:
        annotation |= {"segmentation": None}
    with pytest.raises(
        ConfigError,
        match=r"1 images have another size .*: 11 \(photo 0.png\) is 60 x 80, annotated as 80 x 60",
    ):
        check(write_json(mixed_content))


def test_an_image_over_the_limit_is_not_decoded(
    mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (400, 400)).save(mixed_file.parent / "images" / "photo 3.png")
    monkeypatch.setattr(images, "image_kind", _refuse)
    with pytest.raises(
        ConfigError,
        match=r"image 14: photo 3.png: 400 x 400 is over 100000 pixels \(data.max_pixels\)",
    ):
        check(mixed_file)


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("decoded")


# -- repaired --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_images_that_are_not_rgb_are_counted(mixed_file: Path, mode: str) -> None:
    picture = Image.new(mode, (80, 60))
    picture.save(mixed_file.parent / "images" / "photo 0.png")
    dataset = check(mixed_file)
    ((text, finding),) = found(dataset).items()
    assert text.startswith("images that are ")
    assert text.endswith(": converted to 8-bit RGB")
    assert finding == (1, [11])


def test_pages_and_bits_are_told_also_from_the_cache(mixed_file: Path) -> None:
    folder = mixed_file.parent / "images"
    pages = [np.full((60, 80), value, np.uint8) for value in (0, 200, 255)]
    (folder / "photo 0.png").write_bytes(tiff_pages(pages))
    (folder / "photo 5.png").write_bytes(tiff_pages([np.full((60, 80), 4000, np.uint16)]))
    for _ in range(2):
        told = found(check(mixed_file))
        assert told[Reason.PAGES.text.format(pages=3)] == (1, [11])
        kind = "16-bit with values of 12 bits (scaled by 1/16)"
        assert told[Reason.CONVERTED.text.format(kind=kind)] == (1, [16])


def _oriented(picture: np.ndarray, orientation: int, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](picture))).save(path, "PNG", exif=exif)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_all_orientations_give_one_picture_and_aligned_masks(
    mixed_file: Path, mixed_content: dict[str, Any], orientation: int
) -> None:
    """The annotated object is white on black, and stays under its mask and its box."""
    mask = rle_ops.decode(
        {"size": [60, 80], "counts": mixed_content["annotations"][0]["segmentation"]["counts"]}
    )
    path = mixed_file.parent / "images" / "photo 0.png"
    _oriented(np.repeat(255 * mask[..., None], 3, axis=2), orientation, path)
    dataset = check(mixed_file)
    image = dataset.images[0]
    pixels = decode_image(path.read_bytes(), upright=image.upright, max_pixels=DATA.max_pixels)
    assert (pixels[..., 0] == 255 * rle_ops.decode(image.annotations[0].rle)).all()
    expected = (
        {}
        if orientation == 1
        else {(Reason.TURNED if orientation > 4 else Reason.TURNED_BY_VOTE).text: (1, [11])}
    )
    assert found(dataset) == expected


def test_stored_pixels_are_kept_where_they_are_what_is_annotated(mixed_file: Path) -> None:
    """Orientation 6 with the stored size: this file annotates stored pixels, so a half turn is
    ignored."""
    folder = mixed_file.parent / "images"
    pictures = {
        n: np.random.default_rng(n).integers(0, 256, size, np.uint8)
        for n, size in ((0, (60, 80, 3)), (1, (80, 60, 3)), (2, (64, 64, 3)))
    }
    for number, orientation in ((0, 6), (1, 3), (2, 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pictures[number]).save(folder / f"photo {number}.png", exif=exif)
    dataset = check(mixed_file)
    assert found(dataset) == {
        Reason.NOT_TURNED.text: (1, [11]),
        Reason.NOT_TURNED_BY_VOTE.text: (2, [12, 13]),
    }
    for number, picture in pictures.items():
        image = dataset.images[number]
        assert (
            decode_image(
                (folder / image.file_name).read_bytes(),
                upright=image.upright,
                max_pixels=DATA.max_pixels,
            )
            == picture
        ).all()


def test_a_majority_decides_what_sizes_do_not_tell(mixed_file: Path) -> None:
    """Two images annotated as seen, one as stored: an image that fits either way is turned."""
    folder = mixed_file.parent / "images"
    picture = np.zeros((60, 80, 3), np.uint8)
    _oriented(picture, 6, folder / "photo 0.png")
    _oriented(picture, 8, folder / "photo 5.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 80)).save(folder / "photo 1.png", exif=exif)
    _oriented(np.zeros((64, 64, 3), np.uint8), 3, folder / "photo 2.png")
    assert found(check(mixed_file)) == {
        Reason.TURNED.text: (2, [11, 16]),
        Reason.NOT_TURNED.text: (1, [12]),
        Reason.TURNED_BY_VOTE.text: (1, [13]),
    }


# -- the cache -------------------------------------------------------------------------------------


def test_decoded_once_and_anew_when_anything_changed(
    mixed_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = mixed_file.parent / "cache"
    first = check(mixed_file)
    (folder,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(images, "image_kind", _refuse)
        patch.setattr(images, "header_size", _refuse)
        assert check(mixed_file) == first
        os.utime(mixed_file.parent / "images" / "photo 2.png", (1, 1))
        with pytest.raises(AssertionError, match="decoded"):
            check(mixed_file)
        assert list(cache.iterdir()) == [folder]
    check(mixed_file)
    mixed_file.write_text(mixed_file.read_text() + "\n")
    check(mixed_file)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"11": 3}', '{"11": [60, 80, 1, null]}'])
def test_a_damaged_cache_is_no_result(mixed_file: Path, content: str) -> None:
    first = check(mixed_file)
    (folder,) = (mixed_file.parent / "cache").iterdir()
    (folder / images.FILE).write_text(content)
    assert check(mixed_file) == first


def test_a_flipped_bit_turns_no_image(mixed_file: Path) -> None:
    """The orientation that EXIF gives is a digit of the file, and so is the size."""
    first = check(mixed_file)
    (folder,) = (mixed_file.parent / "cache").iterdir()
    path = folder / images.FILE
    whole = path.read_bytes()
    for place in range(whole.index(b"found"), len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        assert images._kept_kinds(path) == {}
    assert check(mixed_file) == first
    assert path.read_bytes() == whole


def test_what_failed_is_tried_again(mixed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was away for a moment loses no image for good; only its images are read again."""
    path = mixed_file.parent / "images" / "photo 2.png"

    def away(file: Path) -> bytes:
        if file == path:
            raise OSError("Input/output error")
        return file.open("rb").read()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", away)
        dataset = check(mixed_file)
    assert dataset.lost == ("photo 2.png (Input/output error)",)
    decoded = []
    original = images.image_kind
    monkeypatch.setattr(
        images,
        "image_kind",
        lambda encoded, **limits: decoded.append(encoded) or original(encoded, **limits),
    )
    assert check(mixed_file).lost == ()
    assert decoded == [path.read_bytes()]


def test_nothing_new_is_not_written(mixed_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As into a cache that others made, of a data set with an image that cannot be decoded."""
    (mixed_file.parent / "images" / "photo 2.png").write_bytes(b"broken")
    first = check(mixed_file)
    monkeypatch.setattr(images, "keep", lambda *_: pytest.fail("written"))
    assert check(mixed_file).lost == first.lost != ()


def test_a_long_name_has_a_folder_in_the_cache(mixed_file: Path) -> None:
    long = mixed_file.rename(mixed_file.with_name(f"{'层' * 80}.json"))
    assert check(long).lost == ()


def test_a_cache_that_cannot_be_written_to(mixed_file: Path) -> None:
    (mixed_file.parent / "cache").write_text("")
    with pytest.raises(ConfigError, match=r"cache/instances-.*: Not a directory"):
        check(mixed_file)


def test_every_image_counts_in_progress(
    mixed_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        caches,
        "tqdm",
        lambda results, **options: (print(options["desc"], options["total"]), results)[1],
    )
    check(mixed_file)
    assert capsys.readouterr().out.splitlines() == ["reading headers 7", "checking images 7"]
