"""VGG Image Annotator, versions 1 and 2: a project, or its annotations exported as JSON or CSV.

An entry for each image has its file's name and regions: polygons, rectangles, circles and ellipses
in pixels; an ellipse's theta is in radians, clockwise. Rectangles are boxes (`--rectangles mask`:
outlines); points and polylines have no area. A region's class is one of its attributes. The size in
an entry is that of the file, in bytes. A CSV has a row for each region, with its shape and its
attributes as JSON, or one with two empty objects for an image without regions.
https://www.robots.ox.ac.uk/~vgg/software/via/
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import AnnotatedImage, RectangleOptions, Shape, ellipse, named
from mrcnn_jax.convert.image_folder import ImageFolder, files_in
from mrcnn_jax.data.json_values import is_number, read_bytes, read_json, short
from mrcnn_jax.data.other_formats import NOT_VIA3, VIA3
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.output import listed
from mrcnn_jax.pixels.headers import SUFFIXES

METADATA = "_via_img_metadata"  # of a project
COLUMNS = ("filename", "file_size", "region_shape_attributes", "region_attributes")  # of a CSV
NO_AREA = ("point", "polyline", "line")
LIKELY = ("class", "label", "category", "name", "type")  # names of the attribute of the class
CLASS = "object"  # of regions that have no attribute at all


@dataclass(frozen=True)
class Via(RectangleOptions):
    """VGG Image Annotator (VIA 1 and 2): its JSON or CSV file, by default beside the images."""

    attribute: str | None = None
    """The region attribute that is the class; by default the only one, or else class, label,
    category, name or type."""

    def open_images(self) -> ImageFolder:
        """If there are images beside the file or below it, those are it for; others are not."""
        folder, beside = self.images or self.image_folder(), self._path.parent
        inside = beside.resolve().is_relative_to(folder.resolve())
        files = files_in(beside, SUFFIXES) if inside else []
        places = [folder / os.path.relpath(file, folder) for file in files]
        return ImageFolder(folder, files=places or None)

    @functools.cached_property
    def _path(self) -> Path:
        if not self.input.is_dir():
            return self.input
        found = [path for path in sorted(self.input.glob("*.json")) if is_via(path)]
        found = found or [path for path in sorted(self.input.glob("*.csv")) if is_csv(path)]
        if len(found) != 1:
            what = f"several: {found[0].name}, {found[1].name}" if found else "none"
            raise ConfigError(
                f"{self.input}: name the JSON or CSV file of VIA (in this folder: {what})"
            )
        return found[0]

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        path = self._path
        keys: list[str] = []
        of_csv = path.suffix.lower() == ".csv"
        content = _read_csv(path) if of_csv else read_json(path, repeated=keys.append)
        for key in keys:
            report.add(Reason.REPEATED_KEY, f"{path.name}: {short(key)}")
        if content.keys() >= VIA3:
            raise ConfigError(f"{path}: {NOT_VIA3}")
        entries = content.get(METADATA, content)
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise ConfigError(f"{path}: not from VIA 1 or 2: entries with filename and regions")
        here = os.path.relpath(path.parent, images.folder).replace(os.sep, "/")
        attribute = self._attribute(path, entries)
        for entry in entries.values():
            name = PureWindowsPath(entry["filename"]).as_posix()
            where, shapes = f"{path}: {name}", []
            for place, region in enumerate(_regions(entry)):
                what = f"region {place}"
                with named(f"{where}: {what}"):
                    shape = self._shape(region, what, name, attribute, report)
                if shape is not None:
                    shapes.append(shape)
            yield AnnotatedImage(where, name, (f"{here}/{name}", name), None, None, shapes)

    def _attribute(self, path: Path, entries: dict[str, Any]) -> str | None:
        """The name of the attribute that is the class; None: no region has any."""
        regions = [region for entry in entries.values() for region in _regions(entry)]
        dicts = [r["region_attributes"] for r in regions if isinstance(r, dict) and _attributes(r)]
        names = list(dict.fromkeys(name for attributes in dicts for name in attributes))
        if self.attribute is not None:
            if self.attribute not in names:
                there = ", ".join(map(short, names)) or "none"
                raise ConfigError(f"--attribute: {path} has no {self.attribute!r}, but {there}")
            return self.attribute
        likely = [wanted for wanted in LIKELY for name in names if name.lower() == wanted]
        if len(names) > 1 and not likely:
            several = listed([short(name) for name in names], 5)
            raise ConfigError(
                f"{path}: several attributes may be the class: {several} (see --attribute)"
            )
        chosen = next((name for name in names if likely and name.lower() == likely[0]), None)
        return chosen or (names[0] if names else None)

    def _shape(
        self, region: Any, where: str, name: str, attribute: str | None, report: Report
    ) -> Shape | None:
        """A shape; None, reported, if it has no area or class; ValueError if it makes no sense."""
        drawn = region.get("shape_attributes") if isinstance(region, dict) else None
        if not isinstance(drawn, dict):
            raise ValueError("without shape_attributes")
        kind = drawn.get("name")
        if kind in NO_AREA:
            report.add(Reason.NO_AREA, f"{name}: {where}", kind=kind)
            return None
        label = CLASS
        if attribute is None:
            report.add(Reason.NO_ATTRIBUTES, f"{name}: {where}", label=CLASS)
        else:
            found = _label(_attributes(region).get(attribute))
            if found is None:
                report.add(Reason.NO_ATTRIBUTE, f"{name}: {where}", attribute=short(attribute))
                return None
            label = found

        def numbers(*keys: str) -> list[float]:
            values = [drawn.get(key) for key in keys]
            if not all(map(is_number, values)):
                raise ValueError(f"its {', '.join(keys)} are {', '.join(map(short, values))}")
            return [float(value) for value in values]  # type: ignore[arg-type]

        match kind:
            case "polygon":
                xs, ys = drawn.get("all_points_x"), drawn.get("all_points_y")
                polygon = _pairs(xs, ys)
            case "rect" | "rectangle":
                x, y, width, height = numbers("x", "y", "width", "height")
                return self.rectangle(where, label, (x, x + width), (y, y + height), None)
            case "circle":
                cx, cy, radius = numbers("cx", "cy", "r")
                polygon = ellipse(cx, cy, abs(radius), abs(radius))
            case "ellipse":
                cx, cy, rx, ry = numbers("cx", "cy", "rx", "ry")
                (theta,) = numbers("theta") if drawn.get("theta") is not None else (0.0,)
                polygon = ellipse(cx, cy, abs(rx), abs(ry), math.degrees(theta))
            case _:
                raise ValueError(f"its shape is {short(kind)}")
        return Shape(where, label, polygon=polygon)


def _pairs(xs: Any, ys: Any) -> list[float]:
    """x, y, x, y, ...; ValueError if these are not two lists of as many numbers."""
    if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
        raise ValueError("its all_points_x and all_points_y are not lists of one length")
    values = [value for pair in zip(xs, ys, strict=True) for value in pair]
    if not all(map(is_number, values)):
        raise ValueError("its all_points_x and all_points_y are not all numbers")
    return list(map(float, values))


def is_via(path: Path) -> bool:
    """Whether a JSON file has the keys of VIA 1 or 2."""
    text = read_bytes(path) if path.is_file() else b""
    return b'"shape_attributes"' in text or f'"{METADATA}"'.encode() in text


def is_csv(path: Path) -> bool:
    """Whether a CSV file has the columns of VIA."""
    if not path.is_file():  # such as a folder of that name
        return False
    try:
        with path.open("rb") as file:
            head = file.readline(1000)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return all(name.encode() in head for name in COLUMNS)


def _read_csv(path: Path) -> dict[str, Any]:
    """The entries as of a JSON file; ConfigError if there are none."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # an outline may have any length
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    entries: dict[str, Any] = {}
    try:
        names = [name.lstrip("#").strip() for name in reader.fieldnames or ()]  # VIA 1: #filename
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise ConfigError(f"{path}: not from VIA 1 or 2: no column {missing[0]}")
        reader.fieldnames = names
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            name, size, *cells = (row[column] for column in COLUMNS)
            shape, attributes = (
                _of_cell(cell, f"{where}: {column}")
                for cell, column in zip(cells, COLUMNS[2:], strict=True)
            )
            entry = entries.setdefault(f"{name}{size}", {"filename": name, "regions": []})
            if shape:
                region = {"shape_attributes": shape, "region_attributes": attributes}
                entry["regions"].append(region)
    except csv.Error as error:
        raise ConfigError(f"{path}: not CSV after line {reader.line_num}: {error}") from None
    return entries


def _of_cell(cell: str | None, where: str) -> dict[str, Any]:
    try:
        found = json.loads(cell or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: not a JSON object: {short(cell)}")
    return found


def _is_entry(entry: Any) -> bool:
    known = isinstance(entry, dict) and isinstance(entry.get("filename"), str)
    return known and isinstance(entry.get("regions"), list | dict)


def _regions(entry: dict[str, Any]) -> list[Any]:
    """Those of an image; VIA 1 numbers them in a dict."""
    regions = entry["regions"]
    return list(regions.values()) if isinstance(regions, dict) else regions


def _attributes(region: dict[str, Any]) -> dict[str, Any]:
    found = region.get("region_attributes")
    return found if isinstance(found, dict) else {}


def _label(value: Any) -> str | None:
    """The class that an attribute names: its text, or the only box that is ticked."""
    if isinstance(value, dict):
        ticked = [name for name, ticked in value.items() if ticked]
        value = ticked[0] if len(ticked) == 1 else None
    return value if isinstance(value, str) and value.strip() else None
