"""Pictures with shapes become one annotation file in COCO's format, or two; the checker's reader
has read them before they are in place.

Polygons stay polygons, masks become compressed run lengths; an object of both becomes run lengths.
A box is the extent of what was drawn, or the box that was drawn, cut to the image.
"""

from __future__ import annotations

import base64
import difflib
import json
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import ConfigError, DataConfig
from mrcnn_jax.data.coco import (
    LOST_IMAGES,
    MIN_SIDE,
    RLE,
    Box,
    clipped,
    is_polygon,
    is_text,
    read_coco,
)
from mrcnn_jax.data.report import Finding, Reason, Report
from mrcnn_jax.datasets.convert.common import (
    MAX_PIXELS,
    ImageFolder,
    Options,
    Patch,
    Picture,
    Shape,
    read_bytes,
)
from mrcnn_jax.output import whole_file
from mrcnn_jax.pixels.decode import SWAPS, header_size, image_kind
from mrcnn_jax.pixels.geometry import mask_box

NO_NAMES = ("__ignore__", "_background_")  # in a labels.txt of labelme


@dataclass(frozen=True)
class _Object:
    """An annotation but for its ids."""

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


def convert(options: Options) -> list[Path]:
    """Converts, writes and prints; the files written. ConfigError, with one line, for whatever is
    wrong."""
    if not 0 <= options.split < 1:
        raise ConfigError(f"--split: {options.split} is no share of the images in 0..1")
    if not options.input.exists():
        raise ConfigError(f"{options.input}: no such file or folder")
    names = _names(options.categories) if options.categories is not None else None
    images, report = options.open_images(), Report()
    converted = _images(options, images, names, report)
    if not converted:
        raise ConfigError(
            f"{options.input}: no usable image is left: {'; '.join(report.lines()[1:]) or 'it has none'}"
        )
    if names is None:
        names = tuple(sorted({item.label for image in converted for item in image.objects}))
        if not names:
            raise ConfigError(
                f"{options.input}: no object is left, and so no class: {'; '.join(report.lines()[1:]) or 'it has none'}"
            )
    written = _written(converted, names, options, images.folder, report)
    print("\n".join(report.lines()))
    print(f"{len(names)} classes: {', '.join(names)}")
    for path, count in written.items():
        print(f"{path}: {count} images; to check:")
        command = [
            "python",
            "-m",
            "mrcnn_jax.commands.check",
            "--annotations",
            str(path),
            "--images",
            str(images.folder),
        ]
        print(f"    {shlex.join(command)}")
    return list(written)


