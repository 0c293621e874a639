"""Projects of Supervisely."""

from __future__ import annotations

import base64
import io
import json
import math
import zlib
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
    objects,
    picture,
    png,
    refuses,
    same_but_for_the_border,
    supervisely_bitmap,
    supervisely_file,
)
from PIL import Image

from mrcnn_jax.convert import supervisely
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.supervisely import Supervisely
from mrcnn_jax.convert.write import convert

# The example of developer.supervisely.com (objects, bitmap): what base64_2_mask reads there.
EXAMPLE = (
    "eJzrDPBz5+WS4mJgYOD19HAJAtLMIMwIInOeqf8BUmwBPiGuQPr///9Lb86/C2QxlgT5BTM4PLuRBuTwebo4hlTM"
    "Sa44cOHAB6DqY0yORgq8YkAZBk9XP5d1TglNANAFGzA="
)
EXAMPLE_MASK = ["###", "#..", "###"]
TRIANGLE, HOLE = [[5, 30], [45, 36], [25, 3]], [[22, 20], [30, 20], [26, 28]]


def thing(kind: str | None, label: str = "x", **geometry: Any) -> dict[str, Any]:
    given = {} if kind is None else {"geometryType": kind, "shape": kind}
    return {"classTitle": label, "tags": [{"name": "t", "value": None}], **given, **geometry}


def outline(exterior: Any, *holes: Any) -> dict[str, Any]:
    return {"exterior": exterior, "interior": list(holes)}


def project(folder: Path, *drawn: Any, classes: dict[str, str] | None = None) -> Supervisely:
    """A data set with one image."""
    picture(folder / "ds" / "img" / "a.png")
    supervisely_file(folder / "ds" / "ann" / "a.png.json", list(drawn))
    if classes is not None:
        listed = [{"title": title, "shape": shape} for title, shape in classes.items()]
        (folder / "meta.json").write_text(json.dumps({"classes": listed, "tags": []}))
    return Supervisely(folder, folder / "out.json")


def by_opencv(exterior: list[list[int]], *holes: list[list[int]]) -> np.ndarray:
    """As Supervisely's SDK draws a polygon of whole pixels."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(mask, [np.array(exterior)], 1)
    cv2.fillPoly(mask, [np.array(hole) for hole in holes], 0)
    return mask == 1


def test_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square = [[40, 4], [48, 4], [48, 9], [40, 9]]
    options = project(
        tmp_path,
        thing("polygon", points=outline(POLYGON)),
        thing("polygon", points=outline(TRIANGLE, HOLE)),
        thing("multipolygon", parts=[outline(TRIANGLE, HOLE), outline(square)]),
        thing("rectangle", points=outline([[39, 34], [30, 20]])),
        thing("rectangle", points=outline([[30.5, 20.25], [40, 35]])),
        thing("oriented_bbox", points=[[16, 10], [35, 19]], angle=math.radians(30)),
        supervisely_bitmap("y", RING),
        thing("point", points=outline([[3, 3]])),
        thing("graph", nodes={"a": {"loc": [3, 3]}}),
    )
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    (image,) = dataset.images
    assert image.file_name == "ds/img/a.png"
    found = objects(dataset, image.file_name)
    assert [label for label, _ in found] == ["x"] * 6 + ["y"]
    polygon, hole, parts, whole, fractions, turned, ring = (mask for _, mask in found)
    assert same_but_for_the_border(polygon, by_pillow(POLYGON))
    assert same_but_for_the_border(hole, by_opencv(TRIANGLE, HOLE))
    assert not hole[23, 26]
    both = by_opencv(TRIANGLE, HOLE) | by_opencv(square)
    assert same_but_for_the_border(parts, both)
    assert not (whole | fractions).any()
    boxes = [o.box for o in image.annotations]
    assert boxes[3:5] == [(30.0, 20.0, 40.0, 35.0), (30.5, 20.25, 40.0, 35.0)]
    corners = cv2.boxPoints(((26, 15), (20, 10), 30)).tolist()  # clockwise
    assert same_but_for_the_border(turned, by_pillow(corners))
    assert (ring == RING).all()
    text = capsys.readouterr().out
    assert "dropped 1: shapes of type point, which has no area (ds/a.png: object 8)" in text
    assert "dropped 1: shapes of type graph, which has no area (ds/a.png: object 9)" in text
    options = Supervisely(tmp_path, tmp_path / "m.json", rectangles="mask")
    convert(options)
    mask = objects(checked(options, tmp_path / "cache"), "ds/img/a.png")[3][1]
    assert (mask == block(30, 20, 40, 35)).all()


def test_whole_numbers_are_pixels(tmp_path: Path) -> None:
    """A corner of a polygon is the middle of its pixel."""
    square = [[10, 20], [19, 20], [19, 29], [10, 29]]
    shifted = [[x + 0.5, y + 0.5] for x, y in square]
    named = {"x": square, "y": shifted}
    drawn = [thing("polygon", label, points=outline(points)) for label, points in named.items()]
    options = project(tmp_path, *drawn)
    convert(options)
    (image,) = checked(options, tmp_path / "cache").images
    assert [o.box for o in image.annotations] == [(10.5, 20.5, 19.5, 29.5)] * 2


def alpha(values: np.ndarray) -> dict[str, Any]:
    """A PNG that is not compressed again."""
    return {"data": base64.b64encode(png(values)).decode(), "origin": [10, 20]}


def test_bitmaps(tmp_path: Path) -> None:
    """The format's own example; an alpha mask is where it is half opaque."""
    opaque = np.array([[127, 128], [255, 0]], np.uint8)
    coloured = np.dstack([np.zeros((2, 2, 3), np.uint8), np.array([[1, 0], [0, 9]], np.uint8)])
    options = project(
        tmp_path,
        thing("bitmap", "a", bitmap={"data": EXAMPLE, "origin": [4, 7]}),
        thing("alpha_mask", "b", bitmap=alpha(opaque)),
        thing("bitmap", "c", bitmap=alpha(coloured)),
    )
    convert(options)
    found = dict(objects(checked(options, tmp_path / "cache"), "ds/img/a.png"))
    expected = np.array([[pixel == "#" for pixel in row] for row in EXAMPLE_MASK])
    assert (found["a"][7:10, 4:7] == expected).all()
    assert found["a"].sum() == expected.sum()
    assert np.argwhere(found["b"]).tolist() == [[20, 11], [21, 10]]
    assert np.argwhere(found["c"]).tolist() == [[20, 10], [21, 11]]


