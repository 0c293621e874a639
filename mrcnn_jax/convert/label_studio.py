"""Label Studio's own JSON export: one list of tasks, each with annotations of one image.

Of several annotations of a task the newest that was not cancelled counts. Places are in percent of
the image's sides, turns in degrees, clockwise: of a rectangle around its (x, y) corner, of an
ellipse around its centre. Polygons, closed vectors without curves, ellipses, turned rectangles,
brushes and bitmasks are outlines; upright rectangles are boxes (`--rectangles mask`: outlines). A
brush is an RGBA picture, packed by https://github.com/thi-ng/umbrella (rle-pack), a bitmask a PNG:
the pixels whose alpha is 128 and more are it.
https://labelstud.io/guide/export and its label-studio-sdk (converter/brush.py)
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from jaxtyping import Bool, UInt8

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import (
    MAX_PIXELS,
    AnnotatedImage,
    RectangleOptions,
    Shape,
    cropped,
    ellipse,
    named,
    turned,
)
from mrcnn_jax.convert.image_folder import ImageFolder
from mrcnn_jax.data.json_values import is_number, read_json_list, short
from mrcnn_jax.data.names import UPLOADED
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.pixels.headers import SUFFIXES
from mrcnn_jax.pixels.label_images import opacity

KINDS = ("polygon", "rectangle", "ellipse", "brush", "bitmask")  # with an area
NO_AREA = ("keypoint", "vector")
CURVED = "curved"  # of a vector
# Begins of the types of results that are no shapes.
NO_SHAPE = (
    *("choice", "textarea", "relation", "rating", "number", "taxonomy", "datetime", "pairwise"),
    *("ranker", "chat", "reactcode"),
)
OPAQUE = 128  # of 255


@dataclass(frozen=True)
class LabelStudio(RectangleOptions):
    """Label Studio: the file of its "JSON" export (not JSON-MIN), by default beside the images."""

    def annotated_images(self, images: ImageFolder, report: Report) -> Iterator[AnnotatedImage]:
        path = self.input
        if path.is_dir():
            raise ConfigError(f"{path}: a folder: name the JSON file of Label Studio")
        tasks = read_json_list(path)
        usual = _usual_target(tasks)
        for place, task in enumerate(tasks, 1):
            if not isinstance(task, dict) or not isinstance(task.get("annotations"), list):
                raise ConfigError(
                    f"{path}: task {place}: no annotations (export as JSON, not as JSON-MIN)"
                )
            name = f"task {short(task.get('id', place))}"
            with named(f"{path}: {name}"):
                annotation = self._newest(task["annotations"], name, report)
                if annotation is not None:
                    yield self._annotated_image(path, name, task, annotation, usual, report)

    def _newest(self, annotations: list[Any], name: str, report: Report) -> dict[str, Any] | None:
        """The annotation that counts; None if there is none."""
        known = [
            a for a in annotations if isinstance(a, dict) and isinstance(a.get("result"), list)
        ]
        if len(known) < len(annotations):
            raise ValueError("an annotation without a list of results")
        valid = [a for a in known if not (a.get("was_cancelled") or a.get("skipped"))]
        ordered = sorted(valid, key=lambda a: str(a.get("created_at") or ""))
        if len(ordered) < len(annotations):
            report.add(Reason.CANCELLED, name, len(annotations) - len(ordered))
        if len(ordered) > 1:
            report.add(Reason.OLDER, name, len(ordered) - 1)
        return ordered[-1] if ordered else None

    def _annotated_image(
        self,
        path: Path,
        name: str,
        task: dict[str, Any],
        annotation: dict[str, Any],
        usual: str | None,
        report: Report,
    ) -> AnnotatedImage:
        drawn: dict[str, tuple[str, str, dict[str, Any]]] = {}  # id -> where, kind, result
        labels: dict[str, str] = {}  # a label may be a result of its own, with the id of its shape
        size: tuple[int, int] | None = None
        for place, result in enumerate(annotation["result"], 1):
            where = f"result {place}"
            with named(f"{path}: {name}: {where}"):
                kind = _kind(result)
                if kind is None:
                    continue
                if kind == "vector":
                    kind, result = _vector(result)
                identity = where if result.get("id") is None else str(result["id"])
                if identity in drawn and _another(result, drawn[identity][2]):
                    identity = where
                if label := _label(result["value"]):
                    labels.setdefault(identity, label)
                drawn.setdefault(identity, (where, kind, result))
        target = _target([result for _, _, result in drawn.values()]) or usual
        shapes = []
        for identity, (where, kind, result) in drawn.items():
            found = labels.get(identity)
            if kind in NO_AREA:
                report.add(Reason.NO_AREA, f"{name}: {where}", kind=kind)
            elif kind == CURVED:
                report.add(Reason.CURVED, f"{name}: {where}")
            elif found is None:
                report.add(Reason.NO_LABEL, f"{name}: {where}")
            else:
                with named(f"{path}: {name}: {where}"):
                    size = _size(result, size)
                    shapes.append(self._shape(kind, result["value"], where, found, size))
        key, names = _image_names(task, target)
        if key != target:
            report.add(Reason.FIRST_IMAGE, name, key=short(key))
        return AnnotatedImage(f"{path}: {name}", name, names, None, size, shapes)

    def _shape(
        self, kind: str, value: dict[str, Any], where: str, label: str, size: tuple[int, int]
    ) -> Shape:
        height, width = size

        def pixels(key: str, side: int) -> float:
            if not is_number(value.get(key)):
                raise ValueError(f"its {key} is {short(value.get(key))}")
            return value[key] * side / 100

        if kind == "brush":
            return Shape(where, label, patch=cropped(_brush(value, size)))
        if kind == "bitmask":
            return Shape(where, label, patch=cropped(_bitmask(value, size)))
        if kind == "polygon":
            points = value.get("points")
            if not isinstance(points, list) or not all(
                isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points
            ):
                raise ValueError("its points are not [x, y] pairs of numbers")
            places = [place for x, y in points for place in (x * width / 100, y * height / 100)]
            return Shape(where, label, polygon=[round(place, 3) for place in places])
        degrees = value.get("rotation") or 0
        if not is_number(degrees):
            raise ValueError(f"its rotation is {short(degrees)}")
        x, y = pixels("x", width), pixels("y", height)
        if kind == "ellipse":
            rx, ry = abs(pixels("radiusX", width)), abs(pixels("radiusY", height))
            return Shape(where, label, polygon=ellipse(x, y, rx, ry, degrees))
        x2, y2 = x + pixels("width", width), y + pixels("height", height)
        if degrees % 360 == 0:
            return self.rectangle(where, label, (x, x2), (y, y2), None)
        corners = np.array([[x, y], [x2, y], [x2, y2], [x, y2]])
        return Shape(where, label, polygon=turned(corners, (x, y), degrees))


def _kind(result: Any) -> str | None:
    """The shape of a result, such as "polygon" of "polygonlabels"; None if it is none (a text).

    Raises:
        ValueError: it is no result, or of a type that is not known.
    """
    kind = str(result.get("type")).lower() if isinstance(result, dict) else ""
    if kind.startswith(NO_SHAPE):
        return None
    if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
        raise ValueError("without a value")
    known = next((k for k in (*KINDS, *NO_AREA) if kind in (k, f"{k}labels")), None)
    if kind == "labels":  # with a shape
        keys = {"polygon": "points", "ellipse": "radiusX", "brush": "rle", "rectangle": "width"}
        keys |= {"bitmask": "imageDataURL", "vector": "vertices"}
        return next((one for one, key in keys.items() if key in result["value"]), NO_AREA[0])
    if known is None:
        raise ValueError(f"its type is {short(result.get('type'))}")
    return known


def _vector(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of a vector, and its result: closed, without curves and branches, a polygon."""
    value = result["value"]
    if not value.get("closed"):
        return "vector", result
    found = value.get("vertices")
    if not isinstance(found, list) or not all(isinstance(vertex, dict) for vertex in found):
        raise ValueError(f"its vertices are {short(found)}")
    for before, vertex in zip([*found[-1:], *found], found, strict=False):
        follows = vertex.get("prevPointId") in (None, before.get("id"))
        if vertex.get("isBezier") or not follows:
            return CURVED, result
    points = [[vertex.get("x"), vertex.get("y")] for vertex in found]
    return "polygon", {**result, "value": {**value, "points": points}}


