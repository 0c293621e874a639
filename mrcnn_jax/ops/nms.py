"""Exact greedy non-maximum suppression."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from mrcnn_jax.ops import boxes as box_ops
from mrcnn_jax.ops.platforms import by_platform, is_for_onnx


def nms(
    boxes: Float32[Array, "n 4"],
    scores: Float32[Array, " n"],
    valid: Bool[Array, " n"],
    *,
    iou_threshold: float,
    max_output: int,
) -> tuple[Int32[Array, " max_output"], Bool[Array, " max_output"]]:
    """Greedy NMS: keeps a box if its IoU with every box kept before it is at most `iou_threshold`.

    Boxes are visited by falling score, equal ones by rising index. Invalid rows take no part,
    whatever they hold. The choice has no gradient.

    Args:
        boxes: (x1, y1, x2, y2).
        scores: of any scale.
        valid: boxes that exist.
        iou_threshold: a box that overlaps more with one kept before is left out.
        max_output: the most boxes to keep; may exceed n.

    Returns:
        Indices of the boxes kept, highest score first, and which of the `max_output` slots are
        filled. Empty slots have index 0.
    """
    boxes, scores = jax.lax.stop_gradient(
        (box_ops.sanitize(boxes, valid), jnp.where(valid, scores, 0))
    )
    threshold = jnp.asarray(iou_threshold, jnp.float32)
    if is_for_onnx():
        lowest = jnp.finfo(jnp.float32).min  # a valid row may have -inf
        remaining = jnp.where(valid, jnp.maximum(scores, lowest), -jnp.inf)
        chosen = _best_by_masks(boxes[None], remaining[None], threshold, max_output=max_output)
        return jnp.maximum(chosen, 0), chosen >= 0
    order = jnp.argsort(-scores)  # stable: equal scores stay in order of their index
    kept = by_platform(
        boxes[order], valid[order], threshold, cpu=_greedy_row_by_row, default=_greedy_in_blocks
    )
    (positions,) = jnp.nonzero(kept, size=max_output, fill_value=0)
    filled = jnp.arange(max_output) < jnp.sum(kept)
    return jnp.where(filled, order[positions], 0).astype(jnp.int32), filled


def _greedy_row_by_row(
    boxes: Float32[Array, "n 4"], valid: Bool[Array, " n"], threshold: Float32[Array, ""]
) -> Bool[Array, " n"]:
    """Marks the boxes kept, for a CPU: one step per box, which computes its row of the IoU matrix.

    The number of steps is static, so a batch (levels, images) shares one loop; a loop over the kept
    boxes alone, whose end depends on the data, was four times slower.
    """
    rows = jnp.arange(boxes.shape[0])

    def suppress(row: Int32[Array, ""], alive: Bool[Array, " n"]) -> Bool[Array, " n"]:
        overlap = box_ops.iou(jax.lax.dynamic_slice_in_dim(boxes, row, 1), boxes)[0]
        return alive & ~(alive[row] & (rows > row) & (overlap > threshold))

    return jax.lax.fori_loop(0, boxes.shape[0], suppress, valid)


def _greedy_in_blocks(
    boxes: Float32[Array, "n 4"],
    valid: Bool[Array, " n"],
    threshold: Float32[Array, ""],
    *,
    block: int = 256,
) -> Bool[Array, " n"]:
    """Marks the boxes kept, for a GPU: block by block, each suppressing all later boxes.

    A step costs microseconds on a GPU, whatever it does.
    """
    alive, kept = valid, []
    for start in range(0, boxes.shape[0], block):
        own = boxes[start : start + block]
        own_kept = _greedy_in_block(box_ops.iou(own, own) > threshold, alive[:block])
        later = boxes[start + block :]
        alive = alive[block:] & ~jnp.any(
            (box_ops.iou(own, later) > threshold) & own_kept[:, None], axis=0
        )
        kept.append(own_kept)
    return jnp.concatenate(kept) if kept else valid


def multiclass_nms(
    boxes: Float32[Array, "n k 4"],
    scores: Float32[Array, "n k"],
    valid: Bool[Array, "n k"],
    *,
    iou_threshold: float,
    max_output: int,
) -> tuple[Int32[Array, " max_output"], Int32[Array, " max_output"], Bool[Array, " max_output"]]:
    """Per-class NMS: returns the best `max_output` boxes over all classes after `nms` within each.

    Args:
        boxes: one per row and class. Invalid ones take no part, whatever they hold.
        scores: above -inf where valid.
        valid: which boxes exist.
        iou_threshold: a box above this IoU with a better one of its class is suppressed.
        max_output: number of slots.

    Returns:
        Rows, classes (0..k-1), and which slots are filled; highest score first, equal scores by
        class, then by row, lowest first. Empty slots have row and class 0.
    """
    flat = box_ops.sanitize(boxes.reshape(-1, 4), valid.reshape(-1)).reshape(boxes.shape)
    by_class = jax.lax.stop_gradient(flat).transpose(1, 0, 2)
    remaining = jax.lax.stop_gradient(jnp.where(valid, scores, -jnp.inf)).T
    chosen = by_platform(
        by_class,
        remaining,
        jnp.asarray(iou_threshold, jnp.float32),
        cpu=functools.partial(_best_one_by_one, max_output=max_output),
        default=functools.partial(_best_in_blocks, max_output=max_output),
        onnx=functools.partial(_best_by_masks, max_output=max_output),
    )
    filled = chosen >= 0
    chosen = jnp.where(filled, chosen, 0)
    return chosen % scores.shape[0], chosen // scores.shape[0], filled


def _best_one_by_one(
    by_class: Float32[Array, "k n 4"],
    remaining: Float32[Array, "k n"],
    threshold: Float32[Array, ""],
    *,
    max_output: int,
) -> Int32[Array, " max_output"]:
    """Finds the places (class * n + row) of the best boxes, -1 in empty slots, for a CPU.

    A suppressed box never has a higher score than the one that suppressed it. So the best of all
    boxes left is always kept, and only its class has to be looked at again: `max_output` steps of
    one class each, where a loop per class would take n steps of all classes.

    Args:
        by_class: boxes.
        remaining: scores of those neither kept nor suppressed, -inf of the others.
        threshold: of the IoU.
        max_output: number of slots.
    """
    count = remaining.shape[1]
    rows = jnp.arange(count)

    def keep_best(
        slot: Int32[Array, ""], carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        # Scores [k, n], the best of each class [k], what was kept.
        remaining, best, kept = carry
        label = jnp.argmax(best)
        row = jax.lax.dynamic_index_in_dim(remaining, label, keepdims=False)
        first = jnp.argmax(row)
        candidates = jax.lax.dynamic_index_in_dim(by_class, label, keepdims=False)
        overlap = box_ops.iou(jax.lax.dynamic_slice_in_dim(candidates, first, 1), candidates)[0]
        row = jnp.where((overlap > threshold) | (rows == first), -jnp.inf, row)
        place = jnp.where(best[label] > -jnp.inf, label * count + first, -1)
        return (
            remaining.at[label].set(row),
            best.at[label].set(jnp.max(row)),
            kept.at[slot].set(place),
        )

    start = (remaining, remaining.max(axis=1), jnp.full(max_output, -1, jnp.int32))
    return jax.lax.fori_loop(0, max_output, keep_best, start)[2]


def _best_in_blocks(
    by_class: Float32[Array, "k n 4"],
    remaining: Float32[Array, "k n"],
    threshold: Float32[Array, ""],
    *,
    max_output: int,
    block: int = 256,
) -> Int32[Array, " max_output"]:
    """Does what `_best_one_by_one` does, for a GPU: sorts once, then goes by blocks.

    A block's boxes compete with those kept so far and among themselves, until `max_output` are kept
    or no box is left: a turn or two, where a step for each slot takes hundreds of small kernels.
    """
    boxes, scores = by_class.reshape(-1, 4), remaining.reshape(-1)
    # Stable: equal scores stay in order of class and row. Whole blocks: the end is filled up.
    order = jnp.argsort(-scores).astype(jnp.int32)
    order = jnp.pad(order, (0, -len(order) % block))
    exists = jnp.sum(scores > -jnp.inf, dtype=jnp.int32)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        start, _, count = state
        return (start < exists) & (count < max_output)

    def next_block(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, kept, count = state
        places = jax.lax.dynamic_slice_in_dim(order, start, block)
        own, labels = boxes[places], places // remaining.shape[1]
        before, their_labels = boxes[kept], kept // remaining.shape[1]
        beaten = (box_ops.iou(before, own) > threshold) & (their_labels[:, None] == labels[None, :])
        beaten &= (jnp.arange(max_output) < count)[:, None]
        alive = (start + jnp.arange(block) < exists) & ~jnp.any(beaten, axis=0)
        rivals = (box_ops.iou(own, own) > threshold) & (labels[:, None] == labels[None, :])
        alive = _greedy_in_block(rivals, alive)
        slots = count + jnp.cumsum(alive, dtype=jnp.int32) - 1
        kept = kept.at[jnp.where(alive, slots, max_output)].set(places, mode="drop")
        return start + block, kept, count + jnp.sum(alive, dtype=jnp.int32)

    begin = jnp.int32(0), jnp.zeros(max_output, jnp.int32), jnp.int32(0)
    _, kept, count = jax.lax.while_loop(unfinished, next_block, begin)
    return jnp.where(jnp.arange(max_output) < count, kept, -1)


def _best_by_masks(
    by_class: Float32[Array, "k n 4"],
    remaining: Float32[Array, "k n"],
    threshold: Float32[Array, ""],
    *,
    max_output: int,
) -> Int32[Array, " max_output"]:
    """Does what `_best_one_by_one` does, for ONNX: by masks where that has an index.

    jax2onnx 0.17 converts neither a scatter in a loop nor, with a batch axis, a gather by the
    loop's own values; ONNX Runtime has no choice between truth values.
    """
    count = remaining.shape[1]
    boxes = by_class.reshape(-1, 4)
    places, slots = jnp.arange(len(boxes)), jnp.arange(max_output)
    classes = places // count

    def keep_best(slot: Int32[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        remaining, kept = carry
        best = jnp.argmax(remaining)
        box = jnp.sum(jnp.where((places == best)[:, None], boxes, 0), axis=0, keepdims=True)
        rival = (classes == best // count) & (box_ops.iou(box, boxes)[0] > threshold)
        place = jnp.where(jnp.max(remaining) > -jnp.inf, best, -1)
        return (
            jnp.where(rival | (places == best), -jnp.inf, remaining),
            jnp.where(slots == slot, place, kept),
        )

    start = remaining.reshape(-1), jnp.full(max_output, -1, jnp.int32)
    return jax.lax.fori_loop(0, max_output, keep_best, start)[1]


def _greedy_in_block(rivals: Bool[Array, "b b"], alive: Bool[Array, " b"]) -> Bool[Array, " b"]:
    """Marks the boxes kept among those of a block, sorted by falling score.

    "Kept unless a rival kept before it" is repeated until nothing changes. Each round settles at
    least one more box of the chain, so there are at most b + 1 rounds, in practice a few; and a
    fixed point is the greedy choice, by induction.
    """
    size = len(alive)
    rivals &= jnp.arange(size)[:, None] < jnp.arange(size)[None, :]

    def settle(state: tuple[Array, Array]) -> tuple[Array, Array]:
        _, kept = state
        return kept, alive & ~jnp.any(rivals & kept[:, None], axis=0)

    start = jnp.zeros_like(alive), alive
    return jax.lax.while_loop(lambda state: jnp.any(state[0] != state[1]), settle, start)[1]
