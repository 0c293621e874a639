"""Pascal VOC."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exports import (
    HEIGHT,
    PICTURES,
    WIDTH,
    as_voc,
    as_voc_without_xml,
    block,
    by_pillow,
    checked,
    counted,
    objects,
    picture,
    refuses,
    same_but_for_the_border,
    voc_object,
    voc_png,
    voc_xml,
)
from PIL import Image

from mrcnn_jax.convert.common import (
    Options,
)
from mrcnn_jax.convert.voc import Voc
from mrcnn_jax.convert.write import convert
from mrcnn_jax.data.report import Reason


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_voc_borders_difficult_objects_and_boxes_without_masks(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also an object with a mask so small, and partly outside its box, that only its number
    identifies it."""
    picture(tmp_path / "JPEGImages" / "x.jpg")
    picture(tmp_path / "JPEGImages" / "y.jpg")
    inner, core = block(4, 6, 18, 30), block(30, 5, 45, 15)
    bit = block(40, 25, 43, 28)
    values = counted([inner, core, bit])
    values[block(2, 4, 20, 32) & ~inner] = 255
    path = tmp_path / "SegmentationObject" / "x.png"
    voc_png(path, values)
    Image.open(path).convert(mode).save(path)
    text = voc_object("cat", (3, 5, 20, 32)) + voc_object("dog", (31, 6, 45, 15), difficult=1)
    text += voc_object("cow", (43, 23, 52, 38)) + voc_object("cat", (22, 34, 30, 40))
    voc_xml(tmp_path / "Annotations" / "x.xml", text, filename="x.jpg")
    voc_xml(
        tmp_path / "Annotations" / "y.xml",
        voc_object("dog", (1, 1, 52, 40)),
        size=(0, 0),
        filename="wrong.jpg",
    )
    options = Voc(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache", but=Reason.FAR_FROM_MASK)  # the cow's
    found = objects(dataset, "x.jpg")
    assert [label for label, _ in found] == ["cat", "dog", "cow", "cat"]
    for (_, mask), expected in zip(found, (inner, core, bit, ~inner & inner), strict=True):
        assert (mask == expected).all()
    assert [o.box for o in dataset.images[0].annotations][:2] == [
        (2.0, 4.0, 20.0, 32.0),
        (30.0, 5.0, 45.0, 15.0),
    ]
    assert dataset.images[0].annotations[3].box == (21.0, 33.0, 30.0, 40.0)
    assert [o.iscrowd for o in dataset.images[0].annotations] == [False, True, False, False]
    assert dataset.images[1].annotations[0].box == (0.0, 0.0, 52.0, 40.0)
    lines = capsys.readouterr().out
    assert lines.startswith(
        "kept 2 images, 4 objects, 1 crowds, 2 objects without a mask (box only)\n"
    )
    assert "(see --difficult) (x: object 2)" in lines
    assert (
        "repaired 1: images that are not where the annotation says: found by their name (y)"
        in lines
    )
    convert(Voc(tmp_path, tmp_path / "out.json", difficult="object"))
    assert not any(
        o.iscrowd
        for o in checked(options, tmp_path / "cache", but=Reason.FAR_FROM_MASK).images[0].objects
    )


@pytest.mark.parametrize(
    ("names", "cat", "other"), [(None, 8, 30), ("_background_\ncat\nvoid", 1, 2)]
)
def test_voc_numbers_that_are_not_those_of_the_xml(
    names: str | None, cat: int, other: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instances with other numbers go to the object with their box; those without an <object> take
    the class there, or are dropped."""
    picture(tmp_path / "JPEGImages" / "x.png")
    parts = [
        block(30, 5, 45, 15),
        block(4, 6, 18, 30),
        block(30, 25, 40, 35),
        block(46, 25, 50, 35),
    ]
    voc_png(tmp_path / "SegmentationObject" / "x.png", counted(parts))
    classes = np.zeros((HEIGHT, WIDTH), int)
    classes[parts[2]], classes[parts[3] | block(30, 25, 40, 27)] = cat, other
    if names is not None:
        (tmp_path / "class_names.txt").write_text(names)
    voc_png(tmp_path / "SegmentationClass" / "x.png", classes)
    text = (
        voc_object("dog", (5, 7, 18, 30))
        + voc_object("cow", (31, 6, 45, 15))
        + voc_object("hen", (48, 30, 52, 40))
    )
    voc_xml(tmp_path / "Annotations" / "x.xml", text)
    options = Voc(tmp_path, tmp_path / "out.json")
    convert(options)
    found = objects(checked(options, tmp_path / "cache"), "x.png")
    assert [label for label, _ in found] == ["dog", "cow", "hen", "cat"]
    for (_, mask), expected in zip(
        found, (parts[1], parts[0], block(0, 0, 0, 0), parts[2]), strict=True
    ):
        assert (mask == expected).all()
    assert "nor SegmentationClass a name there (x: value 4)" in capsys.readouterr().out


def test_voc_boxes_from_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, box in (("x", (0, 3, 9, 12)), ("y", (10, 10, 20, 20))):
        picture(tmp_path / f"{name}.png")
        voc_xml(tmp_path / f"{name}.xml", voc_object("cat", box))
    options = Voc(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert [image.annotations[0].box for image in dataset.images] == [
        (0.0, 3.0, 9.0, 12.0),
        (10.0, 10.0, 20.0, 20.0),
    ]
    assert "(x: object 1, y: object 1)" in capsys.readouterr().out


def test_voc_boxes_with_decimals_are_from_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As CVAT and Datumaro write them; a few decimals, as in VOC itself, say nothing."""
    for few in (False, True):
        folder = tmp_path / str(few)
        whole = voc_object("cat", (11, 11, 20, 20))
        for name, box in (("x", (3.0, 5.0, 9.0, 12.0)), ("y", (10.0, 10.25, 20.0, 20.0))):
            picture(folder / f"{name}.png")
            voc_xml(folder / f"{name}.xml", voc_object("cat", box) + few * whole)
        options = Voc(folder, folder / "out.json")
        convert(options)
        first, second = checked(options, tmp_path / "cache").images
        assert first.objects[0].box == (3 - few, 5 - few, 9, 12)
        assert second.objects[0].box == (10 - few, 10.25 - few, 20, 20)
        assert ("taken to count from 0" in capsys.readouterr().out) != few


@pytest.mark.parametrize(
    ("box", "start"), [((1, 3, 45, 38), 1), ((0, 2, 44, 37), 0)], ids=["from 1", "from 0"]
)
def test_polygons_of_voc_exports(
    box: tuple[int, ...], start: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Roboflow's, which count as its boxes do, and LabelMe's; without a box, or with two points;
    a point alone is dropped."""
    points = [(0.0, 2.0), (44.0, 8.5), (30.0, 37.0)]
    pairs = [(x + start, y + start) for x, y in points]
    numbered = "".join(f"<x{n}>{x}</x{n}><y{n}>{y}</y{n}>" for n, (x, y) in enumerate(pairs, 1))
    listed = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in pairs)
    whole = voc_object("cat", box)
    text = whole.replace("</object>", f"<polygon>{numbered}</polygon></object>")
    text += f"<object><name>dog</name><polygon>{listed}</polygon></object>"
    text += whole.replace("</object>", "<polygon><x1>3</x1><y1>3</y1></polygon></object>")
    text += "<object><name>cow</name><point><x>3</x><y>3</y></point></object>"
    text += whole.replace("</object>", "<deleted>1</deleted></object>")
    picture(tmp_path / "x.png")
    voc_xml(tmp_path / "x.xml", text)
    options = Voc(tmp_path, tmp_path / "out.json")
    convert(options)
    written = json.loads(options.out.read_text())["annotations"]
    flat = [value for point in points for value in point]
    assert [a.get("segmentation") for a in written] == [[flat], [flat], None]
    assert [a["bbox"] for a in written[:2]] == [[0, 2, 44, 35]] * 2
    assert written[2]["bbox"] == [box[0] - start, box[1] - start, box[2], box[3] - box[1] + start]
    found = objects(checked(options, tmp_path / "cache"), "x.png")
    assert [label for label, _ in found] == ["cat", "dog", "cat"]
    assert same_but_for_the_border(found[0][1], by_pillow([list(point) for point in points]))
    lines = capsys.readouterr().out
    assert (
        "dropped 1: shapes of type object without a box, which has no area (x: object 4)" in lines
    )
    assert "(x: object 3)" in lines
    assert "left out 1: objects marked as deleted (x: object 5)" in lines


def test_voc_images_beside_the_xml_win_over_a_stale_filename(tmp_path: Path) -> None:
    for name in ("cam1/001.png", "cam2/a.png"):
        picture(tmp_path / "JPEGImages" / name)
    text = voc_object("cat", (3, 3, 9, 9))
    voc_xml(tmp_path / "Annotations" / "cam1" / "001.xml", text, filename="a.png")
    options = Voc(tmp_path, tmp_path / "out.json")
    convert(options)
    (image,) = checked(options, tmp_path / "cache").images
    assert image.file_name == "cam1/001.png"


def break_voc(old: str, new: str) -> Callable[[Path], Options]:
    def write(folder: Path) -> Options:
        options = as_voc(folder, {"a.png": PICTURES["a.png"]})
        path = folder / "Annotations" / "a.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        return options

    return write


def break_labelmap(folder: Path) -> Options:
    options = as_voc_without_xml(folder, {"a.png": PICTURES["a.png"]})
    path = folder / "labelmap.txt"
    path.write_text(path.read_text().replace("10,200,30", "10,200"))
    return options


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            break_voc("<xmin>", "<xmin>x"),
            r"a.xml: object 1: its <bndbox/xmin> is 'x\d+', which is not a number",
        ),
        (break_voc("<name>ядро</name>", ""), r"a.xml: object 1: its <name> is missing"),
        (
            break_voc("<height>40", "<height>30"),
            r"SegmentationObject/a.png: it is 40 x 52, but 30 x 52 according to .*a.xml",
        ),
        (break_voc("</annotation>", ""), r"a.xml: not XML"),
        (
            break_labelmap,
            r"labelmap.txt: class 'cell wall': its colour '10,200' is not three numbers",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(write(tmp_path), message, tmp_path)
