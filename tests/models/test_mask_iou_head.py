"""The mask-IoU head against NumPy loops, in the image where IoUs are concerned, and the laws."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_mask_rcnn import C4, CANVAS, CONFIG, batch
from models.test_resnet import numpy_conv
from ops.laws import Outcome, assert_laws

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import MaskHeadConfig, MaskIoUHeadConfig, PointRendConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_head import MaskSamples
from mrcnn_jax.models.mask_iou_head import (
    MaskIoUHead,
    mask_iou_loss,
    mask_iou_targets,
    mask_scores,
    max_pool_2x2,
)
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.ops.masks import area_outside, crop_targets
from mrcnn_jax.structures import Batch, Instances, blank_batch

HEAD = MaskIoUHeadConfig(enabled=True, channels=4, convs=2, fcs=1, hidden=6, loss_weight=3.0)


def numpy_max_pool_2x2(masks: np.ndarray) -> np.ndarray:
    n, side = masks.shape[0], masks.shape[1] // 2
    found = np.full((n, side, side), -np.inf)
    for i, y, x in np.ndindex(*masks.shape):
        found[i, y // 2, x // 2] = max(found[i, y // 2, x // 2], masks[i, y, x])
    return found


def numpy_head(params: dict[str, Any], features: np.ndarray, masks: np.ndarray) -> np.ndarray:
    params = jax.tree.map(np.asarray, params)
    x = np.concatenate([features, numpy_max_pool_2x2(masks)[..., None]], axis=-1)
    convs = sorted(name for name in params if name.startswith("conv"))
    for name in convs:
        kernel = params[name]["kernel"].transpose(3, 2, 0, 1)
        x = numpy_conv(x, kernel, stride=2 if name == convs[-1] else 1) + params[name]["bias"]
        x = np.maximum(x, 0)
    x = x.reshape(len(x), -1)
    for name in sorted(name for name in params if name.startswith("fc")):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    return x @ params["ious"]["kernel"] + params["ious"]["bias"]


# -- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [4, 5])
def test_head_equals_a_loop(side: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, side, side, 5)).astype(np.float32)
    masks = rng.uniform(size=(3, 2 * side, 2 * side)).astype(np.float32)
    module = MaskIoUHead(replace(HEAD, convs=3, fcs=2), 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), features, masks)
    variables = jax.tree.map(
        lambda leaf: rng.normal(scale=0.4, size=leaf.shape).astype(np.float32), shapes
    )
    found = jax.jit(module.apply)(variables, features, masks)
    assert found.dtype == jnp.float32
    assert set(variables["params"]) == {"conv1", "conv2", "conv3", "fc1", "fc2", "ious"}
    half = (side + 1) // 2
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 6, 4)
    assert variables["params"]["fc1"]["kernel"].shape == (half * half * 4, 6)
    expected = numpy_head(variables["params"], features, masks)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_paper_s_layers_are_the_default() -> None:
    """Four convolutions on 14 x 14 x 257, the last to 7 x 7, two layers of 1024, K outputs."""
    assert not ModelConfig().mask_iou_head.enabled
    head = MaskIoUHeadConfig(enabled=True)
    config = replace(CONFIG, fpn_channels=256, mask_head=MaskHeadConfig(), mask_iou_head=head)
    model = MaskRCNN(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example_batch(CANVAS))["params"]
    found = {name: leaf["kernel"].shape for name, leaf in shapes["mask_iou_head"].items()}
    assert found == {
        "conv1": (3, 3, 257, 256),
        **{f"conv{i}": (3, 3, 256, 256) for i in (2, 3, 4)},
        "fc1": (7 * 7 * 256, 1024),
        "fc2": (1024, 1024),
        "ious": (1024, 3),
    }


def test_the_pool_takes_the_largest_of_four() -> None:
    masks = np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(max_pool_2x2(jnp.array(masks)), numpy_max_pool_2x2(masks))
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum())(jnp.array(masks))
    assert (np.asarray(gradient).reshape(2, 3, 2, 3, 2).sum((2, 4)) == 1).all()


def test_scores_of_masks_are_never_above_their_classs() -> None:
    scores = np.full(4, 0.5, np.float32)
    ious = np.array([-0.2, 0.4, 1.0, 1.7], np.float32)
    np.testing.assert_allclose(mask_scores(jnp.array(scores), ious), [0, 0.2, 0.5, 0.5])


# -- which mask it sees ----------------------------------------------------------------------------


def of_labels(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    last = np.minimum(labels, logits.shape[-1]) - 1
    return np.take_along_axis(logits, last[..., None, None, None], axis=-1)[..., 0]


KINDS = {
    "plain": MaskHeadConfig(channels=8, convs=1, pool_size=4),
    "agnostic": MaskHeadConfig(channels=8, convs=1, pool_size=4, class_agnostic=True),
    "softmax": MaskHeadConfig(channels=8, convs=1, pool_size=4, loss="softmax"),
    "refined": MaskHeadConfig(
        channels=8, convs=1, pool_size=4, refine=PointRendConfig(1, 20, channels=8, fcs=1)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_sees_the_probabilities_of_the_boxs_class_before_refinement(kind: str) -> None:
    """By softmax where classes compete; IoUs are those of the head alone, called by hand."""
    config = replace(CONFIG, mask_head=KINDS[kind], mask_iou_head=HEAD)
    model, rng = MaskRCNN(config), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example_batch(CANVAS))
    variables = jax.tree.map(
        lambda leaf: rng.normal(scale=0.4, size=leaf.shape).astype(np.float32), shapes
    )
    count = 1 if kind == "agnostic" else 3
    assert variables["params"]["mask_iou_head"]["ious"]["kernel"].shape == (6, count)
    maps = {
        f"p{i}": rng.normal(size=(1, 64 >> i, 96 >> i, 16)).astype(np.float32)
        for i in (2, 3, 4, 5, 6)
    }
    boxes = np.array([[[4, 8, 60, 40], [30, 2, 90, 62], [5, 5, 20, 20]]], np.float32)
    labels, valid = np.array([[3, 1, 2]], np.int32), np.ones((1, 3), bool)
    apply = functools.partial(model.apply, variables)

    @jax.jit
    def run() -> Any:
        pooled = apply(maps, boxes, valid, method="mask_features")
        instances = Instances(boxes=boxes, labels=labels, valid=valid)
        found = apply(maps, instances, method="scored_masks")
        return *found, pooled, apply(pooled, valid, method="mask_logits")

    masks, ious, pooled, logits = jax.tree.map(np.asarray, run())
    assert masks.shape == ((1, 3, 16, 16) if kind == "refined" else (1, 3, 8, 8))
    if kind == "softmax":
        powers = np.exp(logits.astype(float))
        probabilities = of_labels(powers / (1 + powers.sum(-1, keepdims=True)), labels)
    else:
        probabilities = 1 / (1 + np.exp(-of_labels(logits, labels)))
    if kind != "refined":
        np.testing.assert_allclose(masks, probabilities, rtol=1e-4, atol=1e-5)
    every = numpy_head(variables["params"]["mask_iou_head"], pooled[0], probabilities[0])
    expected = [row[min(label, count) - 1] for row, label in zip(every, labels[0], strict=True)]
    np.testing.assert_allclose(ious[0], expected, rtol=1e-3, atol=1e-3)


def test_c4_gives_it_features_and_masks_of_half_the_side() -> None:
    model = MaskRCNN(replace(C4, mask_iou_head=HEAD))
    prediction, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), batch())
    head = variables["params"]["mask_iou_head"]
    channels = variables["params"]["mask_head"]["deconv"]["kernel"].shape[2]
    assert head["conv1"]["kernel"].shape == (3, 3, channels + 1, 4)
    assert head["fc1"]["kernel"].shape == (2 * 2 * 4, 6)  # 3 x 3 cells, then 2 x 2
    assert prediction.detections.masks.shape[2:] == (6, 6)
    assert prediction.detections.mask_scores.shape == (3, 6)


def test_predictions_are_those_of_a_network_without_and_have_mask_scores() -> None:
    model = MaskRCNN(replace(CONFIG, mask_iou_head=HEAD))
    ours = initialise(model, example_batch(CANVAS), seed=0)
    theirs = {**ours, "params": {k: v for k, v in ours["params"].items() if k != "mask_iou_head"}}
    with_head = jax.tree.map(np.asarray, jax.jit(model.apply)(ours, batch()))
    without = jax.tree.map(np.asarray, jax.jit(MaskRCNN(CONFIG).apply)(theirs, batch()))
    assert without.detections.mask_scores is None
    found = with_head.detections
    assert found.mask_scores.shape == found.scores.shape
    assert found.mask_scores.dtype == np.float32
    assert (found.mask_scores[found.valid] <= found.scores[found.valid]).all()
    assert (found.mask_scores >= 0).all()
    jax.tree.map(
        np.testing.assert_array_equal,
        with_head.replace(detections=found.replace(mask_scores=None)),
        without,
    )


# -- targets ---------------------------------------------------------------------------------------

SIDE, CELLS, SIZE = 64, 16, 8  # pixels of the image, cells of an object's crop and of a mask


def iou_in_the_image(crop: np.ndarray, own: np.ndarray, mask: np.ndarray, box: np.ndarray) -> float:
    """The IoU of two masks on the whole image, pixel by pixel; boxes and cells are whole pixels."""

    def painted(cells: np.ndarray, box: np.ndarray) -> np.ndarray:
        image = np.zeros((SIDE, SIDE), bool)
        x1, y1, x2, y2 = box.astype(int)
        for y in range(max(y1, 0), min(y2, SIDE)):
            for x in range(max(x1, 0), min(x2, SIDE)):
                row, column = (y - y1) * len(cells) // (y2 - y1), (x - x1) * len(cells) // (x2 - x1)
                image[y, x] = cells[row, column]
        return image

    seen, truth = painted(mask >= 0.5, box), painted(crop > 0, own)
    return (seen & truth).sum() / max((seen | truth).sum(), 1)


def test_targets_are_ious_in_the_image() -> None:
    """Of objects inside the box, partly outside it and beside it. All cells are 2 x 2 pixels on one
    grid, so that nothing is rounded."""
    rng = np.random.default_rng(0)
    count = 60
    crops = np.where(rng.random((count, CELLS, CELLS)) < rng.random((count, 1, 1)), 255, 0)
    crops = crops.astype(np.uint8)
    corners = 2 * rng.integers(0, 16, (count, 2))
    own = np.concatenate([corners, corners + 2 * CELLS], axis=1).astype(np.float32)
    corners = 2 * rng.integers(0, 24, (count, 2))
    boxes = np.concatenate([corners, corners + 2 * SIZE], axis=1).astype(np.float32)
    masks = rng.random((count, SIZE, SIZE)).astype(np.float32) ** rng.choice([0.3, 1, 3], count)[
        :, None, None
    ].astype(np.float32)
    masks[:3] = 0
    index = jnp.arange(count, dtype=jnp.int32)
    targets = crop_targets(crops, own, index, jnp.array(boxes), size=SIZE)
    outside = area_outside(jnp.array(crops), jnp.array(own), index, jnp.array(boxes), size=SIZE)
    found = np.asarray(mask_iou_targets(jnp.array(masks), targets, outside))
    expected = np.array(list(map(iou_in_the_image, crops, own, masks, boxes)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found[:3] == 0).all()
    soft = jnp.where(targets == 1, 0.5, 0.4)  # counts from one half on
    np.testing.assert_array_equal(mask_iou_targets(jnp.array(masks), soft, outside), found)
    # What lies outside matters.
    inside = np.asarray(mask_iou_targets(jnp.array(masks), targets, jnp.zeros(count, jnp.float32)))
    assert (inside > expected + 0.05).mean() > 0.3


def test_a_mask_that_is_its_target_is_perfect_where_nothing_is_outside() -> None:
    """Whatever is lost by rounding to cells; and nothing at all has no IoU."""
    rng = np.random.default_rng(1)
    crops = rng.integers(0, 256, (5, CELLS, CELLS)).astype(np.uint8)
    own = np.array([[3.3, 5.1, 17.7, 40.2]] * 5, np.float32)
    boxes = own.copy()
    boxes[1:] += rng.uniform(0, 3, (4, 4)).astype(np.float32) * np.float32([-1, -1, 1, 1])
    index = jnp.arange(5, dtype=jnp.int32)
    targets = crop_targets(crops, own, index, jnp.array(boxes), size=SIZE)
    outside = area_outside(jnp.array(crops), jnp.array(own), index, jnp.array(boxes), size=SIZE)
    np.testing.assert_array_equal(outside, np.zeros(5))
    np.testing.assert_array_equal(mask_iou_targets(targets, targets, outside), np.ones(5))
    nothing = jnp.zeros((1, SIZE, SIZE), jnp.float32)
    assert mask_iou_targets(nothing, nothing, jnp.zeros(1, jnp.float32)) == 0


# -- the loss --------------------------------------------------------------------------------------


def rows_of(count: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 20, (count, 2))
    return {
        "ious": rng.uniform(size=count).astype(np.float32),
        "masks": rng.uniform(size=(count, 6, 6)).astype(np.float32),
        "targets": rng.integers(0, 2, (count, 6, 6)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + rng.uniform(5, 20, (count, 2))], 1).astype(
            np.float32
        ),
        "gt_index": rng.integers(0, 3, count).astype(np.int32),
    }


VALID = np.arange(9) % 3 != 1
WEIGHTED = replace(HEAD, loss_weight=3.0)


def truth_batch() -> Batch:
    """An image with three objects and a row that does not exist."""
    rng = np.random.default_rng(2)
    corners = rng.uniform(0, 20, (4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 20, (4, 2))], 1).astype(np.float32)
    boxes[3] = np.nan
    truth = Instances(
        boxes=boxes[None],
        valid=np.array([[True, True, True, False]]),
        labels=np.ones((1, 4), np.int32),
        masks=rng.integers(0, 256, (1, 4, 7, 7)).astype(np.uint8),
        has_mask=np.ones((1, 4), bool),
    )
    return blank_batch(1, CANVAS).replace(ground_truth=truth, valid=np.ones(1, bool))


def loss(rows: dict[str, Any], valid: Any) -> jax.Array:
    """Of one image."""
    rows = {name: jnp.asarray(values)[None] for name, values in rows.items()}
    samples = MaskSamples(
        boxes=rows["boxes"],
        labels=jnp.ones(rows["ious"].shape, jnp.int32),
        targets=rows["targets"],
        valid=jnp.asarray(valid)[None],
        gt_index=rows["gt_index"],
        left_out=jnp.zeros(1, jnp.int32),
    )
    batch = jax.tree.map(jnp.asarray, truth_batch())
    return mask_iou_loss(rows["ious"], rows["masks"], samples, batch, WEIGHTED)["mask_iou"]


def outside_loop(crop: np.ndarray, own: np.ndarray, box: np.ndarray) -> float:
    """By points: 40 along each side of each of the crop's cells."""
    m, points = len(crop), 40
    at = (np.arange(m * points) + 0.5) / (m * points)
    x, y = (own[i] + at * (own[i + 2] - own[i]) for i in (0, 1))
    inside = ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))[None]
    coverage = np.kron(crop / 255, np.ones((points, points)))
    pixels = (own[2] - own[0]) * (own[3] - own[1]) / (m * points) ** 2
    return float((coverage * ~inside).sum() * pixels)


