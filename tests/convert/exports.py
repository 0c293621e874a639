"""Exports of annotation tools, written by hand, and what a conversion makes of them.

For the tests of this folder.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.datumaro import Datumaro
from mrcnn_jax.convert.label_studio import LabelStudio
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.mask_images import Masks
from mrcnn_jax.convert.supervisely import Supervisely
from mrcnn_jax.convert.via import Via
from mrcnn_jax.convert.voc import Voc
from mrcnn_jax.convert.write import convert
from mrcnn_jax.convert.yolo import Yolo
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason

Drawn = dict[str, list[tuple[str, np.ndarray]]]  # image -> label and mask [h, w] of its objects

HEIGHT, WIDTH = 40, 52
rows, columns = np.mgrid[:HEIGHT, :WIDTH]


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(columns + 0.5 - x, rows + 0.5 - y) <= radius


def oval(cx: float, cy: float, rx: float, ry: float, degrees: float) -> np.ndarray:
    """An ellipse that is turned clockwise, by its equation."""
    x, y, turn = columns + 0.5 - cx, rows + 0.5 - cy, math.radians(degrees)
    along, across = (
        x * math.cos(turn) + y * math.sin(turn),
        y * math.cos(turn) - x * math.sin(turn),
    )
    return (along / rx) ** 2 + (across / ry) ** 2 <= 1


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
TWO = block(0, 0, 3, 3).astype(np.uint8) + block(5, 5, 9, 9) * np.uint8(2)
POLYGON = [[10.5, 3.2], [45.7, 8.1], [30.0, 20.0], [47.3, 37.9], [6.1, 33.3]]


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
    rle = f'rle="{", ".join(map(str, counts))}"'
    return (
        f'<mask label={quoteattr(label)} source="manual" occluded="0" {rle} {box} z_order="0">'
        "</mask>"
    )


def cvat_file(path: Path, images: str) -> None:
    meta = "<meta><task><id>1</id><labels><label><name>x</name></label></labels></task></meta>"
    path.write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n'
        f"<annotations><version>1.1</version>{meta}{images}</annotations>"
    )


def cvat_image(
    name: str, shapes: str, size: tuple[int, int] = (HEIGHT, WIDTH), more: str = ""
) -> str:
    sides = f'width="{size[1]}" height="{size[0]}"'
    return f'<image id="0" name={quoteattr(name)} {sides}{more}>{shapes}</image>'


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
        f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        f"<segmented>1</segmented>{objects}</annotation>"
    )


def voc_object(label: str, box: tuple[float, ...], difficult: int = 0) -> str:
    """`box`: xmin, ymin, xmax, ymax as VOC counts, from 1."""
    sides = "".join(
        f"<{side}>{value}</{side}>"
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<object><name>{label}</name><pose>Left</pose><difficult>{difficult}</difficult>"
        f"<bndbox>{sides}</bndbox></object>"
    )


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
    """As in CVAT's "Segmentation mask": a list of class colours, and a colour per instance."""
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
    """masks/image/class/1.png, 0 and 255. No folder marks an empty image: --keep-unannotated."""
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


def as_yolo(folder: Path, drawn: Drawn) -> Options:
    """The box around each mask, as a polygon."""
    names = sorted({label for objects in drawn.values() for label, _ in objects})
    (folder / "labels").mkdir(parents=True)
    for name, objects in drawn.items():
        picture(folder / "images" / name)
        lines = []
        for label, mask in objects:
            x1, y1, x2, y2 = tight(mask)
            corners = ((x1, y1), (x2 + 1, y1), (x2 + 1, y2 + 1), (x1, y2 + 1))
            shares = (f"{x / WIDTH:.6f} {y / HEIGHT:.6f}" for x, y in corners)
            lines.append(f"{names.index(label)} {' '.join(shares)}\n")
        (folder / "labels" / f"{Path(name).stem}.txt").write_text("".join(lines))
    yaml = f"train: images\nnames: {json.dumps(names, ensure_ascii=False)}\n"
    (folder / "data.yaml").write_text(yaml)
    return Yolo(folder, folder / "out.json")


def corners_of(mask: np.ndarray) -> tuple[list[int], list[int]]:
    """x and y of the corners of the box around a mask."""
    x1, y1, x2, y2 = tight(mask)
    return [x1, x2 + 1, x2 + 1, x1], [y1, y1, y2 + 1, y2 + 1]


def as_via(folder: Path, drawn: Drawn) -> Options:
    """The box around each mask, as a polygon."""
    entries = {}
    for name, objects in drawn.items():
        picture(folder / name)
        regions = []
        for label, mask in objects:
            xs, ys = corners_of(mask)
            shape = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
            regions.append({"shape_attributes": shape, "region_attributes": {"class": label}})
        entries[f"{name}9"] = {"filename": name, "size": 9, "regions": regions}
    (folder / "via_region_data.json").write_text(json.dumps(entries))
    return Via(folder, folder / "out.json")


