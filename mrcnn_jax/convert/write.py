"""Writes annotated images as one or two COCO annotation files, after `read_coco` read them.

Polygons stay polygons, masks become compressed run lengths; an object of both becomes run lengths.
A box is the extent of what was drawn, or the box that was drawn, clipped to the image.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError, require_at_least
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import (
    MAX_PIXELS,
    AnnotatedImage,
    Options,
    Patch,
    RectangleOptions,
    Shape,
    image_size,
    normal_label,
)
from mrcnn_jax.convert.image_folder import ImageFolder
from mrcnn_jax.convert.lists import Only, read_classes
from mrcnn_jax.data.images import tell_pages
from mrcnn_jax.data.json_values import is_text
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import coco_annotation, refuse_lost
from mrcnn_jax.data.repair import MIN_SIDE, is_polygon
from mrcnn_jax.data.report import Finding, Reason, Report
from mrcnn_jax.output import listed, whole_file, write_file
from mrcnn_jax.pixels.decode import header_pages
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.places import RLE, Box, box_area, clipped


@dataclass(frozen=True)
class _Object:
    """An annotation without its ids."""

    label: str
    segmentation: list[list[float]] | RLE | None
    box: Box
    area: float
    iscrowd: bool


@dataclass(frozen=True)
class _Image:
    file_name: str
    height: int
    width: int
    objects: tuple[_Object, ...]


def convert(options: Options, *, hint: bool = True) -> list[Path]:
    """Converts an export and prints what was kept and lost.

    Args:
        options: those of the export's format; they say where everything is.
        hint: name commands that check the files, and options that would help.

    Returns:
        The files written.

    Raises:
        ConfigError: the export, an image or an option is unusable. Nothing is written then.
    """
    if not 0 <= options.split < 1:
        raise ConfigError(f"--split: {options.split} is not a share in 0..1")
    if not options.input.exists():
        raise ConfigError(f"{options.input}: no such file or folder")
    require_at_least(0, options, "--", "seed")
    names = read_classes(options.categories) if options.categories is not None else None
    images, report = options.open_images(), Report()
    converted = _images(options, images, names, report, hint=hint)
    why = "; ".join(report.lines()[1:]) or "it has none"
    if not converted:
        raise ConfigError(f"{options.input}: no usable image is left: {why}")
    if names is None:
        names = tuple(sorted({item.label for image in converted for item in image.objects}))
        if not names:
            raise ConfigError(f"{options.input}: no object is left, and so no class: {why}")
        own = options.class_names() or ()
        names = (*own, *(name for name in names if name not in own))
    objects = [item for image in converted for item in image.objects]
    boxes_alone = objects and all(item.segmentation is None for item in objects)
    if boxes_alone and isinstance(options, RectangleOptions):
        first = next(image.file_name for image in converted if image.objects)
        report.add(Reason.BOXES_ALONE, first, len(objects))
    written = _written(converted, names, options, images.folder, report)
    print("\n".join([*report.lines(), *(options.hints() if hint else ())]))
    print(f"{len(names)} classes: {', '.join(names)}")
    for path, count in written.items() if hint else ():
        print(f"{path}: {count} images; to check:")
        print(f"    {cli.command('check', '--annotations', path, '--images', images.folder)}")
    return list(written)


# -- images ----------------------------------------------------------------------------------------


def _images(
    options: Options,
    images: ImageFolder,
    names: tuple[str, ...] | None,
    report: Report,
    *,
    hint: bool,
) -> list[_Image]:
    """The annotated images whose file exists, by its name.

    ConfigError if too many do not exist, with a `hint` at the option that allows it, or if some
    have another size than annotated.
    """
    only = Only(options.only)
    converted: dict[str, _Image] = {}
    places: dict[str, str] = {}
    lost, wrong, count = [], [], 0
    for annotated in options.annotated_images(images, report):
        file = _file(annotated, images, report)
        if not only.names(file or annotated.stem or annotated.names[0]):
            report.add(Reason.NOT_LISTED, annotated.name, file=options.only)
            continue
        count += 1
        size = None if file is None else image_size(images.folder / file, annotated.size)
        if file is None or size is None:
            reason = Reason.MISSING if file is None else Reason.UNDECODABLE
            report.add(reason, annotated.name)
            for shape in annotated.shapes:
                report.add(Reason.OF_DROPPED_IMAGE, f"{annotated.name}: {shape.where}")
            lost.append(
                f"{annotated.names[-1] if annotated.names else annotated.stem} ({reason.text})"
            )
            continue
        if file in places:
            raise ConfigError(f"{annotated.where}: its image {file} is also that of {places[file]}")
        places[file] = annotated.where
        if annotated.size not in (None, size):
            found, stated = (f"{h} x {w}" for h, w in (size, annotated.size))
            wrong.append(f"{annotated.where}: {file} is {found}, annotated as {stated}")
            continue
        tell_pages(report, file, header_pages(images.folder / file))
        converted[file] = _Image(file, *size, _objects(annotated, size, options, names, report))
    if wrong:
        raise ConfigError(
            f"{len(wrong)} images have another size (height x width) than annotated: "
            f"{listed(wrong, separator='; ')}"
        )
    if not options.allow_missing:
        see = " (see --allow-missing)" if hint else ""
        refuse_lost(lost, count, f"{options.input}: in {images.folder}{see}")
    for file in images.files:
        if file in places or not only.names(file):
            continue
        if not options.keep_unannotated:
            report.add(Reason.UNANNOTATED, file)
        elif (size := image_size(images.folder / file, None)) is None:
            report.add(Reason.UNDECODABLE, file)
        else:
            tell_pages(report, file, header_pages(images.folder / file))
            converted[file] = _Image(file, *size, ())
    for line in only.left():
        report.add(Reason.LISTED_ONLY, line, file=options.only)
    return [converted[file] for file in sorted(converted)]


def _file(annotated: AnnotatedImage, images: ImageFolder, report: Report) -> str | None:
    """The image's file, relative to the folder; None if there is none."""
    for name in annotated.names:
        if not is_text(name):
            raise ConfigError(f"{annotated.where}: its image's name {name!r} is not printable")
    file = images.find(annotated.names)
    if file is not None:
        # So do annotations look whose images were renumbered, but also those with numbers of their
        # own.
        own = images.like(annotated.beside[0]) if annotated.beside else []
        if own and file not in own:
            report.add(Reason.NAMED_OTHERWISE, f"{annotated.name}: {file}")
    else:
        file = images.find(annotated.beside) or images.find_elsewhere(annotated.names, None)
        if (
            file is None
            and annotated.embedded is None
            and (away := images.outside(annotated.names))
        ):
            # Of another name there may be a picture of it with the answers painted in.
            raise ConfigError(
                f"{annotated.where}: its image {away} lies outside of {images.folder}: --images "
                "names its folder"
            )
        file = file or images.find_elsewhere((), annotated.stem)
        if file is not None and annotated.names:
            report.add(Reason.IMAGE_PATH, annotated.name)
    if file is None and annotated.embedded is not None:
        file = PurePosixPath(annotated.names[-1]).name
        path = images.folder / file
        try:
            if path.exists():
                raise ValueError("there is such a file, of another image or not readable")
            content = base64.b64decode(annotated.embedded)
            write_file(path, content)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{annotated.where}: imageData cannot be written as {path}: {error}"
            ) from None
        report.add(Reason.EMBEDDED, annotated.name)
    return file


