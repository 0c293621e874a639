"""Exports of every format, converted and read by the checker: masks come back as they were drawn,
and nothing is lost without a report."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exports import (
    PICTURES,
    RING,
    TWO,
    Drawn,
    as_cvat,
    as_datumaro,
    as_folders,
    as_label_images,
    as_label_studio,
    as_labelme,
    as_names,
    as_supervisely,
    as_via,
    as_voc,
    as_voc_without_xml,
    as_yolo,
    block,
    break_masks,
    checked,
    objects,
    refuses,
)
from pictures import tiff_pages

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    Options,
)
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.write import convert


@pytest.mark.parametrize(
    "write",
    [
        as_labelme,
        as_cvat,
        as_voc,
        as_voc_without_xml,
        as_label_images,
        as_folders,
        as_names,
        as_supervisely,
        as_datumaro,
    ],
    ids=lambda write: write.__name__,
)
def test_masks_come_back_as_they_were_drawn(
    write: Callable[[Path, Drawn], Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks with holes, in parts, of one pixel, at the border, inside one another; names and labels
    beyond ASCII; an empty image."""
    options = write(tmp_path, PICTURES)
    assert convert(options) == [options.out]
    assert capsys.readouterr().out.startswith("kept 3 images, 5 objects, 0 crowds\n2 classes:"), (
        "no reason to say more"
    )
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("cell wall", "ядро")
    assert [(image.id, image.file_name) for image in dataset.images] == [
        (1, "a.png"),
        (2, "empty.png"),
        (3, "größe 2.png"),
    ]
    for name, drawn in PICTURES.items():
        found = objects(dataset, name)
        assert sorted((label, mask.tobytes()) for label, mask in found) == sorted(
            (label, mask.tobytes()) for label, mask in drawn
        )
    boxes = {image.file_name: {o.box for o in image.annotations} for image in dataset.images}
    assert boxes["größe 2.png"] == {(51.0, 39.0, 52.0, 40.0), (0.0, 0.0, 5.0, 40.0)}
    areas = {a["area"] for a in json.loads(options.out.read_text())["annotations"]}
    assert areas == {float(mask.sum()) for drawn in PICTURES.values() for _, mask in drawn}


