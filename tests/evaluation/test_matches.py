"""The quality of images by hand and in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from report_cases import NAMES, SIZE, answers_of, case, instance

from mrcnn_jax.evaluation.average_precision import match_results
from mrcnn_jax.evaluation.matches import image_qualities, matched_pairs

TRUTH, RESULTS = case()


def _strip(start: int, stop: int) -> np.ndarray:
    """Columns `start` to `stop` of a band 20 pixels high: IoUs are ratios of lengths."""
    mask = np.zeros(SIZE, bool)
    mask[10:30, start:stop] = True
    return mask


def _handmade() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    objects = [
        instance(_strip(0, 10), 0, 3),
        instance(_strip(20, 40), 0, 8),  # is missed
        instance(_strip(0, 10), 1, 3),
        instance(_strip(40, 100), 1, 3, iscrowd=1),
        instance(_strip(0, 10), 3, 3),
        instance(_strip(0, 10), 5, 3),
        instance(_strip(20, 30), 5, 3),
    ]
    results = [
        instance(_strip(0, 8), 0, 3, score=0.9),  # IoU .8
        instance(_strip(0, 10), 0, 3, score=0.6),  # finds it taken
        instance(_strip(20, 40), 0, 8, score=0.49),  # too low to count
        instance(_strip(0, 10), 1, 3, score=0.5),
        instance(_strip(50, 70), 1, 3, score=0.8),  # in the crowd
        instance(_strip(0, 10), 2, 3, score=0.8),  # in an image without objects
        instance(_strip(0, 10), 4, 3, score=0.3),
        instance(_strip(0, 4), 5, 3, score=0.8),  # IoU .4
    ]
    ground_truth = {
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"}
            for i in range(6)
        ],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
        "annotations": [{**a, "id": number} for number, a in enumerate(objects)],
    }
    return ground_truth, results


def test_quality_of_images_by_hand() -> None:
    ground_truth, results = _handmade()
    qualities = image_qualities(match_results(ground_truth, results)["segm"])
    # Image 4 has neither an object nor a detection that counts. Of those where nothing is found the
    # one with most in it is the worst.
    assert list(qualities.items()) == [
        (5, 0.0),
        (2, 0.0),
        (3, 0.0),
        (0, pytest.approx(0.8 / (1 + 1 / 2 + 1 / 2))),
        (1, 1.0),
    ]


def test_quality_of_images_in_plain_loops() -> None:
    qualities = image_qualities(match_results(TRUTH, RESULTS)["segm"], score=0.4)
    answers = [
        (r, a)
        for r, a in zip(RESULTS, answers_of(TRUTH, RESULTS), strict=True)
        if r["score"] >= 0.4 and not a.ignored
    ]
    for image in range(14):
        here = [answer for result, answer in answers if result["image_id"] == image]
        pairs = [answer.iou for answer in here if answer.annotation is not None]
        objects = sum(a["image_id"] == image and not a["iscrowd"] for a in TRUTH["annotations"])
        weight = len(pairs) + (len(here) - len(pairs)) / 2 + (objects - len(pairs)) / 2
        assert qualities.get(image) == (pytest.approx(sum(pairs) / weight) if weight else None), (
            image
        )
    assert sorted(qualities.values()) == list(qualities.values())
    assert 14 not in qualities


def test_matched_pairs_by_hand_and_in_plain_loops() -> None:
    """A score too low for a picture still counts; crowds and what finds an object taken do not."""
    assert matched_pairs(match_results(*_handmade())["segm"]) == [(1, 1), (3, 2), (4, 3)]
    expected = [
        (number, 1 + [a is answer.annotation for a in TRUTH["annotations"]].index(True))
        for number, answer in enumerate(answers_of(TRUTH, RESULTS), start=1)
        if answer.annotation is not None
    ]
    assert len(expected) > 20
    assert matched_pairs(match_results(TRUTH, RESULTS)["segm"]) == expected
