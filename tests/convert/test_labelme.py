"""Exports of labelme."""

from __future__ import annotations

import base64
import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from exports import (
    HEIGHT,
    PICTURES,
    POLYGON,
    RING,
    TWO,
    WIDTH,
    as_labelme,
    block,
    by_pillow,
    checked,
    disc,
    labelme_file,
    labelme_mask,
    labelme_shape,
    objects,
    picture,
    png,
    refuses,
    same_but_for_the_border,
)
from PIL import Image

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    Options,
)
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.write import convert
from mrcnn_jax.data.report import Reason


def test_labelme_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "x.png")
    turned = cv2.boxPoints(((26, 20), (30, 8), 30)).tolist()
    half = [[30, 5], [40, 5], [40, 15], [30, 15]]
    shapes = [
        labelme_shape("polygon", POLYGON),
        labelme_shape("circle", [[26, 20], [26, 32]]),
        labelme_shape("oriented_rectangle", turned),
        labelme_shape("rectangle", [[40, 30], [10, 20]]),
        labelme_shape("polygon", half, group_id=7),
        labelme_mask("x", RING, group_id=7),
        labelme_shape("polygon", [[40, 20], [50, 20], [50, 30]], label="y", group_id=7),
        labelme_shape("point", [[3, 3]]),
        labelme_shape("line", [[3, 3], [5, 5]]),
        labelme_shape("polygon", [[3, 3], [5, 5]]),
        labelme_shape("polygon", [[60, 3], [65, 3], [65, 9]]),
        labelme_shape("polygon", [[40, 20], [60, 0], [60, 40]], label="y"),
        labelme_shape("polygon", [[3, 3], [9, 3.2], [9, 3.1]]),
    ]
    labelme_file(tmp_path / "x.json", "x.png", shapes)
    options = Labelme(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    found = objects(dataset, "x.png")
    assert [label for label, _ in found] == ["x", "x", "x", "x", "x", "y", "y"]
    masks = [mask for _, mask in found]
    assert same_but_for_the_border(masks[0], by_pillow(POLYGON))
    assert same_but_for_the_border(masks[1], disc(26, 20, 12))
    assert abs(masks[1].sum() - math.pi * 12**2) < 6
    assert same_but_for_the_border(masks[2], by_pillow(turned))
    assert not masks[3].any(), "a box has no mask"
    assert dataset.images[0].annotations[3].box == (10.0, 20.0, 40.0, 30.0)
    assert (masks[4] == (RING | block(30, 5, 40, 15))).all()
    assert dataset.images[0].annotations[6].box == (40.0, 8.0, 52.0, 31.0), (
        "of the part inside, by its pixels"
    )
    written = json.loads(options.out.read_text())["annotations"]
    assert written[0]["segmentation"] == [[v for point in POLYGON for v in point]], (
        "polygons stay polygons"
    )
    assert [isinstance(a.get("segmentation"), dict) for a in written] == [
        False,
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "kept 1 images, 7 objects, 0 crowds, 1 objects without a mask (box only)",
        "clipped 1: annotations whose box leaves the image (x.json: shape 12)",
        "dropped 1: annotations whose box lies outside the image (x.json: shape 11)",
        "dropped 1: annotations whose mask has no pixel in the image (x.json: shape 13)",
        "dropped 1: annotations with an unusable segmentation (x.json: shape 10)",
        "dropped 1: shapes of type line, which has no area (x.json: shape 9)",
        "dropped 1: shapes of type point, which has no area (x.json: shape 8)",
        "2 classes: x, y",
        f"{options.out}: 1 images; to check:",
        f"    python -m mrcnn_jax check --annotations {options.out} --images {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("written", "repaired"),
    [
        ("../images/é.png", False),
        ("..\\images\\é.png", False),
        (unicodedata.normalize("NFD", "../images/é.png"), False),
        ("é.png", False),  # relative to --images
        ("C:\\Users\\me\\images\\é.png", True),
        ("/home/me/é.png", True),
        ("old name.png", True),  # the JSON's own name is left
    ],
)
def test_labelme_images_are_found(
    written: str, repaired: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "images" / "é.png")
    picture(tmp_path / "images" / "other.png")
    (tmp_path / "json").mkdir()
    labelme_file(tmp_path / "json" / "é.json", written, [labelme_mask("x", RING)])
    options = Labelme(
        tmp_path / "json", tmp_path / "new folder" / "out.json", images=tmp_path / "images"
    )
    convert(options)
    ((label, mask),) = objects(checked(options, tmp_path / "cache"), "é.png")
    assert label == "x"
    assert (mask == RING).all()
    text = capsys.readouterr().out
    assert (
        "repaired 1: images that are not where the annotation says: found by their name (é.json)"
        in text
    ) == repaired
    assert "left out 1: images without an annotation (see --keep-unannotated) (other.png)" in text


def place(folder: Path, said: str, *images: str, images_in: str = "") -> list[str]:
    """The image of cam1/001.json, which says `said`, among `images`."""
    for image in images:
        picture(folder / images_in / image)
    json_folder = folder / ("json" if images_in else "") / "cam1"
    json_folder.mkdir(parents=True, exist_ok=True)
    labelme_file(json_folder / "001.json", said, [labelme_mask("x", RING)])
    options = Labelme(
        json_folder.parent, folder / "out.json", images=folder / images_in if images_in else None
    )
    convert(options)
    return [image["file_name"] for image in json.loads(options.out.read_text())["images"]]


@pytest.mark.parametrize("images_in", ["", "images"])
def test_the_image_beside_the_json_wins(
    images_in: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where imagePath is stale, over one of that name in another folder; also if the images are in
    a folder of their own with the same subfolders."""
    beside = "cam1/001.png"
    assert place(tmp_path / "1", "a.png", beside, "cam2/a.png", images_in=images_in) == [beside]
    assert "found by their name (001.json)" in capsys.readouterr().out
    assert place(tmp_path / "2", "b.png", "cam1/b.png", "cam2/b.png", images_in=images_in) == [
        "cam1/b.png"
    ]
    assert "found by their name" not in capsys.readouterr().out
    stale = "C:\\old\\cam2\\a.png"
    assert place(tmp_path / "3", stale, beside, "cam2/a.png", images_in=images_in) == [beside]
    with pytest.raises(ConfigError, match=r"both cam2/a.png and cam3/a.png may be the image"):
        place(tmp_path / "4", "a.png", "cam2/a.png", "cam3/a.png", images_in=images_in)


def test_an_image_outside_is_not_its_overlay(tmp_path: Path) -> None:
    """As after predict --format labelme: the overlays have the names of the JSON files."""
    picture(tmp_path / "photos" / "a.png")
    picture(tmp_path / "found" / "00001_a.png")
    (tmp_path / "found" / "labelme").mkdir()
    shapes = [labelme_mask("x", RING)]
    labelme_file(tmp_path / "found" / "labelme" / "00001_a.json", "../../photos/a.png", shapes)
    options = Labelme(tmp_path / "found", tmp_path / "out.json")
    outside = r"00001_a.json: its image ../photos/a.png lies outside of .*found: --images names its"
    refuses(options, outside, tmp_path)
    convert(Labelme(tmp_path / "found", tmp_path / "out.json", images=tmp_path / "photos"))
    names = [image["file_name"] for image in json.loads(options.out.read_text())["images"]]
    assert names == ["a.png"]


def test_another_image_than_its_own_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """001.json says a.png, and there is a 001.png, too; not if 001.png is only a second format."""
    assert place(tmp_path / "1", "a.png", "cam1/a.png", "cam1/001.png") == ["cam1/a.png"]
    told = "that name another one: that is taken (001.json: cam1/a.png)"
    assert told in capsys.readouterr().out
    assert place(tmp_path / "2", "001.jpg", "cam1/001.jpg", "cam1/001.png") == ["cam1/001.jpg"]
    assert "that name another one" not in capsys.readouterr().out


def test_an_image_at_the_top_is_not_that_of_a_folder(tmp_path: Path) -> None:
    assert place(tmp_path, "a.png", "a.png", "cam1/001.png") == ["cam1/001.png"]


def test_images_beside_the_json_in_a_linked_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one of their name at the top, and not by their name alone."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "cam1").symlink_to(tmp_path / "elsewhere")
    assert place(tmp_path / "my", "a.png", "a.png", "cam1/a.png") == ["cam1/a.png"]
    assert "found by their name" not in capsys.readouterr().out


def test_shapes_that_were_begun_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "x.png")
    shapes = [
        labelme_shape("circle", [[3, 3]]),
        labelme_shape("circle", [[3, 3], [3, 3]]),
        labelme_shape("rectangle", [[3, 3]]),
        labelme_shape("rectangle", [[3, 3], [3, 9]]),
        labelme_shape("polygon", []),
        labelme_shape("polygon", [[3, 3], [9, 9], [5, 5]]),
        labelme_shape("linestrip", [[3, 3], [9, 9], [5, 5]]),
        labelme_shape("polygon", POLYGON),
    ]
    labelme_file(tmp_path / "x.json", "x.png", shapes)
    options = Labelme(tmp_path, tmp_path / "out.json")
    convert(options)
    assert len(objects(checked(options, tmp_path / "cache"), "x.png")) == 1
    text = capsys.readouterr().out
    assert "dropped 1: shapes of type circle, which has no area (x.json: shape 1)" in text
    counts = [line.split()[1] for line in text.splitlines() if line.startswith("dropped")]
    assert sum(int(count.rstrip(":")) for count in counts) == 7


def test_an_image_in_the_json_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "cam1").mkdir()
    (tmp_path / "x.png").mkdir()
    encoded = base64.b64encode(png(np.full((HEIGHT, WIDTH, 3), 5, np.uint8))).decode()
    shapes = [labelme_mask("x", RING)]
    labelme_file(tmp_path / "cam1" / "x.json", "x.png", shapes, imageData=encoded)
    options = Labelme(tmp_path, tmp_path / "out.json", write_images=True)
    with pytest.raises(ConfigError, match=r"imageData cannot be written as .*x.png: there is such"):
        convert(options)


def test_labelme_images_inside_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = png(np.full((HEIGHT, WIDTH, 3), 5, np.uint8))
    more = {"imageData": base64.b64encode(file).decode()}
    labelme_file(tmp_path / "x.json", "D:\\data\\x.png", [labelme_mask("x", RING)], **more)
    with pytest.raises(
        ConfigError,
        match=r"--allow-missing\): 1 of 1 images are lost .*: D:/data/x.png \(images whose file",
    ):
        convert(Labelme(tmp_path, tmp_path / "out.json"))
    with pytest.raises(ConfigError, match="1 of 1 images are lost") as caught:
        convert(Labelme(tmp_path, tmp_path / "out.json"), hint=False)
    assert "--" not in str(caught.value)  # `train my/` has no such option
    options = Labelme(tmp_path, tmp_path / "out.json", write_images=True)
    convert(options)
    assert (tmp_path / "x.png").read_bytes() == file
    assert (objects(checked(options, tmp_path / "cache"), "x.png")[0][1] == RING).all()
    assert "written into the image folder (x.json)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "stored", "upright"),
    [
        ((HEIGHT, WIDTH), (WIDTH, HEIGHT), True),
        ((HEIGHT, WIDTH), (HEIGHT, WIDTH), False),
        ((None, None), (WIDTH, HEIGHT), True),
    ],
)
def test_turned_photographs(
    size: tuple[Any, Any], stored: tuple[int, int], upright: bool, tmp_path: Path
) -> None:
    """labelme shows pictures as EXIF says, and the checker turns the pixels to fit the size;
    without a size, the picture is upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "x.jpg", stored, exif=exif)
    labelme_file(tmp_path / "x.json", "x.jpg", [labelme_mask("x", RING)], size)
    options = Labelme(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert (dataset.images[0].height, dataset.images[0].width, dataset.images[0].upright) == (
        HEIGHT,
        WIDTH,
        upright,
    )
    assert (objects(dataset, "x.jpg")[0][1] == RING).all()


def test_labelme_masks_beyond_the_image_and_cut_as_labelme_cuts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "x.png")
    full = base64.b64encode(png(np.ones((10, 12), np.uint8))).decode()
    points = [[[-4, 35], [7, 44]], [[10, 10], [13, 12]], [[20.6, 9.6], [31.4, 18.4]]]
    shapes = [labelme_shape("mask", p, mask=full) for p in points]
    shapes += [
        labelme_shape(
            "mask",
            [[1, 1], [12, 10]],
            mask=base64.b64encode(png(np.zeros((10, 12), np.uint8))).decode(),
        )
    ]
    moved = labelme_mask("x", RING)
    moved["points"] = [[x - 6, y - 8] for x, y in moved["points"]]
    labelme_file(tmp_path / "x.json", "x.png", [*shapes, moved])
    options = Labelme(tmp_path, tmp_path / "out.json")
    convert(options)
    masks = [mask for _, mask in objects(checked(options, tmp_path / "cache"), "x.png")]
    blocks = block(0, 35, 8, 40), block(10, 10, 14, 13), block(21, 10, 33, 20)
    for mask, expected in zip(
        masks, (*blocks, np.pad(RING, ((0, 8), (0, 6)))[8:, 6:]), strict=True
    ):
        assert (mask == expected).all()
    text = capsys.readouterr().out
    assert (
        "clipped 2: annotations whose box leaves the image (x.json: shape 1, x.json: shape 5)"
        in text
    )
    assert "dropped 1: annotations whose mask has no pixel in the image (x.json: shape 4)" in text


def test_one_label_in_two_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "x.png")
    labels = ["é", unicodedata.normalize("NFD", "é"), " é"]
    labelme_file(tmp_path / "x.json", "x.png", [labelme_mask(label, RING) for label in labels])
    options = Labelme(tmp_path, tmp_path / "out.json")
    convert(options)
    found = checked(options, tmp_path / "cache", but=Reason.SAME_ANNOTATION)
    assert found.class_names == ("é",)
    assert "(x.json: shape 2, x.json: shape 3)" in capsys.readouterr().out


