"""The training and the validation set of a run: read, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.copies import note_copies
from mrcnn_jax.data.depth_files import depth_source
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.output import listed


def read_splits(
    config: Config, read_before: Sequence[CocoDataset]
) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation file, with the same categories: as many as the model's.

    Args:
        config: with resolved paths.
        read_before: data sets that `read_coco` has read before; they are not read again.

    Raises:
        ConfigError: a file cannot be used, or not beside the other one or for this model.
    """
    data = config.data
    train_set = _data_set(config, "train", read_before, data.class_names)
    if len(train_set.categories) != config.model.num_classes:
        names = ", ".join(train_set.class_names)
        raise ConfigError(
            f"model.num_classes: {config.model.num_classes}, but {train_set.annotations_path} has "
            f"{len(train_set.categories)}: {names}"
        )
    train_set.refuse_without_objects()
    # data.class_names, by id, hold for the training file; the other one's ids may be in any order.
    val_set = align_categories(_data_set(config, "val", read_before, ()), train_set)
    refuse_without_depth(config, train_set, val_set)
    note_copies(train_set, val_set)
    return train_set, val_set


def align_categories(val_set: CocoDataset, train_set: CocoDataset) -> CocoDataset:
    """The validation set with the labels of the training set.

    Raises:
        ConfigError: its categories are not the same.
    """
    val_set = val_set.matched_to(categories_of(train_set), f"{train_set.annotations_path}")
    missing = [c.name for c in train_set.categories if c not in val_set.categories]
    if missing:
        raise ConfigError(
            f"{val_set.annotations_path}: 'categories' lacks {', '.join(map(repr, missing))} of "
            f"{train_set.annotations_path} (it may be without annotations there)"
        )
    return val_set


def _data_set(
    config: Config,
    split: Literal["train", "val"],
    read_before: Sequence[CocoDataset],
    class_names: tuple[str, ...],
) -> CocoDataset:
    """The data set of a split, read unless it was read before as it would be now."""
    names = (getattr(config.data, f"{split}_{what}") for what in ("annotations", "images"))
    annotations, images = map(Path, names)
    depth = depth_source(config, split)
    for dataset in read_before:
        same = (dataset.annotations_path, dataset.images_dir) == (annotations, images)
        if same and not depth and class_names in ((), dataset.class_names):
            return dataset
    return read_coco(
        annotations, images, replace(config.data, class_names=class_names), depth=depth
    )


def refuse_without_depth(config: Config, train_set: CocoDataset, val_set: CocoDataset) -> None:
    """ConfigError if a stage has the loss depth, for which both data sets need depths."""
    if not any("depth" in stage.losses for stage in config.stages):
        return
    for dataset, name in ((train_set, "train_depth"), (val_set, "val_depth")):
        folder = getattr(config.data, name)
        why = None
        if not dataset.has_depth and folder is None:
            why = (
                f"none of its images has a depth_file: write these, or give data.{name}, a folder "
                "of depth maps with the images' names"
            )
        elif not dataset.has_depth:
            why = f"data.{name}: {folder} has no .png or .npy with the name of an image"
        elif dataset.depth is not None and dataset.depth.metres is None:
            why = f"not one pixel of its {dataset.depth.maps} depth maps is known"
        if why is not None:
            raise ConfigError(f"{dataset.annotations_path}: no depth for the loss depth: {why}")


def refuse_without_masks(
    config: Config, dataset: CocoDataset, began: Mapping[str, Collection[str]]
) -> None:
    """ConfigError if what is learnt of masks would stay random, for lack of them, in a new run.

    That is a RoI depth head, which learns in the boxes of objects with a mask, if no object has
    one, and the masks of a class, or their IoU, if none of its objects has one.

    Args:
        began: layers of each module that do not begin with random values.
    """
    losses = {loss for stage in config.stages for loss in stage.losses}
    model = config.model
    if "depth" in losses and model.depth_head.kind == "roi" and not dataset.has_masks:
        raise ConfigError(
            f"{dataset.annotations_path}: no depth for the loss depth: a head of the kind roi "
            "learns from objects with a mask, and there is none: --model.depth-head.kind dense "
            "needs none"
        )
    outputs = {"mask_head": "logits"}
    if "mask_iou" in losses:
        outputs["mask_iou_head"] = "ious"
    loaded = all(layer in began.get(module, ()) for module, layer in outputs.items())
    trained = losses & {"mask", "mask_iou"}
    if model.mask_head.class_agnostic or loaded or not (trained and dataset.has_masks):
        return
    objects = [o for image in dataset.images for o in image.objects]
    boxes = {o.label for o in objects} - {o.label for o in objects if o.rle is not None}
    if boxes:
        names = listed([dataset.class_names[label - 1] for label in sorted(boxes)])
        loss = "--model.mask-head.loss bce " if model.mask_head.loss == "softmax" else ""
        raise ConfigError(
            f"{dataset.annotations_path}: {names}: only boxes, no mask to learn from: "
            f"{loss}--model.mask-head.class-agnostic learns one mask for all classes"
        )


def categories_of(dataset: CocoDataset) -> tuple[tuple[int, str], ...]:
    return tuple((category.id, category.name) for category in dataset.categories)
