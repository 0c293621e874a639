"""Joint training on coco300 for benchmarks/accuracy_vs_torchvision.py: what both sides share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sides

from mrcnn_jax.config.files import load_config_file, resolve_paths
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig
from mrcnn_jax.output import whole_file

CLASSES = 3
STAGE = "joint"
WARMUP = 50  # steps, at most a tenth of all
DECAY_AT = 0.75  # share of the steps; without a decay AP swings by as much as the sides differ
ALL_PROPOSALS = 100  # where all of them are samples
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Plan:
    """The training of both sides; written once per --workdir and never changed."""

    asked: dict[str, Any]
    """Options that it was made from."""
    annotations: str
    epochs: int
    steps: int
    """Steps of all epochs."""
    rates: list[float]
    """Learning rate of each step."""


def whole_epochs(canvases: Sequence[int], batch_size: int, steps: int) -> tuple[int, int, int]:
    """Rounds `steps` to whole epochs; below one epoch, to the first images that make as many.

    Returns:
        (epochs, images, steps).
    """
    from mrcnn_jax.data.order import plan_epoch

    def length(images: int) -> int:
        return len(plan_epoch(canvases[:images], batch_size, seed=0, epoch=0, shuffle=False))

    images = len(canvases)
    epochs = max(1, round(steps / length(images)))
    while images > 1 and epochs == 1 and length(images) > steps:
        images -= 1
    return epochs, images, epochs * length(images)


def subset(
    content: Mapping[str, Any], image_ids: Collection[int], *, crowds: bool
) -> dict[str, Any]:
    """Returns a COCO file with only these images and their annotations, with or without crowds."""
    return dict(content) | {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [
            a
            for a in content["annotations"]
            if a["image_id"] in image_ids and (crowds or not a.get("iscrowd"))
        ],
    }


def run_config(
    arguments: argparse.Namespace, *, annotations: str | None, epochs: int, steps: int
) -> Config:
    """Returns the config of our run: torchvision's constants and trained parameters, on coco300."""
    config = load_config_file(sides.ROOT / "configs" / "torchvision_coco.py")
    data = DataConfig(
        folder="coco300",
        short_side=300,
        long_side=480,
        canvases=((320, 480), (480, 320)),
        max_objects=32,  # the most that an image has is 24
        keep_empty=False,
        cache=str(arguments.workdir.absolute() / "data"),
    )
    if annotations is not None:
        data = replace(data, train_annotations=annotations)
    rpn, box_head, mask_head = config.model.rpn, config.model.box_head, config.model.mask_head
    box_head = replace(box_head, samples=arguments.samples)
    mask_head = replace(mask_head, samples=arguments.samples // 4)
    if arguments.all_samples:
        count = ALL_PROPOSALS + data.max_objects
        rpn = replace(rpn, samples=10**5, positive_fraction=1.0, train_proposals=ALL_PROPOSALS)
        box_head = replace(box_head, samples=count, positive_fraction=1.0)
        mask_head = replace(mask_head, samples=count)
    optimizer = OptimizerConfig(
        name="sgd",
        learning_rate=0.005,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        milestones=(DECAY_AT,),
        warmup_steps=WARMUP,
    )
    return resolve_paths(
        replace(
            config,
            name="accuracy_vs_torchvision",
            data=data,
            model=replace(
                config.model, num_classes=CLASSES, rpn=rpn, box_head=box_head, mask_head=mask_head
            ),
            stages=tuple(
                replace(stage, epochs=epochs, optimizer=optimizer) for stage in config.stages
            ),
            init_from="weights/pqf_resnet50_large.npz",
            seed=arguments.seed,
            save_every_steps=SAVE_EVERY,
            validate_every_epochs=epochs,
        )
    )


def prepare(arguments: argparse.Namespace) -> None:
    """Writes what the sides share: the plan, and the seed's initial weights by our paths."""
    import jax
    from flax.traverse_util import flatten_dict

    from mrcnn_jax.models.initialise import initialise
    from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
    from mrcnn_jax.training.initial import initial_variables
    from mrcnn_jax.training.optimizer import learning_rate

    if not (arguments.workdir / "plan.json").exists():
        config = run_config(arguments, annotations=None, epochs=1, steps=arguments.steps)
        split, _ = splits(config)
        epochs, images, steps = whole_epochs(
            [plan.canvas for plan in split.plans], config.data.batch_size, arguments.steps
        )
        annotations = Path(config.data.train_annotations)
        if images < len(split.plans) or arguments.without_crowds:
            kept = {image.id for image in split.dataset.images[:images]}
            content = subset(
                json.loads(annotations.read_text()), kept, crowds=not arguments.without_crowds
            )
            annotations = arguments.workdir.absolute() / "train.json"
            annotations.write_text(json.dumps(content))
        (stage,) = run_config(
            arguments, annotations=str(annotations), epochs=epochs, steps=steps
        ).stages
        rates = [float(learning_rate(stage, step, steps)) for step in range(steps)]
        plan = Plan(asked(arguments), str(annotations), epochs, steps, rates)
        with whole_file(arguments.workdir / "plan.json") as part:
            part.write_text(json.dumps(plan.__dict__))
    _, config = planned_config(arguments)
    model = MaskRCNN(config.model)
    variables = initialise(model, example_batch(config.data.canvases[0]), seed=config.seed)
    variables = flatten_dict(variables, sep="/") | flatten_dict(
        initial_variables(variables, config)[0], sep="/"
    )
    path = initial_weights(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, **jax.device_get(variables))


def planned_config(arguments: argparse.Namespace) -> tuple[Plan, Config]:
    """Returns the plan in --workdir, and the config of our run that follows it."""
    plan = Plan(**json.loads((arguments.workdir / "plan.json").read_text()))
    return plan, run_config(
        arguments, annotations=plan.annotations, epochs=plan.epochs, steps=plan.steps
    )


def folder_of(arguments: argparse.Namespace, seed: int, side: str) -> Path:
    return Path(arguments.workdir) / f"seed{seed}" / side


def initial_weights(arguments: argparse.Namespace) -> Path:
    return Path(arguments.workdir) / f"seed{arguments.seed}" / "initial.npz"


def splits(config: Config) -> tuple[Any, Any]:
    """Opens the training and the validation images as a run does."""
    from mrcnn_jax.data.loader import open_split
    from mrcnn_jax.data.reading import read_coco

    data = config.data
    assert data.cache is not None
    opened = []
    for name in ("train", "val"):
        annotations = Path(getattr(data, f"{name}_annotations"))
        dataset = read_coco(annotations, Path(getattr(data, f"{name}_images")), data)
        opened.append(open_split(name, dataset, cache=Path(data.cache), data=data))
    return opened[0], opened[1]


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that define the training."""
    return {
        name: getattr(arguments, name)
        for name in ("steps", "samples", "all_samples", "without_crowds")
    }
