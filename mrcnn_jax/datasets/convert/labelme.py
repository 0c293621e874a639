"""labelme: a JSON file an image, as labelme 3 to 6 write it (labelme/_label_file.py says what is in
it).

Shapes with one label and one group_id are one object. Polygons, circles, oriented rectangles and
masks are outlines; rectangles are boxes (`--rectangles mask`: outlines); points and lines have no
area. A mask lies at its first point, rounded, and its points are its first and last pixel; as
labelme does, it is cut to them where they are whole numbers. labelme shows and stores pictures
turned as EXIF says.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.datasets.convert.common import (
    MAX_PIXELS,
    ImageFolder,
    Options,
    Patch,
    Picture,
    Shape,
    ellipse,
    files_in,
    finite,
    read_json,
    rectangle,
)
from mrcnn_jax.pixels.decode import decode_labels

NO_AREA = ("point", "points", "line", "linestrip")


@dataclass(frozen=True)
class Labelme(Options):
    """labelme: a folder of JSON files, by default with the images in it.

    Rectangles become boxes without a mask, or masks with `--rectangles mask`.
    """

    rectangles: Literal["box", "mask"] = "box"
    """What a rectangle is: the box of an object whose outline is not known, or its outline."""
    write_images: bool = False
    """Write images that are only inside the JSON (imageData) into the image folder."""

    def pictures(self, images: ImageFolder, report: Report) -> Iterator[Picture]:
        files = files_in(self.input, (".json",)) if self.input.is_dir() else [self.input]
        if not files:
            raise ConfigError(f"{self.input}: no JSON files in this folder")
        for path in files:
            content = read_json(path)
            if content.keys() & {"imagePath", "shapes"} or not self.input.is_dir():
                yield self._picture(path, content, images.folder, report)
            else:
                report.add(Reason.OTHER_FILE, path.relative_to(self.input).as_posix())

    def _picture(
        self, path: Path, content: dict[str, Any], folder: Path, report: Report
    ) -> Picture:
        image_path, raw_shapes, embedded = (
            content.get("imagePath"),
            content.get("shapes"),
            content.get("imageData"),
        )
        if not isinstance(image_path, str) or not isinstance(raw_shapes, list):
            raise ConfigError(f"{path}: not of labelme: 'imagePath' or 'shapes' is missing")
        image_path = PureWindowsPath(image_path).as_posix()
        size = content.get("imageHeight"), content.get("imageWidth")
        if size != (None, None) and not all(type(side) is int and side > 0 for side in size):
            raise ConfigError(f"{path}: imageHeight, imageWidth are {size[0]!r}, {size[1]!r}")
        shapes = []
        for number, raw in enumerate(raw_shapes, 1):
            try:
                shape = self._shape(raw, number)
            except ValueError as error:
                raise ConfigError(f"{path}: shape {number}: {error}") from None
            if shape is None:
                report.add(Reason.NO_AREA, f"{path.name}: shape {number}", kind=raw["shape_type"])
            else:
                shapes.append(shape)
        return Picture(
            where=str(path),
            name=path.name,
            names=(os.path.relpath(os.path.normpath(path.parent / image_path), folder), image_path),
            stem=path.stem,
            size=None if size == (None, None) else size,  # type: ignore[arg-type]
            shapes=shapes,
            embedded=embedded if self.write_images and isinstance(embedded, str) else None,
        )

    def _shape(self, raw: Any, number: int) -> Shape | None:
        """A shape; None if its type has no area; ValueError if it makes no sense."""
        if not isinstance(raw, dict):
            raise ValueError("not an object")
        label, group, kind, points = (
            raw.get("label"),
            raw.get("group_id"),
            raw.get("shape_type") or "polygon",
            raw.get("points"),
        )
        if not isinstance(label, str):
            raise ValueError(f"its label is {label!r}")
        if group is not None and type(group) not in (int, str):
            raise ValueError(f"its group_id is {group!r}")
        if kind in NO_AREA:
            return None
        if not isinstance(points, list) or not all(
            isinstance(p, list) and len(p) == 2 and all(map(finite, p)) for p in points
        ):
            raise ValueError("its points are not [x, y] pairs of numbers")
        where = f"shape {number}"
        match kind:
            case "polygon" | "oriented_rectangle" | "rotation":
                return Shape(
                    where,
                    label,
                    polygon=[float(value) for point in points for value in point],
                    group=group,
                )
            case "rectangle":
                if len(points) not in (2, 4):
                    raise ValueError(f"a rectangle with {len(points)} points")
                xs, ys = zip(*points, strict=True)
                box = float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
                outline = rectangle(box) if self.rectangles == "mask" else None
                return Shape(where, label, polygon=outline, box=box, group=group)
            case "circle":
                if len(points) != 2:
                    raise ValueError(f"a circle with {len(points)} points")
                (cx, cy), edge = points
                radius = math.dist((cx, cy), edge)
                return Shape(where, label, polygon=ellipse(cx, cy, radius, radius), group=group)
            case "mask":
                return Shape(where, label, patch=_patch(raw.get("mask"), points), group=group)
        raise ValueError(f"its shape_type is {kind!r}")


def _patch(encoded: Any, points: list[list[float]]) -> Patch:
    if not isinstance(encoded, str) or len(points) != 2:
        raise ValueError("a mask needs a 'mask' (base64) and two points")
    pixels = decode_labels(base64.b64decode(encoded), max_pixels=MAX_PIXELS) != 0
    (left, top), (right, bottom) = ((round(x), round(y)) for x, y in points)
    if all(value == int(value) for point in points for value in point):
        pixels = pixels[: max(bottom - top + 1, 0), : max(right - left + 1, 0)]
    return Patch(pixels, left, top)