# -- objects ---------------------------------------------------------------------------------------


def _objects(
    annotated: AnnotatedImage,
    size: tuple[int, int],
    options: Options,
    names: tuple[str, ...] | None,
    report: Report,
) -> tuple[_Object, ...]:
    """The shapes of an image as objects; those of one label and group are one."""
    groups: dict[Hashable, list[Shape]] = defaultdict(list)
    skipped = set(map(normal_label, options.skip))
    for number, shape in enumerate(annotated.shapes):
        label, name = normal_label(shape.label), f"{annotated.name}: {shape.where}"
        where = f"{annotated.where}: {shape.where}"
        if label in skipped:
            report.add(Reason.SKIPPED, name, label=label)
            continue
        if not is_text(label):
            raise ConfigError(f"{where}: its label {shape.label!r} is not printable")
        if names is not None and label not in names:
            near = difflib.get_close_matches(label, names, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"{where}: its label {label!r} is not in {options.categories}{hint}; "
                "--skip leaves it out"
            )
        if label != shape.label:
            report.add(Reason.LABEL, name)
        groups[label, number if shape.group is None else (shape.group,)].append(shape)
    objects = (
        _object(shapes, size, f"{annotated.name}: {shapes[0].where}", report)
        for shapes in groups.values()
    )
    return tuple(item for item in objects if item is not None)


def _object(
    shapes: list[Shape], size: tuple[int, int], name: str, report: Report
) -> _Object | None:
    """The shapes as one annotation; None, reported, if nothing of it is left."""
    height, width = size
    drawn = [shape for shape in shapes if shape.polygon is not None or shape.patch is not None]
    usable = [s for s in drawn if s.polygon is None or is_polygon(s.polygon, height, width)]
    extents = [_extent(shape) for shape in shapes if shape in usable or shape not in drawn]
    boxes = [extent for extent in extents if extent is not None]
    if len(usable) < len(drawn):
        report.add(Reason.POLYGON if boxes else Reason.UNUSABLE_MASK, name)
    if not boxes:
        if len(usable) == len(drawn):
            report.add(Reason.NO_PIXEL, name)
        return None
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    whole = min(x1), min(y1), max(x2), max(y2)
    box = clipped(whole, height, width)
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        degenerate = min(whole[2] - whole[0], whole[3] - whole[1]) < MIN_SIDE
        report.add(Reason.DEGENERATE if degenerate else Reason.OUTSIDE, name)
        return None
    rle = _rle(usable, height, width)
    if rle is not None and rle_ops.area(rle) == 0:
        report.add(Reason.NO_PIXEL, name)
        return None
    if box != whole:
        report.add(Reason.CLIPPED, name)
        if rle is not None and all(shape.box is None for shape in shapes):
            # The extent of the part inside may be smaller than the clipped box.
            x, y, w, h = rle_ops.toBbox(rle).tolist()
            box = x, y, x + w, y + h
    iscrowd = any(shape.iscrowd for shape in shapes)
    area = box_area(box) if rle is None else float(rle_ops.area(rle))
    segmentation: list[list[float]] | RLE | None = rle
    if usable and all(shape.patch is None for shape in usable):
        segmentation = [shape.polygon for shape in usable if shape.polygon is not None]
    return _Object(normal_label(shapes[0].label), segmentation, box, area, iscrowd)