def test_loss_equals_a_loop() -> None:
    rows, truth, errors = rows_of(), truth_batch().ground_truth, []
    for i in np.flatnonzero(VALID):
        both = either = 0.0
        for y, x in np.ndindex(6, 6):
            seen, there = rows["masks"][i, y, x] >= 0.5, rows["targets"][i, y, x] == 1
            both, either = both + (seen and there), either + (seen or there)
        k, box = rows["gt_index"][i], rows["boxes"][i].astype(float)
        cell = (box[2] - box[0]) * (box[3] - box[1]) / 36
        outside = outside_loop(truth.masks[0, k], truth.boxes[0, k].astype(float), box) / cell
        errors.append((float(rows["ious"][i]) - both / (either + outside)) ** 2 / 2)
    assert float(loss(rows, VALID)) == pytest.approx(3 * np.mean(errors), rel=5e-3)


def test_laws_of_padded_sets() -> None:
    assert_laws(lambda rows, valid: Outcome(totals=loss(rows, valid)), rows_of(), VALID)


def test_only_the_predicted_iou_has_a_gradient() -> None:
    rows = rows_of()

    def objective(floats: dict[str, jax.Array]) -> jax.Array:
        return loss(rows | floats, VALID)

    floats = {name: jnp.array(rows[name]) for name in ("ious", "masks", "targets", "boxes")}
    gradients = jax.tree.map(np.asarray, jax.grad(objective)(floats))
    assert (gradients.pop("ious")[VALID] != 0).all()
    assert not any(leaf.any() for leaf in gradients.values())


def test_mistakes_are_named() -> None:
    for field, value in (("convs", 0), ("channels", 0), ("hidden", 0), ("fcs", -1)):
        with pytest.raises(ConfigError, match=rf"^model\.mask_iou_head\.{field}: must be at least"):
            MaskIoUHeadConfig(**{field: value})
