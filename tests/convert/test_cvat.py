"""Exports of CVAT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from exports import (
    HEIGHT,
    PICTURES,
    POLYGON,
    RING,
    WIDTH,
    as_cvat,
    block,
    by_pillow,
    checked,
    cvat_file,
    cvat_image,
    cvat_mask,
    objects,
    picture,
    refuses,
    same_but_for_the_border,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    Options,
)
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.write import convert


def test_cvat_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a project's export, with a folder for a subset; turns are as OpenCV turns."""
    picture(tmp_path / "images" / "train" / "dir" / "x.png")
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in POLYGON)
    box = 'xtl="11.00" ytl="16.00" xbr="41.00" ybr="24.00"'
    shapes = f"""
        <polygon label="x" source="manual" occluded="0" points="{points}" z_order="0">
            <attribute name="a">b</attribute></polygon>
        <box label="x" source="manual" occluded="0" {box} z_order="1"></box>
        <box label="x" source="manual" occluded="0" {box} rotation="30.00" z_order="1"></box>
        <ellipse label="x" source="manual" occluded="0" cx="26.00" cy="20.00" rx="18.00" ry="7.00"
            rotation="330.00" z_order="0"></ellipse>
        <polygon label="x" occluded="0" points="2,2;12,2;12,9;2,9" z_order="0" group_id="3"/>
        <polygon label="x" occluded="0" points="40,30;50,30;50,38;40,38" z_order="0" group_id="3"/>
        <polygon label="x" occluded="0" points="20,30;30,30;30,38;20,38" z_order="0" group_id="0"/>
        <polygon label="x" occluded="0" points="32,30;35,30;35,38;32,38" z_order="0" group_id="0"/>
        <polyline label="x" occluded="0" points="2,2;12,2" z_order="0"/>
        <tag label="x" source="manual"/>
        <skeleton label="x" source="manual" z_order="0">
            <points label="1" outside="0" occluded="0" points="1,1"/></skeleton>
    """
    picture(tmp_path / "images" / "train" / "dir" / "y.png")
    other = cvat_image("train\\dir\\y.png", cvat_mask("x", RING))
    cvat_file(
        tmp_path / "annotations.xml",
        cvat_image("dir/x.png", shapes, more=' subset="train"') + other,
    )
    options = Cvat(tmp_path / "annotations.xml", tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    masks = [mask for _, mask in objects(dataset, "train/dir/x.png")]
    assert same_but_for_the_border(masks[0], by_pillow(POLYGON))
    assert not masks[1].any()
    assert dataset.images[0].annotations[1].box == (11.0, 16.0, 41.0, 24.0)
    assert same_but_for_the_border(
        masks[2], by_pillow(cv2.boxPoints(((26, 20), (30, 8), 30)).tolist())
    )
    expected = cv2.ellipse(
        np.zeros((HEIGHT, WIDTH), np.uint8), (26, 20), (18, 7), 330, 0, 360, 1, thickness=-1
    )
    assert same_but_for_the_border(masks[3], expected == 1)
    assert (masks[4] == (block(2, 2, 12, 9) | block(40, 30, 50, 38))).all()
    assert (masks[5] == block(20, 30, 30, 38)).all()
    assert len(masks) == 7, "group 0 is none"
    assert (objects(dataset, "train/dir/y.png")[0][1] == RING).all()
    text = capsys.readouterr().out
    for kind, number in (("polyline", 9), ("tag", 10), ("skeleton", 11)):
        assert (
            f"dropped 1: shapes of type {kind}, which has no area (dir/x.png: {kind} {number})"
            in text
        )
    assert "not where the annotation says" not in text


def test_frames_of_a_video_have_no_suffix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a project each subset has frames of the same names; a dot in a name is no suffix."""
    for name in ("frame_0.PNG", "frame_1.PNG", "take 1.5.jpg", "train/a.png", "val/a.png"):
        picture(tmp_path / "images" / name)
    box = '<box label="x" xtl="10" ytl="20" xbr="{}" ybr="30"/>'
    images = [("frame_0", ""), ("frame_1", ""), ("take 1.5", ""), ("a", ' subset="val"')]
    text = "".join(
        cvat_image(name, box.format(20 + n), more=more) for n, (name, more) in enumerate(images)
    )
    cvat_file(tmp_path / "annotations.xml", text)
    options = Cvat(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert {image.file_name: image.annotations[0].box[2] for image in dataset.images} == {
        "frame_0.PNG": 20.0,
        "frame_1.PNG": 21.0,
        "take 1.5.jpg": 22.0,
        "val/a.png": 23.0,
    }
    assert "left out 1: images without an annotation" in capsys.readouterr().out
    picture(tmp_path / "images" / "frame_1.jpg")
    with pytest.raises(ConfigError, match=r"both frame_1.PNG and frame_1.jpg may be the image"):
        convert(options)


def test_shapes_without_points_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "x.png")
    shapes = """<polygon label="x" points=""/><polygon label="x" points="1,1;2,2"/>
        <box label="x" xtl="5" ytl="5" xbr="5" ybr="9"/><points label="x" points="1,1"/>
        <mask label="x" rle="" left="1" top="1" width="0" height="0"/>
        <ellipse label="x" cx="9" cy="9" rx="0" ry="0"/>
        <box label="x" xtl="10" ytl="20" xbr="40" ybr="30"/>"""
    cvat_file(tmp_path / "annotations.xml", cvat_image("x.png", shapes))
    options = Cvat(tmp_path, tmp_path / "out.json")
    convert(options)
    assert checked(options, tmp_path / "cache").report.kept["objects"] == 1
    text = capsys.readouterr().out
    dropped = [line.split(":")[0] for line in text.splitlines() if line.startswith("dropped")]
    assert sum(int(line.split()[1]) for line in dropped) == 6


def break_cvat(*changes: tuple[str, str]) -> Callable[[Path], Options]:
    def write(folder: Path) -> Options:
        options = as_cvat(folder, {"a.png": PICTURES["a.png"]})
        text = (folder / "annotations.xml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (folder / "annotations.xml").write_text(text)
        return options

    return write


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            break_cvat(('"></mask>', '">')),
            r"annotations.xml: not XML \(empty or cut off\?\): mismatched tag: line",
        ),
        (
            break_cvat(("<annotations>", f"{BOMB}<annotations>")),
            r"annotations.xml: refused: no annotation tool writes a <!DOCTYPE>",
        ),
        (
            break_cvat(("<annotations>", "<notes>"), ("</annotations>", "</notes>")),
            r"annotations.xml: its root is <notes>, not <annotations>",
        ),
        (break_cvat(("1.1<", "2.0<")), r"annotations.xml: <version> is '2.0', not 1.1"),
        (
            break_cvat(("<image", "<track/><image")),
            r"annotations.xml: <track>: this is 'CVAT for video'; export it as",
        ),
        (
            break_cvat(('width="52"', "")),
            r"annotations.xml: image 0 \(a.png\): its width is missing",
        ),
        (
            break_cvat(('height="40"', 'height="41"')),
            r"image 0 \(a.png\): a.png is 40 x 52, annotated as 41 x 52",
        ),
        (
            break_cvat(('rle="', 'rle="1, ')),
            r"\(a.png\): mask 1: its rle has \d+ pixels, its box 24 x 24, the image 40 x 52",
        ),
        (
            break_cvat(('rle="', 'rle="-')),
            r"image 0 \(a.png\): mask 1: its rle is not a list of counts",
        ),
        (
            break_cvat(("<mask", '<polygon label="x" points="1,1;2,z;3,3"/><mask')),
            r"polygon 1: its point is 'z', which is not a number",
        ),
        (
            break_cvat(("<mask", '<box label="x" xtl="1" ytl="1" xbr="inf" ybr="3"/><mask')),
            r"box 1: its xbr is 'inf', which is not a number",
        ),
        (break_cvat(('label="ядро"', "")), r"image 0 \(a.png\): mask 1: no label"),
        (
            break_cvat(
                ("</image>", '</image><image id="1" name="./a.png" width="52" height="40"/>')
            ),
            r"image 1 .*its image a.png is also that of",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    refuses(write(tmp_path), message, tmp_path)