def test_split_is_by_image_and_repeatable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {
        f"{number}.png": [("b", RING), ("a", block(40, 0, 50, 9))][: 1 + number % 2]
        for number in range(10)
    }
    options = as_labelme(tmp_path, drawn)
    split = Labelme(tmp_path, options.out, split=0.3, seed=5)
    files = convert(split)
    assert [file.name for file in files] == ["out_train.json", "out_val.json"]
    train, val = (json.loads(file.read_text()) for file in files)
    assert [len(train["images"]), len(val["images"])] == [7, 3]
    assert {i["file_name"] for i in train["images"] + val["images"]} == set(drawn)
    assert (
        train["categories"] == val["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    )
    for key, count in (("images", 10), ("annotations", 15)):
        assert sorted(item["id"] for item in train[key] + val[key]) == list(range(1, count + 1))
    for file in files:
        for image in checked(split, tmp_path / "cache", file).images:
            assert len(image.annotations) == len(drawn[image.file_name])
    texts = [file.read_text() for file in files]
    capsys.readouterr()
    assert [file.read_text() for file in convert(split)] == texts
    assert "left out 4: JSON files that labelme did not write" in capsys.readouterr().out, (
        "those of the first time, and the checker's"
    )
    convert(Labelme(tmp_path, options.out, split=0.3, seed=6))
    assert [file.read_text() for file in files] != texts


class Killed(BaseException):
    """As a kill, it is caught nowhere."""


@pytest.mark.parametrize("renames", [0, 1])
def test_no_kill_leaves_an_image_in_both_files_of_a_split(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new split over an old one, killed before its first rename or between the two."""
    as_labelme(tmp_path, {f"{number}.png": [("a", RING)] for number in range(10)})
    old, new = (Labelme(tmp_path, tmp_path / "out.json", split=0.5, seed=n) for n in (0, 1))
    files = convert(old)
    before = [file.read_bytes() for file in files]
    with monkeypatch.context() as patch:
        replace, done = Path.replace, []

        def killed(self: Path, target: Path) -> Path:
            if len(done) == renames:
                raise Killed
            done.append(target)
            return replace(self, target)

        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            convert(new)
    left = [file for file in files if file.exists()]
    assert len(left) == renames
    names = [
        image["file_name"] for file in left for image in json.loads(file.read_text())["images"]
    ]
    assert len(names) == len(set(names)) == 5 * renames
    assert [file.read_bytes() for file in convert(new)] != before


def test_a_split_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_labelme(tmp_path, {f"{number}.png": [("a", RING)] for number in range(10)})
    options = Labelme(tmp_path, tmp_path / "out.json", split=0.5)
    files = convert(options)
    before = [file.read_bytes() for file in files]
    write = Path.write_text

    def full(self: Path, text: str) -> int:
        if "val" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, text)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"out_val.json: cannot be written: No space left"):
        convert(Labelme(tmp_path, tmp_path / "out.json", split=0.5, seed=1))
    assert [file.read_bytes() for file in files] == before
    assert len(list(tmp_path.glob("out*"))) == 2


def test_pages_of_an_image_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = as_labelme(tmp_path, {"a.tif": [("a", RING)]})
    page = np.zeros(RING.shape, np.uint8)
    (tmp_path / "a.tif").write_bytes(tiff_pages([page, page]))
    convert(options)
    text = "repaired 1: images with 2 pages or frames: only the first is read (a.tif)"
    assert text in capsys.readouterr().out


def test_categories_skip_and_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = as_cvat(tmp_path, PICTURES)
    names = tmp_path / "names.txt"
    names.write_text("__ignore__\nядро\nunused\ncell wall\n")
    (tmp_path / "list.txt").write_text("a -1\nempty.png\nemtpy.png\n")
    convert(Cvat(tmp_path, options.out, categories=names, only=tmp_path / "list.txt"))
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("ядро", "unused", "cell wall")
    assert [image.file_name for image in dataset.images] == ["a.png", "empty.png"]
    assert [label for label, _ in objects(dataset, "a.png")] == ["ядро", "cell wall", "cell wall"]
    assert (
        f"left out 1: images that {tmp_path / 'list.txt'} does not list (--only) (größe 2.png)"
        in (told := capsys.readouterr().out)
    )
    line = f"noticed 1: lines of {tmp_path / 'list.txt'} (--only) that name no image (emtpy.png)"
    assert line in told
    (tmp_path / "list.txt").write_text(unicodedata.normalize("NFD", "größe 2.png\n"))
    convert(Cvat(tmp_path, options.out, only=tmp_path / "list.txt"))
    assert "kept 1 images" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"^--seed: must be at least 0$"):
        convert(Cvat(tmp_path, options.out, split=0.5, seed=-1))
    names.write_text("cell walls\nядро\n")
    with pytest.raises(
        ConfigError,
        match=r"\(a.png\): mask 2: its label 'cell wall' is not .*\(did you mean 'cell walls'\?\)",
    ):
        convert(Cvat(tmp_path, options.out, categories=names))
    convert(Cvat(tmp_path, options.out, categories=names, skip=("cell wall",)))
    assert [label for label, _ in objects(checked(options, tmp_path / "cache"), "a.png")] == [
        "ядро"
    ]
    assert (
        "left out 3: shapes labelled cell wall (--skip) "
        "(a.png: mask 2, a.png: mask 3, größe 2.png: mask 1)" in capsys.readouterr().out
    )


def test_missing_and_broken_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = as_cvat(tmp_path, PICTURES)
    (tmp_path / "images" / "größe 2.png").unlink()
    (tmp_path / "images" / "empty.png").write_bytes(b"no image")
    with pytest.raises(
        ConfigError,
        match=r"2 of 3 images are lost .*: größe 2.png \(images whose .*\), empty.png \(images",
    ):
        convert(options)
    assert not options.out.exists()
    convert(Cvat(tmp_path, options.out, allow_missing=True))
    assert [image.file_name for image in checked(options, tmp_path / "cache").images] == ["a.png"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "dropped 2: annotations of a dropped image (größe 2.png: mask 1, größe 2.png: mask 2)",
        "dropped 1: images that cannot be decoded (empty.png)",
        "dropped 1: images whose file is missing (größe 2.png)",
    ]


@pytest.mark.parametrize(
    "write",
    [
        as_labelme,
        as_cvat,
        as_voc,
        as_voc_without_xml,
        as_label_images,
        as_yolo,
        as_via,
        as_label_studio,
        as_supervisely,
        as_datumaro,
    ],
    ids=lambda write: write.__name__,
)
def test_broken_files_are_converted_or_refused_in_a_line(
    write: Callable[[Path, Drawn], Options], tmp_path: Path
) -> None:
    """Bytes of the files changed, cut out or repeated raise no other error."""
    options = write(tmp_path, {"a.png": PICTURES["a.png"]})
    files = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and "images" not in str(path).lower()
    }
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(80):
        path = sorted(files)[rng.integers(len(files))]
        broken = bytearray(files[path])
        for _ in range(rng.integers(1, 4)):
            at, length = rng.integers(len(broken)), int(rng.integers(1, 9))
            match rng.integers(4):
                case 0:
                    broken[at] ^= 1 << int(rng.integers(8))
                case 1:
                    del broken[at : at + length]
                case 2:
                    broken[at:at] = broken[at : at + length]
                case _:
                    broken[at:at] = [
                        b"-",
                        b"9999999999",
                        b"null",
                        b"1e400",
                        b"\x00",
                        b"<",
                        b'"',
                        b"\xff",
                    ][rng.integers(8)]
            broken = broken or bytearray(b" ")
        path.write_bytes(broken)
        try:
            convert(replace(options))  # which may keep what it has read
        except ConfigError as error:
            refused.append(str(error))
        path.write_bytes(files[path])
    assert len(refused) > 15
    assert not any("\n" in line for line in refused)
    convert(options)
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 3


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            break_masks(TWO, split=0.5),
            r"--split: 0.5 of 1 images leaves one of the files empty",
        ),
        (break_masks(TWO, categories=Path(__file__)), r"test_write.py: '.*' is named \d+ times"),
        (break_masks(TWO, categories=Path("/none.txt")), r"/none.txt: No such file or directory"),
        (
            break_masks(TWO, out=Path("/proc/none/out.json")),
            r"--out: /proc/none/out.json: cannot be written: No such file",
        ),
        (break_masks(TWO, images=Path("/none")), r"/none: no such image folder"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(write(tmp_path), message, tmp_path)
