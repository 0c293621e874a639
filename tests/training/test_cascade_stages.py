"""The stages that train a cascade's box heads: each moves its own head, and nothing else."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from training.test_step import (
    CANVAS,
    CONFIG,
    SGD,
    Runner,
    batch,
    moved,
    poisoned,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.optional_heads import with_cascade
from mrcnn_jax.config.schema import BOX_LOSSES, Config, ParamGroup
from mrcnn_jax.config.tables import joint, staged
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.training.stages import labels, refuse_random_frozen

CASCADE = replace(
    CONFIG,
    box_head=replace(CONFIG.box_head, foreground_iou=0.5, class_agnostic=True, cascade=(0.6, 0.7)),
    mask_head=replace(CONFIG.mask_head, train_on="box_samples"),
)
TABLE = with_cascade(staged(pretrained=False, optimizers=(SGD, SGD, SGD)), 2)
MODEL = MaskRCNN(CASCADE)


@functools.cache
def variables() -> Variables:
    return jax.tree.map(np.asarray, initialise(MODEL, example_batch(CANVAS), seed=0))


@pytest.mark.parametrize(("row", "head"), [(2, "box_head2"), (3, "box_head3")])
def test_a_row_moves_its_head_alone(row: int, head: str) -> None:
    """What does not exist has no part in it; one compilation learns a batch."""
    stage = TABLE[row]
    runner = Runner(stage, variables(), MODEL)
    state, first = runner.once(batch(0))
    assert {path.split("/")[0] for path in moved(runner.start.params, state.params)} == {head}
    assert moved(runner.start.batch_stats, state.batch_stats) == set()
    name = stage.name
    assert {loss for loss in first if loss.startswith("loss/")} == {
        f"loss/{name}_class",
        f"loss/{name}_box",
        "loss/total",
    }
    jax.tree.map(
        np.testing.assert_array_equal, runner.once(poisoned(batch(0), np.nan)), (state, first)
    )
    metrics = first
    for _ in range(20):
        state, metrics = runner.step(state, batch(0))
    assert float(metrics["loss/total"]) < 0.7 * float(first["loss/total"])
    assert runner.traces == 1


def test_all_box_heads_train_together() -> None:
    """In one row, which moves each of them."""
    (both,) = with_cascade(joint((ParamGroup("box_head/.*"),), epochs=1, optimizer=SGD), 2)
    assert both.losses == ("rpn", "box", "box2", "box3", "mask")
    others = ("resnet/.*", "fpn/.*", "rpn/.*", "mask_head/.*")
    stage = replace(both, losses=BOX_LOSSES, frozen=others)
    runner = Runner(stage, variables(), MODEL)
    state, metrics = runner.once(batch(0))
    assert {path.split("/")[0] for path in moved(runner.start.params, state.params)} == {
        "box_head",
        "box_head2",
        "box_head3",
    }
    parts = [f"loss/{name}_{kind}" for name in BOX_LOSSES for kind in ("class", "box")]
    total = sum(float(metrics[part]) for part in parts)
    assert float(metrics["loss/total"]) == pytest.approx(total, rel=1e-6)


def test_a_mask_head_waits_for_the_last_box_head() -> None:
    params = variables()["params"]
    for stage in TABLE:
        labels(stage, params)
    config = Config(model=CASCADE, stages=TABLE)
    refuse_random_frozen(config, params, ())
    with pytest.raises(
        ConfigError, match=r"^stages\.mask: frozen at random initialisation: box_head3 "
    ):
        refuse_random_frozen(replace(config, stages=(*TABLE[:3], TABLE[4])), params, ())
    joined = with_cascade(joint((ParamGroup(".*"),), epochs=1), 2)
    refuse_random_frozen(replace(config, stages=joined), params, ())
    forgotten = joint((ParamGroup(".*"),), epochs=1)
    with pytest.raises(
        ConfigError, match=r"^stages\.joint: trains box_head2 without its loss, box2 \("
    ):
        refuse_random_frozen(replace(config, stages=forgotten), params, ())
