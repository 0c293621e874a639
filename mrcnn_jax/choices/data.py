"""Chooses sides and canvases of images, and limits of their objects, for a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mrcnn_jax.choices.devices import Device
from mrcnn_jax.choices.fitting import MULTIPLE, choose_canvases
from mrcnn_jax.choices.table import Row
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.output import listed
from mrcnn_jax.pixels.geometry import resize_plan

SHORT_SIDE: dict[Device, int] = {"cpu": 320, "gpu": 800}
LONG_SIDE: dict[Device, int] = {"cpu": 640, "gpu": 1333}
WITHIN: dict[Device, float] = {"cpu": 0.75, "gpu": 0.95}  # of the images keep the short side
ENLARGED = 1.5  # at most, for nine images in ten
SMALLEST = 32  # px: of a short side


def choose_data(
    train: CocoDataset,
    val: CocoDataset,
    device: Device,
    recipe: Config,
    given: Mapping[str, Any],
) -> tuple[DataConfig, list[Row]]:
    """Chooses sides and canvases of the images, and limits of their objects.

    Args:
        train, val: the data sets, whose paths are those of the config.
        device: what trains.
        recipe: has the augmentation.
        given: fields by dotted name, which are not chosen.

    Raises:
        ConfigError: a value given cannot be used.
    """
    short_given, long_given, canvases_given = (
        given.get(f"data.{name}") for name in ("short_side", "long_side", "canvases")
    )
    if canvases_given is not None:
        DataConfig(short_side=1, long_side=1, canvases=canvases_given)  # refuses what is none
    sides = np.array([(i.height, i.width) for i in (*train.images, *val.images)])
    short, long = sides.min(1), sides.max(1)
    own, aspect = np.quantile(short, 0.1), np.quantile(long / short, WITHIN[device])
    most = min(SHORT_SIDE[device], long_given or SHORT_SIDE[device])
    short_side = int(np.clip(ENLARGED * own, SMALLEST, most))
    why = f"most on a {device.upper()}"
    if short_side < most:
        why = f"enlarges 9 images in 10 by at most {ENLARGED}; {SMALLEST} at least"
    if canvases_given is not None:
        short_side = min(short_side, *(min(canvas) for canvas in canvases_given))
        why = "as the canvases given"
    short_side = short_side if short_given is None else short_given
    long_side = min(MULTIPLE * round(short_side * aspect / MULTIPLE), LONG_SIDE[device])
    long_side = max(long_side, short_side)
    if canvases_given is not None:
        long_side = min(long_side, max(max(canvas) for canvas in canvases_given))
    long_side = long_side if long_given is None else long_given
    if not 0 < short_side <= long_side:  # before anything is computed from them
        raise ConfigError("data.short_side: must be in 1..data.long_side")
    resized = [
        resize_plan(height, width, short_side, long_side, [(long_side, long_side)]).resized
        for height, width in sides.tolist()
    ]
    canvases = canvases_given or choose_canvases(resized, short_side, long_side)
    most_objects = max(object_counts(train) + object_counts(val))
    pasted = most_objects if recipe.data.augment.copy_paste > 0 else 0
    crowds = [len(i.crowds) for i in (*train.images, *val.images)]
    data = DataConfig(
        root=None,
        train_annotations=str(train.annotations_path.resolve()),
        train_images=str(train.images_dir.resolve()),
        val_annotations=str(val.annotations_path.resolve()),
        val_images=str(val.images_dir.resolve()),
        class_names=train.class_names,
        short_side=short_side,
        long_side=long_side,
        canvases=canvases,
        max_objects=max(16, rounded(most_objects + pasted, 8)),
        max_ignored=max(20, rounded(max(crowds), 8)),
        augment=recipe.data.augment,
    )
    used = [
        canvases[resize_plan(height, width, short_side, long_side, canvases).canvas]
        for height, width in sides.tolist()
    ]
    padding = 1 - sum(h * w for h, w in resized) / sum(h * w for h, w in used)
    of_classes = ""
    for what, dataset in (("without objects", train), ("without objects in validation", val)):
        there = set().union(*(image.labels for image in dataset.images))
        there_by_name = {dataset.class_names[label - 1] for label in there}
        if without := [name for name in train.class_names if name not in there_by_name]:
            of_classes += f"; {what}: {listed(without, 5)}"
    return data, [
        Row(
            "classes",
            lambda c: f"{c.model.num_classes}: {listed(c.data.class_names, 5)}",
            f"categories of {train.annotations_path.name}{of_classes}",
        ),
        Row(
            "image sides, px",
            lambda c: f"short {c.data.short_side}, long {c.data.long_side}",
            f"{why}; {WITHIN[device]:.0%} are at most {aspect:.2f} : 1",
            ("--data.short-side", "--data.long-side"),
        ),
        Row(
            "canvases, px",
            lambda c: ", ".join(f"{h} x {w}" for h, w in c.data.canvases),
            f"the fewest pixels; {padding:.0%} are padding; each is compiled once",
            ("--data.canvases",),
        ),
        Row(
            "augmentation",
            lambda c: (
                f"flip {c.data.augment.flip:g}, scale "
                f"{c.data.augment.scale[0]:g}..{c.data.augment.scale[1]:g}"
            ),
            "flip 0 if left and right differ in meaning",
            ("--data.augment.flip", "--data.augment.scale"),
        ),
        Row(
            "most objects",
            lambda c: f"{c.data.max_objects}",
            f"an image has up to {most_objects}" + (", and as many are pasted" if pasted else ""),
            ("--data.max-objects",),
        ),
    ]


def object_counts(dataset: CocoDataset) -> list[int]:
    """Objects of each image."""
    return [len(image.objects) for image in dataset.images]


def rounded(count: int, multiple: int) -> int:
    """A count rounded up to a multiple."""
    return -(-count // multiple) * multiple
