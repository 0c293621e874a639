"""Whole annotation files, and the ways in which people's files are known to differ from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_ops

from tools.kinds.mutations import HEIGHT, WIDTH

Content = dict[str, Any]


# -- whole files -----------------------------------------------------------------------------------


def whole_file() -> Content:
    """Six images with four polygons each, of which there is nothing to report."""
    rng = np.random.default_rng(0)
    annotations: list[Content] = []
    for number in range(24):
        x, y = (4 + 30 * (number % 2)), (4 + 22 * (number // 2 % 2))
        w, h = (int(side) for side in rng.integers(12, 19, 2))
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number // 4 + 1,
                "category_id": number % 3 + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [polygon],
            }
        )
    return {
        "images": [
            {"id": i, "file_name": f"sub/{i}.png", "height": HEIGHT, "width": WIDTH}
            for i in range(1, 7)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": n} for i, n in enumerate(("cat", "dog", "cow"), 1)],
    }


def mixed_file() -> Content:
    """Three images and every kind of segmentation."""
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    runs = [10 * HEIGHT, 20 * HEIGHT, 34 * HEIGHT]
    segmentations = [
        [[10, 10, 40, 12, 25, 40]],
        [square, [40, 20, 50, 20, 50, 30]],
        square,
        {"size": [HEIGHT, WIDTH], "counts": runs},
        {
            "size": [HEIGHT, WIDTH],
            "counts": "Zn0d0l000000000AYO5g0KYO5g0KYO5g0KYO5g0KYO5g0:000000000000000000fS1",
        },
        None,
        [],
    ]
    boxes = [[10, 10, 30, 30], [10, 10, 40, 20], [10, 10, 20, 20], [10, 0, 20, 48]]
    boxes += [[20, 10, 20, 20], [10, 10, 30, 30], [10, 10, 30, 30]]
    return {
        "info": {"year": 2026},
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(("a.png", "a b/ü.png", "c.jpg"), 7)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": 7 + number % 3,
                "category_id": (3, 90)[number % 2],
                "bbox": boxes[number],
                "area": 900,
                "iscrowd": int(number == 3),
                "segmentation": segmentation,
            }
            for number, segmentation in enumerate(segmentations)
        ],
        "categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}],
    }


def prepare(folder: Path) -> None:
    """Writes the images of both files, no two of them alike."""
    rng = np.random.default_rng(1)
    for content in (whole_file(), mixed_file()):
        for image in content["images"]:
            path = folder / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(path)


# -- known damage ----------------------------------------------------------------------------------

Change = Callable[[np.random.Generator, Content], Content | bytes | None]
DAMAGES: dict[str, tuple[Change, bool]] = {}  # name -> the change, whether it is harmless


def _damage(harmless: bool = False) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        DAMAGES[change.__name__.strip("_")] = change, harmless
        return change

    return register


def _each(change: Callable[[Content], Any]) -> Change:
    """A change of annotations: in half of the cases of all of them, else of some."""

    def changed(rng: np.random.Generator, content: Content) -> None:
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.05, 0.95)
        chosen = [a for a in content["annotations"] if rng.random() < share]
        for annotation in chosen or content["annotations"][:1]:
            change(annotation)

    return changed


def _points(annotation: Content, change: Callable[[float, float], tuple[float, float]]) -> None:
    (polygon,) = annotation["segmentation"]
    pairs = zip(polygon[::2], polygon[1::2], strict=True)
    annotation["segmentation"] = [[value for pair in pairs for value in change(*pair)]]


def _scaled(x: float, y: float) -> tuple[float, float]:
    return x / WIDTH, y / HEIGHT


def _set(name: str, value: Callable[[Content], Any]) -> Callable[[Content], None]:
    return lambda annotation: annotation.update({name: value(annotation)})


def _corners(a: Content) -> list[float]:
    x, y, w, h = a["bbox"]
    return [x, y, x + w, y + h]


def _pairs(a: Content) -> list[Any]:
    (p,) = a["segmentation"]
    return [[list(pair) for pair in zip(p[::2], p[1::2], strict=True)]]


def _rle(a: Content) -> Content:
    found = rle_ops.merge(rle_ops.frPyObjects(a["segmentation"], HEIGHT, WIDTH))
    return {"size": [HEIGHT, WIDTH], "counts": found["counts"].decode()}


for _name, _change, _harmless in (
    ("polygons as fractions", lambda a: _points(a, _scaled), False),
    ("polygons as (y, x)", lambda a: _points(a, lambda x, y: (y, x)), False),
    ("polygons of a doubled image", lambda a: _points(a, lambda x, y: (2 * x, 2 * y)), False),
    ("polygons moved", lambda a: _points(a, lambda x, y: (x + 15, y)), False),
    ("polygons as pairs", _set("segmentation", _pairs), False),
    ("polygons of a point", lambda a: _points(a, lambda x, y: (5.2, 5.2)), False),
    ("flat polygons", _set("segmentation", lambda a: a["segmentation"][0]), False),
    ("no polygons", _set("segmentation", lambda a: []), False),
    (
        "masks of another size",
        _set("segmentation", lambda a: _rle(a) | {"size": [WIDTH, HEIGHT]}),
        False,
    ),
    (
        "masks without a pixel",
        _set("segmentation", lambda a: {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}),
        False,
    ),
    (
        "bytes of Python as masks",
        _set("segmentation", lambda a: _rle(a) | {"counts": str(_rle(a)["counts"].encode())}),
        False,
    ),
    ("boxes of zeros", _set("bbox", lambda a: [0, 0, 0, 0]), False),
    ("boxes that are null", _set("bbox", lambda a: None), False),
    ("boxes as corners", _set("bbox", _corners), False),
    (
        "boxes as fractions",
        _set("bbox", lambda a: [a["bbox"][i] / (WIDTH, HEIGHT)[i % 2] for i in range(4)]),
        False,
    ),
    ("boxes moved", _set("bbox", lambda a: [a["bbox"][0] + 20, *a["bbox"][1:]]), False),
    ("boxes of NaN", _set("bbox", lambda a: [float("nan")] * 4), False),
    ("crowds", _set("iscrowd", lambda a: 1), False),
    ("image ids of none", _set("image_id", lambda a: a["image_id"] + 100), False),
    ("ids as text", _set("image_id", lambda a: str(a["image_id"])), True),
    ("category ids as fractions", _set("category_id", lambda a: float(a["category_id"])), True),
    ("masks as RLE", _set("segmentation", _rle), True),
    (
        "closed polygons",
        _set("segmentation", lambda a: [a["segmentation"][0] + a["segmentation"][0][:2]]),
        True,
    ),
    (
        "polygons the other way round",
        _set("segmentation", lambda a: [[v for pair in reversed(_pairs(a)[0]) for v in pair]]),
        True,
    ),
    ("more fields", _set("attributes", lambda a: {"deep": [{"er": None}]}), True),
    ("no area", lambda a: a.pop("area"), True),
    ("no iscrowd", lambda a: a.pop("iscrowd"), True),
    ("iscrowd as a truth value", _set("iscrowd", lambda a: False), True),
):
    DAMAGES[_name] = _each(_change), _harmless


@_damage()
def _category_ids_from_0(rng: np.random.Generator, content: Content) -> None:
    for annotation in content["annotations"]:
        annotation["category_id"] -= 1


@_damage()
def _an_image_twice(rng: np.random.Generator, content: Content) -> None:
    image = content["images"][rng.integers(6)]
    content["images"].append(image | {"id": 99})
    content["annotations"].append(content["annotations"][0] | {"id": 99, "image_id": 99})


@_damage()
def _an_annotation_twice(rng: np.random.Generator, content: Content) -> None:
    again = content["annotations"][rng.integers(24)] | {"id": 99}
    content["annotations"].append(again)


@_damage()
def _an_id_twice(rng: np.random.Generator, content: Content) -> None:
    section = content[("images", "annotations", "categories")[rng.integers(3)]]
    section[1]["id"] = section[0]["id"]


@_damage()
def _a_class_twice(rng: np.random.Generator, content: Content) -> None:
    content["categories"][1]["name"] = content["categories"][0]["name"]


@_damage()
def _sizes_of_others(rng: np.random.Generator, content: Content) -> None:
    for image in content["images"]:
        image |= {"height": image["width"], "width": image["height"]}


@_damage()
def _sizes_missing(rng: np.random.Generator, content: Content) -> None:
    for image in content["images"]:
        del image["height"], image["width"]


@_damage()
def _names_of_another_machine(rng: np.random.Generator, content: Content) -> None:
    start = ("C:\\data\\", "/home/me/", "..\\", "./", "sub/../")[rng.integers(5)]
    for image in content["images"]:
        image["file_name"] = start + image["file_name"]


@_damage()
def _a_key_twice(rng: np.random.Generator, content: Content) -> bytes:
    text = json.dumps(content)
    key = ('"image_id": ', '"bbox": ', '"category_id": ')[rng.integers(3)]
    value = '[1, 1, 5, 5], "bbox": ' if "bbox" in key else f"2, {key}"
    return text.replace(key, f"{key}{value}", int(rng.integers(1, 9))).encode()


@_damage()
def _cut_off(rng: np.random.Generator, content: Content) -> bytes:
    text = json.dumps(content).encode()
    return text[: rng.integers(len(text))]


@_damage()
def _zeros_at_the_end(rng: np.random.Generator, content: Content) -> bytes:
    text = json.dumps(content).encode()
    at = int(rng.integers(len(text)))
    return text[:at] + bytes(len(text) - at)


@_damage()
def _nested_deeply(rng: np.random.Generator, content: Content) -> bytes:
    deep = "[" * 200_000 + "]" * 200_000
    return json.dumps(content)[:-1].encode() + f', "more": {deep}}}'.encode()


@_damage()
def _a_huge_integer(rng: np.random.Generator, content: Content) -> bytes:
    digits = "1" * int(rng.integers(20, 6000))
    name = ("id", "area", "iscrowd", "category_id")[rng.integers(4)]
    return json.dumps(content).replace(f'"{name}": ', f'"{name}": {digits}', 1).encode()


@_damage(harmless=True)
def _a_byte_order_mark(rng: np.random.Generator, content: Content) -> bytes:
    return json.dumps(content).encode("utf-8-sig")


@_damage(harmless=True)
def _indented(rng: np.random.Generator, content: Content) -> bytes:
    return json.dumps(content, indent=int(rng.integers(1, 9))).encode() + b"\r\n \n"


@_damage(harmless=True)
def _shuffled(rng: np.random.Generator, content: Content) -> None:
    for section in ("images", "annotations", "categories"):
        rng.shuffle(content[section])