def test_data_sets_old_names_and_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested ones; masks that the tool exports beside the images are none of these."""
    for place in ("one", "two/datasets/deep"):
        picture(tmp_path / place / "img" / "a.jpg")
        picture(tmp_path / place / "masks_machine" / "a.png")
        drawn = [supervisely_bitmap("x", RING)]
        supervisely_file(tmp_path / place / "ann" / "a.json", drawn, tags=[{"name": "day"}] * 2)
    picture(tmp_path / "one" / "img" / "b.jpg")
    options = Supervisely(tmp_path, tmp_path / "out.json")
    convert(options)
    names = [image.file_name for image in checked(options, tmp_path / "cache").images]
    assert names == ["one/img/a.jpg", "two/datasets/deep/img/a.jpg"]
    text = capsys.readouterr().out
    assert "dropped 4: shapes of type tag, which has no area (one/a: tag 1, one/a: tag 2, " in text
    assert (
        "left out 1: images without an annotation (see --keep-unannotated) (one/img/b.jpg" in text
    )
    assert "not where the annotation says" not in text
    options = Supervisely(tmp_path, tmp_path / "out.json", datasets=("two\\datasets/deep",))
    convert(options)
    assert "left out" not in capsys.readouterr().out
    names = [image.file_name for image in checked(options, tmp_path / "cache").images]
    assert names == ["two/datasets/deep/img/a.jpg"]
    options = Supervisely(tmp_path / "one", tmp_path / "out.json", images=tmp_path)
    convert(options)
    assert [i.file_name for i in checked(options, tmp_path / "c").images] == ["one/img/a.jpg"]


def test_classes_are_those_of_the_project(tmp_path: Path) -> None:
    """In its order, but for those without an area; what is not in it follows."""
    classes = {"z": "polygon", "line": "line", "a": "bitmap", " y ": "any", "no": "rectangle"}
    old = thing(None, "z", points=outline(POLYGON))  # the shape is that of its class
    drawn = thing("polygon", "other", points=outline(POLYGON))
    options = project(tmp_path, old, drawn, thing(None, "line"), classes=classes)
    for folder in (tmp_path, tmp_path / "ds"):
        options = Supervisely(folder, tmp_path / "out.json", skip=("no",))
        convert(options)
        dataset = checked(options, tmp_path / "cache")
        assert dataset.class_names == ("z", "a", "y", "other")
        assert [o.label for o in dataset.images[0].annotations] == [1, 4]


def of(*drawn: Any, **options: Any) -> Callable[[Path], Options]:
    return lambda folder: project(folder, *drawn, **options)


def file(content: Any, name: str = "ds/ann/a.png.json") -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        options = project(folder, thing("point"))
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return options

    return make


def bitmap(**fields: Any) -> Callable[[Path], Options]:
    return of(thing("bitmap", bitmap={"data": EXAMPLE, "origin": [0, 0]} | fields))


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def gif() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(stream, "GIF")
    return stream.getvalue()


BLOCK = np.ones((2, 2), np.uint8)
SIZE = {"height": HEIGHT, "width": WIDTH}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Supervisely(folder, folder / "out.json"), r"no JSON in a folder ann/$"),
        (
            lambda folder: Supervisely(Path(__file__), folder / "out.json"),
            r"test_supervisely.py: a file: name the folder",
        ),
        (file("{"), r"ds/ann/a.png.json: not JSON"),
        (file({"size": SIZE}), r"a.png.json: not from Supervisely: no list of objects"),
        (file({"frames": [], "objects": []}), r"a.png.json: the annotation of a video"),
        (file({"objects": [], "size": {"height": 3}}), r"a.png.json: its size is \{'height': 3\}"),
        (
            file({"objects": [], "size": {"height": 10**6, "width": 10**6}}),
            r"its size, 1000000 x 1000000, is over 200000000 pixels",
        ),
        (file({"classes": [{}]}, "meta.json"), r"meta.json: classes: \{\} has no title"),
        (
            file({"classes": [], "projectType": "videos"}, "meta.json"),
            r"meta.json: projectType is 'videos', not 'images'",
        ),
        (of(3), r"a.png.json: object 1: not an object"),
        (of(thing("polygon", None)), r"object 1: its classTitle is None"),  # type: ignore[arg-type]
        (of(thing("mask_3d")), r"object 1: its geometryType is 'mask_3d'"),
        (of(thing(None)), r"object 1: its geometryType is None"),
        (of(thing("point"), thing("polygon")), r"object 2: its points are None, without exterior"),
        (
            of(thing("polygon", points=outline([[1, 2], [3]]))),
            r"object 1: its exterior is not a list of \[x, y\] pairs of numbers",
        ),
        (
            of(thing("polygon", points=outline(POLYGON, [[1, None]]))),
            r"object 1: its interior is not a list of \[x, y\] pairs",
        ),
        (
            of(thing("polygon", points={"exterior": POLYGON, "interior": 3})),
            r"object 1: its interior is 3, not a list of holes",
        ),
        (of(thing("multipolygon", parts=[])), r"object 1: its parts are \[\]"),
        (of(thing("multipolygon", parts=[3])), r"object 1: its parts are 3, without exterior"),
        (
            of(thing("rectangle", points=outline([[1, 2]]))),
            r"object 1: a rectangle with 1 points",
        ),
        (of(thing("oriented_bbox", points=[[1, 2], [3, 4]])), r"object 1: its angle is ''"),
        (of(thing("bitmap")), r"object 1: its bitmap is None, without data"),
        (bitmap(origin=[1]), r"object 1: its bitmap.origin is not a list of \[x, y\] pairs"),
        (bitmap(data="abc"), r"object 1: its bitmap.data is not base64"),
        (bitmap(data=EXAMPLE[:80]), r"object 1: its bitmap.data: not an image .*: unknown format"),
        (bitmap(data=packed(png(BLOCK)[:-12])), r"object 1: its bitmap.data: not an .*: cut off"),
        (bitmap(data=packed(gif())), r"object 1: its bitmap.data: not an image that can be dec"),
        (
            lambda folder: Supervisely(
                project(folder, thing("point")).input, folder / "out.json", datasets=("d",)
            ),
            r"--datasets: .* has no 'd', but ds$",
        ),
        (
            lambda folder: (
                supervisely_file(folder / "ds" / "ann" / "a.png.json", [], (4, 6)),
                picture(folder / "ds" / "img" / "a.png"),
                Supervisely(folder, folder / "out.json"),
            )[-1],
            r"ds/img/a.png is 40 x 52, annotated as 4 x 6",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(
    make: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(make(tmp_path), message, tmp_path)


def test_a_bitmap_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisely, "LARGEST", 1000)
    options = bitmap(data=packed(png(BLOCK) + bytes(1000)))(tmp_path)
    refuses(options, r"object 1: its bitmap.data is over 1000 bytes", tmp_path)


def test_what_is_not_drawn_to_its_end_is_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = thing("polygon", points=outline([[1, 2], [3, 4]]))
    point = thing("polygon", points=outline(TRIANGLE, [[20, 20]]))  # a hole without an area
    options = project(tmp_path, line, point)
    convert(options)
    text = capsys.readouterr().out
    assert "dropped 1: annotations with an unusable segmentation (ds/a.png: object 1)" in text
    ((_, mask),) = objects(checked(options, tmp_path / "cache"), "ds/img/a.png")
    assert same_but_for_the_border(mask, by_opencv(TRIANGLE))
