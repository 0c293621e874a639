"""Reads a COCO-format annotation file into a checked, immutable data set, and back.

Nothing is dropped in silence: whatever does not survive is counted in `Report` with its reason and the first ids.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config import ConfigError

Box = tuple[float, float, float, float]
RLE = dict[str, Any]  # {"size": [height, width], "counts": str}, compressed

MIN_SIDE = 0.1  # px: a box that is thinner after clipping is degenerate
LOST_IMAGES = 0.01  # share of images that may be missing or unreadable before the data set is refused
FIRST_IDS = 10


@dataclass(frozen=True)
class Category:
    id: int
    name: str


@dataclass(frozen=True)
class ObjectRecord:
    """One annotation. `box` (x1, y1, x2, y2) in original pixels, clipped to the image; `area` as annotated: COCO's size classes."""

    annotation_id: int
    label: int  # 1..K
    box: Box
    rle: RLE | None
    iscrowd: bool
    area: float


@dataclass(frozen=True)
class ImageRecord:
    id: int
    file_name: str
    height: int
    width: int
    objects: tuple[ObjectRecord, ...]


Outcome = Literal["dropped", "clipped", "repaired", "truncated"]


@dataclass
class Finding:
    """How often something happened, and the first ids (of annotations or images, as the reason says)."""

    count: int = 0
    first_ids: list[Any] = field(default_factory=list)


@dataclass
class Report:
    """What was kept, and what happened to the rest: (outcome, reason) -> count and first ten ids."""

    kept: dict[str, int] = field(default_factory=dict)
    findings: dict[tuple[Outcome, str], Finding] = field(default_factory=dict)

    def add(self, outcome: Outcome, reason: str, identifier: Any, count: int = 1) -> None:
        finding = self.findings.setdefault((outcome, reason), Finding())
        finding.count += count
        if len(finding.first_ids) < FIRST_IDS:
            finding.first_ids.append(identifier)

    def lines(self) -> list[str]:
        """For people: one line for what is kept, one for each finding."""
        kept = ", ".join(f"{count} {what}" for what, count in self.kept.items())
        found = [
            f"{outcome} {f.count}: {reason} ({', '.join(map(str, f.first_ids))}{', ...' if f.count > len(f.first_ids) else ''})"
            for (outcome, reason), f in sorted(self.findings.items())
        ]
        return [f"kept {kept}", *found]

    def to_dict(self) -> dict[str, Any]:
        """For machines: {"kept": {...}, "findings": [{"outcome", "reason", "count", "first_ids"}, ...]}."""
        found = [
            {"outcome": outcome, "reason": reason, "count": f.count, "first_ids": f.first_ids}
            for (outcome, reason), f in sorted(self.findings.items())
        ]
        return {"kept": self.kept, "findings": found}


@dataclass(frozen=True)
class CocoDataset:
    """Checked images in the order of their ids; category number k of `categories` (by id) is label k + 1."""

    categories: tuple[Category, ...]
    images: tuple[ImageRecord, ...]
    report: Report
    annotations_path: Path
    images_dir: Path

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
        """The same data set with some images only, and what is kept counted anew; ConfigError if none is left."""
        left = tuple(images)
        if not left:
            raise ConfigError(f"{self.annotations_path}: no usable image is left: {'; '.join(self.report.lines()[1:])}")
        crowds = [record.iscrowd for image in left for record in image.objects]
        self.report.kept.update(images=len(left), objects=crowds.count(False), crowds=crowds.count(True))
        return replace(self, images=left)

    def to_coco(self) -> dict[str, Any]:
        """The data set in COCO's format with the file's own ids: what pycocotools evaluates against.

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
            "images": [{"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width} for i in self.images],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def read_coco(annotations: Path, images: Path) -> CocoDataset:
    """Reads and checks an annotation file and looks for its images (the pixels are checked when the data set is built).

    Refused with a ConfigError of one line: not a JSON object, missing or wrong keys, duplicate ids, an unknown category_id, more than 1 %
    of the images missing, no usable image. Dropped, clipped and repaired annotations are in the result's `report`.
    """
    content = _load(annotations)
    categories = _categories(content["categories"], annotations)
    labels = {category.id: label for label, category in enumerate(categories, 1)}
    report = Report()

    images_by_id = {_identifier(raw, "images", annotations): raw for raw in content["images"]}
    _refuse_duplicates(content["images"], "images", annotations)
    _refuse_duplicates(content["annotations"], "annotations", annotations)
    usable = _usable_images(images_by_id, images, annotations, report)

    objects: dict[int, list[ObjectRecord]] = defaultdict(list)
    for raw in content["annotations"]:
        category_id, image_id = raw.get("category_id"), raw.get("image_id")
        if not _is_id(category_id) or category_id not in labels:
            raise ConfigError(f"{annotations}: annotation {raw['id']}: unknown category_id {category_id!r}")
        if not _is_id(image_id) or image_id not in images_by_id:
            report.add("dropped", "annotations with an unknown image_id", raw["id"])
        elif image_id not in usable:
            report.add("dropped", "annotations of a dropped image", raw["id"])
        else:
            height, width = usable[image_id]
            record = _object(raw, labels[category_id], height, width, report)
            if record is not None:
                objects[image_id].append(record)

    records = (
        ImageRecord(i, images_by_id[i]["file_name"], height, width, tuple(objects[i])) for i, (height, width) in sorted(usable.items())
    )
    return CocoDataset(categories, (), report, annotations, images).with_images(records)


def refuse_lost_images(annotations: Path, lost: list[str], total: int, what: str) -> None:
    """ConfigError if more than 1 % of the images are lost (missing or unreadable), naming the first."""
    if len(lost) > LOST_IMAGES * total:
        names = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ConfigError(f"{annotations}: {len(lost)} of {total} images {what}: {names}")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path}: not JSON (empty or cut off?): {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object is needed, this is a {type(content).__name__}")
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise ConfigError(f"{path}: {key!r} is missing or not a list of objects")
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _identifier(raw: dict[str, Any], key: str, path: Path) -> int:
    if not _is_id(raw.get("id")):
        raise ConfigError(f"{path}: {key}: id {raw.get('id')!r} is not an integer")
    return raw["id"]


def _refuse_duplicates(items: list[dict[str, Any]], key: str, path: Path) -> None:
    counts = Counter(_identifier(item, key, path) for item in items)
    if len(counts) < len(items):
        raise ConfigError(f"{path}: {key}: id {counts.most_common(1)[0][0]} occurs more than once")


def _categories(raw: list[dict[str, Any]], path: Path) -> tuple[Category, ...]:
    _refuse_duplicates(raw, "categories", path)
    if not raw:
        raise ConfigError(f"{path}: 'categories' is empty")
    found = (Category(item["id"], str(item.get("name", item["id"]))) for item in raw)
    return tuple(sorted(found, key=lambda category: category.id))


def _usable_images(images_by_id: dict[int, dict[str, Any]], folder: Path, path: Path, report: Report) -> dict[int, tuple[int, int]]:
    """(height, width) of the images that exist and have a size; the rest is reported."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such image folder")
    usable, missing = {}, []
    for image_id, raw in images_by_id.items():
        name, height, width = raw.get("file_name"), raw.get("height"), raw.get("width")
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            report.add("dropped", "images whose file_name is missing or leaves the image folder", image_id)
        elif not (_is_id(height) and _is_id(width) and height > 0 and width > 0):  # type: ignore[operator]
            report.add("dropped", "images without a size", image_id)
        elif not (folder / name).is_file():
            report.add("dropped", "images whose file is missing", image_id)
            missing.append(name)
        else:
            usable[image_id] = (height, width)
    refuse_lost_images(path, missing, len(images_by_id), f"are missing in {folder}")
    return usable  # type: ignore[return-value]


