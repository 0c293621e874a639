"""Shared by all formats: options, the annotated images they are read into, reading files."""

from __future__ import annotations

import contextlib
import itertools
import math
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.parsers import expat

import numpy as np
import tyro
from jaxtyping import Bool, Int64

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.image_folder import ImageFolder
from mrcnn_jax.data.json_values import is_number, read_bytes
from mrcnn_jax.data.report import Report
from mrcnn_jax.pixels.decode import image_kind
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.headers import SWAPS, header_size
from mrcnn_jax.pixels.label_images import decode_labels
from mrcnn_jax.pixels.places import Box

# The most that data.max_pixels allows; a run's own limit is the checker's business.
MAX_PIXELS = 200_000_000
BLENDED = 0.28  # of a label image's edge pixels: more are no labels (`blended`)
ELLIPSE_ERROR = 0.05  # px: how far the polygon of an ellipse may lie inside it


@dataclass(frozen=True, eq=False)
class Patch:
    """A mask with its top left pixel at (left, top) of the image; cut off outside of the image."""

    pixels: Bool[np.ndarray, "h w"]
    left: int = 0
    top: int = 0


@dataclass(frozen=True, eq=False)
class Shape:
    """One thing drawn on an image, in its pixels: a polygon (x, y, x, y, ...), patch or box.

    A box may come with one of the others.
    """

    where: str  # "shape 3"
    label: str
    polygon: list[float] | None = None
    patch: Patch | None = None
    box: Box | None = None  # None: the extent of the polygon or patch
    group: str | int | None = None  # shapes of one label and group are one object; None: alone
    iscrowd: bool = False


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its annotations as a tool exported them."""

    where: str  # for errors: the file, and the element in it
    name: str  # for the report
    # Paths in the image folder by the annotation's words, the likeliest first; like those of
    # `beside`, they may lack their suffix.
    names: tuple[str, ...]
    stem: str | None  # the image's name without its suffix, if it is nowhere else
    size: tuple[int, int] | None  # (height, width) as annotated
    shapes: Sequence[Shape]
    beside: tuple[str, ...] = ()  # if it is at none of `names`: where the annotation's file lies
    embedded: str | None = None  # the image itself, base64


@dataclass(frozen=True)
class Options:
    """The options of every format."""

    input: tyro.conf.Positional[Path]
    """The annotation tool's export: its folder or its file (docs/converters.md)."""
    out: Path
    """The annotation file to write, in COCO format."""
    images: Path | None = None
    """The folder of the images; the file names written are relative to it. The default depends on
    the format: see docs/converters.md."""
    categories: Path | None = None
    """A text file with one class name per line, for category ids 1, 2, 3, ...; other labels are
    refused. By default, all labels found, sorted."""
    skip: tuple[str, ...] = ()
    """Labels to leave out."""
    only: Path | None = None
    """Convert only the images in this text file: one name per line, with or without its suffix
    (such as VOC's ImageSets/Segmentation/train.txt)."""
    split: float = 0.0
    """Share of the images, chosen at random, to write into OUT_val.json; the others go into
    OUT_train.json."""
    seed: int = 0
    """Seed of the split."""
    keep_unannotated: bool = False
    """Keep images that no annotation names, as images without objects."""
    allow_missing: bool = False
    """Continue if more than 1 % of the images are missing or unreadable; they are dropped."""

    def image_folder(self) -> Path:
        """Where this format keeps its images by default."""
        return self.input if self.input.is_dir() else self.input.parent

    def open_images(self) -> ImageFolder:
        """The images; ConfigError if there is no such folder."""
        return ImageFolder(self.images or self.image_folder())

    def class_names(self) -> tuple[str, ...] | None:
        """The export's own list of classes, in its order, as `normal_label` spells them; None: it
        has none. Labels that are not in it follow, sorted."""
        return None

    def hints(self) -> list[str]:
        """Lines for people on what was not asked for."""
        return []

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        """The annotated images of the export.

        Args:
            images: the image folder, as `open_images` returns it.
            report: counts what is dropped.

        Raises:
            ConfigError: something cannot be read.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class RectangleOptions(Options):
    """The options of formats with rectangles."""

    rectangles: Literal["box", "mask"] = "box"
    """Treat an upright rectangle as a box without a mask, or as a mask."""

    def rectangle(
        self, where: str, label: str, xs: Sequence[float], ys: Sequence[float], group: Any
    ) -> Shape:
        """The shape of an upright rectangle, given its corners in any order."""
        box = float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
        outline = rectangle(box) if self.rectangles == "mask" else None
        return Shape(where, label, polygon=outline, box=box, group=group)


def image_size(path: Path, annotated: tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of an image; None if it cannot be decoded.

    It is the stored size if that is the annotated one, else the size after the turn of EXIF.
    `images.check_images` will treat the file in the same way: it takes the turn that gives the
    annotated size.
    """
    try:
        stored = header_size(path)
        if stored == annotated:
            return stored
        kind = image_kind(path.read_bytes(), max_pixels=MAX_PIXELS)
    except (OSError, ValueError):
        return None
    return stored[::-1] if kind.orientation in SWAPS else stored


