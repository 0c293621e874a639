"""Exports written by hand, converted, read by the checker: the masks are those that were drawn, and
nothing is lost without a word."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import math
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import ConfigError, DataConfig
from mrcnn_jax.data.coco import CocoDataset, read_coco
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.report import Reason
from mrcnn_jax.datasets.convert.common import Options
from mrcnn_jax.datasets.convert.cvat import Cvat
from mrcnn_jax.datasets.convert.labelme import Labelme
from mrcnn_jax.datasets.convert.mask_images import Masks
from mrcnn_jax.datasets.convert.voc import Voc
from mrcnn_jax.datasets.convert.write import convert

ROOT = Path(__file__).parents[3]
Drawn = dict[str, list[tuple[str, np.ndarray]]]  # image -> label and mask [h, w] of its objects

HEIGHT, WIDTH = 40, 52
rows, columns = np.mgrid[:HEIGHT, :WIDTH]


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(columns + 0.5 - x, rows + 0.5 - y) <= radius


def block(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    return (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)


RING = disc(14, 15, 12) & ~disc(16, 14, 5)
PICTURES: Drawn = {
    "a.png": [
        ("ядро", RING),
        ("cell wall", block(30, 0, 40, 9) | block(44, 20, 52, 40)),
        ("cell wall", disc(16, 14, 3)),
    ],
    "größe 2.png": [("cell wall", block(51, 39, 52, 40)), ("ядро", block(0, 0, 5, 40))],
    "empty.png": [],
}


def picture(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path, **options)


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


# -- what the tools write, by hand -----------------------------------------------------------------


def tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    """First and last column and row (x1, y1, x2, y2) of a mask, both inside."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


def labelme_mask(label: str, mask: np.ndarray, **more: Any) -> dict[str, Any]:
    x1, y1, x2, y2 = tight(mask)
    encoded = base64.b64encode(png(mask[y1 : y2 + 1, x1 : x2 + 1].astype(np.uint8))).decode()
    return {
        "label": label,
        "points": [[x1, y1], [x2, y2]],
        "group_id": None,
        "shape_type": "mask",
        "flags": {},
        "mask": encoded,
        **more,
    }


def labelme_file(
    path: Path,
    image: str,
    shapes: list[dict[str, Any]],
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **more: Any,
) -> None:
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
    }
    path.write_text(json.dumps(content | {"imageHeight": size[0], "imageWidth": size[1]} | more))


def cvat_mask(label: str, mask: np.ndarray) -> str:
    x1, y1, x2, y2 = tight(mask)
    inside = mask[y1 : y2 + 1, x1 : x2 + 1]
    runs = [(value, len(list(same))) for value, same in itertools.groupby(inside.ravel().tolist())]
    counts = ([0] if runs[0][0] else []) + [count for _, count in runs]
    box = f'left="{x1}" top="{y1}" width="{x2 - x1 + 1}" height="{y2 - y1 + 1}"'
    return f'<mask label={quoteattr(label)} source="manual" occluded="0" rle="{", ".join(map(str, counts))}" {box} z_order="0"></mask>'


def cvat_file(path: Path, images: str) -> None:
    meta = "<meta><task><id>1</id><labels><label><name>x</name></label></labels></task></meta>"
    path.write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}{images}</annotations>'
    )


def cvat_image(
    name: str, shapes: str, size: tuple[int, int] = (HEIGHT, WIDTH), more: str = ""
) -> str:
    return f'<image id="0" name={quoteattr(name)} width="{size[1]}" height="{size[0]}"{more}>{shapes}</image>'


def voc_colour(index: int) -> tuple[int, ...]:
    """By Python's text of the bits instead of shifts."""
    bits = f"{index:09b}"[::-1]
    return tuple(int(bits[channel::3][:3].ljust(8, "0"), 2) for channel in range(3))


def voc_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([c for index in range(256) for c in voc_colour(index)])
    image.save(path)


