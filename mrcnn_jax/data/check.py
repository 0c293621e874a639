"""Checks a COCO-format data set before anything is trained on it.

    python -m mrcnn_jax.data.check --annotations x.json --images dir/ [--json]

Exit status 0 if the data set is usable, 2 (and one line) if not.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import tyro

from mrcnn_jax.config import ConfigError
from mrcnn_jax.data.coco import CocoDataset, read_coco


def summary(dataset: CocoDataset) -> dict[str, Any]:
    """The report, objects a class, images by size, and the largest count of objects in an image."""
    objects = [record for image in dataset.images for record in image.objects if not record.iscrowd]
    by_label = Counter(record.label for record in objects)
    by_size = Counter(f"{image.height} x {image.width}" for image in dataset.images)
    return {
        **dataset.report.to_dict(),
        "objects_by_class": {name: by_label[label] for label, name in enumerate(dataset.class_names, 1)},
        "images_by_size": dict(by_size.most_common()),
        "max_objects_per_image": max(sum(not record.iscrowd for record in image.objects) for image in dataset.images),
        "images_without_objects": sum(all(record.iscrowd for record in image.objects) for image in dataset.images),
        "objects_without_mask": sum(record.rle is None for record in objects),
    }


def _main(annotations: Path, images: Path, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Checks a COCO-format data set: exit status 0 if it is usable, 2 if not.

    Args:
        annotations: The annotation file.
        images: The folder that its file names are relative to.
        as_json: Print one JSON object instead of lines.
    """
    try:
        dataset = read_coco(annotations, images)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    found = summary(dataset)
    if as_json:
        print(json.dumps(found))
        return
    sizes = list(found["images_by_size"].items())
    others = f", and {len(sizes) - 8} other sizes" if len(sizes) > 8 else ""
    print("\n".join(dataset.report.lines()))
    print("objects a class: " + ", ".join(f"{name} {count}" for name, count in found["objects_by_class"].items()))
    print("images by height x width: " + ", ".join(f"{size}: {count}" for size, count in sizes[:8]) + others)
    print(f"largest count of objects in an image: {found['max_objects_per_image']}")
    print(f"images without objects: {found['images_without_objects']}; objects without a mask: {found['objects_without_mask']}")


if __name__ == "__main__":
    tyro.cli(_main)
