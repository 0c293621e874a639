"""A data set cut into tiles has the pixels and masks of the data set, tile by tile."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert import cut_tiles
from mrcnn_jax.convert.cut_tiles import cut
from mrcnn_jax.convert.tile_data import Tile
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.pixels.windows import windows

SIZE = (100, 150)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)


def disc(y: int, x: int, radius: int) -> np.ndarray:
    return cv2.circle(np.zeros(SIZE, np.uint8), (x, y), radius, 1, cv2.FILLED)


def annotation(
    number: int, mask: np.ndarray, image: int = 7, category: int = 3, **fields: Any
) -> dict[str, Any]:
    rle = rle_ops.encode(np.asfortranarray(mask))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": rle_ops.toBbox(rle).tolist(),
        "area": float(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
        **fields,
    }


def written(
    folder: Path, annotations: list[dict[str, Any]], images: dict[int, str] | None = None
) -> Tile:
    """A data set of images of SIZE, and the options of cutting it into tiles of 64, overlap 14."""
    images = images or {7: "sub/a.png"}
    for name in images.values():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(folder / "images" / name)
    content = {
        "images": [
            {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
            for number, name in images.items()
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cell"}, {"id": 8, "name": "bar"}],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return Tile(
        annotations=folder / "all.json",
        images=folder / "images",
        out=folder / "out",
        tile=64,
        overlap=14,
        least_share=0.0,
    )


def read(options: Tile) -> dict[str, Any]:
    """The result; the loader takes it."""
    path = options.out / "annotations.json"
    read_coco(path, options.out / "images", DataConfig())
    return json.loads(path.read_text())


def test_tiles_have_the_pixels_and_masks_of_their_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = {1: disc(50, 50, 30), 2: disc(20, 120, 10), 3: disc(80, 75, 9)}
    polygon = [90.0, 60.0, 140.0, 60.0, 140.0, 90.0, 90.0, 90.0]
    masks[4] = np.zeros(SIZE, np.uint8)
    masks[4][60:90, 90:140] = 1
    annotations = [annotation(n, masks[n], category=8 if n == 2 else 3) for n in (1, 2, 3)]
    annotations.append(annotation(4, masks[4], segmentation=[polygon]))
    options = written(tmp_path, annotations)
    cut(options)
    content = read(options)
    places = windows(SIZE, 64, 14)
    names = {f"sub/a/{w.y1:05d}_{w.x1:05d}.png": w for w in places}
    assert {image["file_name"] for image in content["images"]} == set(names)
    for image in content["images"]:
        w = names[image["file_name"]]
        pixels = cv2.imread(str(options.out / "images" / image["file_name"]))[..., ::-1]
        np.testing.assert_array_equal(pixels, PIXELS[w.y1 : w.y2, w.x1 : w.x2])
        assert (image["height"], image["width"]) == w.size
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        parts = {n: mask[w.y1 : w.y2, w.x1 : w.x2] for n, mask in masks.items()}
        parts = {n: part for n, part in parts.items() if part.any()}
        assert len(found) == len(parts)
        for entry, (n, part) in zip(found, parts.items(), strict=True):
            np.testing.assert_array_equal(rle_ops.decode(entry["segmentation"]), part)
            assert entry["category_id"] == (8 if n == 2 else 3)
            assert entry["area"] == part.sum()
            rows, columns = (np.flatnonzero(part.any(axis=axis)) for axis in (1, 0))
            x, y = columns[0], rows[0]
            assert entry["bbox"] == [x, y, columns[-1] + 1 - x, rows[-1] + 1 - y]
            assert entry["iscrowd"] == 0
    assert content["categories"] == [{"id": 3, "name": "cell"}, {"id": 8, "name": "bar"}]
    ids = [entry["id"] for entry in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    told = capsys.readouterr().out
    whole = sum(
        mask.sum() == mask[w.y1 : w.y2, w.x1 : w.x2].sum()
        for mask in masks.values()
        for w in places
    )
    assert f"clipped {len(ids) - whole}: objects that a border of a tile cuts" in told
    assert f"1 images: 6 tiles in {options.out}; to check:\n" in told
    assert f"--annotations {options.out / 'annotations.json'}" in told


@pytest.mark.parametrize("small_parts", ["crowd", "drop"])
def test_small_parts_are_crowds_or_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_parts: Any
) -> None:
    """The tile at column 50 has less than a quarter of a disc."""
    mask = disc(32, 45, 10)
    share = mask[:64, 50:].sum() / mask.sum()
    assert 0.2 < share < 0.25
    options = written(tmp_path, [annotation(1, mask), annotation(2, disc(30, 90, 5))])
    cut(replace(options, least_share=0.25, small_parts=small_parts))
    content = read(options)
    name = "sub/a/00000_00050.png"
    [image] = [image for image in content["images"] if image["file_name"] == name]
    found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    crowds = [a["area"] for a in found if a["iscrowd"]]
    assert crowds == ([mask[:64, 50:].sum()] if small_parts == "crowd" else [])
    assert [a["area"] for a in found if not a["iscrowd"]] == [disc(30, 90, 5).sum()]
    told = capsys.readouterr().out
    what = "made crowds there" if small_parts == "crowd" else "dropped there"
    assert f"objects of which less than 25% lies in a tile: {what}" in told


def test_empty_tiles_boxes_and_crowds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Boxes without a mask are clipped; crowds stay crowds, and alone are no object."""
    box = {"bbox": [40.0, 10.0, 20.0, 10.0], "area": 200.0}
    crowd = annotation(2, disc(85, 140, 12), iscrowd=1)
    boxed = annotation(1, disc(20, 20, 3), **box)
    del boxed["segmentation"]
    options = written(tmp_path, [boxed, crowd])
    cut(options)
    content = read(options)
    assert [i["file_name"] for i in content["images"]] == [
        "sub/a/00000_00000.png",
        "sub/a/00000_00050.png",
    ]
    assert [a["bbox"] for a in content["annotations"]] == [
        [40.0, 10.0, 20.0, 10.0],
        [0.0, 10.0, 10.0, 10.0],
    ]
    assert [a["area"] for a in content["annotations"]] == [200.0, 100.0]
    assert "left out 4: tiles without an object (see --keep-empty)" in capsys.readouterr().out
    cut(replace(options, out=tmp_path / "more", keep_empty=True))
    content = read(replace(options, out=tmp_path / "more"))
    assert len(content["images"]) == 6
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 0, 1]


