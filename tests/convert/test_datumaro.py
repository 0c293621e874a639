"""Data sets of Datumaro, and exports of CVAT in its format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from exports import (
    HEIGHT,
    POLYGON,
    RING,
    WIDTH,
    block,
    by_pillow,
    checked,
    datumaro_file,
    objects,
    oval,
    picture,
    refuses,
    same_but_for_the_border,
)

from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.datumaro import Datumaro
from mrcnn_jax.convert.write import convert
from mrcnn_jax.data.report import Reason


def drawn(kind: str, label: Any = 0, group: Any = 0, **fields: Any) -> dict[str, Any]:
    attributes = fields.pop("attributes", {"occluded": False})
    one = {"id": 0, "type": kind, "attributes": attributes, "group": group, "label_id": label}
    return one | {"z_order": 0} | fields


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths by hand: down the columns, the background first."""
    counts, last, length = [], False, 0
    for pixel in mask.T.ravel().tolist():
        if pixel != last:
            counts.append(length)
            last, length = pixel, 0
        length += 1
    return {"size": list(mask.shape), "counts": [*counts, length]}


def item(name: str, *annotations: Any, **fields: Any) -> dict[str, Any]:
    image = {"path": f"{name}.png", "size": [HEIGHT, WIDTH]}
    return {"id": name, "annotations": list(annotations), "image": image} | fields


def written(folder: Path, *items: Any, labels: tuple[Any, ...] = ("x", "y")) -> Datumaro:
    """A subset with the images a.png, b.png, ... of its items."""
    for one in items:
        if isinstance(one, dict) and "image" in one:
            picture(folder / "images" / "default" / f"{one['id']}.png")
    datumaro_file(folder / "annotations" / "default.json", list(labels), list(items))
    return Datumaro(folder, folder / "out.json")


def test_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = {"attributes": {"rotation": 30.0}}
    options = written(
        tmp_path,
        item(
            "a",
            drawn("polygon", points=[value for point in POLYGON for value in point]),
            drawn("mask", rle=runs(RING)),
            drawn("ellipse", points=[8, 13, 44, 27]),
            drawn("ellipse", points=[8, 13, 44, 27], **turned),
            drawn("bbox", 1, bbox=[30.0, 20.0, 10.0, 15.0]),
            drawn("bbox", 1, bbox=[16, 10, 20, 10], **turned),
            drawn("mask", rle=runs(block(0, 0, 9, 9)), attributes={"is_crowd": True}),
            drawn("label"),
            drawn("points", points=[1.0, 2.0], visibility=[2]),
            drawn("skeleton", points=[1, 2, 2]),
            {"id": 0, "type": "hash_key", "hash_key": []},
            drawn("polygon", None, points=[1, 1, 9, 1, 9, 9]),
            drawn("bbox", bbox=[2, 30, 8, 6], attributes={"is_crowd": True}),
        ),
        item("b"),
    )
    convert(options)
    dataset = checked(options, tmp_path / "cache", but=Reason.MANY_CROWDS)
    assert [image.file_name for image in dataset.images] == ["default/a.png", "default/b.png"]
    found = objects(dataset, "default/a.png")
    assert [label for label, _ in found] == ["x"] * 4 + ["y"] * 2 + ["x"] * 2
    masks = [mask for _, mask in found]
    assert same_but_for_the_border(masks[0], by_pillow(POLYGON))
    assert (masks[1] == RING).all()
    for mask, degrees in ((masks[2], 0), (masks[3], 30)):
        assert same_but_for_the_border(mask, oval(26, 20, 18, 7, degrees))
    assert not masks[4].any()
    assert dataset.images[0].annotations[4].box == (30.0, 20.0, 40.0, 35.0)
    corners = cv2.boxPoints(((26, 15), (20, 10), 30)).tolist()  # clockwise
    assert same_but_for_the_border(masks[5], by_pillow(corners))
    assert [o.iscrowd for o in dataset.images[0].annotations] == [False] * 6 + [True] * 2
    text = capsys.readouterr().out
    for kind, place in (("label", 8), ("points", 9), ("skeleton", 10)):
        what = f"shapes of type {kind}, which has no area (item 'a': annotation {place})"
        assert f"dropped 1: {what}" in text
    assert "dropped 1: shapes without a label (item 'a': annotation 12)" in text
    assert "hash_key" not in text
    assert "not where the annotation says" not in text


