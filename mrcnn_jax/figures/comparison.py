"""Runs side by side on the same images: their detections, and the proposals of their RPNs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mrcnn_jax.evaluation.average_precision import mask_score
from mrcnn_jax.evaluation.proposals import recalled
from mrcnn_jax.figures.draw import (
    MISSED,
    PROPOSAL,
    RECALLED,
    Image,
    draw_instances,
    draw_proposals,
)
from mrcnn_jax.figures.png_pages import drawn_size, row_of_columns, write_pages

MIN_SCORE = 0.5  # detections below it are not drawn
IOU = 0.5  # least overlap of a proposal with an object that it reaches


def detections_figure(
    images: Sequence[Image],
    ground_truths: Sequence[Sequence[Mapping[str, Any]]],
    detections: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    class_names: Mapping[int, str],
    out_dir: Path,
) -> list[Path]:
    """Draw a row for each image: the ground truth, then the detections and masks of each run.

    Args:
        images: uint8 RGB [H, W, 3] in original pixels.
        ground_truths: COCO annotations of each image.
        detections: title of a column -> COCO results of each image, of which those with a score
            of MIN_SCORE or more are drawn.
        class_names: category id -> name.
        out_dir: folder of the pages, created if need be.

    Returns:
        The pages, `detections_1.png`, `detections_2.png`, ...
    """
    columns = 1 + len(detections)
    drawn = []
    for i, (image, truth) in enumerate(zip(images, ground_truths, strict=True)):
        shown = {f"ground truth ({len(truth)})": truth}
        for title, results in detections.items():
            found = [result for result in results[i] if mask_score(result) >= MIN_SCORE]
            shown[f"{title}: score >= {MIN_SCORE:g} ({len(found)})"] = found
        size = drawn_size(image, columns)
        cells = [
            draw_instances(image, objects, class_names, size, min_score=0)
            for objects in shown.values()
        ]
        drawn.append(row_of_columns(cells, list(shown), columns))
    return write_pages(drawn, out_dir, "detections", rows=3)


def proposals_figure(
    images: Sequence[Image],
    proposals: Mapping[str, Sequence[tuple[Float[np.ndarray, "_ 4"], Float[np.ndarray, " _"]]]],
    ground_truths: Sequence[Float[np.ndarray, "_ 4"]],
    out_dir: Path,
) -> list[Path]:
    """Draw each run's proposals over each image; objects they reach are green, others are red.

    Args:
        images: uint8 RGB [H, W, 3] in original pixels.
        proposals: title of a column -> (boxes, scores) of each image: (x1, y1, x2, y2) in original
            pixels, best first, all of which are drawn, and their objectness in [0, 1].
        ground_truths: boxes (x1, y1, x2, y2) of each image in original pixels, without crowds.
        out_dir: folder of the pages, created if need be.

    Returns:
        The pages, `proposals_1.png`, `proposals_2.png`, ...: a row holds one image, or two if there
        is one run.
    """
    columns = max(len(proposals), 2)
    drawn = []
    for i, (image, truth) in enumerate(zip(images, ground_truths, strict=True)):
        cells, titles = [], []
        for title, found in proposals.items():
            boxes, scores = found[i]
            hits = recalled(boxes, truth, iou=IOU, limit=len(boxes))
            cells.append(
                draw_proposals(image, boxes, scores, truth, hits, drawn_size(image, columns))
            )
            titles.append(
                f"{title}: {len(boxes)} proposals, {hits.sum()} of {len(truth)} objects reached"
            )
        drawn.append(row_of_columns(cells, titles, columns))
    colors = {
        f"object reached (IoU >= {IOU:g})": RECALLED,
        "object missed": MISSED,
        "proposal, the fainter the lower its score": PROPOSAL,
    }
    return write_pages(
        drawn, out_dir, "proposals", rows=3, columns=2 if len(proposals) == 1 else 1, colors=colors
    )