def test_turned_small_and_like_named_images(tmp_path: Path) -> None:
    """EXIF is followed as in training; files of one name have a folder each."""
    options = written(
        tmp_path,
        [annotation(n, disc(50, 75, 40), image=n) for n in range(1, 7)],
        {1: "a.png", 2: "a.tif", 3: "b.png", 4: "c.tif.png", 5: "c.png", 6: "c.tif"},
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).rotate(90, expand=True).save(tmp_path / "images" / "b.png", exif=exif)
    cut(replace(options, tile=200))
    content = read(options)
    assert [i["file_name"] for i in content["images"]] == [
        "a/00000_00000.png",
        "a.tif/00000_00000.png",
        "b/00000_00000.png",
        "c.tif/00000_00000.png",
        "c/00000_00000.png",
        "c.tif_2/00000_00000.png",
    ]
    for image in content["images"]:
        pixels = cv2.imread(str(options.out / "images" / image["file_name"]), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(pixels[..., ::-1], PIXELS)


def test_huge_images_are_read_by_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16,000 x 16,000 pixels, more than data.max_pixels may be; a PNG of that size is refused."""
    side, path = 16_000, tmp_path / "images" / "large.tif"
    options = written(tmp_path, [], {7: "large.tif"})
    mask = {"size": [side, side], "counts": [side * 9500 + 9500, 50, side * side]}
    mask["counts"][-1] -= sum(mask["counts"][:2])
    content = json.loads(options.annotations.read_text())
    content["images"][0] |= {"height": side, "width": side}
    box = {"bbox": [9500, 9500, 1, 50], "area": 50, "iscrowd": 0, "segmentation": mask}
    content["annotations"] = [{"id": 1, "image_id": 7, "category_id": 3, **box}]
    options.annotations.write_text(json.dumps(content))
    entries = [
        (256, side),
        (257, side),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 512),
        (277, 1),
        (278, side),
        (279, side * side),
    ]
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<LH", 8, len(entries)))
        file.write(b"".join(struct.pack("<HHLL", tag, 4, 1, v) for tag, v in entries) + bytes(4))
        for y in range(9500, 9550):
            file.seek(512 + y * side + 9500)
            file.write(bytes([200]))
        file.truncate(512 + side * side)
    cut(replace(options, tile=1024, overlap=128))
    content = read(options)
    [image] = content["images"]
    assert image["file_name"] == "large/08960_08960.png"
    pixels = cv2.imread(str(options.out / "images" / image["file_name"]), cv2.IMREAD_UNCHANGED)
    [entry] = content["annotations"]
    assert entry["bbox"] == [540, 540, 1, 50]
    np.testing.assert_array_equal(
        pixels == 200, rle_ops.decode(entry["segmentation"])[..., None].repeat(3, axis=2)
    )
    monkeypatch.setattr(cut_tiles, "open_windows", lambda *_, **__: None)
    with pytest.raises(
        ConfigError, match=r"large\.tif: 16000 x 16000 is over .* TIFF of 8 or 16 bits"
    ):
        cut(replace(options, out=tmp_path / "other"))


def test_the_conversion_of_a_large_image_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = written(tmp_path, [annotation(1, disc(50, 50, 9))], {7: "large.tif"})
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 9).save(tmp_path / "images" / "large.tif")
    monkeypatch.setattr(cut_tiles, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    cut(options)
    assert (
        "images that are 16-bit with values of 12 bits (scaled by 1/16): converted to 8-bit RGB (7)"
        in (capsys.readouterr().out)
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tile": 8}, "tile: 8"),
        ({"overlap": 64}, "overlap: 64"),
        ({"least_share": 1.5}, "--least-share: 1.5 is not a share"),
        ({"out": Path("taken")}, "--out: .*taken: is there already"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    options = written(tmp_path, [annotation(1, disc(50, 50, 9))])
    (tmp_path / "taken").touch()
    change = {name: tmp_path / v if isinstance(v, Path) else v for name, v in change.items()}
    with pytest.raises(ConfigError, match=told):
        cut(replace(options, **change))
    assert not (tmp_path / "out").exists()


def test_depth_maps_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = written(tmp_path, [annotation(1, disc(50, 50, 9))])
    content = json.loads(options.annotations.read_text())
    content["images"][0]["depth_file"] = "a_depth.png"
    options.annotations.write_text(json.dumps(content))
    cut(options)
    assert "left out 1: depth maps: they are not cut (7)" in capsys.readouterr().out


def test_repeated_keys_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = written(tmp_path, [annotation(1, disc(50, 50, 9))])
    text = options.annotations.read_text()
    options.annotations.write_text(text.replace('"iscrowd": 0', '"iscrowd": 1, "iscrowd": 0'))
    cut(options)
    assert "dropped 1: values of a JSON object whose key is there again" in capsys.readouterr().out


@pytest.mark.parametrize("there", [False, True])
def test_a_call_that_was_killed_is_no_obstacle(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders as they are at the second image and at each rename, at which another call fails:
    until the end there is nothing in the new one."""
    images = {7: "a.png", 9: "b.png"}
    masks = [annotation(n, disc(50, 50, 30), image=n) for n in images]
    options = written(tmp_path / "data", masks, images)
    options = replace(options, out=tmp_path / "new" / "tiles")
    if there:
        options.out.mkdir(parents=True)
    moments = []

    def keep(*_: Any) -> None:
        moments.append(tmp_path / f"killed{len(moments)}")
        shutil.copytree(options.out.parent, moments[-1])

    def watched(function: Any, moment: Callable[..., bool]) -> Any:
        def call(*arguments: Any) -> Any:
            if moment(*arguments):
                keep()
            return function(*arguments)

        return call

    def of_new(_: Path, target: Path) -> bool:
        return Path(target).is_relative_to(options.out.parent)

    reader = watched(cut_tiles._reader, lambda path, *_: path.name == "b.png")
    with monkeypatch.context() as patch:
        patch.setattr(cut_tiles, "_reader", reader)
        for name in ("rename", "replace"):
            patch.setattr(Path, name, watched(getattr(Path, name), of_new))
        cut(options)
    assert len(read(options)["images"]) == 8
    assert len(moments) >= 2
    for folder in moments:
        assert list((folder / "tiles").glob("*")) == []
        assert len(list(folder.glob(".*"))) == 1
        again = replace(options, out=folder / "tiles")
        cut(again)
        assert [path.name for path in folder.iterdir()] == ["tiles"]
        assert {path.name for path in again.out.iterdir()} == {"annotations.json", "images"}
        assert len(read(again)["images"]) == 8


def test_an_error_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = written(tmp_path, [annotation(1, disc(50, 50, 9))])

    def fails(*_: Any) -> Any:
        raise ConfigError("a.png: cannot be decoded after all")

    monkeypatch.setattr(cut_tiles, "_reader", fails)
    before = sorted(tmp_path.iterdir())
    for out in ("out", "new/out"):
        with pytest.raises(ConfigError, match="after all"):
            cut(replace(options, out=tmp_path / out))
        assert sorted(tmp_path.iterdir()) == before


def test_links_and_disks_as_new_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = written(tmp_path, [annotation(1, disc(50, 50, 9))])
    (tmp_path / "empty").mkdir()
    options.out.symlink_to(tmp_path / "empty")
    cut(options)
    assert options.out.is_symlink()
    assert read(options)["images"]
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    monkeypatch.chdir("here")
    with pytest.raises(ConfigError, match=r"--out: /proc: is there already"):
        cut(replace(options, out=Path("/proc")))
    with pytest.raises(ConfigError, match=r"--out: .: cannot be replaced \(name a new folder"):
        cut(replace(options, out=Path()))
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == disk)
    with pytest.raises(ConfigError, match=r"--out: .*disk: cannot be replaced"):
        cut(replace(options, out=disk))