def normal_label(name: str) -> str:
    """A class name as it is written: in NFC, without outer spaces."""
    return unicodedata.normalize("NFC", name.strip())


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> list[float]:
    """A polygon at most ELLIPSE_ERROR inside an ellipse, turned clockwise on the screen."""
    half_angle = math.acos(1 - min(1.0, ELLIPSE_ERROR / max(rx, ry, ELLIPSE_ERROR)))
    angles = np.linspace(0, 2 * np.pi, max(12, math.ceil(np.pi / half_angle)), endpoint=False)
    points = np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], axis=1)
    return turned(points, (cx, cy), degrees)


def turned(points: np.ndarray, center: tuple[float, float], degrees: float) -> list[float]:
    """Points [n, 2] turned clockwise on the screen, as a flat list, rounded to 1/1000 px."""
    angle = math.radians(degrees)
    matrix = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.round((points - center) @ matrix + center, 3).ravel().tolist()


def rectangle(box: Box, degrees: float = 0.0) -> list[float]:
    """The corners of a box (x1, y1, x2, y2), turned clockwise around its centre."""
    x1, y1, x2, y2 = box
    corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    return turned(corners, ((x1 + x2) / 2, (y1 + y2) / 2), degrees)


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Turns a ValueError into a ConfigError whose message begins with `where`."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped; ConfigError if it is not UTF-8."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def read_xml(path: Path, root: str) -> ET.Element:
    """The root element of an XML file.

    Raises:
        ConfigError: the file is not XML, has another root, or declares a document type (which could
            define entities).
    """
    builder, parser = ET.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: Any) -> None:
        raise ConfigError(f"{path}: refused: no annotation tool writes a <!DOCTYPE>")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(read_bytes(path), True)
    except ConfigError:
        raise
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ConfigError(f"{path}: not XML (empty or cut off?): {error}") from None
    element = builder.close()
    if element.tag != root:
        raise ConfigError(f"{path}: its root is <{element.tag}>, not <{root}>")
    return element


def number(text: str | None, what: str) -> float:
    """The number in an XML file's text; ValueError, which names `what` it is, if it is none."""
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not is_number(value):
        problem = "is missing" if text is None else f"is {text!r}, which is not a number"
        raise ValueError(f"its {what} {problem}")
    return value


def read_labels(
    path: Path, size: tuple[int, ...] | None = None, source: Path | str = ""
) -> Int64[np.ndarray, "h w"]:
    """The values of a label image (`decode_labels`).

    Args:
        path: the file.
        size: (height, width) that it must have, according to `source`.
        source: what the message names.

    Raises:
        ConfigError: it cannot be decoded, or has another size.
    """
    with named(f"{path}"):
        values = decode_labels(read_bytes(path), max_pixels=MAX_PIXELS)
        if size not in (None, values.shape):
            found, expected = (f"{h} x {w}" for h, w in (values.shape, size))
            raise ValueError(f"it is {found}, but {expected} according to {source}")
    return values


def refuse_blended(path: Path, values: Int64[np.ndarray, "h w"]) -> None:
    """ConfigError if a label image seems to hold blends of labels (`blended`)."""
    if blended(values):
        raise ConfigError(
            f"{path}: many values lie between those around them, as after resizing with "
            "interpolation or in a JPEG: write the masks anew, or resize with nearest neighbour"
        )


def blended(values: Int64[np.ndarray, "h w"]) -> bool:
    """Whether a label image seems to hold blends of labels: resized, or once a JPEG.

    Where labels meet, few pixels have a value between those around them (of the edges, 0.1 with
    cells of 40 pixels side by side, 0.2 with cells of 13), but after resizing with interpolation
    0.3 and more. And few labels are nowhere but where two others meet; most values of a JPEG are.
    """
    import cv2  # late: --help does without it

    if values.max() < 1 << 16:  # faster than sorting
        present = np.bincount(values.ravel()) > 0
        names, places = np.flatnonzero(present), (np.cumsum(present) - 1)[values]
    else:  # colours
        names, places = np.unique(values, return_inverse=True)
    if len(names) < 3:
        return False
    near = places.reshape(values.shape).astype(np.float32)
    square = np.ones((3, 3), np.uint8)
    low, high = cv2.erode(near, square), cv2.dilate(near, square)
    edge, between = (low != high) & (values != 0), (low < near) & (near < high)
    if (edge & between).sum() > BLENDED * edge.sum():
        return True
    third = between.copy()  # pixels with more than two values around them
    (height, width), padded = values.shape, np.pad(near, 1, mode="edge")
    for y, x in itertools.product(range(3), range(3)):
        other = padded[y : y + height, x : x + width]
        third |= (other != low) & (other != high)
    meetings = np.bincount(places.ravel()[third.ravel()], minlength=len(names))
    lost = (meetings >= 0.8 * np.bincount(places.ravel())) & (names != 0)
    return bool(lost.sum() >= max(2, len(names) / 2))


def instances(values: Int64[np.ndarray, "h w"]) -> Iterator[tuple[int, Patch]]:
    """Each value but 0, and where it is."""
    for value in np.unique(values[values != 0]).tolist():
        there = values == value
        yield value, cropped(there)


def cropped(mask: Bool[np.ndarray, "h w"]) -> Patch:
    """The pixels of a mask, without the rest of it."""
    x1, y1, x2, y2 = mask_box(mask)
    return Patch(mask[y1:y2, x1:x2].copy(), x1, y1)  # a view would keep all of it in memory


def value_name(value: int) -> str:
    """A label image's value in text: "3", or "#ff0000" for a colour."""
    return f"#{value & 0xFFFFFF:06x}" if value >> 24 else str(value)