def _object(raw: dict[str, Any], label: int, height: int, width: int, report: Report) -> ObjectRecord | None:
    """The checked annotation, or None if it is dropped (reported)."""
    segmentation = raw.get("segmentation")
    rle = None
    if segmentation:
        rle = _rle(segmentation, height, width, raw["id"], report)
        if rle is None:
            report.add("dropped", "annotations with an unusable segmentation", raw["id"])
            return None
    box = _corners(raw.get("bbox"))
    if box is None and rle is not None:
        box = _corners(rle_ops.toBbox(rle).tolist())
        report.add("repaired", "annotations without a usable bbox: taken from the mask", raw["id"])
    if box is None:
        report.add("dropped", "annotations without a usable bbox", raw["id"])
        return None
    clipped = (min(max(box[0], 0.0), width), min(max(box[1], 0.0), height), min(max(box[2], 0.0), width), min(max(box[3], 0.0), height))
    if min(clipped[2] - clipped[0], clipped[3] - clipped[1]) < MIN_SIDE:
        report.add("dropped", "annotations with a degenerate box", raw["id"])
        return None
    if clipped != box:
        report.add("clipped", "annotations whose box leaves the image", raw["id"])
    area: Any = raw.get("area")
    if not _is_number(area):
        area = float(rle_ops.area(rle)) if rle is not None else (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
        report.add("repaired", "annotations without an area: computed", raw["id"])
    return ObjectRecord(raw["id"], label, clipped, rle, bool(raw.get("iscrowd", 0)), float(area))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _corners(bbox: Any) -> Box | None:
    """(x, y, w, h) as (x1, y1, x2, y2)."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return None
    x, y, w, h = (float(value) for value in bbox)
    return x, y, x + w, y + h


def _rle(segmentation: Any, height: int, width: int, annotation_id: int, report: Report) -> RLE | None:
    """Polygons or run lengths (list or compressed) as compressed run lengths; None if they are unusable.

    pycocotools trusts its input (a wrong length reads or writes beyond its buffers), so everything is checked before.
    """
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if _is_polygon(polygon)]
        if not polygons:
            return None
        if len(polygons) < len(segmentation):
            report.add("dropped", "polygons (parts of an annotation) with under 3 points or an odd count", annotation_id)
        rle = rle_ops.merge(rle_ops.frPyObjects(polygons, height, width))
    elif isinstance(segmentation, dict) and segmentation.get("size") == [height, width]:
        counts = segmentation.get("counts")
        runs = _runs(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(_is_id(run) and run >= 0 for run in runs) or sum(runs) != height * width:
            return None
        rle = rle_ops.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    else:
        return None
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_number, polygon))


def _runs(counts: str) -> list[int] | None:
    """Run lengths of COCO's compressed string (maskApi.c, rleFrString); None if it is malformed.

    Each run is a signed number in groups of 5 bits, low first, one character each (bit 5: more follow); from the fourth run on it is
    the difference to the run two before.
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
