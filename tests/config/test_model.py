"""Options of the network that make no sense."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig, PointRendConfig
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig, ResNetConfig, RoIConfig, RPNConfig


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ResNetConfig(width=0), "model.resnet.width"),
        (lambda: ResNetConfig(norm_epsilon=-1.0), "model.resnet.norm_epsilon"),
        (lambda: ConvNeXtConfig(blocks=(3, 3, 0, 3)), "model.convnext.blocks"),
        (lambda: ConvNeXtConfig(channels=(0, 1, 1, 1)), "model.convnext.channels"),
        (lambda: ConvNeXtConfig(layer_scale=-1.0), "model.convnext.layer_scale"),
        (lambda: ConvNeXtConfig(drop_path=1.0), "model.convnext.drop_path"),
        (
            lambda: ModelConfig(trunk="convnext", backbone="c4"),
            "model.trunk: convnext needs model.backbone fpn",
        ),
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
        (lambda: RPNConfig(samples=1, positive_fraction=0.5), "model.rpn.samples"),
        (lambda: RPNConfig(positive_iou=0.0, negative_iou=0.0), "model.rpn.positive_iou"),
        (lambda: RPNConfig(smooth_l1_beta=math.inf), "model.rpn.smooth_l1_beta"),
        (lambda: BoxHeadConfig(samples=3, positive_fraction=0.25), "model.box_head.samples"),
        (lambda: BoxHeadConfig(samples=0), "model.box_head.samples"),
        (lambda: RPNConfig(proposals=0), "model.rpn.proposals"),
        (lambda: RPNConfig(nms_iou=70), "model.rpn.nms_iou"),
        (lambda: RPNConfig(crowd_overlap=0.0), "model.rpn.crowd_overlap"),
        (lambda: RPNConfig(box_loss_weight=-1.0), "model.rpn.box_loss_weight"),
        (lambda: RPNConfig(objectness_loss_weight=math.nan), "model.rpn.objectness_loss_weight"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(make: Callable[[], Any], field: str) -> None:
    """In one line that begins with the field."""
    with pytest.raises(ConfigError, match=rf"\A{re.escape(field)}.*\Z"):
        make()


def test_the_trunk_has_a_name() -> None:
    tiny = ModelConfig(trunk="convnext")
    small = replace(tiny, convnext=ConvNeXtConfig(blocks=(3, 3, 27, 3)))
    other = replace(tiny, convnext=ConvNeXtConfig(channels=(8, 16, 32, 64)))
    names = [model.trunk_name for model in (ModelConfig(), tiny, small, other)]
    assert names == ["ResNet-50", "ConvNeXt-T", "ConvNeXt-S", "ConvNeXt"]


def test_live_norm_is_of_a_resnet_alone() -> None:
    live = ModelConfig(resnet=ResNetConfig(norm="live"))
    assert live.live_norm
    assert not replace(live, trunk="convnext").live_norm
    assert not ModelConfig().live_norm
