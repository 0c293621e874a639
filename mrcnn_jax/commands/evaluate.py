"""Evaluation of a run on a COCO-format split: figures of merit, results and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mrcnn_jax import parallel
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import to_dict
from mrcnn_jax.data.loader import Split, open_split, plan_once
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.evaluation.average_precision import coco_figures, judge, table
from mrcnn_jax.evaluation.proposals import proposal_recall
from mrcnn_jax.figures.comparison import detections_figure, proposals_figure
from mrcnn_jax.figures.curves import curves
from mrcnn_jax.figures.page import render
from mrcnn_jax.figures.page.contents import report_data
from mrcnn_jax.figures.views import annotations_of, read_images, spread, truth_boxes
from mrcnn_jax.inference.predictor import Predictor, results_of_split
from mrcnn_jax.runs.checkpoints import Weights
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import Choice, Run, load_run, make_folder


def evaluate_weights(workdir: Path, *, checkpoint: Choice = "newest", **options: Any) -> None:
    """`evaluate_run` with its options, of a checkpoint's weights, and of their moving average if it
    holds one."""
    evaluate_run(workdir, checkpoint=checkpoint, **options)
    if load_run(workdir, checkpoint).has_average:
        evaluate_run(workdir, checkpoint=checkpoint, weights="ema", **options)


def evaluate_run(
    workdir: Path,
    *,
    split_name: Literal["train", "val"] = "val",
    limit: int | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    figures: int = 8,
    report_images: int = 60,
    boundary: bool = False,
    out: Path | None = None,
    checkpoint: Choice = "newest",
    weights: Weights = "raw",
) -> dict[str, float]:
    """COCO box and mask figures of a checkpoint of the run, on every image of a split exactly once,
    with all devices.

    Of several processes (`parallel.join`) each calls this, with the same arguments; the first one
    has the figures and writes, the others get {}.

    Args:
        workdir: the run's folder; config, categories and weights come from it.
        split_name: which of the run's own data sets.
        limit: only the first images.
        annotations, images: another data set, whose categories are the run's or some of them.
        figures: how many images are drawn.
        report_images: how many images report.html shows, half of them the worst and half the best.
        boundary: masks are judged by their boundaries too: `boundary/AP`, ...
            (evaluation.boundary).
        out: folder for metrics.json, detections.json, report.html and figures/; by default
            <workdir>/eval with the pictures in <workdir>/figures for the validation images, and
            <workdir>/eval_train for the training images. With the moving average its name ends in
            _ema.
        checkpoint, weights: which, as in `load_run`.

    Raises:
        ConfigError: no such checkpoint or weights, no such data, or a category that the run was not
            trained on.
    """
    run = load_run(workdir, checkpoint, weights)
    data = run.config.data
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit}: must be at least 1")
    if report_images < 0:
        raise ConfigError(f"--report-images: {report_images}: must be at least 0")
    split = open_data(run, workdir, split_name, annotations, images)
    json_path = split.dataset.annotations_path
    categories, known = (
        [(category.id, category.name) for category in split.dataset.categories],
        run.meta.categories,
    )
    shown = run.meta.name + (", moving average of its weights" if weights == "ema" else "")
    print(
        f"{workdir}: checkpoint {shown}"
        + ("" if run.meta.stage_complete else " (its stage is not complete)")
    )
    if len(categories) < len(known):
        print(
            f"{json_path} has {len(categories)} of the run's {len(known)} categories: detections of the others are not judged"
        )

    print("\n".join(split.dataset.report.lines()))
    # The run's own pictures are those of its own evaluation; any other has its pictures beside its
    # results.
    own = out is None and split_name == "val" and weights == "raw"
    out = out or workdir / ("eval" if split_name == "val" else f"eval_{split_name}")
    out = out if weights == "raw" else out.with_name(f"{out.name}_{weights}")
    folder = (workdir if own else out) / "figures"
    parallel.in_turn(lambda: make_folder(out) if parallel.is_first() else None)
    mesh = parallel.data_mesh()
    predictor = Predictor(run, mesh)
    # What is seen on an image does not depend on its batch: every device gets as many images as one
    # would.
    plan = plan_once(split, data.eval_batch_size * (1 if mesh is None else mesh.size), limit)
    results, proposals = results_of_split(predictor, split, plan)
    if not parallel.is_first():
        return {}
    seen = split.dataset.with_images([split.dataset.images[i] for i in sorted(proposals)])
    ground_truth = seen.to_coco()
    judged = {number for number, _ in categories}
    judged_results = [result for result in results if result["category_id"] in judged]
    evaluations = judge(ground_truth, judged_results)
    metrics = coco_figures(evaluations)
    if boundary:
        metrics |= coco_figures(judge(ground_truth, judged_results, iou_types=("boundary",)))
    truths = [
        np.array([o.box for o in image.objects if not o.iscrowd]).reshape(-1, 4)
        for image in seen.images
    ]
    metrics |= proposal_recall(
        [proposals[i][0] for i in sorted(proposals)], truths, limit=run.config.model.rpn.proposals
    )

    # Figures that stand for the checkpoint, as on its model card, are those of all of its own
    # validation images.
    whole = (
        {"checkpoint": run.meta.name}
        if split_name == "val" and annotations is None and limit is None
        else {}
    )
    (out / "metrics.json").write_text(json.dumps(whole | metrics, indent=2) + "\n")
    (out / "detections.json").write_text(json.dumps(results))
    print(
        f"{len(proposals)} images, {len(ground_truth['annotations'])} annotations, {len(results)} detections\n{table(metrics)}"
    )

    # Images from all over the split, easy and hard ones; those without objects show little.
    chosen = spread(
        [i for i in sorted(proposals) if split.dataset.images[i].objects] or sorted(proposals),
        figures,
    )
    pixels = read_images(split, chosen, data)
    seen_there = [
        [r for r in results if r["image_id"] == split.dataset.images[i].id] for i in chosen
    ]
    pages = detections_figure(
        pixels, annotations_of(split, chosen), {"detections": seen_there}, run.class_names, folder
    )
    pages += proposals_figure(
        pixels, {"RPN": [proposals[i] for i in chosen]}, truth_boxes(split, chosen), folder
    )
    # A run made of imported weights has no metrics.
    rows = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
    pages += curves(rows, folder)

    index = {image.id: i for i, image in enumerate(split.dataset.images)}
    report = report_data(
        evaluations,
        metrics,
        lambda image_id: read_images(split, [index[image_id]], data)[0],
        heading={
            "run": str(workdir),
            "checkpoint": shown,
            "data": str(split.dataset.annotations_path),
        },
        config=to_dict(run.config),
        rows=rows,
        images=report_images,
    )
    (out / "report.html").write_text(render(report), encoding="utf-8")
    print(
        f"results: {out / 'metrics.json'}, {out / 'detections.json'}\npictures: "
        + ", ".join(str(page) for page in pages)
    )
    print(f"page: {out / 'report.html'}")
    return metrics


def open_data(
    run: Run,
    workdir: Path,
    split_name: Literal["train", "val"],
    annotations: Path | None = None,
    images: Path | None = None,
) -> Split:
    """A split of the run's own data, or another data set whose categories are the run's or some of
    them; ConfigError if there is none."""
    data = run.config.data
    if (annotations is None) != (images is None):
        raise ConfigError("--annotations and --images go together")
    json_path = annotations or Path(getattr(data, f"{split_name}_annotations"))
    images_path = images or Path(getattr(data, f"{split_name}_images"))
    if (
        not json_path.is_absolute() and annotations is None
    ):  # a run that was trained keeps where its data was
        raise ConfigError(
            f"{workdir}: its config names no data set: give --annotations and --images"
        )
    cache = Path(data.cache) if data.cache else workdir / "data"
    expected = (
        data if annotations is None else replace(data, class_names=())
    )  # which may be some of the run's
    split = parallel.in_turn(
        lambda: open_split(
            split_name, read_coco(json_path, images_path, expected), cache=cache, data=expected
        )
    )
    categories, known = (
        [(category.id, category.name) for category in split.dataset.categories],
        run.meta.categories,
    )
    unknown = [
        f"{number} {name!r} (there {run.class_names.get(number)!r})"
        for number, name in categories
        if (number, name) not in known
    ]
    if unknown:
        raise ConfigError(
            f"{json_path}: categories that the run does not have: {', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}"
        )
    return split
