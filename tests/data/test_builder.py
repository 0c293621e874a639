from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrcnn_jax.config import ConfigError
from mrcnn_jax.data import builder
from mrcnn_jax.data.coco import CocoDataset, read_coco


@pytest.fixture
def dataset(mixed_file: Path) -> CocoDataset:
    return read_coco(mixed_file, mixed_file.parent / "images")


def test_records_hold_the_data_set(dataset: CocoDataset, tmp_path: Path) -> None:
    built = builder.build(dataset, tmp_path / "cache")
    assert len(built.source) == len(dataset.images) == 7
    assert built.dataset.images == dataset.images
    for index in (3, 0, 6, 1, 2, 5, 4):  # at random
        image, record = dataset.images[index], built.source[index]
        assert record["image"] == (dataset.images_dir / image.file_name).read_bytes()
        assert (record["image_id"], record["file_name"].decode()) == (image.id, image.file_name)
        objects = record["objects"]
        assert [int(i) for i in objects["annotation_id"]] == [o.annotation_id for o in image.objects]
        assert [int(i) for i in objects["label"]] == [o.label for o in image.objects]
        assert [bool(i) for i in objects["iscrowd"]] == [o.iscrowd for o in image.objects]
        assert [tuple(b.tolist()) for b in objects["box"]] == [tuple(np.float32(o.box).tolist()) for o in image.objects]
        assert [c.decode() for c in objects["counts"]] == [o.rle["counts"] if o.rle else "" for o in image.objects]
    assert "tensorflow" not in sys.modules


def _refuse(*_: Any) -> None:
    raise RuntimeError("decoded")


def test_built_once_and_anew_when_anything_changed(dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    builder.build(dataset, cache)
    (folder,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(builder, "decode_image", _refuse)
        builder.build(dataset, cache)
        os.utime(dataset.images_dir / "photo 2.png", (1, 1))
        with pytest.raises(RuntimeError, match="decoded"):
            builder.build(dataset, cache)
        assert list(cache.iterdir()) == [folder], "a build that fails leaves nothing behind"
    builder.build(dataset, cache)
    dataset.annotations_path.write_text(dataset.annotations_path.read_text() + "\n")
    builder.build(dataset, cache)
    assert len(list(cache.iterdir())) == 3


def test_a_folder_that_is_not_complete_does_not_count(dataset: CocoDataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    builder.build(dataset, cache)
    (folder,) = cache.iterdir()
    (folder / builder.DROPPED_FILE).unlink()
    assert len(builder.build(dataset, cache).source) == 7
    assert list(cache.iterdir()) == [folder]


def test_images_that_cannot_be_used(dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = dataset.images[0].file_name
    encoded = (dataset.images_dir / name).read_bytes()
    (dataset.images_dir / name).write_bytes(encoded[:40])
    resized = dataclasses.replace(dataset.images[3], height=51)
    dataset = dataclasses.replace(dataset, images=(*dataset.images[:3], resized, *dataset.images[4:]))
    with pytest.raises(ConfigError, match=r"2 of 7 images .*: photo 0\.png, photo 3\.png"):
        builder.build(dataset, tmp_path / "cache")
    monkeypatch.setattr("mrcnn_jax.data.coco.LOST_IMAGES", 0.5)
    for _ in range(2):  # from the images, then from the cache
        built = builder.build(dataset, tmp_path / "cache")
        assert [image.id for image in built.dataset.images] == [12, 13, 15, 16, 17]
        assert [built.source[i]["image_id"] for i in range(5)] == [12, 13, 15, 16, 17]
        assert {reason: f.first_ids for (_, reason), f in built.dataset.report.findings.items()} == {
            "images that cannot be decoded": [11],
            "images whose decoded size (EXIF orientation ignored) is not the annotated one": [14],
        }
    assert dataset.report.findings == {}


def test_quiet(dataset: CocoDataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    builder.build(dataset, tmp_path / "cache")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
