"""What a recipe needs to know of a checked data set."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.coco import CocoDataset
from mrcnn_jax.data.transforms import resize_plan

SMALL = 32**2  # COCO's small objects: area in pixels under it
SIDES = (8, 16, 32, 64, 128, 256, 512)  # px on the canvas, of the histogram


def summary(dataset: CocoDataset, data: DataConfig) -> dict[str, Any]:
    """The report, and what a recipe needs to know: JSON only."""
    plans = [resize_plan(image.height, image.width, data) for image in dataset.images]
    objects = [
        (record, plan)
        for image, plan in zip(dataset.images, plans, strict=True)
        for record in image.objects
        if not record.iscrowd
    ]
    counts = [sum(not record.iscrowd for record in image.objects) for image in dataset.images]
    by_label = Counter(record.label for record, _ in objects)
    by_size = Counter(f"{image.height} x {image.width}" for image in dataset.images)
    areas = np.array([record.area for record, _ in objects])
    magnified = np.array([plan.scale[0] * plan.scale[1] for _, plan in objects])
    boxes = np.array([record.box for record, _ in objects]).reshape(-1, 4)
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * magnified)
    histogram = np.bincount(np.searchsorted(SIDES, sides, side="right"), minlength=len(SIDES) + 1)
    names = [
        f"under {SIDES[0]}",
        *(f"{low} to {high}" for low, high in itertools.pairwise(SIDES)),
        f"from {SIDES[-1]}",
    ]
    used = Counter(plan.canvas for plan in plans)
    return {
        **dataset.report.to_dict(),
        "objects_by_class": {
            name: by_label[label] for label, name in enumerate(dataset.class_names, 1)
        },
        "objects_by_canvas_side": dict(zip(names, histogram.tolist(), strict=True)),
        "small_objects_share": float((areas < SMALL).mean()) if objects else 0.0,
        "small_objects_share_on_canvas": float((areas * magnified < SMALL).mean())
        if objects
        else 0.0,
        "objects_without_mask": sum(record.rle is None for record, _ in objects),
        "max_objects_per_image": max(counts),
        "max_objects_limit": data.max_objects,
        "objects_over_limit": sum(max(count - data.max_objects, 0) for count in counts),
        "images_over_limit": sum(count > data.max_objects for count in counts),
        "images_by_size": dict(by_size.most_common()),
        "images_by_canvas": {
            f"{h} x {w}": used[i] for i, (h, w) in enumerate(data.canvases) if used[i]
        },
        "images_without_objects": counts.count(0),
    }


def summary_lines(dataset: CocoDataset, found: dict[str, Any]) -> list[str]:
    """`summary` for people."""

    def listed(counts: dict[str, int], limit: int = 8) -> str:
        more = f", and {len(counts) - limit} others" if len(counts) > limit else ""
        return ", ".join(f"{name}: {count}" for name, count in list(counts.items())[:limit]) + more

    shares = found["small_objects_share"], found["small_objects_share_on_canvas"]
    return [
        *dataset.report.lines(),
        f"objects a class: {listed(found['objects_by_class'], 100)}",
        f"objects by size (square root of the box's area on the canvas, px): {listed(found['objects_by_canvas_side'])}",
        f"small objects (area under 32 x 32 px): {shares[0]:.1%} in the images, {shares[1]:.1%} on the canvas",
        f"objects without a mask: {found['objects_without_mask']}",
        f"largest count of objects in an image: {found['max_objects_per_image']}; data.max_objects = {found['max_objects_limit']} "
        f"cuts {found['objects_over_limit']} in {found['images_over_limit']} images",
        f"images by height x width: {listed(found['images_by_size'])}",
        f"images by canvas: {listed(found['images_by_canvas'])}",
        f"images without objects: {found['images_without_objects']}",
    ]
