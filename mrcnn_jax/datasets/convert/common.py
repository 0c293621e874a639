"""What every format is read into: pictures with the shapes drawn on them; and the options that
every format has."""

from __future__ import annotations

import json
import math
import unicodedata
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.parsers import expat

import numpy as np
import tyro
from jaxtyping import Bool, Int64
from PIL import Image

from mrcnn_jax.config.schema import ConfigError
from mrcnn_jax.data.coco import Box
from mrcnn_jax.data.report import Report
from mrcnn_jax.pixels.decode import FORMATS, decode_labels
from mrcnn_jax.pixels.geometry import mask_box

SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
# the most that data.max_pixels allows: the limit that a run sets is for the checker
MAX_PIXELS = 200_000_000
ELLIPSE_ERROR = 0.05  # px: how far the polygon that stands for an ellipse may lie inside it


@dataclass(frozen=True, eq=False)
class Patch:
    """A mask whose top left pixel lies at (left, top) of the image; what is outside of the image is
    cut off."""

    pixels: Bool[np.ndarray, "h w"]
    left: int = 0
    top: int = 0


@dataclass(frozen=True, eq=False)
class Shape:
    """One thing drawn on a picture, in pixels of it: a polygon (x1, y1, x2, y2, ...) or a patch, a
    box, or a box with either."""

    where: str  # "shape 3"
    label: str
    polygon: list[float] | None = None
    patch: Patch | None = None
    box: Box | None = None  # if there is none, it is that of the polygon or patch
    group: str | int | None = (
        None  # shapes with one label and group are one object; None: an object of its own
    )
    iscrowd: bool = False


@dataclass(frozen=True)
class Picture:
    """An annotated image as a tool exported it."""

    where: str  # for errors: the file, and the element in it
    name: str  # for the report
    names: tuple[
        str, ...
    ]  # file names that the image may have: relative to the image folder, the likeliest first
    stem: str | None  # if none of them is there: the image of this name without its suffix
    size: tuple[int, int] | None  # (height, width) as annotated
    shapes: Sequence[Shape]
    embedded: str | None = None  # the image itself, base64


@dataclass(frozen=True)
class Options:
    """What every format asks."""

    input: tyro.conf.Positional[Path]
    """What the annotation tool exported: its folder (for CVAT, annotations.xml will do)."""
    out: Path
    """The annotation file to write, in COCO's format."""
    images: Path | None = None
    """The folder of the images, which the file names written are relative to. By default, as the
    format has it: see docs/converters.md."""
    categories: Path | None = None
    """A text file with a class name a line: category ids 1, 2, 3, ... in this order, and other
    labels are refused. By default all labels found, sorted."""
    skip: tuple[str, ...] = ()
    """Labels to leave out."""
    only: Path | None = None
    """A text file with an image's name a line, with or without its suffix (VOC's
    ImageSets/Segmentation/train.txt): no other images."""
    split: float = 0.0
    """Share of the images to write into OUT_val.json, chosen at random; the others go into
    OUT_train.json."""
    seed: int = 0
    """Of the split."""
    keep_unannotated: bool = False
    """Take images of the folder that no annotation names as images without objects."""
    allow_missing: bool = False
    """Go on if more than 1 % of the images are missing or unreadable (they are dropped, and
    counted)."""

    def image_folder(self) -> Path:
        """Where this format has its images."""
        return self.input if self.input.is_dir() else self.input.parent

    def open_images(self) -> ImageFolder:
        """The images; ConfigError if there is no such folder."""
        return ImageFolder(self.images or self.image_folder())

    def pictures(self, images: ImageFolder, report: Report) -> Iterator[Picture]:
        """The pictures of the export. ConfigError for what cannot be read; what is dropped goes to
        the report."""
        raise NotImplementedError


