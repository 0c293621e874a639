"""Supervisely: the folder of a project, with meta.json, and img/ and ann/ in that of each data set.

The annotation of img/x.jpg is ann/x.jpg.json, in old projects ann/x.json. Whole numbers are pixels,
counted from 0: a rectangle has its corners in it, and a point of a polygon is the middle of one.
Fractions are places. Polygons may have holes, and a multipolygon several parts. A bitmap is a PNG,
compressed by zlib, in base64, with its first pixel at `origin`; an alpha mask is where it is half
opaque. Upright rectangles are boxes (`--rectangles mask`: outlines), turned ones outlines, with
their angle in radians, clockwise. Tags of objects are not read.
https://developer.supervisely.com/getting-started/supervisely-annotation-format and its SDK
(supervisely/geometry, of the turned rectangles and alpha masks)
"""

from __future__ import annotations

import base64
import contextlib
import functools
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    MAX_PIXELS,
    AnnotatedImage,
    Patch,
    RectangleOptions,
    Shape,
    cropped,
    named,
    normal_label,
    rectangle,
)
from mrcnn_jax.convert.image_folder import ImageFolder, files_in, normal_path
from mrcnn_jax.data.json_values import is_number, read_json, short
from mrcnn_jax.data.repair import is_polygon
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.label_images import opacity
from mrcnn_jax.pixels.places import Box

NO_AREA = ("point", "line", "graph", "cuboid", "cuboid_2d")
OPAQUE = {"bitmap": 1, "alpha_mask": 128}  # of 255: the least of a pixel of the object
LARGEST = 1 << 28  # bytes of an unpacked bitmap


@dataclass(frozen=True)
class Supervisely(RectangleOptions):
    """Supervisely: the folder of a project (with meta.json) or of a data set in it."""

    datasets: tuple[str, ...] = ()
    """The data sets to convert, by their folders in the project; by default all."""

    def open_images(self) -> ImageFolder:
        """By default the images in the folders img/ of the data sets that are converted."""
        if self.images is not None:
            return ImageFolder(self.images)
        folders = {path.parent.with_name("img") for path in self._files}
        return ImageFolder(self.image_folder(), without=lambda file: file.parent not in folders)

    def class_names(self) -> tuple[str, ...] | None:
        skipped = set(map(normal_label, self.skip))
        titles = [title for title, shape in self._classes.items() if shape not in NO_AREA]
        names = dict.fromkeys(name for name in map(normal_label, titles) if name not in skipped)
        return tuple(names) or None

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        files, _ = self._files, self._classes  # both are refused before anything else
        for path in files:
            yield self._annotated_image(path, images, report)

    @functools.cached_property
    def _files(self) -> list[Path]:
        """The annotations of the data sets that are converted."""
        if not self.input.is_dir():
            raise ConfigError(f"{self.input}: a file: name the folder of Supervisely's project")
        found = [file for file in files_in(self.input, (".json",)) if file.parent.name == "ann"]
        if not found:
            raise ConfigError(f"{self.input}: not from Supervisely: no JSON in a folder ann/")
        wanted = set(map(normal_path, self.datasets))
        there = {self._dataset(path) for path in found}
        if not wanted <= there:
            (missing, *_), named = sorted(wanted - there), ", ".join(sorted(there))
            raise ConfigError(f"--datasets: {self.input} has no {missing!r}, but {named}")
        return [path for path in found if not wanted or self._dataset(path) in wanted]

    def _dataset(self, path: Path) -> str:
        """The data set of an annotation: its folder in the project."""
        return normal_path(os.path.relpath(path.parent.parent, self.input))

    @functools.cached_property
    def _classes(self) -> dict[str, str | None]:
        """Title -> shape of the classes in the meta.json here or above; none if there is none."""
        here = Path(os.path.abspath(self.input))
        for folder in (self.input, *here.parents[:3]):  # data sets may be nested
            path = folder / "meta.json"
            content = read_json(path) if path.is_file() else {}
            if not isinstance(content.get("classes"), list):
                continue
            kind = content.get("projectType", "images")
            if kind != "images":
                raise ConfigError(f"{path}: projectType is {short(kind)}, not 'images'")
            for one in content["classes"]:
                if not isinstance(one, dict) or not isinstance(one.get("title"), str):
                    raise ConfigError(f"{path}: classes: {short(one)} has no title")
            return {one["title"]: one.get("shape") for one in content["classes"]}
        return {}

    def _annotated_image(self, path: Path, images: ImageFolder, report: Report) -> AnnotatedImage:
        content = read_json(path)
        drawn = content.get("objects")
        if "frames" in content:
            raise ConfigError(f"{path}: the annotation of a video, not of an image")
        if not isinstance(drawn, list):
            raise ConfigError(f"{path}: not from Supervisely: no list of objects")
        with named(f"{path}"):
            size = _size(content.get("size"))
        file = path.stem
        name = normal_path(f"{self._dataset(path)}/{file}")
        tags = content.get("tags")
        for place in range(1, 1 + (len(tags) if isinstance(tags, list) else 0)):
            report.add(Reason.NO_AREA, f"{name}: tag {place}", kind="tag")
        shapes: list[Shape] = []
        for place, raw in enumerate(drawn, 1):
            where = f"object {place}"
            with named(f"{path}: {where}"):
                kind = self._kind(raw)
                if kind in NO_AREA:
                    report.add(Reason.NO_AREA, f"{name}: {where}", kind=kind)
                else:
                    shapes += self._shapes(raw, kind, where, size)
        here = os.path.relpath(path.parent.with_name("img"), images.folder).replace(os.sep, "/")
        return AnnotatedImage(str(path), name, (f"{here}/{file}", name, file), None, size, shapes)

    def _kind(self, raw: Any) -> str | None:
        """What is drawn; ValueError if it makes no sense. Old files say it in meta.json alone."""
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        label = raw.get("classTitle")
        if not isinstance(label, str):
            raise ValueError(f"its classTitle is {short(label)}")
        return raw.get("geometryType") or raw.get("shape") or self._classes.get(label)

    def _shapes(
        self, raw: dict[str, Any], kind: str | None, where: str, size: tuple[int, int]
    ) -> list[Shape]:
        """What is drawn as one object; ValueError if it makes no sense."""
        label = raw["classTitle"]
        match kind:
            case "bitmap" | "alpha_mask":
                return [Shape(where, label, patch=_bitmap(raw.get("bitmap"), OPAQUE[kind]))]
            case "polygon":
                return [_polygon(raw.get("points"), "points", where, label, size)]
            case "multipolygon":
                parts = raw.get("parts")
                if not isinstance(parts, list) or not parts:
                    raise ValueError(f"its parts are {short(parts)}")
                return [_polygon(part, "parts", where, label, size, group=where) for part in parts]
            case "rectangle":
                x1, y1, x2, y2 = _box(_points_of(raw.get("points"), "points"))
                return [self.rectangle(where, label, (x1, x2), (y1, y2), None)]
            case "oriented_bbox":
                box, angle = _box(raw.get("points")), raw.get("angle", "")
                if not is_number(angle):
                    raise ValueError(f"its angle is {short(angle)}")
                outline = rectangle(box, math.degrees(angle))
                return [Shape(where, label, polygon=outline)]
            case _:
                raise ValueError(f"its geometryType is {short(kind)}")


