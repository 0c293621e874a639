"""Exports of YOLO segmentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exports import (
    HEIGHT,
    POLYGON,
    WIDTH,
    block,
    by_pillow,
    checked,
    objects,
    picture,
    refuses,
    same_but_for_the_border,
)

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.write import convert
from mrcnn_jax.convert.yolo import Yolo
from mrcnn_jax.data.reading import read_coco

SQUARE = "1 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75"  # x 13..26, y 10..30


def line(points: list[list[float]], number: int = 0) -> str:
    shares = (f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in points)
    return " ".join([str(number), *shares])


def write(folder: Path, yaml: str, labels: dict[str, str | None]) -> None:
    """Images and the text of their label files (None: no file), by the path of the image."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(yaml)
    for name, text in labels.items():
        picture(folder / name)
        if text is not None:
            file = folder / f"{name.replace('images', 'labels').rpartition('.')[0]}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


NAMES = "names: [cell, 'nerve']\n"


def test_polygons_and_boxes_in_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a data set as Ultralytics documents it; the third class has no object."""
    write(
        tmp_path,
        "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cell\n  1: nerve\n  2: axon\n",
        {
            "images/train/a.png": f"{line(POLYGON)}\r\n\n{SQUARE}\n0 0.5 0.75 1.000001 0.5\n",
            "images/train/b.png": "",
            "images/train/c.jpg": None,
            "images/val/a.png": "2 0 0 0 1 1 1",
        },
    )
    options = Yolo(tmp_path, tmp_path / "out.json")
    convert(options)
    text = capsys.readouterr().out
    assert "noticed 1: images without a label file: read as images without objects (train/c.jpg)\n"
    assert "\nnot converted: val (see --part)\n" in text
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("cell", "nerve", "axon")
    assert [i.file_name for i in dataset.images] == ["train/a.png", "train/b.png", "train/c.jpg"]
    (_, first), (label, second), (_, third) = objects(dataset, "train/a.png")
    assert same_but_for_the_border(first, by_pillow(POLYGON))
    assert label == "nerve"
    assert (second == block(13, 10, 26, 30)).all()
    assert not third.any()
    assert dataset.images[0].annotations[2].box == (0.0, 20.0, 52.0, 40.0)
    assert not objects(dataset, "train/b.png") + objects(dataset, "train/c.jpg")
    options = Yolo(tmp_path / "data.yaml", tmp_path / "out.json", part="val")
    convert(options)
    ((label, mask),) = objects(checked(options, tmp_path / "cache"), "val/a.png")
    assert label == "axon"
    # The lower left half: of the corners (0, 0), (0, 1), (1, 1).
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    assert same_but_for_the_border(mask, columns / WIDTH <= rows / HEIGHT)


def test_boxes_alone_are_told_and_can_be_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, f"train: images\n{NAMES}", {"images/a.png": "0 .5 .5 .25 .5\n1 .5 .5 1 1"})
    options = Yolo(tmp_path, tmp_path / "out.json")
    convert(options)
    out = capsys.readouterr().out
    assert "2 objects without a mask (box only)" in out
    assert "noticed 2: objects that are boxes, as all here: a mask head learns nothing" in out
    options = Yolo(tmp_path, tmp_path / "out.json", rectangles="mask")
    convert(options)
    assert "as all here" not in capsys.readouterr().out
    (_, mask), _ = objects(checked(options, tmp_path / "cache"), "a.png")
    left, right = WIDTH * 3 // 8, WIDTH * 5 // 8
    x, y, w, h = json.loads(options.out.read_text())["annotations"][0]["bbox"]
    assert (x, y, w, h) == (19.5, 10.0, 13.0, 20.0)
    assert mask[20, left + 1 : right].all()
    assert mask[:, :left].sum() == mask[:10].sum() == mask[30:].sum() == 0


def paths(options: Options) -> list[str]:
    convert(options)
    dataset = read_coco(options.out, options.open_images().folder, DataConfig())
    return [image.file_name for image in dataset.images if image.annotations]


@pytest.mark.parametrize(
    ("yaml", "images", "train", "val"),
    [
        # Roboflow's, which says ../ for folders beside its data.yaml.
        (
            f"train: ../train/images\nval: ../valid/images\n\nnc: 2\n{NAMES}",
            ("train/images/a.png", "valid/images/a.png"),
            ["train/images/a.png"],
            ["valid/images/a.png"],
        ),
        # The path of another machine.
        (
            f"path: /home/me/set\ntrain: images/train\nval: images/val\n{NAMES}",
            ("images/train/a.png", "images/val/sub/b.png"),
            ["train/a.png"],
            ["val/sub/b.png"],
        ),
        # A list of folders; images and labels in a folder of that name, too.
        (
            f"path: images\ntrain: [a/images, b]\nval:\n- c/images\ntest:\n{NAMES}",
            ("images/a/images/1.png", "images/b/2.png", "images/c/images/1.png"),
            ["a/images/1.png", "b/2.png"],
            ["c/images/1.png"],
        ),
        # Other words for them; the usual one comes first.
        (
            f"Train: a/images\nvalidation: a/images\nval: b\nTraining: b\n{NAMES}",
            ("a/images/1.png", "b/2.png"),
            ["a/images/1.png"],
            ["b/2.png"],
        ),
        # Lists of images, relative to them, to `path`, or with "./"; a suffix among the dots.
        (
            f"train: train.txt\nval: val.txt\n{NAMES}",
            ("images/x.rf.0f.png", "images/y.png", "images/z.png"),
            ["x.rf.0f.png", "z.png"],
            ["y.png"],
        ),
    ],
)
def test_the_parts_are_found(
    yaml: str, images: tuple[str, ...], train: list[str], val: list[str], tmp_path: Path
) -> None:
    def labels(name: str) -> str:
        """The last folder called images becomes labels."""
        head, images, tail = name.rpartition("images/")
        return f"{head}labels/{tail}" if images else name

    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "data.yaml").write_text(yaml)
    (tmp_path / "my" / "train.txt").write_text("./images/x.rf.0f.png\n\nimages/z.png\n")
    (tmp_path / "my" / "val.txt").write_text(f"{tmp_path}/my/images/y.png\n")
    for name in images:
        picture(tmp_path / "my" / name)
        file = (tmp_path / "my" / labels(name)).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SQUARE)
    assert paths(Yolo(tmp_path / "my", tmp_path / "t.json")) == train
    assert paths(Yolo(tmp_path / "my", tmp_path / "v.json", part="val")) == val


def test_labels_without_an_image_are_missing_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, f"train: images\n{NAMES}", {"images/a.png": SQUARE})
    (tmp_path / "labels" / "lost.txt").write_text(f"{SQUARE}\n{SQUARE}")
    (tmp_path / "labels" / "classes.txt").write_text("cell\nnerve\n")
    refuses(Yolo(tmp_path, tmp_path / "out.json"), r"lost \(images whose file is miss", tmp_path)
    options = Yolo(tmp_path, tmp_path / "out.json", allow_missing=True)
    convert(options)
    text = capsys.readouterr().out
    assert "dropped 1: images whose file is missing (lost.txt)" in text
    assert "dropped 2: annotations of a dropped image (lost.txt: line 1, lost.txt: line 2)" in text


def test_a_list_may_name_images_of_a_folder_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its labels are counted once, as of an image that is missing."""
    write(tmp_path, f"train: list.txt\n{NAMES}", {"images/a.png": SQUARE})
    (tmp_path / "list.txt").write_text("images/a.png\r\nimages/b.png\r\ngone/images/c.png\r\n")
    (tmp_path / "labels" / "b.txt").write_text(SQUARE)
    (tmp_path / "gone" / "labels").mkdir(parents=True)
    (tmp_path / "gone" / "labels" / "c.txt").write_text(SQUARE)
    convert(Yolo(tmp_path, tmp_path / "out.json", allow_missing=True))
    text = capsys.readouterr().out
    assert "dropped 2: images whose file is missing (images/b.png, gone/images/c.png)" in text


