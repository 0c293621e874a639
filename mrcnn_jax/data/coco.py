"""Reads a COCO-format annotation file into a checked, immutable data set, and back.

A file is refused (ConfigError), or its images and annotations are kept, repaired, clipped or
dropped: every reason is a row of `report.Reason`, counted with its first ids. Nothing here looks
into an image (`images.check_images` does).
"""

from __future__ import annotations

import ast
import functools
import json
import math
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.report import Reason, Report

Box = tuple[float, float, float, float]
RLE = dict[str, Any]  # {"size": [height, width], "counts": str}, compressed
Note = Callable[[Reason], None]  # counts a reason at the annotation at hand

MIN_SIDE = 0.1  # px: a box with a thinner side is degenerate
LOST_IMAGES = (
    0.01  # share of images that may be missing or unreadable before the data set is refused
)
FAR_IOU, FAR_SIDE = (
    0.5,
    2.0,
)  # a box is far from its mask's extent if they overlap less and some side is more px away (rounding is not)
# px: a polygon with a longer outline is no outline, and pycocotools would need 80 bytes for each
OUTLINE = 3.2e6


@dataclass(frozen=True)
class Category:
    id: int
    name: str


@dataclass(frozen=True)
class ObjectRecord:
    """One annotation. `box` (x1, y1, x2, y2) in original pixels, clipped to the image; `area` as
    annotated: COCO's size classes."""

    annotation_id: int
    label: int  # 1..K
    box: Box
    rle: RLE | None
    iscrowd: bool
    area: float


@dataclass(frozen=True)
class ImageRecord:
    """`file_name` is as it is spelled in the folder; `upright`: the pixels are those of the file,
    turned as its EXIF orientation says."""

    id: int
    file_name: str
    height: int
    width: int
    objects: tuple[ObjectRecord, ...]
    upright: bool = False