def _label(value: dict[str, Any]) -> str | None:
    """The only label of a shape, under "polygonlabels", "labels", ...; None if it has none."""
    lists = [found for key, found in value.items() if key.endswith("labels") and found]
    if not lists:
        return None
    if not isinstance(lists[0], list) or len(lists[0]) > 1 or not isinstance(lists[0][0], str):
        raise ValueError(f"its labels are {short(lists[0])}, not one")
    return lists[0][0]


def _another(result: dict[str, Any], first: dict[str, Any]) -> bool:
    """Whether a result with the id of an earlier one is a shape of its own, not the label of it."""
    places = (
        {key: found for key, found in one["value"].items() if not key.endswith("labels")}
        for one in (result, first)
    )
    return result["type"] == first["type"] and next(places) != next(places)


def _size(result: dict[str, Any], known: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the image that a result is on."""
    height, width = result.get("original_height"), result.get("original_width")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(f"its original_height, original_width are {height!r}, {width!r}")
    if result.get("image_rotation"):
        raise ValueError(f"image_rotation {result['image_rotation']!r}: annotated turned: refused")
    if known not in (None, (height, width)):
        raise ValueError(f"the image is {height} x {width} here, and before {known}")
    return height, width


def _target(results: list[dict[str, Any]]) -> str | None:
    """The name of the image that results are drawn on; ValueError if they are on several."""
    named_ones = [result for result in results if result.get("to_name")]
    found = {(short(r["to_name"]), short(r.get("item_index") or 0)): r for r in named_ones}
    if len(found) > 1:
        alike = len({name for name, _ in found}) < len(found)
        shown = ", ".join(f"{name} {index}" if alike else name for name, index in found)
        raise ValueError(f"shapes on several images ({shown}): give each image a task of its own")
    return str(named_ones[0]["to_name"]) if named_ones else None


def _usual_target(tasks: list[Any]) -> str | None:
    """What all results of an export are drawn on; None if there are several or none."""

    def inside(parent: Any, key: str) -> list[Any]:
        found = parent.get(key) if isinstance(parent, dict) else None
        return found if isinstance(found, list) else []

    annotations = [a for task in tasks for a in inside(task, "annotations")]
    results = [result for a in annotations for result in inside(a, "result")]
    found = {str(r["to_name"]) for r in results if isinstance(r, dict) and r.get("to_name")}
    return found.pop() if len(found) == 1 else None


def _image_names(task: dict[str, Any], target: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Where the image of a task is in its data, and may be in the folder.

    Args:
        task: as exported.
        target: the name of the image in the labelling interface, mostly that in the data, too.

    Returns:
        `target`, or of several images the key of the first one if `target` is not that of any;
        and paths, the likeliest first.

    Raises:
        ValueError: it has none.
    """
    data = task.get("data")
    texts = data.items() if isinstance(data, dict) else ()
    places = {key: _place(text) for key, text in texts if isinstance(text, str)}
    images = {key: place for key, place in places.items() if place is not None}
    if not images:
        raise ValueError(f"no image in its data {short(data)}")
    several = len(set(images.values())) > 1
    key = target if target in images else next(iter(images))
    path = images[key].replace("\\", "/").lstrip("/")
    name = path.rpartition("/")[2]
    paths = dict.fromkeys((path, f"images/{name}", name, UPLOADED.sub("", name)))
    return key if several else target, tuple(paths)


def _place(text: str) -> str | None:
    """The path in an image's address; None if it is none."""
    try:
        parts = urlsplit(text)
    except ValueError:  # any text, not an address
        return None
    place = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]  # of local files: ?d=path
    return place if Path(place).suffix.lower() in SUFFIXES else None