@pytest.mark.parametrize("rectangles", ["box", "mask"])
def test_a_group_is_an_object(rectangles: Any, tmp_path: Path) -> None:
    """A box beside an outline is that of the object, and no mask. Of one label, and but for 0."""
    left, right = block(2, 2, 12, 9), block(40, 30, 50, 38)
    box = {"bbox": [1, 1, 50, 38]}
    options = written(
        tmp_path,
        item(
            "a",
            drawn("mask", 0, 7, rle=runs(left)),
            drawn("bbox", 0, 7, **box),
            drawn("polygon", 0, 7, points=[40, 30, 50, 30, 50, 38, 40, 38]),
            drawn("bbox", 1, 7, **box),
            drawn("mask", 0, 0, rle=runs(left)),
            drawn("mask", 0, 0, rle=runs(right)),
        ),
    )
    options = Datumaro(options.input, options.out, rectangles=rectangles)
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    found = objects(dataset, "default/a.png")
    assert [label for label, _ in found] == ["x", "y", "x", "x"]
    alone = block(1, 1, 51, 39) if rectangles == "mask" else np.zeros_like(left)
    for (_, mask), expected in zip(found, (left | right, alone, left, right), strict=True):
        assert (mask == expected).all()
    assert [o.box for o in dataset.images[0].annotations[:2]] == [(1.0, 1.0, 51.0, 39.0)] * 2


def test_classes_are_the_files_without_a_skeletons_points(tmp_path: Path) -> None:
    """In its order; skipped ones are left out."""
    nose = {"name": "nose", "parent": "person", "attributes": []}
    sedan = {"name": "sedan", "parent": "car", "attributes": []}
    labels = ("z", "person", nose, "car", sedan, "no")
    options = written(tmp_path, item("a", drawn("mask", 4, rle=runs(RING))), labels=labels)
    path = tmp_path / "annotations" / "default.json"
    points = '"points": {"items": [{"label_id": 1, "labels": ["nose"], "joints": []}]}, "label"'
    path.write_text(path.read_text().replace('"label"', points, 1))
    options = Datumaro(path, options.out, skip=("no",))
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("z", "person", "car", "sedan")
    assert [o.label for o in dataset.images[0].annotations] == [4]


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ({"path": "deep/a.png"}, "images/default/deep/a.png"),
        ({"path": "default/a.png"}, "images/default/a.png"),
        ({"path": "a.png", "size": None}, "images/a.png"),
        ({}, "images/default/deep/a.jpg"),  # by the item's id
        ({"path": "/home/me/a.png"}, "images/default/deep/a.png"),
        ({"path": "a.png"}, "annotations/a.png"),
    ],
)
def test_images_are_found(image: dict[str, Any], file: str, tmp_path: Path) -> None:
    drawn_item = item("deep/a", drawn("mask", rle=runs(RING)), image=image)
    datumaro_file(tmp_path / "annotations" / "default.json", ["x"], [drawn_item])
    picture(tmp_path / file)
    options = Datumaro(tmp_path, tmp_path / "out.json", images=tmp_path)
    convert(options)
    assert [i.file_name for i in checked(options, tmp_path / "cache").images] == [file]


