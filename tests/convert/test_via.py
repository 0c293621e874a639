"""Exports of the VGG Image Annotator."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exports import (
    POLYGON,
    block,
    by_pillow,
    checked,
    disc,
    objects,
    oval,
    picture,
    refuses,
    same_but_for_the_border,
)

from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.via import Via
from mrcnn_jax.convert.write import convert


def region(name: str, attributes: dict[str, Any] | None = None, **shape: Any) -> dict[str, Any]:
    given = {"class": "x"} if attributes is None else attributes
    return {"shape_attributes": {"name": name, **shape}, "region_attributes": given}


def rect(x: int, **attributes: Any) -> dict[str, Any]:
    return region("rect", attributes, x=x, y=20, width=10, height=15)


def write(path: Path, entries: dict[str, Any], *, project: bool = False) -> None:
    """An entry for each image, given its regions: keys are names and sizes of files in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        f"{name}-1": {"filename": name, "size": 123, "regions": regions, "file_attributes": {}}
        for name, regions in entries.items()
    }
    if project:
        content = {
            "_via_settings": {"ui": {}, "core": {"filepath": {}}, "project": {"name": "p"}},
            "_via_img_metadata": content,
            "_via_attributes": {"region": {"class": {"type": "text"}}, "file": {}},
            "_via_data_format_version": "2.0.10",
            "_via_image_id_list": list(content),
        }
    path.write_text(json.dumps(content))


SHAPES = [
    region("polygon", all_points_x=[x for x, _ in POLYGON], all_points_y=[y for _, y in POLYGON]),
    region("circle", cx=14, cy=15, r=12.5),
    region("ellipse", cx=26, cy=20, rx=18, ry=7, theta=math.radians(330)),
    region("ellipse", cx=26, cy=20, rx=18, ry=7),
    rect(30, **{"class": "y"}),
    region("point", cx=3, cy=3),
    region("polyline", all_points_x=[1, 2, 3], all_points_y=[1, 2, 1]),
]


