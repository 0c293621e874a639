"""The contents of an evaluation's page (eval/report.html) as plain values.

Everything is read from pycocotools' own matches and precision: the page cannot contradict
metrics.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.evaluation.at_score import AtScore
from mrcnn_jax.evaluation.average_precision import FIGURES, NAMES, IouType, category_names
from mrcnn_jax.evaluation.matches import entries, iou_index
from mrcnn_jax.figures.draw import Image
from mrcnn_jax.figures.page.gallery import gallery
from mrcnn_jax.figures.panels import stage_panels
from mrcnn_jax.runs.metrics import Row

BINS = 20  # of the histogram of scores, over [0, 1]
POINTS = 80  # of a training curve: more would be a blot


def report_data(
    evaluations: Mapping[IouType, COCOeval],
    metrics: Mapping[str, float],
    at_score: AtScore,
    read_image: Callable[[int], Image],
    *,
    heading: Mapping[str, str],
    config: Mapping[str, Any],
    rows: Sequence[Row] = (),
    images: int = 60,
) -> dict[str, Any]:
    """Collect the data of `page.render`, ready for JSON; None stands for an undefined number.

    Args:
        evaluations: of boxes and masks (`evaluation.average_precision.match_results`).
        metrics: their figures and the recall of the proposals, as in metrics.json.
        at_score: counts at one score.
        read_image: image id -> uint8 RGB in original pixels; called for the images of the gallery.
        heading: the top of the page, label -> text.
        config: the run's, as `config.files.to_dict` returns it.
        rows: the run's metrics (`runs.metrics.read_metrics`), for the curves of training.
        images: number of images in the gallery at most, half of them the worst and half the best.
    """
    # Of boxes and masks, those that the matrix compares: an object without a mask is a crowd there.
    compared = evaluations[at_score.kind]
    names = category_names(compared.cocoGt.dataset["categories"])
    objects = [a for a in evaluations["bbox"].cocoGt.dataset["annotations"] if not a["iscrowd"]]
    per_class = Counter(a["category_id"] for a in objects)
    # Results without masks (of a head that is still random) have no figures for these, not 0.
    detected = {kind: len(one.cocoDt.dataset["annotations"]) for kind, one in evaluations.items()}
    given = {kind: count > 0 or not any(detected.values()) for kind, count in detected.items()}
    return {
        "heading": dict(heading),
        "totals": {
            "images": len(compared.params.imgIds),
            "objects": len(objects),
            "detections": len(compared.cocoDt.dataset["annotations"]),
        },
        "figures": {
            kind: {
                key.split("/")[1]: _known(value)
                for key, value in metrics.items()
                if key.startswith(f"{kind}/") and key.count("/") == 1
            }
            for kind in NAMES
            if f"{kind}/AP" in metrics
        },
        "recall": {
            name: _known(value) for name, value in metrics.items() if name.startswith("recall@")
        },
        "classes": [
            {"name": names[category], "objects": per_class[category]}
            for category in compared.params.catIds
        ],
        "class_figures": {
            kind: _class_figures(one, given=given[kind]) for kind, one in evaluations.items()
        },
        "at_score": {
            **at_score.to_dict(),
            "rates": [
                {name: _known(value) for name, value in at_score.rates(label).items()}
                for label in (*range(len(at_score.names)), None)
            ],
        },
        "precision": {
            kind: _precision_curves(one) if given[kind] else [None] * (1 + len(names))
            for kind, one in evaluations.items()
        },
        "histogram": {kind: _score_histogram(one) for kind, one in evaluations.items()},
        "training": training_curves(rows),
        "config": json.loads(json.dumps(config), parse_constant=str),  # JSON has no infinity
        "gallery": gallery(compared, read_image, images),
    }


def training_curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Collect the panels of `stage_panels` for each stage.

    A panel is {"title", "label", "series": [{"name", "x", "y"}]}. A series of more than POINTS
    steps holds the means of POINTS windows, with the least and largest value of each in "low" and
    "high". Values that are not finite are left out.
    """
    return [
        {
            "stage": stage,
            "panels": [
                {
                    "title": panel.title,
                    "label": panel.quantity,
                    "series": [{"name": n, **_windows(*line)} for n, line in panel.curves.items()],
                }
                for panel in panels
            ],
        }
        for stage, panels in stage_panels(rows).items()
    ]


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


