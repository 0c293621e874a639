"""`convert to-yolo`: a COCO file as a data set of YOLO segmentation."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError

if TYPE_CHECKING:
    from mrcnn_jax.data.records import CocoDataset, ImageRecord
    from mrcnn_jax.data.report import Report


@dataclass(frozen=True, kw_only=True)
class ToYolo:
    """The other way: a COCO file, and perhaps one of validation, to YOLO segmentation."""

    input: tyro.conf.Positional[Path]
    """The annotation file, in COCO format."""
    images: Path
    """The folder that its file names are relative to."""
    out: Path
    """The folder of the data set, which appears when all is in it: data.yaml, labels, and copies of
    the images."""
    val: Path | None = None
    """An annotation file of validation images, with the same classes or some of them."""
    val_images: Path | None = None
    """Their folder; by default --images."""


def run(arguments: ToYolo) -> None:
    """Converts, and prints what was kept and lost.

    Raises:
        ConfigError: a file cannot be used, two classes have one name, a class of `val` is new, or
            `out` exists or cannot be written.
    """
    from mrcnn_jax.config.schema import DataConfig
    from mrcnn_jax.convert.common import MAX_PIXELS, normal_label
    from mrcnn_jax.data.reading import read_coco
    from mrcnn_jax.inference.annotations import data_yaml
    from mrcnn_jax.output import part_folder, write_file

    if arguments.val_images is not None and arguments.val is None:
        raise ConfigError("--val-images: needs --val")
    if arguments.out.exists():
        raise ConfigError(f"--out: {arguments.out}: exists (choose another one)")
    limits = DataConfig(max_pixels=MAX_PIXELS)
    datasets = {"train": read_coco(arguments.input, arguments.images, limits)}
    known = [(category.id, category.name) for category in datasets["train"].categories]
    if arguments.val is not None:
        val_images = arguments.val_images or arguments.images
        validation = read_coco(arguments.val, val_images, limits)
        datasets["val"] = validation.matched_to(known, f"{arguments.input}")
    classes = {number: place for place, (number, _) in enumerate(known)}
    names = [normal_label(name) for _, name in known]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{arguments.input}: categories: {twice!r} is there twice")
    datasets = {part: _usable(dataset) for part, dataset in datasets.items()}
    corners = any(
        record.rle is not None
        for dataset in datasets.values()
        for image in dataset.images
        for record in image.objects
    )
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with part_folder(arguments.out) as folder:
            for part, dataset in datasets.items():
                _write(dataset, classes, folder, part, corners)
            write_file(folder / "data.yaml", data_yaml(names, *datasets))
            folder.rename(arguments.out)
    except OSError as error:
        raise ConfigError(f"--out: {error.filename}: {error.strerror}") from None
    for dataset in datasets.values():
        print("\n".join(dataset.report.lines()))
    if arguments.val is None:
        print("no validation images, without which Ultralytics does not train (see --val)")
    print(f"{arguments.out / 'data.yaml'}: {len(known)} classes: {', '.join(names)}")
    again = cli.command("convert", "yolo", arguments.out, "--out", f"{arguments.out}.json")
    print(f"    {again} reads it")


def _usable(dataset: CocoDataset) -> CocoDataset:
    """The data set without images that cannot be decoded.

    Raises:
        ConfigError: too many are lost, or YOLO cannot hold one: EXIF turns it, but it is annotated
            as stored; or it would share its label file with another one.
    """
    from mrcnn_jax.convert.common import image_size
    from mrcnn_jax.data.report import Reason

    stems: dict[Path, ImageRecord] = {}
    lost = list(dataset.lost)
    images = []
    for image in dataset.images:
        file = os.path.normpath(image.file_name)
        other = stems.setdefault(Path(file).with_suffix(""), image)
        if other is not image:
            raise ConfigError(
                f"{dataset.annotations_path}: images {other.id} ({other.file_name}) and "
                f"{image.id} ({image.file_name}) would share a label file"
            )
        size = image_size(dataset.images_dir / image.file_name, None)
        if size is None:
            dataset.report.add(Reason.UNDECODABLE, image.id)
            lost.append(f"{image.file_name} ({Reason.UNDECODABLE.text})")
            continue
        if size != (image.height, image.width):
            raise ConfigError(
                f"{dataset.images_dir / image.file_name}: {size[0]} x {size[1]} as EXIF turns it, "
                f"which YOLO does, but annotated as {image.height} x {image.width}"
            )
        images.append(image)
    dataset = replace(dataset, lost=tuple(lost)).with_images(images)
    dataset.refuse_lost_images()
    return dataset


def _write(
    dataset: CocoDataset, classes: dict[int, int], out: Path, part: str, corners: bool
) -> None:
    """Copies the images of a part and writes their labels (`corners`: of `yolo_lines`)."""
    import numpy as np

    from mrcnn_jax.convert.yolo import labels_of
    from mrcnn_jax.data.report import Reason
    from mrcnn_jax.inference.annotations import yolo_lines
    from mrcnn_jax.output import write_file

    report: Report = dataset.report
    for image in dataset.images:
        copy = out / "images" / part / image.file_name
        size = image.height, image.width
        for record in image.annotations:
            if record.iscrowd:
                report.add(Reason.CROWD, record.annotation_id)
            elif record.rle is None:
                reason = Reason.BOX_POLYGON if corners else Reason.BOX_LINE
                report.add(reason, record.annotation_id)
        lines = yolo_lines(
            size,
            [classes[dataset.category_id(record.label)] for record in image.objects],
            np.array([record.box for record in image.objects], np.float64).reshape(-1, 4),
            [record.rle for record in image.objects],
            corners=corners,
        )
        labels = labels_of(copy)
        for path in (copy, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dataset.images_dir / image.file_name, copy)
        write_file(labels, "".join(f"{line}\n" for line in lines))
