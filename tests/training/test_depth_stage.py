"""The stage that trains a depth head: nothing else moves, and nothing else is computed."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from training.test_step import (
    CANVAS,
    CONFIG,
    DENSE,
    QUICK_COMPILE,
    ROI,
    SGD,
    Runner,
    batch,
    moved,
    operations,
    poisoned,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.optional_heads import with_depth
from mrcnn_jax.config.schema import Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint, staged
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.training.step import make_validation_step

TABLE = with_depth(
    staged(pretrained=False),
    optimizer=OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.1),
)
DEPTH = TABLE[-1]


@functools.cache
def variables(config: ModelConfig) -> Variables:
    return jax.tree.map(np.asarray, initialise(MaskRCNN(config), example_batch(CANVAS), seed=0))


@functools.cache
def runner(config: ModelConfig) -> Runner:
    return Runner(DEPTH, variables(config), MaskRCNN(config))


@pytest.mark.parametrize("config", [DENSE, ROI], ids=["dense", "roi"])
def test_the_depth_stage_moves_the_depth_head_alone(config: ModelConfig) -> None:
    """It has moments for nothing else; what does not exist or is unknown has no part in it."""
    step = runner(config)
    truth = batch(0)
    state, first = step.once(truth)
    head = {path for path in flatten_dict(step.start.params, sep="/") if "depth_head/" in path}
    assert moved(step.start.params, state.params) == head
    assert moved(step.start.batch_stats, state.batch_stats) == set()
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    flat = flatten_dict(step.start.params, sep="/")
    assert sum(sizes) < 2 * sum(flat[path].size for path in head) + 20
    assert set(first) == {"loss/depth", "loss/total", "gradient_norm", "objects_lost"}

    nowhere = np.where(truth.depth == 0, -np.inf, truth.depth).astype(np.float32)
    again = step.once(poisoned(truth.replace(depth=nowhere), np.nan))
    jax.tree.map(np.testing.assert_array_equal, (state, first), again)
    metrics = first
    for _ in range(30):
        state, metrics = step.step(state, truth)
    assert float(metrics["loss/depth"]) < 0.6 * float(first["loss/depth"])
    assert step.traces == 1


def test_an_image_that_fills_up_a_batch_or_has_no_depth_may_hold_anything() -> None:
    step, partial, other = runner(DENSE), batch(0, valid=(True, False)), batch(1)
    mixed = jax.tree.map(
        lambda a, b: np.concatenate([a[:1], b[1:]]), partial, other.replace(valid=partial.valid)
    )
    expected = step.once(partial)
    jax.tree.map(np.testing.assert_array_equal, step.once(mixed), expected)
    without = partial.replace(depth=np.stack([partial.depth[0], 0 * partial.depth[1]]))
    found = step.once(without.replace(valid=np.ones(2, bool)))
    # The other image's features are normalised with it; only the loss is compared.
    assert float(found[1]["loss/depth"]) == pytest.approx(
        float(expected[1]["loss/depth"]), rel=1e-6
    )


def test_the_dense_stage_holds_no_backward_pass_but_its_heads_and_no_boxes() -> None:
    """Two products for each of its seven convolutions, less those by the input of the first ones of
    four levels; neither NMS nor RoIAlign."""
    config = DENSE
    step = runner(config)
    forward = operations(
        make_validation_step(MaskRCNN(config), DEPTH),
        variables(config),
        batch(0),
        jax.random.key(0),
    )
    backward = operations(step.function, step.start, batch(0))
    assert forward["convolution"] >= 20
    assert backward["convolution"] - forward["convolution"] == 2 * 7 - 4
    for name in ("while", "sort", "topk", "gather", "scatter"):
        assert forward[name] == backward[name] == 0, name


def test_depth_is_trained_with_the_others_by_its_weight() -> None:
    """In a joint table, and the other losses are those without it."""
    (stage,) = joint(train=(ParamGroup(".*"),), epochs=1, optimizer=SGD)
    both = replace(stage, losses=(*stage.losses, "depth"))
    key, truth = jax.random.key(3), batch(0)

    def losses(config: ModelConfig, table: object) -> dict[str, float]:
        validate = jax.jit(
            make_validation_step(MaskRCNN(config), table),  # type: ignore[arg-type]
            compiler_options=QUICK_COMPILE,
        )
        found, _ = validate(variables(DENSE), truth, key)
        return {name: float(value) for name, value in found.items()}

    without, single = losses(DENSE, stage), losses(DENSE, both)
    double = losses(replace(DENSE, depth_head=replace(DENSE.depth_head, loss_weight=2.0)), both)
    assert single.keys() - without.keys() == {"loss/depth"}
    assert double["loss/depth"] == pytest.approx(2 * single["loss/depth"], rel=1e-6)
    for name in without.keys() - {"loss/total"}:
        assert single[name] == pytest.approx(without[name], rel=1e-5), name
    assert single["loss/total"] == pytest.approx(
        without["loss/total"] + single["loss/depth"], rel=1e-5
    )


@pytest.mark.parametrize("config", [DENSE, ROI], ids=["dense", "roi"])
def test_predictions_have_depth_and_the_boxes_and_masks_of_a_network_without(
    config: ModelConfig,
) -> None:
    ours = variables(config)
    theirs = {**ours, "params": {k: v for k, v in ours["params"].items() if k != "depth_head"}}
    with_depth, without = (
        jax.jit(MaskRCNN(c).apply)(v, batch(0)) for c, v in ((config, ours), (CONFIG, theirs))
    )
    assert without.depth is None
    shape = (2, 16, 16) if config is DENSE else (2, *with_depth.detections.masks.shape[1:])
    assert with_depth.depth.shape == shape
    assert (np.asarray(with_depth.depth) > 0).all()
    jax.tree.map(
        np.testing.assert_array_equal,
        (with_depth.proposals, with_depth.detections),
        (without.proposals, without.detections),
    )


def test_a_depth_loss_without_a_depth_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^stages\.depth\.losses: depth needs model\.depth_head"):
        Config(model=CONFIG, stages=TABLE)
    assert [stage.name for stage in TABLE] == ["rpn", "box", "mask", "depth"]
    assert all(stage.frozen[-1] == "depth_head/.*" for stage in TABLE[:3])
    assert Config(model=DENSE, stages=TABLE).stages == TABLE
