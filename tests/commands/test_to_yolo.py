"""COCO files as data sets of YOLO, and what `convert yolo` makes of those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exports import HEIGHT, PICTURES, RING, WIDTH, as_labelme, block, objects, picture
from PIL import Image

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.write import convert
from mrcnn_jax.data.reading import read_coco


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def coco(path: Path, names: dict[int, str], annotations: list[dict], **images: str) -> None:
    content = {
        "images": [
            {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for number, name in enumerate(images.values())
        ],
        "annotations": [{**a, "id": 10 + number} for number, a in enumerate(annotations)],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    path.write_text(json.dumps(content))


def square(image: int, category: int, **more: object) -> dict:
    """Of the image's middle half."""
    points = [[13, 10, 39, 10, 39, 30, 13, 30]]
    box = {"bbox": [13, 10, 26, 20], "area": 520, "iscrowd": 0, "segmentation": points}
    return {"image_id": image, "category_id": category, **box, **more}


def test_masks_come_back(here: Path, mrcnn: Callable[..., int]) -> None:
    """Those of the converters' tests, with holes, parts and names beyond ASCII."""
    (here / "export").mkdir()
    options = as_labelme(here / "export", PICTURES)
    convert(options)
    assert mrcnn("convert", "to-yolo", options.out, "--images", "export", "--out", "yolo") == 0
    assert mrcnn("convert", "yolo", "yolo", "--out", "back.json") == 0
    back = read_coco(Path("back.json"), Path("yolo/images/train"), DataConfig())
    assert back.class_names == ("cell wall", "ядро")
    assert sorted(image.file_name for image in back.images) == sorted(PICTURES)
    for name, drawn in PICTURES.items():
        found = objects(back, name)
        assert [label for label, _ in found] == [label for label, _ in drawn]
        for (_, mask), (_, expected) in zip(found, drawn, strict=True):
            assert (mask & expected).sum() / (mask | expected).sum() >= 0.95
    assert (RING & block(14, 12, 18, 16)).sum() == 0  # the hole is one


def test_both_parts_by_hand(
    here: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids of the validation file are its own; crowds and boxes are told."""
    for name in ("a.png", "sub/b.jpg", "images/c.png"):
        picture(here / "photos" / name)
    no_mask = {"segmentation": []}
    crowd = square(1, 7, iscrowd=1)
    annotations = [square(0, 7), square(0, 3, **no_mask), crowd]
    coco(here / "t.json", {3: "bee", 7: "ape"}, annotations, a="a.png", b="sub/b.jpg")
    coco(here / "v.json", {1: "ape"}, [square(0, 1)], c="images/c.png")
    words = ("--images", "photos", "--out", "my", "--val", "v.json")
    assert mrcnn("convert", "to-yolo", "t.json", *words) == 0
    told = capsys.readouterr().out
    assert "left out 1: annotations with iscrowd 1: YOLO has none (12)" in told
    assert "noticed 1: annotations without a mask: written as polygons of four corners (" in told
    assert "no validation images" not in told
    assert Path("my/data.yaml").read_text() == (
        'train: images/train\nval: images/val\nnames:\n  0: "bee"\n  1: "ape"\n'
    )
    polygon, box = Path("my/labels/train/a.txt").read_text().splitlines()
    values = polygon.split()
    assert values[0] == "1"
    pairs = {(float(x), float(y)) for x, y in zip(values[1::2], values[2::2], strict=True)}
    assert pairs == {(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)}
    corners = (0.25, 0.25, 0.75, 0.25, 0.75, 0.75, 0.25, 0.75)
    assert box == " ".join(["0", *(f"{share:.6f}" for share in corners)])
    assert Path("my/labels/train/sub/b.txt").read_text() == ""
    assert Path("my/images/train/sub/b.jpg").read_bytes() == Path("photos/sub/b.jpg").read_bytes()
    assert mrcnn("convert", "yolo", "my", "--part", "val", "--out", "back.json") == 0
    back = read_coco(Path("back.json"), Path("my/images"), DataConfig())
    ((label, mask),) = objects(back, "val/images/c.png")
    assert label == "ape"
    assert (mask == block(13, 10, 39, 30)).all()


def test_boxes_alone_stay_four_numbers(
    here: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A crowd's mask is not written, so there is no polygon beside the box."""
    picture(here / "a.png")
    annotations = [square(0, 1, segmentation=[]), square(0, 1, iscrowd=1)]
    coco(here / "t.json", {1: "ape"}, annotations, a="a.png")
    assert mrcnn("convert", "to-yolo", "t.json", "--images", ".", "--out", "my") == 0
    told = capsys.readouterr().out
    assert "noticed 1: annotations without a mask, as all here: written as boxes (10)" in told
    assert "no validation images, without which Ultralytics does not train (see --val)" in told
    assert Path("my/labels/train/a.txt").read_text() == "0 0.500000 0.500000 0.500000 0.500000\n"


def test_an_interrupted_call_leaves_nothing(
    here: Path, mrcnn: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next one is not refused."""
    picture(here / "a.png")
    coco(here / "t.json", {1: "ape"}, [square(0, 1)], a="a.png")
    words = ("convert", "to-yolo", "t.json", "--images", ".", "--out", "new/my")
    with monkeypatch.context() as patched:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr("shutil.copyfile", interrupted)
        mrcnn(*words)
    assert not list((here / "new").iterdir())
    assert mrcnn(*words) == 0
    assert Path("new/my/labels/train/a.txt").is_file()


def test_mistakes(
    here: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(here / "a.jpg")
    picture(here / "turned.jpg", exif=exif)
    coco(here / "t.json", {1: "ape"}, [square(0, 1)], a="a.jpg")
    coco(here / "turned.json", {1: "ape"}, [square(0, 1)], a="turned.jpg")
    picture(here / "a.png")
    coco(here / "both.json", {1: "ape"}, [square(0, 1)], a="a.jpg", b="./a.png")
    coco(here / "same.json", {1: "ape"}, [square(0, 1)], a="a.jpg", b="./a.jpg")
    coco(here / "names.json", {1: "ape", 2: "ape "}, [square(0, 1)], a="a.jpg")
    (here / "broken.png").write_bytes((here / "a.png").read_bytes()[:-40])
    coco(here / "broken.json", {1: "ape"}, [square(0, 1)], a="broken.png")
    coco(here / "other.json", {1: "bee"}, [square(0, 1)], a="a.jpg")
    for words, line in (
        (("t.json", "--val-images", "."), "--val-images: needs --val"),
        (("none.json",), "none.json: No such file"),
        (("turned.json",), "turned.jpg: 52 x 40 as EXIF turns it, which YOLO does, but annotated"),
        (("both.json",), "both.json: images 0 (a.jpg) and 1 (./a.png) would share a label file"),
        (("same.json",), "same.json: images 0 (a.jpg) and 1 (./a.jpg) would share a label file"),
        (("names.json",), "names.json: categories: 'ape' is there twice"),
        (("broken.json",), "broken.json: no usable image is left: dropped 1: images that"),
        (("t.json", "--val", "other.json"), "other.json: categories that t.json does not have"),
    ):
        assert mrcnn("convert", "to-yolo", *words, "--images", ".", "--out", "my") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {line}")
        assert error.count("\n") == 1
        assert not Path("my").exists()
    Path("my").mkdir()
    assert mrcnn("convert", "to-yolo", "t.json", "--images", ".", "--out", "my") == 2
    assert capsys.readouterr().err == "error: --out: my: exists (choose another one)\n"
