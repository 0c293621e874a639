"""The region proposal network against plain NumPy loops that spell out the report's constants, and
the laws of padded sets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.laws import POISONS, Rows, poisoned
from ops.test_boxes import iou_loop
from ops.test_nms import greedy

from mrcnn_jax.config.model import ModelConfig, RPNConfig
from mrcnn_jax.models.rpn import (
    RPNHead,
    RPNOutput,
    RPNTargets,
    pyramid_anchors,
    rpn_labels,
    rpn_loss,
    rpn_proposals,
    rpn_targets,
    usable_anchors,
)
from mrcnn_jax.structures import Instances

CONFIG = RPNConfig(scales=(8, 16, 32, 64, 128), box_weights=(2.0, 2.0, 1.0, 0.5))
WEIGHTS = np.array(CONFIG.box_weights)
CANVAS = (64, 96)
SIZE = np.array([50, 70], np.int32)
STRIDES = ModelConfig().strides
LEVELS = pyramid_anchors(CONFIG, CANVAS, STRIDES)
ANCHORS = np.concatenate(LEVELS)
LIMITS = np.array([70, 50, 70, 50], np.float32)  # x, y, x, y


def instances(boxes: Any, valid: Any = None, **fields: Any) -> Instances:
    boxes = jnp.asarray(boxes, jnp.float32).reshape(-1, 4)
    return Instances(
        boxes=boxes,
        valid=jnp.ones(len(boxes), bool) if valid is None else jnp.asarray(valid, bool),
        **fields,
    )


def near(boxes: np.ndarray, seed: int, *, shift: float = 0.2, growth: float = 0.3) -> np.ndarray:
    """`boxes` with centres moved by up to `shift` of a side, and sides changed by up to `growth` of
    themselves."""
    rng = np.random.default_rng(seed)
    sides = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + sides * rng.uniform(-shift, shift, sides.shape)
    half = sides * rng.uniform(1 - growth, 1 + growth, sides.shape) / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def encode_loop(box: np.ndarray, anchor: np.ndarray) -> list[float]:
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box.astype(float), anchor.astype(float)
    wa, ha = a2 - a1, b2 - b1
    return [
        ((x1 + x2) - (a1 + a2)) / 2 / wa,
        ((y1 + y2) - (b1 + b2)) / 2 / ha,
        math.log((x2 - x1) / wa),
        math.log((y2 - y1) / ha),
    ]


def giou_loop(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boxes; Rezatofighi et al. 2019, algorithm 1."""
    a, b = a.astype(float), b.astype(float)
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap
    hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return float(overlap / union - (hull - union) / hull)


def decode_loop(delta: np.ndarray, anchor: np.ndarray, limits: np.ndarray | None) -> np.ndarray:
    """One box, cut at the image's borders if these are given."""
    (tx, ty, tw, th), (a1, b1, a2, b2) = delta.astype(float), anchor.astype(float)
    wa, ha = a2 - a1, b2 - b1
    x, y = (a1 + a2) / 2 + tx * wa, (b1 + b2) / 2 + ty * ha
    w, h = wa * min(math.exp(tw), 62.5), ha * min(math.exp(th), 62.5)
    box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return (box if limits is None else np.clip(box, 0, limits)).astype(np.float32)


def smooth_l1_loop(pred: Any, target: Any, beta: float = 1.0) -> float:
    """Summed over the four deltas."""
    distances = [abs(float(p) - float(t)) for p, t in zip(pred, target, strict=True)]
    return sum(d * d / (2 * beta) if d < beta else d - beta / 2 for d in distances)


