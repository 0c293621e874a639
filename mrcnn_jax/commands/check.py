"""Check a COCO-format data set, its images included, before training on it.

    mrcnn check --annotations x.json --images dir/ [--config FILE] [--json] [--strict]
    [--contact-sheet FILE.png] [--depth DIR]
    mrcnn check my/

`my/` is a folder of images and annotations as `mrcnn train my/` takes it: each of its files is
checked.

Prints what is kept, dropped, clipped and repaired, with the reason and the first ten ids of each,
and what a recipe depends on: objects by class and size, the largest count in an image, canvases,
and every limit of the config that an image exceeds. Exit status 0 if the data set is usable, 2 (and
one line) if not.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import data_root, load_config_file
from mrcnn_jax.config.schema import DataConfig

if TYPE_CHECKING:
    from mrcnn_jax.data.records import CocoDataset

SHEET_IMAGES, SHEET_COLUMNS, SHEET_CELL = 24, 6, (360, 320)  # (height, width) in pixels


@dataclass(frozen=True)
class Arguments:
    folder: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[my/]")] = None
    """A folder whose annotations and images are found."""
    annotations: Path | None = None
    """The annotation file."""
    images: Path | None = None
    """The folder that its file names are relative to."""
    depth: Path | None = None
    """A folder with depth maps of the images' names; by default the config's data.train_depth or
    data.val_depth, if `annotations` is its file, or what the file's "depth_file" fields say."""
    depth_scale: float | None = None
    """Value of a depth map's 16-bit PNG for a metre; by default the config's data.depth_scale."""
    config: Path | None = None
    """A config file whose `data` gives limits, canvases and class names (by default the defaults),
    and whose `model` gives the network's limits."""
    cache: Path | None = None
    """Where the result of decoding every image is kept; by default the config's data.cache, or
    ~/.cache/mrcnn_jax. Training with the same folder does not decode the images again."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead of lines; of a folder, one for each of its files."""
    strict: bool = False
    """Exit status 2 if any image or annotation is dropped."""
    contact_sheet: Path | None = None
    """Draw some images with their boxes and masks into this PNG file; of a folder with validation
    images, those into another one whose name ends in _val."""


def run(arguments: Arguments) -> None:
    """Checks and prints; ConfigError if the data set is not usable."""
    if (arguments.annotations is None) != (arguments.images is None) or (
        (arguments.folder is None) == (arguments.annotations is None)
    ):
        raise ConfigError("check needs a folder, or --annotations and --images")
    if arguments.folder is None:
        _check(arguments)
    else:
        _check_folder(arguments, arguments.folder)


def _check_folder(arguments: Arguments, folder: Path) -> None:
    """Checks each annotation file of a folder; an export is converted for it.

    Raises:
        ConfigError: one is not usable, or the second has other categories than the first.
    """
    from mrcnn_jax.data.copies import note_copies
    from mrcnn_jax.data.report import Report
    from mrcnn_jax.datasets.prepare import ANNOTATIONS, CLASSES, converted, with_classes_of
    from mrcnn_jax.datasets.recognise import recognise
    from mrcnn_jax.training.splits import align_categories

    found = recognise(folder)
    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(sys.stderr if arguments.as_json else sys.stdout):
            print(found.told)
            parts = [part for part in (found.train, found.val) if part is not None]
            exports = [part for part in (found.export, found.val_export) if part is not None]
            for number, export in enumerate(exports):
                if number:
                    export = with_classes_of(parts[0], export, Path(scratch, CLASSES))
                out = Path(scratch, str(number), ANNOTATIONS)
                parts.append(converted(export, out, exports))
        sheet = arguments.contact_sheet
        datasets: list[CocoDataset] = []
        for part in parts:
            if sheet is not None and datasets:
                sheet = sheet.with_stem(f"{sheet.stem}_val")
            if not arguments.as_json and (found.export is None or len(parts) > 1):
                side = "validation" if datasets else "training"
                print(f"\n{part.annotations if found.export is None else side}:")
            one = replace(
                arguments, annotations=part.annotations, images=part.images, contact_sheet=sheet
            )
            # Validation may have the same classes under other ids, as `align_categories` says.
            datasets.append(_check(one, classes=not datasets))
    training, *others = datasets
    for other in others:
        copies = Report()
        note_copies(training, replace(align_categories(other, training), report=copies))
        lines = [line for line in copies.lines()[1:] if f"{training.annotations_path}" in line]
        with contextlib.redirect_stdout(sys.stderr if arguments.as_json else sys.stdout):
            for line in lines:
                print(line)


