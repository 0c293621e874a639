"""Label Studio's own JSON export."""

from __future__ import annotations

import base64
import json
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
)

from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.label_studio import LabelStudio, unpacked
from mrcnn_jax.convert.write import convert

# Packed by label-studio-converter 0.0.59 (brush.py): `encode_rle` of an RGBA picture that is
# (10, 200, 30, 255) in BRUSH, with an alpha of 127 at the end of its second row; and `mask2rle`.
BRUSH = ["..##..", "..###.", ".#....", "######"]
# fmt: off
RGBA = [
    0, 0, 0, 96, 57, 27, 252, 224, 0, 5, 1, 144, 0, 240, 31, 224, 5, 1, 144, 0, 240, 31, 247, 192,
    0, 10, 3, 32, 1, 224, 63, 192, 10, 3, 32, 1, 224, 63, 192, 10, 3, 32, 1, 224, 63, 226, 0, 1,
    254, 48, 0, 2, 128, 200, 0, 120, 15, 251, 224, 0, 5, 1, 144, 0, 240, 31, 224, 5, 1, 144, 0, 240,
    31, 224, 5, 1, 144, 0, 240, 31, 224, 5, 1, 144, 0, 240, 31, 224, 5, 1, 144, 0, 240, 31, 224, 5,
    1, 144, 0, 240, 31, 224,
]
MASK = [
    0, 0, 0, 96, 57, 27, 252, 224, 19, 255, 223, 0, 183, 255, 56, 4, 127, 247, 192, 48, 191, 248,
]
# fmt: on


def result(
    kind: str, label: str = "x", size: tuple[int, int] = (HEIGHT, WIDTH), **value: Any
) -> dict[str, Any]:
    return {
        "id": str(hash((kind, label, str(value)))),
        "type": f"{kind}labels",
        "from_name": "label",
        "to_name": "image",
        "original_width": size[1],
        "original_height": size[0],
        "image_rotation": 0,
        "value": value | {f"{kind}labels": [label]},
    }


def percent(points: list[list[float]]) -> list[list[float]]:
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


def place(x: float, y: float, **sides: float) -> dict[str, float]:
    """In percent; sides that end on x or width are along the width."""
    shares = {
        key: 100 * value / (WIDTH if key in ("width", "radiusX") else HEIGHT)
        for key, value in sides.items()
    }
    return {"x": 100 * x / WIDTH, "y": 100 * y / HEIGHT, **shares}


def task(image: str, *results: Any, **annotation: Any) -> dict[str, Any]:
    return {
        "id": 7,
        "annotations": [{"id": 1, "was_cancelled": False, "result": list(results), **annotation}],
        "file_upload": "",
        "data": {"text": "not this.txt", "image": image},
        "predictions": [],
    }


def write(folder: Path, *tasks: Any) -> LabelStudio:
    (folder / "project-1.json").write_text(json.dumps(tasks))
    return LabelStudio(folder / "project-1.json", folder / "out.json")


@pytest.mark.parametrize("number", [None, "one"])
def test_shapes_without_an_id_of_their_own_are_kept(number: str | None, tmp_path: Path) -> None:
    """As scripts write them; the same shape twice is one."""
    picture(tmp_path / "a.png")
    first, second = (
        result("polygon", label, points=percent(points)) | {"id": number}
        for label, points in (("x", POLYGON), ("y", [[2, 2], [12, 2], [12, 9], [2, 9]]))
    )
    results = (first, second) if number is None else (first, second, first)
    options = write(tmp_path, task("a.png", *results))
    convert(options)
    found = objects(checked(options, tmp_path / "cache"), "a.png")
    assert [label for label, _ in found] == ["x", "y"]


