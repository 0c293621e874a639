"""The limits of a config that a data set's images run into, each by its field."""

from __future__ import annotations

from dataclasses import dataclass

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import FIRST_IDS


@dataclass(frozen=True)
class Cap:
    """A limit that some images exceed."""

    field: str
    """Its field in the config."""
    limit: int
    images: int
    """How many images exceed it."""
    most: int
    """The largest count in an image."""
    first_ids: tuple[int, ...]
    """The first images that exceed it."""
    what: str
    """What is counted."""
    then: str
    """What becomes of the rest."""

    def line(self) -> str:
        """For people."""
        ids = ", ".join(map(str, self.first_ids)) + (", ..." * (self.images > FIRST_IDS))
        return (
            f"{self.field} = {self.limit}: images with more {self.what}: {self.images} (up to "
            f"{self.most} in one): {self.then}; set it to {self.most} or more ({ids})"
        )


def found_limit(limit: int, images: int, min_score: float, what: str = "images") -> str:
    """For people: the limit of a network that found as many objects as it can.

    Args:
        limit: its most detections per image.
        images: how many images have that many.
        min_score: the least score of all of them.
        what: "images", or the "tiles" of images.
    """
    return (
        f"model.box_head.detections = {limit}: {what} with as many objects of score {min_score:g} "
        f"or more: {images}: no more can be found; train with a larger one"
    )


def caps(dataset: CocoDataset, data: DataConfig, model: ModelConfig | None = None) -> list[Cap]:
    """List the limits that images exceed, those of the data before those of the network.

    Args:
        dataset: a checked data set.
        data: its limits.
        model: the limits of the network; None: they are left out.
    """
    crowds = [len(image.crowds) for image in dataset.images]
    objects = [len(image.objects) for image in dataset.images]
    smallest = "the smallest are not trained on"
    limits = [
        ("data.max_objects", data.max_objects, objects, smallest),
        ("data.max_ignored", data.max_ignored, crowds, "the smallest are taken for background"),
    ]
    if model is not None:
        rpn, fewer = model.rpn, "no more can be found"
        limits += [
            ("model.rpn.proposals", rpn.proposals, objects, fewer),
            (
                "model.rpn.train_proposals",
                rpn.train_proposals or rpn.proposals,
                [] if rpn.train_proposals is None else objects,
                "no more are proposed in training",
            ),
            ("model.box_head.detections", model.box_head.detections, objects, fewer),
            (
                "model.mask_head.samples",
                model.mask_head.samples,
                # Samples of the box head are drawn anew in each step.
                objects if model.mask_head.train_on != "box_samples" else [],
                "the mask head does not train on the rest",
            ),
        ]
    found = []
    for field, limit, counts, then in limits:
        over = [i.id for i, n in zip(dataset.images, counts, strict=False) if n > limit]
        if over:
            what = "crowds" if counts is crowds else "objects"
            ids = tuple(over[:FIRST_IDS])
            found.append(Cap(field, limit, len(over), max(counts), ids, what, then))
    return found
