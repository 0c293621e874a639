"""The whole network, tiny and untrained: what holds for every prediction, and what may not change
one."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ops.test_points import bilinear_loop

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig, PointRendConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import (
    MaskRCNN,
    Variables,
    example_batch,
    normalise,
    select_proposals,
)
from mrcnn_jax.models.resnet import resnet_stage
from mrcnn_jax.models.rpn import RPNOutput, pyramid_anchors
from mrcnn_jax.structures import Batch, Instances

CONFIG = ModelConfig(
    num_classes=3,
    fpn_channels=16,
    resnet=ResNetConfig(depth=10, width=8),
    rpn=RPNConfig(scales=(8, 16, 32, 64, 128), pre_nms=60, proposals=12),
    roi=RoIConfig(canonical_size=56.0),
    box_head=BoxHeadConfig(hidden=32, pool_size=3, detections=6),
    mask_head=MaskHeadConfig(channels=8, convs=2, pool_size=4),
)
C4 = replace(
    CONFIG,
    backbone="c4",
    box_head=replace(CONFIG.box_head, fcs=0, pool_size=6),
    mask_head=MaskHeadConfig(channels=8, convs=0, pool_size=6, deconv_kernel=2),
)
CANVAS = (64, 96)
SIZES = np.array([[50, 70], CANVAS, CANVAS], np.int32)
VALID = np.array([True, True, False])


@pytest.fixture(scope="module")
def variables() -> Variables:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return initialise(MaskRCNN(CONFIG), example_batch(CANVAS), seed=0)


def batch() -> Batch:
    """Three images of noise: one with padding, one that fills the canvas, one that is not valid."""
    images = np.random.default_rng(0).integers(0, 256, (3, *CANVAS, 3)).astype(np.uint8)
    images[0, 50:] = 0
    images[0, :, 70:] = 0
    repeated = jax.tree.map(lambda leaf: np.repeat(leaf, 3, axis=0), example_batch(CANVAS))
    return repeated.replace(images=images, image_sizes=SIZES, valid=VALID)


@functools.cache
def program(compute_dtype: Any = "float32") -> Any:
    model = MaskRCNN(replace(CONFIG, compute_dtype=compute_dtype))
    return jax.jit(lambda variables, batch: model.apply(variables, batch))


def predict(variables: Variables, batch: Batch) -> Any:
    return jax.tree.map(np.asarray, program()(variables, batch))


def test_predictions_are_boxes_in_the_image_labels_scores_and_masks(variables: Variables) -> None:
    found = predict(variables, batch())
    proposals, detections = found.proposals, found.detections
    assert proposals.boxes.shape == (3, 12, 4)
    assert detections.boxes.shape == (3, 6, 4)
    assert detections.masks.shape == (3, 6, 8, 8)
    for rows in (proposals, detections):
        assert rows.boxes.dtype == rows.scores.dtype == np.float32
        assert rows.valid[
            :2
        ].all()  # untrained, each of four classes has a score of about a quarter
        assert not rows.valid[2].any()
        for boxes, scores, (height, width) in zip(
            rows.boxes[:2], rows.scores[:2], SIZES[:2], strict=True
        ):
            assert (boxes >= 0).all()
            assert (boxes <= [width, height, width, height]).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (np.diff(scores) <= 0).all()
            assert ((scores > 0) & (scores < 1)).all()
    assert (np.isin(detections.labels[:2], (1, 2, 3))).all()
    assert detections.masks.dtype == np.float32
    assert ((detections.masks >= 0) & (detections.masks <= 1)).all()
    assert detections.masks[:2].std() > 0


def test_pixels_outside_of_an_image_change_nothing(variables: Variables) -> None:
    original = batch()
    images = original.images.copy()
    images[0, 50:], images[0, :, 70:], images[2] = 255, 255, 255
    expected, found = (
        predict(variables, original),
        predict(variables, original.replace(images=images)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b[:2]), found, expected)


def test_images_do_not_see_each_other(variables: Variables) -> None:
    original = batch()
    expected = predict(variables, original)
    order = np.array([1, 2, 0])
    found = predict(variables, jax.tree.map(lambda leaf: leaf[order], original))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[[0, 2]], b[[1, 0]], rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


def test_normalisation_by_hand() -> None:
    original = batch()
    pixels = (original.images.astype(float) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels[0, 50:] = 0
    pixels[0, :, 70:] = 0
    result = jax.jit(functools.partial(normalise, config=CONFIG))(
        original.images, original.image_sizes
    )
    np.testing.assert_allclose(result, pixels, rtol=1e-5, atol=1e-6)


def test_anchors_and_outputs_have_one_order(variables: Variables) -> None:
    """As many predictions as anchors, for a canvas whose P6 has cells that hang over its border
    too."""
    for canvas in (CANVAS, (64, 160)):
        shapes = jax.eval_shape(
            lambda v, b: MaskRCNN(CONFIG).apply(v, b, method=_outputs)[0],
            variables,
            example_batch(canvas),
        )
        assert shapes.logits.shape == (
            1,
            sum(len(level) for level in pyramid_anchors(CONFIG.rpn, canvas, CONFIG.strides)),
        )


def test_boxes_read_the_level_of_their_size() -> None:
    """Levels that hold their own number: P4 from a side of 56 on (canonical_size), P5 from 112, P3
    from 28, P2 below."""
    grids = ((16, 24), (8, 12), (4, 6), (2, 3))
    features = {
        f"p{k}": jnp.full((1, *grid, 1), k, jnp.float32)
        for k, grid in zip((2, 3, 4, 5), grids, strict=True)
    }
    sides = np.array([10, 27.9, 28, 55, 56, 64, 112, 300], np.float32)
    boxes = np.array([[[0, 0, side, side] for side in sides]], np.float32)
    valid = np.ones((1, len(sides)), bool)
    valid[0, 4] = False
    pooled = MaskRCNN(CONFIG).apply({}, features, boxes, valid, 3, method="_roi_features")
    np.testing.assert_allclose(
        np.asarray(pooled)[0, :, 0, 0, 0], [2, 2, 3, 3, 0, 4, 5, 5], rtol=1e-5
    )


def test_class_agnostic_masks_have_one_output() -> None:
    agnostic = replace(CONFIG, mask_head=replace(CONFIG.mask_head, class_agnostic=True))
    for config, count in ((CONFIG, 3), (agnostic, 1)):
        model = MaskRCNN(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0), example_batch(CANVAS))["params"]
        assert shapes["mask_head"]["logits"]["kernel"].shape == (8, count)
        assert shapes["box_head"]["logits"]["kernel"].shape == (32, 4)


def test_c4_halves_an_odd_side_upwards() -> None:
    model = MaskRCNN(replace(C4, mask_head=replace(C4.mask_head, pool_size=7)))
    example = example_batch(CANVAS)
    found = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), example)[0])
    assert found.detections.masks.shape[-2:] == (8, 8)
    assert model.config.mask_size == 8


def test_c4_reads_one_map_through_res5() -> None:
    """Cells of 16 pixels; res5 halves what the RoI operation gave, boxes see its average, and masks
    have twice its side."""
    model = MaskRCNN(C4)
    variables = initialise(model, example_batch(CANVAS), seed=0)
    assert set(variables["params"]) == {"resnet", "res5", "rpn", "box_head", "mask_head"}
    assert "layer4" not in variables["params"]["resnet"]
    assert set(variables["params"]["box_head"]) == {"logits", "deltas"}
    found = jax.tree.map(np.asarray, jax.jit(model.apply)(variables, batch()))
    assert found.detections.valid[:2].any()
    assert not found.detections.valid[2].any()
    assert found.detections.masks.shape == (3, 6, 6, 6)
    assert C4.mask_size == 6
    assert found.proposals.boxes.shape == (3, 12, 4)

    outputs = jax.jit(functools.partial(model.apply, method=_outputs))(variables, batch())
    assert outputs[0].logits.shape == (3, (64 // 16) * (96 // 16) * 15)
    # By hand: a RoI's features on the ramp that the map is, then res5, the average, a product.
    channels = variables["params"]["resnet"]["layer3"]["block0"]["conv2"]["bias"].shape[0]
    rows, columns = np.mgrid[:4, :6].astype(np.float32)
    ramp = (
        np.repeat(
            (16 * (rows + 0.5) + 1000 * 16 * (columns + 0.5))[None, ..., None], channels, axis=-1
        )
        / 1e4
    )
    box = np.array(
        [20, 18, 50, 42], np.float32
    )  # inside of the cells' centres: bilinear samples are the ramp itself
    y, x = (box[i] + (np.arange(6) + 0.5) / 6 * (box[i + 2] - box[i]) for i in (1, 0))
    pooled = (
        np.repeat((y[:, None] + 1000 * x[None])[None, ..., None], channels, axis=-1).astype(
            np.float32
        )
        / 1e4
    )
    res5 = {kind: tree["res5"] for kind, tree in variables.items()}
    maps = resnet_stage(C4.resnet, 5, dtype=jnp.float32, name="res5").apply(
        res5, pooled, live=False, mask_in=None, mask_out=None
    )
    assert maps.shape[1:3] == (3, 3)
    layer = variables["params"]["box_head"]["logits"]
    expected = np.asarray(maps).mean((1, 2)) @ np.asarray(layer["kernel"]) + np.asarray(
        layer["bias"]
    )
    output = model.apply(
        variables, {"c4": ramp}, box[None, None], np.ones((1, 1), bool), method="box_output"
    )
    np.testing.assert_allclose(output.logits[0], expected, rtol=1e-4, atol=1e-5)
    seen = model.apply(
        variables, {"c4": ramp}, box[None, None], np.ones((1, 1), bool), method="mask_features"
    )
    np.testing.assert_allclose(seen[0], maps, rtol=1e-4, atol=1e-5)


def test_live_res5_sees_boxes_that_exist_and_masks_its_running_statistics() -> None:
    resnet, box_head = replace(C4.resnet, norm="live"), replace(C4.box_head, pool_size=7)
    live = MaskRCNN(replace(C4, resnet=resnet, box_head=box_head))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: live.init(jax.random.key(0), example_batch(CANVAS)))
    variables = {
        kind: {
            name: jax.tree.map(
                lambda leaf: rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32),
                shapes[kind][name],
            )
            for name in ("res5", "box_head")
            if name in shapes[kind]
        }
        for kind in ("params", "batch_stats")
    }
    channels = shapes["params"]["resnet"]["layer3"]["block0"]["conv2"]["bias"].shape[0]
    maps = {"c4": rng.normal(size=(1, 4, 6, channels)).astype(np.float32)}
    corners = rng.uniform(0, 30, (1, 5, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(9, 30, (1, 5, 2))], 2).astype(np.float32)
    exists = np.array([[True, False, True, True, False]])
    train = functools.partial(
        live.apply, variables, maps, live=True, method="box_output", mutable=["batch_stats"]
    )
    found, moved = jax.jit(train)(boxes, exists)
    expected, statistics = jax.jit(train)(boxes[:, exists[0]], np.ones((1, 3), bool))
    for name in ("logits", "deltas"):
        ours, theirs = getattr(found, name)[exists], getattr(expected, name)[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), moved, statistics
    )
    masks = [
        jax.jit(functools.partial(model.apply, variables, maps, method="mask_features"))(
            boxes, exists
        )
        for model in (live, MaskRCNN(C4))
    ]
    np.testing.assert_array_equal(*masks)


def test_a_deterministic_network_sums_the_gradients_of_boxes_in_integers_on_a_gpu() -> None:
    features = {f"p{k}": jnp.ones((1, 64 >> k, 96 >> k, 1), jnp.float32) for k in (2, 3, 4, 5)}
    boxes, valid = jnp.array([[[0, 0, 30, 40]]], jnp.float32), jnp.ones((1, 1), bool)
    for deterministic, kind in ((False, "f32"), (True, "i32")):
        model = MaskRCNN(CONFIG, deterministic=deterministic)
        pool = functools.partial(model.apply, {}, method="_roi_features")
        traced = jax.jit(jax.grad(lambda maps: pool(maps, boxes, valid, 3).sum())).trace(features)  # noqa: B023
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        sums = re.findall(r"stablehlo\.scatter.*?\^bb0\(%\w+: tensor<(\w+)>", program, re.DOTALL)
        assert set(sums) == {kind}


def test_imported_batch_norm_in_neck_and_heads() -> None:
    """Convolutions with batch norm, by its running statistics, are those of the plain network with
    scaled kernels and shifted biases."""
    plain = replace(CONFIG, box_head=replace(CONFIG.box_head, convs=1, conv_channels=8, fcs=1))
    normed = replace(
        plain,
        fpn_norm="frozen_batch",
        box_head=replace(plain.box_head, norm="frozen_batch"),
        mask_head=replace(plain.mask_head, norm="frozen_batch"),
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: MaskRCNN(normed).init(jax.random.key(0), example_batch(CANVAS)))
    variables = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes
    )
    flat = flatten_dict(variables, sep="/")
    for path in flat:
        if path.endswith("/var"):
            flat[path] = np.abs(flat[path]) + 0.5
    folded = {}
    heads = ("params/fpn/", "params/box_head/conv", "params/mask_head/conv")
    for path, leaf in flat.items():
        if path.startswith(heads):
            layer = path.rpartition("/")[0]
            statistics = layer.replace("params", "batch_stats", 1)
            factor = flat[f"{layer}/scale"] / np.sqrt(flat[f"{statistics}/var"] + 1e-5)
            if path.endswith("/kernel"):
                folded[path] = (leaf * factor)[0, 0] if "lateral" in path else leaf * factor
            elif path.endswith("/bias"):
                folded[path] = leaf - flat[f"{statistics}/mean"] * factor
        elif not path.startswith(tuple(head.replace("params", "batch_stats") for head in heads)):
            folded[path] = leaf
    results = [
        jax.jit(functools.partial(MaskRCNN(config).apply, method=_outputs))(
            unflatten_dict(tree, sep="/"), batch()
        )
        for config, tree in ((normed, flat), (plain, folded))
    ]
    for ours, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(
            ours, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max())
        )


def test_masks_are_refined_by_the_finest_map() -> None:
    """Two doublings of what the mask branch gives, the cells nearest to an even chance predicted
    anew, in plain loops."""
    config = replace(
        CONFIG,
        mask_head=replace(
            CONFIG.mask_head, refine=PointRendConfig(steps=2, points=40, channels=8, fcs=1)
        ),
    )
    model, rng = MaskRCNN(config), np.random.default_rng(0)
    kernels = {
        "conv1": (3, 3, 16, 8),
        "conv2": (3, 3, 8, 8),
        "deconv": (3, 3, 8, 8),
        "logits": (8, 3),
        "fc1": (17, 8),
        "last": (9, 3),
    }
    params: dict[str, Any] = {
        name: {
            leaf: rng.normal(scale=0.5, size=size).astype(np.float32)
            for leaf, size in (("kernel", shape), ("bias", shape[-1:]))
        }
        for name, shape in kernels.items()
    }
    params["points"] = {"fc1": params.pop("fc1"), "logits": params.pop("last")}
    maps = {
        f"p{i}": rng.normal(size=(1, 64 >> i, 96 >> i, 16)).astype(np.float32)
        for i in (2, 3, 4, 5, 6)
    }
    boxes, labels, valid = (
        np.array([[[4, 8, 60, 40], [30, 2, 90, 62]]], np.float32),
        np.array([[3, 1]], np.int32),
        np.ones((1, 2), bool),
    )
    apply = functools.partial(model.apply, {"params": {"mask_head": params}})

    @jax.jit
    def run() -> tuple[jax.Array, jax.Array]:
        pooled = apply(maps, boxes, valid, method="mask_features")
        instances = Instances(boxes=boxes, labels=labels, valid=valid)
        masks, _ = apply(maps, instances, method="scored_masks")
        return apply(pooled, valid, method="mask_logits"), masks

    logits, masks = map(np.asarray, run())
    assert masks.shape == (1, 2, 32, 32)
    layers = params["points"]
    for n, (box, label) in enumerate(zip(boxes[0], labels[0], strict=True)):
        coarse = mask = logits[0, n, :, :, label - 1].astype(float)
        for side in (16, 32):
            mask = np.array(
                [
                    [bilinear_loop(mask, (j + 0.5) / 2, (i + 0.5) / 2) for j in range(side)]
                    for i in range(side)
                ]
            )
            for cell in np.argsort(np.abs(mask).ravel())[:40]:
                i, j = divmod(int(cell), side)
                x, y = (j + 0.5) / side, (i + 0.5) / side
                seen = bilinear_loop(coarse, 8 * x, 8 * y)
                at = (box[:2] + [x, y] * (box[2:] - box[:2])) / 4
                hidden = (
                    np.append(bilinear_loop(maps["p2"][0], *at), seen) @ layers["fc1"]["kernel"]
                    + layers["fc1"]["bias"]
                )
                last = np.append(np.maximum(hidden, 0), seen)
                mask[i, j] = (
                    last @ layers["logits"]["kernel"][:, label - 1]
                    + layers["logits"]["bias"][label - 1]
                )
        np.testing.assert_allclose(masks[0, n], 1 / (1 + np.exp(-mask)), rtol=1e-3, atol=1e-4)


def test_training_may_have_more_proposals() -> None:
    config = replace(CONFIG, rpn=replace(CONFIG.rpn, train_pre_nms=90, train_proposals=30))
    anchors = sum(len(level) for level in pyramid_anchors(config.rpn, CANVAS, config.strides))
    rng = np.random.default_rng(0)
    output = RPNOutput(
        logits=jnp.array(rng.normal(size=(3, anchors)), jnp.float32),
        deltas=jnp.array(rng.normal(size=(3, anchors, 4)) / 9, jnp.float32),
    )
    few, many = (
        jax.jit(functools.partial(select_proposals, config=config, train=train))(output, batch())
        for train in (False, True)
    )
    assert few.boxes.shape == (3, 12, 4)
    assert many.boxes.shape == (3, 30, 4)
    assert many.valid[:2].all()
    np.testing.assert_array_equal(many.boxes[:, :12], few.boxes)
    wide = replace(config, rpn=replace(config.rpn, pre_nms=1))  # training's own number counts
    select = functools.partial(select_proposals, config=wide, train=True)
    np.testing.assert_array_equal(jax.jit(select)(output, batch()).valid, many.valid)


def _outputs(model: MaskRCNN, batch: Batch) -> Any:
    """The heads' output on fixed boxes: no choice lies between the image and these numbers."""
    features = model.features(batch)
    boxes = jnp.broadcast_to(
        jnp.array([[[4, 4, 30, 40], [10, 2, 69, 49], [20, 20, 29, 27]]], jnp.float32),
        (len(batch.valid), 3, 4),
    )
    valid = jnp.ones(boxes.shape[:2], bool)
    return (
        model.rpn_output(features, batch),
        model.box_output(features, boxes, valid),
        model.mask_logits(model.mask_features(features, boxes, valid), valid),
    )


def test_bfloat16_computes_nearly_the_same_and_hands_over_float32(variables: Variables) -> None:
    results = []
    for dtype in ("float32", "bfloat16"):
        model = MaskRCNN(replace(CONFIG, compute_dtype=dtype))
        results.append(jax.jit(lambda v, b: model.apply(v, b, method=_outputs))(variables, batch()))  # noqa: B023
    names = ("rpn logits", "rpn deltas", "box logits", "box deltas", "masks")
    for name, exact, rough in zip(names, *map(jax.tree.leaves, results), strict=True):
        assert exact.dtype == rough.dtype == jnp.float32
        error = float(jnp.abs(exact - rough).max() / jnp.abs(exact).max())
        assert 0 < error < 0.05, name  # eight bits, through some 20 layers
    found = jax.eval_shape(program("bfloat16"), variables, batch())
    for leaf in (
        found.proposals.boxes,
        found.proposals.scores,
        found.detections.boxes,
        found.detections.scores,
        found.detections.masks,
    ):
        assert leaf.dtype == jnp.float32
