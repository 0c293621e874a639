"""Pascal VOC: Annotations/*.xml, SegmentationObject/*.png, SegmentationClass/*.png, JPEGImages/
(VOC2012 development kit, section 2).

An object's mask is one value of SegmentationObject (255: border, of no object). Its class and box
are those of the <object> of that number in the XML, or, where numbers and boxes do not agree (tools
number as they like), of the one whose box overlaps most; without such an <object>, or without XML,
the class is that of SegmentationClass there, by labelmap.txt, class_names.txt or VOC's own 20
names. Objects without a mask keep their box. VOC counts pixels from 1, and xmax, ymax are the last
pixel.

Objects marked difficult become crowds: VOC leaves them out of training and judges no detection of
them as right or wrong, which is what COCO does with crowds. (`--difficult object` takes them as any
other.)
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.coco import Box
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.datasets.convert.common import (
    ImageFolder,
    Options,
    Patch,
    Picture,
    Shape,
    files_in,
    finite,
    instances,
    read_bytes,
    read_labels,
    read_xml,
)

# fmt: off
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
NO_CLASSES = ("background", "_background_", "ignored", "__ignore__", "void")
VOID = (255, 1 << 24 | 0xE0E0C0)  # as an index, as its colour
BORDER = 8  # px: how far a mask may lie outside the box of its object
SAME_IOU = 0.5  # of a mask's extent and a box that are one object


@dataclass(frozen=True)
class _Object:
    label: str
    corners: Box  # xmin, ymin, xmax, ymax as written
    difficult: bool


@dataclass(frozen=True)
class _Annotation:
    path: Path
    filename: str | None
    size: tuple[int, int] | None
    objects: tuple[_Object, ...]


@dataclass(frozen=True)
class Voc(Options):
    """Pascal VOC: the folder with Annotations/, SegmentationObject/ and SegmentationClass/ (or some
    of them), images in JPEGImages/."""

    difficult: Literal["crowd", "object"] = "crowd"
    """What becomes of objects marked difficult: crowd regions, which are neither trained on nor
    judged, or objects as any other."""

    def image_folder(self) -> Path:
        return self.input / "JPEGImages" if (self.input / "JPEGImages").is_dir() else self.input

    def pictures(self, images: ImageFolder, report: Report) -> Iterator[Picture]:
        xml_folder, png_folder = self.input / "Annotations", self.input / "SegmentationObject"
        if not xml_folder.is_dir():
            xml_folder = self.input
        xmls = {
            file.relative_to(xml_folder).with_suffix("").as_posix(): file
            for file in files_in(xml_folder, (".xml",))
        }
        pngs = {
            file.relative_to(png_folder).with_suffix("").as_posix(): file
            for file in files_in(png_folder, (".png",))
        }
        if not xmls and not pngs:
            raise ConfigError(
                f"{self.input}: neither Annotations/*.xml nor SegmentationObject/*.png"
            )
        annotations = {stem: _annotation(path) for stem, path in sorted(xmls.items())}
        first = min(
            (min(o.corners[:2]) for annotation in annotations.values() for o in annotation.objects),
            default=1,
        )
        names = _class_names(self.input)
        for stem in sorted(xmls.keys() | pngs.keys()):
            yield self._picture(
                stem, annotations.get(stem), pngs.get(stem), names, 0 if first < 1 else 1, report
            )

    def _picture(
        self,
        stem: str,
        annotation: _Annotation | None,
        png: Path | None,
        names: dict[int, str],
        start: int,
        report: Report,
    ) -> Picture:
        where = str(annotation.path if annotation is not None else png)
        size = annotation.size if annotation is not None else None
        objects = annotation.objects if annotation is not None else ()
        boxes = [
            (x1 - start, y1 - start, x2, y2) for x1, y1, x2, y2 in (o.corners for o in objects)
        ]
        found: list[tuple[int, Patch]] = []
        if png is not None:
            values = read_labels(png)
            if size not in (None, values.shape):
                raise ConfigError(
                    f"{png}: it is {values.shape[0]} x {values.shape[1]}, but {where} says {size[0]} x {size[1]}"
                )  # type: ignore[index]
            size = values.shape
            found = list(instances(np.where(np.isin(values, VOID), 0, values)))
        owners = _owners(found, boxes)
        shapes = []
        for number, (drawn, box) in enumerate(zip(objects, boxes, strict=True)):
            patch = next(
                (patch for (_, patch), owner in zip(found, owners, strict=True) if owner == number),
                None,
            )
            crowd = drawn.difficult and self.difficult == "crowd"
            shapes.append(
                Shape(f"object {number + 1}", drawn.label, patch=patch, box=box, iscrowd=crowd)
            )
            if crowd:
                report.add(Reason.DIFFICULT, f"{stem}: object {number + 1}")
            if start == 0:
                report.add(Reason.ZERO_BASED, f"{stem}: object {number + 1}")
        if None in owners:
            classes = self._classes(stem, size)
            for (value, patch), owner in zip(found, owners, strict=True):
                if owner is None:
                    label = _majority(classes, patch, names)
                    if label is None:
                        report.add(Reason.NO_CLASS, f"{stem}: value {value_name(value)}")
                    else:
                        shapes.append(Shape(f"value {value_name(value)}", label, patch=patch))
        filename = annotation.filename if annotation is not None else None
        return Picture(where, stem, (filename,) if filename else (), stem, size, shapes)

    def _classes(self, stem: str, size: tuple[int, int] | None) -> Int64[np.ndarray, "h w"] | None:
        path = self.input / "SegmentationClass" / f"{stem}.png"
        if not path.is_file():
            return None
        values = read_labels(path)
        if values.shape != size:
            raise ConfigError(f"{path}: it is not of the size of SegmentationObject/{stem}.png")
        return values


def value_name(value: int) -> str:
    """A label image's value: "3", or "#ff0000" of a colour."""
    return f"#{value & 0xFFFFFF:06x}" if value >> 24 else str(value)