def assert_loss_laws(
    function: Callable[[Rows, np.ndarray], Any],
    rows: Rows,
    valid: np.ndarray,
    *,
    random: bool = False,
) -> None:
    """The laws of padded sets for `function`(rows, valid), a loss and its gradients by predictions
    or weights.

    random: the draw of samples depends on the order and the number of rows, so that only poison
    changes nothing.
    """
    function = jax.jit(function)
    reference = function(rows, valid)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reference))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(reference))
    for poison in POISONS:
        jax.tree.map(
            np.testing.assert_array_equal, function(poisoned(rows, valid, poison), valid), reference
        )
    if random:
        return
    order = np.append(np.random.default_rng(0).permutation(len(valid)), [0] * 5)
    for chosen, still in (
        (order[:-5], valid[order[:-5]]),
        (order, np.append(valid[order[:-5]], [False] * 5)),
    ):
        changed = function({name: values[chosen] for name, values in rows.items()}, still)
        for ours, expected in zip(
            jax.tree.leaves(changed), jax.tree.leaves(reference), strict=True
        ):
            np.testing.assert_allclose(
                ours, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max()
            )


# Network


def head_and_params(batch_norm: bool) -> tuple[RPNHead, dict[str, Any]]:
    """A head of 3 channels that passes each cell on untouched: channel r is the logit of ratio r,
    and d times it are its deltas."""
    conv = np.zeros((3, 3, 3, 3), np.float32)
    conv[1, 1] = np.eye(3)
    deltas = np.zeros((3, 12), np.float32)
    for ratio in range(3):
        deltas[ratio, 4 * ratio : 4 * ratio + 4] = (1, 2, 3, 4)
    params: dict[str, Any] = {
        "conv1": {"kernel": conv}
        if batch_norm
        else {"kernel": conv, "bias": np.zeros(3, np.float32)},
        "logits": {"kernel": np.eye(3, dtype=np.float32), "bias": np.zeros(3, np.float32)},
        "deltas": {"kernel": deltas, "bias": np.zeros(12, np.float32)},
    }
    return RPNHead(replace(CONFIG, batch_norm=batch_norm), STRIDES), params