def voc_xml(
    path: Path, objects: str, size: tuple[int, int] = (HEIGHT, WIDTH), filename: str | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><folder>VOC2012</folder><filename>{filename or path.stem + '.png'}</filename>"
        f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size><segmented>1</segmented>{objects}</annotation>"
    )


def voc_object(label: str, box: tuple[float, ...], difficult: int = 0) -> str:
    """`box`: xmin, ymin, xmax, ymax as VOC counts, from 1."""
    sides = "".join(
        f"<{side}>{value}</{side}>"
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{label}</name><pose>Left</pose><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def counted(masks: list[np.ndarray], *, first: int = 1) -> np.ndarray:
    """A label image: first, first + 1, ... where the masks are."""
    return sum(
        (mask * number for number, mask in enumerate(masks, first)), np.zeros((HEIGHT, WIDTH), int)
    )


def as_labelme(folder: Path, drawn: Drawn) -> Options:
    for name, objects in drawn.items():
        picture(folder / name)
        labelme_file(
            folder / f"{Path(name).stem}.json",
            name,
            [labelme_mask(label, mask) for label, mask in objects],
        )
    return Labelme(folder, folder / "out.json")


def as_cvat(folder: Path, drawn: Drawn) -> Options:
    images = ""
    for name, objects in drawn.items():
        picture(folder / "images" / name)
        images += cvat_image(name, "".join(cvat_mask(label, mask) for label, mask in objects))
    cvat_file(folder / "annotations.xml", images)
    return Cvat(folder, folder / "out.json")


def as_voc(folder: Path, drawn: Drawn) -> Options:
    for name, objects in drawn.items():
        picture(folder / "JPEGImages" / name)
        boxes = [(label, tight(mask)) for label, mask in objects]
        text = "".join(
            voc_object(label, (x1 + 1, y1 + 1, x2 + 1, y2 + 1)) for label, (x1, y1, x2, y2) in boxes
        )
        voc_xml(folder / "Annotations" / f"{Path(name).stem}.xml", text)
        voc_png(folder / "SegmentationObject" / name, counted([mask for _, mask in objects]))
    return Voc(folder, folder / "out.json")


def as_voc_without_xml(folder: Path, drawn: Drawn) -> Options:
    """As CVAT's "Segmentation mask" has them: colours, and a list of them; instances in colours of
    their own."""
    labels = sorted({label for objects in drawn.values() for label, _ in objects})
    colours = {label: (10, 200, 30 + 60 * i) for i, label in enumerate(labels)}
    for name, objects in drawn.items():
        picture(folder / "JPEGImages" / name)
        whole = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
        for number, (label, mask) in enumerate(objects, 1):
            border = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) == 1
            whole[:, border & ~whole.any((0, 3))] = (224, 224, 192)
            whole[0][mask], whole[1][mask] = colours[label], (255 - number, 0, number)
        for part, values in zip(("SegmentationClass", "SegmentationObject"), whole, strict=True):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / name).write_bytes(png(values))
    lines = ["# label : color (RGB) : 'body' parts : actions", "background:0,0,0::"]
    lines += [f"{label}:{','.join(map(str, colour))}::" for label, colour in colours.items()]
    (folder / "labelmap.txt").write_text("\n".join(lines))
    return Voc(folder, folder / "out.json")


def as_label_images(folder: Path, drawn: Drawn) -> Options:
    """16 bits, with a class for each value of each file."""
    classes = {}
    (folder / "masks").mkdir()
    for name, objects in drawn.items():
        picture(folder / "images" / name)
        values = counted([mask for _, mask in objects], first=1000).astype(np.uint16)
        (folder / "masks" / name).write_bytes(png(values))
        classes[name] = {str(1000 + number): label for number, (label, _) in enumerate(objects)}
    (folder / "classes.json").write_text(json.dumps(classes))
    return Masks(
        folder / "masks",
        folder / "out.json",
        images=folder / "images",
        classes=folder / "classes.json",
    )


