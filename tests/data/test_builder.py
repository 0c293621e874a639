from __future__ import annotations

import dataclasses
import pickle
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data import builder
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset


@pytest.fixture
def dataset(mixed_file: Path) -> CocoDataset:
    dataset = read_coco(mixed_file, mixed_file.parent / "images", DataConfig())
    first, *others = dataset.images
    (mixed_file.parent / "images" / "depth").write_bytes(bytes(range(256)) + b"\0")
    first = dataclasses.replace(first, upright=True, depth_file="depth")
    return dataclasses.replace(dataset, images=(first, *others))


def test_records_hold_the_data_set(dataset: CocoDataset, tmp_path: Path) -> None:
    source = builder.build(dataset, tmp_path / "cache" / "folder")
    assert len(source) == len(dataset.images) == 7
    for index in (3, 0, 6, 1, 2, 5, 4):  # at random
        image, record = dataset.images[index], source[index]
        assert record["image"] == (dataset.images_dir / image.file_name).read_bytes()
        assert record["depth"] == (b"" if index else bytes(range(256)) + b"\0")
        assert (record["image_id"], record["file_name"].decode(), record["upright"]) == (
            image.id,
            image.file_name,
            index == 0,
        )
        objects = record["objects"]
        assert [int(i) for i in objects["annotation_id"]] == [
            o.annotation_id for o in image.annotations
        ]
        assert [int(i) for i in objects["label"]] == [o.label for o in image.annotations]
        assert [bool(i) for i in objects["iscrowd"]] == [o.iscrowd for o in image.annotations]
        assert [tuple(b.tolist()) for b in objects["box"]] == [
            tuple(np.float32(o.box).tolist()) for o in image.annotations
        ]
        assert [c.decode() for c in objects["counts"]] == [
            o.rle["counts"] if o.rle else "" for o in image.annotations
        ]
    assert "tensorflow" not in sys.modules


def test_built_once(dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("built")

    folder = tmp_path / "cache" / "folder"
    with monkeypatch.context() as patch:
        patch.setattr(builder, "make_record", refuse)
        with pytest.raises(RuntimeError, match="built"):
            builder.build(dataset, folder)
        assert list(folder.iterdir()) == [], "a build that fails leaves nothing behind"
        patch.undo()
        builder.build(dataset, folder)
        patch.setattr(builder, "make_record", refuse)
        assert len(builder.build(dataset, folder)) == 7
    assert [path.name for path in folder.iterdir()] == [builder.FOLDER]


def test_a_cache_that_cannot_be_written_to(dataset: CocoDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/cache: Not a directory"):
        builder.build(dataset, tmp_path / "file" / "cache")


def test_what_a_killed_build_left_is_removed(dataset: CocoDataset, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    left = folder / f".{builder.FOLDER}.01234567.part" / "coco_builder"
    left.mkdir(parents=True)
    (left / "half").touch()
    builder.build(dataset, folder)
    assert [path.name for path in folder.iterdir()] == [builder.FOLDER]


def test_a_full_disk_is_told_in_one_line(dataset: CocoDataset, tmp_path: Path) -> None:
    """array_record has errors of its own. A limit of a file's size stands for the disk's."""
    folder = tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(ConfigError) as error:
            builder.build(dataset, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).startswith(str(folder))
    assert str(error.value).endswith(": File too large")
    assert list(folder.iterdir()) == []


def test_quiet(dataset: CocoDataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    builder.build(dataset, tmp_path / "cache")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_no_code_that_a_folder_names_is_run(dataset: CocoDataset, tmp_path: Path) -> None:
    """tfds imports the classes that features.json names, from wherever Python finds them."""
    folder = tmp_path / "cache"
    record = builder.build(dataset, folder)[0]
    for name in ("features.json", "dataset_info.json"):
        path = folder / builder.FOLDER / name
        assert path.exists()
        path.write_text(path.read_text().replace("tensorflow_datasets.core", "antigravity"))
    assert "antigravity" in (folder / builder.FOLDER / "features.json").read_text()
    again = builder.build(dataset, folder)[0]
    assert "antigravity" not in sys.modules
    assert again["image"] == record["image"]
    np.testing.assert_array_equal(again["objects"]["box"], record["objects"]["box"])


def test_harm_to_the_records_is_one_line_that_says_what_to_delete(
    dataset: CocoDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    builder.build(dataset, folder)
    (file,) = (folder / builder.FOLDER).glob("*.array_record-*")
    whole = file.read_bytes()
    start = whole.index((dataset.images_dir / dataset.images[3].file_name).read_bytes()[:64])
    flipped = bytearray(whole)
    flipped[start + 40] ^= 1
    line = f"^{folder}: the built data set is damaged; delete this folder: "
    for content in (b"", whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=line) as caught:
            _ = [builder.build(dataset, folder)[index] for index in range(7)]
        assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    shorter = dataclasses.replace(dataset, images=dataset.images[:-1])
    with pytest.raises(ConfigError, match=line + "7 records, but 6 images"):
        builder.build(shorter, folder)
    file.rename(file.with_name(file.name.replace("00001", "00002")))
    with pytest.raises(ConfigError, match=line + "1 files of records"):
        builder.build(dataset, folder)


def test_records_are_read_in_another_process(dataset: CocoDataset, tmp_path: Path) -> None:
    source = builder.build(dataset, tmp_path / "cache")
    copied = pickle.loads(pickle.dumps(source))
    assert copied[2]["image"] == source[2]["image"]