@pytest.mark.parametrize("version", ["1", "2", "project"])
def test_shapes(version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """VIA 1 numbers regions in a dict; ellipses are turned clockwise."""
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    numbered = {str(place): one for place, one in enumerate(SHAPES)}
    regions: Any = numbered if version == "1" else SHAPES
    write(
        tmp_path / "via_region_data.json",
        {"a.png": regions, "b.png": {} if version == "1" else []},
        project=version == "project",
    )
    options = Via(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert [image.file_name for image in dataset.images] == ["a.png", "b.png"]
    found = objects(dataset, "a.png")
    assert [label for label, _ in found] == ["x", "x", "x", "x", "y"]
    masks = [mask for _, mask in found]
    assert same_but_for_the_border(masks[0], by_pillow(POLYGON))
    assert same_but_for_the_border(masks[1], disc(14, 15, 12.5))
    for mask, degrees in ((masks[2], 330), (masks[3], 0)):
        assert same_but_for_the_border(mask, oval(26, 20, 18, 7, degrees))
    assert not masks[4].any()
    assert dataset.images[0].annotations[4].box == (30.0, 20.0, 40.0, 35.0)
    text = capsys.readouterr().out
    assert "dropped 1: shapes of type point, which has no area (a.png: region 5)" in text
    assert "dropped 1: shapes of type polyline, which has no area (a.png: region 6)" in text
    assert "left out 1: images without an annotation (see --keep-unannotated) (c.png)" in text
    assert "not where the annotation says" not in text
    options = Via(tmp_path / "via_region_data.json", tmp_path / "m.json", rectangles="mask")
    convert(options)
    mask = objects(checked(options, tmp_path / "cache"), "a.png")[4][1]
    assert (mask == block(30, 20, 40, 35)).all()


@pytest.mark.parametrize(
    ("attributes", "attribute", "labels"),
    [
        ([{"kind": "a"}, {"kind": "b"}], None, ["a", "b"]),
        ([{"size": "s", "Label": "a"}, {"size": "l", "Label": "b"}], None, ["a", "b"]),
        ([{"size": "s", "label": "a"}, {"size": "l", "label": "b"}], "size", ["s", "l"]),
        ([{"type": {"a": True, "b": False}}, {"type": {"b": True}}], None, ["a", "b"]),
        ([{"type": {"a": True, "b": True}}, {"type": "b"}], None, ["b"]),
        ([{"type": ""}, {}, {"type": "b"}], None, ["b"]),
        ([{}, {}], None, ["object", "object"]),
    ],
)
def test_the_class_is_an_attribute(
    attributes: list[dict[str, Any]],
    attribute: str | None,
    labels: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "a.json", {"a.png": [rect(10 * i, **a) for i, a in enumerate(attributes)]})
    options = Via(tmp_path / "a.json", tmp_path / "out.json", attribute=attribute)
    convert(options)
    assert [label for label, _ in objects(checked(options, tmp_path / "c"), "a.png")] == labels
    text = capsys.readouterr().out
    lost = len(attributes) - len(labels)
    assert (f"dropped {lost}: regions whose attribute 'type' names no class, or s" in text) == (
        lost > 0
    )
    told = "noticed 2: regions without an attribute, as all here: of one class, object (a.png: regi"
    assert (told in text) == (attributes[0] == {})


def test_images_of_the_same_name_are_those_beside_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        picture(tmp_path / part / "a.png")
        write(tmp_path / part / "via.json", {"a.png": [rect(10, **{"class": part})]})
    for part in ("train", "val"):
        options = Via(tmp_path / part / "via.json", tmp_path / "out.json", images=tmp_path)
        convert(options)
        dataset = checked(options, tmp_path / "cache")
        assert [image.file_name for image in dataset.images] == [f"{part}/a.png"]
        assert dataset.class_names == (part,)
        assert "left out" not in capsys.readouterr().out
    write(tmp_path / "up" / "via.json", {"train\\a.png": [rect(10)]})  # the file in another folder
    options = Via(tmp_path / "up" / "via.json", tmp_path / "out.json", images=tmp_path)
    convert(options)
    assert [i.file_name for i in checked(options, tmp_path / "cache").images] == ["train/a.png"]


# As VIA 2 writes them: names and JSON in quotes, quotes in them twice, CRLF.
EXPORT = r"""
filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes
"a.png",123,"{}",3,0,"{""name"":""circle"",""cx"":14,""cy"":15,""r"":12.5}","{""class"":""x""}"
"a.png",123,"{}",3,1,"{""name"":""rect"",""x"":30,""y"":20,""width"":10,""height"":15}","{""class"":""\""y""}"
"a.png",123,"{}",3,2,"{""name"":""point"",""cx"":3,""cy"":4}","{""class"":""x""}"
b.png,-1,"{}",0,0,"{}","{}"
"""
CSV = EXPORT.strip().replace("\n", "\r\n")


@pytest.mark.parametrize("first", ["filename", "#filename", "\ufefffilename"])
def test_a_csv_has_the_same_regions(
    first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder without VIA's JSON it is found."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "via_export_csv.csv").write_text(
        CSV.replace("filename", first, 1), encoding="utf-8", newline=""
    )
    (tmp_path / "other.csv").write_text("filename,size\r\n")
    options = Via(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert [image.file_name for image in dataset.images] == ["a.png", "b.png"]
    found = objects(dataset, "a.png")
    assert [label for label, _ in found] == ["x", '"y']
    assert same_but_for_the_border(found[0][1], disc(14, 15, 12.5))
    assert dataset.images[0].annotations[1].box == (30.0, 20.0, 40.0, 35.0)
    assert dataset.images[1].annotations == ()
    told = capsys.readouterr().out
    assert "dropped 1: shapes of type point, which has no area (a.png: region 2)" in told


def test_an_outline_in_a_csv_may_be_long(tmp_path: Path) -> None:
    """Python's reader stops at 131,072 characters of a cell."""
    picture(tmp_path / "a.png")
    corners = [[3, 3], [40, 3], [40, 30], [3, 30]]
    xs, ys = ([c[axis] for c in corners for _ in range(20_000)] for axis in (0, 1))
    shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
    with (tmp_path / "via.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV.splitlines()[0].split(","))
        writer.writerow(["a.png", 1, "{}", 1, 0, json.dumps(shape), '{"class": "x"}'])
    options = Via(tmp_path / "via.csv", tmp_path / "out.json")
    convert(options)
    [(_, mask)] = objects(checked(options, tmp_path / "cache"), "a.png")
    assert same_but_for_the_border(mask, block(3, 3, 40, 30))


def table(*lines: str) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        picture(folder / "a.png")
        (folder / "via.csv").write_text("\n".join(lines))
        return Via(folder / "via.csv", folder / "out.json")

    return make


HEAD = CSV.splitlines()[0]


def broken(*regions: Any, **options: Any) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        picture(folder / "a.png")
        write(folder / "via.json", {"a.png": list(regions)})
        return Via(folder / "via.json", folder / "out.json", **options)

    return make


def text(content: str) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        (folder / "via.json").write_text(content)
        return Via(folder / "via.json", folder / "out.json")

    return make


def folders(*names: str) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        for name in names:
            (folder / name).mkdir()
        return Via(folder, folder / "out.json")

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text("{"), r"via.json: not JSON"),
        (text('{"a": {"filename": "a.png"}}'), r"via.json: not from VIA 1 or 2: entries with f"),
        (text('{"project": {"pid": "1"}, "file": {}}'), r"via.json: not from VIA 1 or 2"),
        (
            text(
                '{"project": {}, "config": {}, "attribute": {}, "file": {}, "metadata": {"1_x": '
                '{"vid": "1", "flg": 0, "z": [], "xy": [2, 1, 1, 9, 9], "av": {}}}, "view": {}}'
            ),
            r"via.json: VIA 3's: not read \(VIA 1 and 2 are\)$",
        ),
        (broken(3), r"via.json: a.png: region 0: without shape_attributes"),
        (broken(rect(1), region("blob")), r"via.json: a.png: region 1: its shape is 'blob'"),
        (broken(region("circle", cx=1, cy="2", r=3)), r"region 0: its cx, cy, r are 1, '2', 3"),
        (
            broken(region("polygon", all_points_x=[1, 2], all_points_y=[1])),
            r"region 0: its all_points_x and all_points_y are not lists of one length",
        ),
        (
            broken(region("polygon", all_points_x=[1, 2, 3], all_points_y=[1, None, 2])),
            r"region 0: its all_points_x and all_points_y are not all numbers",
        ),
        (broken(rect(1, a="x", b="y")), r"via.json: several attributes may be the class: 'a', 'b'"),
        (broken(rect(1, a="x"), attribute="b"), r"--attribute: .*via.json has no 'b', but 'a'$"),
        (table("filename,file_size,region_attributes"), r"no column region_shape_attributes$"),
        (table(""), r"via.csv: not from VIA 1 or 2: no column filename$"),
        (table(HEAD), r"via.csv: no usable image is left"),
        (table(HEAD, "a.png,1"), r"via.csv: line 2: region_shape_attributes: not a JSON object: "),
        (table(HEAD, 'a.png,1,{},1,0,{},"[3]"'), r"line 2: region_attributes: not a JSON object"),
        (table(HEAD, 'a.png,1,{},1,0,"{}"x'), r"via.csv: not CSV after line 1: "),
        (
            table(HEAD, 'a.png,1,{},1,0,"{""name"":""rect"",""x"":1}",{}'),
            r"via.csv: a.png: region 0: its x, y, width, height are 1, None, None, None",
        ),
        (lambda folder: Via(folder, folder / "out.json"), r"name the JSON or CSV file .*: none\)"),
        (folders("x.csv", "x.json"), r"name the JSON or CSV file .*: none\)"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    make: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(make(tmp_path), message, tmp_path)
