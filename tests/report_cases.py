"""An evaluation of random ellipses whose names would break a careless page, and how pycocotools
should count it, in plain loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from mrcnn_jax.evaluation.at_score import at_score, shown
from mrcnn_jax.evaluation.average_precision import coco_figures, match_results
from mrcnn_jax.figures.page.contents import report_data
from mrcnn_jax.runs.metrics import Row

SIZE = (96, 128)
ATTACK = "window.attacked = true"
NAMES = {
    3: f"</script><script>{ATTACK}</script>",
    8: f"""<img src=x onerror="{ATTACK}">'"&amp;\u2028""",
    11: "n" * 300,
    20: "seen nowhere",
}
FILE_NAME = f"<svg onload='{ATTACK}'>/{{{{data}}}}/{{}}.jpg"


class Answer(NamedTuple):
    """A detection: the annotation it took (None: false), the IoU of their masks, and whether it
    lies in a crowd and does not count."""

    annotation: dict[str, Any] | None
    iou: float
    ignored: bool


def mask_of(instance: dict[str, Any]) -> np.ndarray:
    return np.asarray(coco_mask.decode(instance["segmentation"])).astype(bool)


def instance(mask: np.ndarray, image: int, category: int, **more: Any) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = coco_mask.toBbox(rle).tolist()
    rle = {"size": list(mask.shape), "counts": rle["counts"].decode()}
    return {
        "image_id": image,
        "category_id": category,
        "segmentation": rle,
        "bbox": box,
        "area": float(mask.sum()),
        "iscrowd": 0,
        **more,
    }


def case(images: int = 14) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth with a crowd in every third image, and detections that are shifted copies, of
    other classes, or invented."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]

    def ellipse() -> np.ndarray:
        cx, cy, rx, ry = rng.uniform(20, 108), rng.uniform(20, 76), *rng.uniform(5, 40, 2)
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1

    categories = [3, 8, 11]
    truth, found = [], []
    for image in range(images):
        for number in range(rng.integers(1, 5)):
            crowd = int(image % 3 == 1 and number == 0)
            truth.append(
                instance(
                    ellipse(), image, int(rng.choice(categories)), iscrowd=crowd, id=len(truth)
                )
            )
            for _ in range(rng.integers(0, 4)):
                mask = np.roll(mask_of(truth[-1]), tuple(rng.integers(-5, 6, 2)), (0, 1))
                category = (
                    truth[-1]["category_id"] if rng.uniform() < 0.8 else int(rng.choice(categories))
                )
                found.append(instance(mask, image, category, score=float(rng.uniform())))
        found += [
            instance(ellipse(), image, int(rng.choice(categories)), score=float(rng.uniform()))
            for _ in range(rng.integers(0, 4))
        ]
    ground_truth = {
        # One image more than has objects or detections.
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": FILE_NAME.format(i)}
            for i in range(images + 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
        "annotations": truth,
    }
    return ground_truth, found


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (*SIZE, 3), np.uint8)


def data_of(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    images: int = 60,
    rows: Sequence[Row] = (),
    score: float = 0.5,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    evaluations = match_results(ground_truth, results, iou_types=("bbox",))
    with_mask = [result for result in results if "segmentation" in result]
    evaluations |= match_results(ground_truth, with_mask, iou_types=("segm",))
    kind = shown(evaluations)
    heading = {"run": "runs/" + NAMES[8], "data": "/long/" + "path/" * 60}
    config = {
        "name": NAMES[3],
        "model": {"scales": (16, 32), "high": float("inf")},
        "stages": ({"name": "rpn"},),
    }
    return report_data(
        evaluations,
        {**coco_figures(evaluations), "recall@50": 0.5, "recall@50/small": 0.25, **(metrics or {})},
        at_score(evaluations[kind], kind, score),
        picture,
        heading=heading,
        config=config,
        rows=rows,
        images=images,
    )


def answers_of(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> list[Answer]:
    """COCO's matching at a mask IoU of .5, of each result: best scores first, each takes the object
    it overlaps most of those left."""
    taken: set[int] = set()
    answers: list[Answer | None] = [None] * len(results)
    for i in sorted(range(len(results)), key=lambda i: -results[i]["score"]):
        result, mask = results[i], mask_of(results[i])
        best: tuple[float, dict[str, Any] | None] = (0.5, None)
        crowd = False
        for annotation in ground_truth["annotations"]:
            if (annotation["image_id"], annotation["category_id"]) != (
                result["image_id"],
                result["category_id"],
            ):
                continue
            other = mask_of(annotation)
            if annotation["iscrowd"]:
                crowd |= bool((mask & other).sum() >= 0.5 * mask.sum())
            elif (
                id(annotation) not in taken
                and (mask & other).sum() >= best[0] * (mask | other).sum()
            ):
                best = (mask & other).sum() / (mask | other).sum(), annotation
        if best[1] is not None:
            taken.add(id(best[1]))
        answers[i] = Answer(best[1], best[0] if best[1] else 0.0, best[1] is None and crowd)
    return [answer for answer in answers if answer is not None]
