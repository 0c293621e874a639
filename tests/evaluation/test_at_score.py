"""Precision, recall and confusions at a score: by hand and in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from report_cases import NAMES, SIZE, answers_of, case, instance, mask_of

from mrcnn_jax.evaluation.at_score import (
    RATES,
    AtScore,
    at_score,
    matrix,
    missing_line,
    shown,
    table,
)
from mrcnn_jax.evaluation.average_precision import match_results

TRUTH, RESULTS = case()
CATEGORIES = sorted(NAMES)


def strip(start: int, stop: int) -> np.ndarray:
    """Columns `start` to `stop` of a band 20 pixels high: IoUs are ratios of lengths."""
    mask = np.zeros(SIZE, bool)
    mask[10:30, start:stop] = True
    return mask


CAT, DOG, OWL, NONE = 3, 8, 11, 20


def by_hand() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    objects = [
        instance(strip(0, 10), 0, CAT),  # found
        instance(strip(20, 40), 0, CAT),  # taken for a dog, and then for an owl
        instance(strip(60, 80), 0, DOG),  # found at a low score, and seen as a cat
        instance(strip(0, 10), 1, OWL),  # missed
        instance(strip(20, 60), 1, OWL, iscrowd=1),
        instance(strip(0, 20), 2, DOG),  # found, and taken for an owl
    ]
    results = [
        instance(strip(0, 8), 0, CAT, score=0.9),
        instance(strip(20, 38), 0, OWL, score=0.55),  # IoU .9, but later
        instance(strip(20, 35), 0, DOG, score=0.6),  # IoU .75: takes the cat
        instance(strip(60, 80), 0, DOG, score=0.3),
        instance(strip(70, 80), 0, CAT, score=0.5),  # IoU .5
        instance(strip(0, 4), 1, OWL, score=0.8),  # IoU .4
        instance(strip(20, 40), 1, OWL, score=0.8),  # in the crowd
        instance(strip(20, 60), 1, CAT, score=0.8),  # crowds are no objects
        instance(strip(0, 20), 2, OWL, score=0.95),  # the dog is taken: by its own class first
        instance(strip(1, 20), 2, DOG, score=0.7),
    ]
    ground_truth = {
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"}
            for i in range(3)
        ],
        "categories": [
            {"id": number, "name": name}
            for number, name in ((CAT, "cat"), (DOG, "dog"), (OWL, "owl"), (NONE, "none"))
        ],
        "annotations": [{**a, "id": number} for number, a in enumerate(objects)],
    }
    return ground_truth, results


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_by_hand(kind: Any) -> None:
    """Boxes of the strips have the same IoUs."""
    found = at_score(match_results(*by_hand())[kind], kind, 0.5)
    assert found.names == ("cat", "dog", "owl", "none")
    assert found.counts.tolist() == [
        # cat, dog, owl, none, missed
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [1, 0, 3, 0, 0],  # false
    ]
    cat, dog, owl = (found.rates(label) for label in range(3))
    assert cat == {"precision": 1 / 3, "recall": 1 / 2, "F1": 2 / 5}
    assert dog == {"precision": 1 / 2, "recall": 1 / 2, "F1": 1 / 2}
    assert owl == {"precision": 0, "recall": 0, "F1": 0}
    assert found.rates() == {"precision": 2 / 8, "recall": 2 / 5, "F1": 4 / 13}
    figures = found.figures()
    assert len(figures) == 3 + 3 * 3  # not of the class without an object or detection
    assert figures[f"at_score/{kind}/recall"] == 0.4
    assert figures[f"at_score/{kind}/F1/dog"] == 0.5
    average = {"bbox/AP": 0.5, "bbox/AP/cat": 0.25, "bbox/AP/dog": 0.75, "segm/AP": -1.0}
    lines = [line.split() for line in table(found, average).splitlines()]
    assert lines[0][-2:] == ["box", "AP"]
    assert lines[1] == ["all", "25.0", "40.0", "30.8", "5", "8", "50.0"]
    assert lines[2:] == [
        ["cat", "33.3", "50.0", "40.0", "2", "3", "25.0"],
        ["dog", "50.0", "50.0", "50.0", "2", "2", "75.0"],
        ["owl", "0.0", "0.0", "0.0", "1", "3", "-"],
    ]
    confusions = matrix(found)
    assert confusions is not None
    assert [line.split() for line in confusions.splitlines()] == [
        ["objects", "by", "class,", "found", "as", "cat", "dog", "owl", "missed"],
        ["cat", "1", "1", "0", "0"],
        ["dog", "1", "1", "0", "0"],
        ["owl", "0", "0", "0", "1"],
        ["false", "1", "0", "3"],
    ]
    # Below .3 the dog of the first image is found, and no longer seen as a cat.
    low = at_score(match_results(*by_hand())[kind], kind, 0.3)
    assert low.counts[:2].tolist() == [[1, 1, 0, 0, 0], [0, 2, 0, 0, 0]]
    assert low.counts[4].tolist() == [2, 0, 3, 0, 0]


def test_nothing_to_count() -> None:
    ground_truth, results = by_hand()
    nothing = at_score(match_results(ground_truth, [])["segm"], "segm", 0.5)
    assert nothing.rates() == {"precision": -1, "recall": 0, "F1": 0}
    assert nothing.counts.sum() == nothing.counts[:3, 4].sum() == 5
    truth = {**ground_truth, "annotations": []}
    assert at_score(match_results(truth, results)["segm"], "segm", 0.5).rates()["recall"] == -1
    empty = at_score(match_results(truth, [])["segm"], "segm", 0.5)
    assert empty.figures() == {f"at_score/segm/{rate}": -1 for rate in RATES}
    assert table(empty, {}).splitlines()[1].split() == ["all", "-", "-", "-", "0", "0"]
    assert matrix(empty) is None


def test_classes_without_objects_are_named() -> None:
    """AP is not theirs."""
    counts = np.diag([3, 0, 2, 0])
    counts[1, 3] = counts[3, 0] = 0
    found = AtScore("segm", 0.5, ("cat", "dog", "owl"), counts)
    line = "no object of dog: AP is the mean of the other 2 classes"
    assert missing_line(found) == line
    counts[1, 3] = 1  # missed
    assert missing_line(found) is None
    assert missing_line(AtScore("segm", 0.5, ("cat",), np.zeros((2, 2), np.int64))) is None


@pytest.mark.parametrize(("classes", "fits"), [(1, False), (2, True), (10, True), (11, False)])
def test_a_matrix_that_fits_is_shown(classes: int, fits: bool) -> None:
    counts = np.eye(classes + 1, dtype=np.int64)
    found = AtScore("segm", 0.5, tuple(f"c{i}" for i in range(classes)), counts)
    assert (matrix(found) is not None) == fits


def test_boxes_are_shown_if_no_object_has_a_mask() -> None:
    """A crowd is no object; of those with a mask one is enough."""
    ground_truth, results = by_hand()
    assert shown(match_results(ground_truth, results)) == "segm"
    *first, last = ground_truth["annotations"]
    boxes = [a if a["iscrowd"] else {**a, "segmentation": []} for a in first]
    assert shown(match_results({**ground_truth, "annotations": [*boxes, last]}, results)) == "segm"
    assert shown(match_results({**ground_truth, "annotations": boxes}, results)) == "bbox"
    assert shown(match_results({**ground_truth, "annotations": []}, results)) == "bbox"


def in_loops(score: float) -> np.ndarray:
    """COCO's matches of `report_cases.answers_of`, then the rest across classes, best first."""
    place = {category: number for number, category in enumerate(CATEGORIES)}
    counts = np.zeros((5, 5), int)
    answers = list(zip(RESULTS, answers_of(TRUTH, RESULTS), strict=True))
    left = [a for a in TRUTH["annotations"] if not a["iscrowd"]]
    false = []
    for result, answer in answers:
        if result["score"] < score or answer.ignored:
            continue
        column = place[result["category_id"]]
        if answer.annotation is None:
            false.append(result)
        else:
            counts[column, column] += 1
            left = [a for a in left if a is not answer.annotation]
    for result in sorted(false, key=lambda r: -r["score"]):
        best, chosen = 0.5, None
        for a in left:
            if a["image_id"] == result["image_id"]:
                one, other = mask_of(a), mask_of(result)
                iou = (one & other).sum() / (one | other).sum()
                if iou >= best:
                    best, chosen = iou, a
        row = 4 if chosen is None else place[chosen["category_id"]]
        counts[row, place[result["category_id"]]] += 1
        left = [a for a in left if a is not chosen]
    for a in left:
        counts[place[a["category_id"]], 4] += 1
    return counts


@pytest.mark.parametrize("score", [0.0, 0.3, 0.5, 0.8])
def test_in_plain_loops(score: float) -> None:
    found: AtScore = at_score(match_results(TRUTH, RESULTS)["segm"], "segm", score)
    expected = in_loops(score)
    assert found.counts.tolist() == expected.tolist()
    assert score > 0.3 or expected[np.triu_indices(3, 1)].sum() + expected[1, 0] > 0
    objects = sum(not a["iscrowd"] for a in TRUTH["annotations"])
    assert found.counts[:4].sum() == objects
