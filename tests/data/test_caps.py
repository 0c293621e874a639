"""Limits of a config that images run into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, RPNConfig
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.caps import caps
from mrcnn_jax.data.records import Category, CocoDataset, ImageRecord, ObjectRecord
from mrcnn_jax.data.report import Report


def dataset(*counts: tuple[int, int]) -> CocoDataset:
    """Images with so many objects and crowds."""
    thing = ObjectRecord(1, 1, (0.0, 0.0, 4.0, 4.0), None, False, 16.0)
    images = tuple(
        ImageRecord(i, f"{i}.png", 8, 8, (thing,) * n + (replace(thing, iscrowd=True),) * crowds)
        for i, (n, crowds) in enumerate(counts)
    )
    return CocoDataset((Category(1, "a"),), images, Report(), Path("a.json"), Path("i"), 1)


MODEL = ModelConfig(
    rpn=RPNConfig(proposals=20, train_proposals=30),
    box_head=BoxHeadConfig(detections=40),
    mask_head=MaskHeadConfig(samples=50),
)
DATA = DataConfig(max_objects=60, max_ignored=2)


@pytest.mark.parametrize(
    ("objects", "fields"),
    [
        (20, []),
        (21, ["model.rpn.proposals"]),
        (31, ["model.rpn.proposals", "model.rpn.train_proposals"]),
        (41, ["model.rpn.proposals", "model.rpn.train_proposals", "model.box_head.detections"]),
        (
            61,
            [
                "data.max_objects",
                "model.rpn.proposals",
                "model.rpn.train_proposals",
                "model.box_head.detections",
                "model.mask_head.samples",
            ],
        ),
    ],
)
def test_every_limit_that_is_exceeded(objects: int, fields: list[str]) -> None:
    assert [cap.field for cap in caps(dataset((objects, 0), (3, 2)), DATA, MODEL)] == fields


def test_samples_drawn_anew_in_each_step_are_no_limit() -> None:
    """Of the box head's samples, masks train on some; on others in the next step."""
    of_box_head = replace(MODEL.mask_head, train_on="box_samples")
    found = caps(dataset((61, 0)), DATA, replace(MODEL, mask_head=of_box_head))
    assert "model.mask_head.samples" not in [cap.field for cap in found]


def test_the_field_the_images_and_the_most() -> None:
    (cap,) = caps(dataset((61, 0), (300, 0), (5, 2)), DATA)
    assert cap.line() == (
        "data.max_objects = 60: images with more objects: 2 (up to 300 in one): the smallest are "
        "not trained on; set it to 300 or more (0, 1)"
    )
    (cap,) = caps(dataset((0, 3)), DATA)
    assert (cap.field, cap.limit, cap.images, cap.most) == ("data.max_ignored", 2, 1, 3)
    assert "more crowds" in cap.line()
    (cap,) = caps(dataset(*12 * [(61, 0)]), DATA)
    assert cap.line().endswith("(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)")