@dataclass(frozen=True)
class CocoDataset:
    """Checked images in the order of their ids; category number k of `categories` (by id) is label
    k + 1.

    `lost`: a text ("name (reason)") for each of the file's `listed` images that is missing or
    cannot be used.
    """

    categories: tuple[Category, ...]
    images: tuple[ImageRecord, ...]
    report: Report
    annotations_path: Path
    images_dir: Path
    listed: int
    lost: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 1..K."""
        return tuple(category.name for category in self.categories)

    def category_id(self, label: int) -> int:
        """The file's category id of a label in 1..K; ValueError for any other label."""
        if not 1 <= label <= len(self.categories):
            raise ValueError(f"label {label} is outside 1..{len(self.categories)}")
        return self.categories[label - 1].id

    def with_images(self, images: Iterable[ImageRecord]) -> CocoDataset:
        """The same data set with some images only, and what is kept counted anew; ConfigError if
        none is left."""
        left = tuple(images)
        if not left:
            reasons = [
                line for line in self.report.lines() if line.startswith(("dropped", "left out"))
            ]
            why = "; ".join(reasons) if self.listed else "the file lists none"
            raise ConfigError(f"{self.annotations_path}: no usable image is left: {why}")
        objects = [record for image in left for record in image.objects]
        crowds = sum(record.iscrowd for record in objects)
        counts = {"images": len(left), "objects": len(objects) - crowds, "crowds": crowds}
        boxes = sum(record.rle is None and not record.iscrowd for record in objects)
        kept = counts | ({"objects without a mask (box only)": boxes} if boxes else {})
        return replace(self, images=left, report=replace(self.report, kept=kept))

    def refuse_lost_images(self) -> None:
        """ConfigError if more than 1 % of the file's images are lost, naming the first ten."""
        if len(self.lost) > LOST_IMAGES * self.listed:
            names = ", ".join(self.lost[:10]) + (", ..." if len(self.lost) > 10 else "")
            raise ConfigError(
                f"{self.annotations_path}: {len(self.lost)} of {self.listed} images are lost (1 % may be): {names}"
            )

    def to_coco(self) -> dict[str, Any]:
        """The data set in COCO's format with the file's own ids: what pycocotools evaluates
        against.

        An annotation without a mask has no "segmentation".
        """
        annotations = []
        for image in self.images:
            for record in image.objects:
                x1, y1, x2, y2 = record.box
                annotation: dict[str, Any] = {
                    "id": record.annotation_id,
                    "image_id": image.id,
                    "category_id": self.category_id(record.label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": record.area,
                    "iscrowd": int(record.iscrowd),
                }
                if record.rle is not None:
                    annotation["segmentation"] = record.rle
                annotations.append(annotation)
        return {
            "info": {},
            "images": [
                {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
                for i in self.images
            ],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


class _Dropped(Exception):
    """An image or annotation is unusable, for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


def read_coco(
    annotations: Path, images: Path, data: DataConfig, *, lost_images: bool = False
) -> CocoDataset:
    """Reads and checks an annotation file and looks for its images (`images.check_images` looks
    into them).

    Refused with a ConfigError of one line: not a JSON object, or one with NaN (but for a bbox that
    a mask replaces); missing or wrong keys; duplicate ids; an unknown category_id; an iscrowd that
    is neither 0 nor 1; other class names than `data.class_names`; an image over `data.max_pixels`;
    boxes that are not (x, y, width, height) in pixels; no usable image; and, unless `lost_images`,
    more than 1 % of the images missing. What is dropped, clipped and repaired is in the result's
    `report`.
    """
    content = _load(annotations)
    report = Report()
    raw_images = _with_integers(
        content["images"], "images", ("id", "height", "width"), annotations, report
    )
    raw_annotations = _with_integers(
        content["annotations"],
        "annotations",
        ("id", "image_id", "category_id"),
        annotations,
        report,
    )
    raw_categories = _with_integers(
        content["categories"], "categories", ("id",), annotations, report
    )
    categories = _categories(raw_categories, annotations, report)
    labels = {category.id: label for label, category in enumerate(categories, 1)}
    dataset = CocoDataset(categories, (), report, annotations, images, listed=len(raw_images))
    if data.class_names and data.class_names != dataset.class_names:
        expected, found = ", ".join(data.class_names), ", ".join(dataset.class_names)
        raise ConfigError(
            f"{annotations}: its classes, by id, are {found}; data.class_names are {expected}"
        )

    usable, lost = _usable_images(raw_images, images, data.max_pixels, annotations, report)
    listed = {raw["id"] for raw in raw_images}
    objects: dict[int, list[ObjectRecord]] = defaultdict(list)
    formats = _BoxFormats()
    for raw in raw_annotations:
        number, category_id, image_id = raw["id"], raw.get("category_id"), raw.get("image_id")
        try:
            if category_id not in labels:
                raise ConfigError(f"unknown category_id {category_id}")
            if image_id not in usable:
                raise _Dropped(
                    Reason.OF_DROPPED_IMAGE if image_id in listed else Reason.UNKNOWN_IMAGE
                )
            image = usable[image_id]
            note = functools.partial(report.add, identifier=number)
            objects[image_id].append(
                _object(raw, labels[category_id], image.height, image.width, note, formats)
            )
        except _Dropped as dropped:
            report.add(dropped.reason, number)
        except ConfigError as error:
            raise ConfigError(f"{annotations}: annotation {number}: {error}") from None
    formats.refuse(annotations)
    dataset = replace(dataset, lost=lost)
    if not lost_images:
        dataset.refuse_lost_images()
    return dataset.with_images(
        replace(image, objects=tuple(objects[image.id])) for _, image in sorted(usable.items())
    )


# -- the file --------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    constants: list[
        str
    ] = []  # NaN and its like, which JSON does not have but Python's writer makes

    def constant(text: str) -> float:
        constants.append(text)
        return float(text)

    try:
        content = json.loads(path.read_bytes(), parse_constant=constant)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path}: not JSON (empty or cut off?): {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object is needed, this is a {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ConfigError(f"{path}: {key!r} is missing or not a list of objects")
    if constants:
        _refuse_constants(content, path)
    return content


def _refuse_constants(content: dict[str, Any], path: Path) -> None:
    """ConfigError if a number outside of the boxes is not finite; boxes are looked at one by one
    later."""
    for key, section in content.items():
        for item in section if isinstance(section, list) else [section]:
            fields = item.items() if isinstance(item, dict) else [("", item)]
            for name, value in fields:
                if (key, name) != ("annotations", "bbox") and _has_constant(value):
                    which = (
                        f" {_short(item['id'])}" if isinstance(item, dict) and "id" in item else ""
                    )
                    raise ConfigError(
                        f"{path}: {key}{which}: {name or 'a value'} is or holds NaN or Infinity, which is not JSON"
                    )


def _has_constant(value: Any) -> bool:
    left = [value]  # a stack of our own: the nesting may be as deep as the parser allows
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, float) and not math.isfinite(value):
            return True
    return False


def _integer(value: Any) -> int | None:
    """12 for 12, 12.0 and "12"; None for what is no integer of 64 bits."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def _with_integers(
    items: list[dict[str, Any]], key: str, fields: tuple[str, ...], path: Path, report: Report
) -> list[dict[str, Any]]:
    """The items with the integers of `fields` as such; ConfigError if an id, the first of them, is
    none or occurs twice."""
    result = []
    for item in items:
        written = {name: item.get(name) for name in fields}
        numbers = {name: _integer(value) for name, value in written.items()}
        if numbers["id"] is None:
            raise ConfigError(f"{path}: {key}: id {_short(written['id'])} is not an integer")
        if any(
            number is not None and type(written[name]) is not int
            for name, number in numbers.items()
        ):
            report.add(Reason.NUMBERS, numbers["id"], items=key)
        # What is no integer becomes text, which equals none, for the message that will name it.
        result.append(
            {
                **item,
                **{
                    name: _short(written[name]) if number is None else number
                    for name, number in numbers.items()
                },
            }
        )
    (number, times), *_ = Counter(item["id"] for item in result).most_common(1) or [(0, 0)]
    if times > 1:
        raise ConfigError(f"{path}: {key}: id {number} occurs more than once")
    return result


def _short(value: Any) -> str:
    """`value` in a few printable characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def is_text(value: Any) -> bool:
    """Whether a name can be printed in a line and written as UTF-8: no control characters, no
    halves of pairs."""
    return (
        isinstance(value, str)
        and value != ""
        and not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)
    )


def _categories(raw: list[dict[str, Any]], path: Path, report: Report) -> tuple[Category, ...]:
    if not raw:
        raise ConfigError(f"{path}: 'categories' is empty")
    categories = [
        Category(item["id"], str(item["id"] if item.get("name") is None else item["name"]))
        for item in raw
    ]
    for category in categories:
        if not is_text(category.name):
            raise ConfigError(
                f"{path}: categories: id {category.id}: its name {_short(category.name)} is not printable"
            )
    if [category.id for category in categories] != list(range(1, len(categories) + 1)):
        for category in categories:
            report.add(Reason.CATEGORY_IDS, category.id)
    return tuple(sorted(categories, key=lambda category: category.id))


# -- images ----------------------------------------------------------------------------------------


def _usable_images(
    raw_images: list[dict[str, Any]], folder: Path, max_pixels: int, path: Path, report: Report
) -> tuple[dict[int, ImageRecord], tuple[str, ...]]:
    """By id, the images that exist and have a size, still without objects; and a text for each of
    the others (reported)."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such image folder")
    usable: dict[int, ImageRecord] = {}
    lost: list[str] = []
    for raw in raw_images:
        number, name, height, width = (
            raw["id"],
            raw.get("file_name"),
            raw.get("height"),
            raw.get("width"),
        )
        try:
            if not (type(height) is int and type(width) is int and height > 0 and width > 0):
                raise _Dropped(Reason.SIZE)
            if height * width > max_pixels:
                raise ConfigError(
                    f"{path}: image {number}: {_short(name)}: {height} x {width} is over {max_pixels} pixels (data.max_pixels)"
                )
            found = _found(folder, name)
        except _Dropped as dropped:
            report.add(dropped.reason, number)
            lost.append(f"{_short(name)} ({dropped.reason.text})")
            continue
        if found != name:
            report.add(Reason.FILE_NAME, number)
        usable[number] = ImageRecord(number, found, height, width, ())
    return usable, tuple(lost)


def _found(folder: Path, name: Any) -> str:
    """How `name` is spelled in the folder."""
    if not is_text(name):
        raise _Dropped(Reason.NAME)
    forward = name.replace("\\", "/")
    for spelling in (
        name,
        forward,
        unicodedata.normalize("NFC", forward),
        unicodedata.normalize("NFD", forward),
    ):
        if posixpath.isabs(spelling) or posixpath.normpath(spelling).split("/")[0] == "..":
            raise _Dropped(Reason.NAME)
        if os.path.isfile(
            folder / spelling
        ):  # not Path's, which raises for names that are too long
            return spelling
    raise _Dropped(Reason.MISSING)


# -- annotations -----------------------------------------------------------------------------------


def _object(
    raw: dict[str, Any], label: int, height: int, width: int, note: Note, formats: _BoxFormats
) -> ObjectRecord:
    rle = _rle(raw.get("segmentation"), height, width, note)
    extent = _extent(rle)
    iscrowd = raw.get("iscrowd") or 0
    if iscrowd is not True and _integer(iscrowd) not in (0, 1):
        raise ConfigError(f"iscrowd {_short(iscrowd)} is neither 0 nor 1")
    box = _box(raw.get("bbox"), extent, height, width, note, formats)
    area: Any = raw.get("area")
    if not (_is_number(area) and area > 0):
        area = (
            float(rle_ops.area(rle)) if rle is not None else (box[2] - box[0]) * (box[3] - box[1])
        )
        note(Reason.AREA)
    return ObjectRecord(
        raw["id"], label, box, rle, iscrowd is True or _integer(iscrowd) == 1, float(area)
    )


def _is_number(value: Any) -> bool:
    """A finite number of a size that arithmetic in float32 stands."""
    return (
        type(value) in (int, float) and abs(value) <= 1e9
    )  # exact for integers that no float can hold; False for NaN


def _box(
    bbox: Any, extent: Box | None, height: int, width: int, note: Note, formats: _BoxFormats
) -> Box:
    """The box (x1, y1, x2, y2) inside the image that the annotation means; `extent` is that of its
    mask, if there is one."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        if extent is not None:
            note(Reason.BOX_FROM_MASK)
            return extent
        if _has_constant(bbox):
            raise ConfigError("bbox holds NaN or Infinity, and there is no mask to take it from")
        raise _Dropped(Reason.NO_BOX)
    x, y, w, h = (float(value) for value in bbox)
    formats.add((x, y, w, h), extent, height, width)
    if min(w, h) < MIN_SIDE:
        raise _Dropped(Reason.DEGENERATE)
    box = clipped((x, y, x + w, y + h), height, width)
    if extent is not None and _far(box, extent):
        note(Reason.FAR_FROM_MASK)
        return extent
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        raise _Dropped(Reason.OUTSIDE)
    if box != (x, y, x + w, y + h):
        note(Reason.CLIPPED)
    return box


def clipped(box: Box, height: int, width: int) -> Box:
    """The part of a box that lies inside the image."""
    return (
        min(max(box[0], 0.0), width),
        min(max(box[1], 0.0), height),
        min(max(box[2], 0.0), width),
        min(max(box[3], 0.0), height),
    )


def _extent(rle: RLE | None) -> Box | None:
    """The box around a mask's pixels; None if there are none."""
    if rle is None:
        return None
    x, y, w, h = rle_ops.toBbox(rle).tolist()
    return (x, y, x + w, y + h) if w and h else None


def _far(box: Box, extent: Box) -> bool:
    """Whether a box is another one than its mask's. COCO's own are not: on 7,000 of its masks this
    never fires."""
    if max(abs(a - b) for a, b in zip(box, extent, strict=True)) <= FAR_SIDE:
        return False
    overlap = max(0.0, min(box[2], extent[2]) - max(box[0], extent[0])) * max(
        0.0, min(box[3], extent[3]) - max(box[1], extent[1])
    )
    areas = (box[2] - box[0]) * (box[3] - box[1]) + (extent[2] - extent[0]) * (
        extent[3] - extent[1]
    )
    return overlap < FAR_IOU * (areas - overlap)


@dataclass
class _BoxFormats:
    """Evidence over a whole file that its boxes are not (x, y, width, height) in pixels, but
    corners or fractions of the image."""

    boxes: int = 0
    not_sizes: int = 0  # impossible as (x, y, w, h)
    not_corners: int = 0  # impossible as (x1, y1, x2, y2)
    fractions: int = 0

    def add(self, bbox: Box, extent: Box | None, height: int, width: int) -> None:
        x, y, w, h = bbox

        def impossible(box: Box) -> bool:
            inside = clipped(box, height, width)
            if (
                max(abs(a - b) for a, b in zip(box, inside, strict=True)) > 1
                or box[2] <= box[0]
                or box[3] <= box[1]
            ):
                return True
            return extent is not None and _far(inside, extent)

        self.boxes += 1
        self.not_sizes += impossible((x, y, x + w, y + h))
        self.not_corners += impossible(bbox)
        # On the smallest images, and with a mask that says so, a box of a pixel in the corner is
        # just that.
        self.fractions += (
            min(bbox) >= 0
            and max(bbox) <= 1
            and min(height, width) >= 8
            and (extent is None or _far((x, y, x + w, y + h), extent))
        )

    def refuse(self, path: Path) -> None:
        """ConfigError, with a hint, if the share of impossible boxes says so."""
        if self.fractions and self.fractions >= 0.5 * self.boxes:
            hint = "as fractions of the image they would fit: multiply them by its width and height"
            raise ConfigError(
                f"{path}: {self.fractions} of {self.boxes} boxes lie in 0..1, which is no box in pixels; {hint}"
            )
        # A true (x, y, w, h) is often impossible as corners; one or two boxes that leave the image
        # by far prove nothing.
        if self.not_sizes >= max(2, 0.2 * self.boxes) and self.not_corners <= 0.05 * self.boxes:
            hint = "as [x1, y1, x2, y2] they fit: convert them (width = x2 - x1, height = y2 - y1)"
            raise ConfigError(
                f"{path}: {self.not_sizes} of {self.boxes} boxes are impossible as [x, y, width, height]; {hint}"
            )


# -- masks -----------------------------------------------------------------------------------------


def _rle(segmentation: Any, height: int, width: int, note: Note) -> RLE | None:
    """Polygons or run lengths (list or compressed) as compressed run lengths; None if there is no
    segmentation.

    pycocotools trusts its input (a wrong length reads or writes beyond its buffers, a far point
    takes any memory), so everything is checked before.
    """
    if not segmentation or (
        isinstance(segmentation, list) and all(part == [] for part in segmentation)
    ):
        return None
    if isinstance(segmentation, list):
        rle = _polygons_rle(segmentation, height, width, note)
    elif isinstance(segmentation, dict) and segmentation.get("size") == [height, width]:
        runs = _run_lengths(segmentation.get("counts"), note)
        if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != height * width:
            raise _Dropped(Reason.UNUSABLE_MASK)
        rle = rle_ops.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        if 0 in runs[1:]:  # of which pycocotools makes boxes that mean nothing
            rle = rle_ops.encode(rle_ops.decode(rle))
    else:
        raise _Dropped(Reason.UNUSABLE_MASK)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _polygons_rle(parts: list[Any], height: int, width: int, note: Note) -> RLE:
    if all(map(_is_number, parts)):
        note(Reason.FLAT_POLYGON)
        parts = [parts]
    polygons = [part for part in parts if is_polygon(part, height, width)]
    if not polygons:
        raise _Dropped(Reason.UNUSABLE_MASK)
    if len(polygons) < len(parts):
        note(Reason.POLYGON)
    rles = rle_ops.frPyObjects(polygons, height, width)
    while len(rles) > 64:  # a merge reads all of what it has merged again for every part
        rles = [rle_ops.merge(rles[i : i + 64]) for i in range(0, len(rles), 64)]
    return rle_ops.merge(rles)


def is_polygon(part: Any, height: int, width: int) -> bool:
    """Three points or more, none of them further from the image than its longer side."""
    if (
        not isinstance(part, list)
        or len(part) < 6
        or len(part) % 2
        or not set(map(type, part)) <= {int, float}
    ):
        return False
    side = max(height, width)
    if not (min(part) >= -side and max(part) <= 2 * side):
        return False
    points = np.array(part, np.float64).reshape(-1, 2)
    return bool(np.abs(np.diff(points, axis=0)).max(1).sum() <= OUTLINE)


def _run_lengths(counts: Any, note: Note) -> list[Any]:
    """The runs of a list, of COCO's compressed text, or of that text as bytes (or as how Python
    prints bytes)."""
    if isinstance(counts, list):
        note(Reason.RUN_LIST)
        return counts
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        try:
            counts = ast.literal_eval(counts)
        except (ValueError, SyntaxError, MemoryError):
            raise _Dropped(Reason.UNUSABLE_MASK) from None
    if isinstance(counts, bytes):
        note(Reason.RUN_BYTES)
        counts = counts.decode("ascii", "replace")
    runs = _runs(counts) if isinstance(counts, str) else None
    if runs is None:
        raise _Dropped(Reason.UNUSABLE_MASK)
    return runs


def _runs(counts: str) -> list[int] | None:
    """Run lengths of COCO's compressed string (maskApi.c, rleFrString); None if it is malformed.

    Each run is a signed number in groups of 5 bits, low first, one character each (bit 5: more
    follow); from the fourth run on it is the difference to the run two before.
    """
    codes = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # more than 35 bits
        return None
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends] & 16) != 0
    values = values - (negative.astype(np.int64) << (5 * (place[ends] + 1)))
    # Runs 1, 3, 5, ... and 2, 4, 6, ... are two chains of differences; run 0 stands alone.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()
