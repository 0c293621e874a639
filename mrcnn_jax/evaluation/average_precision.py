"""COCO's box and mask AP with pycocotools, for any COCO-format ground truth.

pycocotools is given copies without the things that trip it up: annotations are numbered from 1 (it
takes a match with id 0 for no match), `info`, `area` and `iscrowd` may be missing, and there may be
no results at all. Boxes and masks are evaluated separately, so that the area of a detection is that
of its box for boxes and of its mask for masks. Boxes are ranked by "score", masks by "mask_score"
where a result has one (Mask Scoring R-CNN). "boundary" evaluates masks by the smaller of two
IoUs: their own and that of their boundaries (`evaluation.boundary`).

COCO counts the best 100 detections of a class in an image. Where an image of another data set has
more objects of a class, as many count as it has (`detection_limit`).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.evaluation.boundary import BoundaryEval
from mrcnn_jax.evaluation.coco_categories import COCO as COCO_CATEGORIES
from mrcnn_jax.output import text_table
from mrcnn_jax.pixels.rle import segmentation_rle

IouType = Literal["bbox", "segm", "boundary"]
NAMES: dict[IouType, str] = {"bbox": "box", "segm": "mask", "boundary": "boundary"}
# In the order of COCOeval.stats: AP over IoU .50:.95, at .50, at .75, of small, medium and large
# objects; average recall with 1, 10 and 100 detections per image and class, and of small, medium
# and large objects.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
LIMIT = 100  # detections of a class in an image that count in COCO's own figures
AT_LIMIT = f"AP@{LIMIT}"  # AP with that limit, where another one holds


def match_results(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    *,
    iou_types: Sequence[IouType] = ("bbox", "segm"),
) -> dict[IouType, COCOeval]:
    """Match `results` with the objects on all images and categories of `ground_truth`.

    Args:
        ground_truth: a parsed COCO instances file; not changed. For masks, an annotation without a
            segmentation is a crowd region of its box: detections there count neither way.
        results: COCO results (`inference.results.to_coco`); not changed. "segm" and "boundary"
            need a segmentation.
        iou_types: some of "bbox", "segm" and "boundary".

    Returns:
        pycocotools' matches, precision and recall by type, which `coco_figures` reads. `cocoGt` and
        `cocoDt` number annotations and results from 1 in the order in which they were given.

    Raises:
        ConfigError: a result or an annotation names an image, or a result a category, that the
            ground truth lacks; a result lacks a box, mask or finite score; a segmentation is
            unreadable.
    """
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"])) for image in ground_truth["images"]
    }
    known = {category["id"] for category in ground_truth["categories"]}
    for result in results:
        if result["image_id"] not in sizes:
            raise ConfigError(f"results: image_id {result['image_id']}: not in the ground truth")
        if result["category_id"] not in known:
            raise ConfigError(
                f"results: category_id {result['category_id']} (image {result['image_id']}): "
                "not in the ground truth"
            )
        for name in ("score", "mask_score"):
            score = result.get(name, None if name == "score" else 0)
            if not isinstance(score, int | float | np.number) or not math.isfinite(score):
                raise ConfigError(
                    f"results: image_id {result['image_id']}: {name} {score}: not a finite number"
                )

    limit = detection_limit(ground_truth)
    evaluations: dict[IouType, COCOeval] = {}
    for kind in iou_types:
        truth = [_truth(annotation, sizes, kind) for annotation in ground_truth["annotations"]]
        found = [_detection(result, sizes, kind) for result in results]
        evaluations[kind] = _run(ground_truth, truth, found, kind, limit)
    return evaluations


def detection_limit(ground_truth: Mapping[str, Any]) -> int:
    """How many detections of a class in an image count, the best first.

    Args:
        ground_truth: a parsed COCO instances file.

    Returns:
        COCO's 100, or the largest number of objects (crowds are none) that a class has in an image,
        if that is more. COCO's own data sets, known by their 80 categories, always have 100: their
        figures are compared with published ones.
    """
    if {(c["id"], c["name"]) for c in ground_truth["categories"]} == set(COCO_CATEGORIES):
        return LIMIT
    objects = (a for a in ground_truth["annotations"] if not a.get("iscrowd"))
    counts = Counter((a["image_id"], a["category_id"]) for a in objects)
    return max([LIMIT, *counts.values()])


def mask_score(result: Mapping[str, Any]) -> float:
    """The score of a result's mask: its mask_score, or its score if it has no other."""
    return float(result.get("mask_score", result["score"]))


def coco_figures(evaluations: Mapping[IouType, COCOeval]) -> dict[str, float]:
    """COCO's figures, read off the evaluations of `match_results`.

    Returns:
        For each type, `<type>/<figure>` for the twelve FIGURES in [0, 1], or -1 (COCO's sign for
        undefined) if the ground truth has no such object; and `<type>/AP/<category name>` for each
        category with ground truth. Categories that share a name have their id behind it. If
        `detection_limit` is some N over 100, all but AR1, AR10 and AR100 are with N detections, and
        `<type>/AR<N>` and `<type>/AP@100` (AP with COCO's 100) are added.
    """
    metrics: dict[str, float] = {}
    for kind, evaluation in evaluations.items():
        names = category_names(evaluation.cocoGt.dataset["categories"])
        metrics |= {f"{kind}/{name}": value for name, value in _figures(evaluation).items()}
        # IoU x recall x category, all sizes, as many detections as count
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        for i, category in enumerate(evaluation.params.catIds):
            if (precision[:, :, i] > -1).any():
                metrics[f"{kind}/AP/{names[category]}"] = float(precision[:, :, i].mean())
    return metrics


