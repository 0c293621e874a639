"""Splits a COCO file into training and validation images, once and for all.

Folders named train, val and test decide where all images have one. Else images that look alike stay
together: those of a subfolder or of a video, tiles of an image, and copies. Each group is placed by
a hash of its name alone, so that new images move no old ones. The two files are written beside a
text of the rule, and whoever comes again finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.copies import equal_files
from mrcnn_jax.data.json_values import integer, read_json
from mrcnn_jax.data.names import Role, image_roles, originals, tiles, videos
from mrcnn_jax.data.reading import load_coco, read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Report
from mrcnn_jax.output import listed, write_file

SHARE = 0.2  # of the groups, for validation
MOST = 0.4  # of the images: the largest share that few or large groups may make of it
GROUPS = 5  # fewer subfolders or videos cannot be divided fairly
MAX_PIXELS = 200_000_000  # the most that data.max_pixels allows: a run has its own limit
RECORD, TRAIN, VAL = "split.json", "train.json", "val.json"
RULE = (
    "Images are grouped {by}; copies of one file are in one group. A group is for validation if "
    "the SHA-256 of its name, as a number in 0..1, is below {share}, so that new images do not "
    "move old ones. Groups were moved against that only so that both sides have an object "
    "(training, if one image alone has any), that validation has at most {most:.0%} of the images "
    "where groups are small enough, and that every class found in two images or more is in "
    "training."
)


@dataclass(frozen=True)
class Part:
    """An annotation file in COCO's format, and the folder that its file names are relative to."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Division:
    """Which groups are for validation."""

    val: frozenset[str]
    moved: tuple[str, ...]
    """Those that are not where their hash alone would put them."""


