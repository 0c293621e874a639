from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops.matching import best_anchor_mask, match

from .strategies import QUICK, random_boxes

# A coarse grid of IoUs: ties and zeros are frequent.
overlaps = hnp.arrays(np.float32, (7, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


@QUICK
@given(overlaps, hnp.arrays(bool, 4))
def test_match_equals_loop(iou: np.ndarray, gt_valid: np.ndarray) -> None:
    matches = match(jnp.array(iou), jnp.array(gt_valid))
    assert matches.gt_index.dtype == jnp.int32
    for row in range(7):
        index, best = 0, -1.0
        for column in range(4):
            if gt_valid[column] and iou[row, column] > best:
                index, best = column, iou[row, column]
        assert (int(matches.gt_index[row]), float(matches.iou[row])) == (index, max(best, 0.0))


@QUICK
@given(overlaps, hnp.arrays(bool, 7), hnp.arrays(bool, 4))
def test_best_anchors_equal_loop(
    iou: np.ndarray, anchor_valid: np.ndarray, gt_valid: np.ndarray
) -> None:
    expected = np.zeros(7, bool)
    for column in range(4):
        candidates = [iou[row, column] for row in range(7) if anchor_valid[row]]
        if not gt_valid[column] or not candidates or max(candidates) == 0:
            continue
        for row in range(7):
            expected[row] |= anchor_valid[row] and iou[row, column] == max(candidates)
    np.testing.assert_array_equal(
        best_anchor_mask(jnp.array(iou), jnp.array(anchor_valid), jnp.array(gt_valid)), expected
    )


def test_every_touched_ground_truth_has_an_anchor_when_all_is_compiled_together() -> None:
    """The maximum and the comparison see the same bits, even if the IoU is computed twice."""
    rng = np.random.default_rng(0)
    anchors, gt = jnp.array(random_boxes(rng, 2000)), jnp.array(random_boxes(rng, 40))

    @jax.jit
    def best(anchors: jax.Array, gt: jax.Array) -> jax.Array:
        return best_anchor_mask(box_ops.iou(anchors, gt), jnp.ones(2000, bool), jnp.ones(40, bool))

    expected = np.zeros(2000, bool)
    expected[np.argmax(box_ops.iou(anchors, gt), axis=0)] = True
    np.testing.assert_array_equal(best(anchors, gt), expected)
