"""Pascal VOC (VOC2012 development kit, section 2).

The folders are Annotations/*.xml, SegmentationObject/*.png, SegmentationClass/*.png, JPEGImages/.

An object's mask is one value of SegmentationObject (255: border, of no object). Its class and box
are those of the <object> with that number in the XML or, where numbers and boxes disagree (tools
number as they like), of the <object> whose box overlaps most. Without such an <object>, or without
XML, the class is that of SegmentationClass there, by labelmap.txt, class_names.txt or VOC's own 20
names. Objects without a mask keep their box. VOC counts pixels from 1, and xmax, ymax are the last
pixel; CVAT and Datumaro write decimals ("12.0"), from 0.

Objects marked difficult become crowds: VOC leaves them out of training and counts no detection of
them as right or wrong, as COCO does with crowds. (`--difficult object`: they are like any other.)
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

import numpy as np
from jaxtyping import Int64

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    AnnotatedImage,
    Options,
    Patch,
    Shape,
    instances,
    named,
    number,
    read_labels,
    read_lines,
    read_xml,
    refuse_blended,
    value_name,
)
from mrcnn_jax.convert.image_folder import ImageFolder, files_in
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.places import Box, box_area

# fmt: off
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)
# fmt: on
NO_CLASSES = ("background", "_background_", "ignored", "__ignore__", "void")
VOID = (255, 1 << 24 | 0xE0E0C0)  # as an index, as its colour
BORDER = 8  # px: how far a mask may lie outside the box of its object
SAME_IOU = 0.5  # of a mask's extent and a box that are one object


def is_mask(file: PurePath) -> bool:
    """Whether a file lies in a folder of masks, which have the names of the images."""
    return not {"SegmentationObject", "SegmentationClass"}.isdisjoint(file.parts[:-1])


@dataclass(frozen=True)
class _Object:
    label: str
    corners: Box  # xmin, ymin, xmax, ymax as written
    difficult: bool
    polygon: tuple[float, ...] = ()  # as written
    decimals: int = 0  # of the four corners, how many are written with a point


@dataclass(frozen=True)
class _Annotation:
    where: str
    filename: str | None = None
    size: tuple[int, int] | None = None
    objects: tuple[_Object, ...] = ()
    # Names of objects without a box or polygon, and of those that LabelMe marks as deleted.
    without: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Voc(Options):
    """Pascal VOC: a folder with Annotations/, SegmentationObject/, SegmentationClass/ or some of
    them, by default with the images in JPEGImages/."""

    difficult: Literal["crowd", "object"] = "crowd"
    """Treat objects marked difficult as crowd regions, which are neither trained on nor
    evaluated, or as objects like any other."""

    def image_folder(self) -> Path:
        return self.input / "JPEGImages" if (self.input / "JPEGImages").is_dir() else self.input

    def open_images(self) -> ImageFolder:
        folder = self.images or self.image_folder()
        return ImageFolder(folder, without=lambda file: is_mask(file.relative_to(folder)))

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        xml_folder = self.input / "Annotations"
        xmls = _by_stem(xml_folder if xml_folder.is_dir() else self.input, ".xml")
        pngs = _by_stem(self.input / "SegmentationObject", ".png")
        if not xmls and not pngs:
            raise ConfigError(
                f"{self.input}: neither Annotations/*.xml nor SegmentationObject/*.png"
            )
        annotations = {stem: _annotation(path) for stem, path in sorted(xmls.items())}
        found = [o for annotation in annotations.values() for o in annotation.objects]
        decimals = 2 * sum(o.decimals for o in found) > 4 * len(found)
        start = 0 if decimals or any(min(o.corners[:2]) < 1 for o in found) else 1
        names = _class_names(self.input)
        for stem in sorted(xmls.keys() | pngs.keys()):
            png = pngs.get(stem)
            annotation = annotations.get(stem) or _Annotation(str(png))
            yield self._annotated_image(stem, annotation, png, names, start, report)

    def _annotated_image(
        self,
        stem: str,
        annotation: _Annotation,
        png: Path | None,
        names: dict[int, str],
        start: int,
        report: Report,
    ) -> AnnotatedImage:
        where, size, objects = annotation.where, annotation.size, annotation.objects
        corners = (o.corners for o in objects)
        boxes = [(x1 - start, y1 - start, x2, y2) for x1, y1, x2, y2 in corners]
        found: list[tuple[int, Patch]] = []
        if png is not None:
            values = read_labels(png, size, where)
            size = values.shape  # type: ignore[assignment]
            values = np.where(np.isin(values, VOID), 0, values)
            refuse_blended(png, values)
            found = list(instances(values))
        owners = _owners(found, boxes)
        patches = {i: patch for i, (_, patch) in zip(owners, found, strict=True) if i is not None}
        shapes = []
        for i, (drawn, box) in enumerate(zip(objects, boxes, strict=True)):
            name = f"object {i + 1}"
            crowd = drawn.difficult and self.difficult == "crowd"
            shapes.append(_shape(name, drawn, patches.get(i), box, start, crowd))
            if 0 < len(drawn.polygon) < 6:
                report.add(Reason.POLYGON, f"{stem}: {name}")
            if crowd:
                report.add(Reason.DIFFICULT, f"{stem}: {name}")
            if start == 0:
                report.add(Reason.ZERO_BASED, f"{stem}: {name}")
        path, classes = self.input / "SegmentationClass" / f"{stem}.png", None
        if None in owners and path.is_file():
            classes = read_labels(path, size, f"SegmentationObject/{stem}.png")
        for (value, patch), owner in zip(found, owners, strict=True):
            if owner is None:
                name, label = f"value {value_name(value)}", _majority(classes, patch, names)
                if label is None:
                    report.add(Reason.NO_CLASS, f"{stem}: {name}")
                else:
                    shapes.append(Shape(name, label, patch=patch))
        for name in annotation.without:
            report.add(Reason.NO_AREA, f"{stem}: {name}", kind="object without a box")
        for name in annotation.deleted:
            report.add(Reason.DELETED, f"{stem}: {name}")
        folder, filename = PurePosixPath(stem).parent, annotation.filename
        paths = (str(folder / filename),) if filename else ()
        beside = (stem, filename) if filename else (stem,)
        return AnnotatedImage(where, stem, paths, stem, size, shapes, beside)


def _shape(
    name: str, drawn: _Object, patch: Patch | None, box: Box, start: int, crowd: bool
) -> Shape:
    """An object with its mask, else its polygon, else its box alone."""
    if patch is None and len(drawn.polygon) >= 6:
        polygon = [value - start for value in drawn.polygon]
        return Shape(name, drawn.label, polygon=polygon, iscrowd=crowd)
    return Shape(name, drawn.label, patch=patch, box=box, iscrowd=crowd)


def _by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder by relative path without suffix."""
    files = files_in(folder, (suffix,))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _annotation(path: Path) -> _Annotation:
    root = read_xml(path, "annotation")
    with named(f"{path}"):
        height, width = (
            int(number(text, f"<size/{side}>"))
            if (text := root.findtext(f"size/{side}")) is not None
            else 0
            for side in ("height", "width")
        )
    objects, without, deleted = [], [], []
    for place, element in enumerate(root.findall("object"), 1):
        if (element.findtext("deleted") or "").strip() == "1":
            deleted.append(f"object {place}")
            continue
        with named(f"{path}: object {place}"):
            label = element.findtext("name")
            if label is None:
                raise ValueError("its <name> is missing")
            polygon, texts = _polygon(element), {}
            if element.find("bndbox") is not None:
                sides = ("xmin", "ymin", "xmax", "ymax")
                texts = {side: element.findtext(f"bndbox/{side}") for side in sides}
                x1, y1, x2, y2 = (number(text, f"<bndbox/{side}>") for side, text in texts.items())
            elif polygon:
                xs, ys = polygon[::2], polygon[1::2]
                x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
            else:
                without.append(f"object {place}")
                continue
            difficult = (element.findtext("difficult") or "").strip() not in ("0", "")
            decimals = sum("." in (text or "") for text in texts.values())
            objects.append(_Object(label, (x1, y1, x2, y2), difficult, polygon, decimals))
    filename = (root.findtext("filename") or "").strip() or None
    # Some tools write 0 x 0 if they do not know the size.
    size = (height, width) if height and width else None
    return _Annotation(str(path), filename, size, tuple(objects), tuple(without), tuple(deleted))


