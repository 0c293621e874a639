"""Options of the heads that make no sense."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import (
    BoxHeadConfig,
    DepthHeadConfig,
    MaskHeadConfig,
    MaskIoUHeadConfig,
    PointRendConfig,
)
from mrcnn_jax.config.model import ModelConfig


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: BoxHeadConfig(fcs=-1), "model.box_head.fcs"),
        (lambda: MaskHeadConfig(focal_alpha=0.0), "model.mask_head.focal_alpha"),
        (lambda: PointRendConfig(steps=5), "model.mask_head.refine.steps"),
        (lambda: PointRendConfig(points=0), "model.mask_head.refine.points"),
        (
            lambda: PointRendConfig(uncertain_fraction=1.5),
            "model.mask_head.refine.uncertain_fraction",
        ),
        (
            lambda: MaskHeadConfig(loss="focal", refine=PointRendConfig(steps=2)),
            "model.mask_head.refine.steps: needs",
        ),
        (
            lambda: MaskHeadConfig(loss="softmax", refine=PointRendConfig(steps=2)),
            "model.mask_head.refine.steps: needs",
        ),
        (lambda: BoxHeadConfig(detections=0), "model.box_head.detections"),
        (lambda: BoxHeadConfig(foreground_iou=50), "model.box_head.foreground_iou"),
        (lambda: BoxHeadConfig(nms_iou=math.nan), "model.box_head.nms_iou"),
        (lambda: BoxHeadConfig(score_threshold=5), "model.box_head.score_threshold"),
        (lambda: BoxHeadConfig(crowd_overlap=0.0), "model.box_head.crowd_overlap"),
        (lambda: BoxHeadConfig(class_loss_weight=-1.0), "model.box_head.class_loss_weight"),
        (lambda: BoxHeadConfig(box_loss_weight=math.inf), "model.box_head.box_loss_weight"),
        (lambda: MaskHeadConfig(match_iou=50), "model.mask_head.match_iou"),
        (lambda: MaskHeadConfig(loss_weight=-1.0), "model.mask_head.loss_weight"),
        (lambda: PointRendConfig(loss_weight=-1.0), "model.mask_head.refine.loss_weight"),
        (lambda: MaskIoUHeadConfig(loss_weight=math.nan), "model.mask_iou_head.loss_weight"),
        (lambda: DepthHeadConfig(loss_weight=-1.0), "model.depth_head.loss_weight"),
        (
            lambda: BoxHeadConfig(cascade=(0.6,)),
            "model.box_head.cascade: needs model.box_head.class_agnostic",
        ),
        (
            lambda: BoxHeadConfig(class_agnostic=True, cascade=(0.4, 0.7)),
            "model.box_head.cascade: (0.4, 0.7): must rise from model.box_head.foreground_iou, 0.4",
        ),
        (
            lambda: BoxHeadConfig(class_agnostic=True, cascade=(0.6, 1.0)),
            "model.box_head.cascade: (0.6, 1.0): must rise",
        ),
        (
            lambda: BoxHeadConfig(class_agnostic=True, cascade=(0.5, 0.6, 0.7)),
            "model.box_head.cascade: at most two",
        ),
        (
            lambda: BoxHeadConfig(cascade_loss_weights=(0.0, math.nan)),
            "model.box_head.cascade_loss_weights: must be at least 0",
        ),
        (
            lambda: ModelConfig(
                backbone="c4", box_head=BoxHeadConfig(class_agnostic=True, cascade=(0.6,))
            ),
            "model.box_head.cascade: needs model.backbone fpn",
        ),
    ],
)
def test_a_value_that_makes_no_sense_is_named(make: Callable[[], Any], field: str) -> None:
    """In one line that begins with the field."""
    with pytest.raises(ConfigError, match=rf"\A{re.escape(field)}.*\Z"):
        make()