def _names(path: Path) -> tuple[str, ...]:
    try:
        lines = [_normal(line) for line in read_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    names = tuple(name for name in lines if name and name not in NO_NAMES)
    (name, times), *_ = Counter(names).most_common(1) or [("", 0)]
    if times != 1:
        raise ConfigError(
            f"{path}: {'no names' if not names else f'{name!r} is named {times} times'}"
        )
    return names


def _normal(label: str) -> str:
    return unicodedata.normalize("NFC", label.strip())


# -- images ----------------------------------------------------------------------------------------


def _images(
    options: Options, images: ImageFolder, names: tuple[str, ...] | None, report: Report
) -> list[_Image]:
    """The pictures whose image is there, by file name; ConfigError if too many are not, or if some
    have another size than annotated."""
    only = _listed(options.only) if options.only is not None else None
    converted: dict[str, _Image] = {}
    places: dict[str, str] = {}
    lost, wrong, listed = [], [], 0
    for picture in options.pictures(images, report):
        file = _file(picture, images, report)
        if only is not None and not only & _spellings(file or picture.stem or picture.names[0]):
            report.add(Reason.NOT_LISTED, picture.name, file=options.only)
            continue
        listed += 1
        try:
            if file is None:
                raise LookupError(Reason.MISSING)
            try:
                size = _size(images.folder / file, picture.size)
            except (OSError, ValueError):
                raise LookupError(Reason.UNDECODABLE) from None
        except LookupError as error:
            reason = error.args[0]
            report.add(reason, picture.name)
            for shape in picture.shapes:
                report.add(Reason.OF_DROPPED_IMAGE, f"{picture.name}: {shape.where}")
            lost.append(f"{picture.names[-1] if picture.names else picture.stem} ({reason.text})")
            continue
        if file in places:
            raise ConfigError(f"{picture.where}: its image {file} is that of {places[file]}, too")
        places[file] = picture.where
        if picture.size not in (None, size):
            wrong.append(
                f"{picture.where}: {file} is {size[0]} x {size[1]}, annotated as {picture.size[0]} x {picture.size[1]}"
            )  # type: ignore[index]
            continue
        converted[file] = _Image(file, *size, _objects(picture, size, options, names, report))
    if wrong:
        more = "; ..." if len(wrong) > 3 else ""
        raise ConfigError(
            f"{len(wrong)} images have another size (height x width) than annotated: {'; '.join(wrong[:3])}{more}"
        )
    if len(lost) > LOST_IMAGES * listed and not options.allow_missing:
        shown = ", ".join(lost[:10]) + (", ..." if len(lost) > 10 else "")
        raise ConfigError(
            f"{options.input}: {len(lost)} of {listed} images are lost in {images.folder} (1 % may be; --allow-missing): {shown}"
        )
    for file in images.files:
        if file in places or (only is not None and not only & _spellings(file)):
            continue
        if not options.keep_unannotated:
            report.add(Reason.UNANNOTATED, file)
            continue
        try:
            converted[file] = _Image(file, *_size(images.folder / file, None), ())
        except (OSError, ValueError):
            report.add(Reason.UNDECODABLE, file)
    return [converted[file] for file in sorted(converted)]


def _listed(path: Path) -> set[str]:
    """The names of a list, and those without what VOC's lists of a class have behind the name."""
    try:
        lines = [
            line.strip()
            for line in read_bytes(path).decode("utf-8-sig").splitlines()
            if line.strip()
        ]
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    return set(lines) | {
        line.rsplit(maxsplit=1)[0] for line in lines if line.endswith((" 1", " -1", " 0"))
    }


def _spellings(file: str) -> set[str]:
    """How a list may name an image: with or without its folders and its suffix."""
    path = PurePosixPath(file)
    return {file, path.name, path.stem, str(path.with_suffix(""))} if path.name else {file}


def _file(picture: Picture, images: ImageFolder, report: Report) -> str | None:
    """The picture's file, relative to the folder; None if there is none."""
    for name in picture.names:
        if not is_text(name):
            raise ConfigError(f"{picture.where}: its image's name {name!r} is not printable")
    file = images.find(picture.names)
    if file is None:
        file = images.find_elsewhere(picture.names, picture.stem)
        if file is not None and picture.names:
            report.add(Reason.IMAGE_PATH, picture.name)
    if file is None and picture.embedded is not None:
        file = PurePosixPath(picture.names[-1]).name
        try:
            (images.folder / file).write_bytes(base64.b64decode(picture.embedded))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{picture.where}: imageData cannot be written as {images.folder / file}: {error}"
            ) from None
        report.add(Reason.EMBEDDED, picture.name)
    return file


