"""The figures of a run on a split: COCO's AP, recall of its proposals, errors of its depth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from mrcnn_jax import parallel
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.loader import Split, plan_once
from mrcnn_jax.evaluation.at_score import AtScore, at_score, shown
from mrcnn_jax.evaluation.average_precision import IouType, coco_figures, match_results
from mrcnn_jax.evaluation.proposals import proposal_recall
from mrcnn_jax.inference.depth_comparison import DepthComparison
from mrcnn_jax.inference.predictor import Predictor, Proposals, results_of_split
from mrcnn_jax.output import write_file
from mrcnn_jax.runs import manifest

METRICS_FILE = "metrics.json"
CONFUSION = "confusion"  # in it: the only value that is no number, but for the checkpoint


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of a run, and all that they were computed from."""

    metrics: dict[str, float]
    """Those of `coco_figures`, `AtScore`, `proposal_recall` and, where there is depth,
    `DepthComparison`."""
    results: list[dict[str, Any]]
    """COCO results by the run's categories, those that the split does not have included."""
    proposals: Proposals
    ground_truth: dict[str, Any]
    """The evaluated images as a COCO annotation file."""
    matches: dict[IouType, COCOeval]
    """Of boxes and masks."""
    at_score: AtScore
    """Of masks; of boxes if no object has a mask or some detection lacks one."""
    file_ids: Mapping[int, int]
    """As of `CocoDataset.file_ids`."""

    def save(self, folder: Path, checkpoint: str | None = None) -> None:
        """Writes metrics.json, with the name of the checkpoint that they stand for (None: they are
        not of all of its own validation images) and the confusion matrix, detections.json (by the
        ids of the annotation file, of categories that it has, where those of the run are others),
        and the manifest of both."""
        results = self.results
        if ids := self.file_ids:
            known = (result for result in results if result["category_id"] in ids)
            results = [one | {"category_id": ids[one["category_id"]]} for one in known]
        named = {"checkpoint": checkpoint} if checkpoint else {}
        numbers = json.dumps(named | self.metrics, indent=2).removesuffix("\n}")
        matrix = json.dumps(self.at_score.to_dict())  # on one line
        (folder / manifest.NAME).unlink(missing_ok=True)
        write_file(folder / METRICS_FILE, f'{numbers},\n  "{CONFUSION}": {matrix}\n}}\n')
        write_file(folder / "detections.json", json.dumps(results))
        manifest.write(folder, (METRICS_FILE, "detections.json"))


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Reads the metrics that `Evaluation.save` wrote; {} if there are none.

    Returns:
        Name -> number, and perhaps "checkpoint" -> its name.

    Raises:
        ConfigError: they are damaged.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return {}
    # Those of older versions have no manifest; detections.json may be gone, it is large.
    recorded = (folder / manifest.NAME).exists()
    fault = manifest.damage(folder, (METRICS_FILE,)) if recorded else None
    if fault is not None:
        raise ConfigError(f"{fault} (evaluate again)")
    try:
        metrics: dict[str, Any] = dict(json.loads(path.read_bytes()))
        metrics.pop(CONFUSION, None)
        numbers = [value for name, value in metrics.items() if name != "checkpoint"]
        if not all(type(value) in (int, float) for value in numbers):
            raise ValueError("figures that are no numbers")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged: {error} (evaluate again)") from None
    return metrics


def evaluate(
    predictor: Predictor,
    split: Split,
    *,
    limit: int | None = None,
    boundary: bool = False,
    score: float = 0.5,
) -> Evaluation | None:
    """Evaluates every image of a split exactly once, with all devices.

    Of several processes each calls this.

    Args:
        split: its categories are the run's or some of them; the detections of others do not count.
        limit: only the first images.
        boundary: boundary AP as well (`evaluation.boundary`).
        score: for precision, recall and confusions (`evaluation.at_score`).

    Returns:
        The evaluation in the first process, None in the others.
    """
    config, mesh = predictor.run.config, predictor.mesh
    # The detections in an image do not depend on its batch: each device gets a batch of its own.
    devices = 1 if mesh is None else mesh.size
    plan = plan_once(split, config.data.eval_batch_size * devices, limit)
    found = results_of_split(predictor, split, plan)
    if not parallel.is_first():
        return None
    return evaluation_of(config, split, *found, boundary=boundary, score=score)


def evaluation_of(
    config: Config,
    split: Split,
    results: list[dict[str, Any]],
    proposals: Proposals,
    depth: DepthComparison,
    *,
    boundary: bool = False,
    score: float = 0.5,
) -> Evaluation:
    """Computes the figures of what was found in images of a split.

    Args:
        config: of the run.
        split, boundary, score: as of `evaluate`.
        results, proposals, depth: as of `results_of_split`; whose images count.
    """
    indices = sorted(proposals)
    seen = split.dataset.with_images([split.dataset.images[i] for i in indices])
    ground_truth = seen.to_coco()
    categories = {category.id for category in seen.categories}
    counted = [result for result in results if result["category_id"] in categories]
    with_mask = [result for result in counted if "segmentation" in result]
    matches = match_results(ground_truth, counted, iou_types=("bbox",))
    matches |= match_results(ground_truth, with_mask, iou_types=("segm",))
    metrics = coco_figures(matches)
    if counted and not with_mask:  # what gives no masks has no AP of masks, rather than one of 0
        metrics = {
            name: -1.0 if name.startswith("segm/") else value
            for name, value in metrics.items()
            if not name.startswith("segm/AP/")
        }
    found = {kind: at_score(one, kind, score) for kind, one in matches.items()}
    metrics["at_score/score"] = score
    for one in found.values():
        if one.kind == "bbox" or shown(matches) == "segm":  # of no masks, all found would be false
            metrics |= one.figures()
    metrics |= depth.figures(
        list(zip(indices, seen.images, strict=True)), with_mask, matches["segm"]
    )
    if boundary and (with_mask or not counted):
        metrics |= coco_figures(match_results(ground_truth, with_mask, iou_types=("boundary",)))
    truths = [np.array([o.box for o in image.objects]).reshape(-1, 4) for image in seen.images]
    metrics |= proposal_recall(
        [proposals[i][0] for i in indices], truths, limit=config.model.rpn.proposals
    )
    return Evaluation(
        metrics,
        results,
        proposals,
        ground_truth,
        matches,
        found[shown(matches)],
        seen.file_ids,
    )
