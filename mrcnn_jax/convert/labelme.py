"""labelme: one JSON file per image, as labelme 3 to 6 write it (labelme/_label_file.py).

Shapes with one label and group_id are one object. Polygons, circles, oriented rectangles and masks
are outlines; rectangles are boxes (`--rectangles mask`: outlines); points and lines have no area. A
mask lies at its first point, rounded, and its points are its first and last pixel; like labelme, we
cut it to them where they are integers. labelme shows and stores pictures turned as EXIF says.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    MAX_PIXELS,
    AnnotatedImage,
    Patch,
    RectangleOptions,
    Shape,
    ellipse,
    named,
)
from mrcnn_jax.convert.image_folder import ImageFolder, files_in
from mrcnn_jax.data.json_values import is_number, read_json, short
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.label_images import decode_labels

NO_AREA = ("point", "points", "line", "linestrip")
FEWEST = {"circle": 2, "rectangle": 2}  # points; polygons of too few are counted later


@dataclass(frozen=True)
class Labelme(RectangleOptions):
    """labelme: a folder of JSON files, by default with the images in it."""

    write_images: bool = False
    """Write images that are only inside the JSON (imageData) into the image folder."""

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        files = files_in(self.input, (".json",)) if self.input.is_dir() else [self.input]
        if not files:
            raise ConfigError(f"{self.input}: no JSON files in this folder")
        for path in files:
            keys: list[str] = []
            content = read_json(path, repeated=keys.append)
            for key in keys:
                report.add(Reason.REPEATED_KEY, f"{path.name}: {short(key)}")
            if content.keys() & {"imagePath", "shapes"} or not self.input.is_dir():
                yield self._annotated_image(path, content, images.folder, report)
            else:
                report.add(Reason.OTHER_FILE, path.relative_to(self.input).as_posix())

    def _annotated_image(
        self, path: Path, content: dict[str, Any], folder: Path, report: Report
    ) -> AnnotatedImage:
        image_path, raw_shapes = content.get("imagePath"), content.get("shapes")
        if not isinstance(image_path, str) or not isinstance(raw_shapes, list):
            raise ConfigError(f"{path}: not from labelme: 'imagePath' or 'shapes' is missing")
        image_path = PureWindowsPath(image_path).as_posix()
        size = content.get("imageHeight"), content.get("imageWidth")
        if size != (None, None) and not all(type(side) is int and side > 0 for side in size):
            raise ConfigError(f"{path}: imageHeight, imageWidth are {size[0]!r}, {size[1]!r}")
        shapes = []
        for place, raw in enumerate(raw_shapes, 1):
            where = f"shape {place}"
            with named(f"{path}: {where}"):
                shape = self._shape(raw, where)
            if shape is None:
                kind = raw.get("shape_type") or "polygon"
                report.add(Reason.NO_AREA, f"{path.name}: {where}", kind=kind)
            else:
                shapes.append(shape)
        embedded = content.get("imageData")
        names, beside = self._places(path, image_path, folder)
        return AnnotatedImage(
            where=str(path),
            name=path.name,
            names=names,
            beside=beside,
            stem=path.stem,
            size=None if size == (None, None) else size,  # type: ignore[arg-type]
            shapes=shapes,
            embedded=embedded if self.write_images and isinstance(embedded, str) else None,
        )

    def _places(
        self, path: Path, image_path: str, folder: Path
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`names` and `beside` of a picture. imagePath is relative to the JSON file, which may have
        been renamed with its image since."""
        here = os.path.relpath(path.parent, folder)
        real = os.path.realpath
        # As it is written; else as labelme opens it, from where a link leads.
        said = tuple(
            os.path.relpath(os.path.normpath(os.path.join(parent, image_path)), root)
            for parent, root in ((path.parent, folder), (real(path.parent), real(folder)))
        )
        if not here.startswith(".."):  # then a file in another folder is another image
            return said, (f"{here}/{path.stem}", image_path)
        base = self.input if self.input.is_dir() else path.parent
        there = os.path.relpath(path.parent, base)  # the image folder may have the same subfolders
        return (*said, f"{there}/{image_path}", image_path), (f"{there}/{path.stem}",)

    def _shape(self, raw: Any, where: str) -> Shape | None:
        """A shape; None if its type has no area; ValueError if it makes no sense."""
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        label, group, points = raw.get("label"), raw.get("group_id"), raw.get("points")
        kind = raw.get("shape_type") or "polygon"
        if not isinstance(label, str):
            raise ValueError(f"its label is {label!r}")
        if group is not None and type(group) not in (int, str):
            raise ValueError(f"its group_id is {group!r}")
        if not isinstance(kind, str):
            raise ValueError(f"its shape_type is {short(kind)}")
        if kind in NO_AREA:
            return None
        if not isinstance(points, list) or not all(
            isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points
        ):
            raise ValueError("its points are not [x, y] pairs of numbers")
        if kind in FEWEST and len(points) < FEWEST[kind]:
            return None  # begun, but not drawn
        match kind, len(points):
            case (("polygon" | "oriented_rectangle" | "rotation"), _):
                polygon = [float(value) for point in points for value in point]
            case "circle", 2:
                radius = math.dist(*points)
                cx, cy = points[0]
                polygon = ellipse(cx, cy, radius, radius)
            case "rectangle", (2 | 4):
                xs, ys = zip(*points, strict=True)
                return self.rectangle(where, label, xs, ys, group)
            case "mask", _:
                return Shape(where, label, patch=_patch(raw.get("mask"), points), group=group)
            case (("circle" | "rectangle"), count):
                raise ValueError(f"a {kind} with {count} points")
            case _:
                raise ValueError(f"its shape_type is {kind!r}")
        return Shape(where, label, polygon=polygon, group=group)


def _patch(encoded: Any, points: list[list[float]]) -> Patch:
    if not isinstance(encoded, str) or len(points) != 2:
        raise ValueError("a mask needs a 'mask' (base64) and two points")
    pixels = decode_labels(base64.b64decode(encoded), max_pixels=MAX_PIXELS) != 0
    (left, top), (right, bottom) = ((round(x), round(y)) for x, y in points)
    if all(value == int(value) for point in points for value in point):
        pixels = pixels[: max(bottom - top + 1, 0), : max(right - left + 1, 0)]
    return Patch(pixels, left, top)