def _precision_curves(evaluation: COCOeval) -> list[dict[str, Any] | None]:
    """Precision over recall 0, .01, ..., 1, for all classes and for each; None: no objects.

    Each is {"AP50": [101], "AP75": [101], "mean": [101]} (mean: over IoU .50:.95), for all classes
    the mean of those with objects. A class has {"scores": [101]} too: the lowest score among the
    detections that reach this recall at IoU .5, 0 where none do.
    """
    # IoU x recall x class, objects of all sizes, as many detections as count
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    half, three_quarters = (iou_index(evaluation, iou) for iou in (0.5, 0.75))
    scores = evaluation.eval["scores"][half, :, :, 0, -1]
    present = (precision > -1).any(axis=(0, 1))

    def lines(part: Float[np.ndarray, "iou recall"]) -> dict[str, Any]:
        at = {"AP50": part[half], "AP75": part[three_quarters], "mean": part.mean(axis=0)}
        return {name: _rounded(values) for name, values in at.items()}

    return [
        lines(precision[:, :, present].mean(axis=2)) if present.any() else None,
        *(
            {**lines(precision[:, :, k]), "scores": _rounded(scores[:, k])} if there else None
            for k, there in enumerate(present.tolist())
        ),
    ]


def _score_histogram(evaluation: COCOeval) -> list[dict[str, list[int]]]:
    """Detections by score, for all classes and for each: {"true": [BINS], "false": [BINS]}.

    They are matched at IoU .5. Those that COCO leaves out (matched to a crowd, or beyond the best
    of an image and class, `detection_limit`) are in neither.
    """
    counts = np.zeros((2, len(evaluation.params.catIds), BINS), int)  # false and true
    place = {category: k for k, category in enumerate(evaluation.params.catIds)}
    at = iou_index(evaluation, 0.5)
    for entry in entries(evaluation):
        counted, matched = ~entry["dtIgnore"][at], entry["dtMatches"][at] > 0
        scores = np.array(entry["dtScores"])
        for true in (0, 1):
            binned, _ = np.histogram(scores[counted & (matched == true)], BINS, (0, 1))
            counts[true, place[entry["category_id"]]] += binned
    with_total = np.concatenate([counts.sum(axis=1, keepdims=True), counts], axis=1)
    return [
        {"true": true.tolist(), "false": false.tolist()}
        for false, true in zip(*with_total, strict=True)
    ]


def _class_figures(evaluation: COCOeval, *, given: bool) -> list[dict[str, float | None]]:
    """AP of each class: over IoU .50:.95, at .50, at .75, of small, medium and large objects.

    Args:
        evaluation: of boxes or masks.
        given: whether there are such results; otherwise all is undefined.
    """
    if not given:
        return [dict.fromkeys(FIGURES[:6]) for _ in evaluation.params.catIds]
    precision = evaluation.eval["precision"][..., -1]  # IoU x recall x class x size
    half, three_quarters = (
        precision[iou_index(evaluation, iou), :, :, 0].mean(axis=0) for iou in (0.5, 0.75)
    )
    means = precision.mean(axis=(0, 1))  # -1 throughout where there is no such object
    columns = (means[:, 0], half, three_quarters, means[:, 1], means[:, 2], means[:, 3])
    return [
        {name: _known(value) for name, value in zip(FIGURES[:6], row, strict=True)}
        for row in zip(*columns, strict=True)
    ]


def _known(value: float) -> float | None:
    """COCO's -1 stands for undefined."""
    return None if value < 0 else round(float(value), 5)


def _rounded(values: Sequence[float] | Float[np.ndarray, " n"]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
