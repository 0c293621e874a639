"""Precision, recall, F1 and the confusion matrix of the detections with a score of at least some.

A detection and an object of its class match as COCO matches them at an IoU of .5: what lies in a
crowd, and detections beyond those that count, are left out. What is then left of detections and
objects is matched across classes: each detection, the best score first, takes the object whose IoU
with it is highest, if that is at least .5. So the diagonal of the matrix has the true positives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.evaluation.average_precision import NAMES, IouType, category_names
from mrcnn_jax.evaluation.matches import matches_at_half
from mrcnn_jax.output import listed, text_table

IOU = 0.5
SHOWN = 10  # classes whose confusion matrix fits a terminal
RATES = ("precision", "recall", "F1")


@dataclass(frozen=True, eq=False)
class AtScore:
    """Counts over the images of an evaluation, K classes."""

    kind: IouType
    """What was compared."""
    score: float
    """Least score of the detections."""
    names: tuple[str, ...]
    """Of the K classes."""
    counts: Int[np.ndarray, "k1 k1"]
    """Rows: objects by class, then false detections; columns: detections by class, then missed
    objects. K + 1 of both; the last of the last is 0."""

    def rates(self, label: int | None = None) -> dict[str, float]:
        """RATES in [0, 1]; -1 (COCO's sign for undefined) where nothing is to be counted.

        Args:
            label: the class, from 0; None: all together.
        """
        chosen = slice(0, len(self.names)) if label is None else slice(label, label + 1)
        right = int(np.diagonal(self.counts)[chosen].sum())
        objects, found = int(self.counts[chosen].sum()), int(self.counts[:, chosen].sum())
        return {
            "precision": right / found if found else -1.0,
            "recall": right / objects if objects else -1.0,
            "F1": 2 * right / (objects + found) if objects + found else -1.0,
        }

    def figures(self) -> dict[str, float]:
        """`at_score/<kind>/<rate>` for all classes, and `at_score/<kind>/<rate>/<class>` for each
        class with an object or a detection."""
        found = {f"at_score/{self.kind}/{name}": value for name, value in self.rates().items()}
        for label, of_class in enumerate(self.names):
            rates = self.rates(label)
            if rates["F1"] >= 0:
                found |= {f"at_score/{self.kind}/{r}/{of_class}": rates[r] for r in RATES}
        return found

    def to_dict(self) -> dict[str, Any]:
        """The matrix for JSON: {"compared", "score", "names": [K], "counts": [K + 1][K + 1]}."""
        return {
            "compared": self.kind,
            "score": self.score,
            "names": list(self.names),
            "counts": self.counts.tolist(),
        }


def shown(evaluations: Mapping[IouType, COCOeval]) -> IouType:
    """What the confusion matrix compares: masks, or boxes if no object has a mask or some detection
    lacks one.

    Args:
        evaluations: of boxes and masks (`average_precision.match_results`).
    """
    boxes, masks = evaluations["bbox"], evaluations["segm"]
    # Objects without a mask are crowds there.
    comparable = any(not one["iscrowd"] for one in masks.cocoGt.dataset["annotations"])
    found = len(masks.cocoDt.dataset["annotations"]) == len(boxes.cocoDt.dataset["annotations"])
    return "segm" if comparable and found else "bbox"


def at_score(evaluation: COCOeval, kind: IouType, score: float) -> AtScore:
    """Count matches of detections with a score of at least `score`.

    Args:
        evaluation: of boxes or masks (`average_precision.match_results`).
        kind: which of them.
        score: in [0, 1].
    """
    categories = evaluation.cocoGt.dataset["categories"]
    ids = evaluation.params.catIds
    place = {category: number for number, category in enumerate(ids)}
    names = category_names(categories)
    nothing = len(ids)
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    matches = matches_at_half(evaluation)
    missed: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for annotation in evaluation.cocoGt.dataset["annotations"]:
        if not annotation["iscrowd"]:
            missed[annotation["image_id"]][annotation["id"]] = annotation
    false = []
    for detection in evaluation.cocoDt.dataset["annotations"]:
        match = matches[detection["id"]]
        if detection["score"] < score or match.ignored:
            continue
        if match.annotation is None:
            false.append(detection)
        else:
            del missed[detection["image_id"]][match.annotation]
            counts[(place[detection["category_id"]],) * 2] += 1
    for detection in sorted(false, key=lambda one: -one["score"]):
        left = missed[detection["image_id"]]
        taken = _closest(detection, left.values(), "bbox" if kind == "bbox" else "segmentation")
        row = nothing if taken is None else place[left.pop(taken)["category_id"]]
        counts[row, place[detection["category_id"]]] += 1
    for left in missed.values():
        for annotation in left.values():
            counts[place[annotation["category_id"]], nothing] += 1
    return AtScore(kind, score, tuple(names[category] for category in ids), counts)


def _closest(
    detection: dict[str, Any], objects: Iterable[dict[str, Any]], field: str
) -> int | None:
    """The id of the object of another class that overlaps a detection most; None under IOU."""
    others = [one for one in objects if one["category_id"] != detection["category_id"]]
    if not others:
        return None
    ious = coco_mask.iou([detection[field]], [one[field] for one in others], [0] * len(others))[0]
    best = int(ious.argmax())
    return others[best]["id"] if ious[best] >= IOU else None


def table(found: AtScore, metrics: Mapping[str, float]) -> str:
    """Aligned lines for people, in percent: all classes, and each with an object or detection.

    Args:
        found: what is counted.
        metrics: AP, of all classes and of each, as of `average_precision.coco_figures`.
    """
    title = f"{NAMES[found.kind]}s with a score of at least {found.score:g}"
    kinds = [kind for kind in NAMES if metrics.get(f"{kind}/AP", -1) >= 0]
    of_kinds = [f"{NAMES[kind]} AP" for kind in kinds]
    rows = [[title, *RATES, "objects", "detections", *of_kinds]]
    total = len(found.names)
    for label in (None, *range(total)):
        rates = found.rates(label)
        if label is None or rates["F1"] >= 0:
            name = "all" if label is None else found.names[label]
            chosen = slice(0, total) if label is None else slice(label, label + 1)
            of_class = "" if label is None else f"/{name}"
            shares = [rates[rate] for rate in RATES]
            shares += [metrics.get(f"{kind}/AP{of_class}", -1.0) for kind in kinds]
            cells = ["-" if share < 0 else f"{100 * share:.1f}" for share in shares]
            sums = found.counts[chosen].sum(), found.counts[:, chosen].sum()
            rows.append([name, *cells[: len(RATES)], *map(str, sums), *cells[len(RATES) :]])
    return "\n".join(text_table(rows))


def missing_line(found: AtScore) -> str | None:
    """Says which classes have no object, and so no part in AP; None if all have one."""
    without = [name for name, row in zip(found.names, found.counts, strict=False) if not row.sum()]
    if not 0 < len(without) < len(found.names):
        return None
    return (
        f"no object of {listed(without, 5)}: AP is the mean of the other "
        f"{len(found.names) - len(without)} classes"
    )


def matrix(found: AtScore) -> str | None:
    """The confusion matrix in aligned lines; None with one class or more than `SHOWN`.

    Classes without an object or a detection are left out.
    """
    total = len(found.names)
    present = [i for i in range(total) if found.counts[i].sum() + found.counts[:, i].sum()]
    if not 1 < len(present) <= SHOWN:
        return None
    title = "objects by class, found as"
    rows = [[title, *(found.names[i] for i in present), "missed"]]
    for i in (*present, total):
        name = "false" if i == total else found.names[i]
        missed = "" if i == total else str(found.counts[i, total])
        rows.append([name, *(str(found.counts[i, j]) for j in present), missed])
    return "\n".join(text_table(rows))
