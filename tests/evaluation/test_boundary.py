"""Boundary AP against brute force: distances to what is outside of a mask, pixel by pixel."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from report_cases import SIZE, case, instance, mask_of

from mrcnn_jax.evaluation.average_precision import coco_figures, match_results, table
from mrcnn_jax.evaluation.boundary import boundary_rle

THRESHOLDS = np.linspace(0.5, 0.95, 10)


def evaluate(*files: Any, **options: Any) -> dict[str, float]:
    return coco_figures(match_results(*files, **options))


def boundary_loop(mask: np.ndarray) -> np.ndarray:
    """Pixels with one outside of the mask, or of the image, in the square that reaches 2 % of the
    diagonal in each direction."""
    height, width = mask.shape
    d = max(round(0.02 * (height**2 + width**2) ** 0.5), 1)
    boundary = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        inside = y - d >= 0 and x - d >= 0 and y + d < height and x + d < width
        boundary[y, x] = not inside or not mask[y - d : y + d + 1, x - d : x + d + 1].all()
    return boundary


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def rectangle(y1: int, x1: int, y2: int, x2: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def dataset(truth: list[dict[str, Any]], size: tuple[int, int] = SIZE) -> dict[str, Any]:
    images = [
        {"id": i, "height": size[0], "width": size[1]}
        for i in sorted({a["image_id"] for a in truth})
    ]
    return {"images": images, "categories": [{"id": 3, "name": "thing"}], "annotations": truth}


@pytest.mark.parametrize("size", [SIZE, (30, 24), (150, 170)])
def test_boundaries_equal_brute_force(size: tuple[int, int]) -> None:
    """Of blobs with holes that touch all four sides of the image, of a mask of one pixel, a full
    one and an empty one; d is 3, 1 and 5."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).normal(size=size), (0, 0), 4)
    blobs = noise > np.quantile(noise, 0.4)
    corners = ((0, 0, 1, 1), (0, 0, *size), (5, 5, 20, 19), (0, 0, 0, 0))
    for mask in (blobs, *(rectangle(*corner, size) for corner in corners)):
        found = mask_of({"segmentation": boundary_rle(instance(mask, 0, 3)["segmentation"])})
        np.testing.assert_array_equal(found, boundary_loop(mask))
    assert 0 < boundary_loop(blobs).sum() < blobs.sum()


def test_ap_is_that_of_the_smaller_iou() -> None:
    """One object and one detection: AP is the share of the thresholds that their IoU reaches."""
    truth = rectangle(20, 30, 70, 90)
    cases = {
        "wider by a pixel": rectangle(20, 30, 70, 91),
        "shifted by a pixel": rectangle(20, 31, 70, 91),
        "with a small hole": truth & ~rectangle(40, 50, 43, 53),
    }
    for name, mask in cases.items():
        metrics = evaluate(
            dataset([instance(truth, 1, 3, id=0)]),
            [instance(mask, 1, 3, score=0.9)],
            iou_types=("segm", "boundary"),
        )
        masks, boundaries = iou(truth, mask), iou(boundary_loop(truth), boundary_loop(mask))
        assert metrics["segm/AP"] == pytest.approx((masks >= THRESHOLDS).mean()), name
        assert metrics["boundary/AP"] == pytest.approx(
            (min(masks, boundaries) >= THRESHOLDS).mean()
        ), name
        assert metrics["boundary/AP/thing"] == metrics["boundary/AP"]
        assert boundaries < masks
        assert 0 < metrics["boundary/AP"] < metrics["segm/AP"], name


def test_the_mask_counts_where_the_boundary_is_right() -> None:
    """A ring has the boundary of the whole, so that it is the IoU of the masks that is smaller."""
    truth = rectangle(10, 10, 90, 110)
    ring = truth & ~rectangle(14, 14, 86, 106)
    assert iou(boundary_loop(truth), boundary_loop(ring)) > 0.7 > 0.5 > iou(truth, ring)
    metrics = evaluate(
        dataset([instance(truth, 1, 3, id=0)]),
        [instance(ring, 1, 3, score=0.9)],
        iou_types=("boundary",),
    )
    assert metrics["boundary/AP50"] == 0


def test_ground_truth_is_its_own_best_detection_and_growth_costs_more_at_the_boundary() -> None:
    """With crowds, which stay what they are for masks: what is found in one is neither right nor
    wrong."""
    truth, _ = case(images=6)
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    crowds = [a for a in truth["annotations"] if a["iscrowd"]]
    results = [{**a, "score": 0.5} for a in objects]
    inside = [
        {
            **instance(mask_of(a) & ~boundary_loop(mask_of(a)), a["image_id"], a["category_id"]),
            "score": 0.9,
        }
        for a in crowds
    ]
    assert crowds
    metrics = evaluate(truth, results + inside, iou_types=("boundary",))
    assert metrics["boundary/AP"] == metrics["boundary/AP50"] == metrics["boundary/AR100"] == 1.0
    kernel = np.ones((3, 3), np.uint8)
    grown = [
        instance(
            cv2.dilate(mask_of(a).astype(np.uint8), kernel) > 0,
            a["image_id"],
            a["category_id"],
            score=0.5,
        )
        for a in objects
    ]
    metrics = evaluate(truth, grown, iou_types=("segm", "boundary"))
    assert 0 < metrics["boundary/AP"] < metrics["segm/AP"] < 1
    assert evaluate(truth, [], iou_types=("boundary",))["boundary/AP"] == 0


def test_the_table_has_a_row_of_it() -> None:
    metrics = {
        f"{kind}/AP": value for kind, value in (("bbox", 0.5), ("segm", 0.25), ("boundary", 0.125))
    }
    lines = table(metrics).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["box", "50.0"],
        ["mask", "25.0"],
        ["boundary", "12.5"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1
