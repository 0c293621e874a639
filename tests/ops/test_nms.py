from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mrcnn_jax.ops.nms import _best_in_blocks, _greedy_in_blocks, multiclass_nms, nms
from mrcnn_jax.ops.platforms import for_onnx

from .strategies import QUICK, integer_boxes, random_boxes

N = 12
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@functools.partial(jax.jit, static_argnames=("max_output",))
def run(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: jax.Array, max_output: int
) -> tuple[jax.Array, jax.Array]:
    return nms(boxes, scores, valid, iou_threshold=threshold, max_output=max_output)  # type: ignore[arg-type]


def kept(
    boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray, threshold: float, max_output: int
) -> list[int]:
    """Indices that nms keeps, after a check of the empty slots."""
    indices, filled = (
        np.asarray(x) for x in run(boxes, scores, valid, np.float32(threshold), max_output)
    )
    assert indices.shape == filled.shape == (max_output,)
    assert indices.dtype == np.int32
    assert (indices[~filled] == 0).all()
    assert (np.diff(filled.astype(int)) <= 0).all()
    return indices[filled].tolist()


def greedy(
    boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray, threshold: float, max_output: int
) -> list[int]:
    chosen: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if not valid[i] or len(chosen) == max_output:
            continue
        suppressed = False
        for j in chosen:
            a, b = boxes[i], boxes[j]
            shared = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0)) * max(
                min(a[3], b[3]) - max(a[1], b[1]), np.float32(0)
            )
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            suppressed |= bool(union > 0 and shared / union > np.float32(threshold))
        if not suppressed:
            chosen.append(i)
    return chosen


@pytest.mark.parametrize("threshold", THRESHOLDS)
@QUICK
@given(
    integer_boxes(N),
    hnp.arrays(np.float32, N, elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0])),
    hnp.arrays(bool, N),
)
def test_equals_greedy_loop(
    threshold: float, boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray
) -> None:
    """Unsorted, with ties of scores and IoUs, empty boxes, invalid rows; k below, at, above n."""
    for max_output in (3, N, N + 5):
        assert kept(boxes, scores, valid, threshold, max_output) == greedy(
            boxes, scores, valid, threshold, max_output
        )


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_equals_greedy_loop_on_many_boxes(threshold: float) -> None:
    rng = np.random.default_rng(round(100 * threshold))
    boxes, scores, valid = (
        random_boxes(rng, 150),
        rng.normal(size=150).astype(np.float32),
        rng.random(150) < 0.9,
    )
    assert kept(boxes, scores, valid, threshold, 150) == greedy(
        boxes, scores, valid, threshold, 150
    )


@functools.partial(jax.jit, static_argnames=("block",))
def in_blocks(boxes: jax.Array, valid: jax.Array, threshold: jax.Array, block: int) -> jax.Array:
    return _greedy_in_blocks(boxes, valid, threshold, block=block)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 5, 12, 256])
@QUICK
@given(integer_boxes(N), hnp.arrays(bool, N), st.sampled_from(THRESHOLDS))
def test_the_form_in_blocks_equals_the_greedy_loop(
    block: int, boxes: np.ndarray, valid: np.ndarray, threshold: float
) -> None:
    """The GPU's form, here on the CPU: blocks of one box, not dividing n, exactly n, and larger."""
    found = np.flatnonzero(in_blocks(boxes, valid, np.float32(threshold), block))
    assert found.tolist() == greedy(boxes, -np.arange(N, dtype=np.float32), valid, threshold, N)


def test_the_form_in_blocks_settles_long_chains() -> None:
    """Where each box hides only the next, every other is kept, across blocks of 256 and batched."""
    start = 5.0 * np.arange(600, dtype=np.float32)
    boxes = np.stack(
        [start, 0 * start, start + 12, 0 * start + 10], axis=1
    )  # IoU of neighbours: 7/17, 2/22
    valid = np.ones((2, 600), bool)
    valid[1, 1] = False
    found = np.asarray(
        jax.jit(jax.vmap(lambda v: _greedy_in_blocks(boxes, v, jnp.float32(0.3))))(valid)
    )
    assert np.flatnonzero(found[0]).tolist() == list(range(0, 600, 2))
    assert np.flatnonzero(found[1]).tolist() == [0, *range(2, 600, 2)]


