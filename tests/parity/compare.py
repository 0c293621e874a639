"""How near two sets of numbers are, and which detections of two networks are the same."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RELATIVE = 1e-4  # of a stage
BOX = 0.01  # pixels
SCORE = 1e-4
PROBABILITY = 1e-3  # of a mask
GRADIENT = 1e-3

Measured = Callable[[str, str, float, float], None]
"""(what, where, value, bound): notes a cell of the table that `make parity` prints, and asserts
value <= bound."""


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|a - b| / max|b|."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@dataclass(frozen=True)
class Found:
    """Boxes of one image with their scores and classes (all 0: proposals)."""

    boxes: np.ndarray  # [N, 4]
    scores: np.ndarray  # [N]
    labels: np.ndarray  # [N]


@dataclass(frozen=True)
class Pairs:
    """Rows of two sets that are the same, and those that have no partner."""

    ours: np.ndarray
    theirs: np.ndarray
    ours_alone: np.ndarray
    theirs_alone: np.ndarray


def pair(ours: Found, theirs: Found) -> Pairs:
    """Pairs rows of one label, boxes within BOX and scores within SCORE, the nearest first."""
    distance = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(-1)
    near = np.argwhere(
        (distance <= BOX)
        & (np.abs(ours.scores[:, None] - theirs.scores[None]) <= SCORE)
        & (ours.labels[:, None] == theirs.labels[None])
    )
    partner: dict[int, int] = {}
    for row, column in near[np.argsort(distance[tuple(near.T)], kind="stable")].tolist():
        if row not in partner and column not in partner.values():
            partner[row] = column
    rows, columns = np.array(sorted(partner.items()), int).reshape(-1, 2).T
    return Pairs(
        rows,
        columns,
        np.setdiff1d(np.arange(len(ours.boxes)), rows),
        np.setdiff1d(np.arange(len(theirs.boxes)), columns),
    )


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, 4] and [M, 4] -> [N, M], in float64."""
    a, b = a.astype(float)[:, None], b.astype(float)[None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    both = np.maximum(high - low, 0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return both / np.maximum(union, 1e-12)


def sketch(name: str, values: np.ndarray, size: int = 64) -> np.ndarray:
    """Sketches an array by `size` sums of all elements, with random signs drawn from `name`.

    The squared norm of a difference of two sketches is, on average over the signs, that of the
    difference of the tensors.
    """
    signs = (
        np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, values.size, np.int8) * 2
        - 1
    )
    signed = np.zeros(-(-values.size // size) * size)
    signed[: values.size] = values.ravel() * signs
    return signed.reshape(size, -1).sum(1)


@dataclass(frozen=True)
class Side:
    """The candidates that a network kept: at most `count` of the best after per-class NMS."""

    kept: Found
    candidates: Found
    inherited: np.ndarray | None = None
    """Candidates that only this network has, for a reason that was found before."""


@dataclass(frozen=True)
class Rule:
    """The cuts that both networks make."""

    iou_threshold: float
    floors: np.ndarray  # [classes or levels]: candidates have higher scores
    count: int


def without_reason(ours: Side, theirs: Side, pairs: Pairs, rule: Rule) -> list[str]:
    """A line for each row that only one network kept though no cut is near that could tell why.

    Near: within SCORE of being decided otherwise. One such row may replace another: one of its
    class that it overlaps, or the last of a set that is full.
    """
    lone = {True: (ours, theirs, pairs.ours_alone), False: (theirs, ours, pairs.theirs_alone)}
    distances = {
        who: [distance_to_cut(row, side, other, rule) for row in rows]
        for who, (side, other, rows) in lone.items()
    }
    lines = []
    for who, (side, other, rows) in lone.items():
        reasons = [
            row
            for row, distance in zip(lone[not who][2], distances[not who], strict=True)
            if distance <= SCORE
        ]
        for row, distance in zip(rows, distances[who], strict=True):
            rank = np.sum(side.kept.scores > side.kept.scores[row])
            overlap = iou(side.kept.boxes[row : row + 1], other.kept.boxes[reasons])[0]
            replaced = (
                (overlap > rule.iou_threshold)
                & (other.kept.labels[reasons] == side.kept.labels[row])
            ).any()
            if distance > SCORE and not replaced and rank < rule.count - len(reasons):
                kept = side.kept
                lines.append(
                    f"{'ours' if who else 'theirs'}: {kept.labels[row]} {kept.scores[row]:.6f}"
                    f" {kept.boxes[row]}: {distance:.1e}"
                )
    return lines


def distance_to_cut(row: int, side: Side, other: Side, rule: Rule) -> float:
    """Returns the least change of a score or IoU that would reverse a decision on a row.

    It is 0 where an inherited candidate does.

    Of its score, against the floor and against the lowest that the other network kept, if that kept
    as many as it may; of its IoU with a better candidate of its class, against the threshold; of
    the order of two that overlap.
    """
    box, score, label = side.kept.boxes[row], side.kept.scores[row], side.kept.labels[row]
    same = side.candidates.labels == label
    boxes, scores = side.candidates.boxes[same], side.candidates.scores[same]
    itself = np.abs(boxes - box).max(1).argmin()
    overlap = iou(box[None], boxes)[0]
    if side.inherited is not None and (side.inherited[same] & (overlap > rule.iou_threshold)).any():
        return 0.0
    overlap, scores = np.delete(overlap, itself), np.delete(scores, itself)
    distances = [
        [score - rule.floors[label]],
        [score - other.kept.scores.min()] if len(other.kept.scores) == rule.count else [],
        overlap[scores > score - SCORE] - rule.iou_threshold,
        scores[overlap > rule.iou_threshold] - score,
    ]
    return float(np.abs(np.concatenate(distances)).min())
