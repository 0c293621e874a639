"""Folders of instance masks: label images (PNG, TIFF, BMP, GIF) of the size of their image.

A value of 0 means no object.

`--layout image`: one file per image, with its name (or that and "_mask"), and one value (or colour)
per instance: masks/x.png, masks/x_mask.png. Where a value is that of many, each of its parts that
touches no other one is an instance (`--parts`). `--layout folder`: one folder per image, with one
file per instance: masks/x/1.png.
`--layout name`: one file per instance, named image_instance: masks/x_1.png.

The class is `--class-name`; or what `--classes`, a JSON file, says of the mask's relative path or
of the value; or the name of a folder: masks/cat/x.png, masks/cat/x/1.png, masks/x/cat/1.png,
masks/cat/x_1.png. Folders named "masks" are ignored, so that x/images/x.png with x/masks/1.png can
be read too (INPUT and --images are then the same folder).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    AnnotatedImage,
    Options,
    Patch,
    Shape,
    instances,
    read_labels,
    refuse_blended,
    value_name,
)
from mrcnn_jax.convert.image_folder import ImageFolder, files_in
from mrcnn_jax.data.json_values import read_json
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.headers import SUFFIXES as IMAGES

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
LOOKED_AT = 20  # files that decide about `--parts auto`
SPECK = 4, 0.01  # pixels, share of the largest part of the value: under both it is no object
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".jp2")


@dataclass(frozen=True)
class Masks(Options):
    """A folder of instance masks (PNG, TIFF, BMP, GIF); --images names the folder of the images."""

    layout: Literal["image", "folder", "name"] = "image"
    """image: x.png (or x_mask.png, mask_x.png, x.jpg.png) holds all instances of image x, one value
    each; folder: x/1.png; name: x_1.png."""
    class_name: str | None = None
    """The class of all instances. By default, the name of a folder."""
    parts: Literal["auto", "value", "connected"] = "auto"
    """With --layout image: value: each value is one object; connected: so is each part of a value
    that touches no other part of it, not even at a corner; auto: connected if most values in 20 of
    the files have several parts."""
    classes: Path | None = None
    """A JSON file with the classes: {"x.png": "cat"}, {"x.png": {"1": "cat", "2": "dog"}}, or for
    all files {"1": "cat"}; a colour is "#ff0000"."""

    def image_folder(self) -> Path:
        raise ConfigError("--images: the folder of the images is needed")

    def open_images(self) -> ImageFolder:
        folder = self.images or self.image_folder()
        here, there = self.input.resolve(), folder.resolve()
        inside = here != there and here.is_relative_to(there)

        def is_mask(file: Path) -> bool:
            return (inside and file.resolve().is_relative_to(here)) or _in_masks(file, folder)

        return ImageFolder(folder, without=is_mask)

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        if not self.input.is_dir():
            raise ConfigError(f"{self.input}: no such folder")
        if self.layout != "image" and self.parts != "auto":
            raise ConfigError(f"--parts: {self.parts}: goes with --layout image, not {self.layout}")
        files, lossy = files_in(self.input, SUFFIXES), files_in(self.input, LOSSY)
        if self.input.resolve() == images.folder.resolve():
            files, lossy = (
                [file for file in found if _in_masks(file, self.input)] for found in (files, lossy)
            )
        elif images.folder.resolve().is_relative_to(self.input.resolve()):
            lossy = [file for file in lossy if not file.is_relative_to(images.folder)]
        for file in lossy:
            report.add(Reason.LOSSY_MASK, file.relative_to(self.input).as_posix())
        if not files:
            raise ConfigError(f"{self.input}: no masks in this folder (PNG, TIFF, BMP or GIF)")
        classes = read_json(self.classes) if self.classes is not None else {}
        by_image: dict[str, list[tuple[Path, str | None]]] = defaultdict(list)
        orphans = []
        for file in files:
            path = file.relative_to(self.input)
            image, class_name = self._owner(path.with_suffix(""), images)
            if image is None:
                name, stem = str(path), str(path.with_suffix(""))
                orphans.append(AnnotatedImage(str(file), name, (), stem, None, ()))
            else:
                by_image[image].append((file, self.class_name or class_name))
        if not by_image:
            raise ConfigError(
                f"{files[0]}: no image of that name in {images.folder}: --layout is {self.layout}; "
                "it can be image (x.png), folder (x/1.png) or name (x_1.png)"
            )
        yield from orphans
        connected = self.parts == "connected" or (
            self.parts == "auto"
            and self.layout == "image"
            and _in_parts([file for its in by_image.values() for file, _ in its])
        )
        for image, its in sorted(by_image.items()):
            yield self._annotated_image(image, its, classes, connected, report)

    def _owner(self, path: Path, images: ImageFolder) -> tuple[str | None, str | None]:
        """A mask's image or None, by its path without suffix, and the folder that may be one."""
        folders, stem = [part for part in path.parts[:-1] if part != "masks"], path.name
        beside = ["images" if part == "masks" else part for part in path.parts[:-1]]
        if self.layout == "folder":
            places = (beside, folders[:-1]) if folders else ()
            keys = ("/".join([*place, folders[-1]]) for place in places)
            image = next(filter(None, map(images.with_stem, keys)), None)
            if image is not None:
                return image, None
            found = [(images.with_stem(name), i) for i, name in enumerate(folders)]
            found = [(image, i) for image, i in found if image is not None]
            if len(found) > 1:
                raise ConfigError(
                    f"{self.input / path.parent}: both {found[0][0]} and {found[1][0]} may be the "
                    "image of these masks"
                )
            if not found:
                return None, None
            ((image, i),) = found
            return image, next(iter([*folders[i + 1 :], *reversed(folders[:i])]), None)
        stems = image_stems(stem)
        if self.layout == "name":
            stems = [stem[:i] for i in range(len(stem) - 1, 0, -1) if stem[i] == "_"]
        keys = ("/".join([*place, name]) for name in stems for place in (beside, folders, []))
        image = next(filter(None, map(images.with_stem, keys)), None)
        return image, folders[-1] if folders else None

    def _annotated_image(
        self,
        image: str,
        files: list[tuple[Path, str | None]],
        classes: dict[str, Any],
        connected: bool,
        report: Report,
    ) -> AnnotatedImage:
        size: tuple[int, ...] | None = None
        shapes = []
        for file, class_name in files:
            values = read_labels(file, size, f"another mask of {image}")
            size = values.shape
            refuse_blended(file, values)
            found = list(instances(values))
            if self.layout != "image":
                if len(found) > 1:
                    raise ConfigError(
                        f"{file}: {len(found)} values besides 0, but only one instance per file "
                        f"with --layout {self.layout} (--layout image takes one value per instance)"
                    )
                # Without a pixel: it will be reported.
                found = found or [(1, Patch(np.zeros((1, 1), bool)))]
            name = file.relative_to(self.input).as_posix()
            may_be_several = (self.layout, self.parts, len(found)) == ("image", "auto", 1)
            for number, patch in found:
                value, label = value_name(number), class_name
                if self.class_name is None:
                    label = _class(classes, name, value) or class_name
                if label is None:
                    given = "--class-name, --classes or a folder of that name"
                    if self.classes is not None:
                        given = f"{self.classes} has none"
                    raise ConfigError(f"{file}: value {value}: unknown class ({given})")
                where = f"{name} value {value}"
                if connected:
                    patches = _parts(patch, where, report)
                    if len(patches) > 1:
                        report.add(Reason.TAKEN_APART, where)
                else:
                    patches = [patch]
                    if may_be_several and len(_parts(patch)) > 1:
                        report.add(Reason.IN_PARTS, where)
                shapes += [Shape(where, label, patch=patch) for patch in patches]
        return AnnotatedImage(str(files[0][0]), image, (image,), None, size, shapes)  # type: ignore[arg-type]