class ImageFolder:
    """The image files of a folder and of those inside it, by relative path (with /)."""

    def __init__(self, folder: Path, *, without: Callable[[Path], bool] = lambda _: False) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such image folder")
        self.folder = folder
        self.files = [
            file.relative_to(folder).as_posix()
            for file in files_in(folder, SUFFIXES)
            if not without(file)
        ]
        self._exact = {unicodedata.normalize("NFC", file): file for file in self.files}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for key, file in self._exact.items():
            self._by_name[PurePosixPath(key).name].append(file)
            self._by_stem[str(PurePosixPath(key).with_suffix(""))].append(file)
            if "/" in key:
                self._by_stem[PurePosixPath(key).stem].append(file)

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these relative paths that is there, whatever its slashes and Unicode
        form."""
        return next((file for name in names if (file := self._exact.get(normal_path(name)))), None)

    def find_elsewhere(self, names: Sequence[str], stem: str | None) -> str | None:
        """The file with the name of one of these, in any folder; else `with_stem`. ConfigError if
        there are several."""
        found = next(
            (
                files
                for name in names
                if (files := self._by_name.get(PurePosixPath(normal_path(name)).name))
            ),
            [],
        )
        return (
            self._only(found, names[0]) if found else None if stem is None else self.with_stem(stem)
        )

    def with_stem(self, stem: str) -> str | None:
        """The file of this relative path, or of this name in any folder, but for the suffix.
        ConfigError if there are several."""
        found = self._by_stem.get(normal_path(stem), [])
        return self._only(found, stem) if found else None

    def _only(self, found: list[str], name: str) -> str:
        if len(found) > 1:
            raise ConfigError(
                f"{self.folder}: both {found[0]} and {found[1]} may be the image {name}"
            )
        return found[0]


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files with these suffixes in a folder and those inside it, sorted; not hidden ones, nor
    what macOS puts into archives."""
    found = (
        file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file()
    )
    return sorted(
        file
        for file in found
        if not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
    )


def normal_path(name: str) -> str:
    """A relative path as the image folder knows it: with /, in NFC, without "./"."""
    return str(PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/"))))


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> list[float]:
    """A polygon inside an ellipse, at most ELLIPSE_ERROR away from it; turned clockwise on the
    screen."""
    half_angle = math.acos(1 - min(1.0, ELLIPSE_ERROR / max(rx, ry, ELLIPSE_ERROR)))
    angles = np.linspace(0, 2 * np.pi, max(12, math.ceil(np.pi / half_angle)), endpoint=False)
    return turned(
        np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1), (cx, cy), degrees
    )


def turned(points: np.ndarray, center: tuple[float, float], degrees: float) -> list[float]:
    """Points [n, 2] turned clockwise on the screen (y points down), as one list rounded to 1/1000
    px."""
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.round((points - center) @ matrix + center, 3).ravel().tolist()


def rectangle(box: Box, degrees: float = 0.0) -> list[float]:
    """The corners of a box (x1, y1, x2, y2), turned clockwise around its centre."""
    x1, y1, x2, y2 = box
    return turned(
        np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]), ((x1 + x2) / 2, (y1 + y2) / 2), degrees
    )


def read_bytes(path: Path) -> bytes:
    """ConfigError, with the file's name, if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object; ConfigError if it is none."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        content = json.loads(read_bytes(path), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON (empty or cut off?): {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object is needed, this is a {type(content).__name__}")
    return content


def read_xml(path: Path, root: str) -> ET.Element:
    """The root of an XML file; ConfigError if it is none, has another root, or declares a document
    type (and so could define entities)."""
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: Any) -> None:
        raise ConfigError(f"{path}: it has a <!DOCTYPE>, which no annotation tool writes: refused")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(read_bytes(path), True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not XML (empty or cut off?): {error}") from None
    element = builder.close()
    if element.tag != root:
        raise ConfigError(f"{path}: its root is <{element.tag}>, <{root}> is needed")
    return element


def read_labels(path: Path) -> Int64[np.ndarray, "h w"]:
    """`decode.decode_labels` of a file; ConfigError with its name."""
    try:
        return decode_labels(read_bytes(path), max_pixels=MAX_PIXELS)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {error}") from None


def instances(values: Int64[np.ndarray, "h w"]) -> Iterator[tuple[int, Patch]]:
    """Each value but 0, and where it is."""
    for value in np.unique(values[values != 0]).tolist():
        there = values == value
        x1, y1, x2, y2 = mask_box(there)
        yield value, Patch(there[y1:y2, x1:x2], x1, y1)


def finite(value: Any) -> bool:
    """Whether a value is a number that a coordinate may be."""
    return type(value) in (int, float) and abs(value) <= 1e9