def as_folders(folder: Path, drawn: Drawn) -> Options:
    """masks/image/class/1.png, 0 and 255. A folder cannot say that an image is empty:
    --keep-unannotated."""
    for name, objects in drawn.items():
        picture(folder / name)
        for number, (label, mask) in enumerate(objects, 1):
            path = folder / "masks" / Path(name).stem / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(mask.astype(np.uint8) * 255))
    return Masks(
        folder / "masks", folder / "out.json", images=folder, layout="folder", keep_unannotated=True
    )


def as_names(folder: Path, drawn: Drawn) -> Options:
    """class/image_1.png, 1 bit."""
    for name, objects in drawn.items():
        picture(folder / "images" / name)
        for number, (label, mask) in enumerate(objects, 1):
            path = folder / "masks" / label / f"{Path(name).stem}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return Masks(
        folder / "masks",
        folder / "out.json",
        images=folder / "images",
        layout="name",
        keep_unannotated=True,
    )


# -- what came of it -------------------------------------------------------------------------------


def checked(
    options: Options, cache: Path, out: Path | None = None, *, but: Reason | None = None
) -> CocoDataset:
    """The checker's data set of the converted file: nothing was dropped, clipped or mended there
    (`but` for this)."""
    read = read_coco(out or options.out, options.open_images().folder, DataConfig())
    found, _ = check_split(read, cache=cache, data=DataConfig(), keep_empty=True)
    found.refuse_lost_images()
    lost = {
        reason
        for reason, text in found.report.findings
        if reason.outcome in ("dropped", "clipped") or "annotations" in text
    }
    assert lost == ({but} if but else set())
    return found


def objects(dataset: CocoDataset, file: str) -> list[tuple[str, np.ndarray]]:
    """Label and mask of an image's objects; no mask is an empty one."""
    (image,) = (image for image in dataset.images if image.file_name == file)
    empty = np.zeros((image.height, image.width), bool)
    return [
        (
            dataset.class_names[o.label - 1],
            empty if o.rle is None else rle_ops.decode(o.rle).astype(bool),
        )
        for o in image.objects
    ]


def same_but_for_the_border(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether masks differ only in pixels that touch the border of the expected one (at its
    corners, too)."""
    kernel, mask = np.ones((3, 3), np.uint8), expected.astype(np.uint8)
    border = cv2.dilate(mask, kernel) != cv2.erode(
        mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1
    )
    return bool((found == expected)[~border].all()) and bool(expected.any())


@pytest.mark.parametrize(
    "write",
    [as_labelme, as_cvat, as_voc, as_voc_without_xml, as_label_images, as_folders, as_names],
    ids=lambda write: write.__name__,
)
def test_masks_come_back_as_they_were_drawn(
    write: Callable[[Path, Drawn], Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With holes, in several parts, of one pixel, at the border, inside one another; names and
    labels beyond ASCII; an empty image."""
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
    boxes = {image.file_name: {o.box for o in image.objects} for image in dataset.images}
    assert boxes["größe 2.png"] == {(51.0, 39.0, 52.0, 40.0), (0.0, 0.0, 5.0, 40.0)}
    areas = {a["area"] for a in json.loads(options.out.read_text())["annotations"]}
    assert areas == {float(mask.sum()) for drawn in PICTURES.values() for _, mask in drawn}


# -- labelme ---------------------------------------------------------------------------------------


def labelme_shape(
    kind: str, points: list[list[float]], label: str = "x", **more: Any
) -> dict[str, Any]:
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "shape_type": kind,
        "flags": {},
        "mask": None,
        **more,
    }


POLYGON = [[10.5, 3.2], [45.7, 8.1], [30.0, 20.0], [47.3, 37.9], [6.1, 33.3]]


def by_pillow(points: list[list[float]]) -> np.ndarray:
    """A polygon as labelme itself fills it."""
    image = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points], fill=1, outline=1)
    return np.asarray(image)


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
    assert dataset.images[0].objects[3].box == (10.0, 20.0, 40.0, 30.0)
    assert (masks[4] == (RING | block(30, 5, 40, 15))).all()
    assert dataset.images[0].objects[6].box == (40.0, 8.0, 52.0, 31.0), (
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
        f"    python -m mrcnn_jax.commands.check --annotations {options.out} --images {tmp_path}",
    ]


