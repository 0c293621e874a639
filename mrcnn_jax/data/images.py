"""The whole check of a data set: every image is decoded once before it is used; the result is kept
in the data set's folder of the cache.

The folder is named by a hash of what the data set is made from (the annotation file, names, sizes
and times of the images, VERSION), so that nothing stale is ever read. It holds `images.json`,
written here, and the records that `builder` writes.

EXIF orientation. Annotations are of the picture as it is stored, or as it is seen after the turn
that the file's EXIF asks for, and the file does not say which. An image of which only one way has
the annotated size is taken that way. Where both have it (a turn by 180 degrees, a flip, a square),
the majority of the images of the same file that do tell decides; a file without any was most likely
made with a tool that shows pictures as people see them, so they are turned.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from mrcnn_jax.config.schema import ConfigError, DataConfig
from mrcnn_jax.data.coco import CocoDataset, ImageRecord, read_coco
from mrcnn_jax.data.report import Reason
from mrcnn_jax.output import whole_file
from mrcnn_jax.pixels.decode import SWAPS, Kind, header_size, image_kind

VERSION = "1.1.0"  # of the checks and of the records: raise it whenever they change
FILE = "images.json"

# By whether the image is turned, and whether its size tells.
TURN_REASONS = {
    (True, True): Reason.TURNED,
    (True, False): Reason.TURNED_BY_VOTE,
    (False, True): Reason.NOT_TURNED,
    (False, False): Reason.NOT_TURNED_BY_VOTE,
}

T = TypeVar("T")
Kinds = dict[int, Kind | str]  # image id -> what it is, or why it cannot be decoded


def check_split(
    annotations: Path,
    images: Path,
    *,
    cache: Path,
    data: DataConfig,
    keep_empty: bool,
    lost_images: bool = False,
) -> tuple[CocoDataset, Path]:
    """Reads a data set and checks it, pixels included; what was lost on the way is in its `report`.
    And its folder in `cache`.

    Args:
        annotations, images: the file, and the folder that its file names are relative to.
        cache: where results are kept.
        data: limits, and the canvases that objects are counted for.
        keep_empty: whether images without objects stay.
        lost_images: whether more than 1 % of the images may be missing or not decodable.

    Raises:
        ConfigError: as of `read_coco` and `check_images`, or too many images are lost.
    """
    dataset = read_coco(annotations, images, data, lost_images=lost_images)
    if not keep_empty:
        empty = {
            image.id for image in dataset.images if all(record.iscrowd for record in image.objects)
        }
        for image_id in sorted(empty):
            dataset.report.add(Reason.NEGATIVE, image_id)
        dataset = dataset.with_images(image for image in dataset.images if image.id not in empty)
    dataset, folder = check_images(dataset, cache, data)
    if not lost_images:
        dataset.refuse_lost_images()
    for image in dataset.images:
        crowds = sum(record.iscrowd for record in image.objects)
        for count, limit, field in (
            (len(image.objects) - crowds, data.max_objects, "max_objects"),
            (crowds, data.max_ignored, "max_ignored"),
        ):
            if count > limit:
                dataset.report.add(
                    Reason.OVER_LIMIT, image.id, count - limit, field=field, limit=limit
                )
    return dataset, folder


def check_images(dataset: CocoDataset, cache: Path, data: DataConfig) -> tuple[CocoDataset, Path]:
    """The data set without the images that cannot be decoded, each with its `upright`; and its
    folder in `cache`.

    Raises:
        ConfigError: an image over `data.max_pixels` (seen in its header, never decoded), one whose
            size is neither way the annotated one, or no usable image. (Whether too many are lost is
            for `CocoDataset.refuse_lost_images` to say.)
    """
    folder = cache / f"{dataset.annotations_path.stem}-{_key(dataset)}"
    kinds = _kept_kinds(folder / FILE)
    # Failures are not kept: the next time the disk may be there, or the right to read.
    left = [image for image in dataset.images if image.id not in kinds]
    if left:
        _refuse_by_header(dataset, left, data)
        found = {
            image.id: kind for image, kind in _each(dataset, left, _kind, data, "checking images")
        }
        with writing(folder):
            kept = {
                number: astuple(kind)
                for number, kind in (kinds | found).items()
                if isinstance(kind, Kind)
            }
            with whole_file(folder / FILE) as part:
                part.write_text(json.dumps(kept))
        kinds |= found
    return _applied(dataset, kinds), folder


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes a folder of the cache and writes there; ConfigError, with the file's name, if that is
    not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror or error}") from None


def _key(dataset: CocoDataset) -> str:
    files = []
    for image in dataset.images:
        stat = (dataset.images_dir / image.file_name).stat()
        files.append((image.file_name, stat.st_size, stat.st_mtime_ns))
    digest = hashlib.sha256(dataset.annotations_path.read_bytes())
    digest.update(json.dumps([VERSION, files]).encode())
    return digest.hexdigest()[:16]


def _kept_kinds(path: Path) -> Kinds:
    """What an earlier check found; nothing if there was none, or its file is damaged."""
    try:
        return {
            int(number): Kind(*kind) for number, kind in dict(json.loads(path.read_text())).items()
        }  # JSON's keys are text
    except (OSError, ValueError, TypeError):
        return {}


def _each(
    dataset: CocoDataset,
    images: Sequence[ImageRecord],
    function: Callable[[Path, DataConfig], T],
    data: DataConfig,
    what: str,
) -> Iterator[tuple[ImageRecord, T]]:
    """`function` of the file of each image, in threads: Pillow decodes beside Python."""
    pool = ThreadPoolExecutor(data.threads)
    try:
        results = pool.map(
            lambda image: function(dataset.images_dir / image.file_name, data), images
        )
        yield from zip(
            images,
            tqdm(results, desc=what, total=len(images), unit="img", disable=None, leave=False),
            strict=True,
        )
    finally:
        pool.shutdown(cancel_futures=True)


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
    """ConfigError if an image is over the pixel limit, or can neither stored nor turned have the
    annotated size."""
    wrong = []
    for image, found in _each(dataset, images, _size, data, "reading headers"):
        name = f"{dataset.annotations_path}: image {image.id}: {image.file_name}"
        if found is not None and found[0] * found[1] > data.max_pixels:
            raise ConfigError(
                f"{name}: {found[0]} x {found[1]} is over {data.max_pixels} pixels (data.max_pixels)"
            )
        if found is not None and (image.height, image.width) not in (found, found[::-1]):
            wrong.append((image, found))
    _refuse_sizes(dataset, wrong)


def _refuse_sizes(dataset: CocoDataset, wrong: list[tuple[ImageRecord, tuple[int, int]]]) -> None:
    if wrong:
        shown = "; ".join(
            f"{i.id} ({i.file_name}) is {h} x {w}, annotated as {i.height} x {i.width}"
            for i, (h, w) in wrong[:3]
        )
        more = "; ..." if len(wrong) > 3 else ""
        raise ConfigError(
            f"{dataset.annotations_path}: {len(wrong)} images have another size (height x width) than annotated: {shown}{more}"
        )


def _applied(dataset: CocoDataset, kinds: Kinds) -> CocoDataset:
    """The data set as its decoded images make it; ConfigError if a size is not explained by
    EXIF."""
    report, lost, wrong = copy.deepcopy(dataset.report), list(dataset.lost), []
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

    votes = sum(
        turned - stored for _, _, (stored, turned) in decoded
    )  # those that fit either way have none
    images = []
    for image, kind, (stored, turned) in decoded:
        if kind.converted is not None:
            report.add(Reason.CONVERTED, image.id, kind=kind.converted)
        upright = turned and (not stored or votes >= 0) and kind.orientation != 1
        if kind.orientation != 1:
            report.add(TURN_REASONS[upright, stored != turned], image.id)
        images.append(replace(image, upright=upright))
    return replace(dataset, report=report, lost=tuple(lost)).with_images(images)


def _fits(image: ImageRecord, kind: Kind) -> tuple[bool, bool]:
    """Whether the picture has the annotated size as stored, and turned."""
    annotated, stored = (image.height, image.width), (kind.height, kind.width)
    return stored == annotated, (stored[::-1] if kind.orientation in SWAPS else stored) == annotated