def test_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Turned rectangles and ellipses as OpenCV turns them; the former around their corner."""
    picture(tmp_path / "a.png")
    alone = result("polygon", points=percent([[2, 2], [12, 2], [12, 9], [2, 9]]))
    del alone["value"]["polygonlabels"]
    alone |= {"id": "one", "type": "polygon"}
    label = {**alone, "type": "labels", "value": alone["value"] | {"labels": ["y"]}}
    options = write(
        tmp_path,
        task(
            "/data/upload/1/0123abcd-a.png",
            result("polygon", points=percent(POLYGON), closed=True),
            result("rectangle", **place(30, 20, width=10, height=15), rotation=0),
            result("rectangle", **place(26, 5, width=20, height=10), rotation=30),
            result("ellipse", **place(26, 20, radiusX=18, radiusY=7), rotation=330),
            alone,
            label,
            result("keypoint", **place(3, 3), width=0.4),
            {"type": "choices", "value": {"choices": ["good"]}, "id": "c"},
            {"type": "relation", "from_id": "one", "to_id": "c"},
        ),
    )
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    found = objects(dataset, "a.png")
    assert [label for label, _ in found] == ["x", "x", "x", "x", "y"]
    masks = [mask for _, mask in found]
    assert same_but_for_the_border(masks[0], by_pillow(POLYGON))
    assert not masks[1].any()
    assert dataset.images[0].annotations[1].box == (30.0, 20.0, 40.0, 35.0)
    # The centre of a rectangle that is turned by 30 degrees around its corner (26, 5).
    right, down = np.array([3**0.5 / 2, 0.5]), np.array([-0.5, 3**0.5 / 2])
    centre = tuple(np.array([26, 5]) + 10 * right + 5 * down)
    assert same_but_for_the_border(
        masks[2], by_pillow(cv2.boxPoints((centre, (20, 10), 30)).tolist())
    )
    expected = cv2.ellipse(
        np.zeros((HEIGHT, WIDTH), np.uint8), (26, 20), (18, 7), 330, 0, 360, 1, thickness=-1
    )
    assert same_but_for_the_border(masks[3], expected == 1)
    assert (masks[4] == block(2, 2, 12, 9)).all()
    text = capsys.readouterr().out
    assert "dropped 1: shapes of type keypoint, which has no area (task 7: result 7)" in text
    options = LabelStudio(options.input, options.out, rectangles="mask")
    convert(options)
    assert (objects(checked(options, tmp_path / "c"), "a.png")[1][1] == block(30, 20, 40, 35)).all()


@pytest.mark.parametrize("packed", [RGBA, MASK], ids=["encode_rle", "mask2rle"])
def test_brushes_of_label_studio(packed: list[int], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (4, 6))
    brush = result("brush", size=(4, 6), format="rle", rle=packed)
    options = write(tmp_path, task("a.png", brush))
    convert(options)
    ((_, mask),) = objects(checked(options, tmp_path / "cache"), "a.png")
    assert ["".join(".#"[pixel] for pixel in row) for row in mask.astype(int)] == BRUSH


def bitmask(mask: np.ndarray) -> str:
    """Black where it is, and transparent elsewhere."""
    black = np.zeros((*mask.shape, 4), np.uint8)
    black[..., 3] = 255 * mask
    return f"data:image/png;base64,{base64.b64encode(png(black)).decode()}"


def test_bitmasks(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    options = write(tmp_path, task("a.png", result("bitmask", imageDataURL=bitmask(RING))))
    convert(options)
    ((label, mask),) = objects(checked(options, tmp_path / "cache"), "a.png")
    assert label == "x"
    assert (mask == RING).all()


def test_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Closed ones are polygons; not those with curves or branches."""

    def vector(label: str, closed: bool = True, **last: Any) -> dict[str, Any]:
        places = [
            {"id": f"v{n}", "prevPointId": f"v{n - 1}" if n else None, "x": x, "y": y}
            for n, (x, y) in enumerate(percent(POLYGON))
        ]
        places[-1] |= last
        return result("vector", label, vertices=places, closed=closed)

    picture(tmp_path / "a.png")
    curve, branch = vector("curve", isBezier=True), vector("branch", prevPointId="v1")
    drawn = vector("x"), vector("line", closed=False), curve, branch
    options = write(tmp_path, task("a.png", *drawn))
    convert(options)
    ((label, mask),) = objects(checked(options, tmp_path / "cache"), "a.png")
    assert label == "x"
    assert same_but_for_the_border(mask, by_pillow(POLYGON))
    told = capsys.readouterr().out
    assert "dropped 1: shapes of type vector, which has no area (task 7: result 2)" in told
    assert "closed vectors with curves or branches, which are not read" in told
    assert "(task 7: result 3, task 7: result 4)" in told


def test_runs_that_are_not_repeated() -> None:
    """By hand: sizes of lengths 3, 4, 8, 16; three values as they are, then 200 of one."""
    bits = f"{203:032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "0" + "00" + f"{2:03b}" + "".join(f"{value:08b}" for value in (7, 0, 255))
    bits += "1" + "10" + f"{199:08b}" + f"{9:08b}"
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    assert unpacked(packed, 203).tolist() == [7, 0, 255] + [9] * 200


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("/data/local-files/?d=photos%2Fdeep/a.png", "photos/deep/a.png"),
        ("s3://bucket/deep/gr%C3%B6%C3%9Fe.png?x=1", "größe.png"),
        ("/data/upload/2/0123abcd-a.png", "images/0123abcd-a.png"),
        ("https://example.org/a.png", "elsewhere/a.png"),
    ],
)
def test_images_are_found(image: str, file: str, tmp_path: Path) -> None:
    picture(tmp_path / file)
    box = result("rectangle", **place(30, 20, width=10, height=15))
    options = write(tmp_path, task(image, box))
    convert(options)
    assert [i.file_name for i in checked(options, tmp_path / "cache").images] == [file]