def test_rectangles_are_masks_if_they_are_said_to_be(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    labelme_file(tmp_path / "x.json", "x.png", [labelme_shape("rectangle", [[40, 30], [10, 20]])])
    cvat_file(
        tmp_path / "annotations.xml",
        cvat_image("x.png", '<box label="x" xtl="10" ytl="20" xbr="40" ybr="30"/>'),
    )
    for options in (
        Labelme(tmp_path / "x.json", tmp_path / "l.json", rectangles="mask"),
        Cvat(tmp_path / "annotations.xml", tmp_path / "c.json", rectangles="mask"),
    ):
        convert(options)
        ((_, mask),) = objects(checked(options, tmp_path / "cache"), "x.png")
        assert (mask == block(10, 20, 40, 30)).all()


@pytest.mark.parametrize(
    ("written", "mended"),
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
    written: str, mended: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        "repaired 1: images that lie elsewhere than the annotation says: found by their name (é.json)"
        in text
    ) == mended
    assert (
        "left out 1: images without an annotation (--keep-unannotated takes them as images without objects) (other.png)"
        in text
    )


def test_labelme_images_inside_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = png(np.full((HEIGHT, WIDTH, 3), 5, np.uint8))
    more = {"imageData": base64.b64encode(file).decode()}
    labelme_file(tmp_path / "x.json", "D:\\data\\x.png", [labelme_mask("x", RING)], **more)
    with pytest.raises(
        ConfigError,
        match=r"1 of 1 images are lost .*--allow-missing\): D:/data/x.png \(images whose file is missing\)",
    ):
        convert(Labelme(tmp_path, tmp_path / "out.json"))
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
    """labelme shows pictures as EXIF says, and the checker turns the pixels to fit its sizes;
    without a size, upright is meant."""
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


# -- CVAT ------------------------------------------------------------------------------------------


def test_cvat_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a project's export, with a folder for a subset; turns are as OpenCV turns."""
    picture(tmp_path / "images" / "train" / "dir" / "x.png")
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in POLYGON)
    box = 'xtl="11.00" ytl="16.00" xbr="41.00" ybr="24.00"'
    shapes = f"""
        <polygon label="x" source="manual" occluded="0" points="{points}" z_order="0"><attribute name="a">b</attribute></polygon>
        <box label="x" source="manual" occluded="0" {box} z_order="1"></box>
        <box label="x" source="manual" occluded="0" {box} rotation="30.00" z_order="1"></box>
        <ellipse label="x" source="manual" occluded="0" cx="26.00" cy="20.00" rx="18.00" ry="7.00" rotation="330.00" z_order="0"></ellipse>
        <polygon label="x" occluded="0" points="2,2;12,2;12,9;2,9" z_order="0" group_id="3"/>
        <polygon label="x" occluded="0" points="40,30;50,30;50,38;40,38" z_order="0" group_id="3"/>
        <polygon label="x" occluded="0" points="20,30;30,30;30,38;20,38" z_order="0" group_id="0"/>
        <polygon label="x" occluded="0" points="32,30;35,30;35,38;32,38" z_order="0" group_id="0"/>
        <polyline label="x" occluded="0" points="2,2;12,2" z_order="0"/>
        <tag label="x" source="manual"/>
        <skeleton label="x" source="manual" z_order="0"><points label="1" outside="0" occluded="0" points="1,1"/></skeleton>
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
    assert dataset.images[0].objects[1].box == (11.0, 16.0, 41.0, 24.0)
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
    assert "elsewhere" not in text


# -- Pascal VOC ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_voc_borders_difficult_objects_and_boxes_without_masks(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also an object of which so little is marked, and a bit outside of its box, that only its
    number tells which one it is."""
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
    assert [o.box for o in dataset.images[0].objects][:2] == [
        (2.0, 4.0, 20.0, 32.0),
        (30.0, 5.0, 45.0, 15.0),
    ]
    assert dataset.images[0].objects[3].box == (21.0, 33.0, 30.0, 40.0)
    assert [o.iscrowd for o in dataset.images[0].objects] == [False, True, False, False]
    assert dataset.images[1].objects[0].box == (0.0, 0.0, 52.0, 40.0)
    lines = capsys.readouterr().out
    assert lines.startswith(
        "kept 2 images, 4 objects, 1 crowds, 2 objects without a mask (box only)\n"
    )
    assert "(--difficult object) (x: object 2)" in lines
    assert (
        "repaired 1: images that lie elsewhere than the annotation says: found by their name (y)"
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
    """Instances numbered otherwise go to the object whose box they have; what no <object> has goes
    by its class, or is dropped."""
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
    assert "SegmentationClass has none of the names there (x: value 4)" in capsys.readouterr().out


def test_voc_boxes_from_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, box in (("x", (0, 3, 9, 12)), ("y", (10, 10, 20, 20))):
        picture(tmp_path / f"{name}.png")
        voc_xml(tmp_path / f"{name}.xml", voc_object("cat", box))
    options = Voc(tmp_path, tmp_path / "out.json")
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert [image.objects[0].box for image in dataset.images] == [
        (0.0, 3.0, 9.0, 12.0),
        (10.0, 10.0, 20.0, 20.0),
    ]
    assert "(x: object 1, y: object 1)" in capsys.readouterr().out


# -- folders of masks ------------------------------------------------------------------------------


def test_masks_beside_their_images(tmp_path: Path) -> None:
    """x/images/x.png with x/masks/1.png; and one class for all."""
    for name, drawn in PICTURES.items():
        stem = Path(name).stem
        picture(tmp_path / stem / "images" / name)
        (tmp_path / stem / "masks").mkdir()
        for number, (_, mask) in enumerate(drawn):
            (tmp_path / stem / "masks" / f"{number}.png").write_bytes(
                png(mask.astype(np.uint8) * 255)
            )
    options = Masks(
        tmp_path,
        tmp_path / "out.json",
        images=tmp_path,
        layout="folder",
        class_name="nucleus",
        keep_unannotated=True,
    )
    with pytest.raises(ConfigError, match=r"a/masks/0.png: value 255: which class is it\?"):
        convert(dataclasses.replace(options, class_name=None))
    convert(options)
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("nucleus",)
    for name, drawn in PICTURES.items():
        found = [mask for _, mask in objects(dataset, f"{Path(name).stem}/images/{name}")]
        assert len(found) == len(drawn)
        assert all(
            (mask == expected).all() for mask, (_, expected) in zip(found, drawn, strict=True)
        )


def test_masks_in_colours_by_value_and_by_class_folder(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "x.jpg")
    for name, mask, colour in (
        ("cat", RING, (255, 0, 0)),
        ("dog", block(40, 0, 50, 9), (0, 0, 255)),
    ):
        values = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        values[mask] = colour
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(values))
    (tmp_path / "classes.json").write_text('{"#ff0000": "red", "dog/x": "blue"}')
    for classes, names in ((None, ("cat", "dog")), (tmp_path / "classes.json", ("red", "blue"))):
        options = Masks(
            tmp_path, tmp_path / "out.json", images=tmp_path / "images", classes=classes
        )
        (tmp_path / "out.json").unlink(missing_ok=True)
        convert(options)
        found = objects(checked(options, tmp_path / "cache"), "x.jpg")
        assert tuple(label for label, _ in found) == names
        assert (found[0][1] == RING).all()