def test_turned_photographs_are_counted_as_they_are_seen(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, f"train: images\n{NAMES}", {"images/a.jpg": SQUARE})
    picture(tmp_path / "images" / "a.jpg", exif=exif)
    options = Yolo(tmp_path, tmp_path / "out.json")
    convert(options)
    ((_, mask),) = objects(checked(options, tmp_path / "cache"), "a.jpg")
    assert mask.shape == (WIDTH, HEIGHT)
    expected = np.zeros((WIDTH, HEIGHT), bool)
    expected[13:39, 10:20] = True
    assert (mask == expected).all()


def test_what_leaves_the_image_a_little_is_clipped_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not what a rounding makes leave it, if only by thousandths of a pixel."""
    text = "0 -0.005 0 0.5 0 0.5 1.009 0 1\n0 -0.000001 0 0.25 0 0.25 1 0 1"
    labels = {"images/a.png": text, "images/wide.png": "0 0 0 0.5 0 1.000004 1 0 1"}
    write(tmp_path, f"train: images\n{NAMES}", labels)
    picture(tmp_path / "images" / "wide.png", (8, 2000))
    options = Yolo(tmp_path, tmp_path / "out.json")
    convert(options)
    told = "clipped 1: annotations whose box leaves the image (a.png: line 1)\n"
    assert told in capsys.readouterr().out
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 2


def break_yolo(yaml: str, text: str = SQUARE, **options: Any) -> Callable[[Path], Options]:
    def broken(folder: Path) -> Options:
        write(folder, yaml, {"images/a.png": text})
        return Yolo(folder, folder / "out.json", **options)

    return broken


def labels(text: str) -> Callable[[Path], Options]:
    return break_yolo(f"train: images\n{NAMES}", text)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (labels("2 0 0 0 1 1 1"), r"labels/a.txt: line 1: its class is '2', not one of 0 to 1$"),
        (labels(f"\n{SQUARE}\n-1 0 0 0 1 1 1"), r"a.txt: line 3: its class is '-1'"),
        (labels("0 0 0 0 1 1"), r"a.txt: line 1: 5 numbers behind the class: a box has 4, a"),
        (labels("0"), r"a.txt: line 1: 0 numbers"),
        (labels("0 0 0 0 1 1 x"), r"a.txt: line 1: 'x' is not a number"),
        (labels("0 0 0 0 1 1 nan"), r"a.txt: line 1: 'nan' is not a number"),
        (labels("0 0 0 0 1 1 20"), r"a.txt: line 1: 20 is outside of 0..1, the image \(in pixels"),
        (labels("0 0 0 -0.02 1 1 1"), r"a.txt: line 1: -0.02 is outside"),
        (labels(""), r"no object is left, and so no class"),
        (break_yolo(f"train: pictures\n{NAMES}"), r"data.yaml: train: no 'pictures' in "),
        (break_yolo(f"train: labels\n{NAMES}"), r"data.yaml: train: no images in .*labels$"),
        (break_yolo(f"val: images\n{NAMES}"), r"data.yaml: no 'train'"),
        (break_yolo(NAMES), r"data.yaml: no train, val or test"),
        (break_yolo(f"train: 3\n{NAMES}"), r"data.yaml: train is 3, not a folder or list"),
        (break_yolo(f"train: data.yaml\n{NAMES}"), r"data.yaml: neither a folder of images nor"),
        (break_yolo(f"path: 3\ntrain: images\n{NAMES}"), r"data.yaml: path is 3, not a folder"),
        (break_yolo("train: images"), r"data.yaml: names is None, not the list of the classes"),
        (break_yolo("train: images\nnames: [a, no]"), r"data.yaml: names: False is not a name"),
        (break_yolo("train: images\nnames: [a, a]"), r"data.yaml: names: 'a' is there twice"),
        (break_yolo("train: images\nnames: {1: a}"), r"data.yaml: names: 0 is missing: they coun"),
        (
            break_yolo('train: images\nnames: {0: a, "0": b}'),
            r"data.yaml: names: a number is there twice",
        ),
        (
            break_yolo(f"train: images\nnc: 3\n{NAMES}"),
            r"data.yaml: nc is 3, but there are 2 names",
        ),
        (break_yolo("train: [images\nnc: 3"), r"data.yaml: not YAML: .* \(line 2\)"),
        (break_yolo("- 1"), r"data.yaml: not a data.yaml: no keys in it"),
        (break_yolo("!!python/object/apply:os.abort []"), r"data.yaml: not YAML: could not deter"),
        (
            break_yolo(f"train: images\nkpt_shape: [17, 3]\n{NAMES}"),
            r"data.yaml: kpt_shape: a data set of poses",
        ),
        (
            break_yolo(f"train: images\n{NAMES}", images=Path(__file__).parent),
            r"--images: .*a.png is not in ",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(write(tmp_path), message, tmp_path)


def test_a_count_of_classes_names_them(tmp_path: Path) -> None:
    options = break_yolo("train: images\nnc: 2")(tmp_path)
    convert(options)
    assert checked(options, tmp_path / "cache").class_names == ("class_0", "class_1")


def test_numbers_of_names_may_be_in_quotes(tmp_path: Path) -> None:
    options = break_yolo('train: images\nnames: {"1": nerve, 0: cell}')(tmp_path)
    convert(options)
    assert checked(options, tmp_path / "cache").class_names == ("cell", "nerve")


def test_names_are_in_one_unicode_form(tmp_path: Path) -> None:
    """As labels are, whichever form data.yaml and --skip have."""
    yaml = "train: images\nnames: [cafe\u0301, the\u0301]\n"
    write(tmp_path, yaml, {"images/a.png": f"{SQUARE}\n{line(POLYGON)}"})
    convert(Yolo(tmp_path, tmp_path / "out.json"))
    names = [c["name"] for c in json.loads((tmp_path / "out.json").read_text())["categories"]]
    assert names == ["caf\u00e9", "th\u00e9"]
    convert(Yolo(tmp_path, tmp_path / "out.json", skip=("cafe\u0301",)))
    content = json.loads((tmp_path / "out.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["th\u00e9"]
    assert len(content["annotations"]) == 1
