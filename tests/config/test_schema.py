"""Options of a run that make no sense."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import BoxHeadConfig, DepthHeadConfig
from mrcnn_jax.config.model import ModelConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    DistributedConfig,
    Loss,
    OptimizerConfig,
    ParamGroup,
    StageConfig,
)


def stage(**changes: Any) -> StageConfig:
    return replace(tiny.get_config().stages[0], **changes)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: DataConfig(canvases=()), "data.canvases"),
        (lambda: DataConfig(canvases=((800, 1088), (1088, 810))), "data.canvases"),
        (
            lambda: DataConfig(canvases=((800, 1088),)),
            "data.canvases",
        ),  # a portrait image fits nowhere
        (lambda: DataConfig(short_side=1089), "data.short_side"),
        (lambda: DataConfig(batch_size=0), "data.batch_size"),
        (lambda: DataConfig(workers=-1), "data.workers"),
        (lambda: DataConfig(repeat_threshold=1.1), "data.repeat_threshold"),
        (lambda: AugmentConfig(flip=1.1), "data.augment.flip"),
        (lambda: AugmentConfig(brightness=-0.1), "data.augment.brightness"),
        (lambda: AugmentConfig(hue=0.6), "data.augment.hue"),
        (lambda: AugmentConfig(scale=(0.0, 1.0)), "data.augment.scale"),
        (lambda: AugmentConfig(scale=(1.5, 1.0)), "data.augment.scale"),
        (lambda: DataConfig(max_pixels=0), "data.max_pixels"),
        (lambda: DataConfig(depth_range=(0.0, 1.0)), "data.depth_range"),
        (lambda: DataConfig(depth_range=(1.0, 1.0)), "data.depth_range"),
        (lambda: DataConfig(depth_range=(1.0, float("inf"))), "data.depth_range"),
        (lambda: DataConfig(depth_range=(float("nan"), 1.0)), "data.depth_range"),
        (lambda: DataConfig(max_pixels=200_000_001), "data.max_pixels"),
        (lambda: ParamGroup("rpn/.*", -1.0), "stages: rpn/.*: lr_scale"),
        (lambda: ParamGroup("rpn/.*", float("nan")), "stages: rpn/.*: lr_scale"),
        (lambda: OptimizerConfig(batch_size=0), "optimizer.batch_size"),
        (lambda: OptimizerConfig(momentum=1.0), "optimizer.momentum"),
        (lambda: OptimizerConfig(milestones=(0.5, 0.5)), "optimizer.milestones"),
        (lambda: OptimizerConfig(milestones=(1.0,)), "optimizer.milestones"),
        (lambda: OptimizerConfig(step_factor=1.0), "optimizer.step_factor"),
        (lambda: OptimizerConfig(accumulate_steps=0), "optimizer.accumulate_steps"),
        (lambda: stage(name="first stage"), "stages: name 'first stage'"),
        (lambda: stage(losses=()), "stages.rpn.losses"),
        (lambda: stage(train=()), "stages.rpn.train"),
        (lambda: stage(ema_decay=1.0), "stages.rpn.ema_decay"),
        (lambda: Config(evaluate_every_epochs=-1), "evaluate_every_epochs"),
        (lambda: stage(frozen=("box_head/(",)), "stages.rpn: pattern 'box_head/('"),
        (lambda: Config(stages=(stage(), stage())), "stages: two have the same name: rpn, rpn"),
        (lambda: Config(keep_checkpoints=0), "keep_checkpoints"),
        (lambda: Config(skip_non_finite=-1), "skip_non_finite"),
        (lambda: Config(loggers=("wandb", "wandb")), "loggers: one is named twice"),
        (lambda: DistributedConfig("host", 2, 0), "distributed.coordinator: 'host'"),
        (lambda: DistributedConfig("host:1234", None, 0), "distributed.processes"),
        (lambda: DistributedConfig("host:1234", 2), "distributed.index"),
        (lambda: DistributedConfig("auto", 2), "distributed.processes"),
        (lambda: DistributedConfig(index=0), "distributed.index"),
        (lambda: Config(seed=-1), "seed"),
        (lambda: Config(seed=2**32), "seed"),
        (lambda: DistributedConfig("host:1234", 2, 2), "distributed.index"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(make: Callable[[], Any], field: str) -> None:
    """In one line that begins with the field."""
    with pytest.raises(ConfigError, match=rf"\A{re.escape(field)}.*\Z"):
        make()


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("options", "name", "where"),
    [
        (DataConfig(), "depth_scale", "data."),
        (OptimizerConfig(), "learning_rate", "optimizer."),
        (OptimizerConfig(), "clip_norm", "optimizer."),
        (stage(), "epochs", "stages.rpn."),
        (ModelConfig(), "pixel_std", "model."),
        (RPNConfig(), "scales", "model.rpn."),
        (RPNConfig(), "ratios", "model.rpn."),
        (RPNConfig(), "box_weights", "model.rpn."),
        (RoIConfig(), "canonical_size", "model.roi."),
        (BoxHeadConfig(), "box_weights", "model.box_head."),
        (BoxHeadConfig(), "cascade_box_weights", "model.box_head."),
    ],
)
def test_what_has_to_be_positive_and_finite(
    options: Any, name: str, where: str, value: float
) -> None:
    """Of several numbers each."""
    before = getattr(options, name)
    wrong = (*before[:-1], value) if isinstance(before, tuple) else value
    with pytest.raises(ConfigError, match=rf"\A{where}{name}: must be positive and finite\Z"):
        replace(options, **{name: wrong})


def test_a_config_file_may_have_lists() -> None:
    """They become tuples when it is loaded."""
    ratios: Any = [0.5, 1.0]
    assert RPNConfig(ratios=ratios).ratios == ratios
    with pytest.raises(ConfigError, match="ratios: must be positive"):
        RPNConfig(ratios=[*ratios, 0.0])  # type: ignore[arg-type]


def test_pasted_objects_have_no_depth() -> None:
    pasting = DataConfig(augment=AugmentConfig(copy_paste=0.5))
    Config(data=pasting)
    with pytest.raises(ConfigError) as error:
        Config(data=pasting, model=ModelConfig(depth_head=DepthHeadConfig(kind="dense")))
    assert str(error.value) == (
        "data.augment.copy_paste: must be 0 with model.depth_head.kind dense: the depth of pasted "
        "objects is not that of the scene"
    )


@pytest.mark.parametrize(
    ("heads", "loss", "line"),
    [
        (0, "box2", "box2 needs model.box_head.cascade with 1 further head"),
        (1, "box3", "box3 needs model.box_head.cascade with 2 further heads"),
    ],
)
def test_a_loss_of_a_further_box_head_needs_the_head(heads: int, loss: Loss, line: str) -> None:
    box_head = BoxHeadConfig(class_agnostic=True, cascade=(0.6, 0.7)[:heads])
    with pytest.raises(ConfigError) as error:
        Config(model=ModelConfig(box_head=box_head), stages=(stage(losses=(loss,)),))
    assert str(error.value) == f"stages.rpn.losses: {line}"
    box_head = replace(box_head, class_agnostic=True, cascade=(0.6, 0.7))
    Config(model=ModelConfig(box_head=box_head), stages=(stage(losses=(loss,)),))