# -- what all formats share ------------------------------------------------------------------------


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
            assert len(image.objects) == len(drawn[image.file_name])
    texts = [file.read_text() for file in files]
    capsys.readouterr()
    assert [file.read_text() for file in convert(split)] == texts
    assert "left out 4: JSON files that are not of labelme" in capsys.readouterr().out, (
        "those of the first time, and the checker's"
    )
    convert(Labelme(tmp_path, options.out, split=0.3, seed=6))
    assert [file.read_text() for file in files] != texts


def test_categories_skip_and_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = as_cvat(tmp_path, PICTURES)
    names = tmp_path / "names.txt"
    names.write_text("__ignore__\nядро\nunused\ncell wall\n")
    (tmp_path / "list.txt").write_text("a -1\nempty.png\n")
    convert(Cvat(tmp_path, options.out, categories=names, only=tmp_path / "list.txt"))
    dataset = checked(options, tmp_path / "cache")
    assert dataset.class_names == ("ядро", "unused", "cell wall")
    assert [image.file_name for image in dataset.images] == ["a.png", "empty.png"]
    assert [label for label, _ in objects(dataset, "a.png")] == ["ядро", "cell wall", "cell wall"]
    assert (
        f"left out 1: images that {tmp_path / 'list.txt'} does not list (--only) (größe 2.png)"
        in capsys.readouterr().out
    )
    names.write_text("cell walls\nядро\n")
    with pytest.raises(
        ConfigError,
        match=r"image 0 \(a.png\): mask 2: its label 'cell wall' is not in .*names.txt \(did you mean 'cell walls'\?\)",
    ):
        convert(Cvat(tmp_path, options.out, categories=names))
    convert(Cvat(tmp_path, options.out, categories=names, skip=("cell wall",)))
    assert [label for label, _ in objects(checked(options, tmp_path / "cache"), "a.png")] == [
        "ядро"
    ]
    assert (
        "left out 3: shapes labelled cell wall (--skip) (a.png: mask 2, a.png: mask 3, größe 2.png: mask 1)"
        in capsys.readouterr().out
    )