def _annotation(path: Path) -> _Annotation:
    root = read_xml(path, "annotation")
    try:
        size = tuple(
            _number(root, f"size/{side}") if root.find(f"size/{side}") is not None else 0
            for side in ("height", "width")
        )
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    objects = []
    for number, element in enumerate(root.findall("object"), 1):
        try:
            label = element.findtext("name")
            if label is None:
                raise ValueError("its <name> is missing")
            x1, y1, x2, y2 = (
                _number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = element.findtext("difficult") or "0"
            objects.append(_Object(label, (x1, y1, x2, y2), difficult.strip() not in ("0", "")))
        except ValueError as error:
            raise ConfigError(f"{path}: object {number}: {error}") from None
    # A size of 0 x 0 is what some tools write where they do not know it.
    return _Annotation(
        path,
        (root.findtext("filename") or "").strip() or None,
        (int(size[0]), int(size[1])) if all(size) else None,
        tuple(objects),
    )


def _number(element: ET.Element, tag: str) -> float:
    text = element.findtext(tag)
    try:
        number = float(text or "")
    except ValueError:
        number = float("nan")
    if not finite(number):
        raise ValueError(
            f"its <{tag}> {'is missing' if text is None else f'is {text!r}, which is no number'}"
        )
    return number


def _class_names(folder: Path) -> dict[int, str]:
    """What a value of SegmentationClass means: by index, and by colour."""
    lines = [[name] for name in CLASSES]
    for file, separator in (("labelmap.txt", ":"), ("class_names.txt", None)):
        if (folder / file).is_file():
            text = [
                line
                for line in _text(folder / file).splitlines()
                if line.strip() and not line.startswith("#")
            ]
            lines = [line.split(separator) if separator else [line] for line in text]
            break
    names = {}
    for index, (name, *rest) in enumerate(lines):
        written = rest[0].strip() if rest else ""
        if written and not re.fullmatch(r"[0-9]{1,3} *, *[0-9]{1,3} *, *[0-9]{1,3}", written):
            raise ConfigError(
                f"{folder / 'labelmap.txt'}: class {name!r}: its colour is {written!r}, three numbers are needed"
            )
        red, green, blue = (int(c) for c in written.split(",")) if written else _colour(index)
        names[index] = names[1 << 24 | red << 16 | green << 8 | blue] = name.strip()
    return names


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None


def _colour(index: int) -> list[int]:
    """VOC's colour of an index (VOClabelcolormap.m): bits 0, 3, 6 of it are the upper bits of red,
    and so on."""
    return [
        sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)
    ]


NUMBERS = {
    1 << 24 | red << 16 | green << 8 | blue: index
    for index in range(255)
    for red, green, blue in [_colour(index)]
}


def _owners(found: list[tuple[int, Patch]], boxes: list[Box]) -> list[int | None]:
    """The place of each instance's object among the boxes."""
    extents = [
        (p.left, p.top, p.left + p.pixels.shape[1], p.top + p.pixels.shape[0]) for _, p in found
    ]
    places = [NUMBERS.get(value, value) - 1 for value, _ in found]
    if all(
        place < len(boxes) and _inside(extent, boxes[place])
        for place, extent in zip(places, extents, strict=True)
    ):
        return list(places)
    owners: list[int | None] = [None] * len(found)
    pairs = [
        (_iou(extent, box), i, j) for i, extent in enumerate(extents) for j, box in enumerate(boxes)
    ]
    for overlap, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if overlap >= SAME_IOU and owners[i] is None and j not in owners:
            owners[i] = j
    return owners


def _inside(extent: Box, box: Box) -> bool:
    return all(a >= b - BORDER for a, b in zip(extent[:2], box[:2], strict=True)) and all(
        a <= b + BORDER for a, b in zip(extent[2:], box[2:], strict=True)
    )


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    return overlap / max(
        (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap, 1e-9
    )


def _majority(
    classes: Int64[np.ndarray, "h w"] | None, patch: Patch, names: dict[int, str]
) -> str | None:
    """The class that most of an instance's pixels have; None if they have none."""
    if classes is None:
        return None
    height, width = patch.pixels.shape
    values = classes[patch.top : patch.top + height, patch.left : patch.left + width][patch.pixels]
    there, counts = np.unique(values[~np.isin(values, (0, *VOID))], return_counts=True)
    name = names.get(int(there[counts.argmax()])) if there.size else None
    return None if name in NO_CLASSES else name
