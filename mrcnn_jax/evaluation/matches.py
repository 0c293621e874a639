"""pycocotools' matches: of each detection, and the panoptic quality of each image from them.

The panoptic quality (Kirillov et al. 2019) is taken with all classes together: over an image's
objects and its detections with a score of at least SCORE, matched within their class at an IoU of
.5 as COCO does (of masks, or of boxes where no object has a mask; crowds neither count nor cost),
it is

    sum of the matched pairs' IoUs / (matched + (unmatched detections + unmatched objects) / 2),

1 for a perfect image and 0 for one where nothing is found. An image without objects and without
such detections has none.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

SCORE = 0.5


class Match(NamedTuple):
    """COCO's verdict on a detection at an IoU of .5."""

    annotation: int | None  # the one it took; None: a false positive
    ignored: bool  # neither true nor false


def image_qualities(evaluation: COCOeval, *, score: float = SCORE) -> dict[int, float]:
    """Compute the panoptic quality of each image that has one.

    Args:
        evaluation: of masks, or of boxes (`average_precision.match_results`).
        score: detections below it are left out.

    Returns:
        Image id -> quality in [0, 1]; the worst first, of equals the one with more in it.
    """
    matches = matches_at_half(evaluation)
    field = "bbox" if evaluation.params.iouType == "bbox" else "segmentation"
    objects = {a["id"]: a for a in evaluation.cocoGt.dataset["annotations"]}
    overlap: dict[int, float] = defaultdict(float)
    weight: dict[int, float] = defaultdict(float)
    for annotation in objects.values():
        weight[annotation["image_id"]] += 0.0 if annotation["iscrowd"] else 0.5
    for detection in evaluation.cocoDt.dataset["annotations"]:
        match = matches[detection["id"]]
        if detection["score"] < score or match.ignored:
            continue
        weight[detection["image_id"]] += 0.5  # with the object's half a matched pair weighs one
        if match.annotation is not None:
            pair = [detection[field]], [objects[match.annotation][field]], [0]
            overlap[detection["image_id"]] += float(coco_mask.iou(*pair)[0, 0])
    qualities = {image: overlap[image] / total for image, total in weight.items() if total}
    return dict(sorted(qualities.items(), key=lambda item: (item[1], -weight[item[0]], item[0])))


def matches_at_half(evaluation: COCOeval) -> dict[int, Match]:
    """Detection id -> its match.

    Detections are matched best first, so this holds whatever score they are cut off at.
    """
    matches = {
        detection["id"]: Match(None, True) for detection in evaluation.cocoDt.dataset["annotations"]
    }
    at = iou_index(evaluation, 0.5)
    for entry in entries(evaluation):
        for number, annotation, ignored in zip(
            entry["dtIds"], entry["dtMatches"][at], entry["dtIgnore"][at], strict=True
        ):
            taken = int(annotation) if annotation and not ignored else None
            matches[number] = Match(taken, bool(ignored))
    return matches


def matched_pairs(evaluation: COCOeval) -> list[tuple[int, int]]:
    """Which detection found which object.

    Args:
        evaluation: of masks or boxes (`average_precision.match_results`).

    Returns:
        (detection id, annotation id) of all pairs of one class at an IoU of .5, of all sizes and as
        many detections as count, without crowds and other ignored objects. The ids are those of
        `evaluation`: places in the order given to `match_results`, from 1.
    """
    matches = matches_at_half(evaluation).items()
    return [(number, match.annotation) for number, match in matches if match.annotation is not None]


def entries(evaluation: COCOeval) -> list[dict[str, Any]]:
    """pycocotools' matches for each image and class with an object or a detection, of all sizes."""
    return [
        entry
        for entry in evaluation.evalImgs
        if entry is not None and entry["aRng"] == evaluation.params.areaRng[0]
    ]


def iou_index(evaluation: COCOeval, iou: float) -> int:
    """Place of an IoU threshold in pycocotools' arrays."""
    return int(np.argmin(np.abs(evaluation.params.iouThrs - iou)))