def _in_parts(files: list[Path]) -> bool:
    """Whether most values of some of these masks have several parts."""
    counts = []
    for file in files[:: -(-len(files) // LOOKED_AT)]:
        values = read_labels(file)
        refuse_blended(file, values)  # first: blends are tens of thousands of values
        counts += [len(_parts(patch)) for _, patch in instances(values)]
    return bool(counts) and float(np.median(counts)) >= 2


def _parts(patch: Patch, where: str = "", report: Report | None = None) -> list[Patch]:
    """The parts of a mask that do not touch, also not at a corner, without specks (`SPECK`).

    The report gets the specks, under the name `where`.
    """
    import cv2  # late: --help does without it

    _, numbers, boxes, _ = cv2.connectedComponentsWithStats(
        patch.pixels.view(np.uint8), connectivity=8
    )
    areas = boxes[1:, cv2.CC_STAT_AREA]
    pixels, share = SPECK
    kept = np.flatnonzero((areas >= pixels) | (areas >= share * areas.max(initial=0))) + 1
    if report is not None and len(kept) < len(areas):
        report.add(Reason.SPECK, where, len(areas) - len(kept))
    parts = []
    for number in kept.tolist():
        x, y, width, height, _ = boxes[number].tolist()
        there = numbers[y : y + height, x : x + width] == number
        parts.append(Patch(there, patch.left + x, patch.top + y))
    return parts


def plain_stems(stem: str) -> list[str]:
    """The usual names of a mask's image, without suffix: of x, x.jpg (before its own suffix), and
    x_mask or x-masks that is x."""
    stems = [stem, re.sub(r"[_-]masks?$", "", stem, flags=re.IGNORECASE)]
    path = Path(stem)
    if path.suffix.lower() in IMAGES:
        stems.append(path.stem)
    return list(dict.fromkeys(stems))


def image_stems(stem: str) -> list[str]:
    """The names that the image of a mask may have, without suffix.

    First the plain ones. Of mask_x that is x, too; with "mask"
    also x_img, x_image, img_x or image_x.
    """
    stems = plain_stems(stem)
    found = re.fullmatch(r"(masks?[_-])?(.+?)([_-]masks?)?", stem, re.IGNORECASE)
    if found is None or not (found[1] or found[3]):
        return stems
    name = found[2]
    words = ("img", "image")
    return [*stems, name, *(f"{word}_{name}" if found[1] else f"{name}_{word}" for word in words)]


def _in_masks(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder named "masks" inside `folder`."""
    return "masks" in file.relative_to(folder).parts[:-1]


def _class(classes: dict[str, Any], name: str, value: str) -> str | None:
    """The JSON file's entry for a value of a mask, named with or without its suffix."""
    found = classes.get(name, classes.get(Path(name).with_suffix("").as_posix()))
    if isinstance(found, dict):
        found = found.get(value)
    if found is None:
        found = classes.get(value)
    if found is not None and not isinstance(found, str):
        raise ConfigError(
            f"--classes: the class of {name}, value {value}, is {found!r}, not a name"
        )
    return found
