"""Cuts a data set in COCO's format into tiles, with its masks."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pycocotools import mask as rle_ops
from tqdm import tqdm

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import MAX_PIXELS
from mrcnn_jax.convert.tile_data import Tile
from mrcnn_jax.data.images import check_images, report_kind
from mrcnn_jax.data.reading import load_coco, read_coco
from mrcnn_jax.data.records import CocoDataset, ImageRecord, ObjectRecord, coco_annotation
from mrcnn_jax.data.repair import MIN_SIDE
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.output import part_folder
from mrcnn_jax.pixels.decode import Kind, decode_image
from mrcnn_jax.pixels.encode import write_image
from mrcnn_jax.pixels.places import RLE, Box, box_area, clipped, mask_extent
from mrcnn_jax.pixels.rle import moved_rle
from mrcnn_jax.pixels.tiff_windows import MOST, not_by_windows, open_windows
from mrcnn_jax.pixels.windows import Window, check_tiles, windows

ANNOTATIONS, IMAGES = "annotations.json", "images"  # in the new folder
Read = Callable[[Window], UInt8[np.ndarray, "h w 3"]]


@dataclass(frozen=True)
class _Part:
    """An object in a tile, in pixels of the tile."""

    source: ObjectRecord
    box: Box
    rle: RLE | None
    share: float

    @property
    def area(self) -> float:
        if self.share == 1:
            return self.source.area
        return box_area(self.box) if self.rle is None else float(rle_ops.area(self.rle))


_Cut = tuple[str, Window, list[_Part]]  # a tile: the name of its image, its place and objects


def cut(options: Tile) -> None:
    """Cuts a data set into tiles, writes them, and prints what was kept and lost.

    Raises:
        ConfigError: the data set or an option is unusable, or `out` is not empty. Nothing is
            written then.
        OSError: a file cannot be written; has its name.
    """
    overlap = options.tile // 8 if options.overlap is None else options.overlap
    check_tiles(options.tile, overlap)
    if not 0 <= options.least_share <= 1:
        raise ConfigError(f"--least-share: {options.least_share} is not a share in 0..1")
    out = options.out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out: {out}: is there already (name a new folder)")
    place = out.resolve()  # a link to an empty folder stays one
    if out.is_mount() or place == Path.cwd():
        raise ConfigError(f"--out: {out}: cannot be replaced (name a new folder in it)")
    dataset = _checked(options)
    with _made(place.parent), part_folder(place) as part:
        tiles = _cut(dataset, options, overlap, part / IMAGES)
        _write(_content(tiles, dataset, options), part, dataset.report)
        part.rename(place)  # also over an empty folder
    print("\n".join(dataset.report.lines()))
    print(f"{len(dataset.images)} images: {len(tiles)} tiles in {out}; to check:")
    files = "--annotations", out / ANNOTATIONS, "--images", out / IMAGES
    print(f"    {cli.command('check', *files)}")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there, and is removed after an error if it was not and is empty."""
    there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not there:
            with suppress(OSError):
                folder.rmdir()
        raise


def _cut(dataset: CocoDataset, options: Tile, overlap: int, folder: Path) -> list[_Cut]:
    """Writes the images of the tiles that are kept; ConfigError if none is."""
    report = dataset.report
    tiles: list[_Cut] = []
    names: set[str] = set()
    for image in tqdm(dataset.images, unit="image", leave=False, disable=None):
        read = _reader(options.images / image.file_name, image)
        stem = _new_stem(PurePosixPath(image.file_name), names)
        names.add(stem)
        for window in windows((image.height, image.width), options.tile, overlap):
            name = f"{stem}/{window.y1:05d}_{window.x1:05d}.png"
            parts = list(_parts(image, window, options, report))
            if not options.keep_empty and all(_is_crowd(part, options) for part in parts):
                report.add(Reason.NO_OBJECT, name)
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_image(folder / name, read(window))
            tiles.append((name, window, parts))
    if not tiles:
        raise ConfigError(f"{options.annotations}: no tile has an object")
    return tiles


def _new_stem(path: PurePosixPath, taken: set[str]) -> str:
    """The name of an image's folder: without its suffix, unless another image has that already."""
    counted = (f"{path}_{number}" for number in itertools.count(2))
    return next(
        stem
        for stem in itertools.chain((str(path.with_suffix("")), str(path)), counted)
        if stem not in taken
    )


