"""Writes annotated images as one or two COCO annotation files, after `read_coco` read them."""

from __future__ import annotations

import base64
import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError, require_at_least
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import (
    MAX_PIXELS,
    AnnotatedImage,
    Options,
    RectangleOptions,
    image_size,
)
from mrcnn_jax.convert.image_folder import ImageFolder
from mrcnn_jax.convert.lists import Only, read_classes
from mrcnn_jax.convert.objects import Object, objects_of
from mrcnn_jax.data.images import report_pages
from mrcnn_jax.data.json_values import is_text
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import coco_annotation, refuse_lost
from mrcnn_jax.data.report import Finding, Reason, Report
from mrcnn_jax.output import listed, whole_file, write_file
from mrcnn_jax.pixels.headers import header_pages


@dataclass(frozen=True)
class _Image:
    file_name: str
    height: int
    width: int
    objects: tuple[Object, ...]


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
        report_pages(report, file, header_pages(images.folder / file))
        converted[file] = _Image(file, *size, objects_of(annotated, size, options, names, report))
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
            report_pages(report, file, header_pages(images.folder / file))
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