def _size(raw: Any) -> tuple[int, int]:
    """(height, width) of an image; ValueError if it makes no sense."""
    height, width = (raw.get("height"), raw.get("width")) if isinstance(raw, dict) else (None, None)
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(f"its size is {short(raw)}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"its size, {height} x {width}, is over {MAX_PIXELS} pixels")
    return height, width


def _points_of(raw: Any, what: str, key: str = "exterior") -> Any:
    """The points under a key of an outline; ValueError if it is none."""
    if not isinstance(raw, dict):
        raise ValueError(f"its {what} are {short(raw)}, without exterior and interior")
    return raw.get(key)


def _pairs(points: Any, what: str) -> list[list[float]]:
    """Points [x, y] as they are written; ValueError if they are none."""
    if not isinstance(points, list) or not all(
        isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points
    ):
        raise ValueError(f"its {what} is not a list of [x, y] pairs of numbers")
    return points


def _are_pixels(points: list[list[float]]) -> bool:
    return all(value == int(value) for point in points for value in point)


def _polygon(
    raw: Any, what: str, where: str, label: str, size: tuple[int, int], group: str | None = None
) -> Shape:
    """A polygon with its holes, then as a patch."""
    interior = _points_of(raw, what, "interior") or []
    if not isinstance(interior, list):
        raise ValueError(f"its interior is {short(interior)}, not a list of holes")
    rings = [_pairs(_points_of(raw, what), "exterior")]
    rings += [_pairs(hole, "interior") for hole in interior]
    middle = 0.5 if all(map(_are_pixels, rings)) else 0.0
    outline, *holes = ([float(v) + middle for point in ring for v in point] for ring in rings)
    holes = [hole for hole in holes if is_polygon(hole, *size)]
    if not holes or not is_polygon(outline, *size):
        return Shape(where, label, polygon=outline, group=group)
    first, *others = rle_ops.frPyObjects([outline, *holes], *size)
    pixels = rle_ops.decode(first).astype(bool)
    for hole in others:
        pixels &= rle_ops.decode(hole) == 0
    return Shape(where, label, patch=cropped(pixels), group=group)


def _box(corners: Any) -> Box:
    """The box of two corners; ValueError if it makes no sense."""
    points = _pairs(corners, "exterior")
    if len(points) != 2:
        raise ValueError(f"a rectangle with {len(points)} points")
    (x1, x2), (y1, y2) = map(sorted, zip(*points, strict=True))
    last = 1 if _are_pixels(points) else 0
    return float(x1), float(y1), float(x2 + last), float(y2 + last)


def _bitmap(raw: Any, least: int) -> Patch:
    """The pixels of a bitmap that are at least so opaque; ValueError if it makes no sense."""
    data, origin = (raw.get("data"), raw.get("origin")) if isinstance(raw, dict) else (None, None)
    if not isinstance(data, str):
        raise ValueError(f"its bitmap is {short(raw)}, without data")
    [(left, top)] = _pairs([origin], "bitmap.origin")
    try:
        png = packed = base64.b64decode(data)
    except ValueError:  # binascii's own, or not even ASCII
        raise ValueError("its bitmap.data is not base64") from None
    with contextlib.suppress(zlib.error):  # Supervisely reads a PNG as it is, too
        unpacker = zlib.decompressobj()
        png = unpacker.decompress(packed, LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError(f"its bitmap.data is over {LARGEST} bytes")
    try:
        pixels = opacity(png, max_pixels=MAX_PIXELS) >= least
    except ValueError as error:
        raise ValueError(f"its bitmap.data: {error}") from None
    return Patch(pixels, round(left), round(top))