def groupings(
    file_names: Sequence[str], copies: Collection[Collection[int]] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Finds images that belong together, by their names and as copies of each other.

    Args:
        file_names: relative paths, with /.
        copies: numbers of images that are equal.

    Returns:
        How ("by subfolder", "by video" or "one by one"), and the group of each image: those of
        these ways that give groups enough, the last of them in any case. Tiles of one image are
        in one group of each.
    """
    names = originals(file_names)
    folders = list(map(posixpath.dirname, names))
    by_folder, by_video, by_name = (
        merged(groups, copies) for groups in (folders, videos(names), names)
    )
    if len(set(by_folder)) >= GROUPS:
        yield "by subfolder", by_folder
    if GROUPS <= len(set(by_video)) < len(set(by_name)):
        yield "by video (names that differ in a number at their end)", by_video
    yield "one by one", by_name


def merged(groups: Sequence[str], copies: Collection[Collection[int]]) -> list[str]:
    """Joins the groups that share copies of an image, under the first of their names.

    Args:
        groups: the group of each image.
        copies: numbers of images that are equal.
    """
    name = {group: group for group in groups}

    def root(group: str) -> str:
        while name[group] != group:
            group = name[group]
        return group

    for numbers in copies:
        roots = sorted({root(groups[number]) for number in numbers})
        name.update(dict.fromkeys(roots, roots[0]))
    return [root(group) for group in groups]


def chance(group: str) -> float:
    """A number in 0..1 that depends on the name alone."""
    digest = hashlib.sha256(group.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def divide(groups: Sequence[str], classes: Sequence[Collection[int]]) -> Division:
    """Chooses the groups for validation; `RULE` says how.

    Args:
        groups: the group of each image; at least two.
        classes: the classes of each image.
    """
    size: dict[str, int] = defaultdict(int)
    images_with: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for group, found in zip(groups, classes, strict=True):
        size[group] += 1
        for label in set(found):
            images_with[label][group] += 1
    needed = [its for its in images_with.values() if sum(its.values()) >= 2]
    most = MOST * len(groups)
    order = sorted(size, key=lambda group: (chance(group), group))
    rank = {group: place for place, group in enumerate(order)}
    by_hash = {group for group in order if chance(group) < SHARE}
    val = set(by_hash)

    for its in sorted(needed, key=lambda its: (len(its), sorted(its))):  # in any order of images
        if its.keys() <= val:
            val.discard(max(its, key=rank.__getitem__))
    objects = {group for group, found in zip(groups, classes, strict=True) if found}
    if objects and objects <= val:
        val.discard(max(objects, key=rank.__getitem__))

    def trim(keep: Collection[str]) -> None:
        """Moves groups but `keep` to training until validation is small enough."""
        images = sum(size[group] for group in val)
        for group in sorted(val.difference(keep), key=rank.__getitem__, reverse=True):
            if images > most:
                val.discard(group)
                images -= size[group]

    trim(())
    several = len(objects) > 1  # else the one with objects is for training
    if not (val & objects if several else val):
        # What costs training a class, or is large, comes last.
        def cost(group: str) -> tuple[bool, bool, bool, int]:
            costs_a_class = any(its.keys() == {group} for its in needed)
            return (group in objects) != several, costs_a_class, size[group] > most, rank[group]

        added = min(order, key=cost)
        val.add(added)
        trim((added,))
    return Division(frozenset(val), tuple(sorted(val ^ by_hash)))


def without_training(
    division: Division, groups: Sequence[str], classes: Sequence[Collection[int]]
) -> set[int]:
    """The classes of two images or more of which a division leaves none for training."""
    found: dict[int, list[str]] = defaultdict(list)
    for group, its in zip(groups, classes, strict=True):
        for label in set(its):
            found[label].append(group)
    return {label for label, its in found.items() if len(its) >= 2 and set(its) <= division.val}


def split(
    part: Part, source: Path, out: Path, *, fingerprint: str | None = None
) -> tuple[Part, Part, str]:
    """Divides the images of a COCO file, and writes both sides and the rule.

    Args:
        part: the file and its images.
        source: the folder that all this comes from, for `existing_split`.
        out: the folder to write to.
        fingerprint: of `source`, to be recorded.

    Returns:
        Training, validation, and a line on them.

    Raises:
        ConfigError: the file cannot be used (as of `read_coco`), or cannot be divided.
    """
    report, limits = Report(), DataConfig(max_pixels=MAX_PIXELS)
    file = load_coco(part.annotations, report)
    content = file.content
    dataset = read_coco(part.annotations, part.images, limits, file=file)
    dataset.refuse_without_objects()
    roles = _roles(dataset)
    unused, not_used = _not_used(dataset, roles)
    moved: tuple[str, ...] = ()
    if unused:
        dataset = dataset.with_images(i for i in dataset.images if i.id not in unused)
    val = {number for number, role in roles.items() if role == "val"} - unused
    by, rule = "as their folders say", "As the folders of the images say."
    if not val:
        val, by, moved = _chosen(dataset)
        rule = RULE.format(by=by, share=SHARE, most=MOST)
    rule += f" Not used: {not_used}." if not_used else ""
    used = {image.id for image in dataset.images}
    left_out = {integer(item.get("id")) for item in content["images"]} - used
    training, validation = (
        _side(content, lambda number: number not in val and number not in left_out),
        _side(content, val.__contains__),
    )
    counts = len(used) - len(val), len(val)
    record = {
        "annotations": str(part.annotations.resolve()),
        "fingerprint": fingerprint,
        "training_images": counts[0],
        "validation_images": counts[1],
        "rule": rule,
        "moved": list(moved),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, side in ((TRAIN, training), (VAL, validation)):
            write_file(out / name, json.dumps(side) + "\n")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    write_record(source, out, part.images, record)  # last: now it is whole
    lines = [
        f"{out}: {counts[0]} images for training and {counts[1]} for validation, divided {by} "
        f"(the rule is in {RECORD})"
    ]
    if not_used:
        lines.append(f"not used: {not_used}")
    if lost := dataset.lost:
        counted = f"{len(lost)} of {dataset.listed} listed images"
        lines.append(f"left out: {counted}: {listed(lost)}")
    lines += report.lines()[1:]  # values that are in neither of them
    return *_parts(out, part.images.resolve()), "; ".join(lines)


def _roles(dataset: CocoDataset) -> dict[int, Role]:
    """What each image, by its id, is for by its folders.

    Empty unless these divide the images: each has a role, and only some are to be trained on, of
    which one at least has objects.
    """
    found = image_roles([image.file_name for image in dataset.images])
    roles = {i.id: role for i, role in zip(dataset.images, found, strict=True) if role is not None}
    training = [image for image in dataset.images if roles.get(image.id) == "train"]
    divides = len(training) < len(roles) == len(found)
    return roles if divides and any(image.objects for image in training) else {}


def _not_used(dataset: CocoDataset, roles: dict[int, Role]) -> tuple[set[int], str]:
    """The ids of the images that are for nothing by their folders, and a text on them: those for
    tests, and those for validation if none has an object, as before it is annotated."""
    ids: set[int] = set()
    texts = []
    for role in ("val", "test"):
        images = [image for image in dataset.images if roles.get(image.id) == role]
        if images and (role == "test" or not any(image.objects for image in images)):
            names = [image.file_name for image in images]
            folder = posixpath.commonpath(map(posixpath.dirname, names)) or role
            why = "" if role == "test" else " (none has an object)"
            texts.append(f"{len(images)} images of {folder}/{why}")
            ids.update(image.id for image in images)
    return ids, ", ".join(texts)


def _chosen(dataset: CocoDataset) -> tuple[set[int], str, tuple[str, ...]]:
    """The ids of the images for validation; how images were grouped, and the groups moved."""
    names = [posixpath.normpath(image.file_name) for image in dataset.images]
    numbers = defaultdict(list)
    for number, name in enumerate(names):
        numbers[os.path.abspath(dataset.images_dir / name)].append(number)
    same = [
        [number for file in files for number in numbers[file]] for files in equal_files(numbers)
    ]
    labels = [image.labels for image in dataset.images]
    cut = tiles(names)
    # Folders and names may be those of classes, or one may hold all objects: then they do not say
    # what belongs together.
    for by, groups in groupings(names, [*same, *numbers.values()]):  # noqa: B007 (used below)
        if len(set(groups)) < 2:
            why = (
                f"{len(names)} images, of which no two differ: too few to keep some for validation"
            )
            if len(cut) == len(names) > 1:
                why = (
                    f"its {len(names)} images are tiles of one, which overlap: none can be kept "
                    "for validation; cut the images of training and of validation apart"
                )
            raise ConfigError(f"{dataset.annotations_path}: {why}")
        division = divide(groups, labels)
        val_labels = [its for its, g in zip(labels, groups, strict=True) if g in division.val]
        fair = any(val_labels) and len(val_labels) <= MOST * len(names)
        if fair and not without_training(division, groups, labels):
            break
    if cut:
        by += ", tiles of an image together"
    pairs = zip(dataset.images, groups, strict=True)
    return {image.id for image, group in pairs if group in division.val}, by, division.moved


def write_record(source: Path, out: Path, images: Path, record: dict[str, Any]) -> None:
    """Makes TRAIN and VAL in `out`, which are there already, known to `existing_split`.

    Args:
        source: the folder that they come from.
        out: their folder.
        images: the images of both.
        record: what else is to be kept: "rule" for people.

    Raises:
        ConfigError: it cannot be written.
    """
    record = {"folder": str(source.resolve()), "images": str(images.resolve()), **record}
    try:
        write_file(out / RECORD, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def _side(content: dict[str, Any], has: Callable[[int | None], bool]) -> dict[str, Any]:
    """The content with the images whose ids it `has`, and their annotations."""
    return content | {
        section: [item for item in content[section] if has(integer(item.get(key)))]
        for section, key in (("images", "id"), ("annotations", "image_id"))
    }


def _parts(out: Path, images: Path) -> tuple[Part, Part]:
    return Part(out / TRAIN, images), Part(out / VAL, images)


def existing_split(source: Path, out: Path) -> dict[str, Any] | None:
    """What `split` recorded in `out`; None if it did not.

    Raises:
        ConfigError: it is not of the folder `source`, or damaged.
    """
    path = out / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    folder = str(record.get("folder"))
    if Path(folder).resolve() != source.resolve():  # it may have moved behind a link
        raise ConfigError(f"{path}: is of {folder}, not of {source} (choose another --workdir)")
    return record
