"""CVAT: "CVAT for images 1.1", one annotations.xml for all images (docs.cvat.ai, "XML annotation
format").

Shapes of an image with one label and one group_id are one object. Polygons, masks, ellipses and
turned boxes are outlines; upright boxes are boxes (`--rectangles mask`: outlines). A mask's `rle`
runs along the rows of its box, background first. Turns are in degrees, clockwise.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.coco import is_text
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.datasets.convert.common import (
    ImageFolder,
    Options,
    Patch,
    Picture,
    Shape,
    ellipse,
    finite,
    read_xml,
    rectangle,
)

OUTLINES = ("polygon", "box", "ellipse", "mask")


@dataclass(frozen=True)
class Cvat(Options):
    """CVAT for images 1.1: annotations.xml, or the folder it is in, by default with the images in
    images/.

    Upright boxes become boxes without a mask, or masks with `--rectangles mask`.
    """

    rectangles: Literal["box", "mask"] = "box"
    """What an upright box is: the box of an object whose outline is not known, or its outline."""

    def image_folder(self) -> Path:
        folder = super().image_folder()
        return folder / "images" if (folder / "images").is_dir() else folder

    def pictures(self, images: ImageFolder, report: Report) -> Iterator[Picture]:
        path = self.input / "annotations.xml" if self.input.is_dir() else self.input
        if path.is_file() and zipfile.is_zipfile(path):
            raise ConfigError(f"{path}: unzip it, and name its folder")
        root = read_xml(path, "annotations")
        version = root.findtext("version") or ""
        if not version.startswith("1."):
            raise ConfigError(f"{path}: <version> is {version!r}, 1.1 is needed")
        elements = root.findall("image")
        if root.find("track") is not None:
            raise ConfigError(
                f"{path}: <track>: this is 'CVAT for video'; export it as 'CVAT for images 1.1'"
            )
        for element in elements:
            yield self._picture(path, element, report)

    def _picture(self, path: Path, element: ET.Element, report: Report) -> Picture:
        image_id, name = element.get("id"), element.get("name")
        if not is_text(image_id) or name is None or not is_text(name):
            raise ConfigError(
                f"{path}: image {image_id!r}: its id or its name {name!r} is missing or not printable"
            )
        where = f"{path}: image {image_id} ({name})"
        try:
            size = _integer(element, "height"), _integer(element, "width")
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        shapes = []
        for number, drawn in enumerate((child for child in element if child.tag != "attribute"), 1):
            if drawn.tag not in OUTLINES:
                report.add(Reason.NO_AREA, f"{name}: {drawn.tag} {number}", kind=drawn.tag)
                continue
            try:
                shapes.append(self._shape(drawn, f"{drawn.tag} {number}", size))
            except ValueError as error:
                raise ConfigError(f"{where}: {drawn.tag} {number}: {error}") from None
        subset = element.get("subset")
        return Picture(
            where, name, (name, f"{subset}/{name}") if subset else (name,), None, size, shapes
        )

    def _shape(self, drawn: ET.Element, where: str, size: tuple[int, int]) -> Shape:
        label, group = drawn.get("label"), drawn.get("group_id")
        if label is None:
            raise ValueError("no label")
        group = None if group in ("", "0") else group
        match drawn.tag:
            case "polygon":
                points = [
                    _number(text, "points") for text in re.split("[,;]", drawn.get("points", ""))
                ]
                return Shape(where, label, polygon=points, group=group)
            case "ellipse":
                cx, cy, rx, ry = (_attribute(drawn, key) for key in ("cx", "cy", "rx", "ry"))
                return Shape(
                    where,
                    label,
                    polygon=ellipse(cx, cy, abs(rx), abs(ry), _attribute(drawn, "rotation", "0")),
                    group=group,
                )
            case "mask":
                return Shape(where, label, patch=_patch(drawn, size), group=group)
        x1, y1, x2, y2 = (_attribute(drawn, key) for key in ("xtl", "ytl", "xbr", "ybr"))
        rotation = _attribute(drawn, "rotation", "0")
        if rotation % 360:
            return Shape(where, label, polygon=rectangle((x1, y1, x2, y2), rotation), group=group)
        box = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        return Shape(
            where,
            label,
            polygon=rectangle(box) if self.rectangles == "mask" else None,
            box=box,
            group=group,
        )


def _patch(drawn: ET.Element, size: tuple[int, int]) -> Patch:
    left, top, width, height = (_integer(drawn, key) for key in ("left", "top", "width", "height"))
    runs = drawn.get("rle", "").split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,10}\s*", run) for run in runs):
        raise ValueError("its rle is no list of counts")
    counts = [int(run) for run in runs]
    if width > size[1] or height > size[0] or sum(counts) != width * height:
        raise ValueError(
            f"its rle has {sum(counts)} pixels, its box {height} x {width}, the image {size[0]} x {size[1]}"
        )
    return Patch(
        np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width), left, top
    )


def _attribute(element: ET.Element, key: str, default: str | None = None) -> float:
    return _number(element.get(key, default), key)


def _integer(element: ET.Element, key: str) -> int:
    number = _attribute(element, key)
    if number != int(number):
        raise ValueError(f"its {key} {number} is no whole number")
    return int(number)


def _number(text: str | None, key: str) -> float:
    try:
        number = float(text or "")
    except ValueError:
        number = float("nan")
    if not finite(number):
        raise ValueError(
            f"its {key} {'is missing' if text is None else f'holds {text!r}, which is no number'}"
        )
    return number
