"""Rows of images with one column a run: detections beside the ground truth, and proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mrcnn_jax.evaluation.proposals import recalled
from mrcnn_jax.figures.draw import (
    MISSED,
    PROPOSAL,
    RECALLED,
    Image,
    draw_instances,
    draw_proposals,
    side_by_side,
)
from mrcnn_jax.figures.png_pages import column_width, drawn_size, write_pages


def detections_figure(
    images: Sequence[Image],
    ground_truths: Sequence[Sequence[Mapping[str, Any]]],
    detections: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    class_names: Mapping[int, str],
    out_dir: Path,
    *,
    min_score: float = 0.5,
    rows: int = 3,
) -> list[Path]:
    """For each image a row: the ground truth left, right of it the detections with masks of each
    run.

    Args:
        images: uint8 RGB [H, W, 3] in original pixels.
        ground_truths: COCO annotations of each image.
        detections: title of a column -> COCO results of each image.
        class_names: category id -> name.
        out_dir: folder of the pages; made if need be.
        min_score: detections below it are not drawn.
        rows: images a page.

    Returns:
        The pages, `detections_1.png`, `detections_2.png`, ...
    """
    columns = 1 + len(detections)
    drawn = []
    for i, (image, truth) in enumerate(zip(images, ground_truths, strict=True)):
        shown = {
            title: [result for result in found[i] if result["score"] >= min_score]
            for title, found in detections.items()
        }
        titles = [f"ground truth ({len(truth)})"]
        titles += [
            f"{title}: score >= {min_score:g} ({len(found)})" for title, found in shown.items()
        ]
        size = drawn_size(image, columns)
        cells = [
            draw_instances(image, objects, class_names, size)
            for objects in (truth, *shown.values())
        ]
        drawn.append(side_by_side(cells, titles, column_width(columns)))
    return write_pages(drawn, out_dir, "detections", rows=rows)


def proposals_figure(
    images: Sequence[Image],
    proposals: Mapping[str, Sequence[tuple[Float[np.ndarray, "_ 4"], Float[np.ndarray, " _"]]]],
    ground_truths: Sequence[Float[np.ndarray, "_ 4"]],
    out_dir: Path,
    *,
    iou: float = 0.5,
) -> list[Path]:
    """The proposals of each run's RPN over each image, with the ground truth they reach (green) and
    miss (red).

    Args:
        images: uint8 RGB [H, W, 3] in original pixels.
        proposals: title of a column -> (boxes, scores) of each image: (x1, y1, x2, y2) in original
            pixels, best first (all are drawn), and their objectness in [0, 1].
        ground_truths: boxes (x1, y1, x2, y2) of each image in original pixels, crowds left out.
        out_dir: folder of the pages; made if need be.
        iou: overlap from which on a ground-truth box counts as reached.

    Returns:
        The pages, `proposals_1.png`, `proposals_2.png`, ...: a row an image; of one run two images
            a row.
    """
    columns = max(len(proposals), 2)
    drawn = []
    for i, (image, truth) in enumerate(zip(images, ground_truths, strict=True)):
        cells, titles = [], []
        for title, found in proposals.items():
            boxes, scores = found[i]
            hits = recalled(boxes, truth, iou=iou, limit=len(boxes))
            cells.append(
                draw_proposals(image, boxes, scores, truth, hits, drawn_size(image, columns))
            )
            titles.append(
                f"{title}: {len(boxes)} proposals, {hits.sum()} of {len(truth)} objects reached"
            )
        drawn.append(side_by_side(cells, titles, column_width(columns)))
    colors = {
        f"object reached (IoU >= {iou:g})": RECALLED,
        "object missed": MISSED,
        "proposal, the fainter the lower its score": PROPOSAL,
    }
    return write_pages(
        drawn, out_dir, "proposals", rows=3, columns=2 if len(proposals) == 1 else 1, colors=colors
    )
