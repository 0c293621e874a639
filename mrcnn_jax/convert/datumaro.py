"""Datumaro: annotations/SUBSET.json, with the images in images/SUBSET/, as CVAT exports it, too.

Each item is an image. Its polygons (x, y, x, y, ...), ellipses (the corners of the box around one)
and masks (COCO's run lengths) are outlines; a bbox (x, y, width, height) is a box (`--rectangles
mask`: an outline). The annotations of one label and group are one object, unless the group is 0: a
bbox beside an outline is its box. Where CVAT has turned a box or an ellipse, its attribute rotation
says by how many degrees, clockwise. A label is counted from 0 in categories.label.labels.
https://openvinotoolkit.github.io/datumaro (data formats), its source
(plugins/data_formats/datumaro), and docs.cvat.ai (formats, Datumaro)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
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
    ellipse,
    named,
    normal_label,
    rectangle,
)
from mrcnn_jax.convert.image_folder import ImageFolder, files_in
from mrcnn_jax.data.json_values import is_number, read_bytes, read_json, short
from mrcnn_jax.data.repair import Dropped, mask_rle
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.headers import SUFFIXES

OUTLINES = ("polygon", "mask", "ellipse")
NO_AREA = ("label", "caption", "points", "polyline", "skeleton", "cuboid_2d", "cuboid_3d")
NOT_DRAWN = ("hash_key", "feature_vector")  # of Datumaro's own searches
OTHER_MEDIA = ("point_cloud", "video", "video_frame")
# How many numbers an annotation of a type has; a polygon's count is checked with its image.
COUNTS = {"bbox": 4, "ellipse": 4}


@dataclass(frozen=True)
class Datumaro(RectangleOptions):
    """Datumaro: its folder, or annotations/SUBSET.json; by default with the images in images/."""

    subset: str | None = None
    """The subset to convert; by default the only one."""

    def image_folder(self) -> Path:
        """images/ beside annotations/ or the file, if there is one."""
        return self._own_images if self._own_images.is_dir() else self._own_images.parent

    def open_images(self) -> ImageFolder:
        """Where the subset has a folder, the images in that."""
        folder, subset = self.images or self.image_folder(), self._path.stem
        inside = self._own_images.resolve().is_relative_to(folder.resolve())
        own = Path(os.path.relpath(self._own_images, folder)) if inside else Path()
        own = folder / own / subset
        return ImageFolder(folder, files=files_in(own, SUFFIXES) if own.is_dir() else None)

    @property
    def _own_images(self) -> Path:
        """Where Datumaro writes the images."""
        folder = self._path.parent
        return (folder.parent if folder.name == "annotations" else folder) / "images"

    def class_names(self) -> tuple[str, ...]:
        """All but the labels of a skeleton's points."""
        skipped = set(map(normal_label, self.skip))
        names = (label["name"] for label in self._labels if not self._is_point(label))
        return tuple(dict.fromkeys(n for n in map(normal_label, names) if n not in skipped))

    def hints(self) -> list[str]:
        others = [path.stem for path in self._subsets if path != self._path]
        return [f"not converted: {', '.join(others)} (see --subset)"] if others else []

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        path, items = self._path, self._content.get("items")
        if not isinstance(items, list):
            raise ConfigError(f"{path}: not from Datumaro: no list of items")
        for place, item in enumerate(items, 1):
            if not isinstance(item, dict) or not isinstance(item.get("id"), str):
                raise ConfigError(f"{path}: item {place}: without an id: {short(item)}")
            here = os.path.relpath(self._own_images, images.folder).replace(os.sep, "/")
            yield self._annotated_image(item, f"item {short(item['id'])}", here, report)

    @functools.cached_property
    def _subsets(self) -> list[Path]:
        """The annotation files of a folder."""
        if not self.input.is_dir():
            return [self.input]
        folder = self.input / "annotations"
        folder = folder if folder.is_dir() else self.input
        return [path for path in sorted(folder.glob("*.json")) if is_datumaro(path)]

    @functools.cached_property
    def _path(self) -> Path:
        names = [path.stem for path in self._subsets]
        wanted = names if self.subset is None else [self.subset]
        found = [path for path in self._subsets if path.stem in wanted]
        if len(found) == 1:
            return found[0]
        if not names:
            raise ConfigError(f"{self.input}: not from Datumaro: no annotations/SUBSET.json")
        what = "several subsets" if self.subset is None else f"no {self.subset!r}, but"
        raise ConfigError(f"--subset: {self.input} has {what}: {', '.join(names)}")

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        return read_json(self._path)

    @functools.cached_property
    def _labels(self) -> list[dict[str, Any]]:
        labels = _dict(_dict(self._content.get("categories")).get("label")).get("labels")
        if not isinstance(labels, list):
            raise ConfigError(f"{self._path}: not from Datumaro: no list categories.label.labels")
        for place, label in enumerate(labels):
            if not isinstance(label, dict) or not isinstance(label.get("name"), str):
                raise ConfigError(
                    f"{self._path}: categories.label.labels: {place} has no name: {short(label)}"
                )
        return labels

    def _is_point(self, label: dict[str, Any]) -> bool:
        """Whether a label is that of a point of a skeleton, its parent."""
        skeletons = _dict(_dict(self._content.get("categories")).get("points")).get("items")
        for skeleton in skeletons if isinstance(skeletons, list) else ():
            number, points = _dict(skeleton).get("label_id"), _dict(skeleton).get("labels")
            if type(number) is int and 0 <= number < len(self._labels) and isinstance(points, list):
                parent = self._labels[number]["name"]
                if label.get("parent") == parent and label["name"] in points:
                    return True
        return False

    def _annotated_image(
        self, item: dict[str, Any], name: str, here: str, report: Report
    ) -> AnnotatedImage:
        """The image of an item; `here`: Datumaro's folder of images in that of all images."""
        path = self._path
        other = next((key for key in OTHER_MEDIA if item.get(key)), None)
        if other is not None:
            raise ConfigError(f"{path}: {name}: {other}: not an image")
        image, drawn = _dict(item.get("image")), item.get("annotations", [])
        if not isinstance(drawn, list):
            raise ConfigError(f"{path}: {name}: its annotations are {short(drawn)}")
        with named(f"{path}: {name}"):
            size = None if image.get("size") is None else _size(image["size"], "image.size")
            outlined = {_group(raw) for raw in drawn if _dict(raw).get("type") in OUTLINES}
        shapes = []
        for place, raw in enumerate(drawn, 1):
            where = f"annotation {place}"
            with named(f"{path}: {name}: {where}"):
                kind = raw.get("type") if isinstance(raw, dict) else None
                if kind in NOT_DRAWN:
                    continue
                if kind in NO_AREA:
                    report.add(Reason.NO_AREA, f"{name}: {where}", kind=kind)
                elif kind not in ("bbox", *OUTLINES):
                    raise ValueError(f"its type is {short(kind)}")
                elif raw.get("label_id") is None:
                    report.add(Reason.NO_LABEL, f"{name}: {where}")
                else:
                    shapes.append(self._shape(raw, kind, where, size, outlined))
        file = image.get("path")
        known = [file, item["id"]] if isinstance(file, str) and file else [item["id"]]
        places = (f"{here}/{path.stem}/", f"{here}/", f"{path.stem}/", "")
        names = dict.fromkeys(place + one for place in places for one in known)
        stem = PurePosixPath(item["id"].replace("\\", "/")).name
        return AnnotatedImage(f"{path}: {name}", name, tuple(names), stem or None, size, shapes)

    def _shape(
        self,
        raw: dict[str, Any],
        kind: str,
        where: str,
        size: tuple[int, int] | None,
        outlined: set[tuple[Any, Any] | None],
    ) -> Shape:
        """A shape; ValueError if it makes no sense."""
        number, labels, attributes = raw["label_id"], self._labels, _dict(raw.get("attributes"))
        if type(number) is not int or not 0 <= number < len(labels):
            raise ValueError(f"its label_id is {short(number)}, not one of 0 to {len(labels) - 1}")
        label, key = labels[number]["name"], _group(raw)
        group, crowd = None if key is None else key[1], bool(attributes.get("is_crowd"))
        if kind == "mask":
            patch = _patch(_dict(raw.get("rle")), size)
            return Shape(where, label, patch=patch, group=group, iscrowd=crowd)
        values, degrees = _numbers(raw, kind), attributes.get("rotation") or 0
        if not is_number(degrees):
            raise ValueError(f"its attributes.rotation is {short(degrees)}")
        if kind == "polygon":
            polygon = values
        elif kind == "ellipse":
            x1, y1, x2, y2 = values
            radii = abs(x2 - x1) / 2, abs(y2 - y1) / 2
            polygon = ellipse((x1 + x2) / 2, (y1 + y2) / 2, *radii, degrees)
        else:
            x, y, w, h = values
            if key is not None and key in outlined:
                return Shape(where, label, box=(x, y, x + w, y + h), group=group, iscrowd=crowd)
            if degrees % 360 == 0:
                upright = self.rectangle(where, label, (x, x + w), (y, y + h), group)
                return replace(upright, iscrowd=crowd)
            polygon = rectangle((x, y, x + w, y + h), degrees)
        return Shape(where, label, polygon=polygon, group=group, iscrowd=crowd)