def _size(path: Path, annotated: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of an image: as stored if that is the annotated size, else turned as its EXIF
    orientation says, as people see it.

    What `images.check_images` will make of the file is the same: it takes the way that has the
    annotated size.
    """
    stored = header_size(path)
    if stored == annotated:
        return stored
    kind = image_kind(path.read_bytes(), max_pixels=MAX_PIXELS)
    return stored[::-1] if kind.orientation in SWAPS else stored


# -- objects ---------------------------------------------------------------------------------------


def _objects(
    picture: Picture,
    size: tuple[int, int],
    options: Options,
    names: tuple[str, ...] | None,
    report: Report,
) -> tuple[_Object, ...]:
    """The shapes of a picture as objects: those of one label and group together."""
    groups: dict[Hashable, list[Shape]] = defaultdict(list)
    for number, shape in enumerate(picture.shapes):
        label = _normal(shape.label)
        if label in options.skip or shape.label in options.skip:
            report.add(Reason.SKIPPED, f"{picture.name}: {shape.where}", label=label)
            continue
        if not is_text(label):
            raise ConfigError(
                f"{picture.where}: {shape.where}: its label {shape.label!r} is not printable"
            )
        if names is not None and label not in names:
            near = difflib.get_close_matches(label, names, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(
                f"{picture.where}: {shape.where}: its label {label!r} is not in {options.categories}{hint}; --skip leaves it out"
            )
        if label != shape.label:
            report.add(Reason.LABEL, f"{picture.name}: {shape.where}")
        groups[label, number if shape.group is None else (shape.group,)].append(shape)
    objects = (
        _object(shapes, size, f"{picture.name}: {shapes[0].where}", report)
        for shapes in groups.values()
    )
    return tuple(item for item in objects if item is not None)


def _object(
    shapes: list[Shape], size: tuple[int, int], name: str, report: Report
) -> _Object | None:
    """One annotation of the shapes; None, reported, if nothing of it is left."""
    height, width = size
    drawn = [shape for shape in shapes if shape.polygon is not None or shape.patch is not None]
    usable = [
        shape
        for shape in drawn
        if shape.polygon is None or is_polygon(shape.polygon, height, width)
    ]
    boxes = [
        extent
        for shape in shapes
        if shape in usable or shape not in drawn
        for extent in [_extent(shape)]
        if extent is not None
    ]
    if len(usable) < len(drawn):
        report.add(Reason.POLYGON if boxes else Reason.UNUSABLE_MASK, name)
    if not boxes:
        if len(usable) == len(drawn):
            report.add(Reason.NO_PIXEL, name)
        return None
    whole = (
        min(b[0] for b in boxes),
        min(b[1] for b in boxes),
        max(b[2] for b in boxes),
        max(b[3] for b in boxes),
    )
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
        if rle is not None and all(
            shape.box is None for shape in shapes
        ):  # the extent of the part inside may be smaller than that
            x, y, w, h = rle_ops.toBbox(rle).tolist()
            box = x, y, x + w, y + h
    iscrowd = any(shape.iscrowd for shape in shapes)
    area = float(rle_ops.area(rle)) if rle is not None else (box[2] - box[0]) * (box[3] - box[1])
    segmentation: list[list[float]] | RLE | None = rle and {
        "size": [height, width],
        "counts": rle["counts"].decode("ascii"),
    }
    if usable and all(shape.patch is None for shape in usable):
        segmentation = [shape.polygon for shape in usable if shape.polygon is not None]
    return _Object(_normal(shapes[0].label), segmentation, box, area, iscrowd)


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
    rles = [
        rle_ops.encode(_whole(shape.patch, height, width))
        for shape in shapes
        if shape.patch is not None
    ]
    polygons = [shape.polygon for shape in shapes if shape.polygon is not None]
    if polygons:
        rles += rle_ops.frPyObjects(polygons, height, width)
    return rle_ops.merge(rles) if rles else None


def _whole(patch: Patch, height: int, width: int) -> np.ndarray:
    """The image-sized uint8 mask [height, width] of a patch, in the order that pycocotools
    wants."""
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
    """Writes the files; how many images each has. What the checker's reader keeps, and what it says
    of them, goes to the report."""
    parts = {options.out: list(range(len(images)))}
    if options.split:
        count = round(options.split * len(images))
        if not 0 < count < len(images):
            raise ConfigError(
                f"--split: {options.split} of {len(images)} images leaves one of the two files empty"
            )
        order = np.random.default_rng(options.seed).permutation(len(images)).tolist()
        out = options.out
        parts = {
            out.with_name(f"{out.stem}_train{out.suffix}"): sorted(order[count:]),
            out.with_name(f"{out.stem}_val{out.suffix}"): sorted(order[:count]),
        }
    first = np.cumsum(
        [1, *(len(image.objects) for image in images)]
    ).tolist()  # ids are unique over both files
    kept: Counter[str] = Counter()
    for path, numbers in parts.items():
        content = _coco([(n + 1, first[n], images[n]) for n in numbers], names)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                part.write_text(json.dumps(content) + "\n")
                read = read_coco(part, folder, DataConfig(max_pixels=MAX_PIXELS))
        except OSError as error:
            raise ConfigError(f"--out: {path}: cannot be written: {error.strerror}") from None
        kept.update(read.report.kept)
        for key, finding in read.report.findings.items():
            mine = report.findings.setdefault(key, Finding())
            mine.count += finding.count
            mine.first_ids += [f"annotation {number}" for number in finding.first_ids]
    report.kept = dict(kept)
    return {path: len(numbers) for path, numbers in parts.items()}


def _coco(images: list[tuple[int, int, _Image]], names: tuple[str, ...]) -> dict[str, Any]:
    """COCO's format of images with their ids and the ids of their first annotations."""
    ids = {name: number for number, name in enumerate(names, 1)}
    annotations = []
    for image_id, first, image in images:
        for number, item in enumerate(image.objects, first):
            x1, y1, x2, y2 = item.box
            annotation: dict[str, Any] = {
                "id": number,
                "image_id": image_id,
                "category_id": ids[item.label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": item.area,
                "iscrowd": int(item.iscrowd),
            }
            annotations.append(
                annotation
                | ({"segmentation": item.segmentation} if item.segmentation is not None else {})
            )
    return {
        "images": [
            {"id": number, "file_name": i.file_name, "height": i.height, "width": i.width}
            for number, _, i in images
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
