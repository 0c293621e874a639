"""bfloat16 is for layers alone: geometry, softmax and losses keep float32's digits, and training
goes the same way."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RPNConfig
from mrcnn_jax.config.schema import Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint
from mrcnn_jax.data.loader import load, open_split
from mrcnn_jax.data.order import plan_epoch
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch, Instances
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step, stage_losses

QUICK_COMPILE = {"xla_backend_optimization_level": 0}  # they run once, or are tiny
CANVAS = (64, 1344)  # from 1024 on, bfloat16 tells coordinates apart in steps of 8 pixels
SIZE = (61, 1337)
CLASSES = 4
MODEL = ModelConfig(
    num_classes=CLASSES,
    fpn_channels=8,
    resnet=ResNetConfig(depth=10, width=4),
    rpn=RPNConfig(batch_norm=False, proposals=200, nms_iou=0.7),
    box_head=BoxHeadConfig(hidden=8, pool_size=3, samples=32, detections=100),
    mask_head=MaskHeadConfig(channels=4, convs=1, pool_size=4, samples=8),
)


def scene() -> Batch:
    boxes = np.array(
        [[[1100.3, 10.7, 1160.9, 50.2], [1211.6, 5.4, 1333.3, 60.1], [3.3, 7.7, 35.1, 39.3]]],
        np.float32,
    )
    exists = np.ones((1, 3), bool)
    masks = np.random.default_rng(0).integers(0, 256, (1, 3, 28, 28)).astype(np.uint8)
    truth = Instances(
        boxes=boxes,
        valid=exists,
        labels=np.array([[1, 4, 2]], np.int32),
        masks=masks,
        has_mask=exists,
    )
    images = np.random.default_rng(1).integers(0, 256, (1, *CANVAS, 3)).astype(np.uint8)
    ignore = Instances(boxes=boxes[:, :1], valid=~exists[:, :1])
    return example_batch(CANVAS).replace(
        images=images, image_sizes=np.array([SIZE], np.int32), ground_truth=truth, ignore=ignore
    )


@functools.cache
def biases_alone(seed: int | None) -> Variables:
    """Random variables, but output layers that are their biases (0 without a seed): no result
    depends on the features."""
    variables = jax.tree.map(np.asarray, initialise(MaskRCNN(MODEL), example_batch(CANVAS), seed=0))
    flat = flatten_dict(variables, sep="/")
    random = np.random.default_rng(seed)
    for path, leaf in flat.items():
        if path.split("/")[-2] in ("logits", "deltas"):
            random_bias = path.endswith("/bias") and seed is not None
            flat[path] = (
                random.normal(0, 0.3, leaf.shape).astype(np.float32)
                if random_bias
                else np.zeros_like(leaf)
            )
    return unflatten_dict(flat, sep="/")


def seen(dtype: Any, variables: Variables) -> Any:
    model = MaskRCNN(replace(MODEL, compute_dtype=dtype))

    def everything(model: MaskRCNN, batch: Batch) -> Any:
        values, proposals, _ = stage_losses(
            model, batch, jax.random.key(0), ("rpn", "box", "mask"), ()
        )
        return values, proposals, model(batch)

    return jax.device_get(
        jax.jit(nn.apply(everything, model), compiler_options=QUICK_COMPILE)(variables, scene())
    )


def test_geometry_softmax_and_losses_have_the_digits_of_float32() -> None:
    """Where features do not matter, the dtype they have does not either."""
    expected, found = (seen(dtype, biases_alone(5)) for dtype in ("float32", "bfloat16"))
    assert len(found[0]) == 5
    assert min(found[0].values()) > 0
    assert found[2].detections.valid.sum() >= 5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected
    )
    prediction = found[2]
    # By hand.
    heads = biases_alone(5)["params"]
    logits = heads["box_head"]["logits"]["bias"].astype(float)
    probability = np.exp(logits) / np.exp(logits).sum()
    detections = jax.tree.map(
        lambda leaf: leaf[0][prediction.detections.valid[0]], prediction.detections
    )
    np.testing.assert_allclose(detections.scores, probability[detections.labels], rtol=1e-6)
    masks = 1 / (1 + np.exp(-heads["mask_head"]["logits"]["bias"].astype(float)))
    np.testing.assert_allclose(
        detections.masks,
        np.broadcast_to(masks[detections.labels - 1, None, None], detections.masks.shape),
        rtol=1e-6,
    )
    assert (detections.boxes[:, 2] > 1024).any()


def test_without_an_opinion_losses_are_those_of_equal_chances_and_proposals_are_anchors() -> None:
    values, proposals, _ = seen("bfloat16", biases_alone(None))
    assert values["rpn_objectness"] == pytest.approx(np.log(2), rel=1e-6)
    assert values["box_class"] == pytest.approx(np.log(CLASSES + 1), rel=1e-6)
    assert values["mask"] == pytest.approx(np.log(2), rel=1e-6)
    # Anchors by hand: of area scale^2 and the ratio height : width, centred in the cells of their
    # level, clipped to the image.
    anchors = []
    for scale, stride in zip(MODEL.rpn.scales, MODEL.strides, strict=True):
        y, x = np.mgrid[: -(-CANVAS[0] // stride), : -(-CANVAS[1] // stride)] * stride + stride / 2
        for ratio in MODEL.rpn.ratios:
            half = np.array([scale / np.sqrt(ratio), scale * np.sqrt(ratio)]) / 2
            anchors.append(
                np.stack([x - half[0], y - half[1], x + half[0], y + half[1]], axis=-1).reshape(
                    -1, 4
                )
            )
    clipped = np.concatenate(anchors).clip(0, [SIZE[1], SIZE[0]] * 2).astype(np.float32)
    boxes = proposals.boxes[0][proposals.valid[0]]
    assert len(boxes) == MODEL.rpn.proposals
    distance = np.abs(boxes[:, None] - clipped[None]).max(-1).min(1)
    assert distance.max() < 1e-3


# -- training --------------------------------------------------------------------------------------

STEPS = 200
TINY = tiny.get_config().model
MODEL_TRAINED = replace(TINY, mask_head=replace(TINY.mask_head, train_on="box_samples"))


@pytest.fixture(scope="module")
def batches(tiny_config: Config) -> list[Batch]:
    """An epoch of generated shapes."""
    config = tiny_config.data
    root = Path(str(config.root))
    dataset = read_coco(root / config.train_annotations, root / config.train_images, config)
    split = open_split("train", dataset, cache=Path(str(config.cache)), data=config)
    plan = plan_epoch(
        [p.canvas for p in split.plans], config.batch_size, seed=0, epoch=0, shuffle=True
    )
    return list(load(split, plan, config))


@functools.cache
def program(config: ModelConfig) -> tuple[TrainState, Any]:
    model = MaskRCNN(config)
    adam = OptimizerConfig(name="adam", learning_rate=1e-3, warmup_steps=10)
    (stage,) = joint((ParamGroup(".*"),), epochs=1, optimizer=adam)
    variables = initialise(model, example_batch((128, 128)), seed=0)
    optimizer = make_optimizer(stage, variables["params"], total_steps=STEPS)
    key = jax.random.key_data(jax.random.key(0))
    state = TrainState(
        variables["params"],
        variables["batch_stats"],
        optimizer.init(variables["params"]),
        jnp.int32(0),
        key,
    )
    step = make_train_step(model, stage, variables["params"], optimizer)
    return state, jax.jit(step, compiler_options=QUICK_COMPILE)


def losses(
    config: ModelConfig, batches: list[Batch], steps: int, seed: int = 0
) -> tuple[np.ndarray, TrainState]:
    """Total loss of every step, and the state at the end; `seed` is that of the samples."""
    state, step = program(config)
    state = state.replace(key=jax.random.key_data(jax.random.key(seed)))
    found = []
    for number in range(steps):
        state, metrics = step(state, batches[number % len(batches)])
        found.append(metrics["loss/total"])
    return np.array(jax.device_get(found)), jax.device_get(state)


def test_two_hundred_steps_go_the_same_way(batches: list[Batch]) -> None:
    """Total loss on generated shapes, all of the network training.

    First the same steps: within 1 %, two to three of bfloat16's roundings (2^-8). Then an anchor or
    a proposal is taken otherwise, and single steps have nothing in common: what stays is the
    course. Measured on this data: another seed of the samples (four tried) moves means of 25 steps
    by 8 to 16 % and the mean of all by up to 4 %, bfloat16 by 16 % and 2 %, which is much like
    another seed. No more than a quarter beyond is allowed.
    """
    exact, rough = (
        losses(replace(MODEL_TRAINED, compute_dtype=dtype), batches, STEPS)[0]
        for dtype in ("float32", "bfloat16")
    )
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough[: len(batches)], exact[: len(batches)], rtol=0.01)
    windows = [course.reshape(-1, 25).mean(1) for course in (exact, rough)]
    np.testing.assert_allclose(windows[1], windows[0], rtol=0.2)
    assert rough.mean() == pytest.approx(exact.mean(), rel=0.04)
    for course in windows:
        assert course[-1] < 0.5 * course[0]


def test_the_same_seed_gives_the_same_bits(batches: list[Batch]) -> None:
    for model in (replace(MODEL_TRAINED, compute_dtype=dtype) for dtype in ("float32", "bfloat16")):
        runs = [losses(model, batches, 6) for _ in range(2)]
        jax.tree.map(np.testing.assert_array_equal, *runs)
        other, _ = losses(model, batches, 6, seed=1)
        assert not np.array_equal(other, runs[0][0])
