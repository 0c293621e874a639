"""CVAT for images 1.1: one annotations.xml for all images (docs.cvat.ai, "XML annotation format").

Shapes of an image with one label and group_id are one object. Polygons, masks, ellipses and turned
boxes are outlines; upright boxes are boxes (`--rectangles mask`: outlines). A mask's `rle` runs
along the rows of its box, background first. Turns are in degrees, clockwise.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    AnnotatedImage,
    Patch,
    RectangleOptions,
    Shape,
    ellipse,
    named,
    number,
    read_xml,
    rectangle,
)
from mrcnn_jax.convert.image_folder import ImageFolder
from mrcnn_jax.data.json_values import is_text
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.headers import SUFFIXES

OUTLINES = ("polygon", "box", "ellipse", "mask")


@dataclass(frozen=True)
class Cvat(RectangleOptions):
    """CVAT for images 1.1: annotations.xml or its folder, by default with the images in images/."""

    def image_folder(self) -> Path:
        folder = super().image_folder()
        return folder / "images" if (folder / "images").is_dir() else folder

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        path = self.input / "annotations.xml" if self.input.is_dir() else self.input
        if path.is_file() and zipfile.is_zipfile(path):
            raise ConfigError(f"{path}: a zip archive: unpack it and name the folder")
        root = read_xml(path, "annotations")
        version = root.findtext("version") or ""
        if not version.startswith("1."):
            raise ConfigError(f"{path}: <version> is {version!r}, not 1.1")
        if root.find("track") is not None:
            raise ConfigError(
                f"{path}: <track>: this is 'CVAT for video'; export it as 'CVAT for images 1.1'"
            )
        for element in root.findall("image"):
            yield self._annotated_image(path, element, report)

    def _annotated_image(self, path: Path, element: ET.Element, report: Report) -> AnnotatedImage:
        image_id, name = element.get("id"), element.get("name")
        if not is_text(image_id) or name is None or not is_text(name):
            raise ConfigError(
                f"{path}: image {image_id!r}: its id or its name {name!r} is missing or not "
                "printable"
            )
        where = f"{path}: image {image_id} ({name})"
        with named(where):
            size = _integer(element, "height"), _integer(element, "width")
        shapes = []
        for place, drawn in enumerate((child for child in element if child.tag != "attribute"), 1):
            what = f"{drawn.tag} {place}"
            if drawn.tag not in OUTLINES:
                report.add(Reason.NO_AREA, f"{name}: {what}", kind=drawn.tag)
                continue
            with named(f"{where}: {what}"):
                shapes.append(self._shape(drawn, what, size))
        subset = element.get("subset")
        names = (name, f"{subset}/{name}") if subset else (name,)
        # Frames of a video have no suffix.
        stem = None if Path(name).suffix.lower() in SUFFIXES else Path(name).name
        return AnnotatedImage(where, name, names, stem, size, shapes)

    def _shape(self, drawn: ET.Element, where: str, size: tuple[int, int]) -> Shape:
        label, group = drawn.get("label"), drawn.get("group_id")
        if label is None:
            raise ValueError("no label")
        group = None if group in ("", "0") else group
        if drawn.tag == "mask":
            return Shape(where, label, patch=_patch(drawn, size), group=group)
        rotation = number(drawn.get("rotation", "0"), "rotation")
        if drawn.tag == "polygon":
            points = drawn.get("points", "").strip()
            texts = re.split("[,;]", points) if points else []
            polygon = [number(text, "point") for text in texts]
        elif drawn.tag == "ellipse":
            cx, cy, rx, ry = (_attribute(drawn, key) for key in ("cx", "cy", "rx", "ry"))
            polygon = ellipse(cx, cy, abs(rx), abs(ry), rotation)
        else:
            x1, y1, x2, y2 = (_attribute(drawn, key) for key in ("xtl", "ytl", "xbr", "ybr"))
            if rotation % 360 == 0:
                return self.rectangle(where, label, (x1, x2), (y1, y2), group)
            polygon = rectangle((x1, y1, x2, y2), rotation)
        return Shape(where, label, polygon=polygon, group=group)


def _patch(drawn: ET.Element, size: tuple[int, int]) -> Patch:
    left, top, width, height = (_integer(drawn, key) for key in ("left", "top", "width", "height"))
    rle = drawn.get("rle", "").strip()
    runs = rle.split(",") if rle else []
    if not all(re.fullmatch(r"\s*[0-9]{1,10}\s*", run) for run in runs):
        raise ValueError("its rle is not a list of counts")
    counts = [int(run) for run in runs]
    if width > size[1] or height > size[0] or sum(counts) != width * height:
        raise ValueError(
            f"its rle has {sum(counts)} pixels, its box {height} x {width}, "
            f"the image {size[0]} x {size[1]}"
        )
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return Patch(pixels.reshape(height, width), left, top)


def _attribute(element: ET.Element, key: str) -> float:
    return number(element.get(key), key)


def _integer(element: ET.Element, key: str) -> int:
    value = _attribute(element, key)
    if value != int(value):
        raise ValueError(f"its {key} {value} is not an integer")
    return int(value)