def _checked(options: Tile) -> CocoDataset:
    """The data set, whose images are known to be decodable as far as they are not read by windows.

    Raises:
        ConfigError: as of `read_coco` and `check_images`; an image is too large.
    """
    of_file = Report()
    file = load_coco(options.annotations, of_file)
    data = DataConfig(max_pixels=MAX_PIXELS)
    dataset = read_coco(options.annotations, options.images, data, file=file, max_pixels=MOST - 1)
    dataset.report.findings.update(of_file.findings)
    for image in file.content["images"]:
        if image.get("depth_file") is not None:
            dataset.report.add(Reason.NO_DEPTH_TILES, image["id"])
    large = [image for image in dataset.images if image.height * image.width > MAX_PIXELS]
    others = [image for image in dataset.images if image.height * image.width <= MAX_PIXELS]
    for image in large:
        report_kind(
            dataset.report, image.id, _kind_of_large(options.images / image.file_name, image)
        )
    if others:
        with tempfile.TemporaryDirectory() as cache:
            checked, _ = check_images(dataset.with_images(others), Path(cache), data)
        dataset = replace(checked, images=(*checked.images, *large))
    dataset.refuse_lost_images()
    return dataset


def _kind_of_large(path: Path, image: ImageRecord) -> Kind:
    """ConfigError if a large image is not read by windows, or has another size than annotated."""
    try:
        found = open_windows(path, max_pixels=MAX_PIXELS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    size = image.height, image.width
    if found is None:
        raise ConfigError(
            f"{path}: {size[0]} x {size[1]} is over {MAX_PIXELS} pixels, and is "
            f"{not_by_windows(path)}"
        )
    if found.size != size:
        raise ConfigError(
            f"{path}: is {found.size[0]} x {found.size[1]}, annotated as {size[0]} x {size[1]}"
        )
    return found.kind


def _reader(path: Path, image: ImageRecord) -> Read:
    """Reads windows of an image. ConfigError if it cannot be decoded after all."""
    try:
        found = None if image.upright else open_windows(path, max_pixels=MAX_PIXELS)
        if found is None:
            whole = decode_image(path.read_bytes(), upright=image.upright, max_pixels=MAX_PIXELS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None

    def read(window: Window) -> UInt8[np.ndarray, "h w 3"]:
        if found is None:
            return whole[window.y1 : window.y2, window.x1 : window.x2]
        try:
            return found.read(window)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None

    return read


def _parts(image: ImageRecord, window: Window, options: Tile, report: Report) -> Iterator[_Part]:
    """The annotations of an image that have a part in a tile; counts those that it cuts."""
    for record in image.annotations:
        part = _part(record, window)
        if part is None:
            continue
        if record.iscrowd or part.share >= options.least_share:
            if part.share < 1 and not record.iscrowd:
                report.add(Reason.CUT, record.annotation_id)
            yield part
            continue
        drop = options.small_parts == "drop"
        reason = Reason.NO_SMALL_PART if drop else Reason.SMALL_PART
        report.add(reason, record.annotation_id, share=f"{options.least_share:.0%}")
        if not drop:
            yield part


def _part(record: ObjectRecord, window: Window) -> _Part | None:
    """None if nothing that can be annotated is left."""
    x, y = window.x1, window.y1
    moved = record.box[0] - x, record.box[1] - y, record.box[2] - x, record.box[3] - y
    box = clipped(moved, *window.size)
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
        return None
    if record.rle is None:
        share = 1.0 if box == moved else box_area(box) / box_area(moved)
        return _Part(record, box, None, share)
    rle = moved_rle(record.rle, (-y, -x), window.size)
    inside, total = int(rle_ops.area(rle)), int(rle_ops.area(record.rle))
    if inside == total and box == moved:
        return _Part(record, box, rle, 1.0)
    extent = mask_extent(rle)
    return None if extent is None else _Part(record, extent, rle, inside / total)


def _is_crowd(part: _Part, options: Tile) -> bool:
    return part.source.iscrowd or part.share < options.least_share


def _content(tiles: list[_Cut], dataset: CocoDataset, options: Tile) -> dict[str, Any]:
    """The annotation file; images and annotations are numbered from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, window, parts) in enumerate(tiles, 1):
        height, width = window.size
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations += [
            coco_annotation(
                len(annotations) + place,
                number,
                dataset.category_id(part.source.label),
                part.box,
                part.area,
                _is_crowd(part, options),
                part.rle,
            )
            for place, part in enumerate(parts, 1)
        ]
    categories = [{"id": c.id, "name": c.name} for c in dataset.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write(content: dict[str, Any], folder: Path, report: Report) -> None:
    """Writes the file beside the images.

    The report gets what is kept in the file, and what `read_coco` finds in it.
    """
    path = folder / ANNOTATIONS
    path.write_text(json.dumps(content) + "\n")
    read = read_coco(path, folder / IMAGES, DataConfig(max_pixels=MAX_PIXELS))
    report.kept = read.report.kept
    for key, finding in read.report.findings.items():
        report.findings.setdefault(key, finding)
