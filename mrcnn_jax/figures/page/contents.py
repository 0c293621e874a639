"""What the page of an evaluation shows (eval/report.html), as plain values: tables, curves, and the
images that went worst and best.

Everything is read from pycocotools' own matches and precision, so the page cannot tell another
story than metrics.json. How well an image went is its panoptic quality (Kirillov et al. 2019) with
all classes together: over its objects and its detections with a score of at least SCORE, matched by
class at a mask IoU of .5 as COCO does (crowds neither count nor cost),

    sum of the matched pairs' mask IoUs / (matched + (unmatched detections + unmatched objects) /
    2),

1 for a perfect image and 0 for one where nothing is found; an image without objects and such
detections has none.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.evaluation.average_precision import FIGURES, IouType, category_names
from mrcnn_jax.figures.draw import Image
from mrcnn_jax.runs.metrics import Curve, curve, read_rows

SCORE = 0.5  # of the detections by which images are ranked
BINS = 20  # of the histogram of scores, over [0, 1]
POINTS = 80  # of a training curve: more would be a blot
LONG_SIDE = 640  # of an image on the page, in pixels; boxes and masks are in these
# An image's JPEG and the outlines of its masks take the first quality and tolerance (in pixels)
# that keep them within these, so that the file stays below 15 MB; of a gallery of more than FULL
# images each may have less.
JPEG_BYTES, OUTLINE_BYTES, FULL = 150_000, 70_000, 60
QUALITIES = (85, 70, 50, 30, 15)
TOLERANCES = (0.6, 1.5, 4.0, 10.0)


@dataclass(frozen=True)
class Match:
    """What COCO says of a detection at an IoU of .5: the annotation it took (None: a false
    positive), or that it is not judged."""

    annotation: int | None
    ignored: bool


def report_data(
    evaluations: Mapping[IouType, COCOeval],
    metrics: Mapping[str, float],
    read_image: Callable[[int], Image],
    *,
    heading: Mapping[str, str],
    config: Mapping[str, Any],
    metrics_jsonl: Path | None,
    images: int = 60,
) -> dict[str, Any]:
    """The data of `visualization.page.render`, ready for JSON; what is undefined is None.

    Args:
        evaluations: of boxes and masks (`evaluation.coco.judge`).
        metrics: their figures and the proposals' recall, as in metrics.json.
        read_image: image id -> uint8 RGB in original pixels; called for the images of the gallery.
        heading: what stands at the top of the page, label -> text.
        config: the run's, as `config.to_dict` gives it.
        metrics_jsonl: the run's, for the curves of training, or None.
        images: how many the gallery holds at most, half of them the worst and half the best.
    """
    masks = evaluations["segm"]
    names = category_names(masks.cocoGt.dataset["categories"])
    objects = [a for a in masks.cocoGt.dataset["annotations"] if not a["iscrowd"]]
    per_class = Counter(a["category_id"] for a in objects)
    return {
        "heading": dict(heading),
        "totals": {
            "images": len(masks.params.imgIds),
            "objects": len(objects),
            "detections": len(masks.cocoDt.dataset["annotations"]),
        },
        "figures": {
            kind: {name: _known(metrics[f"{kind}/{name}"]) for name in FIGURES}
            for kind in evaluations
        },
        "recall": {
            name: _known(value) for name, value in metrics.items() if name.startswith("recall@")
        },
        "classes": [
            {"name": names[category], "objects": per_class[category]}
            for category in masks.params.catIds
        ],
        "class_figures": {
            kind: _class_figures(evaluation) for kind, evaluation in evaluations.items()
        },
        "precision": {
            kind: precision_curves(evaluation) for kind, evaluation in evaluations.items()
        },
        "histogram": {
            kind: score_histogram(evaluation) for kind, evaluation in evaluations.items()
        },
        "training": [] if metrics_jsonl is None else training_curves(metrics_jsonl),
        "config": json.loads(json.dumps(config), parse_constant=str),  # JSON has no infinity
        "gallery": _gallery(masks, read_image, images),
    }


def precision_curves(evaluation: COCOeval) -> list[dict[str, Any] | None]:
    """Precision over recall 0, .01, ..., 1 for all classes (the mean of those with objects), then
    for each class (None: no objects).

    Each is {"AP50": [101], "AP75": [101], "mean": [101]} (mean: over IoU .50:.95) and, of a class,
    {"scores": [101]}: the lowest score among the detections that reach this recall at IoU .5, 0
    where none do.
    """
    precision = evaluation.eval["precision"][
        :, :, :, 0, -1
    ]  # IoU x recall x class, objects of all sizes, 100 detections an image
    scores = evaluation.eval["scores"][_threshold(evaluation, 0.5), :, :, 0, -1]
    present = (precision > -1).any(axis=(0, 1))

    def lines(part: Float[np.ndarray, "iou recall"]) -> dict[str, Any]:
        at = {
            "AP50": part[_threshold(evaluation, 0.5)],
            "AP75": part[_threshold(evaluation, 0.75)],
            "mean": part.mean(axis=0),
        }
        return {name: _rounded(values) for name, values in at.items()}

    every: list[dict[str, Any] | None] = [
        lines(precision[:, :, present].mean(axis=2)) if present.any() else None
    ]
    classes = [
        {**lines(precision[:, :, k]), "scores": _rounded(scores[:, k])} if there else None
        for k, there in enumerate(present.tolist())
    ]
    return every + classes


def score_histogram(evaluation: COCOeval) -> list[dict[str, list[int]]]:
    """Detections by score for all classes, then for each: {"true": [BINS], "false": [BINS]}, by
    their matches at IoU .5.

    Those that COCO leaves out (matched to a crowd, or beyond the best 100 of an image and class)
    are in neither.
    """
    counts = np.zeros((2, len(evaluation.params.catIds), BINS), int)  # false and true
    place = {category: k for k, category in enumerate(evaluation.params.catIds)}
    at = _threshold(evaluation, 0.5)
    for entry in _entries(evaluation):
        judged, matched, scores = (
            ~entry["dtIgnore"][at],
            entry["dtMatches"][at] > 0,
            np.array(entry["dtScores"]),
        )
        for true in (0, 1):
            counts[true, place[entry["category_id"]]] += np.histogram(
                scores[judged & (matched == true)], BINS, (0, 1)
            )[0]
    return [
        {"true": true.tolist(), "false": false.tolist()}
        for false, true in zip(*_with_total(counts), strict=True)
    ]


def image_qualities(evaluation: COCOeval, *, score: float = SCORE) -> dict[int, float]:
    """Image id -> its panoptic quality (see above), of the images that have one; the worst first,
    of equals the one with more in it."""
    matches = matches_at_half(evaluation)
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
            pair = [detection["segmentation"]], [objects[match.annotation]["segmentation"]], [0]
            overlap[detection["image_id"]] += float(coco_mask.iou(*pair)[0, 0])
    qualities = {image: overlap[image] / total for image, total in weight.items() if total}
    return dict(sorted(qualities.items(), key=lambda item: (item[1], -weight[item[0]], item[0])))


def matches_at_half(evaluation: COCOeval) -> dict[int, Match]:
    """Detection id -> its match. Detections are matched best first, so this holds for every score
    below which they are left out."""
    matches = {
        detection["id"]: Match(None, True) for detection in evaluation.cocoDt.dataset["annotations"]
    }
    at = _threshold(evaluation, 0.5)
    for entry in _entries(evaluation):
        for number, annotation, ignored in zip(
            entry["dtIds"], entry["dtMatches"][at], entry["dtIgnore"][at], strict=True
        ):
            matches[number] = Match(
                int(annotation) if annotation and not ignored else None, bool(ignored)
            )
    return matches


def training_curves(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """For each stage its panels, one a loss, one for the recall of the proposals and one for the
    AP, as in `visualization.figures.curves`.

    A panel is {"title", "label", "series": [{"name", "x", "y"}]}; a series of more than POINTS
    steps gives the means of as many windows, with the least and largest value of each in "low" and
    "high". Values that are not finite are passed over.
    """
    rows = read_rows(metrics_jsonl)
    stages = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        splits = {
            name: {
                row["step"]: row for row in rows if row["stage"] == stage and row["split"] == name
            }
            for name in ("train", "val")
        }
        names = list(
            dict.fromkeys(
                name for split in splits.values() for row in split.values() for name in row
            )
        )
        panels = []
        for name in (name for name in names if name.startswith("loss/")):
            found = {
                label: curve(splits[split], name)
                for label, split in (("training", "train"), ("validation", "val"))
            }
            panels.append(
                _panel(name.removeprefix("loss/").replace("_", " ") + " loss", "loss", found)
            )
        recalls = {
            name.partition("/")[2] or "all": curve(splits["val"], name)
            for name in names
            if name.startswith("recall@")
        }
        if recalls:
            title = next(name for name in names if name.startswith("recall@")).partition("/")[0]
            panels.append(_panel(f"{title} of the proposals, IoU .5", "recall", recalls))
        precisions = {
            what: curve(splits["val"], f"{kind}/AP")
            for kind, what in (("bbox", "boxes"), ("segm", "masks"))
        }
        if any(steps.size for steps, _ in precisions.values()):
            panels.append(_panel("average precision, IoU .50:.95", "AP", precisions))
        if panels:
            stages.append({"stage": stage, "panels": panels})
    return stages


def _panel(title: str, label: str, curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {
        "title": title,
        "label": label,
        "series": [
            {"name": name, **_windows(*line)} for name, line in curves.items() if line[0].size
        ],
    }


def _windows(
    steps: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]
) -> dict[str, list[float]]:
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if len(steps) <= POINTS:
        return {"x": _rounded(steps), "y": _rounded(values)}
    parts = np.array_split(values, POINTS)
    return {
        "x": _rounded([part.mean() for part in np.array_split(steps, POINTS)]),
        "y": _rounded([part.mean() for part in parts]),
        "low": _rounded([part.min() for part in parts]),
        "high": _rounded([part.max() for part in parts]),
    }


def _class_figures(evaluation: COCOeval) -> list[dict[str, float | None]]:
    """AP of each class: over IoU .50:.95, at .50 and .75, and for small, medium and large
    objects."""
    precision = evaluation.eval["precision"][..., -1]  # IoU x recall x class x size
    half, three_quarters = (
        precision[_threshold(evaluation, iou), :, :, 0].mean(axis=0) for iou in (0.5, 0.75)
    )
    means = precision.mean(axis=(0, 1))  # -1 throughout where there is no such object
    columns = (means[:, 0], half, three_quarters, means[:, 1], means[:, 2], means[:, 3])
    return [
        {name: _known(value) for name, value in zip(FIGURES[:6], row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


def _gallery(
    evaluation: COCOeval, read_image: Callable[[int], Image], limit: int
) -> dict[str, Any]:
    qualities = image_qualities(evaluation)
    ranked = list(qualities)
    chosen = (
        ranked
        if len(ranked) <= limit
        else ranked[: limit - limit // 2] + ranked[len(ranked) - limit // 2 :]
    )
    matches = matches_at_half(evaluation)
    place = {category: k for k, category in enumerate(evaluation.params.catIds)}
    share = min(1.0, FULL / max(len(chosen), 1))
    shown = []
    for number in chosen:
        image = read_image(number)
        scale = LONG_SIDE / max(image.shape[:2])
        truth = evaluation.cocoGt.imgToAnns[number]
        found = sorted(
            evaluation.cocoDt.imgToAnns[number], key=lambda detection: -detection["score"]
        )
        order = {annotation["id"]: i for i, annotation in enumerate(truth)}
        drawn = _drawn([*truth, *found], place, scale, share * OUTLINE_BYTES)
        judged = []
        for detection in found:
            match = matches[detection["id"]]
            taken = None if match.annotation is None else order[match.annotation]
            judged.append(
                {"score": float(detection["score"]), "match": taken, "ignored": match.ignored}
            )
        shown.append(
            {
                "name": str(evaluation.cocoGt.imgs[number].get("file_name", number)),
                "quality": _known(qualities[number]),
                "width": max(round(image.shape[1] * scale), 1),
                "height": max(round(image.shape[0] * scale), 1),
                "jpeg": _jpeg(image, share * JPEG_BYTES),
                "objects": [
                    {**d, "crowd": bool(a["iscrowd"])} for d, a in zip(drawn, truth, strict=False)
                ],
                "detections": [
                    {**d, **judgement}
                    for d, judgement in zip(drawn[len(truth) :], judged, strict=True)
                ],
            }
        )
    return {"score": SCORE, "ranked": len(ranked), "images": shown}


def _drawn(
    instances: Sequence[Mapping[str, Any]], place: Mapping[int, int], scale: float, budget: float
) -> list[dict[str, Any]]:
    for tolerance in TOLERANCES:
        paths = [outline(instance["segmentation"], scale, tolerance) for instance in instances]
        if sum(map(len, paths)) <= budget:
            break
    boxes = [[round(float(side) * scale, 1) for side in instance["bbox"]] for instance in instances]
    return [
        {"class": place[i["category_id"]], "box": box, "path": path}
        for i, box, path in zip(instances, boxes, paths, strict=True)
    ]


def outline(rle: Mapping[str, Any], scale: float, tolerance: float = TOLERANCES[0]) -> str:
    """A mask as the path of an SVG, filled by the even-odd rule, in whole pixels of the image times
    `scale`; "" for an empty one.

    Where the path leaves points out it is at most about `tolerance` of these pixels away from them.
    """
    x, y, width, height = (int(side) for side in coco_mask.toBbox(rle))
    if not width * height:
        return ""
    # With a border of zeros, or an enlarged mask would have no half-way to its outside.
    mask = np.pad(np.asarray(coco_mask.decode(rle))[y : y + height, x : x + width], 1).astype(
        np.float32
    )
    # A contour runs through the centres of its pixels, half a pixel inside the mask: of half the
    # size, they hide that.
    size = max(round(mask.shape[1] * scale * 2), 1), max(round(mask.shape[0] * scale * 2), 1)
    drawn = (
        cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR if scale > 0.5 else cv2.INTER_AREA)
        >= 0.5
    )
    contours, _ = cv2.findContours(drawn.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 2 * tolerance, closed=True)[:, 0] + 0.5
        if len(points) > 2:
            # The mask begins one pixel before its box.
            places = (
                ((points * mask.shape[::-1] / size + [x - 1, y - 1]) * scale).round().astype(int)
            )
            steps = np.diff(places, axis=0).ravel().tolist()
            parts.append(f"M{places[0, 0]} {places[0, 1]}l{' '.join(map(str, steps))}z")
    return "".join(parts)


def _jpeg(image: Image, budget: float) -> str:
    """Base64 of a JPEG with a long side of at most LONG_SIDE, in the best of QUALITIES that keeps
    it within `budget`, or in the worst."""
    scale = min(1.0, LONG_SIDE / max(image.shape[:2]))
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)[..., ::-1]
    for quality in QUALITIES:
        text = base64.b64encode(
            cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        ).decode()
        if len(text) <= budget:
            break
    return text


def _entries(evaluation: COCOeval) -> list[dict[str, Any]]:
    """pycocotools' matches of each image and class that has an object or a detection, for objects
    of all sizes."""
    return [
        entry
        for entry in evaluation.evalImgs
        if entry is not None and entry["aRng"] == evaluation.params.areaRng[0]
    ]


def _threshold(evaluation: COCOeval, iou: float) -> int:
    return int(np.argmin(np.abs(evaluation.params.iouThrs - iou)))


def _with_total(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([counts.sum(axis=1, keepdims=True), counts], axis=1)


def _known(value: float) -> float | None:
    """COCO's -1 stands for undefined."""
    return None if value < 0 else round(float(value), 5)


def _rounded(values: Sequence[float] | Float[np.ndarray, " n"]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