def grids() -> list[tuple[int, int]]:
    return [(-(-CANVAS[0] // stride), -(-CANVAS[1] // stride)) for stride in STRIDES]


def test_one_hot_cell_lights_its_own_anchor() -> None:
    head, params = head_and_params(batch_norm=False)

    @jax.jit
    def output(features: list[jax.Array]) -> Any:
        return head.apply(
            {"params": params},
            features,
            image_sizes=jnp.array([CANVAS], jnp.int32),
            valid=jnp.ones(1, bool),
        )

    for level, row, column, ratio in (
        (0, 3, 17, 0),
        (0, 15, 0, 2),
        (1, 5, 11, 1),
        (2, 0, 5, 2),
        (3, 1, 2, 0),
        (4, 0, 1, 2),
    ):
        features = [np.zeros((1, *grid, 3), np.float32) for grid in grids()]
        features[level][0, row, column, ratio] = 1
        result = jax.tree.map(np.asarray, output(features))
        assert result.logits.shape == (1, len(ANCHORS))
        (lit,) = np.nonzero(result.logits[0])
        assert len(lit) == 1
        x, y, scale = (
            (column + 0.5) * STRIDES[level],
            (row + 0.5) * STRIDES[level],
            CONFIG.scales[level],
        )
        width, height = (
            scale / math.sqrt(CONFIG.ratios[ratio]),
            scale * math.sqrt(CONFIG.ratios[ratio]),
        )
        np.testing.assert_allclose(
            ANCHORS[lit[0]],
            [x - width / 2, y - height / 2, x + width / 2, y + height / 2],
            rtol=1e-6,
        )
        np.testing.assert_array_equal(result.deltas[0, lit[0]], [1, 2, 3, 4])
        assert np.count_nonzero(result.deltas) == 4


def test_one_map_has_anchors_of_every_scale_at_each_cell() -> None:
    """C4: a cell's outputs go by scale, then by ratio."""
    config = replace(CONFIG, scales=(8, 16), ratios=(1.0, 4.0), batch_norm=False)
    (anchors,) = pyramid_anchors(config, (32, 48), (16,))
    assert anchors[:4].tolist() == [[4, 4, 12, 12], [6, 0, 10, 16], [0, 0, 16, 16], [4, -8, 12, 24]]
    assert anchors[4].tolist() == [20, 4, 28, 12]
    head = RPNHead(config, (16,))
    features = [jnp.ones((1, 2, 3, 5), jnp.float32)]
    sizes = {"image_sizes": jnp.array([[32, 48]], jnp.int32), "valid": jnp.ones(1, bool)}
    params = jax.eval_shape(functools.partial(head.init, **sizes), jax.random.key(0), features)[
        "params"
    ]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    params["logits"]["bias"] = jnp.arange(4, dtype=jnp.float32)
    params["deltas"]["bias"] = jnp.arange(16, dtype=jnp.float32)
    output = head.apply({"params": params}, features, **sizes)
    assert output.logits[0].tolist() == [0, 1, 2, 3] * 6
    assert output.deltas[0, :5, 1].tolist() == [1, 5, 9, 13, 1]
    assert len(anchors) == 24


def test_anchor_grids_of_other_projects() -> None:
    """At the corners of cells, and torchvision's, whose stride is canvas // cells: 800 // 13 is 61
    where 64 pixels are meant."""
    canvas = (800, 1088)
    for grid, strides in (("corner", (64, 64)), ("torchvision", (61, 64))):
        p6 = pyramid_anchors(
            replace(CONFIG, scales=(32, 64, 128, 256, 512), anchor_grid=grid), canvas, STRIDES
        )[4]
        centres = (p6[:, :2] + p6[:, 2:]).reshape(13, 17, 3, 2) / 2
        for row, column in np.ndindex(13, 17):
            np.testing.assert_allclose(
                centres[row, column], [[column * strides[1], row * strides[0]]] * 3, atol=1e-3
            )
        whole = bool((p6 == np.round(p6)).all())
        assert whole == (grid == "torchvision")


def test_anchors_in_the_padding_count_if_so_configured() -> None:
    config = replace(CONFIG, anchors_in_padding=True)
    assert usable_anchors(config, jnp.asarray(ANCHORS), SIZE).all()
    assert not usable_anchors(CONFIG, jnp.asarray(ANCHORS), SIZE).all()
    # The likeliest anchor is centred at (88, 8), right of the image, and reaches into it.
    logits = np.zeros(len(ANCHORS), np.float32)
    (outside,) = np.flatnonzero(
        (ANCHORS[:, 0] < 66) & (ANCHORS[:, 0] + ANCHORS[:, 2] == 176) & (ANCHORS[:, 1] < 0)
    )[:1]
    logits[outside] = 5
    output = RPNOutput(logits=jnp.array(logits), deltas=jnp.zeros((len(ANCHORS), 4), jnp.float32))
    for setting, expected in (
        (config, np.clip(ANCHORS[outside], 0, LIMITS).tolist()),
        (CONFIG, None),
    ):
        best = (
            jax.jit(lambda output, size: rpn_proposals(output, LEVELS, size, setting))(output, SIZE)  # noqa: B023
            .boxes[0]
            .tolist()
        )
        assert (best == expected) == (setting is config)


def test_an_anchor_that_touches_the_border_is_inside() -> None:
    inside = [[0, 0, 10, 10], [60, 40, 70, 50]]
    across = [[-0.1, 0, 10, 10], [0, -0.1, 10, 10], [60, 40, 70.1, 50], [60, 40, 70, 50.1]]
    config = replace(CONFIG, anchors_across_border=False)
    usable = usable_anchors(config, jnp.array(inside + across, jnp.float32), SIZE)
    assert usable.tolist() == [True] * 2 + [False] * 4


def test_two_convolutions() -> None:
    """The second sees the first one's positive part."""
    head = RPNHead(replace(CONFIG, convs=2, batch_norm=False, ratios=(1.0,)), STRIDES)
    conv = np.zeros((3, 3, 1, 1), np.float32)
    params: dict[str, Any] = {
        f"conv{i}": {"kernel": conv.copy(), "bias": np.zeros(1, np.float32)} for i in (1, 2)
    }
    params["conv1"]["kernel"][1, 1], params["conv2"]["kernel"][1, 0] = (
        -2,
        3,
    )  # minus twice the cell; thrice the cell to the left
    params["logits"] = {"kernel": np.ones((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    params["deltas"] = {"kernel": np.ones((1, 4), np.float32), "bias": np.zeros(4, np.float32)}
    features = [
        np.random.default_rng(0).normal(size=(1, *grid, 1)).astype(np.float32) for grid in grids()
    ]
    output = head.apply(
        {"params": params},
        features,
        image_sizes=jnp.array([CANVAS], jnp.int32),
        valid=jnp.ones(1, bool),
    )
    first = 6 * np.maximum(-features[0][0, ..., 0], 0)
    expected = np.pad(first, ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_allclose(output.logits[0, : expected.size], expected.ravel(), rtol=1e-5)


def test_batch_norm_has_one_set_of_statistics_over_the_cells_on_images() -> None:
    """All levels and images together; neither the canvas's padding nor an image that is not valid
    has a part in them."""
    head, params = head_and_params(batch_norm=True)
    rng = np.random.default_rng(0)
    sizes, valid = np.array([SIZE, CANVAS, CANVAS], np.int32), np.array([True, True, False])
    scale, bias = (rng.uniform(0.5, 2, 3).astype(np.float32) for _ in range(2))
    old = {
        "mean": rng.normal(size=3).astype(np.float32),
        "var": rng.uniform(1, 2, 3).astype(np.float32),
    }
    features = [
        rng.normal(loc=level, size=(3, *grid, 3)).astype(np.float32)
        for level, grid in enumerate(grids())
    ]
    on_image = []
    for (rows, columns), stride in zip(grids(), STRIDES, strict=True):
        mask = np.zeros((3, rows, columns), bool)
        for image, i, j in np.ndindex(mask.shape):
            mask[image, i, j] = (
                valid[image] and i * stride < sizes[image, 0] and j * stride < sizes[image, 1]
            )
        on_image.append(mask)

    def forward(features: list[np.ndarray], live: bool) -> Any:
        variables = {
            "params": {**params, "norm": {"scale": scale, "bias": bias}},
            "batch_stats": {"norm": old},
        }
        return head.apply(
            variables, features, image_sizes=sizes, valid=valid, live=live, mutable=["batch_stats"]
        )

    def expected(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        cells = np.concatenate([level.reshape(3, -1, 3) for level in features], axis=1)
        return np.maximum((cells - mean) / np.sqrt(var + 1e-5) * scale + bias, 0).reshape(3, -1)

    live = jax.jit(functools.partial(forward, live=True))
    output, updated = live(features)
    cells = np.concatenate(
        [level[mask] for level, mask in zip(features, on_image, strict=True)]
    ).astype(np.float64)
    mean, var = cells.mean(0), cells.var(0)
    np.testing.assert_allclose(output.logits, expected(mean, var), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        updated["batch_stats"]["norm"]["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-5
    )
    np.testing.assert_allclose(
        updated["batch_stats"]["norm"]["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-5
    )

    garbage = [
        np.where(mask[..., None], level, np.float32(1e6))
        for level, mask in zip(features, on_image, strict=True)
    ]
    jax.tree.map(np.testing.assert_array_equal, live(garbage)[1], updated)

    output, kept = jax.jit(functools.partial(forward, live=False))(features)
    np.testing.assert_allclose(
        output.logits, expected(old["mean"], old["var"]), rtol=1e-4, atol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"]["norm"], old)


def test_initialisation_is_normal_of_a_hundredth() -> None:
    features = [np.zeros((1, *grid, 32), np.float32) for grid in grids()]
    head = RPNHead(CONFIG, STRIDES)
    init = functools.partial(
        head.init, image_sizes=jnp.array([CANVAS], jnp.int32), valid=jnp.ones(1, bool)
    )
    params = jax.jit(init)(jax.random.key(0), features)["params"]
    assert set(params["conv1"]) == {"kernel"}  # batch norm has the bias
    for name, tolerance in (("conv1", 0.05), ("logits", 0.3), ("deltas", 0.15)):
        assert float(params[name]["kernel"].std()) == pytest.approx(0.01, rel=tolerance)


# Targets

GROUND_TRUTH = near(ANCHORS[[256, 693, 1232, 1242, 1461, 1463, 1509]], seed=2)
GROUND_TRUTH = np.concatenate([GROUND_TRUTH, [[18.5, 30.1, 24.6, 34.9], [5, 5, 25, 25]]]).astype(
    np.float32
)
GT_VALID = np.array([True] * 8 + [False])
CROWD = np.array([[0, 0, 30.7, 21.3], [40.3, 30.9, 60.1, 48.3], [0, 0, 70, 50]], np.float32)
CROWD_VALID = np.array([True, True, False])


def usable_loop(across_border: bool) -> np.ndarray:
    usable = []
    for x1, y1, x2, y2 in ANCHORS.astype(float):
        inside = x1 >= 0 and y1 >= 0 and x2 <= 70 and y2 <= 50
        usable.append((x1 + x2) / 2 < 70 and (y1 + y2) / 2 < 50 and (across_border or inside))
    return np.array(usable)


@pytest.mark.parametrize("across_border", [True, False])
def test_labels_equal_a_loop(across_border: bool) -> None:
    config = replace(CONFIG, anchors_across_border=across_border)
    usable = usable_loop(across_border)
    np.testing.assert_array_equal(
        jax.jit(functools.partial(usable_anchors, config))(ANCHORS, SIZE), usable
    )

    overlap = iou_loop(ANCHORS, GROUND_TRUTH[GT_VALID])
    best = overlap.max(1)
    positive = usable & (best >= 0.7)
    for column in overlap.T:
        touched = np.where(usable, column, 0)
        if touched.max() > 0:
            assert (
                np.sort(touched)[-1] - np.sort(touched)[-2] > 1e-5
            )  # no ties: these are a test by hand below
            positive[touched.argmax()] = True
    crowded = np.zeros(len(ANCHORS), bool)
    for i, (x1, y1, x2, y2) in enumerate(ANCHORS.astype(float)):
        for c1, d1, c2, d2 in CROWD[CROWD_VALID].astype(float):
            shared = max(min(x2, c2) - max(x1, c1), 0) * max(min(y2, d2) - max(y1, d1), 0)
            crowded[i] |= shared / ((x2 - x1) * (y2 - y1)) >= 0.5
    negative = usable & ~positive & (best < 0.3) & ~crowded

    labels = jax.jit(functools.partial(rpn_labels, config=config))
    result = labels(
        ANCHORS, usable, instances(GROUND_TRUTH, GT_VALID), instances(CROWD, CROWD_VALID)
    )
    np.testing.assert_array_equal(result[0], positive)
    np.testing.assert_array_equal(result[1], negative)
    np.testing.assert_array_equal(np.asarray(result[2])[positive], overlap.argmax(1)[positive])
    # Every rule decides about some anchor here, so that another threshold would be another result.
    rest = usable & ~positive
    assert (positive & (best < 0.7)).any()
    assert (rest & crowded & (best < 0.3)).any()
    for low, high, among in (
        (0.7, 0.75, positive),
        (0.6, 0.7, rest),
        (0.3, 0.35, rest),
        (0.25, 0.3, negative),
    ):
        assert (among & (best > low) & (best < high)).any()


def test_labels_at_the_borders_of_the_rules() -> None:
    ground_truth = instances([[0, 0, 10, 10], [42, 2, 52, 12], [100, 100, 104, 104]])
    cases = [
        ([0, 0, 10, 10], "positive"),
        ([0, 0, 10, 7], "positive"),  # IoU 0.7
        ([0, 0, 10, 6.9], "ignored"),
        ([0, 0, 10, 3], "ignored"),  # IoU 0.3
        ([0, 0, 10, 2.9], "negative"),
        ([50, 0, 70, 10], "ignored"),  # half of it in the crowd region
        ([51, 0, 71, 10], "negative"),
        ([42, 2, 52, 12], "positive"),  # in the crowd region: that is no matter to a positive
        ([98, 98, 108, 108], "positive"),  # IoU 0.16, and the best
        ([98, 98, 108, 108], "positive"),  # as good
        ([97, 98, 108, 108], "negative"),
    ]
    anchors = np.array([box for box, _ in cases], np.float32)
    labels = jax.jit(functools.partial(rpn_labels, config=CONFIG))
    positive, negative, _ = labels(
        anchors, np.ones(len(cases), bool), ground_truth, instances([[40, 0, 60, 20]])
    )
    found = [
        "positive" if p else "negative" if n else "ignored"
        for p, n in zip(positive, negative, strict=True)
    ]
    assert found == [label for _, label in cases]


TARGETS = jax.jit(rpn_targets, static_argnames="config")
SMALL = replace(CONFIG, samples=24)


def test_samples_are_one_to_one_as_far_as_there_are_positives() -> None:
    usable = usable_loop(across_border=True)
    ignore = instances(CROWD, CROWD_VALID)
    labels = jax.jit(functools.partial(rpn_labels, config=CONFIG))
    many = near(ANCHORS[np.flatnonzero(usable)[::60]], seed=1, shift=0.05, growth=0.1)
    drawn = []
    for boxes, key in ((many, 0), (many, 1), (many[:2], 2), (np.zeros((1, 4)), 3)):
        ground_truth = instances(boxes, boxes[:, 2] > 0)
        positive, negative, gt_index = map(
            np.asarray, labels(ANCHORS, usable, ground_truth, ignore)
        )
        targets = jax.tree.map(
            np.asarray,
            TARGETS(jax.random.key(key), ANCHORS, SIZE, ground_truth, ignore, config=SMALL),
        )
        indices, chosen = targets.samples.indices, targets.samples.positive
        wanted = min(12, positive.sum())
        assert targets.samples.valid.all()
        assert chosen.sum() == wanted
        assert positive[indices[chosen]].all()
        assert negative[indices[~chosen]].all()
        assert len(set(indices)) == 24
        for row in np.flatnonzero(chosen):
            deltas = encode_loop(boxes[gt_index[indices[row]]], ANCHORS[indices[row]])
            expected = np.array(deltas) * WEIGHTS
            np.testing.assert_allclose(targets.deltas[row], expected, rtol=1e-4, atol=1e-5)
        drawn.append((wanted, set(indices)))
    assert drawn[0][0] == 12
    assert drawn[0][1] != drawn[1][1]  # another key, another draw
    assert 2 <= drawn[2][0] < 12
    assert drawn[3][0] == 0


def batch_of_targets() -> tuple[RPNOutput, RPNTargets]:
    """Three images: objects, none, objects."""
    rng = np.random.default_rng(2)
    images = [
        TARGETS(
            jax.random.key(i),
            ANCHORS,
            SIZE,
            instances(GROUND_TRUTH, valid),
            instances(CROWD, CROWD_VALID),
            config=SMALL,
        )
        for i, valid in enumerate((GT_VALID, GT_VALID & False, GT_VALID))
    ]
    logits, deltas = (
        rng.normal(size=(3, len(ANCHORS))),
        rng.normal(scale=1.5, size=(3, len(ANCHORS), 4)),
    )
    output = RPNOutput(logits=jnp.array(logits, jnp.float32), deltas=jnp.array(deltas, jnp.float32))
    return output, jax.tree.map(lambda *leaves: jnp.stack(leaves), *images)


VALUE_AND_GRAD = jax.jit(
    lambda output, targets, image_valid, config: jax.value_and_grad(
        lambda output: (lambda values: (sum(values.values()), values))(
            rpn_loss(output, targets, image_valid, config)
        ),
        has_aux=True,
    )(output),
    static_argnames="config",
)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, smooth_l1_beta=0.5, objectness_loss_weight=2.0, box_loss_weight=3.0),
        replace(SMALL, box_loss="giou"),
    ],
)
def test_loss_equals_a_loop(config: RPNConfig) -> None:
    output, targets = batch_of_targets()
    # Slots that stayed empty, in the first image.
    valid = targets.samples.valid.at[0, 20:].set(False)
    targets = targets.replace(samples=replace(targets.samples, valid=valid))
    image_valid = np.array([True, True, False])
    samples = jax.tree.map(np.asarray, targets.samples)
    objectness, box, count = 0.0, 0.0, 0
    for image, slot in np.ndindex(samples.indices.shape):
        if not (image_valid[image] and samples.valid[image, slot]):
            continue
        count += 1
        anchor, logit = (
            samples.indices[image, slot],
            float(output.logits[image, samples.indices[image, slot]]),
        )
        probability = 1 / (1 + math.exp(-logit))
        objectness -= math.log(probability if samples.positive[image, slot] else 1 - probability)
        if samples.positive[image, slot]:
            deltas, target = np.asarray(output.deltas[image, anchor]), targets.deltas[image, slot]
            if config.box_loss == "giou":
                box += 1 - giou_loop(
                    *(decode_loop(d / WEIGHTS, ANCHORS[anchor], None) for d in (deltas, target))
                )
            else:
                box += smooth_l1_loop(deltas, target, config.smooth_l1_beta)
    assert count == 44
    (_, values), _ = VALUE_AND_GRAD(output, targets, image_valid, config=config)
    assert float(values["rpn_objectness"]) == pytest.approx(
        config.objectness_loss_weight * objectness / count, rel=1e-5
    )
    assert float(values["rpn_box"]) == pytest.approx(config.box_loss_weight * box / count, rel=1e-5)


def test_an_image_without_objects_has_no_box_loss() -> None:
    output, targets = batch_of_targets()
    (_, values), gradient = VALUE_AND_GRAD(
        output, targets, np.array([False, True, False]), config=SMALL
    )
    assert float(values["rpn_box"]) == 0
    assert float(values["rpn_objectness"]) > 0
    assert (np.asarray(gradient.deltas) == 0).all()
    assert np.isfinite(gradient.logits).all()
    assert np.count_nonzero(gradient.logits[1]) == SMALL.samples  # negatives all
    # Nor is there anything to divide by where no image is valid.
    (_, values), gradient = VALUE_AND_GRAD(output, targets, np.zeros(3, bool), config=SMALL)
    assert [float(value) for value in values.values()] == [0, 0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_an_image_that_is_not_valid_changes_nothing() -> None:
    output, targets = batch_of_targets()
    first = jax.tree.map(lambda leaf: leaf[:2], (output, targets))
    (_, expected), reference = VALUE_AND_GRAD(*first, np.ones(2, bool), config=SMALL)
    for poison in (np.nan, 1e9):
        output = jax.tree.map(lambda leaf: leaf.at[2].set(poison), output)  # noqa: B023
        targets = targets.replace(deltas=targets.deltas.at[2].set(poison))
        (_, values), gradient = VALUE_AND_GRAD(
            output, targets, np.array([True, True, False]), config=SMALL
        )
        for name, value in expected.items():
            assert float(values[name]) == pytest.approx(float(value), rel=1e-6)
        for ours, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(ours[:2], leaf, rtol=1e-6)
            assert (np.asarray(ours[2]) == 0).all()


@pytest.mark.parametrize("varied", ["ground_truth", "ignore"])
def test_laws_of_padded_sets(varied: str) -> None:
    """Losses and their gradients by the predictions, as functions of one of the two sets that the
    targets are made from."""
    output = jax.tree.map(lambda leaf: leaf[:1], batch_of_targets()[0])

    def function(rows: Rows, valid: np.ndarray) -> Any:
        sets = {
            "ground_truth": instances(GROUND_TRUTH, GT_VALID),
            "ignore": instances(CROWD, CROWD_VALID),
        }
        sets[varied] = Instances(valid=jnp.asarray(valid), **rows)
        targets = rpn_targets(
            jax.random.key(4), jnp.asarray(ANCHORS), jnp.asarray(SIZE), config=SMALL, **sets
        )
        batch = jax.tree.map(lambda leaf: leaf[None], targets)
        values, vjp = jax.vjp(
            lambda output: rpn_loss(output, batch, jnp.ones(1, bool), SMALL), output
        )
        return values, vjp({name: jnp.float32(1) for name in values})

    boxes, valid = (GROUND_TRUTH, GT_VALID) if varied == "ground_truth" else (CROWD, CROWD_VALID)
    assert_loss_laws(function, {"boxes": boxes}, valid)


# Proposals


@pytest.mark.parametrize("pre_nms", [40, 2000])
def test_proposals_equal_a_loop(pre_nms: int) -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(size=len(ANCHORS)).astype(np.float32)
    deltas = rng.normal(scale=0.3, size=(len(ANCHORS), 4)).astype(np.float32)
    tiny, wide = rng.choice(len(ANCHORS), (2, 100), replace=False)
    deltas[tiny, 2] = math.log(
        5e-4 / 8
    )  # 0.5 to 1 thousandths of a pixel on P2, more on the others
    deltas[wide, 3] = 9  # clipped at log(1000 / 16)

    survivors: list[tuple[float, np.ndarray]] = []
    dropped = start = 0
    for level in LEVELS:
        centre = (level[:, :2] + level[:, 2:]) / 2
        rows = [
            i
            for i in np.argsort(-logits[start : start + len(level)], kind="stable")
            if centre[i, 0] < 70 and centre[i, 1] < 50
        ]
        rows = rows[:pre_nms]
        moves = deltas / WEIGHTS
        boxes = np.array([decode_loop(moves[start + i], level[i], LIMITS) for i in rows])
        valid = (boxes[:, 2:] - boxes[:, :2] >= 1e-3).all(1)
        dropped += (~valid).sum()
        kept = greedy(boxes, logits[start + np.array(rows)], valid, 0.5, len(rows))
        survivors += [(1 / (1 + math.exp(-logits[start + rows[i]])), boxes[i]) for i in kept]
        start += len(level)
    survivors.sort(key=lambda pair: -pair[0])
    assert len(survivors) > 50
    assert dropped > 0

    config = replace(CONFIG, pre_nms=pre_nms)
    output = RPNOutput(logits=jnp.array(logits), deltas=jnp.array(deltas))
    proposals = jax.jit(lambda output, size: rpn_proposals(output, LEVELS, size, config))(
        output, SIZE
    )
    assert proposals.valid.shape == (50,)
    assert proposals.valid.all()
    np.testing.assert_allclose(proposals.scores, [score for score, _ in survivors[:50]], rtol=1e-5)
    np.testing.assert_allclose(
        proposals.boxes, [box for _, box in survivors[:50]], rtol=1e-5, atol=1e-4
    )


def test_fewer_boxes_than_slots_leave_slots_empty() -> None:
    """An image of 5 x 5 pixels holds the centres of a cell of P2 and one of P3, each with three
    boxes that overlap. These count, however unlikely they are."""
    logits = np.arange(len(ANCHORS), dtype=np.float32) / 1000 - 20
    output = RPNOutput(logits=jnp.array(logits), deltas=jnp.zeros((len(ANCHORS), 4), jnp.float32))
    config = replace(CONFIG, pre_nms=3)
    propose = jax.jit(lambda output, size: rpn_proposals(output, LEVELS, size, config))
    proposals = jax.tree.map(np.asarray, propose(output, np.array([5, 5], np.int32)))
    assert proposals.valid.tolist() == [True] * 2 + [False] * 48
    third_of_first_cells = logits[[len(LEVELS[0]) + 2, 2]].astype(float)
    np.testing.assert_allclose(
        proposals.scores[:2], 1 / (1 + np.exp(-third_of_first_cells)), rtol=1e-6
    )
    assert not propose(output, np.array([0, 0], np.int32)).valid.any()


def test_the_least_side_of_a_proposal_is_enough() -> None:
    """Of P2's anchors of 8 x 8 and about 11.3 x 5.7 pixels, of which the latter are likelier."""
    sides = ANCHORS[:, 2:] - ANCHORS[:, :2]
    here = (ANCHORS[:, :2] > 0).all(1) & (ANCHORS[:, 2:] < LIMITS[2:]).all(1)
    (small,) = np.flatnonzero(here & (sides.min(1) < 8))[:1]
    (square,) = np.flatnonzero(here & (sides == 8).all(1))[:1]
    logits = np.full(len(ANCHORS), -9, np.float32)
    logits[small], logits[square] = 2, 1
    output = RPNOutput(logits=jnp.array(logits), deltas=jnp.zeros((len(ANCHORS), 4), jnp.float32))
    config = replace(CONFIG, min_size=8.0)
    found = jax.jit(lambda output, size: rpn_proposals(output, LEVELS, size, config))(output, SIZE)
    np.testing.assert_array_equal(found.boxes[0], ANCHORS[square])