def _extent(shape: Shape) -> Box | None:
    """The box of a shape; None if its mask has no pixel."""
    if shape.box is not None:
        return shape.box
    if shape.polygon is not None:
        return (
            min(shape.polygon[::2]),
            min(shape.polygon[1::2]),
            max(shape.polygon[::2]),
            max(shape.polygon[1::2]),
        )
    patch = shape.patch or Patch(np.zeros((0, 0), bool))
    x1, y1, x2, y2 = mask_box(patch.pixels)
    if x1 == x2:
        return None
    return patch.left + x1, patch.top + y1, patch.left + x2, patch.top + y2


def _rle(shapes: list[Shape], height: int, width: int) -> RLE | None:
    """The union of polygons and patches; None if there are none."""
    patches = [shape.patch for shape in shapes if shape.patch is not None]
    polygons = [shape.polygon for shape in shapes if shape.polygon is not None]
    rles = [rle_ops.encode(_whole(patch, height, width)) for patch in patches]
    if polygons:
        rles += rle_ops.frPyObjects(polygons, height, width)
    if not rles:
        return None
    return {"size": [height, width], "counts": rle_ops.merge(rles)["counts"].decode("ascii")}


def _whole(patch: Patch, height: int, width: int) -> np.ndarray:
    """A patch as a uint8 mask [height, width] of the image, in the order that pycocotools needs."""
    whole = np.zeros((height, width), np.uint8, order="F")
    rows, columns = patch.pixels.shape
    top, left = max(patch.top, 0), max(patch.left, 0)
    bottom, right = min(patch.top + rows, height), min(patch.left + columns, width)
    if top < bottom and left < right:
        whole[top:bottom, left:right] = patch.pixels[
            top - patch.top : bottom - patch.top, left - patch.left : right - patch.left
        ]
    return whole


# -- the files -------------------------------------------------------------------------------------


def _written(
    images: list[_Image], names: tuple[str, ...], options: Options, folder: Path, report: Report
) -> dict[Path, int]:
    """Writes the files and adds to the report what `read_coco` says of them.

    Returns:
        How many images each file has.
    """
    parts = {options.out: list(range(len(images)))}
    if options.split:
        count = round(options.split * len(images))
        if not 0 < count < len(images):
            raise ConfigError(
                f"--split: {options.split} of {len(images)} images leaves one of the files empty"
            )
        order = np.random.default_rng(options.seed).permutation(len(images)).tolist()
        out = options.out
        parts = {
            out.with_name(f"{out.stem}_train{out.suffix}"): sorted(order[count:]),
            out.with_name(f"{out.stem}_val{out.suffix}"): sorted(order[:count]),
        }
    # Ids are unique over both files.
    first = np.cumsum([1, *(len(image.objects) for image in images)]).tolist()
    kept: Counter[str] = Counter()
    path = options.out
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as renamed_last:
            for path, numbers in parts.items():
                content = _coco([(n + 1, first[n], images[n]) for n in numbers], names)
                part = renamed_last.enter_context(whole_file(path))
                part.write_text(json.dumps(content) + "\n")
                read = read_coco(part, folder, DataConfig(max_pixels=MAX_PIXELS))
                kept.update(read.report.kept)
                for key, finding in read.report.findings.items():
                    mine = report.findings.setdefault(key, Finding())
                    mine.count += finding.count
                    mine.first_ids += [f"annotation {number}" for number in finding.first_ids]
            if options.split:
                # One file of an older split beside one of this would share images with it.
                for path in parts:
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {path}: cannot be written: {error.strerror}") from None
    report.kept = dict(kept)
    return {path: len(numbers) for path, numbers in parts.items()}


def _coco(images: list[tuple[int, int, _Image]], names: tuple[str, ...]) -> dict[str, Any]:
    """The content of a file, given images with their ids and those of their first annotations."""
    ids = {name: number for number, name in enumerate(names, 1)}
    return {
        "images": [
            {"id": number, "file_name": i.file_name, "height": i.height, "width": i.width}
            for number, _, i in images
        ],
        "annotations": [
            coco_annotation(
                number,
                image_id,
                ids[item.label],
                item.box,
                item.area,
                item.iscrowd,
                item.segmentation,
            )
            for image_id, first, image in images
            for number, item in enumerate(image.objects, first)
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
