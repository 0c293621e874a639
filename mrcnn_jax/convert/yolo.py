"""YOLO segmentation as Ultralytics reads it: a data.yaml, and a text file for each image.

A line is "class x1 y1 x2 y2 ...": a polygon in shares of the image's width and height, counted in
the picture turned as EXIF says. Four numbers are a box: its centre, width and height. The labels of
images/x.jpg are in labels/x.txt (the last folder of that name), else beside the image.
https://docs.ultralytics.com/datasets/segment/
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    AnnotatedImage,
    RectangleOptions,
    Shape,
    image_size,
    named,
    normal_label,
    read_lines,
)
from mrcnn_jax.convert.image_folder import ImageFolder, files_in
from mrcnn_jax.data.json_values import is_number, is_text, read_bytes, short
from mrcnn_jax.data.names import ROLES
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.headers import SUFFIXES

PartName = Literal["train", "val", "test"]
PARTS: tuple[PartName, ...] = ("train", "val", "test")
NO_LABELS = ("classes.txt", "labels.txt", "notes.txt")  # of labels/, by other tools
NO_NAMES = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # in YAML
OUTSIDE = 0.01  # of a side: what Ultralytics accepts; pixels instead of shares are far more
ROUNDING = 1e-5  # of a side: numbers are written with five decimals or more


@dataclass(frozen=True)
class DataYaml:
    """What a data.yaml says; paths are absolute."""

    path: Path
    names: tuple[str, ...]
    """Of the classes 0, 1, 2, ..."""
    images: dict[PartName, tuple[Path, ...]]
    """Of the parts that are there; from a list also images that are not."""
    absent: dict[PartName, str]
    """Why a part that is named is not there."""


@dataclass(frozen=True)
class Yolo(RectangleOptions):
    """YOLO segmentation (Ultralytics, Roboflow, CVAT): data.yaml or its folder."""

    part: PartName = "train"
    """The part of the data set to convert."""

    @functools.cached_property
    def data(self) -> DataYaml:
        """The data set; ConfigError if it cannot be understood."""
        path = self.input
        if path.is_dir():
            found = [path / name for name in ("data.yaml", "data.yml") if (path / name).is_file()]
            if not found:
                way = missing_yaml(path) or " (or name another .yaml)"
                raise ConfigError(f"{path}: no data.yaml in this folder{way}")
            path = found[0]
        return read_data_yaml(path)

    def image_folder(self) -> Path:
        """The folder with the images of all parts, so that file names differ between them."""
        here = os.path.abspath(self.data.path.parent)
        folders = [str(file.parent) for files in self.data.images.values() for file in files]
        common = os.path.commonpath(folders or [here])
        return self.data.path.parent / os.path.relpath(common, here)

    def open_images(self) -> ImageFolder:
        folder = self.images or self.image_folder()
        files = [Path(os.path.relpath(file, os.path.abspath(folder))) for file in self._images()]
        for file in files:
            if file.parts[0] == os.pardir:
                raise ConfigError(f"--images: {folder / file} is not in {folder}")
        return ImageFolder(folder, files=[folder / file for file in files])

    def class_names(self) -> tuple[str, ...]:
        skipped = set(map(normal_label, self.skip))
        return tuple(name for name in self.data.names if name not in skipped)

    def hints(self) -> list[str]:
        images = self.data.images
        others = [part for part in images if images[part] != images.get(self.part)]
        return [f"not converted: {', '.join(others)} (see --part)"] if others else []

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        data = self.data
        folders = {}
        for file in self._images():
            labels = labels_of(file)
            folders[labels.parent] = file.parent
            name = os.path.relpath(file, os.path.abspath(images.folder))
            size = image_size(file, None) if file.is_file() else None
            shapes: list[Shape] = []
            if labels.is_file():
                shapes = self._shapes(labels, size or (1, 1), data.names)
            else:
                report.add(Reason.NO_LABEL_FILE, name)
            where = str(labels if shapes else file)
            yield AnnotatedImage(where, name, (name.replace(os.sep, "/"),), None, size, shapes)
        for folder, of_images in folders.items():
            if folder != of_images:
                yield from self._orphans(folder, of_images)

    def _images(self) -> tuple[Path, ...]:
        found = self.data.images.get(self.part)
        if found is None:
            why = self.data.absent.get(self.part, f"no {self.part!r}")
            raise ConfigError(f"{self.data.path}: {why}")
        return found

    def _orphans(self, folder: Path, images: Path) -> Iterator[AnnotatedImage]:
        """The label files of a folder whose image is neither listed nor in that of the images."""
        stems = {file.stem for file in self._images() if file.parent == images}
        if images.is_dir():
            stems |= {file.stem for file in images.iterdir() if file.suffix.lower() in SUFFIXES}
        for path in sorted(folder.glob("*.txt")):
            if path.stem not in stems and path.name not in NO_LABELS:
                shapes = self._shapes(path, (1, 1), self.data.names)
                yield AnnotatedImage(str(path), path.name, (path.stem,), None, None, shapes)

    def _shapes(self, path: Path, size: tuple[int, int], names: tuple[str, ...]) -> list[Shape]:
        try:
            lines = read_bytes(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8") from None
        shapes = []
        for place, line in enumerate(lines, 1):
            if words := line.split():
                with named(f"{path}: line {place}"):
                    shapes.append(self._shape(words, f"line {place}", size, names))
        return shapes

    def _shape(
        self, words: list[str], where: str, size: tuple[int, int], names: tuple[str, ...]
    ) -> Shape:
        (class_text, *texts), (height, width) = words, size
        number = re.fullmatch(r"([0-9]{1,9})(\.0*)?", class_text)
        if number is None or int(number[1]) >= len(names):
            raise ValueError(f"its class is {short(class_text)}, not one of 0 to {len(names) - 1}")
        label, values = names[int(number[1])], list(map(_share, texts))
        if len(values) < 4 or len(values) % 2:
            raise ValueError(
                f"{len(values)} numbers behind the class: a box has 4, a polygon an even count of "
                "at least 6"
            )
        if len(values) == 4:
            x, y, w, h = values
            values = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        if not all(-OUTSIDE <= value <= 1 + OUTSIDE for value in values):
            far = min(values) if min(values) < -OUTSIDE else max(values)
            raise ValueError(f"{far:g} is outside of 0..1, the image (in pixels instead?)")
        sides = (width, height) * (len(values) // 2)
        places = [_inside(value) * side for value, side in zip(values, sides, strict=True)]
        if len(values) == 4:
            return self.rectangle(where, label, places[::2], places[1::2], None)
        return Shape(where, label, polygon=[round(place, 3) for place in places])


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_number(value):
        raise ValueError(f"{short(text)} is not a number")
    return value


def _inside(value: float) -> float:
    """`value`, without a rounding that leaves 0..1."""
    nearest = min(max(value, 0.0), 1.0)
    return nearest if abs(value - nearest) <= ROUNDING else value


def labels_of(image: Path) -> Path:
    """The label file of an image: in labels/ for images/, unless it is beside it alone."""
    beside, parts = image.with_suffix(".txt"), list(image.parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        return beside
    parts[places[-1]] = "labels"
    mapped = Path(*parts).with_suffix(".txt")
    return beside if beside.is_file() and not mapped.is_file() else mapped


def missing_yaml(folder: Path) -> str:
    """The data.yaml to write where tools leave a classes.txt instead, for the end of a message; ""
    if there is none."""
    for train, labels in (("images", folder / "labels"), (".", folder)):
        classes = [path for path in (folder, labels) if (path / "classes.txt").is_file()]
        if classes and any(path.name not in NO_LABELS for path in labels.glob("*.txt")):
            names = ", ".join(map(_quoted, read_lines(classes[0] / "classes.txt")))
            return f"; write {folder / 'data.yaml'}: train: {train}, names: [{names}]"
    return ""


def _quoted(name: str) -> str:
    """A name as a YAML list needs it."""
    plain = re.fullmatch(r"[^\W\d_][\w -]*", name) and name.lower() not in NO_NAMES
    return name if plain else json.dumps(name, ensure_ascii=False)


# -- data.yaml -------------------------------------------------------------------------------------


def read_data_yaml(path: Path) -> DataYaml:
    """Reads a data.yaml, and finds the images of its parts.

    `path` in it is relative to the file; where it is not there, such as on another machine, it is
    the file's own folder. A part is a folder, a list of images in a .txt, or a list of these. As
    Ultralytics does, ../train/images is looked for as train/images, too: so Roboflow writes it.

    Raises:
        ConfigError: it is not YAML, or is not of a data set with boxes or polygons.
    """
    content = _yaml(path)
    if "kpt_shape" in content:
        raise ConfigError(f"{path}: kpt_shape: a data set of poses, not of polygons")
    names = _names(path, content)
    here = Path(os.path.abspath(path.parent))
    root = content.get("path")
    if root is not None and not isinstance(root, str):
        raise ConfigError(f"{path}: path is {short(root)}, not a folder")
    roots = [here / root, here] if root else [here]
    images: dict[PartName, tuple[Path, ...]] = {}
    absent: dict[PartName, str] = {}
    for part in PARTS:
        key, value = _of_part(content, part)
        if value is None:
            continue
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ConfigError(f"{path}: {key} is {short(value)}, not a folder or list of folders")
        places = {text: _place(roots, text) for text in texts}
        lost = [text for text, place in places.items() if place is None]
        if lost:
            absent[part] = f"{key}: no {lost[0]!r} in {roots[0]}"
            continue
        found = [image for place in places.values() if place for image in _listed(place, roots)]
        if found:
            images[part] = tuple(dict.fromkeys(found))
        else:
            absent[part] = f"{key}: no images in {', '.join(map(str, places.values()))}"
    if not images:
        raise ConfigError(f"{path}: {'; '.join(absent.values()) or 'no train, val or test'}")
    return DataYaml(path, names, images, absent)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml  # late: --help does without it

    try:
        content = yaml.safe_load(read_bytes(path).decode("utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{path}: not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a data.yaml: no keys in it")
    return content


def _of_part(content: dict[str, Any], part: PartName) -> tuple[str, Any]:
    """The key of a part, such as val, or else valid, Validation, ..., and what it names."""
    found = {k: v for k, v in content.items() if isinstance(k, str) and v not in (None, "", [])}
    keys = [part, *(key for key in found if ROLES.get(key.lower()) == part)]
    return next(((key, found[key]) for key in keys if key in found), (part, None))


def _names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """The class names, a list or {0: name, ...}."""
    names, count = content.get("names"), content.get("nc")
    if names is None and type(count) is int and 0 < count < 10_000:
        return tuple(f"class_{number}" for number in range(count))
    if isinstance(names, dict):
        digits = re.compile("[0-9]{1,9}")  # "0" is 0 for Ultralytics, too
        numbers = [int(k) if isinstance(k, str) and digits.fullmatch(k) else k for k in names]
        names = dict(zip(numbers, names.values(), strict=True))
        if len(names) < len(numbers):
            raise ConfigError(f"{path}: names: a number is there twice")
        missing = [number for number in range(len(names)) if number not in names]
        if missing:
            raise ConfigError(f"{path}: names: {missing[0]} is missing: they count from 0")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ConfigError(f"{path}: names is {short(names)}, not the list of the classes")
    for name in names:
        if type(name) is not int and not is_text(name):
            raise ConfigError(f"{path}: names: {short(name)} is not a name (in quotes it may be)")
    if count is not None and count != len(names):
        raise ConfigError(f"{path}: nc is {short(count)}, but there are {len(names)} names")
    texts = tuple(normal_label(str(name)) for name in names)
    twice = next((name for name in texts if texts.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: names: {twice!r} is there twice")
    return texts


def _place(roots: list[Path], text: str) -> Path | None:
    """The first place of a folder or file that is there."""
    tries = (root / part for root in roots for part in (text, text.removeprefix("../")))
    return next((Path(os.path.normpath(place)) for place in tries if place.exists()), None)


def _listed(place: Path, roots: list[Path]) -> list[Path]:
    """The images in a folder or in a list of them."""
    if place.is_dir():
        return files_in(place, SUFFIXES)
    if place.suffix.lower() in SUFFIXES:
        return [place]
    if place.suffix.lower() != ".txt":
        raise ConfigError(f"{place}: neither a folder of images nor a .txt that lists them")
    images = []
    for line in read_lines(place):
        if "\0" in line:
            raise ConfigError(f"{place}: {short(line)} is no path")
        found = _place([place.parent, *roots], line)
        images.append(found or Path(os.path.normpath(place.parent / line)))
    return images