def test_of_several_images_the_one_that_is_drawn_on_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for a task without shapes; else the first one, which is told."""
    for name in ("1.png", "1s.png", "2.png", "2s.png"):
        picture(tmp_path / name)
    box = result("rectangle", **place(30, 20, width=10, height=15))
    first, second = (
        task(f"{n}.png", *drawn)
        | {"data": {"thumbnail": f"{n}s.png", "image": f"{n}.png", "by": "//[me"}}
        for n, drawn in ((1, [box]), (2, []))
    )
    options = write(tmp_path, first, second)
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert [(i.file_name, len(i.objects)) for i in dataset.images] == [("1.png", 1), ("2.png", 0)]
    assert "several images" not in capsys.readouterr().out
    options = write(tmp_path, json.loads(json.dumps(first).replace('"to_name": "image"', '"x": 1')))
    convert(options)
    assert [i.file_name for i in checked(options, tmp_path / "cache").images] == ["1s.png"]
    assert "that under 'thumbnail' is taken (task 7)" in capsys.readouterr().out


def test_the_newest_annotation_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    several = task("a.png", result("rectangle", "new", **place(1, 1, width=9, height=9)))
    several["annotations"][0]["created_at"] = "2024-02-01T00:00:00Z"
    for created, label, cancelled in (("2024-01-31", "old", False), ("2024-03-01", "no", True)):
        drawn = result("rectangle", label, **place(1, 1, width=9, height=9))
        more = {"result": [drawn], "created_at": created, "was_cancelled": cancelled}
        several["annotations"].append(more)
    none = task("b.png") | {"annotations": []}
    options = write(tmp_path, several, none, task("c.png"))
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("new",)
    assert [(i.file_name, len(i.annotations)) for i in dataset.images] == [
        ("a.png", 1),
        ("c.png", 0),
    ]
    text = capsys.readouterr().out
    assert "left out 1: annotations of an image that has a newer one (task 7)" in text
    assert "left out 1: annotations that were cancelled (task 7)" in text
    assert "left out 1: images without an annotation (see --keep-unannotated) (b.png)" in text


def broken(*tasks: Any) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        picture(folder / "a.png")
        return write(folder, *tasks)

    return make


def of(*results: Any) -> Callable[[Path], Options]:
    return broken(task("a.png", *results))


POINTS = percent(POLYGON)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken({"image": "a.png", "label": []}), r"task 1: no annotations \(export as JSON, n"),
        (broken(task("a.png") | {"annotations": [3]}), r"task 7: an annotation without a list"),
        (broken(task("a.txt", result("polygon", points=POINTS))), r"task 7: no image in its data"),
        (of(3), r"project-1.json: task 7: result 1: without a value"),
        (of(result("cloud")), r"task 7: result 1: its type is 'cloudlabels'"),
        (of(result("polygon", points=[[1]])), r"result 1: its points are not \[x, y\] pairs"),
        (of(result("rectangle", x=1, y=None)), r"result 1: its y is None"),
        (
            of(result("rectangle", **place(1, 1, width=9, height=9), rotation="a")),
            r"its rotation is 'a'",
        ),
        (
            of(result("polygon", points=POINTS) | {"original_width": None}),
            r"result 1: its original_height, original_width are 40, None",
        ),
        (
            of(result("polygon", points=POINTS) | {"image_rotation": 90}),
            r"result 1: image_rotation 90: annotated turned: refused",
        ),
        (
            of(result("polygon", points=POINTS), result("polygon", "y", (4, 6), points=POINTS)),
            r"result 2: the image is 4 x 6 here, and before \(40, 52\)",
        ),
        (of(result("polygon", size=(4, 6), points=POINTS)), r"a.png is 40 x 52, annotated as 4 x"),
        (
            of({**result("polygon"), "value": {"polygonlabels": ["a", "b"], "points": POINTS}}),
            r"result 1: its labels are \['a', 'b'\], not one",
        ),
        (
            of(*(result("polygon", points=POINTS) | {"to_name": n, "id": n} for n in ("l", "r"))),
            r"project-1.json: task 7: shapes on several images \('l', 'r'\): give each image a t",
        ),
        (
            of(*(result("polygon", points=POINTS) | {"item_index": n, "id": n} for n in (0, 1))),
            r"task 7: shapes on several images \('image' 0, 'image' 1\): give each image",
        ),
        (of(result("bitmask", imageDataURL="x")), r"its imageDataURL is 'x', not a PNG in base64"),
        (
            of(result("bitmask", imageDataURL="data:image/png;base64,eHg=")),
            r"result 1: its imageDataURL: ",
        ),
        (
            of(result("bitmask", imageDataURL=bitmask(RING[:9]))),
            r"its imageDataURL is 9 x 52, the image 40 x 52",
        ),
        (of(result("vector", closed=True, vertices=3)), r"result 1: its vertices are 3"),
        (of(result("vector", closed=True, vertices=[{}])), r"result 1: its points are not \[x, y"),
        (of(result("brush", rle="abc")), r"result 1: its rle is not a list of bytes"),
        (of(result("brush", rle=RGBA)), r"its rle has 96 values of 8 bits, the image 8320 of 8"),
        (of(result("brush", size=(4, 6), rle=RGBA[:50])), r"result 1: its rle is cut off"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    make: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(make(tmp_path), message, tmp_path)


def test_shapes_without_a_label_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = result("polygon", points=POINTS)
    del bare["value"]["polygonlabels"]
    bare["id"] = "bare"
    options = of(bare, result("polygon", points=POINTS))(tmp_path)
    convert(options)
    assert "dropped 1: shapes without a label (task 7: result 1)" in capsys.readouterr().out
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 1
