"""From a folder of images and annotations to a config for it, on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mrcnn_jax import parallel
from mrcnn_jax.choices.choose import choose
from mrcnn_jax.choices.devices import Device, devices_here
from mrcnn_jax.choices.recipes import Start
from mrcnn_jax.choices.table import Chosen
from mrcnn_jax.config.files import find_start
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.datasets.prepare import prepare
from mrcnn_jax.training.initial import better_start
from mrcnn_jax.weights.choice import Choice
from mrcnn_jax.weights.choice import choose as choose_weights
from mrcnn_jax.weights.origin import open_origin
from mrcnn_jax.weights.published import locate

BETTER: dict[Device, str] = {"cpu": "torchvision-resnet50-v2", "gpu": "torchvision-coco-v1"}


class Opening(NamedTuple):
    """What a new run is opened with."""

    config: Config
    """The chosen one, with what was given and what the weights fix."""
    weights: Choice | None
    data_sets: tuple[CocoDataset, CocoDataset]
    """Training and validation."""
    chosen: Chosen


def config_for(
    folder: Path,
    workdir: Path,
    given: Mapping[str, Any],
    *,
    init_from: str | None = None,
    weights: str | None = None,
    download: bool = False,
) -> Opening:
    """Chooses a config for a folder, and prints what was found there and on this machine.

    Of several processes each calls this; the first one writes.

    Args:
        folder: of the images and annotations.
        workdir: of the run, which has not begun; what is made of the folder is written to it.
        given: fields by dotted name, which are not chosen; `init_from` is not one of them.
        init_from: a run or a file to start from.
        weights: the same or a published name, in place of `init_from`; it sets its fields as well.
        download: fetch published weights.

    Raises:
        ConfigError: a user's mistake.
    """
    start, choice = None, None
    if weights is not None:
        path = parallel.in_turn(lambda: locate(str(weights), download=download)).resolve()
        init_from = str(path)
    if init_from is not None:
        path = find_start(init_from)
        origin = open_origin(path)
        if weights is not None:
            choice = choose_weights(path, origin)
            if given.get("init_without_classes") is False:
                choice = replace(choice, classes=0)  # the user knows that they are the same
        start = Start(
            init_from,
            origin.model,
            origin.class_names,
            origin.shrink,
            origin.presumed,
            has_heads=origin.has_heads,
        )
    parts = parallel.in_turn(lambda: prepare(folder, workdir))
    limits = DataConfig(max_pixels=given.get("data.max_pixels", DataConfig.max_pixels))
    train, val = (
        read_coco(part.annotations.resolve(), part.images.resolve(), limits) for part in parts
    )
    train.refuse_without_objects()
    devices = devices_here()
    if start is None and given.get("model.trunk") != "convnext":  # its own are named later
        print(better_start(BETTER[devices.kind], "training"))
    name = jax.devices()[0].device_kind
    print(f"device: {name if devices.count == 1 else f'{devices.count} x {name}'}")
    chosen = choose(train, val, devices, given, start=start, name=folder.resolve().name)
    config = chosen.config
    if choice is not None:
        config = choice.applied(config, given)
    return Opening(following_heads(config), choice, (train, val), chosen)