@QUICK
@given(
    integer_boxes(N),
    hnp.arrays(np.float32, N, elements=st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0])),
    hnp.arrays(bool, N),
    st.sampled_from(THRESHOLDS),
)
def test_the_form_for_onnx_equals_the_greedy_loop(
    boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray, threshold: float
) -> None:
    """Its loop ends with `max_output`, not with n."""
    boxes[~valid] = np.nan
    with for_onnx():
        for max_output in (3, N + 5):
            assert kept(boxes, scores, valid, threshold, max_output) == greedy(
                boxes, scores, valid, threshold, max_output
            )


def test_the_form_for_onnx_has_no_index_in_a_loop() -> None:
    """Batched, as predictions are: jax2onnx and ONNX Runtime do not have these together."""
    boxes, scores = jnp.zeros((2, N, 3, 4)), jnp.zeros((2, N, 3))

    def both(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
        valid = scores > -1
        first = nms(boxes[:, 0], scores[:, 0], valid[:, 0], iou_threshold=0.5, max_output=4)
        return (*first, *multiclass_nms(boxes, scores, valid, iou_threshold=0.5, max_output=4))

    with for_onnx():
        text = str(jax.make_jaxpr(jax.vmap(both))(boxes, scores))
    loops = re.findall(r"(?:scan|while)\[", text)
    names = set(re.findall(r" = ([a-z_-]+)", text))
    assert len(loops) == 2
    assert names & {"argmax", "select_n"} == {"argmax", "select_n"}
    assert not names & {"platform_index", "cond", "sort", "scatter", "scatter-add", "cumsum"}
    for body in text.split("scan[")[1:]:
        assert "gather[" not in body.split("length=")[0]


def test_an_iou_of_exactly_the_threshold_stays() -> None:
    boxes = np.array(
        [[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 3]], np.float32
    )  # IoU with the first: 1/2, 3/4
    scores, valid = np.array([3, 2, 1], np.float32), np.ones(3, bool)
    assert kept(boxes, scores, valid, 0.5, 3) == [0, 1]
    assert kept(boxes, scores, valid, 0.75, 3) == [0, 1, 2]
    assert kept(boxes, scores, valid, 0.49, 3) == [0]


def test_chain_of_a_thousand_boxes() -> None:
    """Each box hides the next two: every third stays, and none is settled before its forerunner."""
    start = 3.0 * np.arange(1000, dtype=np.float32)
    boxes = np.stack(
        [start, 0 * start, start + 12, 0 * start + 10], axis=1
    )  # IoU of neighbours: 9/15, 6/18, 3/21
    shuffled = np.random.default_rng(0).permutation(1000)
    scores = -np.arange(1000, dtype=np.float32)
    result = kept(boxes[shuffled], scores[shuffled], np.ones(1000, bool), 0.3, 1000)
    assert shuffled[result].tolist() == list(range(0, 1000, 3))


def test_nothing_valid() -> None:
    boxes = np.full((5, 4), np.nan, np.float32)
    assert kept(boxes, boxes[:, 0], np.zeros(5, bool), 0.5, 4) == []


def test_valid_rows_of_score_minus_infinity_count() -> None:
    boxes = np.array([[0, 0, 1, 1], [np.nan] * 4, [5, 5, 6, 6]], np.float32)
    scores = np.array([-np.inf, np.inf, 0], np.float32)
    assert kept(boxes, scores, np.array([True, False, True]), 0.5, 3) == [2, 0]


def test_batched_over_images_and_levels() -> None:
    rng = np.random.default_rng(3)
    boxes = np.stack([random_boxes(rng, 20) for _ in range(6)]).reshape(2, 3, 20, 4)
    scores, valid = rng.normal(size=(2, 3, 20)).astype(np.float32), rng.random((2, 3, 20)) < 0.7
    one = functools.partial(nms, iou_threshold=0.3, max_output=9)
    indices, filled = (
        np.asarray(x) for x in jax.jit(jax.vmap(jax.vmap(one)))(boxes, scores, valid)
    )
    for at in np.ndindex(2, 3):
        assert indices[at][filled[at]].tolist() == greedy(boxes[at], scores[at], valid[at], 0.3, 9)


def test_it_may_stand_in_a_differentiated_function() -> None:
    rng = np.random.default_rng(4)
    boxes, scores, valid = (
        random_boxes(rng, 6),
        rng.normal(size=6).astype(np.float32),
        np.arange(6) != 2,
    )

    def total(boxes: jax.Array) -> jax.Array:
        indices, filled = nms(
            boxes,
            jnp.array(scores) + boxes[:, 0],
            jnp.array(valid),
            iou_threshold=0.5,
            max_output=6,
        )
        return jnp.sum(jnp.where(filled[:, None], boxes[indices], 0))

    gradient = np.asarray(jax.jit(jax.grad(total))(jnp.array(boxes)))
    assert set(np.unique(gradient)) <= {0.0, 1.0}
    assert (gradient[2] == 0).all()


def best_of_all_classes(
    boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray, threshold: float, count: int
) -> list[tuple[int, int]]:
    """Returns (row, class) of the first `count` boxes kept, by score, class, rank in the class."""
    kept = [
        (-scores[i, k], k, i)
        for k in range(scores.shape[1])
        for i in greedy(boxes[:, k], scores[:, k], valid[:, k], threshold, N)
    ]
    return [(i, k) for _, k, i in sorted(kept, key=lambda row: row[:2])[:count]]


@functools.partial(jax.jit, static_argnames=("count",))
def run_multiclass(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: jax.Array, count: int
) -> tuple[jax.Array, ...]:
    return multiclass_nms(boxes, scores, valid, iou_threshold=threshold, max_output=count)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("count", "block"))
