"""Reads a COCO annotation file into a checked `CocoDataset`.

A fault of the file as a whole raises a ConfigError. Faulty images and annotations are dropped,
clipped or repaired, each counted under a `report.Reason` with the first ids. Image files are only
looked up here: `images.check_images` decodes them.
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.depth_files import DepthFiles, find_depth
from mrcnn_jax.data.formats import Formats
from mrcnn_jax.data.image_names import FilesByName, written_name
from mrcnn_jax.data.json_values import (
    has_constant,
    integer,
    is_text,
    parse_json,
    read_bytes,
    short,
)
from mrcnn_jax.data.other_formats import other_format
from mrcnn_jax.data.records import Category, CocoDataset, ImageRecord, ObjectRecord
from mrcnn_jax.data.repair import Dropped, object_record
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.headers import header_size

# By section of the file: the fields that are integers, the id first.
INTEGERS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id",),
}
MANY_CROWDS = 0.05  # of all annotations, and more than one; COCO has 1 %


class CocoFile(NamedTuple):
    """The content of a COCO file, and which bytes that was: it may be saved anew meanwhile."""

    content: dict[str, Any]
    sha256: str


def read_coco(
    annotations: Path,
    images: Path,
    data: DataConfig,
    *,
    lost_images: bool = False,
    depth: Path | bool = False,
    file: CocoFile | None = None,
    max_pixels: int | None = None,
) -> CocoDataset:
    """Reads and checks an annotation file and looks up its images.

    Args:
        annotations: the file.
        images: the folder that its file names are relative to.
        data: `class_names` (if any) and `max_pixels` are compared with the file.
        lost_images: accept that more than 1 % of the images or depth maps are missing.
        depth: where depth maps are looked up: in this folder, by the names of the images, or as
            images[].depth_file says (True). False: nowhere.
        file: what `load_coco` returned for it; None: it is loaded.
        max_pixels: instead of that of `data`, which is limited itself.

    Returns:
        The data set; its `report` counts what was dropped, clipped and repaired.

    Raises:
        ConfigError: not a JSON object, or NaN in it (but for a bbox that a mask replaces); missing
            sections; missing or repeated ids; an unknown category_id; an iscrowd that is neither 0
            nor 1; other class names; an image over the pixel limit; boxes that are not (x, y,
            width, height) in pixels; no usable image, or too many missing ones; no such folder of
            depth maps, or too many missing ones.
    """
    report = Report()
    content, digest = load_coco(annotations, report) if file is None else file
    raw = {key: _with_integers(content[key], key, annotations, report) for key in INTEGERS}
    categories = _categories(raw["categories"], annotations, report)
    dataset = CocoDataset(
        categories,
        (),
        report,
        annotations,
        images,
        listed=len(raw["images"]),
        annotations_sha256=digest,
    )
    if data.class_names and data.class_names != dataset.class_names:
        expected, found = ", ".join(data.class_names), ", ".join(dataset.class_names)
        raise ConfigError(
            f"{annotations}: its classes, by id, are {found}; data.class_names are {expected}"
        )
    limit = data.max_pixels if max_pixels is None else max_pixels
    usable, lost = _usable_images(raw["images"], images, limit, annotations, report)
    listed = {image["id"] for image in raw["images"]}
    objects = _objects(raw["annotations"], dataset, usable, listed)
    maps = find_depth(raw["images"], usable, images, depth, report) if depth else DepthFiles()
    dataset = replace(dataset, lost=lost, listed_depth=maps.listed, lost_depth=maps.lost)
    if not lost_images:
        dataset.refuse_lost_images()
    return dataset.with_images(
        replace(image, annotations=tuple(objects[number]), depth_file=maps.names.get(number))
        for number, image in sorted(usable.items())
    )


# -- the file --------------------------------------------------------------------------------------


def load_coco(path: Path, report: Report) -> CocoFile:
    """Parses a COCO file.

    Args:
        path: the file.
        report: counts keys that an object has again.

    Returns:
        Its content, of which "images", "annotations" and "categories" are lists of objects. There
        is no NaN outside of the boxes.

    Raises:
        ConfigError: the file is no such JSON.
    """
    constants: list[float] = []

    def constant(text: str) -> float:
        constants.append(float(text))
        return constants[-1]

    try:
        encoded = read_bytes(path)
        content = parse_json(
            encoded, path, constant, lambda key: report.add(Reason.REPEATED_KEY, short(key))
        )
    except ConfigError as error:
        what = other_format(path)
        raise ConfigError(f"{path}: no COCO file, but {what}") if what else error from None
    for key in INTEGERS:
        value = content.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            what = other_format(path, content)
            why = (
                f"no COCO file, but {what}"
                if what
                else f"{key!r} is missing or not a list of objects"
            )
            raise ConfigError(f"{path}: {why}")
    if constants:
        _refuse_constants(content, path)
    return CocoFile(content, hashlib.sha256(encoded).hexdigest())


def _refuse_constants(content: dict[str, Any], path: Path) -> None:
    """ConfigError if a number is not finite, except in boxes, which are checked one by one."""
    for key, section in content.items():
        for item in section if isinstance(section, list) else [section]:
            fields = item.items() if isinstance(item, dict) else [("", item)]
            for name, value in fields:
                if (key, name) != ("annotations", "bbox") and has_constant(value):
                    known = isinstance(item, dict) and "id" in item
                    which = f"{key} {short(item['id'])}" if known else key
                    raise ConfigError(
                        f"{path}: {which}: {name or 'a value'} is or holds NaN or Infinity, "
                        "which is not JSON"
                    )


def _with_integers(
    items: list[dict[str, Any]], key: str, path: Path, report: Report
) -> list[dict[str, Any]]:
    """The items with their `INTEGERS` parsed; ConfigError if an id is missing or occurs twice."""
    result = []
    for item in items:
        written = {name: item.get(name) for name in INTEGERS[key]}
        numbers = {name: integer(value) for name, value in written.items()}
        if numbers["id"] is None:
            raise ConfigError(f"{path}: {key}: id {short(written['id'])} is not an integer")
        if any(n is not None and type(written[name]) is not int for name, n in numbers.items()):
            report.add(Reason.NUMBERS, numbers["id"], items=key)
        # Anything else becomes text for the message that will quote it; it equals no integer.
        parsed = {name: short(written[name]) if n is None else n for name, n in numbers.items()}
        result.append(item | parsed)
    (number, times), *_ = Counter(item["id"] for item in result).most_common(1) or [(0, 0)]
    if times > 1:
        raise ConfigError(f"{path}: {key}: id {number} occurs more than once")
    return result


def _categories(raw: list[dict[str, Any]], path: Path, report: Report) -> tuple[Category, ...]:
    if not raw:
        raise ConfigError(f"{path}: 'categories' is empty")
    categories = [
        Category(item["id"], str(item["id"] if item.get("name") is None else item["name"]))
        for item in raw
    ]
    for category in categories:
        if not is_text(category.name):
            name = short(category.name)
            raise ConfigError(f"{path}: categories: id {category.id}: name {name} is not printable")
    if [category.id for category in categories] != list(range(1, len(categories) + 1)):
        for category in categories:
            report.add(Reason.CATEGORY_IDS, category.id)
    times = Counter(category.name.strip().casefold() for category in categories)
    for category in categories:
        if times[category.name.strip().casefold()] > 1:
            report.add(Reason.SAME_NAME, category.id)
    return tuple(sorted(categories, key=lambda category: category.id))


# -- images ----------------------------------------------------------------------------------------


def _usable_images(
    raw: list[dict[str, Any]], folder: Path, max_pixels: int, path: Path, report: Report
) -> tuple[dict[int, ImageRecord], tuple[str, ...]]:
    """The usable images by id, without objects yet, and "name (reason)" of the others."""
    if not folder.is_dir():
        what = other_format(folder) if folder.is_file() else None
        raise ConfigError(
            f"{folder}: " + (f"no folder, but {what}" if what else "no such image folder")
        )
    usable: dict[int, ImageRecord] = {}
    used: set[str] = set()
    lost: list[str] = []
    written = {item["id"]: written_name(item) for item in raw}
    by_name = FilesByName(folder, [name for name in written.values() if isinstance(name, str)])
    elsewhere: dict[int, Reason] = {}  # images that are not where their name says: how found
    for item in raw:
        number, name = item["id"], written[item["id"]]
        try:
            found, how = by_name.look(name, of_url=item.get("file_name") is None)
            if how is not None:
                elsewhere[number] = how
            height, width = _size(item, folder / found, report)
            if height * width > max_pixels:
                raise ConfigError(
                    f"{path}: image {number}: {short(name)}: {height} x {width} is over "
                    f"{max_pixels} pixels (data.max_pixels)"
                )
        except Dropped as dropped:
            report.add(dropped.reason, number)
            lost.append(f"{short(name)} ({dropped.reason.text})")
            continue
        if found != name and number not in elsewhere:
            report.add(Reason.FILE_NAME, number)
        if (file := posixpath.normpath(found)) in used:
            report.add(Reason.SAME_FILE, number)
        used.add(file)
        usable[number] = ImageRecord(number, found, height, width, ())
    names: dict[str, set[str]] = defaultdict(set)  # by the file that they were found as
    for number, image in usable.items():
        names[image.file_name].add(str(written[number]))
    for number, how in elsewhere.items():
        if number not in usable:
            continue
        if len(names[usable[number].file_name]) == 1:
            report.add(how, number)
        else:
            report.add(Reason.AMBIGUOUS, number)
            lost.append(f"{short(written[number])} ({Reason.AMBIGUOUS.text})")
            del usable[number]
    return usable, tuple(lost)


def _size(item: dict[str, Any], path: Path, report: Report) -> tuple[int, int]:
    """(height, width) as annotated, or of the file's upright picture where they are missing."""
    sides = [item[side] if type(item[side]) is int else 0 for side in ("height", "width")]
    if min(sides) > 0:
        return sides[0], sides[1]
    try:
        stored = header_size(path, upright=True)
    except ValueError:
        raise Dropped(Reason.SIZE) from None
    report.add(Reason.SIZE_FROM_FILE, item["id"])
    # A side that is annotated stays: it will be compared with the file's.
    height, width = (a if a > 0 else b for a, b in zip(sides, stored, strict=True))
    return height, width