def test_one_of_several_subsets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images of the others are not those that nobody annotated."""
    for subset in ("train", "val"):
        picture(tmp_path / "images" / subset / "a.png")
        one = item("a", drawn("mask", rle=runs(RING)))
        datumaro_file(tmp_path / "annotations" / f"{subset}.json", [subset], [one])
    refuses(
        Datumaro(tmp_path, tmp_path / "out.json"),
        r"--subset: .* has several subsets: train, val$",
        tmp_path,
    )
    refuses(
        Datumaro(tmp_path, tmp_path / "out.json", subset="x"),
        r"--subset: .* has no 'x', but: train, val$",
        tmp_path,
    )
    options = Datumaro(tmp_path, tmp_path / "out.json", subset="val")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("val",)
    assert [i.file_name for i in dataset.images] == ["val/a.png"]
    text = capsys.readouterr().out
    assert "not converted: train (see --subset)" in text
    assert "left out" not in text


def of(*annotations: Any, **fields: Any) -> Callable[[Path], Options]:
    return lambda folder: written(folder, item("a", *annotations, **fields))


def content(text: str) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        path = folder / "a.json"
        path.write_text(text)
        return Datumaro(path, folder / "out.json")

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Datumaro(folder, folder / "out.json"), r"no annotations/SUBSET.json"),
        (content("{"), r"a.json: not JSON"),
        (content('{"categories": {}}'), r"a.json: not from Datumaro: no list of items"),
        (content('{"items": [{"id": 3}]}'), r"a.json: item 1: without an id: \{'id': 3\}"),
        (
            lambda folder: written(
                folder, item("a", drawn("bbox", bbox=[1, 1, 9, 9])), labels=(3,)
            ),
            r"categories.label.labels: 0 has no name: 3",
        ),
        (
            content('{"items": [{"id": "a", "annotations": [{"type": "mask", "label_id": 0}]}]}'),
            r"a.json: not from Datumaro: no list categories.label.labels",
        ),
        (of(video_frame={"frame_index": 3}), r"default.json: item 'a': video_frame: not an image"),
        (of(annotations=3), r"item 'a': its annotations are 3"),
        (of(image={"path": "a.png", "size": [3]}), r"item 'a': its image.size is \[3\], not \[h"),
        (
            of(image={"path": "a.png", "size": [10**6, 10**6]}),
            r"its image.size, 1000000 x 1000000, is over 200000000 pixels",
        ),
        (of(image={"path": "a.png", "size": [4, 6]}), r"a.png is 40 x 52, annotated as 4 x 6"),
        (of(3), r"item 'a': annotation 1: its type is None"),
        (of(drawn("cloud")), r"item 'a': annotation 1: its type is 'cloud'"),
        (of(drawn("bbox", 2)), r"annotation 1: its label_id is 2, not one of 0 to 1"),
        (of(drawn("bbox", "x")), r"annotation 1: its label_id is 'x', not one of 0 to 1"),
        (of(drawn("mask", 0, "x")), r"item 'a': its group is 'x'"),
        (of(drawn("bbox", bbox=[1, 2, 3])), r"annotation 1: its bbox has 3 numbers, not 4"),
        (of(drawn("bbox", bbox=[1, 2, 3, None])), r"its bbox is \[1, 2, 3, None\], not a list of"),
        (of(drawn("ellipse", points=[1, 2])), r"annotation 1: its points has 2 numbers, not 4"),
        (of(drawn("polygon")), r"annotation 1: its points is None, not a list of numbers"),
        (
            of(drawn("bbox", bbox=[1, 2, 3, 4], attributes={"rotation": "a"})),
            r"annotation 1: its attributes.rotation is 'a'",
        ),
        (of(drawn("mask")), r"annotation 1: its rle.size is None, not \[height, width\]"),
        (
            of(drawn("mask", rle=runs(RING[:, :-1]))),
            r"annotation 1: its rle.size is \[40, 51\], but image.size \[40, 52\]",
        ),
        (
            of(drawn("mask", rle={"size": [HEIGHT, WIDTH], "counts": "d0d0:F\\0"})),
            r"annotation 1: its rle.counts, .*, are not of 40 x 52",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(
    make: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(make(tmp_path), message, tmp_path)


def test_unusable_polygons_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = of(drawn("polygon", points=[1, 2, 3, 4]), drawn("mask", rle=runs(RING)))(tmp_path)
    convert(options)
    what = "annotations with an unusable segmentation (item 'a': annotation 1)"
    assert f"dropped 1: {what}" in capsys.readouterr().out