def test_one_label_in_two_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "x.png")
    labels = ["é", unicodedata.normalize("NFD", "é"), " é"]
    labelme_file(tmp_path / "x.json", "x.png", [labelme_mask(label, RING) for label in labels])
    options = Labelme(tmp_path, tmp_path / "out.json")
    convert(options)
    assert checked(options, tmp_path / "cache").class_names == ("é",)
    assert "(x.json: shape 2, x.json: shape 3)" in capsys.readouterr().out


def test_missing_and_broken_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = as_cvat(tmp_path, PICTURES)
    (tmp_path / "images" / "größe 2.png").unlink()
    (tmp_path / "images" / "empty.png").write_bytes(b"no image")
    with pytest.raises(
        ConfigError,
        match=r"2 of 3 images are lost in .*: größe 2.png \(images whose file is missing\), empty.png \(images that",
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


TWO = block(0, 0, 3, 3).astype(np.uint8) + block(5, 5, 9, 9) * np.uint8(2)


def test_masks_without_an_image_and_hidden_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = as_names(tmp_path, {"a.png": PICTURES["a.png"]})
    (tmp_path / "masks" / "ядро" / "b_1.png").write_bytes(png(TWO))
    (tmp_path / "masks" / "ядро" / "._a_1.png").write_bytes(b"what macOS puts into archives")
    with pytest.raises(
        ConfigError, match=r"1 of 2 images are lost .*: ядро/b_1 \(images whose file is missing\)"
    ):
        convert(options)
    convert(
        Masks(
            tmp_path / "masks",
            options.out,
            images=tmp_path / "images",
            layout="name",
            allow_missing=True,
        )
    )
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 3
    assert "dropped 1: images whose file is missing (ядро/b_1.png)" in capsys.readouterr().out


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'


def break_labelme(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Options]:
    def write(folder: Path) -> Options:
        options = as_labelme(folder, {"a.png": PICTURES["a.png"]})
        content = json.loads((folder / "a.json").read_text())
        change(content)
        (folder / "a.json").write_text(json.dumps(content))
        return options

    return write


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


def break_masks(values: np.ndarray | bytes | None, **options: Any) -> Callable[[Path], Options]:
    def write(folder: Path) -> Options:
        picture(folder / "images" / "a.png")
        (folder / "masks").mkdir()
        if values is not None:
            (folder / "masks" / "a.png").write_bytes(
                values if isinstance(values, bytes) else png(values)
            )
        return Masks(
            folder / "masks",
            **{
                "out": folder / "out.json",
                "images": folder / "images",
                "class_name": "x",
                **options,
            },
        )

    return write


def shape(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["shapes"][0].update(change)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            break_labelme(lambda c: c.pop("shapes")),
            r"a.json: not of labelme: 'imagePath' or 'shapes' is missing",
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
        (break_labelme(shape(shape_type="cloud")), r"a.json: shape 1: its shape_type is 'cloud'"),
        (
            break_labelme(shape(shape_type="circle", points=[[1, 2]])),
            r"a.json: shape 1: a circle with 1 points",
        ),
        (break_labelme(shape(mask="????")), r"a.json: shape 1: .*"),
        (
            break_labelme(shape(mask=base64.b64encode(png(TWO)[:60]).decode())),
            r"a.json: shape 1: not an image that can be decoded: cut off",
        ),
        (break_labelme(lambda c: c["shapes"].__setitem__(0, 3)), r"a.json: shape 1: not an object"),
        (
            break_cvat(('"></mask>', '">')),
            r"annotations.xml: not XML \(empty or cut off\?\): mismatched tag: line",
        ),
        (
            break_cvat(("<annotations>", f"{BOMB}<annotations>")),
            r"annotations.xml: it has a <!DOCTYPE>, which no annotation tool writes: refused",
        ),
        (
            break_cvat(("<annotations>", "<notes>"), ("</annotations>", "</notes>")),
            r"annotations.xml: its root is <notes>, <annotations> is needed",
        ),
        (break_cvat(("1.1<", "2.0<")), r"annotations.xml: <version> is '2.0', 1.1 is needed"),
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
            r"image 0 \(a.png\): mask 1: its rle has \d+ pixels, its box 24 x 24, the image 40 x 52",
        ),
        (
            break_cvat(('rle="', 'rle="-')),
            r"image 0 \(a.png\): mask 1: its rle is no list of counts",
        ),
        (
            break_cvat(("<mask", '<polygon label="x" points="1,1;2,z;3,3"/><mask')),
            r"polygon 1: its points holds '?z'?, which is no number",
        ),
        (
            break_cvat(("<mask", '<box label="x" xtl="1" ytl="1" xbr="inf" ybr="3"/><mask')),
            r"box 1: its xbr holds 'inf', which is no number",
        ),
        (break_cvat(('label="ядро"', "")), r"image 0 \(a.png\): mask 1: no label"),
        (
            break_cvat(
                ("</image>", '</image><image id="1" name="./a.png" width="52" height="40"/>')
            ),
            r"image 1 .*its image a.png is that of",
        ),
        (
            break_voc("<xmin>", "<xmin>x"),
            r"a.xml: object 1: its <bndbox/xmin> is 'x\d+', which is no number",
        ),
        (break_voc("<name>ядро</name>", ""), r"a.xml: object 1: its <name> is missing"),
        (
            break_voc("<height>40", "<height>30"),
            r"SegmentationObject/a.png: it is 40 x 52, but .*a.xml says 30 x 52",
        ),
        (break_voc("</annotation>", ""), r"a.xml: not XML"),
        (
            break_labelmap,
            r"labelmap.txt: class 'cell wall': its colour is '10,200', three numbers are needed",
        ),
        (break_masks(None), r"masks: no masks in this folder"),
        (break_masks(TWO, images=None), r"--images: the folder of the images is needed"),
        (
            break_masks(TWO, class_name=None),
            r"masks/a.png: value 1: which class is it\? \(--class-name, --classes or a folder of that name\)",
        ),
        (
            break_masks(TWO, layout="folder"),
            r"masks/a.png: no image of that name in .*: --layout is folder, which may be",
        ),
        (break_masks(TWO[:9]), r"a.png is 40 x 52, annotated as 9 x 52"),
        (
            break_masks(np.zeros((HEIGHT, WIDTH), np.uint8)),
            r"masks: no object is left, and so no class",
        ),
        (
            break_masks(b"\xff\xd8\xff\xe0"),
            r"masks/a.png: not an image that can hold labels: none of PNG, TIFF, BMP, GIF",
        ),
        (
            break_masks(TWO, split=0.5),
            r"--split: 0.5 of 1 images leaves one of the two files empty",
        ),
        (break_masks(TWO, categories=Path(__file__)), r"test_convert.py: '.*' is named \d+ times"),
        (break_masks(TWO, categories=Path("/none.txt")), r"/none.txt: No such file or directory"),
        (
            break_masks(TWO, out=Path("/proc/none/out.json")),
            r"--out: /proc/none/out.json: cannot be written: No such file",
        ),
        (break_masks(TWO, images=Path("/none")), r"/none: no such image folder"),
    ],
)
def test_mistakes_are_told_in_a_line(
    write: Callable[[Path], Options], message: str, tmp_path: Path
) -> None:
    options = write(tmp_path)
    with pytest.raises(ConfigError, match=message) as raised:
        convert(options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("out*"))