def _check(arguments: Arguments, *, classes: bool = True) -> CocoDataset:
    """Checks one annotation file, and returns what is in it.

    Args:
        arguments: with the file and its images.
        classes: whether its classes have to be those of the config, in their order.
    """
    from mrcnn_jax.commands.data_summary import summary, summary_lines
    from mrcnn_jax.data.copies import note_copies
    from mrcnn_jax.data.images import check_split
    from mrcnn_jax.data.reading import read_coco

    assert arguments.annotations is not None
    assert arguments.images is not None
    config = load_config_file(arguments.config) if arguments.config else None
    data, model = (config.data, config.model) if config else (DataConfig(), None)
    if not classes:
        data = replace(data, class_names=())
    cache = arguments.cache or (Path(data.cache) if data.cache else cli.cache_folder())
    if arguments.depth_scale is not None:
        data = replace(data, depth_scale=arguments.depth_scale)
    depth = arguments.depth or depth_folder(data, arguments.annotations)
    found: dict[str, Any] = {"usable": False}
    chosen = config is None and arguments.folder is not None
    try:
        dataset = read_coco(
            arguments.annotations, arguments.images, data, lost_images=True, depth=depth or True
        )
        note_copies(dataset)
        dataset, _ = check_split(dataset, cache=cache, data=data, keep_empty=data.keep_empty)
        found |= summary(dataset, data, model)
        if chosen:
            found["caps"] = []
        if not arguments.as_json:
            print("\n".join(summary_lines(dataset, found)))
            if chosen:
                print(
                    "canvases and sizes on them are of the default config; `train "
                    f"{arguments.folder}` chooses its own, and limits, by these counts"
                )
        if arguments.contact_sheet is not None:
            contact_sheet(dataset, arguments.contact_sheet, data)
        dataset.refuse_lost_images()
        dataset.refuse_without_objects()
        if arguments.strict:
            refuse_dropped(dataset)
        found["usable"] = True
    except ConfigError as error:
        found["error"] = str(error)
        raise
    finally:
        if arguments.as_json:
            print(json.dumps(found))
    return dataset


def depth_folder(data: DataConfig, annotations: Path) -> Path | None:
    """The config's folder of depth maps for an annotation file that is one of the config's."""
    root = data_root(data) or ""
    for split in ("train", "val"):
        file, folder = (getattr(data, f"{split}_{name}") for name in ("annotations", "depth"))
        if folder is not None and Path(root, file).resolve() == annotations.resolve():
            return Path(root, folder)
    return None


def refuse_dropped(dataset: CocoDataset) -> None:
    """ConfigError if any image or annotation was dropped."""
    dropped = [
        f"{finding.count} {text}"
        for (reason, text), finding in dataset.report.findings.items()
        if reason.outcome == "dropped"
    ]
    if dropped:
        raise ConfigError(f"{dataset.annotations_path}: --strict: dropped {'; '.join(dropped)}")


def contact_sheet(dataset: CocoDataset, path: Path, data: DataConfig) -> None:
    """Draws images from all over the data set with boxes and masks into one file.

    Images without objects are drawn only if there are no others.
    """
    import cv2
    import numpy as np

    from mrcnn_jax.figures.draw import draw_instances, spread, titled
    from mrcnn_jax.pixels.decode import decode_image
    from mrcnn_jax.pixels.encode import write_image

    names = {category.id: category.name for category in dataset.categories}
    shown = [image for image in dataset.images if image.objects] or list(dataset.images)
    chosen = spread(shown, SHEET_IMAGES)
    annotations = dataset.with_images(chosen).to_coco()["annotations"]
    height, width = SHEET_CELL
    cells = []
    for image in chosen:
        pixels = decode_image(
            (dataset.images_dir / image.file_name).read_bytes(),
            upright=image.upright,
            max_pixels=data.max_pixels,
        )
        drawn = draw_instances(pixels, [a for a in annotations if a["image_id"] == image.id], names)
        scale = min(height / drawn.shape[0], width / drawn.shape[1])
        size = max(round(drawn.shape[1] * scale), 1), max(round(drawn.shape[0] * scale), 1)
        small = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
        small = np.pad(
            small, ((0, height - size[1]), (0, width - size[0]), (0, 0)), constant_values=255
        )
        cells.append(titled(small, f"image {image.id}: {len(image.objects)}"))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % min(SHEET_COLUMNS, len(cells)))
    rows = [
        np.concatenate(cells[i : i + SHEET_COLUMNS], axis=1)
        for i in range(0, len(cells), SHEET_COLUMNS)
    ]
    write_image(path, np.concatenate(rows))
