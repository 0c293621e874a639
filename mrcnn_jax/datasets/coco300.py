"""coco300, the data set of this project's real-image figures, made from COCO 2017.

300 training and 114 validation images (coco300_ids.json) at a short side of 300 pixels; vehicles
(1), persons (2) and animals (3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.json_values import read_json
from mrcnn_jax.output import write_file
from mrcnn_jax.pixels.encode import write_image
from mrcnn_jax.pixels.rle import encoded

CLASSES = {"vehicle": 1, "person": 2, "animal": 3}  # COCO's supercategories
SHORT_SIDE = 300
JPEG_QUALITY = 92


def write_coco300(coco: Path, out: Path) -> None:
    """Writes the data set's folder, annotations last, and prints a line per split.

    Args:
        coco: COCO 2017 with annotations/instances_{train,val}2017.json, train2017/ and val2017/.
        out: the folder: images/ and annotations/instances_{train,val}.json.

    Raises:
        ConfigError: a file or an image is missing; names it.
        OSError: a file cannot be written; has its name.
    """
    images: dict[int, tuple[Path, dict[str, Any]]] = {}
    annotations: dict[int, list[dict[str, Any]]] = {}
    for split in ("train2017", "val2017"):
        path = coco / "annotations" / f"instances_{split}.json"
        content = read_json(path)
        try:
            groups = {c["id"]: c["supercategory"] for c in content["categories"]}
            kept = {number: CLASSES[name] for number, name in groups.items() if name in CLASSES}
            images |= {
                image["id"]: (coco / split / image["file_name"], image)
                for image in content["images"]
            }
            for annotation in content["annotations"]:
                if annotation["category_id"] in kept:
                    mine = annotation | {"category_id": kept[annotation["category_id"]]}
                    annotations.setdefault(annotation["image_id"], []).append(mine)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not COCO 2017's file of that name: {error}") from None
    chosen: dict[str, list[int]] = read_json(Path(__file__).with_name("coco300_ids.json"))
    missing = [number for numbers in chosen.values() for number in numbers if number not in images]
    if missing:
        raise ConfigError(
            f"{coco}: image {missing[0]} is not in its annotation files "
            f"({len(missing)} missing in all)"
        )

    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    categories = [
        {"id": number, "name": name, "supercategory": name} for name, number in CLASSES.items()
    ]
    results = {}
    for split, numbers in chosen.items():
        found = [
            _smaller(*images[number], annotations.get(number, []), out / "images")
            for number in numbers
        ]
        results[split] = {
            "images": [image for image, _ in found],
            "annotations": [annotation for _, mine in found for annotation in mine],
            "categories": categories,
        }
    for split, result in results.items():
        write_file(out / "annotations" / f"instances_{split}.json", json.dumps(result))
        print(f"{split}: {len(result['images'])} images, {len(result['annotations'])} annotations")


def _smaller(
    path: Path, image: dict[str, Any], annotations: list[dict[str, Any]], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An image, written to `folder`, and its annotations at SHORT_SIDE."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ConfigError(f"{path}: missing, or not an image")
    height, width = image["height"], image["width"]
    factor = SHORT_SIDE / min(height, width)
    size = round(width * factor), round(height * factor)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    write_image(folder / image["file_name"], small[..., ::-1], quality=JPEG_QUALITY)
    x, y = size[0] / width, size[1] / height
    smaller = [
        {name: annotation[name] for name in ("id", "image_id", "category_id", "iscrowd")}
        | {
            "area": round(annotation["area"] * x * y, 2),
            "bbox": _scaled(annotation["bbox"], (x, y)),
            "segmentation": _segmentation(annotation["segmentation"], size, (x, y)),
        }
        for annotation in annotations
    ]
    return image | {"width": size[0], "height": size[1]}, smaller


def _segmentation(segmentation: Any, size: tuple[int, int], scale: tuple[float, float]) -> Any:
    """Scaled polygons; or run lengths (crowds) of the mask resized to `size` and cut at .5."""
    if isinstance(segmentation, list):
        return [_scaled(polygon, scale) for polygon in segmentation]
    mask = rle_ops.decode(rle_ops.frPyObjects(segmentation, *segmentation["size"]))
    resized = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return encoded([resized >= 0.5])[0]


def _scaled(values: list[float], scale: tuple[float, float]) -> list[float]:
    """x, y, x, y, ... scaled by `scale` (x, y) and rounded to a hundredth of a pixel."""
    return [round(value * scale[i % 2], 2) for i, value in enumerate(values)]