def is_datumaro(path: Path) -> bool:
    """Whether a JSON file has the keys of Datumaro."""
    text = read_bytes(path) if path.is_file() else b""
    return all(f'"{key}"'.encode() in text for key in ("items", "categories"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _group(raw: Any) -> tuple[Any, Any] | None:
    """(label, group) of an annotation; None if it is alone. ValueError if it makes no sense."""
    group = _dict(raw).get("group") or None
    if group is not None and type(group) is not int:
        raise ValueError(f"its group is {short(group)}")
    return None if group is None else (short(raw.get("label_id")), group)


def _size(raw: Any, what: str) -> tuple[int, int]:
    """(height, width); ValueError if it makes no sense."""
    known = isinstance(raw, list) and len(raw) == 2 and all(type(side) is int for side in raw)
    if not known or min(raw) < 1:
        raise ValueError(f"its {what} is {short(raw)}, not [height, width]")
    if raw[0] * raw[1] > MAX_PIXELS:
        raise ValueError(f"its {what}, {raw[0]} x {raw[1]}, is over {MAX_PIXELS} pixels")
    return raw[0], raw[1]


def _numbers(raw: dict[str, Any], kind: str) -> list[float]:
    """The numbers of a shape; ValueError if they are none, or others than its type has."""
    key = "bbox" if kind == "bbox" else "points"
    values = raw.get(key)
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise ValueError(f"its {key} is {short(values)}, not a list of numbers")
    if len(values) != COUNTS.get(kind, len(values)):
        raise ValueError(f"its {key} has {len(values)} numbers, not {COUNTS[kind]}")
    return list(map(float, values))


def _patch(rle: dict[str, Any], size: tuple[int, int] | None) -> Patch:
    """The pixels of run lengths; ValueError if they make no sense."""
    height, width = _size(rle.get("size"), "rle.size")
    if size not in (None, (height, width)):
        raise ValueError(f"its rle.size is {rle['size']}, but image.size {list(size or ())}")
    try:
        found = mask_rle(rle, height, width, lambda _: None)
    except Dropped:
        counts = short(rle.get("counts"))
        raise ValueError(f"its rle.counts, {counts}, are not of {height} x {width}") from None
    return cropped(rle_ops.decode(found).astype(bool))
