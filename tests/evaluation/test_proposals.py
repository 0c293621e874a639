"""Recall of proposals against a loop over pairs of boxes."""

from __future__ import annotations

import numpy as np
import pytest

from mrcnn_jax.evaluation.proposals import proposal_recall, recalled


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate(
        [
            corner,
            corner + np.exp(rng.uniform(2.5, 5, (count, 1))) * rng.uniform(0.7, 1.4, (count, 2)),
        ],
        axis=1,
    )


@pytest.mark.parametrize("iou", [0.3, 0.5])
def test_recall_equals_a_loop(iou: float) -> None:
    rng = np.random.default_rng(1)
    proposals = [_boxes(rng, count) for count in (60, 20, 0, 7)]
    truths = [_boxes(rng, count) for count in (8, 5, 3, 0)]
    hits: dict[str, list[bool]] = {"": [], "/small": [], "/medium": [], "/large": []}
    for p, g in zip(proposals, truths, strict=True):
        for box in g:
            hit = any(_iou(box, other) >= iou for other in p[:50])
            area = (box[2] - box[0]) * (box[3] - box[1])
            hits[""].append(hit)
            hits["/small" if area < 1024 else "/medium" if area < 9216 else "/large"].append(hit)
    assert all(hits.values())  # every size is there, or the test tests less than it says
    expected = {f"recall@50{name}": np.mean(values) for name, values in hits.items()}
    assert proposal_recall(proposals, truths, iou=iou) == pytest.approx(expected)


def test_the_threshold_belongs_to_the_hits_and_the_limit_counts() -> None:
    truth = np.array([[0.0, 0, 10, 10]])
    half = np.array([[0.0, 0, 10, 5]])  # IoU exactly 0.5
    far = np.array([[50.0, 50, 60, 60]])
    assert recalled(half, truth).tolist() == [True]
    assert recalled(half, truth, iou=0.501).tolist() == [False]
    assert proposal_recall([np.concatenate([far, half])], [truth], limit=1) == {
        "recall@1": 0.0,
        "recall@1/small": 0.0,
    }
    assert proposal_recall([np.concatenate([far, half])], [truth], limit=2) == {
        "recall@2": 1.0,
        "recall@2/small": 1.0,
    }


def test_sizes_begin_at_their_lower_bound() -> None:
    truth = np.array([[0.0, 0, 32, 32], [0, 0, 96, 96], [0, 0, 31.9, 32]])
    assert proposal_recall([truth[:1]], [truth]) == {
        "recall@50": pytest.approx(2 / 3),
        "recall@50/small": 1.0,
        "recall@50/medium": 1.0,
        "recall@50/large": 0.0,
    }


def test_nothing_to_find_gives_no_figure() -> None:
    assert proposal_recall([np.zeros((3, 4))], [np.zeros((0, 4))]) == {}
    assert proposal_recall([], []) == {}


def test_boxes_without_area_are_not_found() -> None:
    point = np.array([[5.0, 5, 5, 5]])
    assert recalled(point, point).tolist() == [False]
