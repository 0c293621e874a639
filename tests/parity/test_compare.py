"""The comparison itself: what is a partner, and which rows without one have a reason."""

from __future__ import annotations

import numpy as np
import pytest
from parity.compare import Found, Rule, Side, pair, without_reason

RULE = Rule(iou_threshold=0.5, floors=np.full(3, 0.05), count=3)
BOX = [10.0, 10.0, 20.0, 20.0]


def found(*rows: tuple[list[float], float, int]) -> Found:
    boxes, scores, labels = zip(*rows, strict=True) if rows else ([], [], [])
    return Found(np.reshape(boxes, (-1, 4)), np.array(scores), np.array(labels, int))


def unexplained(ours: Found, theirs: Found, candidates: Found) -> int:
    sides = [Side(kept, candidates) for kept in (ours, theirs)]
    return len(without_reason(*sides, pair(ours, theirs), RULE))


@pytest.mark.parametrize(
    ("shift", "score", "label"), [(0.011, 0.9, 1), (0.0, 0.9002, 1), (0.0, 0.9, 2)]
)
def test_partners(shift: float, score: float, label: int) -> None:
    ours = found((BOX, 0.9, 1), ([30.0, 30.0, 40.0, 40.0], 0.8, 1))
    theirs = found(
        ([30.005, 30.0, 40.0, 40.0], 0.80005, 1), ([10.0 + shift, 10.0, 20.0, 20.0], score, label)
    )
    pairs = pair(ours, theirs)
    assert (pairs.ours.tolist(), pairs.theirs.tolist()) == ([1], [0])
    assert (pairs.ours_alone.tolist(), pairs.theirs_alone.tolist()) == ([0], [1])


@pytest.mark.parametrize(("score", "reason"), [(0.05005, True), (0.0502, False)])
def test_threshold(score: float, reason: bool) -> None:
    ours = found((BOX, score, 1))
    assert unexplained(ours, found(), ours) == (not reason)


@pytest.mark.parametrize(("side", "reason"), [(5.0004, True), (5.1, False)])
def test_overlap(side: float, reason: bool) -> None:
    """A candidate of IoU side / 10 with a better one, which both kept."""
    better, other = (BOX, 0.9, 1), ([10.0, 10.0, 10.0 + side, 20.0], 0.4, 1)
    candidates = found(better, other)
    assert unexplained(candidates, found(better), candidates) == (not reason)


def test_order_of_two_that_overlap() -> None:
    one, two = (BOX, 0.9, 1), ([10.0, 10.0, 20.0, 18.0], 0.89995, 1)
    assert unexplained(found(one), found(two), found(one, two)) == 0
    two = ([10.0, 10.0, 20.0, 18.0], 0.89, 1)
    assert unexplained(found(one), found(two), found(one, two)) == 2


def test_rank() -> None:
    rows = [
        ([x, 0.0, x + 5.0, 5.0], score, 1)
        for x, score in ((0, 0.9), (10, 0.8), (20, 0.70005), (30, 0.7), (40, 0.6))
    ]
    everything = found(*rows)
    assert unexplained(found(*rows[:3]), found(rows[0], rows[1], rows[3]), everything) == 0
    assert unexplained(found(*rows[:3]), found(rows[0], rows[1], rows[4]), everything) == 2
