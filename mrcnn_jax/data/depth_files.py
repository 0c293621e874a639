"""Depth maps of a data set: where they are, their check and their numbers.

A map that is missing or broken is no reason to lose its image: its depth counts as unknown.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.data.cache import each, keep, kept
from mrcnn_jax.data.image_names import name_forms
from mrcnn_jax.data.json_values import is_text, short
from mrcnn_jax.data.records import CocoDataset, ImageRecord
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.depth import decode_depth, depth_size
from mrcnn_jax.pixels.depth_statistics import DepthStatistics, MapStatistics

SUFFIXES = (".png", ".npy")


def depth_source(config: Config, split: str | None = None) -> Path | bool:
    """Where `read_coco` looks up the depth maps of a run's data (its `depth`).

    Args:
        config: with resolved paths.
        split: "train" or "val"; None: another data set.
    """
    if config.model.depth_head.kind == "none":
        return False
    folder = None if split is None else getattr(config.data, f"{split}_depth")
    return True if folder is None else Path(folder)


# -- files -----------------------------------------------------------------------------------------


class DepthFiles(NamedTuple):
    """The depth maps of some images."""

    names: Mapping[int, str] = {}  # by image id, relative to the image folder
    listed: int = 0
    lost: tuple[str, ...] = ()  # "name (reason)" of those listed that are missing


def find_depth(
    raw: Iterable[Mapping[str, Any]],
    usable: Mapping[int, ImageRecord],
    images: Path,
    depth: Path | bool,
    report: Report,
) -> DepthFiles:
    """Looks up depth maps. Only regular files count: a pipe is missing.

    Args:
        raw: the images of the COCO file.
        usable: those that will be used, by id.
        images: their folder.
        depth: as of `read_coco`.
        report: gets what is missing.

    Raises:
        ConfigError: `depth` is no folder.
    """
    if isinstance(depth, Path):
        return _find_by_name(usable.values(), images, depth, report)
    names, lost = {}, []
    for item in raw:
        number, written = item["id"], item.get("depth_file")
        if number not in usable or written in (None, ""):
            continue
        if (found := _spelled(images, written)) is not None:
            names[number] = found
        else:
            report.add(Reason.MISSING_DEPTH, number)
            lost.append(f"{short(written)} (no such file, looked up from the image folder)")
    return DepthFiles(names, len(names) + len(lost), tuple(lost))


def _spelled(images: Path, written: Any) -> str | None:
    """How a relative name is spelled on this machine; None if there is no such file."""
    if not is_text(written):
        return None
    spellings = (written, *name_forms(written.replace("\\", "/")))
    relative = (name for name in spellings if not posixpath.isabs(name))
    return next((name for name in relative if os.path.isfile(images / name)), None)


def _find_by_name(
    usable: Iterable[ImageRecord], images: Path, folder: Path, report: Report
) -> DepthFiles:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of depth maps")
    # The real paths: where a folder is a link, ".." is beside what it leads to.
    way = os.path.relpath(os.path.realpath(folder), os.path.realpath(images))
    names = {}
    for image in usable:
        stem = posixpath.splitext(image.file_name)[0]
        candidates = (
            posixpath.normpath(posixpath.join(way, form + suffix))
            for suffix in SUFFIXES
            for form in name_forms(stem)
        )
        for name in candidates:
            # A folder may hold both, x.png and its depth x.npy.
            if name != posixpath.normpath(image.file_name) and os.path.isfile(images / name):
                names[image.id] = name
                break
        else:
            report.add(Reason.NO_DEPTH, image.id, folder=folder)
    return DepthFiles(names, len(names))


# -- the check -------------------------------------------------------------------------------------


def check_depth(dataset: CocoDataset, folder: Path, data: DataConfig) -> CocoDataset:
    """Decodes every depth map that the cache does not know.

    Args:
        dataset: whose images are checked.
        folder: of the data set in the cache.
        data: scale, range and limits.

    Returns:
        The data set with `depth`, and without the maps that cannot be decoded, which are added to
        its report. Too many of them are no error here: see `CocoDataset.refuse_lost_images`.

    Raises:
        ConfigError: a map has not the size of its image; or data.depth_scale gives depths that are
            mostly beyond data.depth_range.
    """
    images = [image for image in dataset.images if image.depth_file is not None]
    if not images:
        return dataset
    options = json.dumps([data.depth_scale, data.depth_range])
    path = folder / f"depth-{hashlib.sha256(options.encode()).hexdigest()[:16]}.json"
    found = DepthStatistics(**(kept(path) or {}))
    decoded = set(found.maps)
    left = [image for image in images if image.id not in decoded]
    broken: dict[int, str] = {}

    def checked(image: ImageRecord) -> MapStatistics | str:
        return _checked(dataset.images_dir, image, data)

    for image, one in each(left, checked, threads=data.threads, what="checking depth"):
        if isinstance(one, str):
            broken[image.id] = f"{image.depth_file} ({one})"
        else:
            found.add(image.id, one)
    if len(broken) < len(left):
        keep(path, asdict(found))
    in_metres = any(str(image.depth_file).endswith(".npy") for image in images)
    if (reason := found.absurd(data.depth_scale, data.depth_range, in_metres)) is not None:
        raise ConfigError(f"{dataset.annotations_path}: {reason}")
    for number in broken:
        dataset.report.add(Reason.UNDECODABLE_DEPTH, number)
    return replace(
        dataset,
        images=tuple(
            replace(image, depth_file=None) if image.id in broken else image
            for image in dataset.images
        ),
        lost_depth=(*dataset.lost_depth, *broken.values()),
        depth=found.summary(len(images) - len(broken)),
    )


def _checked(folder: Path, image: ImageRecord, data: DataConfig) -> MapStatistics | str:
    """The map of an image, or why it cannot be decoded; ConfigError if it has another size."""
    path = folder / str(image.depth_file)
    try:
        size = depth_size(path)
        if size == (image.height, image.width):
            metres = decode_depth(
                path.read_bytes(), scale=data.depth_scale, max_pixels=data.max_pixels
            )
            return MapStatistics.of(metres, data.depth_range)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    raise ConfigError(
        f"{path}: the depth map is {size[0]} x {size[1]}, but its image {image.id} "
        f"({image.file_name}) is {image.height} x {image.width} (height x width)"
    )