def as_label_studio(folder: Path, drawn: Drawn) -> Options:
    """The box around each mask, as a polygon."""
    tasks = []
    for name, objects in drawn.items():
        picture(folder / name)
        results = []
        for number, (label, mask) in enumerate(objects):
            pairs = zip(*corners_of(mask), strict=True)
            points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in pairs]
            result = {"id": str(number), "type": "polygonlabels", "to_name": "image"}
            result |= {"value": {"points": points, "polygonlabels": [label]}}
            results.append(result | {"original_height": HEIGHT, "original_width": WIDTH})
        task = {"data": {"image": f"/data/upload/1/{name}"}, "annotations": [{"result": results}]}
        tasks.append({"id": len(tasks), **task})
    (folder / "project.json").write_text(json.dumps(tasks))
    return LabelStudio(folder / "project.json", folder / "out.json")


def supervisely_bitmap(label: str, mask: np.ndarray, **more: Any) -> dict[str, Any]:
    """As its SDK packs one: a palette whose first colour is transparent."""
    x1, y1, x2, y2 = tight(mask)
    image, file = Image.fromarray(mask[y1 : y2 + 1, x1 : x2 + 1].astype(np.uint8)), io.BytesIO()
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(file, "PNG", transparency=0)
    data = base64.b64encode(zlib.compress(file.getvalue())).decode()
    bitmap = {"data": data, "origin": [x1, y1]}
    return {"geometryType": "bitmap", "classTitle": label, "tags": [], "bitmap": bitmap, **more}


def supervisely_file(
    path: Path, objects: list[Any], size: tuple[int, int] = (HEIGHT, WIDTH), **more: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"description": "", "tags": [], "size": {"height": size[0], "width": size[1]}}
    path.write_text(json.dumps(content | {"objects": objects} | more))


def as_supervisely(folder: Path, drawn: Drawn) -> Options:
    labels = sorted({label for objects in drawn.values() for label, _ in objects})
    for name, objects in drawn.items():
        picture(folder / "ds" / "img" / name)
        bitmaps = [supervisely_bitmap(label, mask) for label, mask in objects]
        supervisely_file(folder / "ds" / "ann" / f"{name}.json", bitmaps)
    classes = [{"title": label, "shape": "bitmap", "color": "#00FF12"} for label in labels]
    (folder / "meta.json").write_text(json.dumps({"classes": classes, "tags": []}))
    return Supervisely(folder, folder / "out.json", images=folder / "ds" / "img")


def datumaro_file(path: Path, labels: list[Any], items: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    named = [
        {"name": n, "parent": "", "attributes": []} if isinstance(n, str) else n for n in labels
    ]
    categories = {"label": {"labels": named, "attributes": []}}
    path.write_text(json.dumps({"infos": {}, "categories": categories, "items": items}))


def as_datumaro(folder: Path, drawn: Drawn) -> Options:
    labels = sorted({label for objects in drawn.values() for label, _ in objects})
    items = []
    for name, objects in drawn.items():
        picture(folder / "images" / "default" / name)
        annotations = []
        for number, (label, mask) in enumerate(objects):
            rle = rle_ops.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
            one = {"id": number, "type": "mask", "attributes": {"occluded": False}, "group": 0}
            annotations.append(one | {"label_id": labels.index(label), "rle": rle, "z_order": 0})
        image = {"path": name, "size": [HEIGHT, WIDTH]}
        items.append({"id": Path(name).stem, "annotations": annotations, "image": image})
    datumaro_file(folder / "annotations" / "default.json", labels, items)
    return Datumaro(folder, folder / "out.json", images=folder / "images" / "default")


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


# -- what came of it -------------------------------------------------------------------------------


def checked(
    options: Options, cache: Path, out: Path | None = None, *, but: Reason | None = None
) -> CocoDataset:
    """The checker's data set of the converted file, of which nothing was dropped, clipped or
    repaired (`but` for this)."""
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
        for o in image.annotations
    ]


def same_but_for_the_border(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether masks differ only in pixels that touch the expected border, also at corners."""
    kernel, mask = np.ones((3, 3), np.uint8), expected.astype(np.uint8)
    border = cv2.dilate(mask, kernel) != cv2.erode(
        mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1
    )
    return bool((found == expected)[~border].all()) and bool(expected.any())


def by_pillow(points: list[list[float]]) -> np.ndarray:
    """A polygon as labelme itself fills it."""
    image = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points], fill=1, outline=1)
    return np.asarray(image)


def refuses(options: Options, message: str, folder: Path) -> None:
    """The conversion ends in a ConfigError of one line, and nothing is written."""
    with pytest.raises(ConfigError, match=message) as raised:
        convert(options)
    assert "\n" not in str(raised.value)
    assert not list(folder.glob("out*"))