def _polygon(element: ET.Element) -> tuple[float, ...]:
    """An object's polygon, which VOC itself has not: <x1>, <y1>, <x2>, ... or <pt><x>, <y>."""
    points = element.findall("polygon/pt")
    pairs = [(point.findtext("x"), point.findtext("y")) for point in points]
    count = len(element.findall("polygon/*"))
    for place in range(1, count + 1):
        pair = tuple(element.findtext(f"polygon/{side}{place}") for side in "xy")
        if pair != (None, None):
            pairs.append(pair)  # type: ignore[arg-type]
    return tuple(number(text, "<polygon>") for pair in pairs for text in pair)


def _class_names(folder: Path) -> dict[int, str]:
    """The meaning of SegmentationClass's values, by index and by colour."""
    rows = [[name] for name in CLASSES]
    for file, separator in (("labelmap.txt", ":"), ("class_names.txt", None)):
        if (folder / file).is_file():
            lines = [line for line in read_lines(folder / file) if not line.startswith("#")]
            rows = [line.split(separator) if separator else [line] for line in lines]
            break
    names = {}
    for index, (name, *rest) in enumerate(rows):
        written = rest[0].strip() if rest else ""
        if written and not re.fullmatch(r"[0-9]{1,3} *, *[0-9]{1,3} *, *[0-9]{1,3}", written):
            raise ConfigError(
                f"{folder / 'labelmap.txt'}: class {name!r}: its colour {written!r} is not three "
                "numbers"
            )
        colour = [int(c) for c in written.split(",")] if written else _colour(index)
        names[index] = names[_colour_value(colour)] = name.strip()
    return names


def _colour(index: int) -> list[int]:
    """VOC's colour of an index (VOClabelcolormap.m): its bits 0, 3, 6 are red's upper bits, etc."""
    return [
        sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)
    ]


def _colour_value(colour: list[int]) -> int:
    """A colour as `decode_labels` returns it."""
    red, green, blue = colour
    return 1 << 24 | red << 16 | green << 8 | blue


NUMBERS = {_colour_value(_colour(index)): index for index in range(255)}


def _owners(found: list[tuple[int, Patch]], boxes: list[Box]) -> list[int | None]:
    """For each instance, the place of its object among the boxes."""
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
    return overlap / max(box_area(a) + box_area(b) - overlap, 1e-9)


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