def test_more_than_one_image_of_a_name_and_more_than_one_instance(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        picture(tmp_path / "images" / name)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(png(TWO))
    with pytest.raises(ConfigError, match=r"images: both a.jpg and a.png may be the image a$"):
        convert(
            Masks(
                tmp_path / "masks",
                tmp_path / "out.json",
                images=tmp_path / "images",
                class_name="x",
            )
        )
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "a_1.png")
    with pytest.raises(
        ConfigError,
        match=r"a_1.png: 2 values besides 0, but it is to hold one instance \(--layout name\)",
    ):
        convert(
            Masks(
                tmp_path / "masks",
                tmp_path / "out.json",
                images=tmp_path / "images",
                class_name="x",
                layout="name",
            )
        )


@pytest.mark.parametrize(
    "write",
    [as_labelme, as_cvat, as_voc, as_voc_without_xml, as_label_images],
    ids=lambda write: write.__name__,
)
def test_broken_files_are_converted_or_refused_in_a_line(
    write: Callable[[Path, Drawn], Options], tmp_path: Path
) -> None:
    """Bytes of the files changed, cut out, repeated: no other error, and what comes through has
    whole masks."""
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
            convert(options)
        except ConfigError as error:
            refused.append(str(error))
        path.write_bytes(files[path])
    assert len(refused) > 15
    assert not any("\n" in line for line in refused)
    convert(options)
    assert len(objects(checked(options, tmp_path / "cache"), "a.png")) == 3