# -- masks -----------------------------------------------------------------------------------------


def _brush(value: dict[str, Any], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The pixels of a brush."""
    packed, (height, width) = value.get("rle"), size
    if not isinstance(packed, list) or not all(type(v) is int and 0 <= v < 256 for v in packed):
        raise ValueError("its rle is not a list of bytes")
    if height * width > MAX_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels: too large")
    values = unpacked(bytes(packed), 4 * height * width)
    return values.reshape(height, width, 4)[..., 3] >= OPAQUE


def _bitmask(value: dict[str, Any], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The pixels of a bitmask."""
    url = value.get("imageDataURL")
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if head != "data:image/png;base64":
        raise ValueError(f"its imageDataURL is {short(url)}, not a PNG in base64")
    try:
        alpha = opacity(base64.b64decode(data), max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(f"its imageDataURL: {error}") from None
    if alpha.shape != size:
        (height, width), (h, w) = size, alpha.shape
        raise ValueError(f"its imageDataURL is {h} x {w}, the image {height} x {width}")
    return alpha >= OPAQUE


def unpacked(packed: bytes, count: int) -> UInt8[np.ndarray, " n"]:
    """The values of thi.ng's rle-pack.

    Bits, the high ones first: 32 of the count of values, 5 of the size of a value, 4 of each of
    four sizes of lengths (all three of a size are it minus 1). Then runs: a bit (1: one value that
    is repeated), 2 bits that choose the size of the length, the length minus 1, and the value or
    the values.

    Args:
        packed: the bytes.
        count: how many values it should have.

    Raises:
        ValueError: it is cut off, or has another count.
    """
    place = 0  # in bits

    def read(size: int) -> int:
        nonlocal place
        start, place = place // 8, place + size
        if place > 8 * len(packed):
            raise ValueError("its rle is cut off")
        end = -(-place // 8)
        return int.from_bytes(packed[start:end], "big") >> 8 * end - place & (1 << size) - 1

    found, word = read(32), read(5) + 1
    if found != count or word != 8:
        raise ValueError(f"its rle has {found} values of {word} bits, the image {count} of 8")
    sizes = [read(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.uint8)
    i = 0
    while i < count:
        repeated, length = read(1), read(sizes[read(2)]) + 1
        if i + length > count:
            raise ValueError("its rle has more values than the image")
        if repeated:
            values[i : i + length] = read(word)
        else:
            values[i : i + length] = [read(word) for _ in range(length)]
        i += length
    return values