def run_in_blocks(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    threshold: jax.Array,
    count: int,
    block: int,
) -> jax.Array:
    """Class * N + row of what is kept, -1 in empty slots: the form for a GPU."""
    left = jnp.where(valid, scores, -jnp.inf).T
    by_class = boxes.transpose(1, 0, 2)
    return _best_in_blocks(by_class, left, threshold, max_output=count, block=block)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
@QUICK
@given(
    integer_boxes(3 * N),
    hnp.arrays(np.float32, (N, 3), elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0])),
    hnp.arrays(bool, (N, 3)),
)
def test_several_classes_equal_a_loop_each(
    threshold: float, boxes: np.ndarray, scores: np.ndarray, valid: np.ndarray
) -> None:
    boxes = boxes.reshape(N, 3, 4)
    poison = np.where(valid, 0, np.nan).astype(np.float32)
    for count in (5, 3 * N + 1):
        found = run_multiclass(
            boxes + poison[..., None], scores + poison, valid, np.float32(threshold), count
        )
        rows, classes, filled = map(np.asarray, found)
        expected = best_of_all_classes(boxes, scores, valid, threshold, count)
        assert list(zip(rows[filled], classes[filled], strict=True)) == expected
        assert filled.tolist() == [True] * len(expected) + [False] * (count - len(expected))
        assert not rows[~filled].any()
        assert not classes[~filled].any()
        with for_onnx():
            by_masks = run_multiclass(boxes, scores, valid, np.float32(threshold), count)
        for field, same in zip(by_masks, found, strict=True):
            assert field.tolist() == same.tolist()
        for block in (4, 64):
            chosen = run_in_blocks(boxes, scores, valid, np.float32(threshold), count, block)
            empty = [-1] * (count - len(expected))
            assert chosen.tolist() == [k * N + i for i, k in expected] + empty


def test_several_classes_batched_over_images() -> None:
    rng = np.random.default_rng(5)
    boxes = np.stack([random_boxes(rng, 3 * N) for _ in range(4)]).reshape(4, N, 3, 4)
    scores, valid = rng.normal(size=(4, N, 3)).astype(np.float32), rng.random((4, N, 3)) < 0.7
    one = functools.partial(multiclass_nms, iou_threshold=0.3, max_output=9)
    rows, classes, filled = (np.asarray(x) for x in jax.jit(jax.vmap(one))(boxes, scores, valid))
    for b in range(4):
        found = list(zip(rows[b][filled[b]], classes[b][filled[b]], strict=True))
        assert found == best_of_all_classes(boxes[b], scores[b], valid[b], 0.3, 9)
