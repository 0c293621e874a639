"""Anchors of a small canvas, boxes near them, and plain loops of encoding, decoding and losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ops.laws import POISONS, Rows, poisoned

from mrcnn_jax.config.model import ModelConfig, RPNConfig
from mrcnn_jax.models.rpn import (
    pyramid_anchors,
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
