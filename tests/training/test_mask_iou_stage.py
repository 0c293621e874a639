"""The mask-IoU head in training: what moves, what its gradient reaches, and what it learns."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from training.test_step import (
    C4,
    CANVAS,
    CONFIG,
    QUICK_COMPILE,
    SGD,
    Runner,
    batch,
    moved,
    poisoned,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import MaskIoUHeadConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.optional_heads import MASK_IOU, following_heads, with_mask_iou
from mrcnn_jax.config.schema import Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint, staged
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.training.stages import refuse_random_frozen
from mrcnn_jax.training.step import stage_losses

HEAD = MaskIoUHeadConfig(enabled=True, channels=8, convs=2, fcs=1, hidden=16)
SCORED, SCORED_C4 = (replace(config, mask_iou_head=HEAD) for config in (CONFIG, C4))
ADAMW = OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.01)


@functools.cache
def variables(config: ModelConfig) -> Variables:
    return jax.tree.map(np.asarray, initialise(MaskRCNN(config), example_batch(CANVAS), seed=0))


@functools.cache
def runner(config: ModelConfig) -> Runner:
    stage = with_mask_iou(staged(pretrained=False, backbone=config.backbone))[-1]
    return Runner(replace(stage, optimizer=ADAMW), variables(config), MaskRCNN(config))


@pytest.mark.parametrize("config", [SCORED, SCORED_C4], ids=["fpn", "c4"])
def test_its_stage_moves_the_head_alone(config: ModelConfig) -> None:
    """What does not exist has no part in it, nor has an image that fills up the batch."""
    step = runner(config)
    state, first = step.once(batch(0))
    head = {path for path in flatten_dict(step.start.params, sep="/") if "mask_iou_head/" in path}
    assert moved(step.start.params, state.params) == head
    assert moved(step.start.batch_stats, state.batch_stats) == set()
    assert {name for name in first if name.startswith("loss/")} == {"loss/mask_iou", "loss/total"}
    jax.tree.map(
        np.testing.assert_array_equal, (state, first), step.once(poisoned(batch(0), np.nan))
    )
    partial, other = batch(0, valid=(True, False)), batch(1)
    mixed = jax.tree.map(
        lambda a, b: np.concatenate([a[:1], b[1:]]), partial, other.replace(valid=partial.valid)
    )
    jax.tree.map(np.testing.assert_array_equal, step.once(mixed), step.once(partial))


def test_what_it_predicts_approaches_the_ious() -> None:
    """Those of the masks as they are: the mask head is frozen, so they stay the same."""
    step = runner(SCORED)
    state, truth = step.start, batch(0)
    first = metrics = None
    for _ in range(150):
        state, metrics = step.step(state, truth)
        first = metrics if first is None else first
    assert step.traces == 1
    assert metrics is not None
    assert first is not None
    assert float(first["loss/mask_iou"]) > 0.005  # half the square of an IoU
    assert float(metrics["loss/mask_iou"]) < 0.02 * float(first["loss/mask_iou"])


def test_its_gradient_reaches_the_mask_head_through_the_mask_that_it_is_given() -> None:
    """As in the published code; the boxes and the class are constants to it."""
    model, tree = MaskRCNN(SCORED), variables(SCORED)

    def objective(params: Any) -> jax.Array:
        values, _, _ = nn.apply(
            lambda m: stage_losses(m, batch(0), jax.random.key(0), ("mask_iou",), ()), model
        )({"params": params, "batch_stats": tree["batch_stats"]})
        return values["mask_iou"]

    gradient = jax.jit(jax.grad(objective), compiler_options=QUICK_COMPILE)(tree["params"])
    reached = {
        name for name, part in gradient.items() if any(np.any(x) for x in jax.tree.leaves(part))
    }
    assert reached == {"resnet", "fpn", "mask_head", "mask_iou_head"}


def test_it_is_trained_with_the_others() -> None:
    """In a joint table, and the other losses are those without it."""
    everything = joint(train=(ParamGroup(".*"),), epochs=1, optimizer=SGD)
    (stage,) = with_mask_iou(everything)
    state, metrics = Runner(stage, variables(SCORED), MaskRCNN(SCORED)).once(batch(0))
    _, without = Runner(everything[0], variables(SCORED), MaskRCNN(SCORED)).once(batch(0))
    start = flatten_dict(variables(SCORED)["params"], sep="/")
    assert moved(variables(SCORED)["params"], state.params) == set(start)
    assert metrics.keys() - without.keys() == {"loss/mask_iou"}
    names = {name for name in without if name.startswith("loss/")} - {"loss/total"}
    for name in names:
        # The rounding of two programs may choose another detection to train masks on.
        bound = 1e-2 if name == "loss/mask" else 1e-4
        assert float(metrics[name]) == pytest.approx(float(without[name]), rel=bound), name
    total = sum(float(metrics[name]) for name in names | {"loss/mask_iou"})
    assert float(metrics["loss/total"]) == pytest.approx(total, rel=1e-5)


def test_a_loss_without_the_head_is_refused() -> None:
    table = with_mask_iou(staged(pretrained=False))
    line = r"^stages\.mask_iou\.losses: mask_iou needs model\.mask_iou_head\.enabled$"
    with pytest.raises(ConfigError, match=line):
        Config(model=CONFIG, stages=table)
    assert [stage.name for stage in table] == ["rpn", "box", "mask", "mask_iou"]
    assert all(stage.frozen[-1] == MASK_IOU for stage in table[:3])
    assert Config(model=SCORED, stages=table).stages == table


def test_a_head_without_its_loss_is_refused() -> None:
    """No other loss has a gradient for it."""
    config = Config(model=SCORED, stages=joint((ParamGroup(".*"),), epochs=1))
    params = variables(SCORED)["params"]
    line = r"^stages\.joint: trains mask_iou_head without its loss, mask_iou \("
    with pytest.raises(ConfigError, match=line):
        refuse_random_frozen(config, params, ())
    refuse_random_frozen(following_heads(config), params, ())