def break_labelme(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Options]:
    def write(folder: Path) -> Options:
        options = as_labelme(folder, {"a.png": PICTURES["a.png"]})
        content = json.loads((folder / "a.json").read_text())
        change(content)
        (folder / "a.json").write_text(json.dumps(content))
        return options

    return write


def shape(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["shapes"][0].update(change)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            break_labelme(lambda c: c.pop("shapes")),
            r"a.json: not from labelme: 'imagePath' or 'shapes' is missing",
        ),
        (
            break_labelme(lambda c: c.update(imageHeight=41)),
            r"1 images have another size .*a.json: a.png is 40 x 52, annotated as 41 x 52",
        ),
        (
            break_labelme(lambda c: c.update(imageHeight="40")),
            r"a.json: imageHeight, imageWidth are '40', 52",
        ),
        (break_labelme(lambda c: c.update(imageHeight=float("nan"))), r"a.json: not JSON .*NaN"),
        (break_labelme(shape(label=None)), r"a.json: shape 1: its label is None"),
        (
            break_labelme(shape(label="a\nb")),
            r"a.json: shape 1: its label 'a\\nb' is not printable",
        ),
        (break_labelme(shape(group_id=[1])), r"a.json: shape 1: its group_id is \[1\]"),
        (
            break_labelme(shape(points=[[1, 2, 3]])),
            r"a.json: shape 1: its points are not \[x, y\] pairs of numbers",
        ),
        (break_labelme(shape(points=[[1, "2"]])), r"a.json: shape 1: its points are not"),
        (
            break_labelme(shape(shape_type=["polygon"])),
            r"a.json: shape 1: its shape_type is \['polygon'\]",
        ),
        (break_labelme(shape(shape_type="cloud")), r"a.json: shape 1: its shape_type is 'cloud'"),
        (
            break_labelme(shape(shape_type="circle", points=[[1, 2]] * 3)),
            r"a.json: shape 1: a circle with 3 points",
        ),
        (break_labelme(shape(mask="????")), r"a.json: shape 1: .*"),
        (
            break_labelme(shape(mask=base64.b64encode(png(TWO)[:60]).decode())),
            r"a.json: shape 1: not an image that can be decoded: cut off",
        ),
        (break_labelme(lambda c: c["shapes"].__setitem__(0, 3)), r"a.json: shape 1: not an object"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(write(tmp_path), message, tmp_path)