# -- annotations -----------------------------------------------------------------------------------


def _objects(
    raw: list[dict[str, Any]],
    dataset: CocoDataset,
    usable: dict[int, ImageRecord],
    listed: set[int],
) -> dict[int, list[ObjectRecord]]:
    """The usable annotations by image id; the others go to the data set's report."""
    path, report = dataset.annotations_path, dataset.report
    labels = {category.id: label for label, category in enumerate(dataset.categories, 1)}
    objects: dict[int, list[ObjectRecord]] = defaultdict(list)
    formats = Formats()
    seen: set[tuple[Any, ...]] = set()
    for item in raw:
        number, category_id, image_id = item["id"], item["category_id"], item["image_id"]
        note = functools.partial(report.add, identifier=number)
        try:
            if category_id not in labels:
                raise ConfigError(f"unknown category_id {category_id}")
            image = usable.get(image_id)
            if image is None:
                dropped = image_id in listed
                raise Dropped(Reason.OF_DROPPED_IMAGE if dropped else Reason.UNKNOWN_IMAGE)
            record = object_record(
                item, labels[category_id], image.height, image.width, note, formats
            )
        except Dropped as dropped:
            note(dropped.reason)
        except ConfigError as error:
            raise ConfigError(f"{path}: annotation {number}: {error}") from None
        else:
            objects[image_id].append(record)
            mask = None if record.rle is None else record.rle["counts"]
            known = image_id, record.label, record.iscrowd, record.box, mask
            if known in seen:
                note(Reason.SAME_ANNOTATION)
            seen.add(known)
    formats.refuse(path)
    _note_oddities([r for found in objects.values() for r in found], formats, report)
    return objects


def _note_oddities(records: list[ObjectRecord], formats: Formats, report: Report) -> None:
    crowds = [record for record in records if record.iscrowd]
    many = len(crowds) >= max(2, MANY_CROWDS * len(records))
    for record in crowds if many else ():
        report.add(Reason.MANY_CROWDS, record.annotation_id)
    for record in records if formats.in_a_corner else ():
        report.add(Reason.IN_A_CORNER, record.annotation_id)
