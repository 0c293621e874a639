"""The whole check of a data set: every image is decoded once, and the result is cached.

The data set's folder in the cache is named by a hash of the annotation file as it was parsed, the
names, sizes and times of the images and depth maps, and VERSION, so that nothing stale is ever
read. It holds `images.json`, written here, what `depth_files` found, and the records that `builder`
writes.

EXIF orientation. A file does not say whether its annotations refer to the stored pixels or to the
picture after the turn that EXIF asks for. If only one of the two has the annotated size, it is
used. If both have it (a half turn, a flip, a square image), the majority of the images that do tell
decides. If none tells, images are turned: most annotation tools show pictures as people see them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, TypeVar

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.cache import each, keep, kept
from mrcnn_jax.data.depth_files import check_depth
from mrcnn_jax.data.records import CocoDataset, ImageRecord
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.output import listed
from mrcnn_jax.pixels.decode import Kind, image_kind
from mrcnn_jax.pixels.headers import SWAPS, header_size

VERSION = "1.5.0"  # of the checks and the records: raise it whenever they change
FILE = "images.json"
LONGEST = 200  # bytes of an annotation file's name in that of its folder, which may have 255

# By (the image is turned, its size tells).
TURN_REASONS = {
    (True, True): Reason.TURNED,
    (True, False): Reason.TURNED_BY_VOTE,
    (False, True): Reason.NOT_TURNED,
    (False, False): Reason.NOT_TURNED_BY_VOTE,
}

T = TypeVar("T")
Kinds = dict[int, Kind | str]  # by image id; a text says why an image cannot be decoded


def check_split(
    dataset: CocoDataset, *, cache: Path, data: DataConfig, keep_empty: bool
) -> tuple[CocoDataset, Path]:
    """Checks a data set that was read, pixels included.

    Args:
        dataset: as `read_coco` returns it.
        cache: where results are kept.
        data: its limits.
        keep_empty: whether images without objects stay.

    Returns:
        The images that can be used, with all that was lost in the `report`, and the folder of the
        data set in `cache`. (`CocoDataset.refuse_lost_images` says whether too many are lost.)

    Raises:
        ConfigError: as of `check_images` and `check_depth`, or no image is left.
    """
    dataset = replace(dataset, report=copy.deepcopy(dataset.report))
    if not keep_empty:
        empty = {i.id for i in dataset.images if not i.objects}
        for image_id in sorted(empty):
            dataset.report.add(Reason.NEGATIVE, image_id)
        dataset = dataset.with_images(i for i in dataset.images if i.id not in empty)
    dataset, folder = check_images(dataset, cache, data)
    return check_depth(dataset, folder, data), folder


def check_images(dataset: CocoDataset, cache: Path, data: DataConfig) -> tuple[CocoDataset, Path]:
    """Decodes every image that the cache does not know.

    Returns:
        The data set without undecodable images, with `upright` set, and its folder in `cache`.

    Raises:
        ConfigError: an image is over `data.max_pixels` (its header says so, it is never decoded) or
            has not the annotated size even when turned; or no usable image is left. Too many lost
            images are no error here: see `CocoDataset.refuse_lost_images`.
    """
    stem = os.fsencode(dataset.annotations_path.stem)[:LONGEST].decode(errors="ignore")
    folder = cache / f"{stem}-{_key(dataset)}"
    kinds = _kept_kinds(folder / FILE)
    # Failures are not cached: next time the disk may be mounted, or the permission granted.
    left = [image for image in dataset.images if image.id not in kinds]
    if left:
        _refuse_by_header(dataset, left, data)
        found = {i.id: kind for i, kind in _each(dataset, left, _kind, data, "checking images")}
        kinds |= found
        if any(isinstance(kind, Kind) for kind in found.values()):
            decoded = {n: astuple(kind) for n, kind in kinds.items() if isinstance(kind, Kind)}
            keep(folder / FILE, decoded)
    return _applied(dataset, kinds), folder


def other_versions(folders: Sequence[Path]) -> str | None:
    """Returns a line on what else the cache has for files of the same names; None if nothing.

    Each change to annotations or images makes a new folder, with a copy of every image. None is
    removed unasked: another evaluation may read it.

    Args:
        folders: of data sets, in one cache.
    """
    stems = {folder.name.rpartition("-")[0] for folder in folders}
    cache = folders[0].parent
    found = sorted(
        folder
        for folder in set(cache.iterdir()) - set(folders)
        if folder.name.rpartition("-")[0] in stems and (folder / FILE).is_file()
    )
    if not found:
        return None
    size = 0
    for path in (path for folder in found for path in folder.rglob("*")):
        with contextlib.suppress(OSError):  # removed meanwhile
            size += path.lstat().st_size
    return (
        f"{cache}: also has {len(found)} of other versions of these data, {size / 2**20:,.0f} MiB: "
        f"{listed([folder.name for folder in found])} (may be deleted if no evaluation reads them)"
    )


def _key(dataset: CocoDataset) -> str:
    def files(names: Iterable[str]) -> list[tuple[str, int, int]]:
        stats = ((name, (dataset.images_dir / name).stat()) for name in names)
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    assert dataset.annotations_sha256, "not of a data set that was read"
    digest = hashlib.sha256(dataset.annotations_sha256.encode())
    images = files(image.file_name for image in dataset.images)
    digest.update(json.dumps([VERSION, images]).encode())
    if dataset.has_depth:
        maps = files(i.depth_file for i in dataset.images if i.depth_file is not None)
        digest.update(json.dumps(maps).encode())
    if dataset.file_ids:  # the records hold labels
        digest.update(json.dumps([astuple(category) for category in dataset.categories]).encode())
    return digest.hexdigest()[:16]


def _kept_kinds(path: Path) -> Kinds:
    """The result of an earlier check; empty if there was none or its file is damaged."""
    return {int(number): Kind(*kind) for number, kind in (kept(path) or {}).items()}


def _each(
    dataset: CocoDataset,
    images: Sequence[ImageRecord],
    function: Callable[[Path, DataConfig], T],
    data: DataConfig,
    what: str,
) -> Iterator[tuple[ImageRecord, T]]:
    """`function` of each image's file."""

    def of_file(image: ImageRecord) -> T:
        return function(dataset.images_dir / image.file_name, data)

    return each(images, of_file, threads=data.threads, what=what)


