"""The network of the RPN and its proposals against plain NumPy loops."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.test_nms import greedy
from rpn_cases import ANCHORS, CANVAS, CONFIG, LEVELS, LIMITS, SIZE, STRIDES, WEIGHTS, decode_loop

from mrcnn_jax.models.rpn import (
    RPNHead,
    RPNOutput,
    pyramid_anchors,
    rpn_proposals,
    usable_anchors,
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