def test_instances_belong_to_the_image_with_the_longest_name(tmp_path: Path) -> None:
    for name in ("a", "a_1"):
        picture(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "masks" / "a_1").mkdir(parents=True)
    (tmp_path / "masks" / "a_1" / "a_1_2.png").write_bytes(png(RING))
    options = Masks(
        tmp_path / "masks",
        tmp_path / "out.json",
        images=tmp_path / "images",
        layout="name",
        class_name="x",
    )
    convert(options)
    assert [image.file_name for image in checked(options, tmp_path / "cache").images] == ["a_1.jpg"]
    (tmp_path / "masks" / "a_1" / "a").mkdir()
    (tmp_path / "masks" / "a_1" / "a_1_2.png").rename(tmp_path / "masks" / "a_1" / "a" / "1.png")
    with pytest.raises(
        ConfigError, match=r"masks/a_1/a: both a_1.jpg and a.jpg may be the image of these masks"
    ):
        convert(dataclasses.replace(options, layout="folder"))


def test_the_command(tmp_path: Path) -> None:
    options = as_voc(tmp_path, PICTURES)
    command = [
        sys.executable,
        "-m",
        "mrcnn_jax.commands.convert",
        "voc",
        str(tmp_path),
        "--out",
        str(options.out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kept 3 images, 5 objects, 0 crowds\n")
    assert (
        f"    python -m mrcnn_jax.commands.check --annotations {options.out} --images {tmp_path / 'JPEGImages'}"
        in done.stdout
    )
    (tmp_path / "Annotations" / "a.xml").write_text("")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "Annotations" / "a.xml") in done.stderr