def _size(path: Path, data: DataConfig) -> tuple[int, int] | None:
    try:
        return header_size(path)
    except ValueError:
        return None  # decoding it will say more


def _kind(path: Path, data: DataConfig) -> Kind | str:
    try:
        return image_kind(path.read_bytes(), max_pixels=data.max_pixels)
    except (OSError, ValueError) as error:
        return str(error)


def _refuse_by_header(
    dataset: CocoDataset, images: Sequence[ImageRecord], data: DataConfig
) -> None:
    """ConfigError if an image is too large, or has not the annotated size even when turned."""
    wrong = []
    for image, found in _each(dataset, images, _size, data, "reading headers"):
        if found is None:
            continue
        height, width = found
        if height * width > data.max_pixels:
            raise ConfigError(
                f"{dataset.annotations_path}: image {image.id}: {image.file_name}: "
                f"{height} x {width} is over {data.max_pixels} pixels (data.max_pixels)"
            )
        if (image.height, image.width) not in (found, found[::-1]):
            wrong.append((image, found))
    _refuse_sizes(dataset, wrong)


def _refuse_sizes(dataset: CocoDataset, wrong: list[tuple[ImageRecord, tuple[int, int]]]) -> None:
    if wrong:
        shown = [
            f"{i.id} ({i.file_name}) is {h} x {w}, annotated as {i.height} x {i.width}"
            for i, (h, w) in wrong
        ]
        raise ConfigError(
            f"{dataset.annotations_path}: {len(wrong)} images have another size (height x width) "
            f"than annotated: {listed(shown, separator='; ')}"
        )


def _applied(dataset: CocoDataset, kinds: Kinds) -> CocoDataset:
    """The data set with what decoding found; ConfigError if EXIF does not explain a size."""
    report, lost, wrong = dataset.report, list(dataset.lost), []
    decoded: list[tuple[ImageRecord, Kind, tuple[bool, bool]]] = []
    for image in dataset.images:
        kind = kinds[image.id]
        if isinstance(kind, str):
            report.add(Reason.UNDECODABLE, image.id)
            lost.append(f"{image.file_name} ({kind})")
            continue
        fits = _fits(image, kind)
        if not any(fits):
            wrong.append((image, (kind.height, kind.width)))
        decoded.append((image, kind, fits))
    _refuse_sizes(dataset, wrong)

    votes = sum(turned - stored for *_, (stored, turned) in decoded)  # 0 if it fits either way
    images = []
    for image, kind, (stored, turned) in decoded:
        report_kind(report, image.id, kind)
        upright = turned and (not stored or votes >= 0) and kind.orientation != 1
        if kind.orientation != 1:
            report.add(TURN_REASONS[upright, stored != turned], image.id)
        images.append(replace(image, upright=upright))
    return replace(dataset, lost=tuple(lost)).with_images(images)


def report_kind(report: Report, identifier: Any, kind: Kind) -> None:
    """Reports how the pixels of a decoded image differ from those of its file.

    Args:
        report: gets the findings.
        identifier: of the image.
        kind: of its file.
    """
    if kind.converted is not None:
        report.add(Reason.CONVERTED, identifier, kind=kind.converted)
    report_pages(report, identifier, kind.pages)


def report_pages(report: Report, identifier: Any, pages: int | None) -> None:
    """Reports that an image has more than one page (`Kind.pages`)."""
    if pages != 1:
        report.add(Reason.PAGES, identifier, pages="several" if pages is None else pages)


def _fits(image: ImageRecord, kind: Kind) -> tuple[bool, bool]:
    """Whether the picture has the annotated size as stored, and when turned."""
    annotated, stored = (image.height, image.width), (kind.height, kind.width)
    return stored == annotated, (stored[::-1] if kind.orientation in SWAPS else stored) == annotated
