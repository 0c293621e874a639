"""COCO's box and mask AP with pycocotools, for any COCO-format ground truth.

pycocotools is given copies, prepared so that what trips it does not matter: annotations are
numbered from 1 (it reads a match with id 0 as no match), `info`, `area` and `iscrowd` may be
missing, and there may be no results at all. Boxes and masks are judged apart, so that the area of a
detection is that of its box for boxes and of its mask for masks. "boundary" judges masks by the
smaller of two IoUs: their own, and that of their boundaries (`evaluation.boundary`).
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.config.schema import ConfigError
from mrcnn_jax.evaluation.boundary import BoundaryEval
from mrcnn_jax.output import text_table
from mrcnn_jax.pixels.rle import segmentation_rle

IouType = Literal["bbox", "segm", "boundary"]
# In the order of COCOeval.stats: AP over IoU .50:.95, at .50, at .75, and for small, medium and
# large objects; average recall at 1, 10 and 100 detections an image, and for small, medium and
# large objects.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    *,
    iou_types: Sequence[IouType] = ("bbox", "segm"),
) -> dict[str, float]:
    """COCO's figures for `results` on all images and categories of `ground_truth`.

    Args:
        ground_truth: a COCO instances file as parsed; not changed. For masks, an annotation without
            a segmentation is a crowd region of its box: what is found there counts neither for nor
                against.
        results: COCO results (`results.coco_results`); not changed. Those for "segm" and "boundary"
            need a segmentation.
        iou_types: some of "bbox", "segm" and "boundary".

    Returns:
        For each type, `<type>/<figure>` for the twelve FIGURES in [0, 1], or -1 (COCO's sign for
        undefined) where the ground truth has no such object; and `<type>/AP/<category name>` for
        each category that has ground truth, the others left out. Categories that share a name carry
        their id behind it.

    Raises:
        ConfigError: a result or an annotation names an image, or a result a category, that the
            ground truth lacks; a result lacks what is judged; a segmentation is unreadable.
    """
    return coco_figures(judge(ground_truth, results, iou_types=iou_types))


def judge(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    *,
    iou_types: Sequence[IouType] = ("bbox", "segm"),
) -> dict[IouType, COCOeval]:
    """What `coco_figures` reads: pycocotools' matches, precision and recall; arguments and errors
    are those of `evaluate`.

    In each, `cocoGt` and `cocoDt` number the annotations and the results from 1 in the order in
    which they were given.
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
                f"results: category_id {result['category_id']} (image {result['image_id']}): not in the ground truth"
            )

    evaluations: dict[IouType, COCOeval] = {}
    for kind in iou_types:
        truth = [_truth(annotation, sizes, kind) for annotation in ground_truth["annotations"]]
        found = [_detection(result, sizes, kind) for result in results]
        evaluations[kind] = _run(ground_truth, truth, found, kind)
    return evaluations


def coco_figures(evaluations: Mapping[IouType, COCOeval]) -> dict[str, float]:
    """What `evaluate` returns."""
    metrics: dict[str, float] = {}
    for kind, evaluation in evaluations.items():
        names = category_names(evaluation.cocoGt.dataset["categories"])
        metrics |= {
            f"{kind}/{figure}": float(value)
            for figure, value in zip(FIGURES, evaluation.stats, strict=True)
        }
        precision = evaluation.eval["precision"][
            :, :, :, 0, -1
        ]  # IoU x recall x category, all sizes, 100 detections an image
        for i, category in enumerate(evaluation.params.catIds):
            if (precision[:, :, i] > -1).any():
                metrics[f"{kind}/AP/{names[category]}"] = float(precision[:, :, i].mean())
    return metrics


def category_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """COCO category id -> name, with the id behind it where several share the name."""
    times = Counter(category["name"] for category in categories)
    return {
        c["id"]: c["name"] if times[c["name"]] == 1 else f"{c['name']} ({c['id']})"
        for c in categories
    }


def table(metrics: dict[str, float]) -> str:
    """`evaluate`'s figures as a few aligned lines, in percent; "-" where a figure is undefined."""
    named = (("bbox", "box"), ("segm", "mask"), ("boundary", "boundary"))
    kinds = [(kind, name) for kind, name in named if f"{kind}/AP" in metrics]
    classes = list(dict.fromkeys(key.split("/", 2)[2] for key in metrics if key.count("/") >= 2))
    lines: list[str] = []
    for title, columns in (("", FIGURES[:6]), ("", FIGURES[6:]), ("AP/", tuple(classes))):
        if not columns:
            continue
        rows = [["AP of" if title else "", *(column.rjust(5) for column in columns)]]
        for kind, name in kinds:
            values = [metrics.get(f"{kind}/{title}{column}", -1.0) for column in columns]
            rows.append([name, *("-" if value < 0 else f"{100 * value:.1f}" for value in values)])
        lines += text_table(rows)
    return "\n".join(lines)


def _truth(
    annotation: dict[str, Any], sizes: dict[int, tuple[int, int]], kind: IouType
) -> dict[str, Any]:
    """A copy of an annotation with all that pycocotools reads."""
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
    """A copy of a result with the area of its box or of its mask, by which pycocotools tells small,
    medium and large."""
    name = f"results: image_id {result['image_id']}"
    if kind != "bbox":
        rle = _rle(result.get("segmentation"), sizes[result["image_id"]], name)
        return {**result, "iscrowd": 0, "segmentation": rle, "area": float(coco_mask.area(rle))}
    if "bbox" not in result:
        raise ConfigError(f"{name}: no bbox")
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
) -> COCOeval:
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # pycocotools prints its progress and its own table
        both = _coco(ground_truth, truth), _coco(ground_truth, found)
        evaluation = BoundaryEval(*both, "segm") if kind == "boundary" else COCOeval(*both, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _coco(ground_truth: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    numbered = [
        {**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)
    ]
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": numbered,
    }
    coco.createIndex()
    return coco
