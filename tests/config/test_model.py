"""Options of the network that make no sense."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import MaskHeadConfig, PointRendConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ResNetConfig(width=0), "model.resnet.width"),
        (lambda: ResNetConfig(norm_epsilon=-1.0), "model.resnet.norm_epsilon"),
        (lambda: RPNConfig(scales=()), "model.rpn.scales"),
        (
            lambda: ModelConfig(rpn=RPNConfig(scales=(32, 64))),
            "model.rpn.scales",
        ),  # one scale a level
        (lambda: RPNConfig(convs=2), "model.rpn.convs"),
        (lambda: RPNConfig(train_proposals=0), "model.rpn.train_proposals"),
        (lambda: RoIConfig(sampling_ratio=-1), "model.roi.sampling_ratio"),
        (lambda: RoIConfig(max_sampling_ratio=0), "model.roi.max_sampling_ratio"),
        (
            lambda: ModelConfig(backbone="c4", mask_head=MaskHeadConfig(refine=PointRendConfig(1))),
            "model.mask_head.refine.steps: the C4",
        ),
        (lambda: ModelConfig(fpn_norm="group"), "model.fpn_norm: group norm"),
        (lambda: RPNConfig(ratios=()), "model.rpn.ratios"),
        (lambda: RPNConfig(negative_iou=0.8), "model.rpn.negative_iou"),
        (lambda: RPNConfig(positive_fraction=0.0), "model.rpn.positive_fraction"),
        (lambda: RPNConfig(proposals=0), "model.rpn.proposals"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(make: Callable[[], Any], field: str) -> None:
    """In one line that begins with the field."""
    with pytest.raises(ConfigError, match=rf"\A{re.escape(field)}.*\Z"):
        make()