def _figures(evaluation: COCOeval) -> dict[str, float]:
    """FIGURES, and those of a limit over 100.

    They are COCOeval.summarize's, which looks for 100 detections whatever `maxDets` says.
    """
    precision = evaluation.eval["precision"]  # IoU x recall x category x size x limit
    recall = evaluation.eval["recall"]  # IoU x category x size x limit
    ious = evaluation.params.iouThrs
    limits = dict(zip(evaluation.params.maxDets, np.moveaxis(recall[:, :, 0], -1, 0), strict=True))
    parts = [
        precision[:, :, :, 0, -1],
        *(precision[ious == iou][:, :, :, 0, -1] for iou in (0.5, 0.75)),
        *(precision[:, :, :, size, -1] for size in (1, 2, 3)),
        *(limits[limit] for limit in (1, 10, LIMIT)),
        *(recall[:, :, size, -1] for size in (1, 2, 3)),
    ]
    found = dict(zip(FIGURES, map(_mean, parts), strict=True))
    limit = evaluation.params.maxDets[-1]
    if limit > LIMIT:
        found |= {f"AR{limit}": _mean(limits[limit])}
        found |= {AT_LIMIT: _mean(precision[:, :, :, 0, evaluation.params.maxDets.index(LIMIT)])}
    return found


def _mean(values: Float[np.ndarray, "*n"]) -> float:
    """The mean over what is defined; -1 if nothing is."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def category_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """COCO category id -> name, followed by the id where several categories share the name."""
    times = Counter(category["name"] for category in categories)
    return {
        c["id"]: c["name"] if times[c["name"]] == 1 else f"{c['name']} ({c['id']})"
        for c in categories
    }


def table(metrics: dict[str, float]) -> str:
    """Format the AP and AR of all classes as aligned lines, in percent; "-" if undefined."""
    metrics = {key: value for key, value in metrics.items() if key.split("/")[0] in NAMES}
    kinds = [(kind, name) for kind, name in NAMES.items() if f"{kind}/AP" in metrics]
    own = dict.fromkeys(key.split("/")[1] for key in metrics if key.count("/") == 1)
    recalls = list(FIGURES[6:])
    recalls[3:3] = [name for name in own if name[2:].isdigit() and name not in FIGURES]
    lines: list[str] = []
    for columns in (FIGURES[:6], tuple(recalls)):
        rows = [["", *(column.rjust(5) for column in columns)]]
        for kind, name in kinds:
            values = [metrics.get(f"{kind}/{column}", -1.0) for column in columns]
            rows.append([name, *("-" if value < 0 else f"{100 * value:.1f}" for value in values)])
        lines += text_table(rows)
    return "\n".join(lines)


def limit_line(evaluations: Mapping[IouType, COCOeval]) -> str:
    """Say how many detections count, and, if they are over COCO's 100, what AP those give."""
    limit = next(iter(evaluations.values())).params.maxDets[-1]
    text = f"the best {limit} detections of a class in an image count"
    if limit == LIMIT:
        return f"{text} (COCO's limit)"
    both = []
    for kind, evaluation in evaluations.items():
        figures = {name: f"{100 * value:.1f}" for name, value in _figures(evaluation).items()}
        both.append(f"{NAMES[kind]} AP {figures['AP']}, with {LIMIT} {figures[AT_LIMIT]}")
    return f"{text}, as many as there are objects, instead of COCO's {LIMIT}: {'; '.join(both)}"


def _truth(
    annotation: dict[str, Any], sizes: dict[int, tuple[int, int]], kind: IouType
) -> dict[str, Any]:
    """A copy of an annotation with every field that pycocotools reads."""
    name = f"annotation {annotation['id']} (image {annotation['image_id']})"
    if annotation["image_id"] not in sizes:
        raise ConfigError(f"{name}: no such image in the ground truth")
    prepared = {"iscrowd": 0, **annotation}
    if not annotation.get("segmentation"):
        x, y, width, height = annotation["bbox"]
        prepared["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        if kind != "bbox":
            prepared["iscrowd"] = 1
    if kind != "bbox" or "area" not in annotation:
        prepared["segmentation"] = _rle(
            prepared["segmentation"], sizes[annotation["image_id"]], name
        )
        prepared.setdefault("area", float(coco_mask.area(prepared["segmentation"])))
    return prepared


def _detection(
    result: dict[str, Any], sizes: dict[int, tuple[int, int]], kind: IouType
) -> dict[str, Any]:
    """A copy of a result with the score of its box or mask, and its area: small or large."""
    name = f"results: image_id {result['image_id']}"
    if kind != "bbox":
        rle = _rle(result.get("segmentation"), sizes[result["image_id"]], name)
        own = {"segmentation": rle, "area": float(coco_mask.area(rle))}
        return {**result, "score": mask_score(result), "iscrowd": 0, **own}
    if "bbox" not in result:
        raise ConfigError(f"{name}: no bbox")
    if not all(map(math.isfinite, result["bbox"])):
        raise ConfigError(f"{name}: bbox {result['bbox']}: not finite")
    return {**result, "iscrowd": 0, "area": result["bbox"][2] * result["bbox"][3]}


def _rle(segmentation: Any, size: tuple[int, int], name: str) -> dict[str, Any]:
    try:
        return segmentation_rle(segmentation, size)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _run(
    ground_truth: dict[str, Any],
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    kind: IouType,
    limit: int,
) -> COCOeval:
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        both = _coco(ground_truth, truth), _coco(ground_truth, found)
        evaluation = BoundaryEval(*both, "segm") if kind == "boundary" else COCOeval(*both, kind)
        if limit > LIMIT:
            evaluation.params.maxDets = [*evaluation.params.maxDets, limit]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _coco(ground_truth: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco
